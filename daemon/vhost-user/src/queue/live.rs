//! The requests of one queue: from chains to [`Request`]s on guest memory, and back into the used ring.

use std::any::Any;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

use blockdev::stats::{OpClass, OpStats, Stage};
use blockdev::{CompletionQueue, Errno, HandlerId, Memory, Op, Payload, Reactor, Request, VolumeQueue};
use smallvec::{SmallVec, smallvec};

use super::QueueSetup;
use crate::chain::{
    ChainReader, Command, Limits, Range, STATUS_IOERR, STATUS_OK, STATUS_UNSUPP, Segment, copy_to_guest, translate,
};
use crate::config;
use crate::dirty_log::DirtyLog;
use crate::inflight::InflightLog;
use crate::memory::Translator;
use crate::pinned::Pinned;
use crate::ring::{Ring, RingError, UsedLog};

/// The most heads taken at a time: more would keep the thread's other queues waiting.
const TAKEN_MAX: u16 = 64;

/// A queue's ring and its requests.
pub(super) struct Live {
    pub(super) ring: Ring,
    memory: Translator,
    /// The same memory, for requests to hold on to.
    owner: Rc<dyn Any>,
    /// Held while the queue runs.
    _pinned: Option<Rc<Pinned>>,
    reader: ChainReader,
    limits: Limits,
    volume: Rc<VolumeQueue>,
    completions: Rc<CompletionQueue>,
    slots: Box<[Slot]>,
    pub(super) in_flight: usize,
    /// Heads given back and not yet published.
    pub(super) batch: Vec<u16>,
    log: Option<Arc<DirtyLog>>,
    inflight: Option<InflightLog>,
    write_through: Arc<AtomicBool>,
    always_write_through: bool,
    read_only: bool,
    serial: [u8; 20],
    stats: Arc<OpStats>,
}

/// A request on its way, by head.
struct Slot {
    /// On its way to the volume or in it; otherwise the slot is free.
    pending: bool,
    class: OpClass,
    /// Of one without data.
    op: Op,
    failed: Option<Errno>,
    bytes: u64,
    status: *mut u8,
    status_guest: u64,
    arrived: Instant,
    /// What a read dirties, while that is logged.
    dirty: SmallVec<[Segment; 2]>,
    /// Ranges yet to be carried out, the next one last.
    ranges: SmallVec<[Range; 1]>,
}

impl Live {
    /// The queue and the heads to carry out again.
    pub(super) fn new(
        reactor: &Rc<Reactor>,
        id: HandlerId,
        volume: Rc<VolumeQueue>,
        setup: QueueSetup,
    ) -> Result<(Live, Vec<u16>), RingError> {
        let event_index = setup.features & config::FEATURE_EVENT_INDEX != 0;
        let used_log = setup.addresses.log.zip(setup.log.as_ref());
        let used_log = used_log.map(|(address, log)| UsedLog { log: log.clone(), address });
        let mut ring = Ring::new(&setup.memory, setup.size, &setup.addresses, event_index, used_log)?;
        ring.set_next_available(setup.base);
        let mut inflight = match &setup.inflight {
            Some(area) => InflightLog::of_ring(area, setup.index, ring.size())?,
            None => None,
        };
        let mut replay = Vec::new();
        if let Some(log) = &mut inflight
            && let Some(recovered) = log.recover(ring.published(), ring.size())
        {
            ring.set_next_available(recovered.next_available);
            replay = recovered.replay;
        }
        let size = usize::from(ring.size());
        let now = reactor.now();
        let slots = (0..size).map(|_| Slot::free(now)).collect();
        let live = Live {
            ring,
            memory: Translator::new(setup.memory.clone()),
            owner: Rc::new(setup.memory),
            _pinned: setup.pages.map(|pages| Pinned::on(reactor, &pages)),
            reader: ChainReader::new(setup.features & config::FEATURE_INDIRECT != 0),
            limits: config::limits(&setup.volume),
            volume,
            completions: CompletionQueue::new(reactor, id, size),
            slots,
            in_flight: 0,
            batch: Vec::with_capacity(size),
            log: setup.log,
            inflight,
            write_through: setup.write_through,
            always_write_through: setup.features & config::FEATURE_FLUSH == 0,
            read_only: setup.read_only,
            serial: setup.serial,
            stats: setup.stats,
        };
        Ok((live, replay))
    }

