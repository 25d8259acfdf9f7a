//! Disks and pools without space: what waits, what is refused, and what goes on.

use std::cell::{Cell, RefCell};
use std::rc::Rc;
use std::time::Duration;

use blockdev::Errno;
use bytes::Bytes;

use crate::segment::BLOCK;
use crate::simulation::cases::bench::{BLOCKS, Bench, Owner, numbers};
use crate::simulation::contents::{Version, content_of};
use crate::simulation::disk::{HostDisk, Syncs};
use crate::simulation::run;
use crate::simulation::seen::Seen;
use crate::{Cause, Durability, Settings, VolumeError, WhenFull};

const ROUNDS: u64 = 20;
const HOURS: Duration = Duration::from_secs(3 * 3600);

/// One whose log does not come round to where it began.
fn long_disk(bench: &Bench) -> HostDisk {
    HostDisk::new(&bench.world, 1024 * BLOCK, [512, 4096][bench.world.random.below(2) as usize])
}

fn flush(bench: &Bench, owner: &Owner) -> Result<(), Errno> {
    bench.run(owner, |volume| async move { volume.flush().await })
}

/// Writes every block in turn, again and again: how many writes were acknowledged.
fn write_on(bench: &Bench, owner: &Owner) -> Rc<Cell<u64>> {
    let acknowledged: Rc<Cell<u64>> = Rc::default();
    let (volume, count) = (owner.volume.clone(), acknowledged.clone());
    let writing = async move {
        for number in 0..ROUNDS * BLOCKS {
            let bytes = Bytes::from(content_of(200 + number));
            volume.write(number % BLOCKS * BLOCK as u64, bytes).await.unwrap();
            count.set(count.get() + 1);
        }
    };
    bench.world.spawn(owner.process, Box::pin(writing));
    acknowledged
}

/// The content after so many of them.
fn after(writes: u64) -> Vec<Version> {
    let last_of = |block: u64| (0..writes).rev().find(|number| number % BLOCKS == block);
    (0..BLOCKS).map(|block| last_of(block).map_or(100 + block, |number| 200 + number)).collect()
}

/// The next owner, which finds what was acknowledged, and of what was not the next write or nothing.
fn is_kept(seed: u64, bench: &Bench, disk: &HostDisk, acknowledged: u64) -> Owner {
    let owner = bench.open(disk);
    let found = bench.content(&owner).unwrap();
    let is_next = acknowledged < ROUNDS * BLOCKS && found == after(acknowledged + 1);
    assert!(is_next || found == after(acknowledged), "seed {seed}: {found:?} after {acknowledged} writes");
    owner
}

#[test]
fn case_19_a_full_disk_under_the_log_stalls_writes_and_nothing_else() {
    for seed in 1_900..1_940 {
        let durability = [Durability::Local, Durability::Remote][(seed % 2) as usize];
        let bench = Bench::new(seed, BLOCKS, durability);
        let disk = long_disk(&bench);
        let owner = bench.open(&disk);
        bench.write(&owner, 0, &numbers(100)).unwrap();
        disk.set_room(Some(bench.world.random.below(200) as usize));
        let acknowledged = write_on(&bench, &owner);
        bench.pass(&owner, Duration::from_secs(10));
        let stalled = acknowledged.get();
        assert!(stalled < ROUNDS * BLOCKS, "seed {seed}: there was space for everything");
        assert_eq!(owner.volume.failed(), None, "seed {seed}");
        let trouble = owner.volume.trouble().expect("a full disk is told of");
        assert_eq!(trouble.cause, Cause::LogDisk(Errno::ENOSPC));
        assert!(owner.volume.now() - trouble.since > Duration::from_secs(5), "seed {seed}: {trouble:?}");
        assert_eq!(bench.content(&owner).unwrap(), after(stalled), "seed {seed}");
        assert_eq!(flush(&bench, &owner), Ok(()), "seed {seed}: what was acknowledged can be flushed");
        assert_eq!(acknowledged.get(), stalled, "seed {seed}");

        if seed % 4 < 2 {
            bench.kill(owner);
            is_kept(seed, &bench, &disk, stalled);
            continue;
        }
        disk.set_room(None);
        bench.pass(&owner, Duration::from_secs(2));
        assert_eq!(acknowledged.get(), ROUNDS * BLOCKS, "seed {seed}: it goes on by itself");
        assert_eq!(owner.volume.trouble(), None, "seed {seed}");
        bench.kill(owner);
        bench.scan(&is_kept(seed, &bench, &disk, ROUNDS * BLOCKS));
    }
}

