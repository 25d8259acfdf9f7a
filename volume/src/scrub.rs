//! Reading everything that a volume and its snapshots hold, to find what has rotted.
//!
//! ```text
//!   the header of every object        the volume: every run of its tree        a snapshot: the ranges in which it differs from the volume
//! ```
//!
//! Each frame that is read is checked by its seal. Nothing is changed.

use std::ops::Range;

use crate::core::Core;
use crate::error::VolumeError;
use crate::map::{Pointer, Tree};
use crate::meta::Snapshot;
use crate::names::Slot;
use crate::progress::Progress;
use crate::segment::BLOCK;

/// Blocks looked at in one go, and read in one go.
const SPAN_BLOCKS: u64 = 16_384;
const READ_BLOCKS: usize = 256;
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
        let stored: Vec<(Range<u64>, Pointer)> = runs.into_iter().filter(|(_, pointer)| !pointer.is_nothing()).collect();
        let mut is_whole = true;
        for part in stored.chunks(READ_BLOCKS) {
            is_whole &= self.scrub_blocks(what, part, findings).await?;
        }
        Ok(is_whole)
    }

    /// Reads some blocks together, and one by one if that fails.
    async fn scrub_blocks(
        &self,
        what: &str,
        part: &[(Range<u64>, Pointer)],
        findings: &mut Vec<String>,
    ) -> Result<bool, VolumeError> {
        let wanted: Vec<(usize, Pointer)> = part.iter().map(|(_, pointer)| *pointer).enumerate().collect();
        let mut bytes = vec![0; part.len() * BLOCK];
        if self.reader.read(&wanted, &mut bytes).await.is_ok() {
            return Ok(true);
        }
        let mut is_whole = true;
        for (blocks, pointer) in part {
            if let Err(error) = self.reader.read(&[(0, *pointer)], &mut bytes).await {
                is_whole &= note(findings, what, blocks, &error)?;
            }
        }
        Ok(is_whole)
    }
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
