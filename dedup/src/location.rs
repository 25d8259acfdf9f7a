//! Where a stored block is: which segment, which frame of it, which block of that.
//!
//! ```text
//!   Location, 62 bits:   segment handle 30 │ Spot: unit 20 │ block 4 │ length class 8
//! ```
//!
//! A unit is the frame's offset in the segment's body divided by 64. The length class bounds how many bytes a read must fetch, so that a
//! block can be read without its segment's header.

/// Frames begin at multiples of this many bytes of a segment's body.
pub const UNIT_LEN: usize = 64;
/// Units are numbered below this.
pub const UNITS_MAX: u32 = 1 << 20;
/// The most blocks in a frame.
pub const FRAME_BLOCKS_MAX: usize = 16;

const HANDLES: u32 = 1 << 30;
/// Up to this many units a class is exact; from there on it goes in steps.
const EXACT_UNITS: usize = 128;
const STEP_UNITS: usize = 8;

/// Stands for a segment in its group's table of segments: a number of 30 bits.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Debug)]
pub struct SegmentHandle(u32);

impl SegmentHandle {
    /// `None` if the number has more than 30 bits.
    #[must_use]
    pub fn new(number: u32) -> Option<Self> {
        (number < HANDLES).then_some(Self(number))
    }

    #[must_use]
    pub fn get(self) -> u32 {
        self.0
    }

    /// For numbers that were a handle before.
    pub(crate) fn from_low_bits(bits: u32) -> Self {
        Self(bits & (HANDLES - 1))
    }
}

/// How long a sealed frame is, rounded up so that 8 bits hold it: exact to 64 bytes up to 8 KiB, to 512 bytes above.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct LengthClass(pub u8);

impl LengthClass {
    /// The smallest class that holds `len` bytes, which are at most 72 KiB; more count as that.
    #[must_use]
    pub fn of(len: usize) -> Self {
        let units = len.div_ceil(UNIT_LEN).max(1);
        let class = match units.checked_sub(EXACT_UNITS) {
            None | Some(0) => units - 1,
            Some(beyond) => EXACT_UNITS - 1 + beyond.div_ceil(STEP_UNITS),
        };
        Self(u8::try_from(class).unwrap_or(u8::MAX))
    }

    /// How many bytes, from the frame's first, are sure to contain it. Reading may find the end of the segment before.
    #[must_use]
    pub fn bytes(self) -> usize {
        let class = usize::from(self.0);
        let units = match class.checked_sub(EXACT_UNITS - 1) {
            None => class + 1,
            Some(steps) => EXACT_UNITS + steps * STEP_UNITS,
        };
        units * UNIT_LEN
    }
}

/// Where a block is within its segment, in 32 bits.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Debug)]
pub struct Spot(u32);

impl Spot {
    /// `None` if the unit has more than 20 bits or the block more than 4.
    #[must_use]
    pub fn new(unit: u32, block: u8, class: LengthClass) -> Option<Self> {
        let fits = unit < UNITS_MAX && usize::from(block) < FRAME_BLOCKS_MAX;
        fits.then_some(Self(unit << 12 | u32::from(block) << 8 | u32::from(class.0)))
    }

    /// The offset of its frame in the segment's body, in units of 64 bytes.
    #[must_use]
    pub fn unit(self) -> u32 {
        self.0 >> 12
    }

    /// Which block of the frame it is.
    #[must_use]
    pub fn block(self) -> u8 {
        (self.0 >> 8 & 15) as u8
    }

    #[must_use]
    pub fn class(self) -> LengthClass {
        LengthClass((self.0 & 0xff) as u8)
    }

    /// Whether `next` seems to be the block right after this one: the next of the frame, or the first of the frame that begins where this
    /// one's length class ends. Nobody knows here which block is the last of its frame, so this is good for guesses of what is read together.
    #[must_use]
    pub fn leads_to(self, next: Self) -> bool {
        if next.unit() == self.unit() {
            return next.block() == self.block() + 1;
        }
        let longest = self.class().bytes() / UNIT_LEN;
        let shortest = if longest > EXACT_UNITS { longest - STEP_UNITS + 1 } else { longest };
        let distance = next.unit().saturating_sub(self.unit()) as usize;
        next.block() == 0 && (shortest..=longest).contains(&distance)
    }
}

/// Where a block is.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Debug)]
pub struct Location {
    pub segment: SegmentHandle,
    pub spot: Spot,
}

impl Location {
    /// Whether `next` seems to be the block right after this one: see [`Spot::leads_to`].
    #[must_use]
    pub fn leads_to(self, next: Self) -> bool {
        self.segment == next.segment && self.spot.leads_to(next.spot)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_length_of_a_frame_has_a_class_that_holds_it() {
        let longest = 16 * 4096 + 64;
        let mut before = 0;
        for len in 1..=longest {
            let class = LengthClass::of(len);
            assert!(class.bytes() >= len, "{len}");
            assert!(class.bytes() < len + if len <= 8192 { 64 } else { 512 }, "{len}");
            assert!(class.0 >= before);
            before = class.0;
        }
        assert!(before < u8::MAX);
        for class in 0..=u8::MAX {
            assert_eq!(LengthClass::of(LengthClass(class).bytes()), LengthClass(class));
        }
        assert_eq!(LengthClass::of(usize::MAX), LengthClass(u8::MAX));
    }

    #[test]
    fn the_blocks_of_frames_lead_to_each_other() {
        let spot = |unit, block, len| Spot::new(unit, block, LengthClass::of(len)).unwrap();
        // A frame of 65 units, and one of 1000.
        for (len, next) in [(4100, 10 + 65), (64_000, 10 + 1000)] {
            assert!(spot(10, 1, len).leads_to(spot(10, 2, len)));
            assert!(spot(10, 3, len).leads_to(spot(next, 0, 64)));
            for other in [
                spot(10, 1, len),
                spot(10, 3, len),
                spot(next, 1, 64),
                spot(next + 8, 0, 64),
                spot(next - 8, 0, 64),
                spot(9, 0, len),
            ] {
                assert!(!spot(10, 1, len).leads_to(other), "{other:?}");
            }
        }
    }

    #[test]
    fn a_spot_gives_back_what_it_was_made_of() {
        for (unit, block, class) in [(0, 0, 0), (UNITS_MAX - 1, 15, 255), (0x12345, 7, 100)] {
            let spot = Spot::new(unit, block, LengthClass(class)).unwrap();
            assert_eq!((spot.unit(), spot.block(), spot.class()), (unit, block, LengthClass(class)));
        }
        assert_eq!(Spot::new(UNITS_MAX, 0, LengthClass(0)), None);
        assert_eq!(Spot::new(0, 16, LengthClass(0)), None);
        assert_eq!(SegmentHandle::new(1 << 30), None);
        assert_eq!(SegmentHandle::new((1 << 30) - 1).map(SegmentHandle::get), Some((1 << 30) - 1));
    }
}
