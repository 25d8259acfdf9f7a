//! Flushes of a mapped volume, as its clients on data-plane threads see them.

use std::collections::BTreeSet;
use std::future::poll_fn;
use std::sync::mpsc::{Receiver, sync_channel};
use std::sync::{Arc, Mutex};
use std::task::{Poll, Waker};
use std::time::Duration;

use backends::segments::memory::MemoryStore;
use backends::segments::{SegmentStore, StoreFuture};
use blockdev::client::Client;
use blockdev::layers::aligned::Aligned;
use blockdev::layers::fault::{FaultPlan, FaultRule, Faulty};
use blockdev::memory_disk::MemoryDisk;
use blockdev::stats::OpClass;
use blockdev::{BlockDevice, DataPlane, DataPlaneOptions, Errno, Op, Volume, VolumeOptions, clock};
use bytes::Bytes;
use uuid::Uuid;
use volume::device::{MappedDevice, MappedOptions};
use volume::{Durability, Secrets, Settings};

const MIB: u64 = 1 << 20;
const BLOCK: u64 = 4096;
const GROUP: Uuid = Uuid::from_u128(9);
const PATIENCE: Duration = Duration::from_secs(30);

fn options(plane: &DataPlane, store: &Arc<Postponing>, durability: Durability) -> MappedOptions {
    MappedOptions {
        group: GROUP,
        volume: GROUP,
        store: store.clone(),
        settings: Settings { durability, ..Settings::default() },
        secrets: Secrets { pool_key: [3; 32], data_key: None },
        home: plane.handles()[0].clone(),
        log_path: "log".into(),
    }
}

/// A client on each thread.
fn open(plane: &DataPlane, options: MappedOptions, log: Arc<dyn BlockDevice>) -> Vec<Client> {
    let device = MappedDevice::open(options, log).unwrap();
    let named = VolumeOptions { name: "disk".into(), read_only: false, block_size: 512 };
    let volume = Volume::new(Arc::new(Aligned::new(device)), named);
    plane.handles().iter().map(|thread| Client::open(&volume, thread).unwrap()).collect()
}

fn block(number: u8) -> Vec<u8> {
    vec![number; BLOCK as usize]
}

/// A store that keeps PUTs of segments waiting, once it is told to.
struct Postponing {
    inner: MemoryStore,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    is_on: bool,
    /// PUTs begun, in the order in which they are numbered, from 0.
    begun: usize,
    let_through: BTreeSet<usize>,
    waiting: Vec<Waker>,
}

impl Postponing {
    fn new() -> Arc<Postponing> {
        Arc::new(Postponing { inner: MemoryStore::new(), state: Mutex::default() })
    }

    fn begin(&self) {
        self.state.lock().unwrap().is_on = true;
    }

    fn let_through(&self, put: usize) {
        let mut state = self.state.lock().unwrap();
        state.let_through.insert(put);
        state.waiting.drain(..).for_each(Waker::wake);
    }

    fn wait_for(&self, puts: usize) {
        let deadline = clock::monotonic() + PATIENCE;
        while self.state.lock().unwrap().begun < puts {
            assert!(clock::monotonic() < deadline, "PUT {puts} was not begun");
            std::thread::sleep(Duration::from_millis(1));
        }
    }

    /// Comes back when this PUT may go on.
    async fn postpone(&self, name: &str) {
        let number = {
            let mut state = self.state.lock().unwrap();
            if !state.is_on || !name.contains("/w/") {
                return;
            }
            state.begun += 1;
            state.begun - 1
        };
        poll_fn(|context| {
            let mut state = self.state.lock().unwrap();
            if state.let_through.contains(&number) {
                return Poll::Ready(());
            }
            state.waiting.push(context.waker().clone());
            Poll::Pending
        })
        .await;
    }
}

impl SegmentStore for Postponing {
    backends::pass_on!(inner: read, delete, list, read_root, swap);

