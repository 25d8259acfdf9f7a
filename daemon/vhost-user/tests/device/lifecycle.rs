//! Starting, stopping, changing and losing what a device stands on.

use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::rc::Rc;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use blockdev::layers::fault::{FaultPlan, FaultRule, Faulty};
use blockdev::memory_disk::MemoryDisk;
use blockdev::stats::OpClass;
use blockdev::{BlockDevice, Capabilities, DeviceError, Errno, Geometry, IoQueue, Op, Reactor, Request};

use crate::frontend::*;
use crate::{DISK, Server, eventually};

fn slow(delay: Duration) -> Server {
    slow_on(Arc::new(MemoryDisk::new(DISK, 1)), delay)
}

fn slow_on(disk: Arc<dyn BlockDevice>, delay: Duration) -> Server {
    let plan = FaultPlan::new(1);
    let rule = |class| FaultRule { class, errors_per_million: 0, errno: Errno::EIO, delay, jitter: Duration::ZERO };
    plan.set(vec![rule(OpClass::Read), rule(OpClass::Write)]);
    Server::of(Arc::new(Faulty::new(disk, plan)))
}

fn offer_writes(frontend: &Frontend, queue: &Queue, count: u16) {
    for number in 0..count {
        let sector = u64::from(number);
        queue.write_request(&frontend.memory, 3 * number, T_OUT, sector, Data::Out(&[number as u8 + 1; 512]));
        queue.offer(&frontend.memory, 3 * number);
    }
    queue.kick();
}

#[test]
fn stopping_a_ring_waits_for_what_is_in_flight() {
    let server = slow(Duration::from_millis(100));
    let frontend = Frontend::connect(&server.socket());
    let queue = Queue::new(0, 64);
    frontend.start(&queue, 0);
    offer_writes(&frontend, &queue, 16);
    eventually("requests are taken", || server.export.stats().class(OpClass::Write).in_flight() > 0);
    let base = frontend.stop(0);
    let used = queue.used_index(&frontend.memory);
    assert_eq!(base, u32::from(used), "everything taken was given back before the answer");
    for number in 0..used {
        assert_eq!(queue.status(&frontend.memory, 3 * number), 0);
    }
    frontend.start(&queue, base as u16);
    eventually("the rest is done", || queue.used_index(&frontend.memory) == 16);
}

#[test]
fn disabling_and_changing_memory_wait_too() {
    let server = slow(Duration::from_millis(50));
    let frontend = Frontend::connect(&server.socket());
    let queue = Queue::new(0, 64);
    frontend.start(&queue, 0);
    offer_writes(&frontend, &queue, 8);
    eventually("requests are taken", || server.export.stats().class(OpClass::Write).in_flight() > 0);
    frontend.must(req::SET_VRING_ENABLE, &u32s(&[0, 0]), &[]);
    assert_eq!(server.export.stats().class(OpClass::Write).in_flight(), 0);
    let used = queue.used_index(&frontend.memory);
    frontend.must(req::SET_VRING_ENABLE, &u32s(&[0, 1]), &[]);
    eventually("the rest is done", || queue.used_index(&frontend.memory) == 8);
    assert!(used <= 8);
    for number in 0..8u16 {
        queue.offer(&frontend.memory, 3 * number);
    }
    queue.kick();
    frontend.share_memory();
    eventually("requests go on after the change", || queue.used_index(&frontend.memory) == 16);
}

#[test]
fn a_lost_kick_is_made_good_when_the_ring_starts() {
    let server = Server::start();
    let frontend = Frontend::connect(&server.socket());
    let mut queue = Queue::new(0, 64);
    frontend.configure(&queue, 0);
    queue.write_request(&frontend.memory, 0, T_OUT, 0, Data::Out(&[9; 512]));
    queue.offer(&frontend.memory, 0);
    frontend.kick_and_enable(&queue);
    queue.wait_used(&frontend.memory);
    assert_eq!(queue.status(&frontend.memory, 0), 0);
}

