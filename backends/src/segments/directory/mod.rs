//! A directory of files as a store: one file per object, one per root.
//!
//! ```text
//!   DIR/pool          what pool this is: written last when the pool is made
//!   DIR/objects/…     NAME=, the content of object NAME; folders as the name has parts
//!   DIR/roots/…       NAME=, see `roots`
//!   DIR/lock          locked while a root is swapped
//!   DIR/temporary/…   what is being written: N.lock, held by one opener, and its files N.0, N.1 …
//!
//!   create:  temporary file ─ fsync ─ rename unless the name is taken ─ fsync folder ─ write-protect
//!   swap:    lock ─ compare ─ temporary file ─ fsync ─ rename ─ fsync folder ─ write-protect ─ unlock
//! ```
//!
//! Invariants:
//! - A file under its own name is whole, and its content is durable.
//! - A write-protected file is one whose name is durable too. A reader who meets another one syncs its folders first, so that what it
//!   was shown stays.
//! - After the sync of a folder failed, nothing succeeds any more that would rely on one, until the directory is opened anew.
//! - Everything is found from the directory's descriptor: what is mounted over it or moved meanwhile does not matter.
//! - Calls of the file system are made on threads of the store; lock, write and sync never wait in each other's queue for reads. Whoever asks only
//!   copies what the page cache has: see `kept`.

mod files;
mod kept;
mod layout;
mod paced;
mod reserve;
mod sync;

use std::future::ready;
use std::io;
use std::ops::Range;
use std::path::Path;
use std::sync::Arc;

use blockdev::offload::Offload;
use bytes::Bytes;
use uuid::Uuid;

use self::files::Files;
use super::drive::block_on;
use super::reply::{self, Reply};
use super::{Listed, OpenOptions, PoolHeader, SegmentStore, StoreError, StoreFuture, Tag, names, probe, roots};

/// As many as an owner keeps segments in flight, so that their syncs are made together.
const WRITING_THREADS: usize = 8;
const READING_THREADS: usize = 4;

/// The store. Several may have one directory open at a time, in several processes.
pub struct DirectoryStore {
    files: Arc<Files>,
    reading: Offload,
    writing: Offload,
    /// One thread: swaps wait for the directory's lock, and creates must not wait with them.
    swapping: Offload,
}

impl DirectoryStore {
    /// Makes a pool in a directory that is empty or not there yet, and proves that it can hold one. Blocks.
    pub fn make(path: &Path, uuid: Uuid) -> Result<(), StoreError> {
        layout::make(path, &PoolHeader::new(uuid))?;
        let store = DirectoryStore::start(path, OpenOptions { expected: Some(uuid), read_only: false, probe: None })?;
        block_on(probe::prove(&store, uuid))
    }

    /// Opens a pool, removes what crashed writers left behind, and proves anew that conditions hold. Blocks.
    pub fn open(path: &Path, options: OpenOptions) -> Result<DirectoryStore, StoreError> {
        let store = DirectoryStore::start(path, options)?;
        probe::prove_opening(&store, options)?;
        Ok(store)
    }

    fn start(path: &Path, options: OpenOptions) -> Result<DirectoryStore, StoreError> {
        let files = Arc::new(Files::open(path, options)?);
        let threads = |name: &str, count: usize| {
            let failed = |error: io::Error| StoreError::Refused(format!("{}: no thread: {error}", path.display()));
            Offload::start(name, count).map_err(failed)
        };
        Ok(DirectoryStore {
            files,
            reading: threads("segment-read", READING_THREADS)?,
            writing: threads("segment-write", WRITING_THREADS)?,
            swapping: threads("segment-swap", 1)?,
        })
    }

    /// What pool this is.
    pub fn header(&self) -> PoolHeader {
        self.files.header()
    }

    fn on<T: Send + 'static>(
        &self,
        threads: &Offload,
        checked: Result<(), StoreError>,
        work: impl FnOnce(&Files) -> Result<T, StoreError> + Send + 'static,
    ) -> StoreFuture<'static, T> {
        let (reply, answer): (Reply<T>, _) = reply::channel();
        match checked {
            Ok(()) => {
                let files = self.files.clone();
                threads.run(move || {
                    let done = work(&files);
                    // Whoever has every answer and drops the store has let go of the directory.
                    drop(files);
                    reply.send(done);
                });
            }
            Err(error) => reply.send(Err(error)),
        }
        Box::pin(answer)
    }
}

impl SegmentStore for DirectoryStore {
    fn create<'a>(&'a self, name: &'a str, content: Vec<Bytes>) -> StoreFuture<'a, ()> {
        let checked = names::check(name).and_then(|()| super::check_object_len(name, &content));
        let name = name.to_owned();
        self.on(&self.writing, checked, move |files| files.create(&name, &content))
    }

    fn read<'a>(&'a self, name: &'a str, range: Range<u64>) -> StoreFuture<'a, Bytes> {
        let checked = names::check(name);
        if checked.is_ok()
            && let Some(bytes) = self.files.read_at_once(name, &range)
        {
            return Box::pin(ready(Ok(bytes)));
        }
        let name = name.to_owned();
        self.on(&self.reading, checked, move |files| files.read(&name, range))
    }

    fn delete<'a>(&'a self, name: &'a str) -> StoreFuture<'a, ()> {
        let checked = names::check(name);
        let name = name.to_owned();
        self.on(&self.writing, checked, move |files| files.delete(&name))
    }

    fn list<'a>(&'a self, prefix: &'a str) -> StoreFuture<'a, Vec<Listed>> {
        let checked = names::check_prefix(prefix);
        let prefix = prefix.to_owned();
        self.on(&self.reading, checked, move |files| files.list(&prefix))
    }

    fn read_root<'a>(&'a self, name: &'a str) -> StoreFuture<'a, Option<(Bytes, Tag)>> {
        let checked = names::check(name);
        let name = name.to_owned();
        self.on(&self.reading, checked, move |files| files.read_root(&name))
    }

    fn swap<'a>(&'a self, name: &'a str, expected: Option<&'a Tag>, content: Bytes) -> StoreFuture<'a, Tag> {
        let checked = names::check(name).and_then(|()| roots::check_len(name, &content));
        let (name, expected) = (name.to_owned(), expected.cloned());
        self.on(&self.swapping, checked, move |files| files.swap(&name, expected.as_ref(), content))
    }
}
