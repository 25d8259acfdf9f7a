//! What every storage driver does: keep volumes, and open them as block devices.
//!
//! A pool keeps its own catalogue, so any daemon that reaches the pool can serve its volumes. All calls may block and belong to
//! the control plane; requests travel through the [`BlockDevice`] that [`Pool::open`] returns. Names have been checked by
//! [`check_name`] before they get here.

use std::collections::BTreeMap;
use std::sync::Arc;

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
    /// `VOL@SNAP` or `VOL` it was cloned from.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub origin: Option<String>,
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub snapshots: BTreeMap<String, SnapshotRecord>,
}

impl VolumeRecord {
    /// The record of a new volume of the raw layout.
    pub fn new(name: &str, spec: &VolumeSpec) -> VolumeRecord {
        VolumeRecord {
            name: name.to_owned(),
            uuid: uuid::Uuid::new_v4(),
            size: spec.size,
            block_size: spec.block_size,
            layout: Layout::Raw,
            policy: spec.policy.clone(),
            tenant: spec.tenant.clone(),
            object: None,
            origin: None,
            snapshots: BTreeMap::new(),
        }
    }
}

/// How a volume lies on its backend.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Layout {
    /// One to one.
    #[default]
    Raw,
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
    pub policy: Option<String>,
    pub tenant: Option<String>,
}

/// Space of one volume, in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Usage {
    pub logical: u64,
    /// Taken on the backend, snapshots not counted.
    pub allocated: u64,
    /// Taken by snapshots, as far as the backend can tell them apart.
    pub snapshots: u64,
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

/// A place where volumes live.
pub trait Pool: Send + Sync {
    /// As configured.
    fn name(&self) -> &str;
    /// `file`, `rbd`, `null`, `memory` …
    fn driver(&self) -> &'static str;
    /// Where it is, for people.
    fn location(&self) -> String;
    fn list(&self) -> Result<Vec<VolumeRecord>>;
    fn get(&self, volume: &str) -> Result<VolumeRecord>;
    fn create(&self, volume: &str, spec: &VolumeSpec) -> Result<VolumeRecord>;
    /// Takes an existing object under this pool's management, unchanged.
    fn adopt(&self, object: &str, volume: &str) -> Result<VolumeRecord>;
    /// Opens it for I/O. A second opener for writing is refused as [`PoolError::InUse`].
    fn open(&self, volume: &str, read_only: bool) -> Result<Arc<dyn BlockDevice>>;
    /// Opens a snapshot, read-only.
    fn open_snapshot(&self, volume: &str, snapshot: &str) -> Result<Arc<dyn BlockDevice>>;
    /// Notes a size that an open device was given.
    fn resized(&self, volume: &str, size: u64) -> Result<()>;
    fn rename(&self, volume: &str, to: &str) -> Result<()>;
    /// Deletes it and its data; an adopted object is only forgotten. Refused while it has snapshots.
    fn delete(&self, volume: &str) -> Result<()>;
    /// A writable copy sharing data with its origin where the backend can, or a refusal that says what to do instead.
    fn clone_volume(&self, volume: &str, snapshot: Option<&str>, to: &str) -> Result<VolumeRecord>;
    /// A snapshot of each volume, all at one point in time; the caller holds their writes back where that needs it.
    fn snapshot(&self, volumes: &[&str], snapshot: &str) -> Result<()>;
    fn delete_snapshot(&self, volume: &str, snapshot: &str) -> Result<()>;
    /// The volume's content becomes the snapshot's. The volume is not open.
    fn rollback(&self, volume: &str, snapshot: &str) -> Result<()>;
    fn usage(&self, volume: &str) -> Result<Usage>;
    fn health(&self) -> PoolHealth;
    /// Looks for damage: what is wrong, one sentence each.
    fn check(&self) -> Result<Vec<String>>;
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