#[test]
fn a_ring_without_a_kick_descriptor_is_looked_at() {
    let server = Server::start();
    let frontend = Frontend::connect(&server.socket());
    let mut queue = Queue::new(0, 64);
    frontend.configure(&queue, 0);
    frontend.must(req::SET_VRING_KICK, &u64s(&[1 << 8]), &[]);
    frontend.must(req::SET_VRING_ENABLE, &u32s(&[0, 1]), &[]);
    for sector in 0..50 {
        queue.write_request(&frontend.memory, 0, T_OUT, sector, Data::Out(&[9; 512]));
        queue.offer(&frontend.memory, 0);
        queue.wait_used(&frontend.memory);
        assert_eq!(queue.status(&frontend.memory, 0), 0);
    }
}

#[test]
fn the_event_index_is_honoured() {
    let server = Server::start();
    let frontend = Frontend::connect(&server.socket());
    let mut queue = Queue::new(0, 64);
    frontend.start(&queue, 0);
    eventually("the signal of the start", || rustix::io::read(&queue.call, &mut [0; 8]).is_ok());
    // Far away from what will be used next.
    frontend.memory.u16(queue.avail + 4 + 128).store(1000, Ordering::SeqCst);
    offer_writes(&frontend, &queue, 4);
    eventually("requests are done", || queue.used_index(&frontend.memory) == 4);
    frontend.stop(0);
    assert!(rustix::io::read(&queue.call, &mut [0; 8]).is_err(), "no interrupt was asked for");
    while queue.take_used(&frontend.memory).is_some() {}
    frontend.start(&queue, 4);
    assert_eq!(queue.run(&frontend.memory, T_IN, 0, Data::In(512)), 0);
}

#[test]
fn without_the_event_index_flags_decide() {
    let server = Server::start();
    let frontend = Frontend::connect_with(&server.socket(), SharedMemory::new(MEMORY), !F_EVENT_INDEX);
    let mut queue = Queue::new(0, 64);
    frontend.start(&queue, 0);
    eventually("the signal of the start", || rustix::io::read(&queue.call, &mut [0; 8]).is_ok());
    frontend.memory.u16(queue.avail).store(1, Ordering::SeqCst);
    offer_writes(&frontend, &queue, 4);
    eventually("requests are done", || queue.used_index(&frontend.memory) == 4);
    assert!(rustix::io::read(&queue.call, &mut [0; 8]).is_err());
    eventually("kicks are wanted again", || frontend.memory.u16(queue.used).load(Ordering::SeqCst) == 0);
    frontend.memory.u16(queue.avail).store(0, Ordering::SeqCst);
    while queue.take_used(&frontend.memory).is_some() {}
    assert_eq!(queue.run(&frontend.memory, T_IN, 0, Data::In(512)), 0);
}

#[test]
fn queues_run_on_several_threads_at_once() {
    let server = Server::start();
    let frontend = Frontend::connect(&server.socket());
    assert_eq!(frontend.ask(req::GET_QUEUE_NUM, &[]).u64(), 64);
    let mut queues: Vec<Queue> = (0..4).map(|index| Queue::new(index, 64)).collect();
    queues.iter().for_each(|queue| frontend.start(queue, 0));
    for round in 0..50u64 {
        for queue in &mut queues {
            let sector = u64::from(queue.index) * 1000 + round;
            queue.write_request(&frontend.memory, 0, T_OUT, sector, Data::Out(&[sector as u8; 512]));
            queue.offer(&frontend.memory, 0);
            queue.kick();
        }
        for queue in &mut queues {
            queue.wait_used(&frontend.memory);
            assert_eq!(queue.status(&frontend.memory, 0), 0);
        }
    }
    assert_eq!(server.export.clients()[0].queues_started, 4);
    let first = &mut queues[0];
    assert_eq!(first.run(&frontend.memory, T_IN, 3049, Data::In(512)), 0);
    assert_eq!(first.read_data(&frontend.memory, 0, 512), [3049u64 as u8; 512]);
}

