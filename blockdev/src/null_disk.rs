//! A device that stores nothing: reads give zeroes (a guest's memory is really filled), writes vanish. For benchmarks.

use std::rc::Rc;
use std::sync::atomic::{AtomicU64, Ordering};

use crate::device::{BlockDevice, Capabilities, DeviceError, Geometry, IoQueue};
use crate::reactor::Reactor;
use crate::request::{Extent, ExtentKind, Op, Payload, Request};

/// The device.
pub struct NullDisk {
    size: AtomicU64,
}

impl NullDisk {
    pub fn new(size: u64) -> NullDisk {
        NullDisk { size: AtomicU64::new(size) }
    }
}

impl BlockDevice for NullDisk {
    fn geometry(&self) -> Geometry {
        Geometry {
            size: self.size.load(Ordering::Acquire),
            block_size: 1,
            memory_alignment: 1,
            preferred_size: 4096,
            discard_granularity: 512,
        }
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
            flush_failure_loses_writes: false,
        }
    }

    fn open_queue(&self, _reactor: &Rc<Reactor>) -> Result<Box<dyn IoQueue>, DeviceError> {
        Ok(Box::new(NullQueue))
    }

    fn resize(&self, size: u64) -> Result<(), DeviceError> {
        self.size.store(size, Ordering::Release);
        Ok(())
    }
}

struct NullQueue;

impl IoQueue for NullQueue {
    fn submit(&self, mut request: Request) {
        match request.op {
            Op::Read => {
                if let Some(memory) = request.payload.memory_mut() {
                    memory.fill(0);
                }
                request.complete(Ok(()));
            }
            Op::BlockStatus => {
                let hole = vec![Extent { len: request.len, kind: ExtentKind::Hole }];
                request.complete_with(Ok(()), Payload::Extents(hole));
            }
            _ => request.complete(Ok(())),
        }
    }
}
