//! Pools of mapped volumes: what a crash leaves between catalogue, store and log, and who clears it away.

mod common;

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use backends::segments::SegmentStore;
use backends::segments::drive::block_on;
use backends::segments::memory::MemoryStore;
use backends::{Claim, Layout, Pool, PoolError, VolumeSpec};
use blockdev::Errno;
use blockdev::client::Client;
use common::{Host, MIB, spec};
use volume::Durability;
use volume::pool::MappedPool;

fn objects(store: &dyn SegmentStore) -> usize {
    block_on(store.list("")).unwrap().len()
}

#[test]
fn one_pool_holds_both_layouts() {
    let folder = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let host = Host::new(folder.path(), "host");
    let path = folder.path().join("pool");
    let pool = host.file_pool(&path);
    assert_eq!(pool.layouts(), [Layout::Mapped, Layout::Raw]);
    pool.create("raw", &spec(Layout::Raw)).unwrap();
    assert!(!path.join("segments").exists(), "it is made with the first mapped volume");
    pool.create("mapped", &spec(Layout::Mapped)).unwrap();
    assert!(matches!(pool.create("mapped", &spec(Layout::Raw)), Err(PoolError::Exists(_))));
    assert!(matches!(pool.create("raw", &spec(Layout::Mapped)), Err(PoolError::Exists(_))));
    let odd = VolumeSpec { size: MIB + 512, ..spec(Layout::Mapped) };
    assert!(matches!(pool.create("odd", &odd), Err(PoolError::Invalid(why)) if why.contains("1052672")));

    for (volume, fill) in [("raw", 1u8), ("mapped", 2)] {
        let disk = host.disk(&pool, volume).unwrap();
        disk.write(512, vec![fill; 8192]).unwrap();
        disk.flush().unwrap();
    }
    pool.rename("mapped", "renamed").unwrap();
    drop(pool);
    let pool = host.file_pool(&path);
    let layouts: Vec<(String, Layout)> = pool.list().unwrap().into_iter().map(|record| (record.name, record.layout)).collect();
    assert_eq!(layouts, [("raw".to_owned(), Layout::Raw), ("renamed".to_owned(), Layout::Mapped)]);
    for (volume, fill) in [("raw", 1u8), ("renamed", 2)] {
        assert!(host.disk(&pool, volume).unwrap().read(512, 8192).unwrap() == vec![fill; 8192], "{volume}");
    }
    assert_eq!(pool.check(&|_, _| ()).unwrap(), Vec::<String>::new());
    assert_eq!(pool.usage("renamed").unwrap().logical, 16 * MIB);
    assert!(matches!(pool.open_as("raw", Claim::AcceptLoss).map(drop), Err(PoolError::Unsupported(_))));
    pool.snapshot(&["renamed"], "s").unwrap();
    // Where files cannot share data, the raw one refuses, and then neither has it.
    let both = pool.snapshot(&["raw", "renamed"], "t").is_ok();
    for volume in ["raw", "renamed"] {
        assert_eq!(pool.get(volume).unwrap().snapshots.contains_key("t"), both, "{volume}");
    }
}

#[test]
fn a_deleted_volume_leaves_neither_objects_nor_log_whatever_was_interrupted() {
    let folder = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let host = Host::new(folder.path(), "host");
    let path = folder.path().join("pool");
    let pool = host.file_pool(&path);
    let record = pool.create("v", &spec(Layout::Mapped)).unwrap();
    let disk = host.disk(&pool, "v").unwrap();
    for block in 0..64 {
        disk.write(block * 65536, blockdev::random::uuid().as_bytes().repeat(4096)).unwrap();
    }
    disk.flush().unwrap();
    drop(disk);
    drop(pool);
    let stored = path.join("segments/objects").join(record.uuid.simple().to_string());
    assert!(stored.exists() && host.logs().len() == 1);

    // A crash right after the record has left the catalogue.
    fs::rename(path.join("volumes/v"), path.join("trash").join(record.uuid.to_string())).unwrap();
    let pool = host.file_pool(&path);
    assert!(matches!(pool.get("v"), Err(PoolError::NotFound(_))));
    assert_eq!(host.logs(), Vec::<PathBuf>::new());
    assert_eq!(files_in(&stored), 0);
    assert_eq!(fs::read_dir(path.join("trash")).unwrap().count(), 0);

    // A crash before a volume that is being made is published.
    let record = pool.create("w", &spec(Layout::Mapped)).unwrap();
    fs::rename(path.join("volumes/w"), path.join("trash").join(format!("new-{}", record.uuid))).unwrap();
    drop(pool);
    let pool = host.file_pool(&path);
    assert_eq!(fs::read_dir(path.join("trash")).unwrap().count(), 0);
    pool.create("w", &spec(Layout::Mapped)).unwrap();
    drop(host.disk(&pool, "w").unwrap());
    pool.delete("w").unwrap();
    assert_eq!(host.logs(), Vec::<PathBuf>::new());
    assert_eq!(pool.check(&|_, _| ()).unwrap(), Vec::<String>::new());
}

