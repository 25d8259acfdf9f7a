//! The conformance suite on the devices and layers that live in this crate.

use std::sync::Arc;
use std::time::Duration;

use blockdev::client::Client;
use blockdev::clock;
use blockdev::conformance::{DEVICE_SIZE, Suite, run};
use blockdev::layers::fault::{FaultPlan, FaultRule, Faulty};
use blockdev::memory_disk::MemoryDisk;
use blockdev::stats::OpClass;
use blockdev::{
    BlockDevice, Capabilities, DataPlane, DataPlaneOptions, DeviceError, Errno, Geometry, IoQueue, Op, Reactor, Volume,
    VolumeOptions,
};

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

/// A long discard on a slow disk is answered before it is done, ends by itself, and never takes what was written after it.
#[test]
fn a_long_discard_goes_on_after_its_answer_and_spares_new_writes() {
    const MIB: u64 = 1 << 20;
    const PAGE: u64 = 64 << 10;
    let disk = Arc::new(MemoryDisk::new(512 * MIB, 4096));
    let plan = FaultPlan::new(3);
    let slow = FaultRule {
        class: OpClass::Discard,
        errors_per_million: 0,
        errno: Errno::EIO,
        delay: Duration::from_millis(30),
        jitter: Duration::ZERO,
    };
    plan.set(vec![slow]);
    let options = VolumeOptions { name: "slow".into(), read_only: false, block_size: 512 };
    let volume = Volume::new(Arc::new(Faulty::new(disk.clone(), plan.clone())), options);
    let plane = DataPlane::start(DataPlaneOptions::default()).unwrap();
    let clients = [0, 1].map(|thread| Client::open(&volume, &plane.handles()[thread]).unwrap());
    for mib in 0..512 {
        clients[0].write(mib * MIB, vec![1; 4096]).unwrap();
    }
    clients[0].run(Op::Discard, 0, 512 * MIB, Vec::new()).unwrap();
    assert!(disk.allocated() > 2 * PAGE, "the answer came after all the work");
    clients[1].write(511 * MIB + 100, vec![2; 1000]).unwrap();
    clients[0].write(510 * MIB, vec![3; 4096]).unwrap();
    plan.set(Vec::new());
    let deadline = clock::monotonic() + Duration::from_secs(60);
    while disk.allocated() > 2 * PAGE {
        assert!(clock::monotonic() < deadline, "{} bytes were never discarded", disk.allocated());
        std::thread::sleep(Duration::from_millis(10));
    }
    assert_eq!(clients[0].read(511 * MIB + 100, 1000).unwrap(), vec![2; 1000]);
    assert_eq!(clients[1].read(510 * MIB, 4096).unwrap(), vec![3; 4096]);
}

#[test]
fn a_failed_flush_refuses_writes_until_reopened() {
    struct Cached(Faulty);
    impl BlockDevice for Cached {
        fn geometry(&self) -> Geometry {
            self.0.geometry()
        }
        fn capabilities(&self) -> Capabilities {
            Capabilities { flush_failure_loses_writes: true, ..self.0.capabilities() }
        }
        fn open_queue(&self, reactor: &std::rc::Rc<Reactor>) -> Result<Box<dyn IoQueue>, DeviceError> {
            self.0.open_queue(reactor)
        }
        fn resize(&self, size: u64) -> Result<(), DeviceError> {
            self.0.resize(size)
        }
    }
    let plan = FaultPlan::new(1);
    let disk = Arc::new(MemoryDisk::new(DEVICE_SIZE, 1));
    let volume = Volume::new(
        Arc::new(Cached(Faulty::new(disk, plan.clone()))),
        VolumeOptions { name: "cached".into(), read_only: false, block_size: 512 },
    );
    let plane = DataPlane::start(DataPlaneOptions::default()).unwrap();
    let clients = [0, 1].map(|thread| Client::open(&volume, &plane.handles()[thread]).unwrap());
    clients[0].write(0, vec![1; 512]).unwrap();
    let fails = FaultRule {
        class: OpClass::Flush,
        errors_per_million: 1_000_000,
        errno: Errno::EIO,
        delay: Duration::ZERO,
        jitter: Duration::ZERO,
    };
    plan.set(vec![fails]);
    assert_eq!(clients[0].flush(), Err(Errno::EIO));
    plan.set(Vec::new());
    assert_eq!(clients[1].flush(), Err(Errno::EIO), "the second flush must not hide the failure of the first");
    assert_eq!(clients[1].write(0, vec![2; 512]), Err(Errno::EIO));
    assert_eq!(clients[1].read(0, 512).unwrap(), vec![1; 512]);
    assert!(volume.health().unwrap().contains("reopened"));
}
