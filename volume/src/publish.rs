//! From the backlog to the pool: steps become segments, and segments, in order, part of the map.

use std::ops::Range;
use std::rc::Rc;

use blockdev::Errno;
use bytes::Bytes;
use dedup::frame::choose;
use dedup::location::{Location, SegmentHandle, Spot, UNIT_LEN};

use crate::backlog::{Pending, Step};
use crate::bytes_at::u64_at;
use crate::core::Core;
use crate::deduplication::Uses;
use crate::environment::offload;
use crate::error::VolumeError;
use crate::log::{PayloadPlace, RecordKind, Tail};
use crate::map::Pointer;
use crate::reduce::{Ingredients, RunContent, hash_step, make_segment};
use crate::segment::{BLOCK, Place, Segment};
use crate::signal::give_way;
use crate::step_header::{ExtentKind, Marker, StepHeader};
use crate::table::Content;

const PUBLISHING_MAX: usize = 8;
/// Segments between two looks for garbage.
const NOTICE_SEGMENTS: u64 = 8;

/// A segment that is in the pool, but not all before it.
pub(crate) struct Published {
    segment: Segment,
    end: Tail,
    _uses: Uses,
}

impl Core {
    pub(crate) async fn publish_steps(self: Rc<Self>) {
        let mut place = self.next_published.get();
        loop {
            let step = self.backlog.next_step().await;
            self.changed.wait_for(|| (self.publishing.get() < PUBLISHING_MAX).then_some(())).await;
            self.publishing.set(self.publishing.get() + 1);
            let core = self.clone();
            self.chain.environment.spawn(Box::pin(async move {
                let published = core.publish(place, step).await;
                core.publishing.set(core.publishing.get() - 1);
                if let Err(error) = published {
                    core.fail(error);
                }
                core.changed.notify();
            }));
            place = place.next();
        }
    }

    async fn publish(self: &Rc<Self>, place: Place, step: Rc<Step>) -> Result<(), VolumeError> {
        let ingredients = self.ingredients(place, &step).await?;
        let (end, is_for_flush) = (step.end, step.is_for_flush);
        drop(step);
        let environment = &*self.chain.environment;
        let hashed = offload(environment, move || hash_step(ingredients)).await.ok_or(VolumeError::Panicked)?;
        let (duplicates, uses) = self.find_duplicates(hashed.distinct()).await;
        let sealed = offload(environment, move || make_segment(hashed, duplicates)).await;
        let sealed = sealed.unwrap_or(Err(VolumeError::Panicked))?;
        self.chain.publish(&sealed.segment.source, &sealed.header, &sealed.body).await?;
        if is_for_flush {
            self.backlog.flush_stored();
            self.changed.notify();
        }
        self.waiting.borrow_mut().insert(place, Published { segment: sealed.segment, end, _uses: uses });
        self.apply_in_order().await
    }

    /// What is in the pool becomes part of the map as far as nothing before it is missing.
    async fn apply_in_order(&self) -> Result<(), VolumeError> {
        let _alone = self.applying.hold().await;
        loop {
            let next = self.next_published.get();
            let Some(Published { segment, end, _uses }) = self.waiting.borrow_mut().remove(&next) else { return Ok(()) };
            self.apply(segment).await?;
            self.next_published.set(next.next());
            let step = self.backlog.published();
            self.published.set(end.position);
            self.log.trim(end.position);
            self.notice_garbage();
            self.changed.notify();
            forget(step, self.settings.slice).await;
        }
    }

    /// Now and then, whether it is time to collect garbage.
    fn notice_garbage(&self) {
        let is_time = self.next_published.get().sequence.is_multiple_of(NOTICE_SEGMENTS);
        if self.settings.gathers
            && is_time
            && let Some(which) = self.due_collection(false)
        {
            self.gather_wanted.set(Some(which));
            self.changed.notify();
        }
    }

    /// The next segment of the history becomes part of what is read, in slices: the backlog has it until all of it is. For whoever holds the right
    /// to apply.
    pub(crate) async fn apply(&self, segment: Segment) -> Result<(), VolumeError> {
        let Segment { source, step, opened } = segment;
        let full = || VolumeError::ObjectDamaged { object: source.path(), why: "the volume has no handle left for it" };
        let bytes = opened.body_at as usize + body_len(&step);
        let handle = self.reader.table.borrow_mut().add(source, Content::Data, step.stored.len() as u32, bytes as u32);
        let handle = handle.ok_or_else(full)?;
        self.reader.tally.stored_bytes.add(bytes as u64);
        self.reader.opened(handle, opened);
        self.deduplication.hook(&self.reader, handle, &step);
        let handles = self.source_handles(&step, handle)?;
        let changed: u64 = step.extents.iter().map(|extent| u64::from(extent.blocks)).sum();
        let stored = step.stored.len() as u64;
        self.pending.set(self.pending.get() + stored);
        self.note_changed(stored);
        self.note_garbage(changed.saturating_sub(stored));
        for slice in self.pointers(&step, &handles).chunks(self.settings.slice) {
            self.map_runs(slice, handles.own);
            give_way().await;
        }
        let mut map = self.map.borrow_mut();
        let after = Place { epoch: source.epoch, sequence: source.number }.next();
        if let Some(marker) = &step.marker {
            map.close_layer(Some((marker.slot, marker.id)));
            self.note_marker(marker.clone());
            self.last_snapshots.borrow_mut().insert(marker.slot, (marker.id, after));
            self.checkpoint_wanted.set(true);
        }
        map.segments += 1;
        map.place = after;
        map.log_end = step.log_end;
        Ok(())
    }

