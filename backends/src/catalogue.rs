//! A catalogue of volumes in a directory: one folder a volume, one JSON record in it.
//!
//! ```text
//!   DIR/pool.json              {"format": 1, "uuid": …}; locked while the catalogue changes
//!   DIR/volumes/NAME/volume.json
//!   DIR/trash/UUID, new-UUID   what is being deleted, or made
//! ```
//!
//! Records are replaced as a whole (write, sync, rename, sync the folder), so a crash leaves the old one or the new one. A volume comes and goes by
//! one rename of its folder. The folders of mapped volumes stay in the trash until [`Catalogue::forget`], as they have data elsewhere.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Write};
use std::os::fd::AsRawFd;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use uuid::Uuid;

use crate::pool::{Layout, PoolError, Result, VolumeRecord, check_name};

const FORMAT: u32 = 1;

#[derive(Serialize, Deserialize)]
struct PoolFile {
    format: u32,
    uuid: Uuid,
}

/// The catalogue. All calls block.
pub struct Catalogue {
    pool: String,
    root: PathBuf,
    uuid: Uuid,
}

/// Held while the catalogue changes; other processes wait.
pub struct CatalogueLock {
    _file: File,
}

pub(crate) fn io_error(what: impl Into<String>) -> impl FnOnce(io::Error) -> PoolError {
    let what = what.into();
    move |source| PoolError::Io { what, source }
}

/// Replaces `path` by `bytes`, durably.
pub(crate) fn write_file(path: &Path, bytes: &[u8]) -> io::Result<()> {
    let temporary = path.with_extension("tmp");
    write_synced(&temporary, bytes)?;
    fs::rename(&temporary, path)?;
    sync_folder_of(path)
}

/// Makes `path` with `bytes` in it, durably; leaves it as it is if it exists, even if that happens meanwhile.
fn write_file_once(path: &Path, bytes: &[u8]) -> io::Result<()> {
    let temporary = path.with_extension(blockdev::random::uuid().to_string());
    let made = write_synced(&temporary, bytes).and_then(|()| match fs::hard_link(&temporary, path) {
        // Where there are no hard links, there is no way to leave a file alone that comes into being just now.
        Err(error) if error.kind() != io::ErrorKind::AlreadyExists && !path.exists() => fs::rename(&temporary, path),
        _ => Ok(()),
    });
    let _ = fs::remove_file(&temporary);
    made.and_then(|()| sync_folder_of(path))
}

fn write_synced(path: &Path, bytes: &[u8]) -> io::Result<()> {
    // Nothing that somebody else made a link to is emptied.
    let flags = libc::O_NOFOLLOW;
    let mut file = OpenOptions::new().write(true).create(true).truncate(true).custom_flags(flags).open(path)?;
    file.write_all(bytes)?;
    file.sync_all()
}

pub(crate) fn sync_folder_of(path: &Path) -> io::Result<()> {
    let folder = path.parent().unwrap_or(Path::new("."));
    File::open(folder)?.sync_all()
}

