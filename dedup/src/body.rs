//! The body of a segment: frames one after the other, each with room for its seal.
//!
//! ```text
//!   body:   frame │ frame │ …                    each begins at a multiple of 64 bytes, its unit × 64
//!   frame:  prefix 4 │ packed bytes 1 … 65,536 │ tag 16 │ zeroes to the next multiple of 64
//!   prefix: codec u8 │ blocks u8 │ packed length - 1, u16        in clear, under the seal
//! ```
//!
//! - A frame's number, which its seal is bound to, is its unit: whoever knows a block's location needs no table to check the frame found
//!   there, and a frame moved elsewhere fails.
//! - The prefix says what a reader needs besides the location, so that a block is read with one request and without the segment's header.
//! - Until the body is sealed its tags are zero; afterwards it does not change.

use crate::frame::{Codec, Compression, Compressor, Decompressor, FrameError, joined_len};
use crate::location::{FRAME_BLOCKS_MAX, LengthClass, Spot, UNIT_LEN, UNITS_MAX};
use crate::seal::{Opener, SealError};
use crate::{BLOCK_LEN, Block};

pub(crate) const PREFIX_LEN: usize = 4;
pub(crate) const TAG_LEN: usize = 16;
/// The longest body, in bytes: what units can number. A segment's limit of 32 MiB leaves half of it unused.
pub const BODY_LEN_MAX: usize = UNITS_MAX as usize * UNIT_LEN;

/// What a segment's header says of a frame.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct FrameRecord {
    /// Offset in the body, in units of 64 bytes; also the number the seal is bound to.
    pub unit: u32,
    /// Bytes stored: prefix, packed bytes and tag, without the zeroes after them.
    pub len: u32,
    pub codec: Codec,
    /// 1 to 16.
    pub blocks: u8,
}

impl FrameRecord {
    /// Where block `block` of this frame is; `None` if there is no such block or the record cannot be of a frame.
    #[must_use]
    pub fn spot(&self, block: u8) -> Option<Spot> {
        let class = LengthClass::of(self.len as usize);
        (block < self.blocks).then(|| Spot::new(self.unit, block, class)).flatten()
    }
}

/// The first bytes of a stored frame.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct FramePrefix {
    pub codec: Codec,
    /// 1 to 16.
    pub blocks: u8,
    /// Bytes, 1 to 65,536.
    pub packed_len: u32,
}

impl FramePrefix {
    pub(crate) fn to_bytes(self) -> [u8; PREFIX_LEN] {
        let [low, high, ..] = (self.packed_len - 1).to_le_bytes();
        [self.codec as u8, self.blocks, low, high]
    }

    /// # Errors
    /// If no frame begins like this.
    pub(crate) fn parse(bytes: [u8; PREFIX_LEN]) -> Result<Self, SealError> {
        let [codec, blocks, low, high] = bytes;
        let packed_len = u32::from(u16::from_le_bytes([low, high])) + 1;
        let codec = Codec::from_id(codec).ok_or(SealError::UnknownCodec(codec))?;
        let frame_len = joined_len(usize::from(blocks));
        if blocks == 0 || usize::from(blocks) > FRAME_BLOCKS_MAX || packed_len as usize > frame_len {
            return Err(SealError::Malformed("a frame's prefix contradicts itself"));
        }
        Ok(Self { codec, blocks, packed_len })
    }

    pub(crate) fn stored_len(self) -> usize {
        PREFIX_LEN + self.packed_len as usize + TAG_LEN
    }
}

/// A body being filled.
pub struct Body {
    pub(crate) bytes: Vec<u8>,
    frames: Vec<FrameRecord>,
    len_max: usize,
}

impl Body {
    /// An empty body of at most `len_max` bytes, itself at most [`BODY_LEN_MAX`].
    #[must_use]
    pub fn new(len_max: usize) -> Self {
        Self { bytes: Vec::new(), frames: Vec::new(), len_max: len_max.min(BODY_LEN_MAX) }
    }

    /// Whether a frame of this many blocks fits, however badly it compresses.
    #[must_use]
    pub fn fits(&self, blocks: usize) -> bool {
        let longest = (PREFIX_LEN + joined_len(blocks) + TAG_LEN).next_multiple_of(UNIT_LEN);
        self.bytes.len() + longest <= self.len_max
    }

    /// Adds a frame of these blocks. `None`, and nothing added, if it does not [fit](Self::fits).
    ///
    /// # Panics
    /// If there is no block or more than 16.
    pub fn push(&mut self, compressor: &mut Compressor, blocks: &[&Block], compression: Compression) -> Option<FrameRecord> {
        if !self.fits(blocks.len()) {
            return None;
        }
        let start = self.bytes.len();
        self.bytes.extend_from_slice(&[0; PREFIX_LEN]);
        let codec = compressor.pack(blocks, compression, &mut self.bytes);
        let packed_len = (self.bytes.len() - start - PREFIX_LEN) as u32;
        let prefix = FramePrefix { codec, blocks: blocks.len() as u8, packed_len };
        self.bytes[start..start + PREFIX_LEN].copy_from_slice(&prefix.to_bytes());
        let stored_len = prefix.stored_len();
        self.bytes.resize((start + stored_len).next_multiple_of(UNIT_LEN), 0);
        let unit = (start / UNIT_LEN) as u32;
        let record = FrameRecord { unit, len: stored_len as u32, codec, blocks: prefix.blocks };
        self.frames.push(record);
        Some(record)
    }

