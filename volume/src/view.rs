//! What a range of blocks holds, through backlog, layers and tree.

use std::ops::Range;

use blockdev::Errno;
use bytes::Bytes;

use crate::backlog::Pending;
use crate::core::Core;
use crate::error::VolumeError;
use crate::extent_map::{ExtentMap, Run, Seen, look_through};
use crate::log::RecordKind;
use crate::map::{Pointer, Tree};
use crate::names::{first_block, slot_of};
use crate::root::Checkpoint;
use crate::segment::{BLOCK, Place};

/// In one answer about extents.
const EXTENTS_MAX: usize = 4096;
/// How often a reader looks again because what it found is gone.
const TRIES_MAX: u32 = 16;

#[derive(Clone, Copy)]
struct Kind(blockdev::ExtentKind);

impl Run for Kind {
    fn skip(&self, _blocks: u64) -> Kind {
        *self
    }
}

impl Core {
    /// Reads whole blocks.
    pub(crate) async fn read(&self, blocks: Range<u64>) -> Result<Vec<u8>, Errno> {
        let mut tries = 0;
        loop {
            if let Some(errno) = self.failed_errno() {
                return Err(errno);
            }
            let before = self.version();
            match self.try_read(blocks.clone()).await {
                Ok(Some(bytes)) => return Ok(bytes),
                Ok(None) => {}
                Err(error) if self.may_have_moved(&error, before, &mut tries) => {}
                Err(error) => return Err(self.unread(error)),
            }
        }
    }

    /// Changes whenever something that was mapped may be mapped no more.
    fn version(&self) -> (Checkpoint, Place) {
        (self.keeper.root().checkpoint, self.next_published.get())
    }

    /// Whether what was looked for may be elsewhere, or gone because the volume has changed since: then look again.
    fn may_have_moved(&self, error: &VolumeError, before: (Checkpoint, Place), tries: &mut u32) -> bool {
        *tries += 1;
        let may_be_gone = matches!(error, VolumeError::ObjectDamaged { .. }) && self.version() != before;
        (may_be_gone || matches!(error, VolumeError::Moved)) && *tries < TRIES_MAX
    }

    /// `None`: the log moved on meanwhile; look again.
    async fn try_read(&self, blocks: Range<u64>) -> Result<Option<Vec<u8>>, VolumeError> {
        let _looking = self.reader.looking();
        let mut bytes = vec![0; (blocks.end - blocks.start) as usize * BLOCK];
        let part =
            |range: &Range<u64>| (range.start - blocks.start) as usize * BLOCK..(range.end - blocks.start) as usize * BLOCK;
        let pending = self.backlog.within(blocks.clone());
        let (above, tree, first) = self.above(pending.open, blocks.start);
        let mut runs = above.runs;
        for range in above.open {
            let found = tree.runs(&self.reader, range.start - first..range.end - first, usize::MAX).await?;
            runs.extend(found.into_iter().map(|(run, pointer)| (run.start + first..run.end + first, pointer)));
        }
        runs.retain(|(_, pointer)| !pointer.is_nothing());
        runs.sort_unstable_by_key(|(range, _)| range.start);
        let wanted: Vec<(usize, Pointer)> =
            runs.into_iter().map(|(range, pointer)| ((range.start - blocks.start) as usize, pointer)).collect();
        self.reader.read(&wanted, &mut bytes).await?;
        for (range, run) in pending.runs {
            let read = self.read_pending(&run, &mut bytes[part(&range)]).await;
            if !read.map_err(|errno| VolumeError::log_io("read", run.payload.position, errno))? {
                return Ok(None);
            }
        }
        Ok(Some(bytes))
    }

    /// What could not be read is an error for its reader, and noted.
    fn unread(&self, error: VolumeError) -> Errno {
        self.note_damage(error);
        Errno::EIO
    }

    /// For whoever asks for the volume's health.
    pub(crate) fn note_damage(&self, error: VolumeError) {
        self.last_unread.replace(Some(error));
    }

    async fn read_pending(&self, run: &Pending, bytes: &mut [u8]) -> Result<bool, Errno> {
        if run.kind != RecordKind::Write {
            bytes.fill(0);
            return Ok(true);
        }
        let found = self.written_bytes(run, bytes.len()).await?;
        Ok(found.map(|found| bytes.copy_from_slice(&found)).is_some())
    }

