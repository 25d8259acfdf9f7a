//! Memory of large buffers, in huge pages where the kernel has them.
//!
//! The kernel pins the memory of a direct transfer page by page and names each run of adjacent pages to the disk. 128 KiB in
//! ordinary pages are 32 of them, which a virtio disk with a queue of 256 takes seven times; in a huge page they are one.
//!
//! ```text
//!   chunk (2 MiB, one huge page)   ├──64K─┼──64K─┼────128K─────┼──────────────1M──────────────┼ …
//!   used (one bit for each 64 KiB)     1      0       1 1         1 1 1 1 1 1 1 1 …
//! ```
//!
//! Sizes are powers of two, each buffer lies at a multiple of its own size, and a chunk is given back to the kernel once nothing in
//! it is used. From 2 MiB on a buffer is a mapping of its own.

use std::io;
use std::ptr::NonNull;

use rustix::mm::{Advice, MapFlags, ProtFlags, madvise, mmap_anonymous, munmap};

/// Bytes of a huge page where base pages have 4 KiB.
const CHUNK: usize = 2 << 20;
const UNIT: usize = CHUNK / u32::BITS as usize;
/// The smallest buffer that is worth a place in a chunk, in bytes.
pub(super) const LARGE_MIN: usize = UNIT;

struct Chunk {
    start: NonNull<u8>,
    /// A bit for each unit, the first is the lowest.
    used: u32,
}

#[derive(Default)]
pub(super) struct Chunks {
    chunks: Vec<Chunk>,
}

impl Chunks {
    /// `size`: a power of two, at least [`LARGE_MIN`]. The memory has any content.
    pub(super) fn allocate(&mut self, size: usize) -> io::Result<NonNull<u8>> {
        if size >= CHUNK {
            return map(size);
        }
        let units = (size / UNIT) as u32;
        let found = self.chunks.iter_mut().find_map(|chunk| Some((free_place(chunk.used, units)?, chunk)));
        let (place, chunk) = match found {
            Some(found) => found,
            None => (0, self.chunks.push_mut(Chunk { start: map(CHUNK)?, used: 0 })),
        };
        chunk.used |= bits(units) << place;
        // SAFETY: the place and the units behind it are inside the chunk's mapping.
        Ok(unsafe { chunk.start.add(place as usize * UNIT) })
    }

    /// # Safety
    /// `start` came from `allocate` of this object with the same size, and nobody uses that memory any more.
    pub(super) unsafe fn free(&mut self, start: NonNull<u8>, size: usize) {
        if size >= CHUNK {
            // SAFETY: the caller's promise; such a buffer is a mapping of its own.
            return unsafe { unmap(start, size) };
        }
        let offset = start.addr().get() % CHUNK;
        let index = self.chunks.iter().position(|chunk| chunk.start.addr().get() == start.addr().get() - offset);
        let index = index.expect("the memory lies in a chunk of this pool");
        let chunk = &mut self.chunks[index];
        chunk.used &= !(bits((size / UNIT) as u32) << (offset / UNIT));
        if chunk.used == 0 {
            let chunk = self.chunks.swap_remove(index);
            // SAFETY: the mapping is the chunk's own, and no buffer in it is left.
            unsafe { unmap(chunk.start, CHUNK) };
        }
    }
}

fn bits(units: u32) -> u32 {
    u32::MAX >> (u32::BITS - units)
}

/// The first multiple of `units` from which on so many units are free.
fn free_place(used: u32, units: u32) -> Option<u32> {
    (0..u32::BITS).step_by(units as usize).find(|place| used & (bits(units) << place) == 0)
}

/// Maps fresh memory at a multiple of [`CHUNK`].
fn map(len: usize) -> io::Result<NonNull<u8>> {
    let reserved = len + CHUNK;
    // SAFETY: a new mapping at an address of the kernel's choice touches nothing that exists.
    let base = unsafe { mmap_anonymous(std::ptr::null_mut(), reserved, ProtFlags::READ | ProtFlags::WRITE, MapFlags::PRIVATE)? };
    let skipped = base.addr().next_multiple_of(CHUNK) - base.addr();
    // SAFETY: `skipped` is less than CHUNK, so `start` and the `len` bytes behind it are inside the new mapping.
    let start = unsafe { base.byte_add(skipped) };
    for (outside, bytes) in [(base, skipped), (start.wrapping_byte_add(len), CHUNK - skipped)] {
        if bytes > 0 {
            // SAFETY: a part of the new mapping that nobody has been told of.
            unsafe { munmap(outside, bytes)? };
        }
    }
    // A kernel without huge pages says no, and ordinary pages serve as well.
    // SAFETY: the advice changes what the new mapping consists of, not what it holds.
    let _ = unsafe { madvise(start, len, Advice::LinuxHugepage) };
    NonNull::new(start.cast()).ok_or_else(|| io::ErrorKind::OutOfMemory.into())
}

