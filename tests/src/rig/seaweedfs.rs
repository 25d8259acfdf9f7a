//! SeaweedFS: an S3 server on loopback, all of it in one process.
//!
//! ```text
//!   Seaweedfs::start ─▶ weed server: master, volume, filer, S3 gateway ─▶ bucket()      usable after about four seconds
//! ```
//!
//! Dropping it kills the server, and its data goes. It knows one user, who may do everything.

use crate::rig::deadline::Deadline;
use crate::rig::process::Running;
use crate::rig::scratch::{self, rig_dir};
use anyhow::{Context, Result, bail};
use std::fs::{self, File};
use std::io::{ErrorKind, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::time::Duration;
use tempfile::TempDir;

pub const ACCESS_KEY: &str = "tester";
pub const SECRET_KEY: &str = "secret-of-tester";
const LIMIT: Duration = Duration::from_secs(120);
const REPLY_LIMIT: Duration = Duration::from_secs(10);

#[derive(Debug)]
pub struct Seaweedfs {
    server: Running,
    filer: SocketAddr,
    s3: SocketAddr,
    folder: TempDir,
}

/// Where `cargo xtask rig install s3` puts the program.
pub fn expected_program() -> PathBuf {
    rig_dir().join("seaweedfs/weed")
}

impl Seaweedfs {
    pub fn start() -> Result<Self> {
        let program = expected_program();
        if !program.is_file() {
            bail!("{} is missing: run `cargo xtask rig install s3`", program.display());
        }
        let folder = scratch::short_dir()?;
        let [master, volume, filer, s3, master_grpc, volume_grpc, filer_grpc, s3_grpc] = free_ports()?;
        let path = folder.path();
        fs::create_dir(path.join("data"))?;
        fs::write(path.join("s3.json"), identities())?;
        let mut command = Command::new(program);
        command.current_dir(path).args(["-logtostderr=true", "server", "-ip=127.0.0.1", "-ip.bind=127.0.0.1", "-dir=data"]);
        // Otherwise it reports to its makers.
        command.arg("-master.telemetry=false");
        command.args(["-master.electionTimeout=1s", "-master.volumeSizeLimitMB=256", "-volume.max=50"]);
        command.args(["-volume.preStopSeconds=0", "-volume.minFreeSpace=1GiB", "-filer", "-s3", "-s3.config=s3.json"]);
        // Listeners at fixed addresses, which a second server would miss.
        command.args(["-s3.port.iceberg=0", "-s3.port.lance=0", "-filer.localSocket=filer.sock"]);
        let ports = [("master.port", master), ("volume.port", volume), ("filer.port", filer), ("s3.port", s3)];
        let grpc = [("master", master_grpc), ("volume", volume_grpc), ("filer", filer_grpc), ("s3", s3_grpc)];
        command.args(ports.map(|(name, port)| format!("-{name}={port}")));
        command.args(grpc.map(|(name, port)| format!("-{name}.port.grpc={port}")));
        let log = File::create(path.join("log"))?;
        command.stdin(Stdio::null()).stdout(log.try_clone()?).stderr(log);
        let server = Running::spawn("weed server", &mut command)?;
        let [filer, s3] = [filer, s3].map(|port| SocketAddr::from(([127, 0, 0, 1], port)));
        let mut started = Self { server, filer, s3, folder };
        started.wait_until_ready()?;
        Ok(started)
    }

    /// Where S3 is served, without TLS.
    pub fn address(&self) -> SocketAddr {
        self.s3
    }

    /// Makes a bucket.
    pub fn make_bucket(&self, name: &str) -> Result<()> {
        let deadline = Deadline::after(LIMIT);
        loop {
            let status = ask(self.filer, "POST", &format!("/buckets/{name}/"));
            if let Ok(200..=299) = status {
                return Ok(());
            }
            if !deadline.pause() {
                bail!("the bucket {name} cannot be made: {status:?}\n{}", self.log());
            }
        }
    }

    fn wait_until_ready(&mut self) -> Result<()> {
        let deadline = Deadline::after(LIMIT);
        loop {
            let status = ask(self.s3, "GET", "/healthz");
            if let Ok(200) = status {
                return Ok(());
            }
            if let Some(ended) = self.server.has_ended()? {
                bail!("weed ended ({ended}):\n{}", self.log());
            }
            if !deadline.pause() {
                bail!("weed does not serve S3: {status:?}\n{}", self.log());
            }
        }
    }

    /// The end of its log, for an error.
    fn log(&self) -> String {
        let text = fs::read_to_string(self.folder.path().join("log")).unwrap_or_default();
        let lines: Vec<&str> = text.lines().rev().take(30).collect();
        lines.into_iter().rev().collect::<Vec<_>>().join("\n")
    }
}

fn identities() -> String {
    let credentials = format!(r#"[{{"accessKey":"{ACCESS_KEY}","secretKey":"{SECRET_KEY}"}}]"#);
    let actions = r#"["Admin","Read","Write","List","Tagging"]"#;
    format!(r#"{{"identities":[{{"name":"tester","credentials":{credentials},"actions":{actions}}}]}}"#)
}

/// Free ports, all different. Another process may take one before the server does; the server then says so.
fn free_ports<const COUNT: usize>() -> Result<[u16; COUNT]> {
    let listeners: Vec<TcpListener> = (0..COUNT).map(|_| TcpListener::bind("127.0.0.1:0")).collect::<Result<_, _>>()?;
    let mut ports = [0; COUNT];
    for (port, listener) in ports.iter_mut().zip(&listeners) {
        *port = listener.local_addr()?.port();
    }
    Ok(ports)
}

/// The status of the answer to a request without a body.
fn ask(server: SocketAddr, method: &str, path: &str) -> Result<u16> {
    let mut stream = TcpStream::connect(server)?;
    stream.set_read_timeout(Some(REPLY_LIMIT))?;
    write!(stream, "{method} {path} HTTP/1.1\r\nHost: {server}\r\nContent-Length: 0\r\nConnection: close\r\n\r\n")?;
    let mut answer = [0; 12];
    stream.read_exact(&mut answer).or_else(|error| match error.kind() {
        ErrorKind::UnexpectedEof => Ok(()),
        _ => Err(error),
    })?;
    let text = String::from_utf8_lossy(&answer);
    let status = text.split(' ').nth(1).context("no HTTP answer")?;
    status.parse().with_context(|| format!("{text:?} is no HTTP answer"))
}
