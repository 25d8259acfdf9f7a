//! Collecting garbage: objects that nothing refers to are deleted, and those little of which is in use are rewritten.
//!
//! ```text
//!   mark      every pointer of every tree and layer: which handles are used, and how much of each
//!   choose    unused handles are forgotten; emptyish objects are victims, and take no new hits
//!   copy      what is in use of the victims ─▶ new objects, whose headers tell what came from where
//!   commit    victims are forwarded ─▶ checkpoint ─▶ only then their objects are deleted
//! ```
//!
//! Invariants: pages are not rewritten for it; a snapshot neither stalls it nor is changed by it. An object that a step on its way may
//! refer to is left alone. What cannot be read is left where it is.

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};

use dedup::body::{BODY_LEN_MAX, Body};
use dedup::frame::Temperature;
use dedup::hash::BlockHash;
use dedup::location::{Location, SegmentHandle, Spot};
use dedup::{BLOCK_LEN, Block};

use crate::checkpoint::{Change, pack};
use crate::core::{Core, SnapshotState};
use crate::environment::offload;
use crate::error::VolumeError;
use crate::map::{Pointer, Tree, spot_bits, spot_of};
use crate::names::{Family, Source};
use crate::object::Kind;
use crate::segment::Place;
use crate::step_header::{Moved, StepHeader};
use crate::table::{Content, Entry, State};

/// Blocks of one object.
const BLOCKS_MAX: usize = 8192;
/// Blocks read at once.
const READ_BLOCKS: usize = 256;
/// Victims of one collection, which bounds what it keeps in memory.
const VICTIMS_MAX: usize = 256;
/// Blocks that may be garbage before anybody looks: one object's.
const GARBAGE_MIN: u64 = 8_192;
/// Of what is stored, the share in use that is kept up while the volume is busy, and beyond which nothing is done. Less garbage costs more copies.
const IN_USE_BUSY: f64 = 0.8;
const IN_USE_BUSY_DONE: f64 = 0.84;
/// The same for a volume that rests.
const IN_USE_QUIET: f64 = 0.97;

/// What a collection did.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Gathered {
    /// Blocks in use, and blocks stored before anything was done.
    pub live_blocks: u64,
    pub stored_blocks: u64,
    /// Objects that are deleted, and their bytes.
    pub objects_deleted: u64,
    pub bytes_deleted: u64,
    /// Blocks that were copied.
    pub blocks_moved: u64,
}

/// How much each handle is used.
#[derive(Default)]
struct Uses {
    /// Pages refer to these.
    named: HashSet<u32>,
    /// Pointers that lead to each handle in the end.
    counts: HashMap<u32, u64>,
}

/// What is to be done.
#[derive(Default)]
struct Chosen {
    forgotten: Vec<u32>,
    victims: Vec<u32>,
}

/// An object that may be rewritten.
struct Candidate {
    handle: u32,
    is_own: bool,
    live: u64,
    blocks: u64,
}

impl Candidate {
    fn new(handle: u32, entry: &Entry, count: u64) -> Candidate {
        let blocks = u64::from(entry.blocks);
        Candidate { handle, is_own: entry.owner == 0, live: count.min(blocks), blocks }
    }

    /// In use, 0 to 1.
    fn share(&self) -> f64 {
        self.live as f64 / self.blocks.max(1) as f64
    }
}

/// Which of the candidates are rewritten.
fn victims(mut candidates: Vec<Candidate>, which: Which) -> Vec<u32> {
    let handles = |candidates: Vec<Candidate>| candidates.into_iter().map(|candidate| candidate.handle).collect();
    if matches!(which, Which::Inherited) {
        candidates.retain(|candidate| !candidate.is_own);
        return handles(candidates);
    }
    candidates.retain(|candidate| candidate.is_own);
    let (mut stored, live) = candidates.iter().fold((0, 0), |(stored, live), one| (stored + one.blocks, live + one.live));
    candidates.retain(|candidate| candidate.live < candidate.blocks);
    candidates.sort_by(|one, other| one.share().total_cmp(&other.share()).then(one.handle.cmp(&other.handle)));
    candidates.truncate(VICTIMS_MAX);
    let is_worth_it = |candidate: &Candidate| match which {
        Which::Below(below) => candidate.share() <= below,
        Which::Until(share) => {
            let goes_on = (live as f64) < share * stored as f64;
            stored -= candidate.blocks - candidate.live;
            goes_on
        }
        Which::Inherited => false,
    };
    let count = candidates.iter().map(is_worth_it).take_while(|worth_it| *worth_it).count();
    candidates.truncate(count);
    handles(candidates)
}

