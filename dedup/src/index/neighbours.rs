//! The cached part of the index: all block hashes of the segments whose headers were loaded lately.
//!
//! ```text
//!   table: hash ─▶ (slot, record)        slots: segment, the records of its header, whom they refer to, when it was last useful
//! ```
//!
//! - The memory is bounded; the header that was of no use for longest goes first.
//! - A header records what was written together, whether it was stored then or was a hit on another segment. When a segment goes,
//!   so does every cached header that refers to it: its handle may soon be another segment's.
//! - A hash may be found in several places.

use crate::hash::BlockHash;
use crate::location::{Location, SegmentHandle};
use hashbrown::HashTable;
use std::collections::HashMap;

/// A block that a segment's header tells of: its hash, and where it is: in this segment or, if it was a hit, in another one.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct BlockRecord {
    pub hash: BlockHash,
    pub location: Location,
}

/// Bytes of memory a record is counted with: 24 for itself, and its place in a table that is half to seven eighths full.
pub(super) const RECORD_COST: usize = 38;

#[derive(Clone, Copy)]
struct Place {
    slot: u32,
    position: u32,
}

struct Neighbourhood {
    segment: SegmentHandle,
    records: Box<[BlockRecord]>,
    /// The segments that the records refer to, sorted.
    targets: Box<[SegmentHandle]>,
    used: u64,
}

pub(super) struct Neighbours {
    slots: Vec<Option<Neighbourhood>>,
    slot_of: HashMap<SegmentHandle, u32>,
    table: HashTable<Place>,
    /// Counts uses; the order of uses is all that matters.
    uses: u64,
    records: usize,
    records_max: usize,
}

impl Neighbours {
    /// Holds at most `budget` bytes.
    pub fn new(budget: usize) -> Self {
        Self {
            slots: Vec::new(),
            slot_of: HashMap::new(),
            table: HashTable::new(),
            uses: 0,
            records: 0,
            records_max: (budget / RECORD_COST).min(u32::MAX as usize),
        }
    }

    pub fn contains(&self, segment: SegmentHandle) -> bool {
        self.slot_of.contains_key(&segment)
    }

    /// Records held.
    pub fn len(&self) -> usize {
        self.records
    }

    /// Takes in a segment's records, which replace those it had; of one too big for the budget, as many as fit.
    pub fn insert(&mut self, segment: SegmentHandle, records: &[BlockRecord]) {
        self.remove(segment);
        let records = &records[..records.len().min(self.records_max)];
        while self.records + records.len() > self.records_max {
            let oldest = self.slots.iter().flatten().min_by_key(|neighbourhood| neighbourhood.used);
            let Some(oldest) = oldest.map(|neighbourhood| neighbourhood.segment) else { break };
            self.remove(oldest);
        }
        self.uses += 1;
        let slot = self.slots.iter().position(Option::is_none).unwrap_or(self.slots.len());
        if slot == self.slots.len() {
            self.slots.push(None);
        }
        let mut targets: Vec<_> = records.iter().map(|record| record.location.segment).collect();
        targets.sort_unstable();
        targets.dedup();
        self.slots[slot] = Some(Neighbourhood { segment, records: records.into(), targets: targets.into(), used: self.uses });
        self.slot_of.insert(segment, slot as u32);
        self.records += records.len();
        let slots = &self.slots;
        for (position, record) in (0..).zip(records) {
            let place = Place { slot: slot as u32, position };
            self.table.insert_unique(record.hash.word(), place, |place| word_at(slots, *place));
        }
    }

    pub fn remove(&mut self, segment: SegmentHandle) {
        let Some(slot) = self.slot_of.remove(&segment) else { return };
        let Some(gone) = self.slots[slot as usize].take() else { return };
        self.records -= gone.records.len();
        for (position, record) in (0..).zip(&gone.records) {
            let is_it = |place: &Place| place.slot == slot && place.position == position;
            if let Ok(entry) = self.table.find_entry(record.hash.word(), is_it) {
                entry.remove();
            }
        }
    }

    /// Removes the header of this segment, and those that refer to it.
    pub fn withdraw(&mut self, segment: SegmentHandle) {
        let refers = |one: &&Neighbourhood| one.segment == segment || one.targets.binary_search(&segment).is_ok();
        let segments: Vec<_> = self.slots.iter().flatten().filter(refers).map(|one| one.segment).collect();
        segments.into_iter().for_each(|segment| self.remove(segment));
    }

