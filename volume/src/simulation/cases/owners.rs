//! Cases about who owns a volume, with which log, and what an owner's requests still do when nobody expects them any more.

use std::cell::RefCell;
use std::rc::Rc;
use std::time::Duration;

use blockdev::Errno;
use bytes::Bytes;

use super::bench::{BLOCKS, Bench, numbers, versions_in};
use crate::clone::SnapshotView;
use crate::segment::BLOCK;
use crate::simulation::VOLUME;
use crate::simulation::contents::{Version, content_of, contents_of};
use crate::simulation::disk::HostDisk;
use crate::simulation::store::Late;
use crate::{Beginning, Durability, MappedGroup, Settings, VolumeError};

const TEN_MINUTES: Duration = Duration::from_secs(600);

#[test]
fn case_08_a_paused_owner_wakes_after_another_has_taken_over_and_collected_garbage() {
    let mut unanswered = 0;
    for seed in 800..840 {
        let bench = Bench::new(seed, BLOCKS, Durability::Remote);
        let first = bench.open(&bench.disk());
        bench.write(&first, 0, &numbers(100)).unwrap();
        let told = Rc::new(RefCell::new(None));
        let (volume, tell) = (first.volume.clone(), told.clone());
        bench.world.spawn(
            first.process,
            Box::pin(async move {
                for block in 0..BLOCKS {
                    if volume.write(block * BLOCK as u64, Bytes::from(content_of(200 + block))).await.is_err() {
                        break;
                    }
                }
                let flushed = volume.flush().await;
                tell.replace(Some(flushed));
            }),
        );
        bench.steps(bench.world.random.below(300));
        let was_flushed = told.borrow().is_some();
        let paused = bench.world.pause(first.process);

        let second = bench.open(&bench.disk());
        let found = bench.content(&second).unwrap();
        for (block, version) in (0..).zip(&found) {
            assert!([100 + block, 200 + block].contains(version), "seed {seed}: block {block} is {version}");
            assert!(!was_flushed || *version == 200 + block, "seed {seed}: block {block} was flushed as {}", 200 + block);
        }
        for round in 3..6 {
            bench.write(&second, 0, &numbers(round * 100)).unwrap();
            bench.run(&second, |volume| async move { volume.gather(1.0).await }).unwrap();
        }

        bench.world.resume(paused);
        unanswered += u64::from(!was_flushed);
        for _ in 0..4 {
            // What it reads may be old. It is never what it did not write, and never garbage.
            for (block, version) in bench.content(&first).into_iter().flat_map(|found| (0..).zip(found)) {
                assert!(
                    [100 + block, 200 + block].contains(&version),
                    "seed {seed}: the first owner reads {version} in block {block}"
                );
            }
            bench.pass(&first, Duration::from_secs(5));
        }
        assert_eq!(first.volume.failed(), Some(VolumeError::Fenced), "seed {seed}");
        let is_all_there = found.iter().all(|version| *version >= 200);
        let acknowledged = matches!(*told.borrow(), Some(Ok(())));
        assert!(!acknowledged || is_all_there, "seed {seed}: a flush was acknowledged that the next owner did not find");
        assert!(bench.write(&first, 0, &[900]).is_err());
        bench.kill(first);
        assert_eq!(bench.content(&second).unwrap(), numbers(500), "seed {seed}");
        // What the first one added beyond the end of its epoch is removed by whoever opens the volume next.
        bench.kill(second);
        let third = bench.open(&bench.disk());
        assert_eq!(bench.content(&third).unwrap(), numbers(500), "seed {seed}");
        bench.scan(&third);
    }
    assert!(unanswered > 10, "{unanswered} flushes were on their way");
}

