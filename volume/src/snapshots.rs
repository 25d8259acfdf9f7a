//! Snapshots of an open volume, and going back to one.
//!
//! ```text
//!   create ─▶ marker in the log ─▶ step that ends with it ─▶ layer that ends with it ─▶ checkpoint: committed
//!   delete ─▶ checkpoint: it is deleting ─▶ does a clone pin it? ─▶ checkpoint: it is gone
//! ```

use std::cmp::Reverse;
use std::ops::Range;
use std::rc::Rc;

use bytes::Bytes;

use crate::checkpoint::Change;
use crate::core::{Core, SnapshotName, SnapshotState};
use crate::environment::random_id;
use crate::error::VolumeError;
use crate::log::RecordKind;
use crate::map::Tree;
use crate::mapped::Durability;
use crate::meta::{Held, Snapshot};
use crate::names::{SLOT_BLOCKS, Slot, first_block, group_path};
use crate::progress::Progress;
use crate::segment::BLOCK;
use crate::step_header::{MARKER_NAME_MAX, Marker};
use crate::table::Table;

/// A snapshot, as its volume tells of it.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct SnapshotInfo {
    pub name: String,
    /// Seconds since 1970.
    pub created: u64,
    /// Of the volume at that time, in bytes.
    pub size: u64,
    /// It can be read, cloned and deleted; until then it is on its way into the pool.
    pub is_committed: bool,
}

impl Core {
    /// Makes the volume as it is now a snapshot: everything acknowledged so far is in it, and nothing that is submitted later.
    /// When it comes back the snapshot is as durable as a flushed write. `created`: seconds since 1970.
    pub(crate) async fn snapshot(&self, slot: Slot, name: &str, created: u64) -> Result<(), VolumeError> {
        if name.is_empty() || name.len() > MARKER_NAME_MAX {
            return Err(VolumeError::SnapshotName);
        }
        let key = (slot, name.to_owned());
        {
            let mut snapshots = self.snapshots.borrow_mut();
            if snapshots.contains_key(&key) {
                return Err(VolumeError::SnapshotExists);
            }
            snapshots.insert(key.clone(), SnapshotState::Reserved);
        }
        let id = random_id(&*self.chain.environment);
        let marker = Marker { slot, id, created, size: self.size(slot), name: name.to_owned() };
        let payload = Bytes::from(marker.encode());
        let logged = self.log.append(RecordKind::Marker, 0, payload.len() as u64, payload).get().await;
        let durable = match (logged, self.settings.durability) {
            (Err(errno), _) => Err(errno),
            (Ok(()), Durability::Local) => self.log.sync().await,
            (Ok(()), Durability::Remote) => self.publish_all().await,
        };
        if let Err(errno) = durable {
            let error = self.not_done(errno);
            if error == VolumeError::LogFull {
                self.snapshots.borrow_mut().remove(&key);
            }
            return Err(error);
        }
        // By now it may be in the pool, or even be deleted again.
        if matches!(self.snapshots.borrow().get(&key), Some(SnapshotState::Reserved)) {
            self.note_marker(marker);
        }
        Ok(())
    }

    /// A snapshot that the log has, or the history.
    pub(crate) fn note_marker(&self, marker: Marker) {
        let mut snapshots = self.snapshots.borrow_mut();
        let key = (marker.slot, marker.name.clone());
        if !matches!(snapshots.get(&key), Some(SnapshotState::Committed(_))) {
            snapshots.insert(key, SnapshotState::Pending(marker));
        }
    }

    pub(crate) fn list_snapshots(&self, slot: Slot) -> Vec<SnapshotInfo> {
        let info = |((_, name), state): (&SnapshotName, &SnapshotState)| match state {
            SnapshotState::Reserved => None,
            SnapshotState::Pending(Marker { created, size, .. }) => {
                Some(SnapshotInfo { name: name.clone(), created: *created, size: *size, is_committed: false })
            }
            SnapshotState::Committed(Snapshot { created, size, is_deleting, .. }) => {
                (!is_deleting).then(|| SnapshotInfo { name: name.clone(), created: *created, size: *size, is_committed: true })
            }
        };
        self.snapshots.borrow().iter().filter(|((of, _), _)| *of == slot).filter_map(info).collect()
    }

