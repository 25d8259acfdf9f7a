//! Reading a tree: what a range of blocks is mapped to, everything that a tree refers to, and how two trees differ.

use std::collections::{BTreeMap, HashSet};
use std::ops::Range;
use std::rc::Rc;

use crate::error::VolumeError;
use crate::map::sight::{Sight, Under};
use crate::map::{FANOUT, Page, Pages, Pointer};

/// One version of a map.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Tree {
    pub(crate) root: Pointer,
    /// Pages from the root to a block: 1 for a single leaf.
    pub(crate) height: u32,
}

/// A pointer of a tree on the way through it.
#[derive(Clone, Copy, Debug)]
pub(super) struct Node {
    pub(super) pointer: Pointer,
    /// 0: of a block.
    pub(super) level: u32,
    /// The first block under it.
    pub(super) first: u64,
}

impl Node {
    pub(super) fn blocks(&self) -> Range<u64> {
        self.first..self.first.saturating_add(blocks_under(self.level))
    }

    pub(super) fn child(&self, pointer: Pointer, index: usize) -> Node {
        let level = self.level - 1;
        Node { pointer, level, first: self.first + index as u64 * blocks_under(level) }
    }

    /// The page that hides this node, as a node.
    fn hiding(&self) -> Option<Node> {
        let (pointer, above) = self.pointer.hiding()?;
        let level = self.level + 1 + above;
        Some(Node { pointer, level, first: self.first - self.first % blocks_under(level) })
    }
}

/// Blocks that one pointer of a level covers.
pub(super) fn blocks_under(level: u32) -> u64 {
    (FANOUT as u64).saturating_pow(level)
}

/// The height of a tree that has room for so many blocks.
pub(crate) fn height_for(blocks: u64) -> u32 {
    (1..).find(|height| blocks_under(*height) >= blocks).unwrap_or(1)
}

impl Tree {
    /// Nothing is mapped, and there is room for so many blocks.
    pub(crate) fn empty(blocks: u64) -> Tree {
        Tree { root: Pointer::HOLE, height: height_for(blocks) }
    }

    fn top(&self) -> Node {
        Node { pointer: self.root, level: self.height, first: 0 }
    }

    /// What the blocks of a range are mapped to: runs in order and without gaps, of the whole range, or of its beginning if there are more than
    /// `runs_max`. Runs of holes, of zeroes and of what is hidden by a page that cannot be read are as long as possible, others have one block.
    pub(crate) async fn runs(
        &self,
        pages: &dyn Pages,
        range: Range<u64>,
        runs_max: usize,
    ) -> Result<Vec<(Range<u64>, Pointer)>, VolumeError> {
        let mut runs: Vec<(Range<u64>, Pointer)> = Vec::new();
        let sight = Sight::new(pages);
        let mut waiting = vec![self.top()];
        while let Some(node) = waiting.pop() {
            let blocks = node.blocks();
            let inside = blocks.start.max(range.start)..blocks.end.min(range.end);
            if inside.is_empty() {
                continue;
            }
            let under = if node.level > 0 { sight.under(node).await? } else { Under::Nothing(sight.revealed(node).await?) };
            let found = match under {
                Under::Page(page) => {
                    let children = page.pointers().iter().enumerate().map(|(index, pointer)| node.child(*pointer, index));
                    let overlaps = |child: &Node| child.first < range.end && child.blocks().end > range.start;
                    waiting.extend(children.filter(overlaps).collect::<Vec<_>>().into_iter().rev());
                    continue;
                }
                Under::Nothing(pointer) | Under::Hidden(pointer) => pointer,
            };
            let is_full = runs.len() == runs_max;
            match runs.last_mut() {
                Some((last, pointer)) if *pointer == found && pointer.location().is_none() => last.end = inside.end,
                _ if is_full => break,
                _ => runs.push((inside, found)),
            }
        }
        Ok(runs)
    }

    /// The ranges of blocks for which two trees have different pointers, in order and joined; at most `ranges_max` of them, from `from` on.
    pub(crate) async fn diff(
        &self,
        other: &Tree,
        pages: &dyn Pages,
        from: u64,
        ranges_max: usize,
    ) -> Result<Vec<Range<u64>>, VolumeError> {
        let height = self.height.max(other.height);
        let sight = Sight::new(pages);
        let mut ranges: Vec<Range<u64>> = Vec::new();
        let mut waiting = vec![(self.raised(height), other.raised(height))];
        while let Some((left, right)) = waiting.pop() {
            let blocks = left.node.blocks();
            if left.node.pointer == right.node.pointer || blocks.end <= from {
                continue;
            }
            let is_same = if left.node.level == 0 {
                sight.revealed(left.node).await? == sight.revealed(right.node).await?
            } else {
                match (left.under(&sight).await?, right.under(&sight).await?) {
                    (Under::Nothing(one) | Under::Hidden(one), Under::Nothing(other) | Under::Hidden(other)) => one == other,
                    (of_left, of_right) => {
                        let (of_left, of_right) = (of_left.into_page(), of_right.into_page());
                        waiting
                            .extend((0..FANOUT).rev().map(|index| (left.child(&of_left, index), right.child(&of_right, index))));
                        continue;
                    }
                }
            };
            if is_same {
                continue;
            }
            let is_full = ranges.len() == ranges_max;
            match ranges.last_mut() {
                Some(last) if last.end == blocks.start => last.end = blocks.end,
                _ if is_full => break,
                _ => ranges.push(blocks.start.max(from)..blocks.end),
            }
        }
        Ok(ranges)
    }

