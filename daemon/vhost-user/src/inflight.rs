//! The in-flight log: which chains of a ring were taken and not given back, kept in memory that the front end holds, so that it
//! survives this process.
//!
//! ```text
//!   area:   queue 0 | queue 1 | … | trailer           each rounded up to 64 bytes
//!   queue:  | features u64 | version u16 | size u16 | last batch u16 | used index u16 |  entry × size
//!   entry:  | in flight u8 | 0 × 5 | next u16 | counter u64 |
//!   trailer: | magic u64 | write through u8 |          our own: a front end does not repeat SET_CONFIG when it reconnects
//!
//!   take      counter, then in flight = 1
//!   give back next = last batch, last batch = head        ─┐
//!             … for each of the batch …                    ├─ a crash between any two steps is recovered from
//!             the ring's used index moves                  │
//!             in flight = 0 for each, then used index     ─┘
//! ```
//!
//! The order of these stores is what counts; a killed process leaves memory as of some point between two of them. Loads and
//! stores are atomic only so that the compiler keeps them, and in order.
//!
//! The front end can write here too: what is read back is checked.

use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, AtomicU16, AtomicU64, Ordering};

use rustix::fs::{MemfdFlags, SealFlags, fcntl_add_seals, ftruncate, memfd_create};
use thiserror::Error;

use crate::memory::{Mapping, MemoryError};
use crate::message::{AreaSpec, InflightSpec};
use crate::ring::{RING_SIZE_MAX, RingError};

const HEADER_LEN: usize = 16;
const ENTRY_LEN: usize = 16;
const ALIGNMENT: usize = 64;
const VERSION: u16 = 1;
const TRAILER_LEN: usize = ALIGNMENT;
const TRAILER_MAGIC: u64 = u64::from_le_bytes(*b"NOVACACH");

