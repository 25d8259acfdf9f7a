//! Copying what is in use of victims into new objects.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::rc::Rc;

use dedup::body::{BODY_LEN_MAX, Body};
use dedup::frame::{Allowed, Packing, choose};
use dedup::hash::BlockHash;
use dedup::location::{Location, SegmentHandle, Spot};
use dedup::{BLOCK_LEN, Block};
use futures_util::future::try_join_all;

use crate::checkpoint::pack;
use crate::core::Core;
use crate::environment::offload;
use crate::error::VolumeError;
use crate::gather::pointers::Pointers;
use crate::map::{Pointer, spot_bits, spot_of};
use crate::names::{Family, Source};
use crate::object::{Kind, Opened};
use crate::reader::Moves;
use crate::step_header::{Moved, StepHeader};
use crate::stored::{Damaged, Stored, with_frames};
use crate::table::Content;

/// Blocks of one object.
const BLOCKS_MAX: usize = 8192;
/// Blocks read at once.
const READ_BLOCKS: usize = 256;

/// A new object with what is in use of its victims. It is in the store, and in no table.
pub(super) struct Written {
    pub(super) source: Source,
    pub(super) content: Content,
    pub(super) blocks: u32,
    pub(super) bytes: u32,
    pub(super) opened: Opened,
    pub(super) header: StepHeader,
    pub(super) victims: Vec<u32>,
}

/// Unpacks blocks and packs them again into a body. Takes long. The answer is where they are in it.
fn repack(mut body: Body, parts: &[Vec<Stored>], packing: Packing) -> (Body, Result<Vec<Spot>, Damaged>) {
    let (mut places, mut content) = (Vec::new(), Vec::new());
    for part in parts {
        content.resize(part.iter().map(|stored| stored.wanted.len()).sum::<usize>() * BLOCK_LEN, 0);
        let unpacked = with_frames(|frames| {
            let mut in_frames = part.iter().flat_map(|stored| stored.frames().map(move |frame| (stored, frame)));
            in_frames.try_for_each(|(stored, frame)| stored.unpack(frame, frames, &mut content).map(drop))
        });
        if let Err(damaged) = unpacked {
            return (body, Err(damaged));
        }
        let blocks: Vec<&Block> = content.as_chunks::<BLOCK_LEN>().0.iter().collect();
        let spots;
        (body, spots) = pack(body, &blocks, packing);
        places.extend(spots);
    }
    (body, Ok(places))
}

/// What is in use of a victim, as it was read.
pub(super) struct Read {
    pub(super) handle: u32,
    spots: BTreeSet<u32>,
    parts: Vec<Vec<Stored>>,
    hashes: HashMap<u32, BlockHash>,
    moves: Rc<Moves>,
}

impl Core {
    /// Reads the blocks of a victim that pointers lead to.
    pub(super) async fn read_victim(&self, handle: u32, pointers: &Pointers, content: Content) -> Result<Read, VolumeError> {
        let reader = &self.reader;
        let spots = self.spots(handle, pointers).await?;
        let segment = SegmentHandle::new(handle).expect("a handle of the table");
        let pointers: Vec<Pointer> = spots.iter().map(|bits| Pointer::to(Location { segment, spot: spot_of(*bits) })).collect();
        let reading = pointers.chunks(READ_BLOCKS).map(async |part| {
            let wanted: Vec<(usize, Pointer)> = part.iter().copied().enumerate().collect();
            self.patiently(async || reader.fetch(&wanted).await).await
        });
        let parts = try_join_all(reading).await?;
        // After the blocks: reading those finds out where an ancestor has moved them.
        let hashes = match content {
            Content::Data => self.patiently(async || reader.hashes_of(handle).await).await?,
            Content::Pages => HashMap::new(),
        };
        let moves = self.patiently(async || reader.moves_into(handle).await).await?;
        Ok(Read { handle, spots, parts, hashes, moves })
    }