/// Which objects are rewritten.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Which {
    /// The volume's own of which no larger share is in use.
    Below(f64),
    /// The volume's own, the emptiest first, until such a share of all that is stored is in use.
    Until(f64),
    /// All that belong to ancestors.
    Inherited,
}

impl Core {
    /// What to collect now, if there may be enough garbage. A volume that rests is tidied up once.
    pub(crate) fn due_collection(&self, is_quiet: bool) -> Option<Which> {
        if self.written.get() == 0 {
            return None;
        }
        let stored = self.stored_blocks();
        let live = self.live.get().min(stored);
        let garbage_max = stored - live;
        if is_quiet && garbage_max > 0 {
            return Some(Which::Until(IN_USE_QUIET));
        }
        let is_much = garbage_max >= GARBAGE_MIN && (live as f64) < IN_USE_BUSY * stored as f64;
        is_much.then_some(Which::Until(IN_USE_BUSY_DONE))
    }

    /// Of the volume's own objects.
    fn stored_blocks(&self) -> u64 {
        let table = self.reader.table.borrow();
        table.used().filter(|(_, entry)| entry.owner == 0 && entry.is_live()).map(|(_, entry)| u64::from(entry.blocks)).sum()
    }

    pub(crate) async fn collect(&self, which: Which) -> Result<Gathered, VolumeError> {
        let _alone = self.house.hold().await;
        // The tree still leads to what was changed since the last checkpoint.
        if self.map.borrow().segments > 0 {
            self.checkpoint_with(Change::default()).await?;
        }
        self.gather_alone(which).await
    }

    /// For whoever holds the house.
    pub(crate) async fn gather_alone(&self, which: Which) -> Result<Gathered, VolumeError> {
        self.written.set(0);
        let ancestors_moved = self.reader.ancestors_moved.get();
        let mut uses = Uses::default();
        let reader = &self.reader;
        let count = |pointer: Pointer, uses: &mut Uses| {
            let Some(location) = pointer.location() else { return };
            let handle = location.segment.get();
            uses.named.insert(handle);
            *uses.counts.entry(reader.forward_of(handle).unwrap_or(handle)).or_default() += 1;
        };
        self.mark(|pointer| count(pointer, &mut uses)).await?;
        // From here to the end of choosing nothing else runs, so no hit slips in between.
        self.mark_layers(|pointer| count(pointer, &mut uses));
        let Chosen { forgotten, victims } = self.choose(&uses, which);
        let nothing_to_do = forgotten.is_empty() && victims.is_empty();
        if victims.len() == VICTIMS_MAX {
            // There may be more, so that another collection is due.
            self.written.set(1);
        }
        let mut done =
            Gathered { stored_blocks: self.stored_blocks(), live_blocks: self.live_blocks(&uses), ..Gathered::default() };
        self.live.set(done.live_blocks);
        if nothing_to_do {
            return Ok(done);
        }
        let written = self.rewrite(victims, &mut done).await?;
        // If an ancestor was found to have moved something, what is in use of its objects is not what it seemed to be: they stay for another time.
        let is_settled = ancestors_moved == self.reader.ancestors_moved.get();
        let may_change =
            |handle: &u32| is_settled || self.reader.table.borrow().get(*handle).is_some_and(|entry| entry.owner == 0);
        for Written { handle, victims, .. } in &written {
            victims.iter().filter(|victim| may_change(victim)).for_each(|victim| self.forward(*victim, *handle, &mut done));
        }
        self.forget(forgotten.into_iter().filter(may_change).collect(), &mut done);
        self.checkpoint_with(Change::default()).await?;
        for Written { handle, header, .. } in written.iter().filter(|written| written.content == Content::Data) {
            self.deduplication.restore(*handle);
            self.deduplication.hook(&self.reader, *handle, header);
        }
        self.reader.tally.blocks_moved.add(done.blocks_moved);
        self.reader.tally.collections.add((done.blocks_moved > 0).into());
        Ok(done)
    }

