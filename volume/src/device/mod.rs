//! A mapped volume as a block device.
//!
//! ```text
//!   data-plane thread                      home thread of the volume
//!   MappedQueue ── Job (bytes copied) ──▶ engine: Tasks · MappedVolume · DeviceLog
//!        ▲                                     │
//!        └──────── posted result ◀─────────────┘
//! ```
//!
//! The engine lives on one thread, its home; queues on any thread send it their requests, and those of its own thread hand them over. Bytes are copied before they are sent: a guest may
//! change its memory at any time, and what is hashed and stored must not change.

mod engine;
mod log_disk;
mod queue;
mod tasks;

use std::ops::Range;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use backends::segments::SegmentStore;
use backends::{EngineUse, ReducedUsage, Shares};
use blockdev::null_disk::NullDisk;
use blockdev::{BlockDevice, Capabilities, DeviceError, Geometry, IoQueue, Reactor, ReactorHandle, clock};
use parking_lot::Mutex;
use uuid::Uuid;

use crate::clone::{SnapshotView, clone_snapshot, delete_volume, diff_snapshots, refuse_clones};
use crate::environment::LocalFuture;
use crate::error::VolumeError;
use crate::gather::Gathered;
use crate::mapped::{MappedVolume, Parts, Settings};
use crate::progress::Progress;
use crate::reduce::Secrets;
use crate::segment::BLOCK;
use crate::shares::shares_in_store;
use crate::snapshots::SnapshotInfo;
use crate::troubles::Trouble;
use engine::{Content, Home};
use queue::MappedQueue;

/// What a mapped volume is made and opened with.
#[derive(Clone)]
pub struct MappedOptions {
    /// The volume and what it may share; names it in the store.
    pub group: Uuid,
    pub store: Arc<dyn SegmentStore + Send + Sync>,
    pub settings: Settings,
    pub secrets: Secrets,
    /// The thread that the engine lives on.
    pub home: ReactorHandle,
}

