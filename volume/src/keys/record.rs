//! A key as it is stored: wrapped, or a note that there is none. Numbers are little-endian.
//!
//! ```text
//!    0   8  magic "novakeys"
//!    8   4  format version: 1
//!   12   1  what for: 1 the pool's key, 2 the data key of a domain, 3 the data key of a raw volume
//!   13   1  state: 1 wrapped, 2 in clear, 3 not encrypted (no key), 4 erased (no key)
//!   14   2  zero
//!   16  16  UUID of the pool; zeroes for a raw volume
//!   32  16  group whose key it is; for a raw volume drawn with the key; zeroes for the pool's
//!   48  16  key id: random, names this key for ever
//!   64  16  id of the key-encryption key; zeroes unless wrapped
//!   80  32  salt; zeroes unless wrapped
//!  112  32  the key, encrypted if wrapped; zeroes if there is none
//!  144  16  tag
//! ```
//!
//! Wrapped: AES-256-GCM under HKDF-SHA256(key-encryption key, salt, `novastor v1 key wrap`), nonce zero, bytes 0..112 as AAD. The salt is a keyed hash of fresh
//! random bytes, of bytes 0..80 and of the key itself, so that even a generator that repeats itself never has two texts encrypted under one key.
//! Otherwise the tag is a hash of all before, keyed by the pool's key, so that nobody without it can say that a domain is not encrypted.

use std::ops::Range;

use aws_lc_rs::constant_time::verify_slices_are_equal;
use uuid::Uuid;
use zeroize::Zeroizing;

use super::KeyError;
use super::kek::{Kek, KekId, Keks};
use crate::bytes_at::{array_at, u32_at};
use crate::crypto::{Aead, Key, TAG_LEN, derive};

/// Bytes of a record.
pub(crate) const RECORD_LEN: usize = 160;
const MAGIC: [u8; 8] = *b"novakeys";
const VERSION: u32 = 1;
const SALT: Range<usize> = 80..112;
const KEY: Range<usize> = 112..144;
const TAG: Range<usize> = 144..RECORD_LEN;
const WRAP_INFO: &[u8] = b"novastor v1 key wrap";
const SALT_CONTEXT: &str = "novastor v1 key wrap salt";
const TAG_CONTEXT: &str = "novastor v1 key record";
/// Each salt gives a key that seals one record.
const NONCE: [u8; 12] = [0; 12];

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Purpose {
    Pool = 1,
    Domain = 2,
    RawVolume = 3,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum State {
    Wrapped(KekId),
    Clear,
    NotEncrypted,
    Erased,
}

impl State {
    fn code(self) -> u8 {
        match self {
            State::Wrapped(_) => 1,
            State::Clear => 2,
            State::NotEncrypted => 3,
            State::Erased => 4,
        }
    }
}

/// Which key a record holds.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Owner {
    pub(crate) purpose: Purpose,
    pub(crate) pool: Uuid,
    /// Zero for the pool's key.
    pub(crate) group: Uuid,
}

/// A record whose fields make sense. Whether it is genuine is found out with a key.
#[derive(Clone, PartialEq, Eq)]
pub(crate) struct Record {
    bytes: [u8; RECORD_LEN],
    /// For errors.
    name: String,
    pub(crate) state: State,
}

impl Record {
    /// `random` is fresh.
    pub(crate) fn wrap(kek: &Kek, owner: Owner, key_id: [u8; 16], key: &Key, random: &[u8; 32]) -> [u8; RECORD_LEN] {
        let mut bytes = head(owner, State::Wrapped(kek.id()), key_id);
        let salt_key = Zeroizing::new(blake3::derive_key(SALT_CONTEXT, kek.key().bytes()));
        let mut hasher = blake3::Hasher::new_keyed(&salt_key);
        hasher.update(random).update(&bytes[..SALT.start]).update(key.bytes());
        bytes[SALT].copy_from_slice(hasher.finalize().as_bytes());
        let wrapping = wrapping_key(kek, &bytes);
        let (aad, rest) = bytes.split_at_mut(KEY.start);
        let (sealed, tag) = rest.split_at_mut(KEY.len());
        sealed.copy_from_slice(key.bytes());
        tag.copy_from_slice(&wrapping.seal(NONCE, aad, sealed));
        bytes
    }

    /// The key of a pool without a key-encryption key.
    pub(crate) fn in_clear(owner: Owner, key_id: [u8; 16], pool_key: &Key) -> [u8; RECORD_LEN] {
        let mut bytes = head(owner, State::Clear, key_id);
        bytes[KEY].copy_from_slice(pool_key.bytes());
        let tag = keyed_tag(pool_key, &bytes);
        bytes[TAG].copy_from_slice(&tag);
        bytes
    }