    /// Shows every pointer of every tree, each page's once.
    async fn mark(&self, mut show: impl FnMut(Pointer)) -> Result<(), VolumeError> {
        let mut known = HashSet::new();
        for tree in self.trees() {
            tree.walk(&self.reader, &mut known, |pointer, _| show(pointer)).await?;
        }
        Ok(())
    }

    fn trees(&self) -> Vec<Tree> {
        let snapshots = self.snapshots.borrow();
        let committed = snapshots.values().filter_map(|state| match state {
            SnapshotState::Committed(snapshot) => Some(snapshot.tree),
            SnapshotState::Reserved | SnapshotState::Pending(_) => None,
        });
        std::iter::once(self.map.borrow().tree).chain(committed).collect()
    }

    fn mark_layers(&self, mut show: impl FnMut(Pointer)) {
        let map = self.map.borrow();
        let layers = map.layers.iter().map(|layer| &**layer).chain([&map.open]);
        layers.flat_map(|layer| layer.runs.iter()).for_each(|(_, pointer)| show(*pointer));
    }

    fn live_blocks(&self, uses: &Uses) -> u64 {
        let table = self.reader.table.borrow();
        let own = table.used().filter(|(_, entry)| entry.owner == 0 && entry.is_live());
        own.map(|(handle, entry)| uses.counts.get(&handle).copied().unwrap_or(0).min(entry.blocks.into())).sum()
    }

    fn choose(&self, uses: &Uses, which: Which) -> Chosen {
        let mut chosen = Chosen::default();
        let (table, hit_uses) = (self.reader.table.borrow(), self.hit_uses.borrow());
        let mut candidates = Vec::new();
        for (handle, entry) in table.used() {
            let count = uses.counts.get(&handle).copied().unwrap_or(0);
            if hit_uses.contains_key(&handle) || self.is_in_history(entry) {
                continue;
            }
            let is_unused = count == 0 && !uses.named.contains(&handle);
            match (entry.state, which) {
                (State::Free, _) => {}
                (State::Live | State::Forwarded(_), _) if is_unused => chosen.forgotten.push(handle),
                (State::Live, _) => candidates.push(Candidate::new(handle, entry, count)),
                (State::Forwarded(_), _) => {}
            }
        }
        chosen.victims = victims(candidates, which);
        chosen.forgotten.iter().chain(&chosen.victims).for_each(|handle| self.deduplication.retire(*handle));
        chosen
    }

    /// An opening would still read the object's header.
    fn is_in_history(&self, entry: &Entry) -> bool {
        let place = Place { epoch: entry.epoch, sequence: entry.number };
        entry.owner == 0 && entry.family == Family::Step && place >= self.keeper.root().checkpoint.place
    }

    /// Copies what is in use of each victim. The answer is the new objects: they take no hits before a checkpoint knows of them, as a history that
    /// refers to what no checkpoint and no step has written could not be read.
    async fn rewrite(&self, victims: Vec<u32>, done: &mut Gathered) -> Result<Vec<Written>, VolumeError> {
        let mut written = Vec::new();
        if victims.is_empty() {
            return Ok(written);
        }
        let mut live = self.live_spots(&victims).await?;
        for content in [Content::Data, Content::Pages] {
            let mut gathering = Gathering::new(self, content);
            for handle in &victims {
                let entry = self.reader.table.borrow().get(*handle).copied();
                // An ancestor's object may turn out to have moved meanwhile.
                if entry.is_none_or(|entry| entry.content != content || !entry.is_live()) {
                    continue;
                }
                let spots = live.remove(handle).unwrap_or_default();
                match gathering.add(*handle, &spots).await {
                    Ok(()) => done.blocks_moved += spots.len() as u64,
                    // It cannot be read: it stays as it is.
                    Err(VolumeError::ObjectDamaged { .. }) => self.deduplication.restore(*handle),
                    Err(error) => return Err(error),
                }
            }
            gathering.store().await?;
            written.append(&mut gathering.written);
        }
        Ok(written)
    }