    /// Those that are in a checkpoint, of some volumes.
    pub(crate) fn committed_snapshots(&self, of: impl Fn(Slot) -> bool) -> Vec<Snapshot> {
        let snapshots = self.snapshots.borrow();
        let committed = snapshots.iter().filter(|((slot, _), _)| of(*slot)).filter_map(|(_, state)| match state {
            SnapshotState::Committed(snapshot) => Some(snapshot.clone()),
            SnapshotState::Reserved | SnapshotState::Pending(_) => None,
        });
        committed.collect()
    }

    /// A snapshot, once it is in a checkpoint.
    pub(crate) async fn committed_snapshot(&self, name: &SnapshotName) -> Result<Snapshot, VolumeError> {
        let settled = || {
            let snapshots = self.snapshots.borrow();
            match snapshots.get(name) {
                None => Some(Err(VolumeError::NoSnapshot)),
                Some(SnapshotState::Committed(snapshot)) => Some(Ok(snapshot.clone())),
                Some(_) => self.failure().map(Err),
            }
        };
        self.backlog.cut();
        self.changed.wait_for(settled).await
    }

    /// Deletes a snapshot that has no clones; its space comes back with the next collection of garbage.
    pub(crate) async fn delete_snapshot(&self, name: &SnapshotName) -> Result<(), VolumeError> {
        self.committed_snapshot(name).await?;
        let _alone = self.house.hold().await;
        let snapshot = self.snapshot_now(name)?;
        self.set_deleting(name, true)?;
        self.checkpoint_with(Change::Nothing).await?;
        if let Err(refused) = self.refuse_pinned(&snapshot).await {
            // It is told of again when that is for good.
            self.checkpoint_with(Change::Spared(snapshot.id)).await?;
            self.set_deleting(name, false)?;
            return Err(refused);
        }
        self.snapshots.borrow_mut().remove(name);
        self.note_garbage(u64::MAX);
        self.checkpoint_with(Change::Nothing).await
    }

    async fn refuse_pinned(&self, snapshot: &Snapshot) -> Result<(), VolumeError> {
        let pins = self.chain.pins().await?;
        let clones: Vec<String> =
            pins.iter().filter(|pin| pin.snapshot == snapshot.id).map(|pin| group_path(&pin.clone)).collect();
        if clones.is_empty() { Ok(()) } else { Err(VolumeError::SnapshotHasClones(clones.join(", "))) }
    }

    /// A snapshot in a checkpoint, for whoever holds the house: nobody deletes it before he is done.
    pub(crate) fn snapshot_now(&self, name: &SnapshotName) -> Result<Snapshot, VolumeError> {
        match self.snapshots.borrow().get(name) {
            Some(SnapshotState::Committed(snapshot)) => Ok(snapshot.clone()),
            _ => Err(VolumeError::NoSnapshot),
        }
    }

    /// The snapshots whose deletion was begun and has not ended.
    pub(crate) fn half_deleted(&self) -> Vec<SnapshotName> {
        let is_begun = |state: &SnapshotState| matches!(state, SnapshotState::Committed(snapshot) if snapshot.is_deleting);
        let snapshots = self.snapshots.borrow();
        snapshots.iter().filter(|(_, state)| is_begun(state)).map(|(name, _)| name.clone()).collect()
    }

    /// Ends the deletions that an earlier owner had begun. Snapshots that have clones stay, and are told of again.
    pub(crate) async fn finish_deletions(self: Rc<Self>, half_deleted: Vec<SnapshotName>) {
        for name in half_deleted {
            if self.delete_snapshot(&name).await.is_err() && self.failed_errno().is_some() {
                return;
            }
        }
    }

