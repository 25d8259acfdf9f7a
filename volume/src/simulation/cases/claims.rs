//! Owners that come and go while requests of the one before are still on their way.

use std::time::Duration;

use backends::segments::StoreError;
use backends::segments::probe::prove;
use blockdev::Errno;
use bytes::Bytes;
use uuid::Uuid;

use super::bench::{BLOCKS, Begun, Bench, Owner, numbers};
use crate::names::{Family, Source, root_path};
use crate::object::CLEAR_LEN;
use crate::segment::BLOCK;
use crate::simulation::VOLUME;
use crate::simulation::contents::{Version, contents_of, indexed};
use crate::simulation::requests::{Leg, Verb};
use crate::{Durability, MappedVolume, Settings, VolumeError};

const RUN: u64 = BLOCKS / 2;

fn bench(seed: u64, durability: Durability) -> Bench {
    let mut bench = Bench::new(seed, BLOCKS, durability);
    bench.settings = Settings { gathers: false, checkpoint_segments: 1000, ..bench.settings };
    bench
}

/// A step of the history.
fn step(epoch: u64, number: u64) -> String {
    Source { group: VOLUME, family: Family::Step, epoch, number }.path()
}

/// Of the first owner.
fn steps(bench: &Bench) -> u64 {
    (0..).find(|number| !is_there(bench, &step(1, *number))).expect("there are not many")
}

fn is_there(bench: &Bench, name: &str) -> bool {
    bench.store.content(name).is_some_and(|content| content.len() > CLEAR_LEN)
}

/// Writes all blocks and flushes, some time.
fn write_and_flush(bench: &Bench, owner: &Owner, from: Version) -> Begun<Result<(), Errno>> {
    let volume = owner.volume.clone();
    bench.begin(owner.process, async move {
        for (block, version) in (0..).zip(numbers(from)) {
            volume.write(block * BLOCK as u64, Bytes::from(contents_of(&[version]))).await?;
        }
        volume.flush().await
    })
}

/// Segments overtake each other. What lies behind the one that is missing is no part of the history, and nobody is told that it is.
#[test]
fn case_07_a_segment_overtakes_the_one_before_it() {
    for seed in 700..710 {
        for hole in 0..3 {
            let place = format!("seed {seed}, {hole} before the hole");
            let bench = bench(seed, Durability::Remote);
            let first = bench.open(&bench.disk());
            bench.write(&first, 0, &numbers(100)).unwrap();
            let begins = steps(&bench);
            let (missing, last) = (step(1, begins + hole), step(1, begins + 3));
            let held = missing.clone();
            let hold = bench.store.hold(Leg::There, move |request| request.is(Verb::Create, &held));
            let writing = write_and_flush(&bench, &first, 200);
            bench.until("the segment behind the hole", || is_there(&bench, &last));
            assert!(hold.has_begun() && !is_there(&bench, &missing), "{place}");
            bench.pass(&first, Duration::from_secs(30));
            assert!(!writing.is_done(), "{place}: a flush came back with a hole");
            assert_eq!(bench.content(&first).unwrap(), numbers(200), "{place}");
            bench.kill(first);

            let second = bench.open(&bench.disk());
            let there = 4 * hole as usize;
            let expected = [&numbers(200)[..there], &numbers(100)[there..]].concat();
            assert_eq!(bench.content(&second).unwrap(), expected, "{place}");
            // Too late.
            hold.release();
            bench.write(&second, 0, &[900]).unwrap();
            assert!(!is_there(&bench, &missing), "{place}: it came through in spite of the seal");
            let expected = [&[900], &expected[1..]].concat();
            assert_eq!(bench.content(&second).unwrap(), expected, "{place}");
            bench.kill(second);
            let third = bench.open(&bench.disk());
            assert_eq!(bench.content(&third).unwrap(), expected, "{place}");
            bench.scan(&third);
        }
    }
}

