//! Orders overlapping writes of one volume, on whatever thread, queue or connection they arrive.
//!
//! A range is held from before the driver sees the request until it has completed. A request that overlaps a held range, or one
//! that waits before it, waits in turn; it is granted by a message to the reactor that asked.

use std::collections::{BTreeMap, VecDeque};
use std::sync::mpsc::{SyncSender, sync_channel};

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

/// Whom to tell that a range is granted.
pub enum Waiter {
    /// `completed(token, 0, 0)` of a handler.
    Handler { reactor: ReactorHandle, handler: HandlerId, token: u32 },
    /// A control-plane thread that waits for a message.
    Thread(SyncSender<()>),
}

impl Waiter {
    fn tell(self) {
        match self {
            Waiter::Handler { reactor, handler, token } => reactor.post(handler, token, 0),
            Waiter::Thread(sender) => {
                let _ = sender.send(());
            }
        }
    }
}

impl RangeLock {
    /// Takes `start..end` (not empty) and returns true, or queues the waiter and returns false.
    pub fn acquire(&self, start: u64, end: u64, waiter: impl FnOnce() -> Waiter) -> bool {
        debug_assert!(start < end);
        let mut state = self.state.lock();
        if state.overlaps_held(start, end) || overlaps_any(&state.waiting, start, end) {
            state.waiting.push_back((start, end, waiter()));
            return false;
        }
        state.held.insert(start, end);
        true
    }

    /// Takes the range, waiting for it on this thread: control plane only.
    pub fn acquire_blocking(&self, start: u64, end: u64) {
        let (sender, granted) = sync_channel(1);
        if !self.acquire(start, end, || Waiter::Thread(sender)) {
            let told = granted.recv();
            debug_assert!(told.is_ok(), "the lock tells every waiter before it forgets it");
        }
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
            waiter.tell();
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
            if self.overlaps_held(start, end) || overlaps_any(&still, start, end) {
                still.push_back((start, end, waiter));
            } else {
                self.held.insert(start, end);
                granted.push(waiter);
            }
        }
        self.waiting = still;
    }
}

/// Linear in those who wait; asked last, so that the many who wait for one large range are not gone through.
fn overlaps_any(waiting: &VecDeque<(u64, u64, Waiter)>, start: u64, end: u64) -> bool {
    waiting.iter().any(|(other_start, other_end, _)| start < *other_end && *other_start < end)
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicU8, Ordering};

    use super::*;

    fn told(receiver: &std::sync::mpsc::Receiver<()>) -> bool {
        receiver.try_recv().is_ok()
    }

    fn wants(lock: &RangeLock, start: u64, end: u64) -> (bool, std::sync::mpsc::Receiver<()>) {
        let (sender, receiver) = sync_channel(1);
        (lock.acquire(start, end, || Waiter::Thread(sender)), receiver)
    }

    #[test]
    fn overlaps_wait_in_order_and_others_do_not() {
        let lock = RangeLock::default();
        assert!(wants(&lock, 0, 10).0);
        assert!(wants(&lock, 10, 20).0);
        let (held, second) = wants(&lock, 5, 15);
        assert!(!held);
        let (held, third) = wants(&lock, 14, 30);
        assert!(!held, "it waits behind the second");
        assert!(wants(&lock, 30, 31).0);
        lock.release(0);
        assert!(!told(&second));
        lock.release(10);
        assert!(told(&second) && !told(&third));
        lock.release(5);
        assert!(told(&third));
        lock.release(14);
        assert!(wants(&lock, 0, 30).0);
    }

    #[test]
    fn no_two_threads_hold_overlapping_ranges() {
        let lock = RangeLock::default();
        let cells: Vec<AtomicU8> = (0..64).map(|_| AtomicU8::new(0)).collect();
        std::thread::scope(|scope| {
            for seed in 1..5u64 {
                let (lock, cells) = (&lock, &cells);
                scope.spawn(move || {
                    let mut random = seed * 7919;
                    for _ in 0..5000 {
                        random = random.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
                        let start = (random >> 33) % 60;
                        let end = start + 1 + (random >> 50) % 4;
                        lock.acquire_blocking(start, end);
                        for cell in &cells[start as usize..end as usize] {
                            assert_eq!(cell.fetch_add(1, Ordering::SeqCst), 0);
                        }
                        for cell in &cells[start as usize..end as usize] {
                            cell.fetch_sub(1, Ordering::SeqCst);
                        }
                        lock.release(start);
                    }
                });
            }
        });
    }
}
