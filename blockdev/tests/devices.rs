//! The conformance suite on the devices and layers that live in this crate.

use std::sync::Arc;
use std::time::Duration;

use blockdev::conformance::{DEVICE_SIZE, Suite, run};
use blockdev::layers::fault::{FaultPlan, FaultRule, Faulty};
use blockdev::memory_disk::MemoryDisk;
use blockdev::stats::OpClass;
use blockdev::{BlockDevice, Capabilities, DeviceError, Errno, Geometry, IoQueue, Reactor};

#[test]
fn memory_disk() {
    run(Suite { sequences: 100, resize: true }, || Arc::new(MemoryDisk::new(DEVICE_SIZE, 1)));
}

#[test]
fn memory_disk_of_4k_blocks() {
    run(Suite { sequences: 100, resize: true }, || Arc::new(MemoryDisk::new(DEVICE_SIZE, 4096)));
}

#[test]
fn slow_disk_of_4k_blocks() {
    run(Suite { sequences: 8, resize: true }, || {
        let plan = FaultPlan::new(7);
        let slow = |class| FaultRule {
            class,
            errors_per_million: 0,
            errno: Errno::EIO,
            delay: Duration::from_micros(50),
            jitter: Duration::from_micros(500),
        };
        plan.set(OpClass::ALL.map(slow).to_vec());
        Arc::new(Faulty::new(Arc::new(MemoryDisk::new(DEVICE_SIZE, 4096)), plan))
    });
}

/// A disk with none of the optional abilities.
struct Plain(MemoryDisk);

impl BlockDevice for Plain {
    fn geometry(&self) -> Geometry {
        self.0.geometry()
    }
    fn capabilities(&self) -> Capabilities {
        let all = self.0.capabilities();
        Capabilities { discard: false, write_zeroes: false, fast_zero: false, fua: false, block_status: false, ..all }
    }
    fn open_queue(&self, reactor: &std::rc::Rc<Reactor>) -> Result<Box<dyn IoQueue>, DeviceError> {
        self.0.open_queue(reactor)
    }
    fn resize(&self, size: u64) -> Result<(), DeviceError> {
        self.0.resize(size)
    }
}

#[test]
fn disk_without_abilities() {
    run(Suite::default(), || Arc::new(Plain(MemoryDisk::new(DEVICE_SIZE, 512))));
}
