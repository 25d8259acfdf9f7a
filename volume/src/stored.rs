//! Frames as they are in the store, on their way to the blocks that somebody wants of them. They travel between threads.

use std::cell::RefCell;
use std::ops::Range;
use std::sync::Arc;

use bytes::Bytes;
use dedup::body::FrameReader;
use dedup::location::{Location, UNIT_LEN};
use dedup::{BLOCK_LEN, Block};

use crate::object::Opened;

/// Bytes read in vain rather than by two requests.
const GAP_MAX: usize = 16 << 10;

/// Frames that lie near each other in one object.
pub(crate) struct Stored {
    /// The blocks that are wanted, in order, and each one's number for whoever wants it.
    pub(crate) wanted: Vec<(usize, Location)>,
    pub(crate) opened: Arc<Opened>,
    /// Where in the object's body they begin, and up to where they were asked for.
    pub(crate) start: usize,
    pub(crate) end: usize,
    pub(crate) bytes: Bytes,
}

/// A frame that is not what was sealed in its place.
pub(crate) struct Damaged(pub(crate) Location);

thread_local! {
    static FRAMES: RefCell<FrameReader> = RefCell::default();
}

/// For threads that unpack frames now and then: the contexts of a reader are dear to make.
pub(crate) fn with_frames<T>(unpack: impl FnOnce(&mut FrameReader) -> T) -> T {
    FRAMES.with_borrow_mut(unpack)
}

/// Where in its object's body a block's frame begins.
pub(crate) fn offset_of(location: Location) -> usize {
    location.spot.unit() as usize * UNIT_LEN
}

/// Bytes from there that are sure to contain the frame, unless the object ends before.
pub(crate) fn frame_bytes(location: Location) -> Range<usize> {
    let start = offset_of(location);
    start..start + location.spot.class().bytes()
}

impl Stored {
    /// Whether all of a block's frame is there, as far as its object has it.
    pub(crate) fn has_frame(&self, location: Location) -> bool {
        let frame = frame_bytes(location);
        self.start <= frame.start && (frame.end <= self.end || self.bytes.len() < self.end - self.start)
    }

    /// The blocks that are wanted, by frame.
    pub(crate) fn frames(&self) -> impl Iterator<Item = &[(usize, Location)]> {
        self.wanted.chunk_by(|(_, before), (_, next)| before.spot.unit() == next.spot.unit())
    }

    /// Checks, decrypts and unpacks one of [`Self::frames`]: all blocks that are in it.
    pub(crate) fn blocks<'a>(&self, frame: &[(usize, Location)], reader: &'a mut FrameReader) -> Result<&'a [Block], Damaged> {
        let location = frame[0].1;
        let unit = location.spot.unit();
        let damaged = || Damaged(location);
        let stored = self.bytes.get(offset_of(location) - self.start..).ok_or_else(damaged)?;
        let blocks = reader.read(&self.opened.opener, unit, stored).map_err(|_| damaged())?;
        self.opened.prove();
        Ok(blocks.as_chunks().0)
    }

    /// The wanted blocks of one of [`Self::frames`]: block number `n` goes to the `n`th place of `out`. The answer is how many blocks the frame has.
    pub(crate) fn unpack(&self, frame: &[(usize, Location)], reader: &mut FrameReader, out: &mut [u8]) -> Result<usize, Damaged> {
        let blocks = self.blocks(frame, reader)?;
        for (number, location) in frame {
            let block = blocks.get(usize::from(location.spot.block())).ok_or(Damaged(*location))?;
            out[number * BLOCK_LEN..(number + 1) * BLOCK_LEN].copy_from_slice(block);
        }
        Ok(blocks.len())
    }
}

/// Whether the next block's frame follows so closely that both are read at once.
pub(crate) fn read_together(before: &Location, next: &Location) -> bool {
    let (unit, next_unit) = (before.spot.unit(), next.spot.unit());
    before.segment == next.segment
        && next_unit >= unit
        && (next_unit - unit) as usize * UNIT_LEN <= before.spot.class().bytes() + GAP_MAX
}
