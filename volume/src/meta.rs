//! What a checkpoint says: the map, the handles, the snapshots. Written whole as an object of its own; the root names the newest. All numbers
//! are little-endian.
//!
//! ```text
//!   sealed part   length u64 · number of frames u32 · the unit of each frame u32
//!   body          frames of the following bytes, with zeroes up to 4096
//!
//!   version u32 · flags u32
//!   volumes u32, each: slot u16 · id 16 · size u64 · root u64 · height u32
//!   parent u8: 0 none, 1: group 16 · snapshot id 16
//!   groups u32, each: group 16 bytes                       its own, then its ancestors'
//!   handles u32, each 32 bytes: state u8 (0 free, 1 live, 2 forwarded) · family u8 · owner u16 · forward u32 · epoch u64 · number u64 ·
//!                               blocks: low 31 bits, content in the highest, u32 · bytes u32
//!   doomed u32, each: family u8 · epoch u64 · number u64   objects to delete, again after a crash
//!   snapshots u32, each: slot u16 · id 16 · created u64 · size u64 · root u64 · height u32 · deleting u8 · length of name u8 · name
//! ```

use std::collections::BTreeMap;

use bytes::{Buf, BufMut};
use dedup::body::{BODY_LEN_MAX, Body, FrameReader};
use dedup::frame::{Compression, Compressor};
use dedup::location::FRAME_BLOCKS_MAX;
use dedup::seal::{Opener, Sealer};
use dedup::{BLOCK_LEN, Block};

use crate::error::VolumeError;
use crate::map::{Pointer, Tree};
use crate::names::{Family, Group, Slot, Source, VolumeId};
use crate::object::{self, Kind, Sealed};
use crate::table::{Content, Entry, State, Table};

const VERSION: u32 = 1;
const CONTENT_BIT: u32 = 1 << 31;
const NAME_MAX: usize = 63;

pub(crate) type SnapshotId = [u8; 16];

/// The snapshot that a clone began as.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Parent {
    pub(crate) group: Group,
    pub(crate) snapshot: SnapshotId,
}

/// A volume of the group.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Held {
    /// Its UUID.
    pub(crate) id: Group,
    /// Bytes.
    pub(crate) size: u64,
    pub(crate) tree: Tree,
}

impl Held {
    pub(crate) fn blocks(&self) -> u64 {
        self.size / BLOCK_LEN as u64
    }
}

/// The volumes of a group, by the part of its addresses that each of them has.
pub(crate) type Volumes = BTreeMap<Slot, Held>;

/// A snapshot whose content is in the pool.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(crate) struct Snapshot {
    /// Of which volume.
    pub(crate) slot: Slot,
    pub(crate) id: SnapshotId,
    pub(crate) name: String,
    /// Seconds since 1970.
    pub(crate) created: u64,
    /// Bytes.
    pub(crate) size: u64,
    pub(crate) tree: Tree,
    /// Takes no new clones, and goes away.
    pub(crate) is_deleting: bool,
}

/// What a checkpoint says.
#[derive(Clone, Debug)]
pub(crate) struct Meta {
    pub(crate) volumes: Volumes,
    pub(crate) parent: Option<Parent>,
    pub(crate) table: Table,
    pub(crate) doomed: Vec<Source>,
    pub(crate) snapshots: Vec<Snapshot>,
}

impl Meta {
    /// Of a new group with one volume of so many bytes.
    pub(crate) fn empty(volume: VolumeId, size: u64) -> Meta {
        let tree = Tree::empty(size / BLOCK_LEN as u64);
        let volumes = Volumes::from([(0, Held { id: volume.id, size, tree })]);
        Meta { volumes, parent: None, table: Table::new(volume.group), doomed: Vec::new(), snapshots: Vec::new() }
    }

    /// Where the volume is that has this UUID.
    pub(crate) fn slot(&self, id: Group) -> Result<Slot, VolumeError> {
        self.volumes.iter().find(|(_, held)| held.id == id).map(|(slot, _)| *slot).ok_or(VolumeError::NoVolume)
    }

    /// A snapshot is not being deleted any more.
    pub(crate) fn spare(&mut self, id: SnapshotId) {
        self.snapshots.iter_mut().filter(|snapshot| snapshot.id == id).for_each(|snapshot| snapshot.is_deleting = false);
    }

