//! What the handles in a volume's map stand for.
//!
//! ```text
//!   handle ─▶ Entry { object, state }     Live       blocks are in the object
//!                                         Forwarded  blocks have moved: that handle's object says where each of them is
//!                                         Free       no page of any tree refers to the handle
//! ```
//!
//! Invariants: what a handle stands for changes only by being forwarded, as long as any page refers to it. A forward leads to a live handle.

use std::collections::HashMap;

use crate::map::Pointer;
use crate::names::{Family, Group, Source};
use crate::segment::Place;

/// The most handles that exist.
const HANDLES_MAX: usize = 1 << 30;

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum State {
    Free,
    Live,
    Forwarded(u32),
}

/// What an object holds.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Content {
    Data = 0,
    Pages = 1,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Entry {
    /// Which group it belongs to, by number: 0 is the volume's own.
    pub(crate) owner: u16,
    pub(crate) family: Family,
    pub(crate) epoch: u64,
    pub(crate) number: u64,
    pub(crate) state: State,
    pub(crate) content: Content,
    /// Blocks in it.
    pub(crate) blocks: u32,
    /// Bytes of it in the store.
    pub(crate) bytes: u32,
}

impl Entry {
    pub(crate) fn is_live(&self) -> bool {
        self.state == State::Live
    }

    /// Blocks in it, if it is one of the volume's own that is live.
    pub(crate) fn own_blocks(&self) -> u64 {
        if self.owner == 0 && self.is_live() { self.blocks.into() } else { 0 }
    }

    /// Where in the volume's history it was written, as far as its name tells. What ancestors wrote was there before all of that.
    pub(crate) fn written_at(&self) -> Place {
        if self.owner == 0 { Place { epoch: self.epoch, sequence: self.number } } else { Place::default() }
    }

    /// Whether it was there, for others to refer to, at a place in the volume's history. A guess where an object was gathered from older ones, or found again.
    pub(crate) fn is_before(&self, place: Place) -> bool {
        self.owner != 0 || self.written_at() < place
    }

    /// Whether a page in this object may refer to another object, as far as their names tell.
    pub(crate) fn may_refer_to(&self, other: &Entry) -> bool {
        if (self.owner, self.epoch) != (other.owner, other.epoch) {
            // A clone's pages may refer to what its ancestors had, and pages of an epoch to what there was before it.
            return other.owner > self.owner || other.owner == self.owner && other.epoch < self.epoch;
        }
        match other.family {
            Family::Gathered => other.number <= self.number,
            // The numbers of a page's object and of the steps it has are compared: see `Core::new_source`.
            Family::Step => other.number < self.number,
            Family::Meta => false,
        }
    }
}

const FREE: Entry = Entry {
    owner: 0,
    family: Family::Step,
    epoch: 0,
    number: 0,
    state: State::Free,
    content: Content::Data,
    blocks: 0,
    bytes: 0,
};

/// The handles of one volume.
#[derive(Clone, Debug)]
pub(crate) struct Table {
    /// Whose objects they stand for: the volume itself, then its ancestors.
    groups: Vec<Group>,
    entries: Vec<Entry>,
    by_source: HashMap<Source, u32>,
    free: Vec<u32>,
    /// Handles that were forwarded, by where they lead to.
    forwarded: HashMap<u32, Vec<u32>>,
    /// Of the volume's own live objects.
    stored_blocks: u64,
}

impl Table {
    pub(crate) fn new(group: Group) -> Table {
        Table::of(vec![group], Vec::new())
    }

    fn of(groups: Vec<Group>, entries: Vec<Entry>) -> Table {
        let (by_source, free, forwarded) = (HashMap::new(), Vec::new(), HashMap::new());
        Table { groups, entries, by_source, free, forwarded, stored_blocks: 0 }
    }

    /// A table as it was stored. `None` if it contradicts itself.
    pub(crate) fn from_parts(groups: Vec<Group>, entries: Vec<Entry>) -> Option<Table> {
        let is_live = |handle: u32| entries.get(handle as usize).is_some_and(|entry| entry.state == State::Live);
        let is_sound = |entry: &Entry| {
            usize::from(entry.owner) < groups.len()
                && match entry.state {
                    State::Forwarded(to) => is_live(to),
                    State::Free | State::Live => true,
                }
        };
        if groups.is_empty() || entries.len() > HANDLES_MAX || !entries.iter().all(is_sound) {
            return None;
        }
        let mut table = Table::of(groups, entries);
        table.stored_blocks = table.entries.iter().map(Entry::own_blocks).sum();
        for handle in (0..table.entries.len() as u32).rev() {
            if let State::Forwarded(to) = table.entries[handle as usize].state {
                table.forwarded.entry(to).or_default().push(handle);
            }
            match table.source(handle) {
                Some(source) => drop(table.by_source.insert(source, handle)),
                None => table.free.push(handle),
            }
        }
        Some(table)
    }

