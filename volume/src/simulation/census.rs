//! A scan of a volume that is at rest, apart from its own ways: what the store has against what the volume's trees lead to.
//!
//! ```text
//!   root ─▶ checkpoint ─▶ every tree ─▶ every block opens              and everything of the group in the store is
//!                              └─▶ handles ─▶ objects                   one of these objects, the checkpoint, or a seal
//! ```

use std::collections::{BTreeSet, HashSet};

use dedup::BLOCK_LEN;

use crate::map::{Pointer, Tree, walk};
use crate::names::{Family, Source, group_path};
use crate::object::CLEAR_LEN;
use crate::reader::Reader;
use crate::segment::Place;
use crate::table::State;
use crate::{MappedVolume, Parts};

/// Collects all garbage of a volume that nobody uses, and looks at what is left. A collection may leave some to the next: what only forwards
/// led to, its own or those of an ancestor that it found.
pub async fn scan(parts: &Parts, volume: &MappedVolume) -> Result<(), String> {
    let group = volume.core.chain.group;
    volume.checkpoint().await.map_err(|error| format!("nothing happens, but there is no checkpoint: {error}"))?;
    for share in [0.7, 0.0, 0.0] {
        volume.gather(share).await.map_err(|error| format!("nothing happens, but garbage cannot be collected: {error}"))?;
    }
    let chain = parts.chain(group);
    let (root, meta) = chain.read_meta().await.map_err(|error| error.to_string())?;
    let trees: Vec<Tree> =
        meta.volumes.values().map(|held| held.tree).chain(meta.snapshots.iter().map(|snapshot| snapshot.tree)).collect();
    // Reading finds out where ancestors have moved what they have, and notes it in the reader's table.
    let table = meta.table;
    let reader = Reader::new(&chain, &root, table.clone(), 1);
    let named = read_all(&reader, &trees).await?;

    let mut used: BTreeSet<u32> = named.clone();
    used.extend(named.iter().filter_map(|handle| table.forward_of(&table.source(*handle)?)));
    if let Some((handle, entry)) = table.used().find(|(handle, _)| !used.contains(handle)) {
        return Err(format!("handle {handle} is kept, and nothing refers to it: {entry:?}"));
    }
    let live = |handle: &u32| table.get(*handle).filter(|entry| entry.state == State::Live).and_then(|_| table.source(*handle));
    let mut expected: HashSet<Source> = used.iter().filter_map(live).collect();
    expected.insert(root.meta());
    let listed = chain.store.list(&format!("{}/", group_path(&group))).await.map_err(|error| error.to_string())?;
    let is_seal = |source: &Source, len: u64| source.family == Family::Step && len == CLEAR_LEN as u64;
    for object in listed {
        let source = Source::parse(&object.name).ok_or_else(|| format!("{} is no object of a volume", object.name))?;
        let is_ahead =
            source.family == Family::Step && Place { epoch: source.epoch, sequence: source.number } >= root.checkpoint.place;
        if !expected.contains(&source) && !is_seal(&source, object.len) && !is_ahead {
            return Err(format!("{} is in the store, and nothing refers to it", object.name));
        }
    }
    Ok(())
}

/// Reads every page and block of some trees. Which handles their pointers name.
async fn read_all(reader: &Reader, trees: &[Tree]) -> Result<BTreeSet<u32>, String> {
    // In an order that is the same each time.
    let mut pointers: BTreeSet<Pointer> = BTreeSet::new();
    for tree in trees {
        let walked = walk(&[*tree], reader, |pointer, _| pointers.extend([pointer])).await;
        let unreadable = walked.map_err(|error| format!("a tree cannot be walked: {error}"))?;
        unreadable.into_values().next().map_or(Ok(()), |error| Err(format!("a page cannot be read: {error}")))?;
    }
    let mut block = [0; BLOCK_LEN];
    for pointer in &pointers {
        let read = reader.read(&[(0, *pointer)], &mut block).await;
        read.map_err(|error| format!("something that a tree leads to cannot be read: {error}"))?;
    }
    Ok(pointers.iter().filter_map(|pointer| pointer.location()).map(|location| location.segment.get()).collect())
}
