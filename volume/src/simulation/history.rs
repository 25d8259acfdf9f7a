//! What a client did to a volume and was told about it, and what it may find after a crash.
//!
//! The oracle: after a crash the content is that of the volume after some prefix of the changes, in the order they were submitted; a prefix that
//! contains everything it must, which depends on what was lost with the crash.

use std::ops::Range;

use crate::segment::BLOCK;
use crate::simulation::contents::{Contents, Version, version_of};
use crate::simulation::world::Random;

#[derive(Clone, Debug)]
enum Change {
    Blocks {
        first: u64,
        versions: Vec<Version>,
    },
    /// Of the whole volume, and perhaps of its size.
    Whole(Vec<Version>),
    /// It was refused.
    Nothing,
}

impl Change {
    fn apply(&self, content: &mut Vec<Version>) {
        match self {
            Change::Blocks { first, versions } => {
                let first = *first as usize;
                content[first..first + versions.len()].copy_from_slice(versions);
            }
            Change::Whole(versions) => content.clone_from(versions),
            Change::Nothing => {}
        }
    }

    /// What it put into a block; past the end of the volume there is nothing.
    fn of(&self, block: u64) -> Option<Version> {
        match self {
            Change::Blocks { first, versions } => versions.get(usize::try_from(block.checked_sub(*first)?).ok()?).copied(),
            Change::Whole(versions) => Some(versions.get(usize::try_from(block).ok()?).copied().unwrap_or(0)),
            Change::Nothing => None,
        }
    }
}

/// What became of a snapshot.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
enum Fate {
    /// It was asked for.
    Asked,
    /// It was acknowledged.
    Made,
    /// Its deletion was asked for.
    Doomed,
    /// Its deletion was acknowledged.
    Deleted,
}

#[derive(Clone, Debug)]
struct Snapshot {
    name: String,
    content: Vec<Version>,
    /// Changes before it.
    changes: usize,
    fate: Fate,
}

/// The changes of a volume since it was made, as one opening of it knows them.
#[derive(Clone)]
pub struct History {
    /// Where it begins.
    first: Vec<Version>,
    now: Vec<Version>,
    changes: Vec<Change>,
    snapshots: Vec<Snapshot>,
    /// In use by a request that is under way.
    busy: Vec<bool>,
    acknowledged: usize,
    flushed: usize,
    /// What the owner that has it now, and none before, said to be flushed.
    flushed_by_owner: usize,
    contents: Contents,
}

/// What must be there after a crash, in growing order.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub enum Kept {
    /// Nothing in particular.
    Nothing,
    /// What was flushed.
    Flushed,
    /// What was acknowledged.
    Acknowledged,
}

impl History {
    pub fn new(contents: &Contents, first: Vec<Version>) -> History {
        History {
            now: first.clone(),
            busy: vec![false; first.len()],
            first,
            changes: Vec::new(),
            snapshots: Vec::new(),
            acknowledged: 0,
            flushed: 0,
            flushed_by_owner: 0,
            contents: contents.clone(),
        }
    }

    pub fn contents(&self) -> Contents {
        self.contents.clone()
    }

    pub fn blocks(&self) -> u64 {
        self.now.len() as u64
    }

    pub fn any_range(&self, random: &Random, longest: u64) -> Range<u64> {
        let start = random.below(self.blocks());
        start..(start + 1 + random.below(longest)).min(self.blocks())
    }

    /// A range that no request is using; it is the caller's until it is released.
    pub fn take_range(&mut self, random: &Random, longest: u64) -> Option<Range<u64>> {
        let range = self.any_range(random, longest);
        let cells = &mut self.busy[range.start as usize..range.end as usize];
        if cells.iter().any(|busy| *busy) {
            return None;
        }
        cells.fill(true);
        Some(range)
    }

    pub fn release(&mut self, blocks: &Range<u64>) {
        self.busy[blocks.start as usize..blocks.end as usize].fill(false);
    }

