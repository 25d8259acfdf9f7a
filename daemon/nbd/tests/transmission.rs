//! The transmission phase against a scripted client and a model.

mod common;

use std::collections::HashMap;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use blockdev::stats::OpClass;
use blockdev::{
    BlockDevice, Capabilities, DeviceError, Errno, Extent, ExtentKind, Geometry, IoQueue, Op, Payload, Reactor, Request,
};
use common::{Answer, Rig, memory, slow};
use nbd::ServerOptions;
use nbd::protocol::{Headers, PAYLOAD_MAX, allocation, command, command_flag, error};
use proptest::prelude::*;

const ALL: [Headers; 3] = [Headers::Simple, Headers::Structured, Headers::Extended];
const MIB: u64 = 1 << 20;

#[test]
fn each_command_works_with_each_kind_of_header() {
    let rig = Rig::new(memory(8 * MIB));
    for headers in ALL {
        let mut wire = rig.attach(headers);
        let data: Vec<u8> = (0..70_000).map(|at| (at % 251) as u8).collect();
        assert_eq!(wire.write_all(4097, &data), Answer::Done);
        assert_eq!(wire.read(4097, 70_000), Answer::Data(data.clone()));
        assert_eq!(wire.ask(command::FLUSH, 0, 0, 0), Answer::Done);
        assert_eq!(wire.ask(command::CACHE, 0, 0, 8 * MIB), Answer::Done);
        assert_eq!(wire.ask(command::WRITE_ZEROES, command_flag::FUA, 4097, 1000), Answer::Done);
        assert_eq!(wire.ask(command::WRITE_ZEROES, command_flag::NO_HOLE, 5097, 1000), Answer::Done);
        assert_eq!(wire.ask(command::WRITE_ZEROES, command_flag::FAST_ZERO, 6097, 1000), Answer::Done);
        assert_eq!(wire.read(4097, 3001), Answer::Data([vec![0; 3000], vec![data[3000]]].concat()));
        assert_eq!(wire.ask(command::TRIM, command_flag::FUA, 0, 8 * MIB), Answer::Done);
        assert_eq!(wire.read(4097, 70_000), Answer::Data(vec![0; 70_000]));
        wire.disconnect();
    }
    rig.wait_for_clients(0);
    let stats = rig.export.stats();
    assert_eq!(stats.class(OpClass::Write).bytes, 3 * 70_000);
    assert_eq!(stats.class(OpClass::Read).bytes, 3 * (140_000 + 3001));
    assert_eq!(stats.class(OpClass::WriteZeroes).ended, 9);
    assert_eq!(stats.class(OpClass::Read).in_flight(), 0);
}

#[test]
fn block_status_tells_holes_from_data() {
    let rig = Rig::new(memory(8 * MIB));
    let hole = u64::from(allocation::HOLE | allocation::ZERO);
    for headers in [Headers::Structured, Headers::Extended] {
        let mut wire = rig.attach(headers);
        wire.write_all(MIB, &vec![1; MIB as usize]);
        let status = |wire: &mut common::Wire, flags, offset, len| wire.ask(command::BLOCK_STATUS, flags, offset, len);
        assert_eq!(status(&mut wire, 0, 0, 8 * MIB), Answer::Extents(vec![(MIB, hole), (MIB, 0), (6 * MIB, hole)]));
        assert_eq!(status(&mut wire, command_flag::REQ_ONE, MIB, 512), Answer::Extents(vec![(512, 0)]));
        assert_eq!(status(&mut wire, 0, 8 * MIB, 1), Answer::Error(error::EINVAL));
        assert_eq!(status(&mut wire, 0, 0, 0), Answer::Error(error::EINVAL));
    }
    let mut simple = rig.attach(Headers::Simple);
    assert_eq!(simple.ask(command::BLOCK_STATUS, 0, 0, 512), Answer::Error(error::EINVAL));
}

