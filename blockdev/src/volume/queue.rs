//! One thread's way into a volume.
//!
//! ```text
//!  submit ─▶ check ─▶ [range lock] ─▶ device ─▶ [next piece] ─▶ [flush for FUA] ─▶ complete
//!                          └─ waits: granted by a posted completion
//! ```
//!
//! Long discards and zeroings are carried out in pieces (see [`super::pieces`]).

use std::cell::{Cell, RefCell};
use std::collections::HashMap;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Instant;

use slab::Slab;

use super::Volume;
use super::pieces::{self, PieceSize, Pieces};
use crate::clock;
use crate::device::{DeviceError, IoQueue};
use crate::errno::Errno;
use crate::range_lock::Waiter;
use crate::reactor::{Handler, HandlerId, Reactor};
use crate::request::{Completer, Completion, CompletionQueue, Extent, ExtentKind, Op, Payload, Request};
use crate::stats::{OpClass, OpStats, Stage};

const SLOTS: usize = 64;

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
    /// Requests that wait for their range, by slot.
    waiting: RefCell<HashMap<u32, Request>>,
    stats: Arc<OpStats>,
    lock_unit: u64,
    device_fua: bool,
    device_discards: bool,
    device_block_status: bool,
    device_zeroes_fast: bool,
    read_only: bool,
    failed_flush_is_fatal: bool,
    piece_size: PieceSize,
    closing: Cell<bool>,
}

/// One request on its way.
struct Slot {
    op: Op,
    offset: u64,
    len: u64,
    arrived: Instant,
    submitted: Instant,
    /// Gone once the request is answered.
    completer: Option<Completer>,
    /// Start of the range held, or waited for.
    locked: Option<u64>,
    flushing: bool,
    /// What the flush must come after, where flushes take turns.
    flush_arrival: u64,
    pieces: Option<Box<Pieces>>,
}

impl Slot {
    fn answered(&self) -> bool {
        self.completer.is_none()
    }

    fn rest(&self) -> Option<(u64, u64)> {
        self.pieces.as_ref().and_then(|pieces| pieces.rest())
    }
}

impl VolumeQueue {
    pub(super) fn open(volume: &Arc<Volume>, reactor: &Rc<Reactor>) -> Result<VolumeQueue, DeviceError> {
        let device = volume.device.open_queue(reactor)?;
        let stats = volume.idle_stats();
        let capabilities = volume.device.capabilities();
        let inner = reactor.install(|id| Inner {
            volume: volume.clone(),
            device,
            reactor: reactor.clone(),
            id,
            completions: CompletionQueue::new(reactor, id, SLOTS),
            slots: RefCell::new(Slab::with_capacity(SLOTS)),
            waiting: RefCell::new(HashMap::new()),
            stats,
            lock_unit: u64::from(volume.lock_unit()),
            device_fua: capabilities.fua,
            device_discards: capabilities.discard,
            device_block_status: capabilities.block_status,
            device_zeroes_fast: capabilities.fast_zero,
            read_only: volume.is_read_only(),
            failed_flush_is_fatal: capabilities.flush_failure_loses_writes,
            piece_size: PieceSize::new(),
            closing: Cell::new(false),
        });
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
        self.inner.slots.borrow().iter().filter(|(_, slot)| !slot.answered()).count()
    }
}

impl Drop for VolumeQueue {
    fn drop(&mut self) {
        self.inner.closing.set(true);
        self.inner.slots.borrow_mut().retain(|_, slot| {
            let resting = slot.answered() && slot.pieces.as_ref().is_some_and(|pieces| pieces.is_resting());
            if resting {
                self.inner.forget_rest(slot);
            }
            !resting
        });
        self.inner.leave_if_done();
    }
}

