//! The segments of one group, as far as their sizes go: everything a step goes through but the seal, which changes no length.

use std::collections::HashSet;

use dedup::Block;
use dedup::accept::EXTENT_COST;
use dedup::body::{BODY_LEN_MAX, Body};
use dedup::frame::{Compressor, Packing};
use dedup::hash::{BlockHash, Domain, DomainKind, Hasher};
use dedup::index::{BlockRecord, Candidates, Index, Plan, Search, Settings};
use dedup::location::{Location, SegmentHandle};
use dedup::pack::{Batch, Hashes, Packer, Place, hash_blocks};

use super::map::Map;

/// Bytes in a segment besides its body and the rows of its header's tables: the part in clear, the fixed part and its tag.
const HEADER_FIXED: usize = 128 + 80 + 16;
const UNIT: usize = 64;
/// Bytes of rows: docs/format.md.
const EXTENT_ROW: usize = 16;
const SPOT_ROW: usize = 4;
const STORED_ROW: usize = 20;
const SOURCE_ROW: usize = 33;
const HIT_ROW: usize = 24;
/// Bytes of a segment in the table of handles.
const HANDLE_ROW: u64 = 32;
/// The index is made for this many bytes.
const UNIQUE_BYTES: u64 = 1 << 40;
/// Handles of one group are numbered from here, times its number.
const HANDLES_OF_GROUP: u32 = 1 << 20;

/// What is kept, in bytes, and what became of the contents that had been stored before.
#[derive(Default)]
pub struct Stored {
    pub frames: u64,
    pub headers: u64,
    /// Pages of maps, and tables of handles.
    pub map: u64,
    /// Of each batch, its contents that an earlier one had stored.
    pub duplicates: u64,
    /// Of those, the ones that were not stored again.
    pub hits: u64,
}

impl Stored {
    pub fn bytes(&self) -> u64 {
        self.frames + self.headers + self.map
    }

    pub fn add(&mut self, other: &Stored) {
        self.frames += other.frames;
        self.headers += other.headers;
        self.map += other.map;
        self.duplicates += other.duplicates;
        self.hits += other.hits;
    }
}

/// What became of a block, as far as extents go.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Kind {
    Zero,
    Own,
    Hit(SegmentHandle),
}

/// Volumes that share their blocks, and are sealed and counted together.
pub struct Group {
    number: u32,
    packing: Packing,
    hasher: Hasher,
    index: Index,
    packer: Packer,
    compressor: Compressor,
    /// Of each segment, what its header tells the index.
    segments: Vec<Vec<BlockRecord>>,
    /// Segments of others that it refers to.
    foreign: HashSet<SegmentHandle>,
    known: HashSet<BlockHash>,
    stored: Stored,
}

impl Group {
    /// `number` tells groups apart: 1 to 1023.
    pub fn new(number: u32, packing: Packing, neighbour_bytes: usize) -> Group {
        let domain = Domain::new(DomainKind::Tenant, &u128::from(number).to_le_bytes());
        let settings = Settings { neighbour_bytes, ..Settings::for_unique_bytes(UNIQUE_BYTES) };
        Group {
            number,
            packing,
            hasher: Hasher::new(&[7; 32], domain),
            index: Index::new(settings),
            packer: Packer::default(),
            compressor: Compressor::default(),
            segments: Vec::new(),
            foreign: HashSet::new(),
            known: HashSet::new(),
            stored: Stored::default(),
        }
    }

    pub fn into_stored(self) -> Stored {
        let handles = (self.segments.len() + self.foreign.len()) as u64 * HANDLE_ROW;
        Stored { map: self.stored.map + handles, ..self.stored }
    }

    /// One step of a volume: what `library` does not have is stored here.
    pub fn write(&mut self, blocks: &[(u64, Block)], library: Option<&mut Group>, map: &mut Map) {
        let mut segment = Segment::default();
        let found = library.map_or_else(|| vec![None; blocks.len()], |library| library.find(blocks, &mut self.stored));
        let own: Vec<_> = blocks.iter().zip(&found).filter(|(_, found)| found.is_none()).map(|(block, _)| block).collect();
        let mut own_places = self.store(&own, &mut segment).into_iter();
        for ((number, _), found) in blocks.iter().zip(found) {
            let place =
                found.map_or_else(|| own_places.next().flatten(), |location| Some((Kind::Hit(location.segment), location)));
            segment.add(*number, place.map_or(Kind::Zero, |(kind, _)| kind));
            if let Some((_, location)) = place {
                map.insert(*number, location);
            }
            if let Some(location) = found {
                segment.library_hits.insert(location);
                self.foreign.insert(location.segment);
            }
        }
        self.stored.headers += segment.header_len() as u64;
    }

