//! Segments, the volumes' maps, and a garbage collector, with contents instead of bytes.

use crate::BATCH_BLOCKS;
use dedup::accept::accept;
use dedup::hash::BlockHash;
use dedup::index::{BlockRecord, Candidates, Index, Plan, Search, Settings};
use dedup::location::{LengthClass, Location, SegmentHandle, Spot};
use std::collections::{BTreeMap, HashMap, HashSet};

/// What is tried.
#[derive(Clone, Copy)]
pub struct Rule {
    pub owners_max: usize,
    pub loads_max: usize,
    pub votes_min: usize,
    /// The budget of neighbourhoods, in segments.
    pub cached_segments: usize,
    pub extent_cost: u32,
    /// Whether a header tells of the hits of its batch, not only of its segment's own blocks.
    pub hits_in_headers: bool,
    pub collects: bool,
}

#[derive(Default)]
pub struct Tally {
    pub batches: u64,
    /// Distinct contents of a batch that were stored before.
    pub exact: u64,
    /// Those of them that the sparse index had a candidate for.
    pub found: u64,
    /// Those of them that were not stored again.
    pub taken: u64,
    pub loads: u64,
    pub loads_most: u64,
    /// In the headers loaded.
    pub records: u64,
    /// Blocks that the garbage collector moved.
    pub moved: u64,
}

struct Stored {
    content: u64,
    segment: u32,
    position: u32,
    references: u32,
}

struct Segment {
    /// In the order of the body: numbers of stored blocks.
    blocks: Vec<u32>,
    records: Vec<BlockRecord>,
    /// The volumes whose history it belongs to, one bit each.
    volumes: u64,
}

pub struct Store {
    rule: Rule,
    index: Index,
    stored: Vec<Stored>,
    segments: Vec<Option<Segment>>,
    /// Of each content, in how many places it is.
    present: HashMap<u64, u32>,
    volumes: Vec<BTreeMap<u64, u32>>,
    pub tally: Tally,
}

impl Store {
    pub fn new(rule: Rule) -> Self {
        let settings = Settings {
            hooks: 1 << 18,
            neighbour_bytes: rule.cached_segments * BATCH_BLOCKS * 38,
            owners_max: rule.owners_max,
            loads_max: rule.loads_max,
            votes_min: rule.votes_min,
        };
        Self {
            rule,
            index: Index::new(settings),
            stored: Vec::new(),
            segments: Vec::new(),
            present: HashMap::new(),
            volumes: Vec::new(),
            tally: Tally::default(),
        }
    }

    pub fn add_volume(&mut self) {
        self.volumes.push(BTreeMap::new());
    }

    /// One batch, in the order of addresses.
    pub fn write(&mut self, volume: usize, writes: &[(u64, Option<u64>)]) {
        let discarded: Vec<_> = writes.iter().filter(|(_, content)| content.is_none()).map(|(address, _)| *address).collect();
        let blocks: Vec<_> = writes.iter().filter_map(|(address, content)| content.map(|content| (*address, content))).collect();
        let mut number_of = HashMap::new();
        let mut contents = Vec::new();
        for (_, content) in &blocks {
            number_of.entry(*content).or_insert_with(|| {
                contents.push(*content);
                contents.len() - 1
            });
        }
        let found = self.find(&contents);
        let addresses: Vec<_> = blocks.iter().map(|(address, _)| *address).collect();
        let in_history = |segment: SegmentHandle| {
            self.segments[segment.get() as usize].as_ref().is_some_and(|segment| segment.volumes >> volume & 1 == 1)
        };
        let candidates = |index: usize| found.of(number_of[&blocks[index].1]);
        let accepted = accept(&addresses, candidates, self.rule.extent_cost, in_history);
        self.count(&contents, &found);
        self.apply(volume, &blocks, &accepted);
        discarded.into_iter().for_each(|address| self.unmap(volume, address));
    }

    fn find(&mut self, contents: &[u64]) -> Candidates {
        let hashes: Vec<_> = contents.iter().map(|content| hash(*content)).collect();
        let mut search = Search::new(&hashes);
        self.tally.batches += 1;
        loop {
            match self.index.lookup(&mut search) {
                Plan::Found(found) => return found,
                Plan::Load(load) => {
                    self.tally.loads += load.len() as u64;
                    self.tally.loads_most = self.tally.loads_most.max(load.len() as u64);
                    for handle in load {
                        if let Some(segment) = &self.segments[handle.get() as usize] {
                            let is_live = |record: &&BlockRecord| self.segments[record.location.segment.get() as usize].is_some();
                            let records: Vec<_> = segment.records.iter().filter(is_live).copied().collect();
                            self.tally.records += records.len() as u64;
                            self.index.loaded(&mut search, handle, &records);
                        }
                    }
                }
            }
        }
    }

    fn count(&mut self, contents: &[u64], found: &Candidates) {
        for (number, content) in contents.iter().enumerate() {
            let stored_before = self.present.contains_key(content);
            assert!(stored_before || found.of(number).is_empty(), "a candidate for what is not there");
            self.tally.exact += u64::from(stored_before);
            self.tally.found += u64::from(!found.of(number).is_empty());
        }
    }

