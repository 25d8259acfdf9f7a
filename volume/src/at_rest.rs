//! A group that nobody has open, looked at without taking it: what it uses, with what this host's log holds that the pool has not got yet.
//!
//! ```text
//!   with the log      root ─▶ history after the checkpoint ─▶ records after that
//!   without it        the same root and history, those records ─▶ figures
//! ```
//!
//! Invariants: nothing is changed, in the store or in the log; the log is let go of before the map is read, which takes long.

use std::rc::Rc;

use backends::{ReducedUsage, Shares};

use crate::backlog::Backlog;
use crate::core::Core;
use crate::error::VolumeError;
use crate::group::{log_end, new_core};
use crate::log::{self, Found, Log, LogStart, Superblock, Tail, WhenFull};
use crate::mapped::{Parts, Settings};
use crate::names::{Group, VolumeId};
use crate::root::Root;

/// What a log holds beyond the history in the pool.
pub(crate) struct Unpublished {
    /// The root that this is true of.
    root: Root,
    superblock: Superblock,
    from: Tail,
    found: Vec<Found>,
}

/// What a volume at rest uses.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct RestingUse {
    pub reduced: ReducedUsage,
    pub shares: Shares,
    /// Bytes of the log that the pool has not got yet.
    pub log: u64,
}

/// Reads the log of `parts`, which nobody uses meanwhile and which the group's last owner wrote.
pub(crate) async fn read_log(parts: &Parts, group: Group) -> Result<Unpublished, VolumeError> {
    let found = parts.chain(group).look().await?;
    let root = found.root;
    let superblock = Superblock::read(&*parts.disk).await?.filter(|superblock| superblock.log_id == root.log_id);
    let superblock = superblock.ok_or(VolumeError::StaleLog)?;
    let cipher = superblock.cipher(&parts.secrets)?;
    let from = log_end(&root.checkpoint, &found.segments, superblock.log_id);
    let found = log::recover(&*parts.disk, &superblock, cipher.as_deref(), root.epoch, from).await?;
    Ok(Unpublished { root, superblock, from, found })
}

/// What a volume uses whose log holds this. Reads the whole map. Fails with [`VolumeError::Raced`] if the group has changed since the log was read, or
/// with another error if it changes meanwhile.
pub(crate) async fn usage(parts: &Parts, volume: VolumeId, unpublished: Unpublished) -> Result<RestingUse, VolumeError> {
    let core = look_through(parts, volume.group, unpublished).await?;
    let slot = core.slot_with(volume.id).ok_or(VolumeError::NoVolume)?;
    let shares = core.shares(slot).await?;
    let reduced = core.reader.table.borrow().usage();
    Ok(RestingUse { reduced, shares, log: core.log.used().0 })
}

/// The group for reading. Payloads of the log cannot be read, only what its records are about.
async fn look_through(parts: &Parts, group: Group, unpublished: Unpublished) -> Result<Rc<Core>, VolumeError> {
    let Unpublished { root, superblock: Superblock { log_id, ring, .. }, from, found } = unpublished;
    let chain = parts.chain(group);
    let looked = chain.look().await?;
    if looked.root != root || log_end(&root.checkpoint, &looked.segments, log_id) != from {
        return Err(VolumeError::Raced);
    }
    let settings = Settings { deduplicate: false, ..Settings::default() };
    let backlog = Rc::new(Backlog::new(from, u64::MAX, 0));
    for batch in &found {
        log::follow(&*backlog, &batch.header, batch.end, ring.sector(), &[]);
    }
    let tail = found.last().map_or(from, |batch| batch.end);
    let troubles = chain.troubles.clone();
    let start = LogStart {
        log_id,
        ring,
        epoch: root.epoch,
        trimmed: from.position,
        tail,
        cipher: None,
        when_full: WhenFull::Wait,
        troubles,
    };
    let log = Log::resume(parts.disk.clone(), parts.environment.clone(), start, backlog.clone());
    new_core(chain, log, backlog, settings, looked, from).await
}
