//! Mapped volumes: one crash-safe engine over a local log and a [`backends::segments::SegmentStore`].
//!
//! ```text
//!   MappedVolume ─▶ log (local disk) ─▶ backlog ─▶ chain of segments (store) ─▶ map
//!        ▲                                              │
//!        └── open: claim · follow · seal · replay ◀─────┘
//! ```
//!
//! Everything runs on one thread as futures over [`Environment`], [`LogDisk`] and the store, so that a simulator can stand in for all three
//! and make any crash happen at any point.

mod ahead;
mod at_rest;
mod backlog;
mod bytes_at;
mod chain;
mod checkpoint;
mod clone;
mod contents;
mod core;
mod crypto;
mod deduplication;
pub mod device;
mod disk;
mod environment;
mod error;
mod extent_map;
mod findings;
mod foreign;
mod gather;
mod group;
mod house;
mod keeper;
pub mod keys;
mod log;
mod map;
mod mapped;
mod meta;
mod names;
mod object;
mod pages;
mod patience;
mod pins;
pub mod pool;
mod progress;
mod publish;
mod reader;
mod reduce;
mod root;
mod scrub;
mod segment;
mod shares;
mod signal;
#[cfg(feature = "simulation")]
pub mod simulation;
mod snapshots;
mod step_header;
mod stored;
mod table;
mod tally;
mod troubles;
mod usage;
mod view;

pub use at_rest::RestingUse;
pub use clone::{SnapshotView, clone_snapshot, delete_volume};
pub use crypto::system_random;
pub use dedup::frame::Allowed;
pub use disk::LogDisk;
pub use environment::{Environment, LocalFuture};
pub use error::VolumeError;
pub use gather::Gathered;
pub use group::{Beginning, MappedGroup};
pub use log::WhenFull;
pub use mapped::{Durability, MappedVolume, Parts, Settings};
pub use names::VolumeId;
pub use progress::Progress;
pub use reduce::Secrets;
pub use segment::BLOCK;
pub use snapshots::SnapshotInfo;
pub use troubles::{Cause, Trouble};
