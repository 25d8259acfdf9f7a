use super::*;
use crate::location::{LengthClass, Location, Spot};
use crate::samples;
use proptest::prelude::*;

const SETTINGS: Settings = Settings { hooks: 4096, neighbour_bytes: 1 << 20, owners_max: 2, loads_max: 4, votes_min: 1 };

fn segment(number: u32) -> SegmentHandle {
    SegmentHandle::new(number).unwrap()
}

/// The records of segment `number`: its blocks' contents are the numbers from `first`.
fn records(number: u32, first: u64, count: u32) -> Vec<BlockRecord> {
    let record = |position: u32| {
        let mut state = first + u64::from(position);
        let word = u128::from(samples::next(&mut state)) << 64 | u128::from(samples::next(&mut state));
        let spot = Spot::new(position / 4, (position % 4) as u8, LengthClass(3)).unwrap();
        BlockRecord { hash: BlockHash(word.to_le_bytes()), location: Location { segment: segment(number), spot } }
    };
    (0..count).map(record).collect()
}

fn hashes(records: &[BlockRecord]) -> Vec<BlockHash> {
    records.iter().map(|record| record.hash).collect()
}

/// Segments 0 to `count`, of 1000 blocks each, all hooked.
fn filled(settings: Settings, count: u32) -> (Index, Vec<Vec<BlockRecord>>) {
    let mut index = Index::new(settings);
    let segments: Vec<_> = (0..count).map(|number| records(number, u64::from(number) * 1000, 1000)).collect();
    (0..).zip(&segments).for_each(|(number, records)| index.hook(segment(number), records));
    (index, segments)
}

/// Looks up, loading what is asked for: what was found, and what was loaded.
fn search(index: &mut Index, segments: &[Vec<BlockRecord>], hashes: &[BlockHash]) -> (Candidates, Vec<u32>) {
    let (mut search, mut loads) = (Search::new(hashes), Vec::new());
    loop {
        match index.lookup(&mut search) {
            Plan::Found(found) => return (found, loads),
            Plan::Load(wanted) => {
                assert!(loads.is_empty() && !wanted.is_empty(), "asked for twice, or for nothing");
                for segment in wanted {
                    loads.push(segment.get());
                    index.loaded(&mut search, segment, &segments[segment.get() as usize]);
                }
            }
        }
    }
}

fn count(found: &Candidates) -> usize {
    (0..found.len()).filter(|index| !found.of(*index).is_empty()).count()
}

#[test]
fn one_hook_leads_to_the_neighbourhood() {
    let (mut index, segments) = filled(SETTINGS, 10);
    let wanted = hashes(&segments[3]);
    let (found, loads) = search(&mut index, &segments, &wanted);
    assert_eq!((count(&found), loads), (1000, vec![3]));
    for (index, record) in segments[3].iter().enumerate() {
        assert_eq!(found.of(index), [record.location]);
    }
    // The second time it is there.
    let (found, loads) = search(&mut index, &segments, &wanted);
    assert_eq!((count(&found), loads), (1000, vec![]));
}

#[test]
fn what_was_never_stored_is_not_found() {
    let (mut index, segments) = filled(SETTINGS, 10);
    let (found, loads) = search(&mut index, &segments, &hashes(&records(3, 1 << 40, 1000)));
    assert_eq!((count(&found), loads, found.len()), (0, vec![], 1000));
    let (found, _) = search(&mut index, &segments, &[]);
    assert!(found.is_empty());
}

#[test]
fn loads_are_bounded_and_go_where_most_is_to_be_found() {
    let (mut index, segments) = filled(SETTINGS, 10);
    let mut wanted = Vec::new();
    for (number, share) in [(0, 200), (1, 1000), (2, 200), (3, 900), (4, 200), (5, 800), (6, 200), (7, 1000)] {
        wanted.extend(hashes(&segments[number][..share]));
    }
    let (found, mut loads) = search(&mut index, &segments, &wanted);
    loads.sort_unstable();
    assert_eq!((count(&found), loads), (3700, vec![1, 3, 5, 7]));
}

