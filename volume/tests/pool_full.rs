//! A store that takes nothing for a while: what is said of it, what goes on, and that nothing is lost.

mod common;

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use backends::segments::drive::block_on;
use backends::segments::memory::MemoryStore;
use backends::segments::{SegmentStore, StoreError, StoreFuture, Tag};
use backends::{Layout, Pool};
use bytes::Bytes;
use common::{Host, MIB, spec};
use uuid::Uuid;
use volume::Durability;

const LIMIT: Duration = Duration::from_secs(60);

/// A store in memory that refuses to take anything while it is told to.
struct Refusing {
    inner: MemoryStore,
    refuses: AtomicBool,
    /// Roots of these are refused.
    groups: Mutex<Vec<Uuid>>,
    error: StoreError,
}

impl Refusing {
    fn check(&self) -> Result<(), StoreError> {
        if self.refuses.load(Ordering::SeqCst) { Err(self.error.clone()) } else { Ok(()) }
    }
}

impl SegmentStore for Refusing {
    backends::pass_on!(inner: read, delete, list, read_root);

    fn create<'a>(&'a self, name: &'a str, content: Vec<Bytes>) -> StoreFuture<'a, ()> {
        Box::pin(async move {
            self.check()?;
            self.inner.create(name, content).await
        })
    }

    fn swap<'a>(&'a self, name: &'a str, expected: Option<&'a Tag>, content: Bytes) -> StoreFuture<'a, Tag> {
        Box::pin(async move {
            self.check()?;
            let is_of = |group: &Uuid| name.contains(&group.simple().to_string());
            if self.groups.lock().unwrap().iter().any(is_of) {
                return Err(self.error.clone());
            }
            self.inner.swap(name, expected, content).await
        })
    }
}

impl Refusing {
    fn new(error: StoreError) -> Arc<Refusing> {
        Arc::new(Refusing { inner: MemoryStore::new(), refuses: AtomicBool::new(false), groups: Mutex::default(), error })
    }

    fn refuse(&self, refuses: bool) {
        self.refuses.store(refuses, Ordering::SeqCst);
    }

    fn refuse_roots_of(&self, groups: &[Uuid]) {
        *self.groups.lock().unwrap() = groups.to_vec();
    }

    /// Whether there is anything of a group.
    fn has(&self, group: Uuid) -> bool {
        let listed = block_on(self.inner.list("")).unwrap();
        listed.iter().any(|listed| listed.name.contains(&group.simple().to_string()))
    }
}

fn eventually(what: &str, mut done: impl FnMut() -> bool) {
    let deadline = blockdev::clock::monotonic() + LIMIT;
    while !done() {
        assert!(blockdev::clock::monotonic() < deadline, "{what}: it never happened");
        std::thread::sleep(Duration::from_millis(10));
    }
}

fn a_store_that_refuses_is_told_and_waited_for(error: StoreError) {
    let folder = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let host = Host::new(folder.path(), "host");
    let words = error.to_string();
    let store = Refusing::new(error);
    let pool = host.store_pool(&store, Durability::Remote);
    pool.create("v", &spec(Layout::Mapped)).unwrap();
    let device = pool.open("v", false).unwrap();
    let disk = Arc::new(host.client(device.clone()).unwrap());
    disk.write(0, vec![1; 8192]).unwrap();
    disk.flush().unwrap();
    pool.snapshot(&["v"], "before").unwrap();
    drop(pool.open_snapshot("v", "before").unwrap());
    assert_eq!((device.health(), pool.health().ok), (None, true));

    store.refuse(true);
    disk.write(4096, vec![2; 8192]).unwrap();
    let flushing = std::thread::spawn({
        let disk = disk.clone();
        move || disk.flush()
    });
    eventually("the refusal is told", || device.health().is_some());
    let told = device.health().unwrap();
    for part in ["the pool takes nothing since 20", &words, "writes wait in the local log"] {
        assert!(told.contains(part), "{part}: {told}");
    }
    assert_eq!(device.health(), Some(told), "its words stay the same");
    let health = pool.health();
    assert!(!health.ok && health.detail.contains(&words) && health.detail.contains("volumes that wait: v"), "{health:?}");
    let usage = pool.engine_use("v").unwrap();
    assert!(!usage.waits.is_zero() && !usage.log.lag.is_zero(), "{usage:?}");
    assert!(disk.read(0, 4096).unwrap() == vec![1; 4096] && disk.read(4096, 8192).unwrap() == vec![2; 8192], "reads go on");
    let refused = pool.create("w", &spec(Layout::Mapped)).unwrap_err().to_string();
    assert!(refused.contains(&words), "{refused}");
    let refused = [pool.snapshot(&["v"], "s").map(drop), pool.clone_volume("v", Some("before"), "c").map(drop)];
    for refused in refused {
        let why = refused.unwrap_err().to_string();
        assert!(why.contains(&words), "{why}");
    }
    disk.write(8192, vec![2; 4096]).unwrap();
    assert!(!flushing.is_finished(), "a flush was acknowledged that the pool does not have");

    store.refuse(false);
    flushing.join().unwrap().unwrap();
    eventually("it is over", || device.health().is_none() && pool.health().ok);
    // What was refused and is in the log goes again by itself.
    eventually("the snapshot is gone", || pool.open_snapshot("v", "s").is_err());
    drop(pool.clone_volume("v", Some("before"), "c").unwrap());
    disk.flush().unwrap();
    let usage = pool.engine_use("v").unwrap();
    assert!(usage.waits.is_zero() && usage.log.lag.is_zero(), "{usage:?}");
    drop((disk, device));
    let other = Host::new(folder.path(), "other");
    let pool = other.store_pool(&store, Durability::Remote);
    let disk = other.disk(&pool, "v").unwrap();
    assert!(disk.read(0, 4096).unwrap() == vec![1; 4096] && disk.read(4096, 8192).unwrap() == vec![2; 8192]);
}