#[test]
fn a_second_front_end_is_refused_and_the_first_goes_on() {
    let server = Server::start();
    let frontend = Frontend::connect(&server.socket());
    let mut queue = Queue::new(0, 64);
    frontend.start(&queue, 0);
    let second = UnixStream::connect(server.socket()).unwrap();
    assert!(receive(&second).is_none());
    assert_eq!(queue.run(&frontend.memory, T_OUT, 0, Data::Out(&[1; 512])), 0);
    let client = &server.export.clients()[0];
    assert_eq!((client.pid as u32, client.queues_started), (std::process::id(), 1));
    drop(frontend);
    let third = Frontend::connect(&server.socket());
    let mut queue = Queue::new(0, 64);
    third.start(&queue, 0);
    assert_eq!(queue.run(&third.memory, T_IN, 0, Data::In(512)), 0);
}

#[test]
fn disconnect_and_stop_end_the_session() {
    let server = Server::start();
    let frontend = Frontend::connect(&server.socket());
    let mut queue = Queue::new(0, 64);
    frontend.start(&queue, 0);
    assert_eq!(queue.run(&frontend.memory, T_OUT, 0, Data::Out(&[1; 512])), 0);
    server.export.disconnect();
    assert!(frontend.is_hung_up());
    let again = Frontend::connect(&server.socket());
    server.export.stop();
    assert!(again.is_hung_up());
    assert!(server.export.clients().is_empty());
    assert!(UnixStream::connect(server.socket()).is_err());
}

#[test]
fn a_front_end_that_leaves_has_its_requests_finished_first() {
    let server = slow(Duration::from_millis(50));
    let frontend = Frontend::connect(&server.socket());
    let queue = Queue::new(0, 64);
    frontend.start(&queue, 0);
    offer_writes(&frontend, &queue, 8);
    eventually("requests are taken", || server.export.stats().class(OpClass::Write).in_flight() > 0);
    drop(frontend);
    eventually("the session ends", || server.export.clients().is_empty());
    assert_eq!(server.export.stats().class(OpClass::Write).in_flight(), 0);
}

/// The front end's end of a channel on which the server may speak first.
fn open_channel(frontend: &Frontend) -> UnixStream {
    let (ours, theirs) = UnixStream::pair().unwrap();
    frontend.must(req::SET_BACKEND_REQ_FD, &[], &[theirs.as_fd()]);
    ours
}

/// The server asks for the configuration space to be read, and waits for no answer.
fn must_be_told(channel: &UnixStream) {
    let told = receive(channel).unwrap();
    assert_eq!((told.request, told.flags, told.payload.len()), (2, 1, 0));
}

/// True if the server has said nothing in consequence of what it has been told so far.
fn is_quiet(frontend: &Frontend, channel: &UnixStream) -> bool {
    frontend.capacity();
    !wait_readable(channel.as_fd(), Duration::ZERO)
}

#[test]
fn a_new_size_is_told_and_shown() {
    let server = Server::start();
    let frontend = Frontend::connect(&server.socket());
    let channel = open_channel(&frontend);
    let mut queue = Queue::new(0, 64);
    frontend.start(&queue, 0);
    must_be_told(&channel);
    assert_eq!(frontend.capacity(), DISK / 512);
    server.volume.resize(2 * DISK).unwrap();
    must_be_told(&channel);
    assert_eq!(frontend.capacity(), 2 * DISK / 512);
    assert_eq!(frontend.config(0x100, 60), frontend.config(0, 60), "older front ends count from 0x100");
    assert_eq!(queue.run(&frontend.memory, T_OUT, DISK / 512, Data::Out(&[1; 512])), 0);
}

#[test]
fn a_size_that_changed_while_nothing_ran_is_told_once_rings_run() {
    let server = Server::start();
    let frontend = Frontend::connect(&server.socket());
    let queues = [Queue::new(0, 64), Queue::new(1, 64)];
    drop(frontend);
    server.volume.resize(2 * DISK).unwrap();

    let frontend = Frontend::connect(&server.socket());
    let channel = open_channel(&frontend);
    frontend.configure(&queues[0], 0);
    assert!(is_quiet(&frontend, &channel), "a front end that has not started its device must not be told");
    frontend.kick_and_enable(&queues[0]);
    must_be_told(&channel);
    assert_eq!(frontend.capacity(), 2 * DISK / 512);
    frontend.start(&queues[1], 0);
    frontend.share_memory();
    assert!(is_quiet(&frontend, &channel), "once is enough");

    for queue in &queues {
        frontend.stop(queue.index);
    }
    server.volume.resize(3 * DISK).unwrap();
    assert!(is_quiet(&frontend, &channel), "its device is stopped");
    frontend.start(&queues[0], 0);
    must_be_told(&channel);
    assert_eq!(frontend.capacity(), 3 * DISK / 512);
}

