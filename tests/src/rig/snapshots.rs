//! The snapshots of a volume that is written to while its daemon dies, and what each of them must hold for ever.

use crate::rig::daemon::Daemon;
use crate::rig::process::{Running, run};
use crate::rig::scratch;
use anyhow::{Context, Result, ensure};
use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::process::{Command, Stdio};
use std::time::Duration;

const LIMIT: Duration = Duration::from_secs(60);

#[derive(Debug)]
pub struct Snapshots {
    volume: String,
    kept: BTreeMap<String, Vec<u8>>,
    /// Asked for, and the daemon was killed.
    asked: BTreeSet<String>,
    /// Their deletion was asked for, and the daemon was killed.
    doomed: BTreeSet<String>,
}

impl Snapshots {
    pub fn new(volume: &str) -> Self {
        Self { volume: volume.to_owned(), kept: BTreeMap::new(), asked: BTreeSet::new(), doomed: BTreeSet::new() }
    }

    pub fn path(&self, name: &str) -> String {
        format!("{}@{name}", self.volume)
    }

    /// Takes a snapshot, and remembers what it holds.
    pub fn take(&mut self, daemon: &Daemon, name: &str) -> Result<&[u8]> {
        daemon.cli(["snapshot", "create", &self.path(name)])?;
        let contents = daemon.contents(&self.path(name))?;
        Ok(self.kept.entry(name.to_owned()).or_insert(contents))
    }

    /// Begins to take a snapshot. The daemon is killed before anybody hears of it.
    pub fn begin_taking(&mut self, daemon: &Daemon, name: &str) -> Result<Running> {
        self.asked.insert(name.to_owned());
        begin(daemon, &["snapshot", "create", &self.path(name)])
    }

    /// Begins to delete a snapshot. The daemon is killed before anybody hears of it.
    pub fn begin_deleting(&mut self, daemon: &Daemon, name: &str) -> Result<Running> {
        self.doomed.insert(name.to_owned());
        begin(daemon, &["snapshot", "delete", &self.path(name), "--yes"])
    }

    /// Those that were there are there, and hold what they held. Those that a kill left undecided are there or not, from now on for good.
    pub fn check(&mut self, daemon: &Daemon) -> Result<()> {
        let listed = daemon.json(["snapshot", "list", &self.volume])?;
        let listed = listed.as_array().context("a list of snapshots")?;
        let mut found = BTreeMap::new();
        for name in listed.iter().filter_map(|snapshot| snapshot["name"].as_str()?.split('@').nth(1)) {
            match daemon.contents(&self.path(name)) {
                Ok(contents) => drop(found.insert(name.to_owned(), contents)),
                // Its deletion had begun, and went on by itself.
                Err(error) if self.doomed.contains(name) && format!("{error:#}").contains("no snapshot") => {}
                Err(error) => return Err(error.context(format!("snapshot {name}"))),
            }
        }
        for (name, contents) in &found {
            match self.kept.get(name) {
                Some(kept) => ensure!(kept == contents, "snapshot {name} is not what it was"),
                None => ensure!(self.asked.contains(name), "nobody asked for snapshot {name}"),
            }
        }
        let is_missing = |name: &&String| !found.contains_key(*name) && !self.doomed.contains(*name);
        let missing: Vec<&String> = self.kept.keys().filter(is_missing).collect();
        ensure!(missing.is_empty(), "snapshots {missing:?} are gone");
        self.kept = found;
        self.asked.clear();
        self.doomed.clear();
        Ok(())
    }

    /// How many there are.
    pub fn count(&self) -> usize {
        self.kept.len()
    }

    /// Deletes the first by name until so many are left.
    pub fn thin_out(&mut self, daemon: &Daemon, left: usize) -> Result<()> {
        while self.kept.len() > left
            && let Some((name, _)) = self.kept.pop_first()
        {
            daemon.cli(["snapshot", "delete", &self.path(&name), "--yes"])?;
        }
        Ok(())
    }
}

fn begin(daemon: &Daemon, arguments: &[&str]) -> Result<Running> {
    let mut command = daemon.command(arguments)?;
    Running::spawn("novastor", command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null()))
}

/// The MD5 sum of some bytes, in hexadecimal digits.
pub fn md5(bytes: &[u8]) -> Result<String> {
    let folder = scratch::disk_dir()?;
    let file = folder.path().join("bytes");
    fs::write(&file, bytes)?;
    let sum = run(Command::new("md5sum").arg(&file), LIMIT)?;
    Ok(sum.split_whitespace().next().unwrap_or_default().to_owned())
}
