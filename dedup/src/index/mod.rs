//! The deduplication index: sparse, with locality.
//!
//! ```text
//!   hashes of a batch ─▶ hooks (1 in 64, pinned) ─▶ segments, those that most hooks agree on first ─▶ "load their headers"
//!                    └─▶ neighbours (all hashes of the headers loaded lately) ─▶ candidates
//! ```
//!
//! Blocks that were written together are written together again, so one hook in common leads to the rest of the neighbourhood: 48 MiB of
//! pinned memory for a TiB of unique blocks instead of some GiB. What was written together is in one header, even where most of
//! it was found elsewhere: a header tells of its segment's own blocks and of the hits of its batch, and the hooks of both lead to it.
//!
//! - The index does no I/O: it asks for segments, the caller hands their records in ([`Index::loaded`]) and looks up again.
//! - Loads per batch are bounded, and asked for all at once. A segment that cannot be loaded is left out.
//! - A segment is compared with the batch as it is loaded, so a batch may need more segments than the cache holds.
//! - It is lossy and rebuilt from headers: losing an entry costs ratio, never data. A candidate is always proposed with its full hash.
//! - After [`Index::unhook`] a segment is never proposed again, unless its handle is given to another one ([`Index::hook`]).

mod hooks;
mod neighbours;

pub use hooks::{ENTRY_LEN, SAMPLING, is_hook};
pub use neighbours::BlockRecord;

use crate::hash::BlockHash;
use crate::location::{Location, SegmentHandle};
use hashbrown::HashTable;
use hooks::Hooks;
use neighbours::Neighbours;
use std::collections::{BTreeSet, HashMap, HashSet};

/// Entries of gone segments are looked for all at once when this many segments are gone.
const GONE_MAX: usize = 4096;
/// Places in cached headers proposed for one hash, so that a content stored everywhere costs no more than others.
const CANDIDATES_MAX: usize = 16;

/// What an index may take.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Settings {
    /// Hooks, 12 bytes each: one for every 64 unique blocks to be found again.
    pub hooks: usize,
    /// Bytes for the records of loaded segments.
    pub neighbour_bytes: usize,
    /// Segments remembered for a hook that several hold.
    pub owners_max: usize,
    /// Segments loaded for a batch.
    pub loads_max: usize,
    /// Hooks of a batch that must agree on a segment before it is loaded.
    pub votes_min: usize,
}

impl Settings {
    /// For this many bytes of unique blocks: 48 MiB of hooks per TiB.
    #[must_use]
    pub fn for_unique_bytes(bytes: u64) -> Self {
        let hooks = usize::try_from(bytes / (crate::BLOCK_LEN as u64 * SAMPLING)).unwrap_or(usize::MAX);
        Self { hooks, neighbour_bytes: 64 << 20, owners_max: 1, loads_max: 32, votes_min: 1 }
    }
}

/// The lookup of one batch. Made anew for each batch; an index looks up one batch after the other.
pub struct Search<'a> {
    hashes: &'a [BlockHash],
    /// Places in `hashes`, by hash.
    places: HashTable<u32>,
    /// Which hash was found where.
    found: Vec<(u32, Location)>,
    /// For each segment asked for, the hooks that named it.
    wanted: HashMap<SegmentHandle, Vec<u32>>,
    planned: bool,
}

impl<'a> Search<'a> {
    /// For the distinct hashes of a batch.
    #[must_use]
    pub fn new(hashes: &'a [BlockHash]) -> Self {
        let mut places = HashTable::with_capacity(hashes.len());
        for (index, hash) in (0..).zip(hashes) {
            places.insert_unique(hash.word(), index, |index: &u32| hashes[*index as usize].word());
        }
        Self { hashes, places, found: Vec::new(), wanted: HashMap::new(), planned: false }
    }

    /// Notes which hashes this header knows of.
    fn compare(&mut self, records: &[BlockRecord]) {
        for record in records {
            let is_it = |index: &u32| self.hashes[*index as usize] == record.hash;
            if let Some(index) = self.places.find(record.hash.word(), is_it) {
                self.found.push((*index, record.location));
            }
        }
    }

