//! The reduction of one destage batch, from blocks to a body that only needs its seal.
//!
//! ```text
//!   hash_blocks         zeroes · hashes · repeats within the batch             (bytes compared, so a collision stores twice)
//!     │ Hashes: borrows nothing, so it may wait while the index is asked
//!     │ distinct() ─▶ Index::lookup, loads by the caller ─▶ Candidates
//!   Batch::with         the hashes and their blocks again
//!   Batch::accept       what is worth it                                        Hits
//!   Batch::verify       optional: read back and compare                         Hits that are certain
//!   Packer::pack        what is left goes into frames, in the order of addresses, until the body is full
//!     ▼
//!   Packed { taken, places, stored, hits } and a Body ─▶ Sealer::seal
//! ```
//!
//! - Every block that is taken gets exactly one [`Place`], in the order of the batch.
//! - What does not fit is not begun: `taken` is how many blocks, from the first, are in this body. The rest goes into the next batch.
//! - A repeat refers to what became of the first of its content: a block of this body, or a hit.

use crate::accept::accept;
use crate::body::Body;
use crate::frame::{Compressor, Packing};
use crate::hash::{BlockHash, Hasher, is_zero};
use crate::index::{BlockRecord, Candidates};
use crate::location::{FRAME_BLOCKS_MAX, Location, SegmentHandle, Spot};
use crate::{BLOCK_LEN, Block};
use hashbrown::HashTable;

/// What became of a block.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Place {
    /// It is all zeroes, and stored nowhere.
    Zero,
    /// It is in this body: block `block` of frame number `frame`, counted from 0 in the order of [`Body::frames`].
    New { frame: u32, block: u8 },
    /// It is stored already.
    Hit(Location),
}

/// What a block is, as far as the batch itself can tell.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Kind {
    Zero,
    /// The first of its content: which of the distinct blocks it is.
    Distinct(u32),
    /// The same as this distinct block.
    Repeat(u32),
}

impl Kind {
    fn distinct(self) -> Option<usize> {
        match self {
            Self::Zero => None,
            Self::Distinct(number) | Self::Repeat(number) => Some(number as usize),
        }
    }
}

/// What the blocks of a batch are, without their bytes.
pub struct Hashes {
    kinds: Vec<Kind>,
    distinct: Vec<BlockHash>,
}

/// Hashes the blocks of a batch.
pub fn hash_blocks<'a>(hasher: &Hasher, blocks: impl IntoIterator<Item = &'a Block>) -> Hashes {
    hash_blocks_by(|block| hasher.hash(block), blocks)
}

fn hash_blocks_by<'a>(hash: impl Fn(&Block) -> BlockHash, blocks: impl IntoIterator<Item = &'a Block>) -> Hashes {
    let (mut kinds, mut distinct, mut firsts) = (Vec::new(), Vec::<BlockHash>::new(), Vec::<&Block>::new());
    let mut known: HashTable<u32> = HashTable::new();
    for block in blocks {
        if is_zero(block) {
            kinds.push(Kind::Zero);
            continue;
        }
        let hash = hash(block);
        let same = |number: &u32| distinct[*number as usize] == hash && firsts[*number as usize] == block;
        if let Some(number) = known.find(hash.word(), same) {
            kinds.push(Kind::Repeat(*number));
            continue;
        }
        let number = distinct.len() as u32;
        known.insert_unique(hash.word(), number, |number| distinct[*number as usize].word());
        distinct.push(hash);
        firsts.push(block);
        kinds.push(Kind::Distinct(number));
    }
    Hashes { kinds, distinct }
}

impl Hashes {
    /// The hashes of the distinct blocks, for the index.
    #[must_use]
    pub fn distinct(&self) -> &[BlockHash] {
        &self.distinct
    }
}

/// The blocks of a batch, hashed.
pub struct Batch<'a> {
    addresses: Vec<u64>,
    blocks: Vec<&'a Block>,
    hashes: Hashes,
}

/// For each block of a batch, the duplicate it refers to.
pub struct Hits(Vec<Option<Location>>);

impl Hits {
    /// What block number `index` of the batch refers to.
    ///
    /// # Panics
    /// If the batch has no such block.
    #[must_use]
    pub fn get(&self, index: usize) -> Option<Location> {
        self.0[index]
    }

    /// How many blocks refer to one.
    #[must_use]
    pub fn count(&self) -> usize {
        self.0.iter().flatten().count()
    }
}

/// What reading back found.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Verified {
    /// Hits whose stored bytes are the block's.
    pub equal: usize,
    /// Hits whose stored bytes differ: a collision, or rot that the seal did not show.
    pub different: usize,
    /// Hits that could not be read.
    pub unread: usize,
}

impl<'a> Batch<'a> {
    /// The blocks that were hashed, in the same order, with their numbers in the volume, ascending.
    ///
    /// # Panics
    /// If there are more or fewer blocks than hashes. That the hashes are theirs is for the caller to see to.
    pub fn with(hashes: Hashes, blocks: impl IntoIterator<Item = (u64, &'a Block)>) -> Self {
        let (addresses, blocks): (Vec<_>, Vec<_>) = blocks.into_iter().unzip();
        assert_eq!(blocks.len(), hashes.kinds.len(), "hashes of another batch");
        Self { addresses, blocks, hashes }
    }

    /// Blocks in the batch.
    #[must_use]
    pub fn len(&self) -> usize {
        self.blocks.len()
    }

    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.blocks.is_empty()
    }