#[test]
fn a_front_end_that_listens_to_nothing_is_told_nothing() {
    let server = Server::start();
    let frontend = Frontend::connect(&server.socket());
    let channel = open_channel(&frontend);
    let without_channel = frontend.ask(req::GET_PROTOCOL_FEATURES, &[]).u64() & !PROTOCOL_BACKEND_REQ;
    frontend.must(req::SET_PROTOCOL_FEATURES, &u64s(&[without_channel]), &[]);
    frontend.start(&Queue::new(0, 64), 0);
    server.volume.resize(2 * DISK).unwrap();
    assert!(is_quiet(&frontend, &channel));
    assert_eq!(frontend.capacity(), 2 * DISK / 512);
}

#[test]
fn memory_slots_come_and_go() {
    let server = Server::start();
    let frontend = Frontend::connect(&server.socket());
    assert!(frontend.ask(req::GET_MAX_MEM_SLOTS, &[]).u64() >= 32);
    let mut queue = Queue::new(0, 64);
    frontend.start(&queue, 0);
    let extra = SharedMemory::new(1 << 20);
    let region = u64s(&[0, 0x5000_0000, 1 << 20, USER + (1 << 40), 0]);
    let mut read_into_extra = || {
        queue.write_request(&frontend.memory, 0, T_IN, 0, Data::In(512));
        queue.set_desc(&frontend.memory, 1, Desc { address: 0x5000_0000, len: 512, flags: WRITE | NEXT, next: 2 });
        queue.offer(&frontend.memory, 0);
        queue.kick();
        queue.wait_used(&frontend.memory);
        queue.status(&frontend.memory, 0)
    };
    assert_eq!(read_into_extra(), 1);
    frontend.must(req::ADD_MEM_REG, &region, &[extra.file.as_fd()]);
    assert_ne!(frontend.try_tell(req::ADD_MEM_REG, &region, &[extra.file.as_fd()]), 0, "it is there already");
    extra.write(0, &[0xaa; 512]);
    assert_eq!(read_into_extra(), 0);
    assert_eq!(extra.read(0, 512), [0; 512]);
    frontend.must(req::REM_MEM_REG, &region, &[]);
    assert_ne!(frontend.try_tell(req::REM_MEM_REG, &region, &[extra.file.as_fd()]), 0, "it is gone already");
    assert_eq!(read_into_extra(), 1);
}

/// Writes down what arrives at the device.
struct Recording {
    below: MemoryDisk,
    seen: Arc<Mutex<Vec<Op>>>,
}

struct RecordingQueue {
    below: Box<dyn IoQueue>,
    seen: Arc<Mutex<Vec<Op>>>,
}

impl BlockDevice for Recording {
    fn geometry(&self) -> Geometry {
        self.below.geometry()
    }
    fn capabilities(&self) -> Capabilities {
        self.below.capabilities()
    }
    fn open_queue(&self, reactor: &Rc<Reactor>) -> Result<Box<dyn IoQueue>, DeviceError> {
        Ok(Box::new(RecordingQueue { below: self.below.open_queue(reactor)?, seen: self.seen.clone() }))
    }
    fn resize(&self, size: u64) -> Result<(), DeviceError> {
        self.below.resize(size)
    }
}

impl IoQueue for RecordingQueue {
    fn submit(&self, request: Request) {
        self.seen.lock().unwrap().push(request.op);
        self.below.submit(request);
    }
}

