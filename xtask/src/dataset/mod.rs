//! `cargo xtask dataset DIR`: images of machines that were cloned from one base and then went different ways, for measuring reduction.
//!
//! ```text
//!   apt, for an empty machine ─▶ packages ─▶ tree of the base ─▶ mke2fs -d ─▶ base.raw
//!                                   │                                            │ copied, sparse
//!                                   └─ what a machine has besides ─▶ debugfs ─▶ server-N.raw: packages · configuration · logs
//! ```
//!
//! - Nothing is mounted, and no package's scripts are run.
//! - Equal packages give equal bytes: UUIDs, hash seeds and times are fixed, and everything is written in the order of names.
//! - A machine begins as a copy of the base's blocks. What an upgrade replaces stays in blocks that are free, as on a machine that never trims.
//! - An image is made once, and again when its recipe changes: the programs' version below, and its packages by name, version and size.

mod life;
mod machine;
mod packages;
mod script;
mod tree;

use crate::commands::output;
use crate::rig::product;
use anyhow::{Context, Result, bail};
use machine::{BASE, MACHINES, Machine};
use novastor_tests::rig::tools;
use packages::Package;
use rustix::process::geteuid;
use script::Script;
use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use tree::Kind;

/// Goes up when images are made differently from equal packages.
const RECIPE: u32 = 1;
const UUID: &str = "6e6f7661-7374-4f72-8000-000000000001";
const HASH_SEED: &str = "6e6f7661-7374-4f72-8000-000000000002";

/// Makes what is missing of the data set in `folder`.
pub fn run(folder: &Path) -> Result<()> {
    if !geteuid().is_root() {
        bail!("the data set needs root, as the files in its images belong to many users: run `cargo xtask dataset` as root");
    }
    fs::create_dir_all(folder).with_context(|| format!("creating {}", folder.display()))?;
    let folder = fs::canonicalize(folder)?;
    let base = packages::resolve(&folder, &BASE)?;
    let base_made = make(&folder, &BASE, &base, || make_base(&folder, &base))?;
    for machine in &MACHINES {
        let packages = packages::resolve(&folder, machine)?;
        let added = packages.into_iter().filter(|package| !base.contains(package)).collect::<Vec<_>>();
        if base_made == crate::rig::Outcome::Installed {
            product::forget(&image(&folder, machine))?;
        }
        make(&folder, machine, &added, || make_clone(&folder, machine, &added))?;
    }
    Ok(())
}

fn image(folder: &Path, machine: &Machine) -> PathBuf {
    folder.join(format!("{}.raw", machine.name))
}

fn make(
    folder: &Path,
    machine: &Machine,
    packages: &[Package],
    build: impl FnOnce() -> Result<()>,
) -> Result<crate::rig::Outcome> {
    let mut recipe = format!("recipe {RECIPE}, seed {}\n", machine.seed);
    packages.iter().for_each(|package| recipe.push_str(&format!("{} {}\n", package.file, package.bytes)));
    let outcome = product::make(&image(folder, machine), &recipe, build)?;
    println!("dataset: {} is there, with {} packages of its own", image(folder, machine).display(), packages.len());
    Ok(outcome)
}

fn make_base(folder: &Path, packages: &[Package]) -> Result<()> {
    let (tree, raw) = (folder.join("trees").join(BASE.name), image(folder, &BASE));
    tree::unpack(folder, packages, &tree)?;
    if raw.exists() {
        fs::remove_file(&raw)?;
    }
    let mut mke2fs = Command::new(tools::require("mke2fs")?);
    mke2fs.env("E2FSPROGS_FAKE_TIME", script::TIME.to_string());
    mke2fs.args(["-q", "-t", "ext4", "-L", "system", "-U", UUID, "-E", &format!("hash_seed={HASH_SEED}"), "-d"]);
    output(mke2fs.args([&tree, &raw]).arg("4G"))?;
    let mut script = Script::default();
    script.set_times("/", &Kind::Folder);
    for entry in tree::entries(&tree)? {
        script.set_times(&entry.path, &entry.kind);
    }
    script.run(&raw)
}

fn make_clone(folder: &Path, machine: &Machine, packages: &[Package]) -> Result<()> {
    let trees = folder.join("trees");
    let (base, tree, raw) = (trees.join(BASE.name), trees.join(machine.name), image(folder, machine));
    tree::unpack(folder, packages, &tree)?;
    life::live(machine, &base, &tree)?;
    output(Command::new("cp").arg("--sparse=always").args([&image(folder, &BASE), &raw]))?;
    let known: BTreeMap<_, _> = tree::entries(&base)?.into_iter().map(|entry| (entry.path, entry.kind)).collect();
    let mut script = Script::default();
    for entry in tree::entries(&tree)? {
        script.put(&tree, &entry, known.get(&entry.path));
    }
    script.run(&raw)
}
