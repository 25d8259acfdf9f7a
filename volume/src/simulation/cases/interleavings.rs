//! Two processes that do something with one volume, in every order of their requests to the store that two changes of turn give.
//!
//! ```text
//!   one, so many requests ─▶ the other, so many ─▶ one of them to its end ─▶ the other to its end
//! ```

use std::time::Duration;

use bytes::Bytes;

use super::bench::{BLOCKS, Begun, Bench, Owner, numbers, versions_in};
use crate::clone::{clone_snapshot, delete_volume};
use crate::simulation::VOLUME;
use crate::simulation::contents::contents_of;
use crate::simulation::requests::{Request, Verb};
use crate::simulation::world::{Paused, ProcessId};
use crate::{Durability, MappedVolume, Settings, VolumeError};

const CLONE: [u8; 16] = [9; 16];
/// What has not ended after so many steps waits for somebody who stands still.
const STEPS: u64 = 20_000;

/// Who comes to an end first.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum First {
    One,
    Other,
}

/// Requests between which turns change: what is only read does not change by being waited for.
fn is_point(request: &Request) -> bool {
    request.changes() || request.verb == Verb::ReadRoot
}

/// A process that is doing something.
struct Actor<T> {
    process: ProcessId,
    doing: Begun<T>,
    /// Requests before it began.
    before: usize,
}

impl<T: 'static> Actor<T> {
    fn new(bench: &Bench, process: ProcessId, work: impl Future<Output = T> + 'static) -> (Actor<T>, Paused) {
        let before = bench.store.requests.of(process).into_iter().filter(is_point).count();
        let actor = Actor { process, doing: bench.begin(process, work), before };
        let paused = bench.world.pause(process);
        (actor, paused)
    }

    fn points(&self, bench: &Bench) -> usize {
        bench.store.requests.of(self.process).into_iter().filter(is_point).count() - self.before
    }

    /// Goes on until it has made so many requests, or its work is done, or it waits for somebody else.
    fn go_on(&self, bench: &Bench, paused: Paused, points: usize) -> Paused {
        bench.world.resume(paused);
        for _ in 0..STEPS {
            if self.doing.is_done() || self.points(bench) >= points || !bench.world.step() {
                break;
            }
        }
        bench.world.pause(self.process)
    }
}

/// What both come to. True if both made all of their requests before the turn changed.
fn interleave<A: 'static, B: 'static>(
    bench: &Bench,
    (one, paused_one): (Actor<A>, Paused),
    (other, paused_other): (Actor<B>, Paused),
    (points_of_one, points_of_other): (usize, usize),
    first: First,
) -> (A, B, [bool; 2]) {
    let paused_one = one.go_on(bench, paused_one, points_of_one);
    let paused_other = other.go_on(bench, paused_other, points_of_other);
    let were_done = [one.doing.is_done(), other.doing.is_done()];
    match first {
        First::One => {
            let paused_one = one.go_on(bench, paused_one, usize::MAX);
            bench.world.resume(paused_other);
            bench.world.resume(paused_one);
        }
        First::Other => {
            let paused_other = other.go_on(bench, paused_other, usize::MAX);
            bench.world.resume(paused_one);
            bench.world.resume(paused_other);
        }
    }
    let (one, other) = (bench.end(&one.doing), bench.end(&other.doing));
    (one, other, were_done)
}

/// Calls `case` for every pair of numbers of requests, until both are done by themselves: it says which of them were.
fn every_pair(case: impl Fn(usize, usize, First) -> [bool; 2]) -> u64 {
    let mut cases = 0;
    for first in [First::One, First::Other] {
        for of_one in 1.. {
            let mut is_one_done = false;
            for of_other in 1.. {
                let [one, other] = case(of_one, of_other, first);
                cases += 1;
                is_one_done = one;
                if other {
                    break;
                }
            }
            if is_one_done {
                break;
            }
        }
    }
    cases
}

/// A volume with a snapshot `s` that holds `numbers(100)`.
fn with_snapshot(seed: u64) -> (Bench, Owner) {
    let mut bench = Bench::new(seed, BLOCKS, Durability::Remote);
    bench.settings = Settings { gathers: false, checkpoint_segments: 1000, segment_bytes: 32 << 20, ..bench.settings };
    let owner = bench.open(&bench.disk());
    bench.write(&owner, 0, &numbers(100)).unwrap();
    let taken = bench.run(&owner, |volume| async move {
        volume.snapshot("s", 0).await?;
        volume.wait_for_snapshot("s").await
    });
    taken.unwrap();
    bench.write(&owner, 0, &numbers(200)).unwrap();
    bench.pass(&owner, Duration::from_secs(1));
    (bench, owner)
}

