//! A directory of raw volumes.

use std::collections::BTreeMap;
use std::fs::{self, File, OpenOptions};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use blockdev::{BlockDevice, clock};
use uuid::Uuid;

use super::device::{FileDevice, FileOptions, hold_unused};
use super::sys::{self, Links};
use crate::catalogue::{Catalogue, io_error, still_there, sync_folder_of};
use crate::pool::{
    Flattened, Layout, ObjectKind, Pool, PoolError, PoolHealth, Result, SnapshotRecord, Usage, VolumeRecord, VolumeSpec,
    check_name,
};

/// Where a pool is.
#[derive(Clone, Debug)]
pub struct FilePoolConfig {
    pub path: PathBuf,
}

/// The pool.
pub struct FilePool {
    name: String,
    catalogue: Arc<Catalogue>,
}

impl FilePool {
    /// Opens the pool in `config.path`, making it if there is none. Blocks.
    pub fn open(name: &str, config: FilePoolConfig) -> Result<FilePool> {
        FilePool::open_expecting(name, config, None)
    }

    /// The same; with `expected` it must be the pool with this UUID, and is not made. Blocks.
    pub fn open_expecting(name: &str, config: FilePoolConfig, expected: Option<Uuid>) -> Result<FilePool> {
        Ok(FilePool { name: name.to_owned(), catalogue: Arc::new(Catalogue::open(name, &config.path, expected)?) })
    }

    /// Where its volumes are noted.
    pub fn catalogue(&self) -> &Arc<Catalogue> {
        &self.catalogue
    }

    /// What tells this pool from every other, wherever it is mounted.
    pub fn uuid(&self) -> Uuid {
        self.catalogue.uuid()
    }

    fn data_path(&self, record: &VolumeRecord) -> PathBuf {
        match &record.object {
            Some(object) => PathBuf::from(object),
            None => self.catalogue.folder(&record.name).join("data.raw"),
        }
    }

    fn snapshot_path(&self, volume: &str, snapshot: &str) -> PathBuf {
        self.catalogue.folder(volume).join("snapshots").join(format!("{snapshot}.raw"))
    }

    fn snapshot_of<'a>(&self, record: &'a VolumeRecord, snapshot: &str) -> Result<&'a SnapshotRecord> {
        record.snapshots.get(snapshot).ok_or_else(|| {
            let name = &record.name;
            PoolError::NotFound(format!(
                "volume {name} has no snapshot {snapshot}; list them with: novastor snapshot list {name}"
            ))
        })
    }

    fn open_path(&self, path: &Path, read_only: bool, links: Links) -> Result<FileDevice> {
        Ok(FileDevice::open_through(path, FileOptions { read_only, direct: true }, links)?)
    }

    fn open_data(&self, record: &VolumeRecord, read_only: bool) -> Result<FileDevice> {
        let path = self.data_path(record);
        let device = self.open_path(&path, read_only, links_to_data(record))?;
        match record.object_kind {
            Some(adopted) if adopted != kind_of(&device) => Err(PoolError::Invalid(format!(
                "volume {}: {} was a {} when it was adopted, and is a {} now; put back what was there",
                record.name,
                path.display(),
                shown(adopted),
                shown(kind_of(&device)),
            ))),
            _ => Ok(device),
        }
    }

    /// A new file at `target` that shares the data of `source`.
    fn reflink(&self, what: &str, source: &Path, links: Links, target: &Path) -> Result<()> {
        let from = sys::open(source, libc::O_RDONLY, links).map_err(io_error(format!("{what}: opening {}", source.display())))?;
        let to = File::create_new(target).map_err(io_error(format!("{what}: creating {}", target.display())))?;
        let shared = sys::share_data(&from, &to).and_then(|()| to.sync_all());
        shared.map_err(|error| {
            let _ = fs::remove_file(target);
            match error.raw_os_error() {
                Some(libc::EOPNOTSUPP | libc::ENOTTY | libc::EXDEV | libc::EINVAL) => PoolError::Unsupported(format!(
                    "{what} refused: the file system under pool {} cannot share data between files; put the pool on XFS or btrfs, \
                     or copy the volume with: novastor image export, then novastor image import",
                    self.name
                )),
                _ => io_error(format!("{what}: sharing the data of {}", source.display()))(error),
            }
        })
    }

    fn snapshot_one(&self, volume: &str, snapshot: &str) -> Result<SnapshotRecord> {
        let mut record = self.get(volume)?;
        let target = self.snapshot_path(volume, snapshot);
        let what = format!("snapshot {volume}@{snapshot}");
        if record.snapshots.contains_key(snapshot) {
            return Err(PoolError::Exists(format!("{what} exists already; choose another name")));
        }
        let folder = self.catalogue.folder(volume).join("snapshots");
        fs::create_dir_all(&folder).map_err(io_error(format!("{what}: making {}", folder.display())))?;
        let _ = fs::remove_file(&target);
        self.reflink(&what, &self.data_path(&record), links_to_data(&record), &target)?;
        sync_folder_of(&target).map_err(io_error(what))?;
        let size = fs::metadata(&target).map_err(io_error("reading the snapshot's size"))?.len();
        let made = SnapshotRecord { created: now_seconds(), size };
        record.snapshots.insert(snapshot.to_owned(), made.clone());
        self.catalogue.update(&record)?;
        Ok(made)
    }
}

