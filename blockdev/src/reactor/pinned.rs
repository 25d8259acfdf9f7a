//! Memory whose pages the ring holds on to, so that the kernel need not look them up for each transfer (`IORING_REGISTER_BUFFERS`).
//!
//! One area is one buffer of the ring. A transfer whose parts all lie in one area names it; others go the usual way. The pages stay
//! those that were there when they were pinned, so the owner of an area is asked before each use whether they still count.

use std::cell::{Cell, RefCell};
use std::io;
use std::rc::Rc;

use io_uring::{IoUring, Probe, opcode, squeue, types};

/// The most bytes of one area: `io_buffer_validate` in the kernel's `io_uring/rsrc.c`.
pub const PINNED_AREA_MAX: usize = 1 << 30;
const BUFFERS_MAX: u16 = 4096;
/// `IORING_OP_READV_FIXED` and `IORING_OP_WRITEV_FIXED` of `include/uapi/linux/io_uring.h`, Linux 6.15.
const READV_FIXED: u8 = 60;
const WRITEV_FIXED: u8 = 61;

/// Whoever had memory pinned. It keeps the memory mapped while it lives.
pub trait PinOwner {
    /// True while the pages pinned are those that everybody sees who has the memory mapped.
    fn is_current(&self) -> bool;
}

/// Names an area pinned on one reactor.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct PinId(u64);

/// Where a transfer goes.
#[derive(Clone, Copy)]
pub struct Place {
    pub file: types::Fd,
    pub offset: u64,
    /// As for `pwritev2`; reads have none.
    pub flags: libc::c_int,
}

struct Area {
    start: usize,
    end: usize,
    buffer: u16,
    id: PinId,
    owner: Rc<dyn PinOwner>,
}

#[derive(Default)]
pub(super) struct Pinned {
    /// In order of address.
    areas: RefCell<Vec<Area>>,
    free: RefCell<Vec<u16>>,
    next: Cell<u64>,
    is_set_up: Cell<bool>,
    takes_scattered: Cell<bool>,
}

impl Pinned {
    /// # Safety
    /// As for [`super::Reactor::pin`].
    pub(super) unsafe fn pin(&self, ring: &IoUring, start: *mut u8, len: usize, owner: Rc<dyn PinOwner>) -> io::Result<PinId> {
        self.set_up(ring)?;
        let mut free = self.free.borrow_mut();
        let buffer = *free.last().ok_or(io::ErrorKind::QuotaExceeded)?;
        let whole = libc::iovec { iov_base: start.cast(), iov_len: len };
        // SAFETY: the caller vouches for the memory.
        unsafe { ring.submitter().register_buffers_update(u32::from(buffer), &[whole], None)? };
        free.pop();
        let id = PinId(self.next.replace(self.next.get() + 1));
        let area = Area { start: start as usize, end: start as usize + len, buffer, id, owner };
        let mut areas = self.areas.borrow_mut();
        let at = areas.partition_point(|other| other.start < area.start);
        areas.insert(at, area);
        Ok(id)
    }

    fn set_up(&self, ring: &IoUring) -> io::Result<()> {
        if self.is_set_up.get() {
            return Ok(());
        }
        ring.submitter().register_buffers_sparse(u32::from(BUFFERS_MAX))?;
        let mut probe = Probe::new();
        let known = ring.submitter().register_probe(&mut probe).is_ok();
        self.takes_scattered.set(known && probe.is_supported(READV_FIXED) && probe.is_supported(WRITEV_FIXED));
        *self.free.borrow_mut() = (0..BUFFERS_MAX).rev().collect();
        self.is_set_up.set(true);
        Ok(())
    }

    pub(super) fn unpin(&self, ring: &IoUring, id: PinId) {
        self.unpin_all(ring, |area| area.id == id);
    }

    fn unpin_all(&self, ring: &IoUring, unwanted: impl Fn(&Area) -> bool) {
        let removed: Vec<Area> = self.areas.borrow_mut().extract_if(.., |area| unwanted(area)).collect();
        for area in removed {
            let nothing = libc::iovec { iov_base: std::ptr::null_mut(), iov_len: 0 };
            // SAFETY: an empty buffer points to nothing; what the kernel was given already holds on to the old one.
            let cleared = unsafe { ring.submitter().register_buffers_update(u32::from(area.buffer), &[nothing], None) };
            // A place that cannot be cleared is not used again.
            if cleared.is_ok() {
                self.free.borrow_mut().push(area.buffer);
            }
        }
    }

