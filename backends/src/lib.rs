//! The storage drivers: each keeps volumes somewhere and opens them as [`blockdev::BlockDevice`]s.
//!
//! ```text
//!   Pool (contract of raw volumes)            ◀── file · rbd · memory · null
//!   SegmentStore (what mapped volumes need)   ◀── directory · memory · object stores
//! ```
//!
//! Invariants: a driver knows nothing of exports or protocols; it never acknowledges what its backend did not.

pub mod catalogue;
pub mod file;
pub mod pool;
#[cfg(feature = "rbd")]
pub mod rbd;
pub mod segments;
pub mod simple;

pub use pool::{
    Claim, Collected, Destaged, EngineUse, Flattened, KeyRecord, KeyRotation, KeyState, Layout, LogUse, ObjectKind, Pool,
    PoolError, PoolHealth, ReducedUsage, Shares, SnapshotRecord, Usage, VolumeRecord, VolumeSpec, check_name,
};
