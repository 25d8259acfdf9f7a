//! A store that counts what is asked of it, and can hold back what is written.

use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};
use std::time::Duration;

use backends::segments::{Listed, SegmentStore, StoreError, StoreFuture, Tag};
use bytes::Bytes;

pub type Shared = Arc<dyn SegmentStore + Send + Sync>;

pub struct Counting {
    inner: Shared,
    pub puts: AtomicU64,
    pub put_bytes: AtomicU64,
    pub swaps: AtomicU64,
    /// While true, objects under `w/` are refused for the moment.
    pub holds_back: AtomicBool,
}

impl Counting {
    pub fn new(inner: Shared) -> Arc<Counting> {
        Arc::new(Counting {
            inner,
            puts: AtomicU64::new(0),
            put_bytes: AtomicU64::new(0),
            swaps: AtomicU64::new(0),
            holds_back: AtomicBool::new(false),
        })
    }

    /// Objects and roots written so far, and bytes of objects.
    pub fn written(&self) -> (u64, u64) {
        (self.puts.load(Relaxed) + self.swaps.load(Relaxed), self.put_bytes.load(Relaxed))
    }
}

impl SegmentStore for Counting {
    fn create<'a>(&'a self, name: &'a str, content: Vec<Bytes>) -> StoreFuture<'a, ()> {
        let len: u64 = content.iter().map(|part| part.len() as u64).sum();
        if self.holds_back.load(Relaxed) && name.contains("/w/") && len > 4096 {
            std::thread::sleep(Duration::from_millis(1));
            return Box::pin(async { Err(StoreError::NoSpace("held back".into())) });
        }
        self.puts.fetch_add(1, Relaxed);
        self.put_bytes.fetch_add(len, Relaxed);
        self.inner.create(name, content)
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
        self.swaps.fetch_add(1, Relaxed);
        self.inner.swap(name, expected, content)
    }
}
