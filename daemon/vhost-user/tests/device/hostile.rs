//! What a guest or a front end can throw at the device. Whatever it is, the daemon goes on, other rings go on, and memory that
//! was not shared is not touched.

use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::sync::Arc;
use std::time::Duration;

use blockdev::layers::fault::{FaultPlan, FaultRule, Faulty};
use blockdev::memory_disk::MemoryDisk;
use blockdev::stats::OpClass;
use blockdev::{BlockDevice, Errno};
use proptest::prelude::*;
use rustix::fs::{MemfdFlags, ftruncate, memfd_create};

use crate::frontend::*;
use crate::{DISK, Server, eventually};

/// Two queues; the second must survive what happens to the first.
fn pair() -> (Server, Frontend, Queue, Queue) {
    pair_on(Arc::new(MemoryDisk::new(DISK, 1)))
}

/// With a disk whose writes take so long.
fn slow_pair(delay: Duration) -> (Server, Frontend, Queue, Queue) {
    let plan = FaultPlan::new(1);
    plan.set(vec![FaultRule { class: OpClass::Write, errors_per_million: 0, errno: Errno::EIO, delay, jitter: Duration::ZERO }]);
    pair_on(Arc::new(Faulty::new(Arc::new(MemoryDisk::new(DISK, 1)), plan)))
}

fn pair_on(disk: Arc<dyn BlockDevice>) -> (Server, Frontend, Queue, Queue) {
    let server = Server::of(disk);
    let frontend = Frontend::connect(&server.socket());
    let (victim, witness) = (Queue::new(0, 64), Queue::new(1, 64));
    frontend.start(&victim, 0);
    frontend.start(&witness, 0);
    (server, frontend, victim, witness)
}

fn assert_broken(frontend: &Frontend, victim: &Queue, witness: &mut Queue) {
    assert!(wait_readable(victim.error.as_fd(), PATIENCE), "no error was signalled");
    let _ = rustix::io::read(&victim.error, &mut [0; 8]);
    assert_eq!(witness.run(&frontend.memory, T_IN, 0, Data::In(512)), 0);
}

/// After the driver has set its ring up anew, it works.
fn assert_mends(frontend: &Frontend, victim: &mut Queue) {
    frontend.stop(victim.index);
    frontend.memory.u16(victim.avail + 2).store(0, std::sync::atomic::Ordering::SeqCst);
    frontend.memory.u16(victim.used + 2).store(0, std::sync::atomic::Ordering::SeqCst);
    victim.seen_used = 0;
    frontend.start(victim, 0);
    assert_eq!(victim.run(&frontend.memory, T_OUT, 0, Data::Out(&[1; 512])), 0);
}

fn breaks(descriptors: &[(u16, Desc)], table: &[Desc]) {
    let (_server, frontend, mut victim, mut witness) = pair();
    let memory = &frontend.memory;
    memory.write(victim.data, &[0; 16]);
    for (at, entry) in table.iter().enumerate() {
        memory.write(victim.data + 0x1000 + 16 * at as u64, &entry.bytes());
    }
    for (index, desc) in descriptors {
        victim.set_desc(memory, *index, *desc);
    }
    victim.offer(memory, 0);
    victim.kick();
    assert_broken(&frontend, &victim, &mut witness);
    assert_eq!(victim.used_index(memory), 0, "nothing was given back");
    assert_mends(&frontend, &mut victim);
}

const HEADER: u64 = GUEST + 0x10000;
const TABLE: u64 = HEADER + 0x1000;

fn desc(address: u64, len: u32, flags: u16, next: u16) -> Desc {
    Desc { address, len, flags, next }
}

#[test]
fn a_chain_in_a_circle_breaks_its_ring() {
    breaks(&[(0, desc(HEADER, 16, NEXT, 1)), (1, desc(HEADER, 16, NEXT, 0))], &[]);
}

