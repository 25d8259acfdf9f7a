use super::*;
use crate::names::Family;
use crate::object::header_len;
use crate::segment::Link;
use dedup::body::FrameReader;
use dedup::frame::Compression;
use dedup::index::{BlockRecord, Index, Plan, Search, Settings};
use dedup::location::UNIT_LEN;
use proptest::prelude::*;
use std::collections::BTreeMap;

const GROUP: [u8; 16] = [1; 16];
/// Where the segment before this volume's is: another group's.
const PARENT: [u8; 16] = [2; 16];
const PACKING: Packing = Packing { compression: Compression::Lz4, frame_blocks: 4 };

/// What was published, by handle, and what its blocks should be.
struct World {
    secrets: Secrets,
    index: Index,
    published: Vec<Sealed>,
    expected: BTreeMap<u64, Option<Block>>,
}

impl World {
    fn new() -> World {
        let settings = Settings { hooks: 4096, neighbour_bytes: 1 << 20, owners_max: 2, loads_max: 8, votes_min: 1 };
        World {
            secrets: Secrets { pool_key: [3; 32], data_key: Some([4; 32]) },
            index: Index::new(settings),
            published: Vec::new(),
            expected: BTreeMap::new(),
        }
    }

    fn ingredients(&mut self, runs: Vec<(Range<u64>, Option<Vec<Block>>)>) -> Ingredients {
        for (range, blocks) in &runs {
            let contents = (0..).map(|index| blocks.as_ref().map(|blocks: &Vec<Block>| blocks[index]));
            self.expected.extend(range.clone().zip(contents));
        }
        let content = |blocks: Option<Vec<Block>>| match blocks {
            Some(blocks) => RunContent::Data(blocks.concat().into()),
            None => RunContent::Discarded,
        };
        Ingredients {
            group: GROUP,
            domain: GROUP,
            place: Place { epoch: 1, sequence: self.published.len() as u64 },
            secrets: self.secrets.clone(),
            packing: PACKING,
            random: [5; 32],
            step: StepHeader { nonce: 6, ..StepHeader::default() },
            runs: runs.into_iter().map(|(range, blocks)| (range, content(blocks))).collect(),
        }
    }

    /// All that a header tells the index.
    fn records(&self, number: usize) -> Vec<BlockRecord> {
        let step = &self.published[number].segment.step;
        let own = step.stored.iter().map(|(hash, spot)| (*hash, number, *spot));
        let elsewhere = step.hits.iter().map(|hit| (hit.hash, self.number_of(step.sources[hit.source as usize]), hit.spot));
        let location = |number: usize, spot| Location { segment: SegmentHandle::new(number as u32).unwrap(), spot };
        own.chain(elsewhere).map(|(hash, number, spot)| BlockRecord { hash, location: location(number, spot) }).collect()
    }

    fn number_of(&self, source: Source) -> usize {
        self.published.iter().position(|sealed| sealed.segment.source == source).expect("a source that was published")
    }

    fn find(&mut self, hashed: &Hashed) -> Candidates {
        let mut search = Search::new(hashed.distinct());
        loop {
            match self.index.lookup(&mut search) {
                Plan::Found(found) => return found,
                Plan::Load(load) => load.iter().for_each(|segment| {
                    let records = self.records(segment.get() as usize);
                    self.index.loaded(&mut search, *segment, &records);
                }),
            }
        }
    }

    /// One step through both parts; `is_known` says which handles the engine still knows.
    fn publish(&mut self, runs: Vec<(Range<u64>, Option<Vec<Block>>)>, is_known: impl Fn(u32) -> bool) {
        let hashed = hash_step(self.ingredients(runs));
        let candidates = self.find(&hashed);
        let known = candidates.segments().into_iter().filter(|segment| is_known(segment.get()));
        let target = |segment: SegmentHandle| {
            let source = self.published[segment.get() as usize].segment.source;
            Target { source }
        };
        let targets = known.map(|segment| (segment, target(segment))).collect();
        let sealed = make_segment(hashed, Some(Duplicates { candidates, targets })).unwrap();
        self.published.push(sealed);
        let number = self.published.len() - 1;
        self.index.hook(SegmentHandle::new(number as u32).unwrap(), &self.records(number));
    }

