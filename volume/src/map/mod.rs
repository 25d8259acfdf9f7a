//! The map of a volume: a tree of pages from block numbers to where the blocks are.
//!
//! ```text
//!   Tree { root, height }
//!     └─▶ inner page: 512 pointers ─▶ … ─▶ leaf page: 512 pointers ─▶ blocks          a leaf covers 2 MiB
//!
//!   pointer   flags 2 │ handle 30 │ unit 20 │ block 4 │ class 8          flags: 0 hole, 1 zeroes, 2 stored, 3 hidden
//! ```
//!
//! Invariants: pages never change; a changed tree shares what did not change with the one before. A hole or zeroes may stand for a whole
//! subtree. A page without anything stored and of one kind only is never kept: its parent says so.
//!
//! When something changes under a page that cannot be read, a new page takes its place, in which pointers that did not change are *hidden*: each leads to
//! the page that cannot be read, which has the pointer for this place. Should that page be readable again, they all are.

pub(crate) mod merge;
mod sight;
pub(crate) mod tree;
mod unhurried;

use std::rc::Rc;

use dedup::location::{LengthClass, Location, SegmentHandle, Spot};
use dedup::{BLOCK_LEN, Block};

use crate::environment::LocalFuture;
use crate::error::VolumeError;
use crate::extent_map::Run;

pub(crate) use tree::{Tree, walk};
pub(crate) use unhurried::Unhurried;

/// Pointers in a page.
pub(crate) const FANOUT: usize = BLOCK_LEN / 8;
/// Pages that are compressed together. Of their spots, only so many block numbers are used.
pub(crate) const PAGES_PER_FRAME: usize = 4;
const HANDLE_BITS: u32 = 30;
/// In the bits of a hidden pointer, above those of the page's number in its frame: how much higher the page stands.
const ABOVE_SHIFT: u32 = 10;
const ABOVE_MAX: u32 = 3;

/// Where a block or a page is, if it is anywhere.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Debug)]
pub(crate) struct Pointer(u64);

impl Pointer {
    /// Never written, or discarded.
    pub(crate) const HOLE: Pointer = Pointer(0);
    /// Written, with zeroes.
    pub(crate) const ZERO: Pointer = Pointer(1 << 62);
    const STORED: u64 = 2 << 62;
    const HIDDEN: u64 = 3 << 62;

    pub(crate) fn to(location: Location) -> Pointer {
        Pointer(Self::STORED | u64::from(location.segment.get()) << 32 | u64::from(spot_bits(location.spot)))
    }

    /// `None`: it leads nowhere.
    pub(crate) fn location(self) -> Option<Location> {
        let is_stored = self.0 >> 62 == Self::STORED >> 62;
        let handle = SegmentHandle::new((self.0 >> 32) as u32 & ((1 << HANDLE_BITS) - 1));
        handle.filter(|_| is_stored).map(|segment| Location { segment, spot: spot_of(self.0 as u32) })
    }

    /// What stands in `page`, which cannot be read. The new pointer is in a page `above` levels below that one. `None`: that is more than a pointer
    /// can say, or `page` leads to no page.
    pub(crate) fn hidden_by(page: Pointer, above: u32) -> Option<Pointer> {
        let number = page.location()?.spot.block();
        (usize::from(number) < PAGES_PER_FRAME && above <= ABOVE_MAX)
            .then_some(Pointer(page.0 | Self::HIDDEN | u64::from(above << ABOVE_SHIFT)))
    }

    /// The page that could not be read, and how many levels it is above the page that has this pointer.
    pub(crate) fn hiding(self) -> Option<(Pointer, u32)> {
        let above = (self.0 as u32 >> ABOVE_SHIFT) & ABOVE_MAX;
        let page = self.0 & !(1 << 62) & !u64::from(ABOVE_MAX << ABOVE_SHIFT);
        (self.0 >> 62 == Self::HIDDEN >> 62).then_some((Pointer(page), above))
    }

    /// A hole, or zeroes.
    pub(crate) fn is_nothing(self) -> bool {
        self == Pointer::HOLE || self == Pointer::ZERO
    }

    /// `None` for bits that no pointer has.
    pub(crate) fn from_bits(bits: u64) -> Option<Pointer> {
        let pointer = Pointer(bits);
        (pointer.is_nothing() || bits >= Self::STORED).then_some(pointer)
    }

    pub(crate) fn bits(self) -> u64 {
        self.0
    }
}

/// A run longer than one block is a hole or zeroes.
impl Run for Pointer {
    fn skip(&self, _blocks: u64) -> Pointer {
        *self
    }
}

pub(crate) fn spot_bits(spot: Spot) -> u32 {
    spot.unit() << 12 | u32::from(spot.block()) << 8 | u32::from(spot.class().0)
}

/// Every number of 32 bits is a spot.
pub(crate) fn spot_of(bits: u32) -> Spot {
    let spot = Spot::new(bits >> 12, (bits >> 8 & 15) as u8, LengthClass((bits & 0xff) as u8));
    spot.expect("20 bits of unit and 4 of block fit")
}

