//! Which flushes are needed, across all threads of a volume.
//!
//! A flush must cover every write completed before it arrived. If nothing was written since the last successful flush began,
//! there is nothing to do; a flush that is still running counts for nothing, since it may fail.
//!
//! A kernel tells of lost writes once: of two flushes at a time, only one may fail. So a device that can lose writes gets one
//! flush at a time, in turn; all that arrive while one runs share the next.

use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};

use crate::range_lock::{RangeLock, Waiter};

pub(super) struct FlushGate {
    dirty: AtomicBool,
    running: AtomicU32,
    failed: AtomicBool,
    turn: RangeLock,
    /// Flushes handed to the device in turn, and the last of them that succeeded.
    started: AtomicU64,
    succeeded: AtomicU64,
}

impl Default for FlushGate {
    /// A volume starts dirty: whoever had it before may not have flushed.
    fn default() -> Self {
        FlushGate {
            dirty: AtomicBool::new(true),
            running: AtomicU32::new(0),
            failed: AtomicBool::new(false),
            turn: RangeLock::default(),
            started: AtomicU64::new(0),
            succeeded: AtomicU64::new(0),
        }
    }
}

impl FlushGate {
    /// A write has completed; called before its submitter is told.
    pub(super) fn wrote(&self) {
        if !self.dirty.load(Ordering::SeqCst) {
            self.dirty.store(true, Ordering::SeqCst);
        }
    }

    /// A flush arrived: true if the device must carry one out, to be ended with [`FlushGate::ended`].
    pub(super) fn begin(&self) -> bool {
        let idle = |gate: &FlushGate| !gate.dirty.load(Ordering::SeqCst) && gate.running.load(Ordering::SeqCst) == 0;
        if idle(self) && !self.dirty.load(Ordering::SeqCst) {
            return false;
        }
        self.running.fetch_add(1, Ordering::SeqCst);
        self.dirty.store(false, Ordering::SeqCst);
        true
    }

    pub(super) fn ended(&self, ok: bool) {
        if !ok {
            self.dirty.store(true, Ordering::SeqCst);
        }
        self.running.fetch_sub(1, Ordering::SeqCst);
    }

    /// What to give to [`FlushGate::is_covered`] for a flush that arrives now.
    pub(super) fn arrival(&self) -> u64 {
        self.started.load(Ordering::SeqCst)
    }

    /// Takes the turn, or queues the waiter and returns false.
    pub(super) fn take_turn(&self, waiter: impl FnOnce() -> Waiter) -> bool {
        self.turn.acquire(0, 1, waiter)
    }

    /// True if a flush that started after `arrival` has succeeded; else the turn's holder now starts one.
    pub(super) fn is_covered(&self, arrival: u64) -> bool {
        let covered = self.succeeded.load(Ordering::SeqCst) > arrival;
        if !covered {
            self.started.fetch_add(1, Ordering::SeqCst);
        }
        covered
    }

    pub(super) fn end_turn(&self, ok: bool) {
        if ok {
            self.succeeded.store(self.started.load(Ordering::SeqCst), Ordering::SeqCst);
        }
        self.turn.release(0);
    }

    /// From now on writes and flushes are refused.
    pub(super) fn fail(&self) {
        self.failed.store(true, Ordering::SeqCst);
    }

    pub(super) fn has_failed(&self) -> bool {
        self.failed.load(Ordering::SeqCst)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_needed_flushes_run() {
        let gate = FlushGate::default();
        assert!(gate.begin());
        assert!(gate.begin(), "one still running is no proof");
        gate.ended(true);
        gate.ended(true);
        assert!(!gate.begin());
        gate.wrote();
        assert!(gate.begin());
        gate.wrote();
        gate.ended(true);
        assert!(gate.begin(), "a write completed while it ran");
        gate.ended(false);
        assert!(gate.begin(), "the last one failed");
    }

    #[test]
    fn a_flush_is_covered_only_by_one_that_started_after_it_arrived() {
        let gate = FlushGate::default();
        let waiter = || Waiter::Thread(std::sync::mpsc::sync_channel(1).0);
        let first = gate.arrival();
        assert!(gate.take_turn(waiter) && !gate.is_covered(first));
        let (second, third) = (gate.arrival(), gate.arrival());
        assert!(!gate.take_turn(waiter) && !gate.take_turn(waiter));
        gate.end_turn(true);
        assert!(!gate.is_covered(second), "the first had started before");
        gate.end_turn(true);
        assert!(gate.is_covered(third), "the second is enough for both");
    }
}
