//! Serves a volume to virtual machines as a vhost-user-blk device.
//!
//! ```text
//!   VMM ══ socket ══▶ export ─▶ session ─▶ rings ─┐ start, drain
//!    │                (a thread that sleeps)      ▼
//!    └═ guest memory, eventfds ═════════▶ queue (on a data-plane thread) ─▶ blockdev::VolumeQueue
//!                                           ring · chain · in-flight log · dirty log
//! ```
//!
//! Invariants:
//! - Guest memory is read and written in place; it stays mapped until the last request that refers to it has completed.
//! - A queue belongs to one data-plane thread. Before anything it depends on changes, it is drained.
//! - Nothing that a guest or a front end does ends more than its ring, or its session.
//! - Features are offered only if volume and session really have them; packed rings, IOMMU and postcopy are not here.
//!
//! The modules are public for tests and fuzzing; users need only [`VhostUserExport`].

#[doc(hidden)]
pub mod chain;
#[doc(hidden)]
pub mod config;
#[doc(hidden)]
pub mod connection;
mod device_state;
#[doc(hidden)]
pub mod dirty_log;
mod export;
#[doc(hidden)]
pub mod inflight;
#[doc(hidden)]
pub mod memory;
#[doc(hidden)]
pub mod message;
mod pinned;
mod queue;
#[doc(hidden)]
pub mod ring;
mod rings;
mod session;
mod sigbus;

pub use export::{ClientInfo, ExportOptions, VhostUserExport};