    /// The buffer that holds all of `parts`. Areas whose owner says that they no longer count are gone after this.
    fn buffer_of(&self, ring: &IoUring, parts: &[libc::iovec]) -> Option<u16> {
        let owner = {
            let areas = self.areas.borrow();
            let first = parts.first()?.iov_base as usize;
            let area = areas.get(areas.partition_point(|area| area.start <= first).checked_sub(1)?)?;
            let holds = |part: &libc::iovec| {
                let start = part.iov_base as usize;
                (area.start..area.end).contains(&start) && part.iov_len <= area.end - start
            };
            if !parts.iter().all(holds) || (parts.len() > 1 && !self.takes_scattered.get()) {
                return None;
            }
            if area.owner.is_current() {
                return Some(area.buffer);
            }
            area.owner.clone()
        };
        super::hand_over(ring);
        self.unpin_all(ring, |area| Rc::ptr_eq(&area.owner, &owner));
        None
    }

    pub(super) fn read(&self, ring: &IoUring, parts: &[libc::iovec], from: Place) -> Option<squeue::Entry> {
        let buffer = self.buffer_of(ring, parts)?;
        let (start, len) = target(parts);
        let entry = opcode::ReadFixed::new(from.file, start.cast_mut(), len, buffer).offset(from.offset).build();
        Some(if parts.len() > 1 { scattered(entry, READV_FIXED) } else { entry })
    }

    pub(super) fn write(&self, ring: &IoUring, parts: &[libc::iovec], to: Place) -> Option<squeue::Entry> {
        let buffer = self.buffer_of(ring, parts)?;
        let (start, len) = target(parts);
        let entry = opcode::WriteFixed::new(to.file, start, len, buffer).offset(to.offset).rw_flags(to.flags).build();
        Some(if parts.len() > 1 { scattered(entry, WRITEV_FIXED) } else { entry })
    }
}

/// Address and length as an operation wants them: of the one part, or of the list of parts.
fn target(parts: &[libc::iovec]) -> (*const u8, u32) {
    match parts {
        [part] => (part.iov_base.cast::<u8>().cast_const(), part.iov_len as u32),
        _ => (parts.as_ptr().cast(), parts.len() as u32),
    }
}

/// The same entry with another opcode: that for scattered memory, which the crate `io_uring` does not know yet and whose other fields
/// mean the same.
fn scattered(mut entry: squeue::Entry, opcode: u8) -> squeue::Entry {
    // SAFETY: `Entry` is `repr(C)` and nothing but the kernel's `io_uring_sqe`, whose first byte is the opcode; any byte is valid there.
    unsafe { (&raw mut entry).cast::<u8>().write(opcode) };
    entry
}

#[cfg(test)]
mod tests {
    use std::cell::Cell;
    use std::fs::File;
    use std::os::fd::{AsRawFd, FromRawFd};
    use std::os::unix::fs::FileExt;
    use std::time::Duration;

    use super::*;
    use crate::reactor::{Handler, HandlerId, Reactor};

    const PAGE: usize = 4096;

    struct Pages {
        start: *mut u8,
        len: usize,
        current: Cell<bool>,
    }

    impl Pages {
        fn new(count: usize) -> Rc<Pages> {
            let len = count * PAGE;
            let (protection, flags) = (libc::PROT_READ | libc::PROT_WRITE, libc::MAP_SHARED | libc::MAP_ANONYMOUS);
            // SAFETY: a new mapping where the kernel likes.
            let start = unsafe { libc::mmap(std::ptr::null_mut(), len, protection, flags, -1, 0) };
            assert_ne!(start, libc::MAP_FAILED);
            Rc::new(Pages { start: start.cast(), len, current: Cell::new(true) })
        }

        fn part(&self, page: usize, len: usize) -> libc::iovec {
            libc::iovec { iov_base: self.start.wrapping_add(page * PAGE).cast(), iov_len: len }
        }

        fn bytes(&self, page: usize, len: usize) -> Vec<u8> {
            // SAFETY: tests ask for what lies in the mapping.
            unsafe { std::slice::from_raw_parts(self.start.wrapping_add(page * PAGE), len) }.to_vec()
        }
    }

    impl Drop for Pages {
        fn drop(&mut self) {
            // SAFETY: mapped in `new`, and nobody refers to it any more.
            unsafe { libc::munmap(self.start.cast(), self.len) };
        }
    }

    impl PinOwner for Pages {
        fn is_current(&self) -> bool {
            self.current.get()
        }
    }

    fn pin(reactor: &Reactor, pages: &Rc<Pages>) -> PinId {
        // SAFETY: the owner keeps the mapping.
        unsafe { reactor.pin(pages.start, pages.len, pages.clone()) }.unwrap()
    }

    #[derive(Default)]
    struct Waits(Cell<Option<i32>>);

