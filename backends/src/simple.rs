//! Pools without a backend: `null` stores nothing, `memory` keeps content as long as the daemon runs. For benchmarks and tests.
//!
//! Their catalogue lies in a directory like that of any pool, so that volumes and exports of them survive a restart.

use std::collections::{BTreeMap, HashMap};
use std::path::Path;
use std::sync::Arc;

use blockdev::BlockDevice;
use blockdev::memory_disk::MemoryDisk;
use blockdev::null_disk::NullDisk;
use parking_lot::Mutex;
use uuid::Uuid;

use crate::catalogue::Catalogue;
use crate::pool::{Flattened, Pool, PoolError, PoolHealth, Result, SnapshotRecord, Usage, VolumeRecord, VolumeSpec};

/// What the volumes of a [`SimplePool`] do.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum SimpleKind {
    /// Reads give zeroes, writes vanish.
    Null,
    /// Content lives in memory until the daemon ends.
    Memory,
}

/// The pool.
pub struct SimplePool {
    name: String,
    kind: SimpleKind,
    catalogue: Catalogue,
    memory: Mutex<HashMap<Uuid, Arc<MemoryDisk>>>,
}

impl SimplePool {
    /// `folder`: where the catalogue lies. Blocks.
    pub fn open(name: &str, kind: SimpleKind, folder: &Path) -> Result<SimplePool> {
        Ok(SimplePool { name: name.to_owned(), kind, catalogue: Catalogue::open(name, folder, None)?, memory: Mutex::default() })
    }

    fn unsupported<T>(&self, what: &str) -> Result<T> {
        Err(PoolError::Unsupported(format!(
            "pool {}: {what} is not possible with the {} driver; use a file pool",
            self.name,
            self.driver()
        )))
    }
}

impl Pool for SimplePool {
    fn name(&self) -> &str {
        &self.name
    }

    fn driver(&self) -> &'static str {
        match self.kind {
            SimpleKind::Null => "null",
            SimpleKind::Memory => "memory",
        }
    }

    fn location(&self) -> String {
        "memory of the daemon".to_owned()
    }

    fn list(&self) -> Result<Vec<VolumeRecord>> {
        self.catalogue.list()
    }

    fn get(&self, volume: &str) -> Result<VolumeRecord> {
        self.catalogue.get(volume)
    }

    fn create(&self, volume: &str, spec: &VolumeSpec) -> Result<VolumeRecord> {
        let _lock = self.catalogue.lock()?;
        self.catalogue.refuse_existing(volume)?;
        let record = VolumeRecord::new(volume, spec);
        self.catalogue.add(&record, |_| Ok(()))?;
        Ok(record)
    }

    fn adopt(&self, _object: &str, _volume: &str) -> Result<VolumeRecord> {
        self.unsupported("adopting")
    }

    fn open(&self, volume: &str, _read_only: bool) -> Result<Arc<dyn BlockDevice>> {
        let record = self.get(volume)?;
        if self.kind == SimpleKind::Null {
            return Ok(Arc::new(NullDisk::new(record.size)));
        }
        let mut memory = self.memory.lock();
        let disk = memory.entry(record.uuid).or_insert_with(|| Arc::new(MemoryDisk::new(record.size, 1)));
        Ok(disk.clone())
    }

    fn open_snapshot(&self, _volume: &str, _snapshot: &str) -> Result<Arc<dyn BlockDevice>> {
        self.unsupported("a snapshot")
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
        self.memory.lock().remove(&record.uuid);
        self.catalogue.remove(&record)
    }

    fn clone_volume(&self, _volume: &str, _snapshot: Option<&str>, _to: &str) -> Result<VolumeRecord> {
        self.unsupported("a clone")
    }

    fn flatten(&self, volume: &str, _progress: &(dyn Fn(u64, u64) + Sync)) -> Result<Flattened> {
        self.get(volume).map(|_| Flattened::NoParent)
    }

    fn snapshot(&self, _volumes: &[&str], _snapshot: &str) -> Result<BTreeMap<String, SnapshotRecord>> {
        self.unsupported("a snapshot")
    }

    fn delete_snapshot(&self, _volume: &str, _snapshot: &str) -> Result<()> {
        self.unsupported("a snapshot")
    }

    fn rollback(&self, _volume: &str, _snapshot: &str) -> Result<()> {
        self.unsupported("a snapshot")
    }

    fn usage(&self, volume: &str) -> Result<Usage> {
        let record = self.get(volume)?;
        let allocated = self.memory.lock().get(&record.uuid).map_or(0, |disk| disk.allocated());
        Ok(Usage { logical: record.size, allocated, snapshots: 0, reduced: None, shares: None, log: None })
    }

    fn health(&self) -> PoolHealth {
        PoolHealth { ok: true, detail: "in memory; content does not survive a restart".to_owned(), total: None, free: None }
    }

    fn check(&self, _progress: &dyn Fn(u64, u64)) -> Result<Vec<String>> {
        self.list().map(|_| Vec::new())
    }
}
