//! Sealing: what makes the bytes of a segment unreadable, or at least unchangeable unnoticed.
//!
//! ```text
//!   data key ── BLAKE3 derive_key("novastor v1 salt key", data key ‖ domain) ──▶ salt key
//!   salt = BLAKE3 keyed_hash(salt key, random 32 ‖ domain 16 ‖ u32 len ‖ segment id ‖ u64 len ‖ header ‖ body before sealing)
//!   key 32 ‖ commitment 32 = HKDF-SHA256(ikm: data key, salt, info: "novastor v1 seal" ‖ domain 16 ‖ segment id)
//!   frame n:  AES-256-GCM(key, nonce: n as 96 bits, AAD: domain 16 ‖ n u32 ‖ prefix 4 ‖ segment id), n = its unit
//!   header:   the same with n = 2^32 - 1 and a prefix of zeroes
//!   stored in clear in the segment:  salt 32 ‖ commitment 32
//! ```
//! Without encryption: tag = the first 16 bytes of BLAKE3 keyed_hash(checksum key, AAD as above ‖ bytes), the checksum key =
//! derive_key("novastor v1 checksum", pool key ‖ domain); salt = zeroes; commitment = derive_key("novastor v1 checksum key check", checksum
//! key). It shows rot and misplacement to whoever has the pool's key; it hides nothing.
//!
//! **Nonces.** GCM breaks when two different texts are sealed under one key and nonce. Within a segment the numbers differ: units grow from
//! frame to frame and stay below 2^20. Between segments the keys differ, as the salt is a hash of *everything that will be sealed*, header
//! included, and of where: two seals share a salt only if all their input is equal, and then their output is equal too, which is what a
//! retry wants. So a repeated random state (a restored memory snapshot, a twin of the daemon, a broken generator) reveals at worst that
//! the same segment was sealed twice under one name. The random bytes hide that too where they are good. A header must be in the salt: a
//! crash can leave the same frames to be sealed again under another map of addresses.
//!
//! **The salt is public**, and a hash of plain text; its key keeps others from testing guesses against it.
//!
//! **Commitment.** GCM alone does not commit to its key: one ciphertext can be made that opens under two keys. Here the commitment is derived
//! with the key by HKDF-SHA256 from data key, salt, domain and segment id, and checked before anything is opened, so a segment
//! opens under one data key, one domain and one id only. It also tells a wrong key apart from rot. A reader never tries several keys: the
//! segment names its own.
//!
//! **Never in the AAD: the LBA**, or a block could not be shared. That a block belongs to an LBA is the business of the map, which is
//! authenticated itself.
//!
//! **Limits.** At most 2^20 frames and 64 MiB per key, far below GCM's. A tag has 128 bits.
//!
//! **Misuse.** A seal takes the body by value, so nothing is sealed twice or changed afterwards. Keys are not printable. What the caller must
//! keep: a segment id names one segment of the pool for ever, encoded at a fixed length or without ambiguity; all parts of one segment go
//! through one seal.

use crate::body::{Body, FramePrefix, PREFIX_LEN, TAG_LEN};
use crate::hash::{Domain, domain_key, first_half};
use aws_lc_rs::aead::{AES_256_GCM, Aad, LessSafeKey, Nonce, UnboundKey};
use aws_lc_rs::hkdf::{HKDF_SHA256, KeyType, Salt};

/// Context strings. Part of the format: never changed.
const SALT_CONTEXT: &str = "novastor v1 salt key";
const CHECKSUM_CONTEXT: &str = "novastor v1 checksum";
const CHECKSUM_CHECK_CONTEXT: &str = "novastor v1 checksum key check";
const SEAL_INFO: &[u8] = b"novastor v1 seal";

/// The number under which a segment's header is sealed; no frame has it.
const HEADER_NUMBER: u32 = u32::MAX;
const HEADER_PREFIX: [u8; PREFIX_LEN] = [0; PREFIX_LEN];

/// How the segments of a domain are sealed. The numbers are part of the format.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[repr(u8)]
pub enum Protection {
    /// In clear, with a keyed checksum of 128 bits for each frame.
    Checksum = 0,
    Aes256Gcm = 1,
}