#[test]
fn extended_lengths_have_64_bits() {
    let size = 16 << 40;
    let rig = Rig::new(memory(size));
    let mut wire = rig.attach(Headers::Extended);
    wire.write_all(1 << 40, &[1; 4096]);
    let hole = u64::from(allocation::HOLE | allocation::ZERO);
    assert_eq!(
        wire.ask(command::BLOCK_STATUS, command_flag::REQ_ONE, (1 << 40) + (1 << 20), 1 << 30),
        Answer::Extents(vec![(1 << 30, hole)])
    );
    assert_eq!(wire.ask(command::WRITE_ZEROES, 0, 1 << 39, 1 << 40), Answer::Done);
    assert_eq!(wire.ask(command::TRIM, 0, 1 << 39, 2 << 40), Answer::Done);
    assert_eq!(wire.read(1 << 40, 4096), Answer::Data(vec![0; 4096]));
    assert_eq!(wire.ask(command::TRIM, 0, size, 1), Answer::Error(error::EINVAL));
    assert_eq!(wire.ask(command::TRIM, 0, 512, u64::MAX), Answer::Error(error::EINVAL));
    assert_eq!(wire.ask(command::WRITE_ZEROES, 0, 1, u64::MAX), Answer::Error(error::EINVAL));
}

#[test]
fn requests_out_of_bounds_or_out_of_order_are_refused_one_by_one() {
    let rig = Rig::new(memory(MIB));
    for headers in ALL {
        let mut wire = rig.attach(headers);
        assert_eq!(wire.read(MIB, 1), Answer::Error(error::EINVAL));
        assert_eq!(wire.read(MIB - 1, 2), Answer::Error(error::EINVAL));
        assert_eq!(wire.read(u64::MAX, 2), Answer::Error(error::EINVAL));
        assert_eq!(wire.write_all(MIB - 1, &[1; 2]), Answer::Error(error::ENOSPC));
        assert_eq!(wire.write_all(u64::MAX - 10, &[1; 100_000]), Answer::Error(error::EINVAL));
        assert_eq!(wire.ask(command::FLUSH, 0, 1, 0), Answer::Error(error::EINVAL));
        assert_eq!(wire.ask(command::CACHE, 0, MIB, 1), Answer::Error(error::EINVAL));
        assert_eq!(wire.ask(8, 0, 0, 0), Answer::Error(error::EINVAL));
        assert_eq!(wire.ask(999, 0, 0, 0), Answer::Error(error::EINVAL));
        assert_eq!(wire.ask(command::READ, command_flag::REQ_ONE, 0, 1), Answer::Error(error::EINVAL));
        let too_much = wire.read(0, PAYLOAD_MAX + 1);
        let number = if headers == Headers::Simple { error::EINVAL } else { error::EOVERFLOW };
        assert_eq!(too_much, Answer::Error(number));
        assert_eq!(wire.read(MIB, 0), if headers == Headers::Simple { Answer::Data(vec![]) } else { Answer::Done });
        assert_eq!(wire.write_all(0, &[]), Answer::Done);
        assert_eq!(wire.write_all(0, &[5]), Answer::Done);
        assert_eq!(wire.read(0, 1), Answer::Data(vec![5]));
        wire.disconnect();
    }
}

#[test]
fn the_largest_payload_passes_and_a_larger_one_is_thrown_away() {
    let rig = Rig::new(memory(64 * MIB));
    let largest: Vec<u8> = (0..PAYLOAD_MAX).map(|at| (at / 4096) as u8).collect();
    for headers in ALL {
        let mut wire = rig.attach(headers);
        assert_eq!(wire.write_all(3, &largest), Answer::Done);
        assert!(wire.read(3, PAYLOAD_MAX) == Answer::Data(largest.clone()));
        if headers == Headers::Extended {
            let (_, header) = wire.header(command::WRITE, 0, 0, PAYLOAD_MAX + 1);
            wire.send(&header);
            assert!(wire.is_closed(), "the specification wants a disconnect here");
            continue;
        }
        assert_eq!(wire.write_all(0, &vec![0; PAYLOAD_MAX as usize + 1]), Answer::Error(error::EINVAL));
        assert_eq!(wire.read(3, 1), Answer::Data(vec![0]));
        let (_, header) = wire.header(command::WRITE, 0, 0, 2 * PAYLOAD_MAX + 1);
        wire.send(&header);
        assert!(wire.is_closed());
    }
}

#[test]
fn extended_payload_flags_are_obeyed() {
    let rig = Rig::new(memory(MIB));
    let mut wire = rig.attach(Headers::Extended);
    let (cookie, mut bytes) = wire.header(command::TRIM, command_flag::PAYLOAD_LEN, 0, 5000);
    bytes.extend([0; 5000]);
    wire.send(&bytes);
    assert_eq!(wire.answer_to(cookie), Answer::Error(error::EINVAL));
    let (cookie, mut bytes) = wire.header(command::WRITE, 0, 0, 5000);
    bytes[5] = 0;
    bytes.extend([6; 5000]);
    wire.send(&bytes);
    assert_eq!(wire.answer_to(cookie), Answer::Done, "QEMU's writes have payload but not the flag");
    assert_eq!(wire.read(4999, 2), Answer::Data(vec![6, 0]));
}

