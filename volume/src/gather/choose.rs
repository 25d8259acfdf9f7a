//! What a collection is for: when one is due, and which objects it forgets and rewrites.

use std::collections::VecDeque;

use super::mark::Uses;
use super::pointers::Pointers;
use crate::core::Core;
use crate::names::Family;
use crate::segment::Place;
use crate::table::Entry;

/// Blocks that may be garbage before anybody looks: one object's.
const GARBAGE_MIN: u64 = 8_192;
/// Of what is stored, the share in use that is kept up while the volume is busy, and beyond which nothing is done. Less garbage costs more copies.
const IN_USE_BUSY: f64 = 0.8;
const IN_USE_BUSY_DONE: f64 = 0.84;
/// The same for a volume that rests, and the share of an object up to which it is rewritten in any case.
const IN_USE_QUIET: f64 = 0.97;
const IN_USE_QUIET_OBJECT: f64 = 0.9;
/// It is tidied up again when one block in so many has changed, as that takes a look at all of its map.
const TIDY_EVERY: u64 = 64;

/// Which objects are rewritten.
#[derive(Clone, Copy, PartialEq, Debug)]
pub(crate) enum Which {
    /// The volume's own of which no larger share is in use.
    Below(f64),
    /// The volume's own, the emptiest first, until such a share of all that is stored is in use.
    Until(f64),
    /// The volume's own, of a volume that rests.
    Tidy,
    /// All that belong to ancestors.
    Inherited,
}

/// What is to be done.
#[derive(Default)]
pub(super) struct Chosen {
    pub(super) forgotten: Vec<u32>,
    /// Each with what is in use of it.
    pub(super) victims: VecDeque<(u32, Pointers)>,
    /// Others are worth it, too.
    pub(super) has_more: bool,
}

/// An object that may be rewritten.
struct Candidate {
    handle: u32,
    live: u64,
    blocks: u64,
    weight: f64,
}

impl Candidate {
    /// In use, 0 to 1.
    fn share(&self) -> f64 {
        self.live as f64 / self.blocks.max(1) as f64
    }

    fn weight_in_use(&self) -> f64 {
        self.weight * self.share()
    }
}

/// What an object counts for: its blocks, as these tell when a collection is due; its bytes where room is wanted, as a page takes more of it than a block that
/// was compressed well.
fn weight(which: Which, entry: &Entry) -> f64 {
    if which == Which::Tidy { entry.bytes.into() } else { entry.blocks.into() }
}

/// Which of the candidates are rewritten. Of the weight of the volume's own objects that are left when unused ones are gone, `live` of `stored` is in use.
fn victims(mut candidates: Vec<Candidate>, which: Which, live: f64, mut stored: f64) -> Vec<u32> {
    if which != Which::Inherited {
        candidates.retain(|candidate| candidate.live < candidate.blocks);
        candidates.sort_by(|one, other| one.share().total_cmp(&other.share()).then(one.handle.cmp(&other.handle)));
    }
    let mut is_below = |share: f64, candidate: &Candidate| {
        let is_below = live < share * stored;
        stored -= candidate.weight - candidate.weight_in_use();
        is_below
    };
    let is_worth_it = |candidate: &Candidate| match which {
        Which::Below(below) => candidate.share() <= below,
        Which::Until(share) => is_below(share, candidate),
        Which::Tidy => is_below(IN_USE_QUIET, candidate) || candidate.share() <= IN_USE_QUIET_OBJECT,
        Which::Inherited => true,
    };
    let count = candidates.iter().map(is_worth_it).take_while(|worth_it| *worth_it).count();
    candidates.into_iter().take(count).map(|candidate| candidate.handle).collect()
}

impl Core {
    /// What to collect now, if there may be enough garbage. A volume that rests is tidied up once.
    pub(crate) fn due_collection(&self, is_quiet: bool) -> Option<Which> {
        let stored = self.reader.table.borrow().stored_blocks();
        let garbage_max = self.garbage_max(stored);
        if is_quiet && garbage_max > 0 && (self.is_untidy() || self.untidy.get() > 0 && !self.is_tidied.get()) {
            return Some(Which::Tidy);
        }
        let is_much = garbage_max >= GARBAGE_MIN && garbage_max as f64 > (1.0 - IN_USE_BUSY) * stored as f64;
        (is_much && self.written.get() > 0).then_some(Which::Until(IN_USE_BUSY_DONE))
    }

    /// So much has changed that it is worth looking at all of the map.
    pub(super) fn is_untidy(&self) -> bool {
        let stored = self.reader.table.borrow().stored_blocks();
        self.untidy.get() > stored / TIDY_EVERY
    }