#[test]
fn a_chain_that_leaves_the_table_breaks_its_ring() {
    breaks(&[(0, desc(HEADER, 16, NEXT, 64))], &[]);
    breaks(&[(0, desc(HEADER, 16, NEXT, u16::MAX))], &[]);
}

#[test]
fn a_chain_without_a_status_breaks_its_ring() {
    breaks(&[(0, desc(HEADER, 16, 0, 0))], &[]);
    breaks(&[(0, desc(HEADER, 16, NEXT, 1)), (1, desc(HEADER, 0, WRITE, 0))], &[]);
}

#[test]
fn a_status_outside_of_memory_breaks_its_ring() {
    for address in [0, GUEST - 1, GUEST + MEMORY, u64::MAX, USER] {
        breaks(&[(0, desc(HEADER, 16, NEXT, 1)), (1, desc(address, 1, WRITE, 0))], &[]);
    }
    breaks(&[(0, desc(HEADER, 16, NEXT, 1)), (1, desc(u64::MAX - 1, u32::MAX, WRITE, 0))], &[]);
}

#[test]
fn a_readable_part_behind_a_writable_one_breaks_its_ring() {
    breaks(&[(0, desc(HEADER, 16, WRITE | NEXT, 1)), (1, desc(HEADER, 16, 0, 0))], &[]);
}

#[test]
fn indirect_tables_are_not_trusted() {
    let indirect = |len, flags| [(0, desc(TABLE, len, INDIRECT | flags, 0))];
    breaks(&indirect(0, 0), &[]);
    breaks(&indirect(17, 0), &[]);
    breaks(&indirect(32, NEXT), &[]);
    breaks(&indirect(16, 0), &[desc(TABLE, 16, INDIRECT, 0)]);
    breaks(&indirect(32, 0), &[desc(HEADER, 16, NEXT, 2)]);
    breaks(&indirect(32, 0), &[desc(HEADER, 16, NEXT, 1), desc(HEADER, 16, NEXT, 0)]);
    breaks(&[(0, desc(GUEST + MEMORY - 16, 32, INDIRECT, 0))], &[]);
    breaks(&[(0, desc(GUEST, !15u32, INDIRECT, 0))], &[]);
}

#[test]
fn an_indirect_table_that_was_not_negotiated_breaks_its_ring() {
    let server = Server::start();
    let frontend = Frontend::connect_with(&server.socket(), SharedMemory::new(MEMORY), !F_INDIRECT);
    let (victim, mut witness) = (Queue::new(0, 64), Queue::new(1, 64));
    frontend.start(&victim, 0);
    frontend.start(&witness, 0);
    victim.set_desc(&frontend.memory, 0, desc(TABLE, 32, INDIRECT, 0));
    victim.offer(&frontend.memory, 0);
    victim.kick();
    assert_broken(&frontend, &victim, &mut witness);
}

#[test]
fn impossible_indices_break_the_ring() {
    for (available, head) in [(65, 0), (40000, 0), (1, 64), (1, u16::MAX)] {
        let (_server, frontend, mut victim, mut witness) = pair();
        let memory = &frontend.memory;
        memory.u16(victim.avail + 4).store(head, std::sync::atomic::Ordering::SeqCst);
        memory.u16(victim.avail + 2).store(available, std::sync::atomic::Ordering::SeqCst);
        victim.kick();
        assert_broken(&frontend, &victim, &mut witness);
        assert_mends(&frontend, &mut victim);
    }
}

#[test]
fn a_head_made_available_twice_breaks_its_ring() {
    let (_server, frontend, mut victim, mut witness) = slow_pair(Duration::from_millis(100));
    victim.write_request(&frontend.memory, 0, T_OUT, 0, Data::Out(&[3; 512]));
    victim.offer(&frontend.memory, 0);
    victim.offer(&frontend.memory, 0);
    victim.kick();
    assert_broken(&frontend, &victim, &mut witness);
    assert_eq!(victim.wait_used(&frontend.memory), (0, 1), "the first of them is answered all the same");
    assert_mends(&frontend, &mut victim);
}

