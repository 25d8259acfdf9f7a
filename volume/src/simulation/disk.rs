//! A disk that keeps only what it promised.
//!
//! Fault model: completed writes are seen by every reader, but a power loss leaves each sector that was not synced since with any of its
//! contents since then; a write in flight when its process dies lands sector by sector, or not at all. With faults switched on, writes fail
//! after part of them has landed, and syncs fail and forget what they should have kept, while readers go on seeing it. A disk may be full: sectors that
//! were never written to find no space then, and a write that would need some fails after part of the others has landed.
//!
//! It also watches what an encrypted log writes: two different batches under one key and batch number would give the key stream away,
//! and a salt that comes twice is no chance.

use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;
use std::rc::Rc;

use blockdev::Errno;
use bytes::Bytes;

use crate::bytes_at::{array_at, u64_at};
use crate::disk::LogDisk;
use crate::environment::LocalFuture;
use crate::log::BatchHeader;
#[cfg(test)]
use crate::simulation::digest;
use crate::simulation::world::{Fate, ProcessId, World};

struct Version {
    id: u64,
    bytes: Vec<u8>,
}

struct State {
    sector: usize,
    /// What readers see.
    current: Vec<u8>,
    /// What is sure to be there after a power loss, unless the sector has versions.
    durable: Vec<u8>,
    /// Written since the last sync.
    versions: BTreeMap<usize, Vec<Version>>,
    next_version: u64,
    /// What has its space.
    allocated: Vec<bool>,
    /// How many other sectors there is space for; `None`: for all.
    room: Option<usize>,
    /// The content of each encrypted batch ever written, or begun, by what makes its key and nonces.
    sealed: BTreeMap<Sealing, [u8; 32]>,
    /// Of each salt, the epoch that used it.
    salts: BTreeMap<[u8; 32], u64>,
}

/// Salt of the opening, epoch, and number of the batch.
type Sealing = ([u8; 32], u64, u64);

/// The disk of a host; it outlives the processes that use it.
#[derive(Clone)]
pub struct HostDisk {
    world: Rc<World>,
    state: Rc<RefCell<State>>,
    /// Failures out of a thousand writes or syncs.
    pub failures: u64,
    /// What syncs come to, besides failures by chance.
    pub syncs: Rc<Cell<Syncs>>,
}

/// What a sync comes to.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum Syncs {
    #[default]
    Work,
    /// They fail, and what they should have kept is forgotten.
    Fail,
    /// The same, and they say that there is no space.
    Full,
    /// They succeed, and keep nothing.
    Lie,
}

impl HostDisk {
    pub fn new(world: &Rc<World>, len: usize, sector: usize) -> HostDisk {
        let state = State {
            sector,
            current: vec![0; len],
            durable: vec![0; len],
            versions: BTreeMap::new(),
            next_version: 0,
            allocated: vec![false; len / sector],
            room: None,
            sealed: BTreeMap::new(),
            salts: BTreeMap::new(),
        };
        HostDisk { world: world.clone(), state: Rc::new(RefCell::new(state)), failures: 0, syncs: Rc::default() }
    }

    /// Everything that was not synced is decided by chance.
    pub fn lose_power(&self) {
        let mut state = self.state.borrow_mut();
        for (sector, mut versions) in std::mem::take(&mut state.versions) {
            let survivor = self.world.random.below(versions.len() as u64 + 1) as usize;
            if survivor < versions.len() {
                let bytes = versions.swap_remove(survivor).bytes;
                state.at(sector).1.copy_from_slice(&bytes);
            }
        }
        state.current = state.durable.clone();
    }

    /// Everything is gone: another disk takes its place.
    pub fn wipe(&self) {
        let mut state = self.state.borrow_mut();
        state.versions.clear();
        state.current.fill(0);
        state.durable.fill(0);
        state.allocated.fill(false);
    }

    /// From now on there is space for so many sectors more; `None`: for all.
    pub fn set_room(&self, sectors: Option<usize>) {
        self.state.borrow_mut().room = sectors;
    }

