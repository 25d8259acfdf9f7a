//! The state of an open mapped volume, shared by its tasks.
//!
//! ```text
//!   backlog   in the log, not yet in the pool             newest
//!   layers    in the pool, not yet in the tree               │      a snapshot ends a layer
//!   tree      as of the last checkpoint                   oldest
//! ```

use std::cell::{Cell, RefCell};
use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet, VecDeque};
use std::rc::Rc;
use std::sync::Arc;

use blockdev::Errno;
use dedup::frame::Packing;
use rustc_hash::FxHashMap;

use crate::backlog::Backlog;
use crate::chain::Chain;
use crate::deduplication::Deduplication;
use crate::error::VolumeError;
use crate::extent_map::ExtentMap;
use crate::gather::Which;
use crate::keeper::Keeper;
use crate::log::{Log, Tail};
use crate::map::Pointer;
use crate::mapped::Settings;
use crate::meta::{Held, Parent, Snapshot, SnapshotId, Volumes};
use crate::names::{Family, Slot, Source, first_block};
use crate::progress::Progress;
use crate::publish::Published;
use crate::reader::Reader;
use crate::segment::{BLOCK, Place};
use crate::signal::{Lock, Signal};
use crate::step_header::Marker;
use crate::usage::WrittenAt;

/// Changes that are in the pool and not in the tree.
#[derive(Default)]
pub(crate) struct Layer {
    pub(crate) runs: ExtentMap<Pointer>,
    /// The snapshot that is its volume as it was after this layer.
    pub(crate) ends_with: Option<(Slot, SnapshotId)>,
}

pub(crate) struct Map {
    pub(crate) volumes: Volumes,
    /// Oldest first; they change no more.
    pub(crate) layers: Vec<Rc<Layer>>,
    /// Takes changes; newer than all layers.
    pub(crate) open: Layer,
    /// Segments whose changes are in the layers, the open one included.
    pub(crate) segments: u64,
    /// The place after the newest of them, and where the log goes on.
    pub(crate) place: Place,
    pub(crate) log_end: Tail,
}

impl Map {
    /// The open layer changes no more. `snapshot` is its volume as it is now.
    pub(crate) fn close_layer(&mut self, snapshot: Option<(Slot, SnapshotId)>) {
        let runs = std::mem::take(&mut self.open.runs);
        if snapshot.is_some() || !runs.is_empty() {
            self.layers.push(Rc::new(Layer { runs, ends_with: snapshot }));
        }
    }
}

/// Whose snapshot, and what it is called.
pub(crate) type SnapshotName = (Slot, String);

/// A snapshot as its volume knows it.
#[derive(Clone)]
pub(crate) enum SnapshotState {
    /// Its name is taken.
    Reserved,
    /// It is in the history, and will be in the next checkpoint.
    Pending(Marker),
    Committed(Snapshot),
}

pub(crate) struct Core {
    pub(crate) chain: Chain,
    pub(crate) log: Rc<Log>,
    pub(crate) backlog: Rc<Backlog>,
    pub(crate) keeper: Keeper,
    pub(crate) settings: Settings,
    pub(crate) reader: Reader,
    pub(crate) map: RefCell<Map>,
    pub(crate) snapshots: RefCell<BTreeMap<SnapshotName, SnapshotState>>,
    /// Of each volume, the last one that was taken since the opening, and where in the history that was.
    pub(crate) last_snapshots: RefCell<HashMap<Slot, (SnapshotId, Place)>>,
    pub(crate) parent: Cell<Option<Parent>>,
    /// Slots that are not given to a volume again before the next opening.
    pub(crate) slots_had: RefCell<BTreeSet<Slot>>,
    pub(crate) deduplication: Deduplication,
    pub(crate) packing: Cell<Option<Packing>>,
    /// Published, but not all before them.
    pub(crate) waiting: RefCell<BTreeMap<Place, Published>>,
    /// The first place of our own that is not yet published.
    pub(crate) next_published: Cell<Place>,
    /// The pool has all records before.
    pub(crate) published: Cell<u64>,
    pub(crate) publishing: Cell<usize>,
    /// Held while a segment becomes part of the map.
    pub(crate) applying: Lock,
    /// Of this epoch's objects of family `g`, and of `m`.
    pub(crate) next_gathered: Cell<u64>,
    pub(crate) next_meta: Cell<u64>,
    /// To be deleted once a checkpoint says so.
    pub(crate) doomed: RefCell<Vec<Source>>,
    /// Forgotten handles and whoever may still follow pointers to them, in the order in which they were forgotten.
    pub(crate) limbo: RefCell<Vec<(Rc<()>, Vec<u32>)>>,
    /// Handles of objects that a collection of garbage could not read.
    pub(crate) unreadable: RefCell<HashSet<u32>>,
    /// What steps have referred to of other objects since marking began, while marking goes on.
    pub(crate) noted_hits: RefCell<Option<Vec<Pointer>>>,
    /// By handle, the share of an object that was in use when marking ended last.
    pub(crate) shares_found: RefCell<FxHashMap<u32, f64>>,
    /// Held by whoever collects garbage. Whoever holds the house does not ask for it.
    pub(crate) gathering: Lock,
    /// Held while the tree or the table is being changed as a whole.
    pub(crate) house: Lock,
    /// Handles that steps on their way may refer to.
    pub(crate) hit_uses: RefCell<HashMap<u32, u32>>,
    pub(crate) checkpoint_wanted: Cell<bool>,
    pub(crate) gather_wanted: Cell<Option<Which>>,
    /// Whether it was tidied up since the opening: before that nobody knows how much garbage earlier owners have left.
    pub(crate) is_tidied: Cell<bool>,
    /// Blocks that may have become garbage since marking began last.
    pub(crate) garbage_noted: Cell<u64>,
    /// Blocks changed since garbage was collected last, and blocks in use, as far as that is known: those that were in use then, without
    /// those that may be garbage since, and those that checkpoints have found to be new. 0: nobody has looked.
    pub(crate) written: Cell<u64>,
    pub(crate) live: Cell<u64>,
    /// Blocks stored since then, or since the last checkpoint, and the share of those before that made nothing garbage.
    pub(crate) pending: Cell<u64>,
    pub(crate) fresh_share: Cell<f64>,
    /// Blocks changed since the volume was tidied up last.
    pub(crate) untidy: Cell<u64>,
    /// Now and then, when a write came, and where the log ended before it.
    pub(crate) written_at: RefCell<VecDeque<WrittenAt>>,
    pub(crate) collecting: Cell<bool>,
    /// Of the work that somebody waits for.
    pub(crate) progress: RefCell<Option<Arc<Progress>>>,
    pub(crate) failed: RefCell<Option<VolumeError>>,
    /// What was damaged when something was read last.
    pub(crate) last_unread: RefCell<Option<VolumeError>>,
    pub(crate) changed: Signal,
}

