//! A group that is open: the volumes that share what they store, one log, one history, one owner.
//!
//! ```text
//!   blocks of the group   0 ───────── 2^36 ───────── 2·2^36 ─── …        each slot a volume, or none
//!                         slot 0       slot 1         slot 2              each with a tree and snapshots of its own
//! ```
//!
//! Log, steps and layers count blocks through the group; trees and requests by volume. Volumes come and go by checkpoints.

use std::cell::{Cell, RefCell};
use std::rc::Rc;
use std::time::Duration;

use blockdev::Errno;
use dedup::BLOCK_LEN;

use crate::backlog::Backlog;
use crate::chain::{Chain, Claimed};
use crate::checkpoint::Change;
use crate::core::{Core, Layer, Map, SnapshotName, SnapshotState};
use crate::deduplication::Deduplication;
use crate::environment::random_id;
use crate::error::VolumeError;
use crate::keeper::Keeper;
use crate::log::{self, Log, LogId, LogStart, Ring, Superblock, Tail};
use crate::map::Tree;
use crate::mapped::{Durability, MappedVolume, Parts, Settings};
use crate::meta::{Held, Meta};
use crate::names::{Group, Slot};
use crate::reader::Reader;
use crate::root::{Checkpoint, Root};
use crate::segment::{Place, Segment};
use crate::signal::{Lock, Signal};
use crate::snapshots::check_size;
use crate::troubles::Trouble;

/// How often a claim may lose against a checkpoint of the owner before.
const CLAIM_TRIES: u32 = 16;
/// The index is made for so many bytes of unique blocks at least.
const INDEXED_MIN: u64 = 64 << 30;

/// The handle of an open group.
pub struct MappedGroup {
    pub(crate) core: Rc<Core>,
}

/// What a new volume of a group begins as.
#[derive(Clone, Debug)]
pub enum Beginning {
    /// Nothing, of so many bytes.
    Empty(u64),
    /// A snapshot of a volume of the group: the volume's UUID, and the snapshot's name. Nothing ties the two to each other afterwards.
    Snapshot([u8; 16], String),
}

impl MappedGroup {
    /// Takes the group over from whoever had it, and brings its volumes back to what was acknowledged last.
    pub async fn open(parts: &Parts, group: Group, settings: Settings) -> Result<MappedGroup, VolumeError> {
        let chain = parts.chain(group);
        let is_local = settings.durability == Durability::Local;
        let mut tries = 0;
        let (before, superblock, is_new, cipher, claimed) = loop {
            let (before, tag) = chain.read_root().await?;
            let (superblock, is_new) = log_for(parts, &before, settings).await?;
            let cipher = superblock.cipher(&parts.secrets)?;
            let rests_on_log = !is_new && before.is_local;
            match chain.claim((before, tag), superblock.log_id, is_local || rests_on_log).await {
                Ok(claimed) => break (before, superblock, is_new, cipher, claimed),
                // Its living owner has changed it, by a checkpoint.
                Err(VolumeError::Raced) if tries < CLAIM_TRIES && chain.read_root().await?.0.owner == before.owner => tries += 1,
                Err(error) => return Err(error),
            }
        };
        let Superblock { log_id, ring, .. } = superblock;
        let rests_on_log = !is_new && before.is_local;
        let from = log_end(&claimed.root.checkpoint, &claimed.segments, log_id);
        let found = if is_new {
            Vec::new()
        } else {
            log::recover(&*parts.disk, &superblock, cipher.as_deref(), before.epoch, from).await?
        };
        let tail = found.last().map_or(from, |batch| batch.end);
        log::behead_torn(&*parts.disk, &superblock, tail.position).await?;
        log::make_durable(&*parts.disk, ring, &found).await?;

        let backlog = Rc::new(Backlog::new(from, settings.segment_bytes, settings.kept_bytes));
        for batch in &found {
            log::follow(&*backlog, &batch.header, batch.end, ring.sector(), &[]);
        }
        let changed = backlog.end();
        let (epoch, when_full, troubles) = (claimed.root.epoch, settings.when_full, chain.troubles.clone());
        let start = LogStart { log_id, ring, epoch, trimmed: from.position, tail, cipher, when_full, troubles };
        let log = Log::resume(parts.disk.clone(), parts.environment.clone(), start, backlog.clone());
        let core = new_core(chain, log, backlog, settings, claimed, from).await?;
        for place in core.backlog.markers() {
            let marker = core.marker_at(place).await?;
            core.note_marker(marker);
        }
        let spawn = |task| parts.environment.spawn(task);
        spawn(Box::pin(core.clone().publish_steps()));
        spawn(Box::pin(core.clone().keep_house()));
        spawn(Box::pin(core.clone().collect_garbage()));
        spawn(Box::pin(core.clone().watch_quiet()));
        spawn(Box::pin(core.clone().finish_deletions(core.half_deleted())));
        spawn(Box::pin(core.clone().watch_root()));
        spawn(Box::pin(core.clone().sweep(core.kept_sources())));
        if settings.deduplicate {
            spawn(Box::pin(core.clone().rebuild_index()));
        }
        if rests_on_log && !is_local {
            spawn(Box::pin(core.clone().leave_log(changed)));
        }
        Ok(MappedGroup { core })
    }

