//! Cases about hosts on which something is wrong: their disk, their clock, their random numbers; and about requests that overlap.

use std::cell::Cell;
use std::ops::Range;
use std::rc::Rc;
use std::time::Duration;

use blockdev::Errno;
use bytes::Bytes;

use super::bench::{BLOCKS, Bench, Owner, numbers, versions_in};
use crate::environment::{Environment, LocalFuture};
use crate::segment::BLOCK;
use crate::simulation::contents::{Version, content_of, contents_of, place};
use crate::simulation::disk::{HostDisk, Syncs};
use crate::simulation::world::Random;
use crate::simulation::{create, new_disk, parts};
use crate::{Durability, MappedVolume, Parts, Secrets, Settings, VolumeError};

/// Whatever is written stays in the log for a while.
fn unhurried(bench: &Bench) -> Settings {
    Settings { segment_bytes: 1 << 20, ..bench.settings }
}

fn power_is_lost(bench: &Bench, disk: &HostDisk, owner: Owner) {
    bench.kill(owner);
    disk.lose_power();
}

/// What was acknowledged before the sync that failed may be in the system's memory only, where the next process finds it: it must not rest on that.
#[test]
fn case_04_a_sync_fails_and_the_next_one_succeeds() {
    for seed in 400..440 {
        let bench = Bench::new(seed, BLOCKS, Durability::Local);
        let (disk, settings) = (bench.disk(), unhurried(&bench));
        let owner = bench.try_open(&disk, settings).unwrap();
        bench.write(&owner, 0, &numbers(100)).unwrap();
        for (block, version) in (0..).zip(numbers(200)) {
            bench.change(&owner, block, version);
        }
        disk.syncs.set(Syncs::Fail);
        let flush = |owner: &Owner| bench.run(owner, |volume| async move { volume.flush().await });
        assert_eq!(flush(&owner), Err(Errno::EIO), "seed {seed}");
        disk.syncs.set(Syncs::Work);
        assert!(flush(&owner).is_err(), "seed {seed}: a flush was acknowledged after one had failed");
        assert!(bench.write(&owner, 0, &[300]).is_err(), "seed {seed}");
        assert!(
            matches!(owner.volume.failed(), Some(VolumeError::LogIo { operation: "sync", .. })),
            "{:?}",
            owner.volume.failed()
        );
        bench.kill(owner);

        let second = bench.try_open(&disk, settings).unwrap();
        assert_eq!(bench.content(&second).unwrap(), numbers(200), "seed {seed}");
        flush(&second).unwrap();
        power_is_lost(&bench, &disk, second);
        let third = bench.open(&disk);
        assert_eq!(bench.content(&third).unwrap(), numbers(200), "seed {seed}: a flush was acknowledged, and its data is gone");
        bench.scan(&third);
    }
}

/// Nobody can keep what a disk does not; what is found is some state the volume had, or its opening is refused.
#[test]
fn case_05_a_disk_that_lies_about_its_syncs() {
    let (mut detected, mut older) = (0, 0);
    for seed in 500..600 {
        let bench = Bench::new(seed, BLOCKS, Durability::Local);
        // Not so small that the pool has most of it.
        let (disk, settings) = (HostDisk::new(&bench.world, 512 * BLOCK, 512), unhurried(&bench));
        let owner = bench.try_open(&disk, settings).unwrap();
        bench.write(&owner, 0, &numbers(100)).unwrap();
        disk.syncs.set(Syncs::Lie);
        for round in 2..6 {
            bench.write(&owner, 0, &numbers(round * 100)).unwrap();
        }
        power_is_lost(&bench, &disk, owner);
        disk.syncs.set(Syncs::Work);
        let found = match bench.try_open(&disk, bench.settings) {
            Ok(owner) => bench.content(&owner).unwrap(),
            Err(VolumeError::LogDamaged { .. }) => {
                detected += 1;
                continue;
            }
            Err(error) => panic!("seed {seed}: {error}"),
        };
        // Blocks are written in order: those of one round, and after them those of the round before.
        let rounds: Vec<u64> = (0..).zip(&found).map(|(block, version)| (version - block) / 100).collect();
        let whole = rounds.is_sorted_by(|one, next| one >= next) && rounds[0] <= rounds[rounds.len() - 1] + 1;
        assert!(whole && (1..6).contains(&rounds[0]), "seed {seed}: {found:?}");
        older += u64::from(found != numbers(500));
    }
    assert!(detected > 80, "{detected} detected, {older} older than what was flushed");
}

