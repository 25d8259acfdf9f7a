//! Guests whose memory is pinned.

mod common;
#[path = "../vhost-user/tests/device/frontend.rs"]
#[allow(dead_code, reason = "only a part of it is needed here")]
mod frontend;

use std::os::fd::AsFd;

use common::{Daemon, eventually};
use frontend::{Desc, Frontend, GUEST, MEMORY, NEXT, Queue, SharedMemory, T_IN, T_OUT, WRITE, req, u64s};
use rustix::fs::{FallocateFlags, fallocate, fstat};

const PART: u64 = 16 << 10;
const PARTS: u64 = 4;
const LEN: usize = (PART * PARTS) as usize;
/// Offsets in the guest's memory.
const HEADER: u64 = 8 << 20;
const STATUS: u64 = HEADER + 16;
const DATA: u64 = 9 << 20;

fn part_at(part: u64) -> u64 {
    DATA + part * 2 * PART
}

/// A daemon that pins, a guest of it, and its queue.
struct Rig {
    daemon: Daemon,
    guest: Frontend,
    queue: Queue,
}

impl Rig {
    fn start() -> Rig {
        let memory = SharedMemory::new(MEMORY);
        memory.write(0, &vec![0; MEMORY as usize]);
        let rig = Rig::with(memory);
        rig.wait_for_log("of guest memory are pinned");
        rig
    }

    fn with(memory: SharedMemory) -> Rig {
        let mut daemon = Daemon::new("");
        let config = daemon.config();
        daemon.configure(&config.replace("[pool.local]", "pin_guest_memory = true\n\n[pool.local]"));
        daemon.start();
        daemon.json(&["volume", "create", "v", "--size", "1M", "--layout", "raw"]);
        daemon.json(&["export", "add", "v", "--nbd"]);
        let socket = daemon.path("v.sock");
        daemon.json(&["export", "add", "v", "--vhost-user", socket.to_str().unwrap()]);
        let guest = Frontend::connect_with(&socket, memory, u64::MAX);
        let queue = Queue::new(0, 64);
        guest.start(&queue, 0);
        Rig { daemon, guest, queue }
    }

    fn wait_for_log(&self, text: &str) {
        eventually(&format!("{text:?} in the log"), || self.daemon.log().contains(text));
    }

    /// A request of four scattered parts at the start of the disk; it must succeed.
    fn transfer(&mut self, kind: u32) {
        let memory = &self.guest.memory;
        memory.write(HEADER, &[kind.to_le_bytes().as_slice(), &[0; 12]].concat());
        memory.write(STATUS, &[0xee]);
        let direction = if kind == T_IN { WRITE } else { 0 };
        self.queue.set_desc(memory, 0, Desc { address: GUEST + HEADER, len: 16, flags: NEXT, next: 1 });
        for part in 0..PARTS {
            let desc = Desc { address: GUEST + part_at(part), len: PART as u32, flags: NEXT | direction, next: part as u16 + 2 };
            self.queue.set_desc(memory, part as u16 + 1, desc);
        }
        let last = PARTS as u16 + 1;
        self.queue.set_desc(memory, last, Desc { address: GUEST + STATUS, len: 1, flags: WRITE, next: 0 });
        self.queue.offer(memory, 0);
        self.queue.kick();
        self.queue.wait_used(memory);
        assert_eq!(memory.read(STATUS, 1), [0]);
    }

    fn write(&mut self, seed: u8) {
        for part in 0..PARTS {
            self.guest.memory.write(part_at(part), &bytes_of(seed, part));
        }
        self.transfer(T_OUT);
    }

    fn read(&mut self) -> Vec<u8> {
        self.transfer(T_IN);
        (0..PARTS).flat_map(|part| self.guest.memory.read(part_at(part), PART as usize)).collect()
    }

    fn on_disk(&self) -> Vec<u8> {
        self.daemon.attach("v").read(0, LEN as u32)
    }

    /// As a balloon does: the guest finds other pages there from now on.
    fn take_back(&self) {
        let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
        fallocate(&self.guest.memory.file, flags, DATA, PARTS * 2 * PART).unwrap();
    }
}

fn bytes_of(seed: u8, part: u64) -> Vec<u8> {
    (0..PART).map(|at| seed.wrapping_add(part as u8).wrapping_mul(31).wrapping_add((at / 512) as u8)).collect()
}

fn all_of(seed: u8) -> Vec<u8> {
    (0..PARTS).flat_map(|part| bytes_of(seed, part)).collect()
}

#[test]
fn scattered_pinned_memory_is_read_and_written() {
    let mut rig = Rig::start();
    for seed in 1..20 {
        rig.write(seed);
        assert!(rig.on_disk() == all_of(seed), "write {seed}");
        assert_eq!(rig.daemon.attach("v").write(0, &all_of(seed + 100)), 0);
        assert!(rig.read() == all_of(seed + 100), "read {seed}");
    }
    assert!(!rig.daemon.log().contains("WARN"), "{}", rig.daemon.log());
    rig.daemon.stop();
}

#[test]
fn what_is_written_after_pages_were_taken_back_is_the_guests() {
    let mut rig = Rig::start();
    rig.write(1);
    rig.take_back();
    rig.write(2);
    assert!(rig.on_disk() == all_of(2), "a page was written that is no longer the guest's");
    rig.wait_for_log("it is no longer pinned");
    rig.write(3);
    assert!(rig.on_disk() == all_of(3));
}

#[test]
fn what_is_read_after_pages_were_taken_back_reaches_the_guest() {
    let mut rig = Rig::start();
    rig.write(1);
    rig.take_back();
    assert!(rig.read() == all_of(1), "a page was read into that is no longer the guest's");
    rig.wait_for_log("it is no longer pinned");
}

#[test]
fn memory_that_is_added_is_pinned_and_what_is_removed_is_let_go() {
    const MORE: u64 = 4 << 20;
    let mut rig = Rig::start();
    let file = rustix::fs::memfd_create("more", rustix::fs::MemfdFlags::CLOEXEC).unwrap();
    fallocate(&file, FallocateFlags::empty(), 0, MORE).unwrap();
    let region = u64s(&[0, GUEST + (1 << 30), MORE, frontend::USER + (1 << 30), 0]);
    rig.guest.must(req::ADD_MEM_REG, &region, &[file.as_fd()]);
    rig.wait_for_log("20 MiB of guest memory are pinned");
    rig.write(1);
    assert!(rig.on_disk() == all_of(1));
    rig.guest.must(req::REM_MEM_REG, &region, &[]);
    rig.write(2);
    assert!(rig.on_disk() == all_of(2));
}

#[test]
fn memory_that_the_vmm_has_not_allocated_is_left_alone() {
    let mut rig = Rig::with(SharedMemory::new(MEMORY));
    rig.wait_for_log("has not allocated all of it");
    rig.write(1);
    assert!(rig.on_disk() == all_of(1));
    let allocated = fstat(&rig.guest.memory.file).unwrap().st_blocks as u64 * 512;
    assert!(allocated < MEMORY / 2, "{allocated} bytes");
    assert!(!rig.daemon.log().contains("are pinned"));
}
