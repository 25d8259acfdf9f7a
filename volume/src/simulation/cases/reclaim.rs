//! Cases about getting space back: trims, garbage, full stores.

use std::cell::Cell;
use std::rc::Rc;
use std::time::Duration;

use bytes::Bytes;

use super::bench::{Begun, Bench, Owner};
use super::{families, schedules};
use crate::error::VolumeError;
use crate::gather::{Gathered, Which};
use crate::segment::BLOCK;
use crate::simulation::contents::{Version, content_of};
use crate::simulation::disk::HostDisk;
use crate::simulation::requests::{Leg, Verb};
use crate::{Durability, Settings};

const BLOCKS: u64 = 64;
/// Long enough for a volume that nobody uses to tidy up.
const IDLE: Duration = Duration::from_secs(120);

fn numbers(from: Version) -> Vec<Version> {
    (from..from + BLOCKS).collect()
}

#[test]
fn case_22_a_trim_of_terabytes_costs_a_handful_of_objects() {
    // More than one extent can say, too.
    for (seed, tib) in (2_200..).zip([4, 20]) {
        let blocks = tib << 28;
        let bench = Bench::new(seed, blocks, Durability::Local);
        let disk = bench.disk();
        let owner = bench.open(&disk);
        let places: Vec<u64> = (0..64).map(|number| number * (blocks / 64) + number).collect();
        for (number, block) in (1..).zip(&places) {
            bench.write(&owner, *block, &[number]).unwrap();
        }
        bench.run(&owner, |volume| async move {
            volume.destage().await.unwrap();
            volume.checkpoint().await.unwrap();
        });
        let (objects, bytes) = (bench.store.names().len(), bench.store.used());
        let size = blocks * BLOCK as u64;
        for discard in [true, false] {
            bench.run(&owner, move |volume| async move {
                volume.zero(0, size, discard).await.unwrap();
                volume.destage().await.unwrap();
                volume.checkpoint().await.unwrap();
            });
        }
        assert!(bench.store.names().len() < objects + 8, "{tib} TiB: {} objects", bench.store.names().len());
        bench.run(&owner, |volume| async move { volume.gather(1.0).await }).unwrap();
        assert!(bench.store.used() < bytes, "{tib} TiB: {} bytes, {bytes} before", bench.store.used());
        bench.kill(owner);
        let owner = bench.open(&disk);
        for block in places {
            let read = bench.run(&owner, move |volume| async move { volume.read(block * BLOCK as u64, BLOCK as u64).await });
            assert!(read.unwrap() == content_of(0), "{tib} TiB: block {block}");
        }
        bench.scan(&owner);
    }
}

#[test]
fn case_20_the_store_is_away_for_long_while_a_checkpoint_and_a_collection_read_it() {
    for seed in 2_000..2_020 {
        let mut bench = Bench::new(seed, BLOCKS, Durability::Local);
        bench.settings = Settings { page_cache_bytes: 0, deduplicate: seed % 2 == 0, ..bench.settings };
        // A log that has room for what is written while the store is away.
        let owner = bench.open(&HostDisk::new(&bench.world, 256 * BLOCK, 4096));
        bench.write(&owner, 0, &numbers(100)).unwrap();
        bench.pass(&owner, IDLE);
        bench.write(&owner, 0, &numbers(200)[..32]).unwrap();
        bench.store.set_faults(1000);
        bench.pass(&owner, Duration::from_secs(seed % 7));
        bench.write(&owner, 32, &numbers(300)[..16]).unwrap();
        bench.pass(&owner, Duration::from_secs(3600));
        assert_eq!(owner.volume.failed(), None, "seed {seed}");
        bench.store.set_faults(0);
        bench.pass(&owner, IDLE);
        assert_eq!(owner.volume.failed(), None, "seed {seed}");
        let expected = [&numbers(200)[..32], &numbers(300)[..16], &numbers(100)[48..]].concat();
        assert!(bench.content(&owner).unwrap() == expected, "seed {seed}");
        bench.scan(&owner);
    }
}

