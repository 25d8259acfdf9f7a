//! Which snapshots of a volume have clones: a root of its own, since others than the owner write it.
//!
//! ```text
//!   0  magic "NVPINNED" · CRC32C of 12.. u32 · version u32
//!  16  pins, 32 bytes each: snapshot id 16 · group of the clone 16
//! ```
//!
//! A clone pins its snapshot first, and then looks whether the snapshot is there and stays. A snapshot that goes away says so in a checkpoint
//! first, and then looks whether it is pinned. So one of the two sees the other.

use backends::segments::StoreError;
use bytes::Bytes;

use crate::bytes_at::{array_at, crc32c, u32_at};
use crate::chain::Chain;
use crate::error::VolumeError;
use crate::meta::SnapshotId;
use crate::names::{Group, pins_path};

const MAGIC: [u8; 8] = *b"NVPINNED";
const VERSION: u32 = 0;
const HEADER_LEN: usize = 16;
const PIN_LEN: usize = 32;

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Pin {
    pub(crate) snapshot: SnapshotId,
    pub(crate) clone: Group,
}

fn encode(pins: &[Pin]) -> Bytes {
    let mut bytes = [&MAGIC[..], &[0; 4], &VERSION.to_le_bytes()].concat();
    for pin in pins {
        bytes.extend_from_slice(&pin.snapshot);
        bytes.extend_from_slice(&pin.clone);
    }
    let crc = crc32c(&bytes[12..]);
    bytes[8..12].copy_from_slice(&crc.to_le_bytes());
    bytes.into()
}

fn decode(bytes: &[u8], name: &str) -> Result<Vec<Pin>, VolumeError> {
    let damaged = |why| VolumeError::ObjectDamaged { object: name.to_owned(), why };
    if bytes.len() < HEADER_LEN || bytes[..8] != MAGIC || !(bytes.len() - HEADER_LEN).is_multiple_of(PIN_LEN) {
        return Err(damaged("it is no list of clones"));
    }
    if crc32c(&bytes[12..]) != u32_at(bytes, 8) {
        return Err(damaged("its checksum is wrong"));
    }
    if u32_at(bytes, 12) != VERSION {
        return Err(VolumeError::FormatVersion(name.to_owned()));
    }
    let pin = |bytes: &[u8]| Pin { snapshot: array_at(bytes, 0), clone: array_at(bytes, 16) };
    Ok(bytes[HEADER_LEN..].chunks_exact(PIN_LEN).map(pin).collect())
}

impl Chain {
    /// The clones of this volume's snapshots.
    pub(crate) async fn pins(&self) -> Result<Vec<Pin>, VolumeError> {
        let name = pins_path(&self.group);
        let found = self.read_until_known(&name).await?;
        found.map_or(Ok(Vec::new()), |(bytes, _)| decode(&bytes, &name))
    }

    /// Notes a clone, or that it is no more. When it comes back the note is in the store.
    pub(crate) async fn set_pin(&self, pin: Pin, is_there: bool) -> Result<(), VolumeError> {
        let name = pins_path(&self.group);
        loop {
            let found = self.read_until_known(&name).await?;
            let mut pins = found.as_ref().map_or(Ok(Vec::new()), |(bytes, _)| decode(bytes, &name))?;
            if pins.contains(&pin) == is_there {
                return Ok(());
            }
            pins.retain(|other| *other != pin);
            pins.extend(is_there.then_some(pin));
            match self.store.swap(&name, found.as_ref().map(|(_, tag)| tag), encode(&pins)).await {
                Ok(_) => return Ok(()),
                Err(StoreError::Changed(_) | StoreError::Unknown(_)) => self.rest().await,
                Err(error) => return Err(error.into()),
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn pins_come_back_and_any_flipped_bit_is_noticed() {
        let pins = [1, 2].map(|number| Pin { snapshot: [number; 16], clone: [9; 16] });
        let bytes = encode(&pins);
        assert_eq!(decode(&bytes, "x"), Ok(pins.to_vec()));
        for bit in 0..bytes.len() * 8 {
            let mut bytes = bytes.to_vec();
            bytes[bit / 8] ^= 1 << (bit % 8);
            assert!(decode(&bytes, "x").is_err(), "bit {bit}");
        }
        assert!(decode(&bytes[..40], "x").is_err());
    }

    proptest! {
        /// Whatever a store hands in under a good checksum.
        #[test]
        fn no_bytes_panic_and_what_is_read_is_what_would_be_written(
            pins in proptest::collection::vec(any::<u8>(), 0..200),
            is_whole: bool,
        ) {
            let len = if is_whole { pins.len() / PIN_LEN * PIN_LEN } else { pins.len() };
            let mut bytes = [&MAGIC[..], &[0; 4], &VERSION.to_le_bytes(), &pins[..len]].concat();
            let crc = crc32c(&bytes[12..]);
            bytes[8..12].copy_from_slice(&crc.to_le_bytes());
            let read = decode(&bytes, "x");
            prop_assert_eq!(read.is_ok(), len.is_multiple_of(PIN_LEN));
            if let Ok(pins) = read {
                prop_assert_eq!(&encode(&pins)[..], &bytes[..]);
            }
            let _ = decode(&pins, "x");
        }
    }
}
