//! What is done to volumes that nobody needs to have open: clones of snapshots, views of snapshots, and the end of a volume.

use std::num::NonZeroUsize;
use std::ops::Range;

use dedup::BLOCK_LEN;

use crate::chain::Chain;
use crate::core::Core;
use crate::environment::random_id;
use crate::error::VolumeError;
use crate::gather::Which;
use crate::map::{Pointer, Tree};
use crate::mapped::{MappedVolume, Parts};
use crate::meta::{Meta, Parent, Snapshot};
use crate::names::{Group, Source, group_path, root_path};
use crate::pins::Pin;
use crate::reader::Reader;
use crate::root::Root;
use crate::segment::BLOCK;

/// Pages that a view keeps.
const VIEW_PAGES: NonZeroUsize = NonZeroUsize::new(1024).expect("it is not 0");
/// Runs of a view's map looked at for one answer about extents.
const RUNS_MAX: usize = 32_768;
/// How often flattening looks again for what moved away while it was copied.
const FLATTEN_TRIES: u32 = 4;

/// Makes a volume that begins as a snapshot of another, in the pool, which shares all its blocks with it. The snapshot stays as long as the
/// clone does, or until it is flattened. The answer is its size in bytes.
pub async fn clone_snapshot(parts: &Parts, parent: Group, snapshot: &str, group: Group) -> Result<u64, VolumeError> {
    let chain = parts.chain(parent);
    let found = named(&chain.read_meta().await?.1, snapshot).ok_or(VolumeError::NoSnapshot)?;
    let pin = Pin { snapshot: found.id, clone: group };
    chain.set_pin(pin, true).await?;
    let made = clone_pinned(parts, &chain, snapshot, pin).await;
    // If the clone is there already, perhaps since an attempt before, it keeps its pin.
    if made.as_ref().is_err_and(|error| *error != VolumeError::VolumeExists) {
        chain.set_pin(pin, false).await?;
    }
    made
}

async fn clone_pinned(parts: &Parts, chain: &Chain, name: &str, pin: Pin) -> Result<u64, VolumeError> {
    let (root, meta) = chain.read_meta().await?;
    let snapshot = named(&meta, name).filter(|found| found.id == pin.snapshot).ok_or(VolumeError::NoSnapshot)?;
    let table = meta.table.for_clone(pin.clone).ok_or(VolumeError::TooManyAncestors)?;
    let parent = Some(Parent { group: chain.group, snapshot: snapshot.id });
    let meta = Meta { tree: snapshot.tree, parent, table, doomed: Vec::new(), snapshots: Vec::new() };
    parts.chain(pin.clone).create_volume(meta, pin.clone, root.domain, snapshot.size).await?;
    Ok(snapshot.size)
}

fn named(meta: &Meta, name: &str) -> Option<Snapshot> {
    meta.snapshots.iter().find(|snapshot| snapshot.name == name && !snapshot.is_deleting).cloned()
}

/// Refuses a volume whose snapshots have clones.
pub async fn refuse_clones(parts: &Parts, group: Group) -> Result<(), VolumeError> {
    parts.chain(group).refuse_clones().await
}

/// Forgets a clone of a volume that was not made, or is no more.
pub async fn unpin(parts: &Parts, group: Group, clone: Group) -> Result<(), VolumeError> {
    let chain = parts.chain(group);
    for pin in chain.pins().await?.into_iter().filter(|pin| pin.clone == clone) {
        chain.set_pin(pin, false).await?;
    }
    Ok(())
}

/// Ends a volume: whoever has it open loses it, and everything of it is removed from the pool. Refused while its snapshots have clones. What an
/// interruption leaves behind is removed by another call.
pub async fn delete_volume(parts: &Parts, group: Group) -> Result<(), VolumeError> {
    let chain = parts.chain(group);
    refuse_clones(parts, group).await?;
    let Some(Deletion { root, is_first }) = chain.mark_deleted().await? else { return Err(VolumeError::NoVolume) };
    if let Err(refused) = refuse_clones(parts, group).await {
        // If it was deleted before, whoever did that may be removing it.
        if is_first {
            chain.unmark_deleted(&root).await?;
        }
        return Err(refused);
    }
    let listed = chain.store.list(&format!("{}/", group_path(&group))).await?;
    let meta = root.meta();
    let others: Vec<Source> =
        listed.iter().filter_map(|listed| Source::parse(&listed.name)).filter(|source| *source != meta).collect();
    let mut left = chain.remove(&others).await;
    // Without it nobody knows what the volume pins, so it goes last.
    if let Some(Parent { group: parent, snapshot }) = chain.parent_of(&root).await? {
        parts.chain(parent).set_pin(Pin { snapshot, clone: group }, false).await?;
    }
    left.extend(chain.remove(&[meta]).await);
    match left.first() {
        None => Ok(()),
        Some(source) => Err(backends::segments::StoreError::Unknown(format!("{} could not be removed", source.path())).into()),
    }
}

impl Chain {
    async fn refuse_clones(&self) -> Result<(), VolumeError> {
        let clones: Vec<String> = self.pins().await?.iter().map(|pin| group_path(&pin.clone)).collect();
        if clones.is_empty() { Ok(()) } else { Err(VolumeError::VolumeHasClones(clones.join(", "))) }
    }

