//! What the blocks of a volume's objects are for: the volume as it is, its snapshots alone, or nothing any more.
//!
//! ```text
//!   tree and layers of the volume ─▶ named ─┐
//!   trees of its snapshots        ─▶ named  ├─▶ by object: used by the volume · by snapshots alone · by nobody
//!   table                         ─▶ stored ┘
//! ```
//!
//! Of a volume with more than [`COUNTED_MAX`] blocks, only some objects are counted and stand for the others.

use backends::Shares;
use blockdev::{Extent, ExtentKind};
use rustc_hash::{FxHashMap, FxHashSet};

use crate::ahead::Ahead;
use crate::clone::reader_of;
use crate::core::Core;
use crate::error::VolumeError;
use crate::map::{Pointer, Tree, Unhurried, walk};
use crate::mapped::Parts;
use crate::meta::{Snapshot, Volumes};
use crate::names::{Slot, VolumeId, first_block};
use crate::reader::Reader;
use crate::segment::BLOCK;
use crate::snapshots::by_age;
use crate::table::{Content, Entry};

/// Blocks that are remembered at once.
const COUNTED_MAX: u64 = 2 << 20;
/// Blocks that are looked at together for what they hold.
const SPAN_BLOCKS: u64 = 1 << 18;
/// How often a volume is looked at that changes meanwhile.
const TRIES_MAX: u32 = 4;

/// Objects with data and objects with pages take handles by turns, so those that are counted are picked by a number that is mixed (SplitMix64's finalizer).
fn is_counted(handle: u32, every: u32) -> bool {
    let mixed = u64::from(handle).wrapping_add(1).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    let mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    (mixed ^ (mixed >> 31)).is_multiple_of(every.into())
}

/// Which blocks were named, of those objects that are counted.
struct Count<'a> {
    reader: &'a Reader,
    /// One object in so many is counted.
    every: u32,
    named: FxHashSet<Pointer>,
    /// By object, in blocks.
    by_volume: FxHashMap<u32, u64>,
    by_anyone: FxHashMap<u32, u64>,
}

impl Count<'_> {
    fn name(&mut self, pointer: Pointer, is_volume: bool) {
        let Some(location) = pointer.location() else { return };
        let named = location.segment.get();
        let handle = self.reader.forward_of(named).unwrap_or(named);
        if !is_counted(handle, self.every) || !self.named.insert(pointer) {
            return;
        }
        *self.by_anyone.entry(handle).or_default() += 1;
        if is_volume {
            *self.by_volume.entry(handle).or_default() += 1;
        }
    }

    /// Bytes of an object: for the volume, for its snapshots alone, for nothing.
    fn split(&self, handle: u32, entry: &Entry) -> [f64; 3] {
        let blocks = u64::from(entry.blocks);
        let count = |counts: &FxHashMap<u32, u64>| counts.get(&handle).copied().unwrap_or(0).min(blocks);
        let (volume, anyone) = (count(&self.by_volume), count(&self.by_anyone));
        let of = |part: u64| f64::from(entry.bytes) * part as f64 / blocks.max(1) as f64;
        [of(volume), of(anyone - volume), of(blocks.max(1) - anyone)]
    }
}

/// `own` says which entries of the table are the group's; the first of the heads is the volume's, the others are those of the rest of the group.
async fn count(
    reader: &Reader,
    own: u16,
    heads: &[Tree],
    layers: impl Fn(&mut dyn FnMut(Pointer)),
    snapshots: &[Tree],
) -> Result<Shares, VolumeError> {
    let is_own = |entry: &&Entry| entry.owner == own && entry.is_live();
    let stored: u64 = reader.table.borrow().entries().iter().filter(is_own).map(|entry| u64::from(entry.blocks)).sum();
    let every = u32::try_from(stored.div_ceil(COUNTED_MAX)).unwrap_or(u32::MAX).max(1);
    let (named, by_volume, by_anyone) = Default::default();
    let mut count = Count { reader, every, named, by_volume, by_anyone };
    let mut data = 0;
    // Before anything else happens: they belong to this tree.
    layers(&mut |pointer| count.name(pointer, true));
    let ahead = Ahead::new(reader, snapshots.len());
    let pages = Unhurried::new(&ahead);
    let (head, others) = heads.split_at(heads.len().min(1));
    walk(head, &pages, |pointer, is_page| {
        data += u64::from(!is_page);
        count.name(pointer, true);
    })
    .await?;
    walk(others, &pages, |pointer, _| count.name(pointer, true)).await?;
    walk(snapshots, &pages, |pointer, _| count.name(pointer, false)).await?;
    let table = reader.table.borrow();
    let mut sums = [0.0; 3];
    // What blocks and what pages take of an object's bytes differs much, so each stand for their own kind.
    for content in [Content::Data, Content::Pages] {
        let (mut parts, mut counted, mut all) = ([0.0; 3], 0_u64, 0_u64);
        for (handle, entry) in table.used().filter(|(_, entry)| is_own(entry) && entry.content == content) {
            all += u64::from(entry.bytes);
            if is_counted(handle, every) {
                counted += u64::from(entry.bytes);
                parts.iter_mut().zip(count.split(handle, entry)).for_each(|(sum, part)| *sum += part);
            }
        }
        let scale = all as f64 / counted.max(1) as f64;
        sums.iter_mut().zip(parts).for_each(|(sum, part)| *sum += part * scale);
    }
    let [_, snapshots, reclaimable] = sums.map(|sum| sum.round() as u64);
    Ok(Shares { data: data * BLOCK as u64, snapshots, reclaimable })
}

