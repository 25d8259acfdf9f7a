//! The map of a volume: a tree of pages from block numbers to where the blocks are.
//!
//! ```text
//!   Tree { root, height }
//!     └─▶ inner page: 512 pointers ─▶ … ─▶ leaf page: 512 pointers ─▶ blocks          a leaf covers 2 MiB
//!
//!   pointer   flags 2 │ handle 30 │ unit 20 │ block 4 │ class 8          flags: 0 hole, 1 zeroes, 2 stored
//! ```
//!
//! Invariants: pages never change; a changed tree shares what did not change with the one before. A hole or zeroes may stand for a whole
//! subtree. A page without anything stored and of one kind only is never kept: its parent says so.

pub(crate) mod merge;
pub(crate) mod tree;

use std::rc::Rc;

use dedup::location::{LengthClass, Location, SegmentHandle, Spot};
use dedup::{BLOCK_LEN, Block};

use crate::environment::LocalFuture;
use crate::error::VolumeError;
use crate::extent_map::Run;

pub(crate) use tree::Tree;

/// Pointers in a page.
pub(crate) const FANOUT: usize = BLOCK_LEN / 8;
const HANDLE_BITS: u32 = 30;

/// Where a block or a page is, if it is anywhere.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Debug)]
pub(crate) struct Pointer(u64);

impl Pointer {
    /// Never written, or discarded.
    pub(crate) const HOLE: Pointer = Pointer(0);
    /// Written, with zeroes.
    pub(crate) const ZERO: Pointer = Pointer(1 << 62);
    const STORED: u64 = 2 << 62;

    pub(crate) fn to(location: Location) -> Pointer {
        Pointer(Self::STORED | u64::from(location.segment.get()) << 32 | u64::from(spot_bits(location.spot)))
    }

    /// `None`: it leads nowhere.
    pub(crate) fn location(self) -> Option<Location> {
        let is_stored = self.0 >> 62 == Self::STORED >> 62;
        let handle = SegmentHandle::new((self.0 >> 32) as u32 & ((1 << HANDLE_BITS) - 1));
        handle.filter(|_| is_stored).map(|segment| Location { segment, spot: spot_of(self.0 as u32) })
    }

    /// `None` for bits that no pointer has.
    pub(crate) fn from_bits(bits: u64) -> Option<Pointer> {
        let pointer = Pointer(bits);
        (pointer == Pointer::HOLE || pointer == Pointer::ZERO || pointer.location().is_some()).then_some(pointer)
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

    /// The one kind of nothing that the page is full of.
    fn only(&self) -> Option<Pointer> {
        let first = self.0[0];
        (first.location().is_none() && self.0.iter().all(|pointer| *pointer == first)).then_some(first)
    }
}

/// Where pages are read.
pub(crate) trait Pages {
    /// The page that a stored pointer leads to.
    fn page(&self, pointer: Pointer) -> LocalFuture<'_, Result<Rc<Page>, VolumeError>>;
}

/// Where new pages go.
pub(crate) trait PageSink {
    /// Stores pages that are neighbours in the tree; where each of them is. They can be read at once.
    fn write(&self, pages: Vec<Page>) -> LocalFuture<'_, Result<Vec<Pointer>, VolumeError>>;
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
        assert_eq!(Pointer::from_bits(3 << 62), None);
        assert_eq!(Page::filled(Pointer::ZERO).only(), Some(Pointer::ZERO));
    }
}