fn clone(bench: &Bench) -> (Actor<Result<u64, VolumeError>>, Paused) {
    let (process, parts) = bench.parts(&bench.disk());
    Actor::new(bench, process, async move { clone_snapshot(&parts, VOLUME, "s", CLONE).await })
}

/// What the clone holds, opened by another host.
fn content_of_clone(bench: &Bench) -> Result<Vec<u64>, VolumeError> {
    let (process, parts) = bench.parts(&bench.disk());
    let settings = bench.settings;
    let reading = async move {
        let clone = MappedVolume::open(&parts, CLONE, settings).await?;
        Ok(versions_in(&clone.read(0, clone.size()).await.unwrap()))
    };
    let read = bench.world.wait_for(process, reading).unwrap();
    bench.world.kill(process);
    read
}

#[test]
fn case_40_every_interleaving_of_a_clone_and_the_deletion_of_its_snapshot() {
    let cases = every_pair(|of_clone, of_deletion, first| {
        let place = format!("{of_clone} requests of the clone, {of_deletion} of the deletion, {first:?} ends first");
        let (bench, owner) = with_snapshot(40_000);
        let volume = owner.volume.clone();
        let deletion = Actor::new(&bench, owner.process, async move { volume.delete_snapshot("s").await });
        let (cloned, deleted, were_done) = interleave(&bench, clone(&bench), deletion, (of_clone, of_deletion), first);
        match (&cloned, &deleted) {
            (Ok(_), Err(VolumeError::SnapshotHasClones(_))) => {
                assert_eq!(bench.snapshot(&owner, "s").unwrap(), numbers(100), "{place}")
            }
            (Err(VolumeError::NoSnapshot), Ok(())) => {}
            // Each saw the other, and gave way.
            (Err(VolumeError::NoSnapshot), Err(VolumeError::SnapshotHasClones(_))) => {
                bench.run(&owner, |volume| async move { volume.delete_snapshot("s").await }).unwrap();
            }
            other => panic!("{place}: {other:?}"),
        }
        // Nothing that the clone needs goes with the next collections.
        bench.gather(&owner);
        bench.gather(&owner);
        assert_eq!(bench.content(&owner).unwrap(), numbers(200), "{place}");
        let expected = if cloned.is_ok() { Ok(numbers(100)) } else { Err(VolumeError::NoVolume) };
        assert_eq!(content_of_clone(&bench), expected, "{place}");
        assert_eq!(owner.volume.snapshots().is_empty(), cloned.is_err(), "{place}");
        bench.scan(&owner);
        were_done
    });
    assert!(cases > 60, "{cases} cases");
}

#[test]
fn case_40_every_interleaving_of_a_clone_and_the_deletion_of_its_volume() {
    let cases = every_pair(|of_clone, of_deletion, first| {
        let place = format!("{of_clone} requests of the clone, {of_deletion} of the deletion, {first:?} ends first");
        let (bench, owner) = with_snapshot(40_100);
        bench.kill(owner);
        let (process, parts) = bench.parts(&bench.disk());
        let deletion = Actor::new(&bench, process, async move { delete_volume(&parts, VOLUME).await });
        let (cloned, deleted, were_done) = interleave(&bench, clone(&bench), deletion, (of_clone, of_deletion), first);
        match (&cloned, &deleted) {
            (Ok(_), Err(VolumeError::VolumeHasClones(_))) => {
                let owner = bench.open(&bench.disk());
                assert_eq!(bench.content(&owner).unwrap(), numbers(200), "{place}");
                assert_eq!(bench.snapshot(&owner, "s").unwrap(), numbers(100), "{place}");
                bench.gather(&owner);
                bench.kill(owner);
            }
            (Err(VolumeError::NoVolume), Ok(())) => {}
            (Err(VolumeError::NoVolume), Err(VolumeError::VolumeHasClones(_))) => {
                let (process, parts) = bench.parts(&bench.disk());
                bench.world.wait_for(process, async move { delete_volume(&parts, VOLUME).await }).unwrap().unwrap();
            }
            other => panic!("{place}: {other:?}"),
        }
        let expected = if cloned.is_ok() { Ok(numbers(100)) } else { Err(VolumeError::NoVolume) };
        assert_eq!(content_of_clone(&bench), expected, "{place}");
        were_done
    });
    assert!(cases > 60, "{cases} cases");
}