    /// A snapshot that is there.
    pub(crate) fn snapshot(&self, volume: Group, name: &str) -> Result<&Snapshot, VolumeError> {
        let slot = self.slot(volume)?;
        let is_it = |snapshot: &&Snapshot| snapshot.slot == slot && snapshot.name == name && !snapshot.is_deleting;
        self.snapshots.iter().find(is_it).ok_or(VolumeError::NoSnapshot)
    }

    fn encode(&self) -> Vec<u8> {
        let mut bytes = Vec::with_capacity(64 + self.table.entries().len() * 32 + self.snapshots.len() * 64);
        bytes.put_u32_le(VERSION);
        bytes.put_u32_le(0);
        bytes.put_u32_le(self.volumes.len() as u32);
        for (slot, Held { id, size, tree }) in &self.volumes {
            bytes.put_u16_le(*slot);
            bytes.put_slice(id);
            bytes.put_u64_le(*size);
            put_tree(&mut bytes, tree);
        }
        bytes.put_u8(self.parent.is_some().into());
        if let Some(parent) = &self.parent {
            bytes.put_slice(&parent.group);
            bytes.put_slice(&parent.snapshot);
        }
        bytes.put_u32_le(self.table.groups().len() as u32);
        self.table.groups().iter().for_each(|group| bytes.put_slice(group));
        bytes.put_u32_le(self.table.entries().len() as u32);
        self.table.entries().iter().for_each(|entry| put_entry(&mut bytes, entry));
        bytes.put_u32_le(self.doomed.len() as u32);
        for source in &self.doomed {
            bytes.put_u8(source.family as u8);
            bytes.put_u64_le(source.epoch);
            bytes.put_u64_le(source.number);
        }
        bytes.put_u32_le(self.snapshots.len() as u32);
        self.snapshots.iter().for_each(|snapshot| put_snapshot(&mut bytes, snapshot));
        bytes
    }

    fn decode(mut bytes: &[u8], group: Group) -> Option<Meta> {
        let bytes = &mut bytes;
        if bytes.try_get_u32_le().ok()? != VERSION || bytes.try_get_u32_le().ok()? != 0 {
            return None;
        }
        let volumes = get_all(bytes, 38, get_held)?.into_iter().collect();
        let parent = match bytes.try_get_u8().ok()? {
            0 => None,
            1 => Some(Parent { group: get_array(bytes)?, snapshot: get_array(bytes)? }),
            _ => return None,
        };
        let groups: Vec<Group> = get_all(bytes, 16, get_array)?;
        let entries = get_all(bytes, 32, get_entry)?;
        let doomed = get_all(bytes, 17, |bytes| {
            let family = Family::of(bytes.try_get_u8().ok()?)?;
            Some(Source { group, family, epoch: bytes.try_get_u64_le().ok()?, number: bytes.try_get_u64_le().ok()? })
        })?;
        let snapshots = get_all(bytes, 48, get_snapshot)?;
        let is_own = groups.first() == Some(&group);
        let table = Table::from_parts(groups, entries)?;
        (is_own && !bytes.has_remaining()).then_some(Meta { volumes, parent, table, doomed, snapshots })
    }

    /// Makes the object.
    pub(crate) fn seal(&self, sealer: &Sealer, source: &Source, random: &[u8; 32]) -> Result<Sealed, VolumeError> {
        let failed = |why| VolumeError::ObjectDamaged { object: source.path(), why };
        let mut bytes = self.encode();
        let len = bytes.len() as u64;
        bytes.resize(bytes.len().next_multiple_of(BLOCK_LEN), 0);
        let (mut body, mut compressor) = (Body::new(BODY_LEN_MAX), Compressor::default());
        let blocks: Vec<&Block> = bytes.as_chunks::<BLOCK_LEN>().0.iter().collect();
        for frame in blocks.chunks(FRAME_BLOCKS_MAX) {
            let pushed = body.push(&mut compressor, frame, Compression::Zstd { level: 1 });
            pushed.ok_or_else(|| failed("there are more volumes, handles and snapshots than a checkpoint can hold"))?;
        }
        let mut inner = Vec::new();
        inner.put_u64_le(len);
        inner.put_u32_le(body.frames().len() as u32);
        body.frames().iter().for_each(|frame| inner.put_u32_le(frame.unit));
        object::seal(sealer, source, Kind::Meta, random, &inner, body).map_err(|_| failed("it could not be sealed"))
    }

