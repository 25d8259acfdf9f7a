//! A split virtqueue in guest memory, seen from the device.
//!
//! ```text
//!   descriptor table   size × | address u64 | length u32 | flags u16 | next u16 |
//!   available ring     | flags u16 | index u16 | head u16 × size        | used_event u16 |
//!   used ring          | flags u16 | index u16 | (head u32, len u32) × size | avail_event u16 |
//! ```
//!
//! All three are translated once, when the ring starts. The guest may change any byte at any time: indices are read and written
//! atomically, everything else is copied once and judged by the copy.

use std::ptr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU16, Ordering, fence};

use thiserror::Error;

use crate::dirty_log::DirtyLog;
use crate::memory::GuestMemory;
use crate::message::RingAddresses;

/// The longest ring, in descriptors.
pub const RING_SIZE_MAX: u32 = 1024;

const DESCRIPTOR_LEN: u64 = 16;
const RING_HEAD_LEN: usize = 4;
const USED_ELEMENT_LEN: usize = 8;
const NO_INTERRUPT: u16 = 1;
const NO_NOTIFY: u16 = 1;

/// Why a ring cannot be used, or can no longer be.
#[derive(Error, Debug, PartialEq, Eq)]
pub enum RingError {
    #[error("a ring of {0} descriptors: the size must be a power of two, at most {RING_SIZE_MAX}")]
    Size(u32),
    #[error("the {0} is not in guest memory, or not aligned")]
    Address(&'static str),
    #[error("the driver made {0} heads available in a ring of {1}")]
    Index(u16, u16),
    #[error("descriptor {0} is beyond the table of {1}")]
    Descriptor(u16, u16),
    #[error("the chain at {0} is available twice")]
    Busy(u16),
    #[error("the chain at {head} {what}")]
    Chain { head: u16, what: &'static str },
    #[error("the guest's memory is gone")]
    MemoryGone,
    #[error("the in-flight log {0}")]
    Log(&'static str),
    #[error("open the volume on this thread: {0}")]
    Volume(String),
}

/// One descriptor, as copied.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Descriptor {
    pub address: u64,
    pub len: u32,
    pub flags: u16,
    pub next: u16,
}

impl Descriptor {
    /// # Safety
    /// `from` must point to 16 mapped bytes.
    pub unsafe fn read(from: *const u8) -> Descriptor {
        // SAFETY: the caller's promise; the guest may write at the same time, and each word is read once.
        let (address, rest) = unsafe {
            if from.addr().is_multiple_of(8) {
                let words = from.cast::<u64>();
                (words.read_volatile(), words.add(1).read_volatile())
            } else {
                let mut words = [0u64; 2];
                ptr::copy(from, words.as_mut_ptr().cast(), 16);
                (words[0], words[1])
            }
        };
        let (address, rest) = (u64::from_le(address), u64::from_le(rest));
        Descriptor { address, len: rest as u32, flags: (rest >> 32) as u16, next: (rest >> 48) as u16 }
    }
}

/// How writes to the used ring are logged.
#[derive(Clone)]
pub struct UsedLog {
    pub log: Arc<DirtyLog>,
    pub address: u64,
}

pub struct Ring {
    size: u16,
    descriptors: *const u8,
    available: *mut u16,
    used: *mut u8,
    event_index: bool,
    next_available: u16,
    next_used: u16,
    /// Of the used index: what the guest has been shown.
    published: u16,
    notifications: bool,
    log: Option<UsedLog>,
}

impl Ring {
    /// The ring at `addresses`. The caller keeps `memory` mapped as long as the ring is used.
    pub fn new(
        memory: &GuestMemory,
        size: u32,
        addresses: &RingAddresses,
        event_index: bool,
        log: Option<UsedLog>,
    ) -> Result<Ring, RingError> {
        if !size.is_power_of_two() || size > RING_SIZE_MAX {
            return Err(RingError::Size(size));
        }
        let at = |address: u64, len: u64, alignment: usize, what| {
            let host = memory.at_user(address, len).filter(|host| host.addr().is_multiple_of(alignment));
            host.ok_or(RingError::Address(what))
        };
        let entries = u64::from(size);
        let descriptors = at(addresses.descriptors, DESCRIPTOR_LEN * entries, 8, "descriptor table")?;
        let available = at(addresses.available, 6 + 2 * entries, 2, "available ring")?;
        let used = at(addresses.used, 6 + 8 * entries, 4, "used ring")?;
        let mut ring = Ring {
            size: size as u16,
            descriptors,
            available: available.cast(),
            used,
            event_index,
            next_available: 0,
            next_used: 0,
            published: 0,
            notifications: true,
            log,
        };
        ring.next_used = u16::from_le(ring.used_u16(2).load(Ordering::Acquire));
        ring.published = ring.next_used;
        Ok(ring)
    }

    pub fn size(&self) -> u16 {
        self.size
    }

    /// The index of the next head to take.
    pub fn next_available(&self) -> u16 {
        self.next_available
    }

    pub fn set_next_available(&mut self, index: u16) {
        self.next_available = index;
    }

    /// The used index as the guest sees it.
    pub fn published(&self) -> u16 {
        self.published
    }

    fn available_u16(&self, index: usize) -> &AtomicU16 {
        debug_assert!(index < 3 + usize::from(self.size));
        // SAFETY: `new` checked that the available ring, of 3 + size words, is mapped and aligned, and its memory stays mapped;
        // the guest and we access it only atomically.
        unsafe { AtomicU16::from_ptr(self.available.add(index)) }
    }

    fn used_u16(&self, offset: usize) -> &AtomicU16 {
        debug_assert!(offset < 6 + USED_ELEMENT_LEN * usize::from(self.size));
        // SAFETY: `new` checked that the used ring, of 6 + 8 × size bytes, is mapped and aligned to 4; offsets given are even.
        unsafe { AtomicU16::from_ptr(self.used.add(offset).cast()) }
    }

    /// How many heads the driver has made available that were not taken yet.
    #[inline]
    pub fn available(&self) -> Result<u16, RingError> {
        let index = u16::from_le(self.available_u16(1).load(Ordering::Acquire));
        let count = index.wrapping_sub(self.next_available);
        if count > self.size { Err(RingError::Index(count, self.size)) } else { Ok(count) }
    }

    /// Takes the next head. Only after [`Ring::available`] said there is one.
    #[inline]
    pub fn pop(&mut self) -> Result<u16, RingError> {
        let slot = usize::from(self.next_available & (self.size - 1));
        let head = u16::from_le(self.available_u16(2 + slot).load(Ordering::Relaxed));
        if head >= self.size {
            return Err(RingError::Descriptor(head, self.size));
        }
        self.next_available = self.next_available.wrapping_add(1);
        Ok(head)
    }

    /// The descriptor `index`, which must be in the table.
    #[inline]
    pub fn descriptor(&self, index: u16) -> Result<Descriptor, RingError> {
        if index >= self.size {
            return Err(RingError::Descriptor(index, self.size));
        }
        // SAFETY: `new` checked that the table of `size` descriptors is mapped, and `index` is inside it.
        Ok(unsafe { Descriptor::read(self.descriptors.add(usize::from(index) * DESCRIPTOR_LEN as usize)) })
    }

    /// Gives a chain back, not yet shown to the guest.
    #[inline]
    pub fn push_used(&mut self, head: u16, len: u32) {
        let slot = usize::from(self.next_used & (self.size - 1));
        let offset = RING_HEAD_LEN + USED_ELEMENT_LEN * slot;
        // SAFETY: the element lies inside the used ring that `new` checked; 4-aligned.
        unsafe {
            let element = self.used.add(offset).cast::<u32>();
            element.write_volatile(u32::from(head).to_le());
            element.add(1).write_volatile(len.to_le());
        }
        self.next_used = self.next_used.wrapping_add(1);
        self.mark(offset, USED_ELEMENT_LEN);
    }

    /// True if chains were given back that the guest has not been shown.
    pub fn has_unpublished(&self) -> bool {
        self.next_used != self.published
    }

    /// Shows the guest what was given back; true if it wants to be told.
    #[inline]
    pub fn publish(&mut self) -> bool {
        let old = std::mem::replace(&mut self.published, self.next_used);
        self.used_u16(2).store(self.next_used.to_le(), Ordering::Release);
        self.mark(2, 2);
        fence(Ordering::SeqCst);
        if self.event_index {
            let event = u16::from_le(self.available_u16(2 + usize::from(self.size)).load(Ordering::Relaxed));
            crossed(event, self.next_used, old)
        } else {
            u16::from_le(self.available_u16(0).load(Ordering::Relaxed)) & NO_INTERRUPT == 0
        }
    }

    /// Asks the guest to kick when it makes more available. What it did before must be looked for afterwards.
    pub fn enable_notifications(&mut self) {
        self.notifications = true;
        if self.event_index {
            let offset = RING_HEAD_LEN + USED_ELEMENT_LEN * usize::from(self.size);
            self.used_u16(offset).store(self.next_available.to_le(), Ordering::Relaxed);
            self.mark(offset, 2);
        } else {
            self.used_u16(0).store(0, Ordering::Relaxed);
            self.mark(0, 2);
        }
        fence(Ordering::SeqCst);
    }

    /// Tells the guest that we look without being kicked. With the event index that needs no word: the index it would kick at
    /// is left behind.
    pub fn disable_notifications(&mut self) {
        if self.notifications && !self.event_index {
            self.used_u16(0).store(NO_NOTIFY.to_le(), Ordering::Relaxed);
            self.mark(0, 2);
        }
        self.notifications = false;
    }

    fn mark(&self, offset: usize, len: usize) {
        if let Some(used) = &self.log {
            used.log.mark(used.address.wrapping_add(offset as u64), len as u64);
        }
    }
}

/// True if going from `old` to `new` passed `event` (virtio 1.3, 2.7.10).
fn crossed(event: u16, new: u16, old: u16) -> bool {
    new.wrapping_sub(event).wrapping_sub(1) < new.wrapping_sub(old)
}

#[cfg(test)]
mod tests {
    use super::crossed;

    #[test]
    fn events_are_crossed_once() {
        assert!(crossed(0, 1, 0));
        assert!(!crossed(1, 1, 0));
        assert!(!crossed(0, 2, 1));
        assert!(crossed(u16::MAX, 3, u16::MAX - 1));
        assert!(!crossed(5, 3, u16::MAX - 1));
    }
}