    /// What was found, but for segments that are not to be used.
    fn candidates(&self, withdrawn: &HashSet<SegmentHandle>) -> Candidates {
        let mut found: Vec<_> = self.found.iter().filter(|(_, one)| !withdrawn.contains(&one.segment)).collect();
        found.sort_unstable();
        found.dedup();
        let mut candidates = Candidates { all: Vec::with_capacity(found.len()), ends: Vec::with_capacity(self.hashes.len()) };
        let mut found = found.into_iter().peekable();
        for index in 0..self.hashes.len() as u32 {
            while let Some((_, location)) = found.next_if(|(of, _)| *of == index) {
                candidates.all.push(*location);
            }
            candidates.ends.push(candidates.all.len() as u32);
        }
        candidates
    }
}

/// For each hash looked up, where it might be found.
#[derive(Default)]
pub struct Candidates {
    all: Vec<Location>,
    ends: Vec<u32>,
}

impl Candidates {
    /// Those of hash number `index`, in no order.
    #[must_use]
    pub fn of(&self, index: usize) -> &[Location] {
        let start = index.checked_sub(1).map_or(0, |before| self.ends[before] as usize);
        &self.all[start..self.ends[index] as usize]
    }

    /// The segments they are in, each once, in ascending order.
    #[must_use]
    pub fn segments(&self) -> Vec<SegmentHandle> {
        let mut segments: Vec<_> = self.all.iter().map(|location| location.segment).collect();
        segments.sort_unstable();
        segments.dedup();
        segments
    }

    /// Forgets those in segments that are not to be kept.
    pub fn retain(&mut self, mut keep: impl FnMut(SegmentHandle) -> bool) {
        let (mut kept, mut start) = (Vec::with_capacity(self.all.len()), 0);
        for end in &mut self.ends {
            kept.extend(self.all[start..*end as usize].iter().filter(|location| keep(location.segment)));
            start = std::mem::replace(end, kept.len() as u32) as usize;
        }
        self.all = kept;
    }

    /// Hashes looked up.
    #[must_use]
    pub fn len(&self) -> usize {
        self.ends.len()
    }

    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.ends.is_empty()
    }
}

/// The outcome of a lookup.
pub enum Plan {
    /// Hand these segments' records in, or say that it failed, and look up again. Never empty.
    Load(Vec<SegmentHandle>),
    /// As good as it gets.
    Found(Candidates),
}

/// The index of one dedup domain.
pub struct Index {
    settings: Settings,
    hooks: Hooks,
    neighbours: Neighbours,
    /// Unhooked, and perhaps still in hooks.
    gone: HashSet<SegmentHandle>,
    /// Asked for by the last plan, and not unhooked since.
    awaited: HashSet<SegmentHandle>,
    /// Unhooked since the present search began.
    withdrawn: HashSet<SegmentHandle>,
}

impl Index {
    #[must_use]
    pub fn new(settings: Settings) -> Self {
        Self {
            hooks: Hooks::new(settings.hooks),
            neighbours: Neighbours::new(settings.neighbour_bytes),
            gone: HashSet::new(),
            awaited: HashSet::new(),
            withdrawn: HashSet::new(),
            settings,
        }
    }

    /// Looks up the hashes of a batch. With the same `search`, the second call at the latest gives [`Plan::Found`].
    pub fn lookup(&mut self, search: &mut Search<'_>) -> Plan {
        if !search.planned {
            search.planned = true;
            self.withdrawn.clear();
            self.match_neighbours(search);
            let load = self.plan(search);
            self.awaited = load.iter().copied().collect();
            if !load.is_empty() {
                return Plan::Load(load);
            }
        }
        Plan::Found(search.candidates(&self.withdrawn))
    }

    /// Takes in the header of a segment that the last plan asked for: its own blocks, and the blocks that were hits when it was written, as
    /// far as they are still where it says. A hit on a segment that is retired since must be left out: its handle may be another's by now.
    ///
    /// A header that was not asked for is ignored, and so is one of a segment that was unhooked meanwhile. What is found in it stays found
    /// even if the next ones push it out of the cache.
    pub fn loaded(&mut self, search: &mut Search<'_>, segment: SegmentHandle, records: &[BlockRecord]) {
        if !self.awaited.remove(&segment) {
            return;
        }
        let before = search.found.len();
        search.compare(records);
        let confirmed: HashSet<_> = search.found[before..].iter().map(|(index, _)| *index).collect();
        for hook in search.wanted.get(&segment).into_iter().flatten() {
            let hash = &search.hashes[*hook as usize];
            if confirmed.contains(hook) {
                self.hooks.useful(hash, segment);
            } else {
                self.hooks.remove(hash, segment);
            }
        }
        self.neighbours.insert(segment, records);
    }

