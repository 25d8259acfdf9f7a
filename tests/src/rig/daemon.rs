//! The novastor under test: its daemon as a child process, and its command line.
//!
//! ```text
//!   Daemon::new ─▶ folder with novastor.toml, pool/, data/
//!      start    ─▶ novastor serve --config …   waits for `ready` on its output
//!      cli(…)   ─▶ novastor …                  against this daemon's admin socket
//!      stop (SIGTERM, must drain) · kill (SIGKILL) · start again: the folder stays
//! ```

use crate::rig::console::{Console, Position};
use crate::rig::deadline::Deadline;
use crate::rig::metrics::Metrics;
use crate::rig::process::{Running, capture, run};
use crate::rig::{scratch, tools};
use anyhow::{Context, Result, bail};
use rustix::process::Signal;
use serde_json::Value;
use std::env;
use std::ffi::OsStr;
use std::fs;
use std::io::{Read, Write};
use std::net::TcpStream;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::time::Duration;
use tempfile::TempDir;

/// For starting, draining, and one command: far more than they take.
const LIMIT: Duration = Duration::from_secs(60);

/// The binary under test: `$NOVASTOR_BIN`, or the one built beside the running test.
pub fn binary() -> Result<PathBuf> {
    if let Some(path) = env::var_os("NOVASTOR_BIN") {
        return Ok(path.into());
    }
    // A test runs as <target>/<profile>/deps/<test>.
    let test = env::current_exe().context("finding this test's own path")?;
    let profile = test.ancestors().find(|folder| folder.ends_with("deps")).and_then(Path::parent);
    let binary = profile.map(|folder| folder.join("novastor"));
    match binary.filter(|path| path.exists()) {
        Some(path) => Ok(path),
        None => bail!("no novastor binary beside {}: run `cargo build -p novastor`", test.display()),
    }
}

#[derive(Debug)]
pub struct Daemon {
    process: Option<Running>,
    log: Console,
    sockets: TempDir,
    disk: TempDir,
    environment: Vec<(String, String)>,
    launcher: Vec<String>,
}

impl Daemon {
    /// Prepares a daemon with one file pool `local` on the workspace's disk. `extra` is appended to the
    /// configuration; `{dir}` in it stands for [`Daemon::folder`].
    pub fn new(extra: &str) -> Result<Self> {
        let (sockets, disk) = (scratch::short_dir()?, scratch::disk_dir()?);
        let configuration = format!(
            "[daemon]\ndata_dir = \"{disk}/data\"\nadmin = \"unix:{dir}/admin.sock\"\n\
             metrics = \"127.0.0.1:0\"\nnbd = [\"unix:{dir}/nbd.sock\"]\nnode = \"test\"\n\n\
             [pool.local]\ndriver = \"file\"\npath = \"{disk}/pool\"\n\n{extra}\n",
            dir = sockets.path().display(),
            disk = disk.path().display(),
        );
        Self::with_configuration(sockets, disk, &configuration)
    }

    /// Prepares a daemon with this whole configuration; `{dir}` stands for [`Daemon::folder`] and `{disk}`
    /// for [`Daemon::disk`].
    pub fn configured(configuration: &str) -> Result<Self> {
        Self::with_configuration(scratch::short_dir()?, scratch::disk_dir()?, configuration)
    }

    fn with_configuration(sockets: TempDir, disk: TempDir, configuration: &str) -> Result<Self> {
        for name in ["data", "pool"] {
            fs::create_dir(disk.path().join(name))?;
        }
        let daemon = Self { process: None, log: Console::new(), sockets, disk, environment: Vec::new(), launcher: Vec::new() };
        daemon.configure(configuration)?;
        Ok(daemon)
    }

    /// Replaces the configuration; it counts from the next start or reload.
    pub fn configure(&self, configuration: &str) -> Result<()> {
        let text = configuration
            .replace("{dir}", &self.folder().display().to_string())
            .replace("{disk}", &self.disk().display().to_string());
        fs::write(self.config_file(), text).with_context(|| format!("writing {}", self.config_file().display()))
    }

    /// Sets an environment variable for the next start.
    pub fn set_env(&mut self, name: &str, value: &str) {
        self.environment.push((name.to_owned(), value.to_owned()));
    }

    /// Starts through another program from now on: its arguments are followed by the daemon's own command line.
    pub fn set_launcher<S: Into<String>>(&mut self, words: impl IntoIterator<Item = S>) {
        self.launcher = words.into_iter().map(Into::into).collect();
    }

    /// A folder with a short path, for sockets.
    pub fn folder(&self) -> &Path {
        self.sockets.path()
    }

    /// A folder on the workspace's disk, with `pool` and `data` in it.
    pub fn disk(&self) -> &Path {
        self.disk.path()
    }

