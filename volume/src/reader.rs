//! Reading what pointers lead to.
//!
//! ```text
//!   pointer ─▶ handle ─▶ Live: this object ─▶ frame ─▶ block
//!                        Forwarded: the other object's header says where the block is now
//! ```
//!
//! Invariants: a pointer is followed by the table as it is now. An object that is gone had its blocks moved: of one's own, the table says
//! where to; of an ancestor's, checkpoints do, see `foreign`. Nothing is handed out that its seal does not vouch for.

use std::cell::RefCell;
use std::collections::{BTreeMap, HashMap, HashSet};
use std::num::NonZeroUsize;
use std::ops::Range;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use backends::segments::StoreError;
use bytes::Bytes;
use dedup::BLOCK_LEN;
use dedup::body::FrameReader;
use dedup::hash::BlockHash;
use dedup::location::{Location, SegmentHandle};
use lru::LruCache;

use crate::chain::Chain;
use crate::error::VolumeError;
use crate::map::{PAGES_PER_FRAME, Page, Pages, Pointer, spot_bits, spot_of};
use crate::names::{Group, Source};
use crate::object::{self, CLEAR_LEN, Object, Opened};
use crate::root::Root;
use crate::signal::give_way;
use crate::step_header::StepHeader;
use crate::stored::{Damaged, Stored, frame_bytes, read_together};
use crate::table::{State, Table};
use crate::tally::Tally;

const PAUSE_FIRST: Duration = Duration::from_millis(20);
const PAUSE_MAX: Duration = Duration::from_secs(1);
/// How long a store may stay away before reads of it fail.
const AWAY_MAX: Duration = Duration::from_secs(30);
/// Blocks unpacked at once: more would keep requests waiting.
const UNPACKED_MAX: usize = 32;
/// How often an object may move away while it is being read.
const MOVES_MAX: usize = 8;

/// Why something could not be read.
enum Failure {
    /// The object of this handle is gone.
    Gone(u32),
    Error(VolumeError),
}

impl From<VolumeError> for Failure {
    fn from(error: VolumeError) -> Failure {
        Failure::Error(error)
    }
}

/// For each object that blocks came from, where they were and where they are, in the order of where they were.
pub(crate) type Moves = BTreeMap<Source, Vec<(u32, u32)>>;

pub(crate) struct Reader {
    pub(crate) table: RefCell<Table>,
    pub(crate) chain: Chain,
    pub(crate) domain: Group,
    /// Whoever reads, if it owns the volume.
    pub(crate) owner: [u8; 16],
    opened: RefCell<HashMap<u32, Arc<Opened>>>,
    moves: RefCell<HashMap<u32, Rc<Moves>>>,
    pub(crate) frames: RefCell<FrameReader>,
    /// `None`: pages are read anew each time.
    pub(crate) cache: RefCell<Option<LruCache<Pointer, Rc<Page>>>>,
    /// Pages that are not in the store yet.
    pub(crate) fresh: RefCell<BTreeMap<Pointer, Rc<Page>>>,
    /// Handles of ancestors' objects that were found to have moved, and of where to, since somebody cleared it.
    pub(crate) foreign_moves: RefCell<HashSet<u32>>,
    /// Blocks that a check found to be other than what was written, by handle.
    wrong: RefCell<HashMap<u32, HashSet<u32>>>,
    /// Cloned by whoever follows pointers; replaced when handles are forgotten.
    looking: RefCell<Rc<()>>,
    pub(crate) tally: Rc<Tally>,
}

impl Reader {
    pub(crate) fn new(chain: &Chain, root: &Root, table: Table, pages_max: usize) -> Reader {
        Reader {
            table: RefCell::new(table),
            chain: chain.clone(),
            domain: root.domain,
            owner: root.owner,
            opened: RefCell::default(),
            moves: RefCell::default(),
            frames: RefCell::default(),
            cache: RefCell::new(NonZeroUsize::new(pages_max).map(LruCache::new)),
            fresh: RefCell::default(),
            foreign_moves: RefCell::default(),
            wrong: RefCell::default(),
            looking: RefCell::default(),
            tally: Rc::default(),
        }
    }

