//! What is done to volumes that nobody needs to have open: clones of snapshots, views of snapshots, and the end of a volume.

use std::ops::Range;
use std::sync::Arc;
use std::time::Duration;

use backends::segments::{StoreError, Tag};
use dedup::BLOCK_LEN;

use crate::chain::Chain;
use crate::checkpoint::Change;
use crate::core::Core;
use crate::environment::random_id;
use crate::error::VolumeError;
use crate::gather::Which;
use crate::map::{Pointer, Tree};
use crate::mapped::{MappedVolume, Parts};
use crate::meta::{Held, Meta, Parent, Volumes};
use crate::names::{Group, Source, VolumeId, group_path, root_path};
use crate::pins::Pin;
use crate::progress::Progress;
use crate::reader::Reader;
use crate::root::Root;
use crate::segment::BLOCK;

/// Pages that a view keeps.
const VIEW_PAGES: usize = 1024;
/// Runs of a view's map looked at for one answer about extents.
const RUNS_MAX: usize = 32_768;
/// How long a store is asked again that does not answer.
const PATIENCE: Duration = Duration::from_secs(60);
/// How often flattening looks again for what moved away while it was copied.
const FLATTEN_TRIES: u32 = 4;

/// Makes a volume that begins as a snapshot of another, in a group of its own, which shares all its blocks with the other. The snapshot stays as long
/// as the clone does, or until it is flattened. The answer is its size in bytes.
pub async fn clone_snapshot(
    parts: &Parts,
    parent: impl Into<VolumeId>,
    snapshot: &str,
    group: Group,
) -> Result<u64, VolumeError> {
    let parent = parent.into();
    let chain = parts.chain(parent.group);
    let found = chain.read_meta().await?.1.snapshot(parent.id, snapshot)?.id;
    let pin = Pin { snapshot: found, clone: group };
    chain.set_pin(pin, true).await?;
    let made = clone_pinned(parts, &chain, (parent, snapshot), pin).await;
    // If the clone is there already, perhaps since an attempt before, it keeps its pin.
    if made.as_ref().is_err_and(|error| *error != VolumeError::VolumeExists) {
        chain.set_pin(pin, false).await?;
    }
    made
}

async fn clone_pinned(parts: &Parts, chain: &Chain, (parent, name): (VolumeId, &str), pin: Pin) -> Result<u64, VolumeError> {
    let (root, meta) = chain.read_meta().await?;
    let snapshot = meta.snapshot(parent.id, name).ok().filter(|found| found.id == pin.snapshot).ok_or(VolumeError::NoSnapshot)?;
    let table = meta.table.for_clone(pin.clone).ok_or(VolumeError::TooManyAncestors)?;
    let parent = Some(Parent { group: chain.group, snapshot: snapshot.id });
    let volumes = Volumes::from([(0, Held { id: pin.clone, size: snapshot.size, tree: snapshot.tree })]);
    let clone = Meta { volumes, parent, table, doomed: Vec::new(), snapshots: Vec::new() };
    parts.chain(pin.clone).create_volume(clone, (pin.clone, root.domain), snapshot.size).await?;
    Ok(snapshot.size)
}

/// The ranges, in bytes, in which two snapshots that are in the pool may differ; as [`MappedVolume::diff`], without opening the volume.
pub(crate) async fn diff_snapshots(
    parts: &Parts,
    volume: VolumeId,
    names: [&str; 2],
    from: u64,
    ranges_max: usize,
) -> Result<Vec<Range<u64>>, VolumeError> {
    let chain = parts.chain(volume.group);
    let (root, meta) = chain.read_meta().await?;
    let tree = |name| meta.snapshot(volume.id, name).map(|snapshot| snapshot.tree);
    let (before, after) = (tree(names[0])?, tree(names[1])?);
    let reader = reader_of(parts, &chain, &root, &meta)?;
    let block = BLOCK as u64;
    let ranges = before.diff(&after, &reader, from / block, ranges_max).await?;
    Ok(ranges.into_iter().map(|range| range.start * block..range.end * block).collect())
}