impl Protection {
    /// `None`: none that this version knows.
    #[must_use]
    pub fn from_id(id: u8) -> Option<Self> {
        [Self::Checksum, Self::Aes256Gcm].into_iter().find(|protection| *protection as u8 == id)
    }
}

/// What a segment keeps in clear to be opened with.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Seal {
    pub salt: [u8; 32],
    pub commitment: [u8; 32],
}

impl Seal {
    /// Bytes on disk.
    pub const LEN: usize = 64;

    #[must_use]
    pub fn to_bytes(&self) -> [u8; Self::LEN] {
        let mut bytes = [0; Self::LEN];
        bytes[..32].copy_from_slice(&self.salt);
        bytes[32..].copy_from_slice(&self.commitment);
        bytes
    }

    #[must_use]
    pub fn from_bytes(bytes: &[u8; Self::LEN]) -> Self {
        let mut seal = Self { salt: [0; 32], commitment: [0; 32] };
        seal.salt.copy_from_slice(&bytes[..32]);
        seal.commitment.copy_from_slice(&bytes[32..]);
        seal
    }
}

/// Why something sealed was not opened, or not sealed.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum SealError {
    #[error("sealed with another key, or for another domain or segment")]
    WrongKey,
    #[error("frame {0} is not what was sealed there")]
    FrameChanged(u32),
    #[error("the header is not what was sealed")]
    HeaderChanged,
    #[error("cut off: {found} bytes instead of {expected}")]
    CutOff { expected: usize, found: usize },
    #[error("codec {0} is not known to this version")]
    UnknownCodec(u8),
    #[error("{0}")]
    Malformed(&'static str),
    #[error("the cryptographic library refused")]
    Library,
}

impl From<aws_lc_rs::error::Unspecified> for SealError {
    fn from(_: aws_lc_rs::error::Unspecified) -> Self {
        Self::Library
    }
}

/// A segment's sealed parts. Where they go is the business of who writes segments.
pub struct Sealed {
    pub seal: Seal,
    /// The header, 16 bytes longer than it was.
    pub header: Vec<u8>,
    /// The frames, each at its unit × 64.
    pub body: Vec<u8>,
}

/// Seals the segments of one domain, and makes what opens them.
#[derive(Clone)]
pub struct Sealer {
    domain: Domain,
    keys: Keys,
}

#[derive(Clone)]
enum Keys {
    Checksum { checksum_key: [u8; 32] },
    Aes256Gcm { data_key: [u8; 32], salt_key: [u8; 32] },
}

impl Sealer {
    /// Segments are encrypted with keys derived from the domain's data key, which is random and used for nothing else.
    #[must_use]
    pub fn encrypting(domain: Domain, data_key: &[u8; 32]) -> Self {
        let salt_key = domain_key(SALT_CONTEXT, data_key, domain);
        Self { domain, keys: Keys::Aes256Gcm { data_key: *data_key, salt_key } }
    }

    /// Segments are in clear, with checksums keyed by the pool's key.
    #[must_use]
    pub fn checksumming(domain: Domain, pool_key: &[u8; 32]) -> Self {
        Self { domain, keys: Keys::Checksum { checksum_key: domain_key(CHECKSUM_CONTEXT, pool_key, domain) } }
    }

    #[must_use]
    pub fn protection(&self) -> Protection {
        match self.keys {
            Keys::Checksum { .. } => Protection::Checksum,
            Keys::Aes256Gcm { .. } => Protection::Aes256Gcm,
        }
    }

    /// Seals all of one segment. `random` is fresh for each segment and kept for its retries: equal input gives equal bytes.
    ///
    /// # Errors
    /// Only if the cryptographic library fails.
    pub fn seal(&self, segment_id: &[u8], random: &[u8; 32], header: &[u8], mut body: Body) -> Result<Sealed, SealError> {
        let salt = self.salt(segment_id, random, header, &body);
        let (lock, commitment) = self.lock(segment_id, &salt)?;
        let mut aad = self.aad(segment_id);
        for (number, prefix, packed, tag) in body.sealable() {
            aad.set(number, prefix);
            tag.copy_from_slice(&lock.seal(number, aad.as_bytes(), packed)?);
        }
        aad.set(HEADER_NUMBER, HEADER_PREFIX);
        let mut sealed_header = header.to_vec();
        let tag = lock.seal(HEADER_NUMBER, aad.as_bytes(), &mut sealed_header)?;
        sealed_header.extend_from_slice(&tag);
        Ok(Sealed { seal: Seal { salt, commitment }, header: sealed_header, body: body.bytes })
    }