    /// Reads blocks: each pointer leads to a block that goes to `out` as block number `index`. Those that lead nowhere are passed
    /// over; those that are hidden cannot be read.
    pub(crate) async fn read(&self, wanted: &[(usize, Pointer)], out: &mut [u8]) -> Result<(), VolumeError> {
        let _looking = self.looking();
        let mut unpacked = 0;
        for stored in self.fetch(wanted).await? {
            for frame in stored.frames() {
                if unpacked >= UNPACKED_MAX {
                    unpacked = 0;
                    give_way().await;
                }
                let blocks = stored.unpack(frame, &mut self.frames.borrow_mut(), out);
                unpacked += blocks.map_err(|damaged| self.damaged_frame(damaged))?;
            }
        }
        Ok(())
    }

    /// The frames that the blocks are in, for somebody who unpacks them elsewhere.
    pub(crate) async fn fetch(&self, wanted: &[(usize, Pointer)]) -> Result<Vec<Stored>, VolumeError> {
        self.wherever_they_are(wanted, async || self.try_fetch(wanted).await).await
    }

    /// A part of an object, of some `len` bytes, with the frame that a block is in, and where the block is.
    pub(crate) async fn fetch_around(&self, pointer: Pointer, len: usize) -> Result<(Location, Stored), VolumeError> {
        let wanted = [(0, pointer)];
        self.wherever_they_are(&wanted, async || {
            let location = self.locate(pointer).await?.ok_or(VolumeError::Moved)?;
            let frame = frame_bytes(location);
            let start = frame.start - frame.start % len;
            let end = frame.end.max(start + len + PAGES_PER_FRAME * BLOCK_LEN);
            Ok((location, self.fetch_part(vec![(0, location)], start..end).await?))
        })
        .await
    }

    /// Reads what blocks are in, wherever these are moved meanwhile.
    async fn wherever_they_are<T>(
        &self,
        wanted: &[(usize, Pointer)],
        mut read: impl AsyncFnMut() -> Result<T, Failure>,
    ) -> Result<T, VolumeError> {
        let _looking = self.looking();
        let mut moves: HashMap<u32, usize> = HashMap::new();
        loop {
            let handle = match read().await {
                Ok(read) => return Ok(read),
                Err(Failure::Error(error)) => return Err(error),
                Err(Failure::Gone(handle)) => handle,
            };
            let times = moves.entry(handle).or_default();
            *times += 1;
            if *times > MOVES_MAX {
                let why = "it is never where it is said to be";
                return Err(VolumeError::ObjectDamaged { object: "a block of the volume".into(), why });
            }
            let found = self.moved_away(handle).await;
            // Somebody may have found out before it was asked for: then nothing that is wanted is there any more.
            if wanted.iter().filter_map(|(_, pointer)| pointer.location()).any(|location| self.leads_to(location, handle)) {
                found?;
            }
        }
    }

    /// Whether the block of a location is in the object of this handle, as far as the table knows.
    fn leads_to(&self, location: Location, handle: u32) -> bool {
        let named = location.segment.get();
        self.forward_of(named).unwrap_or(named) == handle
    }

    /// While the answer lives, no handle that a tree refers to now comes to stand for something else.
    pub(crate) fn looking(&self) -> Rc<()> {
        self.looking.borrow().clone()
    }

    /// Replaced once, it is alone when everyone who looked before is done.
    pub(crate) fn last_look(&self) -> Rc<()> {
        std::mem::take(&mut *self.looking.borrow_mut())
    }

    /// Objects that were just written need no second look.
    pub(crate) fn opened(&self, handle: u32, opened: Opened) {
        self.opened.borrow_mut().insert(handle, Arc::new(opened));
    }

    /// Nothing of what a handle stood for is remembered.
    pub(crate) fn forget(&self, handle: u32) {
        self.opened.borrow_mut().remove(&handle);
        self.moves.borrow_mut().remove(&handle);
        self.wrong.borrow_mut().remove(&handle);
        let is_of = |pointer: &Pointer| pointer.location().is_some_and(|location| location.segment.get() == handle);
        let mut cache = self.cache.borrow_mut();
        let Some(cache) = &mut *cache else { return };
        let gone: Vec<Pointer> = cache.iter().map(|(pointer, _)| *pointer).filter(is_of).collect();
        gone.iter().for_each(|pointer| drop(cache.pop(pointer)));
    }

    /// Where a block is now.
    pub(crate) async fn resolve(&self, location: Location) -> Result<Location, VolumeError> {
        for _ in 0..MOVES_MAX {
            match self.follow(location).await {
                Err(Failure::Gone(handle)) => {
                    let found = self.moved_away(handle).await;
                    if self.leads_to(location, handle) {
                        found?;
                    }
                }
                followed => return followed.map_err(|failure| self.error(failure)),
            }
        }
        Err(VolumeError::Moved)
    }

