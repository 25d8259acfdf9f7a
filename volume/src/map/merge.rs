//! A new tree from an old one and what has changed since.
//!
//! ```text
//!   node(page) ─▶ for each child that changes: node(child) ─▶ the children's new pages are stored together ─▶ this page
//! ```

use std::ops::Range;

use crate::environment::LocalFuture;
use crate::error::VolumeError;
use crate::extent_map::ExtentMap;
use crate::map::sight::{Sight, Under};
use crate::map::tree::{Node, blocks_under, height_for};
use crate::map::{FANOUT, Page, PageSink, Pages, Pointer, Tree};
use crate::names::SLOT_BLOCKS;

/// What became of a node.
enum Merged {
    /// It is there already, or there is nothing under it.
    Known(Pointer),
    New(Box<Page>),
}

/// What has changed of a volume whose first block has the number `first` in `runs`.
#[derive(Clone, Copy)]
pub(crate) struct Changes<'a> {
    pub(crate) runs: &'a ExtentMap<Pointer>,
    pub(crate) first: u64,
}

impl<'a> Changes<'a> {
    /// By the volume's own numbers.
    fn within(&self, blocks: Range<u64>) -> impl Iterator<Item = (Range<u64>, Pointer)> + use<'a> {
        let first = self.first;
        let end = blocks.end.min(SLOT_BLOCKS);
        let own = self.runs.within(first + blocks.start.min(end)..first + end);
        own.map(move |(run, pointer)| (run.start - first..run.end - first, pointer))
    }
}

struct Merge<'a> {
    changes: Changes<'a>,
    sight: Sight<'a>,
    sink: &'a dyn PageSink,
}

/// The tree with `changes` made, with room for `blocks` blocks. Nothing is stored at or beyond `blocks`, before or after. Pages that cannot be
/// read, and under which something changes, hide what does not; why they cannot be read is told to `damaged`.
pub(crate) async fn merge(
    tree: Tree,
    blocks: u64,
    changes: Changes<'_>,
    pages: &dyn Pages,
    sink: &dyn PageSink,
    damaged: impl FnMut(VolumeError),
) -> Result<Tree, VolumeError> {
    let merge = Merge { changes, sight: Sight::new(pages), sink };
    let level = height_for(blocks).max(tree.height);
    let pointer = merge.raise(tree, level).await?;
    let merged = merge.node(Node { pointer, level, first: 0 }).await?;
    let root = merge.stored(merged).await?;
    let tree = merge.lower(Tree { root, height: level }, height_for(blocks)).await?;
    merge.sight.into_unreadable().into_values().for_each(damaged);
    Ok(tree)
}

