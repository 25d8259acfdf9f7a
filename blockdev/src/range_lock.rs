//! Orders overlapping writes of one volume, on whatever thread, queue or connection they arrive.
//!
//! A range is held from before the driver sees the request until it has completed. A request that overlaps a held range, or one
//! that waits before it, waits in turn; it is granted by a message to the reactor that asked.
//!
//! ```text
//!   wanted, in this order   A ──────────        B      ──────────        C   ────
//!   who came last           AA C C C C BBBBBBBBBB        so B waits for A, and C for A and B
//! ```
//!
//! Whoever comes waits for those who came last on any part of its range, and is the last there from then on: who came earlier on that part is
//! waited for by them. So each range has few others right behind it, however many wait, and a release looks at no others.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::mpsc::{SyncSender, sync_channel};

use parking_lot::Mutex;
use slab::Slab;
use smallvec::SmallVec;

use crate::reactor::{HandlerId, ReactorHandle};

/// The locked and wanted ranges of one volume.
#[derive(Default)]
pub struct RangeLock {
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    ranges: Slab<Wanted>,
    /// By start, those that are held.
    held: BTreeMap<u64, usize>,
    /// By start, the pieces that all ranges cover together: their ends, and who came last there.
    last: BTreeMap<u64, (u64, usize)>,
    #[cfg(test)]
    visits: usize,
}

/// A range that is held or waits.
struct Wanted {
    start: u64,
    end: u64,
    /// Pieces of others that it waits for.
    ahead: usize,
    /// While it waits.
    waiter: Option<Waiter>,
    /// Those who wait for it, once for each piece.
    behind: SmallVec<[usize; 2]>,
    /// It came last on a piece with its own start.
    is_last_at_start: bool,
    /// The starts of other pieces on which it came last.
    last_at: BTreeSet<u64>,
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
        let id = state.add(start, end);
        if state.ranges[id].ahead > 0 {
            state.ranges[id].waiter = Some(waiter());
            return false;
        }
        state.held.insert(start, id);
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
        let granted = self.state.lock().release(start);
        for waiter in granted {
            waiter.tell();
        }
    }
}

impl State {
    /// A range that waits for what came before it.
    fn add(&mut self, start: u64, end: u64) -> usize {
        let id = self.ranges.insert(Wanted {
            start,
            end,
            ahead: 0,
            waiter: None,
            behind: SmallVec::new(),
            is_last_at_start: false,
            last_at: BTreeSet::new(),
        });
        while let Some((piece, piece_end, owner)) = self.last_piece_before(end).filter(|(_, piece_end, _)| *piece_end > start) {
            self.ranges[owner].behind.push(id);
            self.ranges[id].ahead += 1;
            self.remove_piece(piece, owner);
            if piece_end > end {
                self.add_piece(end, piece_end, owner);
            }
            if piece < start {
                self.add_piece(piece, start, owner);
            }
        }
        self.add_piece(start, end, id);
        id
    }

    fn last_piece_before(&self, end: u64) -> Option<(u64, u64, usize)> {
        self.last.range(..end).next_back().map(|(start, (end, owner))| (*start, *end, *owner))
    }

    fn add_piece(&mut self, start: u64, end: u64, owner: usize) {
        self.last.insert(start, (end, owner));
        let range = &mut self.ranges[owner];
        debug_assert!(range.start <= start && end <= range.end);
        match start == range.start {
            true => range.is_last_at_start = true,
            false => drop(range.last_at.insert(start)),
        }
    }

    fn remove_piece(&mut self, start: u64, owner: usize) {
        self.last.remove(&start);
        let range = &mut self.ranges[owner];
        match start == range.start {
            true => range.is_last_at_start = false,
            false => drop(range.last_at.remove(&start)),
        }
    }

