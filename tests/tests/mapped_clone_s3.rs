//! Snapshots and clones in a bucket: made on one host, used on another, and there after both were killed.

use anyhow::{Result, ensure};
use novastor_tests::rig::daemon::Daemon;
use novastor_tests::rig::deadline::Deadline;
use novastor_tests::rig::process::run;
use novastor_tests::rig::seaweedfs::{ACCESS_KEY, SECRET_KEY, Seaweedfs};
use novastor_tests::rig::tools;
use std::process::Command;
use std::time::Duration;

const LIMIT: Duration = Duration::from_secs(120);
const BUCKET: &str = "volumes";

fn host(server: &Seaweedfs) -> Result<Daemon> {
    let pool = format!(
        "[pool.cloud]\ndriver = \"s3\"\nbucket = \"{BUCKET}\"\nendpoint = \"http://{}\"\nallow_http = true\nprefix = \"pool\"\n",
        server.address()
    );
    let mut daemon = Daemon::new(&pool)?;
    daemon.set_env("NOVASTOR_POOL__CLOUD__ACCESS_KEY_ID", ACCESS_KEY);
    daemon.set_env("NOVASTOR_POOL__CLOUD__SECRET_KEY", SECRET_KEY);
    started(daemon)
}

/// Starts it, and waits for its pool and its exports.
fn started(mut daemon: Daemon) -> Result<Daemon> {
    daemon.start()?;
    let deadline = Deadline::after(LIMIT);
    for (what, state) in [("pool", "ok"), ("export", "ready")] {
        while !daemon.json([what, "list"])?.as_array().is_some_and(|listed| listed.iter().all(|one| one[state] == true)) {
            ensure!(deadline.pause(), "not every {what} is {state}");
        }
    }
    Ok(daemon)
}

/// Runs commands of qemu-io, all of which must do what they say.
fn qemu_io(uri: &str, commands: &[&str]) -> Result<()> {
    let mut qemu_io = Command::new(tools::require("qemu-io")?);
    let said = run(qemu_io.args(["-f", "raw"]).args(commands.iter().flat_map(|command| ["-c", command])).arg(uri), LIMIT)?;
    ensure!(said.matches(" 65536/65536").count() == commands.len() && !said.contains("failed"), "{said}");
    Ok(())
}

#[test]
fn another_host_serves_a_clone_and_both_survive_kills() -> Result<()> {
    let server = Seaweedfs::start()?;
    server.make_bucket(BUCKET)?;
    let (mut first, mut second) = (host(&server)?, host(&server)?);
    first.cli(["volume", "create", "cloud/disk", "--size", "64M"])?;
    let disk = first.export_nbd("disk")?;
    qemu_io(&disk, &["write -f -P 1 0 64k", "write -f -P 2 1M 64k"])?;
    first.cli(["snapshot", "create", "disk@s"])?;
    qemu_io(&disk, &["write -f -P 3 0 64k"])?;

    second.cli(["volume", "clone", "disk@s", "copy"])?;
    let copy = second.export_nbd("copy")?;
    qemu_io(&copy, &["read -P 1 0 64k", "write -f -P 4 1M 64k"])?;
    let refused = first.try_cli(["snapshot", "delete", "disk@s", "--yes"])?;
    ensure!(!refused.status.success() && String::from_utf8_lossy(&refused.stderr).contains("(copy)"), "{refused:?}");
    first.kill()?;
    second.kill()?;
    let (first, second) = (started(first)?, started(second)?);
    qemu_io(&disk, &["read -P 3 0 64k", "read -P 2 1M 64k"])?;
    qemu_io(&copy, &["read -P 1 0 64k", "read -P 4 1M 64k"])?;

    second.cli(["volume", "flatten", "copy"])?;
    first.cli(["snapshot", "delete", "disk@s", "--yes"])?;
    qemu_io(&copy, &["read -P 1 0 64k", "read -P 4 1M 64k"])?;
    let report = first.json(["pool", "check", "cloud"])?;
    ensure!(report["ok"] == true, "{report}");
    for mut daemon in [first, second] {
        daemon.stop()?;
    }
    Ok(())
}
