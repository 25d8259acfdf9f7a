//! What the objects of a group are called.
//!
//! ```text
//!   GROUP/root                who owns the volume, and where its newest checkpoint is       GROUP: 32 hexadecimal digits
//!   GROUP/pins                which of its snapshots have clones
//!   GROUP/w/EPOCH/NUMBER      steps of its history, and seals of epochs                      EPOCH, NUMBER: 16 digits
//!   GROUP/g/EPOCH/NUMBER      map pages, and blocks that garbage collection has moved
//!   GROUP/m/EPOCH/NUMBER      what checkpoints say
//! ```
//!
//! A name is given once: what it says never changes, so whoever refers to it refers to one content for ever. The same numbers are what a
//! seal is bound to, at a fixed length, so that no object passes for another.

use crate::bytes_at::{array_at, u64_at};

/// What an object is for.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub(crate) enum Family {
    /// A step of the history, or the end of an epoch.
    Step = 1,
    /// What was gathered from steps: blocks that live on, and pages of maps.
    Gathered = 2,
    /// What a checkpoint says.
    Meta = 3,
}

const FAMILIES: [Family; 3] = [Family::Step, Family::Gathered, Family::Meta];

/// The volumes that share what they store, and have one owner: a UUID.
pub(crate) type Group = [u8; 16];

/// Which part of its group's addresses a volume has: [`SLOT_BLOCKS`] blocks each.
pub(crate) type Slot = u16;

/// The most blocks of a volume: 256 TiB.
pub(crate) const SLOT_BLOCKS: u64 = 1 << 36;

/// A volume, by the UUIDs of its group and of itself. They are the same for one that is alone in its group.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct VolumeId {
    pub group: [u8; 16],
    pub id: [u8; 16],
}

impl From<[u8; 16]> for VolumeId {
    fn from(group: [u8; 16]) -> VolumeId {
        VolumeId { group, id: group }
    }
}

/// The first block of a volume, as its group counts them.
pub(crate) fn first_block(slot: Slot) -> u64 {
    u64::from(slot) * SLOT_BLOCKS
}

pub(crate) fn slot_of(block: u64) -> Slot {
    (block / SLOT_BLOCKS) as Slot
}

/// The folder of a volume's objects.
pub(crate) fn group_path(group: &Group) -> String {
    format!("{:032x}", u128::from_be_bytes(*group))
}

/// The folder of a volume's objects of one family, with the slash at its end.
pub(crate) fn family_path(group: &Group, family: Family) -> String {
    format!("{}/{}/", group_path(group), family.letter())
}

pub(crate) fn root_path(group: &Group) -> String {
    format!("{}/root", group_path(group))
}

pub(crate) fn pins_path(group: &Group) -> String {
    format!("{}/pins", group_path(group))
}

impl Family {
    fn letter(self) -> &'static str {
        match self {
            Family::Step => "w",
            Family::Gathered => "g",
            Family::Meta => "m",
        }
    }

    pub(crate) fn of(byte: u8) -> Option<Family> {
        FAMILIES.into_iter().find(|family| *family as u8 == byte)
    }
}

/// An object in which blocks may be.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub(crate) struct Source {
    pub(crate) group: [u8; 16],
    pub(crate) family: Family,
    pub(crate) epoch: u64,
    /// Of a step, its place in the epoch.
    pub(crate) number: u64,
}

impl Source {
    /// Bytes that stand for it: group 16 · epoch u64 · number u64 · family u8 (1 step, 2 gathered, 3 meta).
    pub(crate) const LEN: usize = 33;

    /// Its name in the pool.
    pub(crate) fn path(&self) -> String {
        format!("{}{:016x}/{:016x}", family_path(&self.group, self.family), self.epoch, self.number)
    }

    /// The object that has this name.
    pub(crate) fn parse(path: &str) -> Option<Source> {
        let mut parts = path.split('/');
        let (group, letter, epoch, number) = (parts.next()?, parts.next()?, parts.next()?, parts.next()?);
        let family = FAMILIES.into_iter().find(|family| family.letter() == letter)?;
        let number_of = |text: &str| u64::from_str_radix(text, 16).ok();
        let group = u128::from_str_radix(group, 16).ok()?.to_be_bytes();
        let source = Source { group, family, epoch: number_of(epoch)?, number: number_of(number)? };
        (source.path() == path).then_some(source)
    }

    /// In a header; also what its seal is bound to.
    pub(crate) fn to_bytes(self) -> [u8; Source::LEN] {
        let mut bytes = [0; Source::LEN];
        bytes[..16].copy_from_slice(&self.group);
        bytes[16..24].copy_from_slice(&self.epoch.to_le_bytes());
        bytes[24..32].copy_from_slice(&self.number.to_le_bytes());
        bytes[32] = self.family as u8;
        bytes
    }

    /// `None`: the family is unknown.
    pub(crate) fn from_bytes(bytes: &[u8; Source::LEN]) -> Option<Source> {
        let family = Family::of(bytes[32])?;
        Some(Source { group: array_at(bytes, 0), family, epoch: u64_at(bytes, 16), number: u64_at(bytes, 24) })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn sources() -> impl Strategy<Value = Source> {
        let family = prop_oneof![Just(Family::Step), Just(Family::Gathered), Just(Family::Meta)];
        let numbers = (any::<[u8; 16]>(), any::<u64>(), any::<u64>());
        (numbers, family).prop_map(|((group, epoch, number), family)| Source { group, family, epoch, number })
    }

    #[test]
    fn a_path_is_what_is_documented() {
        let group = *b"\x01\x23\x45\x67\x89\xab\xcd\xef\xfe\xdc\xba\x98\x76\x54\x32\x10";
        let source = Source { group, family: Family::Gathered, epoch: 0x1f, number: u64::MAX };
        assert_eq!(source.path(), "0123456789abcdeffedcba9876543210/g/000000000000001f/ffffffffffffffff");
        let step = Source { family: Family::Step, ..source };
        assert!(step.path().contains("/w/"));
    }

    proptest! {
        #[test]
        fn different_objects_have_different_paths_and_bytes(one in sources(), other in sources()) {
            for object in [one, other] {
                prop_assert_eq!(Source::from_bytes(&object.to_bytes()), Some(object));
                prop_assert_eq!(Source::parse(&object.path()), Some(object));
                prop_assert_eq!(Source::parse(&object.path().replace('/', "//")), None);
            }
            let kin = Source { family: Family::Step, ..one };
            for other in [other, Source { family: Family::Gathered, ..kin }, Source { epoch: kin.epoch ^ 1, ..kin }] {
                prop_assert_eq!(kin == other, kin.path() == other.path());
                prop_assert_eq!(kin == other, kin.to_bytes() == other.to_bytes());
            }
        }

        #[test]
        fn an_unknown_family_is_refused(mut bytes in any::<[u8; Source::LEN]>(), family in 4_u8..) {
            bytes[32] = family;
            prop_assert_eq!(Source::from_bytes(&bytes), None);
        }
    }
}