#[derive(Clone, Copy)]
enum Change {
    Write(Version),
    Zero,
    Discard,
}

#[test]
fn case_21_overlapping_writes_trims_and_zeroes_in_flight() {
    for seed in 2_100..2_140 {
        let bench = Bench::new(seed, BLOCKS, Durability::Local);
        let disk = bench.disk();
        let mut owner = bench.open(&disk);
        let mut expected = vec![0; BLOCKS as usize];
        for round in 1..8 {
            let random = &bench.world.random;
            let changes: Vec<(Range<u64>, Change)> = (0..20)
                .map(|number| {
                    let first = random.below(BLOCKS);
                    let change = match random.below(4) {
                        0 => Change::Zero,
                        1 => Change::Discard,
                        _ => Change::Write(round * 1000 + number),
                    };
                    (first..(first + 1 + random.below(8)).min(BLOCKS), change)
                })
                .collect();
            for (blocks, change) in &changes {
                let version = if let Change::Write(version) = change { *version } else { 0 };
                expected[blocks.start as usize..blocks.end as usize].fill(version);
            }
            let all = bench.run(&owner, move |volume| async move {
                let submit = |(blocks, change): (Range<u64>, Change)| {
                    let ((offset, len), volume) = (place(&blocks), volume.clone());
                    async move {
                        match change {
                            Change::Write(version) => {
                                let versions = vec![version; (blocks.end - blocks.start) as usize];
                                volume.write(offset, Bytes::from(contents_of(&versions))).await
                            }
                            Change::Zero => volume.zero(offset, len, false).await,
                            Change::Discard => volume.zero(offset, len, true).await,
                        }
                    }
                };
                futures_util::future::join_all(changes.into_iter().map(submit)).await
            });
            assert!(all.iter().all(Result::is_ok), "seed {seed}: {all:?}");
            assert_eq!(
                bench.content(&owner).unwrap(),
                expected,
                "seed {seed}: they were not done in the order of their submission"
            );
            match bench.world.random.below(3) {
                0 => {
                    bench.kill(owner);
                    owner = bench.open(&disk);
                }
                1 => {
                    bench.run(&owner, |volume| async move { volume.flush().await }).unwrap();
                    power_is_lost(&bench, &disk, owner);
                    owner = bench.open(&disk);
                }
                _ => bench.run(&owner, |volume| async move { volume.checkpoint().await }).unwrap(),
            }
            assert_eq!(bench.content(&owner).unwrap(), expected, "seed {seed}");
        }
        bench.scan(&owner);
    }
}

/// A machine that was asleep, or moved: all at once it is another day, with everything under way.
#[test]
fn case_27_the_clock_jumps() {
    for seed in 2_700..2_740 {
        for durability in [Durability::Local, Durability::Remote] {
            let bench = Bench::new(seed, BLOCKS, durability);
            let disk = bench.disk();
            let owner = bench.open(&disk);
            bench.store.set_faults(100);
            for round in 1..6 {
                let done = Rc::new(Cell::new(false));
                let (volume, told) = (owner.volume.clone(), done.clone());
                let writing = async move {
                    for (block, version) in (0..).zip(numbers(round * 100)) {
                        volume.write(block * BLOCK as u64, Bytes::from(content_of(version))).await.unwrap();
                    }
                    volume.flush().await.unwrap();
                    volume.gather(0.7).await.unwrap();
                    told.set(true);
                };
                bench.world.spawn(owner.process, Box::pin(writing));
                while !done.get() {
                    bench.steps(1);
                    if bench.world.random.per_mille(20) {
                        bench.world.jump(Duration::from_secs(1 << bench.world.random.below(26)));
                    }
                }
                assert_eq!(bench.content(&owner).unwrap(), numbers(round * 100), "seed {seed}");
            }
            assert_eq!(owner.volume.failed(), None, "seed {seed}");
            bench.store.set_faults(0);
            bench.kill(owner);
            let next = bench.open(&disk);
            assert_eq!(bench.content(&next).unwrap(), numbers(500), "seed {seed}");
            bench.scan(&next);
        }
    }
}