    /// Counts the pages of a volume's map.
    pub fn keep(&mut self, map: &Map) {
        map.store_pages(|pages| {
            let mut body = Body::new(BODY_LEN_MAX);
            let mut locations = Vec::with_capacity(pages.len());
            for frame in pages.chunks(self.packing.frame_blocks) {
                let blocks: Vec<_> = frame.iter().collect();
                let record = body.push(&mut self.compressor, &blocks, self.packing.compression).expect("a map fits one body");
                let spots = (0..frame.len() as u8).map(|block| record.spot(block).expect("a frame's blocks have spots"));
                locations.extend(spots.map(|spot| Location { segment: handle(self.number, self.segments.len()), spot }));
            }
            let header = (HEADER_FIXED + pages.len() * STORED_ROW).next_multiple_of(UNIT);
            self.stored.map += (body.len() + header) as u64;
            locations
        });
    }

    /// Where a library has these blocks already.
    fn find(&mut self, blocks: &[(u64, Block)], count: &mut Stored) -> Vec<Option<Location>> {
        let hashes = hash_blocks(&self.hasher, blocks.iter().map(|(_, block)| block));
        let candidates = self.candidates(&hashes);
        let known = hashes.distinct().iter().filter(|hash| self.known.contains(hash)).count();
        let found = (0..hashes.distinct().len()).filter(|index| !candidates.of(*index).is_empty()).count();
        count.duplicates += known as u64;
        count.hits += found as u64;
        let batch = Batch::with(hashes, blocks.iter().map(|(number, block)| (*number, block)));
        // An image is in the ancestry of those who refer to it.
        let hits = batch.accept(&candidates, EXTENT_COST, |_| true);
        (0..blocks.len()).map(|index| hits.get(index)).collect()
    }

    fn store(&mut self, blocks: &[&(u64, Block)], segment: &mut Segment) -> Vec<Option<(Kind, Location)>> {
        let hashes = hash_blocks(&self.hasher, blocks.iter().map(|(_, block)| block));
        let candidates = self.candidates(&hashes);
        let (before, contents) = (self.known.len(), hashes.distinct().len());
        self.known.extend(hashes.distinct());
        self.stored.duplicates += (contents - (self.known.len() - before)) as u64;
        let batch = Batch::with(hashes, blocks.iter().map(|(number, block)| (*number, block)));
        let hits = batch.accept(&candidates, EXTENT_COST, |_| false);
        let mut body = Body::new(BODY_LEN_MAX);
        let packed = self.packer.pack(&batch, &hits, self.packing, &mut body);
        assert_eq!(packed.taken, blocks.len(), "a batch of 32 MiB fits one body");
        let handle = handle(self.number, self.segments.len());
        let records = packed.records(handle);
        self.index.hook(handle, &records);
        self.segments.push(records);
        self.stored.frames += body.len() as u64;
        self.stored.hits += packed.hits.len() as u64;
        (segment.stored, segment.hits) = (packed.stored.len(), packed.hits.len());
        let place = |place| match place {
            Place::Zero => None,
            Place::New { frame, block } => {
                let spot = body.frames()[frame as usize].spot(block).expect("a stored block has a spot");
                Some((Kind::Own, Location { segment: handle, spot }))
            }
            Place::Hit(location) => Some((Kind::Hit(location.segment), location)),
        };
        packed.places.into_iter().map(place).collect()
    }

    fn candidates(&mut self, hashes: &Hashes) -> Candidates {
        let mut search = Search::new(hashes.distinct());
        loop {
            match self.index.lookup(&mut search) {
                Plan::Found(found) => return found,
                Plan::Load(load) => load.iter().for_each(|segment| {
                    let records = &self.segments[(segment.get() % HANDLES_OF_GROUP) as usize];
                    self.index.loaded(&mut search, *segment, records);
                }),
            }
        }
    }
}

