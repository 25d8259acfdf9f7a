//! A store that answers late, not at all, or in another order.
//!
//! Fault model: each operation takes effect as a whole at one moment, in any order with others. Its reply may be lost: the caller hears
//! `Unknown`, whether it took effect, takes effect later, or never does. A process that dies leaves its requests under way. The store may
//! be full for a while. It never breaks its conditions, unless a case has it ignore them from some moment on (`arranged.rs`).
//!
//! It also watches what is deleted: never what the newest checkpoint of a volume, or its history after that, refers to.

use std::cell::{Cell, RefCell};
use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;
use std::rc::Rc;

use backends::segments::{Listed, SegmentStore, StoreError, StoreFuture, Tag};
use bytes::Bytes;
use dedup::seal::Protection;

use crate::bytes_at::array_at;
use crate::object::CLEAR_LEN;
use crate::simulation::deletions;
#[cfg(test)]
use crate::simulation::requests::{Requests, Verb};
use crate::simulation::world::{Fate, ProcessId, World};

#[cfg(test)]
mod arranged;
#[cfg(test)]
pub use arranged::Late;

/// In the header in clear.
const PROTECTION_AT: usize = 60;
const SALT_AT: usize = 64;
/// Out of a thousand operations, so many take long unless a schedule wants more: until so many other things have happened.
const SLOW: u64 = 30;
const ROUNDS_MAX: u64 = 100;

/// Of an object.
pub fn is_encrypted(content: &[u8]) -> bool {
    content.len() > CLEAR_LEN && content[PROTECTION_AT] == Protection::Aes256Gcm as u8
}

#[derive(Default)]
pub struct State {
    objects: BTreeMap<String, Bytes>,
    roots: BTreeMap<String, (Bytes, u64)>,
    next_tag: u64,
    /// What damaged objects were before.
    damaged: BTreeMap<String, Bytes>,
    /// Of every encrypted object that ever was, even of those that are deleted.
    salts: BTreeMap<[u8; 32], String>,
    /// Names of everything but seals of epochs, even of what is deleted.
    given: BTreeSet<String>,
}

impl State {
    pub fn object(&self, name: &str) -> Option<&Bytes> {
        self.objects.get(name)
    }

    pub fn root(&self, name: &str) -> Option<&Bytes> {
        self.roots.get(name).map(|(bytes, _)| bytes)
    }

    /// A seal that stands where something else stood before and was deleted does not end an epoch: whoever put it there was replaced already.
    pub fn ends_epoch(&self, name: &str) -> bool {
        let is_seal = |object: &Bytes| object.len() == CLEAR_LEN && !self.given.contains(name);
        self.object(name).is_some_and(is_seal)
    }

    /// Bytes of everything.
    fn used(&self) -> u64 {
        let roots = self.roots.values().map(|(bytes, _)| bytes);
        self.objects.values().chain(roots).map(|bytes| bytes.len() as u64).sum()
    }

    /// Two objects with one salt would be encrypted with one key and the same nonces.
    fn note_salt(&mut self, name: &str, content: &[u8]) {
        if is_encrypted(content) {
            let other = self.salts.insert(array_at(content, SALT_AT), name.to_owned());
            assert!(other.is_none_or(|other| other == name), "{name} and another object are encrypted with one salt");
        }
    }
}

/// The store itself.
#[derive(Clone)]
pub struct SharedStore {
    world: Rc<World>,
    state: Rc<RefCell<State>>,
    faults: Rc<Cell<u64>>,
    slow: Rc<Cell<u64>>,
    capacity: Rc<Cell<Option<u64>>>,
    #[cfg(test)]
    late: Rc<RefCell<Option<Late>>>,
    #[cfg(test)]
    pub requests: Rc<Requests>,
    /// Instead of chance.
    #[cfg(test)]
    unheard: Rc<Cell<Option<Unheard>>>,
    #[cfg(test)]
    ignores_conditions: Rc<Cell<bool>>,
}