#[test]
fn a_full_store_is_told_and_waited_for() {
    a_store_that_refuses_is_told_and_waited_for(StoreError::NoSpace("the bucket is over its quota".into()));
}

#[test]
fn a_store_that_forbids_is_told_and_waited_for() {
    a_store_that_refuses_is_told_and_waited_for(StoreError::Refused("access denied; see the access key".into()));
}

/// Everything that the pool has to take fails in words, and what nobody waits for any more changes nothing later.
#[test]
fn what_a_full_store_has_to_take_is_not_waited_for_without_end() {
    let folder = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let host = Host::new(folder.path(), "host");
    let store = Refusing::new(StoreError::NoSpace("the bucket is over its quota".into()));
    let pool = host.store_pool(&store, Durability::Local);
    pool.create("v", &spec(Layout::Mapped)).unwrap();
    let device = pool.open("v", false).unwrap();
    let disk = host.client(device.clone()).unwrap();
    disk.write(0, vec![1; 8192]).unwrap();
    pool.snapshot(&["v"], "before").unwrap();
    drop(pool.clone_volume("v", Some("before"), "c").unwrap());
    let clone = pool.open("c", false).unwrap();
    let clone_disk = host.client(clone.clone()).unwrap();
    store.refuse(true);
    disk.write(0, vec![2; 8192]).unwrap();
    clone_disk.write(0, vec![3; 8192]).unwrap();

    let began = blockdev::clock::monotonic();
    let refused = |what: &str, done: Result<(), String>| {
        let why = done.expect_err(what);
        assert!(why.contains("over its quota"), "{what}: {why}");
        let took = blockdev::clock::monotonic() - began;
        assert!(took > Duration::from_secs(50) && took < Duration::from_secs(120), "{what}: {took:?}");
    };
    std::thread::scope(|scope| {
        scope.spawn(|| refused("rollback", pool.rollback("v", "before").map_err(|error| error.to_string())));
        scope.spawn(|| refused("resize", device.resize(32 * MIB).map_err(|error| error.to_string())));
        scope.spawn(|| refused("check", pool.check_volume("v", &|_, _| {}).map(drop).map_err(|error| error.to_string())));
        scope.spawn(|| refused("changes", pool.changed("v", "before", None).map(drop).map_err(|error| error.to_string())));
        scope.spawn(|| {
            refused(
                "deletion",
                pool.delete_snapshot("c", "none").or(pool.delete_snapshot("v", "before")).map_err(|error| error.to_string()),
            )
        });
        scope.spawn(|| refused("flatten", pool.flatten("c", &|_, _| {}).map(drop).map_err(|error| error.to_string())));
    });
    assert!(disk.read(0, 8192).unwrap() == vec![2; 8192], "reads go on");

    store.refuse(false);
    eventually("it is over", || device.health().is_none() && clone.health().is_none());
    disk.write(MIB, vec![4; 4096]).unwrap();
    disk.flush().unwrap();
    pool.snapshot(&["v"], "after").unwrap();
    drop(pool.open_snapshot("v", "after").unwrap());
    assert!(disk.read(0, 8192).unwrap() == vec![2; 8192], "it was rolled back when nobody waited for it any more");
    assert_eq!(device.geometry().size, 16 * MIB);
    drop((disk, device));
    let disk = host.disk(&pool, "v").unwrap();
    assert!(disk.read(0, 8192).unwrap() == vec![2; 8192]);
    assert_eq!(pool.get("v").unwrap().size, 16 * MIB);
}

/// What is left of it is removed when the store takes it.
#[test]
fn a_deletion_in_a_full_store_ends_in_words_and_so_does_the_next_opening() {
    let folder = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let host = Host::new(folder.path(), "host");
    let store = Refusing::new(StoreError::NoSpace("the bucket is over its quota".into()));
    let began = blockdev::clock::monotonic();
    let pool = host.store_pool(&store, Durability::Local);
    let [first, second, third] = ["a", "b", "c"].map(|name| pool.create(name, &spec(Layout::Mapped)).unwrap().group());
    // The catalogue has room, the volumes have not.
    store.refuse_roots_of(&[first, second]);
    let refused = pool.delete("a").unwrap_err().to_string();
    for part in ["volume a is deleted, but", "over its quota", "tried again"] {
        assert!(refused.contains(part), "{part}: {refused}");
    }
    assert!(pool.get("a").is_err() && store.has(first));
    // Another daemon opens the pool, and serves what is there.
    let other = Host::new(folder.path(), "other").store_pool(&store, Durability::Local);
    assert_eq!(other.list().unwrap().len(), 2);
    drop(other);
    assert!(pool.delete("b").is_err() && store.has(second));
    assert!(blockdev::clock::monotonic() - began < Duration::from_secs(30), "somebody waited for the store");
    store.refuse_roots_of(&[]);
    pool.delete("c").unwrap();
    assert!(!store.has(first) && !store.has(second) && !store.has(third));
}
