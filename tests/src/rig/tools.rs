//! The programs that rigs and tests call, and the component of `cargo xtask rig install` each belongs to.

use anyhow::{Result, bail};
use std::env;
use std::path::{Path, PathBuf};

/// A group of programs and files installed together.
#[derive(Debug)]
pub struct Component {
    pub name: &'static str,
    pub programs: &'static [&'static str],
    /// Files that are no program, such as libraries opened at run time.
    pub files: &'static [&'static str],
}

pub const QEMU: Component = Component {
    name: "qemu",
    programs: &["qemu-system-x86_64", "qemu-storage-daemon", "qemu-img", "qemu-io", "qemu-nbd"],
    files: &["/usr/lib/x86_64-linux-gnu/qemu/block-rbd.so", "/usr/share/qemu/qboot.rom"],
};

pub const TOOLS: Component = Component {
    name: "tools",
    programs: &[
        "blkdiscard",
        "busybox",
        "c++",
        "cpio",
        "depmod",
        "dmsetup",
        "e2fsck",
        "fio",
        "losetup",
        "mkfs.ext4",
        "mkfs.xfs",
        "modprobe",
        "nbd-client",
        "nbdcopy",
        "nbdinfo",
        "nbdkit",
        "python3",
        "setpriv",
        "socat",
        "systemctl",
        "unshare",
        "xfs_io",
        "xz",
        "zstd",
    ],
    files: &["/lib/systemd/systemd"],
};

pub const CEPH: Component = Component {
    name: "ceph",
    programs: &["ceph", "ceph-authtool", "ceph-mon", "ceph-osd", "monmaptool", "rados", "rbd"],
    files: &["/usr/lib/x86_64-linux-gnu/librados.so.2", "/usr/lib/x86_64-linux-gnu/librbd.so.1"],
};

pub const COMPONENTS: [&Component; 3] = [&QEMU, &TOOLS, &CEPH];

impl Component {
    /// The programs and files of this component that this machine lacks.
    pub fn missing(&self) -> Vec<&'static str> {
        let programs = self.programs.iter().filter(|name| find(name).is_none());
        let files = self.files.iter().filter(|path| !Path::new(path).exists());
        programs.chain(files).copied().collect()
    }
}

/// Looks a program up in `PATH`, then in the folders of system programs, which an ordinary user's `PATH` omits.
pub fn find(program: &str) -> Option<PathBuf> {
    let path = env::var_os("PATH").unwrap_or_default();
    env::split_paths(&path)
        .chain(["/usr/sbin", "/sbin"].map(PathBuf::from))
        .map(|folder| folder.join(program))
        .find(|candidate| candidate.is_file())
}

/// The path of a program, or an error that says how to install it.
pub fn require(program: &str) -> Result<PathBuf> {
    if let Some(path) = find(program) {
        return Ok(path);
    }
    let owner = COMPONENTS.iter().find(|component| component.programs.contains(&program));
    match owner {
        Some(component) => {
            bail!("`{program}` is not installed: run `cargo xtask rig install {}`", component.name)
        }
        None => bail!("`{program}` is not installed, and no rig component brings it: install it by hand"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_missing_program_is_an_error_that_names_the_next_step() {
        let error = require("no-such-program").unwrap_err().to_string();
        assert!(error.contains("`no-such-program` is not installed"), "{error}");
    }

    #[test]
    fn a_program_is_found_by_its_path() {
        assert!(require("sh").unwrap().is_absolute());
    }
}