#[test]
fn a_front_end_that_never_stops_talking_can_be_disconnected() {
    let server = Server::start();
    let frontend = Frontend::connect(&server.socket());
    let talker = frontend.socket.try_clone().unwrap();
    let talking = std::thread::spawn(move || {
        use std::io::Write;
        let message = u32s(&[req::SET_OWNER, 1, 0]);
        while (&talker).write_all(&message).is_ok() {}
    });
    server.export.disconnect();
    talking.join().unwrap();
    eventually("the session ends", || server.export.clients().is_empty());
}

#[test]
fn what_has_a_status_byte_gets_an_error_in_it() {
    let (_server, frontend, mut queue, _) = pair();
    let memory = &frontend.memory;
    let mut answer = |data: &[Desc]| {
        memory.write(queue.data, &[0; 17]);
        memory.write(queue.data + 16, &[0xee]);
        let last = data.len() as u16 + 1;
        queue.set_desc(memory, 0, desc(HEADER, 16, NEXT, 1));
        for (at, entry) in data.iter().enumerate() {
            let next = at as u16 + 2;
            queue.set_desc(memory, next - 1, Desc { flags: entry.flags | NEXT, next, ..*entry });
        }
        queue.set_desc(memory, last, desc(HEADER + 16, 1, WRITE, 0));
        queue.offer(memory, 0);
        queue.kick();
        queue.wait_used(memory);
        memory.read(queue.data + 16, 1)[0]
    };
    assert_eq!(answer(&[desc(GUEST + MEMORY, 512, WRITE, 0)]), 1, "data outside of memory");
    assert_eq!(answer(&[desc(GUEST + MEMORY - 256, 512, WRITE, 0)]), 1, "data across the end of memory");
    assert_eq!(answer(&[desc(u64::MAX - 100, 512, WRITE, 0)]), 1, "an address that overflows");
    assert_eq!(answer(&[desc(GUEST, u32::MAX, WRITE, 0); 3]), 1, "lengths that overflow");
    assert_eq!(answer(&[desc(HEADER + 512, 512, WRITE, 0)]), 0, "an honest one");
    queue.set_desc(memory, 0, desc(HEADER, 15, NEXT, 1));
    queue.set_desc(memory, 1, desc(HEADER + 16, 1, WRITE, 0));
    queue.offer(memory, 0);
    queue.kick();
    queue.wait_used(memory);
    assert_eq!(memory.read(queue.data + 16, 1), [1], "half a header");
}

#[test]
fn a_chain_of_too_many_segments_is_refused() {
    let (_server, frontend, mut queue, _) = pair();
    let memory = &frontend.memory;
    for (count, expected) in [(126u16, 0), (127, 1)] {
        memory.write(queue.data, &[0; 17]);
        memory.write(queue.data + 16, &[0xee]);
        let mut table = vec![desc(HEADER, 16, NEXT, 1)];
        table.extend((0..count).map(|at| desc(HEADER + 0x8000, 512, WRITE | NEXT, at + 2)));
        table.push(desc(HEADER + 16, 1, WRITE, 0));
        if count > 126 {
            // One descriptor fewer would do for the ring; the status stands behind the last data.
            table.truncate(128);
            table[127] = desc(HEADER + 16 - 511, 512, WRITE, 0);
            memory.write(queue.data + 0x1000 + 0x1000, &[0]);
        }
        let bytes: Vec<u8> = table.iter().flat_map(|entry| entry.bytes()).collect();
        memory.write(queue.data + 0x1000, &bytes);
        queue.set_desc(memory, 0, desc(TABLE, bytes.len() as u32, INDIRECT, 0));
        queue.offer(memory, 0);
        queue.kick();
        queue.wait_used(memory);
        assert_eq!(memory.read(queue.data + 16, 1), [expected], "{count} segments");
    }
}