#[test]
fn case_13_a_reader_meets_segments_that_are_deleted() {
    let mut deleted = 0;
    for seed in 1_300..1_340 {
        let bench = Bench::new(seed, BLOCKS, Durability::Remote);
        let owner = bench.open(&bench.disk());
        let half: Vec<Version> = (100..100 + BLOCKS / 2).collect();
        bench.write(&owner, 0, &numbers(1)).unwrap();
        bench.write(&owner, 0, &half).unwrap();
        let taken = bench.run(&owner, |volume| async move {
            volume.snapshot("s", 0).await?;
            volume.wait_for_snapshot("s").await
        });
        taken.unwrap();
        let expected = bench.content(&owner).unwrap();

        let (reader, parts) = bench.parts(&bench.disk());
        let its_parts = parts.clone();
        let view = bench.world.wait_for(reader, async move { SnapshotView::open(&its_parts, VOLUME, "s").await }).unwrap();
        let view = Rc::new(view.unwrap());
        let before = bench.store.names();
        // Reads while the owner moves and deletes what it reads.
        let reads = Rc::new(RefCell::new(Vec::new()));
        let (looking, noted) = (view.clone(), reads.clone());
        let reading = async move {
            for _ in 0..20 {
                let read = looking.read(0, looking.size()).await;
                noted.borrow_mut().push(read);
            }
        };
        bench.world.spawn(reader, Box::pin(reading));
        for round in 2..5 {
            bench.write(&owner, 0, &numbers(round * 1000)).unwrap();
            bench.run(&owner, |volume| async move { volume.gather(1.0).await }).unwrap();
        }
        while reads.borrow().len() < 20 {
            bench.steps(1);
        }
        for read in reads.take() {
            assert_eq!(versions_in(&read.unwrap()), expected, "seed {seed}");
        }
        let after = bench.store.names();
        deleted += before.iter().filter(|name| name.contains("/w/") && !after.contains(name)).count();

        // The snapshot goes: its reader gets what it held, or an error.
        let gone = bench.run(&owner, |volume| async move {
            volume.delete_snapshot("s").await?;
            volume.gather(1.0).await
        });
        gone.unwrap();
        let again = async move { view.read(0, view.size()).await };
        if let Ok(read) = bench.world.wait_for(reader, again).unwrap() {
            assert_eq!(versions_in(&read), expected, "seed {seed}");
        }
        let reopened = bench.world.wait_for(reader, async move { SnapshotView::open(&parts, VOLUME, "s").await.err() });
        assert_eq!(reopened.unwrap(), Some(VolumeError::NoSnapshot));
        bench.world.kill(reader);
        bench.scan(&owner);
    }
    assert!(deleted > 40, "{deleted} segments were deleted under readers");
}

#[test]
fn case_18_a_log_of_another_volume_or_epoch_is_attached() {
    for seed in 1_800..1_820 {
        let bench = Bench::new(seed, BLOCKS, Durability::Local);
        let disk = bench.disk();
        let owner = bench.open(&disk);
        bench.write(&owner, 0, &numbers(100)).unwrap();
        bench.kill(owner);
        let early = disk.content();

        // Of another volume.
        let other = Bench::new(seed, BLOCKS, Durability::Local);
        let foreign = other.disk();
        let elsewhere = other.open(&foreign);
        other.write(&elsewhere, 0, &numbers(900)).unwrap();
        other.kill(elsewhere);
        // Both volumes have one name here; the superblock of a log says whose it is.
        let mut of_another = foreign.content();
        of_another[32] ^= 1;
        let crc = crate::bytes_at::crc32c(&of_another[12..96]);
        of_another[8..12].copy_from_slice(&crc.to_le_bytes());
        let (names, mistaken) = (bench.store.names(), HostDisk::new(&bench.world, of_another.len(), 512));
        mistaken.set_content(of_another.clone());
        for accept_loss in [false, true] {
            let refused = bench.try_open(&mistaken, Settings { accept_loss, ..bench.settings }).err();
            assert_eq!(refused, Some(VolumeError::ForeignLog), "seed {seed}");
        }
        assert_eq!(bench.store.names(), names, "seed {seed}: a refused opening changed the pool");
        assert!(mistaken.content() == of_another, "seed {seed}: a refused opening changed the log");

        // Of an earlier epoch of this host: a copy of the disk is put back after more was written, all of which is in the pool.
        let owner = bench.open(&disk);
        bench.write(&owner, 0, &numbers(200)).unwrap();
        bench.run(&owner, |volume| async move { volume.destage().await }).unwrap();
        bench.kill(owner);
        disk.set_content(early.clone());
        let owner = bench.open(&disk);
        assert_eq!(bench.content(&owner).unwrap(), numbers(200), "seed {seed}: an old log was replayed over newer data");
        bench.write(&owner, 0, &[300]).unwrap();
        bench.kill(owner);

        // Of an epoch before another host had the volume.
        let before = disk.content();
        let taken = bench.try_open(&bench.disk(), Settings { accept_loss: true, ..bench.settings }).unwrap();
        bench.write(&taken, 0, &numbers(400)).unwrap();
        bench.kill(taken);
        for accept_loss in [false, true] {
            let refused = bench.try_open(&disk, Settings { accept_loss, ..bench.settings }).err();
            assert_eq!(refused, Some(VolumeError::StaleLog), "seed {seed}");
        }
        assert!(disk.content() == before, "seed {seed}: a refused opening changed the log");
    }
}