/// The next owner has seen that there is nothing, and the segment comes through before its seal, or after it.
#[test]
fn case_29_an_old_request_comes_through_between_the_look_and_the_seal_or_after_it() {
    for seed in 2_900..2_910 {
        for is_before in [true, false] {
            let place = format!("seed {seed}, before the seal: {is_before}");
            let bench = bench(seed, Durability::Remote);
            let first = bench.open(&bench.disk());
            bench.write(&first, 0, &numbers(100)).unwrap();
            let begins = steps(&bench);
            let (name, process) = (step(1, begins), first.process);
            let held = name.clone();
            let put = bench.store.hold(Leg::There, move |request| request.process == process && request.is(Verb::Create, &held));
            let volume = first.volume.clone();
            let writing = bench.begin(process, async move {
                volume.write(0, Bytes::from(contents_of(&[200]))).await?;
                volume.flush().await
            });
            bench.until("the segment", || put.has_begun());

            let (successor, parts) = bench.parts(&bench.disk());
            let held = name.clone();
            let seal = bench.store.hold(if is_before { Leg::There } else { Leg::Back }, move |request| {
                request.process == successor && request.is(Verb::Create, &held)
            });
            let settings = bench.settings;
            let opening = bench.begin(successor, async move { MappedVolume::open(&parts, VOLUME, settings).await });
            bench.until("the seal", || seal.has_begun());
            put.release();
            bench.pass(&first, Duration::from_millis(100));
            assert_eq!(is_there(&bench, &name), is_before, "{place}");
            let told = is_before.then(|| bench.end(&writing));
            seal.release();
            let volume = bench.end(&opening).unwrap();
            let read = bench.world.wait_for(successor, async move { volume.read(0, BLOCK as u64).await }).unwrap().unwrap();
            // It was told of no flush that its successor does not know.
            assert!(told.is_none_or(|told| told.is_ok()), "{place}");
            assert!(read == contents_of(&[if is_before { 200 } else { 100 }]), "{place}");
            bench.pass(&first, Duration::from_secs(20));
            assert!(is_before || bench.end(&writing).is_err(), "{place}");
            assert_eq!(first.volume.failed(), Some(VolumeError::Fenced), "{place}");
            bench.world.kill(successor);
            bench.kill(first);
            bench.scan(&bench.open(&bench.disk()));
        }
    }
}

/// What the first owner wanted to delete is hit by the second one, if it can be, before the request comes through.
#[test]
fn case_31_a_deletion_of_an_owner_that_was_replaced_comes_through_after_the_next_one_has_written_duplicates() {
    let run: Vec<Version> = indexed()[..1].iter().copied().chain(100..99 + RUN).collect();
    for seed in 31_000..31_010 {
        for (verb, part, leg) in
            [(Verb::Swap, "/root", Leg::There), (Verb::Delete, "/w/", Leg::There), (Verb::Delete, "/w/", Leg::Unheard)]
        {
            let place = format!("seed {seed}, {verb:?}, {leg:?}");
            let mut bench = bench(seed, Durability::Remote);
            bench.settings.segment_bytes = RUN * BLOCK as u64;
            let first = bench.open(&bench.disk());
            bench.write(&first, 0, &run).unwrap();
            bench.checkpoint(&first);
            bench.write(&first, 0, &numbers(500)[..RUN as usize - 1]).unwrap();
            bench.checkpoint(&first);
            let process = first.process;
            let hold = bench.store.hold(leg, move |request| request.process == process && request.is(verb, part));
            let volume = first.volume.clone();
            let collecting = bench.begin(process, async move { volume.gather(1.0).await.map(drop) });
            bench.until("the request", || hold.has_begun());

            let second = bench.open(&bench.disk());
            bench.pass(&second, Duration::from_secs(1));
            let expected = [&numbers(500)[..RUN as usize - 1], &run[RUN as usize - 1..], &run[..]].concat();
            bench.write(&second, RUN, &run).unwrap();
            let hits = second.volume.core.reader.tally.hits.get();
            // As long as no root says that it goes, it may be hit; afterwards nobody knows of it.
            assert_eq!(hits > 0, verb == Verb::Swap, "{place}: {hits} hits");
            let segment = step(1, 0);
            // The new owner may have deleted by itself what the root says is to go.
            assert!(is_there(&bench, &segment) || verb == Verb::Delete, "{place}");
            hold.release();
            bench.pass(&second, Duration::from_secs(20));
            assert_eq!(is_there(&bench, &segment), verb == Verb::Swap, "{place}");
            assert_eq!(bench.content(&second).unwrap(), expected, "{place}");
            if verb == Verb::Swap {
                assert_eq!(bench.end(&collecting), Err(VolumeError::Fenced), "{place}");
            }
            assert_eq!(first.volume.failed(), Some(VolumeError::Fenced), "{place}");
            bench.kill(first);
            bench.scan(&second);
            bench.kill(second);
            assert_eq!(bench.content(&bench.open(&bench.disk())).unwrap(), expected, "{place}");
        }
    }
}

