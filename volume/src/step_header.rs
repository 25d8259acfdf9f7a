//! The sealed part of a segment: what a step changed, and where its blocks are. All numbers are little-endian.
//!
//! ```text
//!   0  nonce of its maker  u64            48  extents, blocks, stored, sources, hits, moved, bytes of
//!   8  log id              16 bytes           the marker: how many there are, u32 each
//!  24  log position        u64 ┐ before   76  zero 4
//!  32  log number          u64 │ this:    80  extents, 16 bytes each: first block u64 · blocks u32 ·
//!  40  log chain           u64 ┘ in here      kind u8 (1 data, 2 zero, 3 discarded, 4 hit) · source u24, of a hit
//!      or earlier                          …  the spot of each block of data and hits, u32, in the order of extents
//!                                          …  stored: of each block in the body, hash 16 bytes · spot u32
//!                                          …  sources, 33 bytes each: group 16 · epoch u64 · number u64 · family u8
//!                                          …  hits: hash 16 bytes · source u32 · spot u32
//!                                          …  moved: source u32 · spot there u32 · spot here u32
//!                                          …  marker: id 16 · created u64 · size u64 · slot u16 · name
//! ```
//!
//! - An extent of data lies in this segment's body, a hit in the body of its source.
//! - Sources are named by what lasts. Every source that is referred to is there, and nothing follows the last table.
//! - `hits` tells the index what was found elsewhere when this was written: one for each content.
//! - A marker makes its volume as it is after this step a snapshot.
//! - `moved` tells those who still refer to a source where its block is now.

use dedup::hash::BlockHash;
use dedup::location::Spot;

use crate::bytes_at::{array_at, u32_at, u64_at};
use crate::log::{LogId, Tail};
use crate::map::{spot_bits, spot_of};
use crate::meta::SnapshotId;
use crate::names::{Slot, Source};

const COUNTS_AT: usize = 48;
const TABLES_AT: usize = 80;
const EXTENT_LEN: usize = 16;
const SPOT_LEN: usize = 4;
const STORED_LEN: usize = 20;
const HIT_LEN: usize = 24;
const MOVED_LEN: usize = 12;
/// Of a marker without its name.
const MARKER_LEN: usize = 34;
/// Bytes of a snapshot's name.
pub(crate) const MARKER_NAME_MAX: usize = 63;

/// The most sources of a header: what an extent can number.
pub(crate) const SOURCES_MAX: usize = 1 << 24;

/// What a run of blocks became.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum ExtentKind {
    Data,
    Zero,
    Discarded,
    /// Blocks of another segment: of source number `source` of the header.
    Hit {
        source: u32,
    },
}

impl ExtentKind {
    fn has_spots(self) -> bool {
        matches!(self, ExtentKind::Data | ExtentKind::Hit { .. })
    }

    fn to_bytes(self) -> [u8; 4] {
        let (kind, source) = match self {
            ExtentKind::Data => (1, 0),
            ExtentKind::Zero => (2, 0),
            ExtentKind::Discarded => (3, 0),
            ExtentKind::Hit { source } => (4, source),
        };
        (source << 8 | kind).to_le_bytes()
    }

    fn from_bytes(bytes: [u8; 4]) -> Option<ExtentKind> {
        let bits = u32::from_le_bytes(bytes);
        match (bits & 0xff, bits >> 8) {
            (1, 0) => Some(ExtentKind::Data),
            (2, 0) => Some(ExtentKind::Zero),
            (3, 0) => Some(ExtentKind::Discarded),
            (4, source) => Some(ExtentKind::Hit { source }),
            _ => None,
        }
    }
}

/// A run of blocks of the volume.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Extent {
    pub(crate) first: u64,
    pub(crate) blocks: u32,
    pub(crate) kind: ExtentKind,
}

/// A content that was found elsewhere.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct HitRecord {
    pub(crate) hash: BlockHash,
    pub(crate) source: u32,
    pub(crate) spot: Spot,
}

/// A block that was copied from a source into this segment's body.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Moved {
    pub(crate) source: u32,
    pub(crate) from: Spot,
    pub(crate) to: Spot,
}

/// A snapshot that a step ends with.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(crate) struct Marker {
    /// Of which volume.
    pub(crate) slot: Slot,
    pub(crate) id: SnapshotId,
    /// Seconds since 1970.
    pub(crate) created: u64,
    /// Of the volume at that time, in bytes.
    pub(crate) size: u64,
    pub(crate) name: String,
}