    /// Every place known for this hash, and the segment whose header knows it.
    pub fn find(&self, hash: BlockHash) -> impl Iterator<Item = (SegmentHandle, Location)> {
        self.table.iter_hash(hash.word()).filter_map(move |place| {
            let neighbourhood = self.slots[place.slot as usize].as_ref()?;
            let record = &neighbourhood.records[place.position as usize];
            (record.hash == hash).then_some((neighbourhood.segment, record.location))
        })
    }

    /// Notes that the segment was of use.
    pub fn touch(&mut self, segment: SegmentHandle) {
        let Some(slot) = self.slot_of.get(&segment) else { return };
        if let Some(neighbourhood) = &mut self.slots[*slot as usize] {
            self.uses += 1;
            neighbourhood.used = self.uses;
        }
    }
}

fn word_at(slots: &[Option<Neighbourhood>], place: Place) -> u64 {
    slots[place.slot as usize].as_ref().map_or(0, |neighbourhood| neighbourhood.records[place.position as usize].hash.word())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::location::{LengthClass, Spot};
    use crate::samples;

    /// Blocks that are in segment `seed`.
    fn records(seed: u32, count: u32) -> Vec<BlockRecord> {
        let mut state = u64::from(seed);
        let mut record = |position: u32| {
            let word = u128::from(samples::next(&mut state)) << 64 | u128::from(samples::next(&mut state));
            let spot = Spot::new(position / 4, (position % 4) as u8, LengthClass(9)).unwrap();
            BlockRecord { hash: BlockHash(word.to_le_bytes()), location: Location { segment: segment(seed), spot } }
        };
        (0..count).map(&mut record).collect()
    }

    fn segment(number: u32) -> SegmentHandle {
        SegmentHandle::new(number).unwrap()
    }

    /// Whose headers know of this block.
    fn found(neighbours: &Neighbours, record: &BlockRecord) -> Vec<u32> {
        let found: Vec<_> = neighbours.find(record.hash).collect();
        assert!(found.iter().all(|(_, location)| *location == record.location));
        let mut headers: Vec<_> = found.iter().map(|(segment, _)| segment.get()).collect();
        headers.sort_unstable();
        headers
    }

    #[test]
    fn every_record_is_found_in_every_header_that_has_it() {
        let mut neighbours = Neighbours::new(1 << 20);
        let shared = records(1, 500);
        neighbours.insert(segment(1), &shared);
        neighbours.insert(segment(2), &[shared.clone(), records(2, 500)].concat());
        shared.iter().for_each(|record| assert_eq!(found(&neighbours, record), [1, 2]));
        neighbours.insert(segment(2), &records(3, 500));
        assert_eq!(neighbours.len(), 1000);
        assert_eq!(found(&neighbours, &shared[7]), [1]);
        neighbours.remove(segment(1));
        neighbours.remove(segment(2));
        assert_eq!((neighbours.len(), neighbours.table.len()), (0, 0));
    }

    #[test]
    fn what_refers_to_a_segment_goes_with_it() {
        let mut neighbours = Neighbours::new(1 << 20);
        let (one, two, three) = (records(1, 100), records(2, 100), records(3, 100));
        neighbours.insert(segment(1), &one);
        neighbours.insert(segment(2), &[two.clone(), one.clone()].concat());
        neighbours.insert(segment(3), &three);
        neighbours.withdraw(segment(1));
        assert_eq!(
            (found(&neighbours, &one[0]), found(&neighbours, &two[0]), found(&neighbours, &three[0])),
            (vec![], vec![], vec![3])
        );
    }

    #[test]
    fn the_budget_holds_and_the_least_used_goes() {
        let mut neighbours = Neighbours::new(100 * RECORD_COST);
        let all: Vec<_> = (0..4).map(|seed| records(seed, 40)).collect();
        neighbours.insert(segment(0), &all[0]);
        neighbours.insert(segment(1), &all[1]);
        neighbours.touch(segment(0));
        neighbours.insert(segment(2), &all[2]);
        assert_eq!([0, 1, 2].map(|number| neighbours.contains(segment(number))), [true, false, true]);
        assert!(found(&neighbours, &all[1][0]).is_empty());
        neighbours.insert(segment(3), &records(9, 1000));
        assert_eq!((neighbours.len(), neighbours.table.len()), (100, 100));
        assert!(neighbours.contains(segment(3)));
    }

    #[test]
    fn one_content_many_times_in_a_segment_is_no_trap() {
        let mut neighbours = Neighbours::new(1 << 20);
        let one = records(1, 1)[0];
        neighbours.insert(segment(1), &vec![one; 64]);
        neighbours.remove(segment(1));
        assert_eq!(neighbours.table.len(), 0);
    }
}