/// Reads a volume as a clone of it would: its owner may be moving blocks meanwhile.
pub(crate) fn reader_of(parts: &Parts, chain: &Chain, root: &Root, meta: &Meta) -> Result<Reader, VolumeError> {
    let table = meta.table.for_clone(random_id(&*parts.environment)).ok_or(VolumeError::TooManyAncestors)?;
    Ok(Reader::new(chain, root, table, VIEW_PAGES))
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
    if let Err(refused) = chain.refuse_clones().await {
        chain.take_back_deletion().await?;
        return Err(refused);
    }
    let Some(Deletion { root, tag, is_first }) = chain.mark_deleted().await? else { return Err(VolumeError::NoVolume) };
    if let Err(refused) = chain.refuse_clones().await {
        if is_first || chain.has_clone().await? {
            chain.unmark_deleted(root, &tag).await?;
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
        Some(source) => Err(StoreError::Unknown(format!("{} could not be removed", source.path())).into()),
    }
}

impl Chain {
    async fn refuse_clones(&self) -> Result<(), VolumeError> {
        let clones: Vec<String> = self.pins().await?.iter().map(|pin| group_path(&pin.clone)).collect();
        if clones.is_empty() { Ok(()) } else { Err(VolumeError::VolumeHasClones(clones.join(", "))) }
    }

    /// Whether a volume that is pinned as a clone is there, so that it was made before this one was deleted: then no deletion gets past its pin.
    async fn has_clone(&self) -> Result<bool, VolumeError> {
        for pin in self.pins().await? {
            match (Chain { group: pin.clone, ..self.clone() }).read_root().await {
                Ok(_) | Err(VolumeError::ObjectDamaged { .. }) => return Ok(true),
                Err(VolumeError::NoVolume) => {}
                Err(error) => return Err(error),
            }
        }
        Ok(false)
    }

    /// Brings a volume back that has clones, if somebody who then died has begun to delete it.
    async fn take_back_deletion(&self) -> Result<(), VolumeError> {
        let name = root_path(&self.group);
        let Some((bytes, tag)) = self.read_until_known(&name).await? else { return Ok(()) };
        let Ok(root) = Root::decode(&bytes, &name) else { return Ok(()) };
        if root.is_deleted && self.has_clone().await? {
            self.unmark_deleted(root, &tag).await?;
        }
        Ok(())
    }

    /// Says in the root that the volume is no more, even if it says so already: whoever marked it before can take nothing back from now on. `None`: there
    /// never was one. A store that takes nothing is an error: what a root refers to has to stay.
    async fn mark_deleted(&self) -> Result<Option<Deletion>, VolumeError> {
        let name = root_path(&self.group);
        let owner = random_id(&*self.environment);
        let until = self.environment.now() + PATIENCE;
        let mut is_first = false;
        loop {
            let Some((bytes, tag)) = self.read_until_known(&name).await? else { return Ok(None) };
            let root = Root::decode(&bytes, &name)?;
            if root.owner == owner {
                return Ok(Some(Deletion { root, tag, is_first }));
            }
            is_first = !root.is_deleted;
            // A new epoch, so that its owner is fenced.
            let marked = Root { is_deleted: true, owner, epoch: root.epoch + 1, ..root };
            match self.store.swap(&name, Some(&tag), marked.encode()).await {
                Ok(_) => {}
                Err(error @ (StoreError::NoSpace(_) | StoreError::Refused(_))) => return Err(error.into()),
                Err(error) if self.environment.now() >= until => return Err(error.into()),
                Err(_) => self.rest().await,
            }
        }
    }

    /// The volume is there again, unless its root has changed since `tag`.
    async fn unmark_deleted(&self, root: Root, tag: &Tag) -> Result<(), VolumeError> {
        let name = root_path(&self.group);
        let root = Root { is_deleted: false, owner: random_id(&*self.environment), epoch: root.epoch + 1, ..root };
        let until = self.environment.now() + PATIENCE;
        loop {
            match self.store.swap(&name, Some(tag), root.encode()).await {
                Ok(_) => return Ok(()),
                Err(error @ (StoreError::Unknown(_) | StoreError::NoSpace(_))) if self.environment.now() >= until => {
                    return Err(error.into());
                }
                Err(StoreError::Changed(_) | StoreError::Unknown(_) | StoreError::NoSpace(_)) => {}
                Err(error) => return Err(error.into()),
            }
            match self.read_until_known(&name).await? {
                Some((_, now)) if now == *tag => self.rest().await,
                _ => return Ok(()),
            }
        }
    }
}

/// A volume was marked as deleted.
struct Deletion {
    root: Root,
    /// The version of the root that says so.
    tag: Tag,
    /// It was not before.
    is_first: bool,
}

impl MappedVolume {
    /// Makes the volume independent of the snapshot that it is a clone of: copies what it shares. False if it is no clone.
    /// Refused while it has clones itself, as they share the same blocks. `progress` is told bytes.
    pub async fn flatten(&self, progress: Arc<Progress>) -> Result<bool, VolumeError> {
        let core = &self.core;
        let Some(parent) = core.parent.get() else { return Ok(false) };
        core.chain.refuse_clones().await?;
        let _gathering = core.gathering.hold().await;
        core.progress.replace(Some(progress));
        let mut left = None;
        // What the ancestor has moved away is found where it is now by the next try.
        for _ in 0..FLATTEN_TRIES {
            core.collect_alone(Which::Inherited).await?;
            left = core.inherited();
            if left.is_none() {
                break;
            }
        }
        core.progress.take();
        if let Some(source) = left {
            let why = "it could not be copied: it is damaged, or in use; try again";
            return Err(VolumeError::ObjectDamaged { object: source.path(), why });
        }
        // A clone made meanwhile may know only where the blocks were; one that is made later knows where they are.
        core.chain.refuse_clones().await?;
        let _alone = core.house.hold().await;
        // The pool must know of every copy before anything may go.
        core.checkpoint_with(Change::Nothing).await?;
        let pin = Pin { snapshot: parent.snapshot, clone: core.chain.group };
        Chain { group: parent.group, ..core.chain.clone() }.set_pin(pin, false).await?;
        core.parent.set(None);
        core.checkpoint_with(Change::Nothing).await?;
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
    pub async fn open(parts: &Parts, volume: impl Into<VolumeId>, name: &str) -> Result<SnapshotView, VolumeError> {
        let volume = volume.into();
        let chain = parts.chain(volume.group);
        let (root, meta) = chain.read_meta().await?;
        let snapshot = meta.snapshot(volume.id, name)?;
        let reader = reader_of(parts, &chain, &root, &meta)?;
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
        let stored = runs.into_iter().filter(|(_, pointer)| !pointer.is_nothing());
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
