//! Descriptor chains and the block requests in them. Everything here was written by the guest and is believed only as far as it
//! was checked.
//!
//! ```text
//!   head ─▶ readable … ─▶ writable …      (any of them, but the last only, may be replaced by an indirect table)
//!           header 16 B    data (read)     header: type u32, reserved u32, sector u64
//!           data (write)   status 1 B
//! ```
//!
//! Where descriptors begin and end means nothing: the header is the first 16 readable bytes, the status the last writable one.
//!
//! A chain whose status byte cannot be found breaks its ring; everything else wrong with it is answered with a status.

use smallvec::SmallVec;
use virtio_bindings::{virtio_blk as blk, virtio_ring};

use crate::config::{DISCARD_SEGMENTS_MAX, SEGMENTS_MAX};
use crate::memory::Translator;
use crate::ring::{Descriptor, Ring, RingError};

pub const STATUS_OK: u8 = blk::VIRTIO_BLK_S_OK as u8;
pub const STATUS_IOERR: u8 = blk::VIRTIO_BLK_S_IOERR as u8;
pub const STATUS_UNSUPP: u8 = blk::VIRTIO_BLK_S_UNSUPP as u8;

const NEXT: u16 = virtio_ring::VRING_DESC_F_NEXT as u16;
const WRITE: u16 = virtio_ring::VRING_DESC_F_WRITE as u16;
const INDIRECT: u16 = virtio_ring::VRING_DESC_F_INDIRECT as u16;
const DESCRIPTOR_LEN: u32 = 16;
const HEADER_LEN: usize = 16;
const SECTOR: u64 = 512;
const RANGE_LEN: usize = 16;
/// The longest chain: all data segments that are allowed, header and status.
const CHAIN_MAX: usize = SEGMENTS_MAX as usize + 2;

pub type Segments = SmallVec<[libc::iovec; 2]>;

/// A piece of guest memory.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Segment {
    pub guest: u64,
    pub len: u32,
}

/// One range of a discard or write-zeroes request, in bytes.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Range {
    pub offset: u64,
    pub len: u64,
    pub unmap: bool,
}

/// What a guest asks for.
#[derive(Debug)]
pub enum Command {
    Read {
        offset: u64,
        len: u64,
    },
    Write {
        offset: u64,
        len: u64,
    },
    Flush,
    GetId,
    Discard(SmallVec<[Range; 1]>),
    WriteZeroes(SmallVec<[Range; 1]>),
    /// To be answered at once.
    Refused(u8),
}

/// A request and where its status goes.
#[derive(Debug)]
pub struct Parsed {
    pub command: Command,
    pub status: *mut u8,
    pub status_guest: u64,
}

/// Reads chains, keeping its room from one to the next.
pub struct ChainReader {
    indirect: bool,
    readable: Vec<Segment>,
    writable: Vec<Segment>,
    /// Bytes before this many segments' start are the header.
    data_start: usize,
}

/// What must hold of ranges to zero or discard.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    pub range_sectors_max: u32,
    pub zeroes_sectors_max: u32,
}

impl ChainReader {
    /// `indirect`: whether indirect tables were negotiated.
    pub fn new(indirect: bool) -> ChainReader {
        let segments = || Vec::with_capacity(CHAIN_MAX.max(crate::ring::RING_SIZE_MAX as usize));
        ChainReader { indirect, readable: segments(), writable: segments(), data_start: 0 }
    }

    /// Follows the chain at `head` and makes out the request in it.
    #[inline]
    pub fn parse(&mut self, ring: &Ring, memory: &Translator, head: u16, limits: Limits) -> Result<Parsed, RingError> {
        self.collect(ring, memory, head)?;
        let (status, status_guest) = self.take_status(head, memory)?;
        let command = self.command(memory, limits).unwrap_or(Command::Refused(STATUS_IOERR));
        Ok(Parsed { command, status, status_guest })
    }

    fn collect(&mut self, ring: &Ring, memory: &Translator, head: u16) -> Result<(), RingError> {
        self.readable.clear();
        self.writable.clear();
        self.data_start = 0;
        let broken = |what| RingError::Chain { head, what };
        let mut index = head;
        for _ in 0..ring.size() {
            let descriptor = ring.descriptor(index)?;
            if descriptor.flags & INDIRECT != 0 {
                if !self.indirect {
                    return Err(broken("has an indirect table, which was not negotiated"));
                }
                if descriptor.flags & NEXT != 0 {
                    return Err(broken("goes on after an indirect table"));
                }
                return self.collect_table(memory, head, descriptor, ring.size());
            }
            self.add(head, descriptor)?;
            if descriptor.flags & NEXT == 0 {
                return Ok(());
            }
            index = descriptor.next;
        }
        Err(broken("is longer than the ring, or goes in a circle"))
    }

