//! The memory of one request: where a read puts its bytes and a write takes them from.
//!
//! It may be guest memory that its owner changes at any time, so no reference to the bytes is ever made: they are moved with raw
//! copies, or by the kernel. Whoever needs stable bytes (to hash or compare them) copies them first.
//!
//! Zeroes of a pooled buffer are written only when somebody wants to see them: a front end that can tell or send zeroes in another way
//! never does.

use std::any::Any;
use std::cell::Cell;
use std::ptr;
use std::rc::Rc;

use smallvec::SmallVec;

use crate::buffer::Buffer;

/// Scattered memory and what keeps it mapped.
pub struct Memory {
    segments: SmallVec<[libc::iovec; 2]>,
    len: usize,
    owner: Owner,
    /// All of it counts as zero, and is written as such before anybody gets at the bytes.
    zeroes_due: Cell<bool>,
}

enum Owner {
    Buffer(Buffer),
    Shared(#[expect(dead_code, reason = "held only to keep the memory mapped")] Rc<dyn Any>),
}

impl Memory {
    /// The first `len` bytes of `buffer`. Panics if the buffer is shorter.
    pub fn from_buffer(buffer: Buffer, len: usize) -> Memory {
        assert!(len <= buffer.capacity());
        let segment = libc::iovec { iov_base: buffer.as_ptr().cast(), iov_len: len };
        Memory { segments: SmallVec::from_slice(&[segment]), len, owner: Owner::Buffer(buffer), zeroes_due: Cell::new(false) }
    }

    /// Memory of somebody else, such as a guest's.
    ///
    /// # Safety
    /// Each segment must stay mapped, readable and writable as long as `owner` lives.
    pub unsafe fn from_segments(segments: SmallVec<[libc::iovec; 2]>, owner: Rc<dyn Any>) -> Memory {
        let len = segments.iter().map(|segment| segment.iov_len).sum();
        Memory { segments, len, owner: Owner::Shared(owner), zeroes_due: Cell::new(false) }
    }

    /// Total length in bytes.
    pub fn len(&self) -> usize {
        self.len
    }

    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// The segments, in order. They stay valid as long as this value lives.
    pub fn segments(&self) -> &[libc::iovec] {
        self.settle();
        &self.segments
    }

    /// The pooled buffer behind this memory, where there is one.
    pub fn into_buffer(self) -> Option<Buffer> {
        self.settle();
        match self.owner {
            Owner::Buffer(buffer) => Some(buffer),
            Owner::Shared(_) => None,
        }
    }

    /// True if every segment's address and length is a multiple of `alignment` (a power of two).
    pub fn is_aligned(&self, alignment: usize) -> bool {
        let mask = alignment - 1;
        self.segments.iter().all(|segment| (segment.iov_base as usize | segment.iov_len) & mask == 0)
    }

    /// True if every byte is zero. It looks no further than the first that is not.
    pub fn is_zero(&self) -> bool {
        self.zeroes_due.get()
            || self.segments.iter().filter(|segment| segment.iov_len > 0).all(|segment| {
                let start = segment.iov_base.cast::<u8>();
                // SAFETY: the segment is mapped and readable as long as `self` lives; comparing it with itself, one byte on, stays in it.
                unsafe { start.read_volatile() == 0 && libc::memcmp(start.cast(), start.add(1).cast(), segment.iov_len - 1) == 0 }
            })
    }

    /// Fills all of it with `byte`.
    pub fn fill(&mut self, byte: u8) {
        let may_wait = byte == 0 && matches!(self.owner, Owner::Buffer(_));
        self.zeroes_due.set(may_wait);
        if !may_wait {
            self.write_all(byte);
        }
    }

    /// Writes the zeroes that are due.
    fn settle(&self) {
        if self.zeroes_due.replace(false) {
            self.write_all(0);
        }
    }