    /// What a handle's blocks are in now, if it was forwarded.
    pub(crate) fn forward_of(&self, handle: u32) -> Option<u32> {
        match self.table.borrow().get(handle)?.state {
            State::Forwarded(to) => Some(to),
            State::Live | State::Free => None,
        }
    }

    /// What was moved into a handle's object, and from where.
    pub(crate) async fn moves_into(&self, handle: u32) -> Result<Rc<Moves>, VolumeError> {
        self.moves_of(handle).await.map_err(|failure| self.error(failure))
    }

    /// What the header of a handle's object says.
    pub(crate) async fn step_of(&self, handle: u32) -> Result<StepHeader, VolumeError> {
        let source = self.source(handle)?;
        self.header(handle, &source).await.map_err(|failure| self.error(failure))
    }

    /// The hashes of the blocks that a handle's object holds, by where they are in it.
    pub(crate) async fn hashes_of(&self, handle: u32) -> Result<HashMap<u32, BlockHash>, VolumeError> {
        let step = self.step_of(handle).await?;
        Ok(step.stored.iter().map(|(hash, spot)| (spot_bits(*spot), *hash)).collect())
    }

    /// The block there is not what was written, and is not handed out from now on. What reading it comes to.
    pub(crate) fn distrust(&self, location: Location) -> VolumeError {
        let mut wrong = self.wrong.borrow_mut();
        wrong.entry(location.segment.get()).or_default().insert(spot_bits(location.spot));
        self.wrong_block(location)
    }

    /// Whether some block of a handle's object is not what was written.
    pub(crate) fn distrusts(&self, handle: u32) -> bool {
        self.wrong.borrow().contains_key(&handle)
    }

    fn wrong_block(&self, location: Location) -> VolumeError {
        match self.source(location.segment.get()) {
            Ok(source) => VolumeError::ObjectDamaged { object: source.path(), why: "a block of it is not what was written" },
            Err(error) => error,
        }
    }

    fn is_wrong(&self, location: &Location) -> bool {
        self.wrong.borrow().get(&location.segment.get()).is_some_and(|spots| spots.contains(&spot_bits(location.spot)))
    }

    fn source(&self, handle: u32) -> Result<Source, VolumeError> {
        self.table.borrow().source(handle).ok_or(VolumeError::Moved)
    }

    fn error(&self, failure: Failure) -> VolumeError {
        match failure {
            Failure::Error(error) => error,
            Failure::Gone(handle) => {
                let object =
                    self.table.borrow().source(handle).map_or_else(|| format!("handle {handle}"), |source| source.path());
                VolumeError::ObjectDamaged { object, why: "it is missing" }
            }
        }
    }

    async fn try_fetch(&self, wanted: &[(usize, Pointer)]) -> Result<Vec<Stored>, Failure> {
        let mut found = Vec::with_capacity(wanted.len());
        for (index, pointer) in wanted {
            found.extend(self.locate(*pointer).await?.map(|location| (*index, location)));
        }
        let fetches = found.chunk_by(|(_, before), (_, next)| read_together(before, next));
        let fetched = futures_util::future::join_all(fetches.map(|wanted| self.fetch_frames(wanted))).await;
        fetched.into_iter().collect()
    }

    /// Where a block is that can be read. `None`: the pointer leads nowhere.
    async fn locate(&self, pointer: Pointer) -> Result<Option<Location>, Failure> {
        if let Some((page, _)) = pointer.hiding() {
            self.page(page).await?;
            // It can be read again, so what was found there is out of date.
            return Err(VolumeError::Moved.into());
        }
        let Some(named) = pointer.location() else { return Ok(None) };
        let location = self.follow(named).await?;
        if location.segment != named.segment {
            self.tally.forwards.add(1);
        }
        if self.is_wrong(&location) {
            return Err(self.wrong_block(location).into());
        }
        Ok(Some(location))
    }

    /// The bytes of frames that lie one after the other in one object.
    async fn fetch_frames(&self, wanted: &[(usize, Location)]) -> Result<Stored, Failure> {
        let part = frame_bytes(wanted[0].1).start..frame_bytes(wanted[wanted.len() - 1].1).end;
        self.fetch_part(wanted.to_vec(), part).await
    }

