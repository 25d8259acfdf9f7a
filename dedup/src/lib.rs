//! Data reduction without I/O: hashing, the sparse deduplication index, compression frames and sealing. Bytes in, bytes out.
//!
//! ```text
//!   blocks of a batch ─▶ Hashes     zeroes found, hashed, repeats within the batch found
//!                          │ hashes
//!                          ▼
//!                        Index      hooks ─▶ "load these headers" ─▶ neighbourhoods ─▶ candidates
//!                          ▼
//!                        accept     what saves more than it fragments, and the ancestry
//!                          ▼
//!                        Packer     what is left, in frames of 4 or 16 blocks, compressed into a Body
//!                          ▼
//!                        Sealer     one salt, one key, one seal for a segment's header and frames
//!
//!   Location ─▶ Opener ─▶ FrameReader ─▶ block
//! ```
//!
//! Invariants:
//! - Everything here is synchronous and single-threaded; an object is kept and used again, since its contexts and tables are dear to make.
//! - No clock, no randomness, no file: what varies is passed in. Equal input gives equal bytes.
//! - Whatever is read back is hostile until its seal has been checked, and decoded with bounds even then.
//! - The index only ever costs ratio: a location it proposes is proposed with the full 128-bit hash of its block.

pub mod accept;
pub mod body;
pub mod frame;
pub mod hash;
pub mod index;
pub mod location;
pub mod pack;
pub mod seal;

/// Bytes of a block, the unit of hashing and of the map.
pub const BLOCK_LEN: usize = 4096;

/// The content of one block.
pub type Block = [u8; BLOCK_LEN];

#[cfg(test)]
mod samples;
