//! Pools of mapped volumes, beside the raw ones of a driver where there is one.
//!
//! ```text
//!   MappedPool ─┬─ raw volumes ─▶ the driver's own Pool
//!               ├─ Records   what volumes there are: the driver's catalogue, or a root of the store
//!               ├─ Segments  the store with the objects and roots of all groups, and the pool's key
//!               └─ Logs      a file for each volume that this host has opened
//!
//!   create:  stage the record ─ make the group's root ─ publish the record
//!   delete:  retire the record ─ end the group, remove its objects and log ─ once more at a later opening of the pool, then forget it
//! ```
//!
//! Invariants:
//! - A volume that is in the catalogue has its root; nothing of it is removed before it has left the catalogue.
//! - A group that is not in the catalogue and may have objects is noted as staged or retired, whatever crashes when.
//! - A snapshot or size that the engine has is in the record when the operation ends, or after the next opening.
//! - A volume that was opened is still in the catalogue after it was claimed, or the opening fails: who deletes it later fences the opener.
//! - A log is never removed while its volume exists. One that must not be replayed is set aside.

mod clones;
mod groups;
mod growing_log;
mod key;
mod logs;
mod objects;
mod opening;
mod records;
mod segments;
mod snapshots;
mod store_records;
mod together;
mod usage;

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::ops::Range;
use std::path::PathBuf;
use std::sync::atomic::AtomicUsize;
use std::sync::{Arc, Weak};

use backends::file::FilePool;
use backends::pool::Result;
use backends::segments::SegmentStore;
use backends::segments::drive::block_on;
use backends::{
    Claim, EngineUse, Flattened, KeyRecord, KeyRotation, Layout, Pool, PoolError, PoolHealth, SnapshotRecord, Usage,
    VolumeRecord, VolumeSpec, check_name,
};
use blockdev::{BlockDevice, ReactorHandle};
use dedup::frame::Allowed;
use parking_lot::Mutex;
use uuid::Uuid;

use crate::device::{GroupDevice, MappedDevice};
use crate::group::Beginning;
use crate::keys::Keks;
use crate::log::WhenFull;
use crate::mapped::Durability;
use crate::segment::BLOCK;
use logs::Logs;
use objects::Groups;
use records::{DirectoryRecords, Leaving, Records};
use segments::{Opened, Segments};
use store_records::StoreRecords;

/// A store that several threads share.
pub type SharedStore = Arc<dyn SegmentStore + Send + Sync>;
/// What a volume's policy asks for.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct VolumePolicy {
    pub durability: Durability,
    pub compression: Allowed,
    pub dedup: Dedup,
    pub when_full: WhenFull,
}

/// Among what blocks are stored once.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Dedup {
    None,
    /// Those of the volume.
    Volume,
    /// Those of all volumes of its tenant that have the same policy and were made on this host: they are one group.
    Tenant,
}

/// The policy of a volume, or why it cannot be served as it says.
pub type PolicyOf = Box<dyn Fn(&VolumeRecord) -> Result<VolumePolicy> + Send + Sync>;

/// The key-encryption keys of this host, as they are configured now.
pub type KeksOf = Box<dyn Fn() -> Result<Keks> + Send + Sync>;

/// Of what is written between two segments, the most.
const SEGMENT_BYTES_MAX: u64 = 32 << 20;

/// What a host brings to a pool.
pub struct MappedPoolOptions {
    /// Threads that engines live on.
    pub homes: Vec<ReactorHandle>,
    /// Where the logs are; made when needed.
    pub log_folder: PathBuf,
    /// Bytes of a new log, a multiple of 4096, at least 1 MiB.
    pub log_size: u64,
    pub policy: PolicyOf,
    /// Whether a new volume is to be encrypted.
    pub encrypts: Box<dyn Fn(&VolumeRecord) -> bool + Send + Sync>,
    pub keks: KeksOf,
}

/// The pool.
pub struct MappedPool {
    name: String,
    driver: &'static str,
    location: String,
    raw: Option<FilePool>,
    records: Box<dyn Records>,
    segments: Segments,
    logs: Logs,
    options: MappedPoolOptions,
    next_home: AtomicUsize,
    /// Those that are open, by name: an open volume is not renamed.
    open: Mutex<HashMap<String, (Uuid, Weak<MappedDevice>)>>,
    /// Groups that are open, or were.
    groups: Mutex<HashMap<Uuid, GroupPlace>>,
    /// Held while a volume joins or leaves a group of several. Before the catalogue's lock.
    membership: Mutex<()>,
    /// Left of deletions that the store refused to end.
    unswept: Mutex<Vec<Leaving>>,
}

/// Held while a group is being opened.
type GroupPlace = Arc<Mutex<Weak<GroupDevice>>>;