    /// A part of the body of the object that the blocks are in.
    async fn fetch_part(&self, wanted: Vec<(usize, Location)>, part: Range<usize>) -> Result<Stored, Failure> {
        let handle = wanted[0].1.segment.get();
        let opened = self.open(handle).await?;
        let source = self.source(handle)?;
        let Range { start, end } = part;
        let bytes = self.fetch_bytes(handle, &source, opened.body_at + start as u64..opened.body_at + end as u64).await?;
        Ok(Stored { wanted, opened, start, end, bytes })
    }

    pub(crate) fn damaged_frame(&self, Damaged(location): Damaged) -> VolumeError {
        match self.source(location.segment.get()) {
            Ok(source) => VolumeError::ObjectDamaged { object: source.path(), why: "a frame of it is damaged" },
            Err(error) => error,
        }
    }

    async fn follow(&self, location: Location) -> Result<Location, Failure> {
        let handle = location.segment.get();
        let Some(to) = self.forward_of(handle) else { return Ok(location) };
        let source = self.source(handle)?;
        let moves = self.moves_of(to).await?;
        let of_source = moves.get(&source).map_or(&[][..], Vec::as_slice);
        let missing =
            || VolumeError::ObjectDamaged { object: source.path(), why: "a block of it was not kept when it was rewritten" };
        let at = of_source.binary_search_by_key(&spot_bits(location.spot), |(from, _)| *from).map_err(|_| missing())?;
        let segment = SegmentHandle::new(to).ok_or_else(missing)?;
        Ok(Location { segment, spot: spot_of(of_source[at].1) })
    }

    async fn moves_of(&self, handle: u32) -> Result<Rc<Moves>, Failure> {
        if let Some(moves) = self.moves.borrow().get(&handle) {
            return Ok(moves.clone());
        }
        let source = self.source(handle)?;
        let header = self.header(handle, &source).await?;
        let mut moves = Moves::new();
        for moved in &header.moved {
            let from = header.sources.get(moved.source as usize).copied();
            let from =
                from.ok_or_else(|| VolumeError::ObjectDamaged { object: source.path(), why: "its sources are missing" })?;
            moves.entry(from).or_default().push((spot_bits(moved.from), spot_bits(moved.to)));
        }
        moves.values_mut().for_each(|moves| moves.sort_unstable());
        let moves = Rc::new(moves);
        self.moves.borrow_mut().insert(handle, moves.clone());
        Ok(moves)
    }

    async fn header(&self, handle: u32, source: &Source) -> Result<StepHeader, Failure> {
        let clear = self.fetch_bytes(handle, source, 0..CLEAR_LEN as u64).await?;
        let damaged = |why| VolumeError::ObjectDamaged { object: source.path(), why };
        let len = object::header_len(&clear).ok_or_else(|| damaged("it is no object of a volume"))?;
        let bytes = self.fetch_bytes(handle, source, 0..len as u64).await?;
        let Object::Sealed { inner, .. } = object::open(&bytes, &self.chain.secrets.sealer(self.domain), source)? else {
            return Err(damaged("it is a seal").into());
        };
        Ok(StepHeader::decode(&inner).ok_or_else(|| damaged("its tables contradict each other"))?)
    }

    /// What a header in clear says may be wrong: until something was read by it, it is read anew each time.
    async fn open(&self, handle: u32) -> Result<Arc<Opened>, Failure> {
        if let Some(opened) = self.opened.borrow().get(&handle).filter(|opened| opened.is_proven()) {
            return Ok(opened.clone());
        }
        let source = self.source(handle)?;
        let clear = self.fetch_bytes(handle, &source, 0..CLEAR_LEN as u64).await?;
        let opened = Arc::new(object::open_body(&clear, &self.chain.secrets.sealer(self.domain), &source)?);
        self.opened.borrow_mut().insert(handle, opened.clone());
        Ok(opened)
    }

    async fn fetch_bytes(&self, handle: u32, source: &Source, range: Range<u64>) -> Result<Bytes, Failure> {
        let path = source.path();
        let until = self.chain.environment.now() + AWAY_MAX;
        let mut pause = PAUSE_FIRST;
        loop {
            match self.chain.store.read(&path, range.clone()).await {
                Ok(bytes) => return Ok(bytes),
                Err(StoreError::Absent(_)) => return Err(Failure::Gone(handle)),
                Err(StoreError::Unknown(_)) if self.chain.environment.now() < until => self.chain.environment.sleep(pause).await,
                Err(error) => return Err(VolumeError::from(error).into()),
            }
            pause = (pause * 2).min(PAUSE_MAX);
        }
    }
}
