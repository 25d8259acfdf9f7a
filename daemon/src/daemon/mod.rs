//! The daemon: what it holds, and how it starts and ends.
//!
//! ```text
//!   Daemon ── Config · DataDir (locked) · DataPlane
//!      ├── Pools          configured backends, retried until they open
//!      ├── OpenVolumes    one blockdev::Volume per volume in use
//!      ├── Exports        NBD and vhost-user, kept in data_dir, restored at start
//!      └── Jobs           long work
//! ```
//!
//! Invariants: all methods block and run on control-plane threads, never on a data-plane thread; a panic in one of them fails
//! that operation alone; control operations on one volume exclude each other.

mod adoption;
pub mod data_dir;
mod diff;
mod encryption;
#[cfg(feature = "fault-injection")]
pub mod faults;
pub mod jobs;
mod joint_snapshots;
mod keys;
pub mod known_pools;
pub mod listeners;
mod locks;
mod log;
pub mod mapped;
pub mod open;
pub mod pools;
pub mod process;
mod questions;
mod reload;
pub mod serve;
mod sizes;
mod snapshots;
pub mod sockets;
pub mod systemd;
mod transfers;
mod volumes;
mod watch;

use std::path::PathBuf;
use std::sync::{Arc, Weak};

use backends::{Claim, Layout, Pool, PoolError, VolumeRecord};
use blockdev::{BlockDevice, DataPlane, Volume, VolumeOptions};

use crate::api::types::{Status, Unanswered};
use crate::config::Config;
use crate::error::{Error, ErrorKind, Result};
use crate::exports::Exports;
use crate::names::{VolumeId, VolumeRef};
use data_dir::DataDir;
use jobs::Jobs;
use listeners::Listeners;
use locks::NameLocks;
use open::{Lease, OpenVolumes};
use pools::Pools;

/// Everything the control plane works on.
pub struct Daemon {
    /// For what goes on by itself later.
    this: Weak<Daemon>,
    config: mapped::LiveConfig,
    config_file: Option<PathBuf>,
    data_dir: Arc<DataDir>,
    pools: Arc<Pools>,
    open: Arc<OpenVolumes>,
    locks: NameLocks,
    jobs: Jobs,
    joint_snapshots: joint_snapshots::JointSnapshots,
    exports: Exports,
    listeners: Arc<Listeners>,
    transfers: transfers::Transfers,
    metrics_address: parking_lot::Mutex<Option<String>>,
    /// Those of the last reload: a file may have another key in it by the next.
    kek_ids: parking_lot::Mutex<[Option<volume::keys::KekId>; 2]>,
    started: u64,
    log: log::LogControl,
    /// Last, so that it outlives what runs on it.
    plane: DataPlane,
}

impl Daemon {
    pub fn config(&self) -> Arc<Config> {
        self.config.read().clone()
    }

    pub fn jobs(&self) -> &Jobs {
        &self.jobs
    }

    pub fn transfers(&self) -> &transfers::Transfers {
        &self.transfers
    }

    pub fn exports(&self) -> &Exports {
        &self.exports
    }

    pub fn listeners(&self) -> &Arc<Listeners> {
        &self.listeners
    }

    pub fn data_dir(&self) -> &Arc<DataDir> {
        &self.data_dir
    }

    pub fn pools(&self) -> &Arc<Pools> {
        &self.pools
    }

    pub fn plane(&self) -> &DataPlane {
        &self.plane
    }

    pub fn open_volumes(&self) -> &Arc<OpenVolumes> {
        &self.open
    }

    /// Where the metrics are really served, once that is known.
    pub fn note_metrics_address(&self, address: String) {
        *self.metrics_address.lock() = Some(address);
    }

    pub fn status(&self) -> Status {
        let config = self.config();
        Status {
            version: env!("CARGO_PKG_VERSION").to_owned(),
            node: config.daemon.node.clone(),
            pid: std::process::id(),
            started: self.started,
            data_dir: config.daemon.data_dir.display().to_string(),
            threads: self.plane.handles().len(),
            nbd: self.exports.nbd().addresses(),
            metrics: self.metrics_address.lock().clone(),
        }
    }

    /// The volume that `name` means: with its pool, or unique among all pools. A pool that does not answer may hold one of that name too.
    pub fn resolve(&self, name: &VolumeRef) -> Result<VolumeId> {
        let (id, silent) = self.resolve_among_answers(name)?;
        if silent.is_empty() {
            return Ok(id);
        }
        let message = format!(
            "volume {name} may also be in a pool that does not answer: write POOL/NAME, such as {id}; {}",
            Unanswered::in_words(&silent)
        );
        Err(Error::new(ErrorKind::Backend, message))
    }

    /// The same, for what only looks: pools that do not answer do not count.
    pub fn resolve_to_look(&self, name: &VolumeRef) -> Result<VolumeId> {
        self.resolve_among_answers(name).map(|(id, _)| id)
    }

