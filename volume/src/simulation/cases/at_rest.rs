//! Volumes at rest: what is told of them without opening them.

use std::rc::Rc;

use backends::ReducedUsage;
use bytes::Bytes;

use super::bench::{BLOCKS, Bench, Owner};
use crate::at_rest::{self, RestingUse};
use crate::names::root_path;
use crate::segment::BLOCK;
use crate::simulation::VOLUME;
use crate::simulation::contents::content_of;
use crate::simulation::disk::HostDisk;
use crate::{Durability, MappedVolume, Settings, VolumeError};

/// Whoever opens it only looks.
fn looking(bench: &Bench) -> Settings {
    Settings { checkpoint_segments: 1_000, gathers: false, ..bench.settings }
}

/// Something that a client or the volume itself does, by chance.
async fn use_it(volume: Rc<MappedVolume>, number: u64, chance: u64, block: u64) {
    let (offset, len) = (block * BLOCK as u64, BLOCK as u64);
    match chance {
        0..12 => volume.write(offset, Bytes::from(content_of(number))).await.unwrap(),
        12..14 => volume.zero(offset, len, false).await.unwrap(),
        14..16 => volume.zero(offset, len, true).await.unwrap(),
        16 => volume.snapshot(&format!("s{number}"), 0).await.unwrap(),
        17 => volume.flush().await.unwrap(),
        18 => volume.destage().await.unwrap(),
        _ => volume.checkpoint().await.unwrap(),
    }
}

/// A volume that was used and is at rest.
fn rested(seed: u64, data_key: Option<[u8; 32]>) -> (Bench, HostDisk) {
    let durability = if seed.is_multiple_of(2) { Durability::Local } else { Durability::Remote };
    let bench = Bench::with_key(seed, BLOCKS, durability, data_key);
    let disk = bench.disk();
    let owner = bench.try_open(&disk, looking(&bench)).unwrap();
    for number in 1..=40 {
        let (chance, block) = (bench.world.random.below(20), bench.world.random.below(BLOCKS));
        bench.run(&owner, move |volume| use_it(volume, number, chance, block));
    }
    bench.kill(owner);
    (bench, disk)
}

fn look(bench: &Bench, disk: &HostDisk, between: impl FnOnce()) -> Result<RestingUse, VolumeError> {
    let (process, parts) = bench.parts(disk);
    let log = {
        let parts = parts.clone();
        async move { at_rest::read_log(&parts, VOLUME).await }
    };
    let unpublished = bench.world.wait_for(process, log).unwrap()?;
    between();
    let looked = bench.world.wait_for(process, async move { at_rest::usage(&parts, VOLUME.into(), unpublished).await }).unwrap();
    assert!(!bench.store.requests.of(process).iter().any(|request| request.changes()), "the store was changed");
    bench.world.kill(process);
    looked
}

/// What is stored, what the log holds beyond that, and what the volume has of its size. Not the shares of snapshots, which an opening may complete.
type Figures = (ReducedUsage, u64, u64);

fn found_by_owner(bench: &Bench, owner: &Owner) -> Figures {
    let found = owner.volume.usage();
    let shares = bench.run(owner, |volume| async move { volume.shares().await }).unwrap();
    (found.reduced, found.log.used, shares.data)
}

#[test]
fn what_a_volume_at_rest_uses_is_what_its_next_owner_finds() {
    let (mut in_logs, mut in_snapshots) = (0, 0);
    for seed in 9_100..9_160 {
        for data_key in [None, Some([2; 32])] {
            let (bench, disk) = rested(seed, data_key);
            let (root, log) = (bench.store.root(&root_path(&VOLUME)), disk.content());
            let looked = look(&bench, &disk, || ()).unwrap();
            assert!(bench.store.root(&root_path(&VOLUME)) == root && disk.content() == log, "seed {seed}: something was changed");
            let owner = bench.try_open(&disk, looking(&bench)).unwrap();
            assert_eq!((looked.reduced, looked.log, looked.shares.data), found_by_owner(&bench, &owner), "seed {seed}");
            in_logs += u64::from(looked.log > 0);
            in_snapshots += u64::from(looked.shares.snapshots > 0);
        }
    }
    assert!(
        in_logs > 10 && in_snapshots > 10,
        "{in_logs} with something in the log, {in_snapshots} with something in snapshots alone"
    );
}

#[test]
fn what_a_log_held_is_not_told_of_a_volume_that_was_opened_since() {
    let (bench, disk) = rested(9_160, None);
    let looked = look(&bench, &disk, || bench.kill(bench.open(&disk)));
    assert_eq!(looked, Err(VolumeError::Raced));
    let other = bench.disk();
    assert_eq!(look(&bench, &other, || ()), Err(VolumeError::StaleLog), "the log is another one");
}
