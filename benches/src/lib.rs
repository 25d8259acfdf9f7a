//! Load generators for NBD and vhost-user-blk, the comparison of novastor with other servers, and of what is stored of images.
//!
//! ```text
//!   compare/   rows · servers · rounds · table        starts novastor and its peers, one row at a time
//!      │
//!   load       phases, recorder, report               warm up → measure → stop, the same for every protocol
//!      │
//!   nbd/   vhost                                      one worker per connection or per set of queues
//!      │
//!   requests · pattern · histogram · clock · awake
//!
//!   reduction/                                        no server: images and the crate `dedup`
//! ```
//!
//! Invariants:
//! - Every server is loaded by the same code with the same settings; nothing here knows which server it talks to.
//! - The generator allocates nothing and takes no lock per request, and its own CPU time is part of every report.
//! - Server CPU is the CPU clock of its whole process: user and system time of all threads, exited ones included.

pub mod awake;
pub mod clock;
pub mod compare;
pub mod histogram;
pub mod load;
pub mod nbd;
pub mod pattern;
pub mod reduction;
pub mod requests;
pub mod vhost;
