//! Descriptor chains: the input is the beginning of a guest's memory, rings and all. Whatever it says, what comes out lies inside
//! guest memory.

#![no_main]

use std::cell::OnceCell;
use std::sync::Arc;

use libfuzzer_sys::fuzz_target;
use rustix::event::{EventfdFlags, eventfd};
use rustix::fs::{MemfdFlags, ftruncate, memfd_create};
use vhost_user_blk::chain::{ChainReader, Command, Limits, Segments, translate};
use vhost_user_blk::memory::{GuestMemory, Translator};
use vhost_user_blk::message::{RegionSpec, RingAddresses};
use vhost_user_blk::ring::Ring;

const SIZE: u64 = 64 << 10;
/// Guest and user addresses start at 0, so that small numbers are addresses.
const ADDRESSES: RingAddresses = RingAddresses { descriptors: 0, available: 0x400, used: 0x8000, log: None };
const RING_SIZE: u32 = 64;

thread_local! {
    static MEMORY: OnceCell<Arc<GuestMemory>> = const { OnceCell::new() };
}

/// Two regions, one behind the other in the guest, but not here.
fn guest_memory() -> Arc<GuestMemory> {
    let event = Arc::new(eventfd(0, EventfdFlags::CLOEXEC).expect("an eventfd"));
    let file = memfd_create("guest", MemfdFlags::CLOEXEC).expect("a memory file");
    ftruncate(&file, 2 * SIZE).expect("room");
    let region = |guest, file_offset| RegionSpec { guest, size: SIZE, user: guest, file_offset };
    let table = vec![(region(0, SIZE), file.try_clone().expect("a descriptor")), (region(SIZE, 0), file)];
    Arc::new(GuestMemory::from_table(table, &event).expect("guest memory"))
}

fuzz_target!(|input: &[u8]| {
    let memory = MEMORY.with(|memory| memory.get_or_init(guest_memory).clone());
    let start = memory.at_user(0, SIZE).expect("the first region");
    let second = memory.at_user(SIZE, SIZE).expect("the second region");
    let len = input.len().min(SIZE as usize);
    // SAFETY: both regions are mapped with SIZE bytes, and only this thread touches them.
    unsafe {
        start.write_bytes(0, SIZE as usize);
        start.copy_from_nonoverlapping(input.as_ptr(), len);
    }
    let inside = |pieces: &Segments| {
        pieces.iter().all(|piece| {
            let fits = |region: *mut u8| {
                let offset = (piece.iov_base as usize).wrapping_sub(region as usize);
                offset < SIZE as usize && piece.iov_len <= SIZE as usize - offset
            };
            fits(start) || fits(second)
        })
    };
    let indirect = input.first().is_some_and(|byte| byte % 8 != 0);
    let Ok(mut ring) = Ring::new(&memory, RING_SIZE, &ADDRESSES, true, None) else { return };
    let translator = Translator::new(memory);
    let mut reader = ChainReader::new(indirect);
    let limits = Limits { range_sectors_max: 1 << 25, zeroes_sectors_max: 1 << 15 };
    let Ok(count) = ring.available() else { return };
    for _ in 0..count {
        let Ok(head) = ring.pop() else { return };
        let Ok(parsed) = reader.parse(&ring, &translator, head, limits) else { continue };
        let status = one_byte(parsed.status);
        assert!(inside(&Segments::from_slice(&[status])));
        let segments = match parsed.command {
            Command::Read { .. } => reader.room_for_guest(),
            Command::Write { .. } => reader.data_from_guest(),
            _ => continue,
        };
        if let Some(pieces) = translate(&translator, segments) {
            assert!(inside(&pieces));
            let total: usize = pieces.iter().map(|piece| piece.iov_len).sum();
            let wanted: u64 = segments.iter().map(|segment| u64::from(segment.len)).sum();
            assert_eq!(total as u64, wanted);
        }
        ring.push_used(head, 1);
    }
    ring.publish();
});

fn one_byte(byte: *mut u8) -> libc::iovec {
    libc::iovec { iov_base: byte.cast(), iov_len: 1 }
}
