//! Reading everything that a volume and its snapshots hold, to find what has rotted.
//!
//! ```text
//!   the header of every object        the volume: every run of its tree        a snapshot: the ranges in which it differs from the volume
//! ```
//!
//! Each frame that is read is checked by its seal, and each block by its hash: memory may have changed it between the two. What is not what was
//! written cannot be read any more, until the volume is opened again, and is no duplicate of anything. Nothing is changed in the pool.

use std::collections::HashMap;
use std::ops::Range;
use std::slice::from_ref;

use dedup::hash::BlockHash;
use dedup::location::Location;

use crate::core::Core;
use crate::environment::offload;
use crate::error::VolumeError;
use crate::findings::{Findings, Look, look_until_whole};
use crate::map::{Pointer, Tree, spot_bits};
use crate::meta::Snapshot;
use crate::names::Slot;
use crate::progress::Progress;
use crate::segment::BLOCK;
use crate::signal::give_way;

/// Blocks looked at in one go: so many that of each object some are among them. Its header is read for them, and may be longer than they are.
const SPAN_BLOCKS: u64 = 262_144;
/// Blocks whose runs are looked up in one go, and runs followed in one go: more would keep requests waiting.
const FOLLOWED_BLOCKS: u64 = 16_384;
const RESOLVED_BLOCKS: usize = 1024;
/// Blocks read in one go.
const READ_BLOCKS: usize = 256;
/// Blocks hashed in one go, for the same reason.
const HASHED_BLOCKS: usize = 32;
const RANGES_MAX: usize = 65_536;

impl Core {
    /// What cannot be read of what is in the pool, or never stood still to be compared, one sentence each, by address.
    pub(crate) async fn scrub(&self, slot: Slot, progress: &Progress) -> Result<Vec<String>, VolumeError> {
        self.publish_all().await.map_err(|_| self.failure().unwrap_or(VolumeError::Fenced))?;
        self.checkpoint().await?;
        progress.check_wanted()?;
        let held = self.held(slot).ok_or(VolumeError::NoVolume)?;
        let mut findings = Findings::default();
        self.scrub_headers(&mut findings).await?;
        progress.begin(held.size);
        let head = || self.held(slot).map(|held| held.tree);
        let everything = 0..held.blocks();
        self.scrub_ranges(("the volume", &head), from_ref(&everything), &mut findings, progress).await?;
        for Snapshot { name, size, .. } in self.committed_snapshots(|of| of == slot) {
            let name = (slot, name);
            let tree = || self.snapshot_now(&name).ok().map(|snapshot| snapshot.tree);
            let what = format!("snapshot {}", name.1);
            let blocks = size / BLOCK as u64;
            let mut from = 0;
            while from < blocks {
                let looking = self.reader.looking();
                let checkpoint = self.keeper.root().checkpoint;
                let (Some(head), Some(tree_now)) = (head(), tree()) else { break };
                let ranges = match head.diff(&tree_now, &self.reader, from, RANGES_MAX).await {
                    Err(VolumeError::Moved) if checkpoint != self.keeper.root().checkpoint => continue,
                    ranges => ranges?,
                };
                drop(looking);
                from = if ranges.len() < RANGES_MAX { blocks } else { ranges.last().map_or(blocks, |range| range.end) };
                let ranges: Vec<Range<u64>> = ranges.into_iter().map(|range| range.start..range.end.min(blocks)).collect();
                progress.expect(ranges.iter().map(|range| (range.end - range.start) * BLOCK as u64).sum());
                self.scrub_ranges((&what, &tree), &ranges, &mut findings, progress).await?;
            }
        }
        Ok(findings.told())
    }