#[test]
fn write_through_makes_writes_durable_by_themselves() {
    let seen = Arc::new(Mutex::new(Vec::new()));
    let server = Server::of(Arc::new(Recording { below: MemoryDisk::new(DISK, 1), seen: seen.clone() }));
    let frontend = Frontend::connect(&server.socket());
    let mut queue = Queue::new(0, 64);
    frontend.start(&queue, 0);
    let mut write = || {
        assert_eq!(queue.run(&frontend.memory, T_OUT, 0, Data::Out(&[1; 512])), 0);
        std::mem::take(&mut *seen.lock().unwrap())
    };
    let set = |value: u8, offset: u32| frontend.try_tell(req::SET_CONFIG, &[&u32s(&[offset, 1, 0])[..], &[value]].concat(), &[]);
    assert_eq!(frontend.config(32, 1), [1]);
    assert_eq!(write(), [Op::Write { fua: false }]);
    assert_eq!(set(0, 32), 0);
    assert_eq!(frontend.config(32, 1), [0]);
    assert_eq!(write(), [Op::Flush, Op::Write { fua: true }], "the driver will not flush what it wrote before");
    assert_ne!(set(1, 33), 0, "nothing else can be written");
    assert_eq!(set(1, 32), 0);
    assert_eq!(write(), [Op::Write { fua: false }]);
}

#[test]
fn zeroes_are_unmapped_and_made_durable_as_asked() {
    let seen = Arc::new(Mutex::new(Vec::new()));
    let server = Server::of(Arc::new(Recording { below: MemoryDisk::new(DISK, 1), seen: seen.clone() }));
    let frontend = Frontend::connect(&server.socket());
    let mut queue = Queue::new(0, 64);
    frontend.start(&queue, 0);
    let mut zero = |flags: u32| {
        let range = [&u64s(&[8])[..], &u32s(&[8, flags])].concat();
        assert_eq!(queue.run(&frontend.memory, T_WRITE_ZEROES, 0, Data::Out(&range)), 0);
        std::mem::take(&mut *seen.lock().unwrap())
    };
    let zeroes = |unmap| Op::WriteZeroes { unmap, fua: false, fast: false };
    assert_eq!(zero(0), [zeroes(false)]);
    assert_eq!(zero(1), [zeroes(true)]);
    frontend.must(req::SET_CONFIG, &[&u32s(&[32, 1, 0])[..], &[0]].concat(), &[]);
    assert_eq!(zero(0), [Op::Flush, zeroes(false), Op::Flush]);
    assert_eq!(zero(1), [zeroes(true), Op::Flush]);
}

#[test]
fn a_write_under_way_is_durable_when_the_cache_is_off() {
    let seen = Arc::new(Mutex::new(Vec::new()));
    let recording = Recording { below: MemoryDisk::new(DISK, 1), seen: seen.clone() };
    let server = slow_on(Arc::new(recording), Duration::from_millis(100));
    let frontend = Frontend::connect(&server.socket());
    let queue = Queue::new(0, 64);
    frontend.start(&queue, 0);
    offer_writes(&frontend, &queue, 1);
    eventually("the write is taken", || server.export.stats().class(OpClass::Write).in_flight() > 0);
    frontend.must(req::SET_CONFIG, &[&u32s(&[32, 1, 0])[..], &[0]].concat(), &[]);
    assert_eq!(*seen.lock().unwrap(), [Op::Write { fua: false }, Op::Flush]);
}

fn ranges(count: u64) -> Vec<u8> {
    (0..count).flat_map(|number| [&u64s(&[8 * number])[..], &u32s(&[8, 0])].concat()).collect()
}