impl Inner {
    fn leave_if_done(&self) {
        if self.closing.get() && self.slots.borrow().is_empty() {
            self.reactor.unregister(self.id);
        }
    }

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
            if self.read_only {
                return Err(Errno::EPERM);
            }
            if self.volume.flushes.has_failed() {
                return Err(Errno::EIO);
            }
        }
        if matches!(request.op, Op::WriteZeroes { fast: true, .. }) && !self.device_zeroes_fast {
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
            len: request.len,
            arrived: request.arrived,
            submitted: now,
            completer: None,
            locked: None,
            flushing: request.op == Op::Flush,
            flush_arrival: 0,
            pieces: matches!(request.op, Op::Discard | Op::WriteZeroes { .. }).then(|| Box::new(Pieces::of(&request))),
        };
        let token = self.slots.borrow_mut().insert(slot) as u32;
        let (piece, completer) = request.divert(&self.completions, u64::from(token));
        self.slots.borrow_mut()[token as usize].completer = Some(completer);
        match piece.op {
            Op::Flush => self.flush(token, piece),
            op if op.modifies() => self.lock(token, piece),
            _ => self.device.submit(piece),
        }
    }

    fn waiter(&self, token: u32) -> Waiter {
        Waiter::Handler { reactor: self.reactor.handle(), handler: self.id, token }
    }

    /// Hands a flush to the device, in turn where one at a time is allowed.
    fn flush(&self, token: u32, flush: Request) {
        if !self.failed_flush_is_fatal {
            return self.device.submit(flush);
        }
        let gate = &self.volume.flushes;
        self.slots.borrow_mut()[token as usize].flush_arrival = gate.arrival();
        if gate.take_turn(|| self.waiter(token)) {
            self.flush_in_turn(token, flush);
        } else {
            self.waiting.borrow_mut().insert(token, flush);
        }
    }

    fn flush_in_turn(&self, token: u32, flush: Request) {
        let gate = &self.volume.flushes;
        let arrival = self.slots.borrow()[token as usize].flush_arrival;
        if gate.has_failed() {
            flush.complete(Err(Errno::EIO));
        } else if gate.is_covered(arrival) {
            flush.complete(Ok(()));
        } else {
            self.device.submit(flush);
        }
    }

    /// The flush's result: it is no success once writes were lost, even if the device has said so to another.
    fn flush_done(&self, mut result: Result<(), Errno>) -> Result<(), Errno> {
        let gate = &self.volume.flushes;
        if self.failed_flush_is_fatal {
            if let Err(errno) = result {
                self.volume.fail_closed(errno);
            } else if gate.has_failed() {
                result = Err(Errno::EIO);
            }
            gate.end_turn(result.is_ok());
        }
        gate.ended(result.is_ok());
        result
    }

    /// Cuts the request to one piece, locks its range and starts it, or lets it wait.
    fn lock(&self, token: u32, mut piece: Request) {
        let mut slots = self.slots.borrow_mut();
        let slot = &mut slots[token as usize];
        if let Some(pieces) = &mut slot.pieces {
            piece.len = self.piece_size.end(piece.offset, piece.end()) - piece.offset;
            pieces.goes_to(piece.end());
        }
        let start = piece.offset / self.lock_unit * self.lock_unit;
        let end = piece.end().next_multiple_of(self.lock_unit);
        slot.locked = Some(start);
        if self.volume.ranges.acquire(start, end, || self.waiter(token)) {
            drop(slots);
            self.start(token, piece);
        } else {
            self.waiting.borrow_mut().insert(token, piece);
        }
    }

    /// The piece's range is locked: hands it to the device, unless the volume was shrunk meanwhile.
    fn start(&self, token: u32, mut piece: Request) {
        if piece.end() > self.volume.size() {
            self.volume.later.keep(piece.offset, piece.end());
            return piece.complete(Err(Errno::ENOSPC));
        }
        piece.op = match piece.op {
            Op::Write { fua } => Op::Write { fua: fua && self.device_fua },
            Op::WriteZeroes { unmap, fast, .. } => Op::WriteZeroes { unmap, fua: false, fast },
            other => other,
        };
        let mut slots = self.slots.borrow_mut();
        let slot = &mut slots[token as usize];
        if slot.answered() {
            let Some((from, to)) = self.volume.later.take_first(piece.offset, piece.end()) else {
                drop(slots);
                return piece.complete(Ok(()));
            };
            (piece.offset, piece.len) = (from, to - from);
        } else {
            self.volume.later.keep(piece.offset, piece.end());
        }
        if let Some(pieces) = &mut slot.pieces {
            pieces.starts(piece.end());
        }
        drop(slots);
        self.device.submit(piece);
    }

    fn piece_done(&self, mut completion: Completion) {
        let token = completion.token as u32;
        let mut slots = self.slots.borrow_mut();
        let slot = &mut slots[token as usize];
        if let Some(start) = slot.locked.take() {
            self.volume.flushes.wrote();
            self.volume.ranges.release(start);
        }
        if slot.flushing {
            completion.result = self.flush_done(completion.result);
        } else if let Err(errno) = completion.result
            && matches!(slot.op, Op::Write { fua: true })
            && self.device_fua
            && self.failed_flush_is_fatal
            && errno.may_lose_earlier_writes()
        {
            self.volume.fail_closed(errno);
        } else if completion.result.is_ok() && slot.rest().is_some() && !(slot.answered() && self.closing.get()) {
            drop(slots);
            return self.after_piece(token);
        } else if completion.result.is_ok() && self.needs_flush(slot) && self.volume.flushes.begin() {
            slot.flushing = true;
            let flush = self.part(token, slot, Op::Flush, 0, 0);
            drop(slots);
            return self.flush(token, flush);
        }
        let slot = slots.remove(token as usize);
        drop(slots);
        self.forget_rest(&slot);
        self.finish(slot, completion);
        self.leave_if_done();
    }

    /// What is left of an answered discard stays as it is.
    fn forget_rest(&self, slot: &Slot) {
        if slot.answered()
            && let Some((from, to)) = slot.rest()
        {
            self.volume.later.keep(from, to);
        }
    }

    fn needs_flush(&self, slot: &Slot) -> bool {
        match slot.op {
            Op::Write { fua } => fua && !self.device_fua,
            Op::WriteZeroes { fua, .. } => fua,
            _ => false,
        }
    }

    fn part(&self, token: u32, slot: &Slot, op: Op, offset: u64, len: u64) -> Request {
        Request::new(op, offset, len, Payload::None, slot.arrived, &self.completions, u64::from(token))
    }

    /// One piece of a long request is done: learns from how long it took, and goes on or rests.
    fn after_piece(&self, token: u32) {
        let mut slots = self.slots.borrow_mut();
        let slot = &mut slots[token as usize];
        let Some(pieces) = &mut slot.pieces else { return };
        let now = clock::monotonic();
        if let Some(took) = pieces.took(now) {
            self.piece_size.adapt(took);
            if slot.op == Op::Discard {
                pieces.give_way(now, took, Volume::transfers_everywhere());
            }
        }
        drop(slots);
        self.go_on(token, now);
    }

    /// Between two pieces: answers a discard that takes long, and starts the next piece unless it still rests. It wakes up to be answered, too.
    fn go_on(&self, token: u32, now: Instant) {
        let mut slots = self.slots.borrow_mut();
        let slot = &mut slots[token as usize];
        let answer_at = pieces::answer_at(slot.arrived);
        let answer = if slot.op == Op::Discard && answer_at <= now { self.answer_early(slot) } else { None };
        let is_answered = slot.answered();
        match slot.pieces.as_mut().and_then(|pieces| pieces.still_rests(now)) {
            Some(until) => {
                let wake_at = if is_answered { until } else { until.min(answer_at) };
                self.reactor.set_timer(self.id, wake_at, token);
                drop(slots);
            }
            None => {
                drop(slots);
                self.next_piece(token);
            }
        }
        if let Some(completer) = answer {
            completer.complete(Ok(()), Payload::None);
        }
    }

    /// What is left of it is kept to be discarded later. None if it was answered before.
    fn answer_early(&self, slot: &mut Slot) -> Option<Completer> {
        let (cursor, end) = slot.rest()?;
        let completer = slot.completer.take()?;
        self.volume.later.add(cursor, end);
        self.count(slot, Ok(()));
        Some(completer)
    }

    /// Passes over what was overwritten since the answer: that is done.
    fn next_piece(&self, token: u32) {
        let mut slots = self.slots.borrow_mut();
        let slot = &mut slots[token as usize];
        let Some((cursor, end)) = slot.rest() else { return };
        let start = if slot.answered() { self.volume.later.first_start(cursor, end) } else { Some(cursor) };
        let rest = self.part(token, slot, slot.op, start.unwrap_or(end), end - start.unwrap_or(end));
        if let (None, Some(pieces)) = (start, &mut slot.pieces) {
            pieces.goes_to(end);
        }
        drop(slots);
        if start.is_some() { self.lock(token, rest) } else { rest.complete(Ok(())) }
    }

    fn finish(&self, slot: Slot, completion: Completion) {
        if let Err(errno) = completion.result
            && errno != Errno::EOPNOTSUPP
        {
            self.volume.note_error(OpClass::from(slot.op).name(), slot.offset, slot.len, errno);
        }
        if slot.answered() {
            return;
        }
        self.count(&slot, completion.result);
        if let Some(completer) = slot.completer {
            completer.complete(completion.result, completion.payload);
        }
    }

    fn count(&self, slot: &Slot, result: Result<(), Errno>) {
        let now = self.reactor.now();
        let class = OpClass::from(slot.op);
        self.stats.stage(class, Stage::Queued, slot.submitted.saturating_duration_since(slot.arrived));
        self.stats.stage(class, Stage::Backend, now.saturating_duration_since(slot.submitted));
        self.stats.stage(class, Stage::Total, now.saturating_duration_since(slot.arrived));
        let len = if matches!(slot.op, Op::Flush | Op::BlockStatus) { 0 } else { slot.len };
        self.stats.ended(class, len, result.is_ok());
    }
}

impl Handler for Inner {
    /// A range, or the turn to flush, that this queue waited for was granted.
    fn completed(&self, token: u32, _result: i32, _flags: u32) {
        let Some(piece) = self.waiting.borrow_mut().remove(&token) else { return };
        self.slots.borrow_mut()[token as usize].submitted = self.reactor.now();
        if piece.op == Op::Flush { self.flush_in_turn(token, piece) } else { self.start(token, piece) }
    }

    /// A discard has rested, or is to be answered.
    fn timer(&self, token: u32) {
        let is_resting = {
            let slots = self.slots.borrow();
            slots.get(token as usize).and_then(|slot| slot.pieces.as_ref()).is_some_and(|pieces| pieces.is_resting())
        };
        if is_resting {
            self.go_on(token, clock::monotonic());
        }
    }

    fn ready(&self) {
        while let Some(completion) = self.completions.pop() {
            self.piece_done(completion);
        }
    }
}
