//! A catalogue of volumes in a directory: one folder a volume, one JSON record in it.
//!
//! ```text
//!   DIR/pool.json              {"format": 1, "uuid": …}; locked while the catalogue changes
//!   DIR/volumes/NAME/volume.json
//!   DIR/trash/…                what is being deleted
//! ```
//!
//! Records are replaced as a whole (write, sync, rename, sync the folder), so a crash leaves the old one or the new one.

use std::fs::{self, File};
use std::io::{self, Write};
use std::os::fd::AsRawFd;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use uuid::Uuid;

use crate::pool::{PoolError, Result, VolumeRecord, check_name};

const FORMAT: u32 = 1;

#[derive(Serialize, Deserialize)]
struct PoolFile {
    format: u32,
    uuid: Uuid,
}

pub(crate) struct Catalogue {
    pool: String,
    root: PathBuf,
    uuid: Uuid,
}

/// Held while the catalogue changes; other processes wait.
pub(crate) struct CatalogueLock {
    _file: File,
}

pub(crate) fn io_error(what: impl Into<String>) -> impl FnOnce(io::Error) -> PoolError {
    let what = what.into();
    move |source| PoolError::Io { what, source }
}

/// Replaces `path` by `bytes`, durably.
pub(crate) fn write_file(path: &Path, bytes: &[u8]) -> io::Result<()> {
    let temporary = path.with_extension("tmp");
    let mut file = File::create(&temporary)?;
    file.write_all(bytes)?;
    file.sync_all()?;
    fs::rename(&temporary, path)?;
    sync_folder_of(path)
}

pub(crate) fn sync_folder_of(path: &Path) -> io::Result<()> {
    let folder = path.parent().unwrap_or(Path::new("."));
    File::open(folder)?.sync_all()
}

impl Catalogue {
    /// Opens the catalogue in `root`, making it if there is none.
    pub(crate) fn open(pool: &str, root: &Path) -> Result<Catalogue> {
        let shown = root.display();
        for folder in [root.to_owned(), root.join("volumes"), root.join("trash")] {
            fs::create_dir_all(&folder).map_err(io_error(format!("pool {pool}: making {}", folder.display())))?;
        }
        let file = root.join("pool.json");
        if !file.exists() {
            let fresh = PoolFile { format: FORMAT, uuid: Uuid::new_v4() };
            let bytes = serde_json::to_vec_pretty(&fresh).map_err(|error| PoolError::Backend(error.to_string()))?;
            write_file(&file, &bytes).map_err(io_error(format!("pool {pool}: writing {}", file.display())))?;
        }
        let bytes = fs::read(&file).map_err(io_error(format!("pool {pool}: reading {}", file.display())))?;
        let found: PoolFile = serde_json::from_slice(&bytes).map_err(|error| {
            PoolError::Invalid(format!("pool {pool}: {} is damaged: {error}; restore it from a backup", file.display()))
        })?;
        if found.format != FORMAT {
            return Err(PoolError::Invalid(format!(
                "pool {pool}: {shown} has format {}, this version of novastor knows format {FORMAT}; use the version that made it",
                found.format
            )));
        }
        let catalogue = Catalogue { pool: pool.to_owned(), root: root.to_owned(), uuid: found.uuid };
        catalogue.empty_trash();
        Ok(catalogue)
    }

    pub(crate) fn uuid(&self) -> Uuid {
        self.uuid
    }

    pub(crate) fn root(&self) -> &Path {
        &self.root
    }

    /// The folder of a volume; it need not exist.
    pub(crate) fn folder(&self, volume: &str) -> PathBuf {
        self.root.join("volumes").join(volume)
    }

    /// Waits until no other process changes the catalogue.
    pub(crate) fn lock(&self) -> Result<CatalogueLock> {
        let path = self.root.join("pool.json");
        let file = File::open(&path).map_err(io_error(format!("pool {}: opening {}", self.pool, path.display())))?;
        // SAFETY: flock takes no pointers, and `file` keeps the descriptor open.
        if unsafe { libc::flock(file.as_raw_fd(), libc::LOCK_EX) } != 0 {
            return Err(io_error(format!("pool {}: locking its catalogue", self.pool))(io::Error::last_os_error()));
        }
        Ok(CatalogueLock { _file: file })
    }

