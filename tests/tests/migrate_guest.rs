//! Guests that move between two exports of a volume, live on huge pages, and belong to another user.

use anyhow::{Result, ensure};
use novastor_tests::rig::daemon::Daemon;
use novastor_tests::rig::fio::Fio;
use novastor_tests::rig::guest::{Guest, GuestSpec, Memory};
use novastor_tests::rig::hugepages::HugePages;
use novastor_tests::rig::process::capture;
use novastor_tests::rig::tools;
use std::fs::{self, Permissions};
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

const LIMIT: Duration = Duration::from_secs(180);
const USER: u32 = 65534;
const GROUP: u32 = 64001;
const OTHER_GROUP: u32 = 64002;

#[test]
fn a_guest_moves_between_two_exports_of_its_volume_under_verified_load() -> Result<()> {
    let mut daemon = Daemon::new("")?;
    daemon.start()?;
    daemon.create_volume("disk", "64M")?;
    let sockets = ["here", "there"].map(|name| daemon.folder().join(name));
    for socket in &sockets {
        daemon.cli(["export", "add", "disk", "--vhost-user", &socket.display().to_string()])?;
    }
    let verify = Fio::disk("/dev/vda").verify(0, 8).with(["--minimal"]).line();
    let script = format!(
        "(await stop && touch /tmp/stop) &
         pass=0
         while ! [ -e /tmp/stop ]; do
             pass=$((pass + 1))
             mark begins $pass
             {verify} --randseed=$pass >/tmp/fio.log 2>&1 || {{ cat /tmp/fio.log; dmesg | tail; exit 1; }}
             mark verified $pass
         done
         ! dmesg | grep -iE 'i/o error|blk_update_request|timeout|reset'"
    );
    let spec = |socket: &Path| GuestSpec::new(&script).vhost_user_disk("disk0", socket, 2);
    let mut source = Guest::start(&spec(&sockets[0]))?;
    let mut target = Guest::start(&spec(&sockets[1]).incoming())?;
    source.wait_mark("verified", LIMIT)?;
    source.wait_mark("begins", LIMIT)?;
    source.migrate(&mut target, LIMIT)?;
    source.kill()?;
    // The pass that the move interrupted, and a whole one.
    target.wait_mark("verified", LIMIT)?;
    target.wait_mark("verified", LIMIT)?;
    target.send("stop")?;
    target.finish(LIMIT)?;
    daemon.stop()
}

#[test]
fn the_group_of_a_socket_lets_another_users_guest_in_on_huge_pages() -> Result<()> {
    let mut daemon = Daemon::new("")?;
    daemon.set_env("NOVASTOR_DAEMON__SOCKET_GROUP", &GROUP.to_string());
    daemon.set_env("NOVASTOR_DAEMON__SOCKET_MODE", "0660");
    fs::set_permissions(daemon.folder(), Permissions::from_mode(0o755))?;
    daemon.start()?;
    for name in ["one", "two", "three"] {
        daemon.create_volume(name, "32M")?;
    }
    let configured = daemon.export_vhost_user("one")?;
    daemon.export_nbd("two")?;
    let own = daemon.folder().join("own");
    let group = OTHER_GROUP.to_string();
    daemon.cli(["export", "add", "three", "--vhost-user", &own.display().to_string(), "--mode", "0620", "--group", &group])?;

    for (socket, group, allowed) in [
        (configured.clone(), GROUP, true),
        (configured.clone(), OTHER_GROUP, false),
        (daemon.nbd_socket(), GROUP, true),
        (daemon.nbd_socket(), OTHER_GROUP, false),
        (own.clone(), GROUP, false),
        (own, OTHER_GROUP, true),
        (daemon.folder().join("admin.sock"), GROUP, false),
    ] {
        ensure!(connects(&socket, group)? == allowed, "group {group} on {}: not {allowed}", socket.display());
    }

    let _pages = HugePages::reserve(512)?;
    let script = [Fio::disk("/dev/vda"), Fio::disk("/dev/vdb")].map(|disk| disk.verify(0, 8).line()).join("\n");
    let spec = GuestSpec::new(script).memory(512, Memory::HugePages2M).run_as(USER, GROUP);
    let spec = spec.vhost_user_disk("disk0", &configured, 2).nbd_disk("disk1", &daemon.nbd_socket(), "two", 0);
    Guest::start(&spec)?.finish(LIMIT)?;
    daemon.stop()
}

/// Whether a process of [`USER`] in this group alone can connect to the socket.
fn connects(socket: &Path, group: u32) -> Result<bool> {
    let mut command = Command::new(tools::require("setpriv")?);
    command.args([&format!("--reuid={USER}"), &format!("--regid={group}"), "--clear-groups"]);
    command.arg(tools::require("socat")?).args(["-u", "OPEN:/dev/null"]);
    let output = capture(command.arg(format!("UNIX-CONNECT:{}", socket.display())), LIMIT)?;
    let error = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.success() || error.contains("Permission denied"), "{error}");
    Ok(output.status.success())
}
