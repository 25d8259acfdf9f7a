//! Compression of frames: a few blocks, joined and compressed together.
//!
//! ```text
//!   1 to 16 blocks ─▶ joined, n × 4096 bytes ─▶ codec ─▶ packed bytes, shorter by an eighth at least, or the joined bytes as they are
//! ```
//!
//! - A frame stands alone: no dictionary, no reference to another frame.
//! - The number of blocks is known from outside, so a decoder writes into exactly that much and anything else is an error.
//! - The decoders meet bytes only after their seal was checked, and still trust nothing in them.

use crate::location::FRAME_BLOCKS_MAX;
use crate::{BLOCK_LEN, Block};
use lz4_flex::block::{CompressTable, compress_into_with_table, decompress_into, get_maximum_output_size};
use zstd::zstd_safe::{CCtx, CParameter, DCtx};

/// The blocks in a frame of data that may be read at random.
pub const FRAME_BLOCKS: usize = 4;
/// A frame is stored as it is unless compression saves at least one part in this many: 12.5 %.
const GAIN_PART_MIN: usize = 8;
/// From this length on a small table of lz4_flex does not do.
const LZ4_SMALL_END: usize = u16::MAX as usize;

/// How a frame is packed. The numbers are part of the format.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
#[repr(u8)]
pub enum Codec {
    /// The blocks as they are.
    Stored = 0,
    /// One LZ4 block, without a size before it.
    Lz4 = 1,
    /// One Zstandard frame.
    Zstd = 2,
}

impl Codec {
    /// `None`: no codec that this version knows.
    #[must_use]
    pub fn from_id(id: u8) -> Option<Self> {
        [Self::Stored, Self::Lz4, Self::Zstd].into_iter().find(|codec| *codec as u8 == id)
    }
}

/// What is tried on a frame. The level leaves no trace in the format.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Compression {
    Off,
    Lz4,
    /// Levels as Zstandard counts them; 1 and 3 are those in use.
    Zstd {
        level: i32,
    },
}

/// What the owner of data allows to be tried on it.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum Allowed {
    /// What the log leaves time for.
    #[default]
    Auto,
    /// The same for what is seldom read: smaller, and slower to unpack.
    Cold,
    Off,
    Lz4,
    Zstd,
}

/// How a batch is packed.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Packing {
    pub compression: Compression,
    /// 1 to 16.
    pub frame_blocks: usize,
}

const LZ4: Packing = Packing { compression: Compression::Lz4, frame_blocks: FRAME_BLOCKS };
const ZSTD: Packing = Packing { compression: Compression::Zstd { level: 1 }, frame_blocks: FRAME_BLOCKS };
const COLD: Packing = Packing { compression: Compression::Zstd { level: 3 }, frame_blocks: FRAME_BLOCKS_MAX };

/// Above this the log fills faster than zstd empties it.
const PRESSURE_HIGH: f32 = 0.5;
/// Below this it has room again; in between nothing changes, so that batches do not alternate.
const PRESSURE_LOW: f32 = 0.35;

/// How to pack the next batch. `pressure` is the used share of the log, 0 to 1; what is no number counts as 1. `previous` is how the
/// batch before it was packed.
///
/// Compression is never given up for pressure: a full log waits for the backend as often as for the processor, and lz4 is faster than most.
///
/// A frame that is not compressed gains nothing from a second block.
#[must_use]
pub fn choose(allowed: Allowed, pressure: f32, previous: Option<Packing>) -> Packing {
    match allowed {
        Allowed::Auto => by_pressure(pressure, previous, [ZSTD, LZ4]),
        Allowed::Cold => by_pressure(pressure, previous, [COLD, ZSTD]),
        Allowed::Off => Packing { compression: Compression::Off, frame_blocks: 1 },
        Allowed::Lz4 => LZ4,
        Allowed::Zstd => ZSTD,
    }
}

