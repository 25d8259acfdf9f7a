//! Reading a tree: what a range of blocks is mapped to, everything that a tree refers to, and how two trees differ.

use std::collections::HashSet;
use std::ops::Range;

use crate::error::VolumeError;
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
struct Node {
    pointer: Pointer,
    /// 0: of a block.
    level: u32,
    /// The first block under it.
    first: u64,
}

impl Node {
    fn blocks(&self) -> Range<u64> {
        self.first..self.first.saturating_add(blocks_under(self.level))
    }

    fn child(&self, pointer: Pointer, index: usize) -> Node {
        let level = self.level - 1;
        Node { pointer, level, first: self.first + index as u64 * blocks_under(level) }
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
    /// `runs_max`. Runs of holes or zeroes are as long as possible, others have one block.
    pub(crate) async fn runs(
        &self,
        pages: &dyn Pages,
        range: Range<u64>,
        runs_max: usize,
    ) -> Result<Vec<(Range<u64>, Pointer)>, VolumeError> {
        let mut runs: Vec<(Range<u64>, Pointer)> = Vec::new();
        let mut waiting = vec![self.top()];
        while let Some(node) = waiting.pop() {
            let blocks = node.blocks();
            let inside = blocks.start.max(range.start)..blocks.end.min(range.end);
            if inside.is_empty() {
                continue;
            }
            if node.level > 0 && node.pointer.location().is_some() {
                let page = pages.page(node.pointer).await?;
                let children = page.pointers().iter().enumerate().map(|(index, pointer)| node.child(*pointer, index));
                let overlaps = |child: &Node| child.first < range.end && child.blocks().end > range.start;
                waiting.extend(children.filter(overlaps).collect::<Vec<_>>().into_iter().rev());
                continue;
            }
            let is_full = runs.len() == runs_max;
            match runs.last_mut() {
                Some((last, pointer)) if *pointer == node.pointer && pointer.location().is_none() => last.end = inside.end,
                _ if is_full => break,
                _ => runs.push((inside, node.pointer)),
            }
        }
        Ok(runs)
    }

    /// Shows every stored pointer, those to pages (`true`) before what is under them. Pages that are in `known` already are passed over; all
    /// others are in it afterwards.
    pub(crate) async fn walk(
        &self,
        pages: &dyn Pages,
        known: &mut HashSet<Pointer>,
        mut show: impl FnMut(Pointer, bool),
    ) -> Result<(), VolumeError> {
        let mut waiting = vec![self.top()];
        while let Some(node) = waiting.pop() {
            if node.pointer.location().is_none() || node.level > 0 && !known.insert(node.pointer) {
                continue;
            }
            show(node.pointer, node.level > 0);
            if node.level > 0 {
                let page = pages.page(node.pointer).await?;
                let stored = page.pointers().iter().enumerate().filter(|(_, pointer)| pointer.location().is_some());
                if node.level == 1 {
                    stored.for_each(|(_, pointer)| show(*pointer, false));
                } else {
                    waiting.extend(stored.map(|(index, pointer)| node.child(*pointer, index)));
                }
            }
        }
        Ok(())
    }

    /// The ranges of blocks for which two trees have different pointers, in order and joined; at most `ranges_max` of them, from `from` on.
    /// Pointers that `same` holds for are not different.
    pub(crate) async fn diff(
        &self,
        other: &Tree,
        pages: &dyn Pages,
        from: u64,
        ranges_max: usize,
        same: impl Fn(Pointer, Pointer) -> bool,
    ) -> Result<Vec<Range<u64>>, VolumeError> {
        let height = self.height.max(other.height);
        let mut ranges: Vec<Range<u64>> = Vec::new();
        let mut waiting = vec![(self.raised(height), other.raised(height))];
        while let Some((left, right)) = waiting.pop() {
            let blocks = left.blocks();
            if left.pointer == right.pointer || blocks.end <= from {
                continue;
            }
            let ends = left.pointer.location().is_none() && right.pointer.location().is_none();
            if left.level > 0 && !ends {
                let (of_left, of_right) = (children(pages, left).await?, children(pages, right).await?);
                waiting.extend(of_left.into_iter().zip(of_right).rev());
            } else if left.level > 0 || !same(left.pointer, right.pointer) {
                let is_full = ranges.len() == ranges_max;
                match ranges.last_mut() {
                    Some(last) if last.end == blocks.start => last.end = blocks.end,
                    _ if is_full => break,
                    _ => ranges.push(blocks.start.max(from)..blocks.end),
                }
            }
        }
        Ok(ranges)
    }

    /// The top of the tree as it would be if the tree were higher: the nodes above it are virtual.
    fn raised(&self, height: u32) -> Raised {
        Raised { pointer: self.root, level: height, first: 0, height: self.height }
    }
}

/// A node of a tree that is compared with a higher one.
#[derive(Clone, Copy)]
struct Raised {
    pointer: Pointer,
    level: u32,
    first: u64,
    /// Of its tree: above it, only the first child is there.
    height: u32,
}

impl Raised {
    fn blocks(&self) -> Range<u64> {
        Node { pointer: self.pointer, level: self.level, first: self.first }.blocks()
    }
}

async fn children(pages: &dyn Pages, node: Raised) -> Result<Vec<Raised>, VolumeError> {
    let page = match node.pointer.location() {
        _ if node.level > node.height && node.first == 0 => {
            let mut page = Page::filled(Pointer::HOLE);
            page.0[0] = node.pointer;
            page
        }
        Some(_) => (*pages.page(node.pointer).await?).clone(),
        None => Page::filled(node.pointer),
    };
    let level = node.level - 1;
    let child = |(index, pointer): (usize, &Pointer)| Raised {
        pointer: *pointer,
        level,
        first: node.first + index as u64 * blocks_under(level),
        height: node.height,
    };
    Ok(page.pointers().iter().enumerate().map(child).collect())
}
