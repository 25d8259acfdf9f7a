//! A guest on a mapped volume in a bucket: it verifies what it writes while the daemon is killed, and its log lost.

use anyhow::{Result, ensure};
use novastor_tests::rig::daemon::Daemon;
use novastor_tests::rig::guest::{Guest, GuestSpec};
use novastor_tests::rig::seaweedfs::{ACCESS_KEY, SECRET_KEY, Seaweedfs};
use novastor_tests::rig::snapshots::{Snapshots, md5};
use novastor_tests::rig::verified_load::{self, FILLED};
use std::fs;
use std::time::Duration;

const LIMIT: Duration = Duration::from_secs(180);
const BUCKET: &str = "volumes";

fn host(server: &Seaweedfs, durability: &str) -> Result<Daemon> {
    let pool = format!(
        "[pool.cloud]\ndriver = \"s3\"\nbucket = \"{BUCKET}\"\nendpoint = \"http://{}\"\nallow_http = true\nprefix = \"pool\"\n\
         durability = \"{durability}\"\n",
        server.address()
    );
    let mut daemon = Daemon::new(&pool)?;
    daemon.set_env("NOVASTOR_POOL__CLOUD__ACCESS_KEY_ID", ACCESS_KEY);
    daemon.set_env("NOVASTOR_POOL__CLOUD__SECRET_KEY", SECRET_KEY);
    daemon.start()?;
    daemon.wait_for_pools()?;
    Ok(daemon)
}

fn start_again(daemon: &mut Daemon) -> Result<()> {
    daemon.start()?;
    daemon.wait_for_pools()?;
    daemon.wait_until_served()
}

/// Has the guest rest while `trouble` comes over its daemon; whatever it had flushed is there afterwards.
fn while_it_rests(guest: &mut Guest, daemon: &mut Daemon, trouble: impl FnOnce(&mut Daemon) -> Result<()>) -> Result<()> {
    guest.send("sum")?;
    let sum = guest.wait_mark("sum", LIMIT)?;
    guest.send("rest")?;
    guest.wait_mark("resting", LIMIT)?;
    daemon.kill()?;
    trouble(daemon)?;
    start_again(daemon)?;
    guest.send("go")?;
    guest.wait_mark("kept", LIMIT)?;
    guest.send("sum")?;
    ensure!(guest.wait_mark("sum", LIMIT)? == sum, "what was filled before the trouble has changed");
    Ok(())
}

fn survives(durability: &str) -> Result<()> {
    let server = Seaweedfs::start()?;
    server.make_bucket(BUCKET)?;
    let mut daemon = host(&server, durability)?;
    daemon.cli(["volume", "create", "cloud/disk", "--size", verified_load::SIZE])?;
    let socket = daemon.export_vhost_user("cloud/disk")?;
    let mut guest = Guest::start(&GuestSpec::new(verified_load::script()).vhost_user_disk("disk0", &socket, 2))?;
    guest.wait_ready()?;
    guest.send("1")?;
    let sum = guest.wait_mark("filled", LIMIT)?;
    let mut snapshots = Snapshots::new("cloud/disk");
    let held = snapshots.take(&daemon, "s")?.to_vec();
    ensure!(md5(&held[..FILLED])? == sum, "the snapshot lacks what had been flushed before it");
    daemon.cli(["volume", "clone", "cloud/disk@s", "copy"])?;

    daemon.kill()?;
    start_again(&mut daemon)?;
    guest.skip_marks();
    guest.wait_mark("verified", LIMIT)?;
    guest.send("2")?;
    ensure!(guest.wait_mark("filled", LIMIT)? != sum);
    if durability == "remote" {
        let logs = daemon.disk().join("data/log/cloud");
        while_it_rests(&mut guest, &mut daemon, |_| Ok(fs::remove_dir_all(&logs)?))?;
    } else {
        while_it_rests(&mut guest, &mut daemon, |_| Ok(()))?;
    }
    snapshots.check(&daemon)?;
    ensure!(daemon.contents("cloud/copy")? == held, "the clone is not what its snapshot was");
    guest.send("stop")?;
    guest.finish(LIMIT)?;
    let report = daemon.json(["pool", "check", "cloud"])?;
    ensure!(report["ok"] == true, "{report}");
    daemon.stop()
}

#[test]
fn with_local_durability_it_survives_kills() -> Result<()> {
    survives("local")
}

#[test]
fn with_remote_durability_it_survives_kills_and_the_loss_of_the_log() -> Result<()> {
    survives("remote")
}