    impl Handler for Waits {
        fn completed(&self, _token: u32, result: i32, _flags: u32) {
            self.0.set(Some(result));
        }
        fn ready(&self) {}
    }

    fn file_in_memory() -> File {
        // SAFETY: the name is a string; the descriptor returned is owned by nobody else.
        unsafe {
            let fd = libc::memfd_create(c"file".as_ptr(), libc::MFD_CLOEXEC);
            assert!(fd >= 0);
            File::from_raw_fd(fd)
        }
    }

    struct Rig {
        reactor: Rc<Reactor>,
        waits: Rc<Waits>,
        id: HandlerId,
        file: File,
    }

    impl Rig {
        fn new() -> Rig {
            let reactor = Reactor::new(Duration::ZERO).unwrap();
            let waits = Rc::new(Waits::default());
            let id = reactor.register(waits.clone());
            Rig { reactor, waits, id, file: file_in_memory() }
        }

        fn place(&self) -> Place {
            Place { file: types::Fd(self.file.as_raw_fd()), offset: 0, flags: 0 }
        }

        fn run(&self, entry: squeue::Entry) -> i32 {
            // SAFETY: tests keep the memory and the file until this returns.
            unsafe { self.reactor.submit(self.id, 0, entry) };
            loop {
                self.reactor.turn();
                if let Some(result) = self.waits.0.take() {
                    return result;
                }
            }
        }
    }

    #[test]
    fn one_part_and_several_are_read_and_written() {
        let rig = Rig::new();
        let pages = Pages::new(8);
        pin(&rig.reactor, &pages);
        let content: Vec<u8> = (0..2 * PAGE).map(|at| (at / 7) as u8).collect();
        rig.file.write_all_at(&content, 0).unwrap();
        for parts in [vec![pages.part(1, 2 * PAGE)], vec![pages.part(5, PAGE), pages.part(2, 512), pages.part(3, PAGE - 512)]] {
            let entry = rig.reactor.read_pinned(&parts, rig.place()).expect("Linux 6.15 for several parts");
            assert_eq!(rig.run(entry), 2 * PAGE as i32);
            let page_of = |part: &libc::iovec| (part.iov_base as usize - pages.start as usize) / PAGE;
            let read: Vec<u8> = parts.iter().flat_map(|part| pages.bytes(page_of(part), part.iov_len)).collect();
            assert!(read == content, "{} parts", parts.len());
            let entry = rig.reactor.write_pinned(&parts, Place { offset: 1 << 20, ..rig.place() }).unwrap();
            assert_eq!(rig.run(entry), 2 * PAGE as i32);
            let mut written = vec![0; 2 * PAGE];
            rig.file.read_exact_at(&mut written, 1 << 20).unwrap();
            assert!(written == content);
            rig.file.write_all_at(&[0; 2 * PAGE], 1 << 20).unwrap();
        }
    }

    #[test]
    fn only_what_lies_in_one_area_counts() {
        let rig = Rig::new();
        let (first, second) = (Pages::new(4), Pages::new(4));
        let id = pin(&rig.reactor, &first);
        let is_pinned = |parts: &[libc::iovec]| rig.reactor.read_pinned(parts, rig.place()).is_some();
        assert!(is_pinned(&[first.part(0, 4 * PAGE)]));
        assert!(!is_pinned(&[first.part(3, PAGE + 1)]) && !is_pinned(&[first.part(4, 1)]) && !is_pinned(&[]));
        assert!(!is_pinned(&[second.part(0, PAGE)]));
        pin(&rig.reactor, &second);
        assert!(is_pinned(&[second.part(0, PAGE)]));
        assert!(!is_pinned(&[first.part(0, PAGE), second.part(0, PAGE)]));
        rig.reactor.unpin(id);
        assert!(!is_pinned(&[first.part(0, PAGE)]) && is_pinned(&[second.part(0, PAGE)]));
    }

    #[test]
    fn areas_that_no_longer_count_are_gone_and_their_places_used_again() {
        let rig = Rig::new();
        let pages = Pages::new(2);
        let is_pinned = |page| rig.reactor.read_pinned(&[pages.part(page, PAGE)], rig.place()).is_some();
        for _ in 0..3 * BUFFERS_MAX {
            pages.current.set(true);
            let id = pin(&rig.reactor, &pages);
            assert!(is_pinned(1));
            pages.current.set(false);
            assert!(!is_pinned(0));
            pages.current.set(true);
            assert!(!is_pinned(0), "it was let go of");
            rig.reactor.unpin(id);
        }
        assert_eq!(Rc::strong_count(&pages), 1, "nobody keeps it");
    }
}
