//! Snapshots, clones, resize, rollback and flatten through a pool of mapped volumes: by what its users see.

mod common;

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use backends::segments::memory::MemoryStore;
use backends::{Flattened, Layout, Pool, PoolError, VolumeRecord};
use blockdev::{BlockDevice, Op};
use common::{Host, MIB, Place, spec};
use proptest::prelude::*;
use volume::Durability;

const BLOCK: usize = 4096;

/// A pool with one volume `v`.
fn place() -> Place {
    Place::new(&["v"], &spec(Layout::Mapped))
}

fn write(place: &Place, volume: &str, block: u64, fill: u8) {
    let disk = place.disk(volume);
    disk.write(block * BLOCK as u64, vec![fill; BLOCK]).unwrap();
    disk.flush().unwrap();
}

/// The first byte of each of the first blocks of a volume, or of `VOLUME@SNAPSHOT`.
fn fills(place: &Place, name: &str, blocks: u64) -> Vec<u8> {
    let disk = match name.split_once('@') {
        Some((volume, snapshot)) => place.host.client(place.pool.open_snapshot(volume, snapshot).unwrap()).unwrap(),
        None => place.disk(name),
    };
    (0..blocks).map(|block| uniform(&disk.read(block * BLOCK as u64, BLOCK as u64).unwrap())).collect()
}

fn snapshots(place: &Place, volume: &str) -> Vec<String> {
    place.pool.get(volume).unwrap().snapshots.into_keys().collect()
}

/// The byte that all of a block is.
fn uniform(block: &[u8]) -> u8 {
    assert!(block.iter().all(|byte| *byte == block[0]), "a block is mixed");
    block[0]
}

fn in_use<T: std::fmt::Debug>(outcome: Result<T, PoolError>, words: &[&str]) {
    match outcome {
        Err(PoolError::InUse(why)) => words.iter().for_each(|word| assert!(why.contains(word), "{word}: {why}")),
        other => panic!("{other:?}"),
    }
}

#[test]
fn a_snapshot_under_load_is_one_point_in_time_and_stays() {
    let place = place();
    let disk = place.disk("v");
    let stop = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let writer = scope.spawn(|| {
            // Block 0 first, then block 1: no point in time has block 1 ahead, and none is two behind.
            let mut number = 0u64;
            while !stop.load(Ordering::Relaxed) {
                number += 1;
                for block in [0, BLOCK as u64] {
                    disk.write(block, number.to_le_bytes().repeat(BLOCK / 8)).unwrap();
                }
            }
        });
        for round in 0..20 {
            place.pool.snapshot(&["v"], &format!("s{round}")).unwrap();
        }
        stop.store(true, Ordering::Relaxed);
        writer.join().unwrap();
    });
    let numbers = |place: &Place, snapshot: &str| -> [u64; 2] {
        let disk = place.host.client(place.pool.open_snapshot("v", snapshot).unwrap()).unwrap();
        [0, BLOCK as u64].map(|offset| u64::from_le_bytes(disk.read(offset, BLOCK as u64).unwrap()[..8].try_into().unwrap()))
    };
    let found: Vec<[u64; 2]> = (0..20).map(|round| numbers(&place, &format!("s{round}"))).collect();
    assert!(found.iter().all(|[first, second]| *first == *second || *first == second + 1), "{found:?}");
    assert!(found.is_sorted(), "{found:?}");
    disk.write(0, vec![0xee; 2 * BLOCK]).unwrap();
    disk.flush().unwrap();
    drop(disk);
    let place = place.reopen();
    let again: Vec<[u64; 2]> = (0..20).map(|round| numbers(&place, &format!("s{round}"))).collect();
    assert_eq!(again, found);
}

