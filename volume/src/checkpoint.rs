//! Checkpoints: the layers become part of the tree, and the root says so.
//!
//! ```text
//!   close the open layer ─▶ merge layer by layer, a snapshot after each that ends with one ─▶ pages ─▶ meta ─▶ swap the root
//!                                                                                             ─▶ delete what nothing refers to
//! ```
//!
//! Invariants: whatever the root refers to is in the pool before the root does. What it refers to no longer is deleted only after it was
//! swapped. Reads go on meanwhile, through the tree and the layers as they were.

use std::cell::{Cell, RefCell};
use std::collections::HashMap;
use std::rc::Rc;

use dedup::Block;
use dedup::body::{BODY_LEN_MAX, Body};
use dedup::frame::{Compression, Compressor, Packing};
use dedup::location::{Location, SegmentHandle, Spot};

use crate::core::{Core, SnapshotState};
use crate::environment::{LocalFuture, offload};
use crate::error::VolumeError;
use crate::extent_map::ExtentMap;
use crate::map::merge::{Changes, merge};
use crate::map::{PAGES_PER_FRAME, Page, PageSink, Pointer, Tree};
use crate::meta::{Held, Meta, Snapshot, SnapshotId, Volumes};
use crate::names::{Family, Slot, Source, first_block, slot_of};
use crate::object::{self, Kind, Opened};
use crate::patience::PatientPages;
use crate::root::Checkpoint;
use crate::segment::Place;
use crate::snapshots::by_age;
use crate::step_header::StepHeader;
use crate::table::{Content, Entry};

/// Pages of one object.
pub(crate) const PAGES_MAX: usize = 8192;
/// Neighbours are compressed, and read, together.
const PACKING: Packing = Packing { compression: Compression::Zstd { level: 1 }, frame_blocks: PAGES_PER_FRAME };

/// What a checkpoint changes besides.
#[derive(Clone, Copy)]
pub(crate) enum Change {
    Nothing,
    /// A volume gets another size, in bytes.
    Size(Slot, u64),
    /// A volume becomes, or begins as, this.
    Content(Slot, Held),
    /// A volume is no more.
    Gone(Slot),
    /// A snapshot that was being deleted stays.
    Spared(SnapshotId),
}

thread_local! {
    /// Its contexts are dear to make.
    static COMPRESSOR: RefCell<Compressor> = RefCell::default();
}

/// Writes new pages of the map.
struct PageWriter<'a> {
    core: &'a Core,
    filling: RefCell<Option<Filling>>,
    /// Where in the history the newest snapshot is of the volume whose map is written.
    newest: Cell<Option<Place>>,
    /// Blocks that are stored now, in the place of nothing or of what the newest snapshot keeps.
    fresh: Cell<u64>,
}

/// An object that is not in the store yet.
struct Filling {
    source: Source,
    handle: SegmentHandle,
    body: Body,
    pages: usize,
}

