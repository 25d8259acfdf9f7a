//! Which duplicates to take: not every one is worth it.
//!
//! ```text
//!   batch:       a b c d e f g h        e…h lie one after the other in segment 7: taken, 4 blocks saved for 2 extents more
//!   segment 7:   x e f g h y            b lies alone in segment 3: stored again, as 1 block is not worth 2 extents
//!   segment 3:   p b q
//! ```
//!
//! A duplicate saves one block and splits the run of blocks around it: its neighbours are stored elsewhere, the map needs more extents,
//! and reading the range takes more requests. So a block stored again costs 1, an extent begun costs [`EXTENT_COST`], and of all ways to
//! store a batch the one that costs least is chosen. At a cost of 2, a run between new blocks is taken from 4 blocks on; between other
//! hits, where an extent ends anyway, from 2 on. Blocks of the ancestry are always taken: the map refers there anyway, and rewriting
//! what did not change leaves it as it was. What the trade costs and brings: docs/decisions/0009-sparse-index.md.

use crate::location::{Location, SegmentHandle};

/// What an extent costs, in blocks stored again.
pub const EXTENT_COST: u32 = 2;
/// Above this, nothing changes.
const EXTENT_COST_MAX: u32 = 1 << 16;
/// The cost of a block stored again, in the numbers below: a little over 1, so that of equal ways the one with more hits is chosen.
const BLOCK: u64 = ONE + 1;
const ONE: u64 = 1 << 24;
/// More than any batch can cost: what is never chosen if there is another way.
const PROHIBITIVE: u64 = 1 << 56;

/// One way to store a block, and the cheapest way to store all blocks before it and this one so.
struct State {
    /// `None`: stored anew.
    hit: Option<Location>,
    cost: u64,
    /// Which state of the block before.
    before: usize,
}

/// Chooses for each block the location to refer to, or none.
///
/// `addresses` are the blocks' numbers in the volume, ascending; a gap ends an extent. `candidates(i)` are those of block number `i` of the
/// batch; `in_ancestry` says whether the volume's own history, or that of the snapshot it was cloned from, refers to a segment.
pub fn accept<'a>(
    addresses: &[u64],
    candidates: impl Fn(usize) -> &'a [Location],
    extent_cost: u32,
    in_ancestry: impl Fn(SegmentHandle) -> bool,
) -> Vec<Option<Location>> {
    let mut columns: Vec<Vec<State>> = Vec::with_capacity(addresses.len());
    for (index, address) in addresses.iter().enumerate() {
        let found = candidates(index);
        let must_hit = found.iter().any(|location| in_ancestry(location.segment));
        let may_hit = |location: &&Location| !must_hit || in_ancestry(location.segment);
        let new_cost = if must_hit { PROHIBITIVE } else { BLOCK };
        let before = index.checked_sub(1).map_or(&[][..], |before| &columns[before][..]);
        let adjacent = index.checked_sub(1).is_some_and(|before| addresses[before].checked_add(1) == Some(*address));
        let step =
            Step { before, adjacent, cheapest: cheapest(before), extent_cost: u64::from(extent_cost.min(EXTENT_COST_MAX)) * ONE };
        let hits = found.iter().filter(may_hit).map(|location| step.to(Some(*location), 0));
        let column = std::iter::once(step.to(None, new_cost)).chain(hits).collect();
        columns.push(column);
    }
    let mut accepted = vec![None; addresses.len()];
    let mut state = columns.last().map_or(0, |last| cheapest(last));
    for (hit, column) in accepted.iter_mut().zip(&columns).rev() {
        *hit = column[state].hit;
        state = column[state].before;
    }
    accepted
}

/// From the states of one block to those of the next.
struct Step<'a> {
    before: &'a [State],
    adjacent: bool,
    cheapest: usize,
    extent_cost: u64,
}

impl Step<'_> {
    fn to(&self, hit: Option<Location>, own_cost: u64) -> State {
        let floor = self.before.get(self.cheapest).map_or(0, |state| state.cost);
        let anew = floor + self.extent_cost;
        let continued = self.before.iter().enumerate().filter(|(_, state)| self.adjacent && continues(state.hit, hit));
        let continued = continued.min_by_key(|(_, state)| state.cost).filter(|(_, state)| state.cost <= anew);
        let (before, cost) = continued.map_or((self.cheapest, anew), |(before, state)| (before, state.cost));
        State { hit, cost: cost + own_cost, before }
    }
}

/// Whether two blocks stored like this, one after the other in the volume, make one extent.
fn continues(one: Option<Location>, next: Option<Location>) -> bool {
    match (one, next) {
        (None, None) => true,
        (Some(one), Some(next)) => one.leads_to(next),
        _ => false,
    }
}

