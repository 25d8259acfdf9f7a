//! Which flushes are needed, across all threads of a volume.
//!
//! A flush must cover every write completed before it arrived. If nothing was written since the last successful flush began,
//! there is nothing to do; a flush that is still running counts for nothing, since it may fail.

use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};

pub(super) struct FlushGate {
    dirty: AtomicBool,
    running: AtomicU32,
    failed: AtomicBool,
}

impl Default for FlushGate {
    /// A volume starts dirty: whoever had it before may not have flushed.
    fn default() -> Self {
        FlushGate { dirty: AtomicBool::new(true), running: AtomicU32::new(0), failed: AtomicBool::new(false) }
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

    /// From now on writes and flushes are refused.
    pub(super) fn fail(&self) {
        self.failed.store(true, Ordering::SeqCst);
    }

    pub(super) fn has_failed(&self) -> bool {
        self.failed.load(Ordering::Relaxed)
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
}