/// Opens the volume.
fn opening(bench: &Bench) -> (Actor<Result<MappedVolume, VolumeError>>, Paused) {
    let (process, parts) = bench.parts(&bench.disk());
    let settings = bench.settings;
    Actor::new(bench, process, async move { MappedVolume::open(&parts, VOLUME, settings).await })
}

/// Opens the volume; once more if the claim of somebody who died takes effect only meanwhile.
fn open_at_last(bench: &Bench) -> Owner {
    let disk = bench.disk();
    match bench.try_open(&disk, bench.settings) {
        Err(VolumeError::Raced) => bench.open(&disk),
        opened => opened.unwrap(),
    }
}

/// Writes a version to all blocks and flushes, as far as the volume lets its owner.
fn overwrite(bench: &Bench, process: ProcessId, volume: &MappedVolume, from: u64) -> bool {
    let volume = volume.clone();
    let writing = async move {
        let bytes = Bytes::from(contents_of(&numbers(from)));
        volume.write(0, bytes).await.is_ok() && volume.flush().await.is_ok()
    };
    bench.world.wait_for(process, writing).unwrap()
}

#[test]
fn case_09_two_openers_race_in_every_interleaving() {
    let cases = every_pair(|of_one, of_other, first| {
        let place = format!("{of_one} requests of one, {of_other} of the other, {first:?} ends first");
        let (bench, owner) = with_snapshot(9_000);
        bench.kill(owner);
        let (one, other) = (opening(&bench), opening(&bench));
        let processes = [one.0.process, other.0.process];
        let (one, other, were_done) = interleave(&bench, one, other, (of_one, of_other), first);
        let mut flushed = Vec::new();
        for (opened, (process, from)) in [one, other].iter().zip(processes.into_iter().zip([300, 400])) {
            match opened {
                Ok(volume) => flushed.extend(overwrite(&bench, process, volume, from).then_some(from)),
                Err(error) => assert!(matches!(error, VolumeError::Raced | VolumeError::Fenced), "{place}: {error}"),
            }
        }
        assert!(flushed.len() < 2, "{place}: both were told that their data is durable");
        processes.into_iter().for_each(|process| bench.world.kill(process));
        bench.world.settle();
        let next = bench.open(&bench.disk());
        let found = bench.content(&next).unwrap();
        assert!(flushed.is_empty() || found == numbers(flushed[0]), "{place}: {found:?}");
        assert!([200, 300, 400].map(numbers).contains(&found), "{place}: {found:?}");
        bench.scan(&next);
        were_done
    });
    assert!(cases > 20, "{cases} cases");
}

/// A claimer stands still, or dies, between its claim and its seal; a third one claims, and then the second wakes.
#[test]
fn case_30_a_claimer_stops_at_each_step_and_a_third_claims() {
    let mut woken = 0;
    for dies in [false, true] {
        // Whoever has not looked at the root has claimed nothing.
        for points in 2.. {
            let (bench, first) = with_snapshot(30_000);
            let (second, paused) = opening(&bench);
            let paused = second.go_on(&bench, paused, points);
            let is_done = second.doing.is_done();
            let asleep = if dies {
                bench.world.resume(paused);
                bench.world.kill(second.process);
                None
            } else {
                Some(paused)
            };
            let third = open_at_last(&bench);
            assert_eq!(bench.content(&third).unwrap(), numbers(200), "{points} requests");
            bench.write(&third, 0, &numbers(300)).unwrap();
            if let Some(paused) = asleep.filter(|_| !is_done) {
                bench.world.resume(paused);
                let woke = bench.end(&second.doing).err();
                assert!(matches!(woke, Some(VolumeError::Raced | VolumeError::Fenced)), "{points} requests: {woke:?}");
                woken += 1;
            }
            assert!(bench.write(&first, 0, &numbers(900)).is_err(), "{points} requests: the first owner goes on");
            assert_eq!(bench.content(&third).unwrap(), numbers(300), "{points} requests");
            bench.write(&third, 0, &numbers(400)).unwrap();
            bench.kill(third);
            let last = bench.open(&bench.disk());
            assert_eq!(bench.content(&last).unwrap(), numbers(400), "{points} requests");
            bench.scan(&last);
            if is_done {
                break;
            }
        }
    }
    assert!(woken > 2, "{woken} claimers woke");
}