impl PageWriter<'_> {
    async fn add(&self, pages: Vec<Page>) -> Result<Vec<Pointer>, VolumeError> {
        let is_full = self.filling.borrow().as_ref().is_some_and(|filling| filling.pages + pages.len() > PAGES_MAX);
        if is_full {
            self.flush().await?;
        }
        let filling = self.filling.borrow_mut().take();
        let mut filling = match filling {
            Some(filling) => filling,
            None => self.begin()?,
        };
        filling.pages += pages.len();
        let blocks: Vec<Box<Block>> = pages.iter().map(Page::encode).collect();
        let body = filling.body;
        let packed = offload(&*self.core.chain.environment, move || {
            let blocks: Vec<&Block> = blocks.iter().map(|block| &**block).collect();
            pack(body, &blocks, PACKING)
        })
        .await
        .ok_or(VolumeError::Panicked)?;
        let (body, spots) = packed;
        let at = |spot: &Spot| Pointer::to(Location { segment: filling.handle, spot: *spot });
        let pointers: Vec<Pointer> = spots.iter().map(at).collect();
        filling.body = body;
        self.filling.replace(Some(filling));
        if pointers.len() != pages.len() {
            return Err(full("map pages"));
        }
        pages.into_iter().zip(&pointers).for_each(|(page, pointer)| self.core.reader.add_fresh(*pointer, page));
        Ok(pointers)
    }

    fn begin(&self) -> Result<Filling, VolumeError> {
        let source = self.core.new_source(Family::Gathered, &self.core.next_gathered);
        let handle = self.core.reader.table.borrow_mut().add(source, Content::Pages, 0, 0).and_then(SegmentHandle::new);
        Ok(Filling { source, handle: handle.ok_or_else(|| full("handles"))?, body: Body::new(BODY_LEN_MAX), pages: 0 })
    }

    /// Everything that was added is in the store afterwards.
    async fn flush(&self) -> Result<(), VolumeError> {
        let Some(Filling { source, handle, body, pages }) = self.filling.borrow_mut().take() else { return Ok(()) };
        let (bytes, opened) = self.core.store_object(source, Kind::Step, StepHeader::default().encode(), body).await?;
        self.core.reader.opened(handle.get(), opened);
        self.core.reader.table.borrow_mut().set_size(handle.get(), pages as u32, bytes);
        // Every page that was added is in the store, and need not be kept.
        self.core.reader.settle_fresh();
        Ok(())
    }
}

impl PageSink for PageWriter<'_> {
    fn write(&self, pages: Vec<Page>) -> LocalFuture<'_, Result<Vec<Pointer>, VolumeError>> {
        Box::pin(self.add(pages))
    }

    fn note_replaced(&self, before: &[Pointer]) {
        let (table, newest) = (self.core.reader.table.borrow(), self.newest.get());
        // What is older than the snapshot, and was still there, is in it.
        let is_kept = |before: &Pointer| newest.zip(table.entry_of(*before)).is_some_and(|(place, entry)| entry.is_before(place));
        let fresh = before.iter().filter(|before| before.is_nothing() || is_kept(before)).count();
        self.fresh.set(self.fresh.get() + fresh as u64);
    }
}

fn full(what: &str) -> VolumeError {
    VolumeError::ObjectDamaged { object: what.to_owned(), why: "there are more than the format has room for" }
}

/// The spots of blocks added to a body: fewer if it is full.
pub(crate) fn pack(mut body: Body, blocks: &[&Block], packing: Packing) -> (Body, Vec<Spot>) {
    let mut spots = Vec::with_capacity(blocks.len());
    COMPRESSOR.with_borrow_mut(|compressor| {
        for frame in blocks.chunks(packing.frame_blocks) {
            let Some(record) = body.push(compressor, frame, packing.compression) else { return };
            spots.extend((0..frame.len() as u8).filter_map(|number| record.spot(number)));
        }
    });
    (body, spots)
}

impl Core {
    /// Seals an object and stores it: its bytes, and how it is read.
    pub(crate) async fn store_object(
        &self,
        source: Source,
        kind: Kind,
        inner: Vec<u8>,
        body: Body,
    ) -> Result<(u32, Opened), VolumeError> {
        let mut random = [0; 32];
        self.chain.environment.random(&mut random);
        let sealer = self.chain.secrets.sealer(self.keeper.root().domain);
        let sealing = move || object::seal(&sealer, &source, kind, &random, &inner, body);
        let sealed = offload(&*self.chain.environment, sealing).await.ok_or(VolumeError::Panicked)?;
        let damaged = |_| VolumeError::ObjectDamaged { object: source.path(), why: "it could not be sealed" };
        let object::Sealed { header, body, opened } = sealed.map_err(damaged)?;
        self.chain.publish(&source, &header, &body).await?;
        Ok(((header.len() + body.len()) as u32, opened))
    }

    /// Brings the tree up to what the pool has.
    pub(crate) async fn checkpoint(&self) -> Result<(), VolumeError> {
        let _alone = self.house.hold().await;
        self.checkpoint_with(Change::Nothing).await
    }