#[test]
fn ranges_are_discarded_one_after_another_until_one_fails() {
    let seen = Arc::new(Mutex::new(Vec::new()));
    let recording = Recording { below: MemoryDisk::new(DISK, 1), seen: seen.clone() };
    let plan = FaultPlan::new(1);
    let server = Server::of(Arc::new(Faulty::new(Arc::new(recording), plan.clone())));
    let frontend = Frontend::connect(&server.socket());
    let mut queue = Queue::new(0, 64);
    frontend.start(&queue, 0);
    assert_eq!(queue.run(&frontend.memory, T_DISCARD, 0, Data::Out(&ranges(32))), 0);
    assert_eq!(*seen.lock().unwrap(), [Op::Discard; 32]);
    let (class, errno) = (OpClass::Discard, Errno::EIO);
    let rule = FaultRule { class, errors_per_million: 1_000_000, errno, delay: Duration::ZERO, jitter: Duration::ZERO };
    plan.set(vec![rule]);
    assert_eq!(queue.run(&frontend.memory, T_DISCARD, 0, Data::Out(&ranges(32))), 1);
    assert_eq!(plan.injected(), 1, "nothing came after the first that failed");
    plan.set(Vec::new());
    assert_eq!(queue.run(&frontend.memory, T_DISCARD, 0, Data::Out(&ranges(1))), 0);
    assert_eq!(seen.lock().unwrap().len(), 33, "and nothing of it is left over");
    frontend.stop(0);
    assert_eq!(queue.used_index(&frontend.memory), 3, "each was answered once");
}

#[test]
fn one_kick_is_enough_for_a_long_ring() {
    let server = Server::start();
    let frontend = Frontend::connect(&server.socket());
    let queue = Queue::new(0, 512);
    frontend.start(&queue, 0);
    offer_writes(&frontend, &queue, 150);
    eventually("all are done", || queue.used_index(&frontend.memory) == 150);
    assert!((0..150).all(|number| queue.status(&frontend.memory, 3 * number) == 0));
}

#[test]
fn a_driver_that_cannot_flush_gets_durable_writes() {
    let seen = Arc::new(Mutex::new(Vec::new()));
    let server = Server::of(Arc::new(Recording { below: MemoryDisk::new(DISK, 1), seen: seen.clone() }));
    let frontend = Frontend::connect_with(&server.socket(), SharedMemory::new(MEMORY), !(F_FLUSH | F_WCE));
    let mut queue = Queue::new(0, 64);
    frontend.start(&queue, 0);
    assert_eq!(queue.run(&frontend.memory, T_OUT, 0, Data::Out(&[1; 512])), 0);
    assert_eq!(*seen.lock().unwrap(), [Op::Write { fua: true }]);
}

#[test]
fn a_reset_device_starts_over() {
    let server = Server::start();
    let frontend = Frontend::connect(&server.socket());
    let mut queue = Queue::new(0, 64);
    frontend.start(&queue, 0);
    frontend.must(req::SET_STATUS, &u64s(&[15]), &[]);
    assert_eq!(frontend.ask(req::GET_STATUS, &[]).u64(), 15);
    assert_eq!(queue.run(&frontend.memory, T_OUT, 0, Data::Out(&[1; 512])), 0);
    frontend.must(req::RESET_DEVICE, &[], &[]);
    assert_eq!(frontend.ask(req::GET_STATUS, &[]).u64(), 0);
    assert_eq!(server.export.clients()[0].queues_started, 0);
    frontend.must(req::SET_FEATURES, &u64s(&[frontend.features]), &[]);
    frontend.start(&queue, queue.seen_used);
    assert_eq!(queue.run(&frontend.memory, T_IN, 0, Data::In(512)), 0);
}

#[test]
fn the_device_state_travels() {
    let server = Server::start();
    let frontend = Frontend::connect(&server.socket());
    let set_cache = [&u32s(&[32, 1, 0])[..], &[0]].concat();
    frontend.must(req::SET_CONFIG, &set_cache, &[]);
    let (mut reader, writer) = std::io::pipe().unwrap();
    let saved = frontend.ask_with(req::SET_DEVICE_STATE_FD, &u32s(&[0, 0]), &[writer.as_fd()]);
    assert_eq!(saved.u64(), 1 << 8, "it uses our channel");
    drop(writer);
    let mut state = Vec::new();
    std::io::Read::read_to_end(&mut reader, &mut state).unwrap();
    assert_eq!(frontend.ask(req::CHECK_DEVICE_STATE, &[]).u64(), 0);
    drop(frontend);

    let frontend = Frontend::connect(&server.socket());
    assert_eq!(frontend.config(32, 1), [1]);
    let load = |state: &[u8]| {
        let (reader, mut writer) = std::io::pipe().unwrap();
        let answer = frontend.ask_with(req::SET_DEVICE_STATE_FD, &u32s(&[1, 0]), &[reader.as_fd()]);
        assert_eq!(answer.u64(), 1 << 8);
        std::io::Write::write_all(&mut writer, state).unwrap();
        drop(writer);
        frontend.ask(req::CHECK_DEVICE_STATE, &[]).u64()
    };
    assert_ne!(load(b"something else"), 0);
    assert_ne!(load(&state[..state.len() - 1]), 0);
    assert_eq!(frontend.config(32, 1), [1]);
    assert_eq!(load(&state), 0);
    assert_eq!(frontend.config(32, 1), [0]);
}