    /// Reads what objects say of what is in them: garbage collection needs it, and reading what it has moved.
    async fn scrub_headers(&self, findings: &mut Findings) -> Result<(), VolumeError> {
        // No handle comes to stand for an object that is only being written.
        let _looking = self.reader.looking();
        let handles: Vec<u32> = self.reader.table.borrow().live().collect();
        for handle in handles {
            match self.reader.step_of(handle).await {
                Ok(_) | Err(VolumeError::Moved) => {}
                Err(VolumeError::ObjectDamaged { .. }) if !self.reader.table.borrow().is_live(handle) => {}
                Err(VolumeError::ObjectDamaged { object, why }) => findings.tell(|| format!("{object} is damaged: {why}")),
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }

    /// `what` it is, and its tree as long as it is there.
    async fn scrub_ranges(
        &self,
        (what, tree): (&str, &dyn Fn() -> Option<Tree>),
        ranges: &[Range<u64>],
        findings: &mut Findings,
        progress: &Progress,
    ) -> Result<(), VolumeError> {
        for span in spans(ranges) {
            progress.advance(span.iter().map(|range| (range.end - range.start) * BLOCK as u64).sum());
            let mut looks = 0;
            let look = async |ranges: &[Range<u64>]| {
                if looks > 0 {
                    self.chain.rest().await;
                }
                looks += 1;
                let checkpoint = self.keeper.root().checkpoint;
                let seen = self.scrub_span(tree, ranges).await?;
                Ok(Look { is_outdated: checkpoint != self.keeper.root().checkpoint, ..seen })
            };
            findings.tell_all(what, look_until_whole(span, look).await?);
            progress.check_wanted()?;
        }
        Ok(())
    }

    async fn scrub_span(&self, tree: &dyn Fn() -> Option<Tree>, span: &[Range<u64>]) -> Result<Look, VolumeError> {
        let _looking = self.reader.looking();
        let mut look = Look::default();
        let Some(tree) = tree() else { return Ok(look) };
        let mut stored: Vec<(Pointer, Range<u64>)> = Vec::new();
        let mut followed = 0;
        for part in span.iter().flat_map(|range| parts(range.clone(), FOLLOWED_BLOCKS)) {
            let runs = match tree.runs(&self.reader, part.clone(), usize::MAX).await {
                Ok(runs) => runs,
                Err(error) => {
                    look.note(&part, error)?;
                    continue;
                }
            };
            for (blocks, pointer) in runs.into_iter().filter(|(_, pointer)| !pointer.is_nothing()) {
                match self.whereabouts(pointer).await {
                    Ok(pointer) => stored.push((pointer, blocks)),
                    Err(error) => look.note(&blocks, error)?,
                }
                followed += 1;
                if followed % RESOLVED_BLOCKS == 0 {
                    give_way().await;
                }
            }
        }
        let in_order = move || {
            stored.sort_unstable_by_key(|(pointer, _)| pointer.bits());
            stored
        };
        let stored = offload(&*self.chain.environment, in_order).await.ok_or(VolumeError::Panicked)?;
        for of_object in stored.chunk_by(|(before, _), (next, _)| handle_of(before) == handle_of(next)) {
            let hashes = self.hashes_for(&of_object[0].0).await?;
            for part in of_object.chunks(READ_BLOCKS) {
                self.scrub_blocks(part, &hashes, &mut look).await?;
            }
        }
        Ok(look)
    }

    /// The block itself, if it was moved.
    async fn whereabouts(&self, pointer: Pointer) -> Result<Pointer, VolumeError> {
        match pointer.location() {
            Some(location) => Ok(Pointer::to(self.reader.resolve(location).await?)),
            None => Ok(pointer),
        }
    }

    /// Of the blocks of the object that a pointer leads to. Of one whose header cannot be read there are none, which is told of elsewhere.
    async fn hashes_for(&self, pointer: &Pointer) -> Result<HashMap<u32, BlockHash>, VolumeError> {
        let Some(handle) = handle_of(pointer) else { return Ok(HashMap::new()) };
        match self.reader.hashes_of(handle).await {
            Err(VolumeError::Moved | VolumeError::ObjectDamaged { .. }) => Ok(HashMap::new()),
            hashes => hashes,
        }
    }

    /// Reads some blocks of one object together, and one by one if that fails.
    async fn scrub_blocks(
        &self,
        part: &[(Pointer, Range<u64>)],
        hashes: &HashMap<u32, BlockHash>,
        look: &mut Look,
    ) -> Result<(), VolumeError> {
        let wanted: Vec<(usize, Pointer)> = part.iter().map(|(pointer, _)| *pointer).enumerate().collect();
        let mut bytes = vec![0; part.len() * BLOCK];
        if self.reader.read(&wanted, &mut bytes).await.is_err() {
            for (pointer, blocks) in part {
                if let Err(error) = self.reader.read(&[(0, *pointer)], &mut bytes).await {
                    look.note(blocks, error)?;
                }
            }
            return Ok(());
        }
        let hasher = self.chain.secrets.hasher(self.reader.domain);
        let blocks = bytes.as_chunks::<BLOCK>().0;
        for (part, blocks) in part.chunks(HASHED_BLOCKS).zip(blocks.chunks(HASHED_BLOCKS)) {
            let wrong = part.iter().zip(blocks).filter_map(|((pointer, range), block)| {
                let location = pointer.location()?;
                let expected = hashes.get(&spot_bits(location.spot))?;
                (hasher.hash(block) != *expected).then_some((location, range))
            });
            for (location, range) in wrong {
                look.note(range, self.distrust(location))?;
            }
            give_way().await;
        }
        Ok(())
    }

    /// A block is not what was written there. What reading it comes to from now on.
    fn distrust(&self, location: Location) -> VolumeError {
        self.deduplication.unhook(location.segment.get());
        self.reader.distrust(location)
    }
}

/// What lies in some ranges, as much in one go as is looked at in one go.
fn spans(ranges: &[Range<u64>]) -> impl Iterator<Item = Vec<Range<u64>>> {
    let mut ranges = ranges.iter().cloned();
    let mut rest = 0..0;
    std::iter::from_fn(move || {
        let (mut span, mut room) = (Vec::new(), SPAN_BLOCKS);
        while room > 0 {
            if rest.is_empty() {
                let Some(next) = ranges.next() else { break };
                rest = next;
            }
            let end = rest.end.min(rest.start + room);
            span.push(rest.start..end);
            room -= end - rest.start;
            rest.start = end;
        }
        (!span.is_empty()).then_some(span)
    })
}

fn parts(range: Range<u64>, len: u64) -> impl Iterator<Item = Range<u64>> {
    range.clone().step_by(len as usize).map(move |start| start..(start + len).min(range.end))
}

fn handle_of(pointer: &Pointer) -> Option<u32> {
    pointer.location().map(|location| location.segment.get())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn spans_have_all_of_the_ranges_and_no_more_than_is_looked_at_in_one_go() {
        let all = |ranges: &[(u64, u64)]| -> Vec<Vec<(u64, u64)>> {
            let ranges: Vec<Range<u64>> = ranges.iter().map(|(start, end)| *start..*end).collect();
            spans(&ranges).map(|span| span.iter().map(|range| (range.start, range.end)).collect()).collect()
        };
        let n = SPAN_BLOCKS;
        assert!(all(&[]).is_empty());
        assert_eq!(all(&[(3, 3), (5, 7)]), [[(3, 3), (5, 7)]]);
        assert_eq!(all(&[(0, 2 * n)]), [[(0, n)], [(n, 2 * n)]]);
        assert_eq!(all(&[(0, 1), (2, n + 4)]), [vec![(0, 1), (2, n + 1)], vec![(n + 1, n + 4)]]);
        assert_eq!(parts(1..6, 2).collect::<Vec<_>>(), [1..3, 3..5, 5..6]);
    }
}