    fn collect_table(&mut self, memory: &Translator, head: u16, table: Descriptor, ring_size: u16) -> Result<(), RingError> {
        let broken = |what| RingError::Chain { head, what };
        let entries = (table.len / DESCRIPTOR_LEN) as usize;
        if entries == 0 || !table.len.is_multiple_of(DESCRIPTOR_LEN) {
            return Err(broken("has an indirect table of an impossible length"));
        }
        let start = memory.contiguous(table.address, u64::from(table.len));
        let start = start.ok_or_else(|| broken("has an indirect table outside of guest memory"))?;
        let mut index = 0;
        for _ in 0..entries.min(CHAIN_MAX.max(usize::from(ring_size))) {
            // SAFETY: the table is mapped as a whole, and `index` is less than its number of entries.
            let descriptor = unsafe { Descriptor::read(start.add(index * DESCRIPTOR_LEN as usize)) };
            if descriptor.flags & INDIRECT != 0 {
                return Err(broken("has an indirect table inside an indirect table"));
            }
            self.add(head, descriptor)?;
            if descriptor.flags & NEXT == 0 {
                return Ok(());
            }
            index = usize::from(descriptor.next);
            if index >= entries {
                return Err(broken("leaves its indirect table"));
            }
        }
        Err(broken("is longer than allowed, or goes in a circle"))
    }

    #[inline]
    fn add(&mut self, head: u16, descriptor: Descriptor) -> Result<(), RingError> {
        let segment = Segment { guest: descriptor.address, len: descriptor.len };
        if descriptor.flags & WRITE != 0 {
            self.writable.push(segment);
        } else if self.writable.is_empty() {
            self.readable.push(segment);
        } else {
            return Err(RingError::Chain { head, what: "has a readable part after a writable one" });
        }
        Ok(())
    }

    /// Takes the last writable byte off the chain.
    fn take_status(&mut self, head: u16, memory: &Translator) -> Result<(*mut u8, u64), RingError> {
        let broken = |what| RingError::Chain { head, what };
        while self.writable.pop_if(|segment| segment.len == 0).is_some() {}
        let last = self.writable.last_mut().ok_or_else(|| broken("has no room for a status"))?;
        last.len -= 1;
        let guest = last.guest.checked_add(u64::from(last.len));
        if last.len == 0 {
            self.writable.pop();
        }
        let guest = guest.ok_or_else(|| broken("has its status outside of guest memory"))?;
        let host = memory.contiguous(guest, 1).ok_or_else(|| broken("has its status outside of guest memory"))?;
        Ok((host, guest))
    }

    /// Takes the header off the chain and makes out the command; `None` if it is malformed.
    fn command(&mut self, memory: &Translator, limits: Limits) -> Option<Command> {
        let mut header = [0; HEADER_LEN];
        self.take_header(memory, &mut header)?;
        let kind = u32::from_le_bytes([header[0], header[1], header[2], header[3]]);
        let sector = u64::from_le_bytes(header[8..].try_into().ok()?);
        Some(match kind {
            blk::VIRTIO_BLK_T_IN => {
                let (offset, len) = extent(sector, &self.writable)?;
                Command::Read { offset, len }
            }
            blk::VIRTIO_BLK_T_OUT => {
                let (offset, len) = extent(sector, &self.readable[self.data_start..])?;
                Command::Write { offset, len }
            }
            blk::VIRTIO_BLK_T_FLUSH => Command::Flush,
            blk::VIRTIO_BLK_T_GET_ID => Command::GetId,
            blk::VIRTIO_BLK_T_DISCARD => self.ranges(memory, limits.range_sectors_max, true)?,
            blk::VIRTIO_BLK_T_WRITE_ZEROES => self.ranges(memory, limits.zeroes_sectors_max, false)?,
            _ => Command::Refused(STATUS_UNSUPP),
        })
    }

