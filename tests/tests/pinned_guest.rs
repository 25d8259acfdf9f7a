//! A guest whose memory is pinned, and whose balloon takes it back.

use anyhow::{Result, ensure};
use novastor_tests::rig::daemon::Daemon;
use novastor_tests::rig::deadline::Deadline;
use novastor_tests::rig::fio::Fio;
use novastor_tests::rig::guest::{Guest, GuestSpec, Memory};
use serde_json::json;
use std::time::Duration;

const LIMIT: Duration = Duration::from_secs(240);
const MEMORY_MIB: u64 = 512;
const BALLOONED_MIB: u64 = 300;

/// Large requests, checked, again and again until told to stop.
fn script() -> String {
    let load = Fio::disk("/dev/vda").with([
        "--rw=randwrite",
        "--bs=128k",
        "--size=32M",
        "--iodepth=8",
        "--verify=crc32c",
        "--do_verify=1",
        "--verify_fatal=1",
        "--verify_state_save=0",
        "--output=/dev/null",
    ]);
    format!(
        "modprobe virtio_balloon\nround=0\nwhile [ $round -lt 12 ]; do {}; round=$((round + 1)); mark round $round; done",
        load.line()
    )
}

fn guest_memory_mib(guest: &mut Guest) -> Result<u64> {
    Ok(guest.execute("query-balloon", json!({}))?["actual"].as_u64().unwrap_or(0) >> 20)
}

fn balloon(guest: &mut Guest, mib: u64) -> Result<()> {
    guest.execute("balloon", json!({ "value": mib << 20 }))?;
    let deadline = Deadline::after(LIMIT);
    while guest_memory_mib(guest)? != mib {
        ensure!(!deadline.remaining().is_zero(), "the balloon did not come to {mib} MiB");
        std::thread::sleep(Duration::from_millis(50));
    }
    Ok(())
}

fn wait_for_log(daemon: &Daemon, text: &str) -> Result<()> {
    let deadline = Deadline::after(LIMIT);
    while !daemon.log().contains(text) {
        ensure!(!deadline.remaining().is_zero(), "{text:?} is not in the log:\n{}", daemon.log());
        std::thread::sleep(Duration::from_millis(20));
    }
    Ok(())
}

#[test]
fn a_balloon_takes_pinned_memory_back_under_verified_load() -> Result<()> {
    let mut daemon = Daemon::new("")?;
    daemon.set_env("NOVASTOR_DAEMON__PIN_GUEST_MEMORY", "true");
    daemon.start()?;
    daemon.create_volume("disk", "64M")?;
    let socket = daemon.export_vhost_user("disk")?;
    let memory = format!("memory-backend-memfd,id=mem,size={MEMORY_MIB}M,share=on,prealloc=on");
    let size = MEMORY_MIB.to_string();
    let spec = GuestSpec::new(script())
        .memory(MEMORY_MIB, Memory::FromArguments)
        .args(["-object", &memory, "-m", &size, "-machine", "memory-backend=mem", "-device", "virtio-balloon-pci"])
        .vhost_user_disk("disk0", &socket, 2);
    let mut guest = Guest::start(&spec)?;
    wait_for_log(&daemon, "of guest memory are pinned")?;
    for round in 1..=3 {
        ensure!(guest.wait_mark("round", LIMIT)? == round.to_string(), "round {round}");
    }
    ensure!(!daemon.log().contains("no longer pinned"), "nothing was taken back yet:\n{}", daemon.log());

    for _ in 0..3 {
        balloon(&mut guest, BALLOONED_MIB)?;
        balloon(&mut guest, MEMORY_MIB)?;
    }
    wait_for_log(&daemon, "no longer pinned")?;
    guest.finish(LIMIT)?;
    daemon.stop()
}
