//! One thread's I/O on one file: ring operations straight from request memory.
//!
//! A file system in memory has no transfer that does not wait (`RWF_NOWAIT` is refused), so the ring would hand each to a kernel
//! worker, at several times the cost of the copy itself. There, small transfers are made on the spot.

use std::cell::{Cell, RefCell};
use std::collections::{HashMap, VecDeque};
use std::io;
use std::os::fd::AsRawFd;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use blockdev::{Completer, Errno, Extent, Handler, HandlerId, IoQueue, Op, Payload, Place, Reactor, Request};
use io_uring::{opcode, squeue, types};
use parking_lot::Mutex;
use slab::Slab;
use smallvec::SmallVec;

use super::device::SharedFile;
use super::sys;

/// Operations in the kernel at once; more wait here, as many as the front ends have slots for.
const SLOTS: usize = 256;
const EXTENTS_MAX: usize = 4096;
const RW_MAX: u64 = 1 << 30;
/// Bytes; copying more would keep the thread from its other work.
const ON_THE_SPOT_MAX: u64 = 256 << 10;
/// Bytes handed to the kernel together. It merges neighbours among them, and one huge request keeps a device less busy than
/// several large ones.
const TOGETHER_MAX: u64 = 256 << 10;
/// In shorter transfers looking pages up takes less than asking whether pinned ones still count.
const PINNED_MIN: u64 = 32 << 10;
/// How long a truncation may go unnoticed while there are requests.
const LOOK: Duration = Duration::from_millis(10);
/// What a look for extents gives instead of zero when the file ends before them.
const SHORT: i32 = 1;

pub(super) struct FileQueue {
    inner: Rc<Inner>,
}

struct Inner {
    file: Arc<SharedFile>,
    reactor: Rc<Reactor>,
    id: HandlerId,
    /// Never grows past `SLOTS`, so what it holds does not move while the kernel looks at it.
    running: RefCell<Slab<Running>>,
    waiting: RefCell<VecDeque<Request>>,
    queued_bytes: Cell<u64>,
    /// When the file's length was last looked at.
    looked: Cell<Option<Instant>>,
    found: Arc<Mutex<HashMap<u32, Vec<Extent>>>>,
}

struct Running {
    op: Op,
    offset: u64,
    len: u64,
    /// Bytes transferred so far.
    done: u64,
    payload: Payload,
    completer: Completer,
    /// The rest of a short transfer of scattered memory.
    rest: SmallVec<[libc::iovec; 2]>,
}

impl FileQueue {
    pub(super) fn new(file: Arc<SharedFile>, reactor: &Rc<Reactor>) -> FileQueue {
        let inner = reactor.install(|id| Inner {
            file,
            reactor: reactor.clone(),
            id,
            running: RefCell::new(Slab::with_capacity(SLOTS)),
            waiting: RefCell::new(VecDeque::new()),
            queued_bytes: Cell::new(0),
            looked: Cell::new(None),
            found: Arc::default(),
        });
        FileQueue { inner }
    }
}

impl IoQueue for FileQueue {
    fn submit(&self, request: Request) {
        self.inner.submit(request);
    }
}

impl Drop for FileQueue {
    fn drop(&mut self) {
        self.inner.reactor.unregister(self.inner.id);
    }
}

impl Inner {
    fn submit(&self, request: Request) {
        if self.was_truncated(&request) {
            return request.complete(Err(Errno::EIO));
        }
        if self.is_quick_copy(&request) && self.reactor.may_copy(request.len) {
            return self.transfer_on_the_spot(request);
        }
        if self.running.borrow().len() == SLOTS {
            return self.waiting.borrow_mut().push_back(request);
        }
        self.start(request);
    }

    /// A file that was cut reads as zeroes where a write behind them has made it longer again, and looks whole once its last bytes are written:
    /// before that its length is looked at, and else now and then.
    fn was_truncated(&self, request: &Request) -> bool {
        if self.file.truncated.load(Ordering::Relaxed) {
            return true;
        }
        let size = self.file.size.load(Ordering::Acquire);
        let makes_whole = request.op.modifies() && request.end() >= size;
        let now = self.reactor.now();
        if !makes_whole && self.looked.get().is_some_and(|looked| now.duration_since(looked) < LOOK) {
            return false;
        }
        self.looked.set(Some(now));
        let is_short = self.file.is_short();
        if is_short {
            self.note_short(size);
        }
        is_short
    }

