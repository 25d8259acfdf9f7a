//! A volume: one device, opened once, served to any number of queues on any number of threads.
//!
//! ```text
//!   Volume (shared) ── device · range lock · flush gate · size · watchers · statistics
//!      └── VolumeQueue (one per data-plane thread that serves it) ── IoQueue of the device
//! ```
//!
//! Invariants: every request is checked against size and permissions here, and nowhere else; overlapping writes never reach the
//! device together; after a flush failed on a device that may have lost writes, no write and no flush succeeds any more.

mod flush_gate;
mod later;
mod pieces;
mod queue;

use std::cell::RefCell;
use std::collections::HashMap;
use std::rc::{Rc, Weak};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{self, Arc};

use parking_lot::Mutex;

use crate::device::{BlockDevice, Capabilities, DeviceError, Geometry};
use crate::errno::Errno;
use crate::layers::aligned::Aligned;
use crate::layers::zero_fill::ZeroFill;
use crate::range_lock::RangeLock;
use crate::reactor::{Reactor, ReactorHandle};
use crate::stats::{OpStats, Snapshot};
use flush_gate::FlushGate;
use later::LaterDiscards;

pub use queue::VolumeQueue;

/// How a volume is opened.
#[derive(Clone, Debug)]
pub struct VolumeOptions {
    /// As users know it, for messages.
    pub name: String,
    pub read_only: bool,
    /// The logical block size shown to clients: 512 or 4096.
    pub block_size: u32,
}

/// Writes to a volume wait while this lives.
pub struct WriteHold {
    volume: Arc<Volume>,
}

impl Drop for WriteHold {
    fn drop(&mut self) {
        self.volume.ranges.release(0);
    }
}

type Watcher = Box<dyn Fn(u64) + Send + Sync>;

/// An open volume.
pub struct Volume {
    id: u64,
    options: VolumeOptions,
    device: Arc<dyn BlockDevice>,
    size: AtomicU64,
    lock_unit: u32,
    ranges: RangeLock,
    flushes: FlushGate,
    later: LaterDiscards,
    failure: Mutex<Option<String>>,
    last_error: Mutex<Option<String>>,
    watchers: Mutex<Vec<(u64, Watcher)>>,
    stats: Arc<Counters>,
}

/// One set for each thread that serves a volume, or did.
type Counters = Mutex<Vec<Arc<OpStats>>>;

/// Those of all volumes of this process.
static ALL_COUNTERS: Mutex<Vec<sync::Weak<Counters>>> = Mutex::new(Vec::new());

static NEXT_ID: AtomicU64 = AtomicU64::new(1);

thread_local! {
    static QUEUES: RefCell<HashMap<u64, Weak<VolumeQueue>>> = RefCell::new(HashMap::new());
}

impl Volume {
    /// Serves `device`. Requests of any byte granularity are accepted: what the device cannot take as it is goes through an
    /// aligned buffer.
    pub fn new(device: Arc<dyn BlockDevice>, options: VolumeOptions) -> Arc<Volume> {
        let Geometry { size, block_size: lock_unit, .. } = device.geometry();
        let device = Arc::new(Aligned::new(ZeroFill::wrap(device)));
        let stats = Arc::new(Counters::default());
        ALL_COUNTERS.lock().push(Arc::downgrade(&stats));
        Arc::new(Volume {
            id: NEXT_ID.fetch_add(1, Ordering::Relaxed),
            options,
            device,
            size: AtomicU64::new(size),
            lock_unit,
            ranges: RangeLock::default(),
            flushes: FlushGate::default(),
            later: LaterDiscards::default(),
            failure: Mutex::new(None),
            last_error: Mutex::new(None),
            watchers: Mutex::new(Vec::new()),
            stats,
        })
    }

    /// As users know it.
    pub fn name(&self) -> &str {
        &self.options.name
    }

    /// In bytes.
    pub fn size(&self) -> u64 {
        self.size.load(Ordering::Acquire)
    }

    /// The logical block size shown to clients, in bytes.
    pub fn block_size(&self) -> u32 {
        self.options.block_size
    }

    /// The device's own geometry.
    pub fn geometry(&self) -> Geometry {
        Geometry { size: self.size(), ..self.device.geometry() }
    }

    /// What clients may be offered.
    pub fn capabilities(&self) -> Capabilities {
        let device = self.device.capabilities();
        Capabilities { writable: device.writable && !self.options.read_only, write_zeroes: true, fua: true, ..device }
    }

    pub fn is_read_only(&self) -> bool {
        !self.capabilities().writable
    }

    /// The thread whose queues serve the volume with the least work, if they are not all alike.
    pub fn home(&self) -> Option<ReactorHandle> {
        self.device.home()
    }

    /// The calling data-plane thread's queue, made when first asked for and closed when its last user drops it. Users drop it
    /// only after their requests have completed.
    pub fn queue(self: &Arc<Self>, reactor: &Rc<Reactor>) -> Result<Rc<VolumeQueue>, DeviceError> {
        QUEUES.with(|queues| {
            let mut queues = queues.borrow_mut();
            queues.retain(|_, queue| queue.strong_count() > 0);
            if let Some(queue) = queues.get(&self.id).and_then(Weak::upgrade) {
                return Ok(queue);
            }
            let queue = Rc::new(VolumeQueue::open(self, reactor)?);
            queues.insert(self.id, Rc::downgrade(&queue));
            Ok(queue)
        })
    }