/// Writes one block, and looks what is there afterwards; `model` is what should be.
async fn write_and_look(owner: &Owner, block: u64, version: Version, model: &RefCell<Vec<Version>>) -> Result<(), Errno> {
    let (offset, len) = (block * BLOCK as u64, BLOCK as u64);
    let written = owner.volume.write(offset, Bytes::from(content_of(version))).await;
    if written.is_ok() {
        model.borrow_mut()[block as usize] = version;
    }
    let expected = model.borrow()[block as usize];
    let found = owner.volume.read(offset, len).await.unwrap();
    assert!(found == content_of(expected), "block {block} is not what it was before a write that was refused");
    written
}

/// Writes now and then; how many writes were refused.
fn write_for(bench: &Bench, owner: &Rc<Owner>, rounds: u64, from: Version, model: &Rc<RefCell<Vec<Version>>>) -> u64 {
    let (owner_there, model) = (owner.clone(), model.clone());
    let environment = owner.parts.environment.clone();
    let writing = async move {
        let mut refused = 0;
        for number in 0..rounds * BLOCKS {
            match write_and_look(&owner_there, number % BLOCKS, from + number, &model).await {
                Ok(()) => {}
                Err(errno) => {
                    assert_eq!(errno, Errno::ENOSPC);
                    refused += 1;
                    environment.sleep(Duration::from_millis(number % 3 * 100)).await;
                }
            }
        }
        refused
    };
    bench.world.wait_for(owner.process, writing).unwrap()
}

/// Nothing of what was refused is ever found, whatever of it had come to the disk.
#[test]
fn case_19_a_full_disk_under_the_log_refuses_writes_if_it_is_to() {
    for seed in 19_000..19_040 {
        let mut bench = Bench::new(seed, BLOCKS, [Durability::Local, Durability::Remote][(seed % 2) as usize]);
        bench.settings.when_full = WhenFull::Error;
        let disk = long_disk(&bench);
        let owner = bench.open(&disk);
        bench.write(&owner, 0, &numbers(100)).unwrap();
        let (owner, model) = (Rc::new(owner), Rc::new(RefCell::new(numbers(100))));
        disk.set_room(Some(bench.world.random.below(100) as usize));
        let refused = write_for(&bench, &owner, 10, 200, &model);
        assert!(refused > 0, "seed {seed}: there was space for everything");
        assert_eq!(owner.volume.failed(), None, "seed {seed}");
        assert_eq!(owner.volume.trouble().map(|trouble| trouble.cause), Some(Cause::LogDisk(Errno::ENOSPC)), "seed {seed}");
        assert_eq!(flush(&bench, &owner), Ok(()), "seed {seed}: what was acknowledged can be flushed");
        let snapshot = bench.run(&owner, |volume| async move { volume.snapshot("s", 0).await });
        assert_eq!(snapshot, Err(VolumeError::LogFull), "seed {seed}");
        assert!(owner.volume.snapshots().is_empty());

        if seed % 4 >= 2 {
            disk.set_room(None);
            bench.pass(&owner, Duration::from_secs(2));
            assert_eq!(owner.volume.trouble(), None, "seed {seed}");
            assert_eq!(write_for(&bench, &owner, 2, 1_000, &model), 0, "seed {seed}: it goes on by itself");
            bench.run(&owner, |volume| async move { volume.snapshot("s", 0).await }).unwrap();
        }
        let owner = Rc::into_inner(owner).unwrap();
        bench.kill(owner);
        let owner = bench.open(&disk);
        assert_eq!(bench.content(&owner).unwrap(), *model.borrow(), "seed {seed}");
        disk.set_room(None);
        bench.scan(&owner);
    }
}

