//! Proves the XFS rig.

use anyhow::Result;
use novastor_tests::rig::process::run;
use novastor_tests::rig::xfs::Xfs;
use std::fs;
use std::process::Command;
use std::time::Duration;

#[test]
fn files_can_be_cloned_and_the_mount_goes_with_the_rig() -> Result<()> {
    let xfs = Xfs::mount(512)?;
    let folder = xfs.path().to_owned();
    fs::write(folder.join("a"), vec![7; 1 << 20])?;
    let mut copy = Command::new("cp");
    run(copy.arg("--reflink=always").args([folder.join("a"), folder.join("b")]), Duration::from_secs(60))?;
    assert_eq!(fs::read(folder.join("b"))?, vec![7; 1 << 20]);
    assert!(fs::read_to_string("/proc/mounts")?.contains(folder.to_str().unwrap_or_default()));
    drop(xfs);
    assert!(!fs::read_to_string("/proc/mounts")?.contains(folder.to_str().unwrap_or_default()));
    Ok(())
}