    /// Changes the size and tells the watchers. Waits for the writes in flight beyond a smaller size. May block; control plane
    /// only.
    pub fn resize(&self, size: u64) -> Result<(), DeviceError> {
        let old = self.size();
        let outcome = if size < old { self.shrink(size) } else { self.device.resize(size) };
        let now = if outcome.is_ok() { size } else { self.device.geometry().size };
        self.size.store(now, Ordering::Release);
        if outcome.is_ok() || now != old {
            self.set_size(now);
        }
        outcome
    }

    /// A write that reached the device after its end was cut off would bring back what lay there, or make it long again: new
    /// writes are refused first, then those in flight end.
    fn shrink(&self, size: u64) -> Result<(), DeviceError> {
        self.size.store(size, Ordering::Release);
        let unit = u64::from(self.lock_unit);
        let start = size / unit * unit;
        self.ranges.acquire_blocking(start, u64::MAX);
        let outcome = self.device.resize(size);
        self.ranges.release(start);
        outcome
    }

    /// Takes over a size changed by somebody else. May block; control plane only.
    pub fn refresh_size(&self) -> Result<u64, DeviceError> {
        let size = self.device.refresh_size()?;
        if size != self.size() {
            self.set_size(size);
        }
        Ok(size)
    }

    fn set_size(&self, size: u64) {
        self.size.store(size, Ordering::Release);
        for (_, watcher) in self.watchers.lock().iter() {
            watcher(size);
        }
    }

    /// Calls `watcher` with the new size after each resize, on the resizing thread, until [`Volume::unwatch`] with the returned id.
    pub fn watch_size(&self, watcher: impl Fn(u64) + Send + Sync + 'static) -> u64 {
        let id = NEXT_ID.fetch_add(1, Ordering::Relaxed);
        self.watchers.lock().push((id, Box::new(watcher)));
        id
    }

    pub fn unwatch(&self, id: u64) {
        self.watchers.lock().retain(|(other, _)| *other != id);
    }

    /// Waits for the writes in flight and holds back new ones, on every queue, until the guard is dropped: for snapshots at one
    /// point in time. Requests wait meanwhile; nothing fails. Control plane only; keep it short.
    pub fn hold_writes(self: &Arc<Self>) -> WriteHold {
        self.ranges.acquire_blocking(0, u64::MAX);
        WriteHold { volume: self.clone() }
    }

    /// What all threads did so far.
    pub fn stats(&self) -> Snapshot {
        let mut snapshot = Snapshot::default();
        for stats in self.stats.lock().iter() {
            stats.add_to(&mut snapshot);
        }
        snapshot
    }

    /// `Some(why)` while the volume cannot serve everything it should.
    pub fn health(&self) -> Option<String> {
        // A device may ask a data-plane thread, which may want the lock.
        let failure = self.failure.lock().clone();
        match (self.device.health(), failure) {
            (Some(cause), Some(failure)) => Some(format!("{cause}; {failure}")),
            (cause, failure) => cause.or(failure),
        }
    }

    /// The last failed request, in words.
    pub fn last_error(&self) -> Option<String> {
        self.last_error.lock().clone()
    }

    /// Reads and writes completed so far, on all threads, of this volume and of those beside it: they may share a disk.
    fn transfers_everywhere() -> u64 {
        let mut all = ALL_COUNTERS.lock();
        all.retain(|counters| counters.strong_count() > 0);
        let live = all.iter().filter_map(sync::Weak::upgrade);
        live.map(|counters| counters.lock().iter().map(|stats| stats.transfers()).sum::<u64>()).sum()
    }

    /// Counters for one queue. Those of a queue that has gone are used again, so that clients who come and go cost no memory.
    fn idle_stats(&self) -> Arc<OpStats> {
        let mut stats = self.stats.lock();
        let idle = stats.iter_mut().find_map(|stats| Arc::get_mut(stats).is_some().then(|| stats.clone()));
        if let Some(idle) = idle {
            return idle;
        }
        let fresh = Arc::new(OpStats::default());
        stats.push(fresh.clone());
        fresh
    }

    /// Ranges are locked in units of what the device rewrites as a whole.
    fn lock_unit(&self) -> u32 {
        self.lock_unit
    }

    fn fail_closed(&self, cause: Errno) {
        let mut failure = self.failure.lock();
        if failure.is_none() {
            let why = format!(
                "volume {}: a flush failed ({cause}), so earlier writes may be lost; writes are refused until the volume is reopened",
                self.options.name
            );
            tracing::error!("{why}");
            *failure = Some(why);
        }
        self.flushes.fail();
    }

    fn note_error(&self, what: &str, offset: u64, len: u64, cause: Errno) {
        *self.last_error.lock() = Some(format!("{what} of {len} bytes at {offset}: {cause}"));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::client::Client;
    use crate::memory_disk::MemoryDisk;
    use crate::reactor::{DataPlane, DataPlaneOptions};
    use crate::stats::OpClass;

    #[test]
    fn clients_who_come_and_go_cost_no_memory() {
        let plane = DataPlane::start(DataPlaneOptions { threads: 1, ..DataPlaneOptions::default() }).unwrap();
        let options = VolumeOptions { name: "v".into(), read_only: false, block_size: 512 };
        let volume = Volume::new(Arc::new(MemoryDisk::new(1 << 20, 1)), options);
        for _ in 0..100 {
            Client::open(&volume, &plane.handles()[0]).unwrap().write(0, vec![1; 512]).unwrap();
        }
        assert!(volume.stats.lock().len() <= 2, "{} sets of counters are kept", volume.stats.lock().len());
        assert_eq!(volume.stats().class(OpClass::Write).ended, 100);
    }
}
