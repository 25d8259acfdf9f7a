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

fn prefix(group: Uuid) -> String {
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

/// What is wrong with the root of a volume. Blocks.
pub(super) fn check(store: &dyn SegmentStore, record: &VolumeRecord) -> Option<String> {
    let name = root_path(record.uuid.as_bytes());
    match block_on(store.read_root(&name)) {
        Err(error) => Some(error.to_string()),
        Ok(None) => Some(format!("root {name} is missing: restore it from a copy of the pool")),
        Ok(Some((bytes, _))) => match Root::decode(&bytes, &name) {
            Err(error) => Some(error.to_string()),
            Ok(root) if root.size != record.size => {
                Some(format!("root {name} says {} bytes, the catalogue says {}", root.size, record.size))
            }
            Ok(_) => None,
        },
    }
}

/// Groups with objects that no catalogue knows, one sentence each. Lists the whole store; blocks.
pub(super) fn strays(store: &dyn SegmentStore, known: &BTreeSet<Uuid>) -> Result<Vec<String>, StoreError> {
    let mut strays: BTreeMap<String, u64> = BTreeMap::new();
    for object in block_on(store.list(""))? {
        let Some((group, _)) = object.name.split_once('/') else { continue };
        if Uuid::parse_str(group).is_ok_and(|group| !known.contains(&group)) {
            *strays.entry(group.to_owned()).or_default() += object.len;
        }
    }
    Ok(strays.into_iter().map(|(group, len)| format!("objects {group}/… ({len} bytes) belong to no volume")).collect())
}