    /// Reads what an object says; `inner` is its sealed part.
    pub(crate) fn open(mut inner: &[u8], opener: &Opener, body: &[u8], source: &Source) -> Result<Meta, VolumeError> {
        let damaged = |why| VolumeError::ObjectDamaged { object: source.path(), why };
        let inner = &mut inner;
        let len = inner.try_get_u64_le().map_err(|_| damaged("it says nothing"))?;
        let units = get_all(inner, 4, |bytes| bytes.try_get_u32_le().ok()).ok_or(damaged("its frames are not numbered"))?;
        let (mut reader, mut bytes) = (FrameReader::default(), Vec::new());
        for unit in units {
            let stored = body.get(unit as usize * dedup::location::UNIT_LEN..).ok_or(damaged("it is cut off"))?;
            bytes.extend_from_slice(reader.read(opener, unit, stored).map_err(|_| damaged("a frame of it is damaged"))?);
        }
        let said = usize::try_from(len).ok().and_then(|len| bytes.get(..len)).ok_or(damaged("it is too short"))?;
        if said.first_chunk().is_some_and(|version| u32::from_le_bytes(*version) != VERSION) {
            return Err(VolumeError::FormatVersion(source.path()));
        }
        Meta::decode(said, source.group).ok_or(damaged("it contradicts itself"))
    }
}

fn put_tree(bytes: &mut Vec<u8>, tree: &Tree) {
    bytes.put_u64_le(tree.root.bits());
    bytes.put_u32_le(tree.height);
}

fn get_tree(bytes: &mut &[u8]) -> Option<Tree> {
    let root = Pointer::from_bits(bytes.try_get_u64_le().ok()?)?;
    let height = bytes.try_get_u32_le().ok()?;
    (1..=7).contains(&height).then_some(Tree { root, height })
}

fn get_held(bytes: &mut &[u8]) -> Option<(Slot, Held)> {
    let slot = bytes.try_get_u16_le().ok()?;
    let (id, size) = (get_array(bytes)?, bytes.try_get_u64_le().ok()?);
    Some((slot, Held { id, size, tree: get_tree(bytes)? }))
}

fn put_entry(bytes: &mut Vec<u8>, entry: &Entry) {
    let (state, forward) = match entry.state {
        State::Free => (0, 0),
        State::Live => (1, 0),
        State::Forwarded(to) => (2, to),
    };
    bytes.put_u8(state);
    bytes.put_u8(entry.family as u8);
    bytes.put_u16_le(entry.owner);
    bytes.put_u32_le(forward);
    bytes.put_u64_le(entry.epoch);
    bytes.put_u64_le(entry.number);
    let content = if entry.content == Content::Pages { CONTENT_BIT } else { 0 };
    bytes.put_u32_le(entry.blocks & !CONTENT_BIT | content);
    bytes.put_u32_le(entry.bytes);
}

fn get_entry(bytes: &mut &[u8]) -> Option<Entry> {
    let state = bytes.try_get_u8().ok()?;
    let family = Family::of(bytes.try_get_u8().ok()?)?;
    let owner = bytes.try_get_u16_le().ok()?;
    let state = match (state, bytes.try_get_u32_le().ok()?) {
        (0, _) => State::Free,
        (1, _) => State::Live,
        (2, to) => State::Forwarded(to),
        _ => return None,
    };
    let (epoch, number) = (bytes.try_get_u64_le().ok()?, bytes.try_get_u64_le().ok()?);
    let (blocks, len) = (bytes.try_get_u32_le().ok()?, bytes.try_get_u32_le().ok()?);
    let content = if blocks & CONTENT_BIT == 0 { Content::Data } else { Content::Pages };
    Some(Entry { owner, family, epoch, number, state, content, blocks: blocks & !CONTENT_BIT, bytes: len })
}

fn put_snapshot(bytes: &mut Vec<u8>, snapshot: &Snapshot) {
    bytes.put_u16_le(snapshot.slot);
    bytes.put_slice(&snapshot.id);
    bytes.put_u64_le(snapshot.created);
    bytes.put_u64_le(snapshot.size);
    put_tree(bytes, &snapshot.tree);
    bytes.put_u8(snapshot.is_deleting.into());
    bytes.put_u8(snapshot.name.len() as u8);
    bytes.put_slice(snapshot.name.as_bytes());
}

