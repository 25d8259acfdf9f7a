//! What tells a pool from every other, and a format from the next: the header that a pool of segments begins with.
//!
//! ```text
//!    0  8  magic "novapool"          32  8  incompatible flags: one not known refuses the pool
//!    8  4  format version: 1         40  8  read-only-compatible flags: one not known refuses writing
//!   12  4  zero                      48  8  compatible flags: those not known are ignored
//!   16 16  UUID of the pool          56  4  zero        60  4  CRC32C of bytes 0..60
//! ```
//!
//! Written once, when the pool is made; never changed. The first twelve bytes keep their meaning in every version.

use uuid::Uuid;

use super::StoreError;

const MAGIC: &[u8; 8] = b"novapool";
const VERSION: u32 = 1;
/// Bytes of a header.
pub const HEADER_LEN: usize = 64;

/// Flags this novastor knows, per class.
const KNOWN_INCOMPATIBLE: u64 = 0;
const KNOWN_READ_ONLY_COMPATIBLE: u64 = 0;

/// A pool's identity, as stored.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct PoolHeader {
    pub uuid: Uuid,
    pub incompatible: u64,
    pub read_only_compatible: u64,
    pub compatible: u64,
}

impl PoolHeader {
    /// The header of a new pool.
    pub fn new(uuid: Uuid) -> PoolHeader {
        PoolHeader { uuid, incompatible: 0, read_only_compatible: 0, compatible: 0 }
    }

    pub fn encode(&self) -> [u8; HEADER_LEN] {
        let mut bytes = [0; HEADER_LEN];
        bytes[..8].copy_from_slice(MAGIC);
        bytes[8..12].copy_from_slice(&VERSION.to_le_bytes());
        bytes[16..32].copy_from_slice(self.uuid.as_bytes());
        bytes[32..40].copy_from_slice(&self.incompatible.to_le_bytes());
        bytes[40..48].copy_from_slice(&self.read_only_compatible.to_le_bytes());
        bytes[48..56].copy_from_slice(&self.compatible.to_le_bytes());
        let checksum = checksum_of(&bytes);
        bytes[60..].copy_from_slice(&checksum.to_le_bytes());
        bytes
    }

    /// Reads a header that was found at `place` (for messages).
    pub fn decode(place: &str, bytes: &[u8]) -> Result<PoolHeader, StoreError> {
        let refused = |cause: String| StoreError::Refused(format!("{place}: {cause}"));
        if !bytes.starts_with(MAGIC) {
            return Err(refused("this is no header of a novastor pool".to_owned()));
        }
        let word = |at: usize| bytes.get(at..at + 4).and_then(|bytes| bytes.try_into().ok()).map(u32::from_le_bytes);
        match word(8) {
            Some(VERSION) => {}
            Some(version) => {
                let cause =
                    format!("the pool has format version {version}, and this novastor knows {VERSION} only: use a newer one");
                return Err(refused(cause));
            }
            None => return Err(refused("the pool's header is cut off: the pool was copied in part, or is damaged".to_owned())),
        }
        let whole: Option<&[u8; HEADER_LEN]> = bytes.try_into().ok();
        let Some(bytes) = whole.filter(|bytes| word(60) == Some(checksum_of(bytes))) else {
            return Err(refused("the pool's header is damaged: its length or checksum is wrong".to_owned()));
        };
        let flags = |at: usize| bytes[at..at + 8].iter().rev().fold(0, |flags, byte| flags << 8 | u64::from(*byte));
        Ok(PoolHeader {
            uuid: Uuid::from_slice(&bytes[16..32]).unwrap_or_default(),
            incompatible: flags(32),
            read_only_compatible: flags(40),
            compatible: flags(48),
        })
    }

    /// Whether the pool found at `place` may be used: it is the `expected` one, if any is, and needs nothing this novastor lacks.
    pub fn check(&self, place: &str, expected: Option<Uuid>, read_only: bool) -> Result<(), StoreError> {
        let refused = |cause: String| Err(StoreError::Refused(format!("{place}: {cause}")));
        if let Some(expected) = expected.filter(|expected| *expected != self.uuid) {
            return refused(format!("this is pool {}, not {expected}: another pool is in its place", self.uuid));
        }
        let unknown = self.incompatible & !KNOWN_INCOMPATIBLE;
        if unknown != 0 {
            return refused(format!("the pool needs features {unknown:#x}, which this novastor lacks: use a newer one"));
        }
        let unknown = self.read_only_compatible & !KNOWN_READ_ONLY_COMPATIBLE;
        if unknown != 0 && !read_only {
            return refused(format!(
                "writing to the pool needs features {unknown:#x}, which this novastor lacks: use a newer one, or open it read-only"
            ));
        }
        Ok(())
    }
}

fn checksum_of(header: &[u8; HEADER_LEN]) -> u32 {
    crc_fast::checksum(crc_fast::CrcAlgorithm::Crc32Iscsi, &header[..60]) as u32
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn header() -> PoolHeader {
        PoolHeader { uuid: Uuid::from_u128(7), incompatible: 0, read_only_compatible: 0, compatible: 1 << 40 }
    }

    #[test]
    fn a_header_survives_the_round_trip_and_no_flipped_byte() {
        let bytes = header().encode();
        assert_eq!(PoolHeader::decode("p", &bytes), Ok(header()));
        for at in 0..bytes.len() {
            let mut damaged = bytes;
            damaged[at] ^= 4;
            assert!(matches!(PoolHeader::decode("p", &damaged), Err(StoreError::Refused(_))), "byte {at}");
            assert!(PoolHeader::decode("p", &bytes[..at]).is_err(), "cut at {at}");
        }
    }

    #[test]
    fn another_version_and_another_pool_are_told() {
        let mut newer = header().encode();
        newer[8] = 2;
        let error = PoolHeader::decode("p", &newer).unwrap_err().to_string();
        assert!(error.contains("format version 2"), "{error}");
        let error = header().check("p", Some(Uuid::from_u128(8)), true).unwrap_err().to_string();
        assert!(error.contains("another pool"), "{error}");
        header().check("p", Some(Uuid::from_u128(7)), false).unwrap();
    }

    #[test]
    fn each_class_of_flags_has_its_consequence() {
        let newer = PoolHeader { incompatible: 1, ..header() };
        assert!(newer.check("p", None, true).is_err());
        let newer = PoolHeader { read_only_compatible: 1, ..header() };
        assert!(newer.check("p", None, false).is_err());
        newer.check("p", None, true).unwrap();
    }

    proptest! {
        #[test]
        fn no_bytes_make_it_panic(tail in prop::collection::vec(any::<u8>(), 0..100), is_begun in any::<bool>()) {
            let head: &[u8] = if is_begun { b"novapool\x01\0\0\0" } else { b"" };
            let bytes = [head, &tail].concat();
            prop_assert!(PoolHeader::decode("p", &bytes).is_err());
        }
    }
}