    /// The same for whoever holds the house.
    pub(crate) async fn checkpoint_with(&self, change: Change) -> Result<(), VolumeError> {
        self.checkpoint_wanted.set(false);
        let (base, layers, segments, place, log_end, stored) = {
            // The place tells what the layers have only while no segment is halfway in them.
            let _whole = self.applying.hold().await;
            let mut map = self.map.borrow_mut();
            map.close_layer(None);
            (map.volumes.clone(), map.layers.clone(), map.segments, map.place, map.log_end, self.pending.take())
        };
        let writer = PageWriter { core: self, filling: RefCell::default(), newest: Cell::default(), fresh: Cell::new(0) };
        let (mut volumes, mut trees, mut newest) = (base, HashMap::new(), self.newest_snapshots());
        for layer in &layers {
            self.enter(&layer.runs, &mut volumes, &newest, &writer).await?;
            if let Some((slot, snapshot)) = layer.ends_with
                && let Some(held) = volumes.get(&slot)
            {
                trees.insert(snapshot, held.tree);
                newest.extend(self.place_of(slot, snapshot).map(|place| (slot, place)));
            }
        }
        self.make(change, &mut volumes, &writer).await?;
        writer.flush().await?;

        let doomed = self.doomed.borrow().clone();
        let mut meta = self.meta(volumes.clone(), &trees, doomed.clone());
        if let Change::Spared(snapshot) = change {
            meta.spare(snapshot);
        }
        let source = self.store_meta(meta).await?;
        let old_meta = self.keeper.root().meta();
        let log_id = self.keeper.root().log_id;
        let checkpoint = Checkpoint { place, meta: (source.epoch, source.number), log_id, log_end };
        let size = volumes.values().map(|held| held.size).sum();
        self.keeper.change(|root| (root.checkpoint, root.size) = (checkpoint, size)).await?;
        {
            let mut map = self.map.borrow_mut();
            map.volumes = volumes;
            map.layers.drain(..layers.len());
            map.segments -= segments;
        }
        self.note_fresh(writer.fresh.get(), stored);
        self.commit_snapshots(&trees);
        self.reader.settle_fresh();
        self.release_handles();
        self.remove_doomed(&doomed, old_meta).await;
        self.reader.tally.checkpoints.add(1);
        self.changed.notify();
        Ok(())
    }

    /// Makes what a layer changed part of the volumes' trees.
    async fn enter(
        &self,
        runs: &ExtentMap<Pointer>,
        volumes: &mut Volumes,
        newest: &HashMap<Slot, Place>,
        writer: &PageWriter<'_>,
    ) -> Result<(), VolumeError> {
        let mut from = 0;
        while let Some((run, _)) = runs.within(from..u64::MAX).next() {
            let slot = slot_of(run.start);
            from = first_block(slot + 1);
            if let Some(held) = volumes.get_mut(&slot) {
                writer.newest.set(newest.get(&slot).copied());
                let changes = Changes { runs, first: first_block(slot) };
                held.tree = self.merge(held.tree, held.blocks(), changes, writer).await?;
            }
        }
        Ok(())
    }

    async fn merge(&self, tree: Tree, blocks: u64, changes: Changes<'_>, writer: &PageWriter<'_>) -> Result<Tree, VolumeError> {
        let pages = PatientPages { core: self, pages: &self.reader };
        merge(tree, blocks, changes, &pages, writer, |error| self.note_damage(error)).await
    }

    async fn make(&self, change: Change, volumes: &mut Volumes, writer: &PageWriter<'_>) -> Result<(), VolumeError> {
        let (slot, held) = match change {
            Change::Nothing | Change::Spared(_) => return Ok(()),
            Change::Gone(slot) => {
                volumes.remove(&slot);
                return Ok(());
            }
            Change::Content(slot, held) => (slot, held),
            Change::Size(slot, size) => (slot, Held { size, ..*volumes.get(&slot).ok_or(VolumeError::NoVolume)? }),
        };
        let unchanged = ExtentMap::default();
        let tree = self.merge(held.tree, held.blocks(), Changes { runs: &unchanged, first: 0 }, writer).await?;
        volumes.insert(slot, Held { tree, ..held });
        Ok(())
    }