impl Core {
    /// What there is of a volume, but for what has been written since the last checkpoint.
    pub(crate) fn held(&self, slot: Slot) -> Option<Held> {
        self.map.borrow().volumes.get(&slot).copied()
    }

    /// Bytes of a volume; 0 if it is no more.
    pub(crate) fn size(&self, slot: Slot) -> u64 {
        self.held(slot).map_or(0, |held| held.size)
    }

    /// Where some bytes of a volume, in whole blocks, are in its group.
    pub(crate) fn place(&self, slot: Slot, offset: u64, len: u64) -> Result<u64, Errno> {
        let aligned = (offset | len).is_multiple_of(BLOCK as u64);
        let inside = offset.checked_add(len).is_some_and(|end| end <= self.size(slot));
        let is_right = aligned && inside && len > 0;
        if is_right { Ok(first_block(slot) * BLOCK as u64 + offset) } else { Err(Errno::EINVAL) }
    }

    pub(crate) fn fail(&self, error: VolumeError) {
        self.failed.borrow_mut().get_or_insert(error);
        self.log.fail(Errno::EIO);
        self.changed.notify();
    }

    pub(crate) fn failed_errno(&self) -> Option<Errno> {
        self.log.failed().map(|failure| failure.errno()).or_else(|| self.failed.borrow().as_ref().map(|_| Errno::EIO))
    }

    /// Why the volume does not go on, if it does not.
    pub(crate) fn failure(&self) -> Option<VolumeError> {
        self.failed.borrow().clone().or_else(|| self.log.failed().map(VolumeError::from))
    }

    /// Why a change was not made, or not brought into the pool.
    pub(crate) fn not_done(&self, errno: Errno) -> VolumeError {
        match self.failure() {
            Some(failure) => failure,
            None if errno == Errno::ENOSPC => VolumeError::LogFull,
            None => VolumeError::Fenced,
        }
    }

    pub(crate) fn note_changed(&self, blocks: u64) {
        self.written.set(self.written.get().saturating_add(blocks));
        self.untidy.set(self.untidy.get().saturating_add(blocks));
    }

    /// A checkpoint entered so many stored blocks, of which some took the place of nothing, or of what a snapshot keeps.
    pub(crate) fn note_fresh(&self, fresh: u64, stored: u64) {
        let fresh = fresh.min(stored);
        if self.live.get() > 0 {
            self.live.set(self.live.get() + fresh);
        }
        if stored > 0 {
            self.fresh_share.set(fresh as f64 / stored as f64);
        }
    }

    /// Blocks that may be garbage, of all that are stored. What no checkpoint has entered yet is taken for what the last one entered.
    pub(crate) fn garbage_max(&self, stored: u64) -> u64 {
        let fresh = if self.live.get() > 0 { self.fresh_share.get() * self.pending.get() as f64 } else { 0.0 };
        stored.saturating_sub(self.live.get() + fresh as u64)
    }

    /// So many blocks that were in use may be garbage now.
    pub(crate) fn note_garbage(&self, blocks: u64) {
        self.note_changed(blocks);
        self.live.set(self.live.get().saturating_sub(blocks));
        self.garbage_noted.set(self.garbage_noted.get().saturating_add(blocks));
    }

    /// Brings everything acknowledged so far into the pool. Those who wait at the same time share steps.
    pub(crate) async fn publish_all(&self) -> Result<(), Errno> {
        let wanted = self.backlog.end().position;
        let settled = || match self.failed_errno() {
            Some(errno) => Some(Err(errno)),
            None if self.published.get() >= wanted => Some(Ok(())),
            None => {
                self.backlog.cut_for_flush(wanted);
                None
            }
        };
        self.changed.wait_for(settled).await
    }

    /// Name of an object of this epoch that does not exist yet. The number of a gathered object is greater than those of this epoch's steps whose
    /// changes its pages may have, so that the names alone tell what a page cannot refer to.
    pub(crate) fn new_source(&self, family: Family, counter: &Cell<u64>) -> Source {
        let (root, place) = (self.keeper.root(), self.map.borrow().place);
        let is_later = family == Family::Gathered && place.epoch == root.epoch;
        let number = counter.get().max(if is_later { place.sequence } else { 0 });
        counter.set(number + 1);
        Source { group: root.group, family, epoch: root.epoch, number }
    }
}