    /// The table of a clone: the same handles, whose objects belong to others. `None` if there are too many ancestors.
    pub(crate) fn for_clone(&self, group: Group) -> Option<Table> {
        let groups: Vec<Group> = std::iter::once(group).chain(self.groups.iter().copied()).collect();
        u16::try_from(groups.len()).ok()?;
        let entries =
            self.entries.iter().map(|entry| Entry { owner: entry.owner + u16::from(entry.state != State::Free), ..*entry });
        Table::from_parts(groups, entries.collect())
    }

    pub(crate) fn groups(&self) -> &[Group] {
        &self.groups
    }

    pub(crate) fn entries(&self) -> &[Entry] {
        &self.entries
    }

    /// Handles that stand for something, and for what.
    pub(crate) fn used(&self) -> impl Iterator<Item = (u32, &Entry)> {
        (0..).zip(&self.entries).filter(|(_, entry)| entry.state != State::Free)
    }

    /// Handles of objects that are in the store, and not only being written.
    pub(crate) fn live(&self) -> impl Iterator<Item = u32> {
        self.used().filter(|(_, entry)| entry.is_live() && entry.bytes > 0).map(|(handle, _)| handle)
    }

    pub(crate) fn is_live(&self, handle: u32) -> bool {
        self.get(handle).is_some_and(Entry::is_live)
    }

    pub(crate) fn get(&self, handle: u32) -> Option<&Entry> {
        self.entries.get(handle as usize).filter(|entry| entry.state != State::Free)
    }

    /// What stands for the object that a pointer leads to.
    pub(crate) fn entry_of(&self, pointer: Pointer) -> Option<&Entry> {
        self.get(pointer.location()?.segment.get())
    }

    /// The object that a handle stood for at first.
    pub(crate) fn source(&self, handle: u32) -> Option<Source> {
        let Entry { owner, family, epoch, number, .. } = *self.get(handle)?;
        Some(Source { group: self.groups[usize::from(owner)], family, epoch, number })
    }

    pub(crate) fn handle_of(&self, source: &Source) -> Option<u32> {
        self.by_source.get(source).copied()
    }

    /// The handle of the object that an object's blocks are in now, if it was forwarded.
    pub(crate) fn forward_of(&self, source: &Source) -> Option<u32> {
        match self.get(self.handle_of(source)?)?.state {
            State::Forwarded(to) => Some(to),
            State::Free | State::Live => None,
        }
    }

    /// The handle of an object, which it gets now if it has none. `None`: there are too many.
    pub(crate) fn add(&mut self, source: Source, content: Content, blocks: u32, bytes: u32) -> Option<u32> {
        if let Some(handle) = self.handle_of(&source) {
            return Some(handle);
        }
        let owner = u16::try_from(self.groups.iter().position(|group| *group == source.group)?).ok()?;
        let Source { family, epoch, number, .. } = source;
        let entry = Entry { owner, family, epoch, number, state: State::Live, content, blocks, bytes };
        let handle = match self.free.pop() {
            Some(handle) => handle,
            None if self.entries.len() < HANDLES_MAX => {
                self.entries.push(FREE);
                self.entries.len() as u32 - 1
            }
            None => return None,
        };
        self.put(handle, entry);
        self.by_source.insert(source, handle);
        Some(handle)
    }

    /// Every change of an entry.
    fn put(&mut self, handle: u32, entry: Entry) {
        let place = &mut self.entries[handle as usize];
        self.stored_blocks = self.stored_blocks + entry.own_blocks() - place.own_blocks();
        *place = entry;
    }

    /// What turned out to be in an object that was being written.
    pub(crate) fn set_size(&mut self, handle: u32, blocks: u32, bytes: u32) {
        if let Some(entry) = self.entries.get(handle as usize) {
            self.put(handle, Entry { blocks, bytes, ..*entry });
        }
    }

    /// The blocks of `from`, and all that were forwarded to it, are in the object of `to` from now on.
    pub(crate) fn forward(&mut self, from: u32, to: u32) {
        let mut moved = self.forwarded.get(&from).cloned().unwrap_or_default();
        moved.push(from);
        moved.into_iter().for_each(|handle| self.forward_alone(handle, to));
    }

    /// The same without those that were forwarded to it.
    pub(crate) fn forward_alone(&mut self, from: u32, to: u32) {
        let Some(entry) = self.get(from).copied() else { return };
        self.unlink(from);
        self.put(from, Entry { state: State::Forwarded(to), ..entry });
        self.forwarded.entry(to).or_default().push(from);
    }

    /// An object that was forwarded is in its own place again, without those that went with it.
    pub(crate) fn revive(&mut self, handle: u32) {
        let Some(entry) = self.get(handle).copied() else { return };
        self.unlink(handle);
        self.put(handle, Entry { state: State::Live, ..entry });
    }

    /// The handles that were forwarded to this one.
    pub(crate) fn forwarded_to(&self, handle: u32) -> &[u32] {
        self.forwarded.get(&handle).map_or(&[], Vec::as_slice)
    }

    /// It leads nowhere else any more.
    fn unlink(&mut self, handle: u32) {
        let Some(State::Forwarded(to)) = self.get(handle).map(|entry| entry.state) else { return };
        if let Some(forwarded) = self.forwarded.get_mut(&to) {
            forwarded.retain(|from| *from != handle);
            if forwarded.is_empty() {
                self.forwarded.remove(&to);
            }
        }
    }