#[test]
fn case_19_a_full_pool_refuses_writes_when_the_log_is_full_if_it_is_to() {
    for seed in 19_100..19_120 {
        let mut bench = Bench::new(seed, BLOCKS, Durability::Local);
        bench.settings.when_full = WhenFull::Error;
        let disk = bench.disk();
        let owner = bench.open(&disk);
        bench.write(&owner, 0, &numbers(100)).unwrap();
        bench.store.set_capacity(Some(bench.store.used() + bench.world.random.below(4_000)));
        let (owner, model) = (Rc::new(owner), Rc::new(RefCell::new(numbers(100))));
        let refused = write_for(&bench, &owner, ROUNDS, 200, &model);
        assert!(refused > 0, "seed {seed}: the log had room for everything");
        assert_eq!(owner.volume.failed(), None, "seed {seed}");
        let cause = owner.volume.trouble().map(|trouble| trouble.cause.to_string()).unwrap();
        assert!(cause.contains("the simulated store has no room for it"), "seed {seed}: {cause}");
        assert_eq!(flush(&bench, &owner), Ok(()), "seed {seed}");
        bench.store.set_capacity(None);
        bench.pass(&owner, Duration::from_secs(10));
        assert_eq!(write_for(&bench, &owner, 2, 5_000, &model), 0, "seed {seed}: it goes on by itself");
        let owner = Rc::into_inner(owner).unwrap();
        bench.kill(owner);
        let owner = bench.open(&disk);
        assert_eq!(bench.content(&owner).unwrap(), *model.borrow(), "seed {seed}");
        bench.scan(&owner);
    }
}

/// Writes wait, and everything else that the host has by itself goes on.
#[test]
fn case_20_the_log_is_full_while_the_store_is_away_for_hours() {
    for seed in 20_000..20_040 {
        let bench = Bench::new(seed, BLOCKS, Durability::Local);
        let disk = bench.disk();
        let owner = bench.open(&disk);
        bench.write(&owner, 0, &numbers(100)).unwrap();
        bench.store.set_faults(1000);
        let acknowledged = write_on(&bench, &owner);
        bench.pass(&owner, HOURS);
        let stalled = acknowledged.get();
        assert!((1..ROUNDS * BLOCKS).contains(&stalled), "seed {seed}: {stalled} writes");
        assert_eq!(owner.volume.failed(), None, "seed {seed}");
        let trouble = owner.volume.trouble().expect("a store that is away is told of");
        assert!(
            matches!(trouble.cause, Cause::Pool(_)) && owner.volume.now() - trouble.since > HOURS / 2,
            "seed {seed}: {trouble:?}"
        );
        let last = (stalled - 1) % BLOCKS * BLOCK as u64;
        let read = bench.run(&owner, move |volume| async move { volume.read(last, BLOCK as u64).await }).unwrap();
        assert!(read == content_of(200 + stalled - 1), "seed {seed}: what was written last cannot be read");
        assert_eq!(flush(&bench, &owner), Ok(()), "seed {seed}: what was acknowledged is on the log's disk");
        assert_eq!(acknowledged.get(), stalled, "seed {seed}");

        if seed % 2 == 0 {
            bench.kill(owner);
            bench.store.set_faults(0);
            is_kept(seed, &bench, &disk, stalled);
            continue;
        }
        bench.store.set_faults(0);
        bench.pass(&owner, Duration::from_secs(120));
        assert_eq!(acknowledged.get(), ROUNDS * BLOCKS, "seed {seed}: it goes on by itself");
        assert_eq!(owner.volume.trouble(), None, "seed {seed}");
        bench.kill(owner);
        bench.scan(&is_kept(seed, &bench, &disk, ROUNDS * BLOCKS));
    }
}

#[test]
fn a_sync_that_says_that_there_is_no_space_is_a_failure() {
    for when_full in [WhenFull::Wait, WhenFull::Error] {
        let bench = Bench::new(1, BLOCKS, Durability::Local);
        let disk = bench.disk();
        let owner = bench.try_open(&disk, Settings { when_full, ..bench.settings }).unwrap();
        bench.write(&owner, 0, &numbers(100)).unwrap();
        bench.change(&owner, 0, 7);
        disk.syncs.set(Syncs::Full);
        assert_eq!(flush(&bench, &owner), Err(Errno::EIO));
        disk.syncs.set(Syncs::Work);
        assert_eq!((flush(&bench, &owner), bench.content(&owner)), (Err(Errno::EIO), Err(Errno::EIO)));
        let failed = owner.volume.failed().unwrap().to_string();
        assert!(failed.contains("sync: No space left on device"), "{failed}");
    }
}

#[test]
fn case_19_disks_of_logs_are_full_for_a_while() {
    let mut seen = Seen::default();
    for seed in (190_000..190_300).filter(|seed| seed % 10 >= 8) {
        seen += run(seed, false).unwrap_or_else(|why| panic!("seed {seed}: {why}"));
    }
    assert!(seen.full_disks > 0 && seen.refused > 0, "{seen}");
}