/// The world, but with random numbers that somebody else gets as well.
struct Twin {
    world: Rc<dyn Environment>,
    random: Random,
}

impl Environment for Twin {
    fn now(&self) -> Duration {
        self.world.now()
    }

    fn sleep(&self, duration: Duration) -> LocalFuture<'static, ()> {
        self.world.sleep(duration)
    }

    fn random(&self, bytes: &mut [u8]) {
        bytes.fill_with(|| self.random.number() as u8);
    }

    fn spawn(&self, task: LocalFuture<'static, ()>) {
        self.world.spawn(task);
    }

    fn offload(&self, work: Box<dyn FnOnce() + Send>) -> LocalFuture<'static, ()> {
        self.world.offload(work)
    }
}

/// The volume of both.
const TWINS: [u8; 16] = [46; 16];

/// One daemon in two machines that began as one, with their memory. The store and the disks watch that nothing is encrypted with the same key and nonce.
#[test]
fn case_46_a_twin_with_the_same_random_numbers() {
    let (mut both_flushed, mut flushes) = (0, 0);
    for seed in 4_600..4_680 {
        let bench = Bench::new(seed, BLOCKS, Durability::Remote);
        let secrets = Secrets { pool_key: [1; 32], data_key: Some([2; 32]) };
        let (_, maker) = bench.parts(&bench.disk());
        create(&bench.world, &Parts { secrets: secrets.clone(), ..maker }, TWINS, BLOCKS * BLOCK as u64).unwrap();
        let twin = |first: u64| {
            let process = bench.world.new_process();
            let parts = parts(&bench.world, &bench.store, &new_disk(&bench.world), process);
            let environment = Rc::new(Twin { world: parts.environment.clone(), random: Random::new(seed) });
            let parts = Parts { environment, secrets: secrets.clone(), ..parts };
            let flushed = Rc::new(Cell::new(0));
            let (told, settings) = (flushed.clone(), bench.settings);
            let living = async move {
                let Ok(volume) = MappedVolume::open(&parts, TWINS, settings).await else { return };
                for version in 1..6 {
                    for block in first..first + BLOCKS / 2 {
                        let bytes = Bytes::from(content_of(first << 32 | version));
                        let Ok(()) = volume.write(block * BLOCK as u64, bytes).await else { return };
                    }
                    let Ok(()) = volume.flush().await else { return };
                    told.set(version);
                    let Ok(_) = volume.gather(0.7).await else { return };
                }
            };
            bench.world.spawn(process, Box::pin(living));
            (process, first, flushed)
        };
        let twins = [twin(0), twin(BLOCKS / 2)];
        bench.steps(1000 + bench.world.random.below(5000));
        twins.iter().for_each(|(process, ..)| bench.world.kill(*process));
        bench.world.settle();

        let (process, parts) = bench.parts(&bench.disk());
        let (parts, settings) = (Parts { secrets, ..parts }, bench.settings);
        let reading = async move {
            let volume = MappedVolume::open(&parts, TWINS, settings).await.unwrap();
            volume.read(0, volume.size()).await.unwrap()
        };
        let found = versions_in(&bench.world.wait_for(process, reading).unwrap());
        for (_, first, flushed) in &twins {
            for block in *first..first + BLOCKS / 2 {
                let version = found[block as usize];
                assert!(version == 0 || version >> 32 == *first, "seed {seed}: block {block} holds its twin's {version:x}");
                assert!(
                    version & 0xff >= flushed.get(),
                    "seed {seed}: block {block} holds {version:x}, {} was flushed",
                    flushed.get()
                );
            }
        }
        let told = twins.each_ref().map(|(.., flushed)| flushed.get());
        both_flushed += u64::from(told.iter().all(|told| *told > 0));
        flushes += told.iter().sum::<u64>();
    }
    assert!(flushes > 100 && both_flushed > 2, "{flushes} flushes, {both_flushed} times by both");
}