#[test]
fn ring_sizes_and_numbers_out_of_range_are_refused() {
    let (_server, frontend, _, mut witness) = pair();
    for size in [0, 3, 100, 2048, 65536, u32::MAX] {
        assert_ne!(frontend.try_tell(req::SET_VRING_NUM, &u32s(&[0, size]), &[]), 0, "{size}");
    }
    for ring in [64, 255, u32::MAX] {
        assert_ne!(frontend.try_tell(req::SET_VRING_NUM, &u32s(&[ring, 64]), &[]), 0);
        assert_ne!(frontend.try_tell(req::SET_VRING_ENABLE, &u32s(&[ring, 1]), &[]), 0);
        assert_eq!(frontend.stop(ring), 0, "an unknown ring is answered too");
    }
    for base in [0x1_0000, u32::MAX] {
        assert_ne!(frontend.try_tell(req::SET_VRING_BASE, &u32s(&[0, base]), &[]), 0, "{base}");
    }
    assert_ne!(frontend.try_tell(req::SET_FEATURES, &u64s(&[u64::MAX]), &[]), 0);
    assert_ne!(frontend.try_tell(req::SET_PROTOCOL_FEATURES, &u64s(&[u64::MAX]), &[]), 0);
    assert_ne!(frontend.try_tell(22, &[0; 32], &[]), 0, "an IOTLB message");
    let not_an_event = memfd_create("file", MemfdFlags::CLOEXEC).unwrap();
    assert_ne!(frontend.try_tell(req::SET_VRING_KICK, &u64s(&[0]), &[not_an_event.as_fd()]), 0);
    assert_eq!(witness.run(&frontend.memory, T_IN, 0, Data::In(512)), 0);
}

#[test]
fn odd_parts_of_the_configuration_are_read_as_they_are() {
    let server = Server::start();
    let frontend = Frontend::connect(&server.socket());
    let whole = frontend.config(0, 60);
    for (offset, len) in [(0, 1), (3, 7), (59, 1), (59, 5), (60, 4), (200, 9), (0x100, 3), (0x13b, 2), (0xf00, 0x100)] {
        let start = if offset >= 0x100 { offset - 0x100 } else { offset } as usize;
        let expected: Vec<u8> = (start..start + len as usize).map(|at| whole.get(at).copied().unwrap_or(0)).collect();
        assert_eq!(frontend.config(offset, len), expected, "{len} bytes at {offset}");
    }
    drop(frontend);
    for (offset, len, given) in [(0u32, 0u32, 0usize), (0, 8, 7), (u32::MAX, 8, 8), (0xfff, 2, 2), (0, u32::MAX, 8)] {
        let frontend = Frontend::connect(&server.socket());
        frontend.tell(req::GET_CONFIG, &[u32s(&[offset, len, 0]), vec![0; given]].concat(), &[]);
        assert!(frontend.is_hung_up(), "{len} bytes at {offset}, {given} given");
        eventually("the session ends", || server.export.clients().is_empty());
    }
}

/// How many descriptors of this process lead to the eventfd.
fn holders(event: &OwnedFd) -> usize {
    let id = |path: std::path::PathBuf| {
        let text = std::fs::read_to_string(path).unwrap_or_default();
        text.lines().find(|line| line.starts_with("eventfd-id")).map(str::to_owned)
    };
    let own = id(format!("/proc/self/fdinfo/{}", event.as_raw_fd()).into()).expect("the kernel numbers its eventfds");
    let all = std::fs::read_dir("/proc/self/fdinfo").unwrap().flatten();
    all.filter(|entry| id(entry.path()).as_ref() == Some(&own)).count()
}

