//! What changed since a snapshot, as clients of NBD see it: what a backup reads.

use anyhow::{Context, Result, ensure};
use novastor_tests::rig::daemon::Daemon;
use novastor_tests::rig::process::run;
use novastor_tests::rig::tools;
use serde_json::Value;
use std::process::Command;
use std::time::Duration;

const LIMIT: Duration = Duration::from_secs(60);
const KIB: u64 = 1 << 10;
const MIB: u64 = 1 << 20;

fn write(uri: &str, offset: u64, length: u64, pattern: u8) -> Result<()> {
    let write = format!("write -P {pattern} {offset} {length}");
    run(Command::new(tools::require("qemu-io")?).args(["-f", "raw", "-c", &write, "-c", "flush", uri]), LIMIT).map(drop)
}

/// The ranges that `nbdinfo` shows with flag 1.
fn changed(uri: &str, since: &str) -> Result<Vec<(u64, u64)>> {
    let map = format!("--map=novastor:changed-since:{since}");
    let json = run(Command::new(tools::require("nbdinfo")?).args(["--json", &map, uri]), LIMIT)?;
    let extents: Vec<Value> = serde_json::from_str(&json).context("the map")?;
    let number = |extent: &Value, field: &str| extent[field].as_u64().with_context(|| format!("{field} of {extent}"));
    let marked = extents.iter().filter(|extent| extent["type"] == 1);
    marked.map(|extent| Ok((number(extent, "offset")?, number(extent, "length")?))).collect()
}

#[test]
fn clients_see_what_changed_between_snapshots_and_until_they_attached() -> Result<()> {
    let mut daemon = Daemon::new("")?;
    daemon.start()?;
    daemon.create_mapped_volume("disk", "64M")?;
    let live = daemon.export_nbd("disk")?;
    write(&live, MIB, 64 * KIB, 1)?;
    daemon.cli(["snapshot", "create", "disk@first"])?;
    write(&live, 4 * MIB, 128 * KIB, 2)?;
    write(&live, 6 * MIB, 512, 3)?;
    daemon.cli(["snapshot", "create", "disk@second"])?;
    daemon.cli(["export", "add", "disk@second", "--nbd", "--read-only"])?;
    let still = daemon.nbd_uri("disk@second");
    write(&live, 8 * MIB, 4 * KIB, 4)?;

    let info = run(Command::new(tools::require("nbdinfo")?).arg(&still), LIMIT)?;
    ensure!(info.contains("novastor:changed-since:first") && !info.contains("changed-since:second"), "{info}");
    let between = [(4 * MIB, 128 * KIB), (6 * MIB, 4 * KIB)];
    let found = changed(&still, "first")?;
    ensure!(found == between, "{found:?}");
    let diff = daemon.json(["snapshot", "diff", "disk@first", "disk@second"])?;
    ensure!(diff["changed_bytes"] == 132 * KIB, "{diff}");

    let until_now = [between[0], between[1], (8 * MIB, 4 * KIB)];
    let found = changed(&live, "first")?;
    ensure!(found == until_now, "{found:?}");
    let found = changed(&live, "second")?;
    ensure!(found == [until_now[2]], "{found:?}");
    daemon.cli(["volume", "resize", "disk", "65M"])?;
    let found = changed(&live, "second")?;
    ensure!(found == [until_now[2], (64 * MIB, MIB)], "what is past the snapshot's end has changed: {found:?}");
    daemon.stop()
}