    /// Notes a segment that is durable: one just written or, at start, one found. `records` are as for [`Self::loaded`]. Its handle may have
    /// been another segment's before.
    pub fn hook(&mut self, segment: SegmentHandle, records: &[BlockRecord]) {
        self.withdraw(segment);
        self.gone.remove(&segment);
        for record in records.iter().filter(|record| is_hook(&record.hash)) {
            self.hooks.insert(&record.hash, segment, self.settings.owners_max);
        }
    }

    /// Forgets a segment that is retired, or whose content failed a check. Its hooks go as they are met.
    pub fn unhook(&mut self, segment: SegmentHandle) {
        self.withdraw(segment);
        self.gone.insert(segment);
        if self.gone.len() > GONE_MAX {
            self.hooks.sweep(|segment| self.gone.contains(&segment));
            self.gone.clear();
        }
    }

    /// Sees to it that nothing known of this handle is proposed.
    fn withdraw(&mut self, segment: SegmentHandle) {
        self.neighbours.withdraw(segment);
        self.awaited.remove(&segment);
        self.withdrawn.insert(segment);
    }

    /// Bytes of pinned memory: what does not depend on use.
    #[must_use]
    pub fn pinned_bytes(&self) -> usize {
        self.hooks.memory()
    }

    /// Hooks in use, and records cached.
    #[must_use]
    pub fn len(&self) -> (usize, usize) {
        (self.hooks.len(), self.neighbours.len())
    }

    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == (0, 0)
    }

    /// Finds what the cached segments hold.
    fn match_neighbours(&mut self, search: &mut Search<'_>) {
        let mut useful = BTreeSet::new();
        for (index, hash) in (0..).zip(search.hashes) {
            for (header, location) in self.neighbours.find(*hash).take(CANDIDATES_MAX) {
                useful.insert(header);
                search.found.push((index, location));
            }
        }
        useful.into_iter().for_each(|segment| self.neighbours.touch(segment));
    }

    /// Chooses segments to load: again and again the one that explains most of the hooks not explained yet.
    fn plan(&mut self, search: &mut Search<'_>) -> Vec<SegmentHandle> {
        let known: HashSet<_> = search.found.iter().map(|(index, _)| *index).collect();
        let mut hooks_of: HashMap<SegmentHandle, Vec<u32>> = HashMap::new();
        let mut owners = Vec::new();
        let hooks = (0..).zip(search.hashes).filter(|(index, hash)| is_hook(hash) && !known.contains(index));
        for (index, hash) in hooks {
            self.owners(hash, &mut owners);
            for owner in &owners {
                if self.neighbours.contains(*owner) {
                    self.hooks.remove(hash, *owner);
                } else {
                    hooks_of.entry(*owner).or_default().push(index);
                }
            }
        }
        let mut explained = HashSet::new();
        let mut load = Vec::new();
        while load.len() < self.settings.loads_max {
            // Ties go to the newest handle, so that the choice is the same in every run.
            let votes = |hooks: &Vec<u32>| hooks.iter().filter(|hook| !explained.contains(*hook)).count();
            let best = hooks_of.iter().map(|(segment, hooks)| (votes(hooks), *segment)).max();
            let Some((_, segment)) = best.filter(|(votes, _)| *votes >= self.settings.votes_min.max(1)) else { break };
            let hooks = hooks_of.remove(&segment).unwrap_or_default();
            explained.extend(hooks.iter().copied());
            search.wanted.insert(segment, hooks);
            load.push(segment);
        }
        load
    }

    /// The segments noted for a hook. Those that are gone are forgotten on the way.
    fn owners(&mut self, hash: &BlockHash, owners: &mut Vec<SegmentHandle>) {
        owners.clear();
        self.hooks.visit(hash, |owner| owners.push(owner));
        owners.retain(|owner| {
            let gone = self.gone.contains(owner);
            if gone {
                self.hooks.remove(hash, *owner);
            }
            !gone
        });
    }
}

#[cfg(test)]
mod tests;
