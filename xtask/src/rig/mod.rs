//! `cargo xtask rig install`: brings a fresh Debian 12 to where every test can run.
//!
//! ```text
//!   qemu  ─┐
//!   tools ─┼─ packages, through a view of the archive of our own (see `packages`)
//!   ceph  ─┘
//!   s3 ────── SeaweedFS, in <rig>/seaweedfs (see `seaweedfs`)
//!   guest ─── a kernel, a static fio and an initial file system, in <rig>/guest (see `guest_images`)
//! ```
//!
//! Invariants:
//! - Installing what is there already does nothing, needs no root, and takes well under a second.
//! - Of the machine's configuration, only what the packages themselves bring changes.
//! - Two installations at once take turns.

mod guest_images;
mod kernel_image;
pub mod packages;
pub mod product;
mod seaweedfs;

use anyhow::{Context, Result};
use clap::ValueEnum;
use novastor_tests::rig::deadline::Deadline;
use novastor_tests::rig::scratch::rig_dir;
use novastor_tests::rig::tools::{CEPH, QEMU, TOOLS};
use packages::PackageSet;
use std::fs::{self, File};
use std::time::Duration;

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Selection {
    /// QEMU 10: guests, qemu-storage-daemon, qemu-img
    Qemu,
    /// fio, nbdkit, libnbd, file systems, …
    Tools,
    /// The guest's kernel and initial file system
    Guest,
    /// A one-node Ceph, and librbd
    Ceph,
    /// SeaweedFS, an S3 server
    S3,
    /// All of these
    All,
}

/// QEMU brings a newer libelf, which only the libdw of its own release accepts; Ceph needs libdw.
const QEMU_PACKAGES: PackageSet = PackageSet {
    component: &QEMU,
    suite: Some("bookworm-backports"),
    packages: &["libdw1", "qemu-block-extra", "qemu-system-x86", "qemu-utils"],
};

/// The C++ compiler is for libFuzzer.
const TOOLS_PACKAGES: PackageSet = PackageSet {
    component: &TOOLS,
    suite: None,
    packages: &[
        "busybox-static",
        "cpio",
        "dmsetup",
        "e2fsprogs",
        "fio",
        "g++",
        "kmod",
        "libnbd-bin",
        "mount",
        "nbd-client",
        "nbdkit",
        "python3",
        "socat",
        "systemd",
        "util-linux",
        "xfsprogs",
        "xz-utils",
        "zstd",
    ],
};

/// librbd comes with ceph-common; novastor and QEMU open it at run time.
const CEPH_PACKAGES: PackageSet =
    PackageSet { component: &CEPH, suite: None, packages: &["ceph-common", "ceph-mon", "ceph-osd", "librados2", "librbd1"] };

pub fn install(what: Selection) -> Result<()> {
    fs::create_dir_all(rig_dir()).with_context(|| format!("creating {}", rig_dir().display()))?;
    let lock = rig_dir().join("lock");
    let lock = File::create(&lock).with_context(|| format!("creating {}", lock.display()))?;
    lock.lock().context("waiting for another installation")?;

    let wanted = |part: Selection| what == part || what == Selection::All;
    // The guest's image is made with the tools, from the tools.
    if wanted(Selection::Tools) || wanted(Selection::Guest) {
        step("tools", || TOOLS_PACKAGES.install())?;
    }
    if wanted(Selection::Qemu) || wanted(Selection::Guest) {
        step("qemu", || QEMU_PACKAGES.install())?;
    }
    if wanted(Selection::Guest) {
        step("guest", guest_images::install)?;
    }
    if wanted(Selection::Ceph) {
        step("ceph", || CEPH_PACKAGES.install())?;
    }
    if wanted(Selection::S3) {
        step("s3", seaweedfs::install)?;
    }
    Ok(())
}

/// Whether a step had work to do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Outcome {
    Installed,
    AlreadyThere,
}

fn step(name: &str, work: impl FnOnce() -> Result<Outcome>) -> Result<()> {
    let clock = Deadline::after(Duration::MAX);
    match work().with_context(|| format!("installing rig component `{name}`"))? {
        Outcome::AlreadyThere => println!("rig: {name} is there"),
        Outcome::Installed => println!("rig: {name} installed in {:.1} s", clock.elapsed().as_secs_f64()),
    }
    Ok(())
}