impl Merge<'_> {
    /// What covers `range` alone, if it is one hole or all zeroes now.
    fn covered(&self, range: &Range<u64>) -> Option<Pointer> {
        let (run, pointer) = self.changes.within(range.clone()).next()?;
        (run == *range && pointer.location().is_none()).then_some(pointer)
    }

    fn node(&self, node: Node) -> LocalFuture<'_, Result<Merged, VolumeError>> {
        Box::pin(async move {
            let range = node.blocks();
            if let Some(pointer) = self.covered(&range) {
                return Ok(Merged::Known(pointer));
            }
            let touched = self.touched(&range, node.level);
            if touched.is_empty() {
                return Ok(Merged::Known(node.pointer));
            }
            let mut page = Box::new(self.sight.under(node).await?.into_page());
            self.reveal(&mut page, node).await?;
            if node.level == 1 {
                for (run, pointer) in self.changes.within(range) {
                    let under = &mut page.0[(run.start - node.first) as usize..(run.end - node.first) as usize];
                    if pointer.location().is_some() {
                        self.sink.note_replaced(under);
                    }
                    under.fill(pointer);
                }
            } else {
                self.children(&mut page, node, touched).await?;
            }
            Ok(page.only().map_or_else(|| Merged::New(page), Merged::Known))
        })
    }

    /// Nothing stays hidden that can be seen.
    async fn reveal(&self, page: &mut Page, node: Node) -> Result<(), VolumeError> {
        for index in 0..FANOUT {
            if page.0[index].hiding().is_some() {
                page.0[index] = self.sight.revealed(node.child(page.0[index], index)).await?;
            }
        }
        Ok(())
    }

    /// Replaces the pointers to the children that change.
    async fn children(&self, page: &mut Page, node: Node, touched: Vec<usize>) -> Result<(), VolumeError> {
        let (mut places, mut new) = (Vec::new(), Vec::new());
        for index in touched {
            match self.node(node.child(page.0[index], index)).await? {
                Merged::Known(pointer) => page.0[index] = pointer,
                Merged::New(child) => {
                    places.push(index);
                    new.push(*child);
                }
            }
        }
        if !new.is_empty() {
            let stored = self.sink.write(new).await?;
            places.into_iter().zip(stored).for_each(|(index, pointer)| page.0[index] = pointer);
        }
        Ok(())
    }

    /// The children under which anything changes.
    fn touched(&self, range: &Range<u64>, level: u32) -> Vec<usize> {
        let span = blocks_under(level - 1);
        let mut touched: Vec<usize> = Vec::new();
        for (run, _) in self.changes.within(range.clone()) {
            let (from, to) = ((run.start - range.start) / span, (run.end - 1 - range.start) / span);
            let next = touched.last().map_or(0, |last| last + 1).max(from as usize);
            touched.extend(next..=to as usize);
        }
        touched
    }

    /// Puts pages above the root until the tree is so high.
    async fn raise(&self, tree: Tree, height: u32) -> Result<Pointer, VolumeError> {
        let mut root = tree.root;
        for _ in tree.height..height {
            let mut page = Page::filled(Pointer::HOLE);
            page.0[0] = root;
            root = self.stored(page.only().map_or_else(|| Merged::New(Box::new(page)), Merged::Known)).await?;
        }
        Ok(root)
    }

    /// Takes pages above the root away until the tree is so low.
    async fn lower(&self, mut tree: Tree, height: u32) -> Result<Tree, VolumeError> {
        while tree.height > height {
            let root = Node { pointer: tree.root, level: tree.height, first: 0 };
            tree.root = match self.sight.under(root).await? {
                Under::Page(page) => page.pointers()[0],
                Under::Nothing(pointer) | Under::Hidden(pointer) => pointer,
            };
            tree.height -= 1;
        }
        Ok(tree)
    }

    async fn stored(&self, merged: Merged) -> Result<Pointer, VolumeError> {
        match merged {
            Merged::Known(pointer) => Ok(pointer),
            Merged::New(page) => Ok(self.sink.write(vec![*page]).await?[0]),
        }
    }
}

const _: () = assert!(FANOUT.is_power_of_two());

#[cfg(test)]
mod tests {
    use super::*;
    use std::cell::RefCell;
    use std::collections::{BTreeMap, HashSet};
    use std::rc::Rc;

    use dedup::location::{Location, SegmentHandle};
    use proptest::prelude::*;

    use crate::map::{spot_of, walk};

    /// Pages in memory.
    #[derive(Default)]
    struct Memory {
        pages: RefCell<BTreeMap<Pointer, Rc<Page>>>,
    }

    fn pointer(handle: u32, spot: u32) -> Pointer {
        Pointer::to(Location { segment: SegmentHandle::new(handle).unwrap(), spot: spot_of(spot) })
    }