/// What becomes of a change whose caller is dead, or never hears what became of it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Unheard {
    Never,
    Later,
    /// Whoever is alive is told that there is no room; for the dead it is done.
    Refused,
    Done,
}

const UNHEARD: [Unheard; 4] = [Unheard::Never, Unheard::Later, Unheard::Refused, Unheard::Done];

impl SharedStore {
    pub fn new(world: &Rc<World>) -> SharedStore {
        SharedStore {
            world: world.clone(),
            state: Rc::default(),
            faults: Rc::default(),
            slow: Rc::new(Cell::new(SLOW)),
            capacity: Rc::default(),
            #[cfg(test)]
            late: Rc::default(),
            #[cfg(test)]
            requests: Rc::default(),
            #[cfg(test)]
            unheard: Rc::default(),
            #[cfg(test)]
            ignores_conditions: Rc::default(),
        }
    }

    /// Lost replies out of a thousand operations.
    pub fn set_faults(&self, per_mille: u64) {
        self.faults.set(per_mille);
    }

    /// Operations out of a thousand that take long.
    pub fn set_slow(&self, per_mille: u64) {
        self.slow.set(per_mille);
    }

    #[cfg(test)]
    fn heeds_conditions(&self) -> bool {
        !self.ignores_conditions.get()
    }

    #[cfg(not(test))]
    fn heeds_conditions(&self) -> bool {
        true
    }

    #[cfg(test)]
    fn unheard(&self) -> Unheard {
        self.unheard.get().unwrap_or_else(|| self.draw_unheard())
    }

    #[cfg(not(test))]
    fn unheard(&self) -> Unheard {
        self.draw_unheard()
    }

    fn draw_unheard(&self) -> Unheard {
        UNHEARD[self.world.random.below(4) as usize]
    }

    pub fn opened_by(&self, process: ProcessId) -> SimulatedStore {
        SimulatedStore { shared: self.clone(), process }
    }

    /// Of all objects.
    pub fn names(&self) -> Vec<String> {
        self.state.borrow().objects.keys().cloned().collect()
    }

    /// Flips a bit of some object whose name contains `part`; its name, or `None` if there is none.
    pub fn rot(&self, part: &str) -> Option<String> {
        let mut state = self.state.borrow_mut();
        let names: Vec<String> = state.objects.keys().filter(|name| name.contains(part)).cloned().collect();
        let name = names.get(self.world.random.below(names.len().max(1) as u64) as usize)?.clone();
        let object = state.objects.get_mut(&name)?;
        let mut bytes = object.to_vec();
        let bit = self.world.random.below(bytes.len() as u64 * 8) as usize;
        bytes[bit / 8] ^= 1 << (bit % 8);
        *object = bytes.into();
        Some(name)
    }
}

impl SharedStore {
    /// Of some object that may be, a bit flips, or the end is lost, or all of it: its name, or `None` if there is none.
    pub fn damage(&self, may_be: impl Fn(&str, usize) -> bool) -> Option<String> {
        let random = &self.world.random;
        let names: Vec<String> = {
            let state = self.state.borrow();
            let found = state.objects.iter().filter(|(name, object)| may_be(name, object.len()));
            found.map(|(name, _)| name.clone()).collect()
        };
        let name = names.get(random.below(names.len().max(1) as u64) as usize)?;
        self.change(name, |bytes| match random.below(10) {
            0 => bytes.clear(),
            1 => bytes.truncate(random.below(bytes.len() as u64) as usize),
            _ => {
                let bit = random.below(bytes.len() as u64 * 8) as usize;
                bytes[bit / 8] ^= 1 << (bit % 8);
            }
        });
        Some(name.clone())
    }

    /// Changes what is there under a name; without any bytes, nothing is there.
    pub fn change(&self, name: &str, change: impl FnOnce(&mut Vec<u8>)) {
        let mut state = self.state.borrow_mut();
        let Some(before) = state.objects.remove(name) else { return };
        let mut bytes = before.to_vec();
        change(&mut bytes);
        if bytes == before {
            state.objects.insert(name.to_owned(), before);
            return;
        }
        if !bytes.is_empty() {
            state.objects.insert(name.to_owned(), bytes.into());
        }
        state.damaged.entry(name.to_owned()).or_insert(before);
    }

