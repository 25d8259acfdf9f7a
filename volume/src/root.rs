//! The root of a volume: who owns it, and its newest checkpoint. Changed by compare-and-swap only. Numbers are little-endian.
//!
//! ```text
//!   0  magic "NVVOLUME"             80  checkpoint: epoch and sequence where reading the history begins   u64, u64
//!   8  CRC32C of 12..176            96  bytes of all volumes of the group                                 u64
//!  12  format version   u32        104  its meta object: epoch and number                                 u64, u64
//!  16  group            16 bytes   120  the log whose records before the next place are in the checkpoint 16 bytes
//!  32  epoch            u64        136  position, batch number and chain value in that log                u64, u64, u64
//!  40  durability u8: 0 remote, 1 local · deleted u8: 1 if the volume is no more · zero 6 bytes
//!  48  owner            16 bytes
//!  64  log id           16 bytes  160  dedup domain: the group that the first ancestor has                16 bytes
//! ```

use bytes::Bytes;

use crate::bytes_at::{array_at, crc32c, u32_at, u64_at};
use crate::error::VolumeError;
use crate::log::{LogId, Tail};
use crate::names::{Family, Group, Source};
use crate::segment::Place;

const MAGIC: [u8; 8] = *b"NVVOLUME";
const LEN: usize = 176;
/// Not yet the format of any release.
const VERSION: u32 = 1;

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Root {
    pub(crate) group: Group,
    /// Whose keys hash and seal its blocks: its own group, or its first ancestor's.
    pub(crate) domain: Group,
    pub(crate) epoch: u64,
    /// Whoever claimed this epoch.
    pub(crate) owner: [u8; 16],
    /// The local log of that owner.
    pub(crate) log_id: LogId,
    /// That owner acknowledges flushes when its log has them.
    pub(crate) is_local: bool,
    /// The volume is no more; what is left of it is being removed.
    pub(crate) is_deleted: bool,
    /// Bytes of all volumes of the group.
    pub(crate) size: u64,
    pub(crate) checkpoint: Checkpoint,
}

/// A state of the volume that needs no history.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub(crate) struct Checkpoint {
    /// Where reading the history goes on.
    pub(crate) place: Place,
    /// Epoch and number of the object that says what the volume holds.
    pub(crate) meta: (u64, u64),
    /// All records of this log before `log_end` are in the checkpoint.
    pub(crate) log_id: LogId,
    pub(crate) log_end: Tail,
}

impl Root {
    pub(crate) fn meta(&self) -> Source {
        let (epoch, number) = self.checkpoint.meta;
        Source { group: self.group, family: Family::Meta, epoch, number }
    }

    pub(crate) fn encode(&self) -> Bytes {
        let Checkpoint { place, meta, log_id, log_end } = self.checkpoint;
        let mut bytes = vec![0; LEN];
        let mut put = |at: usize, value: &[u8]| bytes[at..at + value.len()].copy_from_slice(value);
        put(0, &MAGIC);
        put(12, &VERSION.to_le_bytes());
        put(16, &self.group);
        put(40, &[self.is_local.into(), self.is_deleted.into()]);
        put(48, &self.owner);
        put(64, &self.log_id);
        put(120, &log_id);
        put(160, &self.domain);
        let numbers = [
            (32, self.epoch),
            (80, place.epoch),
            (88, place.sequence),
            (96, self.size),
            (104, meta.0),
            (112, meta.1),
            (136, log_end.position),
            (144, log_end.number),
            (152, log_end.chain),
        ];
        numbers.into_iter().for_each(|(at, number)| put(at, &number.to_le_bytes()));
        let crc = crc32c(&bytes[12..]);
        bytes[8..12].copy_from_slice(&crc.to_le_bytes());
        bytes.into()
    }

    pub(crate) fn decode(bytes: &[u8], name: &str) -> Result<Root, VolumeError> {
        let damaged = |why| VolumeError::ObjectDamaged { object: name.to_owned(), why };
        if bytes.len() < 16 || bytes[..8] != MAGIC {
            return Err(damaged("it is not the root of a volume"));
        }
        if crc32c(&bytes[12..]) != u32_at(bytes, 8) {
            return Err(damaged("its checksum is wrong"));
        }
        if u32_at(bytes, 12) != VERSION || bytes.len() != LEN {
            return Err(VolumeError::FormatVersion(name.to_owned()));
        }
        let tail = Tail { position: u64_at(bytes, 136), number: u64_at(bytes, 144), chain: u64_at(bytes, 152) };
        let checkpoint = Checkpoint {
            place: Place { epoch: u64_at(bytes, 80), sequence: u64_at(bytes, 88) },
            meta: (u64_at(bytes, 104), u64_at(bytes, 112)),
            log_id: array_at(bytes, 120),
            log_end: tail,
        };
        Ok(Root {
            group: array_at(bytes, 16),
            domain: array_at(bytes, 160),
            epoch: u64_at(bytes, 32),
            owner: array_at(bytes, 48),
            log_id: array_at(bytes, 64),
            is_local: bytes[40] != 0,
            is_deleted: bytes[41] != 0,
            size: u64_at(bytes, 96),
            checkpoint,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn a_root_comes_back_and_any_flipped_bit_is_noticed() {
        let place = Place { epoch: 2, sequence: 5 };
        let log_end = Tail { position: 7, number: 8, chain: 9 };
        let checkpoint = Checkpoint { place, meta: (1, 6), log_id: [5; 16], log_end };
        let root = Root {
            group: [1; 16],
            domain: [8; 16],
            epoch: 3,
            owner: [2; 16],
            log_id: [3; 16],
            is_local: true,
            is_deleted: false,
            size: 1 << 40,
            checkpoint,
        };
        let bytes = root.encode();
        assert_eq!(Root::decode(&bytes, "x"), Ok(root));
        for bit in 0..LEN * 8 {
            let mut bytes = bytes.to_vec();
            bytes[bit / 8] ^= 1 << (bit % 8);
            assert!(Root::decode(&bytes, "x").is_err(), "bit {bit}");
        }
        assert!(Root::decode(&bytes[..50], "x").is_err());
    }

    proptest! {
        /// Whatever a store hands in under a good checksum.
        #[test]
        fn no_bytes_panic_and_what_is_read_is_what_would_be_written(
            mut bytes in proptest::collection::vec(any::<u8>(), 0..LEN + 8),
            is_long: bool,
            is_known: bool,
        ) {
            if is_long {
                bytes.resize(LEN, 0);
            }
            if bytes.len() >= 16 {
                bytes[..8].copy_from_slice(&MAGIC);
                if is_known {
                    bytes[12..16].copy_from_slice(&VERSION.to_le_bytes());
                }
                let crc = crc32c(&bytes[12..]);
                bytes[8..12].copy_from_slice(&crc.to_le_bytes());
            }
            let read = Root::decode(&bytes, "x");
            prop_assert_eq!(read.is_ok(), bytes.len() == LEN && u32_at(&bytes, 12) == VERSION);
            if let Ok(root) = read {
                prop_assert_eq!(Root::decode(&root.encode(), "x"), Ok(root));
            }
        }
    }
}
