//! Volumes of one tenant that share what they store, through a pool: by what its users see.

mod common;

use std::fs;
use std::sync::Arc;

use backends::segments::SegmentStore;
use backends::segments::drive::block_on;
use backends::segments::memory::MemoryStore;
use backends::{Layout, Pool, PoolError, VolumeSpec};
use blockdev::Op;
use blockdev::client::Client;
use common::{Host, MIB, Place, spec};
use volume::Durability;

const BLOCK: usize = 4096;

fn shared(policy: &str, tenant: &str) -> VolumeSpec {
    VolumeSpec { policy: Some(policy.to_owned()), tenant: Some(tenant.to_owned()), ..spec(Layout::Mapped) }
}

/// A pool with volumes `a` and `b` of tenant `t`.
fn place() -> Place {
    Place::new(&["a", "b"], &shared("shared", "t"))
}

fn allocated(place: &Place, volume: &str) -> u64 {
    place.pool.usage(volume).unwrap().allocated
}

fn write(place: &Place, volume: &str, content: &[u8]) {
    fill(place, &place.disk(volume), volume, content);
}

fn fill(place: &Place, disk: &Client, volume: &str, content: &[u8]) {
    disk.write(0, content.to_vec()).unwrap();
    disk.flush().unwrap();
    // Brings it into the pool.
    place.pool.snapshot(&[volume], "settled").unwrap();
    drop(place.pool.open_snapshot(volume, "settled").unwrap());
    place.pool.delete_snapshot(volume, "settled").unwrap();
}

fn reads(place: &Place, name: &str, content: &[u8]) {
    let disk = match name.split_once('@') {
        Some((volume, snapshot)) => place.host.client(place.pool.open_snapshot(volume, snapshot).unwrap()).unwrap(),
        None => place.disk(name),
    };
    assert!(disk.read(0, content.len() as u64).unwrap() == content, "{name} holds something else");
}

/// What nobody compresses.
fn noise(seed: u64, len: u64) -> Vec<u8> {
    let mut state = seed * 2 + 1;
    let next = || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 33) as u8
    };
    std::iter::repeat_with(next).take(len as usize).collect()
}

fn refused<T: std::fmt::Debug>(outcome: Result<T, PoolError>, words: &[&str]) {
    let why = outcome.unwrap_err().to_string();
    words.iter().for_each(|word| assert!(why.contains(word), "{word}: {why}"));
}

#[test]
fn what_one_volume_of_a_tenant_has_another_does_not_store_again() {
    let place = place();
    let content = noise(1, 12 * MIB);
    // While the group is open its index is whole.
    let held = ["a", "b"].map(|volume| place.disk(volume));
    fill(&place, &held[0], "a", &content);
    let once = allocated(&place, "a");
    assert!(once > 12 * MIB, "{once}");
    fill(&place, &held[1], "b", &content);
    drop(held);
    let twice = allocated(&place, "b");
    // Of segments as small as here, one in eight has nothing that the sparse index knows.
    assert!(twice < once + 6 * MIB, "{once} became {twice}");
    for (volume, policy, tenant) in [("c", "shared", "u"), ("d", "shared-2", "t"), ("e", "own", "t")] {
        place.pool.create(volume, &shared(policy, tenant)).unwrap();
        write(&place, volume, &content);
        let own = allocated(&place, volume);
        assert!((12 * MIB..14 * MIB).contains(&own), "{volume} has {own}");
    }
    assert_eq!(allocated(&place, "a"), allocated(&place, "b"));
    let place = place.reopen();
    ["a", "b", "c", "d", "e"].into_iter().for_each(|volume| reads(&place, volume, &content));
    assert_eq!(place.pool.check(&|_, _| ()).unwrap(), Vec::<String>::new());
}

