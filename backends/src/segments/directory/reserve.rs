//! Space for one more root, so that what frees space can be done where there is none: a root is written beside the one that it replaces.
//!
//! ```text
//!   reserve ── no space for a root ─▶ given up ─▶ the root is written, the one before it gives its space back ─▶ reserve
//! ```

use std::os::fd::OwnedFd;

use rustix::fs::{AtFlags, FallocateFlags, OFlags, fallocate, openat, unlinkat};

use super::layout::file_mode;

const NAME: &str = "reserve";
/// Of a root, and of what a file system needs besides.
const LEN: u64 = 256 << 10;

/// Sees to it that there is a reserve, if there is space for it.
pub(super) fn keep(root: &OwnedFd) {
    let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::CLOEXEC | OFlags::NOFOLLOW;
    let kept = openat(root, NAME, flags, file_mode()).and_then(|file| fallocate(&file, FallocateFlags::empty(), 0, LEN));
    if kept.is_err() {
        give_up(root);
    }
}

/// Gives its space back: false if there was none.
pub(super) fn give_up(root: &OwnedFd) -> bool {
    unlinkat(root, NAME, AtFlags::empty()).is_ok()
}
