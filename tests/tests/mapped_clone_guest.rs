//! Guests on clones of mapped volumes: a system that runs from clones of an imported image, and a file system that is cloned while it is written to.

use anyhow::{Context, Result, ensure};
use novastor_tests::rig::daemon::Daemon;
use novastor_tests::rig::guest::{Guest, GuestSpec};
use novastor_tests::rig::process::run;
use novastor_tests::rig::tools;
use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

const LIMIT: Duration = Duration::from_secs(180);
const MIB: u64 = 1 << 20;
const CLONES: usize = 3;

/// An ext4 image with a busybox that runs by itself, and a library's worth of data that does not compress.
fn system_image(folder: &Path) -> Result<PathBuf> {
    let (image, root) = (folder.join("system.raw"), folder.join("root"));
    for part in ["bin", "etc"] {
        fs::create_dir_all(root.join(part))?;
    }
    fs::copy(tools::require("busybox")?, root.join("bin/busybox"))?;
    fs::write(root.join("etc/version"), "golden")?;
    let words = (0..4 * MIB as u32 / 4).map(|word| word.wrapping_mul(0x9E37_79B9).rotate_left(word % 31));
    fs::write(root.join("bin/library"), words.flat_map(u32::to_le_bytes).collect::<Vec<u8>>())?;
    let mut make = Command::new(tools::require("mkfs.ext4")?);
    run(make.args(["-q", "-E", "lazy_itable_init=1", "-d"]).arg(&root).arg(&image).arg("64M"), LIMIT)?;
    Ok(image)
}

/// What a file in an ext4 image holds; the image must be sound.
fn file_in(image: &Path, path: &str) -> Result<String> {
    run(Command::new(tools::require("e2fsck")?).arg("-fn").arg(image), LIMIT)?;
    run(Command::new("debugfs").args(["-R", &format!("cat {path}")]).arg(image), LIMIT)
}

#[test]
fn a_system_runs_from_clones_of_an_imported_image_and_each_keeps_its_changes() -> Result<()> {
    let mut daemon = Daemon::new("")?;
    daemon.start()?;
    let image = system_image(daemon.disk())?;
    daemon.cli(["image", "import", &image.display().to_string(), "local/golden"])?;
    daemon.cli(["snapshot", "create", "golden@v1"])?;
    let clones: Vec<String> = (0..CLONES).map(|number| format!("clone{number}")).collect();
    let mut spec = GuestSpec::new(
        "modprobe ext4
         for disk in vda vdb vdc; do
             mount -t ext4 /dev/$disk /mnt
             chroot /mnt /bin/busybox sh -c \"
                 [ \\$(/bin/busybox cat /etc/version) = golden ] &&
                 echo $disk >/etc/name && /bin/busybox dd if=/bin/library of=/etc/changed bs=64k count=8 && echo changed >/etc/version\"
             umount /mnt
             e2fsck -fn /dev/$disk
         done",
    );
    for clone in &clones {
        daemon.cli(["volume", "clone", "golden@v1", clone])?;
        spec = spec.vhost_user_disk(clone, &daemon.export_vhost_user(clone)?, 2);
    }
    Guest::start(&spec)?.finish(LIMIT)?;
    daemon.remove_exports()?;

    let golden = fs::read(&image)?;
    for name in ["golden", "golden@v1"] {
        ensure!(daemon.contents(name)? == golden, "{name} is not the image any more");
    }
    let mut names = BTreeSet::new();
    for clone in &clones {
        let found = daemon.copy_of(clone)?;
        ensure!(file_in(&found, "/etc/version")?.trim() == "changed", "{clone}");
        names.insert(file_in(&found, "/etc/name")?.trim().to_owned());
        let unique = daemon.json(["volume", "usage", clone])?["unique"].as_u64().context("unique bytes")?;
        ensure!(unique < 4 * MIB, "{clone} keeps {unique} bytes of its own");
    }
    ensure!(names == BTreeSet::from(["vda", "vdb", "vdc"].map(str::to_owned)), "{names:?}");
    outlives_its_origin(&daemon, &clones)?;
    daemon.stop()
}

/// The last clone is made independent; the rest and the origin go.
fn outlives_its_origin(daemon: &Daemon, clones: &[String]) -> Result<()> {
    let (last, others) = clones.split_last().context("no clone")?;
    let before = daemon.contents(last)?;
    let refused = daemon.try_cli(["volume", "delete", "golden", "--yes"])?;
    let said = String::from_utf8_lossy(&refused.stderr).into_owned();
    ensure!(!refused.status.success() && clones.iter().all(|clone| said.contains(clone.as_str())), "{said}");
    daemon.cli(["volume", "flatten", last])?;
    for clone in others {
        daemon.cli(["volume", "delete", clone, "--yes"])?;
    }
    daemon.cli(["snapshot", "delete", "golden@v1", "--yes"])?;
    daemon.cli(["volume", "delete", "golden", "--yes"])?;
    ensure!(daemon.contents(last)? == before, "{last} changed when its origin went");
    let report = daemon.json(["pool", "check", "local"])?;
    ensure!(report["ok"] == true, "{report}");
    Ok(())
}

/// Fills a file system, and goes on writing into it while it is cloned.
const WRITER: &str = "modprobe ext4
    mkfs.ext4 -q /dev/vda
    mount -t ext4 /dev/vda /mnt
    dd if=/dev/urandom of=/mnt/kept bs=64k count=64 2>/dev/null
    sync
    mark filled $(md5sum </mnt/kept | cut -d' ' -f1)
    (while ! [ -e /tmp/stop ]; do dd if=/dev/urandom of=/mnt/churn bs=64k count=16 conv=fsync 2>/dev/null || mark broken; done) &
    await stop
    touch /tmp/stop
    wait
    umount /mnt
    e2fsck -fn /dev/vda";

/// Finds what was there when the clone was made, and changes it.
const READER: &str = "modprobe ext4
    mount -t ext4 /dev/vda /mnt
    mark found $(md5sum </mnt/kept | cut -d' ' -f1)
    echo other >/mnt/kept
    rm -f /mnt/churn
    umount /mnt
    e2fsck -fn /dev/vda";

#[test]
fn a_file_system_cloned_in_use_is_whole_and_changing_the_clone_leaves_its_origin_alone() -> Result<()> {
    let mut daemon = Daemon::new("")?;
    daemon.start()?;
    daemon.cli(["volume", "create", "local/disk", "--size", "64M"])?;
    let writer = GuestSpec::new(WRITER).vhost_user_disk("disk0", &daemon.export_vhost_user("disk")?, 2);
    let mut guest = Guest::start(&writer)?;
    let checksum = guest.wait_mark("filled", LIMIT)?;
    daemon.cli(["volume", "clone", "disk", "copy"])?;
    guest.send("stop")?;
    guest.finish(LIMIT)?;
    daemon.remove_exports()?;
    let before = daemon.contents("disk")?;

    let reader = GuestSpec::new(READER).vhost_user_disk("disk0", &daemon.export_vhost_user("copy")?, 2);
    let mut guest = Guest::start(&reader)?;
    ensure!(guest.wait_mark("found", LIMIT)? == checksum, "the clone does not hold what had been synced");
    guest.finish(LIMIT)?;
    daemon.remove_exports()?;
    ensure!(daemon.contents("disk")? == before, "changing the clone changed its origin");
    ensure!(file_in(&daemon.copy_of("copy")?, "/kept")?.trim() == "other");
    daemon.stop()
}
