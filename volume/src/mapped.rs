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

use std::cell::{Cell, RefCell};
use std::rc::Rc;
use std::time::Duration;

use backends::segments::SegmentStore;
use backends::{EngineUse, Shares};
use blockdev::Errno;
use bytes::Bytes;
use dedup::BLOCK_LEN;
use dedup::frame::Allowed;

use crate::backlog::Backlog;
use crate::chain::{Chain, Claimed};
use crate::core::{Core, Layer, Map, SnapshotState};
use crate::deduplication::Deduplication;
use crate::disk::LogDisk;
use crate::environment::{Environment, random_id};
use crate::error::VolumeError;
use crate::keeper::Keeper;
use crate::log::{self, Log, LogId, LogStart, RecordKind, Ring, Superblock, Tail};
use crate::meta::Meta;
use crate::names::{Family, Group, Source};
use crate::progress::Progress;
use crate::reader::Reader;
use crate::reduce::Secrets;
use crate::root::{Checkpoint, Root};
use crate::segment::{BLOCK, Place, Segment};
use crate::signal::{Asked, Lock, Signal, answer};
use crate::snapshots::SnapshotInfo;
use crate::troubles::Trouble;

/// A step is cut early when so much of the log is in use.
const PRESSURE: f64 = 0.5;
/// How often a claim may lose against a checkpoint of the owner before.
const CLAIM_TRIES: u32 = 16;
/// The index is made for so many bytes of unique blocks at least.
const INDEXED_MIN: u64 = 64 << 30;

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
    /// Pointers that a collection keeps in memory, 16 bytes each. With more, only how many lead to the fullest objects is remembered, and these are not
    /// rewritten by it.
    pub marked_max: usize,
}

