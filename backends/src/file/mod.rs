//! Local files and block devices, one to one, through io_uring.
//!
//! ```text
//!   FilePool   DIR/pool.json · DIR/volumes/NAME/{volume.json, data.raw, snapshots/SNAP.raw}
//!   FileDevice one open file description, locked; shared by all threads
//!   FileQueue  one per thread; ring operations straight from request memory
//! ```
//!
//! Invariants: the lock is on the description that carries the I/O, so it outlives the process until its last write has landed;
//! a short transfer is resumed from its original offset; a file found shorter than its volume fails every request from then on.

mod device;
mod pool;
mod queue;
mod sys;

pub use device::{FileDevice, FileOptions, hold_unused};
pub use pool::{FilePool, FilePoolConfig};
