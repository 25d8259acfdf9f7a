//! The logs of this host: a sparse file for each mapped volume that it has opened.
//!
//! ```text
//!   FOLDER/GROUP            the log of the volume of that group
//!   FOLDER/GROUP.SECONDS    one that was set aside at that time, since it must not be replayed
//!   FOLDER/GROUP.new        being made
//! ```
//!
//! A log gets its name when it has its size. It is opened for direct I/O, and locked by the description that carries its I/O.

use std::collections::BTreeSet;
use std::fs::{self, File};
use std::io::{Error, ErrorKind};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::time::UNIX_EPOCH;

use backends::PoolError;
use backends::file::{FileDevice, FileOptions, hold_unused};
use backends::pool::Result;
use blockdev::clock;
use uuid::Uuid;

use super::growing_log::GrowingLog;
use crate::device::name_of;
use crate::log::{LogId, SUPERBLOCK_START, id_in};

const NEW: &str = "new";

pub(super) struct Logs {
    folder: PathBuf,
    /// Bytes of a new log.
    size: u64,
}

fn failed(what: impl Into<String>) -> impl FnOnce(Error) -> PoolError {
    let what = what.into();
    move |source| PoolError::Io { what, source }
}

fn sync(folder: &Path) -> std::io::Result<()> {
    File::open(folder)?.sync_all()
}

impl Logs {
    pub(super) fn new(folder: PathBuf, size: u64) -> Logs {
        Logs { folder, size }
    }

    pub(super) fn path(&self, group: Uuid) -> PathBuf {
        self.folder.join(name_of(group))
    }

    /// The id of a group's log, whoever uses it; zeroes if it was never used. `None`: there is none.
    pub(super) fn id(&self, group: Uuid) -> Result<Option<LogId>> {
        let path = self.path(group);
        let mut start = [0; SUPERBLOCK_START];
        match File::open(&path).and_then(|file| file.read_exact_at(&mut start, 0)) {
            Ok(()) => Ok(Some(id_in(&start))),
            Err(error) if error.kind() == ErrorKind::NotFound => Ok(None),
            Err(error) => Err(failed(format!("reading the log {}", path.display()))(error)),
        }
    }

    /// Opens the log of a group, made empty if there is none. Blocks.
    pub(super) fn open(&self, group: Uuid) -> Result<GrowingLog> {
        let path = self.path(group);
        if !path.exists() {
            self.make(&path).map_err(failed(format!("making the log {}", path.display())))?;
        }
        Ok(GrowingLog::open(&path)?)
    }

    /// Opens the log of a group for reading; nobody writes to it meanwhile. Blocks.
    pub(super) fn open_read_only(&self, group: Uuid) -> Result<FileDevice> {
        Ok(FileDevice::open(&self.path(group), FileOptions { read_only: true, direct: true })?)
    }

    fn make(&self, path: &Path) -> std::io::Result<()> {
        fs::create_dir_all(&self.folder)?;
        let new = path.with_extension(NEW);
        let file = File::create(&new)?;
        file.set_len(self.size)?;
        file.sync_all()?;
        fs::rename(&new, path)?;
        sync(&self.folder)
    }

    /// Makes sure that nobody on this host uses the log of a group. `None`: there is none.
    pub(super) fn hold(&self, group: Uuid) -> Result<Option<File>> {
        let path = self.path(group);
        match path.exists() {
            true => Ok(Some(hold_unused(&path)?)),
            false => Ok(None),
        }
    }

    /// Keeps a log under another name, which is returned; the next opening makes a new one.
    pub(super) fn set_aside(&self, group: Uuid) -> Result<PathBuf> {
        let path = self.path(group);
        let _held = self.hold(group)?;
        let now = clock::wall().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs());
        let free = (now..).map(|seconds| path.with_extension(seconds.to_string())).find(|aside| !aside.exists());
        let aside = free.unwrap_or_else(|| path.with_extension("aside"));
        fs::rename(&path, &aside)
            .and_then(|()| sync(&self.folder))
            .map_err(failed(format!("setting the log {} aside", path.display())))?;
        Ok(aside)
    }

    /// Removes everything of a group that does not exist any more. Blocks.
    pub(super) fn remove(&self, group: Uuid) -> Result<()> {
        let _held = self.hold(group)?;
        let name = name_of(group);
        let own: Vec<PathBuf> = self.files()?.into_iter().filter(|(of, _)| *of == name).map(|(_, path)| path).collect();
        if own.is_empty() {
            return Ok(());
        }
        own.iter()
            .try_for_each(fs::remove_file)
            .and_then(|()| sync(&self.folder))
            .map_err(failed(format!("removing the log of group {name}")))
    }

    /// What somebody should know of these files; `known`: the groups that there are.
    pub(super) fn check(&self, known: &BTreeSet<Uuid>) -> Result<Vec<String>> {
        let mut found = Vec::new();
        for (group, path) in self.files()? {
            let shown = path.display();
            let is_known = Uuid::parse_str(&group).is_ok_and(|group| known.contains(&group));
            match (is_known, path.extension()) {
                (true, None) => {}
                (true, Some(extension)) if extension == NEW => {}
                (true, Some(_)) => found.push(format!(
                    "log {shown} was set aside when its volume had another owner: delete it if nothing in it is missed"
                )),
                (false, _) => found.push(format!("log {shown} belongs to no volume of this pool: delete it if it is not needed")),
            }
        }
        Ok(found)
    }

    /// All files, with the groups that they are of.
    fn files(&self) -> Result<Vec<(String, PathBuf)>> {
        let entries = match fs::read_dir(&self.folder) {
            Err(error) if error.kind() == ErrorKind::NotFound => return Ok(Vec::new()),
            entries => entries,
        };
        let listed = entries.and_then(|entries| entries.map(|entry| entry.map(|entry| entry.path())).collect());
        let paths: Vec<PathBuf> = listed.map_err(failed(format!("listing {}", self.folder.display())))?;
        let with_group = |path: PathBuf| Some((path.file_stem()?.to_str()?.to_owned(), path));
        Ok(paths.into_iter().filter_map(with_group).collect())
    }
}

#[cfg(test)]
mod tests {
    use blockdev::BlockDevice;

    use super::*;

    const GROUP: Uuid = Uuid::from_u128(5);

    #[test]
    fn a_log_has_its_size_is_locked_and_is_kept_when_it_is_set_aside() {
        let folder = tempfile::tempdir().unwrap();
        let logs = Logs::new(folder.path().join("log/pool"), 1 << 20);
        assert!(logs.hold(GROUP).unwrap().is_none());
        let open = logs.open(GROUP).unwrap();
        assert_eq!(open.geometry().size, 1 << 20);
        drop(open);
        fs::write(logs.path(GROUP), "old").unwrap();
        let [first, second] = [0, 1].map(|_| {
            let aside = logs.set_aside(GROUP).unwrap();
            logs.open(GROUP).unwrap();
            aside
        });
        assert_ne!(first, second);
        assert_eq!(fs::read(&first).unwrap(), b"old");
        assert_eq!(logs.check(&BTreeSet::from([GROUP])).unwrap().len(), 2);
        assert_eq!(logs.check(&BTreeSet::new()).unwrap().len(), 3);
        let other = logs.open(Uuid::from_u128(6)).unwrap();
        logs.remove(GROUP).unwrap();
        assert!(!first.exists() && !second.exists() && !logs.path(GROUP).exists());
        assert_eq!(other.health(), None);
    }
}