/// A page of the map.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(crate) struct Page([Pointer; FANOUT]);

impl Page {
    pub(crate) fn filled(pointer: Pointer) -> Page {
        Page([pointer; FANOUT])
    }

    pub(crate) fn pointers(&self) -> &[Pointer; FANOUT] {
        &self.0
    }

    pub(crate) fn encode(&self) -> Box<Block> {
        let mut block = Box::new([0; BLOCK_LEN]);
        for (bytes, pointer) in block.as_chunks_mut::<8>().0.iter_mut().zip(&self.0) {
            *bytes = pointer.0.to_le_bytes();
        }
        block
    }

    /// `None` if this is no page.
    pub(crate) fn decode(block: &Block) -> Option<Page> {
        let mut page = Page::filled(Pointer::HOLE);
        for (pointer, bytes) in page.0.iter_mut().zip(block.as_chunks::<8>().0) {
            *pointer = Pointer::from_bits(u64::from_le_bytes(*bytes))?;
        }
        Some(page)
    }

    /// What leads somewhere, and to somewhere else than in another page.
    fn differing_from<'a>(&'a self, other: &'a Page) -> impl Iterator<Item = (usize, Pointer)> {
        let pairs = self.0.iter().zip(&other.0).enumerate();
        pairs
            .filter(|(_, (pointer, other))| pointer != other && !pointer.is_nothing())
            .map(|(index, (pointer, _))| (index, *pointer))
    }

    /// The one kind of nothing that the page is full of.
    fn only(&self) -> Option<Pointer> {
        let first = self.0[0];
        (first.is_nothing() && self.0.iter().all(|pointer| *pointer == first)).then_some(first)
    }
}

/// Where pages are read.
pub(crate) trait Pages {
    /// The page that a stored pointer leads to.
    fn page(&self, pointer: Pointer) -> LocalFuture<'_, Result<Rc<Page>, VolumeError>>;

    /// These are looked at next. Why one of them cannot be read is told when it is.
    fn expect<'a>(&'a self, _next: &'a [Pointer]) -> LocalFuture<'a, ()> {
        Box::pin(async {})
    }
}

/// Where new pages go.
pub(crate) trait PageSink {
    /// Stores pages that are neighbours in the tree; where each of them is. They can be read at once.
    fn write(&self, pages: Vec<Page>) -> LocalFuture<'_, Result<Vec<Pointer>, VolumeError>>;

    /// Something is stored now for blocks that were mapped to this before.
    fn note_replaced(&self, _before: &[Pointer]) {}
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn pointers_come_back(handle in 0_u32..1 << 30, spot: u32) {
            let location = Location { segment: SegmentHandle::new(handle).unwrap(), spot: spot_of(spot) };
            let pointer = Pointer::to(location);
            prop_assert_eq!(pointer.location(), Some(location));
            prop_assert_eq!(Pointer::from_bits(pointer.bits()), Some(pointer));
            prop_assert_eq!(spot_bits(spot_of(spot)), spot);
        }

        #[test]
        fn hidden_pointers_come_back(handle in 0_u32..1 << 30, unit in 0_u32..1 << 20, block in 0_u8..16, class: u8, above in 0_u32..8) {
            let spot = Spot::new(unit, block, LengthClass(class)).unwrap();
            let page = Pointer::to(Location { segment: SegmentHandle::new(handle).unwrap(), spot });
            let hidden = Pointer::hidden_by(page, above);
            prop_assert_eq!(hidden.is_some(), block < 4 && above <= 3);
            if let Some(hidden) = hidden {
                prop_assert_eq!(hidden.hiding(), Some((page, above)));
                prop_assert_eq!((hidden.location(), hidden.is_nothing(), page.hiding()), (None, false, None));
                prop_assert_eq!(Pointer::from_bits(hidden.bits()), Some(hidden));
            }
        }

        #[test]
        fn a_page_comes_back_and_no_other_bytes_are_one(number in 0..FANOUT, bits: u64) {
            let mut page = Page::filled(Pointer::ZERO);
            page.0[number] = Pointer(Pointer::STORED | 77);
            let mut block = page.encode();
            prop_assert_eq!(Page::decode(&block), Some(page));
            block[number * 8..number * 8 + 8].copy_from_slice(&bits.to_le_bytes());
            prop_assert_eq!(Page::decode(&block).is_some(), Pointer::from_bits(bits).is_some());
        }
    }

    #[test]
    fn what_leads_nowhere_has_no_location() {
        assert_eq!([Pointer::HOLE, Pointer::ZERO].map(Pointer::location), [None; 2]);
        assert_eq!(Pointer::from_bits(1), None);
        assert_eq!(Pointer::from_bits(1 << 62 | 5), None);
        assert_eq!(Page::filled(Pointer::ZERO).only(), Some(Pointer::ZERO));
    }
}