    /// What the blocks of a step are mapped to.
    fn pointers(&self, step: &StepHeader, handles: &Handles) -> Vec<(Range<u64>, Pointer)> {
        let mut spots = step.spots.iter();
        let mut runs = Vec::with_capacity(step.spots.len() + step.extents.len());
        for extent in &step.extents {
            let blocks = extent.first..extent.first + u64::from(extent.blocks);
            let segment = match extent.kind {
                ExtentKind::Zero => {
                    runs.push((blocks, Pointer::ZERO));
                    continue;
                }
                ExtentKind::Discarded => {
                    runs.push((blocks, Pointer::HOLE));
                    continue;
                }
                ExtentKind::Data => handles.own,
                ExtentKind::Hit { source } => {
                    self.reader.tally.hits.add(extent.blocks.into());
                    handles.sources[source as usize]
                }
            };
            self.reader.tally.blocks.add(extent.blocks.into());
            runs.extend(blocks.zip(spots.by_ref()).map(|(block, spot)| (block..block + 1, pointer(segment, *spot))));
        }
        runs
    }

    fn map_runs(&self, runs: &[(Range<u64>, Pointer)], own: SegmentHandle) {
        let (mut map, mut noted) = (self.map.borrow_mut(), self.noted_hits.borrow_mut());
        for (blocks, pointer) in runs {
            map.open.runs.insert(blocks.clone(), *pointer);
            if let Some(noted) = &mut *noted
                && pointer.location().is_some_and(|location| location.segment != own)
            {
                noted.push(*pointer);
            }
        }
    }

    fn source_handles(&self, step: &StepHeader, own: u32) -> Result<Handles, VolumeError> {
        let table = self.reader.table.borrow();
        let handle = |number| SegmentHandle::new(number).expect("the table has handles of 30 bits");
        let mut sources = Vec::with_capacity(step.sources.len());
        for source in &step.sources {
            let missing =
                || VolumeError::ObjectDamaged { object: source.path(), why: "a later segment refers to it, and it is gone" };
            sources.push(handle(table.handle_of(source).ok_or_else(missing)?));
        }
        Ok(Handles { own: handle(own), sources })
    }

    /// Gathers what a step is made of.
    async fn ingredients(&self, place: Place, step: &Step) -> Result<Ingredients, VolumeError> {
        let mut runs = Vec::new();
        for (range, run) in step.runs.iter() {
            if runs.len() % self.settings.slice == self.settings.slice - 1 {
                give_way().await;
            }
            let content = match run.kind {
                RecordKind::Write => RunContent::Data(self.pending_bytes(&range, run).await?),
                RecordKind::Zero => RunContent::Zero,
                RecordKind::Discard => RunContent::Discarded,
                RecordKind::Marker => continue,
            };
            runs.push((range, content));
        }
        let packing = choose(self.settings.compression, self.log.fill() as f32, self.packing.get());
        self.packing.set(Some(packing));
        let mut random = [0; 32];
        self.chain.environment.random(&mut random);
        let nonce = u64_at(&random, 0);
        let root = self.keeper.root();
        let marker = match step.marker {
            Some(place) => Some(self.marker_at(place).await?),
            None => None,
        };
        let header = StepHeader { nonce, log_id: root.log_id, log_end: step.end, marker, ..StepHeader::default() };
        let secrets = self.chain.secrets.clone();
        Ok(Ingredients { group: root.group, domain: root.domain, place, secrets, packing, random, step: header, runs })
    }

    pub(crate) async fn marker_at(&self, place: PayloadPlace) -> Result<Marker, VolumeError> {
        let lost = |errno| VolumeError::log_io("read", place.position, errno);
        let bytes = self.log.read(place).await.map_err(lost)?.ok_or_else(|| lost(Errno::EIO))?;
        Marker::decode(&bytes).ok_or_else(|| lost(Errno::EIO))
    }

    async fn pending_bytes(&self, range: &Range<u64>, run: &Pending) -> Result<Bytes, VolumeError> {
        let lost = |errno| VolumeError::log_io("read", run.payload.position, errno);
        let len = (range.end - range.start) as usize * BLOCK;
        self.written_bytes(run, len).await.map_err(lost)?.ok_or_else(|| lost(Errno::EIO))
    }
}

/// Lets go of what a step has in memory, in slices.
async fn forget(step: Option<Rc<Step>>, slice: usize) {
    let Some(mut step) = step.and_then(|step| Rc::try_unwrap(step).ok()) else { return };
    while (0..slice).all(|_| step.runs.pop_first().is_some()) {
        give_way().await;
    }
}

/// What the extents of a header refer to.
struct Handles {
    own: SegmentHandle,
    sources: Vec<SegmentHandle>,
}

/// Where the last frame of a body ends, as far as its header tells.
pub(crate) fn body_len(step: &StepHeader) -> usize {
    let end = |spot: &Spot| spot.unit() as usize * UNIT_LEN + spot.class().bytes();
    step.stored.iter().map(|(_, spot)| end(spot)).max().unwrap_or(0)
}

fn pointer(segment: SegmentHandle, spot: Spot) -> Pointer {
    Pointer::to(Location { segment, spot })
}