    /// What opens the segment of this id with this seal. Worth keeping for segments that are read often.
    ///
    /// # Errors
    /// [`SealError::WrongKey`] if it was not sealed by a sealer like this one, for this id.
    pub fn opener(&self, segment_id: &[u8], seal: &Seal) -> Result<Opener, SealError> {
        let (lock, commitment) = self.lock(segment_id, &seal.salt)?;
        let no_salt = self.protection() == Protection::Checksum;
        if blake3::Hash::from_bytes(commitment) != seal.commitment || (no_salt && seal.salt != [0; 32]) {
            return Err(SealError::WrongKey);
        }
        Ok(Opener { lock, aad: self.aad(segment_id) })
    }

    fn salt(&self, segment_id: &[u8], random: &[u8; 32], header: &[u8], body: &Body) -> [u8; 32] {
        let Keys::Aes256Gcm { salt_key, .. } = &self.keys else { return [0; 32] };
        let mut hasher = blake3::Hasher::new_keyed(salt_key);
        hasher.update(random).update(&self.domain.0);
        hasher.update(&(segment_id.len() as u32).to_le_bytes()).update(segment_id);
        hasher.update(&(header.len() as u64).to_le_bytes()).update(header);
        hasher.update(&body.bytes);
        *hasher.finalize().as_bytes()
    }

    /// The lock of one segment, and what commits to it.
    fn lock(&self, segment_id: &[u8], salt: &[u8; 32]) -> Result<(Lock, [u8; 32]), SealError> {
        match &self.keys {
            Keys::Checksum { checksum_key } => {
                let commitment = blake3::derive_key(CHECKSUM_CHECK_CONTEXT, checksum_key);
                Ok((Lock::Checksum { key: *checksum_key }, commitment))
            }
            Keys::Aes256Gcm { data_key, .. } => {
                let mut output = [0; SealOutput::LEN];
                let extracted = Salt::new(HKDF_SHA256, salt).extract(data_key);
                extracted.expand(&[SEAL_INFO, &self.domain.0, segment_id], SealOutput)?.fill(&mut output)?;
                let (key, rest) = output.split_at(32);
                let mut commitment = [0; 32];
                commitment.copy_from_slice(rest);
                Ok((Lock::Aes256Gcm(Box::new(LessSafeKey::new(UnboundKey::new(&AES_256_GCM, key)?))), commitment))
            }
        }
    }

    fn aad(&self, segment_id: &[u8]) -> AssociatedData {
        let mut bytes = Vec::with_capacity(AssociatedData::FIXED_LEN + segment_id.len());
        bytes.extend_from_slice(&self.domain.0);
        bytes.resize(AssociatedData::FIXED_LEN, 0);
        bytes.extend_from_slice(segment_id);
        AssociatedData(bytes)
    }
}

/// How much HKDF gives: the key and the commitment.
struct SealOutput;

impl SealOutput {
    const LEN: usize = 64;
}

impl KeyType for SealOutput {
    fn len(&self) -> usize {
        Self::LEN
    }
}

/// Domain ‖ number ‖ prefix ‖ segment id. Everything before the id has a fixed length.
#[derive(Clone)]
struct AssociatedData(Vec<u8>);

impl AssociatedData {
    const FIXED_LEN: usize = 16 + 4 + PREFIX_LEN;

    fn set(&mut self, number: u32, prefix: [u8; PREFIX_LEN]) {
        self.0[16..20].copy_from_slice(&number.to_le_bytes());
        self.0[20..Self::FIXED_LEN].copy_from_slice(&prefix);
    }

