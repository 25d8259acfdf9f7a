//! A small XFS with reflink on a loop device, unmounted on drop.

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
pub struct Xfs {
    mount: PathBuf,
    _folder: TempDir,
}

impl Xfs {
    /// Makes and mounts a file system of this size (XFS wants 300 MiB at least).
    pub fn mount(size_mib: u64) -> Result<Self> {
        if !geteuid().is_root() {
            bail!("mounting a loop device needs root: run the tests as root");
        }
        let folder = scratch::disk_dir()?;
        let image = folder.path().join("image");
        File::create(&image)?.set_len(size_mib << 20).with_context(|| format!("sizing {}", image.display()))?;
        run(Command::new(tools::require("mkfs.xfs")?).args(["-q", "-m", "reflink=1"]).arg(&image), LIMIT)?;
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

impl Drop for Xfs {
    fn drop(&mut self) {
        // Lazily: a process about to end may still hold a file, and the mount must go even so.
        let unmounted = run(Command::new("umount").arg("--lazy").arg(&self.mount), LIMIT);
        if let Err(error) = unmounted {
            eprintln!("{error:#}");
        }
    }
}