fn get_snapshot(bytes: &mut &[u8]) -> Option<Snapshot> {
    let slot = bytes.try_get_u16_le().ok()?;
    let id = get_array(bytes)?;
    let (created, size) = (bytes.try_get_u64_le().ok()?, bytes.try_get_u64_le().ok()?);
    let tree = get_tree(bytes)?;
    let is_deleting = bytes.try_get_u8().ok()? != 0;
    let name_len = usize::from(bytes.try_get_u8().ok()?);
    let name = bytes.split_off(..name_len).filter(|name| name.len() <= NAME_MAX)?;
    Some(Snapshot { slot, id, name: String::from_utf8(name.to_vec()).ok()?, created, size, tree, is_deleting })
}

fn get_array<const N: usize>(bytes: &mut &[u8]) -> Option<[u8; N]> {
    bytes.split_off(..N)?.try_into().ok()
}

/// A counted list of things of at least `len_min` bytes each.
fn get_all<T>(bytes: &mut &[u8], len_min: usize, get: impl Fn(&mut &[u8]) -> Option<T>) -> Option<Vec<T>> {
    let count = bytes.try_get_u32_le().ok()? as usize;
    if count > bytes.len() / len_min {
        return None;
    }
    (0..count).map(|_| get(bytes)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use dedup::hash::{Domain, DomainKind};
    use proptest::prelude::*;

    use crate::object::Object;

    const GROUP: Group = [4; 16];
    const NAME: Source = Source { group: GROUP, family: Family::Meta, epoch: 1, number: 2 };

    fn meta(handles: u64) -> Meta {
        let mut meta = Meta::empty(GROUP.into(), 1 << 32);
        for number in 0..handles {
            let source = Source { group: GROUP, family: Family::Step, epoch: 1, number };
            meta.table.add(source, Content::Data, 8192, 1 << 20).unwrap();
        }
        meta.parent = Some(Parent { group: [5; 16], snapshot: [6; 16] });
        meta.doomed.push(Source { group: GROUP, family: Family::Gathered, epoch: 7, number: 8 });
        let tree = Tree { root: Pointer::ZERO, height: 3 };
        meta.snapshots.push(Snapshot {
            slot: 0,
            id: [1; 16],
            name: "monday".into(),
            created: 9,
            size: 4096,
            tree,
            is_deleting: true,
        });
        meta
    }

    #[test]
    fn a_checkpoint_comes_back_and_a_damaged_one_does_not() {
        let sealer = Sealer::encrypting(Domain::new(DomainKind::Volume, &GROUP), &[3; 32]);
        let before = meta(20_000);
        let sealed = before.seal(&sealer, &NAME, &[7; 32]).unwrap();
        let Ok(Object::Sealed { inner, opened, .. }) = object::open(&sealed.header, &sealer, &NAME) else { panic!() };
        let after = Meta::open(&inner, &opened.opener, &sealed.body, &NAME).unwrap();
        assert_eq!((&after.volumes, after.parent, &after.doomed), (&before.volumes, before.parent, &before.doomed));
        assert_eq!(after.snapshots, before.snapshots);
        assert_eq!(after.table.entries(), before.table.entries());
        for at in (0..sealed.body.len()).step_by(997) {
            let mut body = sealed.body.to_vec();
            body[at] ^= 1;
            let opened = Meta::open(&inner, &opened.opener, &body, &NAME);
            assert!(opened.is_err() || body[at] ^ 1 == 0, "a changed byte at {at} was not noticed");
        }
    }

    proptest! {
        #[test]
        fn no_bytes_panic(cut in 0_usize..2000, at in 0_usize..2000, value: u8) {
            let mut bytes = meta(20).encode();
            bytes.truncate(bytes.len() - cut.min(bytes.len()));
            if let Some(byte) = bytes.get_mut(at) {
                *byte = value;
            }
            if let Some(read) = Meta::decode(&bytes, GROUP) {
                prop_assert_eq!(cut, 0);
                prop_assert!(read.table.entries().len() == 20);
            }
        }
    }
}
