//! What every storage driver does: keep volumes, and open them as block devices.
//!
//! A pool keeps its own catalogue, so any daemon that reaches the pool can serve its volumes. All calls may block and belong to
//! the control plane; requests travel through the [`BlockDevice`] that [`Pool::open`] returns. Names have been checked by
//! [`check_name`] before they get here.

use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::Arc;
use std::time::Duration;

use blockdev::{BlockDevice, DeviceError};
use serde::{Deserialize, Serialize};
use thiserror::Error;

/// One volume as its pool's catalogue knows it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct VolumeRecord {
    pub name: String,
    pub uuid: uuid::Uuid,
    /// Bytes.
    pub size: u64,
    /// The logical block size shown to clients, in bytes: 512 or 4096.
    pub block_size: u32,
    #[serde(default)]
    pub layout: Layout,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub policy: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tenant: Option<String>,
    /// For an adopted volume: the file, device or image it stands on.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub object: Option<String>,
    /// What that was when it was adopted, where the pool minds.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub object_kind: Option<ObjectKind>,
    /// `VOL@SNAP` or `VOL` it was cloned from.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub origin: Option<String>,
    /// Of an encrypted volume: its key, wrapped, as text. Opaque to pools.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub wrapped_key: Option<String>,
    /// Its content is encrypted in the pool.
    #[serde(default)]
    pub encrypted: bool,
    /// Of a mapped volume that shares what it stores with others: their group.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub group: Option<uuid::Uuid>,
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub snapshots: BTreeMap<String, SnapshotRecord>,
}

impl VolumeRecord {
    /// The record of a new volume.
    pub fn new(name: &str, spec: &VolumeSpec) -> VolumeRecord {
        VolumeRecord {
            name: name.to_owned(),
            uuid: blockdev::random::uuid(),
            size: spec.size,
            block_size: spec.block_size,
            layout: spec.layout,
            policy: spec.policy.clone(),
            tenant: spec.tenant.clone(),
            object: None,
            object_kind: None,
            origin: None,
            wrapped_key: spec.wrapped_key.clone(),
            encrypted: spec.wrapped_key.is_some(),
            group: None,
            snapshots: BTreeMap::new(),
        }
    }

    /// What a mapped volume belongs to in the pool: a group of several, or of itself.
    pub fn group(&self) -> uuid::Uuid {
        self.group.unwrap_or(self.uuid)
    }
}

/// What an adopted volume stands on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum ObjectKind {
    /// A regular file, by a path without symbolic links.
    File,
    /// A block device, by the name it was adopted by: the kernel's own may be another device's after a reboot.
    Device,
}

/// How a volume lies on its backend.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Layout {
    /// One to one.
    #[default]
    Raw,
    /// As a log and segments, by the engine of mapped volumes.
    Mapped,
}

impl Layout {
    /// As it is written everywhere.
    pub fn name(self) -> &'static str {
        match self {
            Layout::Raw => "raw",
            Layout::Mapped => "mapped",
        }
    }
}

/// One snapshot of a volume.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SnapshotRecord {
    /// Seconds since 1970.
    pub created: u64,
    /// Of the volume at that time, in bytes.
    pub size: u64,
}

/// What a new volume should be.
#[derive(Clone, Debug)]
pub struct VolumeSpec {
    pub size: u64,
    pub block_size: u32,
    /// One of the pool's [`Pool::layouts`].
    pub layout: Layout,
    pub policy: Option<String>,
    pub tenant: Option<String>,
    /// See [`VolumeRecord::wrapped_key`]. Encrypting is not the pool's business.
    pub wrapped_key: Option<String>,
}

/// Whether what was looked for is there.
pub fn is_found<T>(looked: Result<T>) -> Result<bool> {
    match looked {
        Ok(_) => Ok(true),
        Err(PoolError::NotFound(_)) => Ok(false),
        Err(error) => Err(error),
    }
}