    /// The top of the tree as it would be if the tree were higher: the nodes above it are virtual.
    fn raised(&self, height: u32) -> Raised {
        Raised { node: Node { pointer: self.root, level: height, first: 0 }, height: self.height }
    }
}

/// Versions of a page that are read together.
const EXPECTED: usize = 64;

/// What stands at one place in several versions of a map, in the order of the versions.
struct Place {
    level: u32,
    first: u64,
    pointers: Vec<Pointer>,
}

/// Shows every stored pointer of some versions of a map, those to pages (`true`) before what is under them. A page is read once for all versions that
/// share it one after the other, and of what stands in it only that is shown which differs from the version before: little, if the versions are in the
/// order in which they came to be. A page that hides others counts as a whole. The answer is which pages could not be read, and why: nobody knows what
/// is under those.
pub(crate) async fn walk(
    versions: &[Tree],
    pages: &dyn Pages,
    mut show: impl FnMut(Pointer, bool),
) -> Result<BTreeMap<Pointer, VolumeError>, VolumeError> {
    let sight = Sight::new(pages);
    let mut roots: BTreeMap<u32, Vec<Pointer>> = BTreeMap::new();
    versions.iter().for_each(|tree| roots.entry(tree.height).or_default().push(tree.root));
    let (mut waiting, mut hiding) = (Vec::new(), HashSet::new());
    while let Some(place) = waiting.pop().or_else(|| top(&mut roots)) {
        let Place { level, first, mut pointers } = place;
        pointers.retain(|pointer| !pointer.is_nothing());
        pointers.dedup();
        let mut under: Vec<Vec<Pointer>> = vec![Vec::new(); if level > 1 { FANOUT } else { 0 }];
        if let (0, Some(lower)) = (first, under.first_mut()) {
            lower.extend(roots.remove(&(level - 1)).unwrap_or_default());
        }
        let mut before = Rc::new(Page::filled(Pointer::HOLE));
        for next in pointers.chunks(EXPECTED) {
            pages.expect(next).await;
            for pointer in next.iter().copied() {
                let node = Node { pointer, level, first };
                if let Some(Node { pointer, level, first }) = node.hiding() {
                    if hiding.insert(pointer) {
                        waiting.push(Place { level, first, pointers: vec![pointer] });
                    }
                    continue;
                }
                show(pointer, true);
                let Under::Page(page) = sight.under(node).await? else { continue };
                for (index, pointer) in page.differing_from(&before) {
                    match under.get_mut(index) {
                        Some(under) => under.push(pointer),
                        None if pointer.hiding().is_some() => {
                            waiting.push(Place { level: 0, first: first + index as u64, pointers: vec![pointer] });
                        }
                        None => show(pointer, false),
                    }
                }
                before = page;
            }
        }
        let under = under.into_iter().enumerate().rev().filter(|(_, pointers)| !pointers.is_empty());
        waiting.extend(under.map(|(index, pointers)| Place {
            level: level - 1,
            first: first + index as u64 * blocks_under(level - 1),
            pointers,
        }));
    }
    Ok(sight.into_unreadable())
}

/// The place of the highest of the roots.
fn top(roots: &mut BTreeMap<u32, Vec<Pointer>>) -> Option<Place> {
    roots.pop_last().map(|(level, pointers)| Place { level, first: 0, pointers })
}

/// A node of a tree that is compared with a higher one.
#[derive(Clone, Copy)]
struct Raised {
    node: Node,
    /// Of its tree: above it, only the first child is there.
    height: u32,
}

impl Raised {
    fn is_virtual(&self) -> bool {
        self.node.level > self.height && self.node.first == 0
    }

    async fn under(&self, sight: &Sight<'_>) -> Result<Under, VolumeError> {
        if !self.is_virtual() {
            return sight.under(self.node).await;
        }
        let mut page = Page::filled(Pointer::HOLE);
        page.0[0] = self.node.pointer;
        Ok(Under::Page(Rc::new(page)))
    }

    fn child(&self, page: &Page, index: usize) -> Raised {
        Raised { node: self.node.child(page.pointers()[index], index), height: self.height }
    }
}
