//! A mapped volume as a block device.
//!
//! ```text
//!   data-plane thread                      home thread of the volume
//!   MappedQueue ── Job (bytes copied) ──▶ engine: Tasks · MappedGroup · DeviceLog
//!        ▲                                     │
//!        └──────── posted result ◀─────────────┘
//! ```
//!
//! The engine lives on one thread, its home; queues on any thread send it their requests, and those of its own thread hand them over. Bytes are copied before they are sent: a guest may
//! change its memory at any time, and what is hashed and stored must not change.

mod engine;
mod group;
mod log_disk;
mod options;
mod queue;
mod tasks;

use std::ops::Range;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use backends::{EngineUse, Shares};
use blockdev::null_disk::NullDisk;
use blockdev::{BlockDevice, Capabilities, DeviceError, Geometry, IoQueue, Reactor, ReactorHandle};
use uuid::Uuid;

use crate::clone::SnapshotView;
use crate::environment::LocalFuture;
use crate::error::VolumeError;
use crate::gather::Gathered;
use crate::mapped::MappedVolume;
use crate::names::Slot;
use crate::progress::Progress;
use crate::segment::BLOCK;
use crate::snapshots::SnapshotInfo;
use engine::{Content, Home};
pub use group::GroupDevice;
use group::PATIENCE;
pub use options::MappedOptions;
use queue::MappedQueue;

/// The same, while clients of the volume wait.
const PATIENCE_HELD: Duration = Duration::from_secs(2);

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

/// The device. When no device of its group is left, the group is closed; what was acknowledged and is not yet in the pool stays in the log.
pub struct MappedDevice {
    group: Arc<GroupDevice>,
    slot: Slot,
    size: AtomicU64,
}

impl MappedDevice {
    /// Opens a volume and its group, which nobody has open. `log` carries its log; nobody else uses it meanwhile. Blocks; never call it from a
    /// data-plane thread.
    pub fn open(options: MappedOptions, log: Arc<dyn BlockDevice>) -> Result<MappedDevice, OpenError> {
        Arc::new(GroupDevice::open(&options, log)?).volume(options.volume)
    }