#[test]
fn a_read_only_export_refuses_changes_and_says_so() {
    let rig = Rig::with(memory(MIB), 1, ServerOptions::default(), |export| export.read_only(true));
    for headers in ALL {
        let mut wire = rig.attach(headers);
        assert_eq!(wire.write_all(0, &[1; 100_000]), Answer::Error(error::EPERM));
        assert_eq!(wire.ask(command::TRIM, 0, 0, 512), Answer::Error(error::EPERM));
        assert_eq!(wire.ask(command::WRITE_ZEROES, 0, 0, 512), Answer::Error(error::EPERM));
        assert_eq!(wire.ask(command::FLUSH, 0, 0, 0), Answer::Done);
        assert_eq!(wire.read(0, 2), Answer::Data(vec![0; 2]));
    }
}

#[test]
fn errors_of_the_device_reach_the_client_and_nobody_else() {
    let (device, plan) = slow(MIB, Duration::ZERO, &[]);
    let rig = Rig::new(device);
    for headers in ALL {
        let mut wire = rig.attach(headers);
        let rule = |class| blockdev::layers::fault::FaultRule {
            class,
            errors_per_million: 1_000_000,
            errno: blockdev::Errno::EIO,
            delay: Duration::ZERO,
            jitter: Duration::ZERO,
        };
        plan.set(vec![rule(OpClass::Read), rule(OpClass::Flush)]);
        assert_eq!(wire.read(0, 512), Answer::Error(error::EIO));
        assert_eq!(wire.write_all(0, &[1; 512]), Answer::Done);
        assert_eq!(wire.ask(command::FLUSH, 0, 0, 0), Answer::Error(error::EIO));
        plan.set(vec![]);
        assert_eq!(wire.read(0, 512), Answer::Data(vec![1; 512]));
    }
}

/// Reads that fail from the first byte of this range on.
struct Bad {
    below: Arc<dyn BlockDevice>,
    from: u64,
    read: Arc<AtomicU64>,
}

struct BadQueue {
    below: Box<dyn IoQueue>,
    from: u64,
    read: Arc<AtomicU64>,
}

impl BlockDevice for Bad {
    fn geometry(&self) -> Geometry {
        self.below.geometry()
    }
    fn capabilities(&self) -> Capabilities {
        self.below.capabilities()
    }
    fn open_queue(&self, reactor: &Rc<Reactor>) -> Result<Box<dyn IoQueue>, DeviceError> {
        Ok(Box::new(BadQueue { below: self.below.open_queue(reactor)?, from: self.from, read: self.read.clone() }))
    }
    fn resize(&self, size: u64) -> Result<(), DeviceError> {
        self.below.resize(size)
    }
}

impl IoQueue for BadQueue {
    fn submit(&self, request: Request) {
        if request.op == Op::Read && request.end() > self.from {
            return request.complete(Err(Errno::EIO));
        }
        self.read.fetch_add(request.len, Ordering::Relaxed);
        self.below.submit(request);
    }
}

#[test]
fn a_cache_request_reads_its_range_and_tells_what_it_cannot_read() {
    let read = Arc::new(AtomicU64::new(0));
    let rig = Rig::new(Arc::new(Bad { below: memory(64 * MIB), from: 48 * MIB, read: read.clone() }));
    for headers in ALL {
        let mut wire = rig.attach(headers);
        let mut cache = |offset, len| {
            read.store(0, Ordering::Relaxed);
            (wire.ask(command::CACHE, 0, offset, len), read.load(Ordering::Relaxed))
        };
        assert_eq!(cache(1000, 10 * MIB), (Answer::Done, 10 * MIB));
        assert_eq!(cache(48 * MIB, 0), (Answer::Done, 0));
        assert_eq!(cache(0, 48 * MIB), (Answer::Done, 48 * MIB));
        assert_eq!(cache(40 * MIB, 24 * MIB), (Answer::Error(error::EIO), 8 * MIB), "it ends where it fails");
        assert_eq!(cache(0, 64 * MIB + 1), (Answer::Error(error::EINVAL), 0), "nothing is read of what is not all there");
        assert_eq!(cache(u64::MAX - 1, 2), (Answer::Error(error::EINVAL), 0));
        assert_eq!(cache(65 * MIB, 0), (Answer::Error(error::EINVAL), 0));
        assert_eq!(wire.read(0, 2), Answer::Data(vec![0; 2]));
        wire.disconnect();
    }
    assert_eq!(rig.export.stats().class(OpClass::Read).bytes, 6, "clients were sent no more");
}