#[test]
fn what_is_trimmed_deleted_or_rolled_back_comes_back_by_itself() {
    let bench = Bench::new(4_000, BLOCKS, Durability::Local);
    let owner = bench.open(&bench.disk());
    let stored = |blocks: u64, what: &str| {
        bench.pass(&owner, IDLE);
        assert_eq!(owner.volume.usage().reduced.unique, blocks * BLOCK as u64, "{what}");
    };
    let half = BLOCKS / 2 * BLOCK as u64;
    bench.write(&owner, 0, &numbers(100)).unwrap();
    stored(BLOCKS, "as it was written");
    bench.run(&owner, move |volume| async move { volume.zero(0, half, true).await }).unwrap();
    stored(BLOCKS / 2, "after a trim");
    bench.write(&owner, 0, &numbers(200)).unwrap();
    bench.run(&owner, |volume| async move { volume.snapshot("s", 0).await }).unwrap();
    bench.write(&owner, 0, &numbers(300)).unwrap();
    stored(2 * BLOCKS, "with a snapshot");
    bench.run(&owner, |volume| async move { volume.roll_back("s").await }).unwrap();
    stored(BLOCKS, "after going back to it");
    bench.write(&owner, 0, &numbers(400)).unwrap();
    stored(2 * BLOCKS, "overwritten again");
    bench.run(&owner, |volume| async move { volume.delete_snapshot("s").await }).unwrap();
    stored(BLOCKS, "without the snapshot");
    bench.run(&owner, move |volume| async move { volume.zero(half, half, false).await }).unwrap();
    stored(BLOCKS / 2, "after writing zeroes");
    bench.run(&owner, move |volume| async move { volume.resize(BLOCK as u64).await }).unwrap();
    stored(1, "after making it smaller");
}

/// What a snapshot keeps is no garbage when it is overwritten, and nobody looks for any.
#[test]
fn what_is_overwritten_beside_a_snapshot_is_garbage_only_the_second_time() {
    for is_reopened in [false, true] {
        let mut bench = Bench::new(4_050, BLOCKS, Durability::Local);
        bench.settings = Settings { gathers: false, deduplicate: false, ..bench.settings };
        let disk = bench.disk();
        let mut owner = bench.open(&disk);
        bench.write(&owner, 0, &numbers(100)).unwrap();
        bench.run(&owner, |volume| async move {
            volume.snapshot("s", 0).await.unwrap();
            volume.wait_for_snapshot("s").await.unwrap();
        });
        if is_reopened {
            bench.kill(owner);
            owner = bench.open(&disk);
        }
        bench.gather(&owner);
        let core = &owner.volume.core;
        let garbage = || core.garbage_max(core.reader.table.borrow().stored_blocks());
        for (version, fewest, most) in [(200, 0, BLOCKS / 4), (300, BLOCKS, BLOCKS + BLOCKS / 4)] {
            bench.write(&owner, 0, &numbers(version)).unwrap();
            bench.checkpoint(&owner);
            assert!((fewest..=most).contains(&garbage()), "reopened: {is_reopened}, {version}: {}", garbage());
        }
    }
}

/// However many snapshots there are, what a collection reads of their maps it reads by the stretch, and each stretch once.
#[test]
fn a_collection_reads_the_maps_of_many_snapshots_in_few_requests() {
    const LEAF: u64 = 512;
    const LEAVES: u64 = 128;
    const SNAPSHOTS: u64 = 24;
    let mut bench = Bench::new(4_100, LEAVES * LEAF, Durability::Local);
    bench.settings = Settings { gathers: false, segment_bytes: 1 << 20, ..bench.settings };
    let disk = bench.disk();
    let owner = bench.open(&disk);
    for number in 0..SNAPSHOTS {
        let changes: Vec<u64> = (0..LEAVES).map(|leaf| leaf * LEAF + number).collect();
        bench.run(&owner, |volume| async move {
            for block in changes {
                volume.write(block * BLOCK as u64, Bytes::from(content_of(1 + number))).await.unwrap();
            }
            let name = format!("s{number}");
            volume.snapshot(&name, 0).await.unwrap();
            volume.wait_for_snapshot(&name).await.unwrap();
        });
    }
    bench.kill(owner);
    let owner = bench.open(&disk);
    let reads = || bench.store.requests.of(owner.process).iter().filter(|request| request.is(Verb::Read, "/g/")).count() as u64;
    let before = reads();
    bench.gather(&owner);
    let (read, leaves) = (reads() - before, SNAPSHOTS * LEAVES);
    assert!(read <= leaves / 16, "{read} requests for {leaves} pages of {SNAPSHOTS} snapshots");
}