fn handle(group: u32, segment: usize) -> SegmentHandle {
    SegmentHandle::new(group * HANDLES_OF_GROUP + segment as u32).expect("few groups of few segments")
}

/// What a segment's header holds.
#[derive(Default)]
struct Segment {
    extents: usize,
    spots: usize,
    stored: usize,
    hits: usize,
    sources: HashSet<SegmentHandle>,
    library_hits: HashSet<Location>,
    /// The last block, and what became of it.
    last: Option<(u64, Kind)>,
}

impl Segment {
    fn add(&mut self, block: u64, kind: Kind) {
        if self.last != block.checked_sub(1).map(|before| (before, kind)) {
            self.extents += 1;
        }
        self.last = Some((block, kind));
        self.spots += usize::from(kind != Kind::Zero);
        if let Kind::Hit(segment) = kind {
            self.sources.insert(segment);
        }
    }

    fn header_len(&self) -> usize {
        let rows = [
            self.extents * EXTENT_ROW,
            self.spots * SPOT_ROW,
            self.stored * STORED_ROW,
            self.sources.len() * SOURCE_ROW,
            (self.hits + self.library_hits.len()) * HIT_ROW,
        ];
        (HEADER_FIXED + rows.iter().sum::<usize>()).next_multiple_of(UNIT)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use dedup::BLOCK_LEN;
    use dedup::frame::Compression;

    const PACKING: Packing = Packing { compression: Compression::Off, frame_blocks: 4 };

    fn blocks(first: u64, contents: std::ops::Range<u64>) -> Vec<(u64, Block)> {
        let content = |number: u64| std::array::from_fn(|at| (number >> (at % 8 * 8)) as u8);
        (first..).zip(contents.map(content)).collect()
    }

    #[test]
    fn a_copy_costs_a_header_and_a_map() {
        let (mut group, mut map) = (Group::new(1, PACKING, 1 << 20), Map::default());
        group.write(&blocks(0, 1..401), None, &mut map);
        let frames = group.stored.frames;
        assert!(frames >= 400 * BLOCK_LEN as u64 && frames < 410 * BLOCK_LEN as u64);
        group.write(&blocks(1000, 1..401), None, &mut map);
        assert_eq!((group.stored.frames, group.stored.duplicates, group.stored.hits), (frames, 400, 400));
        // One extent each; the second names one source.
        let rows = (400 * (SPOT_ROW + STORED_ROW) + EXTENT_ROW, 400 * (SPOT_ROW + HIT_ROW) + EXTENT_ROW + SOURCE_ROW);
        let headers = [rows.0, rows.1].map(|rows| (HEADER_FIXED + rows).next_multiple_of(UNIT) as u64);
        assert_eq!(group.stored.headers, headers[0] + headers[1]);
        group.keep(&map);
        assert!(group.stored.map > 0);
    }

    #[test]
    fn tenants_find_the_library_and_not_each_other() {
        let mut library = Group::new(1, PACKING, 1 << 20);
        library.write(&blocks(0, 1..401), None, &mut Map::default());
        for number in 2..4 {
            let (mut tenant, mut map) = (Group::new(number, PACKING, 1 << 20), Map::default());
            let mine: Vec<_> = blocks(0, 1..401).into_iter().chain(blocks(400, 1001..1101)).collect();
            tenant.write(&mine, Some(&mut library), &mut map);
            assert!((100..104).contains(&(tenant.stored.frames / BLOCK_LEN as u64)));
            assert_eq!((tenant.stored.duplicates, tenant.stored.hits, tenant.foreign.len()), (400, 400, 1));
        }
    }

    #[test]
    fn zeroes_take_an_extent_and_nothing_else() {
        let (mut group, mut map) = (Group::new(1, PACKING, 1 << 20), Map::default());
        group.write(&[(5, [0; BLOCK_LEN]), (6, [0; BLOCK_LEN])], None, &mut map);
        assert_eq!((group.stored.frames, group.stored.headers), (0, (HEADER_FIXED + EXTENT_ROW).next_multiple_of(UNIT) as u64));
        map.store_pages(|_| unreachable!("zeroes are not mapped"));
    }
}
