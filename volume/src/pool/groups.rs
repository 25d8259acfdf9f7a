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

/// The root of a group, unless there is none, or it is damaged. Blocks.
pub(super) fn root(store: &dyn SegmentStore, group: Uuid) -> Result<Option<Root>, StoreError> {
    let name = root_path(group.as_bytes());
    Ok(block_on(store.read_root(&name))?.and_then(|(bytes, _)| Root::decode(&bytes, &name).ok()))
}

/// What is wrong with the roots of some volumes, one sentence each. Blocks.
pub(super) fn check(store: &dyn SegmentStore, records: &[&VolumeRecord]) -> Vec<String> {
    let mut groups: BTreeMap<Uuid, Vec<&VolumeRecord>> = BTreeMap::new();
    records.iter().for_each(|record| groups.entry(record.group()).or_default().push(record));
    let told = groups.into_iter().filter_map(|(group, records)| {
        let names: Vec<&str> = records.iter().map(|record| record.name.as_str()).collect();
        Some(format!("volume {}: {}", names.join(", "), check_root(store, group, &records)?))
    });
    told.collect()
}

fn check_root(store: &dyn SegmentStore, group: Uuid, records: &[&VolumeRecord]) -> Option<String> {
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
