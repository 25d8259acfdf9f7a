//! An NBD server: volumes to clients over unix and TCP sockets, in the clear or over TLS.
//!
//! ```text
//!   control plane (tokio)                                   data plane (io_uring)
//!   Server ─ listeners ─ handshake ─ Negotiation ──socket──▶ Worker ─ Connection ─ Session ─▶ blockdev::VolumeQueue
//!      └── exports · clients                                              └── Transport (plain, TLS)
//! ```
//!
//! Invariants:
//! - `protocol` and `negotiation` do no I/O; `transmission` knows no tokio, and `handshake` no ring.
//! - A connection stays on one data-plane thread from the end of its negotiation until it is closed.
//! - Whatever a client sends costs bounded memory and bounded time, and harms no other client.

mod client;
mod contexts;
mod export;
mod handshake;
pub mod negotiation;
pub mod protocol;
mod server;
mod tls;
mod transmission;

pub use client::ClientInfo;
pub use contexts::Contexts;
pub use export::{Export, ExportError, Identity, Serves, Subject};
pub use server::{ListenError, ListenerId, Server, ServerOptions, Socket};
pub use tls::{TlsError, TlsSettings};
