//! What a copy reads from and writes to.

use std::io;

/// A stretch of one kind.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Run {
    /// Bytes, never 0.
    pub len: u64,
    /// It reads as zeroes, and takes no space or little.
    pub zero: bool,
}

/// Bytes under addresses, used by several threads at once. No call reaches past `size`.
pub trait Disk: Send + Sync {
    /// For messages.
    fn name(&self) -> &str;

    /// In bytes.
    fn size(&self) -> u64;

    /// What stands at `offset`: at least one run, at most `len` bytes in all. What is not known counts as data.
    fn runs(&self, offset: u64, len: u64) -> io::Result<Vec<Run>>;

    fn read(&self, offset: u64, buffer: &mut [u8]) -> io::Result<()>;

    fn write(&self, offset: u64, data: &[u8]) -> io::Result<()>;

    /// Makes the range read as zeroes, and frees its space where that can be done.
    fn zero(&self, offset: u64, len: u64) -> io::Result<()>;

    /// Makes everything written durable.
    fn flush(&self) -> io::Result<()>;
}

/// One run as a list, of at most `len` bytes.
pub fn one(found: u64, len: u64, zero: bool) -> Vec<Run> {
    vec![Run { len: found.min(len), zero }]
}
