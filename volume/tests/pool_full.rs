//! A store that takes nothing for a while: what is said of it, what goes on, and that nothing is lost.

mod common;

use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use backends::segments::memory::MemoryStore;
use backends::segments::{Listed, SegmentStore, StoreError, StoreFuture, Tag};
use backends::{Layout, Pool};
use bytes::Bytes;
use common::{Host, spec};
use volume::Durability;

const LIMIT: Duration = Duration::from_secs(60);

/// A store in memory that refuses to take anything while it is told to.
struct Refusing {
    inner: MemoryStore,
    refuses: AtomicBool,
    error: StoreError,
}

impl Refusing {
    fn check(&self) -> Result<(), StoreError> {
        if self.refuses.load(Ordering::SeqCst) { Err(self.error.clone()) } else { Ok(()) }
    }
}

impl SegmentStore for Refusing {
    fn create<'a>(&'a self, name: &'a str, content: Vec<Bytes>) -> StoreFuture<'a, ()> {
        Box::pin(async move {
            self.check()?;
            self.inner.create(name, content).await
        })
    }
    fn read<'a>(&'a self, name: &'a str, range: Range<u64>) -> StoreFuture<'a, Bytes> {
        self.inner.read(name, range)
    }
    fn delete<'a>(&'a self, name: &'a str) -> StoreFuture<'a, ()> {
        self.inner.delete(name)
    }
    fn list<'a>(&'a self, prefix: &'a str) -> StoreFuture<'a, Vec<Listed>> {
        self.inner.list(prefix)
    }
    fn read_root<'a>(&'a self, name: &'a str) -> StoreFuture<'a, Option<(Bytes, Tag)>> {
        self.inner.read_root(name)
    }
    fn swap<'a>(&'a self, name: &'a str, expected: Option<&'a Tag>, content: Bytes) -> StoreFuture<'a, Tag> {
        Box::pin(async move {
            self.check()?;
            self.inner.swap(name, expected, content).await
        })
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
    let store = Arc::new(Refusing { inner: MemoryStore::new(), refuses: AtomicBool::new(false), error });
    let pool = host.store_pool(&store, Durability::Remote);
    pool.create("v", &spec(Layout::Mapped)).unwrap();
    let device = pool.open("v", false).unwrap();
    let disk = Arc::new(host.client(device.clone()).unwrap());
    disk.write(0, vec![1; 8192]).unwrap();
    disk.flush().unwrap();
    pool.snapshot(&["v"], "before").unwrap();
    drop(pool.open_snapshot("v", "before").unwrap());
    assert_eq!((device.health(), pool.health().ok), (None, true));

    store.refuses.store(true, Ordering::SeqCst);
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
    let refused = [pool.snapshot(&["v"], "s"), pool.clone_volume("v", Some("before"), "c").map(drop)];
    for refused in refused {
        let why = refused.unwrap_err().to_string();
        assert!(why.contains(&words), "{why}");
    }
    disk.write(8192, vec![2; 4096]).unwrap();
    assert!(!flushing.is_finished(), "a flush was acknowledged that the pool does not have");

    store.refuses.store(false, Ordering::SeqCst);
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