#[test]
fn case_43_a_host_is_lost_with_a_snapshot_that_is_pending() {
    let (mut there, mut lost) = (0, 0);
    for seed in 4_300..4_340 {
        for durability in [Durability::Local, Durability::Remote] {
            let bench = Bench::new(seed, BLOCKS, durability);
            let owner = bench.open(&bench.disk());
            bench.write(&owner, 0, &numbers(100)).unwrap();
            bench.run(&owner, |volume| async move { volume.snapshot("s", 7).await }).unwrap();
            let goes_on = bench.world.random.per_mille(500);
            if goes_on {
                bench.write(&owner, 0, &numbers(200)[..4]).unwrap();
                bench.steps(bench.world.random.below(300));
            }
            bench.world.kill(owner.process);
            bench.world.settle();

            let accept_loss = durability == Durability::Local;
            let next = bench.try_open(&bench.disk(), Settings { accept_loss, ..bench.settings }).unwrap();
            let found = bench.content(&next).unwrap();
            let is_there = next.volume.snapshots().iter().any(|snapshot| snapshot.name == "s");
            if durability == Durability::Remote {
                assert!(is_there, "seed {seed}: a snapshot that was as durable as a flush is gone");
                assert_eq!(found[..4], numbers(if goes_on { 200 } else { 100 })[..4], "seed {seed}");
            }
            if !is_there {
                lost += 1;
                // Nothing after it is there either, and its name is free.
                assert!(found.iter().all(|version| *version < 200), "seed {seed}: {found:?}");
                bench.run(&next, |volume| async move { volume.snapshot("s", 8).await }).unwrap();
            } else {
                there += 1;
            }
            let parts = next.parts.clone();
            let read = bench.run(&next, |volume| async move {
                volume.wait_for_snapshot("s").await?;
                let view = SnapshotView::open(&parts, VOLUME, "s").await?;
                view.read(0, view.size()).await
            });
            let held = versions_in(&read.unwrap());
            assert_eq!(held, if is_there { numbers(100) } else { found }, "seed {seed}");
            bench.scan(&next);
        }
    }
    assert!(there > 40 && lost > 0, "{there} there, {lost} lost");
}

/// What happens while a segment is on its way for ten minutes.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Meanwhile {
    Nothing,
    /// The segment is sent again, becomes garbage, and is deleted before its first request comes through.
    Collected,
    /// The same, but what is in use of it is moved before.
    Moved,
    TakenOver,
}

