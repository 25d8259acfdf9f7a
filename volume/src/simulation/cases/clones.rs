//! Cases about snapshots that have clones, and about whoever reads snapshots of clones.

use std::rc::Rc;
use std::sync::Arc;

use super::bench::{BLOCKS, Bench, Owner, numbers, versions_in};
use crate::clone::{SnapshotView, clone_snapshot};
use crate::names::{Family, Source};
use crate::segment::BLOCK;
use crate::simulation::VOLUME;
use crate::simulation::contents::Version;
use crate::{Durability, MappedVolume, Settings};

/// What a case calls the clone of its volume.
const CLONE: [u8; 16] = [9; 16];

/// Makes a snapshot `s` and a clone of it.
fn clone_as_it_is(bench: &Bench, owner: &Owner) {
    let parts = owner.parts.clone();
    let cloned = bench.run(owner, |volume| async move {
        volume.snapshot("s", 0).await?;
        volume.wait_for_snapshot("s").await?;
        clone_snapshot(&parts, VOLUME, "s", CLONE).await
    });
    cloned.unwrap();
}

/// A snapshot whose deletion was begun, and that has a clone, is there again for good as soon as it is listed.
#[test]
fn a_snapshot_that_is_spared_stays_listed() {
    let is_listed = |owner: &Owner| !owner.volume.snapshots().is_empty();
    let mut spared = 0;
    for seed in 0..60 {
        let bench = Bench::new(seed, BLOCKS, Durability::Remote);
        let disk = bench.disk();
        let owner = bench.open(&disk);
        clone_as_it_is(&bench, &owner);
        let volume = owner.volume.clone();
        bench.world.spawn(owner.process, Box::pin(async move { drop(volume.delete_snapshot("s").await) }));
        while is_listed(&owner) {
            bench.steps(1);
        }
        bench.steps(bench.world.random.below(60));
        bench.kill(owner);

        let next = bench.open(&disk);
        let was_begun = !is_listed(&next);
        for _ in 0..200 {
            bench.steps(1);
            if is_listed(&next) {
                spared += u64::from(was_begun);
                bench.kill(next);
                assert!(is_listed(&bench.open(&disk)), "seed {seed}: the snapshot is gone again");
                break;
            }
        }
    }
    assert!(spared > 10, "{spared} spared");
}

/// A snapshot of a clone is read while the clone is flattened, and then what it came from goes.
#[test]
fn a_reader_of_a_clone_s_snapshot_follows_what_flattening_copied() {
    for seed in 0..10 {
        let bench = Bench::new(seed, BLOCKS, Durability::Remote);
        let owner = bench.open(&bench.disk());
        bench.write(&owner, 0, &numbers(100)).unwrap();
        clone_as_it_is(&bench, &owner);

        let (process, parts) = bench.parts(&bench.disk());
        let settings = bench.settings;
        let flattening = async move {
            let clone = MappedVolume::open(&parts, CLONE, settings).await?;
            clone.snapshot("t", 0).await?;
            clone.wait_for_snapshot("t").await?;
            let view = SnapshotView::open(&parts, CLONE, "t").await?;
            clone.flatten(Arc::default()).await.map(|_| (view, clone))
        };
        let (view, clone) = bench.world.wait_for(process, flattening).unwrap().unwrap();
        let gone = bench.run(&owner, |volume| async move {
            volume.delete_snapshot("s").await?;
            volume.zero(0, BLOCKS * BLOCK as u64, true).await.unwrap();
            volume.destage().await.unwrap();
            volume.gather(1.0).await?;
            volume.checkpoint().await
        });
        gone.unwrap();
        let first = Source { group: VOLUME, family: Family::Step, epoch: 1, number: 0 };
        assert!(!bench.store.names().contains(&first.path()), "seed {seed}: what the clone came from is still there");
        let reading = async move { view.read(0, view.size()).await };
        let read = bench.world.wait_for(process, reading).unwrap();
        assert_eq!(versions_in(&read.unwrap()), numbers(100), "seed {seed}");
        drop(clone);
        bench.world.kill(process);
    }
}