/// A volume with objects of so many blocks, the first half of each overwritten, and what it holds.
fn half_overwritten(seed: u64, segment: u64) -> (Bench, Owner, Vec<Version>) {
    let mut bench = Bench::new(seed, BLOCKS, Durability::Remote);
    let segment_bytes = segment * BLOCK as u64;
    bench.settings = Settings { gathers: false, segment_bytes, checkpoint_segments: 1000, marked_max: 60, ..bench.settings };
    let owner = bench.open(&bench.disk());
    // The index knows few of the blocks: other ones each time.
    let mut expected = numbers(1_000 * seed);
    bench.write(&owner, 0, &expected).unwrap();
    for first in (0..BLOCKS).step_by(segment as usize) {
        let half: Vec<Version> = (first..first + segment / 2).map(|block| 200 + block).collect();
        put(&bench, &owner, &mut expected, first, &half);
    }
    bench.checkpoint(&owner);
    (bench, owner, expected)
}

fn put(bench: &Bench, owner: &Owner, expected: &mut [Version], first: u64, versions: &[Version]) {
    bench.write(owner, first, versions).unwrap();
    expected[first as usize..first as usize + versions.len()].copy_from_slice(versions);
}

fn tidy(bench: &Bench, owner: &Owner) -> Begun<Result<Gathered, VolumeError>> {
    let volume = owner.volume.clone();
    bench.begin(owner.process, async move { volume.core.collect(Which::Tidy).await })
}

/// Tidies up until the volume is written to, while the first victims are rewritten.
fn tidy_until_written_to(bench: &Bench, owner: &Owner, expected: &mut [Version]) -> Gathered {
    let process = owner.process;
    let hold = bench.store.hold(Leg::There, move |request| request.process == process && request.is(Verb::Create, "/g/"));
    let collecting = tidy(bench, owner);
    bench.until("the first victims", || hold.has_begun());
    put(bench, owner, expected, 0, &numbers(300)[..8]);
    hold.release();
    bench.end(&collecting).unwrap()
}

/// A volume that rests is tidied up victim by victim, and no longer than it rests.
#[test]
fn tidying_up_ends_when_the_volume_is_written_to_and_goes_on_later() {
    for seed in 4_200..4_205 {
        let (bench, owner, mut expected) = half_overwritten(seed, 8);
        let first = tidy_until_written_to(&bench, &owner, &mut expected);
        assert!((1..=8).contains(&first.blocks_moved), "seed {seed}: {first:?}");
        assert_eq!(bench.content(&owner).unwrap(), expected, "seed {seed}");
        while bench.end(&tidy(&bench, &owner)).unwrap().blocks_moved > 0 {}
        assert_eq!(owner.volume.usage().reduced.unique, BLOCKS * BLOCK as u64, "seed {seed}: garbage is left");
        assert_eq!(bench.content(&owner).unwrap(), expected, "seed {seed}");
        bench.scan(&owner);
    }
}

/// What was to be rewritten and was left as it is, is found again by whoever writes the same.
#[test]
fn what_tidying_up_left_takes_hits_again() {
    let mut hits = 0;
    for seed in 4_210..4_270 {
        let (bench, owner, mut expected) = half_overwritten(seed, BLOCKS / 2);
        let blocks = |handle| owner.volume.core.reader.table.borrow().get(handle).map_or(0, |entry| u64::from(entry.blocks));
        if [0, 1].map(blocks) != [BLOCKS / 2; 2] {
            // They were cut elsewhere, and it is not certain which is left.
            continue;
        }
        tidy_until_written_to(&bench, &owner, &mut expected);
        let before = owner.volume.core.reader.tally.hits.get();
        let kept = expected[BLOCKS as usize / 4 * 3..].to_vec();
        put(&bench, &owner, &mut expected, BLOCKS / 2, &kept);
        bench.checkpoint(&owner);
        hits += owner.volume.core.reader.tally.hits.get() - before;
        assert_eq!(bench.content(&owner).unwrap(), expected, "seed {seed}");
        bench.scan(&owner);
    }
    assert!(hits > 0);
}