    fn create<'a>(&'a self, name: &'a str, content: Vec<Bytes>) -> StoreFuture<'a, ()> {
        Box::pin(async move {
            self.postpone(name).await;
            self.inner.create(name, content).await
        })
    }
}

/// A flush, begun after a write of its own.
fn write_and_flush(client: &Client, number: u8) -> Receiver<Result<(), Errno>> {
    client.write(u64::from(number) * BLOCK, block(number)).unwrap();
    let (sender, receiver) = sync_channel(1);
    client.submit(Op::Flush, 0, 0, Vec::new(), move |answer| sender.send(answer.map(drop)).unwrap());
    receiver
}

fn is_answered(flush: &Receiver<Result<(), Errno>>) -> bool {
    match flush.recv_timeout(Duration::from_millis(50)) {
        Ok(answer) => answer.map(|()| true).unwrap(),
        Err(_) => false,
    }
}

#[test]
fn a_flush_does_not_wait_for_the_one_before_and_many_share_a_put() {
    let (plane, store) = (DataPlane::start(DataPlaneOptions::default()).unwrap(), Postponing::new());
    let options = options(&plane, &store, Durability::Remote);
    options.create(MIB).unwrap();
    let clients = open(&plane, options, Arc::new(MemoryDisk::new(16 * MIB, 512)));
    store.begin();
    let client = |number: u8| &clients[usize::from(number) % clients.len()];

    let first = write_and_flush(client(0), 0);
    store.wait_for(1);
    let second = write_and_flush(client(1), 1);
    store.wait_for(2);
    let others: Vec<_> = (2..10).map(|number| write_and_flush(client(number), number)).collect();
    store.let_through(1);
    store.wait_for(3);
    assert!(!is_answered(&second), "what was flushed before it is not yet in the pool");
    store.let_through(2);
    assert!(others.iter().all(|flush| !is_answered(flush)));
    store.let_through(0);
    for flush in [first, second].iter().chain(&others) {
        flush.recv_timeout(PATIENCE).unwrap().unwrap();
    }
    assert_eq!(store.state.lock().unwrap().begun, 3);
}

/// A kernel tells of lost writes once: the engine must remember.
#[test]
fn after_a_failed_flush_nothing_succeeds_until_the_volume_is_opened_anew() {
    let (plane, store) = (DataPlane::start(DataPlaneOptions::default()).unwrap(), Postponing::new());
    let options = options(&plane, &store, Durability::Local);
    options.create(MIB).unwrap();
    let (log, plan) = (Arc::new(MemoryDisk::new(16 * MIB, 512)), FaultPlan::new(1));
    let clients = open(&plane, options.clone(), Arc::new(Faulty::new(log.clone(), plan.clone())));
    clients[0].write(0, block(1)).unwrap();
    clients[0].flush().unwrap();

    let late = Duration::from_millis(200);
    let rule = FaultRule {
        class: OpClass::Flush,
        errors_per_million: 1_000_000,
        errno: Errno::EIO,
        delay: late,
        jitter: Duration::ZERO,
    };
    plan.set(vec![rule]);
    let beside: Vec<_> = (2..8).map(|number| write_and_flush(&clients[usize::from(number) % clients.len()], number)).collect();
    for flush in beside {
        assert_eq!(flush.recv_timeout(PATIENCE).unwrap(), Err(Errno::EIO));
    }
    plan.set(Vec::new());
    for client in &clients {
        assert_eq!(client.flush(), Err(Errno::EIO));
        assert_eq!(client.write(0, block(9)), Err(Errno::EIO));
        assert_eq!(client.run(Op::Write { fua: true }, 0, BLOCK, block(9)).map(drop), Err(Errno::EIO));
        assert_eq!(client.flush(), Err(Errno::EIO));
    }
    let health = clients[0].volume().health().unwrap();
    assert!(health.contains("export reopen"), "{health}");
    drop(clients);

    let clients = open(&plane, options, log);
    assert_eq!(clients[0].read(0, BLOCK).unwrap(), block(1));
    clients[0].write(0, block(10)).unwrap();
    clients[0].flush().unwrap();
}
