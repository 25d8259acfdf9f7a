//! Cases of many: snapshots by the thousand, clones of clones of clones, and pages of the map by the thousand.

use std::cell::Cell;
use std::rc::Rc;
use std::time::Duration;

use bytes::Bytes;
use futures_util::future::join_all;

use super::bench::{Bench, versions_in};
use crate::checkpoint::PAGES_MAX;
use crate::clone::{SnapshotView, clone_snapshot};
use crate::segment::BLOCK;
use crate::simulation::VOLUME;
use crate::simulation::contents::{Version, content_of};
use crate::{Durability, MappedVolume, Settings, VolumeError};

const SNAPSHOTS: u64 = 10_000;
/// Made at once.
const BATCH: u64 = 500;
/// In the checkpoint, with a name of six bytes.
const SNAPSHOT_BYTES: usize = 64;
const GENERATIONS: u64 = 1_000;
const BLOCKS: u64 = 64;

fn name_of(number: u64) -> String {
    format!("s{number:05}")
}

fn meta_len(bench: &Bench, group: &str) -> usize {
    let names = bench.store.names().into_iter().filter(|name| name.starts_with(group) && name.contains("/m/"));
    names.map(|name| bench.store.len_of(&name)).max().unwrap()
}

#[test]
fn ten_thousand_snapshots_are_made_listed_read_and_deleted() {
    let bench = Bench::new(10_000, BLOCKS, Durability::Local);
    let disk = bench.disk();
    let owner = bench.open(&disk);
    let made = bench.run(&owner, |volume| async move {
        for batch in 0..SNAPSHOTS / BATCH {
            volume.write(batch * BLOCK as u64, Bytes::from(content_of(1 + batch))).await.unwrap();
            let names: Vec<String> = (0..BATCH).map(|number| name_of(batch * BATCH + number)).collect();
            let making = names.iter().map(|name| volume.snapshot(name, batch));
            for made in join_all(making).await {
                made?;
            }
        }
        volume.wait_for_snapshot(&name_of(SNAPSHOTS - 1)).await
    });
    made.unwrap();
    bench.kill(owner);

    let owner = bench.open(&disk);
    let names: Vec<String> = owner.volume.snapshots().into_iter().map(|snapshot| snapshot.name).collect();
    assert!(names.iter().cloned().eq((0..SNAPSHOTS).map(name_of)));
    assert!(meta_len(&bench, "07") < SNAPSHOTS as usize * SNAPSHOT_BYTES + (64 << 10), "{} bytes", meta_len(&bench, "07"));
    for number in (0..SNAPSHOTS).step_by(997).chain([SNAPSHOTS - 1]) {
        let (parts, name) = (owner.parts.clone(), name_of(number));
        let read = bench.run(&owner, |_| async move {
            let view = SnapshotView::open(&parts, VOLUME, &name).await?;
            view.read(0, view.size()).await
        });
        let written = number / BATCH;
        let expected: Vec<Version> = (0..BLOCKS).map(|block| if block <= written { 1 + block } else { 0 }).collect();
        assert_eq!(versions_in(&read.unwrap()), expected, "snapshot {number}");
    }
    let deleted = bench.run(&owner, |volume| async move {
        for number in (0..SNAPSHOTS).step_by(500) {
            volume.delete_snapshot(&name_of(number)).await?;
        }
        volume.delete_snapshot(&name_of(0)).await
    });
    assert_eq!(deleted, Err(VolumeError::NoSnapshot));
    assert_eq!(owner.volume.snapshots().len() as u64, SNAPSHOTS - SNAPSHOTS / 500);
}

/// The volume of a generation.
fn group(generation: u64) -> [u8; 16] {
    if generation == 0 { VOLUME } else { u128::from(generation).to_be_bytes() }
}

#[test]
fn a_clone_a_thousand_generations_deep_opens_reads_and_writes() {
    let bench = Bench::new(1_000, BLOCKS, Durability::Remote);
    let mut expected = vec![0; BLOCKS as usize];
    for generation in 0..GENERATIONS {
        let (process, parts) = bench.parts(&bench.disk());
        let (settings, block) = (bench.settings, generation % BLOCKS);
        expected[block as usize] = 1 + generation;
        let made = async move {
            let volume = MappedVolume::open(&parts, group(generation), settings).await?;
            volume.write(block * BLOCK as u64, Bytes::from(content_of(1 + generation))).await.unwrap();
            volume.snapshot("s", 0).await?;
            volume.wait_for_snapshot("s").await?;
            clone_snapshot(&parts, group(generation), "s", group(generation + 1)).await
        };
        bench.world.wait_for(process, made).unwrap().unwrap();
        bench.world.kill(process);
        bench.world.settle();
    }
    let (process, parts) = bench.parts(&bench.disk());
    let settings = bench.settings;
    let began = parts.environment.now();
    let last = async move {
        let volume = MappedVolume::open(&parts, group(GENERATIONS), settings).await?;
        let read = volume.read(0, volume.size()).await.unwrap();
        let took = parts.environment.now() - began;
        volume.write(0, Bytes::from(content_of(7_000))).await.unwrap();
        volume.flush().await.unwrap();
        volume.checkpoint().await?;
        Ok::<_, VolumeError>((read, volume.read(0, BLOCK as u64).await.unwrap(), took))
    };
    let (read, first, took) = bench.world.wait_for(process, last).unwrap().unwrap();
    assert_eq!(versions_in(&read), expected);
    assert!(first == content_of(7_000));
    assert!(took < Duration::from_secs(1), "opening and reading it took {took:?} of simulated time");
    let len = meta_len(&bench, &format!("{GENERATIONS:032x}"));
    assert!(len < 1 << 20, "{len} bytes");
}

/// Blocks under a leaf of the map.
const LEAF: u64 = 512;
const LEAVES: u64 = 9_000;

#[test]
fn a_checkpoint_keeps_only_pages_that_are_not_in_the_store_yet() {
    let bench = Bench::new(9_000, LEAVES * LEAF, Durability::Local);
    let settings = Settings { checkpoint_segments: u64::MAX, gathers: false, ..bench.settings };
    let owner = bench.try_open(&bench.disk(), settings).unwrap();
    let changed = bench.run(&owner, |volume| async move {
        for batch in 0..LEAVES / BATCH {
            let first_blocks = (batch * BATCH..(batch + 1) * BATCH).map(|leaf| leaf * LEAF * BLOCK as u64);
            for done in join_all(first_blocks.map(|offset| volume.zero(offset, BLOCK as u64, false))).await {
                done?;
            }
        }
        volume.destage().await
    });
    changed.unwrap();
    let (volume, is_done) = (owner.volume.clone(), Rc::new(Cell::new(false)));
    let done = is_done.clone();
    let checkpoint = async move {
        volume.checkpoint().await.unwrap();
        done.set(true);
    };
    bench.world.spawn(owner.process, Box::pin(checkpoint));
    let mut kept_most = 0;
    while !is_done.get() {
        bench.steps(1);
        kept_most = kept_most.max(owner.volume.core.reader.fresh_pages());
    }
    assert!((1..=PAGES_MAX).contains(&kept_most), "{kept_most} pages were kept, of {LEAVES} and more");
}