    /// Where the blocks in use of each victim are.
    async fn live_spots(&self, victims: &[u32]) -> Result<HashMap<u32, BTreeSet<u32>>, VolumeError> {
        let mut live: HashMap<u32, BTreeSet<u32>> = victims.iter().map(|handle| (*handle, BTreeSet::new())).collect();
        let mut forwarded = Vec::new();
        let mut note = |pointer: Pointer| {
            let Some(Location { segment, spot }) = pointer.location() else { return };
            let handle = segment.get();
            if let Some(spots) = live.get_mut(&handle) {
                spots.insert(spot_bits(spot));
            } else if self.reader.forward_of(handle).is_some_and(|to| victims.contains(&to)) {
                forwarded.push(Location { segment, spot });
            }
        };
        self.mark(&mut note).await?;
        self.mark_layers(&mut note);
        for location in forwarded {
            let Location { segment, spot } = self.reader.resolve(location).await?;
            live.entry(segment.get()).or_default().insert(spot_bits(spot));
        }
        Ok(live)
    }

    /// No page refers to these handles. Objects of one's own are deleted after the next checkpoint.
    fn forget(&self, handles: Vec<u32>, done: &mut Gathered) {
        for handle in &handles {
            let (entry, source) = {
                let table = self.reader.table.borrow();
                (table.get(*handle).copied(), table.source(*handle))
            };
            if let (Some(Entry { owner: 0, state: State::Live, bytes, .. }), Some(source)) = (entry, source) {
                self.doom(source, bytes, done);
            }
            self.reader.table.borrow_mut().forget(*handle);
        }
        self.limbo.borrow_mut().push((self.reader.last_look(), handles));
    }

    /// What is in use of a victim is elsewhere now.
    fn forward(&self, victim: u32, handle: u32, done: &mut Gathered) {
        let (entry, source) = {
            let table = self.reader.table.borrow();
            (table.get(victim).copied(), table.source(victim))
        };
        self.reader.table.borrow_mut().forward(victim, handle);
        if let (Some(Entry { owner: 0, bytes, .. }), Some(source)) = (entry, source) {
            self.doom(source, bytes, done);
        }
    }

    fn doom(&self, source: Source, bytes: u32, done: &mut Gathered) {
        self.doomed.borrow_mut().push(source);
        done.objects_deleted += 1;
        done.bytes_deleted += u64::from(bytes);
    }
}

/// A new object with what is in use of its victims.
struct Written {
    handle: u32,
    header: StepHeader,
    content: Content,
    victims: Vec<u32>,
}

/// An object that blocks are gathered in.
struct Gathering<'a> {
    core: &'a Core,
    content: Content,
    body: Body,
    blocks: usize,
    header: StepHeader,
    victims: Vec<u32>,
    /// Objects that are in the store.
    written: Vec<Written>,
}

