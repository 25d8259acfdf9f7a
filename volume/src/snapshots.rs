//! Snapshots of an open volume, and going back to one.
//!
//! ```text
//!   create ─▶ marker in the log ─▶ step that ends with it ─▶ layer that ends with it ─▶ checkpoint: committed
//!   delete ─▶ checkpoint: it is deleting ─▶ does a clone pin it? ─▶ checkpoint: it is gone
//! ```

use std::ops::Range;
use std::rc::Rc;

use bytes::Bytes;

use crate::checkpoint::Change;
use crate::core::{Core, SnapshotState};
use crate::environment::random_id;
use crate::error::VolumeError;
use crate::log::RecordKind;
use crate::mapped::Durability;
use crate::meta::Snapshot;
use crate::names::group_path;
use crate::segment::BLOCK;
use crate::step_header::{MARKER_NAME_MAX, Marker};

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
    pub(crate) async fn snapshot(&self, name: &str, created: u64) -> Result<(), VolumeError> {
        if name.is_empty() || name.len() > MARKER_NAME_MAX {
            return Err(VolumeError::SnapshotName);
        }
        {
            let mut snapshots = self.snapshots.borrow_mut();
            if snapshots.contains_key(name) {
                return Err(VolumeError::SnapshotExists);
            }
            snapshots.insert(name.to_owned(), SnapshotState::Reserved);
        }
        let id = random_id(&*self.chain.environment);
        let marker = Marker { id, created, size: self.size(), name: name.to_owned() };
        let payload = Bytes::from(marker.encode());
        let logged = self.log.append(RecordKind::Marker, 0, payload.len() as u64, payload).get().await;
        let durable = match (logged, self.settings.durability) {
            (Err(errno), _) => Err(errno),
            (Ok(()), Durability::Local) => self.log.sync().await,
            (Ok(()), Durability::Remote) => self.publish_all().await,
        };
        durable.map_err(|_| self.failure().unwrap_or(VolumeError::Fenced))?;
        // By now it may be in the pool, or even be deleted again.
        if matches!(self.snapshots.borrow().get(name), Some(SnapshotState::Reserved)) {
            self.note_marker(marker);
        }
        Ok(())
    }

    /// A snapshot that the log has, or the history.
    pub(crate) fn note_marker(&self, marker: Marker) {
        let mut snapshots = self.snapshots.borrow_mut();
        if !matches!(snapshots.get(&marker.name), Some(SnapshotState::Committed(_))) {
            snapshots.insert(marker.name.clone(), SnapshotState::Pending(marker));
        }
    }

    pub(crate) fn list_snapshots(&self) -> Vec<SnapshotInfo> {
        let info = |(name, state): (&String, &SnapshotState)| match state {
            SnapshotState::Reserved => None,
            SnapshotState::Pending(Marker { created, size, .. }) => {
                Some(SnapshotInfo { name: name.clone(), created: *created, size: *size, is_committed: false })
            }
            SnapshotState::Committed(Snapshot { created, size, is_deleting, .. }) => {
                (!is_deleting).then(|| SnapshotInfo { name: name.clone(), created: *created, size: *size, is_committed: true })
            }
        };
        self.snapshots.borrow().iter().filter_map(info).collect()
    }

    /// A snapshot, once it is in a checkpoint.
    pub(crate) async fn committed_snapshot(&self, name: &str) -> Result<Snapshot, VolumeError> {
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
    pub(crate) async fn delete_snapshot(&self, name: &str) -> Result<(), VolumeError> {
        self.committed_snapshot(name).await?;
        let _alone = self.house.hold().await;
        let snapshot = self.snapshot_now(name)?;
        self.set_deleting(name, true)?;
        self.checkpoint_with(Change::default()).await?;
        let pins = self.chain.pins().await?;
        let clones: Vec<String> =
            pins.iter().filter(|pin| pin.snapshot == snapshot.id).map(|pin| group_path(&pin.clone)).collect();
        if !clones.is_empty() {
            self.set_deleting(name, false)?;
            self.checkpoint_with(Change::default()).await?;
            return Err(VolumeError::SnapshotHasClones(clones.join(", ")));
        }
        self.snapshots.borrow_mut().remove(name);
        self.note_garbage(u64::MAX);
        self.checkpoint_with(Change::default()).await
    }

    /// A snapshot in a checkpoint, for whoever holds the house: nobody deletes it before he is done.
    fn snapshot_now(&self, name: &str) -> Result<Snapshot, VolumeError> {
        match self.snapshots.borrow().get(name) {
            Some(SnapshotState::Committed(snapshot)) => Ok(snapshot.clone()),
            _ => Err(VolumeError::NoSnapshot),
        }
    }

    /// The snapshots whose deletion was begun and has not ended.
    pub(crate) fn half_deleted(&self) -> Vec<String> {
        let is_begun = |state: &SnapshotState| matches!(state, SnapshotState::Committed(snapshot) if snapshot.is_deleting);
        let snapshots = self.snapshots.borrow();
        snapshots.iter().filter(|(_, state)| is_begun(state)).map(|(name, _)| name.clone()).collect()
    }

    /// Ends the deletions that an earlier owner had begun. Snapshots that have clones stay, and are told of again.
    pub(crate) async fn finish_deletions(self: Rc<Self>, half_deleted: Vec<String>) {
        for name in half_deleted {
            if self.delete_snapshot(&name).await.is_err() && self.failed_errno().is_some() {
                return;
            }
        }
    }

    fn set_deleting(&self, name: &str, deleting: bool) -> Result<(), VolumeError> {
        match self.snapshots.borrow_mut().get_mut(name) {
            Some(SnapshotState::Committed(snapshot)) => snapshot.is_deleting = deleting,
            _ => return Err(VolumeError::NoSnapshot),
        }
        Ok(())
    }

    /// The volume's content and size become the snapshot's. The caller lets nobody write meanwhile.
    pub(crate) async fn roll_back(&self, name: &str) -> Result<(), VolumeError> {
        self.committed_snapshot(name).await?;
        self.publish_all().await.map_err(|_| self.failure().unwrap_or(VolumeError::Fenced))?;
        let _alone = self.house.hold().await;
        let snapshot = self.snapshot_now(name)?;
        let change = Change { tree: Some(snapshot.tree), size: Some(snapshot.size) };
        self.note_garbage(u64::MAX);
        self.checkpoint_with(change).await
    }

    /// Where two snapshots differ, or a snapshot and the volume itself, in bytes.
    pub(crate) async fn diff(
        &self,
        before: &str,
        to: Option<&str>,
        from: u64,
        ranges_max: usize,
    ) -> Result<Vec<Range<u64>>, VolumeError> {
        let _looking = self.reader.looking();
        let before = self.committed_snapshot(before).await?;
        let after = match to {
            Some(name) => self.committed_snapshot(name).await?.tree,
            None => {
                self.publish_all().await.map_err(|_| self.failure().unwrap_or(VolumeError::Fenced))?;
                self.checkpoint().await?;
                self.map.borrow().tree
            }
        };
        let block = BLOCK as u64;
        let ranges = before.tree.diff(&after, &self.reader, from / block, ranges_max).await?;
        Ok(ranges.into_iter().map(|range| range.start * block..range.end * block).collect())
    }

    /// Gives the volume another size. What lies past a smaller one is gone; the caller lets nobody write there meanwhile.
    pub(crate) async fn resize(&self, size: u64) -> Result<(), VolumeError> {
        if size == 0 || !size.is_multiple_of(BLOCK as u64) {
            return Err(VolumeError::BadSize);
        }
        let lost = |_| self.failure().unwrap_or(VolumeError::Fenced);
        let now = self.size();
        if size < now {
            let discarded = self.log.append(RecordKind::Discard, size, now - size, Bytes::new());
            discarded.get().await.map_err(lost)?;
        }
        // Or the loss of the log would undo what was acknowledged before, and not this.
        self.publish_all().await.map_err(lost)?;
        let _alone = self.house.hold().await;
        self.checkpoint_with(Change { tree: None, size: Some(size) }).await
    }
}