#[test]
fn two_hundred_snapshots_are_each_what_the_volume_was() {
    let place = place();
    let disk = place.disk("v");
    for number in 0..200u64 {
        disk.write(number % 16 * BLOCK as u64, vec![number as u8; BLOCK]).unwrap();
        place.pool.snapshot(&["v"], &format!("s{number:03}")).unwrap();
    }
    drop(disk);
    let place = place.reopen();
    assert_eq!(snapshots(&place, "v").len(), 200);
    for number in (0..200u64).step_by(13).chain([199]) {
        let newest = |block: u64| (0..=number).rev().find(|write| write % 16 == block).unwrap_or(0) as u8;
        let expected: Vec<u8> = (0..16).map(newest).collect();
        assert_eq!(fills(&place, &format!("v@s{number:03}"), 16), expected, "snapshot {number}");
    }
    let device = place.pool.open("v", false).unwrap();
    for number in 0..200 {
        place.pool.delete_snapshot("v", &format!("s{number:03}")).unwrap();
    }
    drop(device);
    assert!(snapshots(&place, "v").is_empty());
    place.pool.delete("v").unwrap();
    assert_eq!(place.pool.check(&|_, _| ()).unwrap(), Vec::<String>::new());
}

#[test]
fn a_clone_and_its_origin_go_their_own_ways_and_are_deleted_from_the_end() {
    let place = place();
    write(&place, "v", 0, 1);
    place.pool.snapshot(&["v"], "s").unwrap();
    write(&place, "v", 1, 2);
    let clone = place.pool.clone_volume("v", Some("s"), "c").unwrap();
    assert_eq!((clone.origin.as_deref(), clone.size), (Some("v@s"), 16 * MIB));
    assert!(matches!(place.pool.clone_volume("v", Some("s"), "c"), Err(PoolError::Exists(_))));
    assert!(matches!(place.pool.clone_volume("v", Some("none"), "d"), Err(PoolError::NotFound(_))));
    assert_eq!(fills(&place, "c", 2), [1, 0]);
    write(&place, "c", 0, 3);
    assert_eq!(fills(&place, "c", 2), [3, 0]);
    assert_eq!(fills(&place, "v", 2), [1, 2]);
    assert_eq!(fills(&place, "v@s", 2), [1, 0]);
    let place = place.reopen();
    place.pool.rename("c", "copy").unwrap();
    place.pool.rename("v", "u").unwrap();
    assert_eq!(place.pool.get("copy").unwrap().origin.as_deref(), Some("u@s"));
    place.pool.rename("u", "v").unwrap();
    assert_eq!(fills(&place, "copy", 2), [3, 0]);
    in_use(place.pool.delete_snapshot("v", "s"), &["v@s", "(copy)"]);
    in_use(place.pool.delete("v"), &["volume v", "(copy)"]);
    place.pool.delete("copy").unwrap();
    in_use(place.pool.delete("v"), &["v@s", "delete them first"]);
    place.pool.delete_snapshot("v", "s").unwrap();
    assert!(matches!(place.pool.open_snapshot("v", "s").map(drop), Err(PoolError::NotFound(_))));
    assert!(matches!(place.pool.delete_snapshot("v", "s"), Err(PoolError::NotFound(_))));
    place.pool.delete("v").unwrap();
    assert!(place.pool.list().unwrap().is_empty());
    assert_eq!(place.pool.check(&|_, _| ()).unwrap(), Vec::<String>::new());
}

#[test]
fn a_clone_of_a_clone_of_a_clone_reads_what_each_of_them_wrote() {
    let place = place();
    let names = ["v", "c1", "c2", "c3"];
    for (index, pair) in names.windows(2).enumerate() {
        write(&place, pair[0], index as u64, index as u8 + 1);
        place.pool.clone_volume(pair[0], None, pair[1]).unwrap();
    }
    write(&place, "c3", 3, 4);
    // Without a snapshot one is made, and shown.
    assert_eq!(snapshots(&place, "c1"), ["clone-c2"]);
    assert_eq!(place.pool.get("c2").unwrap().origin.as_deref(), Some("c1@clone-c2"));
    for block in 0..4 {
        write(&place, "v", block, 99);
    }
    let place = place.reopen();
    assert_eq!(fills(&place, "c3", 4), [1, 2, 3, 4]);
    assert_eq!(fills(&place, "c1", 4), [1, 2, 0, 0]);
    place.pool.delete("c3").unwrap();
    place.pool.clone_volume("c2", None, "c3").unwrap();
    assert_eq!(snapshots(&place, "c2"), ["clone-c3", "clone-c3-1"]);
    assert_eq!(fills(&place, "c3", 4), [1, 2, 3, 0]);
}

