use super::*;
use crate::accept::EXTENT_COST;
use crate::body::FrameReader;
use crate::frame::Compression;
use crate::hash::Domain;
use crate::index::{Index, Plan, Search, Settings};
use crate::location::UNIT_LEN;
use crate::samples;
use crate::seal::{Opener, Sealed, Sealer};
use proptest::prelude::*;
use std::collections::HashMap;

const KEY: [u8; 32] = [1; 32];
const DOMAIN: Domain = Domain([2; 16]);
const PACKING: Packing = Packing { compression: Compression::Zstd { level: 1 }, frame_blocks: 4 };
const LEN_MAX: usize = 32 << 20;

/// Segments that were written, and a volume of a few blocks that refers to them.
struct World {
    hasher: Hasher,
    sealer: Sealer,
    index: Index,
    packer: Packer,
    segments: HashMap<SegmentHandle, (Opener, Sealed, Vec<BlockRecord>)>,
    volume: HashMap<u64, Place>,
}

impl World {
    fn new() -> Self {
        let settings = Settings { hooks: 1024, neighbour_bytes: 1 << 20, owners_max: 2, loads_max: 8, votes_min: 1 };
        Self {
            hasher: Hasher::new(&KEY, DOMAIN),
            sealer: Sealer::encrypting(DOMAIN, &KEY),
            index: Index::new(settings),
            packer: Packer::default(),
            segments: HashMap::new(),
            volume: HashMap::new(),
        }
    }

    fn find(&mut self, hashes: &Hashes) -> Candidates {
        let mut search = Search::new(hashes.distinct());
        loop {
            match self.index.lookup(&mut search) {
                Plan::Found(found) => return found,
                Plan::Load(load) => {
                    load.iter().for_each(|segment| self.index.loaded(&mut search, *segment, &self.segments[segment].2));
                }
            }
        }
    }

    /// Destages all of it, in as many segments as it takes: what was packed into each.
    fn write(&mut self, blocks: &[(u64, Block)], len_max: usize) -> Vec<Packed> {
        let (mut done, mut all) = (0, Vec::new());
        while done < blocks.len() {
            let hashes = hash_blocks(&self.hasher, blocks[done..].iter().map(|(_, block)| block));
            let found = self.find(&hashes);
            let batch = Batch::with(hashes, numbered(&blocks[done..]));
            let mut hits = batch.accept(&found, EXTENT_COST, |_| false);
            let before = hits.count();
            let verified = batch.verify(&mut hits, |location, out| self.read(location, out));
            assert_eq!(verified, Verified { equal: before, ..Verified::default() });
            let mut body = Body::new(len_max);
            let packed = self.packer.pack(&batch, &hits, PACKING, &mut body);
            assert!(packed.taken > 0 && body.len() <= len_max);
            self.commit(&blocks[done..done + packed.taken], &packed, body);
            done += packed.taken;
            all.push(packed);
        }
        all
    }

    fn commit(&mut self, blocks: &[(u64, Block)], packed: &Packed, body: Body) {
        let number = self.segments.len() as u32;
        let segment = SegmentHandle::new(number).unwrap();
        let spots: Vec<_> = packed.stored.iter().map(|(_, spot)| *spot).collect();
        for ((address, _), place) in blocks.iter().zip(&packed.places) {
            let place = match *place {
                Place::New { frame, block } => {
                    let spot = body.frames()[frame as usize].spot(block).unwrap();
                    assert!(spots.contains(&spot));
                    Place::Hit(Location { segment, spot })
                }
                other => other,
            };
            self.volume.insert(*address, place);
        }
        let id = number.to_le_bytes();
        let sealed = self.sealer.seal(&id, &[0; 32], b"header", body).unwrap();
        let opener = self.sealer.opener(&id, &sealed.seal).unwrap();
        let records = packed.records(segment);
        self.index.hook(segment, &records);
        self.segments.insert(segment, (opener, sealed, records));
    }