    fn start(&self, request: Request) {
        let (op, offset, len) = (request.op, request.offset, request.len);
        let (payload, completer) = request.into_parts();
        let slot = Running { op, offset, len, done: 0, payload, completer, rest: SmallVec::new() };
        let token = self.running.borrow_mut().insert(slot) as u32;
        if op == Op::BlockStatus { self.look_for_extents(token, offset, len) } else { self.issue(token) }
    }

    fn is_quick_copy(&self, request: &Request) -> bool {
        let transfers = matches!(request.op, Op::Read | Op::Write { fua: false });
        self.file.in_memory && transfers && request.len <= ON_THE_SPOT_MAX
    }

    fn transfer_on_the_spot(&self, request: Request) {
        let Some(memory) = request.payload.memory() else { return request.complete(Err(Errno::EINVAL)) };
        let write = request.op != Op::Read;
        let mut done = 0;
        while done < request.len {
            let rest = if done == 0 { None } else { Some(memory.slice(done as usize, (request.len - done) as usize)) };
            let parts = rest.as_deref().unwrap_or(memory.segments());
            // SAFETY: the parts are of the request's memory, which stays mapped, readable and writable while the request lives.
            match unsafe { sys::transfer(&self.file.file, write, parts, request.offset + done) } {
                Ok(0) => {
                    self.note_short(request.end());
                    return request.complete(Err(Errno::EIO));
                }
                Ok(moved) => done += moved as u64,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return request.complete(Err(Errno::from_io(&error))),
            }
        }
        request.complete(Ok(()));
    }

    /// Hands what is left of the operation to the kernel.
    fn issue(&self, token: u32) {
        let mut running = self.running.borrow_mut();
        let slot = &mut running[token as usize];
        let entry = entry(&self.reactor, types::Fd(self.file.file.as_raw_fd()), slot);
        if self.reactor.queued() == 0 {
            self.queued_bytes.set(0);
        }
        self.queued_bytes.set(self.queued_bytes.get() + slot.len);
        // SAFETY: the entry points to the slot's memory and iovecs. The slab never grows past its capacity, so they stay in place,
        // and the slot is kept until the operation's completion arrives; the descriptor lives as long as `self.file`.
        unsafe { self.reactor.submit(self.id, token, entry) };
        if self.queued_bytes.get() >= TOGETHER_MAX {
            self.reactor.hand_over();
        }
    }

    fn look_for_extents(&self, token: u32, offset: u64, len: u64) {
        let (file, found) = (self.file.clone(), self.found.clone());
        let (reactor, id) = (self.reactor.handle(), self.id);
        let started = self.file.run_aside(move || {
            let looked =
                sys::extents(&file.file, offset, len, EXTENTS_MAX).and_then(|extents| Ok((extents, sys::size_of(&file.file)?)));
            let result = match looked {
                Ok((_, size)) if size < offset + len => SHORT,
                Ok((extents, _)) => {
                    found.lock().insert(token, extents);
                    0
                }
                Err(error) => -Errno::from_io(&error).raw(),
            };
            reactor.post(id, token, result);
        });
        if let Err(error) = started {
            self.finish(token, Err(Errno::from_io(&error)));
        }
    }

    fn finish(&self, token: u32, result: Result<(), Errno>) {
        let slot = self.running.borrow_mut().remove(token as usize);
        let payload = match slot.op {
            Op::BlockStatus => self.found.lock().remove(&token).map_or(Payload::None, Payload::Extents),
            _ => slot.payload,
        };
        slot.completer.complete(result, payload);
        while self.running.borrow().len() < SLOTS {
            let Some(next) = self.waiting.borrow_mut().pop_front() else { return };
            self.submit(next);
        }
    }