    fn is_memory_gone(&self) -> bool {
        self.memory.memory().is_broken() || self.inflight.as_ref().is_some_and(|log| log.area().is_broken())
    }

    /// Takes heads, but not more than [`TAKEN_MAX`]; false if there were none.
    pub(super) fn take_available(&mut self, now: Instant) -> Result<bool, RingError> {
        let count = self.ring.available()?;
        if count == 0 {
            return Ok(false);
        }
        if self.is_memory_gone() {
            return Err(RingError::MemoryGone);
        }
        self.ring.disable_notifications();
        for _ in 0..count.min(TAKEN_MAX) {
            let head = self.ring.pop()?;
            if let Some(log) = &mut self.inflight {
                log.take(head);
            }
            self.take(head, now)?;
        }
        Ok(true)
    }

    /// Starts the request at `head`.
    #[inline]
    pub(super) fn take(&mut self, head: u16, now: Instant) -> Result<(), RingError> {
        if self.slots[usize::from(head)].pending {
            return Err(RingError::Busy(head));
        }
        let parsed = self.reader.parse(&self.ring, &self.memory, head, self.limits)?;
        let slot = &mut self.slots[usize::from(head)];
        (slot.status, slot.status_guest, slot.arrived) = (parsed.status, parsed.status_guest, now);
        slot.failed = None;
        match parsed.command {
            Command::Read { offset, len } => self.transfer(head, Op::Read, offset, len),
            Command::Write { .. } | Command::Discard(_) | Command::WriteZeroes(_) if self.read_only => {
                self.answer(head, STATUS_IOERR, 0);
            }
            Command::Write { offset, len } => self.transfer(head, Op::Write { fua: self.is_write_through() }, offset, len),
            Command::Flush => self.submit(head, Op::Flush, smallvec![Range { offset: 0, len: 0, unmap: false }]),
            Command::Discard(ranges) => self.submit(head, Op::Discard, ranges),
            Command::WriteZeroes(ranges) => {
                let op = Op::WriteZeroes { unmap: false, fua: self.is_write_through(), fast: false };
                self.submit(head, op, ranges);
            }
            Command::GetId => self.identify(head),
            Command::Refused(status) => self.answer(head, status, 0),
        }
        Ok(())
    }

    fn is_write_through(&self) -> bool {
        self.always_write_through || self.write_through.load(Ordering::Relaxed)
    }

    #[inline]
    fn transfer(&mut self, head: u16, op: Op, offset: u64, len: u64) {
        let read = op == Op::Read;
        let segments = if read { self.reader.room_for_guest() } else { self.reader.data_from_guest() };
        let Some(pieces) = translate(&self.memory, segments) else {
            return self.answer(head, STATUS_IOERR, 0);
        };
        let slot = &mut self.slots[usize::from(head)];
        if read && self.log.is_some() {
            slot.dirty.extend_from_slice(segments);
        }
        (slot.pending, slot.class, slot.bytes) = (true, OpClass::from(op), len);
        self.stats.started(slot.class);
        self.in_flight += 1;
        // SAFETY: the pieces lie in mappings of the guest memory that `owner` keeps mapped, readable and writable.
        let memory = unsafe { Memory::from_segments(pieces, self.owner.clone()) };
        let token = u64::from(head);
        self.volume.submit(Request::new(op, offset, len, Payload::Memory(memory), slot.arrived, &self.completions, token));
    }

