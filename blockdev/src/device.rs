//! The contract between whoever has requests and whoever carries them out.
//!
//! *Implementors*: a [`BlockDevice`] is shared by all threads and does control work, which may block; it hands out one [`IoQueue`]
//! per data-plane thread, which never blocks. Each request must be completed exactly once, as a whole: short transfers are
//! resumed and EINTR and EAGAIN retried inside the driver. Requests of one queue may complete in any order. A flush must cover
//! every write of *any* queue of the device that completed before the flush was submitted.
//! *Callers* ([`crate::Volume`]) check bounds and alignment first, never let overlapping writes be in flight together, and never
//! submit an operation that [`Capabilities`] lacks.

use std::rc::Rc;
use std::sync::Arc;

use thiserror::Error;

use crate::reactor::{Reactor, ReactorHandle};
use crate::request::Request;

/// The shape of a device. All in bytes, all powers of two but `size`.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Geometry {
    pub size: u64,
    /// Offsets and lengths of requests to this device must be multiples of it.
    pub block_size: u32,
    /// Addresses and lengths of memory segments must be multiples of it.
    pub memory_alignment: u32,
    /// Requests of a multiple of this, aligned to it, are served best.
    pub preferred_size: u32,
    /// Discards free space in units of this.
    pub discard_granularity: u32,
}

/// What a device can do. A front end offers its client nothing else.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Capabilities {
    pub writable: bool,
    /// `Op::Discard` works.
    pub discard: bool,
    /// `Op::WriteZeroes` works; otherwise the volume writes zeroes itself.
    pub write_zeroes: bool,
    /// `Op::WriteZeroes` is much faster than writing zeroes, with unmap and without.
    pub fast_zero: bool,
    /// `Op::Write { fua: true }` is durable by itself; otherwise the volume flushes after it.
    pub fua: bool,
    /// `Op::BlockStatus` works; otherwise everything counts as data.
    pub block_status: bool,
    /// A read leaves its bytes where the next read of them finds them sooner, as in a page cache.
    pub caches_reads: bool,
    /// A failed flush may have lost writes for good, and the next one may succeed (a page cache): the volume then refuses writes and flushes until it is
    /// reopened, and never has two flushes under way. A device that fails every later write and flush by itself does not need that.
    pub flush_failure_loses_writes: bool,
}

/// Why control work on a device failed.
#[derive(Error, Debug)]
pub enum DeviceError {
    #[error("{what}: {source}")]
    Io { what: String, source: std::io::Error },
    #[error("{0}")]
    Unsupported(String),
    #[error("{0}")]
    Refused(String),
}

/// A device as all threads see it.
pub trait BlockDevice: Send + Sync {
    fn geometry(&self) -> Geometry;
    fn capabilities(&self) -> Capabilities;
    /// A queue for the calling data-plane thread.
    fn open_queue(&self, reactor: &Rc<Reactor>) -> Result<Box<dyn IoQueue>, DeviceError>;
    /// Changes the size, in bytes, a multiple of the block size. May block. Shrinking loses what lies beyond.
    fn resize(&self, size: u64) -> Result<(), DeviceError>;
    /// Re-reads a size changed by somebody else and returns it. May block.
    fn refresh_size(&self) -> Result<u64, DeviceError> {
        Ok(self.geometry().size)
    }
    /// Has `hear` called, on any thread, after somebody else has changed the size: [`BlockDevice::refresh_size`] then takes it
    /// over. It must not block. Called once, at most. Devices whose size is nobody else's to change never call it: a file that
    /// got shorter is damaged.
    fn on_size_changed_elsewhere(&self, _hear: Box<dyn Fn() + Send + Sync>) {}
    /// `Some(why)` while the backend behind the device does not work.
    fn health(&self) -> Option<String> {
        None
    }
    /// The thread whose queues reach the device with the least work, if they are not all alike.
    fn home(&self) -> Option<ReactorHandle> {
        None
    }
}

/// A device as one thread sees it.
pub trait IoQueue {
    /// Takes the request and completes it, now or later, exactly once.
    fn submit(&self, request: Request);
}

impl<D: BlockDevice + ?Sized> BlockDevice for Arc<D> {
    fn geometry(&self) -> Geometry {
        (**self).geometry()
    }
    fn capabilities(&self) -> Capabilities {
        (**self).capabilities()
    }
    fn open_queue(&self, reactor: &Rc<Reactor>) -> Result<Box<dyn IoQueue>, DeviceError> {
        (**self).open_queue(reactor)
    }
    fn resize(&self, size: u64) -> Result<(), DeviceError> {
        (**self).resize(size)
    }
    fn refresh_size(&self) -> Result<u64, DeviceError> {
        (**self).refresh_size()
    }
    fn on_size_changed_elsewhere(&self, hear: Box<dyn Fn() + Send + Sync>) {
        (**self).on_size_changed_elsewhere(hear);
    }
    fn health(&self) -> Option<String> {
        (**self).health()
    }
    fn home(&self) -> Option<ReactorHandle> {
        (**self).home()
    }
}