#[test]
fn signals_that_nobody_takes_are_not_left_behind() {
    let server = Server::start();
    let frontend = Frontend::connect(&server.socket());
    let queue = Queue::new(0, 64);
    rustix::io::write(&queue.call, &(u64::MAX - 1).to_ne_bytes()).unwrap();
    frontend.configure(&queue, 0);
    // Whoever writes to it now waits.
    rustix::fs::fcntl_setfl(&queue.call, rustix::fs::OFlags::empty()).unwrap();
    frontend.kick_and_enable(&queue);
    queue.write_request(&frontend.memory, 0, T_OUT, 0, Data::Out(&[1; 512]));
    queue.offer(&frontend.memory, 0);
    queue.kick();
    eventually("the request is answered", || queue.used_index(&frontend.memory) == 1);
    assert_eq!(frontend.stop(0), 1);
    drop(frontend);
    eventually("nothing waits for the descriptor", || holders(&queue.call) == 1);
}

#[test]
fn ring_addresses_outside_of_memory_break_the_ring_alone() {
    let (_server, frontend, mut victim, mut witness) = pair();
    let good = victim.desc;
    for bad in [MEMORY - 16, MEMORY, u64::MAX - USER - 15] {
        victim.desc = bad;
        frontend.set_addresses(&victim, None);
        assert_broken(&frontend, &victim, &mut witness);
    }
    victim.desc = good;
    assert_mends(&frontend, &mut victim);
}

#[test]
fn garbage_on_the_socket_ends_that_connection_alone() {
    let server = Server::start();
    for (request, flags, payload, fds) in [
        (0x7fff_ffffu32, 1u32, vec![], 0),
        (1, 0, vec![], 0),
        (1, 5, vec![], 0),
        (2, 1, vec![0; 7], 0),
        (5, 1, vec![0xff; 4000], 0),
        (5, 1, vec![0; 5000], 0),
        (12, 1, vec![0; 8], 0),
        (1, 1, vec![], 1),
        (2, 1, vec![0; 8], 33),
    ] {
        let socket = std::os::unix::net::UnixStream::connect(server.socket()).unwrap();
        let file = event();
        let fds: Vec<_> = (0..fds).map(|_| file.as_fd()).collect();
        send(&socket, request, flags, &payload, &fds);
        assert!(receive(&socket).is_none(), "request {request} flags {flags}");
        eventually("the connection ends", || server.export.clients().is_empty());
    }
    let frontend = Frontend::connect(&server.socket());
    let mut queue = Queue::new(0, 64);
    frontend.start(&queue, 0);
    assert_eq!(queue.run(&frontend.memory, T_IN, 0, Data::In(512)), 0);
}

#[test]
fn a_message_that_arrives_byte_by_byte_is_understood() {
    use std::io::Write;
    let server = Server::start();
    let mut socket = std::os::unix::net::UnixStream::connect(server.socket()).unwrap();
    for byte in u32s(&[req::GET_FEATURES, 1, 0]) {
        socket.write_all(&[byte]).unwrap();
    }
    assert!(receive(&socket).unwrap().u64() & F_PROTOCOL != 0);
}

#[test]
fn memory_that_vanishes_ends_its_session_alone() {
    let server = Server::start();
    let frontend = Frontend::connect(&server.socket());
    let mut queue = Queue::new(0, 64);
    frontend.start(&queue, 0);
    assert_eq!(queue.run(&frontend.memory, T_OUT, 0, Data::Out(&[7; 512])), 0);
    queue.write_request(&frontend.memory, 0, T_IN, 0, Data::In(512));
    queue.offer(&frontend.memory, 0);
    ftruncate(&frontend.memory.file, 0).unwrap();
    queue.kick();
    assert!(frontend.is_hung_up());
    let again = Frontend::connect(&server.socket());
    let mut queue = Queue::new(0, 64);
    again.start(&queue, 0);
    assert_eq!(queue.run(&again.memory, T_IN, 0, Data::In(512)), 0);
    assert_eq!(queue.read_data(&again.memory, 0, 512), [7; 512]);
}