fn files_in(folder: &Path) -> usize {
    let entries = fs::read_dir(folder).into_iter().flatten().flatten();
    entries.map(|entry| if entry.path().is_dir() { files_in(&entry.path()) } else { 1 }).sum()
}

#[test]
fn a_pool_that_was_copied_in_part_is_not_filled_anew() {
    let folder = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let host = Host::new(folder.path(), "host");
    let path = folder.path().join("pool");
    let pool = host.file_pool(&path);
    pool.create("v", &spec(Layout::Mapped)).unwrap();
    drop(pool);
    fs::rename(path.join("segments"), folder.path().join("elsewhere")).unwrap();
    let pool = host.file_pool(&path);
    for outcome in [pool.open("v", false).map(drop), pool.create("w", &spec(Layout::Mapped)).map(drop)] {
        assert!(matches!(&outcome, Err(PoolError::Backend(why)) if why.contains("missing")), "{outcome:?}");
    }
    assert!(!pool.check(&|_, _| ()).is_ok_and(|found| found.is_empty()));
    pool.create("raw", &spec(Layout::Raw)).unwrap();
    fs::rename(folder.path().join("elsewhere"), path.join("segments")).unwrap();
    pool.open("v", false).unwrap();
}

#[test]
fn case_17_and_35_a_lost_log_is_missed_until_its_loss_is_accepted_once_and_set_aside_when_it_returns() {
    let folder = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let host = Host::new(folder.path(), "host");
    let store = Arc::new(MemoryStore::new());
    let pool = host.store_pool(&store, Durability::Local);
    pool.create("v", &spec(Layout::Mapped)).unwrap();
    let disk = host.disk(&pool, "v").unwrap();
    disk.write(0, vec![1; 4096]).unwrap();
    disk.flush().unwrap();
    drop(disk);
    let log = host.logs()[0].clone();
    let missed = |pool: &MappedPool| match pool.open("v", false).map(drop) {
        Err(PoolError::Backend(why)) => {
            let has = |words: &str| why.contains(words);
            assert!(has("volume v") && has("log") && has("--accept-loss") && has(&host.folder.display().to_string()), "{why}");
        }
        other => panic!("{other:?}"),
    };
    // Waits for the end of the engine, which holds the log.
    drop(backends::file::hold_unused(&log).unwrap());
    fs::rename(&log, folder.path().join("lost")).unwrap();
    missed(&pool);
    missed(&pool);
    let disk = host.client(pool.open_as("v", Claim::AcceptLoss).unwrap()).unwrap();
    disk.write(4096, vec![2; 4096]).unwrap();
    disk.flush().unwrap();
    drop(disk);
    let disk = host.disk(&pool, "v").expect("the loss was accepted, and is no loss any more");
    assert!(disk.read(4096, 4096).unwrap() == vec![2; 4096]);
    drop(disk);

    // The log comes back after others wrote: it is set aside, not replayed.
    drop(backends::file::hold_unused(&log).unwrap());
    fs::rename(folder.path().join("lost"), &log).unwrap();
    missed(&pool);
    assert_eq!(host.logs().len(), 2, "{:?}", host.logs());
    assert!(pool.check(&|_, _| ()).unwrap().iter().any(|problem| problem.contains("set aside")));
}

#[test]
fn with_remote_durability_another_host_takes_over_and_the_first_may_come_back() {
    let folder = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let hosts = ["a", "b"].map(|name| Host::new(folder.path(), name));
    let store = Arc::new(MemoryStore::new());
    let pools = [0, 1].map(|index: usize| hosts[index].store_pool(&store, Durability::Remote));
    pools[0].create("v", &spec(Layout::Mapped)).unwrap();
    let mut number = 0u8;
    let mut before: Option<Client> = None;
    for round in 0..4 {
        let host = round % 2;
        let disk = hosts[host].disk(&pools[host], "v").unwrap();
        if let Some(before) = before.take() {
            before.write(0, vec![99; 4096]).unwrap_or_default();
            assert_eq!(before.flush(), Err(Errno::EIO), "the replaced owner acknowledged a flush");
        }
        let found = disk.read(0, 4096).unwrap();
        assert_eq!(found[0], number, "round {round}");
        number += 1;
        disk.write(0, vec![number; 4096]).unwrap();
        disk.flush().unwrap();
        before = Some(disk);
    }
}

