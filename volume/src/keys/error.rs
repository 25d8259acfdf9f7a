//! What can go wrong with keys, in words for whoever runs the pool.

use backends::segments::StoreError;

use super::kek::KekId;

/// Why a key is not to be had. Nothing is ever changed before it is known that all keys can be read.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum KeyError {
    /// A key-encryption key could not be read where it should be.
    #[error("key-encryption key in {origin}: {why}")]
    Source { origin: String, why: String },
    /// Something is to be encrypted, and there is no key-encryption key.
    #[error(
        "{what} needs a key-encryption key, and none is configured: make one with `openssl rand -hex 32`, keep a copy of it elsewhere, \
         and name it in [keys]"
    )]
    NoKek { what: String },
    /// The keys that are there do not open a record.
    #[error(
        "{record} is wrapped with key-encryption key {wanted}, and {configured}; nothing was changed. Configure that key, as the previous \
         one if it was replaced"
    )]
    WrongKek { record: String, wanted: KekId, configured: String },
    /// A record is not what novastor wrote.
    #[error("{record} is damaged: {why}; nothing was changed. Restore it from a copy of the pool")]
    Damaged { record: String, why: &'static str },
    /// There is no record where one must be.
    #[error("{record} is missing: without it nothing can be decrypted. Restore it from a copy of the pool")]
    Missing { record: String },
    /// The key was destroyed on purpose.
    #[error("the key in {record} was erased, and with it the volume's content; delete the volume")]
    Erased { record: String },
    /// A domain of this name has a key already.
    #[error("{record} exists already; a domain gets its key once")]
    Exists { record: String },
    /// Another host has replaced the key-encryption key.
    #[error(
        "the key-encryption key of this pool was replaced by {by}, which is not configured here: configure it, and try again"
    )]
    Rotated { by: KekId },
    /// Another host changed the record at the same time.
    #[error("{record} was changed by another host at the same time; try again")]
    Raced { record: String },
    #[error(transparent)]
    Store(#[from] StoreError),
}