#[test]
fn pages_written_to_are_logged_while_that_is_asked() {
    let server = Server::start();
    let frontend = Frontend::connect(&server.socket());
    let mut queue = Queue::new(0, 64);
    frontend.start(&queue, 0);
    let pages = (GUEST + MEMORY) >> 12;
    let log = SharedMemory::new((pages / 8).next_multiple_of(4096));
    let size = (pages / 8).next_multiple_of(4096);
    let answer = frontend.ask_with(req::SET_LOG_BASE, &u64s(&[size, 0]), &[log.file.as_fd()]);
    assert_eq!(answer.request, req::SET_LOG_BASE);
    let is_dirty = |guest: u64| log.read(guest >> 15, 1)[0] >> ((guest >> 12) & 7) & 1 == 1;
    let dirty = || log.read(0, size as usize).iter().map(|byte| byte.count_ones()).sum::<u32>();
    assert_eq!(queue.run(&frontend.memory, T_IN, 0, Data::In(512)), 0);
    assert_eq!(dirty(), 0, "logging is not on yet");

    frontend.must(req::SET_FEATURES, &u64s(&[frontend.features | F_LOG_ALL]), &[]);
    frontend.set_addresses(&queue, Some(GUEST + queue.used));
    queue.write_request(&frontend.memory, 0, T_IN, 0, Data::In(3 * 4096));
    queue.offer(&frontend.memory, 0);
    queue.kick();
    queue.wait_used(&frontend.memory);
    let data = GUEST + queue.data;
    assert!([0, 4096, 8192, 12288].iter().all(|at| is_dirty(data + at)), "data and status");
    assert!(is_dirty(GUEST + queue.used), "the used ring");
    assert!(!is_dirty(data + 16384) && !is_dirty(GUEST + queue.desc) && !is_dirty(GUEST + queue.avail));
    assert_eq!(dirty(), 5);

    log.write(0, &vec![0; size as usize]);
    assert_eq!(queue.run(&frontend.memory, T_GET_ID, 0, Data::In(3 * 4096)), 0);
    assert_eq!(dirty(), 2, "of the room for a serial number only what the number takes");

    log.write(0, &vec![0; size as usize]);
    assert_eq!(queue.run(&frontend.memory, T_OUT, 0, Data::Out(&[1; 4096])), 0);
    assert_eq!(dirty(), 2, "a write dirties its status and the used ring only");

    frontend.must(req::SET_FEATURES, &u64s(&[frontend.features]), &[]);
    frontend.set_addresses(&queue, None);
    log.write(0, &vec![0; size as usize]);
    assert_eq!(queue.run(&frontend.memory, T_IN, 0, Data::In(512)), 0);
    assert_eq!(dirty(), 0, "and it can be switched off again");
}

#[test]
fn a_log_too_small_for_memory_is_not_overrun() {
    let server = Server::start();
    let frontend = Frontend::connect(&server.socket());
    let mut queue = Queue::new(0, 64);
    frontend.start(&queue, 0);
    let log = SharedMemory::new(4096);
    frontend.ask_with(req::SET_LOG_BASE, &u64s(&[16, 0]), &[log.file.as_fd()]);
    frontend.must(req::SET_FEATURES, &u64s(&[frontend.features | F_LOG_ALL]), &[]);
    frontend.set_addresses(&queue, Some(u64::MAX - 3));
    assert_eq!(queue.run(&frontend.memory, T_IN, 0, Data::In(512)), 0);
    assert_eq!(log.read(16, 4080), vec![0; 4080]);
}