fn now_seconds() -> u64 {
    clock::wall().duration_since(std::time::UNIX_EPOCH).map_or(0, |since| since.as_secs())
}

/// A regular file that was put elsewhere may be led to something that its owner must not reach; a device's names are links.
fn links_to_data(record: &VolumeRecord) -> Links {
    match (&record.object, record.object_kind) {
        (None, _) => Links::Folders,
        (Some(_), Some(ObjectKind::Device)) => Links::All,
        (Some(_), _) => Links::None,
    }
}

fn kind_of(device: &FileDevice) -> ObjectKind {
    if device.is_block_device() { ObjectKind::Device } else { ObjectKind::File }
}

fn shown(kind: ObjectKind) -> &'static str {
    match kind {
        ObjectKind::File => "regular file",
        ObjectKind::Device => "block device",
    }
}

fn allocated(path: &Path) -> u64 {
    fs::metadata(path).map_or(0, |metadata| metadata.blocks() * 512)
}

impl Pool for FilePool {
    fn name(&self) -> &str {
        &self.name
    }

    fn driver(&self) -> &'static str {
        "file"
    }

    fn location(&self) -> String {
        self.catalogue.root().display().to_string()
    }

    fn list(&self) -> Result<Vec<VolumeRecord>> {
        self.catalogue.list()
    }

    fn get(&self, volume: &str) -> Result<VolumeRecord> {
        self.catalogue.get(volume)
    }

    fn has(&self, volume: &str) -> Result<bool> {
        self.catalogue.has(volume)
    }

    fn create(&self, volume: &str, spec: &VolumeSpec) -> Result<VolumeRecord> {
        let _lock = self.catalogue.lock()?;
        self.catalogue.refuse_existing(volume)?;
        let record = VolumeRecord::new(volume, spec);
        let what = format!("volume {volume}: creating a file of {} bytes", spec.size);
        self.catalogue.add(&record, |folder| {
            let file = File::create_new(folder.join("data.raw")).map_err(io_error(what.clone()))?;
            file.set_len(spec.size).and_then(|()| file.sync_all()).map_err(io_error(what))
        })?;
        Ok(record)
    }

    fn adopt(&self, object: &str, volume: &str) -> Result<VolumeRecord> {
        let _lock = self.catalogue.lock()?;
        self.catalogue.refuse_existing(volume)?;
        if !Path::new(object).is_absolute() {
            let pool = &self.name;
            return Err(PoolError::Invalid(format!(
                "volume {volume}: adopting {object} refused: write its path from / on: {pool}//path/to/{object}"
            )));
        }
        let path = fs::canonicalize(object).map_err(io_error(format!("volume {volume}: adopting {object}")))?;
        let root = fs::canonicalize(self.catalogue.root());
        if root.is_ok_and(|root| path.starts_with(root)) {
            return Err(PoolError::Invalid(format!("{object} already belongs to pool {}", self.name)));
        }
        let is_there = |other: &String| fs::canonicalize(other).is_ok_and(|other| other == path);
        if let Some(other) = self.list()?.into_iter().find(|other| other.object.as_ref().is_some_and(is_there)) {
            return Err(PoolError::Exists(format!("{object} is already volume {}", other.name)));
        }
        let Some(canonical) = path.to_str() else {
            return Err(PoolError::Invalid(format!("volume {volume}: {} refused: its path is not UTF-8", path.display())));
        };
        let device = self.open_path(&path, true, Links::None)?;
        let (size, kind) = (device.geometry().size, kind_of(&device));
        let object = match kind {
            ObjectKind::File => canonical,
            ObjectKind::Device => object,
        };
        let spec = VolumeSpec { size, block_size: 512, layout: Layout::Raw, policy: None, tenant: None, wrapped_key: None };
        let record =
            VolumeRecord { object: Some(object.to_owned()), object_kind: Some(kind), ..VolumeRecord::new(volume, &spec) };
        self.catalogue.add(&record, |_| Ok(()))?;
        Ok(record)
    }

    fn open(&self, volume: &str, read_only: bool) -> Result<Arc<dyn BlockDevice>> {
        let record = self.get(volume)?;
        let path = self.data_path(&record);
        let device = self.open_data(&record, read_only)?;
        let (size, wanted, shown) = (device.geometry().size, record.size, path.display());
        if size < wanted {
            return Err(PoolError::Invalid(format!(
                "volume {volume}: {shown} was truncated: it has {size} bytes, the volume {wanted}; restore it, or go on with zeroes for \
                 what is lost: truncate -s {wanted} {shown}"
            )));
        }
        Ok(Arc::new(device))
    }

    fn open_snapshot(&self, volume: &str, snapshot: &str) -> Result<Arc<dyn BlockDevice>> {
        self.snapshot_of(&self.get(volume)?, snapshot)?;
        Ok(Arc::new(self.open_path(&self.snapshot_path(volume, snapshot), true, Links::Folders)?))
    }

    fn resized(&self, volume: &str, size: u64) -> Result<()> {
        let _lock = self.catalogue.lock()?;
        let record = self.get(volume)?;
        self.catalogue.update(&VolumeRecord { size, ..record })
    }

    fn set_wrapped_key(&self, volume: &str, from: &str, to: &str) -> Result<()> {
        self.catalogue.set_wrapped_key(volume, from, to)
    }

    fn rename(&self, volume: &str, to: &str) -> Result<()> {
        let _lock = self.catalogue.lock()?;
        self.catalogue.rename(volume, to)
    }

    fn delete(&self, volume: &str) -> Result<()> {
        let _lock = self.catalogue.lock()?;
        let record = self.get(volume)?;
        if !record.snapshots.is_empty() {
            let names = record.snapshots.keys().map(|name| format!("{volume}@{name}")).collect::<Vec<_>>().join(", ");
            return Err(PoolError::InUse(format!("volume {volume} has snapshots ({names}); delete them first")));
        }
        let data = self.data_path(&record);
        let is_own = record.object.is_none() && data.exists();
        let _unused = is_own.then(|| hold_unused(&data)).transpose()?;
        self.catalogue.remove(&record)
    }

    fn clone_volume(&self, volume: &str, snapshot: Option<&str>, to: &str) -> Result<VolumeRecord> {
        let _lock = self.catalogue.lock()?;
        self.catalogue.refuse_existing(to)?;
        let origin = self.get(volume)?;
        let (source, links, size, from) = match snapshot {
            Some(name) => {
                let size = self.snapshot_of(&origin, name)?.size;
                (self.snapshot_path(volume, name), Links::Folders, size, format!("{volume}@{name}"))
            }
            None => (self.data_path(&origin), links_to_data(&origin), origin.size, volume.to_owned()),
        };
        let what = format!("clone of {from} as {to}");
        let record = VolumeRecord {
            name: to.to_owned(),
            uuid: blockdev::random::uuid(),
            size,
            object: None,
            object_kind: None,
            origin: Some(from),
            snapshots: BTreeMap::new(),
            ..origin
        };
        self.catalogue.add(&record, |folder| self.reflink(&what, &source, links, &folder.join("data.raw")))?;
        Ok(record)
    }

    /// A clone shares blocks of the file system with its origin, and depends on it for nothing.
    fn flatten(&self, volume: &str, _progress: &(dyn Fn(u64, u64) + Sync)) -> Result<Flattened> {
        self.get(volume).map(|_| Flattened::NoParent)
    }

    fn snapshot(&self, volumes: &[&str], snapshot: &str) -> Result<BTreeMap<String, SnapshotRecord>> {
        check_name("snapshot", snapshot)?;
        let _lock = self.catalogue.lock()?;
        let mut made = BTreeMap::new();
        for volume in volumes {
            match self.snapshot_one(volume, snapshot) {
                Ok(record) => made.insert((*volume).to_owned(), record),
                Err(error) => {
                    for taken in made.keys() {
                        let _ = self.forget_snapshot(taken, snapshot);
                    }
                    return Err(error);
                }
            };
        }
        Ok(made)
    }

    fn delete_snapshot(&self, volume: &str, snapshot: &str) -> Result<()> {
        let _lock = self.catalogue.lock()?;
        self.forget_snapshot(volume, snapshot)
    }

    fn rollback(&self, volume: &str, snapshot: &str) -> Result<()> {
        let _lock = self.catalogue.lock()?;
        let record = self.get(volume)?;
        let size = self.snapshot_of(&record, snapshot)?.size;
        let what = format!("rollback of {volume} to {snapshot}");
        if record.object.is_some() {
            return Err(PoolError::Unsupported(format!(
                "{what} refused: the volume stands on a file outside the pool; clone the snapshot instead"
            )));
        }
        let (data, fresh) = (self.data_path(&record), self.catalogue.folder(volume).join("data.rollback"));
        // Held until the name leads to the new file: whoever waits for it looks again then.
        let _unused = hold_unused(&data)?;
        let _ = fs::remove_file(&fresh);
        self.reflink(&what, &self.snapshot_path(volume, snapshot), Links::Folders, &fresh)?;
        // A file shorter than its record counts as truncated.
        let record = VolumeRecord { size: size.min(record.size), ..record };
        self.catalogue.update(&record)?;
        fs::rename(&fresh, &data).and_then(|()| sync_folder_of(&data)).map_err(io_error(what))?;
        self.catalogue.update(&VolumeRecord { size, ..record })
    }

    fn usage(&self, volume: &str) -> Result<Usage> {
        let record = self.get(volume)?;
        let snapshots = record.snapshots.keys().map(|name| allocated(&self.snapshot_path(volume, name))).sum();
        let (logical, allocated) = (record.size, allocated(&self.data_path(&record)));
        Ok(Usage { logical, allocated, snapshots, reduced: None, shares: None, log: None })
    }

    fn health(&self) -> PoolHealth {
        let root = self.catalogue.root();
        match space(root) {
            Ok((total, free)) => {
                let usable = still_there(root, self.uuid()).and_then(|()| {
                    probe(&root.join(".health")).map_err(|error| format!("{}: not writable: {error}", root.display()))
                });
                let ok = usable.is_ok();
                let detail = usable.err().unwrap_or_else(|| "writable".to_owned());
                PoolHealth { ok, detail, total: Some(total), free: Some(free) }
            }
            Err(error) => PoolHealth { ok: false, detail: format!("{}: {error}", root.display()), total: None, free: None },
        }
    }

    fn check(&self, _progress: &dyn Fn(u64, u64)) -> Result<Vec<String>> {
        let mut found = Vec::new();
        for name in self.catalogue.names()? {
            let record = match self.get(&name) {
                Ok(record) if record.layout != Layout::Raw => continue,
                Ok(record) => record,
                Err(PoolError::NotFound(_)) => continue,
                Err(error) => {
                    found.push(error.to_string());
                    continue;
                }
            };
            let data = self.data_path(&record);
            match File::open(&data).and_then(|file| sys::size_of(&file)) {
                Err(error) => found.push(format!("volume {}: {}: {error}", record.name, data.display())),
                Ok(size) if size != record.size => {
                    found.push(format!(
                        "volume {}: {} has {size} bytes, its record says {}",
                        record.name,
                        data.display(),
                        record.size
                    ));
                }
                Ok(_) => {}
            }
            for name in record.snapshots.keys().filter(|name| !self.snapshot_path(&record.name, name).exists()) {
                found.push(format!("snapshot {}@{name}: its file is missing", record.name));
            }
        }
        Ok(found)
    }
}

