//! The transmission phase, on the data plane.
//!
//! ```text
//!  Worker (one a thread) ── Connection ── Transport (plain or TLS) ── socket
//!        │                      └──────── Session ── VolumeQueue
//!        └── completion queue · reply batches · who waits for memory
//! ```

mod batch;
mod connection;
mod prefetch;
mod request;
mod session;
mod transport;
mod worker;
mod zeroes;

pub(crate) use worker::{Gone, Negotiated, Worker};
