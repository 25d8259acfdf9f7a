//! A guest sees its disk grow while it runs, and what it discards is free on the host again.

use anyhow::{Context, Result, ensure};
use novastor_tests::rig::daemon::Daemon;
use novastor_tests::rig::deadline::Deadline;
use novastor_tests::rig::fio::Fio;
use novastor_tests::rig::guest::{Guest, GuestSpec};
use std::fs;
use std::time::Duration;

const LIMIT: Duration = Duration::from_secs(120);

fn allocated(daemon: &Daemon) -> Result<u64> {
    let usage = daemon.json(["volume", "usage", "disk"])?;
    Ok(usage["stored"].as_u64().unwrap_or(u64::MAX))
}

/// Resizes a volume that the daemon, which is down, would serve again at once: it is started without its exports first.
fn resize_without_exports(daemon: &mut Daemon, size: &str) -> Result<()> {
    let exports = daemon.disk().join("data/exports.json");
    let aside = exports.with_extension("aside");
    fs::rename(&exports, &aside)?;
    daemon.start()?;
    daemon.cli(["volume", "resize", "disk", size])?;
    daemon.stop()?;
    Ok(fs::rename(&aside, &exports)?)
}

#[test]
fn a_guest_sees_a_size_that_changed_while_its_disk_was_away() -> Result<()> {
    let mut daemon = Daemon::new("")?;
    daemon.start()?;
    daemon.create_volume("disk", "64M")?;
    let socket = daemon.export_vhost_user("disk")?;
    let script = "for size in 67108864 134217728; do
             mark size $(blockdev --getsize64 /dev/vda)
             while [ $(blockdev --getsize64 /dev/vda) = $size ]; do sleep 0.01; done
         done
         mark size $(blockdev --getsize64 /dev/vda)
         dd if=/dev/zero of=/dev/vda bs=1M seek=191 count=1 oflag=direct 2>/dev/null";
    let mut guest = Guest::start(&GuestSpec::new(script).vhost_user_disk("disk0", &socket, 2))?;
    assert_eq!(guest.wait_mark("size", LIMIT)?, (64u64 << 20).to_string());

    let exports = daemon.json(["export", "list"])?;
    let id = exports[0]["id"].as_str().context("the export's id")?;
    daemon.cli(["export", "remove", id])?;
    daemon.cli(["volume", "resize", "disk", "128M"])?;
    daemon.export_vhost_user("disk")?;
    assert_eq!(guest.wait_mark("size", LIMIT)?, (128u64 << 20).to_string(), "its export came back");

    daemon.stop()?;
    resize_without_exports(&mut daemon, "192M")?;
    daemon.start()?;
    assert_eq!(guest.wait_mark("size", LIMIT)?, (192u64 << 20).to_string(), "the daemon came back");
    guest.finish(LIMIT)?;
    daemon.stop()
}

#[test]
fn a_guest_sees_its_disk_grow_and_discards_free_host_blocks() -> Result<()> {
    let mut daemon = Daemon::new("")?;
    daemon.start()?;
    daemon.create_volume("disk", "64M")?;
    let socket = daemon.export_vhost_user("disk")?;
    let at_the_end = Fio::disk("/dev/vda").verify(96, 4).line();
    let script = format!(
        "mark size $(blockdev --getsize64 /dev/vda)
         while [ $(blockdev --getsize64 /dev/vda) = 67108864 ]; do sleep 0.01; done
         mark size $(blockdev --getsize64 /dev/vda)
         {at_the_end}
         dd if=/dev/zero of=/dev/vda bs=1M count=32 oflag=direct 2>/dev/null
         mark written
         await discard
         blkdiscard -o 0 -l 16777216 /dev/vda
         mark discarded
         await end
         test $(dd if=/dev/vda bs=1M count=16 iflag=direct 2>/dev/null | tr -d '\\0' | wc -c) = 0"
    );
    let mut guest = Guest::start(&GuestSpec::new(script).vhost_user_disk("disk0", &socket, 2))?;
    assert_eq!(guest.wait_mark("size", LIMIT)?, (64u64 << 20).to_string());
    let clock = Deadline::after(LIMIT);
    daemon.cli(["volume", "resize", "disk", "128M"])?;
    assert_eq!(guest.wait_mark("size", LIMIT)?, (128u64 << 20).to_string());
    println!("the guest saw the new size {:?} after the command began", clock.elapsed());

    guest.wait_mark("written", LIMIT)?;
    let before = allocated(&daemon)?;
    ensure!((32 << 20..64 << 20).contains(&before), "{before} bytes are allocated after writing 36 MiB");
    guest.send("discard")?;
    guest.wait_mark("discarded", LIMIT)?;
    let after = allocated(&daemon)?;
    ensure!(after + (16 << 20) <= before, "discarding 16 MiB left {after} of {before} bytes allocated");
    guest.send("end")?;
    guest.finish(LIMIT)?;
    daemon.stop()
}
