//! Proves the Ceph rig with Ceph's own tools: what fails here is the rig, not novastor.

use anyhow::Result;
use novastor_tests::rig::ceph::{Ceph, CephSpec, POOL};
use novastor_tests::rig::process::run;
use novastor_tests::rig::tools;
use std::process::Command;
use std::time::Duration;

const LIMIT: Duration = Duration::from_secs(120);

fn write_and_read_back(ceph: &Ceph, image: &str) -> Result<()> {
    ceph.create_image(image, 64)?;
    let uri = format!("rbd:{POOL}/{image}:conf={}", ceph.conf().display());
    let mut qemu_io = Command::new(tools::require("qemu-io")?);
    qemu_io.args(["-f", "raw", "-c", "write -P 0x5a 4M 64k", "-c", "flush", "-c", "read -P 0x5a 4M 64k"]);
    let output = run(qemu_io.arg(uri), LIMIT)?;
    assert!(output.contains("read 65536/65536 bytes"), "{output}");
    Ok(())
}

#[test]
fn one_storage_daemon_serves_an_image() -> Result<()> {
    let ceph = Ceph::start(CephSpec::default())?;
    write_and_read_back(&ceph, "disk")?;
    assert_eq!(ceph.rbd(&["ls", POOL])?, "disk\n");
    let told = ceph.describe();
    assert!(["HEALTH_", "num_ops"].iter().all(|part| told.contains(part)), "{told}");
    Ok(())
}

#[test]
fn keys_are_required_when_asked_for_and_a_copy_may_die() -> Result<()> {
    let mut ceph = Ceph::start(CephSpec { osds: 2, min_copies: 1, authenticate: true })?;
    write_and_read_back(&ceph, "before")?;
    assert!(ceph.rbd(&["--keyring", "/dev/null", "ls", POOL]).is_err(), "a client without a key is refused");
    ceph.kill_osd(0)?;
    write_and_read_back(&ceph, "after")
}
