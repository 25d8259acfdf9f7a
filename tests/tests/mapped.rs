//! A mapped volume under verified load from the host, while its daemon is killed in a loop: all that was acknowledged is there afterwards.
//!
//! `NOVASTOR_TEST_SECONDS` sets how long it keeps killing; without it, a few rounds.

use anyhow::{Context, Result, ensure};
use novastor_tests::rig::daemon::Daemon;
use novastor_tests::rig::deadline::Deadline;
use novastor_tests::rig::fio::Fio;
use novastor_tests::rig::remembered_load::RememberedLoad;
use std::env;
use std::thread;
use std::time::Duration;

const LIMIT: Duration = Duration::from_secs(120);
/// Each round writes a part of its own, and overwrites one that all rounds share.
const PART_MIB: u64 = 16;
const PARTS: u64 = 6;
const ROUNDS: u64 = 8;

fn length() -> Result<Option<Duration>> {
    let seconds = env::var("NOVASTOR_TEST_SECONDS").ok();
    seconds.map(|seconds| Ok(Duration::from_secs(seconds.parse().context("NOVASTOR_TEST_SECONDS")?))).transpose()
}

/// Round `round` writes part `round % PARTS` with content of its own.
fn part(uri: &str, round: u64) -> Fio {
    Fio::nbd(uri).verify(round % PARTS * PART_MIB, PART_MIB).with([format!("--randseed={}", round + 1)])
}

fn kill_again_and_again(policy: &str) -> Result<()> {
    let policies = "[policy.local]\ndurability = \"local\"\n\n[policy.remote]\ndurability = \"remote\"\n";
    let mut daemon = Daemon::new(policies)?;
    daemon.start()?;
    let size = format!("{}M", (PARTS + 1) * PART_MIB);
    daemon.cli(["volume", "create", "disk", "--size", &size, "--layout", "mapped", "--policy", policy])?;
    let uri = daemon.export_nbd("disk")?;
    let clock = Deadline::after(length()?.unwrap_or(Duration::MAX));
    let mut load = RememberedLoad::new((PARTS * PART_MIB) << 20, PART_MIB << 20);
    let mut rounds = 0;
    while if length()?.is_some() { !clock.has_passed() } else { rounds < ROUNDS } {
        part(&uri, rounds).run(LIMIT).with_context(|| format!("round {rounds}"))?;
        let underway = load.start(&daemon.nbd_socket(), "disk")?;
        thread::sleep(Duration::from_millis(200 + rounds % 7 * 100));
        load = underway.kill(&mut daemon)?;
        daemon.start()?;
        daemon.wait_until_served()?;
        load.check(&daemon.nbd_socket(), "disk").with_context(|| format!("after round {rounds}"))?;
        for earlier in rounds.saturating_sub(PARTS - 1)..=rounds {
            let read = part(&uri, earlier).with(["--verify_only"]);
            read.run(LIMIT).with_context(|| format!("what round {earlier} wrote, after round {rounds}"))?;
        }
        rounds += 1;
    }
    println!("{rounds} kills with durability {policy}, under {} requests", load.requests());
    let report = daemon.json(["pool", "check", "local"])?;
    ensure!(report["ok"] == true, "{report}");
    daemon.stop()
}

#[test]
fn what_was_written_survives_kills_with_local_durability() -> Result<()> {
    kill_again_and_again("local")
}

#[test]
fn what_was_written_survives_kills_with_remote_durability() -> Result<()> {
    kill_again_and_again("remote")
}
