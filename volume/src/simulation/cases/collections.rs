//! Collections of garbage that meet somebody: a step that finds duplicates, a reader, a clone, another owner.

use std::time::Duration;

use bytes::Bytes;

use super::bench::{Bench, Owner, numbers, versions_in};
use crate::clone::clone_snapshot;
use crate::names::{Family, Source, group_path};
use crate::segment::BLOCK;
use crate::simulation::VOLUME;
use crate::simulation::contents::{Version, content_of, contents_of, indexed};
use crate::simulation::requests::{Leg, Request, Verb};
use crate::simulation::world::ProcessId;
use crate::table::{Content, Entry};
use crate::{Durability, MappedVolume, Settings, SnapshotView};

/// Of a segment.
const RUN: u64 = 8;
const BLOCKS: u64 = 4 * RUN;
const CLONE: [u8; 16] = [9; 16];

/// Contents that are found again when they are written again.
fn run() -> Vec<Version> {
    indexed()[..1].iter().copied().chain(100..99 + RUN).collect()
}

fn hits(owner: &Owner) -> u64 {
    owner.volume.core.reader.tally.hits.get()
}

/// A volume with one segment that holds [`run`], the first half of which is garbage.
fn half_garbage(seed: u64) -> (Bench, Owner, Vec<Version>) {
    let mut bench = Bench::new(seed, BLOCKS, Durability::Remote);
    bench.settings = Settings { gathers: false, segment_bytes: RUN * BLOCK as u64, checkpoint_segments: 1000, ..bench.settings };
    let owner = bench.open(&bench.disk());
    let mut expected = vec![0; BLOCKS as usize];
    put(&bench, &owner, &mut expected, 0, &run());
    put(&bench, &owner, &mut expected, 0, &[501, 502, 503, 504]);
    bench.checkpoint(&owner);
    bench.pass(&owner, Duration::from_secs(1));
    (bench, owner, expected)
}

fn put(bench: &Bench, owner: &Owner, expected: &mut [Version], at: u64, versions: &[Version]) {
    bench.write(owner, at, versions).unwrap();
    expected[at as usize..at as usize + versions.len()].copy_from_slice(versions);
}

/// The segment of [`half_garbage`] that holds the run.
fn segment() -> String {
    Source { group: VOLUME, family: Family::Step, epoch: 1, number: 0 }.path()
}

fn is_there(bench: &Bench, name: &str) -> bool {
    bench.store.names().iter().any(|one| one == name)
}

/// What was chosen to go takes no hits, and what is written meanwhile does not refer to it: however far its retirement is.
#[test]
fn case_12_duplicates_are_written_at_each_step_of_the_retirement_of_what_holds_them() {
    for seed in 12_000..12_005 {
        for (verb, part) in [(Verb::Create, "/g/"), (Verb::Create, "/m/"), (Verb::Swap, "/root"), (Verb::Delete, "/w/")] {
            for (leg, is_killed) in [(Leg::There, false), (Leg::Back, false), (Leg::There, true), (Leg::Back, true)] {
                let (bench, owner, mut expected) = half_garbage(seed);
                let process = owner.process;
                let place = format!("seed {seed}, {verb:?} {part}, {leg:?}, killed: {is_killed}");
                let hold = bench.store.hold(leg, move |request| request.process == process && request.is(verb, part));
                let volume = owner.volume.clone();
                let collecting = bench.begin(process, async move { volume.gather(1.0).await });
                bench.until("the step of the retirement", || hold.has_begun());
                put(&bench, &owner, &mut expected, RUN, &run());
                assert_eq!(hits(&owner), 0, "{place}: what is about to go was hit");
                assert_eq!(bench.content(&owner).unwrap(), expected, "{place}");
                let owner = if is_killed {
                    bench.kill(owner);
                    let next = bench.open(&bench.disk());
                    hold.release();
                    next
                } else {
                    hold.release();
                    assert_eq!(bench.end(&collecting).unwrap().blocks_moved, RUN / 2, "{place}");
                    assert!(!is_there(&bench, &segment()), "{place}");
                    owner
                };
                assert_eq!(bench.content(&owner).unwrap(), expected, "{place}");
                bench.scan(&owner);
                assert_eq!(bench.content(&owner).unwrap(), expected, "{place}");
            }
        }
    }
}

