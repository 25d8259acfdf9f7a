//! The cryptographic primitives that keys and the log share: HKDF-SHA256, AES-256-GCM, and the system's generator.
//!
//! A nonce is never used twice with one key: whoever calls [`Aead::seal`] says why.

use aws_lc_rs::aead::{AES_256_GCM, Aad, LessSafeKey, Nonce, UnboundKey};
use aws_lc_rs::hkdf::{HKDF_SHA256, KeyType, Salt};
use zeroize::Zeroizing;

/// A symmetric key of 256 bits. It is wiped when dropped, and cannot be printed.
#[derive(Clone)]
pub(crate) struct Key(Zeroizing<[u8; 32]>);

/// Bytes of a tag.
pub(crate) const TAG_LEN: usize = 16;

impl Key {
    pub(crate) fn new(bytes: [u8; 32]) -> Key {
        Key(Zeroizing::new(bytes))
    }

    pub(crate) fn bytes(&self) -> &[u8; 32] {
        &self.0
    }
}

/// How many bytes HKDF is to give.
struct Length(usize);

impl KeyType for Length {
    fn len(&self) -> usize {
        self.0
    }
}

/// HKDF-SHA256 of `key`, `salt` and the joined parts of `info`; at most 8160 bytes.
pub(crate) fn derive<const N: usize>(key: &[u8; 32], salt: &[u8], info: &[&[u8]]) -> Zeroizing<[u8; N]> {
    let mut output = Zeroizing::new([0; N]);
    let extracted = Salt::new(HKDF_SHA256, salt).extract(key);
    let filled = extracted.expand(info, Length(N)).and_then(|expanded| expanded.fill(&mut output[..]));
    filled.expect("HKDF-SHA256 gives up to 8160 bytes");
    output
}

/// AES-256-GCM under one key.
pub(crate) struct Aead(LessSafeKey);

impl Aead {
    pub(crate) fn new(key: &[u8; 32]) -> Aead {
        Aead(LessSafeKey::new(UnboundKey::new(&AES_256_GCM, key).expect("a key of AES-256 has 32 bytes")))
    }

    /// Encrypts `bytes` (less than 64 GiB) in place, and gives their tag, which covers `aad` too.
    pub(crate) fn seal(&self, nonce: [u8; 12], aad: &[u8], bytes: &mut [u8]) -> [u8; TAG_LEN] {
        let nonce = Nonce::assume_unique_for_key(nonce);
        let sealed = self.0.seal_in_place_separate_tag(nonce, Aad::from(aad), bytes).expect("GCM seals up to 64 GiB");
        let mut tag = [0; TAG_LEN];
        tag.copy_from_slice(sealed.as_ref());
        tag
    }

    /// Decrypts `sealed` to `opened`, which is as long. False if these are not the bytes and the `aad` that were sealed; `opened` is then worthless.
    pub(crate) fn open(&self, nonce: [u8; 12], aad: &[u8], sealed: &[u8], tag: &[u8; TAG_LEN], opened: &mut [u8]) -> bool {
        self.0.open_separate_gather(Nonce::assume_unique_for_key(nonce), Aad::from(aad), sealed, tag, opened).is_ok()
    }
}

/// Fills `bytes` from the system's generator: what keys are made of.
///
/// # Panics
/// If the system has no randomness to give.
#[allow(clippy::disallowed_methods)]
pub fn system_random(bytes: &mut [u8]) {
    aws_lc_rs::rand::fill(bytes).expect("the system's random generator works");
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The bytes are those of Python's hmac module, put together as RFC 5869 says.
    #[test]
    fn derive_is_hkdf_sha256() {
        let key = std::array::from_fn(|index| index as u8);
        let expected = [
            0xea, 0xb5, 0xe6, 0x50, 0x2d, 0x16, 0xb2, 0x30, 0xba, 0xc4, 0x3d, 0x3b, 0xff, 0x5e, 0xef, 0x3b, 0x12, 0xdc, 0x93,
            0x72, 0x81, 0xd2, 0xac, 0x13, 0xd8, 0x90, 0x2d, 0x63, 0xb1, 0xa9, 0x03, 0x5e, 0x49, 0xf5, 0x0b, 0x10, 0x0d, 0x5c,
            0x47, 0xf3,
        ];
        assert_eq!(*derive::<40>(&key, b"salt", &[b"no", b"va"]), expected);
    }

    #[test]
    fn what_was_sealed_opens_under_the_same_nonce_and_data_only() {
        let aead = Aead::new(&[1; 32]);
        let mut sealed = *b"sixteen bytes or";
        let tag = aead.seal([2; 12], b"aad", &mut sealed);
        let mut opened = [0; 16];
        assert!(aead.open([2; 12], b"aad", &sealed, &tag, &mut opened));
        assert_eq!(&opened, b"sixteen bytes or");
        assert!(!aead.open([3; 12], b"aad", &sealed, &tag, &mut opened));
        assert!(!aead.open([2; 12], b"bad", &sealed, &tag, &mut opened));
        assert!(!Aead::new(&[2; 32]).open([2; 12], b"aad", &sealed, &tag, &mut opened));
    }

    #[test]
    fn the_generator_does_not_repeat() {
        let [mut first, mut second] = [[0; 32]; 2];
        system_random(&mut first);
        system_random(&mut second);
        assert!(first != second && first != [0; 32]);
    }
}