    pub fn config_file(&self) -> PathBuf {
        self.folder().join("novastor.toml")
    }

    pub fn nbd_socket(&self) -> PathBuf {
        self.folder().join("nbd.sock")
    }

    /// The URI of a volume on the shared NBD socket.
    pub fn nbd_uri(&self, volume: &str) -> String {
        format!("nbd+unix:///{volume}?socket={}", self.nbd_socket().display())
    }

    /// Starts the daemon and waits until its exports accept.
    pub fn start(&mut self) -> Result<()> {
        if self.process.is_some() {
            bail!("the daemon runs already");
        }
        let mut command = match self.launcher.split_first() {
            Some((program, arguments)) => {
                let mut launcher = Command::new(program);
                launcher.args(arguments).arg(binary()?);
                launcher
            }
            None => Command::new(binary()?),
        };
        command.arg("serve").arg("--config").arg(self.config_file()).current_dir(self.folder());
        command.envs(self.environment.iter().cloned());
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut process = Running::spawn("novastor", &mut command)?;
        self.log = Console::new();
        let ready = Console::new();
        ready.attach(process.child.stdout.take().context("the daemon's output")?);
        self.log.attach(process.child.stderr.take().context("the daemon's error output")?);
        let is_ready = |line: &str| (line.trim() == "ready").then_some(());
        ready
            .wait_for(&mut Position::default(), "`ready` from the daemon", LIMIT, is_ready)
            .with_context(|| format!("the daemon's log ends with\n{}", self.log.tail()))?;
        self.process = Some(process);
        Ok(())
    }

    fn process(&mut self) -> Result<&mut Running> {
        self.process.as_mut().context("the daemon does not run")
    }

    pub fn id(&mut self) -> Result<u32> {
        Ok(self.process()?.id())
    }

    /// Fails, with the log, if the daemon has ended by itself.
    pub fn check_alive(&mut self) -> Result<()> {
        match self.process()?.has_ended()? {
            None => Ok(()),
            Some(status) => bail!("the daemon ended with {status}; its log ends with\n{}", self.log.tail()),
        }
    }

    /// SIGTERM; the daemon must drain and end with status 0.
    pub fn stop(&mut self) -> Result<()> {
        let mut process = self.process.take().context("the daemon does not run")?;
        let status = process.terminate(LIMIT)?;
        if !status.success() {
            bail!("the daemon ended with {status} on SIGTERM; its log ends with\n{}", self.log.tail());
        }
        Ok(())
    }

    /// Kills the daemon as a crash would.
    pub fn kill(&mut self) -> Result<()> {
        self.process.take().context("the daemon does not run")?.kill()
    }

    pub fn restart(&mut self) -> Result<()> {
        self.stop()?;
        self.start()
    }

    pub fn signal(&mut self, signal: Signal) -> Result<()> {
        self.process()?.signal(signal)
    }

    /// What the daemon has logged since it last started.
    pub fn log(&self) -> String {
        self.log.text()
    }

    /// Creates a raw volume, in the pool `local` if the name tells no other.
    pub fn create_volume(&self, name: &str, size: &str) -> Result<()> {
        self.cli(["volume", "create", name, "--size", size, "--layout", "raw"])?;
        Ok(())
    }

    /// Creates a mapped volume, in the pool `local` if the name tells no other.
    pub fn create_mapped_volume(&self, name: &str, size: &str) -> Result<()> {
        self.cli(["volume", "create", name, "--size", size, "--layout", "mapped"])?;
        Ok(())
    }

    /// Exports a volume on a vhost-user socket of its own, and returns the socket.
    pub fn export_vhost_user(&self, volume: &str) -> Result<PathBuf> {
        let socket = self.folder().join(format!("{}.sock", volume.replace('/', "-")));
        self.cli(["export", "add", volume, "--vhost-user", &socket.display().to_string()])?;
        Ok(socket)
    }

    /// Exports a volume on the shared NBD socket, and returns its URI.
    pub fn export_nbd(&self, volume: &str) -> Result<String> {
        self.cli(["export", "add", volume, "--nbd"])?;
        Ok(self.nbd_uri(volume))
    }

    /// A file with what a volume or snapshot holds, copied through an export of its own.
    pub fn copy_of(&self, name: &str) -> Result<PathBuf> {
        let read_only: &[&str] = if name.contains('@') { &["--read-only"] } else { &[] };
        let socket = format!("--nbd=unix:{}", self.folder().join("copy.sock").display());
        let export = self.json([&["export", "add", name, &socket], read_only].concat())?;
        let uri = export["uris"][0].as_str().context("the export's URI")?;
        let file = self.disk().join(format!("copy of {}", name.replace('/', " ")));
        run(Command::new(tools::require("nbdcopy")?).arg(uri).arg(&file), LIMIT)?;
        self.cli(["export", "remove", export["id"].as_str().context("the export's id")?])?;
        Ok(file)
    }