#[test]
fn a_file_shorter_than_its_region_is_refused() {
    let server = Server::start();
    let frontend = Frontend::connect(&server.socket());
    let file = memfd_create("short", MemfdFlags::CLOEXEC).unwrap();
    ftruncate(&file, 4096).unwrap();
    let region = [u32s(&[1, 0]), u64s(&[GUEST, 8192, USER, 0])].concat();
    assert_ne!(frontend.try_tell(req::SET_MEM_TABLE, &region, &[file.as_fd()]), 0);
    let overlapping = [u32s(&[2, 0]), u64s(&[GUEST, 4096, USER, 0, GUEST, 4096, USER + 4096, 0])].concat();
    assert_ne!(frontend.try_tell(req::SET_MEM_TABLE, &overlapping, &[file.as_fd(), file.as_fd()]), 0);
}

#[test]
fn features_toggled_in_flight_do_no_harm() {
    let (_server, frontend, mut queue, mut other) = slow_pair(Duration::from_millis(50));
    let mut in_flight = 0;
    for round in 0..20u8 {
        queue.write_request(&frontend.memory, 0, T_OUT, u64::from(round), Data::Out(&[round; 512]));
        queue.offer(&frontend.memory, 0);
        queue.kick();
        // Time to take it, and too little to finish it.
        std::thread::sleep(Duration::from_millis(10));
        in_flight += u32::from(queue.used_index(&frontend.memory) == queue.seen_used);
        let features = if round % 2 == 0 { frontend.features & !F_EVENT_INDEX } else { frontend.features };
        frontend.must(req::SET_FEATURES, &u64s(&[features]), &[]);
        assert_eq!(queue.wait_used(&frontend.memory).0, 0);
        assert_eq!(queue.status(&frontend.memory, 0), 0);
        assert_eq!(other.run(&frontend.memory, T_IN, u64::from(round), Data::In(512)), 0);
        assert_eq!(other.read_data(&frontend.memory, 0, 512), [round; 512]);
    }
    assert!(in_flight > 0, "no request was in flight while features changed");
}

/// Descriptors biased towards being almost right.
fn any_desc() -> impl Strategy<Value = Desc> {
    let address = prop_oneof![
        4 => (0..0x4000u64).prop_map(|at| HEADER + at),
        2 => (0..0x400u64).prop_map(|at| TABLE + at * 16),
        1 => any::<u64>(),
        1 => (0..64u64).prop_map(|at| GUEST + MEMORY - at),
    ];
    let len = prop_oneof![3 => 0..600u32, 2 => (0..10u32).prop_map(|count| count * 16), 1 => any::<u32>()];
    let flags = prop_oneof![5 => 0..8u16, 1 => any::<u16>()];
    let next = prop_oneof![8 => 0..16u16, 1 => any::<u16>()];
    (address, len, flags, next).prop_map(|(address, len, flags, next)| Desc { address, len, flags, next })
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 24, ..ProptestConfig::default() })]

    /// Whatever the descriptors: each chain is answered or its ring broken; the witness and the canary behind memory live.
    #[test]
    fn any_chain_is_survived(
        rounds in proptest::collection::vec((
            proptest::collection::vec(any_desc(), 16),
            proptest::collection::vec(any_desc(), 16),
            proptest::collection::vec(any::<u8>(), 32),
            proptest::collection::vec(0..20u16, 1..8),
        ), 1..8),
    ) {
        let (_server, frontend, mut victim, mut witness) = pair();
        let memory = &frontend.memory;
        for (ring, table, header, heads) in rounds {
            for (at, entry) in ring.iter().enumerate() {
                victim.set_desc(memory, at as u16, *entry);
            }
            for (at, entry) in table.iter().enumerate() {
                memory.write(victim.data + 0x1000 + 16 * at as u64, &entry.bytes());
            }
            memory.write(victim.data, &header);
            memory.write(victim.data, &[header[0] % 16, 0, 0, 0]);
            for head in heads {
                victim.offer(memory, head);
            }
            victim.kick();
            prop_assert_eq!(witness.run(memory, T_IN, 0, Data::In(512)), 0);
        }
        frontend.stop(0);
        assert_mends(&frontend, &mut victim);
    }
}
