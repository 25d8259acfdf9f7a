//! Orders overlapping writes of one volume, on whatever thread, queue or connection they arrive.
//!
//! A range is held from before the driver sees the request until it has completed. A request that overlaps a held range, or one
//! that waits before it, waits in turn; it is granted by a message to the reactor that asked.

use std::collections::{BTreeMap, VecDeque};

use parking_lot::Mutex;

use crate::reactor::{HandlerId, ReactorHandle};

/// The locked and wanted ranges of one volume.
#[derive(Default)]
pub struct RangeLock {
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    held: BTreeMap<u64, u64>,
    waiting: VecDeque<(u64, u64, Waiter)>,
}

/// Whom to tell that a range is granted: `completed(token, 0, 0)` of the handler.
pub struct Waiter {
    pub reactor: ReactorHandle,
    pub handler: HandlerId,
    pub token: u32,
}

impl RangeLock {
    /// Takes `start..end` (not empty) and returns true, or queues the waiter and returns false.
    pub fn acquire(&self, start: u64, end: u64, waiter: impl FnOnce() -> Waiter) -> bool {
        debug_assert!(start < end);
        let mut state = self.state.lock();
        let waits = state.waiting.iter().any(|(other_start, other_end, _)| start < *other_end && *other_start < end);
        if waits || state.overlaps_held(start, end) {
            state.waiting.push_back((start, end, waiter()));
            return false;
        }
        state.held.insert(start, end);
        true
    }

    /// Gives back the range that starts at `start` and grants what waited for it.
    pub fn release(&self, start: u64) {
        let mut granted = Vec::new();
        {
            let mut state = self.state.lock();
            let removed = state.held.remove(&start);
            debug_assert!(removed.is_some(), "released a range that was not held");
            if !state.waiting.is_empty() {
                state.grant(&mut granted);
            }
        }
        for waiter in granted {
            waiter.reactor.post(waiter.handler, waiter.token, 0);
        }
    }
}

impl State {
    fn overlaps_held(&self, start: u64, end: u64) -> bool {
        self.held.range(..end).next_back().is_some_and(|(_, held_end)| *held_end > start)
    }

    fn grant(&mut self, granted: &mut Vec<Waiter>) {
        let mut still = VecDeque::with_capacity(self.waiting.len());
        for (start, end, waiter) in std::mem::take(&mut self.waiting) {
            let behind = still.iter().any(|(other_start, other_end, _)| start < *other_end && *other_start < end);
            if behind || self.overlaps_held(start, end) {
                still.push_back((start, end, waiter));
            } else {
                self.held.insert(start, end);
                granted.push(waiter);
            }
        }
        self.waiting = still;
    }
}