    fn apply(&mut self, volume: usize, blocks: &[(u64, u64)], accepted: &[Option<Location>]) {
        let mut new: Vec<u32> = Vec::new();
        let mut placed: HashMap<u64, u32> = HashMap::new();
        let mut taken = HashSet::new();
        let mut hits = BTreeMap::new();
        let segment = self.segments.len() as u32;
        for ((address, content), hit) in blocks.iter().zip(accepted) {
            let number = match (hit, placed.get(content)) {
                (Some(hit), _) => {
                    taken.insert(*content);
                    hits.insert(*content, *hit);
                    let target = self.segments[hit.segment.get() as usize].as_ref();
                    let position = hit.spot.unit() / 64 * 4 + u32::from(hit.spot.block());
                    target.expect("candidates are of live segments").blocks[position as usize]
                }
                (None, Some(number)) => *number,
                (None, None) => {
                    let (position, number) = (new.len() as u32, self.stored.len() as u32);
                    self.stored.push(Stored { content: *content, segment, position, references: 0 });
                    new.push(number);
                    number
                }
            };
            placed.insert(*content, number);
            self.unmap(volume, *address);
            self.stored[number as usize].references += 1;
            self.volumes[volume].insert(*address, number);
        }
        let again: HashSet<_> = new.iter().map(|number| self.stored[*number as usize].content).collect();
        self.tally.taken += taken.difference(&again).count() as u64;
        let hits = hits.into_iter().filter(|_| self.rule.hits_in_headers);
        let hits = hits.map(|(content, location)| BlockRecord { hash: hash(content), location }).collect();
        self.add_segment(new, hits, 1 << volume);
    }

    fn add_segment(&mut self, blocks: Vec<u32>, hits: Vec<BlockRecord>, volumes: u64) {
        if blocks.is_empty() && hits.is_empty() {
            return;
        }
        let handle = SegmentHandle::new(self.segments.len() as u32).expect("few segments");
        for (position, block) in (0..).zip(&blocks) {
            let block = &mut self.stored[*block as usize];
            (block.segment, block.position) = (handle.get(), position);
            *self.present.entry(block.content).or_default() += 1;
        }
        let own = (0..).zip(&blocks).map(|(position, block)| record(self.stored[*block as usize].content, handle, position));
        let records: Vec<_> = own.chain(hits).collect();
        self.index.hook(handle, &records);
        self.segments.push(Some(Segment { blocks, records, volumes }));
    }

    fn unmap(&mut self, volume: usize, address: u64) {
        if let Some(number) = self.volumes[volume].remove(&address) {
            self.stored[number as usize].references -= 1;
        }
    }

    /// Rewrites the segments of which half is dead, the deadest first, survivors of all of them one after the other.
    pub fn collect(&mut self) {
        if !self.rule.collects {
            return;
        }
        let mut victims = Vec::new();
        for (number, segment) in self.segments.iter().enumerate() {
            let Some(segment) = segment else { continue };
            if segment.blocks.is_empty() {
                continue;
            }
            let live = segment.blocks.iter().filter(|block| self.stored[**block as usize].references > 0).count();
            if live * 2 < segment.blocks.len() {
                victims.push((live * 1000 / segment.blocks.len(), number));
            }
        }
        victims.sort_unstable();
        let (mut survivors, mut volumes) = (Vec::new(), 0);
        for (_, number) in victims {
            let segment = self.segments[number].take().expect("a victim is there");
            self.index.unhook(SegmentHandle::new(number as u32).expect("few segments"));
            for block in &segment.blocks {
                let content = self.stored[*block as usize].content;
                let places = self.present.get_mut(&content).expect("it was stored");
                *places -= 1;
                if *places == 0 {
                    self.present.remove(&content);
                }
            }
            volumes |= segment.volumes;
            let before = survivors.len();
            survivors.extend(segment.blocks.iter().copied().filter(|block| self.stored[*block as usize].references > 0));
            self.tally.moved += (survivors.len() - before) as u64;
            while survivors.len() >= BATCH_BLOCKS {
                let rest = survivors.split_off(BATCH_BLOCKS);
                self.add_segment(std::mem::replace(&mut survivors, rest), Vec::new(), volumes);
                volumes = segment.volumes;
            }
        }
        self.add_segment(survivors, Vec::new(), volumes);
    }

    /// Blocks in segments, dead ones included.
    pub fn stored_blocks(&self) -> usize {
        self.segments.iter().flatten().map(|segment| segment.blocks.len()).sum()
    }

    /// Runs of blocks that lie in a volume and in a segment one after the other, for each GiB that is mapped.
    pub fn extents_per_gib(&self) -> f64 {
        let (mut extents, mut blocks) = (0, 0);
        for volume in &self.volumes {
            let mut before: Option<(u64, u32, u32)> = None;
            for (address, number) in volume {
                let stored = &self.stored[*number as usize];
                let here = (*address, stored.segment, stored.position);
                let continues = before.is_some_and(|(address, segment, position)| (address + 1, segment, position + 1) == here);
                extents += u64::from(!continues);
                blocks += 1;
                before = Some(here);
            }
        }
        extents as f64 / (blocks as f64 / 262_144.0)
    }
}

fn hash(content: u64) -> BlockHash {
    let mut random = crate::Random(content);
    BlockHash((u128::from(random.draw()) << 64 | u128::from(random.draw())).to_le_bytes())
}

fn record(content: u64, segment: SegmentHandle, position: u32) -> BlockRecord {
    let spot = Spot::new(position / 4 * 64, (position % 4) as u8, LengthClass(63)).expect("a segment has 8192 blocks");
    BlockRecord { hash: hash(content), location: Location { segment, spot } }
}