/// With durability `local` that is said, and what the pool has is a state that the volume had; with `remote` nothing is lost.
#[test]
fn case_17_the_log_is_lost() {
    for seed in 1_700..1_710 {
        for durability in [Durability::Local, Durability::Remote] {
            let place = format!("seed {seed}, {durability:?}");
            let bench = bench(seed, durability);
            let owner = bench.open(&bench.disk());
            bench.write(&owner, 0, &numbers(100)).unwrap();
            bench.run(&owner, |volume| async move { volume.destage().await }).unwrap();
            for block in 0..BLOCKS {
                bench.write(&owner, block, &[200 + block]).unwrap();
            }
            bench.kill(owner);
            let (names, root) = (bench.store.names(), bench.store.root(&root_path(&VOLUME)));
            let next = match durability {
                Durability::Remote => bench.open(&bench.disk()),
                Durability::Local => {
                    assert_eq!(bench.try_open(&bench.disk(), bench.settings).err(), Some(VolumeError::LogMissing), "{place}");
                    assert!(bench.store.names() == names && bench.store.root(&root_path(&VOLUME)) == root, "{place}");
                    bench.try_open(&bench.disk(), Settings { accept_loss: true, ..bench.settings }).unwrap()
                }
            };
            let found = bench.content(&next).unwrap();
            let kept = found.iter().filter(|version| **version >= 200).count();
            assert!(durability == Durability::Local || kept == BLOCKS as usize, "{place}: {found:?}");
            assert_eq!(found, [&numbers(200)[..kept], &numbers(100)[kept..]].concat(), "{place}: no state that the volume had");
            bench.scan(&next);
        }
    }
}

/// A host that was fenced comes back with its log, in which is what nobody was told of.
#[test]
fn case_35_the_log_of_a_host_that_was_fenced_returns_after_others_wrote() {
    for seed in 3_500..3_510 {
        let bench = bench(seed, Durability::Remote);
        let disk = bench.disk();
        let first = bench.open(&disk);
        bench.write(&first, 0, &numbers(100)).unwrap();
        bench.change(&first, 0, 777);
        let second = bench.open(&bench.disk());
        let at_first = bench.content(&second).unwrap();
        assert!([100, 777].contains(&at_first[0]), "seed {seed}");
        bench.write(&second, 0, &numbers(200)).unwrap();
        // Alive, and after it was started anew.
        bench.pass(&first, Duration::from_secs(20));
        assert_eq!(first.volume.failed(), Some(VolumeError::Fenced), "seed {seed}");
        bench.kill(first);
        for accept_loss in [false, true] {
            let refused = bench.try_open(&disk, Settings { accept_loss, ..bench.settings }).err();
            assert_eq!(refused, Some(VolumeError::StaleLog), "seed {seed}");
        }
        bench.write(&second, 1, &[201]).unwrap();
        assert_eq!(bench.content(&second).unwrap(), numbers(200), "seed {seed}: the second owner does not go on");
        bench.kill(second);
        let third = bench.open(&bench.disk());
        assert_eq!(bench.content(&third).unwrap(), numbers(200), "seed {seed}");
        bench.scan(&third);
    }
}

/// What every opening of a pool asks first.
fn probe(bench: &Bench) -> Result<(), StoreError> {
    let process = bench.world.new_process();
    let store = bench.store.opened_by(process);
    let proven = bench.world.wait_for(process, async move { prove(&store, Uuid::from_u128(process.into())).await });
    bench.world.kill(process);
    proven.unwrap()
}

/// It is found by the next opening, before anything of a volume is touched. One owner alone loses nothing meanwhile.
#[test]
fn case_33_the_store_ignores_conditions_from_some_moment_on() {
    for seed in 3_300..3_310 {
        let bench = bench(seed, Durability::Remote);
        let disk = bench.disk();
        let owner = bench.open(&disk);
        bench.write(&owner, 0, &numbers(100)).unwrap();
        assert_eq!(probe(&bench), Ok(()), "seed {seed}");
        bench.store.set_ignores_conditions(true);
        let writing = write_and_flush(&bench, &owner, 200);
        bench.steps(bench.world.random.below(400));
        let (root, names) = (bench.store.root(&root_path(&VOLUME)), bench.store.names());
        let refused = probe(&bench).unwrap_err();
        assert!(
            matches!(&refused, StoreError::Refused(why) if why.contains("cannot hold mapped volumes")),
            "seed {seed}: {refused}"
        );
        let lost: Vec<String> = names.into_iter().filter(|name| !bench.store.names().contains(name)).collect();
        assert!(lost.is_empty() && bench.store.root(&root_path(&VOLUME)).is_some() && root.is_some(), "seed {seed}: {lost:?}");
        bench.end(&writing).unwrap();
        bench.checkpoint(&owner);
        bench.gather(&owner);
        assert_eq!(bench.content(&owner).unwrap(), numbers(200), "seed {seed}");
        bench.kill(owner);
        bench.store.set_ignores_conditions(false);
        assert_eq!(probe(&bench), Ok(()), "seed {seed}");
        let next = bench.open(&disk);
        assert_eq!(bench.content(&next).unwrap(), numbers(200), "seed {seed}");
        bench.scan(&next);
    }
}
