//! AES-256-XTS, from aws-lc: the only file that calls it directly, as its Rust binding has no XTS.
//!
//! A data unit is encrypted under its number: the tweak is that number, little-endian. Nothing is authenticated, and a unit that is written twice with the same
//! content looks the same.

use std::ptr;

use aws_lc_sys::{EVP_CIPHER_CTX, EVP_CIPHER_CTX_free, EVP_CIPHER_CTX_new, EVP_Cipher, EVP_CipherInit_ex, EVP_aes_256_xts};

use crate::memory::Memory;

/// Bytes of a key: two of AES-256, which differ.
pub const XTS_KEY_LEN: usize = 64;

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Direction {
    Decrypt = 0,
    Encrypt = 1,
}

/// Encrypts and decrypts under one key. Stays on its thread.
pub struct Xts {
    encrypting: Context,
    decrypting: Context,
}

impl Xts {
    /// `None` if both halves of the key are the same, which XTS forbids.
    pub fn new(key: &[u8; XTS_KEY_LEN]) -> Option<Xts> {
        let differ = key[..XTS_KEY_LEN / 2] != key[XTS_KEY_LEN / 2..];
        let context = |direction| Context::new(key, direction);
        if differ {
            Some(Xts { encrypting: context(Direction::Encrypt)?, decrypting: context(Direction::Decrypt)? })
        } else {
            None
        }
    }

    /// Encrypts `len` bytes at `at` of `memory` in place, as the data unit of this number. Panics if they are not there, or not a multiple of 16.
    pub fn encrypt(&mut self, memory: &mut Memory, at: usize, len: usize, unit: u64) {
        self.encrypting.apply(memory, at, len, unit);
    }

    /// Undoes [`Xts::encrypt`].
    pub fn decrypt(&mut self, memory: &mut Memory, at: usize, len: usize, unit: u64) {
        self.decrypting.apply(memory, at, len, unit);
    }
}

/// A key set up for one direction. Freeing wipes it.
struct Context(ptr::NonNull<EVP_CIPHER_CTX>);

impl Context {
    fn new(key: &[u8; XTS_KEY_LEN], direction: Direction) -> Option<Context> {
        // SAFETY: takes nothing; the result is checked.
        let context = Context(ptr::NonNull::new(unsafe { EVP_CIPHER_CTX_new() })?);
        // SAFETY: the context is fresh and ours, the cipher static, and the key as long as the cipher reads: 64 bytes.
        let set = unsafe {
            EVP_CipherInit_ex(context.0.as_ptr(), EVP_aes_256_xts(), ptr::null_mut(), key.as_ptr(), ptr::null(), direction as i32)
        };
        (set == 1).then_some(context)
    }

    fn apply(&mut self, memory: &mut Memory, at: usize, len: usize, unit: u64) {
        let parts = memory.slice(at, len);
        let [part] = &parts[..] else { panic!("a data unit lies in one piece") };
        assert!(len > 0 && len.is_multiple_of(16), "whole blocks of AES");
        let tweak = u128::from(unit).to_le_bytes();
        let bytes = part.iov_base.cast::<u8>();
        let keep = -1;
        // SAFETY: the context is ours and keyed; a tweak has 16 bytes, and null for the key keeps it.
        let set = unsafe { EVP_CipherInit_ex(self.0.as_ptr(), ptr::null(), ptr::null_mut(), ptr::null(), tweak.as_ptr(), keep) };
        // SAFETY: `slice` vouches for `len` bytes at `bytes`, which `memory`, borrowed exclusively, keeps mapped; in and out may be the same.
        let done = unsafe { EVP_Cipher(self.0.as_ptr(), bytes, bytes, len) };
        assert!(set == 1 && done > 0, "aws-lc encrypts whole data units");
    }
}

impl Drop for Context {
    fn drop(&mut self) {
        // SAFETY: it came from EVP_CIPHER_CTX_new and nobody else has it.
        unsafe { EVP_CIPHER_CTX_free(self.0.as_ptr()) };
    }
}
