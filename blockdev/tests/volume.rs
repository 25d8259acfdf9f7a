//! What happens to a volume when several things happen at once.

use std::cell::RefCell;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc;
use std::time::Duration;

use blockdev::client::{Answer, Client};
use blockdev::layers::fault::{FaultPlan, FaultRule, Faulty};
use blockdev::memory_disk::MemoryDisk;
use blockdev::stats::OpClass;
use blockdev::{
    BlockDevice, Buffer, Capabilities, DataPlane, DataPlaneOptions, DeviceError, Errno, Geometry, IoQueue, Op, Reactor, Request,
    Volume, VolumeOptions,
};

const MIB: u64 = 1 << 20;
const PATIENCE: Duration = Duration::from_secs(60);

fn plane() -> DataPlane {
    DataPlane::start(DataPlaneOptions::default()).unwrap()
}

fn volume(device: Arc<dyn BlockDevice>) -> Arc<Volume> {
    Volume::new(device, VolumeOptions { name: "test".into(), read_only: false, block_size: 512 })
}

fn submit(client: &Client, op: Op, offset: u64, len: u64, data: Vec<u8>) -> mpsc::Receiver<Result<Answer, Errno>> {
    let (sender, receiver) = mpsc::channel();
    client.submit(op, offset, len, data, move |answer| sender.send(answer).unwrap());
    receiver
}

#[test]
fn a_write_in_flight_does_not_bring_back_what_shrinking_cut_off() {
    let plan = FaultPlan::new(1);
    let slow = FaultRule {
        class: OpClass::Write,
        errors_per_million: 0,
        errno: Errno::EIO,
        delay: Duration::from_millis(300),
        jitter: Duration::ZERO,
    };
    plan.set(vec![slow]);
    let volume = volume(Arc::new(Faulty::new(Arc::new(MemoryDisk::new(8 * MIB, 512)), plan)));
    let plane = plane();
    let client = Client::open(&volume, &plane.handles()[0]).unwrap();
    let write = |byte| submit(&client, Op::Write { fua: false }, 6 * MIB, 4096, vec![byte; 4096]);
    let (first, second) = (write(1), write(2));
    while volume.stats().class(OpClass::Write).started < 2 {
        std::thread::yield_now();
    }
    volume.resize(4 * MIB).unwrap();
    first.recv_timeout(PATIENCE).unwrap().unwrap();
    assert_eq!(second.recv_timeout(PATIENCE).unwrap().unwrap_err(), Errno::ENOSPC, "it waited for the first");
    volume.resize(8 * MIB).unwrap();
    assert_eq!(client.read(6 * MIB, 4096).unwrap(), vec![0; 4096]);
}

/// A disk whose first flush stays under way until something is read, and then fails; like a kernel, it tells nobody else of it.
struct TellsOnce {
    disk: MemoryDisk,
    told: Arc<AtomicBool>,
}

struct TellsOnceQueue {
    below: Box<dyn IoQueue>,
    told: Arc<AtomicBool>,
    held: RefCell<Option<Request>>,
}

impl BlockDevice for TellsOnce {
    fn geometry(&self) -> Geometry {
        self.disk.geometry()
    }
    fn capabilities(&self) -> Capabilities {
        Capabilities { flush_failure_loses_writes: true, ..self.disk.capabilities() }
    }
    fn open_queue(&self, reactor: &Rc<Reactor>) -> Result<Box<dyn IoQueue>, DeviceError> {
        let below = self.disk.open_queue(reactor)?;
        Ok(Box::new(TellsOnceQueue { below, told: self.told.clone(), held: RefCell::default() }))
    }
    fn resize(&self, size: u64) -> Result<(), DeviceError> {
        self.disk.resize(size)
    }
}

impl IoQueue for TellsOnceQueue {
    fn submit(&self, request: Request) {
        match request.op {
            Op::Flush if !self.told.swap(true, Ordering::SeqCst) => *self.held.borrow_mut() = Some(request),
            Op::Read => {
                if let Some(flush) = self.held.take() {
                    flush.complete(Err(Errno::EIO));
                }
                self.below.submit(request);
            }
            _ => self.below.submit(request),
        }
    }
}

#[test]
fn no_flush_succeeds_beside_one_that_was_told_of_lost_writes() {
    let told = Arc::new(AtomicBool::new(false));
    let volume = volume(Arc::new(TellsOnce { disk: MemoryDisk::new(MIB, 1), told: told.clone() }));
    let plane = plane();
    let clients = [0, 1].map(|thread| Client::open(&volume, &plane.handles()[thread]).unwrap());
    clients[0].write(0, vec![1; 512]).unwrap();
    let first = submit(&clients[0], Op::Flush, 0, 0, Vec::new());
    while !told.load(Ordering::SeqCst) {
        std::thread::yield_now();
    }
    let second = submit(&clients[1], Op::Flush, 0, 0, Vec::new());
    while volume.stats().class(OpClass::Flush).started < 2 {
        std::thread::yield_now();
    }
    std::thread::sleep(Duration::from_millis(20));
    clients[0].read(0, 512).unwrap();
    assert_eq!(first.recv_timeout(PATIENCE).unwrap().unwrap_err(), Errno::EIO);
    assert_eq!(second.recv_timeout(PATIENCE).unwrap().unwrap_err(), Errno::EIO);
}