    /// Objects that are damaged, and that nobody has deleted since.
    pub fn damaged(&self) -> usize {
        self.state.borrow().damaged.len()
    }

    /// Puts all of them back as they were.
    pub fn repair(&self) {
        let mut state = self.state.borrow_mut();
        let damaged = std::mem::take(&mut state.damaged);
        state.objects.extend(damaged);
    }
}

/// The store as one process reaches it.
pub struct SimulatedStore {
    shared: SharedStore,
    process: ProcessId,
}

impl SimulatedStore {
    /// `apply` happens once, or never.
    fn changes<'a, T: 'static>(&self, apply: impl FnOnce(&mut State) -> Result<T, StoreError> + 'static) -> StoreFuture<'a, T> {
        let shared = self.shared.clone();
        let run = move |fate| {
            let SharedStore { world, state, faults, .. } = shared.clone();
            if fate == Fate::Happens && !world.random.per_mille(faults.get()) {
                return Some(apply(&mut state.borrow_mut()));
            }
            match shared.unheard() {
                Unheard::Never => {}
                Unheard::Later => world.loose_operation(move || drop(apply(&mut state.borrow_mut()))),
                Unheard::Refused if fate == Fate::Happens => {
                    return Some(Err(StoreError::NoSpace("the simulated store is full".into())));
                }
                Unheard::Refused | Unheard::Done => drop(apply(&mut state.borrow_mut())),
            }
            (fate == Fate::Happens).then(unknown)
        };
        self.late(run)
    }

    fn looks<'a, T: 'static>(&self, look: impl FnOnce(&State) -> Result<T, StoreError> + 'static) -> StoreFuture<'a, T> {
        let SharedStore { world, state, faults, .. } = self.shared.clone();
        let run = move |fate| match fate {
            Fate::ProcessDied => None,
            Fate::Happens if world.random.per_mille(faults.get()) => Some(unknown()),
            Fate::Happens => Some(look(&state.borrow())),
        };
        self.late(run)
    }

    /// Something that happens later, and sometimes a long time later.
    fn late<'a, T: 'static>(&self, run: impl FnOnce(Fate) -> Option<Result<T, StoreError>> + 'static) -> StoreFuture<'a, T> {
        let (world, process) = (self.shared.world.clone(), self.process);
        let is_slow = world.random.per_mille(self.shared.slow.get());
        let rounds = if is_slow { world.random.below(ROUNDS_MAX) } else { 0 };
        Box::pin(async move {
            for _ in 0..rounds {
                world.operation(process, |fate| (fate == Fate::Happens).then_some(())).await;
            }
            world.operation(process, run).await
        })
    }
}

/// Whether so many bytes more fit.
fn has_room(state: &State, capacity: Option<u64>, bytes: usize) -> Result<(), StoreError> {
    match capacity {
        Some(capacity) if state.used() + bytes as u64 > capacity => {
            Err(StoreError::NoSpace("the simulated store has no room for it".into()))
        }
        _ => Ok(()),
    }
}

fn unknown<T>() -> Result<T, StoreError> {
    Err(StoreError::Unknown("the simulated reply was lost".into()))
}

impl SegmentStore for SimulatedStore {
    fn create<'a>(&'a self, name: &'a str, content: Vec<Bytes>) -> StoreFuture<'a, ()> {
        let (name, content, capacity) = (name.to_owned(), content.concat(), self.shared.capacity.get());
        let heeds_conditions = self.shared.heeds_conditions();
        #[cfg(test)]
        let hold = self.made(Verb::Create, &name, &content);
        #[cfg(test)]
        let late = self.shared.late.borrow_mut().take_if(|late| name.contains(late.part));
        let apply = move |state: &mut State| {
            if heeds_conditions && state.objects.contains_key(&name) {
                return Err(StoreError::Exists(name));
            }
            has_room(state, capacity, content.len())?;
            state.note_salt(&name, &content);
            if content.len() > CLEAR_LEN {
                state.given.insert(name.clone());
            }
            state.objects.insert(name, content.into());
            Ok(())
        };
        #[cfg(test)]
        if let Some(late) = late {
            return self.takes_long(&late, apply);
        }
        #[cfg(test)]
        if let Some(hold) = hold {
            return self.held(hold, apply);
        }
        self.changes(apply)
    }

    fn read<'a>(&'a self, name: &'a str, range: Range<u64>) -> StoreFuture<'a, Bytes> {
        let name = name.to_owned();
        #[cfg(test)]
        let hold = self.made(Verb::Read, &name, &[range.start, range.end].map(u64::to_le_bytes).concat());
        let look = move |state: &State| {
            let object = state.objects.get(&name).ok_or(StoreError::Absent(name))?;
            let end = (range.end as usize).min(object.len());
            Ok(object.slice((range.start as usize).min(end)..end))
        };
        #[cfg(test)]
        if let Some(hold) = hold {
            return self.held(hold, move |state| look(state));
        }
        self.looks(look)
    }

    fn delete<'a>(&'a self, name: &'a str) -> StoreFuture<'a, ()> {
        let name = name.to_owned();
        #[cfg(test)]
        let hold = self.made(Verb::Delete, &name, &[]);
        let apply = move |state: &mut State| {
            if let Err(why) = deletions::check(state, &name) {
                panic!("{name} is deleted, {why}");
            }
            state.objects.remove(&name);
            state.damaged.remove(&name);
            Ok(())
        };
        #[cfg(test)]
        if let Some(hold) = hold {
            return self.held(hold, apply);
        }
        self.changes(apply)
    }

    fn list<'a>(&'a self, prefix: &'a str) -> StoreFuture<'a, Vec<Listed>> {
        let prefix = prefix.to_owned();
        #[cfg(test)]
        let hold = self.made(Verb::List, &prefix, &[]);
        let look = move |state: &State| {
            let matching = state.objects.range(prefix.clone()..).take_while(|(name, _)| name.starts_with(&prefix));
            Ok(matching.map(|(name, object)| Listed { name: name.clone(), len: object.len() as u64 }).collect())
        };
        #[cfg(test)]
        if let Some(hold) = hold {
            return self.held(hold, move |state| look(state));
        }
        self.looks(look)
    }

    fn read_root<'a>(&'a self, name: &'a str) -> StoreFuture<'a, Option<(Bytes, Tag)>> {
        let name = name.to_owned();
        #[cfg(test)]
        let hold = self.made(Verb::ReadRoot, &name, &[]);
        let look = move |state: &State| Ok(state.roots.get(&name).map(|(bytes, tag)| (bytes.clone(), Tag(tag.to_string()))));
        #[cfg(test)]
        if let Some(hold) = hold {
            return self.held(hold, move |state| look(state));
        }
        self.looks(look)
    }

    fn swap<'a>(&'a self, name: &'a str, expected: Option<&'a Tag>, content: Bytes) -> StoreFuture<'a, Tag> {
        let (name, expected, capacity) = (name.to_owned(), expected.cloned(), self.shared.capacity.get());
        let heeds_conditions = self.shared.heeds_conditions();
        #[cfg(test)]
        let hold = self.made(Verb::Swap, &name, &content);
        let apply = move |state: &mut State| {
            let now = state.roots.get(&name).map(|(_, tag)| Tag(tag.to_string()));
            if heeds_conditions && now != expected {
                return Err(StoreError::Changed(name));
            }
            has_room(state, capacity, content.len())?;
            state.next_tag += 1;
            let tag = state.next_tag;
            state.roots.insert(name, (content, tag));
            Ok(Tag(tag.to_string()))
        };
        #[cfg(test)]
        if let Some(hold) = hold {
            return self.held(hold, apply);
        }
        self.changes(apply)
    }
}