    /// The names of all volumes, damaged ones too.
    pub(crate) fn names(&self) -> Result<Vec<String>> {
        let folder = self.root.join("volumes");
        let what = || format!("pool {}: listing {}", self.pool, folder.display());
        let mut names = Vec::new();
        for entry in fs::read_dir(&folder).map_err(io_error(what()))? {
            let name = entry.map_err(io_error(what()))?.file_name();
            names.extend(name.to_str().filter(|name| self.folder(name).join("volume.json").exists()).map(str::to_owned));
        }
        names.sort();
        Ok(names)
    }

    pub(crate) fn list(&self) -> Result<Vec<VolumeRecord>> {
        let mut records = Vec::new();
        for name in self.names()? {
            match self.get(&name) {
                Ok(record) => records.push(record),
                // Deleted or renamed meanwhile.
                Err(PoolError::NotFound(_)) => {}
                // One damaged record hides no other volume; `check` reports it.
                Err(PoolError::Invalid(why)) => tracing::warn!("pool {}: {why}", self.pool),
                Err(error) => return Err(error),
            }
        }
        Ok(records)
    }

    pub(crate) fn get(&self, volume: &str) -> Result<VolumeRecord> {
        check_name("volume", volume)?;
        let path = self.folder(volume).join("volume.json");
        let bytes = match fs::read(&path) {
            Ok(bytes) => bytes,
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                return Err(PoolError::NotFound(format!(
                    "pool {} has no volume {volume}; list them with: novastor volume list",
                    self.pool
                )));
            }
            Err(error) => return Err(io_error(format!("volume {volume}: reading {}", path.display()))(error)),
        };
        let mut record: VolumeRecord = serde_json::from_slice(&bytes)
            .map_err(|error| PoolError::Invalid(format!("volume {volume}: {} is damaged: {error}", path.display())))?;
        record.name = volume.to_owned();
        Ok(record)
    }

    pub(crate) fn refuse_existing(&self, volume: &str) -> Result<()> {
        check_name("volume", volume)?;
        if self.folder(volume).exists() {
            return Err(PoolError::Exists(format!("pool {} already has a volume {volume}; choose another name", self.pool)));
        }
        Ok(())
    }

    /// Makes the folder of a new volume complete under another name first, by `fill`, then moves it into place with its record.
    pub(crate) fn add(&self, record: &VolumeRecord, fill: impl FnOnce(&Path) -> Result<()>) -> Result<()> {
        let staging = self.root.join("trash").join(format!("new-{}", record.uuid));
        let what = || format!("volume {}: creating it in pool {}", record.name, self.pool);
        fs::create_dir(&staging).map_err(io_error(what()))?;
        let made = fill(&staging)
            .and_then(|()| self.write_record(&staging, record))
            .and_then(|()| fs::rename(&staging, self.folder(&record.name)).map_err(io_error(what())))
            .and_then(|()| sync_folder_of(&self.folder(&record.name)).map_err(io_error(what())));
        if made.is_err() {
            let _ = fs::remove_dir_all(&staging);
        }
        made
    }

    pub(crate) fn update(&self, record: &VolumeRecord) -> Result<()> {
        self.write_record(&self.folder(&record.name), record)
    }

    fn write_record(&self, folder: &Path, record: &VolumeRecord) -> Result<()> {
        let bytes = serde_json::to_vec_pretty(record).map_err(|error| PoolError::Backend(error.to_string()))?;
        write_file(&folder.join("volume.json"), &bytes).map_err(io_error(format!("volume {}: writing its record", record.name)))
    }

    pub(crate) fn rename(&self, volume: &str, to: &str) -> Result<()> {
        self.get(volume)?;
        self.refuse_existing(to)?;
        fs::rename(self.folder(volume), self.folder(to))
            .and_then(|()| sync_folder_of(&self.folder(to)))
            .map_err(io_error(format!("volume {volume}: renaming it to {to}")))
    }

    pub(crate) fn remove(&self, record: &VolumeRecord) -> Result<()> {
        let grave = self.root.join("trash").join(record.uuid.to_string());
        fs::rename(self.folder(&record.name), &grave)
            .and_then(|()| sync_folder_of(&self.folder(&record.name)))
            .and_then(|()| fs::remove_dir_all(&grave))
            .map_err(io_error(format!("volume {}: deleting it", record.name)))
    }

    fn empty_trash(&self) {
        let Ok(_lock) = self.lock() else { return };
        for entry in fs::read_dir(self.root.join("trash")).into_iter().flatten().flatten() {
            if let Err(error) = fs::remove_dir_all(entry.path()) {
                tracing::warn!("pool {}: cannot remove {}: {error}", self.pool, entry.path().display());
            }
        }
    }
}