    fn set_deleting(&self, name: &SnapshotName, deleting: bool) -> Result<(), VolumeError> {
        match self.snapshots.borrow_mut().get_mut(name) {
            Some(SnapshotState::Committed(snapshot)) => snapshot.is_deleting = deleting,
            _ => return Err(VolumeError::NoSnapshot),
        }
        Ok(())
    }

    /// The volume's content and size become the snapshot's. The caller lets nobody write meanwhile, and gives it up before anybody may.
    pub(crate) async fn roll_back(&self, name: &SnapshotName, asked: &Progress) -> Result<(), VolumeError> {
        self.committed_snapshot(name).await?;
        self.publish_all().await.map_err(|_| self.failure().unwrap_or(VolumeError::Fenced))?;
        let _alone = self.house.hold().await;
        asked.check_wanted()?;
        let snapshot = self.snapshot_now(name)?;
        let slot = name.0;
        let held = self.held(slot).ok_or(VolumeError::NoVolume)?;
        let change = Change::Content(slot, Held { size: snapshot.size, tree: snapshot.tree, ..held });
        self.note_garbage(u64::MAX);
        self.checkpoint_with(change).await
    }

    /// Where two snapshots differ, or a snapshot and the volume itself, in bytes.
    pub(crate) async fn diff(
        &self,
        slot: Slot,
        before: &str,
        to: Option<&str>,
        from: u64,
        ranges_max: usize,
    ) -> Result<Vec<Range<u64>>, VolumeError> {
        let _looking = self.reader.looking();
        let before = self.committed_snapshot(&(slot, before.to_owned())).await?;
        let after = match to {
            Some(name) => self.committed_snapshot(&(slot, name.to_owned())).await?.tree,
            None => {
                self.publish_all().await.map_err(|_| self.failure().unwrap_or(VolumeError::Fenced))?;
                self.checkpoint().await?;
                self.held(slot).ok_or(VolumeError::NoVolume)?.tree
            }
        };
        let block = BLOCK as u64;
        let ranges = before.tree.diff(&after, &self.reader, from / block, ranges_max).await?;
        Ok(ranges.into_iter().map(|range| range.start * block..range.end * block).collect())
    }

    /// Gives the volume another size. What lies past a smaller one is gone; the caller lets nobody write there meanwhile, and gives it up before anybody
    /// may.
    pub(crate) async fn resize(&self, slot: Slot, size: u64, asked: &Progress) -> Result<(), VolumeError> {
        check_size(size)?;
        let lost = |errno| self.not_done(errno);
        let now = self.size(slot);
        if size < now {
            let from = first_block(slot) * BLOCK as u64 + size;
            let discarded = self.log.append(RecordKind::Discard, from, now - size, Bytes::new());
            discarded.get().await.map_err(lost)?;
        }
        // Or the loss of the log would undo what was acknowledged before, and not this.
        self.publish_all().await.map_err(lost)?;
        let _alone = self.house.hold().await;
        asked.check_wanted()?;
        self.checkpoint_with(Change::Size(slot, size)).await
    }
}

/// Whether a volume can have so many bytes.
pub(crate) fn check_size(size: u64) -> Result<(), VolumeError> {
    let (block, blocks) = (BLOCK as u64, size / BLOCK as u64);
    let fits = size.is_multiple_of(block) && (1..=SLOT_BLOCKS).contains(&blocks);
    if fits { Ok(()) } else { Err(VolumeError::BadSize) }
}

/// Those of one volume after each other, in the order in which they came to be: their pages are in objects with ever greater numbers.
pub(crate) fn by_age(mut snapshots: Vec<Snapshot>, table: &Table) -> Vec<Snapshot> {
    let written = |tree: &Tree| {
        let entry = table.entry_of(tree.root)?;
        Some((Reverse(entry.owner), entry.epoch, entry.number, tree.root))
    };
    snapshots.sort_by_key(|snapshot| (snapshot.slot, written(&snapshot.tree)));
    snapshots
}