/// A step that has found duplicates keeps what holds them, however long it is on its way.
#[test]
fn case_12_a_collection_leaves_what_a_step_on_its_way_refers_to() {
    for seed in 12_100..12_105 {
        for (leg, is_killed) in [(Leg::There, false), (Leg::Back, false), (Leg::There, true), (Leg::Back, true)] {
            let (bench, owner, mut expected) = half_garbage(seed);
            let process = owner.process;
            let place = format!("seed {seed}, {leg:?}, killed: {is_killed}");
            let hold = bench.store.hold(leg, move |request| request.process == process && request.is(Verb::Create, "/w/"));
            let volume = owner.volume.clone();
            let bytes = Bytes::from(contents_of(&run()));
            let writing = bench.begin(process, async move {
                volume.write(RUN * BLOCK as u64, bytes).await?;
                volume.flush().await
            });
            bench.until("the step", || hold.has_begun());
            bench.gather(&owner);
            assert!(is_there(&bench, &segment()), "{place}: what a step on its way refers to is gone");
            hold.release();
            let owner = if is_killed {
                bench.kill(owner);
                bench.open(&bench.disk())
            } else {
                bench.end(&writing).unwrap();
                assert_eq!(hits(&owner), RUN, "{place}: nothing was hit");
                owner
            };
            let found = bench.content(&owner).unwrap();
            expected[RUN as usize..2 * RUN as usize].copy_from_slice(&run());
            // Nobody was told that it was flushed if its owner was killed.
            assert!(found == expected || is_killed && found[RUN as usize..] == vec![0; 3 * RUN as usize], "{place}: {found:?}");
            bench.gather(&owner);
            assert_eq!(bench.content(&owner).unwrap(), found, "{place}");
            bench.scan(&owner);
        }
    }
}

/// The objects with the volume's blocks.
fn with_data(owner: &Owner) -> Vec<String> {
    let table = owner.volume.core.reader.table.borrow();
    let has_data = |entry: &Entry| entry.is_live() && entry.content == Content::Data;
    table.used().filter(|(_, entry)| has_data(entry)).filter_map(|(handle, _)| Some(table.source(handle)?.path())).collect()
}

fn reads_of(process: ProcessId, group: [u8; 16], families: &'static [&'static str]) -> impl Fn(&Request) -> bool {
    move |request| {
        request.process == process
            && request.verb == Verb::Read
            && request.name.starts_with(&group_path(&group))
            && families.iter().any(|family| request.name.contains(family))
    }
}

/// The parent moves what its clone wants while the clone's request is on its way: once, and once more while the next request is.
#[test]
fn case_41_a_collection_moves_what_a_clone_reads_while_the_read_waits() {
    for seed in 41_000..41_010 {
        for is_view in [false, true] {
            let (bench, owner, expected) = half_garbage(seed);
            let parts = owner.parts.clone();
            let cloned = bench.run(&owner, |volume| async move {
                volume.snapshot("s", 0).await?;
                volume.wait_for_snapshot("s").await?;
                clone_snapshot(&parts, VOLUME, "s", CLONE).await
            });
            cloned.unwrap();
            // Moves together with what the clone reads, and becomes garbage later.
            bench.write(&owner, 2 * RUN, &numbers(800)[..RUN as usize]).unwrap();
            bench.write(&owner, 2 * RUN, &numbers(900)[..RUN as usize / 2]).unwrap();
            bench.checkpoint(&owner);
            let (process, parts) = bench.parts(&bench.disk());
            let settings = bench.settings;
            let opening = async move {
                let clone = MappedVolume::open(&parts, CLONE, settings).await?;
                clone.snapshot("t", 0).await?;
                clone.wait_for_snapshot("t").await?;
                SnapshotView::open(&parts, CLONE, "t").await.map(|view| (clone, view))
            };
            let (clone, view) = bench.world.wait_for(process, opening).unwrap().unwrap();
            let before = clone.core.reader.tally.foreign_forwards.get();

            let first = bench.store.hold(Leg::There, reads_of(process, VOLUME, &["/w/"]));
            let reader = clone.clone();
            let reading = bench.begin(process, async move {
                let offset = RUN / 2 * BLOCK as u64;
                if is_view { view.read(offset, BLOCK as u64).await.ok() } else { reader.read(offset, BLOCK as u64).await.ok() }
            });
            bench.until("the read", || first.has_begun());
            bench.gather(&owner);
            assert!(!is_there(&bench, &segment()), "seed {seed}: it was not moved");
            let new: Vec<String> = with_data(&owner).into_iter().filter(|name| name.contains("/g/")).collect();
            assert_eq!(new.len(), 1, "seed {seed}: {new:?}");
            let second = bench.store.hold(Leg::There, reads_of(process, VOLUME, &["/g/"]));
            first.release();
            bench.until("the read of where it was moved to", || second.has_begun());
            bench.write(&owner, 2 * RUN + RUN / 2, &numbers(900)[..RUN as usize / 2]).unwrap();
            bench.checkpoint(&owner);
            bench.gather(&owner);
            assert!(new.iter().any(|name| !is_there(&bench, name)), "seed {seed}: it was not moved again");
            second.release();
            let read = bench.end(&reading).expect("it is found where it is now");
            assert!(read == content_of(expected[RUN as usize / 2]), "seed {seed}, view: {is_view}");
            if !is_view {
                assert!(clone.core.reader.tally.foreign_forwards.get() > before, "seed {seed}: nothing was followed");
            }
            let all = bench.world.wait_for(process, async move { clone.read(0, clone.size()).await.map(|all| (all, clone)) });
            let (all, clone) = all.unwrap().unwrap();
            assert_eq!(versions_in(&all), expected, "seed {seed}");
            drop(clone);
            bench.world.kill(process);
            bench.scan(&owner);
        }
    }
}