    fn read(&self, location: Location, out: &mut Block) -> Result<(), crate::body::ReadError> {
        let (opener, sealed, _) = &self.segments[&location.segment];
        let start = location.spot.unit() as usize * UNIT_LEN;
        let end = (start + location.spot.class().bytes()).min(sealed.body.len());
        FrameReader::default().read_block(opener, location.spot, &sealed.body[start..end], out)
    }

    fn check(&self, expected: &HashMap<u64, Block>) {
        for (address, content) in expected {
            let mut block = [0; BLOCK_LEN];
            match self.volume[address] {
                Place::Hit(location) => self.read(location, &mut block).unwrap(),
                Place::Zero => {}
                Place::New { .. } => unreachable!("resolved when it was committed"),
            }
            assert_eq!(block, *content, "block {address}");
        }
    }
}

fn numbered(blocks: &[(u64, Block)]) -> impl Iterator<Item = (u64, &Block)> {
    blocks.iter().map(|(address, block)| (*address, block))
}

fn texts(addresses: std::ops::Range<u64>, seed: u64) -> Vec<(u64, Block)> {
    addresses.map(|address| (address, samples::text(seed + address))).collect()
}

#[test]
fn a_copy_is_found_and_stores_nothing() {
    let mut world = World::new();
    let original = texts(0..500, 0);
    assert_eq!(world.write(&original, LEN_MAX)[0].stored.len(), 500);
    let copy: Vec<_> = original.iter().map(|(address, block)| (address + 1000, *block)).collect();
    let packed = world.write(&copy, LEN_MAX);
    assert!(packed[0].places.iter().all(|place| matches!(place, Place::Hit(_))));
    assert_eq!((packed[0].stored.len(), packed[0].hits.len()), (0, 500));
    // The header of the second segment tells of all of them, in the first.
    let original_at = SegmentHandle::new(0).unwrap();
    let records = packed[0].records(SegmentHandle::new(1).unwrap());
    assert_eq!(records, world.segments[&original_at].2);
    world.check(&original.into_iter().chain(copy).collect());
}

#[test]
fn zeroes_and_repeats_are_stored_once_or_not_at_all() {
    let mut world = World::new();
    let (one, two) = (samples::text(1), samples::noise(2));
    let blocks = [(3, one), (4, [0; BLOCK_LEN]), (5, two), (6, one), (7, two), (9, one)];
    let packed = world.write(&blocks, LEN_MAX).remove(0);
    let first = Place::New { frame: 0, block: 0 };
    let second = Place::New { frame: 0, block: 1 };
    assert_eq!(packed.places, [first, Place::Zero, second, first, second, first]);
    assert_eq!((packed.stored.len(), packed.taken), (2, 6));
    world.check(&blocks.into_iter().collect());
}

#[test]
fn a_full_body_ends_the_batch_between_frames() {
    let mut world = World::new();
    let blocks: Vec<_> = (0..100).map(|address| (address, samples::noise(address % 90))).collect();
    // Room for three frames of four incompressible blocks, and some more.
    let packed = world.write(&blocks, 60_000);
    assert_eq!(packed.iter().map(|packed| packed.taken).sum::<usize>(), 100);
    assert_eq!((packed[0].taken, packed[0].stored.len()), (12, 12));
    world.check(&blocks.into_iter().collect());
}

#[test]
fn a_body_without_room_takes_what_needs_none() {
    let hasher = Hasher::new(&KEY, DOMAIN);
    let blocks = [(0, [0; BLOCK_LEN]), (1, samples::text(1)), (2, [0; BLOCK_LEN])];
    let batch = Batch::with(hash_blocks(&hasher, blocks.iter().map(|(_, block)| block)), numbered(&blocks));
    let mut body = Body::new(100);
    let packed = Packer::default().pack(&batch, &batch.without_hits(), PACKING, &mut body);
    assert_eq!((packed.taken, packed.places, body.is_empty()), (1, vec![Place::Zero], true));
}