    /// The disk is larger from now on.
    pub fn grow(&self) {
        let mut state = self.state.borrow_mut();
        let len = state.current.len() + (1 + self.world.random.below(64) as usize) * 4096;
        state.current.resize(len, 0);
        state.durable.resize(len, 0);
        let sectors = len / state.sector;
        state.allocated.resize(sectors, false);
    }

    #[cfg(test)]
    pub fn sector(&self) -> usize {
        self.state.borrow().sector
    }

    #[cfg(test)]
    pub fn content(&self) -> Vec<u8> {
        self.state.borrow().current.clone()
    }

    /// Somebody else writes to the disk.
    #[cfg(test)]
    pub fn set_content(&self, content: Vec<u8>) {
        let mut state = self.state.borrow_mut();
        state.versions.clear();
        state.durable = content.clone();
        state.current = content;
    }

    /// Flips a bit somewhere, for good.
    pub fn rot(&self) {
        let mut state = self.state.borrow_mut();
        let bit = self.world.random.below(state.current.len() as u64 * 8) as usize;
        state.current[bit / 8] ^= 1 << (bit % 8);
        state.durable[bit / 8] ^= 1 << (bit % 8);
    }

    pub fn opened_by(&self, process: ProcessId) -> SimulatedDisk {
        SimulatedDisk { host: self.clone(), process }
    }
}

impl State {
    fn at(&mut self, sector: usize) -> (&mut [u8], &mut [u8]) {
        let bytes = sector * self.sector..(sector + 1) * self.sector;
        (&mut self.current[bytes.clone()], &mut self.durable[bytes])
    }

    /// Panics if an encrypted batch differs from one that was written with the same key and nonces, or has the salt of another opening.
    fn watch_seals(&mut self, mut bytes: &[u8]) {
        while let Some((header, _)) = bytes.starts_with(b"NVLOGBAT").then(|| BatchHeader::decode(bytes)).flatten() {
            let (batch, rest) = bytes.split_at(header.total_len(self.sector));
            if header.salt != [0; 32] {
                self.watch_seal(&header, batch);
            }
            bytes = rest;
        }
    }

    /// What fills the sectors up is not sealed, and may rot.
    fn watch_seal(&mut self, header: &BatchHeader, bytes: &[u8]) {
        let (salt, epoch) = (array_at(bytes, 96), u64_at(bytes, 64));
        let other = self.salts.insert(salt, epoch);
        assert!(other.is_none_or(|other| other == epoch), "epochs {other:?} and {epoch} have one salt");
        let sealing = (salt, epoch, u64_at(bytes, 40));
        let payload_at = header.payload_at(self.sector);
        let sealed = [&bytes[..header.encoded_len()], &bytes[payload_at..payload_at + header.payload_len()]].concat();
        let hash = *blake3::hash(&sealed).as_bytes();
        let before = self.sealed.insert(sealing, hash);
        assert!(before.is_none_or(|before| before == hash), "a nonce was used twice: {sealing:?}");
    }

    /// Whether a sector has its space, or finds some now.
    fn allocate(&mut self, sector: usize) -> bool {
        if self.allocated[sector] {
            return true;
        }
        match &mut self.room {
            Some(0) => return false,
            Some(room) => *room -= 1,
            None => {}
        }
        self.allocated[sector] = true;
        true
    }

    fn land(&mut self, sector: usize, bytes: &[u8]) {
        self.at(sector).0.copy_from_slice(bytes);
        let id = self.next_version;
        self.next_version += 1;
        self.versions.entry(sector).or_default().push(Version { id, bytes: bytes.to_vec() });
    }

    fn settle(&mut self, before: u64, durable: bool) {
        let sectors: Vec<usize> = self.versions.keys().copied().collect();
        for sector in sectors {
            let Some(versions) = self.versions.get_mut(&sector) else { continue };
            let count = versions.iter().take_while(|version| version.id < before).count();
            let last = versions.drain(..count).next_back();
            if versions.is_empty() {
                self.versions.remove(&sector);
            }
            if let Some(last) = last.filter(|_| durable) {
                self.at(sector).1.copy_from_slice(&last.bytes);
            }
        }
    }
}