    /// Where in a victim the blocks are that pointers lead to.
    async fn spots(&self, victim: u32, pointers: &Pointers) -> Result<BTreeSet<u32>, VolumeError> {
        let mut spots = BTreeSet::new();
        for named in pointers.locations() {
            let Location { segment, spot } = match named.segment.get() == victim {
                true => named,
                false => self.patiently(async || self.reader.resolve(named).await).await?,
            };
            // Else an ancestor has moved the block on.
            if segment.get() == victim {
                spots.insert(spot_bits(spot));
            }
        }
        Ok(spots)
    }
}

/// An object that blocks are gathered in.
pub(super) struct Gathering<'a> {
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
    pub(super) fn new(core: &'a Core, content: Content) -> Gathering<'a> {
        let (body, header) = (Body::new(BODY_LEN_MAX), StepHeader::default());
        Gathering { core, content, body, blocks: 0, header, victims: Vec::new(), written: Vec::new() }
    }

    /// Copies blocks of a victim. Nothing is added if one of them is damaged.
    pub(super) async fn add(&mut self, victim: Read) -> Result<usize, VolumeError> {
        let Read { handle, spots, parts, hashes, moves } = victim;
        if self.blocks + spots.len() > BLOCKS_MAX {
            self.store().await?;
        }
        let packing = match self.content {
            Content::Data => choose(self.core.settings.compression, self.core.log.fill() as f32, None),
            Content::Pages => choose(Allowed::Auto, 0.0, None),
        };
        let body = std::mem::replace(&mut self.body, Body::new(0));
        let packed = offload(&*self.core.chain.environment, move || repack(body, &parts, packing)).await;
        let (body, places) = packed.ok_or(VolumeError::Panicked)?;
        self.body = body;
        let places = match places {
            Ok(places) => places,
            Err(damaged) => {
                // Of this victim, some may be in the body already.
                self.store().await?;
                return Err(self.core.reader.damaged_frame(damaged));
            }
        };
        if places.len() != spots.len() {
            return Err(VolumeError::ObjectDamaged { object: "an object being gathered".into(), why: "its blocks do not fit" });
        }
        self.note(handle, &spots, (&places, &hashes, &moves));
        Ok(spots.len())
    }

    /// Notes in the header what came from where: from the victim, and from those that were forwarded to it.
    fn note(&mut self, handle: u32, spots: &BTreeSet<u32>, (places, hashes, moves): (&[Spot], &HashMap<u32, BlockHash>, &Moves)) {
        let now: BTreeMap<u32, Spot> = spots.iter().copied().zip(places.iter().copied()).collect();
        let Some(source) = self.core.reader.table.borrow().source(handle) else { return };
        self.push_moves(source, now.iter().map(|(from, to)| (*from, *to)));
        for (origin, moves) in moves {
            if self.core.reader.table.borrow().handle_of(origin).is_some() {
                self.push_moves(*origin, moves.iter().filter_map(|(from, at)| Some((*from, *now.get(at)?))));
            }
        }
        let stored = now.iter().filter_map(|(from, to)| Some((*hashes.get(from)?, *to)));
        self.header.stored.extend(stored);
        self.blocks += spots.len();
        self.victims.push(handle);
    }

    fn push_moves(&mut self, source: Source, moves: impl Iterator<Item = (u32, Spot)>) {
        let number = self.header.sources.len() as u32;
        self.header.sources.push(source);
        self.header.moved.extend(moves.map(|(from, to)| Moved { source: number, from: spot_of(from), to }));
    }

    /// Everything that was copied is in these objects.
    pub(super) async fn finish(mut self) -> Result<Vec<Written>, VolumeError> {
        self.store().await?;
        Ok(self.written)
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
        let (bytes, opened) = core.store_object(source, Kind::Step, header.encode(), body).await?;
        self.written.push(Written { source, content, blocks: blocks as u32, bytes, opened, header, victims });
        Ok(())
    }
}