    /// In the volume's own live objects.
    pub(crate) fn stored_blocks(&self) -> u64 {
        self.stored_blocks
    }

    /// No page refers to the handle any more. It is not given to another object before [`Table::reuse`].
    pub(crate) fn forget(&mut self, handle: u32) {
        if let Some(source) = self.source(handle) {
            self.unlink(handle);
            self.by_source.remove(&source);
            self.put(handle, FREE);
        }
    }

    /// Nobody who looked at a page before [`Table::forget`] is left.
    pub(crate) fn reuse(&mut self, handle: u32) {
        self.free.push(handle);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn source(group: u8, number: u64) -> Source {
        Source { group: [group; 16], family: Family::Step, epoch: 1, number }
    }

    #[test]
    fn handles_are_kept_forwarded_and_used_again_when_allowed() {
        let mut table = Table::new([1; 16]);
        let add = |table: &mut Table, number| table.add(source(1, number), Content::Data, 4, 100).unwrap();
        let [a, b, c] = [0, 1, 2].map(|number| add(&mut table, number));
        assert_eq!(add(&mut table, 1), b);
        table.forward(a, b);
        table.forward(b, c);
        assert_eq!(
            [a, b, c].map(|handle| table.get(handle).unwrap().state),
            [State::Forwarded(c), State::Forwarded(c), State::Live]
        );
        table.forget(a);
        assert_eq!((table.get(a), table.handle_of(&source(1, 0))), (None, None));
        table.forward(a, c);
        assert_eq!(table.get(a), None, "what is forgotten leads nowhere");
        assert!(![a, b, c].contains(&add(&mut table, 3)));
        table.reuse(a);
        assert_eq!(add(&mut table, 4), a);
    }

    #[test]
    fn what_is_counted_and_linked_is_what_a_table_from_its_entries_would_say() {
        let check = |table: &Table| {
            let again = Table::from_parts(table.groups.clone(), table.entries.clone()).unwrap();
            let sorted = |table: &Table| {
                let links = table.forwarded.iter().map(|(to, from)| (*to, from.iter().copied().collect()));
                links.collect::<std::collections::BTreeMap<u32, std::collections::BTreeSet<u32>>>()
            };
            assert_eq!((sorted(&again), again.stored_blocks()), (sorted(table), table.stored_blocks()));
        };
        let mut table = Table::new([1; 16]);
        let handles: Vec<u32> =
            (0..6).map(|number| table.add(source(1, number), Content::Data, 4 + number as u32, 100).unwrap()).collect();
        assert_eq!(table.stored_blocks(), 39);
        for (from, to) in [(0, 1), (2, 1), (1, 3), (4, 3)] {
            table.forward(handles[from], handles[to]);
            check(&table);
        }
        assert_eq!((table.stored_blocks(), table.forwarded_to(handles[3]).len()), (16, 4));
        table.set_size(handles[3], 20, 1);
        check(&table);
        table.forward_alone(handles[3], handles[5]);
        assert_eq!((table.forwarded_to(handles[3]).len(), table.forwarded_to(handles[5])), (4, &handles[3..4]));
        table.revive(handles[3]);
        check(&table);
        for handle in [handles[0], handles[5], handles[4]] {
            table.forget(handle);
            check(&table);
        }
        assert_eq!(table.stored_blocks(), 20);
        check(&table.for_clone([2; 16]).unwrap());
    }

    #[test]
    fn a_clone_means_the_same_objects() {
        let mut parent = Table::new([1; 16]);
        let handles = [0, 1, 2].map(|number| parent.add(source(1, number), Content::Data, 4, 100).unwrap());
        parent.forward(handles[0], handles[1]);
        parent.forget(handles[2]);
        let mut clone = parent.for_clone([2; 16]).unwrap();
        assert_eq!(clone.source(handles[0]), parent.source(handles[0]));
        assert_eq!(clone.get(handles[0]).unwrap().state, State::Forwarded(handles[1]));
        assert_eq!(clone.add(source(2, 7), Content::Data, 1, 1), Some(handles[2]));
        assert_eq!(clone.add(source(3, 7), Content::Data, 1, 1), None);
        let grandchild = clone.for_clone([3; 16]).unwrap();
        assert_eq!(grandchild.source(handles[1]), parent.source(handles[1]));
        assert_eq!(grandchild.source(handles[2]), clone.source(handles[2]));
    }

    #[test]
    fn a_table_that_contradicts_itself_is_refused() {
        let entry = |owner, state| Entry { owner, state, ..FREE };
        assert!(Table::from_parts(vec![[1; 16]], vec![entry(1, State::Live)]).is_none());
        assert!(Table::from_parts(vec![[1; 16]], vec![entry(0, State::Forwarded(0))]).is_none());
        assert!(Table::from_parts(vec![[1; 16]], vec![entry(0, State::Forwarded(9))]).is_none());
        assert!(Table::from_parts(Vec::new(), Vec::new()).is_none());
    }
}