/// Why a mapped volume could not be made or opened, or did not do what it was asked for.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    #[error(transparent)]
    Volume(#[from] VolumeError),
    #[error(transparent)]
    Device(#[from] DeviceError),
}

/// The name of a volume in its store.
pub(crate) fn name_of(group: Uuid) -> String {
    crate::names::group_path(group.as_bytes())
}

impl MappedOptions {
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

    /// Makes an empty volume of `size` bytes. Blocks.
    pub fn create(&self, size: u64) -> Result<(), OpenError> {
        let group = self.group.into_bytes();
        self.in_store(move |parts| Box::pin(async move { MappedVolume::create(&parts, group, size).await }))
    }

    /// Makes volume `to` begin as a snapshot of this one that is in the pool, and gives its size in bytes. Blocks.
    pub fn clone_snapshot(&self, snapshot: &str, to: Uuid) -> Result<u64, OpenError> {
        let (group, snapshot, to) = (self.group.into_bytes(), snapshot.to_owned(), to.into_bytes());
        self.in_store(move |parts| Box::pin(async move { clone_snapshot(&parts, group, &snapshot, to).await }))
    }

    /// Refuses a volume whose snapshots have clones. Blocks.
    pub fn refuse_clones(&self) -> Result<(), OpenError> {
        let group = self.group.into_bytes();
        self.in_store(move |parts| Box::pin(async move { refuse_clones(&parts, group).await }))
    }

    /// Ends the volume and removes everything of it; can be repeated. Blocks.
    pub fn delete(&self) -> Result<(), OpenError> {
        let group = self.group.into_bytes();
        self.in_store(move |parts| Box::pin(async move { delete_volume(&parts, group).await }))
    }

    /// What the volume keeps in the pool, as its newest checkpoint says. Blocks.
    pub fn usage(&self) -> Result<ReducedUsage, OpenError> {
        let group = self.group.into_bytes();
        self.in_store(move |parts| Box::pin(async move { Ok(parts.chain(group).read_meta().await?.1.table.usage()) }))
    }

    /// What its blocks in the pool are for, as its newest checkpoint says. Reads the whole map; blocks.
    pub fn shares(&self) -> Result<Shares, OpenError> {
        let group = self.group.into_bytes();
        self.in_store(move |parts| Box::pin(async move { shares_in_store(&parts, group).await }))
    }

    /// The ranges, in bytes, in which two snapshots that are in the pool may differ: see [`MappedVolume::diff`]. Blocks.
    pub fn diff_snapshots(&self, before: &str, to: &str, from: u64, ranges_max: usize) -> Result<Vec<Range<u64>>, OpenError> {
        let (group, before, to) = (self.group.into_bytes(), before.to_owned(), to.to_owned());
        self.in_store(move |parts| Box::pin(async move { diff_snapshots(&parts, group, [&before, &to], from, ranges_max).await }))
    }

    /// Forgets a clone of this volume that was not made, or is no more. Blocks.
    pub fn unpin(&self, clone: Uuid) -> Result<(), OpenError> {
        let (group, clone) = (self.group.into_bytes(), clone.into_bytes());
        self.in_store(move |parts| Box::pin(async move { crate::clone::unpin(&parts, group, clone).await }))
    }
}

/// The device. Dropping it closes the volume; what was acknowledged and is not yet in the pool stays in the log.
pub struct MappedDevice {
    home: Home,
    size: AtomicU64,
    /// When the pool began to take nothing, by the engine's clock and by the calendar.
    trouble_since: Mutex<Option<(Duration, SystemTime)>>,
}

impl MappedDevice {
    /// Opens a volume. `log` carries its log; nobody else uses it meanwhile. Blocks; never call it from a data-plane thread.
    pub fn open(options: MappedOptions, log: Arc<dyn BlockDevice>) -> Result<MappedDevice, OpenError> {
        let (group, settings) = (options.group.into_bytes(), options.settings);
        let open = move |parts| -> LocalFuture<'static, engine::Begun<u64>> {
            Box::pin(async move {
                let volume = MappedVolume::open(&parts, group, settings).await?;
                let size = volume.size();
                Ok((Some(Content::Volume(Rc::new(volume))), size))
            })
        };
        let (home, size) = Home::start(&options, &log, open)?;
        Ok(MappedDevice { home, size: AtomicU64::new(size), trouble_since: Mutex::default() })
    }

    /// What it uses; `None` if its thread does not say. Blocks for a moment; never call it from a data-plane thread.
    pub fn usage(&self) -> Option<EngineUse> {
        self.home.ask(|volume| volume.usage())
    }

    /// See [`MappedVolume::snapshot`]. Blocks, as all of the following do.
    pub fn snapshot(&self, name: &str, created: u64) -> Result<(), OpenError> {
        let name = name.to_owned();
        self.home.run(move |volume| Box::pin(async move { volume.snapshot(&name, created).await }))
    }

    /// Those that are there or on their way. Not told by an owner that was replaced: others may be there by now.
    pub fn snapshots(&self) -> Result<Vec<SnapshotInfo>, OpenError> {
        self.home.run(|volume| Box::pin(async move { volume.failed().map_or_else(|| Ok(volume.snapshots()), Err) }))
    }

    /// Comes back when the snapshot is in the pool.
    pub fn wait_for_snapshot(&self, name: &str) -> Result<(), OpenError> {
        let name = name.to_owned();
        self.home.run(move |volume| Box::pin(async move { volume.wait_for_snapshot(&name).await }))
    }

    /// See [`MappedVolume::delete_snapshot`].
    pub fn delete_snapshot(&self, name: &str) -> Result<(), OpenError> {
        let name = name.to_owned();
        self.home.run(move |volume| Box::pin(async move { volume.delete_snapshot(&name).await }))
    }

    /// See [`MappedVolume::roll_back`]. The answer is the volume's size, in bytes, which is that of the snapshot.
    pub fn roll_back(&self, name: &str) -> Result<u64, OpenError> {
        let name = name.to_owned();
        let size = self.home.run(move |volume| {
            Box::pin(async move {
                volume.roll_back(&name).await?;
                Ok(volume.size())
            })
        })?;
        self.size.store(size, Ordering::Release);
        Ok(size)
    }

    /// See [`MappedVolume::flatten`]. `progress` is told bytes done and in all, by this thread.
    pub fn flatten(&self, progress: &dyn Fn(u64, u64)) -> Result<bool, OpenError> {
        let work =
            |volume: Rc<MappedVolume>, told| -> LocalFuture<'static, _> { Box::pin(async move { volume.flatten(told).await }) };
        self.home.run_telling(progress, work)
    }

    /// See [`MappedVolume::scrub`].
    pub fn scrub(&self, progress: &dyn Fn(u64, u64)) -> Result<Vec<String>, OpenError> {
        let work = |volume: Rc<MappedVolume>, told: Arc<Progress>| -> LocalFuture<'static, _> {
            Box::pin(async move { volume.scrub(&told).await })
        };
        self.home.run_telling(progress, work)
    }

    /// See [`MappedVolume::shares`].
    pub fn shares(&self) -> Result<Shares, OpenError> {
        self.home.run(|volume| Box::pin(async move { volume.shares().await }))
    }

    /// What the pool does not take of this volume, in words that stay the same as long as it lasts. Blocks for a moment; never call it from a data-plane thread.
    pub fn trouble(&self) -> Option<String> {
        let found = self.home.ask(|volume| volume.trouble().map(|trouble| (trouble, volume.now()))).flatten();
        self.told_trouble(found)
    }

    fn told_trouble(&self, found: Option<(Trouble, Duration)>) -> Option<String> {
        let mut known = self.trouble_since.lock();
        let Some((Trouble { since, error }, now)) = found else {
            *known = None;
            return None;
        };
        // Told by one clock and meant by another, the beginning would seem to move.
        let wall =
            known.filter(|(of, _)| *of == since).map_or_else(|| clock::wall() - now.saturating_sub(since), |(_, wall)| wall);
        *known = Some((since, wall));
        let seconds = wall.duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs());
        Some(format!("the pool takes nothing since {}: {error}", clock::format_utc(seconds)))
    }

    /// See [`MappedVolume::gather`].
    pub fn gather(&self, below: f64) -> Result<Gathered, OpenError> {
        self.home.run(move |volume| Box::pin(async move { volume.gather(below).await }))
    }

    /// Brings everything acknowledged into the pool, and the map up to it.
    pub fn settle(&self) -> Result<(), OpenError> {
        self.home.run(|volume| {
            Box::pin(async move {
                let failed = |_| volume.failed().unwrap_or(VolumeError::Fenced);
                volume.destage().await.map_err(failed)?;
                volume.checkpoint().await
            })
        })
    }

    /// See [`MappedVolume::diff`].
    pub fn diff(&self, before: &str, to: Option<&str>, from: u64, ranges_max: usize) -> Result<Vec<Range<u64>>, OpenError> {
        let (before, to) = (before.to_owned(), to.map(str::to_owned));
        self.home.run(move |volume| Box::pin(async move { volume.diff(&before, to.as_deref(), from, ranges_max).await }))
    }
}

