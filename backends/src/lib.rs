//! The storage drivers: each keeps volumes somewhere and opens them as [`blockdev::BlockDevice`]s.
//!
//! ```text
//!   Pool (contract) ◀── file · rbd · memory · null
//! ```
//!
//! Invariants: a driver knows nothing of exports or protocols; it never acknowledges what its backend did not.

mod catalogue;
pub mod file;
pub mod pool;
#[cfg(feature = "rbd")]
pub mod rbd;
pub mod simple;

pub use pool::{Layout, Pool, PoolError, PoolHealth, SnapshotRecord, Usage, VolumeRecord, VolumeSpec, check_name};
