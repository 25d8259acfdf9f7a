//! Snapshots and clones of volumes that a guest writes to: each is one point in time, across volumes too.

use anyhow::{Context, Result, ensure};
use novastor_tests::rig::daemon::Daemon;
use novastor_tests::rig::fio::Fio;
use novastor_tests::rig::guest::{Guest, GuestSpec};
use novastor_tests::rig::loop_mount::LoopMount;
use novastor_tests::rig::snapshots::md5;
use std::time::Duration;

const LIMIT: Duration = Duration::from_secs(180);
const MIB: usize = 1 << 20;
/// By these the guest tells its disks apart, whatever it calls them.
const SIZES: [&str; 2] = ["64M", "68M"];
/// Where the guest counts, on both disks.
const COUNTER: usize = 40 * MIB;

fn counter(bytes: &[u8]) -> Result<u64> {
    let text = bytes.get(COUNTER..COUNTER + 20).context("a short volume")?;
    let digits = String::from_utf8_lossy(text);
    digits.split_whitespace().next().context("no counter")?.parse().with_context(|| format!("counter {digits:?}"))
}

fn writes(daemon: &Daemon, volume: &str) -> Result<f64> {
    daemon.metrics()?.sum("novastor_volume_operations_total", &[("volume", volume), ("op", "write")])
}

#[test]
fn snapshots_and_clones_under_load_are_points_in_time() -> Result<()> {
    let xfs = LoopMount::xfs(1024)?;
    let mut daemon = Daemon::new(&format!("[pool.xfs]\ndriver = \"file\"\npath = \"{}\"", xfs.path().display()))?;
    daemon.start()?;
    let volumes = ["xfs/one", "xfs/two"];
    let mut spec = GuestSpec::new(script());
    for (index, volume) in volumes.iter().enumerate() {
        daemon.create_volume(volume, SIZES[index])?;
        spec = spec.vhost_user_disk(&format!("disk{index}"), &daemon.export_vhost_user(volume)?, 2);
    }
    let mut guest = Guest::start(&spec)?;
    let checksum = guest.wait_mark("filled", LIMIT)?;
    let before = writes(&daemon, "xfs/one")?;

    for snapshot in ["a", "b", "c"] {
        let both = volumes.map(|volume| format!("{volume}@{snapshot}"));
        guest.skip_marks();
        guest.wait_mark("counted", LIMIT)?;
        daemon.cli(["snapshot", "create", &both[0], &both[1]])?;
        let disks = [daemon.contents(&both[0])?, daemon.contents(&both[1])?];
        let counts = [counter(&disks[0])?, counter(&disks[1])?];
        // The guest counts on the first disk, then on the second.
        ensure!(counts[0] == counts[1] || counts[0] == counts[1] + 1, "{both:?} hold {counts:?}");
        ensure!(md5(&disks[0][..8 * MIB])? == checksum, "{} changed what had been written", both[0]);
    }
    daemon.cli(["volume", "clone", "xfs/one", "xfs/copy"])?;
    daemon.cli(["volume", "clone", "xfs/one@a", "xfs/early"])?;
    guest.send("overwrite")?;
    let newer = guest.wait_mark("overwritten", LIMIT)?;
    ensure!(newer != checksum);
    for snapshot in ["xfs/one@a", "xfs/one@c", "xfs/copy", "xfs/early"] {
        ensure!(md5(&daemon.contents(snapshot)?[..8 * MIB])? == checksum, "{snapshot} changed");
    }
    let clone = daemon.export_nbd("xfs/early")?;
    Fio::nbd(&clone).verify(0, 8).run(LIMIT)?;
    ensure!(md5(&daemon.contents("xfs/one@a")?[..8 * MIB])? == checksum, "writing a clone changed its origin");

    ensure!(writes(&daemon, "xfs/one")? >= before + 2048.0, "the guest's writes are counted");
    for volume in volumes {
        ensure!(daemon.metrics()?.sum("novastor_volume_errors_total", &[("volume", volume)])? == 0.0);
    }
    guest.send("stop")?;
    guest.finish(LIMIT)?;
    ensure!(md5(&daemon.contents("xfs/one")?[..8 * MIB])? == newer, "the volume itself is as the guest left it");
    daemon.stop()
}

/// Fills the first 8 MiB with a verified pattern, keeps writing behind it, and counts on both disks in turn.
fn script() -> String {
    let fill = Fio::disk("/tmp/first").verify(0, 8).with(["--minimal"]).line();
    let load = Fio::disk("/tmp/first").verify(16, 8).with(["--minimal"]).line();
    let block = COUNTER / 512;
    format!(
        "first=vda second=vdb
         [ $(cat /sys/block/vda/size) -lt $(cat /sys/block/vdb/size) ] || {{ first=vdb; second=vda; }}
         ln -s /dev/$first /tmp/first
         ln -s /dev/$second /tmp/second
         {fill} >/tmp/fio.log 2>&1
         (while ! [ -e /tmp/stop ]; do {load} >/tmp/load.log 2>&1 || mark broken; done) &
         (count=1; while ! [ -e /tmp/stop ]; do
              for disk in /tmp/first /tmp/second; do
                  echo $count | dd of=$disk bs=512 seek={block} conv=sync,fsync 2>/dev/null || mark broken
              done
              mark counted $count
              count=$((count + 1))
          done) &
         checksum() {{ dd if=/tmp/first bs=1M count=8 iflag=direct 2>/dev/null | md5sum | cut -d' ' -f1; }}
         mark filled $(checksum)
         await overwrite
         {fill} --randseed=7 --verify_pattern=0x5a --verify=pattern >/tmp/fio.log 2>&1
         mark overwritten $(checksum)
         await stop
         touch /tmp/stop
         wait
         ! dmesg | grep -i 'i/o error'"
    )
}