impl Marker {
    pub(crate) fn encode(&self) -> Vec<u8> {
        let Marker { slot, id, created, size, name } = self;
        [&id[..], &created.to_le_bytes(), &size.to_le_bytes(), &slot.to_le_bytes(), name.as_bytes()].concat()
    }

    /// `None`: this is no marker.
    pub(crate) fn decode(bytes: &[u8]) -> Option<Marker> {
        let (fixed, name) = bytes.split_at_checked(MARKER_LEN)?;
        let name = std::str::from_utf8(name).ok().filter(|name| (1..=MARKER_NAME_MAX).contains(&name.len()))?;
        let (id, slot) = (array_at(fixed, 0), Slot::from_le_bytes(array_at(fixed, 32)));
        Some(Marker { slot, id, created: u64_at(fixed, 16), size: u64_at(fixed, 24), name: name.to_owned() })
    }
}

/// What a segment says of its step.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub(crate) struct StepHeader {
    /// Tells two makers of one name apart.
    pub(crate) nonce: u64,
    pub(crate) log_id: LogId,
    pub(crate) log_end: Tail,
    pub(crate) extents: Vec<Extent>,
    /// Of each block of each extent of data and of hits, where it is in its body.
    pub(crate) spots: Vec<Spot>,
    pub(crate) stored: Vec<(BlockHash, Spot)>,
    /// The other segments this one refers to.
    pub(crate) sources: Vec<Source>,
    pub(crate) hits: Vec<HitRecord>,
    /// Only of a segment that garbage collection wrote.
    pub(crate) moved: Vec<Moved>,
    pub(crate) marker: Option<Marker>,
}

impl StepHeader {
    pub(crate) fn encode(&self) -> Vec<u8> {
        let mut bytes = Vec::with_capacity(self.encoded_len());
        bytes.extend_from_slice(&self.nonce.to_le_bytes());
        bytes.extend_from_slice(&self.log_id);
        for value in [self.log_end.position, self.log_end.number, self.log_end.chain] {
            bytes.extend_from_slice(&value.to_le_bytes());
        }
        for count in self.counts() {
            bytes.extend_from_slice(&(count as u32).to_le_bytes());
        }
        bytes.resize(TABLES_AT, 0);
        for extent in &self.extents {
            bytes.extend_from_slice(&extent.first.to_le_bytes());
            bytes.extend_from_slice(&extent.blocks.to_le_bytes());
            bytes.extend_from_slice(&extent.kind.to_bytes());
        }
        self.spots.iter().for_each(|spot| bytes.extend_from_slice(&spot_bytes(*spot)));
        for (hash, spot) in &self.stored {
            bytes.extend_from_slice(&hash.0);
            bytes.extend_from_slice(&spot_bytes(*spot));
        }
        self.sources.iter().for_each(|source| bytes.extend_from_slice(&source.to_bytes()));
        for hit in &self.hits {
            bytes.extend_from_slice(&hit.hash.0);
            bytes.extend_from_slice(&hit.source.to_le_bytes());
            bytes.extend_from_slice(&spot_bytes(hit.spot));
        }
        for moved in &self.moved {
            bytes.extend_from_slice(&moved.source.to_le_bytes());
            bytes.extend_from_slice(&spot_bytes(moved.from));
            bytes.extend_from_slice(&spot_bytes(moved.to));
        }
        bytes.extend(self.marker.iter().flat_map(Marker::encode));
        bytes
    }

    /// `None`: this is no such header.
    pub(crate) fn decode(bytes: &[u8]) -> Option<StepHeader> {
        let (fixed, rest) = bytes.split_at_checked(TABLES_AT)?;
        let mut tables = Tables { fixed, rest, next_count: COUNTS_AT };
        let mut header = StepHeader {
            nonce: u64_at(fixed, 0),
            log_id: array_at(fixed, 8),
            log_end: Tail { position: u64_at(fixed, 24), number: u64_at(fixed, 32), chain: u64_at(fixed, 40) },
            extents: tables.take(EXTENT_LEN, extent_at)?,
            spots: tables.take(SPOT_LEN, |row| Some(spot_at(row, 0)))?,
            stored: tables.take(STORED_LEN, |row| Some((BlockHash(array_at(row, 0)), spot_at(row, 16))))?,
            sources: tables.take(Source::LEN, |row| Source::from_bytes(&array_at(row, 0)))?,
            hits: tables.take(HIT_LEN, hit_at)?,
            moved: tables.take(MOVED_LEN, moved_at)?,
            marker: None,
        };
        let marker = tables.take(1, |row| Some(row[0]))?;
        if !marker.is_empty() {
            header.marker = Some(Marker::decode(&marker)?);
        }
        let unused = &fixed[tables.next_count..];
        let whole = tables.rest.is_empty() && unused.iter().all(|byte| *byte == 0);
        (whole && header.is_consistent()).then_some(header)
    }

