//! How often the records of volumes are read: with thousands of snapshots each time is long.

mod common;

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use backends::segments::memory::MemoryStore;
use backends::segments::{SegmentStore, StoreFuture, Tag};
use backends::{Layout, Pool};
use bytes::Bytes;
use common::{Host, MIB, spec};
use volume::Durability;

/// A store that counts reads of its catalogue.
#[derive(Default)]
struct Counting {
    inner: MemoryStore,
    reads: AtomicUsize,
}

impl Counting {
    fn reads(&self) -> usize {
        self.reads.swap(0, Ordering::Relaxed)
    }
}

impl SegmentStore for Counting {
    backends::pass_on!(inner: create, read, delete, list, swap);

    fn read_root<'a>(&'a self, name: &'a str) -> StoreFuture<'a, Option<(Bytes, Tag)>> {
        self.reads.fetch_add(usize::from(name == "catalogue"), Ordering::Relaxed);
        self.inner.read_root(name)
    }
}

#[test]
fn a_snapshot_of_an_open_volume_reads_its_record_twice_and_tells_what_that_says_now() {
    let folder = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let (host, store) = (Host::new(folder.path(), "host"), Arc::new(Counting::default()));
    let pool = host.store_pool(&store, Durability::Local);
    pool.create("v", &spec(Layout::Mapped)).unwrap();
    let disk = host.disk(&pool, "v").unwrap();
    store.reads();
    let made = pool.snapshot(&["v"], "s").unwrap();
    assert_eq!(store.reads(), 2);
    assert_eq!(made["v"].size, 16 * MIB);
    assert_eq!(pool.get("v").unwrap().snapshots["s"], made["v"]);
    store.reads();
    pool.delete_snapshot("v", "s").unwrap();
    assert_eq!(store.reads(), 2);
    assert!(pool.get("v").unwrap().snapshots.is_empty());
    drop(disk);
}
