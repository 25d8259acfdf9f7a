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

use dedup::hash::BlockHash;
use dedup::location::Location;

use crate::core::Core;
use crate::error::VolumeError;
use crate::map::{Pointer, Tree, spot_bits};
use crate::meta::Snapshot;
use crate::names::Slot;
use crate::progress::Progress;
use crate::segment::BLOCK;
use crate::signal::give_way;

/// Blocks looked at in one go: so many that of each object some are among them. Its header is read for them, and may be longer than they are.
const SPAN_BLOCKS: u64 = 262_144;
/// Blocks read in one go.
const READ_BLOCKS: usize = 256;
/// Blocks hashed in one go: more would keep requests waiting.
const HASHED_BLOCKS: usize = 32;
const RANGES_MAX: usize = 4_096;
/// What is told of one volume.
const FINDINGS_MAX: usize = 100;

impl Core {
    /// What cannot be read of what is in the pool, one sentence each.
    pub(crate) async fn scrub(&self, slot: Slot, progress: &Progress) -> Result<Vec<String>, VolumeError> {
        self.publish_all().await.map_err(|_| self.failure().unwrap_or(VolumeError::Fenced))?;
        self.checkpoint().await?;
        let held = self.held(slot).ok_or(VolumeError::NoVolume)?;
        let mut findings = Vec::new();
        self.scrub_headers(&mut findings).await?;
        progress.begin(held.size);
        let head = || self.held(slot).map(|held| held.tree);
        self.scrub_range(("the volume", &head), 0..held.blocks(), &mut findings, progress).await?;
        for Snapshot { name, size, .. } in self.committed_snapshots(|of| of == slot) {
            let name = (slot, name);
            let tree = || self.snapshot_now(&name).ok().map(|snapshot| snapshot.tree);
            let what = format!("snapshot {}", name.1);
            let blocks = size / BLOCK as u64;
            let mut from = 0;
            while from < blocks && findings.len() < FINDINGS_MAX {
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
                for range in ranges {
                    self.scrub_range((&what, &tree), range, &mut findings, progress).await?;
                }
            }
        }
        Ok(findings)
    }