    /// Every extent has its spots, and every source that is referred to is there.
    fn is_consistent(&self) -> bool {
        let with_spots = self.extents.iter().filter(|extent| extent.kind.has_spots());
        let blocks: u64 = with_spots.map(|extent| u64::from(extent.blocks)).sum();
        let of_extents = self.extents.iter().filter_map(|extent| match extent.kind {
            ExtentKind::Hit { source } => Some(source),
            _ => None,
        });
        let of_tables = self.hits.iter().map(|hit| hit.source).chain(self.moved.iter().map(|moved| moved.source));
        let mut referred = of_extents.chain(of_tables);
        blocks == self.spots.len() as u64 && referred.all(|source| (source as usize) < self.sources.len())
    }

    fn counts(&self) -> [usize; 7] {
        let marker = self.marker.as_ref().map_or(0, |marker| MARKER_LEN + marker.name.len());
        [self.extents.len(), self.spots.len(), self.stored.len(), self.sources.len(), self.hits.len(), self.moved.len(), marker]
    }

    fn encoded_len(&self) -> usize {
        let row_lens = [EXTENT_LEN, SPOT_LEN, STORED_LEN, Source::LEN, HIT_LEN, MOVED_LEN, 1];
        TABLES_AT + self.counts().iter().zip(row_lens).map(|(count, len)| count * len).sum::<usize>()
    }
}

/// Tables one after the other, each with its count in the fixed part.
struct Tables<'a> {
    fixed: &'a [u8],
    rest: &'a [u8],
    next_count: usize,
}

impl Tables<'_> {
    fn take<T>(&mut self, row_len: usize, row: impl Fn(&[u8]) -> Option<T>) -> Option<Vec<T>> {
        let count = u32_at(self.fixed, self.next_count) as usize;
        self.next_count += 4;
        let (table, rest) = self.rest.split_at_checked(count * row_len)?;
        self.rest = rest;
        table.chunks_exact(row_len).map(row).collect()
    }
}

fn extent_at(row: &[u8]) -> Option<Extent> {
    let extent = Extent { first: u64_at(row, 0), blocks: u32_at(row, 8), kind: ExtentKind::from_bytes(array_at(row, 12))? };
    extent.first.checked_add(extent.blocks.into())?.checked_mul(dedup::BLOCK_LEN as u64)?;
    Some(extent)
}

fn hit_at(row: &[u8]) -> Option<HitRecord> {
    Some(HitRecord { hash: BlockHash(array_at(row, 0)), source: u32_at(row, 16), spot: spot_at(row, 20) })
}

fn moved_at(row: &[u8]) -> Option<Moved> {
    Some(Moved { source: u32_at(row, 0), from: spot_at(row, 4), to: spot_at(row, 8) })
}

fn spot_bytes(spot: Spot) -> [u8; SPOT_LEN] {
    spot_bits(spot).to_le_bytes()
}