#[test]
fn volumes_of_one_group_are_used_at_once_and_are_apart() {
    let place = place();
    let (a, b) = (place.disk("a"), place.disk("b"));
    refused(place.pool.open("a", false).map(drop), &["volume a", "open"]);
    let last = 16 * MIB - BLOCK as u64;
    for (disk, fill) in [(&a, 1), (&b, 2)] {
        disk.write(0, vec![fill; BLOCK]).unwrap();
        disk.write(last, vec![fill + 10; BLOCK]).unwrap();
        disk.flush().unwrap();
        assert!(disk.write(last + BLOCK as u64, vec![fill; BLOCK]).is_err());
    }
    place.pool.snapshot(&["a", "b"], "s").unwrap();
    a.write(0, vec![3; BLOCK]).unwrap();
    b.run(Op::Discard, 0, 16 * MIB, Vec::new()).unwrap();
    a.flush().unwrap();
    assert_eq!(a.read(last, BLOCK as u64).unwrap(), vec![11; BLOCK]);
    drop((a, b));
    let place = place.reopen();
    reads(&place, "a", &vec![3; BLOCK]);
    reads(&place, "b", &vec![0; BLOCK]);
    reads(&place, "a@s", &vec![1; BLOCK]);
    reads(&place, "b@s", &vec![2; BLOCK]);
    place.pool.rollback("b", "s").unwrap();
    reads(&place, "b", &vec![2; BLOCK]);
    reads(&place, "a", &vec![3; BLOCK]);
    place.pool.delete_snapshot("a", "s").unwrap();
    assert_eq!(place.pool.get("b").unwrap().snapshots.len(), 1);
    reads(&place, "b@s", &vec![2; BLOCK]);
}

#[test]
fn one_of_several_is_deleted_and_the_last_takes_all_with_it() {
    let place = place();
    write(&place, "a", &noise(1, MIB));
    write(&place, "b", &noise(2, MIB));
    refused(place.pool.erase_key("a"), &["volume a", "not encrypted"]);
    place.pool.delete("a").unwrap();
    let place = place.reopen();
    reads(&place, "b", &noise(2, MIB));
    assert_eq!(place.pool.check(&|_, _| ()).unwrap(), Vec::<String>::new());
    let group = place.pool.get("b").unwrap().group();
    // Where the deleted one was, another one is empty.
    place.pool.create("c", &shared("shared", "t")).unwrap();
    assert_eq!(place.pool.get("c").unwrap().group(), group);
    reads(&place, "c", &vec![0; MIB as usize]);
    place.pool.delete("c").unwrap();
    place.pool.delete("b").unwrap();
    assert!(place.host.logs().is_empty(), "{:?}", place.host.logs());
    let place = place.reopen();
    assert_eq!(place.pool.check(&|_, _| ()).unwrap(), Vec::<String>::new());
    let objects = place.folder.path().join("pool/segments/objects").join(group.simple().to_string());
    let left: Vec<_> =
        fs::read_dir(objects).into_iter().flatten().flat_map(|folder| fs::read_dir(folder.unwrap().path())).flatten().collect();
    assert!(left.iter().all(|entry| fs::read_dir(entry.as_ref().unwrap().path()).unwrap().count() == 0), "{left:?}");
}

#[test]
fn a_clone_joins_the_group_and_nothing_ties_it_to_its_origin() {
    let place = place();
    let content = noise(3, 2 * MIB);
    write(&place, "a", &content);
    let before = allocated(&place, "a");
    place.pool.snapshot(&["a"], "s").unwrap();
    let clone = place.pool.clone_volume("a", Some("s"), "c").unwrap();
    assert_eq!((clone.group, clone.origin.as_deref()), (place.pool.get("a").unwrap().group, Some("a@s")));
    reads(&place, "c", &content);
    assert!(allocated(&place, "c") < before + MIB / 2);
    place.pool.delete_snapshot("a", "s").unwrap();
    assert_eq!(place.pool.get("c").unwrap().origin, None);
    place.pool.delete("a").unwrap();
    let place = place.reopen();
    reads(&place, "c", &content);
    let copied = place.pool.clone_volume("c", None, "d").unwrap();
    assert_eq!(copied.origin.as_deref(), Some("c@clone-d"));
    reads(&place, "d", &content);
    assert_eq!(place.pool.check(&|_, _| ()).unwrap(), Vec::<String>::new());
}

