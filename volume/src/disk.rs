//! The local device or file that carries a log.

use blockdev::Errno;
use bytes::Bytes;

use crate::environment::LocalFuture;

/// A disk of fixed size. Offsets and lengths are multiples of its sector size.
///
/// A write that was not followed by a successful sync may be lost, or lost in part: each sector by itself keeps its old or its new content.
/// A failed sync may have lost any write before it, for good.
pub trait LogDisk {
    /// Bytes.
    fn len(&self) -> u64;

    fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Bytes that are written as a whole or not at all: a power of two, at least 512.
    fn sector_size(&self) -> usize;

    fn read(&self, offset: u64, len: usize) -> LocalFuture<'_, Result<Vec<u8>, Errno>>;

    /// Where, at or after `offset`, something else than zeroes may be, or the end. A disk that cannot tell says `offset`.
    fn next_data(&self, offset: u64) -> LocalFuture<'_, Result<u64, Errno>> {
        Box::pin(async move { Ok(offset) })
    }

    /// Writes the parts one behind the other; their lengths may be any, only all together they fill sectors.
    fn write(&self, offset: u64, parts: Vec<Bytes>) -> LocalFuture<'_, Result<(), Errno>>;

    /// Makes durable every write that was completed before this call.
    fn sync(&self) -> LocalFuture<'_, Result<(), Errno>>;
}
