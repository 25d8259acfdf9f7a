//! From the bytes of a step to a sealed segment, in two parts for threads of their own.
//!
//! ```text
//!   Ingredients ─▶ hash_step ─▶ Hashed ─▶ distinct hashes ─▶ the engine asks the index, loads headers ─▶ Duplicates
//!   (runs, bytes)                 └────────────────────────────────────┬───────────────────────────────────┘
//!                                                                make_segment: hits chosen, the rest in frames ─▶ StepHeader ─▶ sealed
//! ```
//!
//! - A hit is a duplicate whose handle the engine knows when it hands the duplicates over. Until the segment is published, it must keep
//!   the objects behind those handles.
//! - The header names the objects of its hits by what lasts, in the order of their first use.

use std::cell::RefCell;
use std::collections::HashMap;
use std::ops::Range;

use bytes::Bytes;
use dedup::accept::EXTENT_COST;
use dedup::body::{BODY_LEN_MAX, Body};
use dedup::frame::Packing;
use dedup::hash::{BlockHash, Domain, DomainKind, Hasher};
use dedup::index::Candidates;
use dedup::location::{Location, SegmentHandle};
use dedup::pack::{Batch, Hashes, Packed, Packer, Place as Outcome, hash_blocks};
use dedup::seal::Sealer;
use dedup::{BLOCK_LEN, Block};
use zeroize::Zeroize;

use crate::error::VolumeError;
use crate::names::{Group, Source};
use crate::segment::{self, Place, Sealed};
use crate::step_header::{Extent, ExtentKind, HitRecord, SOURCES_MAX, StepHeader};

/// The keys of a volume, wiped when dropped.
#[derive(Clone)]
pub struct Secrets {
    /// Names blocks and checks what is not encrypted.
    pub pool_key: [u8; 32],
    /// Encrypts segments and the log, if there is one.
    pub data_key: Option<[u8; 32]>,
}

impl Drop for Secrets {
    fn drop(&mut self) {
        self.pool_key.zeroize();
        self.data_key.zeroize();
    }
}

impl Secrets {
    pub(crate) fn sealer(&self, group: Group) -> Sealer {
        match &self.data_key {
            Some(data_key) => Sealer::encrypting(domain(group), data_key),
            None => Sealer::checksumming(domain(group), &self.pool_key),
        }
    }

    pub(crate) fn hasher(&self, group: Group) -> Hasher {
        Hasher::new(&self.pool_key, domain(group))
    }
}

fn domain(group: Group) -> Domain {
    Domain::new(DomainKind::Volume, &group)
}

/// What a run of blocks of a step becomes.
pub(crate) enum RunContent {
    /// Whole blocks.
    Data(Bytes),
    Zero,
    Discarded,
}

/// All that makes a segment. It travels between threads.
pub(crate) struct Ingredients {
    pub(crate) group: Group,
    pub(crate) domain: Group,
    pub(crate) place: Place,
    pub(crate) secrets: Secrets,
    pub(crate) packing: Packing,
    pub(crate) random: [u8; 32],
    /// Nonce, log id and end of the log; the rest is found out here.
    pub(crate) step: StepHeader,
    /// In order, without overlaps.
    pub(crate) runs: Vec<(Range<u64>, RunContent)>,
}

/// A step whose blocks are hashed.
pub(crate) struct Hashed {
    ingredients: Ingredients,
    hashes: Hashes,
}

impl Hashed {
    /// The hashes of its distinct blocks, for the index.
    pub(crate) fn distinct(&self) -> &[BlockHash] {
        self.hashes.distinct()
    }
}

/// An object in which duplicates may be.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Target {
    pub(crate) source: Source,
}

/// What the index found for a step.
pub(crate) struct Duplicates {
    /// Those of [`Hashed::distinct`].
    pub(crate) candidates: Candidates,
    /// What their handles stand for. Candidates whose handle is missing are not used.
    pub(crate) targets: HashMap<SegmentHandle, Target>,
}

thread_local! {
    /// Its contexts are dear to make.
    static PACKER: RefCell<Packer> = RefCell::default();
}

/// Hashes the blocks of a step. Takes long.
pub(crate) fn hash_step(ingredients: Ingredients) -> Hashed {
    let hasher = ingredients.secrets.hasher(ingredients.domain);
    let hashes = hash_blocks(&hasher, data_blocks(&ingredients.runs).map(|(_, block)| block));
    Hashed { ingredients, hashes }
}

