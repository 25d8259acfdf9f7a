//! The pinned part of the index: for one block hash in 64, which segments hold it.
//!
//! ```text
//!   hash: 6 low bits zero? ─ no ─▶ not a hook
//!            │ yes
//!   bytes 1..5 choose one bucket, bytes 4..8 another one;  bytes 8..16 = tag
//!   bucket: 8 × tag u64, 8 × (state 2 bits │ segment handle 30 bits)       12 bytes per entry
//! ```
//!
//! - The table never grows. A full pair of buckets loses its least used entry.
//! - An entry is a hint: it may name a segment that is gone, or one that never held the block.

use crate::hash::BlockHash;
use crate::location::SegmentHandle;

/// One hash in this many is a hook.
pub const SAMPLING: u64 = 64;
/// Bytes of pinned memory for an entry.
pub const ENTRY_LEN: usize = 12;

const WAYS: usize = 8;
const STATE_SHIFT: u32 = 30;
/// States: empty, fresh, and two degrees of having been useful.
const FRESH: u32 = 1;
const STATE_MAX: u32 = 3;

/// Whether a block of this hash has an entry in the index.
#[must_use]
pub fn is_hook(hash: &BlockHash) -> bool {
    u64::from(hash.0[0]).is_multiple_of(SAMPLING)
}

pub(super) struct Hooks {
    tags: Vec<u64>,
    /// State and handle; 0 is empty.
    owners: Vec<u32>,
    buckets: u32,
    /// Where the search for a victim begins, so that equals take turns.
    hand: usize,
    len: usize,
}

impl Hooks {
    /// Room for about `entries` of them.
    pub fn new(entries: usize) -> Self {
        let buckets = u32::try_from(entries.div_ceil(WAYS).max(1)).unwrap_or(u32::MAX);
        let slots = buckets as usize * WAYS;
        Self { tags: vec![0; slots], owners: vec![0; slots], buckets, hand: 0, len: 0 }
    }

    /// Entries in use.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Bytes.
    pub fn memory(&self) -> usize {
        self.tags.len() * ENTRY_LEN
    }

    /// Calls `visit` with every segment noted for this hook.
    pub fn visit(&self, hash: &BlockHash, mut visit: impl FnMut(SegmentHandle)) {
        let tag = hash.word();
        for slot in self.slots(hash) {
            if self.tags[slot] == tag && self.owners[slot] != 0 {
                visit(SegmentHandle::from_low_bits(self.owners[slot]));
            }
        }
    }

    /// Notes that the segment holds the block of this hook. Of more than `owners_max` segments the least useful is forgotten.
    pub fn insert(&mut self, hash: &BlockHash, segment: SegmentHandle, owners_max: usize) {
        let tag = hash.word();
        let (mut owners, mut weakest) = (0, None);
        for slot in self.slots(hash) {
            if self.tags[slot] != tag || self.owners[slot] == 0 {
                continue;
            }
            if SegmentHandle::from_low_bits(self.owners[slot]) == segment {
                return;
            }
            owners += 1;
            let state = self.owners[slot] >> STATE_SHIFT;
            if weakest.is_none_or(|(least, _)| state < least) {
                weakest = Some((state, slot));
            }
        }
        let slot = match weakest {
            Some((_, slot)) if owners >= owners_max => slot,
            _ => self.victim(hash),
        };
        self.len += usize::from(self.owners[slot] == 0);
        self.tags[slot] = tag;
        self.owners[slot] = FRESH << STATE_SHIFT | segment.get();
    }

    /// Notes that the entry led to duplicates.
    pub fn useful(&mut self, hash: &BlockHash, segment: SegmentHandle) {
        if let Some(slot) = self.find(hash, segment) {
            let state = (self.owners[slot] >> STATE_SHIFT) + 1;
            self.owners[slot] = state.min(STATE_MAX) << STATE_SHIFT | segment.get();
        }
    }

    pub fn remove(&mut self, hash: &BlockHash, segment: SegmentHandle) {
        if let Some(slot) = self.find(hash, segment) {
            self.owners[slot] = 0;
            self.len -= 1;
        }
    }

    /// Removes all entries of the segments that `is_gone` names.
    pub fn sweep(&mut self, is_gone: impl Fn(SegmentHandle) -> bool) {
        for owner in &mut self.owners {
            if *owner != 0 && is_gone(SegmentHandle::from_low_bits(*owner)) {
                *owner = 0;
                self.len -= 1;
            }
        }
    }

    fn find(&self, hash: &BlockHash, segment: SegmentHandle) -> Option<usize> {
        let is_it = |owner: u32| owner != 0 && SegmentHandle::from_low_bits(owner) == segment;
        self.slots(hash).find(|slot| self.tags[*slot] == hash.word() && is_it(self.owners[*slot]))
    }

