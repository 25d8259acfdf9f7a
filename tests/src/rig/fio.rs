//! Verified load: fio writes blocks with checksums and reads them back; any difference ends it with an error.

use crate::rig::process::{Running, capture, run};
use crate::rig::tools;
use anyhow::{Context, Result};
use serde_json::Value;
use std::env;
use std::process::{Command, Stdio};
use std::time::Duration;

/// One fio job.
#[derive(Debug, Clone)]
pub struct Fio {
    arguments: Vec<String>,
}

impl Fio {
    /// On the host, over NBD.
    pub fn nbd(uri: &str) -> Self {
        Self { arguments: vec!["--name=nbd".into(), "--ioengine=nbd".into(), format!("--uri={uri}")] }
    }

    /// On a disk, past the page cache.
    pub fn disk(device: &str) -> Self {
        let arguments = ["--name=disk", "--ioengine=libaio", "--direct=1"].map(str::to_owned);
        Self { arguments: arguments.into() }.with(["--filename", device])
    }

    /// Writes every 4 KiB block of this part of the disk in random order and reads all of it back.
    pub fn verify(self, offset_mib: u64, size_mib: u64) -> Self {
        let part = [format!("--offset={offset_mib}M"), format!("--size={size_mib}M")];
        self.with(part).with([
            "--rw=randwrite",
            "--bs=4k",
            "--iodepth=16",
            "--verify=crc32c",
            "--do_verify=1",
            "--verify_fatal=1",
            "--verify_state_save=0",
        ])
    }

    pub fn with<S: Into<String>>(mut self, arguments: impl IntoIterator<Item = S>) -> Self {
        self.arguments.extend(arguments.into_iter().map(Into::into));
        self
    }

    /// The line that runs this job in a shell; no argument has a space in it.
    pub fn line(&self) -> String {
        format!("fio {}", self.arguments.join(" "))
    }

    fn command(&self) -> Result<Command> {
        let mut command = Command::new(tools::require("fio")?);
        command.args(&self.arguments).current_dir(env::temp_dir());
        Ok(command)
    }

    /// Runs the job here; it must succeed. Returns what fio printed.
    pub fn run(&self, limit: Duration) -> Result<String> {
        run(&mut self.command()?, limit)
    }

    /// Runs the job here to its end, however it ends; returns what fio printed.
    pub fn capture(&self, limit: Duration) -> Result<String> {
        let output = capture(&mut self.command()?, limit)?;
        Ok(format!("{}{}", String::from_utf8_lossy(&output.stderr), String::from_utf8_lossy(&output.stdout)))
    }

    /// Starts the job here. What it prints goes to the test's own output.
    pub fn start(&self) -> Result<Running> {
        Running::spawn("fio", self.command()?.stdin(Stdio::null()).args(["--output-format=terse", "--minimal"]))
    }
}

/// The only job in a report that fio printed with `--output-format=json`, perhaps between other words.
pub fn job(output: &str) -> Result<Value> {
    jobs(output)?.into_iter().next().context("a report without a job")
}

/// The jobs of such a report, in the order of the job file.
pub fn jobs(output: &str) -> Result<Vec<Value>> {
    let start = output.find("{\n").with_context(|| format!("no report in {output:?}"))?;
    let end = output.rfind('}').with_context(|| format!("an unfinished report: {output:?}"))?;
    let mut report: Value = serde_json::from_str(&output[start..=end]).context("fio's report")?;
    serde_json::from_value(report["jobs"].take()).context("the jobs of fio's report")
}
