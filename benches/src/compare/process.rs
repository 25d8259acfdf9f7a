//! A server process that ends with its handle.

use std::fs::File;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, bail};

use crate::clock;

const START_TIMEOUT: Duration = Duration::from_secs(30);
const STOP_TIMEOUT: Duration = Duration::from_secs(10);

/// A server that accepts connections.
pub struct Running {
    pub socket: PathBuf,
    /// Name of its NBD export.
    pub export: String,
    /// The command line, for the report.
    pub command: String,
    child: Child,
}

impl Running {
    /// Starts `command` and waits until `ready` holds. Its output goes to `log`.
    pub fn start(command: &mut Command, log: &Path, socket: PathBuf, export: &str, ready: impl Fn() -> bool) -> Result<Self> {
        let shown = show(command);
        let output = File::create(log).with_context(|| format!("create {}", log.display()))?;
        end_with_this_thread(command);
        let child = command
            .stdin(Stdio::null())
            .stdout(output.try_clone()?)
            .stderr(output)
            .spawn()
            .with_context(|| format!("start {}", command.get_program().display()))?;
        let mut running = Self { socket, export: export.into(), command: shown, child };
        let deadline = clock::now_ns() + START_TIMEOUT.as_nanos() as u64;
        while !ready() {
            if let Some(status) = running.child.try_wait()? {
                bail!("{} ended with {status}: {}", running.command, last_lines(log));
            }
            if clock::now_ns() > deadline {
                bail!("{} is not ready after {} s: {}", running.command, START_TIMEOUT.as_secs(), last_lines(log));
            }
            std::thread::sleep(Duration::from_millis(10));
        }
        Ok(running)
    }

    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Resident memory in bytes.
    pub fn resident_bytes(&self) -> Result<u64> {
        let path = format!("/proc/{}/status", self.pid());
        let status = std::fs::read_to_string(&path).with_context(|| format!("read {path}"))?;
        let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).context("no VmRSS in the process status")?;
        let kib: u64 = line.trim().trim_end_matches(" kB").parse().context("VmRSS is not a number")?;
        Ok(kib * 1024)
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        // SAFETY: a plain system call; the child has not been waited for, so the number is still its own.
        unsafe { libc::kill(self.child.id() as libc::pid_t, libc::SIGTERM) };
        let deadline = clock::now_ns() + STOP_TIMEOUT.as_nanos() as u64;
        while matches!(self.child.try_wait(), Ok(None)) {
            if clock::now_ns() > deadline {
                eprintln!("{} does not end on SIGTERM; killing it", self.command);
                // Fails only if it has ended meanwhile.
                let _ = self.child.kill();
                let _ = self.child.wait();
                return;
            }
            std::thread::sleep(Duration::from_millis(5));
        }
    }
}

/// Runs a command to its end; what it printed. Its standard error is part of the error.
pub fn output(command: &mut Command) -> Result<Vec<u8>> {
    let output = command.output().with_context(|| format!("start {}", command.get_program().display()))?;
    if !output.status.success() {
        bail!("{}: {}: {}", show(command), output.status, String::from_utf8_lossy(&output.stderr).trim());
    }
    Ok(output.stdout)
}

/// The child gets SIGTERM when the thread that started it ends, however it ends.
fn end_with_this_thread(command: &mut Command) {
    // SAFETY: between fork and exec only one system call is made, which needs neither memory nor locks.
    unsafe {
        command.pre_exec(|| match libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGTERM) {
            0 => Ok(()),
            _ => Err(std::io::Error::last_os_error()),
        })
    };
}

fn show(command: &Command) -> String {
    let mut words = vec![command.get_program().to_string_lossy().into_owned()];
    words.extend(command.get_args().map(|word| word.to_string_lossy().into_owned()));
    words.join(" ")
}

fn last_lines(log: &Path) -> String {
    let text = std::fs::read_to_string(log).unwrap_or_default();
    let lines: Vec<&str> = text.lines().rev().take(3).collect();
    lines.into_iter().rev().collect::<Vec<_>>().join("; ")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn start(script: &str, folder: &Path, ready: impl Fn() -> bool) -> Result<Running> {
        Running::start(Command::new("sh").args(["-c", script]), &folder.join("log"), "socket".into(), "", ready)
    }

    #[test]
    fn a_server_that_ends_early_is_an_error_with_its_last_words() {
        let folder = tempfile::tempdir().unwrap();
        let error = start("echo no such volume >&2; exit 3", folder.path(), || false).err().unwrap().to_string();
        assert!(error.contains("exit status: 3: no such volume"), "{error}");
    }

    #[test]
    fn a_server_ends_with_the_thread_that_started_it() {
        let folder = tempfile::tempdir().unwrap();
        let place = folder.path().to_owned();
        let server = std::thread::spawn(move || start("exec sleep 600", &place, || true).unwrap()).join().unwrap();
        let stat = format!("/proc/{}/stat", server.pid());
        for _ in 0..1000 {
            // A child that has ended and not been waited for is a zombie.
            if std::fs::read_to_string(&stat).unwrap().contains(") Z ") {
                return;
            }
            std::thread::sleep(Duration::from_millis(10));
        }
        panic!("the server outlived its thread");
    }

    #[test]
    fn a_dropped_server_is_gone() {
        let folder = tempfile::tempdir().unwrap();
        let server = start("exec sleep 600", folder.path(), || true).unwrap();
        let pid = server.pid();
        assert!(server.resident_bytes().unwrap() > 0);
        drop(server);
        assert!(!Path::new(&format!("/proc/{pid}")).exists());
    }
}
