//! Objects and roots in memory: for tests, and what the contract means in its plainest form.

use std::collections::BTreeMap;
use std::future::ready;
use std::ops::Range;
use std::sync::Arc;

use bytes::Bytes;
use parking_lot::Mutex;

use super::{Listed, OBJECT_LEN_MAX, SegmentStore, StoreError, StoreFuture, Tag, names, roots};

#[derive(Default)]
struct State {
    objects: BTreeMap<String, Bytes>,
    /// With the number of the version.
    roots: BTreeMap<String, (u64, Bytes)>,
}

/// A store that lasts as long as its last clone; clones share what is in it.
#[derive(Clone, Default)]
pub struct MemoryStore(Arc<Mutex<State>>);

impl MemoryStore {
    pub fn new() -> MemoryStore {
        MemoryStore::default()
    }

    fn with<'a, T: 'a>(&self, name: &str, work: impl FnOnce(&mut State) -> Result<T, StoreError>) -> StoreFuture<'a, T> {
        Box::pin(ready(names::check(name).and_then(|()| work(&mut self.0.lock()))))
    }
}

fn tag_of(version: u64) -> Tag {
    Tag(format!("memory-{version}"))
}

impl SegmentStore for MemoryStore {
    fn create<'a>(&'a self, name: &'a str, content: Vec<Bytes>) -> StoreFuture<'a, ()> {
        self.with(name, |state| {
            super::check_object_len(name, &content)?;
            if state.objects.contains_key(name) {
                return Err(StoreError::Exists(format!("object {name}")));
            }
            state.objects.insert(name.to_owned(), content.concat().into());
            Ok(())
        })
    }

    fn read<'a>(&'a self, name: &'a str, range: Range<u64>) -> StoreFuture<'a, Bytes> {
        self.with(name, |state| {
            let object = state.objects.get(name).ok_or_else(|| StoreError::Absent(format!("object {name}")))?;
            let [start, end] = [range.start, range.end].map(|at| at.min(object.len() as u64).min(OBJECT_LEN_MAX) as usize);
            Ok(object.slice(start..end.max(start)))
        })
    }

    fn delete<'a>(&'a self, name: &'a str) -> StoreFuture<'a, ()> {
        self.with(name, |state| {
            state.objects.remove(name);
            Ok(())
        })
    }

    fn list<'a>(&'a self, prefix: &'a str) -> StoreFuture<'a, Vec<Listed>> {
        Box::pin(ready(names::check_prefix(prefix).map(|()| {
            let state = self.0.lock();
            let from_prefix = state.objects.range(prefix.to_owned()..);
            let listed = from_prefix.take_while(|(name, _)| name.starts_with(prefix));
            listed.map(|(name, object)| Listed { name: name.clone(), len: object.len() as u64 }).collect()
        })))
    }

    fn read_root<'a>(&'a self, name: &'a str) -> StoreFuture<'a, Option<(Bytes, Tag)>> {
        self.with(name, |state| Ok(state.roots.get(name).map(|(version, content)| (content.clone(), tag_of(*version)))))
    }

    fn swap<'a>(&'a self, name: &'a str, expected: Option<&'a Tag>, content: Bytes) -> StoreFuture<'a, Tag> {
        self.with(name, |state| {
            roots::check_len(name, &content)?;
            let current = state.roots.get(name).map_or(0, |(version, _)| *version);
            if expected.cloned() != (current > 0).then(|| tag_of(current)) {
                return Err(StoreError::Changed(format!("root {name}")));
            }
            state.roots.insert(name.to_owned(), (current + 1, content));
            Ok(tag_of(current + 1))
        })
    }
}