    pub(super) fn live_blocks(&self, uses: &Uses) -> u64 {
        let table = self.reader.table.borrow();
        let own = table.used().filter(|(_, entry)| entry.owner == 0 && entry.is_live());
        own.map(|(handle, entry)| uses.live_blocks(handle, entry)).sum()
    }

    pub(super) fn choose(&self, mut uses: Uses, which: Which) -> Chosen {
        let mut chosen = Chosen::default();
        let (table, hit_uses, unreadable) = (self.reader.table.borrow(), self.hit_uses.borrow(), self.unreadable.borrow());
        let (mut candidates, mut in_use, mut stored) = (Vec::new(), 0.0, 0.0);
        for (handle, entry) in table.used() {
            let is_left_alone = hit_uses.contains_key(&handle) || uses.may_be_needed(handle) || self.is_in_history(entry);
            if !is_left_alone && uses.is_unused(handle) {
                chosen.forgotten.push(handle);
                continue;
            }
            let (live, blocks) = (uses.live_blocks(handle, entry), entry.blocks.into());
            let candidate = Candidate { handle, live, blocks, weight: weight(which, entry) };
            if entry.owner == 0 && entry.is_live() {
                in_use += candidate.weight_in_use();
                stored += candidate.weight;
            }
            if !is_left_alone && entry.is_live() && uses.tracks(entry) && !unreadable.contains(&handle) {
                candidates.push(candidate);
            }
        }
        let victims = victims(candidates, which, in_use, stored);
        let worth_it = victims.len();
        chosen.victims = victims.into_iter().filter_map(|handle| Some((handle, uses.take(handle)?))).collect();
        // Of the fullest it may not be known what is in use, until others are gone.
        chosen.has_more = (1..worth_it).contains(&chosen.victims.len());
        let taken = chosen.forgotten.iter().chain(chosen.victims.iter().map(|(handle, _)| handle));
        taken.for_each(|handle| self.deduplication.retire(*handle));
        chosen
    }

    /// An opening would still read the object's header.
    fn is_in_history(&self, entry: &Entry) -> bool {
        let place = Place { epoch: entry.epoch, sequence: entry.number };
        entry.owner == 0 && entry.family == Family::Step && place >= self.keeper.root().checkpoint.place
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Of each object, blocks in use, blocks, and weight.
    fn chosen_by_weight(which: Which, objects: impl Iterator<Item = (u64, u64, f64)>) -> Vec<u32> {
        let candidate = |(handle, (live, blocks, weight))| Candidate { handle, live, blocks, weight };
        let candidates: Vec<Candidate> = (0..).zip(objects).map(candidate).collect();
        let in_use = candidates.iter().map(Candidate::weight_in_use).sum();
        let stored = candidates.iter().map(|candidate| candidate.weight).sum();
        victims(candidates, which, in_use, stored)
    }

    fn chosen(which: Which, objects: &[(u64, u64)]) -> Vec<u32> {
        chosen_by_weight(which, objects.iter().map(|(live, blocks)| (*live, *blocks, *blocks as f64)))
    }

    #[test]
    fn the_emptiest_objects_are_rewritten_until_enough_of_what_is_stored_is_in_use() {
        let objects = [(99, 100), (50, 100), (100, 100), (85, 100), (95, 100)];
        assert_eq!(chosen(Which::Until(0.80), &objects), [0; 0]);
        assert_eq!(chosen(Which::Until(0.90), &objects), [1]);
        assert_eq!(chosen(Which::Until(0.97), &objects), [1, 3]);
        assert_eq!(chosen(Which::Until(1.0), &objects), [1, 3, 4, 0]);
        assert_eq!(chosen(Which::Below(0.85), &objects), [1, 3]);
    }

    #[test]
    fn a_resting_volume_rewrites_what_has_a_tenth_of_garbage_however_little_that_is_of_all() {
        let mostly_full = [(990, 1000), (89, 100), (999, 1000), (91, 100), (1000, 1000), (1000, 1000)];
        assert_eq!(chosen(Which::Until(IN_USE_QUIET), &mostly_full), [0; 0]);
        assert_eq!(chosen(Which::Tidy, &mostly_full), [1]);
        let evenly = [(91, 100), (92, 100), (93, 100)];
        assert_eq!(chosen(Which::Tidy, &evenly), [0, 1]);
    }

    #[test]
    fn room_counts_by_bytes() {
        // Blocks that were compressed well, and pages.
        let objects = |weights: [f64; 2]| [(990, 1000, weights[0]), (96, 100, weights[1])].into_iter();
        assert_eq!(chosen_by_weight(Which::Tidy, objects([1000.0, 100.0])), [0; 0]);
        assert_eq!(chosen_by_weight(Which::Tidy, objects([50.0, 100.0])), [0; 0]);
        assert_eq!(chosen_by_weight(Which::Tidy, objects([10.0, 100.0])), [1]);
    }
}