/// How much garbage earlier owners left is known when the volume was tidied up, not when something else was collected.
#[test]
fn a_volume_that_was_opened_again_and_written_to_is_tidied_up_when_it_rests() {
    let mut bench = Bench::new(4_070, BLOCKS, Durability::Local);
    bench.settings = Settings { gathers: false, ..bench.settings };
    let disk = bench.disk();
    let owner = bench.open(&disk);
    bench.write(&owner, 0, &numbers(100)).unwrap();
    bench.write(&owner, 0, &numbers(200)[..8]).unwrap();
    bench.checkpoint(&owner);
    bench.kill(owner);
    let owner = bench.open(&disk);
    let core = owner.volume.core.clone();
    assert_eq!(core.due_collection(true), None, "nothing was changed");
    bench.change(&owner, 20, 300);
    bench.checkpoint(&owner);
    bench.run(&owner, |volume| async move { volume.core.collect(Which::Below(0.0)).await.map(drop) }).unwrap();
    assert_eq!(core.due_collection(true), Some(Which::Tidy));
    bench.end(&tidy(&bench, &owner)).unwrap();
    assert_eq!(core.due_collection(true), None, "it is tidy");
}

/// A snapshot that is deleted while a collection looks at its map counted there: somebody looks again.
#[test]
fn what_a_snapshot_had_that_was_deleted_during_a_collection_is_collected_later() {
    let mut bench = Bench::new(4_060, BLOCKS, Durability::Local);
    bench.settings = Settings { gathers: false, deduplicate: false, page_cache_bytes: 0, ..bench.settings };
    let disk = bench.disk();
    let owner = bench.open(&disk);
    bench.write(&owner, 0, &numbers(100)).unwrap();
    bench.run(&owner, |volume| async move {
        volume.snapshot("s", 0).await.unwrap();
        volume.wait_for_snapshot("s").await.unwrap();
    });
    bench.write(&owner, 0, &numbers(200)).unwrap();
    // A collection begins with what changed since the last checkpoint.
    bench.checkpoint(&owner);
    bench.kill(owner);
    let owner = bench.open(&disk);
    let process = owner.process;
    let hold = bench.store.hold(Leg::There, move |request| request.process == process && request.is(Verb::Read, "/g/"));
    let collecting = tidy(&bench, &owner);
    bench.until("its marking", || hold.has_begun());
    bench.run(&owner, |volume| async move { volume.delete_snapshot("s").await }).unwrap();
    assert!(!collecting.is_done());
    hold.release();
    bench.end(&collecting).unwrap();
    let core = &owner.volume.core;
    let stored = core.reader.table.borrow().stored_blocks();
    assert_eq!(core.garbage_max(stored), stored, "what the snapshot had is still taken for used");
}