    fn meta(&self, volumes: Volumes, trees: &HashMap<SnapshotId, Tree>, doomed: Vec<Source>) -> Meta {
        let snapshots = self.snapshots.borrow().values().filter_map(|state| committed(state, trees)).collect();
        let (parent, table) = (self.parent.get(), self.reader.table.borrow().clone());
        Meta { volumes, parent, table, doomed, snapshots }
    }

    async fn store_meta(&self, meta: Meta) -> Result<Source, VolumeError> {
        let source = self.new_source(Family::Meta, &self.next_meta);
        let mut random = [0; 32];
        self.chain.environment.random(&mut random);
        let sealer = self.chain.secrets.sealer(self.keeper.root().domain);
        let sealing = move || meta.seal(&sealer, &source, &random);
        let sealed = offload(&*self.chain.environment, sealing).await.ok_or(VolumeError::Panicked)??;
        self.chain.publish(&source, &sealed.header, &sealed.body).await?;
        Ok(source)
    }

    /// Where in the history the newest snapshot of each volume is, as exactly as that is known.
    fn newest_snapshots(&self) -> HashMap<Slot, Place> {
        let table = self.reader.table.borrow();
        let place = |snapshot: &Snapshot| {
            let written = || table.entry_of(snapshot.tree.root).map(Entry::written_at);
            Some((snapshot.slot, self.place_of(snapshot.slot, snapshot.id).or_else(written)?))
        };
        let stay = self.committed_snapshots(|_| true).into_iter().filter(|snapshot| !snapshot.is_deleting).collect();
        by_age(stay, &table).iter().filter_map(place).collect()
    }

    fn place_of(&self, slot: Slot, id: SnapshotId) -> Option<Place> {
        let last = self.last_snapshots.borrow().get(&slot).copied();
        last.filter(|(last, _)| *last == id).map(|(_, place)| place)
    }

    fn commit_snapshots(&self, trees: &HashMap<SnapshotId, Tree>) {
        for state in self.snapshots.borrow_mut().values_mut() {
            if let Some(snapshot) = committed(state, trees) {
                *state = SnapshotState::Committed(snapshot);
            }
        }
    }

    /// Handles that were forgotten, and that nobody follows pointers to any more, may be used again.
    fn release_handles(&self) {
        // Whoever looked before an earlier forgetting may follow what was forgotten later, too.
        let mut limbo = self.limbo.borrow_mut();
        let done = limbo.iter().take_while(|(looking, _)| Rc::strong_count(looking) == 1).count();
        self.reader.tally.handles_held.add(limbo[done..].iter().map(|(_, handles)| handles.len() as u64).sum());
        let free: Vec<u32> = limbo.drain(..done).flat_map(|(_, handles)| handles).collect();
        for handle in free {
            self.reader.tally.handles_released.add(1);
            self.reader.forget(handle);
            self.unreadable.borrow_mut().remove(&handle);
            self.deduplication.restore(handle);
            self.reader.table.borrow_mut().reuse(handle);
        }
    }

    async fn remove_doomed(&self, doomed: &[Source], old_meta: Source) {
        let mut left = self.chain.remove(doomed).await;
        left.extend(self.chain.remove(&[old_meta]).await);
        let mut now = self.doomed.borrow_mut();
        now.retain(|source| !doomed.contains(source));
        now.extend(left);
    }
}

/// What a checkpoint says of a snapshot, if its tree is known.
fn committed(state: &SnapshotState, trees: &HashMap<SnapshotId, Tree>) -> Option<Snapshot> {
    match state {
        SnapshotState::Reserved => None,
        SnapshotState::Committed(snapshot) => Some(snapshot.clone()),
        SnapshotState::Pending(marker) => {
            let tree = *trees.get(&marker.id)?;
            let (id, name, created, size) = (marker.id, marker.name.clone(), marker.created, marker.size);
            Some(Snapshot { slot: marker.slot, id, name, created, size, tree, is_deleting: false })
        }
    }
}