#[test]
fn a_flattened_clone_outlives_its_origin() {
    let place = place();
    for block in 0..64 {
        write(&place, "v", block, block as u8 + 1);
    }
    place.pool.clone_volume("v", None, "c").unwrap();
    write(&place, "c", 0, 200);
    assert_eq!(place.pool.flatten("v", &|_, _| {}).unwrap(), Flattened::NoParent);
    place.pool.clone_volume("c", None, "d").unwrap();
    in_use(place.pool.flatten("c", &|_, _| {}), &["volume c", "(d)"]);
    place.pool.delete("d").unwrap();
    assert_eq!(place.pool.flatten("c", &|_, _| {}).unwrap(), Flattened::Copied);
    assert_eq!(place.pool.flatten("c", &|_, _| {}).unwrap(), Flattened::NoParent);
    assert_eq!(place.pool.get("c").unwrap().origin, None);
    place.pool.delete_snapshot("v", "clone-c").unwrap();
    place.pool.delete("v").unwrap();
    let place = place.reopen();
    let expected: Vec<u8> = (0..64).map(|block| if block == 0 { 200 } else { block + 1 }).collect();
    assert_eq!(fills(&place, "c", 64), expected);
    assert_eq!(place.pool.check(&|_, _| ()).unwrap(), Vec::<String>::new());
}

#[test]
fn rollback_and_resize_are_in_the_record() {
    let place = place();
    write(&place, "v", 0, 1);
    place.pool.snapshot(&["v"], "s").unwrap();
    let device = place.pool.open("v", false).unwrap();
    device.resize(32 * MIB).unwrap();
    place.pool.resized("v", 32 * MIB).unwrap();
    drop(device);
    assert_eq!(place.pool.get("v").unwrap().size, 32 * MIB);
    write(&place, "v", 0, 2);
    write(&place, "v", 8191, 3);
    place.pool.rollback("v", "s").unwrap();
    let place = place.reopen();
    assert_eq!(place.pool.get("v").unwrap().size, 16 * MIB);
    assert_eq!(fills(&place, "v", 1), [1]);
    let device = place.pool.open("v", false).unwrap();
    device.resize(4 * MIB).unwrap();
    // The engine is the truth: the record follows with the next opening, if nothing else.
    drop(device);
    let place = place.reopen();
    drop(place.pool.open("v", false).unwrap());
    assert_eq!(place.pool.get("v").unwrap().size, 4 * MIB);
    assert_eq!(fills(&place, "v@s", 4096).len(), 4096);
    assert!(matches!(place.pool.rollback("v", "none"), Err(PoolError::NotFound(_))));
}

#[test]
fn changed_ranges_hold_every_change_and_little_else() {
    let place = place();
    write(&place, "v", 0, 1);
    place.pool.snapshot(&["v"], "a").unwrap();
    write(&place, "v", 7, 2);
    write(&place, "v", 3000, 2);
    place.pool.snapshot(&["v"], "b").unwrap();
    write(&place, "v", 9, 3);
    let block = BLOCK as u64;
    let changed = |to| place.pool.changed("v", "a", to).unwrap().expect("a mapped volume can tell");
    assert_eq!(changed(Some("b")), [7 * block..8 * block, 3000 * block..3001 * block]);
    assert_eq!(changed(None), [7 * block..8 * block, 9 * block..10 * block, 3000 * block..3001 * block]);
}

/// Edits the record of volume `v` behind the pool's back.
fn edit_record(place: &Place, edit: impl FnOnce(&mut VolumeRecord)) {
    let path = place.folder.path().join("pool/volumes/v/volume.json");
    let mut record = serde_json::from_slice(&std::fs::read(&path).unwrap()).unwrap();
    edit(&mut record);
    std::fs::write(&path, serde_json::to_vec(&record).unwrap()).unwrap();
}

#[test]
fn a_record_that_a_crash_left_behind_follows_the_engine() {
    let place = place();
    write(&place, "v", 0, 1);
    place.pool.snapshot(&["v"], "real").unwrap();
    let right = place.pool.get("v").unwrap();
    edit_record(&place, |record| {
        let ghost = record.snapshots.remove("real").unwrap();
        record.snapshots.insert("ghost".to_owned(), ghost);
        record.size = 4 * MIB;
    });
    assert_eq!(snapshots(&place, "v"), ["ghost"]);
    assert!(matches!(place.pool.rollback("v", "ghost"), Err(PoolError::NotFound(_))));
    assert_eq!(place.pool.get("v").unwrap(), right);
    edit_record(&place, |record| record.snapshots.clear());
    place.pool.rollback("v", "real").unwrap();
    assert_eq!(place.pool.get("v").unwrap(), right);
}

