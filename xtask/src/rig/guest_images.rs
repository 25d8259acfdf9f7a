//! What a guest boots: Debian's cloud kernel as an ELF file, and an initial file system with the tools of jobs.
//!
//! ```text
//!   linux-image-cloud (unpacked, not installed) ─▶ tree/ ─▶ vmlinux
//!                                                    └ modules ─┐
//!   fio's source package ─▶ fio-static ─────────────────────────┼─▶ initramfs.cpio
//!   busybox, nbd-client, mkfs.*, … of this machine ─────────────┘
//! ```
//!
//! A changed recipe builds its product anew, and what depends on it.

use super::packages::{self, PackageSet};
use super::product::{forget, make};
use super::{Outcome, kernel_image};
use crate::commands;
use anyhow::{Context, Result};
use novastor_tests::rig::guest::Images;
use novastor_tests::rig::scratch::{rig_dir, workspace_root};
use novastor_tests::rig::tools::Component;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

const KERNEL_RECIPE: &str = include_str!("../../../tests/rig/guest-kernel.sh");
const FIO_RECIPE: &str = include_str!("../../../tests/rig/guest-fio.sh");
const INITRAMFS_RECIPE: &str = concat!(
    include_str!("../../../tests/rig/guest-initramfs.sh"),
    include_str!("../../../tests/rig/guest-init"),
    include_str!("../../../tests/rig/guest-job.sh"),
);
/// To build fio: a C compiler, and the static libraries it links.
const BUILD_PACKAGES: PackageSet = PackageSet {
    component: &Component {
        name: "guest",
        programs: &["dpkg-source", "gcc", "make"],
        files: &["/usr/include/libaio.h", "/usr/lib/x86_64-linux-gnu/libz.a"],
    },
    suite: None,
    packages: &["dpkg-dev", "gcc", "libaio-dev", "make", "zlib1g-dev"],
};

pub fn install() -> Result<Outcome> {
    let images = Images::expected();
    let folder = rig_dir().join("guest");
    let (tree, fio) = (folder.join("tree"), folder.join("fio-static"));
    fs::create_dir_all(&folder).with_context(|| format!("creating {}", folder.display()))?;

    let kernel = make(&images.kernel, KERNEL_RECIPE, || {
        packages::check_machine()?;
        commands::output(recipe("guest-kernel.sh")?.arg(&folder))?;
        kernel_image::extract(&compressed_kernel(&tree)?, &images.kernel)
    })?;
    let static_fio = make(&fio, FIO_RECIPE, || {
        BUILD_PACKAGES.install()?;
        let sources = folder.join("fio");
        commands::output(recipe("guest-fio.sh")?.args([&sources, &fio]))?;
        fs::remove_dir_all(&sources).context("removing fio's sources")
    })?;
    if [kernel, static_fio].contains(&Outcome::Installed) {
        forget(&images.initramfs)?;
    }
    let initramfs = make(&images.initramfs, INITRAMFS_RECIPE, || {
        commands::output(recipe("guest-initramfs.sh")?.args([&tree, &fio, &images.initramfs]))?;
        Ok(())
    })?;
    let all = [kernel, static_fio, initramfs];
    Ok(if all.contains(&Outcome::Installed) { Outcome::Installed } else { Outcome::AlreadyThere })
}

fn recipe(name: &str) -> Result<Command> {
    packages::apt(workspace_root().join("tests/rig").join(name))
}

fn compressed_kernel(tree: &Path) -> Result<PathBuf> {
    let entries = fs::read_dir(tree.join("boot")).context("the kernel package holds no /boot")?;
    let mut paths = entries.flatten().map(|entry| entry.path());
    paths
        .find(|path| path.file_name().is_some_and(|name| name.to_string_lossy().starts_with("vmlinuz-")))
        .context("the kernel package holds no kernel")
}