    /// A change of some blocks is about to be submitted: its number.
    pub fn submit(&mut self, blocks: &Range<u64>, versions: &[Version]) -> usize {
        self.change(Change::Blocks { first: blocks.start, versions: versions.to_vec() })
    }

    /// The volume is about to get another size, and to hold the same as far as it goes: the number of that change.
    pub fn resize(&mut self, blocks: u64) -> usize {
        let mut content = self.now.clone();
        content.resize(blocks as usize, 0);
        self.change(Change::Whole(content))
    }

    fn change(&mut self, change: Change) -> usize {
        change.apply(&mut self.now);
        self.busy.resize(self.now.len(), false);
        self.changes.push(change);
        self.changes.len() - 1
    }

    /// A change was refused: nobody ever finds it.
    pub fn refused(&mut self, number: usize) {
        self.changes[number] = Change::Nothing;
        self.now.clone_from(&self.first);
        self.changes.iter().for_each(|change| change.apply(&mut self.now));
        self.busy.resize(self.now.len(), false);
    }

    /// A snapshot was refused: nobody ever finds it.
    pub fn snapshot_refused(&mut self, name: &str) {
        self.snapshots.retain(|snapshot| snapshot.name != name);
    }

    /// A snapshot is about to be asked for: its name.
    pub fn snapshot(&mut self) -> String {
        let name = format!("s{}", self.contents.number());
        let (content, changes) = (self.now.clone(), self.changes.len());
        self.snapshots.push(Snapshot { name: name.clone(), content, changes, fate: Fate::Asked });
        name
    }

    /// What a snapshot holds.
    pub fn content_of_snapshot(&self, name: &str) -> Option<Vec<Version>> {
        self.snapshots.iter().find(|snapshot| snapshot.name == name).map(|snapshot| snapshot.content.clone())
    }

    pub fn snapshot_made(&mut self, name: &str) {
        self.set_fate(name, Fate::Made);
    }

    pub fn snapshot_deleted(&mut self, name: &str) {
        self.set_fate(name, Fate::Deleted);
    }

    /// Some snapshot that is there.
    pub fn any_snapshot(&self, random: &Random) -> Option<String> {
        let there: Vec<&Snapshot> = self.snapshots.iter().filter(|snapshot| snapshot.fate == Fate::Made).collect();
        let chosen = there.get(random.below(there.len().max(1) as u64) as usize)?;
        Some(chosen.name.clone())
    }

    /// Its deletion is about to be asked for.
    pub fn doom_snapshot(&mut self, name: &str) {
        self.set_fate(name, Fate::Doomed);
    }

    fn set_fate(&mut self, name: &str, fate: Fate) {
        if let Some(snapshot) = self.snapshots.iter_mut().find(|snapshot| snapshot.name == name) {
            snapshot.fate = snapshot.fate.max(fate);
        }
    }

    /// Its deletion was refused.
    pub fn spare_snapshot(&mut self, name: &str) {
        if let Some(snapshot) = self.snapshots.iter_mut().find(|snapshot| snapshot.name == name) {
            snapshot.fate = Fate::Made;
        }
    }

    /// It is there, and nobody asked for its deletion.
    pub fn is_made(&self, name: &str) -> bool {
        self.has_fate(name, Fate::Made)
    }

    pub fn is_deleted(&self, name: &str) -> bool {
        self.has_fate(name, Fate::Deleted)
    }

    fn has_fate(&self, name: &str, fate: Fate) -> bool {
        self.snapshots.iter().any(|snapshot| snapshot.name == name && snapshot.fate == fate)
    }

    /// The volume is about to become a snapshot: the number of that change.
    pub fn roll_back(&mut self, name: &str) -> Option<usize> {
        let content = self.content_of_snapshot(name)?;
        Some(self.change(Change::Whole(content)))
    }