#[test]
fn what_another_host_had_last_is_taken_from_it_only_if_asked_for() {
    let folder = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let hosts = ["a", "b"].map(|name| Host::new(folder.path(), name));
    let store = Arc::new(MemoryStore::new());
    let pools = [0, 1].map(|index: usize| hosts[index].store_pool(&store, Durability::Remote));
    pools[0].create("v", &spec(Layout::Mapped)).unwrap();
    let is_refused = |outcome: Result<(), PoolError>| {
        assert!(matches!(&outcome, Err(PoolError::TakenOver(why)) if why.contains("volume v")), "{outcome:?}");
    };
    pools[1].snapshot(&["v"], "early").expect("nobody had it before");
    is_refused(pools[0].open_as("v", Claim::Own).map(drop));
    let owner = hosts[0].client(pools[0].open_as("v", Claim::Return).expect("its log may be lost")).unwrap();
    owner.write(0, vec![1; 4096]).unwrap();
    owner.flush().unwrap();

    let log = hosts[1].logs().remove(0);
    is_refused(pools[1].open_as("v", Claim::Return).map(drop));
    is_refused(pools[1].snapshot(&["v"], "s").map(drop));
    is_refused(pools[1].delete_snapshot("v", "early"));
    is_refused(pools[1].rollback("v", "early"));
    is_refused(pools[1].flatten("v", &|_, _| ()).map(drop));
    is_refused(pools[1].check_volume("v", &|_, _| ()).map(drop));
    is_refused(pools[1].changed("v", "early", None).map(drop));
    is_refused(pools[1].clone_volume("v", None, "w").map(drop));
    pools[1].usage("v").expect("what the pool has can be read");
    assert_eq!(hosts[1].logs(), [log], "nothing was set aside");
    owner.write(4096, vec![2; 4096]).unwrap();
    owner.flush().expect("its owner goes on");
    assert!(!pools[0].is_taken_over("v"));

    let taken = hosts[1].client(pools[1].open_as("v", Claim::TakeOver).unwrap()).unwrap();
    assert!(taken.read(0, 8192).unwrap() == [[1; 4096], [2; 4096]].concat());
    assert_eq!(owner.write(8192, vec![3; 4096]).and_then(|()| owner.flush()), Err(Errno::EIO));
    assert!(pools[0].is_taken_over("v"));
    drop(owner);
    is_refused(pools[0].open_as("v", Claim::Return).map(drop));
    drop(taken);
    pools[1].snapshot(&["v"], "late").expect("the host that had it last");
}

/// Every object of a store, and the root of a volume, with its version.
fn everything(store: &dyn SegmentStore, volume: uuid::Uuid) -> Vec<(String, Vec<u8>)> {
    let read = |name: &str| block_on(store.read(name, 0..u64::from(u32::MAX))).unwrap().to_vec();
    let (root, tag) = block_on(store.read_root(&format!("{}/root", volume.simple()))).unwrap().expect("the volume has a root");
    let objects = block_on(store.list("")).unwrap().into_iter().map(|listed| (listed.name.clone(), read(&listed.name)));
    objects.chain([(tag.0, root.to_vec())]).collect()
}

#[test]
fn case_52_a_key_is_not_there_when_another_host_is_to_take_over() {
    for kek in [None, Some([9; 32])] {
        let folder = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
        let mut hosts = ["a", "b"].map(|name| Host::new(folder.path(), name));
        hosts[1].kek = kek;
        let store = Arc::new(MemoryStore::new());
        let pools = [0, 1].map(|index: usize| hosts[index].store_pool(&store, Durability::Remote));
        let secret = VolumeSpec { policy: Some("secret".to_owned()), ..spec(Layout::Mapped) };
        let record = pools[0].create("v", &secret).unwrap();
        let owner = hosts[0].disk(&pools[0], "v").unwrap();
        owner.write(0, vec![1; 4096]).unwrap();
        owner.flush().unwrap();

        let before = everything(&*store, record.uuid);
        for claim in [Claim::Own, Claim::Return, Claim::TakeOver, Claim::AcceptLoss] {
            let refused = pools[1].open_as("v", claim).map(drop).unwrap_err().to_string();
            assert!(refused.contains("key") || claim != Claim::TakeOver, "{kek:?}: {refused}");
            assert!(everything(&*store, record.uuid) == before, "{kek:?}, {claim:?}: something was written");
        }
        owner.write(4096, vec![2; 4096]).unwrap();
        owner.flush().expect("its owner goes on");
        hosts[1].kek = Some([8; 32]);
        let pool = hosts[1].store_pool(&store, Durability::Remote);
        let taken = hosts[1].client(pool.open_as("v", Claim::TakeOver).expect("the key is there")).unwrap();
        assert!(taken.read(0, 8192).unwrap() == [[1; 4096], [2; 4096]].concat());
    }
}

#[test]
fn who_serves_a_volume_that_another_host_deletes_is_told() {
    let folder = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let hosts = ["a", "b"].map(|name| Host::new(folder.path(), name));
    let store = Arc::new(MemoryStore::new());
    let pools = [0, 1].map(|index: usize| hosts[index].store_pool(&store, Durability::Remote));
    pools[0].create("v", &spec(Layout::Mapped)).unwrap();
    let device = pools[0].open("v", false).unwrap();
    let disk = hosts[0].client(device.clone()).unwrap();
    disk.write(0, vec![1; 65536]).unwrap();
    disk.flush().unwrap();
    assert!(objects(&*store) > 0);
    assert_eq!(device.health(), None);
    pools[1].delete("v").unwrap();
    assert_eq!(objects(&*store), 0);
    while device.health().is_none() {
        std::thread::sleep(std::time::Duration::from_millis(20));
    }
    assert_eq!(disk.read(0, 4096), Err(Errno::EIO));
    assert!(matches!(pools[0].get("v"), Err(PoolError::NotFound(_))));
    assert!(pools[0].engine_use("v").is_some(), "it is still open there");
    drop((disk, device));
}