#[test]
fn several_volumes_have_a_snapshot_together_or_not_at_all() {
    let place = place();
    place.pool.create("w", &spec(Layout::Mapped)).unwrap();
    place.pool.snapshot(&["v", "w"], "both").unwrap();
    place.pool.snapshot(&["w"], "taken").unwrap();
    assert!(matches!(place.pool.snapshot(&["v", "w"], "taken"), Err(PoolError::Exists(_))));
    assert_eq!(snapshots(&place, "v"), ["both"]);
    assert_eq!(snapshots(&place, "w"), ["both", "taken"]);
    assert!(matches!(place.pool.snapshot(&["v"], "NO"), Err(PoolError::Invalid(_))));
}

#[test]
fn a_clone_that_was_not_made_whole_holds_nothing_up() {
    let place = place();
    write(&place, "v", 0, 1);
    place.pool.clone_volume("v", None, "c").unwrap();
    let path = place.folder.path().join("pool");
    // A crash before the record was published, and a trash that was emptied by hand.
    std::fs::remove_dir_all(path.join("volumes/c")).unwrap();
    let place = place.reopen();
    place.pool.delete_snapshot("v", "clone-c").unwrap();
    place.pool.clone_volume("v", None, "d").unwrap();
    let record = place.pool.get("d").unwrap();
    std::fs::rename(path.join("volumes/d"), path.join("trash").join(format!("new-{}", record.uuid))).unwrap();
    let place = place.reopen();
    assert_eq!(std::fs::read_dir(path.join("trash")).unwrap().count(), 0);
    place.pool.delete_snapshot("v", "clone-d").unwrap();
    place.pool.delete("v").unwrap();
}

/// A clone is not forgotten because its record cannot be read.
#[test]
fn what_a_clone_with_a_damaged_record_needs_stays() {
    let place = place();
    write(&place, "v", 0, 1);
    place.pool.snapshot(&["v"], "s").unwrap();
    place.pool.clone_volume("v", Some("s"), "c").unwrap();
    let record = place.folder.path().join("pool/volumes/c/volume.json");
    let before = fs::read(&record).unwrap();
    fs::write(&record, "{").unwrap();
    for refused in [place.pool.delete_snapshot("v", "s"), place.pool.delete("v")] {
        let why = refused.unwrap_err().to_string();
        assert!(why.contains("volume c"), "{why}");
    }
    fs::write(&record, before).unwrap();
    let place = place.reopen();
    assert_eq!(fills(&place, "c", 2), [1, 0]);
    in_use(place.pool.delete_snapshot("v", "s"), &["v@s", "(c)"]);
}

#[test]
fn another_host_clones_what_this_one_serves() {
    let folder = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let hosts = ["a", "b"].map(|name| Host::new(folder.path(), name));
    let store = Arc::new(MemoryStore::new());
    let pools = [0, 1].map(|index: usize| hosts[index].store_pool(&store, Durability::Remote));
    pools[0].create("v", &spec(Layout::Mapped)).unwrap();
    let disk = hosts[0].disk(&pools[0], "v").unwrap();
    disk.write(0, vec![1; BLOCK]).unwrap();
    pools[0].snapshot(&["v"], "s").unwrap();
    pools[1].clone_volume("v", Some("s"), "c").unwrap();
    let clone = hosts[1].disk(&pools[1], "c").unwrap();
    clone.write(0, vec![2; BLOCK]).unwrap();
    clone.flush().unwrap();
    disk.write(BLOCK as u64, vec![3; BLOCK]).unwrap();
    disk.flush().expect("cloning took the volume from nobody");
    assert!(disk.read(0, BLOCK as u64).unwrap() == vec![1; BLOCK]);
    in_use(pools[0].delete_snapshot("v", "s"), &["(c)"]);
    drop(clone);
    pools[1].delete("c").unwrap();
    pools[0].delete_snapshot("v", "s").unwrap();
    let usage = pools[0].usage("v").unwrap();
    assert!(usage.reduced.unwrap().unique >= 2 * BLOCK as u64, "{usage:?}");
}