/// # Safety
/// `start` came from `map` with the same length, and nobody uses that memory any more.
unsafe fn unmap(start: NonNull<u8>, len: usize) {
    // SAFETY: the caller's promise.
    let outcome = unsafe { munmap(start.as_ptr().cast(), len) };
    assert!(outcome.is_ok(), "memory of a buffer cannot be unmapped: {outcome:?}");
}

#[cfg(test)]
mod tests {
    use super::*;

    /// As proc_pid_smaps(5) has them, of the mapping around this address.
    fn mapping_flags(address: usize) -> String {
        let maps = std::fs::read_to_string("/proc/self/smaps").unwrap();
        let holds = |line: &&str| {
            let range = line.split_whitespace().next().and_then(|range| range.split_once('-'));
            let number = |text| usize::from_str_radix(text, 16).ok();
            range.is_some_and(|(from, to)| number(from) <= Some(address) && number(to) > Some(address))
        };
        let flags = maps.lines().skip_while(|line| !holds(line)).find_map(|line| line.strip_prefix("VmFlags:"));
        flags.expect("the address is mapped").to_owned()
    }

    fn pseudo_random(state: &mut u64) -> usize {
        *state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        (*state >> 33) as usize
    }

    #[test]
    fn buffers_of_any_sizes_do_not_overlap_and_leave_nothing_behind() {
        let mut chunks = Chunks::default();
        let mut held: Vec<(NonNull<u8>, usize, u8)> = Vec::new();
        let mut state = 1;
        for step in 0..4000 {
            if held.len() > 60 || (!held.is_empty() && pseudo_random(&mut state).is_multiple_of(2)) {
                let (start, size, mark) = held.swap_remove(pseudo_random(&mut state) % held.len());
                // SAFETY: the buffer is held and so many bytes long.
                let (first, last) = unsafe { (start.read(), start.add(size - 1).read()) };
                assert_eq!((first, last), (mark, mark), "step {step}: another buffer was written into this one");
                // SAFETY: it was allocated with this size and is forgotten now.
                unsafe { chunks.free(start, size) };
            } else {
                let size = LARGE_MIN << (pseudo_random(&mut state) % 7);
                let start = chunks.allocate(size).unwrap();
                assert_eq!(start.addr().get() % size.min(CHUNK), 0, "step {step}");
                let mark = step as u8;
                // SAFETY: the buffer was just allocated and is so many bytes long.
                unsafe {
                    start.write(mark);
                    start.add(size - 1).write(mark);
                }
                held.push((start, size, mark));
            }
        }
        for (start, size, _) in held {
            // SAFETY: it was allocated with this size and is forgotten now.
            unsafe { chunks.free(start, size) };
        }
        assert!(chunks.chunks.is_empty());
    }

    #[test]
    fn a_chunk_is_filled_before_another_is_made() {
        let mut chunks = Chunks::default();
        let buffers: Vec<_> = (0..CHUNK / LARGE_MIN).map(|_| chunks.allocate(LARGE_MIN).unwrap()).collect();
        assert_eq!(chunks.chunks.len(), 1);
        let large = chunks.allocate(CHUNK / 2).unwrap();
        assert_eq!(chunks.chunks.len(), 2);
        // SAFETY: each is given back once, with the size it was allocated with.
        unsafe {
            chunks.free(large, CHUNK / 2);
            buffers.into_iter().for_each(|buffer| chunks.free(buffer, LARGE_MIN));
        }
        assert!(chunks.chunks.is_empty());
    }

    #[test]
    fn the_kernel_is_asked_for_huge_pages() {
        let mut chunks = Chunks::default();
        for size in [LARGE_MIN, 2 * CHUNK] {
            let start = chunks.allocate(size).unwrap();
            let flags = mapping_flags(start.addr().get());
            assert!(flags.split_whitespace().any(|flag| flag == "hg"), "{flags}");
            // SAFETY: it was allocated with this size and is forgotten now.
            unsafe { chunks.free(start, size) };
        }
    }
}
