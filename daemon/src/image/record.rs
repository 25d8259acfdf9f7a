//! How far a copy has come, kept in a file until it is complete.
//!
//! Of an import it lies in the user's state folder, of an export beside the unfinished image.

use std::fs::{self, File};
use std::io::{self, Write};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use super::format::Format;

/// What makes a source the same one as before.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Source {
    /// A file, by where it lies and when it was last changed.
    File { device: u64, inode: u64, bytes: u64, changed_ns: i128 },
    /// A volume or snapshot, by the volume's UUID.
    Volume { uuid: String, snapshot: Option<String> },
}

impl Source {
    pub fn of_file(file: &File) -> io::Result<Source> {
        let metadata = file.metadata()?;
        let changed_ns = i128::from(metadata.mtime()) * 1_000_000_000 + i128::from(metadata.mtime_nsec());
        Ok(Source::File { device: metadata.dev(), inode: metadata.ino(), bytes: metadata.len(), changed_ns })
    }
}

/// An unfinished copy.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Record {
    pub source: Source,
    pub format: Format,
    /// Of the target, in bytes.
    pub size: u64,
    /// Everything before it was written and flushed.
    pub position: u64,
    /// The copy ended in good order, and the target with it.
    pub closed: bool,
}

impl Record {
    /// The record at `path`, if there is a readable one.
    pub fn load(path: &Path) -> Option<Record> {
        serde_json::from_slice(&fs::read(path).ok()?).ok()
    }

    /// Replaces the record at `path`; a crash leaves the old or the new one.
    pub fn save(&self, path: &Path) -> io::Result<()> {
        let folder = path.parent().ok_or(io::ErrorKind::InvalidInput)?;
        fs::create_dir_all(folder)?;
        let next = path.with_extension("json-new");
        let saved = self.write(&next).and_then(|()| fs::rename(&next, path));
        if saved.is_err() {
            let _ = fs::remove_file(&next);
        }
        saved
    }

    fn write(&self, path: &Path) -> io::Result<()> {
        let mut file = File::create(path)?;
        file.write_all(&serde_json::to_vec(self)?)?;
        file.sync_data()
    }

    /// True if it is of a copy from `source` to a target of this size and format.
    pub fn is_of(&self, source: &Source, format: Format, size: u64) -> bool {
        self.source == *source && self.format == format && self.size == size
    }
}

/// Where records of imports are kept: `$XDG_STATE_HOME/novastor`, or `~/.local/state/novastor`.
pub fn state_folder() -> Option<PathBuf> {
    let absolute = |name: &str| std::env::var_os(name).map(PathBuf::from).filter(|path| path.is_absolute());
    let folder = absolute("XDG_STATE_HOME").or_else(|| Some(absolute("HOME")?.join(".local/state")))?;
    Some(folder.join("novastor"))
}