    /// The frames added so far, in the order of their units.
    #[must_use]
    pub fn frames(&self) -> &[FrameRecord] {
        &self.frames
    }

    /// Bytes so far, a multiple of 64.
    #[must_use]
    pub fn len(&self) -> usize {
        self.bytes.len()
    }

    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.bytes.is_empty()
    }

    /// The bytes for sealing: each frame's number, its prefix and packed bytes, and its tag.
    pub(crate) fn sealable(&mut self) -> impl Iterator<Item = (u32, [u8; PREFIX_LEN], &mut [u8], &mut [u8])> {
        let starts = self.frames.iter().map(|frame| frame.unit as usize * UNIT_LEN);
        let ends = starts.clone().skip(1).chain([self.bytes.len()]);
        let spans: Vec<_> = starts.zip(ends).map(|(start, end)| end - start).collect();
        let mut rest = &mut self.bytes[..];
        self.frames.iter().zip(spans).map(move |(frame, span)| {
            let (this, after) = std::mem::take(&mut rest).split_at_mut(span);
            rest = after;
            let (prefix, body) = this.split_at_mut(PREFIX_LEN);
            let packed_len = frame.len as usize - PREFIX_LEN - TAG_LEN;
            let (packed, tail) = body.split_at_mut(packed_len);
            (frame.unit, [prefix[0], prefix[1], prefix[2], prefix[3]], packed, &mut tail[..TAG_LEN])
        })
    }
}

/// Why a stored frame was not read.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum ReadError {
    #[error(transparent)]
    Seal(#[from] SealError),
    #[error(transparent)]
    Frame(#[from] FrameError),
    #[error("the frame has {blocks} blocks, none with the number {wanted}")]
    NoSuchBlock { blocks: u8, wanted: u8 },
}

/// Reads stored frames. Keep it, since it keeps its buffers and its decompression context.
#[derive(Default)]
pub struct FrameReader {
    decompressor: Decompressor,
    packed: Vec<u8>,
    joined: Vec<u8>,
}

impl FrameReader {
    /// Checks, decrypts and unpacks the frame at `unit`. `stored` begins with it and may go on beyond it. The answer is its blocks, joined.
    ///
    /// # Errors
    /// If anything differs from what was sealed at this place, or is cut off.
    pub fn read(&mut self, opener: &Opener, unit: u32, stored: &[u8]) -> Result<&[u8], ReadError> {
        let prefix = opener.open_frame(unit, stored, &mut self.packed)?;
        self.joined.resize(joined_len(usize::from(prefix.blocks)), 0);
        self.decompressor.unpack(prefix.codec, &self.packed, &mut self.joined)?;
        Ok(&self.joined)
    }

    /// As [`Self::read`], for the one block at `spot`, copied to `out`.
    ///
    /// # Errors
    /// Also if the frame has no such block. `out` is then as it was.
    pub fn read_block(&mut self, opener: &Opener, spot: Spot, stored: &[u8], out: &mut Block) -> Result<(), ReadError> {
        let joined = self.read(opener, spot.unit(), stored)?;
        let (blocks, _) = joined.as_chunks::<BLOCK_LEN>();
        let missing = ReadError::NoSuchBlock { blocks: blocks.len() as u8, wanted: spot.block() };
        *out = *blocks.get(usize::from(spot.block())).ok_or(missing)?;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::samples;

    #[test]
    fn frames_are_aligned_and_bounded() {
        let mut body = Body::new(40_000);
        let mut compressor = Compressor::default();
        let mut end = 0;
        for seed in 0.. {
            let blocks = [samples::text(seed), samples::noise(seed), samples::text(seed + 1)];
            let fits = body.fits(3);
            let compression = if seed % 2 == 0 { Compression::Zstd { level: 1 } } else { Compression::Off };
            let record = body.push(&mut compressor, &blocks.each_ref(), compression);
            assert_eq!(record.is_some(), fits);
            let Some(record) = record else { break };
            assert_eq!(record.unit as usize * UNIT_LEN, end);
            end = (end + record.len as usize).next_multiple_of(UNIT_LEN);
            assert_eq!((end, body.frames().last()), (body.len(), Some(&record)));
            assert_eq!(record.spot(2).map(|spot| (spot.unit(), spot.block())), Some((record.unit, 2)));
            assert_eq!(record.spot(3), None);
        }
        assert!(body.len() <= 40_000 && body.len() > 40_000 - 12_400, "{}", body.len());
    }

    #[test]
    fn a_prefix_is_parsed_back_or_refused() {
        for (blocks, packed_len) in [(1, 1), (1, 4096), (16, 65_536), (4, 256)] {
            let prefix = FramePrefix { codec: Codec::Zstd, blocks, packed_len };
            assert_eq!(FramePrefix::parse(prefix.to_bytes()), Ok(prefix));
        }
        assert_eq!(FramePrefix::parse([3, 1, 0, 0]), Err(SealError::UnknownCodec(3)));
        for wrong in [[0, 0, 0, 0], [0, 17, 0, 0], [2, 1, 0, 0x10], [2, 15, 0xff, 0xff]] {
            assert!(matches!(FramePrefix::parse(wrong), Err(SealError::Malformed(_))), "{wrong:?}");
        }
    }
}