/// The handle of an object that is gone stands for another one only when nobody can mean the first any more.
#[test]
fn case_49_a_handle_is_used_again_only_when_no_reader_may_mean_what_it_stood_for() {
    for seed in 49_000..49_010 {
        let (bench, owner, mut expected) = half_garbage(seed);
        let reader = &owner.volume.core.reader;
        let gone = Source::parse(&segment()).unwrap();
        let handle = reader.table.borrow().handle_of(&gone).unwrap();
        let (process, name) = (owner.process, segment());
        let hold = bench.store.hold(Leg::There, move |request| request.process == process && request.is(Verb::Read, &name));
        let volume = owner.volume.clone();
        let reading = bench.begin(process, async move { volume.read(RUN / 2 * BLOCK as u64, BLOCK as u64).await });
        bench.until("the read", || hold.has_begun());

        // What it reads is overwritten, and its object goes.
        put(&bench, &owner, &mut expected, RUN / 2, &[601, 602, 603, 604]);
        bench.checkpoint(&owner);
        bench.gather(&owner);
        assert!(!is_there(&bench, &segment()), "seed {seed}");
        bench.checkpoint(&owner);
        let other = |handle| reader.table.borrow().source(handle);
        let fill = |expected: &mut Vec<Version>, from: Version| {
            for round in 0..4 {
                let versions: Vec<Version> = (from + round * RUN..from + (round + 1) * RUN).collect();
                put(&bench, &owner, expected, 2 * RUN, &versions);
            }
            bench.checkpoint(&owner);
        };
        fill(&mut expected, 1000);
        assert_eq!(other(handle), None, "seed {seed}: the handle stands for another object while somebody reads the first");
        assert!(reader.tally.handles_held.get() > 0, "seed {seed}");
        hold.release();
        let read = bench.end(&reading).unwrap();
        assert!([expected[RUN as usize / 2], run()[RUN as usize / 2]].map(content_of).contains(&read), "seed {seed}");

        // Then it is given to another one, and whoever looked at the first remembers nothing of it.
        bench.checkpoint(&owner);
        fill(&mut expected, 2000);
        assert!(other(handle).is_some_and(|source| source != gone), "seed {seed}: the handle was not used again");
        put(&bench, &owner, &mut expected, RUN, &run());
        assert_eq!(hits(&owner), 0, "seed {seed}: the index took what the handle stands for now for what it stood for");
        assert_eq!(bench.content(&owner).unwrap(), expected, "seed {seed}");
        bench.scan(&owner);
        let content = bench.content(&owner).unwrap();
        bench.kill(owner);
        assert_eq!(bench.content(&bench.open(&bench.disk())).unwrap(), content, "seed {seed}");
    }
}