    /// Opens every header anew, and reads every block through what they say.
    fn check(&self) {
        let mut map = BTreeMap::new();
        for sealed in &self.published {
            let source = sealed.segment.source;
            let link = segment::decode(&sealed.header, &self.secrets.sealer(source.group), source).unwrap();
            let Link::Step(read) = link else { panic!("a seal") };
            assert_eq!((&read.step, header_len(&sealed.header)), (&sealed.segment.step, Some(sealed.header.len())));
            let mut spots = read.step.spots.iter();
            for extent in &read.step.extents {
                for block in extent.first..extent.first + u64::from(extent.blocks) {
                    let place = match extent.kind {
                        ExtentKind::Data => Some((source, *spots.next().unwrap())),
                        ExtentKind::Hit { source } => Some((read.step.sources[source as usize], *spots.next().unwrap())),
                        ExtentKind::Zero | ExtentKind::Discarded => None,
                    };
                    map.insert(block, place);
                }
            }
        }
        let mut reader = FrameReader::default();
        for (block, expected) in &self.expected {
            let mut found = [0; BLOCK_LEN];
            if let Some((source, spot)) = map[block] {
                let sealed = &self.published[self.number_of(source)];
                let frame = &sealed.body[spot.unit() as usize * UNIT_LEN..];
                reader.read_block(&sealed.segment.opened.opener, spot, frame, &mut found).unwrap();
            }
            assert_eq!(found, expected.unwrap_or([0; BLOCK_LEN]), "block {block}");
        }
    }
}

/// Content number `seed`; 0 is zeroes.
fn content(seed: u64) -> Block {
    std::array::from_fn(|at| if seed == 0 || at >= 2048 { 0 } else { (seed >> (at % 8 * 8)) as u8 ^ (at / 8) as u8 })
}

fn run(first: u64, seeds: Range<u64>) -> (Range<u64>, Option<Vec<Block>>) {
    (first..first + seeds.end - seeds.start, Some(seeds.map(content).collect()))
}

#[test]
fn a_copy_is_hits_on_sources_that_last() {
    let mut world = World::new();
    world.publish(vec![run(0, 1..301)], |_| true);
    // The parent's object: the same bytes as if another group had written them.
    world.published[0].segment.source = Source { group: PARENT, family: Family::Gathered, epoch: 9, number: 8 };
    world.publish(vec![run(1000, 1..301), run(2000, 500..600)], |_| true);
    let step = &world.published[1].segment.step;
    assert_eq!(step.sources, [world.published[0].segment.source]);
    assert_eq!((step.extents[0].kind, step.extents[0].blocks), (ExtentKind::Hit { source: 0 }, 300));
    assert_eq!((step.stored.len(), step.hits.len(), step.spots.len()), (100, 300, 400));
}

#[test]
fn what_is_not_known_any_more_is_no_hit() {
    let mut world = World::new();
    world.publish(vec![run(0, 1..301)], |_| true);
    world.publish(vec![run(1000, 1..301)], |_| false);
    let step = &world.published[1].segment.step;
    assert_eq!((step.stored.len(), step.hits.len(), step.sources.len()), (300, 0, 0));
    world.check();
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(40))]

    #[test]
    fn steps_with_hits_read_back(
        steps in prop::collection::vec(
            (prop::collection::vec((0_u64..200, prop::option::weighted(0.9, 0_u64..150), 1_u64..90), 1..5), any::<u8>()),
            1..7,
        ),
    ) {
        let mut world = World::new();
        for (runs, unknown) in steps {
            let mut free = 0;
            let runs = runs.into_iter().map(|(gap, seed, len)| {
                let first = free + gap;
                free = first + len;
                match seed {
                    Some(seed) => run(first, seed..seed + len),
                    None => (first..free, None),
                }
            });
            let runs = runs.collect();
            world.publish(runs, |handle| unknown >> (handle % 8) & 1 == 0);
        }
        world.check();
    }
}
