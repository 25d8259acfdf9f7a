//! A guest on a mapped volume verifies what it writes while the daemon is killed again and again, and snapshots come and go: the guest notices no
//! error, and each snapshot is bit-exact to the end.
//!
//! `NOVASTOR_TEST_SECONDS` sets how long it keeps killing; without it, a few rounds.

use anyhow::{Context, Result, ensure};
use novastor_tests::rig::daemon::Daemon;
use novastor_tests::rig::deadline::Deadline;
use novastor_tests::rig::guest::{Guest, GuestSpec};
use novastor_tests::rig::snapshots::{Snapshots, md5};
use novastor_tests::rig::verified_load::{self, FILLED};
use std::env;
use std::thread;
use std::time::Duration;

const LIMIT: Duration = Duration::from_secs(180);
const ROUNDS: u32 = 6;
/// Snapshots that a round leaves there.
const KEPT_MAX: usize = 4;

fn length() -> Result<Option<Duration>> {
    let seconds = env::var("NOVASTOR_TEST_SECONDS").ok();
    seconds.map(|seconds| Ok(Duration::from_secs(seconds.parse().context("NOVASTOR_TEST_SECONDS")?))).transpose()
}

/// Takes a snapshot, and deletes old ones, to the end. How many that were.
fn replace_snapshots(daemon: &Daemon, snapshots: &mut Snapshots, round: u32) -> Result<usize> {
    snapshots.take(daemon, &format!("whole{round}"))?;
    let before = snapshots.count();
    snapshots.thin_out(daemon, KEPT_MAX)?;
    Ok(before.saturating_sub(KEPT_MAX))
}

#[test]
fn a_guest_and_the_snapshots_of_its_disk_survive_kills() -> Result<()> {
    let mut daemon = Daemon::new("")?;
    daemon.start()?;
    daemon.create_mapped_volume("disk", verified_load::SIZE)?;
    let socket = daemon.export_vhost_user("disk")?;
    let mut guest = Guest::start(&GuestSpec::new(verified_load::script()).vhost_user_disk("disk0", &socket, 2))?;
    guest.wait_ready()?;
    let mut snapshots = Snapshots::new("disk");
    let clock = Deadline::after(length()?.unwrap_or(Duration::MAX));
    let (mut round, mut deleted) = (0, 0);
    while if length()?.is_some() { !clock.has_passed() } else { round < ROUNDS } {
        round += 1;
        guest.send(&round.to_string())?;
        let sum = guest.wait_mark("filled", LIMIT)?;
        let held = snapshots.take(&daemon, &format!("s{round}"))?;
        ensure!(md5(&held[..FILLED])? == sum, "snapshot s{round} lacks what had been flushed before it");
        if round % 2 == 0 {
            deleted += replace_snapshots(&daemon, &mut snapshots, round)?;
        }
        let begun = [
            snapshots.begin_taking(&daemon, &format!("cut{round}"))?,
            snapshots.begin_deleting(&daemon, &format!("s{}", round.saturating_sub(2)))?,
        ];
        thread::sleep(Duration::from_millis(u64::from(round % 5 * 30)));
        daemon.check_alive()?;
        daemon.kill()?;
        drop(begun);
        guest.skip_marks();
        daemon.start()?;
        daemon.wait_until_served()?;
        snapshots.check(&daemon).with_context(|| format!("after round {round}"))?;
        guest.send("sum")?;
        ensure!(guest.wait_mark("sum", LIMIT)? == sum, "what was flushed in round {round} is not there after a kill");
    }
    guest.wait_mark("verified", LIMIT)?;
    guest.send("stop")?;
    guest.finish(LIMIT)?;
    ensure!(deleted > 0 || round < ROUNDS, "no snapshot was deleted while the guest wrote");
    println!("{round} kills; {deleted} snapshots were deleted meanwhile, {} are left", snapshots.count());
    snapshots.check(&daemon).context("at the end")?;
    snapshots.thin_out(&daemon, 0)?;
    let report = daemon.json(["pool", "check", "local"])?;
    ensure!(report["ok"] == true, "{report}");
    daemon.stop()
}
