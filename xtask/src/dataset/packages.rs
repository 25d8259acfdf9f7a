//! Packages for a machine that has none yet, as apt chooses and fetches them.

use super::machine::{Machine, SYSTEM};
use crate::commands::output;
use crate::rig::packages;
use anyhow::{Context, Result, bail};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

/// A package's file.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct Package {
    /// Name, version and architecture.
    pub file: String,
    pub bytes: u64,
}

impl Package {
    /// Where apt puts it.
    pub fn path(&self, folder: &Path) -> PathBuf {
        folder.join("packages/archives").join(&self.file)
    }

    /// The package's name.
    pub fn name(&self) -> &str {
        self.file.split('_').next().unwrap_or_default()
    }
}

/// Chooses the packages of a machine and fetches those that are not in `folder` yet. In the order of names.
pub fn resolve(folder: &Path, machine: &Machine) -> Result<Vec<Package>> {
    packages::check_machine()?;
    let state = folder.join("packages");
    // apt names only what it would have to fetch, so it is shown a folder that stays empty.
    let listing = install(&state, machine, "none", "--print-uris")?;
    let listing = String::from_utf8(listing).context("apt prints something that is no UTF-8")?;
    let mut chosen = listing.lines().filter(|line| line.starts_with('\'')).map(package).collect::<Result<Vec<_>>>()?;
    chosen.sort();
    if chosen.iter().any(|package| !package.path(folder).exists()) {
        install(&state, machine, "archives", "--download-only")?;
    }
    match chosen.iter().find(|package| !package.path(folder).exists()) {
        Some(package) => bail!("apt has fetched no {}; look into {}", package.file, state.display()),
        None => Ok(chosen),
    }
}

/// Asks apt to install a machine's packages on an empty machine, but for what `option` says.
fn install(state: &Path, machine: &Machine, archives: &str, option: &str) -> Result<Vec<u8>> {
    let (status, archives) = (state.join("status"), state.join(archives));
    fs::create_dir_all(archives.join("partial")).with_context(|| format!("creating {}", archives.display()))?;
    fs::write(&status, "")?;
    let mut command = packages::apt("apt-get")?;
    command.args(["install", "--yes", "-qq", "--target-release", machine.suite, option]);
    command.args(["-o", &format!("Dir::State::status={}", status.display())]);
    command.args(["-o", &format!("Dir::Cache::archives={}", archives.display())]);
    command.args(["-o", "APT::Install-Recommends=false"]);
    output(command.args(SYSTEM).args(machine.packages))
}

/// A line as apt prints it: `'URI' FILE BYTES HASH`.
fn package(line: &str) -> Result<Package> {
    let mut words = line.split(' ').skip(1);
    let (file, bytes) = (words.next(), words.next().and_then(|bytes| bytes.parse().ok()));
    let (Some(file), Some(bytes)) = (file, bytes) else { bail!("apt prints a line that is not understood: {line}") };
    Ok(Package { file: file.to_owned(), bytes })
}

/// Runs `dpkg-deb OPTION PACKAGE TARGET`.
pub fn dpkg_deb(option: &str, package: &Path, target: &Path) -> Result<()> {
    output(Command::new("dpkg-deb").arg(option).args([package, target]))?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_of_apt_are_packages() {
        let parsed =
            package("'http://deb.example.org/pool/p/perl_5.36.0-7_amd64.deb' perl_5.36.0-7_amd64.deb 239412 SHA256:ab").unwrap();
        assert_eq!(parsed, Package { file: "perl_5.36.0-7_amd64.deb".to_owned(), bytes: 239_412 });
        assert_eq!(parsed.name(), "perl");
        assert!(package("'http://deb.example.org/pool/p/perl.deb' perl.deb many").is_err());
    }
}