impl MappedPool {
    /// A pool that has raw volumes too; the store lies in its directory, and is made with the first mapped volume. Blocks.
    pub fn beside(files: FilePool, mut options: MappedPoolOptions) -> MappedPool {
        let keks = std::mem::replace(&mut options.keks, Box::new(|| Ok(Keks::default())));
        let (name, location) = (files.name().to_owned(), files.location());
        let segments = Segments::directory(files.catalogue().root().join("segments"), files.uuid(), keks);
        let records = Box::new(DirectoryRecords(files.catalogue().clone()));
        MappedPool::open_with(name, "file", location, Some(files), records, segments, options)
    }

    /// A pool of mapped volumes only, all of it in a store. Blocks.
    pub fn in_store(
        name: &str,
        driver: &'static str,
        location: String,
        (store, pool): (SharedStore, uuid::Uuid),
        mut options: MappedPoolOptions,
    ) -> MappedPool {
        let keks = std::mem::replace(&mut options.keks, Box::new(|| Ok(Keks::default())));
        let records = Box::new(StoreRecords::new(name, store.clone()));
        MappedPool::open_with(name.to_owned(), driver, location, None, records, Segments::given(store, pool, keks), options)
    }

    fn open_with(
        name: String,
        driver: &'static str,
        location: String,
        raw: Option<FilePool>,
        records: Box<dyn Records>,
        segments: Segments,
        options: MappedPoolOptions,
    ) -> MappedPool {
        let logs = Logs::new(options.log_folder.clone(), options.log_size);
        let pool = MappedPool {
            name,
            driver,
            location,
            raw,
            records,
            segments,
            logs,
            options,
            next_home: AtomicUsize::default(),
            open: Mutex::default(),
            groups: Mutex::default(),
            membership: Mutex::default(),
            unswept: Mutex::default(),
        };
        if let Err(error) = pool.records.clear(&|left| pool.sweep(left)) {
            tracing::warn!(
                "pool {}: what deleted volumes left cannot be removed now, it is tried again later: {error}",
                pool.name
            );
        }
        pool
    }

    fn store(&self) -> Result<Opened> {
        self.segments.open(&self.name, || self.has_volumes(), false)
    }

    /// The store, made if this is the first mapped volume.
    fn store_to_create(&self) -> Result<Opened> {
        self.segments.open(&self.name, || self.has_volumes(), true)
    }

    fn has_volumes(&self) -> Result<bool> {
        Ok(self.records.list()?.iter().any(|record| record.layout == Layout::Mapped))
    }

    /// A volume, and its driver if it is a raw one.
    fn found(&self, volume: &str) -> Result<(VolumeRecord, Option<&FilePool>)> {
        let record = self.get(volume)?;
        let raw = self.raw.as_ref().filter(|_| record.layout == Layout::Raw);
        Ok((record, raw))
    }

    /// Volumes that are open here and wait for the pool, and what of it is told.
    fn waiting(&self) -> Option<String> {
        let devices: Vec<(String, Arc<MappedDevice>)> = {
            let open = self.open.lock();
            open.iter().filter_map(|(name, (_, device))| Some((name.clone(), device.upgrade()?))).collect()
        };
        let told = devices.into_iter().filter_map(|(name, device)| Some((device.trouble()?, name)));
        let waiting: BTreeSet<(String, String)> = told.collect();
        // The one that began first.
        let (why, _) = waiting.first()?.clone();
        let mut names: Vec<String> = waiting.into_iter().map(|(_, name)| name).collect();
        names.sort();
        Some(format!("{why} (volumes that wait: {})", names.join(", ")))
    }

    fn check_mapped(&self, records: Vec<VolumeRecord>, progress: &dyn Fn(u64, u64)) -> Result<Vec<String>> {
        let mut groups = Groups::new();
        for record in records.into_iter().filter(|record| record.layout == Layout::Mapped) {
            groups.entry(record.group()).or_default().push(record);
        }
        let leaving = self.records.leaving()?;
        let known: BTreeSet<Uuid> = groups.keys().copied().chain(leaving.iter().map(|left| left.group)).collect();
        let mut found = self.logs.check(&known)?;
        if self.segments.is_made() || !groups.is_empty() {
            let opened = self.store()?;
            let sizes = groups::sizes(&*opened.store).map_err(|error| segments::failed(&self.name, error))?;
            found.extend(self.check_objects(&opened, &groups, &sizes, progress)?);
            found.extend(groups::strays(&sizes, &known));
        }
        Ok(found)
    }
}

impl Pool for MappedPool {
    fn name(&self) -> &str {
        &self.name
    }