/// The last of those that cost least, so that a hit is preferred.
fn cheapest(states: &[State]) -> usize {
    states.iter().enumerate().rev().min_by_key(|(_, state)| state.cost).map_or(0, |(number, _)| number)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::location::{LengthClass, Spot};
    use proptest::prelude::*;

    /// Block number `position` of a segment of frames of one block, a unit each.
    fn at((segment, position): (u32, u32)) -> Location {
        let spot = Spot::new(position, 0, LengthClass(0)).unwrap();
        Location { segment: SegmentHandle::new(segment).unwrap(), spot }
    }

    /// For each block, the candidates (segment, position).
    fn accepted(blocks: &[(u64, &[(u32, u32)])], ancestry: &[u32]) -> Vec<Option<(u32, u32)>> {
        let addresses: Vec<_> = blocks.iter().map(|(address, _)| *address).collect();
        let candidates: Vec<Vec<_>> = blocks.iter().map(|(_, found)| found.iter().copied().map(at).collect()).collect();
        let in_ancestry = |segment: SegmentHandle| ancestry.contains(&segment.get());
        let accepted = accept(&addresses, |index| &candidates[index], EXTENT_COST, in_ancestry);
        accepted.into_iter().map(|one| one.map(|one| (one.segment.get(), one.spot.unit()))).collect()
    }

    #[test]
    fn runs_of_four_are_taken_and_shorter_ones_are_not() {
        for len in 1..8_u32 {
            let found: Vec<_> = (0..len).map(|index| [(7, 20 + index)]).collect();
            let mut blocks: Vec<(u64, &[(u32, u32)])> = vec![(0, &[])];
            blocks.extend((1..).zip(found.iter().map(|found| &found[..])));
            blocks.push((u64::from(len) + 1, &[]));
            let mut expected = vec![None];
            expected.extend((0..len).map(|index| (len >= 4).then_some((7, 20 + index))));
            expected.push(None);
            assert_eq!(accepted(&blocks, &[]), expected);
        }
    }

    #[test]
    fn between_other_hits_a_run_of_two_is_worth_it() {
        let found: Vec<_> =
            (0..4).map(|index| [(1, index)]).chain([[(2, 8)], [(2, 9)]]).chain((6..10).map(|index| [(1, index)])).collect();
        let blocks: Vec<(u64, &[(u32, u32)])> = (0..).zip(found.iter().map(|found| &found[..])).collect();
        assert!(accepted(&blocks, &[]).iter().all(Option::is_some));
    }

    #[test]
    fn the_longer_of_two_runs_wins() {
        let blocks: [(u64, &[(u32, u32)]); 5] =
            [(0, &[(9, 0), (1, 10)]), (1, &[(1, 11), (9, 1)]), (2, &[(9, 2), (1, 12)]), (3, &[(9, 3), (1, 13)]), (4, &[(1, 14)])];
        assert_eq!(accepted(&blocks, &[]), [10, 11, 12, 13, 14].map(|position| Some((1, position))));
    }

    #[test]
    fn the_ancestry_is_taken_block_by_block() {
        let blocks: [(u64, &[(u32, u32)]); 4] = [(0, &[(5, 3), (2, 8)]), (9, &[]), (10, &[(2, 4)]), (11, &[(2, 9), (2, 5)])];
        assert_eq!(accepted(&blocks, &[2]), [Some((2, 8)), None, Some((2, 4)), Some((2, 5))]);
        let far: [(u64, &[(u32, u32)]); 2] = [(u64::MAX - 1, &[(1, 0)]), (u64::MAX, &[(1, 1)])];
        assert_eq!(accepted(&far, &[1]), [Some((1, 0)), Some((1, 1))]);
    }

    /// What the module's head says a choice costs.
    fn cost(blocks: &[(u64, &[(u32, u32)])], choice: &[Option<(u32, u32)>]) -> u32 {
        let stored = choice.iter().filter(|hit| hit.is_none()).count() as u32;
        let continued = |index: usize| {
            let adjacent = blocks[index - 1].0 + 1 == blocks[index].0;
            adjacent
                && match (choice[index - 1], choice[index]) {
                    (None, None) => true,
                    (Some((one, position)), Some(next)) => (one, position + 1) == next,
                    _ => false,
                }
        };
        let extents = (0..choice.len()).filter(|index| *index == 0 || !continued(*index)).count() as u32;
        stored + EXTENT_COST * extents
    }

    proptest! {
        /// Of all choices, tried one by one, none costs less; and the ancestry is never stored again.
        #[test]
        fn nothing_costs_less(
            found in prop::collection::vec(prop::collection::vec((0_u32..3, 0_u32..6), 0..3), 0..8),
            gaps in prop::collection::vec(prop::bool::weighted(0.1), 8), ancestry in 0_u32..6,
        ) {
            let mut address = 0;
            let mut blocks: Vec<(u64, &[(u32, u32)])> = Vec::new();
            for (found, gap) in found.iter().zip(gaps) {
                address += 1 + u64::from(gap);
                blocks.push((address, found));
            }
            let mut choices: Vec<Vec<Option<(u32, u32)>>> = vec![vec![]];
            for found in &found {
                let ancestors: Vec<_> = found.iter().copied().filter(|(segment, _)| *segment == ancestry).collect();
                let ways: Vec<_> = if ancestors.is_empty() {
                    found.iter().copied().map(Some).chain([None]).collect()
                } else {
                    ancestors.into_iter().map(Some).collect()
                };
                choices = choices.iter().flat_map(|choice| ways.iter().map(|way| [&choice[..], &[*way]].concat())).collect();
            }
            let best = choices.iter().map(|choice| cost(&blocks, choice)).min();
            let accepted = accepted(&blocks, &[ancestry]);
            prop_assert!(choices.contains(&accepted));
            prop_assert_eq!(Some(cost(&blocks, &accepted)), best);
        }
    }
}
