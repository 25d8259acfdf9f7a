//! Snapshots of a mapped volume are taken and deleted under verified load while its daemon is killed again and again: each is bit-exact for ever.
//!
//! `NOVASTOR_TEST_SECONDS` sets how long it keeps killing; without it, a few rounds.

use anyhow::{Context, Result, ensure};
use novastor_tests::rig::daemon::Daemon;
use novastor_tests::rig::deadline::Deadline;
use novastor_tests::rig::fio::Fio;
use novastor_tests::rig::remembered_load::RememberedLoad;
use novastor_tests::rig::snapshots::Snapshots;
use std::env;
use std::thread;
use std::time::Duration;

const LIMIT: Duration = Duration::from_secs(120);
const MIB: usize = 1 << 20;
/// Each round writes this part anew.
const PART_MIB: u64 = 8;
const ROUNDS: u64 = 6;
/// Snapshots that a round leaves there.
const KEPT_MAX: usize = 4;

fn length() -> Result<Option<Duration>> {
    let seconds = env::var("NOVASTOR_TEST_SECONDS").ok();
    seconds.map(|seconds| Ok(Duration::from_secs(seconds.parse().context("NOVASTOR_TEST_SECONDS")?))).transpose()
}

fn part(uri: &str, round: u64) -> Fio {
    Fio::nbd(uri).verify(0, PART_MIB).with([format!("--randseed={}", round + 1)])
}

fn kill_again_and_again(durability: &str) -> Result<()> {
    let mut daemon = Daemon::new(&format!("durability = \"{durability}\""))?;
    daemon.start()?;
    daemon.create_mapped_volume("disk", "24M")?;
    let uri = daemon.export_nbd("disk")?;
    let mut snapshots = Snapshots::new("disk");
    let clock = Deadline::after(length()?.unwrap_or(Duration::MAX));
    let mut load = RememberedLoad::new(PART_MIB << 20, 16 << 20);
    let mut rounds = 0;
    while if length()?.is_some() { !clock.has_passed() } else { rounds < ROUNDS } {
        part(&uri, rounds).run(LIMIT).with_context(|| format!("round {rounds}"))?;
        let underway = load.start(&daemon.nbd_socket(), "disk")?;
        let name = format!("s{rounds}");
        let held = snapshots.take(&daemon, &name)?[..PART_MIB as usize * MIB].to_vec();
        ensure!(daemon.contents("disk")?.starts_with(&held), "{name} is not what had been written before it");
        thread::sleep(Duration::from_millis(rounds % 7 * 50));
        let begun = [
            snapshots.begin_taking(&daemon, &format!("cut{rounds}"))?,
            snapshots.begin_deleting(&daemon, &format!("s{}", rounds.saturating_sub(2)))?,
        ];
        thread::sleep(Duration::from_millis(rounds % 5 * 30));
        load = underway.kill(&mut daemon)?;
        drop(begun);
        daemon.start()?;
        daemon.wait_until_served()?;
        load.check(&daemon.nbd_socket(), "disk").with_context(|| format!("after round {rounds}"))?;
        part(&uri, rounds).with(["--verify_only"]).run(LIMIT).with_context(|| format!("round {rounds}, after a kill"))?;
        snapshots.check(&daemon).with_context(|| format!("after round {rounds}"))?;
        snapshots.thin_out(&daemon, KEPT_MAX)?;
        rounds += 1;
    }
    println!("{rounds} kills with durability {durability}; {} snapshots are left", snapshots.count());
    snapshots.check(&daemon).context("at the end")?;
    snapshots.thin_out(&daemon, 0)?;
    part(&uri, rounds - 1).with(["--verify_only"]).run(LIMIT).context("without its snapshots")?;
    let report = daemon.json(["pool", "check", "local"])?;
    ensure!(report["ok"] == true, "{report}");
    daemon.stop()
}

#[test]
fn snapshots_survive_kills_with_local_durability() -> Result<()> {
    kill_again_and_again("local")
}

#[test]
fn snapshots_survive_kills_with_remote_durability() -> Result<()> {
    kill_again_and_again("remote")
}
