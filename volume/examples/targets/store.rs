//! A store that counts what is asked of it, and can hold back what is written; and one that is far away.

use std::ops::Range;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use backends::segments::{SegmentStore, StoreError, StoreFuture, Tag};
use bytes::Bytes;
use tokio::runtime::Handle;

use crate::rig::Random;

pub type Shared = Arc<dyn SegmentStore + Send + Sync>;

pub struct Counting {
    inner: Shared,
    pub puts: AtomicU64,
    pub put_bytes: AtomicU64,
    pub swaps: AtomicU64,
    reads: AtomicU64,
    deletes: AtomicU64,
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
            reads: AtomicU64::new(0),
            deletes: AtomicU64::new(0),
            holds_back: AtomicBool::new(false),
        })
    }

    /// Objects and roots written so far, and bytes of objects.
    pub fn written(&self) -> (u64, u64) {
        (self.puts.load(Relaxed) + self.swaps.load(Relaxed), self.put_bytes.load(Relaxed))
    }

    /// Objects and roots written, read (objects in parts), and deleted so far.
    pub fn requests(&self) -> [u64; 4] {
        [&self.puts, &self.swaps, &self.reads, &self.deletes].map(|count| count.load(Relaxed))
    }
}

impl SegmentStore for Counting {
    backends::pass_on!(inner: list);

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
        self.reads.fetch_add(1, Relaxed);
        self.inner.read(name, range)
    }

    fn delete<'a>(&'a self, name: &'a str) -> StoreFuture<'a, ()> {
        self.deletes.fetch_add(1, Relaxed);
        self.inner.delete(name)
    }

    fn read_root<'a>(&'a self, name: &'a str) -> StoreFuture<'a, Option<(Bytes, Tag)>> {
        self.reads.fetch_add(1, Relaxed);
        self.inner.read_root(name)
    }

    fn swap<'a>(&'a self, name: &'a str, expected: Option<&'a Tag>, content: Bytes) -> StoreFuture<'a, Tag> {
        self.swaps.fetch_add(1, Relaxed);
        self.inner.swap(name, expected, content)
    }
}

/// A store that takes as long to write to as one that is some way off: 15 ms, and by chance more.
pub struct Distant {
    inner: Shared,
    runtime: Handle,
    random: Mutex<Random>,
}

impl Distant {
    pub fn new(inner: Shared, runtime: Handle, random: Random) -> Distant {
        Distant { inner, runtime, random: Mutex::new(random) }
    }

    /// 15 ms, and 5 ms more in the mean, exponentially; of a hundred two take up to 80 ms longer.
    fn delay(&self) -> Duration {
        let mut random = self.random.lock().unwrap_or_else(PoisonError::into_inner);
        let mut chance = || (random.number() >> 11) as f64 / (1u64 << 53) as f64;
        let (usual, seldom, how_long) = (-5.0 * (1.0 - chance()).ln(), chance() < 0.02, 80.0 * chance());
        Duration::from_secs_f64((15.0 + usual + if seldom { how_long } else { 0.0 }) / 1e3)
    }

    fn late<'a, T: 'a>(&'a self, answer: StoreFuture<'a, T>) -> StoreFuture<'a, T> {
        let delay = self.delay();
        let slept = self.runtime.spawn(async move { tokio::time::sleep(delay).await });
        Box::pin(async move {
            slept.await.map_err(|error| StoreError::Unknown(error.to_string()))?;
            answer.await
        })
    }
}

impl SegmentStore for Distant {
    backends::pass_on!(inner: read, delete, list, read_root);

    fn create<'a>(&'a self, name: &'a str, content: Vec<Bytes>) -> StoreFuture<'a, ()> {
        self.late(self.inner.create(name, content))
    }

    fn swap<'a>(&'a self, name: &'a str, expected: Option<&'a Tag>, content: Bytes) -> StoreFuture<'a, Tag> {
        self.late(self.inner.swap(name, expected, content))
    }
}
