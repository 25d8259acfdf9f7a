//! A mapped volume served to a guest over vhost-user and to the host over NBD at once: each sees what the other wrote.

use anyhow::{Result, ensure};
use novastor_tests::rig::daemon::Daemon;
use novastor_tests::rig::guest::{Guest, GuestSpec};
use novastor_tests::rig::process::run;
use novastor_tests::rig::tools;
use std::process::Command;
use std::time::Duration;

const LIMIT: Duration = Duration::from_secs(120);

/// Writes 64 KiB of 0x55 at the start, then looks for 64 KiB of 0x33 at 1 MiB.
const SCRIPT: &str = "set -e
    dd if=/dev/zero bs=64k count=1 2>/dev/null | tr '\\0' '\\125' >/tmp/own
    dd if=/dev/zero bs=64k count=1 2>/dev/null | tr '\\0' '\\63' >/tmp/wanted
    dd if=/tmp/own of=/dev/vda bs=64k count=1 oflag=direct
    mark written
    await read
    dd if=/dev/vda of=/tmp/found bs=64k skip=16 count=1 iflag=direct
    cmp /tmp/wanted /tmp/found
    mark same";

fn qemu_io(uri: &str, command: &str) -> Result<String> {
    run(Command::new(tools::require("qemu-io")?).args(["-f", "raw", "-c", command, uri]), LIMIT)
}

#[test]
fn both_ways_show_one_content() -> Result<()> {
    let mut daemon = Daemon::new("")?;
    daemon.start()?;
    daemon.create_mapped_volume("disk", "64M")?;
    let socket = daemon.export_vhost_user("disk")?;
    let uri = daemon.export_nbd("disk")?;
    let mut guest = Guest::start(&GuestSpec::new(SCRIPT).vhost_user_disk("disk0", &socket, 2))?;
    guest.wait_mark("written", LIMIT)?;
    let said = qemu_io(&uri, "read -P 0x55 0 64k")?;
    ensure!(said.contains("read 65536/65536") && !said.contains("failed"), "{said}");
    let said = qemu_io(&uri, "write -P 0x33 1M 64k")?;
    ensure!(said.contains("wrote 65536/65536"), "{said}");
    guest.send("read")?;
    guest.wait_mark("same", LIMIT)?;
    guest.finish(LIMIT)?;
    daemon.stop()
}
