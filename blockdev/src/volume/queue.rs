//! One thread's way into a volume.
//!
//! ```text
//!  submit ─▶ check ─▶ [range lock] ─▶ device ─▶ [next piece] ─▶ [flush for FUA] ─▶ complete
//!                          └─ waits: granted by a posted completion
//! ```
//!
//! A discard or zeroing of more than [`PIECE`] bytes is carried out piece by piece, each locked on its own, so that it delays
//! no other request by more than one piece.

use std::cell::{Cell, RefCell};
use std::rc::Rc;
use std::sync::Arc;
use std::time::Instant;

use slab::Slab;

use super::Volume;
use crate::device::{DeviceError, IoQueue};
use crate::errno::Errno;
use crate::range_lock::Waiter;
use crate::reactor::{Handler, HandlerId, Reactor};
use crate::request::{Completer, Completion, CompletionQueue, Extent, ExtentKind, Op, Payload, Request};
use crate::stats::{OpClass, OpStats, Stage};

const SLOTS: usize = 64;
const PIECE: u64 = 256 << 20;

/// A volume as one data-plane thread sees it.
pub struct VolumeQueue {
    inner: Rc<Inner>,
}

struct Inner {
    volume: Arc<Volume>,
    device: Box<dyn IoQueue>,
    reactor: Rc<Reactor>,
    id: HandlerId,
    completions: Rc<CompletionQueue>,
    slots: RefCell<Slab<Slot>>,
    stats: Arc<OpStats>,
    lock_unit: u64,
    device_fua: bool,
    device_discards: bool,
    device_block_status: bool,
    failed_flush_is_fatal: bool,
    in_flight: Cell<usize>,
}

/// One request on its way.
struct Slot {
    op: Op,
    offset: u64,
    end: u64,
    len: u64,
    arrived: Instant,
    submitted: Instant,
    completer: Option<Completer>,
    waiting: Option<Request>,
    locked: Option<u64>,
    flushing: bool,
}

impl VolumeQueue {
    pub(super) fn open(volume: &Arc<Volume>, reactor: &Rc<Reactor>) -> Result<VolumeQueue, DeviceError> {
        let device = volume.device.open_queue(reactor)?;
        let stats = Arc::new(OpStats::default());
        volume.stats.lock().push(stats.clone());
        let capabilities = volume.device.capabilities();
        let mut made = None;
        reactor.register_cyclic(|id| {
            let inner = Rc::new(Inner {
                volume: volume.clone(),
                device,
                reactor: reactor.clone(),
                id,
                completions: CompletionQueue::new(reactor, id, SLOTS),
                slots: RefCell::new(Slab::with_capacity(SLOTS)),
                stats,
                lock_unit: u64::from(volume.lock_unit()),
                device_fua: capabilities.fua,
                device_discards: capabilities.discard,
                device_block_status: capabilities.block_status,
                failed_flush_is_fatal: capabilities.flush_failure_loses_writes,
                in_flight: Cell::new(0),
            });
            made = Some(inner.clone());
            inner
        });
        let inner = made.expect("register_cyclic calls its argument");
        Ok(VolumeQueue { inner })
    }

    /// Takes a request of any offset and length; it is checked here and completed exactly once through its own queue.
    pub fn submit(&self, request: Request) {
        self.inner.submit(request);
    }

    pub fn volume(&self) -> &Arc<Volume> {
        &self.inner.volume
    }

    /// Requests taken and not yet completed.
    pub fn in_flight(&self) -> usize {
        self.inner.in_flight.get()
    }
}

impl Drop for VolumeQueue {
    fn drop(&mut self) {
        self.inner.reactor.unregister(self.inner.id);
    }
}

impl Inner {
    fn submit(&self, mut request: Request) {
        if request.op == Op::Flush {
            (request.offset, request.len) = (0, 0);
        }
        let class = OpClass::from(request.op);
        self.stats.started(class);
        if let Err(errno) = self.check(&request) {
            self.stats.ended(class, 0, false);
            return request.complete(Err(errno));
        }
        if self.is_void(&request) {
            self.stats.ended(class, 0, true);
            return request.complete(Ok(()));
        }
        if request.op == Op::BlockStatus && !self.device_block_status {
            self.stats.ended(class, 0, true);
            let all_data = vec![Extent { len: request.len, kind: ExtentKind::Data }];
            return request.complete_with(Ok(()), Payload::Extents(all_data));
        }
        self.in_flight.set(self.in_flight.get() + 1);
        self.admit(request);
    }

    fn check(&self, request: &Request) -> Result<(), Errno> {
        if request.op == Op::Flush {
            return if self.volume.flushes.has_failed() { Err(Errno::EIO) } else { Ok(()) };
        }
        let end = request.offset.checked_add(request.len).ok_or(Errno::EINVAL)?;
        if end > self.volume.size() {
            return Err(if matches!(request.op, Op::Write { .. } | Op::WriteZeroes { .. }) {
                Errno::ENOSPC
            } else {
                Errno::EINVAL
            });
        }
        if request.op.modifies() {
            if self.volume.is_read_only() {
                return Err(Errno::EPERM);
            }
            if self.volume.flushes.has_failed() {
                return Err(Errno::EIO);
            }
        }
        if matches!(request.op, Op::WriteZeroes { fast: true, .. }) && !self.volume.capabilities().fast_zero {
            return Err(Errno::EOPNOTSUPP);
        }
        let carries_memory = matches!(request.op, Op::Read | Op::Write { .. });
        let memory_len = request.payload.memory().map(|memory| memory.len() as u64);
        if carries_memory && memory_len != Some(request.len) {
            return Err(Errno::EINVAL);
        }
        Ok(())
    }