fn by_pressure(pressure: f32, previous: Option<Packing>, [calm, pressed]: [Packing; 2]) -> Packing {
    let limit = if previous == Some(pressed) { PRESSURE_LOW } else { PRESSURE_HIGH };
    if pressure < limit { calm } else { pressed }
}

/// Why a frame was not unpacked.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum FrameError {
    #[error("the frame does not decode with its codec {0:?}")]
    Undecodable(Codec),
    #[error("the frame decodes to {found} bytes instead of {expected}")]
    Length { expected: usize, found: usize },
}

/// Packs frames. Keep it: a new zstd context for each frame costs three times the compression itself.
pub struct Compressor {
    /// For less than 64 KiB, and for 64 KiB: a table that has grown would pack small frames differently from a new one.
    lz4: [CompressTable; 2],
    zstd: CCtx<'static>,
    level: Option<i32>,
    joined: Vec<u8>,
    packed: Vec<u8>,
}

impl Default for Compressor {
    fn default() -> Self {
        Self {
            lz4: [CompressTable::small(), CompressTable::large()],
            zstd: CCtx::create(),
            level: None,
            joined: Vec::new(),
            packed: Vec::new(),
        }
    }
}

impl Compressor {
    /// Appends the packed blocks to `out` and says how they were packed. What a codec fails on, or does not shrink enough, is stored.
    ///
    /// # Panics
    /// If there is no block or more than 16.
    pub fn pack(&mut self, blocks: &[&Block], compression: Compression, out: &mut Vec<u8>) -> Codec {
        assert!((1..=FRAME_BLOCKS_MAX).contains(&blocks.len()), "a frame of {} blocks", blocks.len());
        self.joined.clear();
        blocks.iter().for_each(|block| self.joined.extend_from_slice(*block));
        let len_max = self.joined.len() - self.joined.len() / GAIN_PART_MIN;
        let (codec, packed) = match compression {
            Compression::Off => (Codec::Stored, None),
            Compression::Lz4 => (Codec::Lz4, self.lz4(len_max)),
            Compression::Zstd { level } => (Codec::Zstd, self.zstd(level, len_max)),
        };
        let Some(len) = packed else {
            out.extend_from_slice(&self.joined);
            return Codec::Stored;
        };
        out.extend_from_slice(&self.packed[..len]);
        codec
    }

    /// Packs `joined` into `packed`: how long it became, unless that is more than `len_max`.
    fn lz4(&mut self, len_max: usize) -> Option<usize> {
        self.packed.resize(self.packed.len().max(get_maximum_output_size(self.joined.len())), 0);
        let table = &mut self.lz4[usize::from(self.joined.len() >= LZ4_SMALL_END)];
        let len = compress_into_with_table(&self.joined, &mut self.packed, table).ok()?;
        (len <= len_max).then_some(len)
    }

    /// As [`Self::lz4`]. zstd itself gives up as soon as it runs out of room.
    fn zstd(&mut self, level: i32, len_max: usize) -> Option<usize> {
        if self.level != Some(level) {
            self.zstd.set_parameter(CParameter::CompressionLevel(level)).ok()?;
            self.level = Some(level);
        }
        self.packed.resize(self.packed.len().max(len_max), 0);
        self.zstd.compress2(&mut self.packed[..len_max], &self.joined).ok()
    }
}

/// Unpacks frames. Keep it, as the [`Compressor`].
pub struct Decompressor {
    zstd: DCtx<'static>,
}

impl Default for Decompressor {
    fn default() -> Self {
        Self { zstd: DCtx::create() }
    }
}

impl Decompressor {
    /// Fills `out`, whose length is that of the frame's blocks; a frame that gives more or fewer bytes is refused. After an error the content
    /// of `out` is anything.
    ///
    /// # Errors
    /// If the bytes are not what the codec writes, or decode to another length.
    pub fn unpack(&mut self, codec: Codec, packed: &[u8], out: &mut [u8]) -> Result<(), FrameError> {
        let expected = out.len();
        let found = match codec {
            Codec::Stored if packed.len() == expected => {
                out.copy_from_slice(packed);
                expected
            }
            Codec::Stored => packed.len(),
            Codec::Lz4 => decompress_into(packed, out).map_err(|_| FrameError::Undecodable(codec))?,
            Codec::Zstd => self.zstd.decompress(out, packed).map_err(|_| FrameError::Undecodable(codec))?,
        };
        if found == expected { Ok(()) } else { Err(FrameError::Length { expected, found }) }
    }
}