impl<'a> Gathering<'a> {
    fn new(core: &'a Core, content: Content) -> Gathering<'a> {
        let (body, header) = (Body::new(BODY_LEN_MAX), StepHeader::default());
        Gathering { core, content, body, blocks: 0, header, victims: Vec::new(), written: Vec::new() }
    }

    /// Copies blocks of a victim. Nothing is added if one of them cannot be read.
    async fn add(&mut self, handle: u32, spots: &BTreeSet<u32>) -> Result<(), VolumeError> {
        if self.blocks + spots.len() > BLOCKS_MAX {
            self.store().await?;
        }
        let reader = &self.core.reader;
        let segment = SegmentHandle::new(handle).expect("a handle of the table");
        let mut content = vec![0; spots.len() * BLOCK_LEN];
        let wanted: Vec<(usize, Pointer)> =
            spots.iter().map(|bits| Pointer::to(Location { segment, spot: spot_of(*bits) })).enumerate().collect();
        for part in wanted.chunks(READ_BLOCKS) {
            reader.read(part, &mut content).await?;
        }
        // After the blocks: reading those finds out where an ancestor has moved them.
        let hashes = self.hashes_of(handle).await?;
        let packing = match self.content {
            Content::Data => dedup::frame::choose(self.core.log.fill() as f32, Temperature::Warm, None),
            Content::Pages => dedup::frame::choose(0.0, Temperature::Warm, None),
        };
        let body = std::mem::replace(&mut self.body, Body::new(0));
        let packed = offload(&*self.core.chain.environment, move || {
            let blocks: Vec<&Block> = content.as_chunks::<BLOCK_LEN>().0.iter().collect();
            pack(body, &blocks, packing)
        })
        .await;
        let (body, places) = packed.ok_or(VolumeError::Panicked)?;
        self.body = body;
        if places.len() != spots.len() {
            return Err(VolumeError::ObjectDamaged { object: "an object being gathered".into(), why: "its blocks do not fit" });
        }
        self.note(handle, spots, &places, &hashes).await
    }

    async fn hashes_of(&self, handle: u32) -> Result<HashMap<u32, BlockHash>, VolumeError> {
        if self.content == Content::Pages {
            return Ok(HashMap::new());
        }
        let step = self.core.reader.step_of(handle).await?;
        Ok(step.stored.iter().map(|(hash, spot)| (spot_bits(*spot), *hash)).collect())
    }

    /// Notes in the header what came from where: from the victim, and from those that were forwarded to it.
    async fn note(
        &mut self,
        handle: u32,
        spots: &BTreeSet<u32>,
        places: &[Spot],
        hashes: &HashMap<u32, BlockHash>,
    ) -> Result<(), VolumeError> {
        let now: BTreeMap<u32, Spot> = spots.iter().copied().zip(places.iter().copied()).collect();
        let Some(source) = self.core.reader.table.borrow().source(handle) else { return Ok(()) };
        self.push_moves(source, now.iter().map(|(from, to)| (*from, *to)));
        for (origin, moves) in self.core.reader.moves_into(handle).await?.iter() {
            if self.core.reader.table.borrow().handle_of(origin).is_some() {
                self.push_moves(*origin, moves.iter().filter_map(|(from, at)| Some((*from, *now.get(at)?))));
            }
        }
        let stored = now.iter().filter_map(|(from, to)| Some((*hashes.get(from)?, *to)));
        self.header.stored.extend(stored);
        self.blocks += spots.len();
        self.victims.push(handle);
        Ok(())
    }

    fn push_moves(&mut self, source: Source, moves: impl Iterator<Item = (u32, Spot)>) {
        let number = self.header.sources.len() as u32;
        self.header.sources.push(source);
        self.header.moved.extend(moves.map(|(from, to)| Moved { source: number, from: spot_of(from), to }));
    }

    /// Stores what was gathered.
    async fn store(&mut self) -> Result<(), VolumeError> {
        let whole = std::mem::replace(self, Gathering::new(self.core, self.content));
        let Gathering { core, content, body, blocks, header, victims, written } = whole;
        self.written = written;
        if victims.is_empty() {
            return Ok(());
        }
        let source = core.new_source(Family::Gathered, &core.next_gathered);
        let full = || VolumeError::ObjectDamaged { object: source.path(), why: "the volume has no handle left for it" };
        let handle = core.reader.table.borrow_mut().add(source, content, blocks as u32, 0).ok_or_else(full)?;
        core.deduplication.retire(handle);
        let bytes = core.store_object(source, Kind::Step, header.encode(), body, handle).await?;
        core.reader.table.borrow_mut().set_size(handle, blocks as u32, bytes);
        self.written.push(Written { handle, header, content, victims });
        Ok(())
    }
}