    fn as_bytes(&self) -> &[u8] {
        &self.0
    }
}

/// The key of one segment.
enum Lock {
    Checksum { key: [u8; 32] },
    Aes256Gcm(Box<LessSafeKey>),
}

impl Lock {
    fn seal(&self, number: u32, aad: &[u8], bytes: &mut [u8]) -> Result<[u8; TAG_LEN], SealError> {
        match self {
            Self::Checksum { key } => Ok(checksum(key, aad, bytes)),
            Self::Aes256Gcm(key) => {
                let tag = key.seal_in_place_separate_tag(nonce(number), Aad::from(aad), bytes)?;
                tag.as_ref().try_into().map_err(|_| SealError::Library)
            }
        }
    }

    /// Writes the opened bytes to `out`, whose length is theirs. False if they are not what was sealed; `out` is then worthless.
    fn open(&self, number: u32, aad: &[u8], bytes: &[u8], tag: &[u8], out: &mut [u8]) -> bool {
        match self {
            Self::Checksum { key } => {
                out.copy_from_slice(bytes);
                checksum(key, aad, bytes) == tag
            }
            Self::Aes256Gcm(key) => key.open_separate_gather(nonce(number), Aad::from(aad), bytes, tag, out).is_ok(),
        }
    }
}

fn nonce(number: u32) -> Nonce {
    let mut bytes = [0; 12];
    bytes[..4].copy_from_slice(&number.to_le_bytes());
    Nonce::assume_unique_for_key(bytes)
}

fn checksum(key: &[u8; 32], aad: &[u8], bytes: &[u8]) -> [u8; TAG_LEN] {
    first_half(blake3::Hasher::new_keyed(key).update(aad).update(bytes).finalize().as_bytes())
}

/// Opens the parts of one segment.
pub struct Opener {
    lock: Lock,
    aad: AssociatedData,
}

impl Opener {
    /// Checks and decrypts the frame at `unit`. `stored` begins with the frame and may go on beyond it; the packed bytes replace the
    /// content of `packed`.
    ///
    /// # Errors
    /// If it is not the frame that was sealed there, or is cut off. `packed` is then empty.
    pub fn open_frame(&self, unit: u32, stored: &[u8], packed: &mut Vec<u8>) -> Result<FramePrefix, SealError> {
        packed.clear();
        let cut_off = |expected| SealError::CutOff { expected, found: stored.len() };
        let (raw_prefix, rest) = stored.split_first_chunk().ok_or(cut_off(PREFIX_LEN + 1 + TAG_LEN))?;
        let prefix = FramePrefix::parse(*raw_prefix)?;
        let sealed = rest.get(..prefix.stored_len() - PREFIX_LEN).ok_or(cut_off(prefix.stored_len()))?;
        let (bytes, tag) = sealed.split_at(sealed.len() - TAG_LEN);
        packed.resize(bytes.len(), 0);
        if !self.open(unit, *raw_prefix, bytes, tag, packed) {
            packed.clear();
            return Err(SealError::FrameChanged(unit));
        }
        Ok(prefix)
    }

    /// Checks and decrypts the segment's header.
    ///
    /// # Errors
    /// If it is not the header that was sealed.
    pub fn open_header(&self, sealed: &[u8]) -> Result<Vec<u8>, SealError> {
        let cut_off = SealError::CutOff { expected: TAG_LEN, found: sealed.len() };
        let split = sealed.len().checked_sub(TAG_LEN).ok_or(cut_off)?;
        let (bytes, tag) = sealed.split_at(split);
        let mut header = vec![0; bytes.len()];
        let opened = self.open(HEADER_NUMBER, HEADER_PREFIX, bytes, tag, &mut header);
        if opened { Ok(header) } else { Err(SealError::HeaderChanged) }
    }

    fn open(&self, number: u32, prefix: [u8; PREFIX_LEN], bytes: &[u8], tag: &[u8], out: &mut [u8]) -> bool {
        let mut aad = self.aad.clone();
        aad.set(number, prefix);
        self.lock.open(number, aad.as_bytes(), bytes, tag, out)
    }
}

#[cfg(test)]
mod tests;
