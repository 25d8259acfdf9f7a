//! Encryption of the log of a volume that has a data key.
//!
//! ```text
//!   data key ──HKDF(salt of the opening)──▶ key of an opening ──AES-256-GCM──▶ payload of each write, and the tag of each header
//! ```
//!
//! Every opening draws a salt, which stands in each of its batches; its key is bound to group, log and epoch as well. No two openings share an epoch, so that
//! none shares a key, even if its generator repeats itself: what a crash tore off and the next opening writes again, at the same place and under the same
//! batch number, is encrypted with another key. An opening that takes batches back draws another salt before it gives their numbers again. Under one salt
//! a batch number is given once; with the index of the record it makes the nonce.
//!
//! Headers stay in clear. Their tag covers all of header and records, and through these the tags of the payloads and the chain of batches before.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::rc::Rc;

use crate::crypto::{Aead, Key, TAG_LEN, derive};
use crate::log::format::{BatchHeader, LogId};

const KEY_INFO: &[u8] = b"novastor v1 log";
const CHECK_INFO: &[u8] = b"novastor v1 log key check";
/// In place of the index of a record: the header itself.
const HEADER_INDEX: u32 = u32::MAX;

/// What an opening of the log puts into its batches; zeroes in a log that is not encrypted.
pub(crate) type LogSalt = [u8; 32];

/// Tells in the superblock which data key a log was made with; zeroes if it is not encrypted.
pub(crate) type KeyCheck = [u8; 32];

/// What the superblock says of the key.
pub(crate) fn key_check(data_key: Option<&[u8; 32]>, group: &[u8; 16], log_id: &LogId) -> KeyCheck {
    data_key.map_or([0; 32], |data_key| *derive(data_key, &[], &[CHECK_INFO, group, log_id]))
}

/// What an opening, or a part of it, encrypts with.
type Opening = (LogSalt, Rc<OpeningKey>);

/// The keys of one log: those of the openings that wrote what is in it.
pub(crate) struct LogCipher {
    data_key: Key,
    group: [u8; 16],
    log_id: LogId,
    /// By epoch, and the first batch that was written with them.
    openings: RefCell<BTreeMap<(u64, u64), Opening>>,
}

impl LogCipher {
    pub(crate) fn new(data_key: &[u8; 32], group: [u8; 16], log_id: LogId) -> LogCipher {
        LogCipher { data_key: Key::new(*data_key), group, log_id, openings: RefCell::default() }
    }

    /// The key of an opening. It is kept only if asked to.
    pub(crate) fn opening(&self, epoch: u64, salt: &LogSalt) -> Rc<OpeningKey> {
        let openings = self.openings.borrow();
        let known = openings.range((epoch, 0)..=(epoch, u64::MAX)).rev().find(|(_, (known, _))| known == salt);
        known.map_or_else(|| Rc::new(self.derive(epoch, salt)), |(_, (_, key))| key.clone())
    }

    /// Keeps the key of an opening, by which its payloads will be read: those of batch `number` and later ones.
    pub(crate) fn keep(&self, epoch: u64, number: u64, salt: LogSalt, key: Rc<OpeningKey>) {
        let mut openings = self.openings.borrow_mut();
        let before = openings.range((epoch, 0)..=(epoch, number)).next_back();
        if before.is_none_or(|(_, (known, _))| *known != salt) {
            openings.insert((epoch, number), (salt, key));
        }
    }

    /// The key of a batch, if it is kept.
    pub(crate) fn kept(&self, epoch: u64, number: u64) -> Option<Rc<OpeningKey>> {
        let openings = self.openings.borrow();
        let (_, (_, key)) = openings.range((epoch, 0)..=(epoch, number)).next_back()?;
        Some(key.clone())
    }

    fn derive(&self, epoch: u64, salt: &LogSalt) -> OpeningKey {
        let info = [KEY_INFO, &self.group, &self.log_id, &epoch.to_le_bytes()];
        OpeningKey(Aead::new(&derive(self.data_key.bytes(), salt, &info)))
    }
}

/// Where a payload stands in the log's history, and its tag: what it takes to open it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct PayloadSeal {
    pub(crate) epoch: u64,
    /// Of its batch.
    pub(crate) number: u64,
    /// Among the records of its batch.
    pub(crate) index: u32,
    pub(crate) tag: [u8; TAG_LEN],
}

/// Encrypts and checks the batches of one opening.
pub(crate) struct OpeningKey(Aead);