#[test]
fn cache_requests_of_any_length_take_one_buffer_and_let_others_work() {
    const SIZE: u64 = 16 << 40;
    let rig = Rig::with(memory(SIZE), 1, ServerOptions::default(), |export| export);
    let mut greedy = rig.attach(Headers::Extended);
    let cookies: Vec<u64> = (0..100).map(|_| greedy.request(command::CACHE, 0, 0, SIZE)).collect();
    let mut other = rig.attach(Headers::Structured);
    let mut most = 0;
    for n in 0..50 {
        assert_eq!(other.write_all(n * 4096, &[7; 4096]), Answer::Done);
        assert_eq!(other.read(n * 4096, 4096), Answer::Data(vec![7; 4096]));
        most = most.max(rig.buffers_used());
    }
    assert!(most <= 2 << 20, "{most} bytes of buffers are in use");
    assert_eq!(greedy.read(0, 1), Answer::Data(vec![7]), "the same client's other requests overtake them");
    let first = rig.server.clients()[0].id;
    assert!(rig.server.disconnect(first), "years before the last of them could be done");
    let mut answered: Vec<u64> = cookies.iter().map(|_| greedy.answer()).map(|(cookie, _)| cookie).collect();
    answered.sort_unstable();
    assert_eq!(answered, cookies);
    assert!(greedy.is_closed());
    rig.wait_for_clients(1);
}

#[test]
fn a_client_that_vanishes_ends_its_cache_requests() {
    let (device, _) = slow(64 * MIB, Duration::from_millis(20), &[OpClass::Read]);
    let rig = Rig::new(device);
    for _ in 0..3 {
        let mut wire = rig.attach(Headers::Simple);
        for _ in 0..3 {
            wire.request(command::CACHE, 0, 0, 64 * MIB);
        }
        wire.send(b"this is no request header at all");
        assert!(wire.is_closed());
        let mut wire = rig.attach(Headers::Simple);
        wire.request(command::CACHE, 0, 0, 64 * MIB);
        drop(wire);
    }
    rig.wait_for_clients(0);
}

#[test]
fn a_disconnect_waits_for_writes_in_flight() {
    let (device, _) = slow(8 * MIB, Duration::from_millis(200), &[OpClass::Write]);
    let rig = Rig::new(device);
    let mut wire = rig.attach(Headers::Simple);
    let cookies: Vec<u64> = (0..16).map(|n| wire.write(0, n * 4096, &[n as u8 + 1; 4096])).collect();
    wire.request(command::DISC, 0, 0, 0);
    let mut answered: Vec<u64> = (0..16)
        .map(|_| wire.answer())
        .map(|(cookie, answer)| {
            assert_eq!(answer, Answer::Done);
            cookie
        })
        .collect();
    answered.sort_unstable();
    assert_eq!(answered, cookies);
    assert!(wire.is_closed());

    let mut dropped = rig.attach(Headers::Simple);
    for n in 0..16 {
        dropped.write(0, MIB + n * 4096, &[n as u8 + 1; 4096]);
    }
    drop(dropped);
    rig.wait_for_clients(0);
    let mut reader = rig.attach(Headers::Simple);
    for n in 0..16 {
        assert_eq!(reader.read(n * 4096, 4096), Answer::Data(vec![n as u8 + 1; 4096]));
    }
}

#[test]
fn many_requests_in_flight_are_all_answered_once() {
    let (device, _) = slow(64 * MIB, Duration::from_millis(1), &[OpClass::Read]);
    let rig = Rig::new(device);
    for headers in ALL {
        let mut wire = rig.attach(headers);
        let mut bytes = Vec::new();
        let mut waiting = HashMap::new();
        for n in 0..1000u64 {
            let len = 1 + n * 37 % 9000;
            let (cookie, header) = wire.header(command::READ, 0, n * 4096, len);
            bytes.extend(header);
            waiting.insert(cookie, len);
        }
        wire.send(&bytes);
        while !waiting.is_empty() {
            let (cookie, answer) = wire.answer();
            let len = waiting.remove(&cookie).expect("answered twice, or never asked");
            assert_eq!(answer, Answer::Data(vec![0; len as usize]));
        }
    }
}