#[derive(Clone, Debug)]
enum Step {
    Write(usize, u8, u8),
    Snapshot(usize),
    DeleteSnapshot(usize, usize),
    Clone(usize, Option<usize>),
    Rollback(usize, usize),
    Flatten(usize),
    Delete(usize),
    Reopen,
}

fn step() -> impl Strategy<Value = Step> {
    let any = 0..8usize;
    prop_oneof![
        8 => (any.clone(), 0..4u8, 1..u8::MAX).prop_map(|(volume, block, fill)| Step::Write(volume, block, fill)),
        4 => any.clone().prop_map(Step::Snapshot),
        3 => (any.clone(), any.clone()).prop_map(|(volume, snapshot)| Step::DeleteSnapshot(volume, snapshot)),
        3 => (any.clone(), prop::option::of(any.clone())).prop_map(|(volume, snapshot)| Step::Clone(volume, snapshot)),
        2 => (any.clone(), any.clone()).prop_map(|(volume, snapshot)| Step::Rollback(volume, snapshot)),
        1 => any.clone().prop_map(Step::Flatten),
        2 => any.prop_map(Step::Delete),
        1 => Just(Step::Reopen),
    ]
}

type Blocks = [u8; 4];

#[derive(Default)]
struct Expected {
    blocks: Blocks,
    snapshots: BTreeMap<String, Blocks>,
    /// What its clone depends on.
    origin: Option<(String, String)>,
}

/// What all volumes hold, and which of them depend on which snapshot.
#[derive(Default)]
struct Model {
    volumes: BTreeMap<String, Expected>,
    names: usize,
}

impl Model {
    fn volume(&self, number: usize) -> Option<String> {
        self.volumes.keys().nth(number % self.volumes.len().max(1)).cloned()
    }

    fn snapshot(&self, volume: &str, number: usize) -> Option<String> {
        let snapshots = &self.volumes[volume].snapshots;
        snapshots.keys().nth(number % snapshots.len().max(1)).cloned()
    }

    fn fresh(&mut self, what: &str) -> String {
        self.names += 1;
        format!("{what}{}", self.names)
    }

    fn has_clones(&self, volume: &str, snapshot: Option<&str>) -> bool {
        let is_of = |(parent, name): &(String, String)| parent == volume && snapshot.is_none_or(|snapshot| name == snapshot);
        self.volumes.values().any(|other| other.origin.as_ref().is_some_and(is_of))
    }

    /// Does the same to the pool and to the model; both must agree on whether it can be done.
    fn apply(&mut self, place: &Place, step: &Step) {
        let pool = &place.pool;
        let (Step::Write(number, ..)
        | Step::Snapshot(number)
        | Step::DeleteSnapshot(number, _)
        | Step::Clone(number, _)
        | Step::Rollback(number, _)
        | Step::Flatten(number)
        | Step::Delete(number)) = step
        else {
            return;
        };
        let Some(volume) = self.volume(*number) else { return };
        match step {
            Step::Write(_, block, fill) => {
                write(place, &volume, u64::from(*block), *fill);
                self.volumes.get_mut(&volume).unwrap().blocks[usize::from(*block)] = *fill;
            }
            Step::Snapshot(_) => {
                let name = self.fresh("s");
                pool.snapshot(&[&volume], &name).unwrap();
                self.keep(&volume, name);
            }
            Step::DeleteSnapshot(_, snapshot) => {
                let Some(snapshot) = self.snapshot(&volume, *snapshot) else { return };
                let is_free = !self.has_clones(&volume, Some(&snapshot));
                assert_eq!(pool.delete_snapshot(&volume, &snapshot).is_ok(), is_free);
                if is_free {
                    self.volumes.get_mut(&volume).unwrap().snapshots.remove(&snapshot);
                }
            }
            Step::Clone(_, snapshot) => {
                let (to, asked) = (self.fresh("v"), snapshot.and_then(|number| self.snapshot(&volume, number)));
                pool.clone_volume(&volume, asked.as_deref(), &to).unwrap();
                let snapshot = asked.unwrap_or_else(|| format!("clone-{to}"));
                if !self.volumes[&volume].snapshots.contains_key(&snapshot) {
                    self.keep(&volume, snapshot.clone());
                }
                let blocks = self.volumes[&volume].snapshots[&snapshot];
                let clone = Expected { blocks, origin: Some((volume, snapshot)), ..Expected::default() };
                self.volumes.insert(to, clone);
            }
            Step::Rollback(_, snapshot) => {
                let Some(snapshot) = self.snapshot(&volume, *snapshot) else { return };
                pool.rollback(&volume, &snapshot).unwrap();
                let expected = self.volumes.get_mut(&volume).unwrap();
                expected.blocks = expected.snapshots[&snapshot];
            }
            Step::Flatten(_) => {
                let expected = &self.volumes[&volume];
                let is_free = expected.origin.is_none() || !self.has_clones(&volume, None);
                assert_eq!(pool.flatten(&volume, &|_, _| {}).is_ok(), is_free);
                if is_free {
                    self.volumes.get_mut(&volume).unwrap().origin = None;
                }
            }
            Step::Delete(_) => {
                let is_free = self.volumes[&volume].snapshots.is_empty();
                assert_eq!(pool.delete(&volume).is_ok(), is_free);
                if is_free {
                    self.volumes.remove(&volume);
                }
            }
            Step::Reopen => {}
        }
    }