#[test]
fn case_44_a_store_is_full_while_blocks_are_trimmed_and_garbage_is_collected() {
    let mut stalled = 0;
    for seed in 4_400..4_430 {
        let bench = Bench::new(seed, BLOCKS, Durability::Local);
        let disk = bench.disk();
        let owner = bench.open(&disk);
        bench.write(&owner, 0, &numbers(100)).unwrap();
        bench.run(&owner, |volume| async move { volume.snapshot("s", 0).await }).unwrap();
        bench.run(&owner, |volume| async move { volume.wait_for_snapshot("s").await }).unwrap();
        bench.store.set_capacity(Some(bench.store.used() + bench.world.random.below(4_000)));

        // Somebody writes, trims and flushes, and garbage is collected, whatever comes of it.
        let acknowledged: Rc<Cell<u64>> = Rc::default();
        let (volume, count) = (owner.volume.clone(), acknowledged.clone());
        let writing = async move {
            for round in 0..40 {
                for block in 0..BLOCKS {
                    let (offset, len) = (block * BLOCK as u64, BLOCK as u64);
                    let bytes = Bytes::from(content_of(200 + round * BLOCKS + block));
                    volume.write(offset, bytes).await.unwrap();
                    count.set(count.get() + 1);
                    if block % 8 == 7 {
                        volume.zero(offset, len, true).await.unwrap();
                        volume.flush().await.unwrap();
                    }
                }
            }
        };
        bench.world.spawn(owner.process, Box::pin(writing));
        let volume = owner.volume.clone();
        let collecting = async move {
            volume.delete_snapshot("s").await.unwrap();
            volume.gather(1.0).await.unwrap();
        };
        bench.world.spawn(owner.process, Box::pin(collecting));
        bench.steps(5_000);
        let is_done = acknowledged.get() == 40 * BLOCKS;
        stalled += u64::from(!is_done);
        let expected = |acknowledged: u64, block: u64| {
            let rounds = acknowledged / BLOCKS + u64::from(block < acknowledged % BLOCKS);
            let version = |rounds: u64| if rounds == 0 { 100 + block } else { 200 + (rounds - 1) * BLOCKS + block };
            // One more write, or one trim, may be on its way.
            [version(rounds), version(rounds + 1), 0]
        };
        let before = acknowledged.get();
        for (block, found) in (0..).zip(bench.content(&owner).unwrap()) {
            let after = acknowledged.get();
            assert!(
                expected(before, block).contains(&found) || expected(after, block).contains(&found),
                "seed {seed}: block {block} reads as {found} with {before} to {after} writes acknowledged"
            );
        }

        let is_killed = bench.world.random.per_mille(500);
        let owner = if is_killed {
            bench.kill(owner);
            let kept = acknowledged.get();
            // Opening it writes to the store too.
            let refused = bench.try_open(&disk, bench.settings);
            bench.store.set_capacity(None);
            let owner = refused.unwrap_or_else(|_| bench.open(&disk));
            for (block, found) in (0..).zip(bench.content(&owner).unwrap()) {
                assert!(expected(kept, block).contains(&found), "seed {seed}: block {block} is {found} after {kept} writes");
            }
            owner
        } else {
            bench.store.set_capacity(None);
            while acknowledged.get() < 40 * BLOCKS {
                bench.steps(1);
            }
            owner
        };
        bench.pass(&owner, IDLE);
        bench.scan(&owner);
    }
    assert!(stalled > 10, "{stalled} stores were full");
}

#[test]
fn case_45_schedules_delete_nothing_that_the_newest_checkpoint_needs() {
    // The store watches each deletion.
    let mut seen = schedules(4_500..4_540);
    seen += families(4_500..4_520);
    assert!(seen.collections > 0 && seen.takeovers > 0 && seen.snapshots_deleted > 0 && seen.flattened > 0, "{seen}");
}

#[test]
fn the_watch_on_deletions_finds_all_that_a_volume_needs() {
    let bench = Bench::new(4_500, BLOCKS, Durability::Remote);
    let settings = Settings { checkpoint_segments: 1000, ..bench.settings };
    let owner = bench.try_open(&bench.disk(), settings).unwrap();
    bench.write(&owner, 0, &numbers(100)).unwrap();
    bench.run(&owner, |volume| async move { volume.checkpoint().await }).unwrap();
    bench.write(&owner, 0, &numbers(200)[..8]).unwrap();
    let needed = |letter: &str| {
        let names = bench.store.names().into_iter().filter(|name| name.contains(letter));
        names.filter(|name| bench.store.may_delete(name).is_err()).count()
    };
    let all = |letter: &str| bench.store.names().iter().filter(|name| name.contains(letter)).count();
    assert_eq!((needed("/w/"), needed("/g/"), needed("/m/")), (all("/w/"), all("/g/"), all("/m/")));
    assert!(all("/w/") > 16 && all("/g/") > 0 && all("/m/") == 1);
    assert_eq!(bench.store.may_delete(&bench.store.names()[0].replace("/0000", "/ffff")), Ok(()));
}