    /// A note that there is no key: `state` is `NotEncrypted` or `Erased`.
    pub(crate) fn without_key(owner: Owner, state: State, pool_key: &Key) -> [u8; RECORD_LEN] {
        let mut bytes = head(owner, state, [0; 16]);
        let tag = keyed_tag(pool_key, &bytes);
        bytes[TAG].copy_from_slice(&tag);
        bytes
    }

    /// Reads the record `name` (for errors) of a pool.
    pub(crate) fn parse(name: &str, bytes: &[u8], purpose: Purpose, pool: Uuid) -> Result<Record, KeyError> {
        let damaged = |why| KeyError::Damaged { record: name.to_owned(), why };
        let bytes: [u8; RECORD_LEN] = bytes.try_into().map_err(|_| damaged("its length is wrong"))?;
        if bytes[..8] != MAGIC {
            return Err(damaged("it is no record of a key"));
        }
        if u32_at(&bytes, 8) != VERSION {
            return Err(damaged("it is of a format version that this novastor does not know; use a newer one"));
        }
        if bytes[12] != purpose as u8 || bytes[14..16] != [0; 2] {
            return Err(damaged("it holds a key of another kind"));
        }
        if bytes[16..32] != pool.into_bytes() {
            return Err(damaged("it belongs to another pool"));
        }
        let state = match bytes[13] {
            1 => State::Wrapped(KekId(array_at(&bytes, 64))),
            2 if purpose == Purpose::Pool => State::Clear,
            3 if purpose == Purpose::Domain => State::NotEncrypted,
            4 if purpose == Purpose::Domain => State::Erased,
            _ => return Err(damaged("its state is unknown")),
        };
        Ok(Record { bytes, name: name.to_owned(), state })
    }

    pub(crate) fn group(&self) -> Uuid {
        Uuid::from_bytes(array_at(&self.bytes, 32))
    }

    pub(crate) fn key_id(&self) -> [u8; 16] {
        array_at(&self.bytes, 48)
    }

    /// The key that it wraps.
    pub(crate) fn unwrap(&self, keks: &Keks) -> Result<Key, KeyError> {
        let State::Wrapped(wanted) = self.state else { return Err(self.damaged("it holds no wrapped key")) };
        let wrong = || KeyError::WrongKek { record: self.name.clone(), wanted, configured: keks.describe() };
        let kek = keks.find(wanted).ok_or_else(wrong)?;
        let mut key = Zeroizing::new([0; 32]);
        let (aad, sealed, tag) = (&self.bytes[..KEY.start], &self.bytes[KEY], array_at(&self.bytes, TAG.start));
        let genuine = wrapping_key(kek, &self.bytes).open(NONCE, aad, sealed, &tag, &mut key[..]);
        if genuine { Ok(Key::new(*key)) } else { Err(self.damaged("it was changed since it was written")) }
    }

    /// The key that it holds in clear.
    pub(crate) fn clear_key(&self) -> Result<Key, KeyError> {
        let key = Key::new(array_at(&self.bytes, KEY.start));
        self.check(&key)?;
        Ok(key)
    }

    /// Whether someone with the pool's key wrote it, for those without a wrapped key.
    pub(crate) fn check(&self, pool_key: &Key) -> Result<(), KeyError> {
        let genuine = verify_slices_are_equal(&keyed_tag(pool_key, &self.bytes), &self.bytes[TAG]).is_ok();
        if genuine { Ok(()) } else { Err(self.damaged("it was changed since it was written")) }
    }

    pub(crate) fn damaged(&self, why: &'static str) -> KeyError {
        KeyError::Damaged { record: self.name.clone(), why }
    }
}

fn head(owner: Owner, state: State, key_id: [u8; 16]) -> [u8; RECORD_LEN] {
    let mut bytes = [0; RECORD_LEN];
    bytes[..8].copy_from_slice(&MAGIC);
    bytes[8..12].copy_from_slice(&VERSION.to_le_bytes());
    bytes[12] = owner.purpose as u8;
    bytes[13] = state.code();
    bytes[16..32].copy_from_slice(owner.pool.as_bytes());
    bytes[32..48].copy_from_slice(owner.group.as_bytes());
    bytes[48..64].copy_from_slice(&key_id);
    if let State::Wrapped(kek) = state {
        bytes[64..80].copy_from_slice(&kek.0);
    }
    bytes
}

fn wrapping_key(kek: &Kek, bytes: &[u8; RECORD_LEN]) -> Aead {
    Aead::new(&derive(kek.key().bytes(), &bytes[SALT], &[WRAP_INFO]))
}

fn keyed_tag(pool_key: &Key, bytes: &[u8; RECORD_LEN]) -> [u8; TAG_LEN] {
    let key = Zeroizing::new(blake3::derive_key(TAG_CONTEXT, pool_key.bytes()));
    array_at(blake3::keyed_hash(&key, &bytes[..TAG.start]).as_bytes(), 0)
}