    /// A request without data, in one or more ranges: they are carried out one after another, so that a guest has no more
    /// requests in the volume than in its ring.
    fn submit(&mut self, head: u16, op: Op, mut ranges: SmallVec<[Range; 1]>) {
        let slot = &mut self.slots[usize::from(head)];
        slot.pending = true;
        (slot.op, slot.class, slot.bytes) = (op, OpClass::from(op), ranges.iter().map(|range| range.len).sum());
        ranges.reverse();
        slot.ranges = ranges;
        self.stats.started(slot.class);
        self.in_flight += 1;
        self.submit_next_range(head);
    }

    fn submit_next_range(&mut self, head: u16) {
        let slot = &mut self.slots[usize::from(head)];
        let Some(Range { offset, len, unmap }) = slot.ranges.pop() else { return };
        let op = match slot.op {
            Op::WriteZeroes { fua, fast, .. } => Op::WriteZeroes { unmap, fua, fast },
            other => other,
        };
        let token = u64::from(head);
        self.volume.submit(Request::new(op, offset, len, Payload::None, slot.arrived, &self.completions, token));
    }

    fn identify(&mut self, head: u16) {
        let room = self.reader.room_for_guest();
        let Some(len) = copy_to_guest(&self.memory, room, &self.serial) else {
            return self.answer(head, STATUS_IOERR, 0);
        };
        if let Some(log) = &self.log {
            let mut left = len;
            for segment in room {
                let written = segment.len.min(left);
                log.mark(segment.guest, u64::from(written));
                left -= written;
            }
        }
        self.answer(head, STATUS_OK, len);
    }

    /// Gives a chain back: writes the status behind `len` bytes of data.
    #[inline]
    fn answer(&mut self, head: u16, status: u8, len: u32) {
        let slot = &self.slots[usize::from(head)];
        // SAFETY: the address was translated when the chain was taken, and its mapping is held by `memory`.
        unsafe { slot.status.write_volatile(status) };
        if let Some(log) = &self.log {
            log.mark(slot.status_guest, 1);
        }
        self.ring.push_used(head, len + 1);
        if let Some(log) = &self.inflight {
            log.give_back(head);
        }
        self.batch.push(head);
    }

    /// Answers what has completed; true if guest memory is gone.
    pub(super) fn complete_finished(&mut self, now: Instant) -> bool {
        while let Some(completion) = self.completions.pop() {
            let head = completion.token as u16;
            let slot = &mut self.slots[usize::from(head)];
            slot.failed = completion.result.err();
            if slot.failed.is_none() && !slot.ranges.is_empty() {
                self.submit_next_range(head);
                continue;
            }
            slot.ranges.clear();
            slot.pending = false;
            self.in_flight -= 1;
            self.finish(head, now);
        }
        !self.batch.is_empty() && self.is_memory_gone()
    }

    #[inline]
    fn finish(&mut self, head: u16, now: Instant) {
        let slot = &mut self.slots[usize::from(head)];
        self.stats.stage(slot.class, Stage::Total, now.saturating_duration_since(slot.arrived));
        self.stats.ended(slot.class, slot.bytes, slot.failed.is_none());
        if let Some(log) = &self.log {
            slot.dirty.drain(..).for_each(|segment| log.mark(segment.guest, u64::from(segment.len)));
        }
        let status = match slot.failed {
            None => STATUS_OK,
            Some(Errno::EOPNOTSUPP) => STATUS_UNSUPP,
            Some(_) => STATUS_IOERR,
        };
        let len = if slot.class == OpClass::Read && slot.failed.is_none() { slot.bytes as u32 } else { 0 };
        self.answer(head, status, len);
    }

    /// Shows the guest the batch; true if it wants to be told.
    pub(super) fn publish(&mut self) -> bool {
        let notify = self.ring.publish();
        if let Some(log) = &self.inflight {
            log.settle(&self.batch, self.ring.published());
        }
        self.batch.clear();
        notify
    }
}

impl Slot {
    fn free(now: Instant) -> Slot {
        Slot {
            pending: false,
            class: OpClass::Read,
            op: Op::Flush,
            failed: None,
            bytes: 0,
            status: std::ptr::null_mut(),
            status_guest: 0,
            arrived: now,
            dirty: SmallVec::new(),
            ranges: SmallVec::new(),
        }
    }
}
