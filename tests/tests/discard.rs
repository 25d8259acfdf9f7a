//! A discard of a whole huge volume with scattered data answers soon, and other I/O goes on meanwhile.

use anyhow::{Context, Result, bail, ensure};
use novastor_tests::rig::daemon::Daemon;
use novastor_tests::rig::deadline::Deadline;
use novastor_tests::rig::fio::{self, Fio};
use novastor_tests::rig::loop_mount::LoopMount;
use novastor_tests::rig::nbd::NbdClient;
use novastor_tests::rig::process::run;
use novastor_tests::rig::tools;
use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::process::Command;
use std::thread;
use std::time::Duration;

const LIMIT: Duration = Duration::from_secs(120);
const SIZE: u64 = 2 << 40;
const EXTENTS: u64 = 262_144;

/// 4 KiB reads and writes on another volume of the same file system.
fn load(uri: &str) -> Fio {
    let shape = ["--rw=randrw", "--bs=4k", "--iodepth=4", "--size=64M", "--time_based", "--runtime=8", "--output-format=json"];
    Fio::nbd(uri).with(shape)
}

/// The 99th percentile of completion times, reads and writes.
fn p99(report: &str) -> Result<[Duration; 2]> {
    let job = fio::job(report)?;
    ensure!(job["error"] == 0, "fio ended with error {}", job["error"]);
    let of = |direction: &str| {
        let nanos = job[direction]["clat_ns"]["percentile"]["99.000000"].as_u64();
        nanos.map(Duration::from_nanos).with_context(|| format!("no {direction} percentiles in {job}"))
    };
    Ok([of("read")?, of("write")?])
}

#[test]
fn a_huge_discard_answers_soon_while_another_volume_is_used() -> Result<()> {
    discards_beside("busy")
}

#[test]
fn a_huge_discard_answers_soon_while_its_volume_is_used() -> Result<()> {
    discards_beside("huge")
}

/// Discards all of the volume `huge`, while the first 64 MiB of the volume `used` are read and written.
fn discards_beside(used: &str) -> Result<()> {
    let ext4 = LoopMount::ext4(3072)?;
    let huge = ext4.path().join("huge.raw");
    scatter(&huge)?;
    let mut daemon = Daemon::new(&format!("[pool.ext4]\ndriver = \"file\"\npath = \"{}/pool\"", ext4.path().display()))?;
    fs::create_dir(ext4.path().join("pool"))?;
    daemon.start()?;
    daemon.cli(["volume", "adopt", &format!("ext4/{}", huge.display()), "huge"])?;
    daemon.create_volume("ext4/busy", "64M")?;
    daemon.export_nbd("huge")?;
    daemon.export_nbd("busy")?;
    let used_uri = daemon.nbd_uri(used);
    Fio::nbd(&used_uri).verify(0, 64).run(LIMIT)?;
    let before = p99(&load(&used_uri).run(LIMIT)?)?;

    let meanwhile = load(&used_uri);
    let meanwhile = thread::spawn(move || meanwhile.run(LIMIT));
    thread::sleep(Duration::from_secs(1));
    let mut client = NbdClient::connect(&daemon.nbd_socket(), "huge", LIMIT)?;
    let clock = Deadline::after(LIMIT);
    client.trim(0, SIZE)?;
    let answered = clock.elapsed();
    wait_until_free(&daemon)?;
    let free = clock.elapsed();
    let during = p99(&meanwhile.join().map_err(|_| anyhow::anyhow!("fio's thread panicked"))??)?;
    println!(
        "a discard of 2 TiB with {EXTENTS} extents: answered in {answered:?}, all free after {free:?}; p99 of I/O to {used} \
         (read, write): before {before:?}, meanwhile {during:?}"
    );
    let mut check = Command::new(tools::require("qemu-io")?);
    let read = run(check.args(["-f", "raw", "-c", "read -P 0 128M 4k"]).arg(&huge), LIMIT)?;
    ensure!(!read.contains("failed"), "{read}");
    daemon.stop()
}

/// A file of [`SIZE`] bytes that holds [`EXTENTS`] blocks far apart: 1 GiB.
fn scatter(path: &Path) -> Result<()> {
    let file = File::create(path)?;
    file.set_len(SIZE)?;
    for extent in 0..EXTENTS {
        file.write_all_at(&[0x5a; 4096], extent * (SIZE / EXTENTS))?;
    }
    Ok(file.sync_all()?)
}

/// The work goes on after the answer.
fn wait_until_free(daemon: &Daemon) -> Result<()> {
    let deadline = Deadline::after(LIMIT);
    loop {
        let usage = daemon.json(["volume", "usage", "huge"])?;
        if usage["stored"].as_u64().is_some_and(|bytes| bytes < 128 << 20) {
            return Ok(());
        }
        if !deadline.pause() {
            bail!("still allocated: {usage}");
        }
    }
}