    fn keep(&mut self, volume: &str, snapshot: String) {
        let expected = self.volumes.get_mut(volume).unwrap();
        expected.snapshots.insert(snapshot, expected.blocks);
    }

    fn check(&self, place: &Place) {
        let listed: Vec<String> = place.pool.list().unwrap().into_iter().map(|record| record.name).collect();
        assert_eq!(listed, self.volumes.keys().cloned().collect::<Vec<_>>());
        for (volume, expected) in &self.volumes {
            assert_eq!(fills(place, volume, 4), expected.blocks, "{volume}");
            assert_eq!(snapshots(place, volume), expected.snapshots.keys().cloned().collect::<Vec<_>>(), "{volume}");
            for (snapshot, blocks) in &expected.snapshots {
                assert_eq!(fills(place, &format!("{volume}@{snapshot}"), 4), blocks, "{volume}@{snapshot}");
            }
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 24, ..ProptestConfig::default() })]

    #[test]
    fn any_order_of_operations_leaves_what_a_model_says(steps in prop::collection::vec(step(), 1..30)) {
        let mut place = place();
        let mut model = Model::default();
        model.volumes.insert("v".to_owned(), Expected::default());
        for step in &steps {
            if matches!(step, Step::Reopen) {
                place = place.reopen();
            }
            model.apply(&place, step);
        }
        model.check(&place);
        prop_assert_eq!(place.pool.check(&|_, _| ()).unwrap(), Vec::<String>::new());
    }
}

fn files_under(folder: &Path) -> Vec<PathBuf> {
    let entries = fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path());
    entries.flat_map(|path| if path.is_dir() { files_under(&path) } else { vec![path] }).collect()
}

#[test]
fn what_has_rotted_is_found_and_is_an_error_for_its_readers_alone() {
    let folder = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let host = Host::new(folder.path(), "host");
    let path = folder.path().join("pool");
    let pool = host.file_pool(&path);
    pool.create("v", &spec(Layout::Mapped)).unwrap();
    let noise = |seed: u8| {
        (0..64 * 4096).map(|at: usize| ((at * at) >> 3) as u8 ^ seed.wrapping_mul((at >> 12) as u8)).collect::<Vec<u8>>()
    };
    let disk = host.disk(&pool, "v").unwrap();
    disk.write(0, noise(3)).unwrap();
    pool.snapshot(&["v"], "s").unwrap();
    disk.write(0, noise(5)).unwrap();
    disk.write(MIB, noise(7)).unwrap();
    assert_eq!(pool.check_volume("v", &|_, _| ()).unwrap(), Vec::<String>::new());
    let steps: Vec<PathBuf> =
        files_under(&path.join("segments/objects")).into_iter().filter(|file| file.to_str().unwrap().contains("/w/")).collect();
    let rotten = steps.iter().max_by_key(|file| fs::metadata(file).unwrap().len()).unwrap();
    let mut bytes = fs::read(rotten).unwrap();
    let at = bytes.len() - 2000;
    bytes[at] ^= 1;
    fs::remove_file(rotten).unwrap();
    fs::write(rotten, bytes).unwrap();
    let found = pool.check_volume("v", &|_, _| ()).unwrap();
    assert!((1..=4).contains(&found.len()), "{found:?}");
    assert!(found[0].contains("bytes ") && found[0].contains("is damaged"), "{found:?}");
    let unreadable =
        (0..MIB / 2 / 4096).filter(|block| [0, MIB].iter().any(|base| disk.read(base + block * 4096, 4096).is_err())).count();
    assert!((1..=4).contains(&unreadable), "{unreadable} blocks");
}