/// Why a log cannot be used.
#[derive(Error, Debug)]
pub enum LogError {
    #[error("an in-flight log for {queues} queues of {size} does not fit {area} bytes at {offset}")]
    Shape { queues: u16, size: u16, area: u64, offset: u64 },
    #[error(transparent)]
    Memory(#[from] MemoryError),
    #[error("make an in-flight log: {0}")]
    Make(#[from] std::io::Error),
}

fn queue_len(size: u16) -> usize {
    (HEADER_LEN + ENTRY_LEN * usize::from(size)).next_multiple_of(ALIGNMENT)
}

/// The log of all rings of a front end.
pub struct InflightArea {
    mapping: Mapping,
    queues: u16,
    queue_size: u16,
}

impl InflightArea {
    /// A new, empty log and the file it lies in.
    pub fn create(queues: u16, queue_size: u16) -> Result<(InflightSpec, OwnedFd), LogError> {
        let size = (usize::from(queues) * queue_len(queue_size) + TRAILER_LEN).next_multiple_of(4096) as u64;
        let area = AreaSpec { size, file_offset: 0 };
        if u32::from(queue_size) > RING_SIZE_MAX {
            return Err(LogError::Shape { queues, size: queue_size, area: size, offset: 0 });
        }
        let make = || -> rustix::io::Result<OwnedFd> {
            let file = memfd_create("inflight", MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING)?;
            ftruncate(&file, size)?;
            fcntl_add_seals(&file, SealFlags::SHRINK | SealFlags::GROW | SealFlags::SEAL)?;
            Ok(file)
        };
        let file = make().map_err(std::io::Error::from)?;
        Ok((InflightSpec { area, queues, queue_size }, file))
    }

    /// The log that a front end hands (back) to us.
    pub fn open(spec: InflightSpec, file: OwnedFd, event: &Arc<OwnedFd>) -> Result<InflightArea, LogError> {
        let need = usize::from(spec.queues) * queue_len(spec.queue_size);
        let fits = need as u64 <= spec.area.size && u32::from(spec.queue_size) <= RING_SIZE_MAX;
        if !fits || !spec.area.file_offset.is_multiple_of(8) {
            let AreaSpec { size, file_offset } = spec.area;
            return Err(LogError::Shape { queues: spec.queues, size: spec.queue_size, area: size, offset: file_offset });
        }
        let mapping = Mapping::new(file, spec.area, event)?;
        Ok(InflightArea { mapping, queues: spec.queues, queue_size: spec.queue_size })
    }

    pub fn is_broken(&self) -> bool {
        self.mapping.is_broken()
    }

    /// Magic and value of the trailer, where there is room for one.
    fn trailer(&self) -> Option<(&AtomicU64, &AtomicU8)> {
        let offset = usize::from(self.queues) * queue_len(self.queue_size);
        (offset + TRAILER_LEN <= self.mapping.len()).then(|| {
            let start = self.mapping.start().wrapping_add(offset);
            // SAFETY: the trailer lies inside the mapping, at a multiple of 8, and is only accessed atomically.
            unsafe { (AtomicU64::from_ptr(start.cast()), AtomicU8::from_ptr(start.add(8))) }
        })
    }

    /// Whether the guest had switched its write cache off, as far as this log knows.
    pub fn write_through(&self) -> Option<bool> {
        let (magic, value) = self.trailer()?;
        (magic.load(Ordering::Acquire) == TRAILER_MAGIC).then(|| value.load(Ordering::Relaxed) != 0)
    }

    pub fn set_write_through(&self, write_through: bool) {
        if let Some((magic, value)) = self.trailer() {
            value.store(u8::from(write_through), Ordering::Relaxed);
            magic.store(TRAILER_MAGIC, Ordering::Release);
        }
    }
}

/// Where to go on after a restart.
#[derive(Debug, PartialEq, Eq)]
pub struct Recovered {
    /// Heads to carry out again, in the order they were taken.
    pub replay: Vec<u16>,
    /// Of the available ring.
    pub next_available: u16,
}

/// The log of one ring.
pub struct InflightLog {
    area: Arc<InflightArea>,
    start: *mut u8,
    size: u16,
    counter: u64,
}

impl InflightLog {
    /// The log of ring `index`, of `size` descriptors; `None` if the area has none for it.
    pub fn of_ring(area: &Arc<InflightArea>, index: usize, size: u16) -> Result<Option<InflightLog>, RingError> {
        if index >= usize::from(area.queues) {
            return Ok(None);
        }
        if size > area.queue_size {
            return Err(RingError::Log("has fewer entries than the ring"));
        }
        let start = area.mapping.start().wrapping_add(index * queue_len(area.queue_size));
        Ok(Some(InflightLog { area: area.clone(), start, size: area.queue_size, counter: 0 }))
    }

    fn u16_at(&self, offset: usize) -> &AtomicU16 {
        debug_assert!(offset + 2 <= queue_len(self.size));
        // SAFETY: `open` checked that the area holds this queue's log; offsets given are even and inside it; it is mapped as
        // long as `area` lives, and only accessed atomically.
        unsafe { AtomicU16::from_ptr(self.start.add(offset).cast()) }
    }

    fn version(&self) -> &AtomicU16 {
        self.u16_at(8)
    }

    fn last_batch(&self) -> &AtomicU16 {
        self.u16_at(12)
    }

    fn used_index(&self) -> &AtomicU16 {
        self.u16_at(14)
    }

    fn entry(&self, head: u16) -> usize {
        debug_assert!(head < self.size);
        HEADER_LEN + ENTRY_LEN * usize::from(head)
    }

    fn in_flight(&self, head: u16) -> &AtomicU8 {
        // SAFETY: as in `u16_at`.
        unsafe { AtomicU8::from_ptr(self.start.add(self.entry(head))) }
    }

    fn next(&self, head: u16) -> &AtomicU16 {
        self.u16_at(self.entry(head) + 6)
    }

    fn counter(&self, head: u16) -> &AtomicU64 {
        // SAFETY: as in `u16_at`; the area starts at a multiple of 8, and so does every counter in it.
        unsafe { AtomicU64::from_ptr(self.start.add(self.entry(head) + 8).cast()) }
    }

    /// Brings the log in line with a ring whose used index is `used`. `None`: the log is new, or is not about this ring, and
    /// was emptied.
    pub fn recover(&mut self, used: u16, ring_size: u16) -> Option<Recovered> {
        let known = self.version().load(Ordering::Acquire) == VERSION;
        let recovered = if known && self.settle_batch(used) { self.pending(used, ring_size) } else { None };
        if recovered.is_none() {
            self.reset(used);
        }
        recovered
    }

    /// The process may have died after it moved the used index by a batch and before it took the batch off the log: the batch
    /// is the list at its head. False if the list cannot be that.
    fn settle_batch(&self, used: u16) -> bool {
        let batch = used.wrapping_sub(self.used_index().load(Ordering::Acquire));
        if batch > self.size {
            return false;
        }
        let mut heads = Vec::with_capacity(usize::from(batch));
        let mut head = self.last_batch().load(Ordering::Acquire);
        for _ in 0..batch {
            if head >= self.size || heads.contains(&head) {
                return false;
            }
            heads.push(head);
            head = self.next(head).load(Ordering::Acquire);
        }
        // Entries are cleared in the order of the list, so those cleared already come first.
        let flags: Vec<bool> = heads.iter().map(|head| self.in_flight(*head).load(Ordering::Acquire) == 1).collect();
        if !flags.is_sorted() {
            return false;
        }
        self.forget(heads.into_iter(), used);
        true
    }

    fn pending(&mut self, used: u16, ring_size: u16) -> Option<Recovered> {
        let mut taken: Vec<(u64, u16)> = (0..self.size)
            .filter(|head| self.in_flight(*head).load(Ordering::Acquire) == 1)
            .map(|head| (self.counter(head).load(Ordering::Acquire), head))
            .collect();
        taken.sort_unstable();
        let beyond = taken.iter().any(|(_, head)| *head >= ring_size);
        if beyond || taken.len() > usize::from(ring_size) {
            return None;
        }
        self.counter = taken.last().map_or(0, |(counter, _)| counter.wrapping_add(1));
        let next_available = used.wrapping_add(taken.len() as u16);
        Some(Recovered { replay: taken.into_iter().map(|(_, head)| head).collect(), next_available })
    }

    fn reset(&self, used: u16) {
        for head in 0..self.size {
            self.in_flight(head).store(0, Ordering::Release);
        }
        self.u16_at(10).store(self.size, Ordering::Release);
        self.used_index().store(used, Ordering::Release);
        self.version().store(VERSION, Ordering::Release);
    }

    /// `head` was taken from the ring.
    #[inline]
    pub fn take(&mut self, head: u16) {
        self.counter(head).store(self.counter, Ordering::Release);
        self.counter = self.counter.wrapping_add(1);
        may_die();
        self.in_flight(head).store(1, Ordering::Release);
    }

    /// `head` is about to be given back.
    #[inline]
    pub fn give_back(&self, head: u16) {
        self.next(head).store(self.last_batch().load(Ordering::Relaxed), Ordering::Release);
        may_die();
        self.last_batch().store(head, Ordering::Release);
    }

    /// A batch was given back: the ring's used index is now `used`. `heads` in the order they were given back.
    #[inline]
    pub fn settle(&self, heads: &[u16], used: u16) {
        self.forget(heads.iter().rev().copied(), used);
    }

    fn forget(&self, heads: impl Iterator<Item = u16>, used: u16) {
        for head in heads {
            may_die();
            self.in_flight(head).store(0, Ordering::Release);
        }
        may_die();
        self.used_index().store(used, Ordering::Release);
    }

    /// Keeps the memory mapped; for whoever wants to know whether it still is.
    pub fn area(&self) -> &Arc<InflightArea> {
        &self.area
    }
}

/// A place between two stores: tests let the process die there.
#[inline(always)]
fn may_die() {
    #[cfg(test)]
    tests::may_die();
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::cell::Cell;
    use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};

    use proptest::prelude::*;
    use rustix::event::{EventfdFlags, eventfd};

    fn area(queues: u16, size: u16) -> Arc<InflightArea> {
        let event = Arc::new(eventfd(0, EventfdFlags::CLOEXEC).unwrap());
        let (spec, file) = InflightArea::create(queues, size).unwrap();
        Arc::new(InflightArea::open(spec, file, &event).unwrap())
    }

    fn log(area: &Arc<InflightArea>, index: usize) -> InflightLog {
        InflightLog::of_ring(area, index, 8).unwrap().unwrap()
    }

    #[test]
    fn a_new_log_recovers_nothing() {
        let area = area(2, 8);
        assert_eq!(log(&area, 1).recover(77, 8), None);
        let again = Recovered { replay: vec![], next_available: 77 };
        assert_eq!(log(&area, 1).recover(77, 8), Some(again));
        assert!(InflightLog::of_ring(&area, 2, 8).unwrap().is_none());
        assert!(InflightLog::of_ring(&area, 0, 16).is_err());
    }

    #[test]
    fn logs_of_impossible_shape_are_refused() {
        let event = Arc::new(eventfd(0, EventfdFlags::CLOEXEC).unwrap());
        let (spec, file) = InflightArea::create(2, 128).unwrap();
        let refused = |spec| InflightArea::open(spec, file.try_clone().unwrap(), &event).is_err();
        assert!(refused(InflightSpec { queues: 5, ..spec }));
        assert!(refused(InflightSpec { queue_size: 2048, ..spec }));
        assert!(refused(InflightSpec { area: AreaSpec { file_offset: 1, ..spec.area }, ..spec }));
        assert!(refused(InflightSpec { area: AreaSpec { size: u64::MAX, ..spec.area }, ..spec }));
        assert!(!refused(spec));
    }

    #[test]
    fn a_log_of_another_ring_is_emptied() {
        let area = area(1, 8);
        let mut first = log(&area, 0);
        first.recover(100, 8);
        (0..4).for_each(|head| first.take(head));
        assert_eq!(log(&area, 0).recover(3, 8), None, "a reset ring starts at 0 again");
        assert_eq!(log(&area, 0).recover(3, 8).unwrap().replay, Vec::<u16>::new());
    }

    thread_local! {
        /// How many more stores happen before the process dies.
        static FUEL: Cell<usize> = const { Cell::new(usize::MAX) };
    }

    pub fn may_die() {
        let left = FUEL.get();
        if left == 0 {
            resume_unwind(Box::new("killed"));
        }
        FUEL.set(left - 1);
    }

    #[derive(Clone, Debug)]
    enum Step {
        Take(u16),
        Complete(Vec<u16>),
    }

    /// A run of takes and completions of batches in any order.
    fn steps() -> impl Strategy<Value = Vec<Step>> {
        proptest::collection::vec((any::<bool>(), any::<u64>()), 1..40).prop_map(|choices| {
            let mut free: Vec<u16> = (0..8).collect();
            let mut taken: Vec<u16> = Vec::new();
            let mut steps = Vec::new();
            for (take, seed) in choices {
                if take && !free.is_empty() {
                    let head = free.remove(seed as usize % free.len());
                    taken.push(head);
                    steps.push(Step::Take(head));
                } else if !taken.is_empty() {
                    let count = 1 + seed as usize % taken.len();
                    let by = (seed >> 8) as usize % taken.len();
                    taken.rotate_left(by);
                    let batch: Vec<u16> = taken.drain(..count).collect();
                    free.extend(&batch);
                    steps.push(Step::Complete(batch));
                }
            }
            steps
        })
    }

    proptest! {
        /// Kills the process between any two stores and recovers, and kills the recovery too: exactly what the guest has not
        /// seen given back is replayed, in the order it was taken.
        #[test]
        fn any_crash_is_recovered(steps in steps(), start in any::<u16>(), fuel in 0usize..200, second in 0usize..10) {
            let area = area(1, 8);
            let mut log = log(&area, 0);
            log.recover(start, 8);
            let mut used = start;
            let mut expected: Vec<u16> = Vec::new();
            FUEL.set(fuel);
            let _ = catch_unwind(AssertUnwindSafe(|| {
                for step in steps {
                    may_die();
                    match step {
                        Step::Take(head) => {
                            log.take(head);
                            expected.push(head);
                        }
                        Step::Complete(batch) => {
                            batch.iter().for_each(|head| log.give_back(*head));
                            may_die();
                            used = used.wrapping_add(batch.len() as u16);
                            expected.retain(|head| !batch.contains(head));
                            log.settle(&batch, used);
                        }
                    }
                }
            }));
            let next_available = used.wrapping_add(expected.len() as u16);
            let reborn = || InflightLog::of_ring(&area, 0, 8).unwrap().unwrap();
            FUEL.set(second);
            let _ = catch_unwind(AssertUnwindSafe(|| reborn().recover(used, 8)));
            FUEL.set(usize::MAX);
            prop_assert_eq!(reborn().recover(used, 8), Some(Recovered { replay: expected, next_available }));
        }

        /// Whatever the front end writes into the log, recovery ends and names only heads of the ring.
        #[test]
        fn garbage_is_survived(bytes in proptest::collection::vec(any::<u8>(), queue_len(8)), used in any::<u16>()) {
            let area = area(1, 8);
            let mut log = log(&area, 0);
            for (at, byte) in bytes.iter().enumerate() {
                // SAFETY: inside the log's own part of the area.
                unsafe { log.start.add(at).write_volatile(*byte) };
            }
            log.version().store(VERSION, Ordering::Relaxed);
            if let Some(recovered) = log.recover(used, 4) {
                prop_assert!(recovered.replay.len() <= 4 && recovered.replay.iter().all(|head| *head < 4));
            }
        }
    }
}