impl OpeningKey {
    /// Encrypts a payload in place.
    pub(crate) fn seal_payload(&self, number: u64, index: usize, payload: &mut [u8]) -> [u8; TAG_LEN] {
        self.0.seal(nonce(number, index as u32), &[], payload)
    }

    /// The payload in clear, or `None` if it is not what was sealed.
    pub(crate) fn open_payload(&self, seal: &PayloadSeal, payload: &[u8]) -> Option<Vec<u8>> {
        let mut opened = vec![0; payload.len()];
        self.0.open(nonce(seal.number, seal.index), &[], payload, &seal.tag, &mut opened).then_some(opened)
    }

    /// The tag of a header, whose payloads have theirs.
    pub(crate) fn header_tag(&self, header: &BatchHeader) -> [u8; TAG_LEN] {
        self.0.seal(nonce(header.number, HEADER_INDEX), &header.lay_out(), &mut [])
    }

    pub(crate) fn is_genuine(&self, header: &BatchHeader) -> bool {
        self.0.open(nonce(header.number, HEADER_INDEX), &header.lay_out(), &[], &header.tag, &mut [])
    }
}

fn nonce(number: u64, index: u32) -> [u8; 12] {
    let mut nonce = [0; 12];
    nonce[..8].copy_from_slice(&number.to_le_bytes());
    nonce[8..].copy_from_slice(&index.to_le_bytes());
    nonce
}

#[cfg(test)]
mod tests {
    use super::*;

    const GROUP: [u8; 16] = [1; 16];
    const LOG: LogId = [2; 16];

    fn cipher() -> LogCipher {
        LogCipher::new(&[9; 32], GROUP, LOG)
    }

    fn sealed(epoch: u64, salt: u8, number: u64, index: usize) -> Vec<u8> {
        let mut payload = vec![7; 64];
        let tag = cipher().opening(epoch, &[salt; 32]).seal_payload(number, index, &mut payload);
        payload.extend_from_slice(&tag);
        payload
    }

    #[test]
    fn one_payload_at_one_place_is_never_encrypted_alike_by_two_openings() {
        let texts = [sealed(3, 1, 5, 0), sealed(4, 1, 5, 0), sealed(3, 2, 5, 0), sealed(3, 1, 6, 0), sealed(3, 1, 5, 1)];
        for (index, text) in texts.iter().enumerate() {
            assert!(texts[..index].iter().all(|other| other[..16] != text[..16]), "text {index} repeats a key stream");
        }
        assert_eq!(texts[0], sealed(3, 1, 5, 0));
    }

    #[test]
    fn a_batch_is_read_with_the_key_that_was_kept_for_it() {
        let cipher = cipher();
        for (epoch, number, salt) in [(3, 5, 1), (3, 6, 1), (3, 8, 2), (3, 8, 3), (4, 9, 4)] {
            cipher.keep(epoch, number, [salt; 32], cipher.opening(epoch, &[salt; 32]));
        }
        let salt_of = |epoch, number| {
            let key = cipher.kept(epoch, number)?;
            (1..5).find(|salt| Rc::ptr_eq(&key, &cipher.opening(epoch, &[*salt; 32])))
        };
        assert_eq!(salt_of(3, 4), None);
        assert_eq!([5, 6, 7, 8, 99].map(|number| salt_of(3, number)), [1, 1, 1, 3, 3].map(Some));
        assert_eq!((salt_of(4, 8), salt_of(4, 9), salt_of(5, 9)), (None, Some(4), None));
    }

    /// Put together from the primitives, as docs/format.md says.
    #[test]
    fn keys_nonces_and_tags_are_what_is_documented() {
        let info = [&b"novastor v1 log"[..], &GROUP, &LOG, &3_u64.to_le_bytes()].concat();
        let aead = Aead::new(&derive(&[9; 32], &[1; 32], &[&info]));
        let mut expected = vec![7; 64];
        let tag = aead.seal([5, 0, 0, 0, 0, 0, 0, 0, 2, 0, 0, 0], &[], &mut expected);
        expected.extend_from_slice(&tag);
        assert_eq!(sealed(3, 1, 5, 2), expected);
        assert_eq!(key_check(None, &GROUP, &LOG), [0; 32]);
        let info = [&b"novastor v1 log key check"[..], &GROUP, &LOG].concat();
        assert_eq!(key_check(Some(&[9; 32]), &GROUP, &LOG), *derive::<32>(&[9; 32], &[], &[&info]));
    }
}