/// Clients that ask for much and read nothing, and one that behaves.
fn beside_hogs(hogs: usize, requests: usize, len: u64) {
    let rig = Rig::with(memory(64 * MIB), 1, ServerOptions::default(), |export| export);
    let mut filler = rig.attach(Headers::Simple);
    assert_eq!(filler.write_all(0, &vec![6; PAYLOAD_MAX as usize]), Answer::Done);
    filler.disconnect();
    rig.wait_for_clients(0);
    let mut hogs: Vec<_> = (0..hogs).map(|_| rig.attach(Headers::Simple)).collect();
    for hog in &mut hogs {
        let bytes: Vec<u8> = (0..requests).flat_map(|_| hog.header(command::READ, 0, 0, len).1).collect();
        hog.send(&bytes);
    }
    let mut other = rig.attach(Headers::Structured);
    for n in 0..50 {
        assert_eq!(other.write_all(n * 4096, &[7; 128 << 10]), Answer::Done);
        assert_eq!(other.read(n * 4096, 128 << 10), Answer::Data(vec![7; 128 << 10]));
    }
    for hog in &mut hogs[..2] {
        for _ in 0..requests {
            assert!(matches!(hog.answer(), (_, Answer::Data(data)) if data.len() as u64 == len));
        }
    }
    let stuck = rig.server.clients()[2].id;
    assert!(rig.server.disconnect(stuck));
    let deadline = blockdev::clock::monotonic() + common::HANG;
    while rig.server.clients().iter().any(|client| client.id == stuck) {
        assert!(blockdev::clock::monotonic() < deadline, "a stuck client is not disconnected");
        std::thread::sleep(Duration::from_millis(20));
    }
}

#[test]
fn clients_that_do_not_read_hinder_nobody() {
    beside_hogs(40, 64, 4 * MIB);
}

#[test]
fn clients_that_do_not_read_one_large_reply_each_hinder_nobody() {
    beside_hogs(40, 1, PAYLOAD_MAX);
}

#[test]
fn clients_that_do_not_send_the_payload_they_announced_hinder_nobody_for_long() {
    let rig = Rig::with(memory(64 * MIB), 1, ServerOptions::default(), |export| export);
    let mut other = rig.attach(Headers::Simple);
    let lengths = (14..=25).rev().flat_map(|power| [1 << power; 8]).chain([4096; 64]);
    let hogs: Vec<_> = lengths
        .map(|len| {
            let mut hog = rig.attach(Headers::Simple);
            hog.request(command::WRITE, 0, 0, len);
            hog
        })
        .collect();
    let mut late = rig.attach(Headers::Simple);
    for n in 0..20 {
        assert_eq!(other.write_all(n * 4096, &[7; 128 << 10]), Answer::Done);
        assert_eq!(other.read(n * 4096, 128 << 10), Answer::Data(vec![7; 128 << 10]));
    }
    assert_eq!(
        late.read(0, 4096),
        Answer::Data(vec![7; 4096]),
        "who attaches when all memory is taken waits for it like the others"
    );
    assert!(rig.server.clients().len() < 2 + hogs.len(), "they had all the memory, so some had to go");
}

/// A device of which every second part is a hole.
struct Striped(Arc<dyn BlockDevice>);

struct StripedQueue(Box<dyn IoQueue>);

impl BlockDevice for Striped {
    fn geometry(&self) -> Geometry {
        self.0.geometry()
    }
    fn capabilities(&self) -> Capabilities {
        self.0.capabilities()
    }
    fn open_queue(&self, reactor: &Rc<Reactor>) -> Result<Box<dyn IoQueue>, DeviceError> {
        Ok(Box::new(StripedQueue(self.0.open_queue(reactor)?)))
    }
    fn resize(&self, size: u64) -> Result<(), DeviceError> {
        self.0.resize(size)
    }
}

impl IoQueue for StripedQueue {
    fn submit(&self, request: Request) {
        if request.op != Op::BlockStatus {
            return self.0.submit(request);
        }
        let part = |n| Extent { len: request.len / 4096, kind: if n % 2 == 0 { ExtentKind::Data } else { ExtentKind::Hole } };
        let extents = (0..4096).map(part).collect();
        request.complete_with(Ok(()), Payload::Extents(extents));
    }
}

