//! What may be deleted of a volume: nothing that its newest checkpoint says it needs, nothing of its history since, and no seal.
//!
//! Looked at from outside, by what is in the store at that moment, whoever deletes: its owner, or one that was replaced long ago.

use crate::meta::Meta;
use crate::names::{Source, root_path};
use crate::object::{self, Object};
use crate::root::Root;
use crate::segment::{self, Link, Place};
use crate::simulation::store::{State, is_encrypted};
use crate::{Secrets, table};

/// Whether an object may go. The error ends a sentence.
pub fn check(store: &State, name: &str) -> Result<(), String> {
    let Some(source) = Source::parse(name) else { return Ok(()) };
    let path = root_path(&source.group);
    let Some(root) = store.root(&path).map(|bytes| Root::decode(bytes, &path)) else { return Ok(()) };
    let root = root.map_err(|error| error.to_string())?;
    if root.is_deleted {
        return Ok(());
    }
    if source == root.meta() {
        return Err("and it is what the newest checkpoint says".to_owned());
    }
    if store.ends_epoch(name) {
        return Err("and it is the seal of an epoch".to_owned());
    }
    match meta_of(store, &root) {
        // Rotten ones are not read.
        None => return Ok(()),
        Some(meta) => {
            let entry = meta.table.handle_of(&source).and_then(|handle| meta.table.get(handle));
            if entry.is_some_and(|entry| entry.state == table::State::Live) {
                return Err("and the newest checkpoint needs it".to_owned());
            }
        }
    }
    check_history(store, &root, &source)
}

fn secrets_for(bytes: &[u8]) -> Secrets {
    let data_key = is_encrypted(bytes).then_some([2; 32]);
    Secrets { pool_key: [1; 32], data_key }
}

fn meta_of(store: &State, root: &Root) -> Option<Meta> {
    let bytes = store.object(&root.meta().path())?;
    let sealer = secrets_for(bytes).sealer(root.domain);
    match object::open(bytes, &sealer, &root.meta()).ok()? {
        Object::Sealed { inner, opened, .. } => {
            Meta::open(&inner, &opened.opener, &bytes[opened.body_at as usize..], &root.meta()).ok()
        }
        Object::Seal { .. } => None,
    }
}

fn check_history(store: &State, root: &Root, source: &Source) -> Result<(), String> {
    let mut place = root.checkpoint.place;
    loop {
        let link_source = place.of(root.group);
        let Some(bytes) = store.object(&link_source.path()) else { return Ok(()) };
        if link_source == *source {
            return Err("and it is a part of the history after the newest checkpoint".to_owned());
        }
        match segment::decode(bytes, &secrets_for(bytes).sealer(root.domain), link_source) {
            Err(_) => return Ok(()),
            Ok(Link::Seal { next }) if next > place.epoch => place = Place { epoch: next, sequence: 0 },
            Ok(Link::Seal { .. }) => return Ok(()),
            Ok(Link::Step(segment)) => {
                if segment.step.sources.contains(source) {
                    return Err(format!("and {} refers to it", link_source.path()));
                }
                place = place.next();
            }
        }
    }
}
