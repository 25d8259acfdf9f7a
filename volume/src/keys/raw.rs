//! The keys of encrypted raw volumes: their pools have a catalogue, and no store of segments, so the record travels as text in the volume's own entry.
//!
//! The key for AES-256-XTS is HKDF-SHA256(data key, no salt, `novastor v1 raw volume xts` ‖ a UUID drawn with the key), 64 bytes. A clone that shares its
//! origin's bytes keeps its origin's record, and so the key. A catalogue has no UUID of a pool, so the record has none either.

use uuid::Uuid;
use zeroize::Zeroizing;

use super::kek::{KekId, Keks};
use super::record::{Owner, Purpose, RECORD_LEN, Record, State};
use super::{KeyError, Random};
use crate::bytes_at::array_at;
use crate::crypto::{Key, derive};

const XTS_INFO: &[u8] = b"novastor v1 raw volume xts";

/// Both keys of AES-256-XTS, joined. Wiped when dropped.
pub type RawKey = Zeroizing<[u8; 64]>;

/// Makes and opens the records of raw volumes.
#[derive(Clone)]
pub struct RawKeys {
    pub keks: Keks,
    pub random: Random,
}

impl RawKeys {
    /// A new key for `volume` (for errors): the text for its entry, and the key.
    ///
    /// # Errors
    /// [`KeyError::NoKek`] without a current key-encryption key.
    pub fn create(&self, volume: &str) -> Result<(String, RawKey), KeyError> {
        let kek = self.keks.current_for(|| format!("encrypting volume {volume}"))?;
        let [mut ids, mut salt_seed, mut data_key] = [[0; 32]; 3].map(Zeroizing::new);
        [&mut ids, &mut salt_seed, &mut data_key].into_iter().for_each(|bytes| (self.random)(&mut bytes[..]));
        let (key_id, drawn) = (array_at(&ids[..], 0), Uuid::from_bytes(array_at(&ids[..], 16)));
        let data_key = Key::new(*data_key);
        let record = Record::wrap(kek, owner(drawn), key_id, &data_key, &salt_seed);
        Ok((to_text(&record), xts_key(&data_key, drawn)))
    }

    /// The key in the entry of `volume` (for errors).
    ///
    /// # Errors
    /// [`KeyError::WrongKek`], or [`KeyError::Damaged`].
    pub fn open(&self, volume: &str, text: &str) -> Result<RawKey, KeyError> {
        let record = self.parse(volume, text)?;
        Ok(xts_key(&record.unwrap(&self.keks)?, record.group()))
    }

    /// The text that takes the place of `text` after the key-encryption key was replaced; `None` if it is wrapped with the current one.
    ///
    /// # Errors
    /// Those of [`RawKeys::open`], and [`KeyError::NoKek`].
    pub fn rewrap(&self, volume: &str, text: &str) -> Result<Option<String>, KeyError> {
        let kek = self.keks.current_for(|| format!("rotating the key of volume {volume}"))?;
        let record = self.parse(volume, text)?;
        let data_key = record.unwrap(&self.keks)?;
        if record.state == State::Wrapped(kek.id()) {
            return Ok(None);
        }
        let mut random = [0; 32];
        (self.random)(&mut random);
        Ok(Some(to_text(&Record::wrap(kek, owner(record.group()), record.key_id(), &data_key, &random))))
    }

    /// The key-encryption key that wraps the key in the entry of `volume` (for errors). Needs none.
    ///
    /// # Errors
    /// [`KeyError::Damaged`].
    pub fn wrapped_by(&self, volume: &str, text: &str) -> Result<KekId, KeyError> {
        let record = self.parse(volume, text)?;
        match record.state {
            State::Wrapped(kek) => Ok(kek),
            _ => Err(record.damaged("it holds no wrapped key")),
        }
    }

    fn parse(&self, volume: &str, text: &str) -> Result<Record, KeyError> {
        let name = format!("the key in the entry of volume {volume}");
        let damaged = |why| KeyError::Damaged { record: name.clone(), why };
        let bytes = from_text(text).ok_or(damaged("it is not written in hexadecimal digits"))?;
        Record::parse(&name, &bytes, Purpose::RawVolume, Uuid::nil())
    }
}

fn owner(drawn: Uuid) -> Owner {
    Owner { purpose: Purpose::RawVolume, pool: Uuid::nil(), group: drawn }
}

fn xts_key(data_key: &Key, drawn: Uuid) -> RawKey {
    derive(data_key.bytes(), &[], &[XTS_INFO, drawn.as_bytes()])
}

fn to_text(record: &[u8; RECORD_LEN]) -> String {
    record.iter().map(|byte| format!("{byte:02x}")).collect()
}

fn from_text(text: &str) -> Option<Vec<u8>> {
    let digits = text.chars().map(|digit| digit.to_digit(16)).collect::<Option<Vec<u32>>>()?;
    let (pairs, rest) = digits.as_chunks::<2>();
    rest.is_empty().then(|| pairs.iter().map(|[high, low]| (high << 4 | low) as u8).collect())
}