    /// The UUIDs of its volumes.
    pub fn volumes(&self) -> Vec<[u8; 16]> {
        self.core.map.borrow().volumes.values().map(|held| held.id).collect()
    }

    pub fn volume(&self, id: Group) -> Option<MappedVolume> {
        let slot = self.core.slot_with(id)?;
        Some(MappedVolume { core: self.core.clone(), slot })
    }

    /// The handle of what is in a slot; without a volume there, every request fails.
    pub(crate) fn at(&self, slot: Slot) -> MappedVolume {
        MappedVolume { core: self.core.clone(), slot }
    }

    /// What the pool does not take now, or the disk of the log, if that is so and it goes on.
    pub fn trouble(&self) -> Option<Trouble> {
        self.at(0).trouble()
    }

    /// How long that has been so.
    pub(crate) fn trouble_lasts(&self) -> Option<Duration> {
        Some(self.core.chain.environment.now().saturating_sub(self.trouble()?.since))
    }

    /// Why it does not go on, if it does not.
    pub fn failed(&self) -> Option<VolumeError> {
        self.core.failure()
    }

    /// Nothing is acknowledged any more.
    pub fn close(&self) {
        self.core.log.fail(Errno::ESHUTDOWN);
        self.core.changed.notify();
    }

    /// Makes a volume, which is in the pool when this comes back. `id`: a UUID that no volume has or had.
    pub async fn add(&self, id: Group, beginning: Beginning) -> Result<(), VolumeError> {
        let core = &self.core;
        // What was written to a volume that had the slot before must not come after the checkpoint.
        core.publish_all().await.map_err(|_| core.failure().unwrap_or(VolumeError::Fenced))?;
        let origin = match beginning {
            Beginning::Empty(size) => {
                check_size(size)?;
                Err(Held { id, size, tree: Tree::empty(size / BLOCK_LEN as u64) })
            }
            Beginning::Snapshot(of, name) => {
                let name = (core.slot_with(of).ok_or(VolumeError::NoVolume)?, name);
                core.committed_snapshot(&name).await?;
                Ok(name)
            }
        };
        let _alone = core.house.hold().await;
        let held = match origin {
            Ok(name) => core.snapshot_now(&name).map(|found| Held { id, size: found.size, tree: found.tree })?,
            Err(held) => held,
        };
        if core.slot_with(id).is_some() {
            return Err(VolumeError::VolumeExists);
        }
        let slot = core.free_slot().ok_or(VolumeError::GroupFull)?;
        core.checkpoint_with(Change::Content(slot, held)).await
    }

    /// Ends a volume that nobody uses, with its snapshots. Refused while these have clones in other groups. What it took comes back by collecting
    /// garbage.
    pub async fn remove(&self, id: Group) -> Result<(), VolumeError> {
        let core = &self.core;
        let slot = core.slot_with(id).ok_or(VolumeError::NoVolume)?;
        for name in core.snapshot_names(slot) {
            match core.delete_snapshot(&name).await {
                // An earlier deletion was completed meanwhile.
                Ok(()) | Err(VolumeError::NoSnapshot) => {}
                Err(error) => return Err(error),
            }
        }
        core.publish_all().await.map_err(|_| core.failure().unwrap_or(VolumeError::Fenced))?;
        let _alone = core.house.hold().await;
        if core.slot_with(id) != Some(slot) {
            return Err(VolumeError::NoVolume);
        }
        if let Some((_, name)) = core.snapshot_names(slot).pop() {
            return Err(VolumeError::VolumeHasSnapshot(name));
        }
        core.slots_had.borrow_mut().insert(slot);
        core.note_garbage(u64::MAX);
        core.checkpoint_with(Change::Gone(slot)).await
    }
}

impl Core {
    pub(crate) fn slot_with(&self, id: Group) -> Option<Slot> {
        self.map.borrow().volumes.iter().find(|(_, held)| held.id == id).map(|(slot, _)| *slot)
    }

    /// Of all that a volume has, in whatever state.
    fn snapshot_names(&self, slot: Slot) -> Vec<SnapshotName> {
        self.snapshots.borrow().keys().filter(|(of, _)| *of == slot).cloned().collect()
    }

    /// The lowest that no volume has had since the group was opened: whoever still means one that is gone, by its slot, finds nothing. The last one is
    /// never given, so that every byte of the group has a number.
    fn free_slot(&self) -> Option<Slot> {
        let mut had = self.slots_had.borrow_mut();
        had.extend(self.map.borrow().volumes.keys());
        let free = (0..Slot::MAX).find(|slot| !had.contains(slot))?;
        had.insert(free);
        Some(free)
    }
}