/// A host's disk as one process has it open.
pub struct SimulatedDisk {
    host: HostDisk,
    process: ProcessId,
}

impl LogDisk for SimulatedDisk {
    fn len(&self) -> u64 {
        self.host.state.borrow().current.len() as u64
    }

    fn sector_size(&self) -> usize {
        self.host.state.borrow().sector
    }

    fn read(&self, offset: u64, len: usize) -> LocalFuture<'_, Result<Vec<u8>, Errno>> {
        let state = self.host.state.clone();
        let read = move |fate| {
            let from = offset as usize;
            let read = || state.borrow().current[from..from + len].to_vec();
            #[cfg(test)]
            digest::note(&[b"read", &offset.to_le_bytes(), &read()]);
            (fate == Fate::Happens).then(|| Ok(read()))
        };
        self.host.world.operation(self.process, read)
    }

    /// Any run of sectors that are zeroes may be a hole, and any part of it may be told.
    fn next_data(&self, offset: u64) -> LocalFuture<'_, Result<u64, Errno>> {
        let HostDisk { world, state, .. } = self.host.clone();
        let looking = world.clone();
        let look = move |fate| {
            let state = state.borrow();
            let first = offset as usize / state.sector;
            let sectors = state.current.chunks_exact(state.sector).skip(first);
            let empty = sectors.take_while(|sector| sector.iter().all(|byte| *byte == 0)).count() as u64;
            let told = if world.random.per_mille(500) { empty } else { world.random.below(empty + 1) };
            let found = offset + told * state.sector as u64;
            #[cfg(test)]
            digest::note(&[b"look", &offset.to_le_bytes(), &found.to_le_bytes()]);
            (fate == Fate::Happens).then_some(Ok(found))
        };
        looking.operation(self.process, look)
    }

    fn write(&self, offset: u64, parts: Vec<Bytes>) -> LocalFuture<'_, Result<(), Errno>> {
        let bytes = parts.concat();
        let HostDisk { world, state, failures, .. } = self.host.clone();
        let sector = state.borrow().sector;
        assert!(offset.is_multiple_of(sector as u64) && bytes.len().is_multiple_of(sector), "a misaligned write");
        state.borrow_mut().watch_seals(&bytes);
        #[cfg(test)]
        digest::note(&[b"write", &offset.to_le_bytes(), &bytes]);
        let landing = self.host.world.clone();
        let write = move |fate| {
            let mut state = state.borrow_mut();
            let first = offset as usize / sector;
            let has_space: Vec<bool> = (first..first + bytes.len() / sector).map(|sector| state.allocate(sector)).collect();
            let is_full = has_space.contains(&false);
            let fails = fate == Fate::ProcessDied || world.random.per_mille(failures);
            let share = if fails || is_full { world.random.below(1001) } else { 1000 };
            for (index, bytes) in bytes.chunks_exact(sector).enumerate() {
                if world.random.below(1000) < share && has_space[index] {
                    state.land(first + index, bytes);
                }
            }
            let result = match () {
                () if fails => Err(Errno::EIO),
                () if is_full => Err(Errno::ENOSPC),
                () => Ok(()),
            };
            (fate == Fate::Happens).then_some(result)
        };
        landing.operation(self.process, write)
    }

    fn sync(&self) -> LocalFuture<'_, Result<(), Errno>> {
        let HostDisk { world, state, failures, syncs } = self.host.clone();
        let before = state.borrow().next_version;
        let waiting = self.host.world.clone();
        let sync = move |fate| {
            if fate == Fate::ProcessDied {
                return None;
            }
            if syncs.get() == Syncs::Lie {
                return Some(Ok(()));
            }
            let errno = if syncs.get() == Syncs::Full { Errno::ENOSPC } else { Errno::EIO };
            let fails = world.random.per_mille(failures) || [Syncs::Fail, Syncs::Full].contains(&syncs.get());
            state.borrow_mut().settle(before, !fails);
            #[cfg(test)]
            digest::note(&[b"sync", &before.to_le_bytes(), &[fails.into()]]);
            Some(if fails { Err(errno) } else { Ok(()) })
        };
        waiting.operation(self.process, sync)
    }
}