    fn write_all(&self, byte: u8) {
        for segment in &self.segments {
            // SAFETY: the segment is mapped and writable as long as `self` lives.
            unsafe { ptr::write_bytes(segment.iov_base.cast::<u8>(), byte, segment.iov_len) };
        }
    }

    /// Copies `source` to `offset` of this memory. Panics if it does not fit.
    pub fn copy_from(&mut self, offset: usize, source: &[u8]) {
        let mut done = 0;
        self.walk(offset, source.len(), |address, len| {
            // SAFETY: `walk` hands out mapped ranges of this memory; `source` is borrowed, and no reference to shared memory is made.
            unsafe { ptr::copy(source[done..].as_ptr(), address, len) };
            done += len;
        });
    }

    /// Copies `len` bytes from `source` to `offset` of this memory. Panics if they do not fit.
    ///
    /// # Safety
    /// `source` must be readable for `len` bytes.
    unsafe fn copy_raw(&mut self, offset: usize, source: *const u8, len: usize) {
        let mut done = 0;
        self.walk(offset, len, |address, len| {
            // SAFETY: the caller vouches for `source`, `walk` for `address`; the areas may overlap.
            unsafe { ptr::copy(source.wrapping_add(done), address, len) };
            done += len;
        });
    }

    /// Copies `len` bytes from `from` of `source` to `offset` of this memory. Panics if either has less.
    pub fn copy_memory(&mut self, mut offset: usize, source: &Memory, from: usize, len: usize) {
        source.walk(from, len, |part, part_len| {
            // SAFETY: `walk` hands out mapped ranges of `source`, which is borrowed.
            unsafe { self.copy_raw(offset, part, part_len) };
            offset += part_len;
        });
    }

    /// Copies from `offset` of this memory to `target`. Panics if there is not enough.
    pub fn copy_to(&self, offset: usize, target: &mut [u8]) {
        let mut done = 0;
        self.walk(offset, target.len(), |address, len| {
            // SAFETY: as in `copy_from`, with `target` borrowed exclusively.
            unsafe { ptr::copy(address, target[done..].as_mut_ptr(), len) };
            done += len;
        });
    }

    /// A copy of all of it.
    pub fn to_vec(&self) -> Vec<u8> {
        let mut copy = Vec::with_capacity(self.len);
        let start: *mut u8 = copy.as_mut_ptr();
        let mut done = 0;
        self.walk(0, self.len, |address, len| {
            // SAFETY: `walk` hands out mapped ranges, together as long as the vector's capacity, which nobody else refers to.
            unsafe { ptr::copy_nonoverlapping(address, start.add(done), len) };
            done += len;
        });
        // SAFETY: `walk` handed out `self.len` bytes, so that many were written.
        unsafe { copy.set_len(done) };
        copy
    }

    /// The iovecs of the range `offset..offset + len`, for resubmitting the rest of a short transfer. Panics if out of range.
    pub fn slice(&self, offset: usize, len: usize) -> SmallVec<[libc::iovec; 2]> {
        let mut part = SmallVec::new();
        self.walk(offset, len, |address, len| {
            part.push(libc::iovec { iov_base: address.cast(), iov_len: len });
        });
        part
    }

