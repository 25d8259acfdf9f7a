//! Novastor as a user would run it: a configuration file, `serve`, and the command line client for volumes and exports.

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result};

use super::process::{self, Running};
use super::rows::{Protocol, Row};
use super::{NULL_BYTES, Options, Workspace};

pub const NAME: &str = "novastor";
pub const POOL: &str = "bench";
/// The policy of volumes whose data is stored as it is.
pub const UNREDUCED: &str = "unreduced";
/// Of a mapped volume.
pub const LOG_BYTES: u64 = 4 << 30;
const VOLUME: &str = "disk";
const THREADS: usize = 2;

pub fn start(row: &Row, options: &Options, workspace: &Workspace) -> Result<Running> {
    let daemon = Daemon::new(options, &workspace.run.join(NAME))?;
    let file = workspace.file(row.backing);
    let mut running = daemon.serve(if file.is_some() { "file" } else { "null" })?;
    match file {
        None => daemon.client(&["volume", "create", VOLUME, "--pool", POOL, "--size", &NULL_BYTES.to_string()])?,
        Some(file) => daemon.client(&["volume", "adopt", &format!("{POOL}/{}", file.display()), VOLUME])?,
    }
    match row.protocol {
        Protocol::VhostUser { .. } => {
            running.socket = daemon.folder.join("disk.sock");
            daemon.export_vhost_user(VOLUME, &running.socket)?;
        }
        Protocol::Nbd { .. } => daemon.client(&["export", "add", VOLUME, "--nbd"])?,
    }
    Ok(running)
}

/// A daemon's folder, configuration and client.
pub struct Daemon {
    binary: PathBuf,
    folder: PathBuf,
    pin_guest_memory: bool,
}

impl Daemon {
    pub fn new(options: &Options, folder: &Path) -> Result<Self> {
        if folder.exists() {
            std::fs::remove_dir_all(folder).with_context(|| format!("remove {}", folder.display()))?;
        }
        for folder in [folder.join("data"), folder.join("pool")] {
            std::fs::create_dir_all(&folder).with_context(|| format!("create {}", folder.display()))?;
        }
        Ok(Self {
            binary: std::path::absolute(&options.novastor)?,
            folder: folder.into(),
            pin_guest_memory: options.pin_guest_memory,
        })
    }

    /// Starts `serve` with one new pool of this driver.
    pub fn serve(&self, driver: &str) -> Result<Running> {
        let config = self.folder.join("novastor.toml");
        std::fs::write(&config, self.configuration(driver)).with_context(|| format!("write {}", config.display()))?;
        let log = self.folder.join("log");
        let ready = || std::fs::read_to_string(&log).is_ok_and(|text| text.lines().any(|line| line.trim() == "ready"));
        let mut command = Command::new(&self.binary);
        command.arg("serve").arg("--config").arg(&config);
        Running::start(&mut command, &log, self.nbd_socket(), VOLUME, ready)
    }

    pub fn client(&self, arguments: &[&str]) -> Result<()> {
        process::output(&mut self.command(arguments)).map(drop)
    }

    /// Runs the client; what it printed, as JSON.
    pub fn ask(&self, arguments: &[&str]) -> Result<serde_json::Value> {
        let printed = process::output(&mut self.command(arguments))?;
        serde_json::from_slice(&printed).with_context(|| format!("{arguments:?} printed no JSON"))
    }

    fn command(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new(&self.binary);
        command.args(arguments).env("NOVASTOR_ADMIN", format!("unix:{}", self.folder.join("admin.sock").display()));
        command
    }

    /// Removes its folder, with all that is in its pool.
    pub fn remove(self) -> Result<()> {
        std::fs::remove_dir_all(&self.folder).with_context(|| format!("remove {}", self.folder.display()))
    }

    pub fn export_vhost_user(&self, volume: &str, socket: &Path) -> Result<()> {
        let socket = socket.to_str().context("a socket path that is not UTF-8")?;
        self.client(&["export", "add", volume, "--vhost-user", socket])
    }

    fn nbd_socket(&self) -> PathBuf {
        self.folder.join("nbd.sock")
    }

    fn configuration(&self, driver: &str) -> String {
        let folder = self.folder.display();
        let path = if driver == "file" { format!("path = \"{folder}/pool\"\n") } else { String::new() };
        format!(
            "[daemon]\ndata_dir = \"{folder}/data\"\nadmin = \"unix:{folder}/admin.sock\"\n\
             nbd = [\"unix:{}\"]\nthreads = {THREADS}\npin_guest_memory = {}\nlog_size = \"{}GiB\"\n\n[pool.{POOL}]\ndriver = \"{driver}\"\n{path}\n\
             [policy.{UNREDUCED}]\ncompression = \"none\"\ndedup = \"none\"\n",
            self.nbd_socket().display(),
            self.pin_guest_memory,
            LOG_BYTES >> 30
        )
    }
}
