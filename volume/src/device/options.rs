//! What is done to volumes in their store, without opening them.

use std::ops::Range;
use std::path::PathBuf;
use std::sync::Arc;

use backends::segments::SegmentStore;
use backends::{ReducedUsage, Shares};
use blockdev::null_disk::NullDisk;
use blockdev::{BlockDevice, ReactorHandle};
use uuid::Uuid;

use super::OpenError;
use super::engine::{self, Home};
use crate::at_rest::{self, RestingUse};
use crate::clone::{clone_snapshot, delete_volume, diff_snapshots, refuse_clones};
use crate::contents::Contents;
use crate::environment::LocalFuture;
use crate::error::VolumeError;
use crate::mapped::{MappedVolume, Parts, Settings};
use crate::names::VolumeId;
use crate::reduce::Secrets;
use crate::shares::shares_in_store;

/// What a mapped volume is made and opened with.
#[derive(Clone)]
pub struct MappedOptions {
    /// What the volume shares what it stores with, and its name in the store.
    pub group: Uuid,
    /// The volume itself: its group's UUID, if it is alone in it.
    pub volume: Uuid,
    pub store: Arc<dyn SegmentStore + Send + Sync>,
    pub settings: Settings,
    pub secrets: Secrets,
    /// The thread that the engine lives on.
    pub home: ReactorHandle,
    /// The file or device that carries its log, as its user knows it.
    pub log_path: PathBuf,
}

impl MappedOptions {
    pub(super) fn id(&self) -> VolumeId {
        VolumeId { group: self.group.into_bytes(), id: self.volume.into_bytes() }
    }

    /// Does something in the store, on the home thread, without opening the volume. Blocks; never call it from a data-plane thread.
    fn in_store<T: Send + 'static>(
        &self,
        work: impl FnOnce(Parts) -> LocalFuture<'static, Result<T, VolumeError>> + Send + 'static,
    ) -> Result<T, OpenError> {
        // Nothing is logged before a volume is opened.
        let log: Arc<dyn BlockDevice> = Arc::new(NullDisk::new(0));
        let begin = move |parts| -> LocalFuture<'static, engine::Begun<T>> {
            Box::pin(async move { work(parts).await.map(|answer| (None, answer)) })
        };
        Home::start(self, &log, begin).map(|(_, answer)| answer)
    }

    /// Makes an empty volume of `size` bytes, and its group. Blocks.
    pub fn create(&self, size: u64) -> Result<(), OpenError> {
        let id = self.id();
        self.in_store(move |parts| Box::pin(async move { MappedVolume::create(&parts, id, size).await }))
    }

    /// Makes volume `to`, in a group of its own, begin as a snapshot of this one that is in the pool, and gives its size in bytes. Blocks.
    pub fn clone_snapshot(&self, snapshot: &str, to: Uuid) -> Result<u64, OpenError> {
        let (id, snapshot, to) = (self.id(), snapshot.to_owned(), to.into_bytes());
        self.in_store(move |parts| Box::pin(async move { clone_snapshot(&parts, id, &snapshot, to).await }))
    }

    /// Refuses a volume whose snapshots have clones. Blocks.
    pub fn refuse_clones(&self) -> Result<(), OpenError> {
        let group = self.group.into_bytes();
        self.in_store(move |parts| Box::pin(async move { refuse_clones(&parts, group).await }))
    }

    /// Ends the group with all its volumes, and removes everything of it; can be repeated. Blocks.
    pub fn delete(&self) -> Result<(), OpenError> {
        let group = self.group.into_bytes();
        self.in_store(move |parts| Box::pin(async move { delete_volume(&parts, group).await }))
    }

    /// What the group keeps in the pool, as its newest checkpoint says. Blocks.
    pub fn usage(&self) -> Result<ReducedUsage, OpenError> {
        let group = self.group.into_bytes();
        self.in_store(move |parts| Box::pin(async move { Ok(parts.chain(group).read_meta().await?.1.table.usage()) }))
    }

    /// What the volume uses while nobody has it open, with what its log on this host holds that the pool has not got yet. Nothing is changed, and the log
    /// is let go of before the map is read. Fails if somebody takes the volume meanwhile. Blocks; never call it from a data-plane thread.
    pub fn usage_at_rest(&self, log: Arc<dyn BlockDevice>) -> Result<RestingUse, OpenError> {
        let (id, group) = (self.id(), self.group.into_bytes());
        let begin = move |parts| -> LocalFuture<'static, engine::Begun<_>> {
            Box::pin(async move { at_rest::read_log(&parts, group).await.map(|unpublished| (None, unpublished)) })
        };
        let (_, unpublished) = Home::start(self, &log, begin)?;
        drop(log);
        self.in_store(move |parts| Box::pin(async move { at_rest::usage(&parts, id, unpublished).await }))
    }

    /// What the group needs in the pool, as its newest checkpoint says. Blocks.
    pub(crate) fn contents(&self) -> Result<Contents, OpenError> {
        let group = self.group.into_bytes();
        self.in_store(move |parts| Box::pin(async move { Contents::read(&parts, group).await }))
    }

    /// What its blocks in the pool are for, as its newest checkpoint says. Reads the whole map; blocks.
    pub fn shares(&self) -> Result<Shares, OpenError> {
        let id = self.id();
        self.in_store(move |parts| Box::pin(async move { shares_in_store(&parts, id).await }))
    }

    /// The ranges, in bytes, in which two snapshots that are in the pool may differ: see [`MappedVolume::diff`]. Blocks.
    pub fn diff_snapshots(&self, before: &str, to: &str, from: u64, ranges_max: usize) -> Result<Vec<Range<u64>>, OpenError> {
        let (id, before, to) = (self.id(), before.to_owned(), to.to_owned());
        self.in_store(move |parts| Box::pin(async move { diff_snapshots(&parts, id, [&before, &to], from, ranges_max).await }))
    }

    /// Forgets a clone of this volume that was not made, or is no more. Blocks.
    pub fn unpin(&self, clone: Uuid) -> Result<(), OpenError> {
        let (group, clone) = (self.group.into_bytes(), clone.into_bytes());
        self.in_store(move |parts| Box::pin(async move { crate::clone::unpin(&parts, group, clone).await }))
    }
}