impl FilePool {
    fn forget_snapshot(&self, volume: &str, snapshot: &str) -> Result<()> {
        let mut record = self.get(volume)?;
        self.snapshot_of(&record, snapshot)?;
        record.snapshots.remove(snapshot);
        self.catalogue.update(&record)?;
        let path = self.snapshot_path(volume, snapshot);
        fs::remove_file(&path).map_err(io_error(format!("snapshot {volume}@{snapshot}: removing {}", path.display())))
    }
}

/// Makes a file and removes it, beside others who do the same. Whatever somebody has put there is replaced, and not followed.
fn probe(path: &Path) -> std::io::Result<()> {
    let _ = fs::remove_file(path);
    OpenOptions::new().write(true).create(true).truncate(false).custom_flags(libc::O_NOFOLLOW).open(path)?;
    match fs::remove_file(path) {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(()),
        removed => removed,
    }
}

/// Total and free bytes of the file system that holds `path`.
fn space(path: &Path) -> std::io::Result<(u64, u64)> {
    use std::os::unix::ffi::OsStrExt;
    let name = std::ffi::CString::new(path.as_os_str().as_bytes())?;
    let mut status = std::mem::MaybeUninit::<libc::statvfs>::zeroed();
    // SAFETY: `name` is a C string that outlives the call, and the result area is a whole statvfs.
    if unsafe { libc::statvfs(name.as_ptr(), status.as_mut_ptr()) } != 0 {
        return Err(std::io::Error::last_os_error());
    }
    // SAFETY: the call succeeded and filled it.
    let status = unsafe { status.assume_init() };
    Ok((status.f_blocks * status.f_frsize, status.f_bavail * status.f_frsize))
}
