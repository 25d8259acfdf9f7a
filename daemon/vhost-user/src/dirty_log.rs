//! The log of pages a device has written to, for live migration: one bit for each 4 KiB of guest address, shared with the
//! front end, which clears bits while we set them.

use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, Ordering};

use crate::memory::{Mapping, MemoryError};
use crate::message::AreaSpec;

const PAGE_SHIFT: u32 = 12;

pub struct DirtyLog {
    bits: Mapping,
}

impl DirtyLog {
    pub fn new(area: AreaSpec, file: OwnedFd, event: &Arc<OwnedFd>) -> Result<DirtyLog, MemoryError> {
        Ok(DirtyLog { bits: Mapping::new(file, area, event)? })
    }

    /// True once the file behind it was truncated under us.
    pub fn is_broken(&self) -> bool {
        self.bits.is_broken()
    }

    /// `len` bytes at `guest` have been written. What lies beyond the log is not guest memory to the front end.
    pub fn mark(&self, guest: u64, len: u64) {
        let Some(last) = len.checked_sub(1).and_then(|more| guest.checked_add(more)) else { return };
        for page in guest >> PAGE_SHIFT..=last >> PAGE_SHIFT {
            let byte = page / 8;
            if byte >= self.bits.len() as u64 {
                return;
            }
            // SAFETY: the byte lies inside the mapping, which lives as long as `self`; it is only accessed atomically.
            let bits = unsafe { AtomicU8::from_ptr(self.bits.start().wrapping_add(byte as usize)) };
            let bit = 1 << (page % 8);
            if bits.load(Ordering::Relaxed) & bit == 0 {
                bits.fetch_or(bit, Ordering::SeqCst);
            }
        }
    }
}
