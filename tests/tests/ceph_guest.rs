//! An RBD image served over NBD and vhost-user; and a host that has no Ceph.

use anyhow::{Context, Result, ensure};
use novastor_tests::rig::ceph::{Ceph, CephSpec, POOL};
use novastor_tests::rig::daemon::Daemon;
use novastor_tests::rig::fio::Fio;
use novastor_tests::rig::guest::{Guest, GuestSpec};
use novastor_tests::rig::process::run;
use novastor_tests::rig::tools;
use std::fs;
use std::process::Command;
use std::time::Duration;

const LIMIT: Duration = Duration::from_secs(180);

#[test]
fn an_image_is_served_over_both_protocols() -> Result<()> {
    let ceph = Ceph::start(CephSpec::default())?;
    ceph.create_image("vm1", 64)?;
    let conf = ceph.conf();
    let mut daemon = Daemon::new(&format!("[pool.ceph]\ndriver = \"rbd\"\npool = \"{POOL}\"\nconf = \"{}\"", conf.display()))?;
    daemon.start()?;
    daemon.cli(["volume", "adopt", "ceph/vm1"])?;
    let socket = daemon.export_vhost_user("ceph/vm1")?;
    daemon.cli(["export", "add", "ceph/vm1", "--nbd"])?;
    let uri = daemon.nbd_uri("vm1");

    Fio::nbd(&uri).verify(0, 8).run(LIMIT)?;
    let script = [Fio::disk("/dev/vda").verify(16, 8).line(), Fio::disk("/dev/vda").verify(0, 4).line()].join("\n");
    Guest::start(&GuestSpec::new(script).vhost_user_disk("disk0", &socket, 2))?.finish(LIMIT)?;

    let mut compare = Command::new(tools::require("qemu-img")?);
    compare.args(["compare", "-f", "raw", "-F", "raw", &uri, &format!("rbd:{POOL}/vm1:conf={}", conf.display())]);
    run(&mut compare, LIMIT)?;
    daemon.stop()
}

#[test]
fn an_image_resized_elsewhere_grows_in_the_guest_and_for_new_nbd_clients() -> Result<()> {
    let ceph = Ceph::start(CephSpec::default())?;
    ceph.create_image("vm1", 64)?;
    let conf = ceph.conf();
    let mut daemon = Daemon::new(&format!("[pool.ceph]\ndriver = \"rbd\"\npool = \"{POOL}\"\nconf = \"{}\"", conf.display()))?;
    daemon.start()?;
    let socket = daemon.export_vhost_user("ceph/vm1")?;
    daemon.cli(["export", "add", "ceph/vm1", "--nbd"])?;
    let script = "mark size $(blockdev --getsize64 /dev/vda)
         while [ $(blockdev --getsize64 /dev/vda) = 67108864 ]; do sleep 0.01; done
         mark size $(blockdev --getsize64 /dev/vda)
         dd if=/dev/zero of=/dev/vda bs=1M seek=127 count=1 oflag=direct 2>/dev/null";
    let mut guest = Guest::start(&GuestSpec::new(script).vhost_user_disk("disk0", &socket, 2))?;
    let first = guest.wait_mark("size", LIMIT).with_context(|| ceph.describe())?;
    ensure!(first == (64u64 << 20).to_string());
    ceph.rbd(&["resize", "--size", "128M", &format!("{POOL}/vm1")])?;
    ensure!(guest.wait_mark("size", LIMIT)? == (128u64 << 20).to_string());
    guest.finish(LIMIT)?;

    ensure!(daemon.json(["volume", "show", "ceph/vm1"])?["size"] == 128 << 20);
    let mut ask = Command::new(tools::require("nbdinfo")?);
    let size = run(ask.args(["--size", &daemon.nbd_uri("vm1")]), LIMIT)?;
    ensure!(size.trim() == (128u64 << 20).to_string(), "an NBD client sees {size}");
    daemon.stop()
}

/// Hides librbd from the daemon alone, as if it had never been installed: a whiteout lies over it.
const WITHOUT_LIBRBD: &str = "cover=$1 libraries=/usr/lib/x86_64-linux-gnu; shift
    mkdir $cover
    mknod $cover/librbd.so.1 c 0 0
    mount -t overlay overlay -o lowerdir=$cover:$libraries $libraries
    exec \"$@\"";

#[test]
fn without_ceph_the_daemon_serves_the_rest_and_says_what_is_missing() -> Result<()> {
    let mut daemon = Daemon::new("[pool.ceph]\ndriver = \"rbd\"\npool = \"rbd\"\nconf = \"{dir}/ceph.conf\"")?;
    fs::write(daemon.folder().join("ceph.conf"), "[global]\nmon host = 127.0.0.1\n")?;
    let cover = daemon.folder().join("cover").display().to_string();
    daemon.set_launcher(["unshare", "--mount", "sh", "-ec", WITHOUT_LIBRBD, "sh", &cover]);
    daemon.start()?;
    let pool = daemon.json(["pool", "show", "ceph"])?;
    let detail = pool["detail"].as_str().unwrap_or_default();
    ensure!(pool["ok"] == false && detail.contains("librbd.so.1") && detail.contains("install the package librbd1"), "{pool}");
    println!("{detail}");
    daemon.create_volume("local/disk", "64M")?;
    Fio::nbd(&daemon.export_nbd("local/disk")?).verify(0, 4).run(LIMIT)?;
    daemon.stop()
}