fn geometry_of(size: u64) -> Geometry {
    let block_size = BLOCK as u32;
    Geometry { size, block_size, memory_alignment: 1, preferred_size: block_size, discard_granularity: block_size }
}

impl BlockDevice for MappedDevice {
    fn geometry(&self) -> Geometry {
        geometry_of(self.size.load(Ordering::Acquire))
    }

    fn capabilities(&self) -> Capabilities {
        Capabilities {
            writable: true,
            discard: true,
            write_zeroes: true,
            fast_zero: true,
            fua: true,
            block_status: true,
            caches_reads: false,
            flush_failure_loses_writes: true,
        }
    }

    fn open_queue(&self, reactor: &Rc<Reactor>) -> Result<Box<dyn IoQueue>, DeviceError> {
        Ok(Box::new(MappedQueue::new(reactor, self.home.thread().clone(), self.home.number())))
    }

    fn resize(&self, size: u64) -> Result<(), DeviceError> {
        let resized = self.home.run(move |volume| Box::pin(async move { volume.resize(size).await }));
        resized.map_err(|error| match error {
            OpenError::Volume(error) => DeviceError::Refused(error.to_string()),
            OpenError::Device(error) => error,
        })?;
        self.size.store(size, Ordering::Release);
        Ok(())
    }

    fn home(&self) -> Option<ReactorHandle> {
        Some(self.home.thread().clone())
    }

    fn health(&self) -> Option<String> {
        let ask = |volume: &MappedVolume| {
            let trouble = volume.trouble().map(|trouble| (trouble, volume.now()));
            (volume.failed(), trouble, volume.last_read_error())
        };
        let Some((failed, trouble, unread)) = self.home.ask(ask) else { return Some("its engine does not answer".to_owned()) };
        if let Some(error) = failed {
            return Some(format!("{error}; no I/O succeeds until it is opened anew: `novastor export reopen` does that"));
        }
        match self.told_trouble(trouble) {
            Some(trouble) => {
                Some(format!("{trouble}; writes wait in the local log, and go on by themselves when that is mended"))
            }
            None => unread.map(|error| format!("a read failed: {error}")),
        }
    }
}

/// A snapshot as a device that is read only. Its volume may be open, here or elsewhere, or not.
pub struct SnapshotDevice {
    home: Home,
    size: u64,
}

impl SnapshotDevice {
    /// Opens a snapshot that is in the pool. Blocks; never call it from a data-plane thread.
    pub fn open(options: &MappedOptions, snapshot: &str) -> Result<SnapshotDevice, OpenError> {
        let (group, snapshot) = (options.group.into_bytes(), snapshot.to_owned());
        let log: Arc<dyn BlockDevice> = Arc::new(NullDisk::new(0));
        let open = move |parts| -> LocalFuture<'static, engine::Begun<u64>> {
            Box::pin(async move {
                let view = SnapshotView::open(&parts, group, &snapshot).await?;
                let size = view.size();
                Ok((Some(Content::View(Rc::new(view))), size))
            })
        };
        let (home, size) = Home::start(options, &log, open)?;
        Ok(SnapshotDevice { home, size })
    }
}

impl BlockDevice for SnapshotDevice {
    fn geometry(&self) -> Geometry {
        geometry_of(self.size)
    }

    fn capabilities(&self) -> Capabilities {
        Capabilities {
            writable: false,
            discard: false,
            write_zeroes: false,
            fast_zero: false,
            fua: false,
            block_status: true,
            caches_reads: false,
            flush_failure_loses_writes: false,
        }
    }

    fn open_queue(&self, reactor: &Rc<Reactor>) -> Result<Box<dyn IoQueue>, DeviceError> {
        Ok(Box::new(MappedQueue::new(reactor, self.home.thread().clone(), self.home.number())))
    }

    fn home(&self) -> Option<ReactorHandle> {
        Some(self.home.thread().clone())
    }

    fn resize(&self, _size: u64) -> Result<(), DeviceError> {
        Err(DeviceError::Unsupported("a snapshot keeps its size".into()))
    }
}