/// The bytes of `blocks` blocks.
pub(crate) fn joined_len(blocks: usize) -> usize {
    blocks * BLOCK_LEN
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::samples;
    use proptest::prelude::*;

    const ALL: [Compression; 4] =
        [Compression::Off, Compression::Lz4, Compression::Zstd { level: 1 }, Compression::Zstd { level: 3 }];

    fn pack(compressor: &mut Compressor, blocks: &[Block], compression: Compression) -> (Codec, Vec<u8>) {
        let mut out = b"before".to_vec();
        let codec = compressor.pack(&blocks.iter().collect::<Vec<_>>(), compression, &mut out);
        assert_eq!(&out[..6], b"before");
        (codec, out.split_off(6))
    }

    #[test]
    fn frames_come_back_as_they_were() {
        let (mut compressor, mut decompressor) = (Compressor::default(), Decompressor::default());
        for seed in 0..20 {
            for count in [1, 3, 4, 16] {
                let blocks: Vec<_> = (0..count).map(|block| samples::text(seed * 16 + block)).collect();
                for compression in ALL {
                    let (codec, packed) = pack(&mut compressor, &blocks, compression);
                    assert_eq!(codec == Codec::Stored, compression == Compression::Off);
                    let mut out = vec![0xee; joined_len(blocks.len())];
                    decompressor.unpack(codec, &packed, &mut out).unwrap();
                    assert_eq!(out, blocks.concat());
                }
            }
        }
    }

    #[test]
    fn what_gains_less_than_an_eighth_is_stored() {
        let mut compressor = Compressor::default();
        let noise = samples::noise(1);
        for compression in ALL {
            assert_eq!(pack(&mut compressor, &[noise; 1], compression), (Codec::Stored, noise.to_vec()));
        }
        // From nothing but noise to half zeroes, the codec changes once, where the gain is an eighth.
        for compression in &ALL[1..] {
            let mut block = noise;
            let lens: Vec<_> = (0..32)
                .map(|part| {
                    block[part * 64..][..64].fill(0);
                    pack(&mut compressor, &[block], *compression).1.len()
                })
                .collect();
            assert!(lens.iter().all(|len| *len == BLOCK_LEN || *len <= BLOCK_LEN / 8 * 7), "{lens:?}");
            assert!(lens.is_sorted_by(|a, b| a >= b), "{lens:?}");
            assert_eq!((lens[0], lens[31] < BLOCK_LEN), (BLOCK_LEN, true));
        }
    }

    #[test]
    fn a_context_that_was_used_packs_like_a_new_one() {
        let blocks: Vec<_> = (0..4).map(samples::text).collect();
        let mut used = Compressor::default();
        for compression in ALL.into_iter().chain(ALL) {
            pack(&mut used, &[samples::noise(3); 16], compression);
            assert!(
                pack(&mut used, &blocks, compression) == pack(&mut Compressor::default(), &blocks, compression),
                "{compression:?}"
            );
        }
    }

    #[test]
    fn a_wrong_length_is_an_error() {
        let (mut compressor, mut decompressor) = (Compressor::default(), Decompressor::default());
        let blocks: Vec<_> = (0..4).map(samples::text).collect();
        for compression in ALL {
            let (codec, packed) = pack(&mut compressor, &blocks, compression);
            for wrong in [0, 1, joined_len(3), joined_len(4) - 1, joined_len(4) + 1, joined_len(16)] {
                assert!(decompressor.unpack(codec, &packed, &mut vec![0; wrong]).is_err(), "{codec:?} {wrong}");
            }
            for cut in 0..packed.len() {
                assert!(decompressor.unpack(codec, &packed[..cut], &mut vec![0; joined_len(4)]).is_err(), "{codec:?} {cut}");
            }
            let longer = [&packed[..], b"x"].concat();
            assert!(decompressor.unpack(codec, &longer, &mut vec![0; joined_len(4)]).is_err(), "{codec:?}");
        }
    }

    /// A few bytes that would decode to gigabytes write no further than the buffer.
    #[test]
    fn a_bomb_is_bounded() {
        let bomb = zstd::bulk::compress(&vec![0; 64 << 20], 19).unwrap();
        assert!(bomb.len() < 16 << 10);
        let mut decompressor = Decompressor::default();
        assert!(decompressor.unpack(Codec::Zstd, &bomb, &mut vec![0; joined_len(4)]).is_err());
        let mut lz4_bomb = vec![0x1f, 0, 1, 0];
        lz4_bomb.resize(60_000, 0xff);
        assert!(decompressor.unpack(Codec::Lz4, &lz4_bomb, &mut vec![0; joined_len(4)]).is_err());
    }

    #[test]
    fn ids_are_stable() {
        for (codec, id) in [(Codec::Stored, 0), (Codec::Lz4, 1), (Codec::Zstd, 2)] {
            assert_eq!((codec as u8, Codec::from_id(id)), (id, Some(codec)));
        }
        assert_eq!(Codec::from_id(3), None);
    }

    #[test]
    fn pressure_chooses_with_hysteresis() {
        let mut previous = None;
        let mut next = |pressure| {
            previous = Some(choose(Allowed::Auto, pressure, previous));
            previous.unwrap()
        };
        assert_eq!([0.0, 0.49, 0.5, 0.4, 0.36, 0.3, 0.4, 1.0].map(&mut next), [ZSTD, ZSTD, LZ4, LZ4, LZ4, ZSTD, ZSTD, LZ4]);
        assert_eq!([f32::NAN, f32::INFINITY].map(&mut next), [LZ4, LZ4]);
        assert_eq!(choose(Allowed::Cold, 0.1, None), COLD);
        assert_eq!(choose(Allowed::Cold, 0.9, Some(COLD)), ZSTD);
        assert_eq!(choose(Allowed::Cold, 0.4, Some(ZSTD)), ZSTD);
        assert_eq!(choose(Allowed::Cold, 0.3, Some(ZSTD)), COLD);
    }

    #[test]
    fn what_is_not_allowed_is_not_chosen() {
        for (allowed, compression) in
            [(Allowed::Off, Compression::Off), (Allowed::Lz4, Compression::Lz4), (Allowed::Zstd, Compression::Zstd { level: 1 })]
        {
            let chosen = [0.0, 1.0].map(|pressure| choose(allowed, pressure, None).compression);
            assert_eq!(chosen, [compression; 2]);
        }
    }

    proptest! {
        #[test]
        fn hostile_bytes_are_an_error_or_the_right_length(
            packed in prop::collection::vec(any::<u8>(), 0..600), codec in 0_u8..3, blocks in 1_usize..17,
        ) {
            let mut out = vec![0; joined_len(blocks)];
            let _ = Decompressor::default().unpack(Codec::from_id(codec).unwrap(), &packed, &mut out);
        }

        #[test]
        fn a_damaged_frame_never_panics(seed in any::<u64>(), at in any::<prop::sample::Index>(), bit in 0_u8..8) {
            let blocks: Vec<_> = (0..4).map(|block| samples::text(seed.wrapping_add(block))).collect();
            let (mut compressor, mut decompressor) = (Compressor::default(), Decompressor::default());
            for compression in ALL {
                let (codec, mut packed) = pack(&mut compressor, &blocks, compression);
                let at = at.index(packed.len());
                packed[at] ^= 1 << bit;
                let _ = decompressor.unpack(codec, &packed, &mut vec![0; joined_len(4)]);
            }
        }
    }
}