#[test]
fn answers_about_extents_that_nobody_takes_are_few() {
    let rig = Rig::with(Arc::new(Striped(memory(64 * MIB))), 1, ServerOptions::default(), |export| export);
    let mut wire = rig.attach(Headers::Extended);
    let cookies: Vec<u64> = (0..128).map(|_| wire.request(command::BLOCK_STATUS, 0, 0, 64 * MIB)).collect();
    std::thread::sleep(Duration::from_millis(300));
    let started = rig.export.stats().class(OpClass::BlockStatus).started;
    assert!(started < 64, "{started} answers wait for a client that takes none");
    for _ in cookies {
        assert!(matches!(wire.answer().1, Answer::Extents(extents) if extents.len() == 4096));
    }
}

#[test]
fn a_large_receive_buffer_is_given_back() {
    let rig = Rig::new(memory(MIB));
    let mut wire = rig.attach(Headers::Simple);
    let mut bytes = Vec::new();
    for _ in 0..64 {
        bytes.extend(wire.header(command::WRITE, 0, 0, 4096).1);
        bytes.extend([1; 4096]);
    }
    wire.send(&bytes);
    for _ in 0..64 {
        assert_eq!(wire.answer().1, Answer::Done);
    }
    let deadline = blockdev::clock::monotonic() + common::HANG;
    while rig.buffers_used() > 4096 {
        assert!(blockdev::clock::monotonic() < deadline, "still {} bytes", rig.buffers_used());
        std::thread::sleep(Duration::from_millis(20));
    }
    assert_eq!(wire.read(0, 2), Answer::Data(vec![1; 2]));
}

#[test]
fn withdrawing_an_export_drains_its_clients() {
    let (device, _) = slow(MIB, Duration::from_millis(300), &[OpClass::Write]);
    let rig = Rig::new(device);
    let mut wire = rig.attach(Headers::Structured);
    let mut stuck = rig.attach(Headers::Simple);
    let cookie = wire.write(0, 0, &[1; 512]);
    stuck.write(0, 512, &[1; 512]);
    let deadline = blockdev::clock::monotonic() + common::HANG;
    while rig.export.stats().class(OpClass::Write).started < 2 {
        assert!(blockdev::clock::monotonic() < deadline);
        std::thread::sleep(Duration::from_millis(1));
    }
    rig.runtime.block_on(rig.server.withdraw(&rig.export));
    assert!(rig.server.clients().is_empty());
    assert_eq!(wire.answer_to(cookie), Answer::Done);
    assert!(wire.is_closed());
    let mut late = common::Wire::connect(&rig.socket);
    let replies = late.option(nbd::protocol::option::GO, &common::Wire::go_data("disk"));
    assert_eq!(replies[0].0, nbd::protocol::option_reply::ERR_UNKNOWN);
}

#[test]
fn clients_are_listed_and_can_be_disconnected() {
    let rig = Rig::new(memory(MIB));
    let mut first = rig.attach(Headers::Simple);
    let mut second = rig.attach(Headers::Simple);
    first.write_all(0, &[1; 4096]);
    second.read(0, 512);
    let clients = rig.server.clients();
    assert_eq!(clients.len(), 2);
    assert_eq!((clients[0].requests, clients[0].bytes_written, clients[1].bytes_read), (1, 4096, 512));
    assert_eq!(clients[0].export, "disk");
    assert!(clients[0].peer.contains(&format!("process {}", std::process::id())), "{}", clients[0].peer);
    assert!(rig.server.disconnect(clients[0].id));
    assert!(!rig.server.disconnect(12345));
    assert!(first.is_closed());
    rig.wait_for_clients(1);
    assert_eq!(second.read(0, 1), Answer::Data(vec![1]));
}

/// One thing a client does. Ranges are in a disk of [`MODEL_SIZE`] bytes and may reach beyond it.
#[derive(Clone, Debug)]
enum Step {
    Read(u64, u64),
    Write(u64, u64, u8, bool),
    Zero(u64, u64, u16),
    Trim(u64, u64),
    Status(u64, u64),
    Flush,
}

