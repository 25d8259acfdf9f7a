//! How a root lies in a store that keeps bytes: the content behind a counter, so that no version is mistaken for an earlier one of the
//! same content.
//!
//! ```text
//!    0  8  magic "novaroot"        8  4  version: 1        12  4  zero
//!   16  8  counter: 1, and one more with every swap
//!   24 32  BLAKE3 of the counter and the content
//!   56  …  content, to the end
//! ```

use bytes::{BufMut, Bytes, BytesMut};

use super::{ROOT_LEN_MAX, StoreError};

const MAGIC: &[u8; 8] = b"novaroot";
const VERSION: u32 = 1;
const HEAD: usize = 56;
/// The longest stored form, in bytes.
pub(super) const STORED_LEN_MAX: u64 = ROOT_LEN_MAX + HEAD as u64;

/// A root as it was stored.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Stored {
    pub counter: u64,
    pub hash: blake3::Hash,
    pub content: Bytes,
}

fn hash_of(counter: u64, content: &[u8]) -> blake3::Hash {
    let mut hasher = blake3::Hasher::new();
    hasher.update(&counter.to_le_bytes()).update(content);
    hasher.finalize()
}

/// Refuses what is too long for a root.
pub(super) fn check_len(name: &str, content: &[u8]) -> Result<(), StoreError> {
    if content.len() as u64 <= ROOT_LEN_MAX {
        return Ok(());
    }
    Err(StoreError::Refused(format!("root {name}: {} bytes are more than the {ROOT_LEN_MAX} a root may have", content.len())))
}

impl Stored {
    pub(super) fn new(counter: u64, content: Bytes) -> Stored {
        Stored { counter, hash: hash_of(counter, &content), content }
    }

    pub(super) fn encode(&self) -> Bytes {
        let mut bytes = BytesMut::with_capacity(HEAD + self.content.len());
        bytes.put_slice(MAGIC);
        bytes.put_u32_le(VERSION);
        bytes.put_u32_le(0);
        bytes.put_u64_le(self.counter);
        bytes.put_slice(self.hash.as_bytes());
        bytes.put_slice(&self.content);
        bytes.freeze()
    }

    pub(super) fn decode(name: &str, bytes: &Bytes) -> Result<Stored, StoreError> {
        let refused = |cause: String| StoreError::Refused(format!("root {name} {cause}"));
        if bytes.len() < HEAD || !bytes.starts_with(MAGIC) {
            return Err(refused("is damaged, or is no root: it does not begin as one".to_owned()));
        }
        let version = u32_at(bytes, 8);
        if version != VERSION {
            return Err(refused(format!(
                "has format version {version}, and this novastor knows {VERSION} only: use a newer one"
            )));
        }
        let stored = Stored::new(u64_at(bytes, 16), bytes.slice(HEAD..));
        if stored.hash.as_bytes()[..] != bytes[24..HEAD] || u32_at(bytes, 12) != 0 {
            return Err(refused("is damaged: its checksum does not match its content".to_owned()));
        }
        Ok(stored)
    }
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    bytes[at..at + 4].iter().rev().fold(0, |value, byte| value << 8 | u32::from(*byte))
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    bytes[at..at + 8].iter().rev().fold(0, |value, byte| value << 8 | u64::from(*byte))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn a_root_survives_the_round_trip_and_no_flipped_byte() {
        let stored = Stored::new(0x0102_0304_0506_0708, Bytes::from_static(b"content"));
        let bytes = stored.encode();
        assert_eq!(bytes[16..24], [8, 7, 6, 5, 4, 3, 2, 1]);
        assert_eq!(Stored::decode("r", &bytes), Ok(stored));
        for at in 0..bytes.len() {
            let mut damaged = bytes.to_vec();
            damaged[at] ^= 0x10;
            assert!(matches!(Stored::decode("r", &damaged.into()), Err(StoreError::Refused(_))), "byte {at}");
            assert!(Stored::decode("r", &bytes.slice(..at)).is_err(), "cut at {at}");
        }
    }

    #[test]
    fn the_same_content_later_is_another_version() {
        let [first, second] = [1, 2].map(|counter| Stored::new(counter, Bytes::from_static(b"a")));
        assert_ne!(first.hash, second.hash);
    }

    proptest! {
        #[test]
        fn no_bytes_make_it_panic(tail in prop::collection::vec(any::<u8>(), 0..100), is_begun in any::<bool>()) {
            let head: &[u8] = if is_begun { b"novaroot\x01\0\0\0" } else { b"" };
            let bytes = [head, &tail].concat();
            prop_assert!(Stored::decode("r", &bytes.into()).is_err());
        }
    }
}
