//! The job files of `fio-jobs/` run on an export, each of their sections.

use anyhow::{Result, ensure};
use novastor_tests::rig::daemon::Daemon;
use novastor_tests::rig::fio;
use novastor_tests::rig::process::run;
use novastor_tests::rig::{scratch, tools};
use serde_json::Value;
use std::fs;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

const LIMIT: Duration = Duration::from_secs(120);

fn serving() -> Result<(Daemon, String)> {
    let mut daemon = Daemon::new("")?;
    daemon.start()?;
    daemon.create_volume("disk", "256M")?;
    let uri = daemon.export_nbd("disk")?;
    Ok((daemon, uri))
}

/// What fio reports of each job.
fn jobs(file: &Path, folder: &Path, uri: &str) -> Result<Vec<Value>> {
    let mut fio = Command::new(tools::require("fio")?);
    let report = run(fio.arg("--output-format=json").arg(file).env("URI", uri).current_dir(folder), LIMIT)?;
    fio::jobs(&report)
}

fn transferred(job: &Value) -> [u64; 2] {
    ["read", "write"].map(|direction| job[direction]["io_bytes"].as_u64().unwrap_or(0))
}

#[test]
fn writes_are_verified() -> Result<()> {
    let (mut daemon, uri) = serving()?;
    let jobs = jobs(&scratch::workspace_root().join("fio-jobs/nbd-verify.fio"), daemon.folder(), &uri)?;
    ensure!(jobs.len() == 3, "{} jobs", jobs.len());
    for job in jobs {
        let [read, written] = transferred(&job);
        ensure!(
            job["error"] == 0 && written == 256 << 20 && read >= written,
            "{}: {read} read, {written} written",
            job["jobname"]
        );
    }
    daemon.stop()
}

#[test]
fn every_section_measures_what_its_name_says() -> Result<()> {
    let (mut daemon, uri) = serving()?;
    let text = fs::read_to_string(scratch::workspace_root().join("fio-jobs/nbd.fio"))?;
    ensure!(text.contains("runtime=10\n"), "the sections take another time than 10 s each");
    let file = daemon.folder().join("nbd.fio");
    fs::write(&file, text.replace("runtime=10\n", "runtime=1\n"))?;
    let jobs = jobs(&file, daemon.folder(), &uri)?;
    ensure!(jobs.len() == 7, "{} jobs", jobs.len());
    for job in jobs {
        let name = job["jobname"].as_str().unwrap_or_default();
        let [read, written] = transferred(&job).map(|bytes| bytes > 0);
        let reads = name.contains("read") || name.contains("mixed");
        let writes = name.contains("write") || name.contains("mixed");
        ensure!(job["error"] == 0 && (read, written) == (reads, writes), "{name}: read {read}, wrote {written}");
    }
    daemon.stop()
}
