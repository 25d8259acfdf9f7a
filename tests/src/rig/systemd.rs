//! systemd as a machine runs it, in namespaces of its own: no guest, no container engine.
//!
//! Its files are those of this machine, seen through a layer that keeps changes in memory, so its units come from here and what it does stays there. It
//! boots to `sysinit.target` and has no network, so that it starts nothing of this machine's own.

use crate::rig::deadline::Deadline;
use crate::rig::process::{Running, capture, run};
use crate::rig::{scratch, tools};
use anyhow::{Context, Result, bail};
use rustix::process::{Pid, Signal, geteuid, kill_process};
use std::fs::{self, File};
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;
use tempfile::TempDir;

const LIMIT: Duration = Duration::from_secs(60);
/// Units and mounts of this machine that must not start there.
const MASKED: [&str; 2] = ["network-online.target", "remote-fs.target"];

#[derive(Debug)]
pub struct Systemd {
    script: Running,
    state: TempDir,
    leader: Pid,
}

impl Systemd {
    /// Boots it with `program` in `/usr/bin`. `files` are laid over this machine's: where each goes, as an absolute path, and what is in it.
    pub fn boot(program: &Path, files: &[(&str, &str)]) -> Result<Self> {
        if !geteuid().is_root() {
            bail!("starting systemd in namespaces needs root: run the tests as root");
        }
        tools::require("systemctl")?;
        let state = scratch::disk_dir()?;
        let units = state.path().join("files/etc/systemd/system");
        fs::create_dir_all(&units)?;
        fs::create_dir(state.path().join("data"))?;
        for unit in MASKED {
            symlink("/dev/null", units.join(unit))?;
        }
        let place = |path: &str| state.path().join("files").join(path.trim_start_matches('/'));
        for (path, content) in [("/etc/fstab", "")].iter().chain(files) {
            let file = place(path);
            fs::create_dir_all(file.parent().context("a file needs a folder")?)?;
            fs::write(file, content)?;
        }
        fs::create_dir_all(place("/usr/bin"))?;
        let name = program.file_name().and_then(|name| name.to_str()).context("a program needs a name")?;
        fs::copy(program, place(&format!("/usr/bin/{name}"))).with_context(|| format!("copying {}", program.display()))?;
        let log = File::create(state.path().join("log"))?;
        let script = scratch::workspace_root().join("tests/rig/systemd.sh");
        let mut command = Command::new(tools::require("bash")?);
        command.arg(script).arg(state.path()).stdin(Stdio::null()).stdout(log.try_clone()?).stderr(log);
        let mut script = Running::spawn("systemd", &mut command)?;
        let leader = Self::leader(&mut script, state.path())?;
        let systemd = Self { script, state, leader };
        systemd.wait_until_up()?;
        Ok(systemd)
    }

    fn leader(script: &mut Running, state: &Path) -> Result<Pid> {
        let deadline = Deadline::after(LIMIT);
        loop {
            if let Ok(pid) = fs::read_to_string(state.join("pid")) {
                return pid.trim().parse().ok().and_then(Pid::from_raw).context("process 1 has no number");
            }
            if script.has_ended()?.is_some() || !deadline.pause() {
                bail!("systemd did not start:\n{}", fs::read_to_string(state.join("log"))?);
            }
        }
    }

    fn wait_until_up(&self) -> Result<()> {
        let deadline = Deadline::after(LIMIT);
        while !self.path("/run/systemd/private").exists() {
            if !deadline.pause() {
                bail!("systemd answers nobody:\n{}", fs::read_to_string(self.state.path().join("log"))?);
            }
        }
        // Units of this machine that fail there are not what is tested.
        capture(&mut self.command("systemctl", &["is-system-running", "--wait"]), LIMIT).map(drop)
    }

    /// A command that runs there.
    pub fn command(&self, program: &str, arguments: &[&str]) -> Command {
        let mut command = Command::new("nsenter");
        let leader = self.leader.as_raw_nonzero().to_string();
        command.args(["--target", &leader, "--cgroup", "--ipc", "--mount", "--net", "--pid", "--uts", "--"]);
        command.args(["env", "-i", "PATH=/usr/sbin:/usr/bin:/sbin:/bin", program]).args(arguments);
        command
    }

    /// Runs a command there, which must succeed; what it printed.
    pub fn run(&self, program: &str, arguments: &[&str]) -> Result<String> {
        let printed = run(&mut self.command(program, arguments), LIMIT);
        printed.map_err(|error| error.context(self.journal()))
    }

    /// A property of a unit.
    pub fn property(&self, unit: &str, name: &str) -> Result<String> {
        Ok(self.run("systemctl", &["show", unit, "--value", "--property", name])?.trim().to_owned())
    }

    /// Sends a signal to a service's main process.
    pub fn signal(&self, unit: &str, signal: &str) -> Result<()> {
        self.run("systemctl", &["kill", "--kill-whom=main", "--signal", signal, unit]).map(drop)
    }

    /// The last lines that services there printed.
    pub fn journal(&self) -> String {
        let printed = capture(&mut self.command("journalctl", &["--no-pager", "--lines=40"]), LIMIT);
        printed.map_or_else(|error| format!("{error:#}"), |output| String::from_utf8_lossy(&output.stdout).into_owned())
    }

    /// Where this machine finds a file that lies at `inside` there.
    pub fn path(&self, inside: &str) -> PathBuf {
        PathBuf::from(format!("/proc/{}/root{inside}", self.leader.as_raw_nonzero()))
    }
}

impl Drop for Systemd {
    fn drop(&mut self) {
        // All else there ends with its process 1, and then the script, which takes the control group away.
        let ended = kill_process(self.leader, Signal::KILL).map_err(Into::into).and_then(|()| self.script.wait(LIMIT).map(drop));
        if let Err(error) = ended {
            eprintln!("{}: {error:#}", self.state.path().display());
        }
    }
}