impl Catalogue {
    /// Opens the catalogue in `root`. With `expected` it must be that one; else it is made if there is none.
    pub(crate) fn open(pool: &str, root: &Path, expected: Option<Uuid>) -> Result<Catalogue> {
        if let Some(uuid) = expected {
            still_there(root, uuid).map_err(|why| {
                PoolError::Invalid(format!(
                    "pool {pool}: {why} To take what is there now, or begin anew: novastor pool forget {pool}"
                ))
            })?;
        }
        let shown = root.display();
        for folder in [root.to_owned(), root.join("volumes"), root.join("trash")] {
            fs::create_dir_all(&folder).map_err(io_error(format!("pool {pool}: making {}", folder.display())))?;
        }
        let file = root.join("pool.json");
        if !file.exists() {
            let fresh = PoolFile { format: FORMAT, uuid: blockdev::random::uuid() };
            let bytes = serde_json::to_vec_pretty(&fresh).map_err(|error| PoolError::Backend(error.to_string()))?;
            write_file_once(&file, &bytes).map_err(io_error(format!("pool {pool}: writing {}", file.display())))?;
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

    /// Its directory.
    pub fn root(&self) -> &Path {
        &self.root
    }

    /// The folder of a volume; it need not exist.
    pub(crate) fn folder(&self, volume: &str) -> PathBuf {
        self.root.join("volumes").join(volume)
    }

    /// Waits until no other process changes the catalogue.
    pub fn lock(&self) -> Result<CatalogueLock> {
        let path = self.root.join("pool.json");
        let file = File::open(&path).map_err(io_error(format!("pool {}: opening {}", self.pool, path.display())))?;
        // SAFETY: flock takes no pointers, and `file` keeps the descriptor open.
        if unsafe { libc::flock(file.as_raw_fd(), libc::LOCK_EX) } != 0 {
            return Err(io_error(format!("pool {}: locking its catalogue", self.pool))(io::Error::last_os_error()));
        }
        Ok(CatalogueLock { _file: file })
    }

    /// Replaces the wrapped key of a volume, if it still is `from`.
    pub(crate) fn set_wrapped_key(&self, volume: &str, from: &str, to: &str) -> Result<()> {
        let _lock = self.lock()?;
        let record = self.get(volume)?;
        if record.wrapped_key.as_deref() != Some(from) {
            return Err(PoolError::InUse(format!("volume {volume}: another host has changed its key meanwhile; try again")));
        }
        self.update(&VolumeRecord { wrapped_key: Some(to.to_owned()), ..record })
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

    pub fn list(&self) -> Result<Vec<VolumeRecord>> {
        let mut records = Vec::new();
        for record in self.records()? {
            match record {
                Ok(record) => records.push(record),
                // One damaged record hides no other volume; `check` reports it.
                Err(PoolError::Invalid(why)) => tracing::warn!("pool {}: {why}", self.pool),
                Err(error) => return Err(error),
            }
        }
        Ok(records)
    }

    /// The same for whoever must not miss one: fails if a record is damaged.
    pub fn list_all(&self) -> Result<Vec<VolumeRecord>> {
        self.records()?.into_iter().collect()
    }

    /// Looks again while volumes are being renamed or deleted.
    fn records(&self) -> Result<Vec<Result<VolumeRecord>>> {
        let mut before = self.names()?;
        loop {
            let records = before.iter().map(|name| self.get(name)).collect::<Vec<_>>();
            let after = self.names()?;
            let moved = records.iter().any(|record| matches!(record, Err(PoolError::NotFound(_))));
            if after == before && !moved {
                return Ok(records);
            }
            before = after;
        }
    }

    pub fn get(&self, volume: &str) -> Result<VolumeRecord> {
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

    pub fn has(&self, volume: &str) -> Result<bool> {
        check_name("volume", volume)?;
        let path = self.folder(volume).join("volume.json");
        path.try_exists().map_err(io_error(format!("volume {volume}: looking for {}", path.display())))
    }

    pub fn refuse_existing(&self, volume: &str) -> Result<()> {
        check_name("volume", volume)?;
        if self.folder(volume).exists() {
            return Err(PoolError::Exists(format!("pool {} already has a volume {volume}; choose another name", self.pool)));
        }
        Ok(())
    }

    /// Makes the folder of a new volume complete under another name first, by `fill`, then moves it into place with its record.
    pub(crate) fn add(&self, record: &VolumeRecord, fill: impl FnOnce(&Path) -> Result<()>) -> Result<()> {
        let made = self.stage(record).and_then(|()| fill(&self.staging(record.uuid))).and_then(|()| self.publish(record));
        if made.is_err() {
            let _ = fs::remove_dir_all(self.staging(record.uuid));
        }
        made
    }

    fn staging(&self, volume: Uuid) -> PathBuf {
        self.root.join("trash").join(format!("new-{volume}"))
    }

    fn grave(&self, volume: Uuid) -> PathBuf {
        self.root.join("trash").join(volume.to_string())
    }

    /// Notes a volume that is about to be made; it is not in the catalogue yet.
    pub fn stage(&self, record: &VolumeRecord) -> Result<()> {
        let staging = self.staging(record.uuid);
        let what = || format!("volume {}: creating it in pool {}", record.name, self.pool);
        fs::create_dir(&staging).map_err(io_error(what()))?;
        self.write_record(&staging, record)?;
        sync_folder_of(&staging).map_err(io_error(what()))
    }

    /// Moves a staged volume into the catalogue.
    pub fn publish(&self, record: &VolumeRecord) -> Result<()> {
        let folder = self.folder(&record.name);
        fs::rename(self.staging(record.uuid), &folder)
            .and_then(|()| sync_folder_of(&folder))
            .map_err(io_error(format!("volume {}: creating it in pool {}", record.name, self.pool)))
    }

    pub fn update(&self, record: &VolumeRecord) -> Result<()> {
        self.write_record(&self.folder(&record.name), record)
    }

    fn write_record(&self, folder: &Path, record: &VolumeRecord) -> Result<()> {
        let bytes = serde_json::to_vec_pretty(record).map_err(|error| PoolError::Backend(error.to_string()))?;
        write_file(&folder.join("volume.json"), &bytes).map_err(io_error(format!("volume {}: writing its record", record.name)))
    }

    pub fn rename(&self, volume: &str, to: &str) -> Result<()> {
        self.get(volume)?;
        self.refuse_existing(to)?;
        fs::rename(self.folder(volume), self.folder(to))
            .and_then(|()| sync_folder_of(&self.folder(to)))
            .map_err(io_error(format!("volume {volume}: renaming it to {to}")))
    }

    pub(crate) fn remove(&self, record: &VolumeRecord) -> Result<()> {
        self.retire(record)?;
        fs::remove_dir_all(self.grave(record.uuid)).map_err(io_error(format!("volume {}: deleting it", record.name)))
    }

    /// Moves a volume out of the catalogue, into the trash.
    pub fn retire(&self, record: &VolumeRecord) -> Result<()> {
        let (folder, grave) = (self.folder(&record.name), self.grave(record.uuid));
        fs::rename(&folder, &grave)
            .and_then(|()| sync_folder_of(&folder))
            .and_then(|()| sync_folder_of(&grave))
            .map_err(io_error(format!("volume {}: deleting it", record.name)))
    }

    /// The mapped volumes in the trash: deleted ones, and (`true`) such whose making has not ended.
    pub fn retired(&self) -> Result<Vec<(VolumeRecord, bool)>> {
        let trash = self.trash().map_err(io_error(format!("pool {}: listing its trash", self.pool)))?;
        let found = trash.iter().filter_map(|folder| Some((mapped_in(folder)?, folder)));
        Ok(found
            .map(|(record, folder)| (self.staging(record.uuid) == *folder, record))
            .map(|(staged, record)| (record, staged))
            .collect())
    }

    /// Empties the trash of a volume of which nothing is left.
    pub fn forget(&self, volume: Uuid) -> Result<()> {
        for folder in [self.staging(volume), self.grave(volume)] {
            match fs::remove_dir_all(&folder) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => {
                    return Err(io_error(format!("pool {}: removing {}", self.pool, folder.display()))(error));
                }
                _ => {}
            }
        }
        Ok(())
    }

    fn trash(&self) -> io::Result<Vec<PathBuf>> {
        fs::read_dir(self.root.join("trash"))?.map(|entry| entry.map(|entry| entry.path())).collect()
    }

    fn empty_trash(&self) {
        let Ok(_lock) = self.lock() else { return };
        for folder in self.trash().unwrap_or_default().into_iter().filter(|folder| mapped_in(folder).is_none()) {
            if let Err(error) = fs::remove_dir_all(&folder) {
                tracing::warn!("pool {}: cannot remove {}: {error}", self.pool, folder.display());
            }
        }
    }
}

/// Whether the pool in `root` is still the one with this UUID; what is there instead, in words.
pub(crate) fn still_there(root: &Path, uuid: Uuid) -> std::result::Result<(), String> {
    let file = root.join("pool.json");
    let shown = root.display();
    match fs::read(&file).map(|bytes| serde_json::from_slice::<PoolFile>(&bytes)) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            Err(format!("{shown} has no pool any more ({} is missing); is its file system mounted?", file.display()))
        }
        Err(error) => Err(format!("{}: {error}.", file.display())),
        Ok(Ok(found)) if found.uuid != uuid => Err(format!(
            "{shown} has another pool, with UUID {} instead of {uuid}; is the right file system mounted?",
            found.uuid
        )),
        // What is damaged is told by who reads it next.
        Ok(_) => Ok(()),
    }
}

/// The mapped volume whose folder this is.
fn mapped_in(folder: &Path) -> Option<VolumeRecord> {
    let bytes = fs::read(folder.join("volume.json")).ok()?;
    let record: VolumeRecord = serde_json::from_slice(&bytes).ok()?;
    (record.layout == Layout::Mapped).then_some(record)
}