#[test]
fn a_batch_finds_more_than_the_cache_holds() {
    let small = Settings { neighbour_bytes: 1000 * neighbours::RECORD_COST, ..SETTINGS };
    let (mut index, segments) = filled(small, 10);
    let wanted: Vec<_> = segments[3..7].iter().flat_map(|records| hashes(records)).collect();
    let (found, loads) = search(&mut index, &segments, &wanted);
    assert_eq!((count(&found), loads.len(), index.len().1), (4000, 4, 1000));
}

#[test]
fn a_segment_that_explains_the_hooks_of_another_spares_its_load() {
    let (mut index, mut segments) = filled(SETTINGS, 3);
    let both = [&segments[0][..], &segments[1]].concat();
    index.hook(segment(3), &both);
    segments.push(both.clone());
    // Both know the same places.
    let (found, loads) = search(&mut index, &segments, &hashes(&both));
    assert_eq!((count(&found), loads), (2000, vec![3]));
}

#[test]
fn a_segment_that_is_gone_is_never_proposed() {
    let (mut index, segments) = filled(SETTINGS, 10);
    let wanted = hashes(&segments[3]);
    search(&mut index, &segments, &wanted);
    index.unhook(segment(3));
    let (found, loads) = search(&mut index, &segments, &wanted);
    assert_eq!((count(&found), loads), (0, vec![]));
    // Nor if it goes while it is being loaded.
    let wanted = hashes(&segments[4]);
    let mut search = Search::new(&wanted);
    assert!(matches!(index.lookup(&mut search), Plan::Load(load) if load == [segment(4)]));
    index.unhook(segment(4));
    index.loaded(&mut search, segment(4), &segments[4]);
    assert!(matches!(index.lookup(&mut search), Plan::Found(found) if count(&found) == 0));
    // Or after it was found.
    let wanted = hashes(&segments[5]);
    let mut search = Search::new(&wanted);
    assert!(matches!(index.lookup(&mut search), Plan::Load(load) if load == [segment(5)]));
    index.loaded(&mut search, segment(5), &segments[5]);
    index.unhook(segment(5));
    assert!(matches!(index.lookup(&mut search), Plan::Found(found) if count(&found) == 0));
}

#[test]
fn a_header_leads_to_its_hits_in_other_segments() {
    let (mut index, mut segments) = filled(Settings { owners_max: 1, ..SETTINGS }, 10);
    // A batch of which parts were found in six segments: its header knows of all of them.
    let parts: Vec<_> = (1..7).flat_map(|number| segments[number][100..300].to_vec()).collect();
    index.hook(segment(10), &[records(10, 1 << 40, 100), parts.clone()].concat());
    segments.push([records(10, 1 << 40, 100), parts.clone()].concat());
    let (found, loads) = search(&mut index, &segments, &hashes(&parts));
    assert_eq!((count(&found), loads), (1200, vec![10]));
    assert!(parts.iter().enumerate().all(|(index, record)| found.of(index) == [record.location]));
    // When one of them goes, the cached header does not lead there, and the loaded one must not.
    index.unhook(segment(2));
    segments[10].retain(|record| record.location.segment != segment(2));
    let (found, loads) = search(&mut index, &segments, &hashes(&parts));
    assert_eq!((count(&found), loads), (1000, vec![10]));
}

#[test]
fn a_content_stored_everywhere_is_proposed_a_few_times() {
    let mut index = Index::new(SETTINGS);
    let own = |number: u32| records(number, u64::from(number) << 32, 1000);
    let segments: Vec<_> = (0..20).map(|number| [own(number), records(number, 1 << 60, 10)].concat()).collect();
    for (number, records) in (0..).zip(&segments) {
        index.hook(segment(number), records);
        search(&mut index, &segments, &hashes(&records[..1000]));
        let (found, _) = search(&mut index, &segments, &hashes(&records[1000..]));
        assert_eq!(found.of(3).len(), (number as usize + 1).min(CANDIDATES_MAX));
    }
}