/// Space of one volume, in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Usage {
    pub logical: u64,
    /// Taken on the backend; of a raw volume, snapshots not counted.
    pub allocated: u64,
    /// Taken by snapshots alone, as far as the backend can tell them apart.
    pub snapshots: u64,
    /// Of a mapped volume.
    pub reduced: Option<ReducedUsage>,
    /// Of a mapped volume.
    pub shares: Option<Shares>,
    /// Of a mapped volume whose log is on this host: what that holds and the pool has not got yet.
    pub log: Option<u64>,
}

/// What the blocks that a mapped volume keeps are for, in bytes. Of a very large one, estimated from a part of its objects.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Shares {
    /// Of the volume, that hold data: what it has of its logical size.
    pub data: u64,
    /// What is stored for snapshots alone: it comes back when they are deleted.
    pub snapshots: u64,
    /// What is stored for nothing any more: it comes back by garbage collection.
    pub reclaimable: u64,
}

/// What a mapped volume keeps itself, for its snapshots too and without what it shares with the volume it was cloned from, in bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ReducedUsage {
    /// Its blocks, each of them once: after deduplication, before compression. What nothing refers to any more counts until it is collected.
    pub unique: u64,
    /// The objects that hold them.
    pub compressed: u64,
    /// The objects that hold its map.
    pub map: u64,
}

/// The local log of an open volume.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct LogUse {
    /// Bytes held by what is not yet in the pool.
    pub used: u64,
    /// Bytes.
    pub size: u64,
    /// How long the oldest write has waited that is not yet in the pool, to a second.
    pub lag: Duration,
}

/// What an open mapped volume has brought into the pool since it was opened, in bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Destaged {
    /// Blocks with data.
    pub logical: u64,
    /// Blocks of these that were found to be stored already.
    pub duplicate: u64,
    /// The objects that hold the others.
    pub stored: u64,
}

/// What collecting garbage has done in an open mapped volume since it was opened, in bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Collected {
    /// Blocks that were copied.
    pub moved: u64,
    /// Objects that were done away with.
    pub freed: u64,
    pub is_running: bool,
}

/// What the engine of an open mapped volume uses and does.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct EngineUse {
    pub log: LogUse,
    pub reduced: ReducedUsage,
    /// Pinned memory of the index that finds what is stored already, in bytes.
    pub index: u64,
    pub destaged: Destaged,
    pub collected: Collected,
    /// How long the pool has taken nothing that it was given.
    pub waits: Duration,
}

/// A key that a pool keeps.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct KeyRecord {
    /// The volumes that it encrypts, which share it; `None`: it is the pool's own, which names blocks.
    pub volumes: Option<Vec<String>>,
    pub state: KeyState,
}

/// How a key is kept.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum KeyState {
    /// Encrypted by the key-encryption key of this id.
    Wrapped(String),
    /// As it is: nothing in the pool is encrypted.
    Clear,
    /// Destroyed on purpose.
    Erased,
    /// It cannot be read: why.
    Unreadable(String),
}

/// What wrapping keys anew did, in keys.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct KeyRotation {
    pub rewrapped: u64,
    /// Wrapped by the current key-encryption key before.
    pub already: u64,
}

/// State of a pool.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PoolHealth {
    pub ok: bool,
    /// In words.
    pub detail: String,
    /// Bytes, where the backend can tell.
    pub total: Option<u64>,
    pub free: Option<u64>,
}

/// Why a pool refused or failed. Messages name the thing, the cause and the next step.
#[derive(Error, Debug)]
pub enum PoolError {
    #[error("{0}")]
    NotFound(String),
    #[error("{0}")]
    Exists(String),
    #[error("{0}")]
    InUse(String),
    /// Another host had the mapped volume last, and it was not to be taken from it.
    #[error("{0}")]
    TakenOver(String),
    #[error("{0}")]
    Unsupported(String),
    #[error("{0}")]
    Invalid(String),
    #[error("{what}: {source}")]
    Io { what: String, source: std::io::Error },
    #[error("{0}")]
    Backend(String),
}

