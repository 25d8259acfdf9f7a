//! Volumes as images of a Ceph pool, through librbd.
//!
//! ```text
//!   RbdPool (catalogue, snapshots, clones) ── IoContext ── Cluster ── librados, librbd: opened at run time (library)
//!      └── RbdDevice ── lock (who may write) ── Image
//!             └── RbdQueue, one per data-plane thread ──▶ librbd's threads ──post──▶ reactor
//! ```
//!
//! Invariants:
//! - The memory of a request stays in its slot until librbd's callback has run; librbd's threads touch nothing else of ours.
//! - An image open for writing holds its exclusive lock; whoever held it before is fenced before the first write.
//! - librbd's own cache is off: a completed write is in Ceph.
//! - Nothing here blocks a data-plane thread: what librbd has no asynchronous call for runs on the device's helper thread.

mod cluster;
mod device;
mod health;
mod helper;
mod image;
mod images;
mod library;
mod lock;
mod openings;
mod pool;
mod queue;
mod record;

use std::ffi::{CString, c_char, c_int};
use std::io;

use blockdev::DeviceError;

pub use library::probe;
pub use pool::{RbdPool, RbdPoolConfig};

/// A string for C. One with a zero byte inside is refused.
fn c_string(text: &str) -> Result<CString, DeviceError> {
    CString::new(text).map_err(|_| DeviceError::Refused(format!("{text:?} is refused: it holds a zero byte")))
}

/// The string in a buffer that C filled; up to the first zero byte, or all of it.
fn text_of(buffer: &[c_char]) -> String {
    let bytes: Vec<u8> = buffer.iter().map(|byte| *byte as u8).take_while(|byte| *byte != 0).collect();
    String::from_utf8_lossy(&bytes).into_owned()
}

/// The outcome of a call that answers with zero, or a negative error number.
fn result_of(code: c_int) -> io::Result<()> {
    if code < 0 { Err(io::Error::from_raw_os_error(-code)) } else { Ok(()) }
}

/// As [`result_of`], in words.
fn outcome(code: c_int, what: impl FnOnce() -> String) -> Result<(), DeviceError> {
    result_of(code).map_err(|source| DeviceError::Io { what: what(), source })
}