/// What a clone knows of where its ancestor has moved things may be out of date.
#[test]
fn a_reader_of_a_clone_s_snapshot_follows_what_the_ancestor_moved_twice() {
    for seed in 0..10 {
        let bench = Bench::new(seed, BLOCKS, Durability::Remote);
        let owner = bench.open(&bench.disk());
        let write_each_second = |first: u64, from: Version| {
            for block in (first..BLOCKS).step_by(2) {
                bench.write(&owner, block, &[from + block]).unwrap();
            }
        };
        let gather = || bench.run(&owner, |volume| async move { volume.gather(1.0).await.map(drop) }).unwrap();
        bench.write(&owner, 0, &numbers(100)).unwrap();
        write_each_second(0, 200);
        let expected = bench.content(&owner).unwrap();
        clone_as_it_is(&bench, &owner);
        let (process, parts) = bench.parts(&bench.disk());
        let settings = bench.settings;
        let opening = async move {
            let clone = MappedVolume::open(&parts, CLONE, settings).await?;
            clone.snapshot("t", 0).await?;
            clone.wait_for_snapshot("t").await?;
            SnapshotView::open(&parts, CLONE, "t").await.map(|view| (view, clone))
        };
        let (view, clone) = bench.world.wait_for(process, opening).unwrap().unwrap();
        bench.write(&owner, 0, &numbers(300)).unwrap();
        write_each_second(1, 400);
        gather();
        let learning = async move {
            clone.read(0, BLOCKS * BLOCK as u64).await.unwrap();
            clone.checkpoint().await.map(|()| clone)
        };
        let clone = bench.world.wait_for(process, learning).unwrap().unwrap();
        assert!(clone.core.reader.tally.foreign_forwards.get() > 0, "seed {seed}: nothing was moved");
        bench.write(&owner, 0, &numbers(500)).unwrap();
        gather();
        gather();
        let reading = async move { view.read(0, view.size()).await };
        let read = bench.world.wait_for(process, reading).unwrap();
        assert_eq!(versions_in(&read.unwrap()), expected, "seed {seed}");
        drop(clone);
        bench.world.kill(process);
    }
}

/// All that one request wants may have moved at once.
#[test]
fn a_reader_follows_many_objects_that_moved_at_once() {
    const MANY: u64 = 96;
    let bench = Bench::new(1, MANY, Durability::Remote);
    let owner = bench.open(&bench.disk());
    let versions: Vec<Version> = (100..100 + MANY).collect();
    bench.write(&owner, 0, &versions).unwrap();
    for block in (0..MANY).step_by(2) {
        bench.write(&owner, block, &[200 + block]).unwrap();
    }
    let expected = bench.content(&owner).unwrap();
    clone_as_it_is(&bench, &owner);
    let (process, parts) = bench.parts(&bench.disk());
    let view = bench.world.wait_for(process, async move { SnapshotView::open(&parts, VOLUME, "s").await }).unwrap().unwrap();
    bench.run(&owner, |volume| async move { volume.gather(0.7).await.map(drop) }).unwrap();
    let reading = async move { view.read(0, view.size()).await };
    assert_eq!(versions_in(&bench.world.wait_for(process, reading).unwrap().unwrap()), expected);
    bench.world.kill(process);
}

/// What a clone wrote itself is younger than a snapshot of it as it came, however often its origin had been opened before.
#[test]
fn what_a_clone_overwrites_is_garbage_though_a_snapshot_has_its_origin_s_map() {
    let mut bench = Bench::new(7_000, BLOCKS, Durability::Local);
    bench.settings = Settings { gathers: false, deduplicate: false, ..bench.settings };
    let disk = bench.disk();
    for _ in 0..5 {
        let owner = bench.open(&disk);
        bench.kill(owner);
    }
    let origin = bench.open(&disk);
    bench.write(&origin, 0, &numbers(100)).unwrap();
    clone_as_it_is(&bench, &origin);

    let (disk, settings) = (bench.disk(), bench.settings);
    let open = || {
        let (process, parts) = bench.parts(&disk);
        let its_parts = parts.clone();
        let opening = async move { MappedVolume::open(&its_parts, CLONE, settings).await };
        let volume = bench.world.wait_for(process, opening).unwrap().unwrap();
        Owner { process, parts, volume: Rc::new(volume) }
    };
    let clone = open();
    bench.run(&clone, |volume| async move {
        volume.snapshot("t", 0).await.unwrap();
        volume.wait_for_snapshot("t").await.unwrap();
    });
    bench.write(&clone, 0, &numbers(200)).unwrap();
    bench.checkpoint(&clone);
    bench.kill(clone);
    let clone = open();
    bench.gather(&clone);
    bench.write(&clone, 0, &numbers(300)).unwrap();
    bench.checkpoint(&clone);
    let core = &clone.volume.core;
    let garbage = core.garbage_max(core.reader.table.borrow().stored_blocks());
    assert!(garbage >= BLOCKS, "{garbage}");
}