    /// True for what needs no device: nothing to do, nothing to flush, or an optional hint.
    fn is_void(&self, request: &Request) -> bool {
        match request.op {
            Op::Flush => !self.volume.flushes.begin(),
            Op::Discard => request.len == 0 || !self.device_discards,
            _ => request.len == 0,
        }
    }

    fn admit(&self, request: Request) {
        let now = self.reactor.now();
        let slot = Slot {
            op: request.op,
            offset: request.offset,
            end: request.end(),
            len: request.len,
            arrived: request.arrived,
            submitted: now,
            completer: None,
            waiting: None,
            locked: None,
            flushing: request.op == Op::Flush,
        };
        let token = self.slots.borrow_mut().insert(slot) as u32;
        let (piece, completer) = request.divert(&self.completions, u64::from(token));
        self.slots.borrow_mut()[token as usize].completer = Some(completer);
        if piece.op.modifies() { self.lock(token, piece) } else { self.device.submit(piece) }
    }

    /// Cuts the request to one piece, locks its range and starts it, or lets it wait.
    fn lock(&self, token: u32, mut piece: Request) {
        if !matches!(piece.op, Op::Write { .. }) {
            let piece_end = (piece.offset + PIECE) / PIECE * PIECE;
            piece.len = piece.end().min(piece_end) - piece.offset;
        }
        let start = piece.offset / self.lock_unit * self.lock_unit;
        let end = piece.end().next_multiple_of(self.lock_unit);
        let mut slots = self.slots.borrow_mut();
        let slot = &mut slots[token as usize];
        slot.locked = Some(start);
        slot.waiting = Some(piece);
        let waiter = || Waiter::Handler { reactor: self.reactor.handle(), handler: self.id, token };
        if !self.volume.ranges.acquire(start, end, waiter) {
            return;
        }
        let piece = slot.waiting.take();
        drop(slots);
        self.start(piece);
    }

    fn start(&self, piece: Option<Request>) {
        let Some(mut piece) = piece else { return };
        piece.op = match piece.op {
            Op::Write { fua } => Op::Write { fua: fua && self.device_fua },
            Op::WriteZeroes { unmap, fast, .. } => Op::WriteZeroes { unmap, fua: false, fast },
            other => other,
        };
        self.device.submit(piece);
    }

    fn piece_done(&self, completion: Completion) {
        let token = completion.token as usize;
        let mut slots = self.slots.borrow_mut();
        let slot = &mut slots[token];
        if let Some(start) = slot.locked.take() {
            self.volume.flushes.wrote();
            self.volume.ranges.release(start);
        }
        if slot.flushing {
            self.volume.flushes.ended(completion.result.is_ok());
            if let Err(errno) = completion.result
                && self.failed_flush_is_fatal
            {
                self.volume.fail_closed(errno);
            }
        } else if matches!(slot.op, Op::Write { fua: true }) && completion.result == Err(Errno::EIO) && self.failed_flush_is_fatal
        {
            self.volume.fail_closed(Errno::EIO);
        } else if completion.result.is_ok()
            && let Some(next) = self.next_step(slot, token as u32)
        {
            drop(slots);
            return if next.op == Op::Flush { self.device.submit(next) } else { self.lock(token as u32, next) };
        }
        let slot = slots.remove(token);
        drop(slots);
        self.finish(slot, completion);
    }

    /// The next piece of a long request, or the flush that makes its FUA true.
    fn next_step(&self, slot: &mut Slot, token: u32) -> Option<Request> {
        let request =
            |op, offset, len| Request::new(op, offset, len, Payload::None, slot.arrived, &self.completions, u64::from(token));
        if matches!(slot.op, Op::Discard | Op::WriteZeroes { .. }) {
            let done = (slot.offset + PIECE) / PIECE * PIECE;
            if done < slot.end {
                slot.offset = done;
                return Some(request(slot.op, done, slot.end - done));
            }
        }
        let needs_flush = match slot.op {
            Op::Write { fua } => fua && !self.device_fua,
            Op::WriteZeroes { fua, .. } => fua,
            _ => false,
        };
        if needs_flush && self.volume.flushes.begin() {
            slot.flushing = true;
            return Some(request(Op::Flush, 0, 0));
        }
        None
    }

    fn finish(&self, slot: Slot, completion: Completion) {
        let now = self.reactor.now();
        let class = OpClass::from(slot.op);
        self.stats.stage(class, Stage::Queued, slot.submitted.saturating_duration_since(slot.arrived));
        self.stats.stage(class, Stage::Backend, now.saturating_duration_since(slot.submitted));
        self.stats.stage(class, Stage::Total, now.saturating_duration_since(slot.arrived));
        let len = if matches!(slot.op, Op::Flush | Op::BlockStatus) { 0 } else { slot.len };
        self.stats.ended(class, len, completion.result.is_ok());
        if let Err(errno) = completion.result
            && errno != Errno::EOPNOTSUPP
        {
            self.volume.note_error(class.name(), slot.offset, len, errno);
        }
        self.in_flight.set(self.in_flight.get() - 1);
        if let Some(completer) = slot.completer {
            completer.complete(completion.result, completion.payload);
        }
    }
}

impl Handler for Inner {
    /// A range this queue waited for was granted.
    fn completed(&self, token: u32, _result: i32, _flags: u32) {
        let mut slots = self.slots.borrow_mut();
        let slot = &mut slots[token as usize];
        slot.submitted = self.reactor.now();
        let piece = slot.waiting.take();
        drop(slots);
        self.start(piece);
    }

    fn ready(&self) {
        while let Some(completion) = self.completions.pop() {
            self.piece_done(completion);
        }
    }
}
