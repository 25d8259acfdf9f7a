//! A segment: one immutable object that carries a step of a volume's history.
//!
//! Its header alone rebuilds the map and feeds the deduplication index (see `step_header`). A seal ends an epoch: what its owner still tries
//! to add collides with it.

use bytes::Bytes;
use dedup::body::Body;
use dedup::seal::{SealError, Sealer};

use crate::error::VolumeError;
use crate::names::{Family, Source};
use crate::object::{self, Kind, Object, Opened};
use crate::step_header::StepHeader;

/// Bytes of a block.
pub const BLOCK: usize = dedup::BLOCK_LEN;

/// Where a segment stands in a volume's history.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug, Default)]
pub(crate) struct Place {
    pub(crate) epoch: u64,
    pub(crate) sequence: u64,
}

impl Place {
    /// The object that stands there.
    pub(crate) fn of(&self, group: [u8; 16]) -> Source {
        Source { group, family: Family::Step, epoch: self.epoch, number: self.sequence }
    }

    pub(crate) fn next(&self) -> Place {
        Place { epoch: self.epoch, sequence: self.sequence + 1 }
    }
}

/// An object of the chain, as it was read.
pub(crate) enum Link {
    Seal { next: u64 },
    Step(Box<Segment>),
}

/// A segment whose header has been checked.
pub(crate) struct Segment {
    pub(crate) source: Source,
    pub(crate) step: StepHeader,
    pub(crate) opened: Opened,
}

/// A segment ready to be stored.
pub(crate) struct Sealed {
    pub(crate) segment: Segment,
    pub(crate) header: Bytes,
    pub(crate) body: Bytes,
}

/// Seals a step and its body. `random` is fresh for each segment.
pub(crate) fn seal(
    sealer: &Sealer,
    source: Source,
    random: &[u8; 32],
    step: StepHeader,
    body: Body,
) -> Result<Sealed, SealError> {
    let object::Sealed { header, body, opened } = object::seal(sealer, &source, Kind::Step, random, &step.encode(), body)?;
    Ok(Sealed { segment: Segment { source, step, opened }, header, body })
}

/// Checks what stands under the name of an object.
pub(crate) fn decode(bytes: &[u8], sealer: &Sealer, source: Source) -> Result<Link, VolumeError> {
    let damaged = |why| VolumeError::ObjectDamaged { object: source.path(), why };
    match object::open(bytes, sealer, &source)? {
        Object::Seal { next } => Ok(Link::Seal { next }),
        Object::Sealed { kind, inner, opened } if kind == Kind::Step as u32 => {
            let step = StepHeader::decode(&inner).ok_or(damaged("its tables contradict each other"))?;
            Ok(Link::Step(Box::new(Segment { source, step, opened })))
        }
        Object::Sealed { .. } => Err(damaged("it is no step of a history")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bytes_at::{crc32c, u32_at};
    use crate::object::{CLEAR_LEN, encode_seal, header_len};
    use crate::step_header::tests::step;
    use dedup::hash::{Domain, DomainKind};
    use proptest::prelude::*;

    const STEP: Source = Source { group: [1; 16], family: Family::Step, epoch: 3, number: 9 };

    fn sealer(key: u8) -> Sealer {
        Sealer::encrypting(Domain::new(DomainKind::Volume, &STEP.group), &[key; 32])
    }

    #[test]
    fn headers_come_back_and_any_flipped_bit_is_noticed() {
        let sealed = seal(&sealer(4), STEP, &[7; 32], step(), Body::new(1 << 20)).unwrap();
        assert_eq!(header_len(&sealed.header), Some(sealed.header.len()));
        let open = |bytes: &[u8], key, source| decode(bytes, &sealer(key), source);
        assert!(matches!(open(&sealed.header, 4, STEP), Ok(Link::Step(segment)) if segment.step == step()));
        let seal = encode_seal(&STEP, 4);
        assert!(matches!(open(&seal, 4, STEP), Ok(Link::Seal { next: 4 })));
        let others = [
            Source { group: [8; 16], ..STEP },
            Source { epoch: 4, ..STEP },
            Source { number: 10, ..STEP },
            Source { family: Family::Gathered, ..STEP },
        ];
        for whole in [&sealed.header, &seal] {
            let used = CLEAR_LEN + u32_at(whole, 56) as usize;
            for bit in 0..used * 8 {
                let mut bytes = whole.to_vec();
                bytes[bit / 8] ^= 1 << (bit % 8);
                assert!(open(&bytes, 4, STEP).is_err(), "bit {bit}");
            }
            others.iter().for_each(|other| assert!(open(whole, 4, *other).is_err(), "{other:?}"));
        }
        assert!(open(&sealed.header, 5, STEP).is_err(), "another key opened it");
    }

    /// The name in clear is not what keeps two objects apart: their seals are.
    #[test]
    fn a_segment_does_not_open_under_another_name() {
        let sealed = seal(&sealer(4), STEP, &[7; 32], step(), Body::new(1 << 20)).unwrap();
        let mut renamed = sealed.header.to_vec();
        renamed[61] = Family::Gathered as u8;
        let end = CLEAR_LEN + u32_at(&renamed, 56) as usize;
        let crc = crc32c(&renamed[12..end]);
        renamed[8..12].copy_from_slice(&crc.to_le_bytes());
        let refused = decode(&renamed, &sealer(4), Source { family: Family::Gathered, ..STEP });
        assert!(matches!(refused, Err(VolumeError::ObjectDamaged { why: "it was sealed with another key", .. })));
    }

    proptest! {
        #[test]
        fn no_bytes_panic(bytes in proptest::collection::vec(any::<u8>(), 0..1024)) {
            let _ = decode(&bytes, &sealer(1), STEP);
        }
    }
}