    fn take_header(&mut self, memory: &Translator, header: &mut [u8; HEADER_LEN]) -> Option<()> {
        let mut done = 0;
        while done < HEADER_LEN {
            let segment = self.readable.get_mut(self.data_start)?;
            let part = (HEADER_LEN - done).min(segment.len as usize);
            copy_from_guest(memory, segment.guest, &mut header[done..done + part])?;
            done += part;
            segment.guest = segment.guest.wrapping_add(part as u64);
            segment.len -= part as u32;
            if segment.len == 0 {
                self.data_start += 1;
            }
        }
        Some(())
    }

    fn ranges(&self, memory: &Translator, sectors_max: u32, discard: bool) -> Option<Command> {
        let segments = &self.readable[self.data_start..];
        let total: u64 = segments.iter().map(|segment| u64::from(segment.len)).sum();
        let count = total / RANGE_LEN as u64;
        if count == 0 || !total.is_multiple_of(RANGE_LEN as u64) || count > u64::from(DISCARD_SEGMENTS_MAX) {
            return None;
        }
        let mut bytes = [0; DISCARD_SEGMENTS_MAX as usize * RANGE_LEN];
        let mut done = 0;
        for segment in segments {
            let end = done + segment.len as usize;
            copy_from_guest(memory, segment.guest, &mut bytes[done..end])?;
            done = end;
        }
        let mut ranges = SmallVec::new();
        for range in bytes[..done].chunks_exact(RANGE_LEN) {
            let sector = u64::from_le_bytes(range[..8].try_into().ok()?);
            let sectors = u32::from_le_bytes(range[8..12].try_into().ok()?);
            let flags = u32::from_le_bytes(range[12..].try_into().ok()?);
            let unmap = flags & blk::VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP != 0;
            if flags & !blk::VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP != 0 || (discard && unmap) {
                return Some(Command::Refused(STATUS_UNSUPP));
            }
            let offset = sector.checked_mul(SECTOR)?;
            if sectors > sectors_max {
                return None;
            }
            ranges.push(Range { offset, len: u64::from(sectors) * SECTOR, unmap });
        }
        Some(if discard { Command::Discard(ranges) } else { Command::WriteZeroes(ranges) })
    }

    /// The data a command reads from the guest: what a write writes.
    pub fn data_from_guest(&self) -> &[Segment] {
        &self.readable[self.data_start..]
    }

    /// The room a command has for data to the guest: what a read fills.
    pub fn room_for_guest(&self) -> &[Segment] {
        &self.writable
    }
}

/// Offset and length in bytes of a read or write; `None` if it is not made of whole sectors or has too many segments.
fn extent(sector: u64, segments: &[Segment]) -> Option<(u64, u64)> {
    let len: u64 = segments.iter().map(|segment| u64::from(segment.len)).sum();
    let offset = sector.checked_mul(SECTOR)?;
    let whole = len.is_multiple_of(SECTOR) && len < u64::from(u32::MAX) && segments.len() <= SEGMENTS_MAX as usize;
    whole.then_some((offset, len))
}

/// The host memory of guest segments; `None` if some of it is not guest memory.
#[inline]
pub fn translate(memory: &Translator, segments: &[Segment]) -> Option<Segments> {
    let mut pieces = Segments::new();
    for segment in segments {
        let all = memory.pieces(segment.guest, u64::from(segment.len), |start, len| {
            pieces.push(libc::iovec { iov_base: start.cast(), iov_len: len });
        });
        if !all {
            return None;
        }
    }
    Some(pieces)
}

fn copy_from_guest(memory: &Translator, guest: u64, target: &mut [u8]) -> Option<()> {
    let mut done = 0;
    let all = memory.pieces(guest, target.len() as u64, |start, len| {
        // SAFETY: `pieces` gives mapped ranges whose lengths add up to no more than the target's; they never overlap it.
        unsafe { std::ptr::copy_nonoverlapping(start, target[done..].as_mut_ptr(), len) };
        done += len;
    });
    all.then_some(())
}

/// Copies as much of `source` as there is room for; the number of bytes copied, or `None` if the room is not guest memory.
pub fn copy_to_guest(memory: &Translator, room: &[Segment], source: &[u8]) -> Option<u32> {
    let mut done = 0;
    for segment in room {
        let part = (segment.len as usize).min(source.len() - done);
        let all = memory.pieces(segment.guest, part as u64, |start, len| {
            // SAFETY: `pieces` gives mapped ranges whose lengths add up to what is left of the source; they never overlap it.
            unsafe { std::ptr::copy_nonoverlapping(source[done..].as_ptr(), start, len) };
            done += len;
        });
        if !all {
            return None;
        }
    }
    Some(done as u32)
}
