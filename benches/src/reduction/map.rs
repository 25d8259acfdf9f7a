//! The map of a volume: a tree of pages of 512 pointers, as docs/decisions/0013-map-of-blocks.md has it.

use std::collections::BTreeMap;

use dedup::location::Location;
use dedup::{BLOCK_LEN, Block};

/// Pointers of a page.
const POINTERS: u64 = 512;
const POINTER_LEN: usize = 8;

/// Where each block of a volume is. Blocks that are not here are zeroes.
#[derive(Default)]
pub struct Map(BTreeMap<u64, Location>);

impl Map {
    pub fn insert(&mut self, block: u64, location: Location) {
        self.0.insert(block, location);
    }

    /// The leaves, then the pages above them up to one that holds all. `place` stores the pages of a level and says where each of them is.
    pub fn store_pages(&self, mut place: impl FnMut(&[Block]) -> Vec<Location>) {
        let mut level = self.0.clone();
        while !level.is_empty() {
            let (numbers, pages): (Vec<u64>, Vec<Block>) = pages(&level).into_iter().unzip();
            let locations = place(&pages);
            if numbers == [0] {
                break;
            }
            level = numbers.into_iter().zip(locations).collect();
        }
    }
}

fn pages(level: &BTreeMap<u64, Location>) -> BTreeMap<u64, Block> {
    let mut pages = BTreeMap::new();
    for (number, location) in level {
        let page = pages.entry(number / POINTERS).or_insert([0; BLOCK_LEN]);
        let at = (number % POINTERS) as usize * POINTER_LEN;
        page[at..at + POINTER_LEN].copy_from_slice(&pointer(*location).to_le_bytes());
    }
    pages
}

/// flags 2 │ handle 30 │ unit 20 │ block 4 │ class 8
fn pointer(Location { segment, spot }: Location) -> u64 {
    let spot_bits = u64::from(spot.unit()) << 12 | u64::from(spot.block()) << 8 | u64::from(spot.class().0);
    1 << 62 | u64::from(segment.get()) << 32 | spot_bits
}

#[cfg(test)]
mod tests {
    use super::*;
    use dedup::location::{LengthClass, SegmentHandle, Spot};

    fn location(unit: u32) -> Location {
        let spot = Spot::new(unit, 3, LengthClass(9)).unwrap();
        Location { segment: SegmentHandle::new(5).unwrap(), spot }
    }

    #[test]
    fn a_tree_ends_in_one_page() {
        let mut map = Map::default();
        // Two leaves that are far apart need two pages above them, and one above those.
        [0, 1, POINTERS * POINTERS].into_iter().for_each(|block| map.insert(block, location(1)));
        let mut levels = Vec::new();
        map.store_pages(|pages| {
            levels.push(pages.to_vec());
            (0..).take(pages.len()).map(location).collect()
        });
        assert_eq!(levels.iter().map(Vec::len).collect::<Vec<_>>(), [2, 2, 1]);
        let word = |page: &Block, at: usize| u64::from_le_bytes(std::array::from_fn(|byte| page[at * POINTER_LEN + byte]));
        assert_eq!(
            [word(&levels[0][0], 0), word(&levels[0][0], 1), word(&levels[0][0], 2)],
            [pointer(location(1)), pointer(location(1)), 0]
        );
        assert_eq!([word(&levels[2][0], 0), word(&levels[2][0], 1)], [pointer(location(0)), pointer(location(1))]);
    }

    #[test]
    fn an_empty_map_has_no_pages() {
        Map::default().store_pages(|_| unreachable!("there is nothing to store"));
    }
}