#[test]
fn case_51_a_put_takes_ten_minutes_and_then_succeeds() {
    for seed in 5_100..5_130 {
        for meanwhile in [Meanwhile::Nothing, Meanwhile::Collected, Meanwhile::Moved, Meanwhile::TakenOver] {
            let bench = Bench::new(seed, BLOCKS, Durability::Remote);
            let mut owner = bench.open(&bench.disk());
            bench.write(&owner, 0, &numbers(100)).unwrap();
            let times_out = meanwhile != Meanwhile::Nothing;
            bench.store.delay(Late { part: "/w/", takes: TEN_MINUTES, times_out });
            let began = owner.parts.environment.now();
            if meanwhile == Meanwhile::TakenOver {
                let bytes = Bytes::from(content_of(200));
                let volume = owner.volume.clone();
                let writing = async move {
                    let _ = volume.write(0, bytes).await;
                    let _ = volume.flush().await;
                };
                bench.world.spawn(owner.process, Box::pin(writing));
                while !bench.store.is_delaying() {
                    bench.steps(1);
                }
                let first = std::mem::replace(&mut owner, bench.open(&bench.disk()));
                bench.pass(&first, Duration::from_secs(20));
                assert!(first.volume.failed().is_some(), "seed {seed}");
                bench.kill(first);
            } else {
                bench.write(&owner, 0, &numbers(200)).unwrap();
                let took = owner.parts.environment.now() - began;
                assert_eq!(took >= TEN_MINUTES, meanwhile == Meanwhile::Nothing, "seed {seed}: {took:?}");
            }
            let mut expected = numbers(300);
            for block in 0..BLOCKS as usize {
                if meanwhile == Meanwhile::Moved && block % 2 == 0 {
                    expected[block] = numbers(200)[block];
                } else {
                    bench.write(&owner, block as u64, &expected[block..block + 1]).unwrap();
                }
            }
            bench.run(&owner, |volume| async move { volume.gather(1.0).await }).unwrap();
            bench.run(&owner, |volume| async move { volume.checkpoint().await }).unwrap();
            bench.pass(&owner, 2 * TEN_MINUTES);
            assert_eq!(bench.content(&owner).unwrap(), expected, "seed {seed}, {meanwhile:?}");
            let disk = bench.disk();
            bench.kill(owner);
            // What the late request left is removed by whoever opens the volume next.
            let next = bench.open(&disk);
            assert_eq!(bench.content(&next).unwrap(), expected, "seed {seed}, {meanwhile:?}");
            bench.scan(&next);
        }
    }
}

/// A record that a crash tore stays out, even if the next owner's first record, torn the other way round, brings back just what it lacks.
#[test]
fn what_was_torn_off_does_not_come_back() {
    let bench = Bench::new(5, 4, Durability::Local);
    let disk = bench.disk();
    let first = bench.open(&disk);
    bench.write(&first, 0, &[1]).unwrap();
    let before = disk.content();
    bench.change(&first, 1, 9);
    let whole = disk.content();
    bench.kill(first);
    let written: Vec<usize> = (0..whole.len()).filter(|at| whole[*at] != before[*at]).collect();
    let sector = disk.sector();
    let header = written[0] / sector * sector..(written[0] / sector + 1) * sector;
    let mut torn = before;
    torn[header.clone()].copy_from_slice(&whole[header.clone()]);
    disk.set_content(torn);

    let second = bench.open(&disk);
    assert_eq!(bench.content(&second), Ok(vec![1, 0, 0, 0]));
    let opened = disk.content();
    bench.change(&second, 2, 9);
    let mut torn = disk.content();
    bench.kill(second);
    torn[header.clone()].copy_from_slice(&opened[header]);
    disk.set_content(torn);

    let third = bench.open(&disk);
    assert_eq!(bench.content(&third), Ok(vec![1, 0, 0, 0]));
}

/// Nobody who still means a volume that is gone gets to one that was made after it.
#[test]
fn a_volume_that_is_gone_is_not_mistaken_for_a_later_one() {
    let bench = Bench::new(6, 4, Durability::Remote);
    let disk = bench.disk();
    let (process, parts) = bench.parts(&disk);
    let settings = bench.settings;
    let used = bench.world.wait_for(process, async move {
        let group = MappedGroup::open(&parts, VOLUME, settings).await?;
        group.add([1; 16], Beginning::Empty(4 * BLOCK as u64)).await?;
        let first = group.volume([1; 16]).unwrap();
        first.write(0, Bytes::from(contents_of(&[5]))).await.unwrap();
        first.snapshot("s", 0).await?;
        group.remove([1; 16]).await?;
        group.add([2; 16], Beginning::Empty(4 * BLOCK as u64)).await?;
        let second = group.volume([2; 16]).unwrap();
        assert_eq!(first.write(0, Bytes::from(contents_of(&[6]))).await, Err(Errno::EINVAL));
        assert_eq!(first.snapshots(), []);
        assert_eq!(group.remove([1; 16]).await, Err(VolumeError::NoVolume));
        assert_eq!(versions_in(&second.read(0, 4 * BLOCK as u64).await.unwrap()), [0; 4]);
        assert_eq!(group.volumes(), [VOLUME, [2; 16]]);
        Ok::<(), VolumeError>(())
    });
    used.unwrap().unwrap();
}