    /// Those who are granted their ranges by it, in the order in which they came.
    fn release(&mut self, start: u64) -> SmallVec<[Waiter; 4]> {
        let mut granted = SmallVec::new();
        let Some(id) = self.held.remove(&start) else {
            debug_assert!(false, "released a range that was not held");
            return granted;
        };
        let released = self.ranges.remove(id);
        for piece in released.is_last_at_start.then_some(start).into_iter().chain(released.last_at) {
            self.last.remove(&piece);
        }
        for next in released.behind {
            #[cfg(test)]
            {
                self.visits += 1;
            }
            let range = &mut self.ranges[next];
            range.ahead -= 1;
            if range.ahead == 0 {
                self.held.insert(range.start, next);
                granted.extend(range.waiter.take());
            }
        }
        granted
    }
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

    /// Acquires `count` times what `range` says, the first time without waiting; then releases in turn. The ranges that were looked at.
    fn visits(count: usize, range: impl Fn(usize) -> (u64, u64)) -> usize {
        let lock = RangeLock::default();
        let waiters: Vec<_> = (0..count).map(|index| wants(&lock, range(index).0, range(index).1)).collect();
        let mut left: BTreeSet<usize> = (0..count).collect();
        while let Some(index) = left.iter().copied().find(|index| waiters[*index].0 || told(&waiters[*index].1)) {
            lock.release(range(index).0);
            left.remove(&index);
        }
        assert!(left.is_empty(), "{} were never granted", left.len());
        let state = lock.state.lock();
        assert!(state.ranges.is_empty() && state.held.is_empty() && state.last.is_empty());
        state.visits
    }

    #[test]
    fn a_release_does_not_go_through_those_who_wait() {
        const COUNT: usize = 3000;
        let end = COUNT as u64 + 1;
        // Each may wait for as many pieces as it hid, and for one it splits at either end.
        let most = 3 * COUNT;
        let same = visits(COUNT, |_| (7, 8));
        assert_eq!(same, COUNT - 1);
        let shrinking = visits(COUNT, |index| {
            if index < COUNT / 2 {
                (0, end - index as u64)
            } else {
                (index as u64 - COUNT as u64 / 2, index as u64 - COUNT as u64 / 2 + 1)
            }
        });
        assert!(shrinking <= most, "{shrinking}");
        let mut random = 1u64;
        let ranges: Vec<(u64, u64)> = std::iter::repeat_with(|| {
            random = random.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
            ((random >> 33) % 1000, (random >> 33) % 1000 + 1 + (random >> 45) % 100)
        })
        .take(COUNT)
        .collect();
        let random = visits(COUNT, |index| ranges[index]);
        assert!(random <= most, "{random}");
    }

    #[test]
    fn exactly_those_wait_who_overlap_one_that_came_before() {
        let mut random = 7u64;
        let mut next = |below: u64| {
            random = random.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
            (random >> 33) % below
        };
        for _ in 0..200 {
            let lock = RangeLock::default();
            // In the order in which they came; those that are granted say so.
            let mut model: Vec<(u64, u64, bool, std::sync::mpsc::Receiver<()>)> = Vec::new();
            for _ in 0..200 {
                let held: Vec<usize> = (0..model.len()).filter(|index| model[*index].2).collect();
                if !held.is_empty() && next(2) == 0 {
                    let (start, ..) = model.remove(held[next(held.len() as u64) as usize]);
                    lock.release(start);
                } else {
                    let start = next(40);
                    let end = start + 1 + next(12);
                    let (is_held, receiver) = wants(&lock, start, end);
                    model.push((start, end, is_held, receiver));
                }
                for index in 0..model.len() {
                    let (start, end, ..) = model[index];
                    let is_free = model[..index].iter().all(|(other, other_end, ..)| end <= *other || *other_end <= start);
                    let is_told = told(&model[index].3);
                    let entry = &mut model[index];
                    entry.2 |= is_told;
                    assert_eq!(entry.2, is_free, "{start}..{end}");
                }
            }
        }
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