    /// Chooses which duplicates to refer to: see [`crate::accept`]. `found` is what the index has for [`Hashes::distinct`].
    ///
    /// # Panics
    /// If `found` belongs to other hashes than these.
    pub fn accept(&self, found: &Candidates, extent_cost: u32, in_ancestry: impl Fn(SegmentHandle) -> bool) -> Hits {
        assert_eq!(found.len(), self.hashes.distinct.len(), "candidates of another batch");
        let candidates = |index: usize| self.hashes.kinds[index].distinct().map_or(&[][..], |number| found.of(number));
        Hits(accept(&self.addresses, candidates, extent_cost, in_ancestry))
    }

    /// No duplicates but those within the batch: where deduplication is off.
    #[must_use]
    pub fn without_hits(&self) -> Hits {
        Hits(vec![None; self.len()])
    }

    /// Compares each hit with what is stored, which `read` gets. Those that differ or cannot be read are hits no longer.
    pub fn verify<E>(&self, hits: &mut Hits, mut read: impl FnMut(Location, &mut Block) -> Result<(), E>) -> Verified {
        let mut verified = Verified::default();
        let mut stored = [0; BLOCK_LEN];
        for (hit, block) in hits.0.iter_mut().zip(&self.blocks) {
            let Some(location) = *hit else { continue };
            let outcome = match read(location, &mut stored) {
                Ok(()) if stored == **block => {
                    verified.equal += 1;
                    continue;
                }
                Ok(()) => &mut verified.different,
                Err(_) => &mut verified.unread,
            };
            *outcome += 1;
            *hit = None;
        }
        verified
    }
}

/// A batch, or as much of it as fitted.
#[derive(Default, Debug)]
pub struct Packed {
    /// How many blocks, from the first of the batch.
    pub taken: usize,
    /// Of each of them, what became of it.
    pub places: Vec<Place>,
    /// Of each block in the body, in the body's order, its hash and where it is.
    pub stored: Vec<(BlockHash, Spot)>,
    /// Of each content that is elsewhere, its hash and where it is. The header keeps these too: see [`crate::index`].
    pub hits: Vec<BlockRecord>,
}

impl Packed {
    /// What the header of the segment with this handle tells the index: for [`crate::index::Index::hook`].
    #[must_use]
    pub fn records(&self, segment: SegmentHandle) -> Vec<BlockRecord> {
        let own = self.stored.iter().map(|(hash, spot)| BlockRecord { hash: *hash, location: Location { segment, spot: *spot } });
        own.chain(self.hits.iter().copied()).collect()
    }
}

/// Packs batches into bodies. Keep it: it keeps its compression contexts.
#[derive(Default)]
pub struct Packer {
    compressor: Compressor,
}

impl Packer {
    /// Adds to `body` what is neither zero nor a hit.
    ///
    /// # Panics
    /// If `hits` belong to another batch, or frames are to have no or more than 16 blocks.
    pub fn pack(&mut self, batch: &Batch<'_>, hits: &Hits, packing: Packing, body: &mut Body) -> Packed {
        assert_eq!(hits.0.len(), batch.len(), "hits of another batch");
        assert!((1..=FRAME_BLOCKS_MAX).contains(&packing.frame_blocks), "frames of {} blocks", packing.frame_blocks);
        let mut filling = Filling {
            compressor: &mut self.compressor,
            packing,
            body,
            frame: Vec::with_capacity(packing.frame_blocks),
            packed: Packed::default(),
        };
        // Where the content of each distinct block is, once it is anywhere.
        let mut content: Vec<Option<Place>> = vec![None; batch.hashes.distinct.len()];
        for (index, kind) in batch.hashes.kinds.iter().enumerate() {
            let place = match (kind.distinct(), hits.0[index]) {
                (None, _) => Place::Zero,
                (Some(number), Some(hit)) => {
                    if !matches!(content[number], Some(Place::Hit(_))) {
                        filling.packed.hits.push(BlockRecord { hash: batch.hashes.distinct[number], location: hit });
                    }
                    *content[number].insert(Place::Hit(hit))
                }
                (Some(number), None) => match content[number] {
                    Some(place) => place,
                    None => match filling.add(batch.blocks[index], batch.hashes.distinct[number]) {
                        Some(place) => *content[number].insert(place),
                        None => break,
                    },
                },
            };
            filling.packed.places.push(place);
        }
        filling.close_frame();
        filling.packed.taken = filling.packed.places.len();
        filling.packed
    }
}

/// A body while it is filled.
struct Filling<'a, 'b> {
    compressor: &'a mut Compressor,
    packing: Packing,
    body: &'a mut Body,
    frame: Vec<(&'b Block, BlockHash)>,
    packed: Packed,
}

impl<'b> Filling<'_, 'b> {
    /// Adds a block to the frame being collected. `None` if the body has no room for another frame.
    fn add(&mut self, block: &'b Block, hash: BlockHash) -> Option<Place> {
        if self.frame.is_empty() && !self.body.fits(self.packing.frame_blocks) {
            return None;
        }
        let place = Place::New { frame: self.body.frames().len() as u32, block: self.frame.len() as u8 };
        self.frame.push((block, hash));
        if self.frame.len() == self.packing.frame_blocks {
            self.close_frame();
        }
        Some(place)
    }

    fn close_frame(&mut self) {
        if self.frame.is_empty() {
            return;
        }
        let mut blocks = [self.frame[0].0; FRAME_BLOCKS_MAX];
        blocks.iter_mut().zip(&self.frame).for_each(|(slot, (block, _))| *slot = block);
        let record = self.body.push(self.compressor, &blocks[..self.frame.len()], self.packing.compression);
        // There was room when the frame was begun, and a spot for every unit and block that a body can have.
        let spots = (0..).map(|block| record.and_then(|record| record.spot(block)));
        for ((_, hash), spot) in self.frame.drain(..).zip(spots) {
            self.packed.stored.push((hash, spot.expect("a frame that was begun fits")));
        }
    }
}

#[cfg(test)]
mod tests;
