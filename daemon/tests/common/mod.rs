//! The real binary in a temporary folder, and the smallest NBD client that can tell what it serves.

#![allow(dead_code, reason = "each test file uses a part of it")]

use std::collections::BTreeMap;
use std::fs;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpStream;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::sync::mpsc;
use std::time::Duration;

use serde_json::Value;
use tempfile::TempDir;

/// Against hanging; everything takes far less.
const LIMIT: Duration = Duration::from_secs(60);

pub struct Daemon {
    folder: TempDir,
    environment: BTreeMap<String, String>,
    child: Option<Child>,
}

impl Daemon {
    /// A folder with a configuration of one file pool; `extra` is appended, with `{dir}` replaced.
    pub fn new(extra: &str) -> Daemon {
        let daemon = Daemon { folder: tempfile::tempdir().unwrap(), environment: BTreeMap::new(), child: None };
        let text = format!(
            "[daemon]\ndata_dir = \"{{dir}}/data\"\nadmin = \"unix:{{dir}}/admin.sock\"\nmetrics = \"127.0.0.1:0\"\n\
             nbd = [\"unix:{{dir}}/nbd.sock\"]\nnode = \"test\"\n\n[pool.local]\ndriver = \"file\"\npath = \"{{dir}}/pool\"\n\n\
             [pool.memory]\ndriver = \"memory\"\n\n{extra}\n"
        );
        daemon.configure(&text);
        daemon
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    pub fn config(&self) -> String {
        fs::read_to_string(self.path("novastor.toml")).unwrap()
    }

    pub fn configure(&self, text: &str) {
        let text = text.replace("{dir}", &self.folder.path().display().to_string());
        fs::write(self.path("novastor.toml"), text).unwrap();
    }

    /// What it finds in its environment from the next start on, beside what this process has.
    pub fn set_environment(&mut self, variables: &[(&str, &str)]) {
        self.environment = variables.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())).collect();
    }

    /// Starts it and waits for `ready`.
    pub fn start(&mut self) {
        let child = self.spawn().unwrap_or_else(|log| panic!("the daemon did not start:\n{log}"));
        self.child = Some(child);
    }

    /// Starts it; its error output if it ends instead of saying `ready`.
    pub fn spawn(&self) -> Result<Child, String> {
        let log = fs::File::create(self.path("log")).unwrap();
        let mut child = command()
            .arg("serve")
            .arg("--config")
            .arg(self.path("novastor.toml"))
            .current_dir(self.folder.path())
            .envs(&self.environment)
            .stdout(Stdio::piped())
            .stderr(log)
            .spawn()
            .unwrap();
        let output = child.stdout.take().unwrap();
        let (sender, receiver) = mpsc::channel();
        std::thread::spawn(move || {
            for line in BufReader::new(output).lines().map_while(Result::ok) {
                let _ = sender.send(line);
            }
        });
        match receiver.recv_timeout(LIMIT) {
            Ok(line) if line == "ready" => Ok(child),
            Err(mpsc::RecvTimeoutError::Timeout) => {
                let _ = child.kill();
                panic!("the daemon neither got ready nor ended:\n{}", self.log())
            }
            other => {
                let status = child.wait().unwrap();
                assert!(!status.success(), "the daemon said {other:?} and ended well");
                Err(self.log())
            }
        }
    }

    pub fn log(&self) -> String {
        fs::read_to_string(self.path("log")).unwrap_or_default()
    }

    pub fn signal(&self, signal: rustix::process::Signal) {
        let child = self.child.as_ref().unwrap();
        rustix::process::kill_process(rustix::process::Pid::from_child(child), signal).unwrap();
    }

    /// SIGTERM; it must end by itself, with status 0.
    pub fn stop(&mut self) {
        self.signal(rustix::process::Signal::TERM);
        let mut child = self.child.take().unwrap();
        assert!(wait(&mut child).success(), "{}", self.log());
    }

    /// SIGKILL.
    pub fn kill(&mut self) {
        let mut child = self.child.take().unwrap();
        child.kill().unwrap();
        child.wait().unwrap();
    }

    pub fn is_alive(&mut self) -> bool {
        self.child.as_mut().unwrap().try_wait().unwrap().is_none()
    }

    /// Runs a command against this daemon.
    pub fn run(&self, arguments: &[&str]) -> Output {
        let admin = format!("unix:{}", self.path("admin.sock").display());
        command().env("NOVASTOR_ADMIN", admin).args(arguments).current_dir(self.folder.path()).output().unwrap()
    }

    /// It must succeed; its output as JSON.
    pub fn json(&self, arguments: &[&str]) -> Value {
        let output = self.run(&[arguments, &["--json"]].concat());
        let (out, err) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
        assert!(output.status.success(), "{arguments:?}: {err}\n{}", self.log());
        serde_json::from_str(&out).unwrap_or_else(|error| panic!("{arguments:?}: {error}: {out}"))
    }

    /// It must fail with status 1; the error it prints as JSON.
    pub fn refused(&self, arguments: &[&str]) -> (String, String) {
        let output = self.run(&[arguments, &["--json"]].concat());
        let text = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(1), "{arguments:?}: {text}");
        let error: Value = serde_json::from_str(&text).unwrap_or_else(|error| panic!("{arguments:?}: {error}: {text}"));
        let field = |name: &str| error["error"][name].as_str().unwrap().to_owned();
        (field("kind"), field("message"))
    }

    /// Attaches to an export of the shared unix listener.
    pub fn attach(&self, export: &str) -> Nbd<UnixStream> {
        Nbd::attach(UnixStream::connect(self.path("nbd.sock")).unwrap(), export).expect("the export exists")
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        if let Some(mut child) = self.child.take() {
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

pub fn command() -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_novastor"));
    command.stdin(Stdio::null()).env_remove("NOVASTOR_ADMIN");
    command
}

/// Waits for its end, for at most [`LIMIT`].
pub fn wait(child: &mut Child) -> std::process::ExitStatus {
    for _ in 0..LIMIT.as_millis() / 10 {
        if let Some(status) = child.try_wait().unwrap() {
            return status;
        }
        std::thread::sleep(Duration::from_millis(10));
    }
    let _ = child.kill();
    panic!("it did not end")
}

/// Tries until `done`, for at most [`LIMIT`].
pub fn eventually(what: &str, mut done: impl FnMut() -> bool) {
    for _ in 0..LIMIT.as_millis() / 20 {
        if done() {
            return;
        }
        std::thread::sleep(Duration::from_millis(20));
    }
    panic!("{what}: it never happened");
}

pub trait Stream: Read + Write {
    fn limit(&self);
}

impl Stream for UnixStream {
    fn limit(&self) {
        self.set_read_timeout(Some(LIMIT)).unwrap();
    }
}

impl Stream for TcpStream {
    fn limit(&self) {
        self.set_read_timeout(Some(LIMIT)).unwrap();
    }
}

/// A client in the transmission phase, one request at a time, with simple replies.
pub struct Nbd<S> {
    stream: S,
    pub size: u64,
    pub flags: u16,
}

const READ: u16 = 0;
const WRITE: u16 = 1;
const FLUSH: u16 = 3;

impl<S: Stream> Nbd<S> {
    /// Chooses `export`; `None` if the server refuses it.
    pub fn attach(mut stream: S, export: &str) -> Option<Nbd<S>> {
        stream.limit();
        let mut greeting = [0; 18];
        stream.read_exact(&mut greeting).unwrap();
        assert_eq!(&greeting[..16], b"NBDMAGICIHAVEOPT");
        // Fixed newstyle, no zeroes; then GO, without information requests.
        stream.write_all(&3u32.to_be_bytes()).unwrap();
        let mut option = b"IHAVEOPT".to_vec();
        option.extend(7u32.to_be_bytes());
        option.extend((export.len() as u32 + 6).to_be_bytes());
        option.extend((export.len() as u32).to_be_bytes());
        option.extend(export.as_bytes());
        option.extend(0u16.to_be_bytes());
        stream.write_all(&option).unwrap();
        let (mut size, mut flags) = (0, 0);
        loop {
            let mut head = [0; 20];
            stream.read_exact(&mut head).unwrap();
            let kind = u32::from_be_bytes(head[12..16].try_into().unwrap());
            let mut body = vec![0; u32::from_be_bytes(head[16..20].try_into().unwrap()) as usize];
            stream.read_exact(&mut body).unwrap();
            match kind {
                1 => return Some(Nbd { stream, size, flags }),
                3 if body[..2] == [0, 0] => {
                    size = u64::from_be_bytes(body[2..10].try_into().unwrap());
                    flags = u16::from_be_bytes(body[10..12].try_into().unwrap());
                }
                3 => {}
                _ => return None,
            }
        }
    }

    fn request(&mut self, kind: u16, offset: u64, len: u32, data: &[u8]) -> u32 {
        let mut request = 0x2560_9513u32.to_be_bytes().to_vec();
        request.extend(0u16.to_be_bytes());
        request.extend(kind.to_be_bytes());
        request.extend(7u64.to_be_bytes());
        request.extend(offset.to_be_bytes());
        request.extend(len.to_be_bytes());
        request.extend(data);
        self.stream.write_all(&request).unwrap();
        let mut reply = [0; 16];
        self.stream.read_exact(&mut reply).unwrap();
        assert_eq!(reply[..4], 0x6744_6698u32.to_be_bytes());
        u32::from_be_bytes(reply[4..8].try_into().unwrap())
    }

    /// The NBD error number, 0 for success.
    pub fn write(&mut self, offset: u64, data: &[u8]) -> u32 {
        self.request(WRITE, offset, data.len() as u32, data)
    }

    pub fn flush(&mut self) -> u32 {
        self.request(FLUSH, 0, 0, &[])
    }

    pub fn read(&mut self, offset: u64, len: u32) -> Vec<u8> {
        assert_eq!(self.request(READ, offset, len, &[]), 0);
        let mut data = vec![0; len as usize];
        self.stream.read_exact(&mut data).unwrap();
        data
    }

    /// True once the server has closed the connection.
    pub fn is_closed(&mut self) -> bool {
        matches!(self.stream.read(&mut [0; 1]), Ok(0) | Err(_))
    }
}

/// One GET of plain HTTP.
pub fn http_get(address: &str, path: &str, headers: &str) -> (u16, String) {
    let mut stream = TcpStream::connect(address).unwrap();
    stream.limit();
    write!(stream, "GET {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n{headers}\r\n").unwrap();
    let mut text = String::new();
    stream.read_to_string(&mut text).unwrap();
    let status = text.split(' ').nth(1).unwrap().parse().unwrap();
    (status, text.split_once("\r\n\r\n").unwrap().1.to_owned())
}

pub fn exists(path: &Path) -> bool {
    fs::symlink_metadata(path).is_ok()
}