/// A crash may leave a volume in a group that is in no record. The record is hidden here and comes back, to show that the volume has gone.
#[test]
fn what_is_in_no_record_leaves_the_group_when_it_is_opened() {
    let place = place();
    let (record, hidden) = (place.folder.path().join("pool/volumes/b"), place.folder.path().join("b"));
    fs::rename(&record, &hidden).unwrap();
    let place = place.reopen();
    reads(&place, "a", &[0; BLOCK]);
    let held = place.disk("a");
    fs::rename(&hidden, &record).unwrap();
    let gone = |_: &u32| {
        std::thread::sleep(std::time::Duration::from_millis(50));
        place.pool.open("b", false).is_err()
    };
    assert!((0..200).any(|number| gone(&number)), "it is still there");
    refused(place.pool.open("b", false).map(drop), &["volume b", "does not have it"]);
    drop(held);
    reads(&place, "a", &[0; BLOCK]);
}

#[test]
fn a_volume_whose_record_is_damaged_stays() {
    let place = place();
    let content = noise(5, MIB);
    write(&place, "b", &content);
    let record = place.folder.path().join("pool/volumes/b/volume.json");
    let before = fs::read(&record).unwrap();
    fs::write(&record, "{").unwrap();
    let place = place.reopen();
    write(&place, "a", &noise(6, MIB));
    refused(place.pool.delete("a"), &["volume b", "damaged"]);
    reads(&place, "a", &noise(6, MIB));
    fs::write(&record, before).unwrap();
    reads(&place, "b", &content);
    place.pool.delete("a").unwrap();
    reads(&place, "b", &content);
}

#[test]
fn a_key_that_several_have_is_not_erased_for_one() {
    let place = place();
    for volume in ["x", "y"] {
        place.pool.create(volume, &shared("shared-secret", "t")).unwrap();
    }
    write(&place, "x", &noise(1, MIB));
    let place = place.reopen();
    reads(&place, "x", &noise(1, MIB));
    refused(place.pool.erase_key("x"), &["volume x", "y"]);
    place.pool.delete("y").unwrap();
    assert!(place.pool.erase_key("x").unwrap());
    assert!(place.pool.open("x", false).is_err());
}

#[test]
fn another_host_takes_no_volume_from_its_owner_by_making_or_deleting_one() {
    let folder = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let store = Arc::new(MemoryStore::new());
    let hosts = ["here", "there"].map(|name| Host::new(folder.path(), name));
    let pools = [0, 1].map(|host: usize| hosts[host].store_pool(&store, Durability::Remote));
    ["a", "b"].iter().for_each(|volume| drop(pools[0].create(volume, &shared("shared", "t")).unwrap()));
    let a = hosts[0].disk(&pools[0], "a").unwrap();
    pools[1].create("c", &shared("shared", "t")).unwrap();
    let groups = ["a", "b", "c"].map(|volume| pools[1].get(volume).unwrap().group());
    assert!(groups[0] == groups[1] && groups[0] != groups[2]);
    refused(pools[1].delete("b"), &["volume b", "another host", "a"]);
    pools[0].snapshot(&["a"], "s").unwrap();
    drop(pools[0].open_snapshot("a", "s").unwrap());
    assert_eq!(hosts[1].client(pools[1].open_snapshot("a", "s").unwrap()).unwrap().read(0, 4096).unwrap(), vec![0; 4096]);
    refused(pools[1].clone_volume("a", Some("s"), "d").map(drop), &["volume a", "another host", "b"]);
    pools[0].delete_snapshot("a", "s").unwrap();
    a.write(0, vec![1; BLOCK]).unwrap();
    a.flush().unwrap();
    pools[0].delete("b").unwrap();
    drop(a);
    pools[0].delete("a").unwrap();
    let left = block_on(store.list(&format!("{}/", groups[0].simple()))).unwrap();
    assert!(left.is_empty(), "{left:?}");
}
