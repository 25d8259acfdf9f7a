//! Where rigs keep their files.
//!
//! ```text
//!   rig_dir()     what `cargo xtask rig install` made: guest kernel, initramfs   $NOVASTOR_RIG_DIR or <workspace>/.rig
//!   short_dir()   a new folder with a short path, for unix sockets               /tmp/nv-XXXXXX
//!   disk_dir()    a new folder on the workspace's file system, for disk images   <rig_dir>/run/XXXXXX
//! ```
//!
//! A unix socket's path holds at most 107 bytes, and a clone may sit deep in someone's home folder:
//! sockets go into `short_dir`, whatever `TMPDIR` says.

use anyhow::{Context, Result};
use std::env;
use std::fs;
use std::path::{Path, PathBuf};
use tempfile::{Builder, TempDir};

pub fn workspace_root() -> &'static Path {
    let crate_root = Path::new(env!("CARGO_MANIFEST_DIR"));
    crate_root.parent().unwrap_or(crate_root)
}

pub fn rig_dir() -> PathBuf {
    env::var_os("NOVASTOR_RIG_DIR").map_or_else(|| workspace_root().join(".rig"), PathBuf::from)
}

pub fn short_dir() -> Result<TempDir> {
    Builder::new().prefix("nv-").tempdir_in("/tmp").context("creating a scratch folder in /tmp")
}

pub fn disk_dir() -> Result<TempDir> {
    let parent = rig_dir().join("run");
    fs::create_dir_all(&parent).with_context(|| format!("creating {}", parent.display()))?;
    Builder::new().tempdir_in(&parent).with_context(|| format!("creating a folder in {}", parent.display()))
}