    /// What a volume or snapshot holds.
    pub fn contents(&self, name: &str) -> Result<Vec<u8>> {
        let file = self.copy_of(name)?;
        let contents = fs::read(&file).with_context(|| format!("reading {}", file.display()))?;
        fs::remove_file(&file)?;
        Ok(contents)
    }

    /// Removes every export.
    pub fn remove_exports(&self) -> Result<()> {
        for export in self.json(["export", "list"])?.as_array().context("a list of exports")? {
            self.cli(["export", "remove", export["id"].as_str().context("an export's id")?])?;
        }
        Ok(())
    }

    /// Waits until every export is served: the daemon says `ready` without those whose volumes take long to open.
    pub fn wait_until_served(&self) -> Result<()> {
        self.wait_for_all("export", "ready")
    }

    /// Waits until every pool is open: the daemon says `ready` without those that take long.
    pub fn wait_for_pools(&self) -> Result<()> {
        self.wait_for_all("pool", "ok")
    }

    fn wait_for_all(&self, what: &str, state: &str) -> Result<()> {
        let deadline = Deadline::after(LIMIT);
        loop {
            let listed = self.json([what, "list"])?;
            if listed.as_array().is_some_and(|listed| listed.iter().all(|one| one[state] == true)) {
                return Ok(());
            }
            if !deadline.pause() {
                bail!("not every {what} is {state}: {listed}; the daemon's log ends with\n{}", self.log.tail());
            }
        }
    }

    /// What Prometheus would scrape, from the metrics endpoint of its own.
    pub fn metrics(&self) -> Result<Metrics> {
        let admin = UnixStream::connect(self.folder().join("admin.sock")).context("the admin socket")?;
        let status: Value = serde_json::from_str(&http_get(admin, "/v1/status")?).context("the daemon's status")?;
        let address = status["metrics"].as_str().context("the daemon serves no metrics")?;
        let stream = TcpStream::connect(address).with_context(|| format!("connecting to {address}"))?;
        Ok(Metrics::new(http_get(stream, "/metrics")?))
    }

    /// `novastor ARGUMENTS` against this daemon, to be run.
    pub fn command<S: AsRef<OsStr>>(&self, arguments: impl IntoIterator<Item = S>) -> Result<Command> {
        let mut command = Command::new(binary()?);
        command.env("NOVASTOR_ADMIN", format!("unix:{}", self.folder().join("admin.sock").display()));
        command.args(arguments).current_dir(self.folder());
        Ok(command)
    }

    /// Runs `novastor ARGUMENTS` against this daemon, whatever comes of it.
    pub fn try_cli<S: AsRef<OsStr>>(&self, arguments: impl IntoIterator<Item = S>) -> Result<Output> {
        capture(&mut self.command(arguments)?, LIMIT)
    }

    /// Runs `novastor ARGUMENTS`, which must succeed, and returns its output.
    pub fn cli<S: AsRef<OsStr>>(&self, arguments: impl IntoIterator<Item = S>) -> Result<String> {
        let arguments: Vec<S> = arguments.into_iter().collect();
        let shown: Vec<_> = arguments.iter().map(|argument| argument.as_ref().to_string_lossy()).collect();
        let shown = format!("novastor {}", shown.join(" "));
        let output = self.try_cli(arguments)?;
        if !output.status.success() {
            let error = String::from_utf8_lossy(&output.stderr);
            bail!("{shown} failed ({}): {error}; the daemon's log ends with\n{}", output.status, self.log.tail());
        }
        String::from_utf8(output.stdout).with_context(|| format!("the output of {shown}"))
    }

    /// Runs `novastor ARGUMENTS --json` and parses what it prints.
    pub fn json<S: AsRef<OsStr>>(&self, arguments: impl IntoIterator<Item = S>) -> Result<Value> {
        let arguments = arguments.into_iter().map(|argument| argument.as_ref().to_owned());
        let output = self.cli(arguments.chain([OsStr::new("--json").to_owned()]))?;
        serde_json::from_str(&output).with_context(|| format!("novastor printed no JSON: {output:?}"))
    }
}

/// The body of an HTTP answer, which must be a success.
fn http_get(mut stream: impl Read + Write, path: &str) -> Result<String> {
    write!(stream, "GET {path} HTTP/1.0\r\nHost: localhost\r\n\r\n").with_context(|| format!("asking for {path}"))?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer).with_context(|| format!("the answer to {path}"))?;
    match answer.split_once("\r\n\r\n") {
        Some((head, body)) if head.lines().next().is_some_and(|status| status.contains(" 200 ")) => Ok(body.to_owned()),
        _ => bail!("{path} was answered with {answer:?}"),
    }
}
