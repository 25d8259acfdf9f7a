//! A system that boots from clones of an imported image: ten of them cost little more than one, and deleting them gives the space back.

use anyhow::{Result, ensure};
use novastor_tests::rig::daemon::Daemon;
use novastor_tests::rig::deadline::Deadline;
use novastor_tests::rig::guest::{Guest, GuestSpec, Memory};
use novastor_tests::rig::process::run;
use novastor_tests::rig::tools;
use std::fs::{self, Permissions};
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

const LIMIT: Duration = Duration::from_secs(180);
const MIB: u64 = 1 << 20;
const CLONES: usize = 10;
/// Booted at once.
const AT_ONCE: usize = 2;
/// Of the image, what neither compresses nor repeats.
const LIBRARY: u64 = 24 * MIB;
/// What a guest writes and deletes again.
const CHURN: u64 = 48 * MIB;
/// What a boot and a small change may cost: the file system's own records, and maps of them.
const CHANGE_MAX: u64 = 3 * MIB;

const INIT: &str = include_str!("../rig/guest-init");
const JOB_FUNCTIONS: &str = include_str!("../rig/guest-job.sh");

/// What the system does: checks its library, tells who it is and how often it has booted, and does what it is told.
const SERVICE: &str = "#!/bin/sh
set -e
. /rig.sh
md5sum -c -s /etc/library.md5
[ ! -e /etc/own.md5 ] || md5sum -c -s /etc/own.md5
mark booted $(cat /etc/name) $(cat /etc/boots)
while await && [ $REPLY != off ]; do
    case $REPLY in
    churn)
        dd if=/dev/urandom of=/churn bs=1M count=$(cat /etc/churn) 2>/dev/null
        sync
        mark churned;;
    trim)
        rm /churn
        sync
        fstrim /
        mark trimmed;;
    *)
        echo $REPLY >/etc/name
        dd if=/dev/urandom of=/etc/own bs=64k count=4 2>/dev/null
        md5sum /etc/own >/etc/own.md5
        mark changed;;
    esac
done
echo $(($(cat /etc/boots) + 1)) >/etc/boots
sync
mount -o remount,ro /";

fn noise(length: u64) -> Vec<u8> {
    let mut state = 0x9E37_79B9_7F4A_7C15u64;
    let mut next = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state.to_le_bytes()
    };
    (0..length / 8).flat_map(|_| next()).collect()
}

/// A qcow2 image of an ext4 file system with a busybox, a service and a library.
fn system_image(folder: &Path) -> Result<PathBuf> {
    let (raw, image, root) = (folder.join("system.raw"), folder.join("system.qcow2"), folder.join("root"));
    for part in ["bin", "sbin", "etc", "proc", "sys", "dev", "tmp", "run", "lib"] {
        fs::create_dir_all(root.join(part))?;
    }
    let busybox = tools::require("busybox")?;
    fs::copy(&busybox, root.join("bin/busybox"))?;
    for applet in run(Command::new(&busybox).arg("--list"), LIMIT)?.lines().filter(|applet| *applet != "busybox") {
        symlink("/bin/busybox", root.join("bin").join(applet))?;
    }
    for (name, script) in [("sbin/init", INIT), ("rig.sh", JOB_FUNCTIONS), ("job.sh", SERVICE)] {
        fs::write(root.join(name), script)?;
        fs::set_permissions(root.join(name), Permissions::from_mode(0o755))?;
    }
    fs::write(root.join("lib/library"), noise(LIBRARY))?;
    let sum = run(Command::new("md5sum").arg("lib/library").current_dir(&root), LIMIT)?;
    fs::write(root.join("etc/library.md5"), sum.replace("lib/", "/lib/"))?;
    for (name, text) in [("name", "golden"), ("boots", "0"), ("churn", &(CHURN / MIB).to_string())] {
        fs::write(root.join("etc").join(name), text)?;
    }
    let mut make = Command::new(tools::require("mkfs.ext4")?);
    run(make.args(["-q", "-E", "lazy_itable_init=1", "-d"]).arg(&root).arg(&raw).arg("160M"), LIMIT)?;
    run(Command::new(tools::require("qemu-img")?).args(["convert", "-O", "qcow2"]).args([&raw, &image]), LIMIT)?;
    Ok(image)
}

/// Bytes that a folder's files hold.
fn bytes_in(folder: &Path) -> Result<u64> {
    let mut sum = 0;
    for entry in fs::read_dir(folder)? {
        let path = entry?.path();
        // What is listed may be gone a moment later.
        sum += if path.is_dir() { bytes_in(&path)? } else { fs::metadata(&path).map_or(0, |found| found.len()) };
    }
    Ok(sum)
}