impl From<DeviceError> for PoolError {
    fn from(error: DeviceError) -> PoolError {
        match error {
            DeviceError::Io { what, source } => PoolError::Io { what, source },
            DeviceError::Unsupported(what) => PoolError::Unsupported(what),
            DeviceError::Refused(what) => PoolError::InUse(what),
        }
    }
}

pub type Result<T> = std::result::Result<T, PoolError>;

/// From whom an opening may take a mapped volume.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Claim {
    /// From nobody: refused as [`PoolError::TakenOver`] unless this host had it last, or nobody did.
    Own,
    /// The same, but a host that has no log of it takes it: the log may be lost.
    Return,
    /// From whichever host has it.
    TakeOver,
    /// The same, even if that loses what an owner before has acknowledged. What is lost cannot come back.
    AcceptLoss,
}

/// A place where volumes live.
pub trait Pool: Send + Sync {
    /// As configured.
    fn name(&self) -> &str;
    /// `file`, `rbd`, `null`, `memory` …
    fn driver(&self) -> &'static str;
    /// Where it is, for people.
    fn location(&self) -> String;
    /// The layouts that its volumes can have, the usual one first.
    fn layouts(&self) -> &'static [Layout] {
        &[Layout::Raw]
    }
    fn list(&self) -> Result<Vec<VolumeRecord>>;
    fn get(&self, volume: &str) -> Result<VolumeRecord>;
    /// Whether there is such a volume; that it can be used is not said.
    fn has(&self, volume: &str) -> Result<bool> {
        is_found(self.get(volume))
    }
    fn create(&self, volume: &str, spec: &VolumeSpec) -> Result<VolumeRecord>;
    /// Takes an existing object under this pool's management, unchanged.
    fn adopt(&self, object: &str, volume: &str) -> Result<VolumeRecord>;
    /// Opens it for I/O. A second opener for writing is refused as [`PoolError::InUse`]; a mapped volume is taken over from a host that has it.
    fn open(&self, volume: &str, read_only: bool) -> Result<Arc<dyn BlockDevice>>;
    /// Opens it for I/O as far as `claim` allows.
    fn open_as(&self, volume: &str, claim: Claim) -> Result<Arc<dyn BlockDevice>> {
        match claim {
            Claim::Own | Claim::Return | Claim::TakeOver => self.open(volume, false),
            Claim::AcceptLoss => Err(PoolError::Unsupported(format!(
                "volume {volume}: --accept-loss refused: only mapped volumes have a local log that could be lost; open it without"
            ))),
        }
    }
    /// Whether another host has taken over a volume that is still open here.
    fn is_taken_over(&self, _volume: &str) -> bool {
        false
    }
    /// Opens a snapshot, read-only.
    fn open_snapshot(&self, volume: &str, snapshot: &str) -> Result<Arc<dyn BlockDevice>>;
    /// Notes a size that an open device was given.
    fn resized(&self, volume: &str, size: u64) -> Result<()>;
    /// Replaces the wrapped key in the volume's record by `to`, if it still is `from`.
    fn set_wrapped_key(&self, volume: &str, _from: &str, _to: &str) -> Result<()> {
        Err(PoolError::Unsupported(format!("volume {volume}: driver {} keeps no keys", self.driver())))
    }
    /// The keys that the pool keeps beside its records: those of mapped volumes, and its own. No key-encryption key is needed to see them.
    fn keys(&self) -> Result<Vec<KeyRecord>> {
        Ok(Vec::new())
    }
    /// Wraps those keys with the current key-encryption key. If one of them cannot be read, nothing was changed; what an interruption leaves half done,
    /// the next call completes. `progress` is told records done and in all.
    fn rotate_keys(&self, _progress: &dyn Fn(u64, u64)) -> Result<KeyRotation> {
        Ok(KeyRotation::default())
    }
    /// Destroys the key of an encrypted mapped volume for good, and with it the content of all volumes that share it. The volumes are not open here.
    /// False: it was destroyed before.
    fn erase_key(&self, volume: &str) -> Result<bool> {
        Err(PoolError::Unsupported(format!(
            "volume {volume}: key erase refused: its key stands in its entry of the catalogue, and goes with it: novastor volume delete {volume}"
        )))
    }
    fn rename(&self, volume: &str, to: &str) -> Result<()>;
    /// Deletes it and its data; an adopted object is only forgotten. Refused while it has snapshots.
    fn delete(&self, volume: &str) -> Result<()>;
    /// A writable copy sharing data with its origin where the backend can, or a refusal that says what to do instead.
    fn clone_volume(&self, volume: &str, snapshot: Option<&str>, to: &str) -> Result<VolumeRecord>;
    /// Makes a clone independent of its origin, which can be deleted then, unless snapshots of the clone
    /// still need it. The volume may be open. `progress` is told bytes done
    /// and bytes in all, from any thread. Once begun it cannot be stopped; what a daemon that ends leaves half done, the next call
    /// completes.
    fn flatten(&self, volume: &str, progress: &(dyn Fn(u64, u64) + Sync)) -> Result<Flattened>;
    /// A snapshot of each volume, all at one point in time; the caller holds their writes back where that needs it. What was made, by volume.
    fn snapshot(&self, volumes: &[&str], snapshot: &str) -> Result<BTreeMap<String, SnapshotRecord>>;
    fn delete_snapshot(&self, volume: &str, snapshot: &str) -> Result<()>;
    /// The volume's content becomes the snapshot's. The volume is not open.
    fn rollback(&self, volume: &str, snapshot: &str) -> Result<()>;
    /// Whether [`Pool::changed`] tells anything of volumes of this layout.
    fn tells_changes(&self, _layout: Layout) -> bool {
        false
    }
    /// Ranges, in bytes, in order, in which snapshot `before` may differ from snapshot `to`, or from the volume as it is. `None`: the pool cannot
    /// tell, anything may.
    fn changed(&self, _volume: &str, _before: &str, _to: Option<&str>) -> Result<Option<Vec<Range<u64>>>> {
        Ok(None)
    }
    fn usage(&self, volume: &str) -> Result<Usage>;
    /// Of a mapped volume that is open here.
    fn engine_use(&self, _volume: &str) -> Option<EngineUse> {
        None
    }
    fn health(&self) -> PoolHealth;
    /// Reads what a volume and its snapshots hold, where the driver can tell damage: what is wrong, one sentence each. `progress` is told bytes done
    /// and in all.
    fn check_volume(&self, _volume: &str, _progress: &dyn Fn(u64, u64)) -> Result<Vec<String>> {
        Ok(Vec::new())
    }
    /// Looks for damage, without reading all data: what is wrong, one sentence each. `progress` is told steps done and in all.
    fn check(&self, progress: &dyn Fn(u64, u64)) -> Result<Vec<String>>;
}

/// What became of [`Pool::flatten`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Flattened {
    /// What it shared with its parent was copied; it depends on no other volume now.
    Copied,
    /// It has no parent: there was nothing to do.
    NoParent,
}

/// Volume, pool and snapshot names: `[a-z0-9][a-z0-9._-]{0,62}`.
pub fn check_name(what: &str, name: &str) -> Result<()> {
    let good_start = name.starts_with(|first: char| first.is_ascii_lowercase() || first.is_ascii_digit());
    let good_rest = name.bytes().all(|byte| byte.is_ascii_lowercase() || byte.is_ascii_digit() || b"._-".contains(&byte));
    if good_start && good_rest && name.len() <= 63 {
        return Ok(());
    }
    let shown: String = name.chars().take(80).collect();
    Err(PoolError::Invalid(format!(
        "{what} name {shown:?} refused: a name is 1 to 63 of a-z, 0-9, '.', '_' and '-', and starts with a letter or a digit"
    )))
}