    /// Says in the root that the volume is no more, even if it says so already: whoever marked it before takes nothing back from now on. `None`:
    /// there never was one.
    async fn mark_deleted(&self) -> Result<Option<Deletion>, VolumeError> {
        let name = root_path(&self.group);
        let owner = random_id(&*self.environment);
        let mut is_first = false;
        loop {
            let Some((bytes, tag)) = self.read_until_known(&name).await? else { return Ok(None) };
            let root = Root::decode(&bytes, &name)?;
            if root.owner == owner {
                return Ok(Some(Deletion { root, is_first }));
            }
            is_first = !root.is_deleted;
            // A new epoch, so that its owner is fenced.
            let marked = Root { is_deleted: true, owner, epoch: root.epoch + 1, ..root };
            if self.store.swap(&name, Some(&tag), marked.encode()).await.is_err() {
                self.rest().await;
            }
        }
    }

    /// The volume is there again, unless somebody else has marked it as deleted since.
    async fn unmark_deleted(&self, marked: &Root) -> Result<(), VolumeError> {
        let name = root_path(&self.group);
        let restored = Root { is_deleted: false, epoch: marked.epoch + 1, ..*marked };
        loop {
            let Some((bytes, tag)) = self.read_until_known(&name).await? else { return Ok(()) };
            if Root::decode(&bytes, &name)? != *marked {
                return Ok(());
            }
            if self.store.swap(&name, Some(&tag), restored.encode()).await.is_err() {
                self.rest().await;
            }
        }
    }
}

/// A volume was marked as deleted.
struct Deletion {
    root: Root,
    /// It was not before.
    is_first: bool,
}

impl MappedVolume {
    /// Makes the volume independent of the snapshot that it is a clone of: copies what it shares. False if it is no clone.
    /// Refused while it has clones itself, as they share the same blocks.
    pub async fn flatten(&self) -> Result<bool, VolumeError> {
        let core = &self.core;
        let Some(parent) = core.parent.get() else { return Ok(false) };
        core.chain.refuse_clones().await?;
        let _alone = core.house.hold().await;
        let mut left = None;
        // What the ancestor has moved away is found where it is now by the next try.
        for _ in 0..FLATTEN_TRIES {
            core.gather_alone(Which::Inherited).await?;
            left = core.inherited();
            if left.is_none() {
                break;
            }
        }
        if let Some(source) = left {
            let why = "it could not be copied: it is damaged, or in use; try again";
            return Err(VolumeError::ObjectDamaged { object: source.path(), why });
        }
        // A clone made meanwhile may know only where the blocks were; one that is made later knows where they are.
        core.chain.refuse_clones().await?;
        let pin = Pin { snapshot: parent.snapshot, clone: core.chain.group };
        Chain { group: parent.group, ..core.chain.clone() }.set_pin(pin, false).await?;
        core.parent.set(None);
        core.checkpoint_with(crate::checkpoint::Change::default()).await?;
        Ok(true)
    }
}

impl Core {
    /// Some object of an ancestor that the volume needs.
    fn inherited(&self) -> Option<Source> {
        let table = self.reader.table.borrow();
        let (handle, _) = table.used().find(|(_, entry)| entry.owner != 0 && entry.is_live())?;
        table.source(handle)
    }
}

/// A snapshot opened for reading, whether its volume is open or not, here or elsewhere.
pub struct SnapshotView {
    reader: Reader,
    tree: Tree,
    size: u64,
}

impl SnapshotView {
    /// Opens a snapshot that is in the pool.
    pub async fn open(parts: &Parts, group: Group, name: &str) -> Result<SnapshotView, VolumeError> {
        let chain = parts.chain(group);
        let (root, meta) = chain.read_meta().await?;
        let snapshot = named(&meta, name).ok_or(VolumeError::NoSnapshot)?;
        let table = meta.table.for_clone(random_id(&*parts.environment)).ok_or(VolumeError::TooManyAncestors)?;
        let reader = Reader::new(&chain, &root, table, VIEW_PAGES);
        Ok(SnapshotView { reader, tree: snapshot.tree, size: snapshot.size })
    }

    /// Bytes.
    pub fn size(&self) -> u64 {
        self.size
    }

    /// Reads whole blocks: `offset` and `len` are multiples of 4096.
    pub async fn read(&self, offset: u64, len: u64) -> Result<Vec<u8>, VolumeError> {
        let blocks = self.blocks(offset, len)?;
        let runs = self.tree.runs(&self.reader, blocks.clone(), usize::MAX).await?;
        let mut bytes = vec![0; (blocks.end - blocks.start) as usize * BLOCK_LEN];
        let stored = runs.into_iter().filter(|(_, pointer)| pointer.location().is_some());
        let wanted: Vec<(usize, Pointer)> = stored.map(|(run, pointer)| ((run.start - blocks.start) as usize, pointer)).collect();
        self.reader.read(&wanted, &mut bytes).await?;
        Ok(bytes)
    }

    /// What the parts of a range hold, from its beginning.
    pub async fn extents(&self, offset: u64, len: u64) -> Result<Vec<blockdev::Extent>, VolumeError> {
        let blocks = self.blocks(offset, len)?;
        let runs = self.tree.runs(&self.reader, blocks, RUNS_MAX).await?;
        let mut extents: Vec<blockdev::Extent> = Vec::new();
        for (run, pointer) in runs {
            let (kind, len) = (crate::view::kind_of(pointer), (run.end - run.start) * BLOCK as u64);
            match extents.last_mut().filter(|last| last.kind == kind) {
                Some(last) => last.len += len,
                None => extents.push(blockdev::Extent { len, kind }),
            }
        }
        Ok(extents)
    }

    fn blocks(&self, offset: u64, len: u64) -> Result<Range<u64>, VolumeError> {
        let block = BLOCK as u64;
        let inside = offset.checked_add(len).is_some_and(|end| end <= self.size);
        let aligned = (offset | len).is_multiple_of(block);
        if inside && aligned { Ok(offset / block..(offset + len) / block) } else { Err(VolumeError::BadSize) }
    }
}
