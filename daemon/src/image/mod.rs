//! Disk images: copied into volumes and out of them.
//!
//! ```text
//!   image file ── Raw · Imago (qcow2, flat vmdk) ──┐                        ┌── record: how far, for the next time
//!                                                  ├── Disk ─▶ Copy ─▶ Disk ┤
//!   volume ────── Volume (NBD, private socket) ────┘                        └── progress: bar, lines, JSON
//! ```
//!
//! All of it runs in the client: the daemon never opens a file on a caller's word.
//!
//! Invariants: no file but the one that was named is opened (a flat vmdk's extents beside it aside); a range below the recorded
//! position was flushed, and is compared again when the copy is resumed; zeroes are never stored where a hole does.

mod copy;
mod disk;
mod format;
mod imago_disk;
mod raw;
mod record;
mod volume;
mod whole;

pub use copy::{Copy, Pass, is_zero};
pub use disk::{Disk, Run};
pub use format::{Format, OpenError, Opened, create, open};
pub use record::{Record, Source, state_folder};
pub use volume::Volume;

#[cfg(test)]
mod tests;