    fn ask<T: Send + 'static>(&self, question: impl FnOnce(&MappedVolume) -> T + Send + 'static) -> Option<T> {
        let slot = self.slot;
        self.group.home.ask(move |group| question(&group.at(slot)))
    }

    fn run<T: Send + 'static>(
        &self,
        work: impl FnOnce(MappedVolume) -> LocalFuture<'static, Result<T, VolumeError>> + Send + 'static,
    ) -> Result<T, OpenError> {
        let slot = self.slot;
        self.group.home.run(move |group| work(group.at(slot)))
    }

    /// The same, unless the pool takes nothing for so long: then it goes on by itself.
    fn run_unless_stuck<T: Send + 'static>(
        &self,
        limit: Duration,
        work: impl FnOnce(MappedVolume) -> LocalFuture<'static, Result<T, VolumeError>> + Send + 'static,
    ) -> Result<T, OpenError> {
        let slot = self.slot;
        self.group.run_unless_stuck(limit, move |group| work(group.at(slot)))
    }

    /// The same for work that comes on, or may not go on when nobody waits for it any more.
    fn run_telling<T: Send + 'static>(
        &self,
        tell: &dyn Fn(u64, u64),
        work: impl FnOnce(MappedVolume, Arc<Progress>) -> LocalFuture<'static, Result<T, VolumeError>> + Send + 'static,
    ) -> Result<T, OpenError> {
        let slot = self.slot;
        self.group.run_telling(PATIENCE, tell, move |group, progress| work(group.at(slot), progress))
    }

    /// What it uses; `None` if its thread does not say. Blocks for a moment; never call it from a data-plane thread.
    pub fn usage(&self) -> Option<EngineUse> {
        self.ask(|volume| volume.usage())
    }

    /// See [`MappedVolume::snapshot`]. Blocks, as all of the following do. Where the pool takes nothing, they fail after a while, and what has to do with
    /// snapshots goes on.
    pub fn snapshot(&self, name: &str, created: u64) -> Result<(), OpenError> {
        let name = name.to_owned();
        self.run_unless_stuck(PATIENCE_HELD, move |volume| Box::pin(async move { volume.snapshot(&name, created).await }))
    }

    /// Those that are there or on their way. Not told by an owner that was replaced: others may be there by now.
    pub fn snapshots(&self) -> Result<Vec<SnapshotInfo>, OpenError> {
        self.run(|volume| Box::pin(async move { volume.failed().map_or_else(|| Ok(volume.snapshots()), Err) }))
    }

    /// Comes back when the snapshot is in the pool.
    pub fn wait_for_snapshot(&self, name: &str) -> Result<(), OpenError> {
        let name = name.to_owned();
        self.run_unless_stuck(PATIENCE, move |volume| Box::pin(async move { volume.wait_for_snapshot(&name).await }))
    }

    /// See [`MappedVolume::delete_snapshot`].
    pub fn delete_snapshot(&self, name: &str) -> Result<(), OpenError> {
        self.delete_within(name, PATIENCE)
    }

    /// The same for somebody who holds up the volume's clients meanwhile.
    pub fn take_back_snapshot(&self, name: &str) -> Result<(), OpenError> {
        self.delete_within(name, PATIENCE_HELD)
    }

    fn delete_within(&self, name: &str, limit: Duration) -> Result<(), OpenError> {
        let name = name.to_owned();
        self.run_unless_stuck(limit, move |volume| Box::pin(async move { volume.delete_snapshot(&name).await }))
    }

    /// See [`MappedVolume::roll_back`]. The answer is the volume's size, in bytes, which is that of the snapshot.
    pub fn roll_back(&self, name: &str) -> Result<u64, OpenError> {
        let name = name.to_owned();
        let size = self.run_telling(&|_, _| {}, move |volume, asked| {
            Box::pin(async move {
                volume.roll_back_if_wanted(&name, &asked).await?;
                Ok(volume.size())
            })
        })?;
        self.size.store(size, Ordering::Release);
        Ok(size)
    }

    /// See [`MappedVolume::flatten`]. `progress` is told bytes done and in all, by this thread.
    pub fn flatten(&self, progress: &dyn Fn(u64, u64)) -> Result<bool, OpenError> {
        let work =
            |volume: MappedVolume, told| -> LocalFuture<'static, _> { Box::pin(async move { volume.flatten(told).await }) };
        self.run_telling(progress, work)
    }

    /// See [`MappedVolume::scrub`].
    pub fn scrub(&self, progress: &dyn Fn(u64, u64)) -> Result<Vec<String>, OpenError> {
        let work = |volume: MappedVolume, told: Arc<Progress>| -> LocalFuture<'static, _> {
            Box::pin(async move { volume.scrub(&told).await })
        };
        self.run_telling(progress, work)
    }

    /// See [`MappedVolume::shares`].
    pub fn shares(&self) -> Result<Shares, OpenError> {
        self.run(|volume| Box::pin(async move { volume.shares().await }))
    }

    /// What the pool does not take of this volume, in words that stay the same as long as it lasts. Blocks for a moment; never call it from a data-plane thread.
    pub fn trouble(&self) -> Option<String> {
        let found = self.ask(|volume| volume.pool_trouble().map(|trouble| (trouble, volume.now()))).flatten();
        found.map(|(trouble, now)| self.group.told_trouble(trouble, now))
    }

    /// Whether another host has taken it over. Blocks for a moment; never call it from a data-plane thread.
    pub fn is_taken_over(&self) -> bool {
        self.ask(|volume| volume.failed() == Some(VolumeError::Fenced)) == Some(true)
    }

    /// See [`MappedVolume::gather`].
    pub fn gather(&self, below: f64) -> Result<Gathered, OpenError> {
        self.run(move |volume| Box::pin(async move { volume.gather(below).await }))
    }

    /// Brings everything acknowledged into the pool, and the map up to it.
    pub fn settle(&self) -> Result<(), OpenError> {
        self.run(|volume| {
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
        let diff = move |volume: MappedVolume| -> LocalFuture<'static, _> {
            Box::pin(async move { volume.diff(&before, to.as_deref(), from, ranges_max).await })
        };
        self.run_unless_stuck(PATIENCE, diff)
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
            // Failures of the engine are never taken back, and are looked at before anything is told to be durable: after a flush has failed, all that
            // was not flushed before it, and every write and flush after it, fails until the volume is opened anew.
            flush_failure_loses_writes: false,
        }
    }

    fn open_queue(&self, reactor: &Rc<Reactor>) -> Result<Box<dyn IoQueue>, DeviceError> {
        Ok(Box::new(MappedQueue::new(reactor, self.group.home.thread().clone(), (self.group.home.number(), self.slot))))
    }

    fn resize(&self, size: u64) -> Result<(), DeviceError> {
        let resize = move |volume: MappedVolume, asked: Arc<Progress>| -> LocalFuture<'static, _> {
            Box::pin(async move { volume.resize_if_wanted(size, &asked).await })
        };
        let resized = self.run_telling(&|_, _| {}, resize);
        resized.map_err(|error| match error {
            OpenError::Volume(error) => DeviceError::Refused(error.to_string()),
            OpenError::Device(error) => error,
        })?;
        self.size.store(size, Ordering::Release);
        Ok(())
    }

    fn home(&self) -> Option<ReactorHandle> {
        Some(self.group.home.thread().clone())
    }

    fn health(&self) -> Option<String> {
        if self.group.home.is_ended() {
            let why = "its group was closed, to be opened anew for another of its volumes";
            return Some(format!("{why}; no I/O succeeds until it is opened anew too: `novastor export reopen` does that"));
        }
        let ask = |volume: &MappedVolume| {
            let trouble = volume.trouble().map(|trouble| (trouble, volume.now()));
            (volume.failed(), trouble, volume.last_read_error())
        };
        let Some((failed, trouble, unread)) = self.ask(ask) else { return Some("its engine does not answer".to_owned()) };
        if let Some(error) = failed {
            return Some(format!("{error}; no I/O succeeds until it is opened anew: `novastor export reopen` does that"));
        }
        match trouble {
            Some((trouble, now)) => {
                let outlook = self.group.told_outlook(&trouble.cause);
                Some(format!("{}; {outlook}", self.group.told_trouble(trouble, now)))
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
        let (id, snapshot) = (options.id(), snapshot.to_owned());
        let log: Arc<dyn BlockDevice> = Arc::new(NullDisk::new(0));
        let open = move |parts| -> LocalFuture<'static, engine::Begun<u64>> {
            Box::pin(async move {
                let view = SnapshotView::open(&parts, id, &snapshot).await?;
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
        Ok(Box::new(MappedQueue::new(reactor, self.home.thread().clone(), (self.home.number(), 0))))
    }

    fn home(&self) -> Option<ReactorHandle> {
        Some(self.home.thread().clone())
    }

    fn resize(&self, _size: u64) -> Result<(), DeviceError> {
        Err(DeviceError::Unsupported("a snapshot keeps its size".into()))
    }
}