impl Core {
    /// As the newest checkpoint says, and of what has been written since as much as the pool has.
    pub(crate) async fn shares(&self, slot: Slot) -> Result<Shares, VolumeError> {
        let mut tries = 1..TRIES_MAX;
        loop {
            let before = self.keeper.root().checkpoint;
            match self.try_shares(slot).await {
                // What was looked at has moved, or is gone.
                Err(VolumeError::Moved | VolumeError::ObjectDamaged { .. })
                    if self.keeper.root().checkpoint != before && tries.next().is_some() => {}
                found => return Ok(Shares { data: self.data(slot).await?, ..found? }),
            }
        }
    }

    /// Bytes of the volume that hold data, in the log too.
    async fn data(&self, slot: Slot) -> Result<u64, VolumeError> {
        let unread = |_| self.failure().or_else(|| self.last_unread.borrow().clone()).unwrap_or(VolumeError::Moved);
        let (mut data, mut from) = (0, first_block(slot));
        let end = from + self.size(slot) / BLOCK as u64;
        while from < end {
            let extents = self.extents(from..end.min(from + SPAN_BLOCKS)).await.map_err(unread)?;
            let is_data = |extent: &&Extent| extent.kind == ExtentKind::Data;
            data += extents.iter().filter(is_data).map(|extent| extent.len).sum::<u64>();
            from += extents.iter().map(|extent| extent.len).sum::<u64>().max(BLOCK as u64) / BLOCK as u64;
        }
        Ok(data)
    }

    fn show_layers(&self, mut show: impl FnMut(Pointer)) {
        let map = self.map.borrow();
        let layers = map.layers.iter().map(|layer| &**layer).chain([&map.open]);
        layers.flat_map(|layer| layer.runs.iter()).for_each(|(_, pointer)| show(*pointer));
    }

    async fn try_shares(&self, slot: Slot) -> Result<Shares, VolumeError> {
        let _looking = self.reader.looking();
        let heads = heads(&self.map.borrow().volumes, slot);
        let snapshots = in_order(self.committed_snapshots(|_| true), &self.reader);
        count(&self.reader, 0, &heads, |show| self.show_layers(show), &snapshots).await
    }
}

fn in_order(snapshots: Vec<Snapshot>, reader: &Reader) -> Vec<Tree> {
    by_age(snapshots, &reader.table.borrow()).into_iter().map(|snapshot| snapshot.tree).collect()
}

/// The trees of a group's volumes, that of one of them first.
fn heads(volumes: &Volumes, slot: Slot) -> Vec<Tree> {
    let others = volumes.iter().filter(|(of, _)| **of != slot);
    volumes.get(&slot).into_iter().chain(others.map(|(_, held)| held)).map(|held| held.tree).collect()
}

/// Of a volume that need not be open, as its newest checkpoint says.
pub(crate) async fn shares_in_store(parts: &Parts, volume: VolumeId) -> Result<Shares, VolumeError> {
    let chain = parts.chain(volume.group);
    let (root, meta) = chain.read_meta().await?;
    // There, the volume is the first ancestor of a clone that is none.
    let reader = reader_of(parts, &chain, &root, &meta)?;
    let heads = heads(&meta.volumes, meta.slot(volume.id)?);
    count(&reader, 1, &heads, |_| (), &in_order(meta.snapshots, &reader)).await
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn objects_that_are_counted_are_picked_evenly_whoever_takes_handles_by_turns() {
        const HANDLES: u32 = 60_000;
        assert!((0..HANDLES).all(|handle| is_counted(handle, 1)));
        for (every, turns) in [(2, 2), (13, 2), (25, 5), (54, 3)] {
            for turn in 0..turns {
                let counted = (0..HANDLES).filter(|handle| handle % turns == turn && is_counted(*handle, every)).count();
                let expected = f64::from(HANDLES / turns / every);
                assert!((counted as f64 - expected).abs() < 5.0 * expected.sqrt(), "{counted} instead of {expected}");
            }
        }
    }
}
