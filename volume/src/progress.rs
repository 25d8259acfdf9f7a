//! How far long work is: told by whoever does it, looked at by whoever waits for it on another thread.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use crate::core::Core;
use crate::error::VolumeError;

/// In bytes.
#[derive(Default, Debug)]
pub struct Progress {
    done: AtomicU64,
    total: AtomicU64,
    is_given_up: AtomicBool,
}

impl Progress {
    /// Bytes done, and in all as far as that is known.
    pub fn get(&self) -> (u64, u64) {
        (self.done.load(Ordering::Relaxed), self.total.load(Ordering::Relaxed))
    }

    /// Nobody waits for it any more.
    pub(crate) fn give_up(&self) {
        self.is_given_up.store(true, Ordering::Relaxed);
    }

    /// Fails if nobody waits for it any more, who may do something else by now.
    pub(crate) fn check_wanted(&self) -> Result<(), VolumeError> {
        if self.is_given_up.load(Ordering::Relaxed) { Err(VolumeError::GivenUp) } else { Ok(()) }
    }

    /// So much is to be done, and nothing of it is.
    pub(crate) fn begin(&self, total: u64) {
        self.done.store(0, Ordering::Relaxed);
        self.total.store(total, Ordering::Relaxed);
    }

    /// So much more is to be done.
    pub(crate) fn expect(&self, more: u64) {
        self.total.fetch_add(more, Ordering::Relaxed);
    }

    pub(crate) fn advance(&self, more: u64) {
        self.done.fetch_add(more, Ordering::Relaxed);
    }
}

impl Core {
    /// Tells whoever waits, if anybody does.
    pub(crate) fn note_progress(&self, note: impl FnOnce(&Progress)) {
        if let Some(progress) = &*self.progress.borrow() {
            note(progress);
        }
    }
}
