//! What a group has in the store, seen from outside its volume: how much, whether it is sound, and how it is removed.

use std::collections::{BTreeMap, BTreeSet};

use backends::VolumeRecord;
use backends::segments::drive::{block_on, join_all};
use backends::segments::{SegmentStore, StoreError};
use uuid::Uuid;

use crate::device::name_of;
use crate::names::root_path;
use crate::root::Root;

/// Deletions under way at a time.
const DELETING_MAX: usize = 16;

pub(super) fn prefix(group: Uuid) -> String {
    format!("{}/", name_of(group))
}

/// Bytes of all objects of a group. Blocks.
pub(super) fn stored(store: &dyn SegmentStore, group: Uuid) -> Result<u64, StoreError> {
    Ok(block_on(store.list(&prefix(group)))?.iter().map(|object| object.len).sum())
}

/// Removes all objects of a group that was never made whole. Blocks.
pub(super) fn remove(store: &dyn SegmentStore, group: Uuid) -> Result<(), StoreError> {
    let objects = block_on(store.list(&prefix(group)))?;
    for some in objects.chunks(DELETING_MAX) {
        let deletions = some.iter().map(|object| store.delete(&object.name)).collect();
        block_on(join_all(deletions)).into_iter().collect::<Result<(), StoreError>>()?;
    }
    Ok(())
}

/// The root of a group, unless there is none, or it is damaged. Blocks.
pub(super) fn root(store: &dyn SegmentStore, group: Uuid) -> Result<Option<Root>, StoreError> {
    let name = root_path(group.as_bytes());
    Ok(block_on(store.read_root(&name))?.and_then(|(bytes, _)| Root::decode(&bytes, &name).ok()))
}

/// What is wrong with the root of the group of these volumes. Blocks.
pub(super) fn check_root(store: &dyn SegmentStore, group: Uuid, records: &[VolumeRecord]) -> Option<String> {
    let name = root_path(group.as_bytes());
    let size: u64 = records.iter().map(|record| record.size).sum();
    // What is left of a volume that was deleted may still be in a group of several.
    let is_shared = records.iter().any(|record| record.group.is_some());
    match block_on(store.read_root(&name)) {
        Err(error) => Some(error.to_string()),
        Ok(None) => Some(format!("root {name} is missing: restore it from a copy of the pool")),
        Ok(Some((bytes, _))) => match Root::decode(&bytes, &name) {
            Err(error) => Some(error.to_string()),
            Ok(root) if root.size < size || root.size != size && !is_shared => {
                Some(format!("root {name} says {} bytes, the catalogue says {size}", root.size))
            }
            Ok(_) => None,
        },
    }
}

/// Bytes of the objects of each group. Lists the whole store; blocks.
pub(super) fn sizes(store: &dyn SegmentStore) -> Result<BTreeMap<Uuid, u64>, StoreError> {
    let mut sizes: BTreeMap<Uuid, u64> = BTreeMap::new();
    for object in block_on(store.list(""))? {
        let group = object.name.split_once('/').and_then(|(group, _)| Uuid::parse_str(group).ok());
        group.into_iter().for_each(|group| *sizes.entry(group).or_default() += object.len);
    }
    Ok(sizes)
}

/// Groups with objects that no catalogue knows, one sentence each.
pub(super) fn strays(sizes: &BTreeMap<Uuid, u64>, known: &BTreeSet<Uuid>) -> Vec<String> {
    let strays = sizes.iter().filter(|(group, _)| !known.contains(*group));
    strays.map(|(group, len)| format!("objects {}/… ({len} bytes) belong to no volume", name_of(*group))).collect()
}
