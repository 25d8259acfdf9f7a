//! novastor: the daemon that serves volumes to guests and hosts, and the command line that drives it.
//!
//! ```text
//!   cli ──client (HTTP+JSON)──▶ api ──▶ daemon ──▶ pools · open volumes · exports · jobs
//!                                          │            │            │
//!                                       config       backends     nbd, vhost-user-blk ──▶ blockdev (data plane)
//! ```
//!
//! Invariants: nothing here runs per I/O; control work blocks only its own thread; the command line knows nothing that the API
//! does not say.

pub mod api;
pub mod cli;
pub mod client;
pub mod config;
pub mod daemon;
pub mod doctor;
pub mod error;
pub mod exports;
pub mod image;
pub mod metrics;
pub mod names;
pub mod quoting;
pub mod units;