impl Default for Settings {
    fn default() -> Settings {
        Settings {
            durability: Durability::Local,
            segment_bytes: 32 << 20,
            accept_loss: false,
            checkpoint_segments: 64,
            compression: Allowed::Auto,
            deduplicate: true,
            page_cache_bytes: 64 << 20,
            kept_bytes: 96 << 20,
            gathers: true,
            slice: 128,
            marked_max: 1 << 20,
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

/// The handle. Requests may run concurrently; their futures borrow it.
pub struct MappedVolume {
    pub(crate) core: Rc<Core>,
}

impl MappedVolume {
    /// Makes an empty volume of `size` bytes, a multiple of 4096. `group` is a UUID that no other volume has or had.
    pub async fn create(parts: &Parts, group: Group, size: u64) -> Result<(), VolumeError> {
        if size == 0 || !size.is_multiple_of(BLOCK as u64) {
            return Err(VolumeError::BadSize);
        }
        let meta = Meta::empty(group, size / BLOCK as u64);
        parts.chain(group).create_volume(meta, (group, group), size, true).await
    }

    /// Takes the volume over from whoever had it and brings it back to what was acknowledged last.
    pub async fn open(parts: &Parts, group: Group, settings: Settings) -> Result<MappedVolume, VolumeError> {
        let chain = parts.chain(group);
        let is_local = settings.durability == Durability::Local;
        let mut tries = 0;
        let (before, superblock, is_new, cipher, claimed) = loop {
            let (before, tag) = chain.read_root().await?;
            let (superblock, is_new) = log_for(parts, &before, settings.accept_loss).await?;
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
        log::make_durable(&*parts.disk, ring, &found).await?;

        let backlog = Rc::new(Backlog::new(from, settings.segment_bytes, settings.kept_bytes));
        for batch in &found {
            log::follow(&*backlog, &batch.header, batch.end, ring.sector(), &[]);
        }
        let tail = found.last().map_or(from, |batch| batch.end);
        let changed = backlog.end();
        let start = LogStart { log_id, ring, epoch: claimed.root.epoch, trimmed: from.position, tail, cipher };
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
        Ok(MappedVolume { core })
    }

    /// Bytes.
    pub fn size(&self) -> u64 {
        self.core.size()
    }

    /// Why it does not go on, if it does not.
    pub fn failed(&self) -> Option<VolumeError> {
        self.core.failure()
    }

    /// What could not be read when it was needed last, for a client, a checkpoint or a collection of garbage.
    pub fn last_read_error(&self) -> Option<VolumeError> {
        self.core.last_unread.borrow().clone()
    }

    /// What the pool does not take now of a volume that goes on, if that is so.
    pub fn trouble(&self) -> Option<Trouble> {
        let goes_on = self.core.failure().is_none();
        self.core.chain.troubles.worst(self.now()).filter(|_| goes_on)
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
        self.core.shares().await
    }

    /// The most bytes of one write: a multiple of 4096.
    pub fn write_max(&self) -> usize {
        self.core.log.payload_max() / BLOCK * BLOCK
    }

    /// Nothing is acknowledged any more.
    pub fn close(&self) {
        self.core.log.fail(Errno::ESHUTDOWN);
        self.core.changed.notify();
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
        match self.core.check_range(offset, len) {
            Ok(()) => self.append_for(Asked::call(then), RecordKind::Write, offset, len, bytes),
            Err(errno) => then(Err(errno)),
        }
    }

    /// Makes whole blocks read as zeroes; `discard`: because their content no longer matters.
    pub async fn zero(&self, offset: u64, len: u64, discard: bool) -> Result<(), Errno> {
        let kind = if discard { RecordKind::Discard } else { RecordKind::Zero };
        self.change(kind, offset, len, Bytes::new()).await
    }

    async fn change(&self, kind: RecordKind, offset: u64, len: u64, payload: Bytes) -> Result<(), Errno> {
        self.core.check_range(offset, len)?;
        let (asked, answer) = answer();
        self.append_for(asked, kind, offset, len, payload);
        answer.get().await
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
        self.core.check_range(offset, len)?;
        self.core.read(offset / BLOCK as u64..(offset + len) / BLOCK as u64).await
    }

    /// What the parts of a range hold, in order and without gaps: of all of it, or of its first 4096 parts.
    pub async fn extents(&self, offset: u64, len: u64) -> Result<Vec<blockdev::Extent>, Errno> {
        self.core.check_range(offset, len)?;
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
        self.core.snapshot(name, created).await
    }

    pub fn snapshots(&self) -> Vec<SnapshotInfo> {
        self.core.list_snapshots()
    }

    /// Comes back when the snapshot is in the pool, and can be read and cloned from anywhere.
    pub async fn wait_for_snapshot(&self, name: &str) -> Result<(), VolumeError> {
        self.core.committed_snapshot(name).await.map(drop)
    }

    /// Deletes a snapshot that has no clones.
    pub async fn delete_snapshot(&self, name: &str) -> Result<(), VolumeError> {
        self.core.delete_snapshot(name).await
    }

    /// The volume's content and size become the snapshot's. The caller lets nobody write meanwhile.
    pub async fn roll_back(&self, name: &str) -> Result<(), VolumeError> {
        self.core.roll_back(name).await
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
        self.core.diff(before, to, from, ranges_max).await
    }

    /// Gives the volume another size, a multiple of 4096 bytes. What lies past a smaller one is gone; the caller lets nobody write meanwhile.
    pub async fn resize(&self, size: u64) -> Result<(), VolumeError> {
        self.core.resize(size).await
    }

    /// Reads everything that the volume and its snapshots hold in the pool: what cannot be read, one sentence each. `progress` is told bytes.
    pub async fn scrub(&self, progress: &Progress) -> Result<Vec<String>, VolumeError> {
        self.core.scrub(progress).await
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

/// The log on this host, if the volume's last owner wrote it; otherwise one that is new, or was made by an opening that came no further.
async fn log_for(parts: &Parts, root: &Root, accept_loss: bool) -> Result<(Superblock, bool), VolumeError> {
    let found = Superblock::read(&*parts.disk).await?;
    let reused = match found {
        Some(found) if found.group != root.group => return Err(VolumeError::ForeignLog),
        Some(found) if found.log_id == root.log_id => return Ok((found, false)),
        Some(found) if !log::is_unused(&*parts.disk, &found).await? => return Err(VolumeError::StaleLog),
        found => found,
    };
    if root.is_local && !accept_loss {
        return Err(VolumeError::LogMissing);
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
fn log_end(checkpoint: &Checkpoint, segments: &[Segment], log_id: LogId) -> Tail {
    let of_this_log = |segment: &Segment| (segment.step.log_id == log_id).then_some(segment.step.log_end);
    let in_checkpoint = if checkpoint.log_id == log_id { checkpoint.log_end } else { Tail::default() };
    segments.iter().rev().find_map(of_this_log).unwrap_or(in_checkpoint)
}

async fn new_core(
    chain: Chain,
    log: Rc<Log>,
    backlog: Rc<Backlog>,
    settings: Settings,
    claimed: Claimed,
    from: Tail,
) -> Result<Rc<Core>, VolumeError> {
    let Claimed { root, tag, meta, segments } = claimed;
    let Meta { tree, parent, table, doomed, snapshots } = meta;
    let pages_max = settings.page_cache_bytes / BLOCK_LEN;
    let map = Map { tree, layers: Vec::new(), open: Layer::default(), segments: 0, place: root.checkpoint.place, log_end: from };
    let indexed = settings.deduplicate.then_some(root.size.max(INDEXED_MIN));
    let committed = snapshots.into_iter().map(|snapshot| (snapshot.name.clone(), SnapshotState::Committed(snapshot)));
    let core = Rc::new(Core {
        log,
        backlog,
        keeper: Keeper::new(chain.clone(), root, tag),
        reader: Reader::new(&chain, &root, table, pages_max),
        chain,
        settings,
        map: RefCell::new(map),
        snapshots: RefCell::new(committed.collect()),
        parent: Cell::new(parent),
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

impl Chain {
    /// Makes a volume that begins as `meta` says. Does nothing that anyone sees before its last step. It waits for a store that takes nothing, unless
    /// `fails`: then it must be the only attempt at this group.
    pub(crate) async fn create_volume(
        &self,
        meta: Meta,
        (group, domain): (Group, Group),
        size: u64,
        fails: bool,
    ) -> Result<(), VolumeError> {
        let source = Source { group, family: Family::Meta, epoch: 0, number: 0 };
        let mut random = [0; 32];
        self.environment.random(&mut random);
        let sealed = meta.seal(&self.secrets.sealer(domain), &source, &random)?;
        let published = match fails {
            true => self.publish_or_fail(&source, &sealed.header, &sealed.body).await,
            false => self.publish(&source, &sealed.header, &sealed.body).await,
        };
        match published {
            Err(VolumeError::Fenced) => return Err(VolumeError::VolumeExists),
            published => published?,
        }
        let checkpoint = Checkpoint { meta: (0, 0), ..Checkpoint::default() };
        let (owner, log_id) = ([0; 16], LogId::default());
        let root = Root { group, domain, epoch: 0, owner, log_id, is_local: false, is_deleted: false, size, checkpoint };
        self.create(&root, fails).await
    }
}
