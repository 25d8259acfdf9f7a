//! A mapped volume that is open.
//!
//! ```text
//!   write ─▶ log ─▶ acknowledged           read ◀── backlog (log) ◀─ hides ─ layers ◀─ hides ─ tree (pool)
//!             │ backlog
//!             ▼ steps, ≤ 8 in flight
//!           pool ─▶ open layer ─▶ log trimmed          checkpoints: layers ─▶ tree ─▶ root
//! ```
//!
//! One thread owns it. Overlapping requests are the caller's to order.

use std::rc::Rc;
use std::time::Duration;

use backends::segments::SegmentStore;
use backends::{EngineUse, Shares};
use blockdev::Errno;
use bytes::Bytes;
use dedup::frame::Allowed;

use crate::chain::Chain;
use crate::core::{Core, SnapshotName};
use crate::disk::LogDisk;
use crate::environment::Environment;
use crate::error::VolumeError;
use crate::group::MappedGroup;
use crate::log::{LogId, RecordKind, WhenFull};
use crate::meta::Meta;
use crate::names::{Family, Group, Slot, Source, VolumeId};
use crate::progress::Progress;
use crate::reduce::Secrets;
use crate::root::{Checkpoint, Root};
use crate::segment::BLOCK;
use crate::signal::{Asked, answer};
use crate::snapshots::{SnapshotInfo, check_size};
use crate::troubles::Trouble;

/// A step is cut early when so much of the log is in use.
const PRESSURE: f64 = 0.5;

/// When a flush has done its work.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Durability {
    /// The local log has it. The loss of this host loses what the pool does not have yet.
    Local,
    /// The pool has it.
    Remote,
}

#[derive(Clone, Copy, Debug)]
pub struct Settings {
    pub durability: Durability,
    /// Bytes of changes after which a segment is written, at most 32 MiB.
    pub segment_bytes: u64,
    /// Open the volume even if flushes were acknowledged that only another host's log may have.
    pub accept_loss: bool,
    /// Refuse a volume that had an owner whose log is not here.
    pub own_only: bool,
    /// Segments after which a checkpoint is due.
    pub checkpoint_segments: u64,
    pub compression: Allowed,
    /// Blocks that are stored already are not stored again.
    pub deduplicate: bool,
    /// For pages of the map that were read.
    pub page_cache_bytes: usize,
    /// For data that is in the log and not yet in the pool; what is more is read back from the log.
    pub kept_bytes: usize,
    /// Garbage is collected by itself.
    pub gathers: bool,
    /// Runs of a step that are gone through at once: more would keep requests waiting.
    pub slice: usize,
    /// Pointers that a collection keeps in memory, some 5 bytes each. With more, only how many lead to the fullest objects is remembered, and these are
    /// not rewritten by it.
    pub marked_max: usize,
    pub when_full: WhenFull,
}

impl Default for Settings {
    fn default() -> Settings {
        Settings {
            durability: Durability::Local,
            segment_bytes: 32 << 20,
            accept_loss: false,
            own_only: false,
            checkpoint_segments: 64,
            compression: Allowed::Auto,
            deduplicate: true,
            page_cache_bytes: 64 << 20,
            kept_bytes: 96 << 20,
            gathers: true,
            slice: 128,
            marked_max: 16 << 20,
            when_full: WhenFull::Wait,
        }
    }
}

/// Where a volume lives.
#[derive(Clone)]
pub struct Parts {
    pub environment: Rc<dyn Environment>,
    pub disk: Rc<dyn LogDisk>,
    pub store: Rc<dyn SegmentStore>,
    pub secrets: Secrets,
}

impl Parts {
    pub(crate) fn chain(&self, group: Group) -> Chain {
        let Parts { environment, store, secrets, .. } = self.clone();
        Chain { store, environment, group, secrets, troubles: Rc::default() }
    }
}

/// The handle of a volume of an open group. Requests may run concurrently; their futures borrow it.
#[derive(Clone)]
pub struct MappedVolume {
    pub(crate) core: Rc<Core>,
    pub(crate) slot: Slot,
}

impl MappedVolume {
    /// Makes an empty volume of `size` bytes, a multiple of 4096, and its group. Both have UUIDs that no others have or had.
    pub async fn create(parts: &Parts, volume: impl Into<VolumeId>, size: u64) -> Result<(), VolumeError> {
        check_size(size)?;
        let volume = volume.into();
        let group = volume.group;
        parts.chain(group).create_volume(Meta::empty(volume, size), (group, group), size).await
    }