/// Makes the segment. Takes long. Without `duplicates`, everything is stored that is not a repeat within the step.
pub(crate) fn make_segment(hashed: Hashed, duplicates: Option<Duplicates>) -> Result<Sealed, VolumeError> {
    let Hashed { ingredients, hashes } = hashed;
    let Ingredients { group, domain, place, secrets, packing, random, step, runs } = ingredients;
    let batch = Batch::with(hashes, data_blocks(&runs));
    let (hits, targets) = match duplicates {
        None => (batch.without_hits(), HashMap::new()),
        Some(Duplicates { mut candidates, targets }) => {
            candidates.retain(|segment| targets.contains_key(&segment));
            (batch.accept(&candidates, EXTENT_COST, |_| false), targets)
        }
    };
    let mut body = Body::new(BODY_LEN_MAX);
    let packed = PACKER.with_borrow_mut(|packer| packer.pack(&batch, &hits, packing, &mut body));
    if packed.taken != batch.len() {
        return Err(damaged("its blocks do not fit"));
    }
    let step = Filling { step, body: &body, targets: &targets, numbers: HashMap::new() }.fill(&runs, packed)?;
    segment::seal(&secrets.sealer(domain), place.of(group), &random, step, body).map_err(|_| damaged("it could not be sealed"))
}

fn damaged(why: &'static str) -> VolumeError {
    VolumeError::ObjectDamaged { object: "a segment that is being made".to_owned(), why }
}

/// A header while it is filled.
struct Filling<'a> {
    step: StepHeader,
    body: &'a Body,
    targets: &'a HashMap<SegmentHandle, Target>,
    /// The sources of the header so far.
    numbers: HashMap<SegmentHandle, u32>,
}

impl Filling<'_> {
    fn fill(mut self, runs: &[(Range<u64>, RunContent)], packed: Packed) -> Result<StepHeader, VolumeError> {
        let mut outcomes = packed.places.into_iter();
        for (range, content) in runs {
            match content {
                RunContent::Data(_) => {
                    range.clone().zip(outcomes.by_ref()).try_for_each(|(block, outcome)| self.add_block(block, outcome))?
                }
                RunContent::Zero => push_in_parts(&mut self.step.extents, range.clone(), ExtentKind::Zero),
                RunContent::Discarded => push_in_parts(&mut self.step.extents, range.clone(), ExtentKind::Discarded),
            }
        }
        for hit in packed.hits {
            let source = self.source(hit.location)?;
            self.step.hits.push(HitRecord { hash: hit.hash, source, spot: hit.location.spot });
        }
        self.step.stored = packed.stored;
        Ok(self.step)
    }

    fn add_block(&mut self, block: u64, outcome: Outcome) -> Result<(), VolumeError> {
        let (kind, spot) = match outcome {
            Outcome::Zero => (ExtentKind::Zero, None),
            Outcome::New { frame, block } => {
                let spot = self.body.frames()[frame as usize].spot(block).ok_or(damaged("a block has no place"))?;
                (ExtentKind::Data, Some(spot))
            }
            Outcome::Hit(location) => (ExtentKind::Hit { source: self.source(location)? }, Some(location.spot)),
        };
        push_block(&mut self.step.extents, block, kind);
        self.step.spots.extend(spot);
        Ok(())
    }

    /// The number of the object that a hit is in.
    fn source(&mut self, hit: Location) -> Result<u32, VolumeError> {
        if let Some(number) = self.numbers.get(&hit.segment) {
            return Ok(*number);
        }
        let target = self.targets.get(&hit.segment).ok_or(damaged("a hit is in an object without a name"))?;
        let number = self.step.sources.len();
        if number == SOURCES_MAX {
            return Err(damaged("its hits are in too many objects"));
        }
        self.step.sources.push(target.source);
        self.numbers.insert(hit.segment, number as u32);
        Ok(number as u32)
    }
}

fn data_blocks(runs: &[(Range<u64>, RunContent)]) -> impl Iterator<Item = (u64, &Block)> {
    runs.iter().flat_map(|(range, content)| {
        let bytes = match content {
            RunContent::Data(bytes) => &bytes[..],
            RunContent::Zero | RunContent::Discarded => &[],
        };
        range.clone().zip(bytes.as_chunks::<BLOCK_LEN>().0)
    })
}

/// Adds one block to the last extent, or begins another.
fn push_block(extents: &mut Vec<Extent>, block: u64, kind: ExtentKind) {
    match extents.last_mut() {
        Some(last) if last.kind == kind && last.first + u64::from(last.blocks) == block && last.blocks < u32::MAX => {
            last.blocks += 1
        }
        _ => extents.push(Extent { first: block, blocks: 1, kind }),
    }
}

/// A run without data may be longer than one extent can say.
fn push_in_parts(extents: &mut Vec<Extent>, range: Range<u64>, kind: ExtentKind) {
    let mut first = range.start;
    while first < range.end {
        let blocks = (range.end - first).min(u32::MAX.into()) as u32;
        extents.push(Extent { first, blocks, kind });
        first += u64::from(blocks);
    }
}

#[cfg(test)]
mod tests;