    impl Pages for Memory {
        fn page(&self, pointer: Pointer) -> LocalFuture<'_, Result<Rc<Page>, VolumeError>> {
            Box::pin(async move { Ok(self.pages.borrow()[&pointer].clone()) })
        }
    }

    impl PageSink for Memory {
        fn write(&self, pages: Vec<Page>) -> LocalFuture<'_, Result<Vec<Pointer>, VolumeError>> {
            let mut stored = self.pages.borrow_mut();
            let pointers = pages.into_iter().map(|page| {
                assert!(page.only().is_none(), "a page of nothing is kept");
                let pointer = pointer(1, stored.len() as u32);
                stored.insert(pointer, Rc::new(page));
                pointer
            });
            let pointers = pointers.collect();
            Box::pin(async move { Ok(pointers) })
        }
    }

    fn all(runs: &ExtentMap<Pointer>) -> Changes<'_> {
        Changes { runs, first: 0 }
    }

    fn done<T>(future: impl Future<Output = Result<T, VolumeError>>) -> T {
        backends::segments::drive::block_on(future).unwrap()
    }

    #[derive(Clone, Copy, Debug)]
    enum Kind {
        Hole,
        Zero,
        Data,
    }

    /// A block of a volume of 3 × 512 × 512 blocks, mostly near the edges of pages.
    fn place() -> impl Strategy<Value = u64> {
        (0_u64..3, 0_u64..4, 0_u64..8).prop_map(|(high, middle, low)| {
            let near = |edge: u64, place: u64| if place < 4 { edge + place } else { (edge + 508 + place - 4).min(edge + 511) };
            high * 512 * 512 + near(0, middle % 4) * 512 + near(0, low)
        })
    }

    fn change() -> impl Strategy<Value = (Kind, u64, u64)> {
        let kind = prop_oneof![Just(Kind::Hole), Just(Kind::Zero), Just(Kind::Data)];
        let len = prop_oneof![1_u64..20, Just(512), Just(1024), Just(512 * 512), Just(512 * 512 * 2)];
        (kind, place(), len)
    }

    const BLOCKS: u64 = 3 * 512 * 512;

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]
        #[test]
        fn trees_behave_like_maps_of_extents(layers in proptest::collection::vec(proptest::collection::vec(change(), 1..12), 1..5)) {
            let memory = Memory::default();
            let mut model = ExtentMap::default();
            model.insert(0..BLOCKS, Pointer::HOLE);
            let mut tree = Tree::empty(BLOCKS);
            let mut versions = vec![(tree, model.clone())];
            let mut number = 0;
            for layer in layers {
                let mut changes = ExtentMap::default();
                for (kind, start, len) in layer {
                    let range = start..(start + len).min(BLOCKS);
                    match kind {
                        Kind::Hole => changes.insert(range, Pointer::HOLE),
                        Kind::Zero => changes.insert(range, Pointer::ZERO),
                        Kind::Data => for block in range.start..range.end.min(range.start + 600) {
                            number += 1;
                            changes.insert(block..block + 1, pointer(2, number));
                        }
                    }
                }
                changes.iter().for_each(|(range, pointer)| model.insert(range, *pointer));
                tree = done(merge(tree, BLOCKS, all(&changes), &memory, &memory, |_| ()));
                versions.push((tree, model.clone()));
            }
            for (tree, model) in &versions {
                prop_assert_eq!(by_run(done(tree.runs(&memory, 0..BLOCKS, usize::MAX))), by_run(model.within(0..BLOCKS).collect()));
                let mut seen = HashSet::new();
                done(walk(&[*tree], &memory, |pointer, is_page| if !is_page { seen.insert(pointer); }));
                let stored = model.iter().filter(|(_, pointer)| pointer.location().is_some()).map(|(_, pointer)| *pointer);
                prop_assert_eq!(seen, stored.collect::<HashSet<_>>());
            }
            let (mut seen, mut pages, mut again, mut blocks) = (HashSet::new(), HashSet::new(), Vec::new(), 0);
            let trees: Vec<Tree> = versions.iter().map(|(tree, _)| *tree).collect();
            done(walk(&trees, &memory, |pointer, is_page| match is_page {
                true if pages.insert(pointer) => (),
                true => again.push(pointer),
                false => {
                    seen.insert(pointer);
                    blocks += 1;
                }
            }));
            let stored = versions.iter().flat_map(|(_, model)| model.iter()).filter(|(_, pointer)| pointer.location().is_some());
            prop_assert_eq!(&seen, &stored.map(|(_, pointer)| *pointer).collect::<HashSet<_>>());
            prop_assert_eq!(again, []);
            prop_assert_eq!(blocks, seen.len(), "what the version before had is shown again");
            for (before, after) in versions.iter().zip(&versions[1..]) {
                let found = done(before.0.diff(&after.0, &memory, 0, usize::MAX));
                prop_assert_eq!(found, differences(&before.1, &after.1));
            }
        }

        #[test]
        fn trees_grow_and_shrink(block in 0_u64..600, small in 600_u64..2000, large in 262_144_u64..300_000_000) {
            let memory = Memory::default();
            let mut changes = ExtentMap::default();
            changes.insert(block..block + 1, pointer(2, 5));
            let tree = done(merge(Tree::empty(small), small, all(&changes), &memory, &memory, |_| ()));
            let none = ExtentMap::default();
            let grown = done(merge(tree, large, all(&none), &memory, &memory, |_| ()));
            prop_assert_eq!(grown.height, height_for(large));
            prop_assert_eq!(done(grown.runs(&memory, block..block + 1, 9)), [(block..block + 1, pointer(2, 5))]);
            prop_assert!(done(tree.diff(&grown, &memory, 0, 9)).is_empty());
            let shrunk = done(merge(grown, small, all(&none), &memory, &memory, |_| ()));
            prop_assert_eq!(shrunk, tree);
        }
    }

    /// Runs that touch and are the same nothing are one.
    fn by_run(runs: Vec<(Range<u64>, Pointer)>) -> Vec<(Range<u64>, Pointer)> {
        let mut joined: Vec<(Range<u64>, Pointer)> = Vec::new();
        for (range, pointer) in runs {
            match joined.last_mut() {
                Some((last, same)) if *same == pointer && pointer.location().is_none() => last.end = range.end,
                _ => joined.push((range, pointer)),
            }
        }
        joined
    }

    fn differences(before: &ExtentMap<Pointer>, after: &ExtentMap<Pointer>) -> Vec<Range<u64>> {
        let edges = before.iter().chain(after.iter()).flat_map(|(range, _)| [range.start, range.end]);
        let mut edges: Vec<u64> = edges.collect();
        edges.sort_unstable();
        edges.dedup();
        let mut ranges: Vec<Range<u64>> = Vec::new();
        for edge in edges.windows(2) {
            let at = |map: &ExtentMap<Pointer>| map.within(edge[0]..edge[0] + 1).next().map(|(_, pointer)| pointer);
            if at(before) == at(after) {
                continue;
            }
            match ranges.last_mut() {
                Some(last) if last.end == edge[0] => last.end = edge[1],
                _ => ranges.push(edge[0]..edge[1]),
            }
        }
        ranges
    }

    #[test]
    fn a_trim_of_four_tebibytes_touches_a_few_pages() {
        let memory = Memory::default();
        let blocks = (4_u64 << 40) / 4096;
        let mut changes = ExtentMap::default();
        (0..64).for_each(|number| changes.insert(number * (1 << 24)..number * (1 << 24) + 1, pointer(2, number as u32)));
        let tree = done(merge(Tree::empty(blocks), blocks, all(&changes), &memory, &memory, |_| ()));
        let before = memory.pages.borrow().len();
        let mut trim = ExtentMap::default();
        trim.insert(1..blocks - 1, Pointer::HOLE);
        let trimmed = done(merge(tree, blocks, all(&trim), &memory, &memory, |_| ()));
        assert_eq!(memory.pages.borrow().len() - before, 4);
        assert_eq!(done(trimmed.runs(&memory, 0..blocks, 9)), [(0..1, pointer(2, 0)), (1..blocks, Pointer::HOLE)]);
    }
}