    /// Takes the volume over, with its group, from whoever had it, and brings it back to what was acknowledged last.
    pub async fn open(parts: &Parts, volume: impl Into<VolumeId>, settings: Settings) -> Result<MappedVolume, VolumeError> {
        let VolumeId { group, id } = volume.into();
        MappedGroup::open(parts, group, settings).await?.volume(id).ok_or(VolumeError::NoVolume)
    }

    /// Bytes.
    pub fn size(&self) -> u64 {
        self.core.size(self.slot)
    }

    /// Why it does not go on, if it does not.
    pub fn failed(&self) -> Option<VolumeError> {
        self.core.failure()
    }

    /// What could not be read when it was needed last, for a client, a checkpoint or a collection of garbage.
    pub fn last_read_error(&self) -> Option<VolumeError> {
        self.core.last_unread.borrow().clone()
    }

    /// What the pool does not take now of a volume that goes on, or the disk of its log, if that is so.
    pub fn trouble(&self) -> Option<Trouble> {
        let goes_on = self.core.failure().is_none();
        self.core.chain.troubles.worst(self.now()).filter(|_| goes_on)
    }

    /// The same of the pool alone.
    pub(crate) fn pool_trouble(&self) -> Option<Trouble> {
        let goes_on = self.core.failure().is_none();
        self.core.chain.troubles.worst_of_pool(self.now()).filter(|_| goes_on)
    }

    /// By the clock that [`Trouble`] is told by.
    pub fn now(&self) -> Duration {
        self.core.chain.environment.now()
    }

    /// What it uses of the log, of the pool and of memory, and what it has done since it was opened.
    pub fn usage(&self) -> EngineUse {
        self.core.engine_use()
    }

    /// What the blocks of its objects are for. Reads the whole map.
    pub async fn shares(&self) -> Result<Shares, VolumeError> {
        self.core.shares(self.slot).await
    }

    /// The most bytes of one write: a multiple of 4096.
    pub fn write_max(&self) -> usize {
        self.core.log.payload_max() / BLOCK * BLOCK
    }

    /// Writes whole blocks: `offset` and the length of `bytes` are multiples of 4096, at most [`MappedVolume::write_max`].
    pub async fn write(&self, offset: u64, bytes: Bytes) -> Result<(), Errno> {
        if bytes.len() > self.write_max() {
            return Err(Errno::EINVAL);
        }
        let len = bytes.len() as u64;
        self.change(RecordKind::Write, offset, len, bytes).await
    }

    /// The same for those who do not wait: `then` is called with what came of it, at once or later.
    pub(crate) fn write_then(&self, offset: u64, bytes: Bytes, then: impl FnOnce(Result<(), Errno>) + 'static) {
        let len = bytes.len() as u64;
        match self.core.place(self.slot, offset, len) {
            Ok(offset) => self.append_for(Asked::call(then), RecordKind::Write, offset, len, bytes),
            Err(errno) => then(Err(errno)),
        }
    }

    /// Makes whole blocks read as zeroes; `discard`: because their content no longer matters.
    pub async fn zero(&self, offset: u64, len: u64, discard: bool) -> Result<(), Errno> {
        let kind = if discard { RecordKind::Discard } else { RecordKind::Zero };
        self.change(kind, offset, len, Bytes::new()).await
    }

    async fn change(&self, kind: RecordKind, offset: u64, len: u64, payload: Bytes) -> Result<(), Errno> {
        let offset = self.core.place(self.slot, offset, len)?;
        let (asked, answer) = answer();
        self.append_for(asked, kind, offset, len, payload);
        answer.get().await
    }

    fn name(&self, snapshot: &str) -> SnapshotName {
        (self.slot, snapshot.to_owned())
    }

    fn append_for(&self, asked: Asked<Result<(), Errno>>, kind: RecordKind, offset: u64, len: u64, payload: Bytes) {
        self.core.note_write();
        self.core.log.append_for(asked, kind, offset, len, payload);
        if self.core.log.fill() > PRESSURE && self.core.publishing.get() == 0 && self.core.backlog.is_taken() {
            self.core.backlog.cut();
        }
    }

    /// Reads whole blocks.
    pub async fn read(&self, offset: u64, len: u64) -> Result<Vec<u8>, Errno> {
        let offset = self.core.place(self.slot, offset, len)?;
        self.core.read(offset / BLOCK as u64..(offset + len) / BLOCK as u64).await
    }

    /// What the parts of a range hold, in order and without gaps: of all of it, or of its first 4096 parts.
    pub async fn extents(&self, offset: u64, len: u64) -> Result<Vec<blockdev::Extent>, Errno> {
        let offset = self.core.place(self.slot, offset, len)?;
        self.core.extents(offset / BLOCK as u64..(offset + len) / BLOCK as u64).await
    }

