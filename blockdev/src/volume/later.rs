//! Discards that were answered and are still being carried out.
//!
//! A discard says that content no longer matters, so a long one may be answered before all its space is freed. What is left is
//! kept here; a write into it takes its range out again, under the range lock, and so is never discarded after the fact. The set
//! is in memory only: losing it loses space until the next trim, never data.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, Ordering};

use parking_lot::Mutex;

#[derive(Default)]
pub(super) struct LaterDiscards {
    any: AtomicBool,
    ranges: Mutex<BTreeMap<u64, u64>>,
}

impl LaterDiscards {
    /// `start..end` is still to be discarded.
    pub(super) fn add(&self, start: u64, end: u64) {
        let mut ranges = self.ranges.lock();
        remove(&mut ranges, start, end);
        ranges.insert(start, end);
        self.any.store(true, Ordering::SeqCst);
    }

    /// `start..end` has new content, or is given up. Costs one load where nothing is pending.
    pub(super) fn keep(&self, start: u64, end: u64) {
        if self.any.load(Ordering::SeqCst) {
            let mut ranges = self.ranges.lock();
            remove(&mut ranges, start, end);
            self.any.store(!ranges.is_empty(), Ordering::SeqCst);
        }
    }

    /// Where the first part of `start..end` that is still to be discarded begins.
    pub(super) fn first_start(&self, start: u64, end: u64) -> Option<u64> {
        first(&self.ranges.lock(), start, end).map(|(start, _)| start)
    }

    /// Takes out the first part of `start..end` that is still to be discarded.
    pub(super) fn take_first(&self, start: u64, end: u64) -> Option<(u64, u64)> {
        let mut ranges = self.ranges.lock();
        let part = first(&ranges, start, end)?;
        remove(&mut ranges, part.0, part.1);
        self.any.store(!ranges.is_empty(), Ordering::SeqCst);
        Some(part)
    }
}

fn first(ranges: &BTreeMap<u64, u64>, start: u64, end: u64) -> Option<(u64, u64)> {
    let before = ranges.range(..=start).next_back().filter(|(_, range_end)| **range_end > start);
    let (range_start, range_end) = before.or_else(|| ranges.range(start..end).next())?;
    Some(((*range_start).max(start), (*range_end).min(end)))
}

fn remove(ranges: &mut BTreeMap<u64, u64>, start: u64, end: u64) {
    while let Some((range_start, range_end)) = ranges.range(..end).next_back().map(|(start, end)| (*start, *end)) {
        if range_end <= start {
            return;
        }
        ranges.remove(&range_start);
        if range_end > end {
            ranges.insert(end, range_end);
        }
        if range_start < start {
            ranges.insert(range_start, start);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn behaves_like_a_set_of_blocks() {
        let later = LaterDiscards::default();
        let mut model = [false; 64];
        let mut random = 12345u64;
        for _ in 0..20_000 {
            random = random.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
            let start = (random >> 33) % 60;
            let end = start + 1 + (random >> 45) % 4;
            let range = start as usize..end as usize;
            match (random >> 60) % 3 {
                0 => {
                    later.add(start, end);
                    model[range].fill(true);
                }
                1 => {
                    later.keep(start, end);
                    model[range].fill(false);
                }
                _ => {
                    let first = later.take_first(start, end);
                    let expected_start = range.clone().find(|at| model[*at]);
                    assert_eq!(first.map(|(from, _)| from as usize), expected_start);
                    if let Some((from, to)) = first {
                        assert!(from < to && to <= end);
                        assert!(model[from as usize..to as usize].iter().all(|pending| *pending));
                        model[from as usize..to as usize].fill(false);
                    }
                }
            }
            assert_eq!(later.any.load(Ordering::SeqCst), model.contains(&true));
        }
    }
}
