//! Debian packages for the rigs, without touching the machine's own package sources.
//!
//! ```text
//!   /etc/apt/sources.list.d/debian.sources ─ copied ─┐
//!   /etc/apt/sources.list                  ─ copied ─┼─▶ <rig>/apt/sources/ ─▶ apt-get with APT_CONFIG=<rig>/apt/apt.conf
//!   bookworm-backports, and sources for fio ─ added ─┘
//! ```

use super::Outcome;
use crate::commands;
use anyhow::{Context, Result, bail};
use novastor_tests::rig::scratch::rig_dir;
use novastor_tests::rig::tools::Component;
use rustix::process::geteuid;
use std::ffi::OsStr;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicBool, Ordering};

/// The archive used when the machine's own sources name none.
const DEFAULT_ARCHIVE: &str = "http://deb.debian.org/debian";
const DEB822_SOURCES: &str = "/etc/apt/sources.list.d/debian.sources";
const CLASSIC_SOURCES: &str = "/etc/apt/sources.list";

/// Packages that bring a component.
#[derive(Debug)]
pub struct PackageSet {
    pub component: &'static Component,
    pub suite: Option<&'static str>,
    pub packages: &'static [&'static str],
}

impl PackageSet {
    pub fn install(&self) -> Result<Outcome> {
        let missing = self.component.missing();
        if missing.is_empty() {
            return Ok(Outcome::AlreadyThere);
        }
        self.check_installable(&missing)?;
        let mut command = apt("apt-get")?;
        command.args(["install", "--yes", "--quiet", "--no-install-recommends"]);
        if let Some(suite) = self.suite {
            command.args(["--target-release", suite]);
        }
        commands::output(command.args(self.packages))?;
        let missing = self.component.missing();
        if !missing.is_empty() {
            bail!("the packages are installed, and still missing: {}", missing.join(", "));
        }
        Ok(Outcome::Installed)
    }

    fn check_installable(&self, missing: &[&str]) -> Result<()> {
        let root = || match geteuid().is_root() {
            true => Ok(()),
            false => bail!("installing needs root: run `cargo xtask rig install` as root once"),
        };
        check_machine().and_then(|()| root()).with_context(|| {
            format!("missing here: {}. They come with the Debian packages {}", missing.join(", "), self.packages.join(" "))
        })
    }
}

/// Whether packages made for Debian 12 can be used here at all.
pub fn check_machine() -> Result<()> {
    let release = fs::read_to_string("/etc/os-release").unwrap_or_default();
    let field = |name: &str| {
        let value = release.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix('='));
        value.unwrap_or("unknown").trim_matches('"').to_owned()
    };
    let (system, version) = (field("ID"), field("VERSION_ID"));
    if (system.as_str(), version.as_str()) != ("debian", "12") {
        bail!("installing needs Debian 12; this is {system} {version}: install it all by hand");
    }
    if std::env::consts::ARCH != "x86_64" {
        bail!("installing needs an x86_64 machine; this is {}", std::env::consts::ARCH);
    }
    Ok(())
}

/// An apt command that sees backports and source packages. Old package lists name packages that are gone from
/// the archive, so the first command of each run fetches them anew.
pub fn apt(program: impl AsRef<OsStr>) -> Result<Command> {
    static REFRESHED: AtomicBool = AtomicBool::new(false);
    if !REFRESHED.load(Ordering::Relaxed) {
        create_view(&rig_dir().join("apt"))?;
        commands::output(with_view("apt-get").args(["update", "--quiet"]))?;
        REFRESHED.store(true, Ordering::Relaxed);
    }
    Ok(with_view(program))
}

fn configuration_path() -> PathBuf {
    rig_dir().join("apt/apt.conf")
}

fn with_view(program: impl AsRef<OsStr>) -> Command {
    let mut command = Command::new(program);
    command.env("APT_CONFIG", configuration_path()).env("DEBIAN_FRONTEND", "noninteractive").env("LANG", "C");
    command
}

fn create_view(folder: &Path) -> Result<()> {
    let sources = folder.join("sources");
    for name in ["sources", "lists/partial", "cache/archives/partial"] {
        fs::create_dir_all(folder.join(name)).with_context(|| format!("creating {}", folder.display()))?;
    }
    let deb822 = fs::read_to_string(DEB822_SOURCES).unwrap_or_default();
    let classic = fs::read_to_string(CLASSIC_SOURCES).unwrap_or_default();
    fs::write(sources.join("debian.sources"), &deb822)?;
    fs::write(sources.join("machine.list"), &classic)?;
    fs::write(sources.join("rig.sources"), rig_sources(archive(&deb822, &classic)))?;

    let text = format!(
        "Dir::Etc::sourcelist \"/dev/null\";\nDir::Etc::sourceparts \"{folder}/sources\";\n\
         Dir::State::lists \"{folder}/lists\";\nDir::Cache \"{folder}/cache\";\n\
         DPkg::Lock::Timeout \"600\";\nAPT::Sandbox::User \"root\";\n",
        folder = folder.display()
    );
    fs::write(configuration_path(), text).context("writing apt's configuration")
}

/// The Debian archive that the machine uses already, perhaps a mirror near it.
fn archive<'a>(deb822: &'a str, classic: &'a str) -> &'a str {
    let modern = deb822.lines().filter_map(|line| line.strip_prefix("URIs:"));
    let old = classic.lines().filter(|line| line.starts_with("deb "));
    modern
        .chain(old)
        .flat_map(str::split_whitespace)
        .find(|word| word.contains("://") && word.trim_end_matches('/').ends_with("/debian"))
        .unwrap_or(DEFAULT_ARCHIVE)
}

fn rig_sources(archive: &str) -> String {
    format!(
        "Types: deb deb-src\nURIs: {archive}\nSuites: bookworm bookworm-updates bookworm-backports\nComponents: main\n\
         Signed-By: /usr/share/keyrings/debian-archive-keyring.gpg\n"
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_machines_own_archive_is_used() {
        let deb822 = "Types: deb\nURIs: http://mirror.example.org/debian/\nSuites: bookworm\n";
        let security = "Types: deb\nURIs: http://deb.debian.org/debian-security\n";
        let classic = "deb http://near.example.org/debian bookworm main\n";
        assert_eq!(archive(&format!("{security}{deb822}"), ""), "http://mirror.example.org/debian/");
        assert_eq!(archive("", classic), "http://near.example.org/debian");
        assert_eq!(archive(security, ""), DEFAULT_ARCHIVE);
    }
}