    fn walk(&self, mut offset: usize, mut len: usize, mut visit: impl FnMut(*mut u8, usize)) {
        assert!(offset.checked_add(len).is_some_and(|end| end <= self.len), "range beyond this memory");
        self.settle();
        for segment in &self.segments {
            if len == 0 {
                return;
            }
            if offset >= segment.iov_len {
                offset -= segment.iov_len;
                continue;
            }
            let part = (segment.iov_len - offset).min(len);
            visit(segment.iov_base.cast::<u8>().wrapping_add(offset), part);
            offset = 0;
            len -= part;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::buffer::BufferPool;

    fn scattered() -> (Memory, Rc<Vec<std::cell::UnsafeCell<u8>>>) {
        let bytes: Rc<Vec<_>> = Rc::new((0..32).map(std::cell::UnsafeCell::new).collect());
        let at = |start: usize, len| libc::iovec { iov_base: bytes[start].get().cast(), iov_len: len };
        let segments = SmallVec::from_slice(&[at(20, 4), at(0, 8)]);
        // SAFETY: the vector lives as long as its Rc.
        let memory = unsafe { Memory::from_segments(segments, bytes.clone()) };
        (memory, bytes)
    }

    #[test]
    fn copies_cross_segments() {
        let (mut memory, _bytes) = scattered();
        let mut out = [0; 6];
        memory.copy_to(2, &mut out);
        assert_eq!(out, [22, 23, 0, 1, 2, 3]);
        memory.copy_from(3, &[90, 91]);
        memory.copy_to(2, &mut out);
        assert_eq!(out, [22, 90, 91, 1, 2, 3]);
        assert_eq!(memory.slice(3, 5).iter().map(|part| part.iov_len).collect::<Vec<_>>(), [1, 4]);
        assert_eq!(memory.to_vec(), [20, 21, 22, 90, 91, 1, 2, 3, 4, 5, 6, 7]);
        memory.fill(7);
        memory.copy_to(0, &mut out);
        assert_eq!(out, [7; 6]);
    }

    #[test]
    #[should_panic(expected = "beyond")]
    fn out_of_range_panics() {
        scattered().0.copy_to(10, &mut [0; 3]);
    }

    #[test]
    fn one_byte_anywhere_is_not_zero() {
        let (mut memory, _bytes) = scattered();
        memory.fill(0);
        assert!(memory.is_zero());
        for at in 0..12 {
            memory.copy_from(at, &[1]);
            assert!(!memory.is_zero(), "byte {at}");
            memory.copy_from(at, &[0]);
        }
        assert!(memory.is_zero());
    }

    #[test]
    fn zeroes_are_there_however_one_gets_at_them() {
        let pool = BufferPool::new(1 << 16, 0);
        let zeroed = || {
            let mut memory = Memory::from_buffer(pool.try_get(512).unwrap(), 512);
            memory.fill(7);
            memory.fill(0);
            assert!(memory.is_zero());
            memory
        };
        assert_eq!(zeroed().to_vec(), [0; 512]);
        let mut out = [9; 8];
        zeroed().copy_to(504, &mut out);
        assert_eq!(out, [0; 8]);
        let read = |address: *const u8| {
            // SAFETY: the address is the first of a buffer that lives.
            unsafe { address.read() }
        };
        let memory = zeroed();
        assert_eq!(read(memory.segments()[0].iov_base.cast()), 0);
        assert_eq!(read(zeroed().slice(0, 1)[0].iov_base.cast()), 0);
        let buffer = zeroed().into_buffer().unwrap();
        assert_eq!(read(buffer.as_ptr()), 0);
        let (mut partly, mut whole) = (zeroed(), zeroed());
        partly.copy_from(3, &[5]);
        assert_eq!(partly.to_vec()[..5], [0, 0, 0, 5, 0]);
        assert!(!partly.is_zero());
        partly.copy_memory(0, &zeroed(), 0, 4);
        assert!(partly.is_zero());
        whole.fill(4);
        assert!(!whole.is_zero());
    }

    #[test]
    fn guest_memory_is_filled_at_once() {
        let (mut memory, bytes) = scattered();
        memory.fill(0);
        // SAFETY: the vector is alive and nobody else refers to the byte.
        assert_eq!(unsafe { bytes[21].get().read() }, 0);
    }

    #[test]
    fn buffers_come_back() {
        let pool = BufferPool::new(1 << 16, 0);
        let memory = Memory::from_buffer(pool.try_get(512).unwrap(), 512);
        assert!(memory.is_aligned(512) && !memory.is_aligned(1024));
        assert!(memory.into_buffer().is_some());
    }
}
