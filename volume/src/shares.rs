//! What the blocks of a volume's objects are for: the volume as it is, its snapshots alone, or nothing any more.
//!
//! ```text
//!   tree and layers of the volume ─▶ named ─┐
//!   trees of its snapshots        ─▶ named  ├─▶ by object: used by the volume · by snapshots alone · by nobody
//!   table                         ─▶ stored ┘
//! ```
//!
//! Of a volume with more than [`COUNTED_MAX`] blocks, only some objects are counted and stand for the others.

use std::hash::BuildHasher;

use backends::Shares;
use blockdev::{Extent, ExtentKind};
use rustc_hash::{FxBuildHasher, FxHashMap, FxHashSet};

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
use crate::table::{Content, Entry, State, Table};

/// Blocks that are remembered at once.
const COUNTED_MAX: u64 = 2 << 20;
/// Blocks that are looked at together for what they hold.
const SPAN_BLOCKS: u64 = 1 << 18;
/// How often a volume is looked at that changes meanwhile.
const TRIES_MAX: u32 = 4;

/// Objects with data and objects with pages take handles by turns, so those that are counted are picked by a hash.
fn is_counted(handle: u32, every: u32) -> bool {
    FxBuildHasher.hash_one(handle).is_multiple_of(every.into())
}

/// An object that is counted, as it was when counting began.
struct Object {
    blocks: u64,
    bytes: u32,
    /// Blocks that were named.
    by_volume: u64,
    by_anyone: u64,
}

impl Object {
    fn new(entry: &Entry) -> Object {
        Object { blocks: entry.blocks.into(), bytes: entry.bytes, by_volume: 0, by_anyone: 0 }
    }

    /// Bytes: for the volume, for its snapshots alone, for nothing.
    fn split(&self) -> [f64; 3] {
        let (volume, anyone) = (self.by_volume.min(self.blocks), self.by_anyone.min(self.blocks));
        let of = |part: u64| f64::from(self.bytes) * part as f64 / self.blocks.max(1) as f64;
        [of(volume), of(anyone - volume), of(self.blocks.max(1) - anyone)]
    }
}

/// Objects with content of one kind. What blocks and what pages take of an object's bytes differs much, so each stand for their own kind.
#[derive(Default)]
struct Kind {
    counted: FxHashMap<u32, Object>,
    /// Of all objects, those that are not counted too.
    bytes: u64,
}

impl Kind {
    /// Bytes: for the volume, for its snapshots alone, for nothing.
    fn split(&self) -> [f64; 3] {
        let counted: u64 = self.counted.values().map(|object| u64::from(object.bytes)).sum();
        let scale = self.bytes as f64 / counted.max(1) as f64;
        let splits = self.counted.values().map(Object::split);
        splits.fold([0.0; 3], |sums, parts| std::array::from_fn(|part| sums[part] + parts[part] * scale))
    }
}

/// Which blocks are named of the objects that were there when counting began, wherever a collection may move them meanwhile.
struct Count {
    /// Handles that lead to objects that are counted, and these.
    leads_to: FxHashMap<u32, u32>,
    data: Kind,
    pages: Kind,
    named: FxHashSet<Pointer>,
}

impl Count {
    /// `own` says which entries of the table are the group's.
    fn new(table: &Table, own: u16) -> Count {
        let is_own = |entry: &Entry| entry.owner == own && entry.is_live();
        let stored: u64 = table.entries().iter().filter(|entry| is_own(entry)).map(|entry| u64::from(entry.blocks)).sum();
        let every = u32::try_from(stored.div_ceil(COUNTED_MAX)).unwrap_or(u32::MAX).max(1);
        let (mut leads_to, mut data, mut pages) = (FxHashMap::default(), Kind::default(), Kind::default());
        for (named, entry) in table.used() {
            let handle = if let State::Forwarded(to) = entry.state { to } else { named };
            if is_counted(handle, every) {
                leads_to.insert(named, handle);
            }
            if is_own(entry) {
                let kind = if entry.content == Content::Data { &mut data } else { &mut pages };
                kind.bytes += u64::from(entry.bytes);
                if is_counted(named, every) {
                    kind.counted.insert(named, Object::new(entry));
                }
            }
        }
        Count { leads_to, data, pages, named: FxHashSet::default() }
    }

    fn name(&mut self, pointer: Pointer, is_volume: bool) {
        let Some(location) = pointer.location() else { return };
        let Some(handle) = self.leads_to.get(&location.segment.get()) else { return };
        if !self.named.insert(pointer) {
            return;
        }
        let object = [&mut self.data, &mut self.pages].into_iter().find_map(|kind| kind.counted.get_mut(handle));
        if let Some(object) = object {
            object.by_anyone += 1;
            object.by_volume += u64::from(is_volume);
        }
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
    let mut count = Count::new(&reader.table.borrow(), own);
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
    let (in_data, in_pages) = (count.data.split(), count.pages.split());
    let [_, snapshots, reclaimable] = std::array::from_fn(|part| (in_data[part] + in_pages[part]).round() as u64);
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
    use dedup::location::{Location, SegmentHandle};

    use super::*;
    use crate::map::spot_of;
    use crate::names::{Family, Source};

    fn name(count: &mut Count, handle: u32, spots: std::ops::Range<u32>) {
        let segment = SegmentHandle::new(handle).unwrap();
        spots.for_each(|spot| count.name(Pointer::to(Location { segment, spot: spot_of(spot) }), true));
    }

    #[test]
    fn what_a_collection_moves_meanwhile_is_still_in_use() {
        let mut table = Table::new([1; 16]);
        let add = |table: &mut Table, number, blocks| {
            let source = Source { group: [1; 16], family: Family::Step, epoch: 1, number };
            table.add(source, Content::Data, blocks, 100 * blocks).unwrap()
        };
        let (first, second) = (add(&mut table, 1, 10), add(&mut table, 2, 10));
        table.forward(first, second);
        let mut count = Count::new(&table, 0);
        name(&mut count, first, 0..2);
        name(&mut count, second, 2..4);
        let third = add(&mut table, 3, 6);
        table.forward(second, third);
        name(&mut count, first, 4..5);
        name(&mut count, second, 5..6);
        name(&mut count, third, 0..6);
        assert_eq!(count.data.split(), [600.0, 0.0, 400.0]);
    }

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