/// Two contents under one hash: within a batch the bytes tell them apart, between batches the reader does.
#[test]
fn case_23_a_collision_is_stored_twice() {
    let (one, two) = (samples::text(1), samples::text(2));
    let collide = |blocks: &[(u64, Block)]| hash_blocks_by(|_| BlockHash([0x40; 16]), blocks.iter().map(|(_, block)| block));
    let blocks = [(0, one), (1, two), (2, one)];
    let batch = Batch::with(collide(&blocks), numbered(&blocks));
    let mut body = Body::new(LEN_MAX);
    let packed = Packer::default().pack(&batch, &batch.without_hits(), PACKING, &mut body);
    let places = [0, 1, 0].map(|block| Place::New { frame: 0, block });
    assert_eq!((&packed.places[..], packed.stored.len()), (&places[..], 2));

    let segment = SegmentHandle::new(5).unwrap();
    let mut index = Index::new(Settings { votes_min: 1, ..Settings::for_unique_bytes(1 << 30) });
    let records = packed.records(segment);
    index.hook(segment, &records[..1]);
    let (same, wanted) = ([(7, one)], [(7, two)]);
    let hashes = collide(&wanted);
    let mut search = Search::new(hashes.distinct());
    assert!(matches!(index.lookup(&mut search), Plan::Load(_)));
    index.loaded(&mut search, segment, &records[..1]);
    let Plan::Found(found) = index.lookup(&mut search) else { panic!("asked for twice") };
    let wanted = Batch::with(hashes, numbered(&wanted));
    let stored = |location: Location, out: &mut Block| {
        assert_eq!(location, records[0].location);
        *out = one;
        Ok::<_, ()>(())
    };
    let mut hits = wanted.accept(&found, 0, |_| false);
    assert_eq!(wanted.verify(&mut hits, stored), Verified { different: 1, ..Verified::default() });
    assert_eq!(hits.count(), 0);
    let mut hits = wanted.accept(&found, 0, |_| false);
    assert_eq!(wanted.verify(&mut hits, |_, _| Err(())), Verified { unread: 1, ..Verified::default() });
    let same = Batch::with(collide(&same), numbered(&same));
    let mut hits = same.accept(&found, 0, |_| false);
    assert_eq!(same.verify(&mut hits, stored), Verified { equal: 1, ..Verified::default() });
}

#[test]
#[should_panic(expected = "hashes of another batch")]
fn hashes_of_fewer_blocks_are_refused() {
    let blocks = texts(0..3, 0);
    let hashes = hash_blocks(&Hasher::new(&KEY, DOMAIN), blocks[1..].iter().map(|(_, block)| block));
    let _ = Batch::with(hashes, numbered(&blocks));
}

#[test]
fn records_are_in_the_order_of_the_body() {
    let mut world = World::new();
    let packed = world.write(&texts(0..50, 7), LEN_MAX).remove(0);
    assert!(packed.stored.is_sorted_by_key(|(_, spot)| (spot.unit(), spot.block())));
    let hashes: Vec<_> = texts(0..50, 7).iter().map(|(_, block)| world.hasher.hash(block)).collect();
    assert_eq!(packed.stored.iter().map(|(hash, _)| *hash).collect::<Vec<_>>(), hashes);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(40))]

    /// Batches of repeated, copied, moved and new content, in segments of any size, read back as they were written.
    #[test]
    fn what_is_written_is_read_back(
        batches in prop::collection::vec((prop::collection::vec((0_u64..40, 1_u64..30), 1..6), 34_000_usize..200_000), 1..6),
    ) {
        let (mut world, mut expected) = (World::new(), HashMap::new());
        for (runs, len_max) in batches {
            let mut written = HashMap::new();
            for (start, len) in runs {
                // Content 0 is zeroes; contents overlap between runs.
                written.extend((start..start + len).map(|address| (address * 3 % 64, if address % 9 == 0 { 0 } else { address + len })));
            }
            let mut blocks: Vec<_> = written
                .into_iter()
                .map(|(address, content)| (address, if content == 0 { [0; BLOCK_LEN] } else { samples::text(content) }))
                .collect();
            blocks.sort_unstable_by_key(|(address, _)| *address);
            world.write(&blocks, len_max);
            expected.extend(blocks);
            world.check(&expected);
        }
    }
}
