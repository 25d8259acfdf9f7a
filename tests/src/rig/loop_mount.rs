//! A small file system on a loop device, unmounted on drop.

use crate::rig::process::run;
use crate::rig::{scratch, tools};
use anyhow::{Context, Result, bail};
use rustix::process::geteuid;
use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;
use tempfile::TempDir;

const LIMIT: Duration = Duration::from_secs(60);

#[derive(Debug)]
pub struct LoopMount {
    mount: PathBuf,
    _folder: TempDir,
}

impl LoopMount {
    /// XFS with reflink; it wants 300 MiB at least.
    pub fn xfs(size_mib: u64) -> Result<Self> {
        Self::make(size_mib, &["mkfs.xfs", "-q", "-m", "reflink=1"])
    }

    /// Ext4, which has no reflink.
    pub fn ext4(size_mib: u64) -> Result<Self> {
        Self::make(size_mib, &["mkfs.ext4", "-q", "-m", "0"])
    }

    fn make(size_mib: u64, make: &[&str]) -> Result<Self> {
        if !geteuid().is_root() {
            bail!("mounting a loop device needs root: run the tests as root");
        }
        let folder = scratch::disk_dir()?;
        let image = folder.path().join("image");
        File::create(&image)?.set_len(size_mib << 20).with_context(|| format!("sizing {}", image.display()))?;
        let (program, arguments) = make.split_first().context("no program")?;
        run(Command::new(tools::require(program)?).args(arguments).arg(&image), LIMIT)?;
        let mount = folder.path().join("mount");
        fs::create_dir(&mount)?;
        // `mount` frees the loop device again when it unmounts.
        run(Command::new(tools::require("mount")?).args(["-o", "loop"]).args([&image, &mount]), LIMIT)?;
        Ok(Self { mount, _folder: folder })
    }

    pub fn path(&self) -> &Path {
        &self.mount
    }
}

impl Drop for LoopMount {
    fn drop(&mut self) {
        // Lazily: a process about to end may still hold a file, and the mount must go even so.
        let unmounted = run(Command::new("umount").arg("--lazy").arg(&self.mount), LIMIT);
        if let Err(error) = unmounted {
            eprintln!("{error:#}");
        }
    }
}