#[test]
fn whoever_asks_a_stopped_data_plane_is_told() {
    let plane = plane();
    let handle = plane.handles()[0].clone();
    let client = Client::open(&volume(Arc::new(MemoryDisk::new(MIB, 1))), &handle).unwrap();
    drop(plane);
    let (sender, receiver) = mpsc::channel();
    std::thread::spawn(move || sender.send((handle.call(|_| 1), client.write(0, vec![1; 512]))).unwrap());
    assert_eq!(receiver.recv_timeout(PATIENCE).unwrap(), (None, Err(Errno::ESHUTDOWN)));
}

thread_local! {
    static HELD: RefCell<Vec<Buffer>> = const { RefCell::new(Vec::new()) };
}

/// Takes all buffers of the client's thread but one of 4096 bytes.
fn spend_buffers(plane: &DataPlane) {
    plane.handles()[0].call(|reactor| {
        HELD.with_borrow_mut(|held| {
            let spare = reactor.buffers().try_get(4096);
            for shift in (12..=26).rev() {
                while let Some(buffer) = reactor.buffers().try_get(1 << shift) {
                    held.push(buffer);
                }
            }
            drop(spare);
        });
    });
}

#[test]
fn requests_that_need_a_second_buffer_go_on_when_all_are_spent() {
    struct Plain(MemoryDisk);
    impl BlockDevice for Plain {
        fn geometry(&self) -> Geometry {
            self.0.geometry()
        }
        fn capabilities(&self) -> Capabilities {
            Capabilities { write_zeroes: false, fast_zero: false, ..self.0.capabilities() }
        }
        fn open_queue(&self, reactor: &Rc<Reactor>) -> Result<Box<dyn IoQueue>, DeviceError> {
            self.0.open_queue(reactor)
        }
        fn resize(&self, size: u64) -> Result<(), DeviceError> {
            self.0.resize(size)
        }
    }
    let plane = plane();
    let client = Client::open(&volume(Arc::new(Plain(MemoryDisk::new(8 * MIB, 4096)))), &plane.handles()[0]).unwrap();
    spend_buffers(&plane);
    let write = submit(&client, Op::Write { fua: false }, 100, 4000, vec![7; 4000]);
    write.recv_timeout(PATIENCE).unwrap().unwrap();
    assert_eq!(client.read(100, 4000).unwrap(), vec![7; 4000]);
    client.run(Op::WriteZeroes { unmap: false, fua: false, fast: false }, 200, 3 * MIB, Vec::new()).unwrap();
    assert_eq!(client.read(100, 4000).unwrap(), [vec![7; 100], vec![0; 3900]].concat());
    plane.handles()[0].call(|_| drop(HELD.take()));
}

#[test]
fn a_misaligned_request_of_many_chunks_round_trips() {
    let volume = volume(Arc::new(MemoryDisk::new(32 * MIB, 4096)));
    let plane = plane();
    let client = Client::open(&volume, &plane.handles()[0]).unwrap();
    let whole: Vec<u8> = (0..32 * MIB).map(|at| (at % 251) as u8).collect();
    client.write(0, whole.clone()).unwrap();
    let (start, len) = (4096 - 17, 13 * MIB as usize + 30);
    assert_eq!(client.read(start, len as u64).unwrap(), whole[start as usize..start as usize + len]);
    client.write(start, vec![7; len]).unwrap();
    let mut expected = whole;
    expected[start as usize..start as usize + len].fill(7);
    assert!(client.read(0, 32 * MIB).unwrap() == expected);
}

/// A disk that makes writes durable itself and, like a file, may lose others when that fails.
struct Loses(MemoryDisk);

impl BlockDevice for Loses {
    fn geometry(&self) -> Geometry {
        self.0.geometry()
    }
    fn capabilities(&self) -> Capabilities {
        Capabilities { flush_failure_loses_writes: true, fua: true, ..self.0.capabilities() }
    }
    fn open_queue(&self, reactor: &Rc<Reactor>) -> Result<Box<dyn IoQueue>, DeviceError> {
        self.0.open_queue(reactor)
    }
    fn resize(&self, size: u64) -> Result<(), DeviceError> {
        self.0.resize(size)
    }
}

#[test]
fn a_failed_durable_write_fails_closed_unless_it_was_only_refused() {
    // 14 is EFAULT: a front end has truncated the memory that it wrote from.
    for (cause, harmless) in [(Errno::EIO, false), (Errno::ETIMEDOUT, false), (Errno::ENOSPC, true), (Errno::from_raw(14), true)]
    {
        let plan = FaultPlan::new(1);
        let failing = FaultRule {
            class: OpClass::Write,
            errors_per_million: 1_000_000,
            errno: cause,
            delay: Duration::ZERO,
            jitter: Duration::ZERO,
        };
        plan.set(vec![failing]);
        let volume = volume(Arc::new(Faulty::new(Arc::new(Loses(MemoryDisk::new(MIB, 1))), plan.clone())));
        let plane = plane();
        let client = Client::open(&volume, &plane.handles()[0]).unwrap();
        let durable = submit(&client, Op::Write { fua: true }, 0, 512, vec![1; 512]);
        assert_eq!(durable.recv_timeout(PATIENCE).unwrap().unwrap_err(), cause);
        plan.set(Vec::new());
        assert_eq!(client.write(0, vec![2; 512]).is_ok(), harmless, "after {cause}");
        assert_eq!(volume.health().is_none(), harmless, "after {cause}");
    }
}