    /// Checks which snapshots an opening finds. Those that are gone are forgotten.
    /// `durable`: what was found is as good as acknowledged.
    pub fn recover_snapshots(&mut self, found: &[String], kept: Kept, durable: bool) -> Result<(), String> {
        let known = |name: &String| self.snapshots.iter().any(|snapshot| snapshot.name == *name);
        if let Some(name) = found.iter().find(|name| !known(name)) {
            return Err(format!("there is a snapshot {name}, which nobody asked for"));
        }
        for snapshot in &self.snapshots {
            let is_there = found.contains(&snapshot.name);
            match snapshot.fate {
                Fate::Made if !is_there && kept >= Kept::Flushed => return Err(format!("snapshot {} is gone", snapshot.name)),
                Fate::Deleted if is_there => return Err(format!("snapshot {} is back", snapshot.name)),
                _ if is_there && snapshot.changes > self.changes.len() => {
                    return Err(format!("snapshot {} is there, but not all changes before it", snapshot.name));
                }
                Fate::Asked | Fate::Made | Fate::Doomed | Fate::Deleted => {}
            }
        }
        // A deletion that was interrupted goes on, and may be refused in the end.
        let is_kept = |snapshot: &Snapshot| found.contains(&snapshot.name) || snapshot.fate >= Fate::Doomed;
        self.snapshots.retain(is_kept);
        let is_certain = |snapshot: &Snapshot| found.contains(&snapshot.name) && (durable || snapshot.fate > Fate::Asked);
        for snapshot in self.snapshots.iter_mut().filter(|snapshot| is_certain(snapshot)) {
            snapshot.fate = Fate::Made;
        }
        Ok(())
    }

    /// Checks the whole content of a snapshot.
    pub fn check_snapshot(&self, name: &str, content: &[u8]) -> Result<(), String> {
        let Some(snapshot) = self.snapshots.iter().find(|snapshot| snapshot.name == name) else { return Ok(()) };
        if content.len() != snapshot.content.len() * BLOCK {
            return Err(format!("snapshot {name} has {} bytes instead of {} blocks", content.len(), snapshot.content.len()));
        }
        for ((block, bytes), expected) in (0..).zip(content.chunks_exact(BLOCK)).zip(&snapshot.content) {
            let found = version_of(block, bytes)?;
            if found != *expected {
                return Err(format!("block {block} of snapshot {name} reads as version {found} instead of {expected}"));
            }
        }
        Ok(())
    }

    /// All changes up to this one are acknowledged: acknowledgements come in the order of submission.
    pub fn acknowledge(&mut self, number: usize) {
        self.acknowledged = self.acknowledged.max(number + 1);
    }

    /// What a flush that begins now must cover.
    pub fn flush_begins(&self) -> usize {
        self.acknowledged
    }

    pub fn flushed(&mut self, covered: usize) {
        self.flushed = self.flushed.max(covered);
        self.flushed_by_owner = self.flushed_by_owner.max(covered);
    }

    /// An owner before may have said more, on the word of a log whose loss was accepted since.
    pub fn flushed_by_owner(&self) -> usize {
        self.flushed_by_owner
    }

    /// Checks a range that the caller has taken.
    pub fn check_read(&self, blocks: &Range<u64>, bytes: &[u8]) -> Result<(), String> {
        for (block, bytes) in blocks.clone().zip(bytes.chunks_exact(BLOCK)) {
            let expected = self.now[block as usize];
            let found = version_of(block, bytes)?;
            if found != expected {
                return Err(format!("block {block} reads as version {found}, but version {expected} was acknowledged"));
            }
        }
        Ok(())
    }

    /// What a read that begins now finds at least.
    pub fn read_begins(&self) -> usize {
        self.acknowledged
    }

    /// Checks a range that others may have changed while it was read: each block holds what it held when the read began, or what was written since.
    pub fn check_racing_read(&self, blocks: &Range<u64>, bytes: &[u8], began: usize) -> Result<(), String> {
        let (before, since) = self.changes.split_at(began.min(self.changes.len()));
        for (block, bytes) in blocks.clone().zip(bytes.chunks_exact(BLOCK)) {
            let found = version_of(block, bytes)?;
            let at_first = || self.first.get(block as usize).copied().unwrap_or(0);
            let expected = before.iter().rev().find_map(|change| change.of(block)).unwrap_or_else(at_first);
            if found != expected && !since.iter().any(|change| change.of(block) == Some(found)) {
                return Err(format!(
                    "block {block} reads as version {found}, which it did not hold any more, or not yet; it was {expected}"
                ));
            }
        }
        Ok(())
    }