/// The log on this host, if the group's last owner wrote it; otherwise one that is new, or was made by an opening that came no further.
async fn log_for(parts: &Parts, root: &Root, settings: Settings) -> Result<(Superblock, bool), VolumeError> {
    let found = Superblock::read(&*parts.disk).await?;
    let reused = match found {
        Some(found) if found.group != root.group => return Err(VolumeError::ForeignLog),
        Some(found) if found.log_id == root.log_id => return Ok((found, false)),
        Some(found) if !log::is_unused(&*parts.disk, &found).await? => return Err(VolumeError::StaleLog),
        found => found,
    };
    if root.is_local && !settings.accept_loss {
        return Err(VolumeError::LogMissing);
    }
    if settings.own_only && root.log_id != LogId::default() {
        return Err(VolumeError::Elsewhere);
    }
    let superblock = match reused {
        Some(superblock) => superblock,
        None => {
            let ring = Ring::of(&*parts.disk)?;
            log::refuse_if_beheaded(&*parts.disk, ring).await?;
            Superblock::new(random_id(&*parts.environment), root.group, ring, &parts.secrets)
        }
    };
    superblock.write(&*parts.disk).await?;
    Ok((superblock, true))
}

/// The end of what the pool has of this log.
pub(crate) fn log_end(checkpoint: &Checkpoint, segments: &[Segment], log_id: LogId) -> Tail {
    let of_this_log = |segment: &Segment| (segment.step.log_id == log_id).then_some(segment.step.log_end);
    let in_checkpoint = if checkpoint.log_id == log_id { checkpoint.log_end } else { Tail::default() };
    segments.iter().rev().find_map(of_this_log).unwrap_or(in_checkpoint)
}

/// What there is of a group that was claimed, or is looked at.
pub(crate) async fn new_core(
    chain: Chain,
    log: Rc<Log>,
    backlog: Rc<Backlog>,
    settings: Settings,
    claimed: Claimed,
    from: Tail,
) -> Result<Rc<Core>, VolumeError> {
    let Claimed { root, tag, meta, segments } = claimed;
    let Meta { volumes, parent, table, doomed, snapshots } = meta;
    let largest = volumes.values().map(|held| held.size).max().unwrap_or(0);
    let stored = table.stored_blocks() * BLOCK_LEN as u64;
    // Volumes of a group have much in common, and are thin.
    let indexed = settings.deduplicate.then_some(root.size.min(largest.max(stored * 2)).max(INDEXED_MIN));
    let pages_max = settings.page_cache_bytes / BLOCK_LEN;
    let map =
        Map { volumes, layers: Vec::new(), open: Layer::default(), segments: 0, place: root.checkpoint.place, log_end: from };
    let committed =
        snapshots.into_iter().map(|snapshot| ((snapshot.slot, snapshot.name.clone()), SnapshotState::Committed(snapshot)));
    let core = Rc::new(Core {
        log,
        backlog,
        keeper: Keeper::new(chain.clone(), root, tag),
        reader: Reader::new(&chain, &root, table, pages_max),
        chain,
        settings,
        map: RefCell::new(map),
        snapshots: RefCell::new(committed.collect()),
        last_snapshots: RefCell::default(),
        shares_found: RefCell::default(),
        parent: Cell::new(parent),
        slots_had: RefCell::default(),
        deduplication: Deduplication::new(indexed),
        packing: Cell::new(None),
        waiting: RefCell::default(),
        next_published: Cell::new(Place { epoch: root.epoch, sequence: 0 }),
        published: Cell::new(from.position),
        publishing: Cell::new(0),
        applying: Lock::default(),
        next_gathered: Cell::new(0),
        next_meta: Cell::new(0),
        doomed: RefCell::new(doomed),
        limbo: RefCell::default(),
        unreadable: RefCell::default(),
        noted_hits: RefCell::default(),
        gathering: Lock::default(),
        house: Lock::default(),
        hit_uses: RefCell::default(),
        checkpoint_wanted: Cell::new(false),
        gather_wanted: Cell::new(None),
        is_tidied: Cell::new(false),
        garbage_noted: Cell::new(0),
        written: Cell::new(0),
        live: Cell::new(0),
        pending: Cell::new(0),
        fresh_share: Cell::new(0.0),
        untidy: Cell::new(0),
        written_at: RefCell::default(),
        collecting: Cell::new(false),
        progress: RefCell::default(),
        failed: RefCell::new(None),
        last_unread: RefCell::new(None),
        changed: Signal::default(),
    });
    for segment in segments {
        core.apply(segment).await?;
    }
    core.map.borrow_mut().log_end = from;
    Ok(core)
}