    /// The first `len` bytes of a run that was written; `None` if its place in the log was given to newer ones meanwhile.
    pub(crate) async fn written_bytes(&self, run: &Pending, len: usize) -> Result<Option<Bytes>, Errno> {
        let from = run.skip as usize * BLOCK;
        if let Some(payload) = run.kept() {
            return Ok(Some(payload.slice(from..from + len)));
        }
        let payload = self.log.read(run.payload).await?;
        Ok(payload.map(|payload| Bytes::from(payload).slice(from..from + len)))
    }

    /// What the layers say of some ranges, the tree to ask for the rest, and the block at which that begins. All of it is of the volume that has `block`.
    fn above(&self, open: Vec<Range<u64>>, block: u64) -> (Seen<Pointer>, Tree, u64) {
        let (map, slot) = (self.map.borrow(), slot_of(block));
        let layers = std::iter::once(&map.open).chain(map.layers.iter().rev().map(|layer| &**layer));
        let tree = map.volumes.get(&slot).map_or_else(|| Tree::empty(1), |held| held.tree);
        (look_through(layers.map(|layer| &layer.runs), open), tree, first_block(slot))
    }

    /// What the parts of a range hold: of all of it, or of its first 4096 parts.
    pub(crate) async fn extents(&self, blocks: Range<u64>) -> Result<Vec<blockdev::Extent>, Errno> {
        let mut tries = 0;
        loop {
            if let Some(errno) = self.failed_errno() {
                return Err(errno);
            }
            let before = self.version();
            match self.try_extents(blocks.clone()).await {
                // What seemed damaged may only have moved.
                Ok((_, true)) if self.version() != before && tries < TRIES_MAX => tries += 1,
                Ok((extents, _)) => return Ok(extents),
                Err(error) if self.may_have_moved(&error, before, &mut tries) => {}
                Err(error) => return Err(self.unread(error)),
            }
        }
    }

    /// What is hidden by a damaged page counts as data, and the answer says whether there is such.
    async fn try_extents(&self, blocks: Range<u64>) -> Result<(Vec<blockdev::Extent>, bool), VolumeError> {
        let _looking = self.reader.looking();
        let mut kinds = ExtentMap::default();
        let pending = self.backlog.within(blocks.clone());
        let (above, tree, first) = self.above(pending.open, blocks.start);
        let mut is_damaged = false;
        // Beyond where the tree was followed to, nothing is known.
        let mut known = blocks.end;
        for range in above.open {
            let wanted = range.start..range.end.min(known);
            if wanted.is_empty() {
                continue;
            }
            let runs = tree.runs(&self.reader, wanted.start - first..wanted.end - first, EXTENTS_MAX * 8).await?;
            let end = runs.last().map_or(wanted.end, |(run, _)| run.end + first);
            known = if end < wanted.end { known.min(end) } else { known };
            is_damaged |= runs.iter().any(|(_, pointer)| pointer.hiding().is_some());
            runs.into_iter().for_each(|(run, pointer)| kinds.insert(run.start + first..run.end + first, Kind(kind_of(pointer))));
        }
        above.runs.into_iter().for_each(|(run, pointer)| kinds.insert(run, Kind(kind_of(pointer))));
        for (range, run) in pending.runs {
            let kind = match run.kind {
                RecordKind::Write => blockdev::ExtentKind::Data,
                RecordKind::Zero => blockdev::ExtentKind::Zero,
                RecordKind::Discard | RecordKind::Marker => blockdev::ExtentKind::Hole,
            };
            kinds.insert(range, Kind(kind));
        }
        Ok((joined(&kinds, blocks.start..known), is_damaged))
    }
}

pub(crate) fn kind_of(pointer: Pointer) -> blockdev::ExtentKind {
    match pointer {
        Pointer::HOLE => blockdev::ExtentKind::Hole,
        Pointer::ZERO => blockdev::ExtentKind::Zero,
        _ => blockdev::ExtentKind::Data,
    }
}

fn joined(kinds: &ExtentMap<Kind>, blocks: Range<u64>) -> Vec<blockdev::Extent> {
    let mut extents: Vec<blockdev::Extent> = Vec::new();
    for (range, Kind(kind)) in kinds.within(blocks) {
        let len = (range.end - range.start) * BLOCK as u64;
        let is_full = extents.len() == EXTENTS_MAX;
        match extents.last_mut().filter(|last| last.kind == kind) {
            Some(last) => last.len += len,
            None if is_full => break,
            None => extents.push(blockdev::Extent { len, kind }),
        }
    }
    extents
}