#[test]
fn many_gone_segments_are_swept_out() {
    let (mut index, _) = filled(SETTINGS, 10);
    let before = index.len().0;
    assert!(before > 100);
    (0..=GONE_MAX as u32).for_each(|number| index.unhook(segment(number)));
    assert_eq!((index.len().0, index.gone.len()), (0, 0));
}

#[test]
fn a_handle_used_again_leads_to_the_new_segment_only() {
    let (mut index, mut segments) = filled(SETTINGS, 4);
    let old = hashes(&segments[3]);
    index.unhook(segment(3));
    segments[3] = records(3, 1 << 40, 1000);
    index.hook(segment(3), &segments[3]);
    // Old hooks of the handle cost one load in vain, and are forgotten by it.
    let hooks_before = index.len().0;
    let (found, loads) = search(&mut index, &segments, &old);
    assert_eq!((count(&found), loads), (0, vec![3]));
    assert!(index.len().0 < hooks_before);
    let new = hashes(&segments[3]);
    let (found, loads) = search(&mut index, &segments, &new);
    assert_eq!((count(&found), loads), (1000, vec![]));
    // Even if nobody said that the one before is gone.
    segments[3] = records(3, 1 << 41, 1000);
    index.hook(segment(3), &segments[3]);
    let (found, _) = search(&mut index, &segments, &new);
    assert_eq!(count(&found), 0);
}

#[test]
fn a_load_that_failed_costs_ratio_only() {
    let (mut index, segments) = filled(SETTINGS, 4);
    let wanted = hashes(&segments[1]);
    let mut failing = Search::new(&wanted);
    assert!(matches!(index.lookup(&mut failing), Plan::Load(_)));
    assert!(matches!(index.lookup(&mut failing), Plan::Found(found) if count(&found) == 0));
    // Records of segments that nobody asked for change nothing.
    index.loaded(&mut failing, segment(2), &segments[2]);
    assert_eq!(index.len().1, 0);
    let (found, loads) = search(&mut index, &segments, &wanted);
    assert_eq!((count(&found), loads), (1000, vec![1]));
}

#[test]
fn the_pinned_memory_is_48_mib_per_tib() {
    let settings = Settings::for_unique_bytes(1 << 36);
    assert_eq!(Index::new(settings).pinned_bytes(), 48 << 16);
}

proptest! {
    /// Whatever happens, what is proposed is what a loaded segment holds under exactly this hash.
    #[test]
    fn every_candidate_is_true(operations in prop::collection::vec((0_u8..4, 0_u32..12, 0_u32..12), 1..60), budget in 0_usize..4000) {
        let settings = Settings { hooks: 64, neighbour_bytes: budget * neighbours::RECORD_COST, ..SETTINGS };
        let mut index = Index::new(settings);
        let mut stored: HashMap<u32, Vec<BlockRecord>> = HashMap::new();
        for (operation, number, content) in operations {
            let records = records(number, u64::from(content) * 500, 1000);
            match operation {
                0 => {
                    index.unhook(segment(number));
                    index.hook(segment(number), &records);
                    stored.insert(number, records);
                }
                1 => {
                    index.unhook(segment(number));
                    stored.remove(&number);
                }
                _ => {
                    let wanted = hashes(&records);
                    let mut search = Search::new(&wanted);
                    let mut plan = index.lookup(&mut search);
                    if let Plan::Load(segments) = plan {
                        prop_assert!(segments.len() <= settings.loads_max);
                        for segment in segments {
                            if let Some(records) = stored.get(&segment.get()) {
                                index.loaded(&mut search, segment, records);
                            }
                        }
                        plan = index.lookup(&mut search);
                    }
                    let Plan::Found(found) = plan else { panic!("asked for twice") };
                    for (hash, index) in wanted.iter().zip(0..) {
                        for location in found.of(index) {
                            let position = location.spot.unit() * 4 + u32::from(location.spot.block());
                            let record = &stored[&location.segment.get()][position as usize];
                            prop_assert_eq!((record.hash, record.location), (*hash, *location));
                        }
                    }
                }
            }
            prop_assert!(index.len().1 <= budget);
        }
    }
}
