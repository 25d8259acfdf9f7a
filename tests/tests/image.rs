//! A disk image copied into a volume and back, by QEMU's tools over NBD and by novastor's own: equal, and as sparse as before.

use anyhow::{Context, Result, ensure};
use novastor_tests::rig::daemon::{Daemon, binary};
use novastor_tests::rig::deadline::Deadline;
use novastor_tests::rig::process::{Running, run};
use novastor_tests::rig::tools;
use rustix::process::Signal;
use serde_json::Value;
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Duration;

const LIMIT: Duration = Duration::from_secs(120);
const MIB: u64 = 1 << 20;
/// What the tools may take beyond the data: clusters are larger than blocks.
const SLACK: u64 = 4 * MIB;

fn qemu_img(arguments: &[&str]) -> Result<String> {
    run(Command::new(tools::require("qemu-img")?).args(arguments), LIMIT)
}

fn taken(path: &Path) -> Result<u64> {
    Ok(fs::metadata(path)?.blocks() * 512)
}

/// A compressed qcow2 image of a 512 MiB ext4 file system with a few files in it.
fn real_image(folder: &Path) -> Result<(String, u64)> {
    let (raw, qcow2, files) = (folder.join("fs.raw"), folder.join("fs.qcow2"), folder.join("files"));
    fs::create_dir(&files)?;
    for number in 0..40u32 {
        let words = (0..40_000).flat_map(|word: u32| (word * (number + 3)).wrapping_mul(0x9E37_79B9).to_le_bytes());
        fs::write(files.join(format!("file-{number}")), words.collect::<Vec<u8>>())?;
    }
    let mut make = Command::new(tools::require("mkfs.ext4")?);
    run(make.args(["-q", "-E", "lazy_itable_init=1", "-d"]).arg(&files).arg(&raw).arg("512M"), LIMIT)?;
    let [from, to] = [&raw, &qcow2].map(|path| path.display().to_string());
    qemu_img(&["convert", "-c", "-f", "raw", "-O", "qcow2", &from, &to])?;
    // What holds data once it is unpacked: zeroes that mkfs wrote do not.
    qemu_img(&["convert", "-f", "qcow2", "-O", "raw", &to, &from])?;
    Ok((to, taken(&raw)?))
}

#[test]
fn a_real_image_comes_back_equal_and_sparse() -> Result<()> {
    let mut daemon = Daemon::new("")?;
    daemon.start()?;
    let (image, data) = real_image(daemon.disk())?;
    ensure!((MIB..256 * MIB).contains(&data), "the image holds {data} bytes");

    daemon.create_volume("converted", "512M")?;
    let uri = daemon.export_nbd("converted")?;
    qemu_img(&["convert", "-n", "-f", "qcow2", "-O", "raw", &image, &uri])?;
    daemon.cli(["image", "import", &image, "local/imported"])?;
    daemon.export_nbd("imported")?;
    for volume in ["converted", "imported"] {
        let uri = daemon.nbd_uri(volume);
        let compared = qemu_img(&["compare", "-f", "qcow2", "-F", "raw", &image, &uri])?;
        ensure!(compared.contains("Images are identical"), "{volume}: {compared}");
        let allocated = daemon.json(["volume", "usage", volume])?["stored"].as_u64().context("bytes allocated")?;
        ensure!(allocated <= data + SLACK, "{volume} takes {allocated} bytes for {data} bytes of data");

        let back = daemon.disk().join(format!("{volume}.back"));
        let own = daemon.disk().join(format!("{volume}.exported"));
        run(Command::new(tools::require("nbdcopy")?).arg(&uri).arg(&back), LIMIT)?;
        daemon.cli(["image", "export", volume, &own.display().to_string()])?;
        for path in [back, own] {
            let copy = path.display().to_string();
            qemu_img(&["compare", "-f", "qcow2", "-F", "raw", &image, &copy])?;
            let size = taken(&path)?;
            ensure!(size <= data + SLACK, "{copy} takes {size} bytes for {data} bytes of data");
        }
    }
    daemon.stop()
}

fn job(daemon: &Daemon) -> Result<Value> {
    let jobs = daemon.json(["job", "list"])?;
    Ok(jobs.as_array().and_then(|jobs| jobs.last()).context("a job")?.clone())
}

/// Waits until `there`, which the daemon brings about.
fn wait_until(what: &str, mut there: impl FnMut() -> Result<bool>) -> Result<()> {
    let deadline = Deadline::after(LIMIT);
    while !there()? {
        ensure!(deadline.pause(), "{what}: it never happened");
    }
    Ok(())
}

#[test]
fn a_copy_given_up_has_ended_when_its_last_write_has() -> Result<()> {
    let mut daemon = Daemon::new("")?;
    // Far longer than the daemon waits for a client that says nothing.
    daemon.set_env("NOVASTOR_DAEMON__FAULTS", "write delay_us=15000000");
    daemon.start().context("a daemon with faults: build it with `cargo build -p novastor --features fault-injection`")?;
    let image = daemon.disk().join("image.raw");
    fs::write(&image, vec![1; 4 << 20])?;
    daemon.create_volume("disk", "4M")?;
    let mut command = Command::new(binary()?);
    command.env("NOVASTOR_ADMIN", format!("unix:{}", daemon.folder().join("admin.sock").display()));
    command.env("XDG_STATE_HOME", daemon.disk().join("state")).args(["image", "import"]).arg(&image).arg("disk");
    let client = Running::spawn("novastor image import", command.stdin(Stdio::null()).stderr(Stdio::null()))?;
    let writing = [("volume", "local/disk"), ("op", "write")];
    wait_until("a write in flight", || {
        Ok(daemon.metrics()?.sum("novastor_volume_in_flight", &writing).is_ok_and(|count| count > 0.0))
    })?;
    client.signal(Signal::STOP)?;
    daemon.cli(["job", "cancel", job(&daemon)?["id"].as_str().context("its id")?])?;
    wait_until("the end of the job", || Ok(job(&daemon)?["state"] != "running"))?;
    ensure!(job(&daemon)?["state"] == "cancelled");
    ensure!(daemon.json(["volume", "show", "disk"])?["open"] == false, "the job has ended, and something is still written");
    daemon.stop()
}