    /// Checks that a block holds what it held at some time.
    pub fn check_known(&self, block: u64, bytes: &[u8]) -> Result<(), String> {
        let found = version_of(block, bytes)?;
        let at_first = self.first.get(block as usize).copied();
        if found == 0 || at_first == Some(found) || self.changes.iter().any(|change| change.of(block) == Some(found)) {
            return Ok(());
        }
        Err(format!("block {block} reads as version {found}, which was never written to it"))
    }

    /// Finds the longest prefix that gives `content`, the whole volume. Fails if none does, or none that keeps what is certain.
    /// The history ends there from now on. `durable`: what was found is as good as flushed.
    pub fn recover(&mut self, content: &[u8], kept: Kept, durable: bool) -> Result<usize, String> {
        let found = (0_u64..).zip(content.chunks_exact(BLOCK)).map(|(block, bytes)| version_of(block, bytes));
        let found = found.collect::<Result<Vec<Version>, String>>()?;
        let mut state = self.first.clone();
        let mut longest = (state == found).then_some(0);
        for (index, change) in self.changes.iter().enumerate() {
            change.apply(&mut state);
            if state == found {
                longest = Some(index + 1);
            }
        }
        let total = self.changes.len();
        let longest =
            longest.ok_or_else(|| format!("the content {found:?} is none that the volume ever had in {total} changes"))?;
        let (least, why) = match kept {
            Kept::Acknowledged => (self.acknowledged.max(self.flushed), "acknowledged"),
            Kept::Flushed => (self.flushed, "flushed"),
            Kept::Nothing => (0, ""),
        };
        if longest < least {
            return Err(format!("{longest} of {total} changes are there, but {least} were {why}"));
        }
        self.changes.truncate(longest);
        self.acknowledged = longest;
        self.flushed = if durable { longest } else { self.flushed.min(longest) };
        self.flushed_by_owner = 0;
        self.busy = vec![false; found.len()];
        self.now = found;
        Ok(longest)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::simulation::contents::contents_of;

    #[test]
    fn only_prefixes_that_keep_what_is_certain_are_accepted() {
        let mut history = History::new(&Contents::default(), vec![0; 2]);
        history.submit(&(0..1), &[1]);
        history.submit(&(1..2), &[2]);
        history.submit(&(0..2), &[0, 0]);
        history.resize(3);
        history.acknowledge(1);
        let with = |versions: &[Version], kept| history.clone().recover(&contents_of(versions), kept, false);
        assert_eq!(with(&[1, 2], Kept::Acknowledged), Ok(2));
        assert_eq!(with(&[1, 0], Kept::Nothing), Ok(1));
        assert_eq!(with(&[0, 0], Kept::Nothing), Ok(3));
        assert_eq!(with(&[0, 0, 0], Kept::Nothing), Ok(4));
        assert!(with(&[1, 0], Kept::Acknowledged).unwrap_err().contains("2 were acknowledged"));
        assert!(with(&[0, 2], Kept::Nothing).unwrap_err().contains("none that the volume ever had"));
        assert!(with(&[1, 2, 0], Kept::Nothing).unwrap_err().contains("none that the volume ever had"));
        let mut owned = history.clone();
        owned.flushed(2);
        owned.recover(&contents_of(&[1, 2]), Kept::Flushed, false).unwrap();
        assert_eq!((owned.flushed, owned.flushed_by_owner()), (2, 0), "the next owner has said nothing yet");
        owned.flushed(2);
        assert_eq!(owned.flushed_by_owner(), 2);
        let mut torn = contents_of(&[1, 2]);
        torn[BLOCK - 1] ^= 1;
        assert!(history.clone().recover(&torn, Kept::Nothing, false).unwrap_err().contains("never written"));
    }
}