/// What the pool holds, once that is as little as wanted.
fn shrinks_to(daemon: &Daemon, most: u64) -> Result<u64> {
    let deadline = Deadline::after(LIMIT);
    loop {
        let found = bytes_in(&daemon.disk().join("pool"))?;
        if found <= most {
            return Ok(found);
        }
        ensure!(deadline.pause(), "the pool still holds {found} bytes, more than {most}");
    }
}

/// Boots from a volume.
fn boot(daemon: &Daemon, volume: &str) -> Result<Guest> {
    let spec = GuestSpec::from_disk().memory(256, Memory::Pages4K).vcpus(1);
    Guest::start(&spec.vhost_user_disk("disk0", &daemon.export_vhost_user(volume)?, 1))
}

/// Boots each clone and has it change itself.
fn change(daemon: &Daemon, clones: &[String]) -> Result<()> {
    for some in clones.chunks(AT_ONCE) {
        let mut guests = some.iter().map(|clone| boot(daemon, clone)).collect::<Result<Vec<_>>>()?;
        for (guest, clone) in guests.iter_mut().zip(some) {
            ensure!(guest.wait_mark("booted", LIMIT)? == "golden 0", "{clone} is not the image");
            guest.send(clone)?;
            guest.wait_mark("changed", LIMIT)?;
            guest.send("off")?;
        }
        for guest in guests {
            guest.finish(LIMIT)?;
        }
        daemon.remove_exports()?;
    }
    Ok(())
}

#[test]
fn ten_clones_of_an_image_that_boot_cost_little_more_than_one() -> Result<()> {
    // Flushes wait for the pool, so that after each boot the pool has all that it cost.
    let mut daemon = Daemon::new("durability = \"remote\"")?;
    daemon.start()?;
    let image = system_image(daemon.disk())?;
    daemon.cli(["image", "import", &image.display().to_string(), "local/golden"])?;
    daemon.cli(["snapshot", "create", "golden@v1"])?;
    let empty = bytes_in(&daemon.disk().join("pool"))?;
    ensure!(empty >= LIBRARY, "{empty} bytes for an image with {LIBRARY} of noise");

    let clones: Vec<String> = (0..CLONES).map(|number| format!("clone{number}")).collect();
    for clone in &clones {
        daemon.cli(["volume", "clone", "golden@v1", clone])?;
    }
    change(&daemon, &clones[..1])?;
    let with_one = bytes_in(&daemon.disk().join("pool"))?;
    change(&daemon, &clones[1..])?;
    let with_ten = bytes_in(&daemon.disk().join("pool"))?;
    println!("the image: {empty} bytes; with one clone used: {with_one}; with {CLONES}: {with_ten}");
    ensure!(with_ten - empty <= CLONES as u64 * CHANGE_MAX, "{CLONES} changed clones cost {} bytes", with_ten - empty);
    ensure!(2 * with_ten <= 3 * with_one, "one clone costs {with_one}, {CLONES} cost {with_ten}");

    // Each kept its own changes; what a guest deletes comes back while it runs.
    let mut guest = boot(&daemon, &clones[0])?;
    ensure!(guest.wait_mark("booted", LIMIT)? == "clone0 1");
    guest.send("churn")?;
    guest.wait_mark("churned", LIMIT)?;
    let churned = bytes_in(&daemon.disk().join("pool"))?;
    ensure!(churned >= with_ten + CHURN, "{churned} bytes after {CHURN} more than the {with_ten} before");
    guest.send("trim")?;
    guest.wait_mark("trimmed", LIMIT)?;
    shrinks_to(&daemon, with_ten + CHURN / 4)?;
    guest.send("off")?;
    guest.finish(LIMIT)?;
    daemon.remove_exports()?;

    for clone in &clones {
        daemon.cli(["volume", "delete", clone, "--yes"])?;
    }
    shrinks_to(&daemon, empty + CHANGE_MAX)?;
    let mut guest = boot(&daemon, "golden")?;
    ensure!(guest.wait_mark("booted", LIMIT)? == "golden 0", "the image has changed");
    guest.send("off")?;
    guest.finish(LIMIT)?;
    daemon.remove_exports()?;
    daemon.cli(["snapshot", "delete", "golden@v1", "--yes"])?;
    daemon.cli(["volume", "delete", "golden", "--yes"])?;
    shrinks_to(&daemon, MIB)?;
    let report = daemon.json(["pool", "check", "local"])?;
    ensure!(report["ok"] == true, "{report}");
    daemon.stop()
}