fn spot_at(row: &[u8], at: usize) -> Spot {
    spot_of(u32_at(row, at))
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use crate::names::Family;
    use dedup::location::LengthClass;
    use proptest::prelude::*;

    const SOURCE: Source = Source { group: [7; 16], family: Family::Gathered, epoch: 4, number: 1 << 40 };

    fn spot(unit: u32, block: u8) -> Spot {
        Spot::new(unit, block, LengthClass(5)).unwrap()
    }

    /// One of everything.
    pub(crate) fn step() -> StepHeader {
        StepHeader {
            nonce: 6,
            log_id: [2; 16],
            log_end: Tail { position: 4096, number: 2, chain: 8 },
            extents: vec![
                Extent { first: 5, blocks: 2, kind: ExtentKind::Data },
                Extent { first: 7, blocks: 1, kind: ExtentKind::Hit { source: 1 } },
                Extent { first: 1 << 30, blocks: 1 << 20, kind: ExtentKind::Discarded },
            ],
            spots: vec![spot(0, 0), spot(70, 3), spot(1000, 15)],
            stored: vec![(BlockHash([9; 16]), spot(70, 3))],
            sources: vec![SOURCE, Source { family: Family::Step, ..SOURCE }],
            hits: vec![HitRecord { hash: BlockHash([3; 16]), source: 1, spot: spot(1000, 15) }],
            moved: vec![Moved { source: 0, from: spot(8, 1), to: spot(70, 3) }],
            marker: Some(Marker { slot: 3, id: [6; 16], created: 5, size: 1 << 30, name: "monday".into() }),
        }
    }

    #[test]
    fn what_contradicts_itself_is_refused() {
        type Change = fn(&mut StepHeader);
        let changes: [Change; 6] = [
            |step| step.extents[1].kind = ExtentKind::Hit { source: 2 },
            |step| step.hits[0].source = 2,
            |step| step.moved[0].source = u32::MAX,
            |step| step.extents[1].kind = ExtentKind::Zero,
            |step| step.spots.truncate(2),
            |step| step.extents[2].first = u64::MAX - 5,
        ];
        assert_eq!(StepHeader::decode(&step().encode()), Some(step()));
        for (number, change) in changes.into_iter().enumerate() {
            let mut changed = step();
            change(&mut changed);
            assert_eq!(StepHeader::decode(&changed.encode()), None, "change {number}");
        }
    }

    #[test]
    fn nothing_may_be_left_over_or_missing() {
        let bytes = step().encode();
        assert_eq!(StepHeader::decode(&[&bytes[..], &[0]].concat()), None);
        (0..bytes.len()).for_each(|len| assert_eq!(StepHeader::decode(&bytes[..len]), None, "{len} bytes"));
        for at in TABLES_AT - 4..TABLES_AT {
            let mut unknown = bytes.clone();
            unknown[at] = 1;
            assert_eq!(StepHeader::decode(&unknown), None, "byte {at}");
        }
    }

    fn spots() -> impl Strategy<Value = Spot> {
        (0..1_u32 << 20, 0..16_u8, any::<u8>())
            .prop_map(|(unit, block, class)| Spot::new(unit, block, LengthClass(class)).unwrap())
    }

    fn kinds(sources: u32) -> impl Strategy<Value = ExtentKind> {
        let plain = prop_oneof![Just(ExtentKind::Data), Just(ExtentKind::Zero), Just(ExtentKind::Discarded)];
        prop_oneof![plain, (0..sources).prop_map(|source| ExtentKind::Hit { source })]
    }

    prop_compose! {
        fn steps()(sources in 1_u32..5)(
            extents in prop::collection::vec((0..1_u64 << 50, 0_u32..6, kinds(sources)), 0..9),
            spots in prop::collection::vec(spots(), 60),
            stored in prop::collection::vec((any::<[u8; 16]>(), spots()), 0..9),
            hits in prop::collection::vec((any::<[u8; 16]>(), 0..sources, spots()), 0..9),
            moved in prop::collection::vec((0..sources, spots(), spots()), 0..9),
            sources in Just(sources),
        ) -> StepHeader {
            let extents: Vec<_> = extents.into_iter().map(|(first, blocks, kind)| Extent { first, blocks, kind }).collect();
            let blocks = extents.iter().filter(|extent| extent.kind.has_spots()).map(|extent| extent.blocks as usize).sum();
            StepHeader {
                extents,
                spots: spots[..blocks].to_vec(),
                stored: stored.into_iter().map(|(hash, spot)| (BlockHash(hash), spot)).collect(),
                sources: (0..sources).map(|number| Source { number: number.into(), ..SOURCE }).collect(),
                hits: hits.into_iter().map(|(hash, source, spot)| HitRecord { hash: BlockHash(hash), source, spot }).collect(),
                moved: moved.into_iter().map(|(source, from, to)| Moved { source, from, to }).collect(),
                ..step()
            }
        }
    }

    proptest! {
        #[test]
        fn headers_come_back(step in steps()) {
            let bytes = step.encode();
            prop_assert_eq!(bytes.len(), step.encoded_len());
            prop_assert_eq!(StepHeader::decode(&bytes), Some(step));
        }

        /// What decodes at all encodes to the same bytes: nothing in them is without meaning.
        #[test]
        fn a_changed_byte_is_refused_or_kept(step in steps(), at in any::<prop::sample::Index>(), byte in any::<u8>()) {
            let mut bytes = step.encode();
            let at = at.index(bytes.len());
            bytes[at] = byte;
            if let Some(decoded) = StepHeader::decode(&bytes) {
                prop_assert_eq!(decoded.encode(), bytes);
            }
        }

        #[test]
        fn no_bytes_panic(mut bytes in prop::collection::vec(any::<u8>(), 0..1024), counts in any::<[u8; 6]>()) {
            for (at, count) in (COUNTS_AT..).step_by(4).zip(counts) {
                if let Some(field) = bytes.get_mut(at..at + 4) {
                    field.copy_from_slice(&u32::from(count).to_le_bytes());
                }
            }
            let _ = StepHeader::decode(&bytes);
        }
    }
}