    /// An empty slot of the emptier bucket, or the least useful one. The others then lose a degree, so that no use counts for ever.
    fn victim(&mut self, hash: &BlockHash) -> usize {
        let [first, second] = self.buckets_of(hash);
        let room = |bucket: usize| self.owners[bucket..bucket + WAYS].iter().filter(|owner| **owner == 0).count();
        let bucket = if room(second) > room(first) { second } else { first };
        if let Some(slot) = (bucket..bucket + WAYS).find(|slot| self.owners[*slot] == 0) {
            return slot;
        }
        let hand = self.hand;
        self.hand = hand.wrapping_add(1);
        let turned = |way: usize| hand.wrapping_add(way) % (2 * WAYS);
        let slot_of = |way: usize| if way < WAYS { first + way } else { second + way - WAYS };
        let slots: [usize; 2 * WAYS] = std::array::from_fn(|way| slot_of(turned(way)));
        let victim = slots.into_iter().min_by_key(|slot| self.owners[*slot] >> STATE_SHIFT).unwrap_or(first);
        if self.owners[victim] >> STATE_SHIFT > FRESH {
            for slot in slots {
                let state = (self.owners[slot] >> STATE_SHIFT).saturating_sub(1).max(FRESH);
                self.owners[slot] = state << STATE_SHIFT | SegmentHandle::from_low_bits(self.owners[slot]).get();
            }
        }
        victim
    }

    /// The slots of both buckets; those of one bucket if they are the same.
    fn slots(&self, hash: &BlockHash) -> impl Iterator<Item = usize> + use<> {
        let [first, second] = self.buckets_of(hash);
        let again = if first == second { 0 } else { WAYS };
        (first..first + WAYS).chain(second..second + again)
    }

    /// The first slots of both buckets.
    fn buckets_of(&self, hash: &BlockHash) -> [usize; 2] {
        let word = u128::from_le_bytes(hash.0) as u64;
        [(word >> 8) as u32, (word >> 32) as u32].map(|part| {
            let bucket = (u64::from(part) * u64::from(self.buckets)) >> 32;
            bucket as usize * WAYS
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::samples;

    fn hook(state: &mut u64) -> BlockHash {
        let word = u128::from(samples::next(state)) << 64 | u128::from(samples::next(state));
        BlockHash((word & !63).to_le_bytes())
    }

    fn segment(number: u32) -> SegmentHandle {
        SegmentHandle::new(number).unwrap()
    }

    fn owners(hooks: &Hooks, hash: &BlockHash) -> Vec<u32> {
        let mut owners = Vec::new();
        hooks.visit(hash, |segment| owners.push(segment.get()));
        owners.sort_unstable();
        owners
    }

    #[test]
    fn one_hash_in_64_is_a_hook() {
        let count = (0..=u8::MAX).filter(|byte| is_hook(&BlockHash([*byte; 16]))).count();
        assert_eq!(count, 4);
    }

    #[test]
    fn a_table_filled_to_its_size_keeps_nearly_all() {
        let mut hooks = Hooks::new(8192);
        assert_eq!(hooks.memory(), 8192 * 12);
        let mut state = 1;
        let hashes: Vec<_> = (0..8192).map(|_| hook(&mut state)).collect();
        (0..).zip(&hashes).for_each(|(number, hash)| hooks.insert(hash, segment(number), 1));
        let kept = (0..).zip(&hashes).filter(|(number, hash)| owners(&hooks, hash) == [*number]).count();
        assert!(kept > 8192 * 95 / 100, "{kept}");
        assert_eq!(kept, hooks.len());
    }

    #[test]
    fn a_full_table_stays_its_size_and_keeps_what_was_useful() {
        let mut hooks = Hooks::new(1024);
        let mut state = 2;
        let useful: Vec<_> = (0..100).map(|_| hook(&mut state)).collect();
        for hash in &useful {
            hooks.insert(hash, segment(7), 1);
            hooks.useful(hash, segment(7));
        }
        for _ in 0..4000 {
            hooks.insert(&hook(&mut state), segment(8), 1);
        }
        assert_eq!((hooks.memory(), hooks.len()), (1024 * 12, 1024));
        let kept = useful.iter().filter(|hash| owners(&hooks, hash) == [7]).count();
        assert!(kept >= 95, "{kept}");
    }

    #[test]
    fn a_hook_has_a_few_owners_at_most() {
        let mut hooks = Hooks::new(64);
        let hash = hook(&mut 3);
        for (number, expected) in [(1, vec![1]), (2, vec![1, 2]), (2, vec![1, 2])] {
            hooks.insert(&hash, segment(number), 2);
            assert_eq!(owners(&hooks, &hash), expected);
        }
        hooks.useful(&hash, segment(1));
        hooks.insert(&hash, segment(3), 2);
        assert_eq!(owners(&hooks, &hash), [1, 3]);
        hooks.remove(&hash, segment(1));
        hooks.remove(&hash, segment(1));
        assert_eq!((owners(&hooks, &hash), hooks.len()), (vec![3], 1));
        hooks.sweep(|gone| gone == segment(3));
        assert_eq!((owners(&hooks, &hash), hooks.len()), (vec![], 0));
    }

    #[test]
    fn a_table_of_one_bucket_works() {
        let mut hooks = Hooks::new(0);
        let mut state = 4;
        (0..100).for_each(|number| hooks.insert(&hook(&mut state), segment(number), 1));
        assert_eq!(hooks.len(), 8);
    }
}
