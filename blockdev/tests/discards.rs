//! Long discards beside other traffic.

use std::cell::RefCell;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::mpsc;
use std::time::Duration;

use blockdev::client::{Answer, Client};
use blockdev::clock;
use blockdev::memory_disk::MemoryDisk;
use blockdev::{
    BlockDevice, Capabilities, DataPlane, DataPlaneOptions, DeviceError, Errno, Geometry, IoQueue, Op, Reactor, Request, Volume,
    VolumeOptions,
};

const MIB: u64 = 1 << 20;
const PATIENCE: Duration = Duration::from_secs(60);
/// A piece that takes so long makes its discard rest for longer than it may take to be answered.
const SLOW: Duration = Duration::from_millis(20);
const RELEASES: u64 = 0;
const PASSES: u64 = 4096;

#[derive(Default)]
struct State {
    held: AtomicUsize,
    is_open: AtomicBool,
}

/// A disk that holds back discards, until it is open, or those it has until [`RELEASES`] is written.
struct Holds {
    disk: MemoryDisk,
    state: Arc<State>,
}

struct HoldsQueue {
    below: Box<dyn IoQueue>,
    state: Arc<State>,
    held: RefCell<Vec<Request>>,
}

impl BlockDevice for Holds {
    fn geometry(&self) -> Geometry {
        self.disk.geometry()
    }
    fn capabilities(&self) -> Capabilities {
        self.disk.capabilities()
    }
    fn open_queue(&self, reactor: &Rc<Reactor>) -> Result<Box<dyn IoQueue>, DeviceError> {
        let below = self.disk.open_queue(reactor)?;
        Ok(Box::new(HoldsQueue { below, state: self.state.clone(), held: RefCell::default() }))
    }
    fn resize(&self, size: u64) -> Result<(), DeviceError> {
        self.disk.resize(size)
    }
}

impl IoQueue for HoldsQueue {
    fn submit(&self, request: Request) {
        if request.op == Op::Discard && !self.state.is_open.load(Ordering::SeqCst) {
            self.held.borrow_mut().push(request);
            self.state.held.fetch_add(1, Ordering::SeqCst);
            return;
        }
        if matches!(request.op, Op::Write { .. }) && request.offset == RELEASES {
            self.state.held.store(0, Ordering::SeqCst);
            for discard in self.held.take() {
                self.below.submit(discard);
            }
        }
        self.below.submit(request);
    }
}

struct Rig {
    state: Arc<State>,
    client: Client,
    _plane: DataPlane,
}

impl Rig {
    fn new() -> Rig {
        let state = Arc::<State>::default();
        let device = Holds { disk: MemoryDisk::new(64 << 30, 4096), state: state.clone() };
        let volume = Volume::new(Arc::new(device), VolumeOptions { name: "test".into(), read_only: false, block_size: 512 });
        let plane = DataPlane::start(DataPlaneOptions::default()).unwrap();
        let client = Client::open(&volume, &plane.handles()[0]).unwrap();
        Rig { state, client, _plane: plane }
    }

    fn wait_for_held(&self, count: usize) {
        let deadline = clock::monotonic() + PATIENCE;
        while self.state.held.load(Ordering::SeqCst) < count {
            assert!(clock::monotonic() < deadline, "{count} pieces never came");
            std::thread::yield_now();
        }
    }

    /// Discards, lets two pieces of each through, the second slowly and beside a write, and waits for the answers.
    fn discard(&self, ranges: &[(u64, u64)]) {
        let answers: Vec<mpsc::Receiver<Result<Answer, Errno>>> = ranges
            .iter()
            .map(|(offset, len)| {
                let (sender, receiver) = mpsc::channel();
                self.client.submit(Op::Discard, *offset, *len, Vec::new(), move |answer| sender.send(answer).unwrap());
                receiver
            })
            .collect();
        self.wait_for_held(ranges.len());
        self.write(RELEASES);
        self.wait_for_held(ranges.len());
        self.write(PASSES);
        std::thread::sleep(SLOW);
        self.write(RELEASES);
        for answer in answers {
            answer.recv_timeout(PATIENCE).expect("an answer before the third piece").unwrap();
        }
    }

    fn write(&self, offset: u64) {
        self.client.write(offset, vec![1; 4096]).unwrap();
    }

    fn open(&self) {
        self.state.is_open.store(true, Ordering::SeqCst);
        self.write(RELEASES);
    }
}

#[test]
fn discards_that_rest_are_answered() {
    let rig = Rig::new();
    let ranges: Vec<(u64, u64)> = (0..32).map(|index| ((index + 1) * 1024 * MIB, 512 * MIB)).collect();
    rig.discard(&ranges);
    rig.open();
}

#[test]
fn what_was_overwritten_does_not_keep_a_discard_from_going_on() {
    let rig = Rig::new();
    let (start, far) = (1024 * MIB, 1024 * MIB + 250 * MIB);
    rig.write(far);
    rig.discard(&[(start, 256 * MIB)]);
    rig.open();
    for index in 6..12 {
        rig.client.write(start + index * 16 * MIB, vec![2; 16 * MIB as usize]).unwrap();
    }
    let deadline = clock::monotonic() + PATIENCE;
    while rig.client.read(far, 4096).unwrap() != vec![0; 4096] {
        assert!(clock::monotonic() < deadline, "it was never discarded");
        std::thread::sleep(Duration::from_millis(10));
    }
    assert_eq!(rig.client.read(start + 100 * MIB, 4096).unwrap(), vec![2; 4096]);
}
