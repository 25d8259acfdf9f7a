//! A small file system on a loop device or in memory, unmounted on drop.

use crate::rig::process::run;
use crate::rig::{scratch, tools};
use anyhow::{Context, Result, bail};
use rustix::process::geteuid;
use std::ffi::OsString;
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

    /// In memory: full to the last byte when it is full.
    pub fn tmpfs(size_mib: u64) -> Result<Self> {
        Self::check_root()?;
        let folder = scratch::disk_dir()?;
        let size = format!("size={size_mib}m");
        Self::mount(folder, |mount| {
            ["-t", "tmpfs", "-o", &size, "tmpfs"].map(Into::into).into_iter().chain([mount.into()]).collect()
        })
    }

    fn make(size_mib: u64, make: &[&str]) -> Result<Self> {
        Self::check_root()?;
        let folder = scratch::disk_dir()?;
        let image = folder.path().join("image");
        File::create(&image)?.set_len(size_mib << 20).with_context(|| format!("sizing {}", image.display()))?;
        let (program, arguments) = make.split_first().context("no program")?;
        run(Command::new(tools::require(program)?).args(arguments).arg(&image), LIMIT)?;
        // `mount` frees the loop device again when it unmounts.
        Self::mount(folder, |mount| vec!["-o".into(), "loop".into(), image.into(), mount.into()])
    }

    fn check_root() -> Result<()> {
        if !geteuid().is_root() {
            bail!("mounting a file system needs root: run the tests as root");
        }
        Ok(())
    }

    fn mount(folder: TempDir, arguments: impl FnOnce(&Path) -> Vec<OsString>) -> Result<Self> {
        let mount = folder.path().join("mount");
        fs::create_dir(&mount)?;
        run(Command::new(tools::require("mount")?).args(arguments(&mount)), LIMIT)?;
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
