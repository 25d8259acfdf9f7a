//! Proves the loop-mounted file systems.

use anyhow::Result;
use novastor_tests::rig::loop_mount::LoopMount;
use novastor_tests::rig::process::run;
use std::fs;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

const LIMIT: Duration = Duration::from_secs(60);

fn reflink(folder: &Path) -> Result<String> {
    fs::write(folder.join("a"), vec![7; 1 << 20])?;
    run(Command::new("cp").arg("--reflink=always").args([folder.join("a"), folder.join("b")]), LIMIT)
}

fn is_mounted(folder: &Path) -> Result<bool> {
    Ok(fs::read_to_string("/proc/mounts")?.contains(folder.to_str().unwrap_or_default()))
}

#[test]
fn files_on_xfs_can_be_cloned_and_the_mount_goes_with_the_rig() -> Result<()> {
    let xfs = LoopMount::xfs(512)?;
    let folder = xfs.path().to_owned();
    reflink(&folder)?;
    assert_eq!(fs::read(folder.join("b"))?, vec![7; 1 << 20]);
    assert!(is_mounted(&folder)?);
    drop(xfs);
    assert!(!is_mounted(&folder)?);
    Ok(())
}

#[test]
fn files_on_ext4_cannot_be_cloned() -> Result<()> {
    let ext4 = LoopMount::ext4(64)?;
    let error = reflink(ext4.path()).unwrap_err().to_string();
    assert!(error.contains("failed to clone"), "{error}");
    Ok(())
}