    fn driver(&self) -> &'static str {
        self.driver
    }

    fn location(&self) -> String {
        self.location.clone()
    }

    fn layouts(&self) -> &'static [Layout] {
        if self.raw.is_some() { &[Layout::Mapped, Layout::Raw] } else { &[Layout::Mapped] }
    }

    fn list(&self) -> Result<Vec<VolumeRecord>> {
        self.records.list()
    }

    fn get(&self, volume: &str) -> Result<VolumeRecord> {
        self.records.get(volume)
    }

    fn has(&self, volume: &str) -> Result<bool> {
        self.records.has(volume)
    }

    fn create(&self, volume: &str, spec: &VolumeSpec) -> Result<VolumeRecord> {
        if let (Layout::Raw, Some(raw)) = (spec.layout, &self.raw) {
            return raw.create(volume, spec);
        }
        let block = BLOCK as u64;
        if !spec.size.is_multiple_of(block) {
            let next = spec.size.next_multiple_of(block);
            return Err(PoolError::Invalid(format!(
                "volume {volume}: size {} is no multiple of {block}, as that of a mapped volume must be: the next is {next}",
                spec.size
            )));
        }
        let mut record = VolumeRecord::new(volume, spec);
        record.encrypted = (self.options.encrypts)(&record);
        let opened = self.store_to_create()?;
        let shares = (self.options.policy)(&record)?.dedup == Dedup::Tenant;
        let _membership = shares.then(|| self.membership.lock());
        let joins = shares && self.join(&mut record)?;
        let make = || {
            let failed = |error| PoolError::Backend(format!("volume {volume}: creating it in pool {}: {error}", self.name));
            if joins {
                return self.open_group(&record, Claim::Own)?.add(record.uuid, Beginning::Empty(record.size)).map_err(failed);
            }
            let domain = block_on(opened.keyring.create_domain(record.group(), record.encrypted));
            domain.map_err(|error| key::key_failed(&format!("volume {volume}"), &error))?;
            self.engine(&record, &opened)?.create(record.size).map_err(failed)?;
            if record.group.is_some() {
                // Tells where the group is.
                drop(self.logs.open(record.group())?);
            }
            Ok(())
        };
        self.add(&record, &make)?;
        Ok(record)
    }

    fn adopt(&self, object: &str, volume: &str) -> Result<VolumeRecord> {
        match &self.raw {
            Some(raw) => raw.adopt(object, volume),
            None => Err(PoolError::Unsupported(format!(
                "volume {volume}: adopting {object} refused: pool {} holds mapped volumes only; copy it with: novastor image import",
                self.name
            ))),
        }
    }

    fn open(&self, volume: &str, read_only: bool) -> Result<Arc<dyn BlockDevice>> {
        match self.found(volume)? {
            (_, Some(raw)) => raw.open(volume, read_only),
            _ if read_only => Err(PoolError::Unsupported(format!(
                "volume {volume}: a mapped volume has one owner, who must be able to write; export it with --read-only from there"
            ))),
            (record, None) => Ok(self.open_device(&record, Claim::TakeOver)?),
        }
    }

    fn open_as(&self, volume: &str, claim: Claim) -> Result<Arc<dyn BlockDevice>> {
        match self.found(volume)? {
            (_, Some(raw)) => raw.open_as(volume, claim),
            (record, None) => Ok(self.open_device(&record, claim)?),
        }
    }

    fn is_taken_over(&self, volume: &str) -> bool {
        let device = self.open.lock().get(volume).and_then(|(_, device)| device.upgrade());
        device.is_some_and(|device| device.is_taken_over())
    }

    fn open_snapshot(&self, volume: &str, snapshot: &str) -> Result<Arc<dyn BlockDevice>> {
        match self.found(volume)? {
            (_, Some(raw)) => raw.open_snapshot(volume, snapshot),
            (record, None) => Ok(Arc::new(self.view(&record, snapshot)?)),
        }
    }

    fn resized(&self, volume: &str, size: u64) -> Result<()> {
        match self.found(volume)? {
            (_, Some(raw)) => raw.resized(volume, size),
            (record, None) => self.mirror_change(&record, &*self.device(&record)?).map(drop),
        }
    }

    fn set_wrapped_key(&self, volume: &str, from: &str, to: &str) -> Result<()> {
        match self.found(volume)? {
            (_, Some(raw)) => raw.set_wrapped_key(volume, from, to),
            (_, None) => Err(PoolError::Unsupported(format!("volume {volume}: a mapped volume's key is in the pool's keys"))),
        }
    }

    fn keys(&self) -> Result<Vec<KeyRecord>> {
        self.mapped_keys()
    }

    fn rotate_keys(&self, progress: &dyn Fn(u64, u64)) -> Result<KeyRotation> {
        self.rotate_mapped_keys(progress)
    }

    fn erase_key(&self, volume: &str) -> Result<bool> {
        match self.found(volume)? {
            (_, Some(raw)) => raw.erase_key(volume),
            (record, None) => self.erase_mapped_key(&record),
        }
    }

    fn rename(&self, volume: &str, to: &str) -> Result<()> {
        self.records.rename(volume, to)?;
        self.rename_in_clones(volume, to)
    }

    fn delete(&self, volume: &str) -> Result<()> {
        match self.found(volume)? {
            (_, Some(raw)) => raw.delete(volume),
            (record, None) => self.delete_mapped(&record),
        }
    }

    fn clone_volume(&self, volume: &str, snapshot: Option<&str>, to: &str) -> Result<VolumeRecord> {
        match self.found(volume)? {
            (_, Some(raw)) => raw.clone_volume(volume, snapshot, to),
            (record, None) => self.clone_mapped(&record, snapshot, to),
        }
    }

    fn flatten(&self, volume: &str, progress: &(dyn Fn(u64, u64) + Sync)) -> Result<Flattened> {
        match self.found(volume)? {
            (_, Some(raw)) => raw.flatten(volume, progress),
            (record, None) => self.flatten_mapped(&record, progress),
        }
    }

    fn snapshot(&self, volumes: &[&str], snapshot: &str) -> Result<BTreeMap<String, SnapshotRecord>> {
        check_name("snapshot", snapshot)?;
        let (mut raw, mut mapped) = (Vec::new(), Vec::new());
        for volume in volumes {
            match self.found(volume)? {
                (_, Some(_)) => raw.push(*volume),
                (record, None) => mapped.push(record),
            }
        }
        let mut made = self.snapshot_mapped(&mapped, snapshot)?;
        if let Some(files) = self.raw.as_ref().filter(|_| !raw.is_empty()) {
            let beside = files.snapshot(&raw, snapshot);
            made.append(&mut beside.inspect_err(|_| mapped.iter().for_each(|record| self.take_back(record, snapshot)))?);
        }
        Ok(made)
    }

    fn delete_snapshot(&self, volume: &str, snapshot: &str) -> Result<()> {
        match self.found(volume)? {
            (_, Some(raw)) => raw.delete_snapshot(volume, snapshot),
            (record, None) => self.delete_mapped_snapshot(&record, snapshot),
        }
    }

    fn rollback(&self, volume: &str, snapshot: &str) -> Result<()> {
        match self.found(volume)? {
            (_, Some(raw)) => raw.rollback(volume, snapshot),
            (record, None) => self.roll_back_mapped(&record, snapshot),
        }
    }

    fn tells_changes(&self, layout: Layout) -> bool {
        layout == Layout::Mapped
    }

    fn changed(&self, volume: &str, before: &str, to: Option<&str>) -> Result<Option<Vec<Range<u64>>>> {
        match self.found(volume)? {
            (_, Some(raw)) => raw.changed(volume, before, to),
            (record, None) => self.changed_mapped(&record, before, to).map(Some),
        }
    }

    fn usage(&self, volume: &str) -> Result<Usage> {
        match self.found(volume)? {
            (_, Some(raw)) => raw.usage(volume),
            (record, None) => self.usage_mapped(&record),
        }
    }

    fn engine_use(&self, volume: &str) -> Option<EngineUse> {
        let device = self.open.lock().get(volume).and_then(|(_, device)| device.upgrade())?;
        device.usage()
    }

    fn health(&self) -> PoolHealth {
        let listed = || match self.records.list() {
            Ok(_) => PoolHealth { ok: true, detail: "answers".to_owned(), total: None, free: None },
            Err(error) => PoolHealth { ok: false, detail: error.to_string(), total: None, free: None },
        };
        let health = self.raw.as_ref().map_or_else(listed, |raw| raw.health());
        match self.waiting() {
            Some(detail) if health.ok => PoolHealth { ok: false, detail, ..health },
            _ => health,
        }
    }

    fn check_volume(&self, volume: &str, progress: &dyn Fn(u64, u64)) -> Result<Vec<String>> {
        match self.found(volume)? {
            (_, Some(raw)) => raw.check_volume(volume, progress),
            (record, None) => {
                let scrubbed = self.device(&record)?.scrub(progress);
                scrubbed.map_err(|error| snapshots::refused(&format!("volume {volume}: check"), error))
            }
        }
    }

    fn check(&self, progress: &dyn Fn(u64, u64)) -> Result<Vec<String>> {
        let mut found = self.raw.as_ref().map_or(Ok(Vec::new()), |raw| raw.check(&|_, _| ()))?;
        found.extend(self.check_mapped(self.records.list()?, progress)?);
        Ok(found)
    }
}