    /// Reads what objects say of what is in them: garbage collection needs it, and reading what it has moved.
    async fn scrub_headers(&self, findings: &mut Vec<String>) -> Result<(), VolumeError> {
        // No handle comes to stand for an object that is only being written.
        let _looking = self.reader.looking();
        let handles: Vec<u32> = self.reader.table.borrow().live().collect();
        for handle in handles {
            match self.reader.step_of(handle).await {
                Ok(_) | Err(VolumeError::Moved) => {}
                Err(VolumeError::ObjectDamaged { .. }) if !self.reader.table.borrow().is_live(handle) => {}
                Err(VolumeError::ObjectDamaged { object, why }) => tell(findings, format!("{object} is damaged: {why}")),
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }

    /// `of`: what it is, and its tree as long as it is there.
    async fn scrub_range(
        &self,
        of: (&str, &dyn Fn() -> Option<Tree>),
        range: Range<u64>,
        findings: &mut Vec<String>,
        progress: &Progress,
    ) -> Result<(), VolumeError> {
        for start in range.clone().step_by(SPAN_BLOCKS as usize) {
            let span = start..(start + SPAN_BLOCKS).min(range.end);
            progress.advance((span.end - span.start) * BLOCK as u64);
            for last in [false, false, true] {
                let checkpoint = self.keeper.root().checkpoint;
                let mut found = Vec::new();
                let is_whole = self.scrub_span(of, span.clone(), &mut found).await?;
                // What a checkpoint has replaced meanwhile is no damage, and what took its place was not looked at.
                let is_fresh = checkpoint == self.keeper.root().checkpoint;
                if last || is_fresh || (is_whole && found.is_empty()) {
                    found.into_iter().for_each(|finding| tell(findings, finding));
                    break;
                }
            }
        }
        Ok(())
    }

    /// False if not all of it could be looked at.
    async fn scrub_span(
        &self,
        (what, tree): (&str, &dyn Fn() -> Option<Tree>),
        span: Range<u64>,
        findings: &mut Vec<String>,
    ) -> Result<bool, VolumeError> {
        let _looking = self.reader.looking();
        let Some(tree) = tree() else { return Ok(true) };
        let runs = match tree.runs(&self.reader, span.clone(), usize::MAX).await {
            Ok(runs) => runs,
            Err(error) => return note(findings, what, &span, &error),
        };
        let mut is_whole = true;
        let mut stored = Vec::new();
        for (blocks, pointer) in runs.into_iter().filter(|(_, pointer)| !pointer.is_nothing()) {
            match self.whereabouts(pointer).await {
                Ok(pointer) => stored.push((pointer, blocks)),
                Err(error) => is_whole &= note(findings, what, &blocks, &error)?,
            }
        }
        stored.sort_unstable_by_key(|(pointer, _)| pointer.bits());
        for of_object in stored.chunk_by(|(before, _), (next, _)| handle_of(before) == handle_of(next)) {
            let hashes = self.hashes_for(&of_object[0].0).await?;
            for part in of_object.chunks(READ_BLOCKS) {
                is_whole &= self.scrub_blocks(what, part, &hashes, findings).await?;
            }
        }
        Ok(is_whole)
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
        what: &str,
        part: &[(Pointer, Range<u64>)],
        hashes: &HashMap<u32, BlockHash>,
        findings: &mut Vec<String>,
    ) -> Result<bool, VolumeError> {
        let wanted: Vec<(usize, Pointer)> = part.iter().map(|(pointer, _)| *pointer).enumerate().collect();
        let mut bytes = vec![0; part.len() * BLOCK];
        let mut is_whole = true;
        if self.reader.read(&wanted, &mut bytes).await.is_ok() {
            let hasher = self.chain.secrets.hasher(self.reader.domain);
            let blocks = bytes.as_chunks::<BLOCK>().0;
            for (part, blocks) in part.chunks(HASHED_BLOCKS).zip(blocks.chunks(HASHED_BLOCKS)) {
                let wrong = part.iter().zip(blocks).filter_map(|((pointer, range), block)| {
                    let location = pointer.location()?;
                    let expected = hashes.get(&spot_bits(location.spot))?;
                    (hasher.hash(block) != *expected).then_some((location, range))
                });
                for (location, range) in wrong {
                    is_whole &= note(findings, what, range, &self.distrust(location))?;
                }
                give_way().await;
            }
            return Ok(is_whole);
        }
        for (pointer, blocks) in part {
            if let Err(error) = self.reader.read(&[(0, *pointer)], &mut bytes).await {
                is_whole &= note(findings, what, blocks, &error)?;
            }
        }
        Ok(is_whole)
    }

    /// A block is not what was written there. What reading it comes to from now on.
    fn distrust(&self, location: Location) -> VolumeError {
        self.deduplication.unhook(location.segment.get());
        self.reader.distrust(location)
    }
}

fn handle_of(pointer: &Pointer) -> Option<u32> {
    pointer.location().map(|location| location.segment.get())
}

/// Notes damage; false if the blocks were freed meanwhile. A store that does not answer, or another owner, ends the search.
fn note(findings: &mut Vec<String>, what: &str, blocks: &Range<u64>, error: &VolumeError) -> Result<bool, VolumeError> {
    match error {
        VolumeError::Moved => Ok(false),
        VolumeError::ObjectDamaged { object, why } => {
            let (from, to) = (blocks.start * BLOCK as u64, blocks.end * BLOCK as u64);
            tell(findings, format!("{what}: bytes {from} to {to} cannot be read: {object} is damaged: {why}"));
            Ok(true)
        }
        error => Err(error.clone()),
    }
}

fn tell(findings: &mut Vec<String>, finding: String) {
    if findings.len() < FINDINGS_MAX {
        findings.push(finding);
    }
}
