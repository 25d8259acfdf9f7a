//! Runs of blocks and what each of them is mapped to. A later run hides the parts of earlier ones that it covers.

use std::collections::BTreeMap;
use std::ops::Range;

/// What a run is mapped to.
pub(crate) trait Run: Clone {
    /// The same for the run without its first `blocks` blocks.
    fn skip(&self, blocks: u64) -> Self;
}

#[derive(Clone, Debug)]
struct Mapped<V> {
    end: u64,
    value: V,
}

/// From block numbers to values, kept as disjoint runs.
#[derive(Clone, Debug)]
pub(crate) struct ExtentMap<V> {
    runs: BTreeMap<u64, Mapped<V>>,
}

impl<V> Default for ExtentMap<V> {
    fn default() -> Self {
        ExtentMap { runs: BTreeMap::new() }
    }
}

impl<V: Run> ExtentMap<V> {
    pub(crate) fn insert(&mut self, blocks: Range<u64>, value: V) {
        if blocks.is_empty() {
            return;
        }
        self.remove(blocks.clone());
        self.runs.insert(blocks.start, Mapped { end: blocks.end, value });
    }

    pub(crate) fn remove(&mut self, blocks: Range<u64>) {
        self.split_at(blocks.start);
        self.split_at(blocks.end);
        let inside: Vec<u64> = self.runs.range(blocks).map(|(start, _)| *start).collect();
        for start in inside {
            self.runs.remove(&start);
        }
    }

    /// No run crosses `block` afterwards.
    fn split_at(&mut self, block: u64) {
        let Some((&start, run)) = self.runs.range_mut(..block).next_back() else { return };
        if run.end <= block {
            return;
        }
        let rest = Mapped { end: run.end, value: run.value.skip(block - start) };
        run.end = block;
        self.runs.insert(block, rest);
    }

    /// The mapped parts of a range, in order.
    pub(crate) fn within(&self, blocks: Range<u64>) -> impl Iterator<Item = (Range<u64>, V)> + '_ {
        let before = self.runs.range(..blocks.start).next_back().filter(|(_, run)| run.end > blocks.start);
        before.into_iter().chain(self.runs.range(blocks.clone())).map(move |(&start, run)| {
            let from = start.max(blocks.start);
            (from..run.end.min(blocks.end), run.value.skip(from - start))
        })
    }

    /// Removes the first run.
    pub(crate) fn pop_first(&mut self) -> Option<V> {
        self.runs.pop_first().map(|(_, run)| run.value)
    }

    pub(crate) fn iter(&self) -> impl Iterator<Item = (Range<u64>, &V)> + '_ {
        self.runs.iter().map(|(&start, run)| (start..run.end, &run.value))
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.runs.is_empty()
    }
}

/// What maps that hide one another say of a range.
pub(crate) struct Seen<V> {
    /// Without overlaps, in no order.
    pub(crate) runs: Vec<(Range<u64>, V)>,
    /// What none of them has, in order.
    pub(crate) open: Vec<Range<u64>>,
}

/// Looks for some ranges in maps, the first of which hide the later ones.
pub(crate) fn look_through<'a, V: Run + 'a>(maps: impl Iterator<Item = &'a ExtentMap<V>>, mut open: Vec<Range<u64>>) -> Seen<V> {
    let mut runs = Vec::new();
    for map in maps {
        if open.is_empty() {
            break;
        }
        let mut left = Vec::new();
        for range in open {
            let mut from = range.start;
            for (run, value) in map.within(range.clone()) {
                left.extend((from < run.start).then_some(from..run.start));
                from = run.end;
                runs.push((run, value));
            }
            left.extend((from < range.end).then_some(from..range.end));
        }
        open = left;
    }
    Seen { runs, open }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    impl Run for u64 {
        fn skip(&self, blocks: u64) -> u64 {
            self + blocks
        }
    }

    const BLOCKS: usize = 32;

    proptest! {
        #[test]
        fn behaves_like_an_array(changes in proptest::collection::vec((any::<bool>(), 0..BLOCKS, 0..BLOCKS, 0_u64..1000), 0..40)) {
            let mut map = ExtentMap::default();
            let mut model = [None; BLOCKS];
            for (insert, a, b, value) in changes {
                let (from, to) = (a.min(b), a.max(b));
                for (index, cell) in model[from..to].iter_mut().enumerate() {
                    *cell = insert.then_some(value * 100 + index as u64);
                }
                let blocks = from as u64..to as u64;
                if insert { map.insert(blocks, value * 100) } else { map.remove(blocks) }
                for (from, to) in [(0, BLOCKS), (a.min(7), b.max(7))] {
                    let mut seen = [None; BLOCKS];
                    for (range, value) in map.within(from as u64..to as u64) {
                        for block in range.clone() {
                            seen[block as usize] = Some(value + block - range.start);
                        }
                    }
                    prop_assert_eq!(&seen[from..to], &model[from..to]);
                }
            }
        }
    }
}
