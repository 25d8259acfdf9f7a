//! What leads to an object's blocks, in little memory: 4 bytes for a pointer, and room for half as many more.

use dedup::location::{Location, SegmentHandle};

use crate::map::{spot_bits, spot_of};

/// Room that is made at least.
const ROOM_MIN: usize = 16;

/// Pointers, each once after [`Pointers::settle`].
#[derive(Default)]
pub(super) struct Pointers {
    /// By the handle that they name.
    by_handle: Vec<(SegmentHandle, Spots)>,
}

/// In order and each once, but for what came last.
#[derive(Default)]
struct Spots(Vec<u32>);

impl Spots {
    fn push(&mut self, spot: u32) {
        if self.0.len() == self.0.capacity() {
            self.settle();
            self.0.reserve_exact(self.0.len() / 2 + ROOM_MIN);
        }
        self.0.push(spot);
    }

    fn settle(&mut self) {
        // What came before is in order already, which this kind of sorting makes use of.
        self.0.sort();
        self.0.dedup();
    }
}

impl Pointers {
    pub(super) fn push(&mut self, location: Location) {
        let place = self.by_handle.iter().position(|(handle, _)| *handle == location.segment);
        let place = place.unwrap_or_else(|| {
            self.by_handle.push((location.segment, Spots::default()));
            self.by_handle.len() - 1
        });
        self.by_handle[place].1.push(spot_bits(location.spot));
    }

    /// What was pushed more than once counts once from now on.
    pub(super) fn settle(&mut self) {
        self.by_handle.iter_mut().for_each(|(_, spots)| spots.settle());
    }

    pub(super) fn len(&self) -> usize {
        self.by_handle.iter().map(|(_, spots)| spots.0.len()).sum()
    }

    pub(super) fn locations(&self) -> impl Iterator<Item = Location> {
        let at = |segment: SegmentHandle| move |bits: &u32| Location { segment, spot: spot_of(*bits) };
        self.by_handle.iter().flat_map(move |(segment, spots)| spots.0.iter().map(at(*segment)))
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn each_pointer_is_there_once(pushed in proptest::collection::vec((0_u32..3, 0_u32..200), 0..2_000)) {
            let locations = pushed.iter().map(|(handle, spot)| (SegmentHandle::new(*handle).unwrap(), *spot));
            let mut pointers = Pointers::default();
            locations.clone().for_each(|(segment, spot)| pointers.push(Location { segment, spot: spot_of(spot) }));
            pointers.settle();
            let expected: BTreeSet<(SegmentHandle, u32)> = locations.collect();
            let found: Vec<(SegmentHandle, u32)> =
                pointers.locations().map(|location| (location.segment, spot_bits(location.spot))).collect();
            prop_assert_eq!(found.len(), pointers.len());
            prop_assert_eq!(found.into_iter().collect::<BTreeSet<_>>(), expected.clone());
            prop_assert_eq!(pointers.len(), expected.len());
        }
    }
}
