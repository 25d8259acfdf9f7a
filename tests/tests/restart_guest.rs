//! The daemon is killed and started again and again under verified load in a guest: the guest notices a pause, not an error.
//!
//! `NOVASTOR_TEST_SECONDS` sets how long each test keeps killing; without it, long enough for a dozen restarts.

use anyhow::{Context, Result};
use novastor_tests::rig::daemon::Daemon;
use novastor_tests::rig::deadline::Deadline;
use novastor_tests::rig::fio::Fio;
use novastor_tests::rig::guest::{Guest, GuestSpec};
use std::env;
use std::thread;
use std::time::Duration;

const LIMIT: Duration = Duration::from_secs(120);
const DEFAULT_LENGTH: Duration = Duration::from_secs(24);
const BETWEEN_KILLS: Duration = Duration::from_secs(2);
/// Long enough for marks of I/O that the dead process had completed to arrive.
const DEAD: Duration = Duration::from_millis(200);

fn length() -> Result<Duration> {
    match env::var("NOVASTOR_TEST_SECONDS") {
        Ok(seconds) => Ok(Duration::from_secs(seconds.parse().context("NOVASTOR_TEST_SECONDS")?)),
        Err(_) => Ok(DEFAULT_LENGTH),
    }
}

/// Verifies the first part of the disk over and over, and reports each single write to a block behind it.
fn script() -> String {
    let verify = Fio::disk("/dev/vda").verify(0, 8).with(["--minimal"]).line();
    format!(
        "dd if=/dev/zero of=/tmp/block bs=4k count=1 2>/dev/null
         (while ! [ -e /tmp/stop ]; do
              dd if=/tmp/block of=/dev/vda bs=4k count=1 seek=4096 oflag=direct 2>/tmp/dd.log || mark failed $(cat /tmp/dd.log)
              mark done
          done) &
         (await stop && touch /tmp/stop) &
         passes=0
         while ! [ -e /tmp/stop ]; do
             {verify} --randseed=$((passes + 1)) >/tmp/fio.log 2>&1 || {{ cat /tmp/fio.log; dmesg | tail; exit 1; }}
             passes=$((passes + 1))
             mark verified
         done
         wait
         mark passes $passes
         ! dmesg | grep -iE 'i/o error|blk_update_request|timeout|reset'"
    )
}

fn kill_again_and_again(mut daemon: Daemon, spec: &GuestSpec) -> Result<()> {
    let mut guest = Guest::start(spec)?;
    guest.wait_mark("verified", LIMIT)?;
    let clock = Deadline::after(length()?);
    let mut pauses = Vec::new();
    while !clock.has_passed() {
        daemon.check_alive()?;
        daemon.kill()?;
        thread::sleep(DEAD);
        guest.skip_marks();
        let restart = Deadline::after(LIMIT);
        daemon.start()?;
        guest.wait_mark("done", LIMIT)?;
        pauses.push(restart.elapsed());
        thread::sleep(BETWEEN_KILLS.saturating_sub(restart.elapsed()));
    }
    guest.send("stop")?;
    let passes = guest.wait_mark("passes", LIMIT)?;
    let console = guest.finish(LIMIT)?;
    assert!(!console.contains("MARK failed"), "{console}");
    pauses.sort();
    println!(
        "{} restarts, {passes} verified passes; from exec to the next completion in the guest: median {:?}, longest {:?}",
        pauses.len(),
        pauses[pauses.len() / 2],
        pauses[pauses.len() - 1]
    );
    daemon.stop()
}

#[test]
fn a_vhost_user_guest_survives_kills() -> Result<()> {
    let mut daemon = Daemon::new("")?;
    daemon.start()?;
    daemon.create_volume("disk", "64M")?;
    let socket = daemon.export_vhost_user("disk")?;
    kill_again_and_again(daemon, &GuestSpec::new(script()).vhost_user_disk("disk0", &socket, 2))
}

#[test]
fn a_guest_on_a_mapped_volume_survives_kills() -> Result<()> {
    let mut daemon = Daemon::new("")?;
    daemon.start()?;
    daemon.create_mapped_volume("disk", "64M")?;
    let socket = daemon.export_vhost_user("disk")?;
    kill_again_and_again(daemon, &GuestSpec::new(script()).vhost_user_disk("disk0", &socket, 2))
}

#[test]
fn a_guest_on_qemus_nbd_client_survives_kills() -> Result<()> {
    let mut daemon = Daemon::new("")?;
    daemon.start()?;
    daemon.create_volume("disk", "64M")?;
    daemon.export_nbd("disk")?;
    let spec = GuestSpec::new(script()).nbd_disk("disk0", &daemon.nbd_socket(), "disk", 60);
    kill_again_and_again(daemon, &spec)
}