    /// Makes every change acknowledged so far durable, as the volume's durability means it.
    pub async fn flush(&self) -> Result<(), Errno> {
        let core = &self.core;
        if core.settings.durability == Durability::Local {
            return core.log.sync().await;
        }
        core.publish_all().await
    }

    /// Brings everything acknowledged into the pool.
    pub async fn destage(&self) -> Result<(), Errno> {
        self.core.publish_all().await
    }

    /// Makes the volume as it is now a snapshot: what is acknowledged is in it, and what is submitted later is not. When it comes back it is as
    /// durable as a flushed write. `created`: seconds since 1970.
    pub async fn snapshot(&self, name: &str, created: u64) -> Result<(), VolumeError> {
        self.core.snapshot(self.slot, name, created).await
    }

    pub fn snapshots(&self) -> Vec<SnapshotInfo> {
        self.core.list_snapshots(self.slot)
    }

    /// Comes back when the snapshot is in the pool, and can be read and cloned from anywhere.
    pub async fn wait_for_snapshot(&self, name: &str) -> Result<(), VolumeError> {
        self.core.committed_snapshot(&self.name(name)).await.map(drop)
    }

    /// Deletes a snapshot that has no clones.
    pub async fn delete_snapshot(&self, name: &str) -> Result<(), VolumeError> {
        self.core.delete_snapshot(&self.name(name)).await
    }

    /// The volume's content and size become the snapshot's. The caller lets nobody write meanwhile.
    pub async fn roll_back(&self, name: &str) -> Result<(), VolumeError> {
        self.roll_back_if_wanted(name, &Progress::default()).await
    }

    pub(crate) async fn roll_back_if_wanted(&self, name: &str, asked: &Progress) -> Result<(), VolumeError> {
        self.core.roll_back(&self.name(name), asked).await
    }

    /// The ranges, in bytes, in which two snapshots may differ, or a snapshot and the volume as it is in the pool (`to`: `None`). In order and
    /// joined; those that begin at or after `from`, or contain it, and not more than `ranges_max`.
    pub async fn diff(
        &self,
        before: &str,
        to: Option<&str>,
        from: u64,
        ranges_max: usize,
    ) -> Result<Vec<std::ops::Range<u64>>, VolumeError> {
        self.core.diff(self.slot, before, to, from, ranges_max).await
    }

    /// Gives the volume another size, a multiple of 4096 bytes. What lies past a smaller one is gone; the caller lets nobody write meanwhile.
    pub async fn resize(&self, size: u64) -> Result<(), VolumeError> {
        self.resize_if_wanted(size, &Progress::default()).await
    }

    pub(crate) async fn resize_if_wanted(&self, size: u64, asked: &Progress) -> Result<(), VolumeError> {
        self.core.resize(self.slot, size, asked).await
    }

    /// Reads everything that the volume and its snapshots hold in the pool: what cannot be read, one sentence each. `progress` is told bytes.
    pub async fn scrub(&self, progress: &Progress) -> Result<Vec<String>, VolumeError> {
        self.core.scrub(self.slot, progress).await
    }

    /// Brings the map in the pool up to what the pool has.
    pub async fn checkpoint(&self) -> Result<(), VolumeError> {
        self.core.checkpoint().await
    }

    /// Frees what nothing refers to, and rewrites objects of which no larger share than `below` is in use.
    pub async fn gather(&self, below: f64) -> Result<crate::gather::Gathered, VolumeError> {
        self.core.collect(crate::gather::Which::Below(below)).await
    }
}

impl Chain {
    /// Makes a volume that begins as `meta` says. Does nothing that anyone sees before its last step. A store that takes nothing is an error, so it must
    /// be the only attempt at this group.
    pub(crate) async fn create_volume(&self, meta: Meta, (group, domain): (Group, Group), size: u64) -> Result<(), VolumeError> {
        let source = Source { group, family: Family::Meta, epoch: 0, number: 0 };
        let mut random = [0; 32];
        self.environment.random(&mut random);
        let sealed = meta.seal(&self.secrets.sealer(domain), &source, &random)?;
        match self.publish_or_fail(&source, &sealed.header, &sealed.body).await {
            Err(VolumeError::Fenced) => return Err(VolumeError::VolumeExists),
            published => published?,
        }
        let checkpoint = Checkpoint { meta: (0, 0), ..Checkpoint::default() };
        let (owner, log_id) = ([0; 16], LogId::default());
        let root = Root { group, domain, epoch: 0, owner, log_id, is_local: false, is_deleted: false, size, checkpoint };
        self.create(&root).await
    }
}