const MODEL_SIZE: u64 = 300_000;

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let range = || (0..MODEL_SIZE + 2000, prop_oneof![0..600u64, 0..60_000u64]);
    let step = prop_oneof![
        4 => range().prop_map(|(offset, len)| Step::Read(offset, len)),
        4 => (range(), any::<u8>(), any::<bool>()).prop_map(|((offset, len), byte, fua)| Step::Write(offset, len, byte, fua)),
        1 => (range(), 0u16..4).prop_map(|((offset, len), flags)| Step::Zero(offset, len, flags)),
        1 => range().prop_map(|(offset, len)| Step::Trim(offset, len)),
        1 => range().prop_map(|(offset, len)| Step::Status(offset, len)),
        1 => Just(Step::Flush),
    ];
    proptest::collection::vec(step, 1..60)
}

/// Sends everything in one go, cut anywhere, one request at a time on the disk's bytes: requests that overlap one before them
/// wait for its reply first, as a client must.
fn run_model(headers: Headers, steps: &[Step], chunk: usize) {
    let rig = Rig::with(memory(MODEL_SIZE), 1, ServerOptions::default(), |export| export);
    let mut wire = rig.attach(headers);
    let mut model = vec![0u8; MODEL_SIZE as usize];
    let mut expected = HashMap::new();
    let mut busy: Vec<(u64, u64)> = Vec::new();
    let mut bytes = Vec::new();
    for step in steps {
        let (command, flags, offset, len) = match *step {
            Step::Read(offset, len) => (command::READ, 0, offset, len),
            Step::Write(offset, len, _, fua) => (command::WRITE, u16::from(fua), offset, len),
            Step::Zero(offset, len, flags) => (command::WRITE_ZEROES, flags, offset, len),
            Step::Trim(offset, len) => (command::TRIM, 0, offset, len),
            Step::Status(offset, len) => (command::BLOCK_STATUS, 0, offset, len),
            Step::Flush => (command::FLUSH, 0, 0, 0),
        };
        if busy.iter().any(|(start, end)| offset < *end && *start < offset + len) {
            settle(&mut wire, &mut bytes, &mut expected, chunk);
            busy.clear();
        }
        busy.push((offset, offset + len));
        let (cookie, header) = wire.header(command, flags, offset, len);
        bytes.extend(header);
        let range = (offset + len <= MODEL_SIZE).then_some(offset as usize..(offset + len) as usize);
        let answer = match (step, range) {
            (Step::Write(..) | Step::Zero(..), None) => Some(Answer::Error(error::ENOSPC)),
            (_, None) => Some(Answer::Error(error::EINVAL)),
            (Step::Status(..), Some(range)) if range.is_empty() || headers == Headers::Simple => {
                Some(Answer::Error(error::EINVAL))
            }
            (Step::Status(..), Some(_)) => None,
            (Step::Read(..), Some(range)) if range.is_empty() && headers != Headers::Simple => Some(Answer::Done),
            (Step::Read(..), Some(range)) => Some(Answer::Data(model[range].to_vec())),
            (Step::Write(_, _, byte, _), Some(range)) => {
                model[range].fill(*byte);
                Some(Answer::Done)
            }
            (Step::Zero(..) | Step::Trim(..), Some(range)) => {
                model[range].fill(0);
                Some(Answer::Done)
            }
            (Step::Flush, Some(_)) => Some(Answer::Done),
        };
        if let Step::Write(_, len, byte, _) = step {
            bytes.extend(vec![*byte; *len as usize]);
        }
        expected.insert(cookie, answer);
    }
    settle(&mut wire, &mut bytes, &mut expected, chunk);
    wire.disconnect();
}

fn settle(wire: &mut common::Wire, bytes: &mut Vec<u8>, expected: &mut HashMap<u64, Option<Answer>>, chunk: usize) {
    for part in bytes.chunks(chunk) {
        wire.send(part);
    }
    bytes.clear();
    while !expected.is_empty() {
        let (cookie, answer) = wire.answer();
        match expected.remove(&cookie).expect("an answer to nothing") {
            Some(wanted) => assert!(wanted == answer, "wanted {wanted:?}, got {answer:?}"),
            None => assert!(matches!(answer, Answer::Extents(_)), "{answer:?}"),
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 40, ..ProptestConfig::default() })]

    #[test]
    fn pipelined_requests_match_a_model(
        kind in 0usize..3,
        steps in steps(),
        chunk in prop_oneof![1usize..100, 100usize..50_000],
    ) {
        run_model(ALL[kind], &steps, chunk);
    }
}