    fn found_short(&self, token: u32) {
        let end = self.running.borrow().get(token as usize).map_or(0, |slot| slot.offset + slot.len);
        self.note_short(end);
        self.finish(token, Err(Errno::EIO));
    }

    /// The file ended before `end`, where the volume reaches, unless it was shrunk meanwhile.
    fn note_short(&self, end: u64) {
        if end <= self.file.size.load(Ordering::Acquire) && !self.file.truncated.swap(true, Ordering::Relaxed) {
            tracing::error!(
                "{} is shorter than its volume: somebody truncated it; all its I/O fails now",
                self.file.path.display()
            );
        }
    }
}

/// The ring operation for what is left of `slot`.
fn entry(reactor: &Reactor, file: types::Fd, slot: &mut Running) -> squeue::Entry {
    match slot.op {
        Op::Read | Op::Write { .. } => transfer(reactor, file, slot),
        Op::Flush => opcode::Fsync::new(file).flags(types::FsyncFlags::DATASYNC).build(),
        Op::Discard | Op::WriteZeroes { unmap: true, .. } => {
            fallocate(file, slot, libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE)
        }
        Op::WriteZeroes { .. } => fallocate(file, slot, libc::FALLOC_FL_ZERO_RANGE | libc::FALLOC_FL_KEEP_SIZE),
        Op::BlockStatus => opcode::Nop::new().build(),
    }
}

fn fallocate(file: types::Fd, slot: &Running, mode: libc::c_int) -> squeue::Entry {
    opcode::Fallocate::new(file, slot.len).offset(slot.offset).mode(mode).build()
}

fn transfer(reactor: &Reactor, file: types::Fd, slot: &mut Running) -> squeue::Entry {
    let Some(memory) = slot.payload.memory() else { return opcode::Nop::new().build() };
    let durable = if matches!(slot.op, Op::Write { fua: true }) { libc::RWF_DSYNC } else { 0 };
    let offset = slot.offset + slot.done;
    let whole = slot.done == 0 && slot.len <= RW_MAX;
    if !whole {
        let left = (slot.len - slot.done).min(RW_MAX);
        slot.rest = memory.slice(slot.done as usize, left as usize);
    }
    let parts = if whole { memory.segments() } else { &slot.rest };
    let place = Place { file, offset, flags: durable };
    let pinned = match slot.op {
        _ if slot.len < PINNED_MIN => None,
        Op::Read => reactor.read_pinned(parts, place),
        _ => reactor.write_pinned(parts, place),
    };
    if let Some(entry) = pinned {
        return entry;
    }
    match (slot.op, parts) {
        (Op::Read, [part]) => opcode::Read::new(file, part.iov_base.cast(), part.iov_len as u32).offset(offset).build(),
        (Op::Read, parts) => opcode::Readv::new(file, parts.as_ptr(), parts.len() as u32).offset(offset).build(),
        (_, [part]) => {
            opcode::Write::new(file, part.iov_base.cast(), part.iov_len as u32).offset(offset).rw_flags(durable).build()
        }
        (_, parts) => opcode::Writev::new(file, parts.as_ptr(), parts.len() as u32).offset(offset).rw_flags(durable).build(),
    }
}

impl Handler for Inner {
    fn completed(&self, token: u32, result: i32, _flags: u32) {
        if [-libc::EAGAIN, -libc::EINTR].contains(&result) {
            return self.issue(token);
        }
        if result < 0 {
            return self.finish(token, Err(Errno::from_raw(-result)));
        }
        let mut running = self.running.borrow_mut();
        let slot = &mut running[token as usize];
        if !matches!(slot.op, Op::Read | Op::Write { .. }) {
            let short = match slot.op {
                Op::BlockStatus => result == SHORT,
                Op::Flush => self.file.is_short(),
                _ => false,
            };
            drop(running);
            return if short { self.found_short(token) } else { self.finish(token, Ok(())) };
        }
        slot.done += result as u64;
        let left = slot.len - slot.done.min(slot.len);
        let stuck = result == 0;
        drop(running);
        match left {
            0 => self.finish(token, Ok(())),
            _ if stuck => self.found_short(token),
            _ => self.issue(token),
        }
    }

    fn ready(&self) {}
}
