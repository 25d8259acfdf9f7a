//! Child processes: run to the end with their output, or kept running and killed on drop.

use crate::rig::deadline::Deadline;
use anyhow::{Context, Result, bail};
use rustix::process::{Pid, Signal, kill_process};
use std::fs;
use std::io::Read;
use std::process::{Child, Command, ExitStatus, Output, Stdio};
use std::thread;
use std::time::Duration;

/// Runs a command that must succeed within `limit`; the error carries what it printed.
pub fn run(command: &mut Command, limit: Duration) -> Result<String> {
    let output = capture(command, limit)?;
    if !output.status.success() {
        bail!(
            "{command:?} failed ({}):\n{}{}",
            output.status,
            String::from_utf8_lossy(&output.stdout),
            String::from_utf8_lossy(&output.stderr)
        );
    }
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

/// Runs a command to its end, whatever its exit status, killing it after `limit`.
pub fn capture(command: &mut Command, limit: Duration) -> Result<Output> {
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let child = command.spawn().with_context(|| format!("starting {command:?}"))?;
    let mut child = Running::new(format!("{command:?}"), child);
    let stdout = drain(child.child.stdout.take());
    let stderr = drain(child.child.stderr.take());
    let status = child.wait(limit)?;
    let collect = |reader: thread::JoinHandle<Vec<u8>>| reader.join().unwrap_or_default();
    Ok(Output { status, stdout: collect(stdout), stderr: collect(stderr) })
}

/// Reads a pipe to its end on a thread of its own, so that the child never blocks on it.
fn drain(pipe: Option<impl Read + Send + 'static>) -> thread::JoinHandle<Vec<u8>> {
    thread::spawn(move || {
        let mut bytes = Vec::new();
        if let Some(mut pipe) = pipe {
            // A read error ends the output early; the exit status still tells how the command went.
            let _ = pipe.read_to_end(&mut bytes);
        }
        bytes
    })
}

/// What each thread of a process is at: its name, state, where it waits in the kernel, and its system call.
pub fn threads(process: u32) -> String {
    let tasks = fs::read_dir(format!("/proc/{process}/task")).into_iter().flatten().flatten();
    let lines = tasks.map(|task| {
        let read = |name: &str| fs::read_to_string(task.path().join(name)).unwrap_or_default().trim().to_owned();
        let stat = read("stat");
        let state = stat.rsplit_once(") ").and_then(|(_, fields)| fields.chars().next()).unwrap_or('?');
        format!(
            "  {} {} {state} in {}, system call {}\n",
            task.file_name().display(),
            read("comm"),
            read("wchan"),
            read("syscall")
        )
    });
    lines.collect()
}

/// The same of all child processes of this one.
pub fn threads_of_children() -> String {
    let tasks = fs::read_dir("/proc/self/task").into_iter().flatten().flatten();
    let children = tasks.map(|task| fs::read_to_string(task.path().join("children")).unwrap_or_default());
    let children: Vec<u32> =
        children.flat_map(|line| line.split_whitespace().filter_map(|child| child.parse().ok()).collect::<Vec<_>>()).collect();
    children.into_iter().map(threads).collect()
}

/// A child process that is killed when dropped.
#[derive(Debug)]
pub struct Running {
    name: String,
    pub child: Child,
}

impl Running {
    pub fn new(name: impl Into<String>, child: Child) -> Self {
        Self { name: name.into(), child }
    }

    /// Starts a server whose output is not needed.
    pub fn spawn(name: impl Into<String>, command: &mut Command) -> Result<Self> {
        let child = command.spawn().with_context(|| format!("starting {command:?}"))?;
        Ok(Self::new(name, child))
    }

    pub fn id(&self) -> u32 {
        self.child.id()
    }

    pub fn has_ended(&mut self) -> Result<Option<ExitStatus>> {
        self.child.try_wait().with_context(|| format!("waiting for {}", self.name))
    }

    pub fn wait(&mut self, limit: Duration) -> Result<ExitStatus> {
        let deadline = Deadline::after(limit);
        loop {
            if let Some(status) = self.has_ended()? {
                return Ok(status);
            }
            if !deadline.pause() {
                bail!("{} did not end within {limit:?}; its threads:\n{}", self.name, threads(self.child.id()));
            }
        }
    }

    pub fn signal(&self, signal: Signal) -> Result<()> {
        let pid = i32::try_from(self.child.id()).ok().and_then(Pid::from_raw).context("no process id")?;
        kill_process(pid, signal).with_context(|| format!("sending {signal:?} to {}", self.name))
    }

    /// Stops the process, as SIGSTOP does, and waits until every thread of it stands: on a busy machine some run on for a while.
    pub fn pause(&self) -> Result<()> {
        self.signal(Signal::STOP)?;
        let deadline = Deadline::after(Duration::from_secs(60));
        while !self.stands_still()? {
            if !deadline.pause() {
                bail!("{} does not stop", self.name);
            }
        }
        Ok(())
    }

    fn stands_still(&self) -> Result<bool> {
        for task in fs::read_dir(format!("/proc/{}/task", self.child.id()))? {
            // A thread that has ended meanwhile stands still too.
            let stat = fs::read_to_string(task?.path().join("stat")).unwrap_or_default();
            if stat.rsplit_once(") ").is_some_and(|(_, fields)| !fields.starts_with('T')) {
                return Ok(false);
            }
        }
        Ok(true)
    }

    /// Asks the process to end, and waits for it.
    pub fn terminate(&mut self, limit: Duration) -> Result<ExitStatus> {
        if let Some(status) = self.has_ended()? {
            return Ok(status);
        }
        self.signal(Signal::TERM)?;
        self.wait(limit)
    }

    /// Kills the process as a crash would.
    pub fn kill(&mut self) -> Result<()> {
        self.child.kill().with_context(|| format!("killing {}", self.name))?;
        self.child.wait().with_context(|| format!("waiting for {}", self.name))?;
        Ok(())
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        // The process may have ended already; either way it is gone afterwards.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LIMIT: Duration = Duration::from_secs(30);

    #[test]
    fn a_failing_command_shows_its_output_and_status() {
        let error = run(Command::new("sh").args(["-c", "echo out; echo err >&2; exit 3"]), LIMIT);
        let error = error.unwrap_err().to_string();
        assert!(error.contains("out\nerr") && error.contains("exit status: 3"), "{error}");
    }

    #[test]
    fn a_command_that_hangs_is_killed() {
        let error = run(Command::new("sleep").arg("600"), Duration::from_millis(50)).unwrap_err();
        assert!(error.to_string().contains("did not end"), "{error}");
    }

    #[test]
    fn dropping_a_running_process_ends_it() {
        let mut command = Command::new("sleep");
        let running = Running::spawn("sleep", command.arg("600")).unwrap();
        let proc_entry = format!("/proc/{}", running.id());
        assert!(std::fs::exists(&proc_entry).unwrap());
        drop(running);
        assert!(!std::fs::exists(&proc_entry).unwrap());
    }
}