    /// The volume, and the pools that did not say whether they have one of that name too.
    fn resolve_among_answers(&self, name: &VolumeRef) -> Result<(VolumeId, Vec<Unanswered>)> {
        let id = |pool: &str| VolumeId { pool: pool.to_owned(), name: name.name.clone(), snapshot: name.snapshot.clone() };
        if let Some(pool) = &name.pool {
            let found = self.pools.get(pool)?;
            if !found.has(&name.name)? {
                // Says what there is instead.
                found.get(&name.name)?;
            }
            return Ok((id(pool), Vec::new()));
        }
        let (mut found, mut silent) = (Vec::new(), Vec::new());
        let wanted = name.name.clone();
        let is_there = move |pool: &dyn Pool| pool.has(&wanted).map_err(|error| error.to_string());
        for answer in self.pools.ask(is_there) {
            match answer.answer.and_then(|answer| answer) {
                Ok(true) => found.push(answer.pool),
                Ok(false) => {}
                Err(why) => silent.push(Unanswered { pool: answer.pool, error: why }),
            }
        }
        match (found.as_slice(), silent.as_slice()) {
            ([pool], _) => Ok((id(pool), silent)),
            ([], []) => {
                Err(Error::not_found(format!("volume {} does not exist: `novastor volume list` shows those that do", name.name)))
            }
            ([], silent) => Err(Error::new(
                ErrorKind::Backend,
                format!(
                    "volume {} is in no pool that answers; {}; if you know its pool, write POOL/NAME",
                    name.name,
                    Unanswered::in_words(silent)
                ),
            )),
            (several, _) => {
                Err(Error::invalid(format!("volume {} is in the pools {}: write POOL/NAME", name.name, several.join(", "))))
            }
        }
    }

    /// Resolves a name as written.
    pub fn resolve_text(&self, name: &str) -> Result<VolumeId> {
        self.resolve(&name.parse()?)
    }

    /// The catalogue's record of a volume.
    pub fn record(&self, id: &VolumeId) -> Result<VolumeRecord> {
        Ok(self.pools.get(&id.pool)?.get(&id.name)?)
    }

    /// Opens a volume or a snapshot, or shares it if it is open; a mapped volume is taken from no other host. The caller holds its name lock.
    pub fn lease(&self, id: &VolumeId, write: bool) -> Result<Lease> {
        self.lease_as(id, write, Claim::Own)
    }

    /// The same, as far as `claim` allows.
    pub fn lease_as(&self, id: &VolumeId, write: bool, claim: Claim) -> Result<Lease> {
        if write && id.snapshot.is_some() {
            return Err(Error::invalid(format!("snapshot {id} can only be used read-only: add --read-only")));
        }
        self.open.lease(id, write, || self.open_volume(id, write, claim))
    }

    /// Opens a volume even if that loses what was acknowledged; refused if it is open, as nothing is missing then. The caller holds its name
    /// lock.
    pub fn lease_accepting_loss(&self, id: &VolumeId) -> Result<Lease> {
        if self.open.get(id).is_some() {
            return Err(Error::invalid(format!("volume {id}: it is open, so nothing of it is missing: leave out --accept-loss")));
        }
        self.open.lease(id, true, || self.open_volume(id, true, Claim::AcceptLoss))
    }

    /// Makes this host the owner of a mapped volume, before a command that was told to take it over. The caller holds its name lock.
    pub(crate) fn take_over(&self, id: &VolumeId) -> Result<()> {
        let volume = id.volume();
        if self.record(&volume)?.layout == Layout::Mapped && self.open.get(&volume).is_none() {
            drop(self.lease_as(&volume, true, Claim::TakeOver)?);
        }
        Ok(())
    }

    fn open_volume(&self, id: &VolumeId, write: bool, claim: Claim) -> Result<Arc<Volume>> {
        let pool = self.pools.get(&id.pool)?;
        let record = pool.get(&id.name)?;
        let (device, read_only) = match &id.snapshot {
            Some(snapshot) => (pool.open_snapshot(&id.name, snapshot)?, true),
            None if claim == Claim::AcceptLoss => (pool.open_as(&id.name, claim)?, false),
            None => match pool.open_as(&id.name, claim) {
                Ok(device) => (device, false),
                Err(error) if write || record.layout == Layout::Mapped || matches!(error, PoolError::NotFound(_)) => {
                    return Err(error.into());
                }
                Err(_) => (pool.open(&id.name, true)?, true),
            },
        };
        let device = self.decrypted(&*pool, &record, device)?;
        device.on_size_changed_elsewhere(self.hears_of_size(id));
        let device = self.with_faults(id, device)?;
        let options = VolumeOptions { name: id.to_string(), read_only, block_size: record.block_size };
        Ok(Volume::new(device, options))
    }

    #[cfg(not(feature = "fault-injection"))]
    fn with_faults(&self, _id: &VolumeId, device: Arc<dyn BlockDevice>) -> Result<Arc<dyn BlockDevice>> {
        Ok(device)
    }

    #[cfg(feature = "fault-injection")]
    fn with_faults(&self, id: &VolumeId, device: Arc<dyn BlockDevice>) -> Result<Arc<dyn BlockDevice>> {
        match &self.config().daemon.faults {
            Some(text) => faults::wrap(id, device, text),
            None => Ok(device),
        }
    }

    /// Holds the volumes against other control operations.
    pub fn hold<'i>(&self, ids: impl IntoIterator<Item = &'i VolumeId>) -> locks::NameGuard<'_> {
        self.locks.hold(ids.into_iter().map(|id| id.volume().to_string()))
    }
}