/// Blocks that neither compress nor repeat.
fn noise(seed: u8, blocks: usize) -> Vec<u8> {
    let mut bytes = vec![0; blocks * BLOCK];
    blake3::Hasher::new_keyed(&[seed; 32]).finalize_xof().fill(&mut bytes);
    bytes
}

#[test]
fn usage_tells_what_is_stored_for_the_volume_for_its_snapshots_and_for_nothing() {
    let place = place();
    let write = |seed: u8, blocks: usize| {
        let disk = place.disk("v");
        disk.write(0, noise(seed, blocks)).unwrap();
        disk.flush().unwrap();
    };
    let shares = || place.pool.usage("v").unwrap().shares.unwrap();
    let about = |bytes: u64, blocks: u64| {
        let expected = blocks * BLOCK as u64;
        assert!((expected..expected + expected / 16).contains(&bytes), "{bytes} are not about {expected}");
    };
    write(1, 256);
    place.pool.snapshot(&["v"], "s").unwrap();
    let before = shares();
    assert_eq!((before.data, before.snapshots), (256 * BLOCK as u64, 0));
    assert!(before.reclaimable < 32 * BLOCK as u64, "{before:?}");

    write(2, 128);
    place.pool.snapshot(&["v"], "t").unwrap();
    let (both, usage) = (shares(), place.pool.usage("v").unwrap());
    assert_eq!(both.data, 256 * BLOCK as u64);
    about(both.snapshots, 128);
    assert_eq!(usage.snapshots, both.snapshots);
    let disk = place.disk("v");
    assert_eq!(shares(), both, "an open volume tells the same");
    drop(disk);

    place.pool.delete_snapshot("v", "s").unwrap();
    let after = shares();
    assert_eq!((after.data, after.snapshots), (256 * BLOCK as u64, 0), "snapshot t is the volume as it is");
    about(after.reclaimable - both.reclaimable, 128);

    let disk = place.disk("v");
    disk.write(8 * MIB, noise(3, 4)).unwrap();
    assert_eq!(shares().data, 260 * BLOCK as u64, "what only the log has counts");
    disk.run(Op::Discard, 8 * MIB, 4 * BLOCK as u64, Vec::new()).unwrap();
    assert_eq!(shares().data, 256 * BLOCK as u64);
}

#[test]
fn the_progress_of_a_flatten_and_of_a_check_ends_with_all_of_it() {
    let place = place();
    let disk = place.disk("v");
    disk.write(0, noise(1, 256)).unwrap();
    disk.flush().unwrap();
    drop(disk);
    place.pool.clone_volume("v", None, "c").unwrap();
    let told = std::sync::Mutex::new(Vec::new());
    let tell = |done: u64, total: u64| told.lock().unwrap().push((done, total));
    assert_eq!(place.pool.flatten("c", &tell).unwrap(), Flattened::Copied);
    let (done, total) = *told.lock().unwrap().last().unwrap();
    assert!(done == total && total >= 256 * BLOCK as u64, "{done} of {total}");
    told.lock().unwrap().clear();
    assert_eq!(place.pool.check_volume("v", &tell).unwrap(), Vec::<String>::new());
    let told = told.into_inner().unwrap();
    assert_eq!(told.last().copied(), Some((16 * MIB, 16 * MIB)));
    assert!(told.iter().all(|(done, total)| done <= total), "{told:?}");
}
