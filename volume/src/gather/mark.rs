//! Finding out what is in use: every pointer of every tree and layer, each page read once, while others go on.
//!
//! What is added meanwhile comes from steps: their own objects are new, and what else they refer to is noted as they are applied.

use std::collections::{BTreeMap, HashSet};
use std::rc::Rc;

use rustc_hash::{FxHashMap, FxHashSet};

use crate::ahead::Ahead;
use crate::core::{Core, Layer};
use crate::error::VolumeError;
use crate::gather::Which;
use crate::gather::pointers::Pointers;
use crate::map::{Pointer, Tree, Unhurried, walk};
use crate::names::Slot;
use crate::patience::PatientPages;
use crate::signal::give_way;
use crate::snapshots::by_age;
use crate::table::{Entry, State, Table};

/// Runs of a layer looked at in one go.
const RUNS_AT_ONCE: usize = 4_096;

/// What leads to an object's blocks.
enum Live {
    Known(Pointers),
    /// More than is kept, or all of it.
    Counted(u64),
}

/// How handles are used.
pub(super) struct Uses {
    /// Handles that were there when marking began.
    before: HashSet<u32>,
    /// Pages refer to these.
    named: FxHashSet<u32>,
    /// By the handle that a pointer leads to in the end.
    live: FxHashMap<u32, Live>,
    /// Pages that cannot be read may refer to these, and to everything in their objects.
    kept: HashSet<u32>,
    /// Whether ancestors' objects are to be rewritten, and not the volume's own.
    inherited: bool,
    /// The shares of objects that were in use when somebody looked last.
    expected: FxHashMap<u32, f64>,
    /// How many are known, and may be; some that were met more than once count more than once.
    pointers: usize,
    pointers_max: usize,
}

impl Uses {
    fn new(table: &Table, which: Which, expected: FxHashMap<u32, f64>, pointers_max: usize) -> Uses {
        Uses {
            before: table.used().map(|(handle, _)| handle).collect(),
            named: FxHashSet::default(),
            live: FxHashMap::default(),
            kept: HashSet::new(),
            inherited: which == Which::Inherited,
            expected,
            pointers: 0,
            pointers_max,
        }
    }

    /// Whether the object may be rewritten, so that it matters what of it is in use.
    pub(super) fn tracks(&self, entry: &Entry) -> bool {
        self.inherited == (entry.owner != 0)
    }

    /// Whether it is not known that nothing, or what, refers to it.
    pub(super) fn may_be_needed(&self, handle: u32) -> bool {
        !self.before.contains(&handle) || self.kept.contains(&handle)
    }

    pub(super) fn is_unused(&self, handle: u32) -> bool {
        !self.named.contains(&handle) && !self.live.contains_key(&handle)
    }

    pub(super) fn live_blocks(&self, handle: u32, entry: &Entry) -> u64 {
        let blocks = u64::from(entry.blocks);
        if self.may_be_needed(handle) {
            return blocks;
        }
        match self.live.get(&handle) {
            None => 0,
            Some(Live::Known(pointers)) => blocks.min(pointers.len() as u64),
            Some(Live::Counted(count)) => blocks.min(*count),
        }
    }

    /// The share of each live object that is in use, as far as that is known.
    fn shares(&self, table: &Table) -> FxHashMap<u32, f64> {
        let live = table.used().filter(|(handle, entry)| entry.is_live() && !self.may_be_needed(*handle));
        live.map(|(handle, entry)| (handle, self.live_blocks(handle, entry) as f64 / f64::from(entry.blocks.max(1)))).collect()
    }

    /// What leads to an object's blocks, if that is known.
    pub(super) fn take(&mut self, handle: u32) -> Option<Pointers> {
        match self.live.remove(&handle) {
            None => Some(Pointers::default()),
            Some(Live::Known(pointers)) => Some(pointers),
            Some(Live::Counted(_)) => None,
        }
    }

    fn note(&mut self, pointer: Pointer, table: &Table) {
        let Some(location) = pointer.location() else { return };
        let handle = location.segment.get();
        self.named.insert(handle);
        let Some(entry) = table.get(handle) else { return };
        let (to, target) = match entry.state {
            State::Forwarded(to) => (to, table.get(to).unwrap_or(entry)),
            State::Live | State::Free => (handle, entry),
        };
        let unknown = if self.tracks(target) { Live::Known(Pointers::default()) } else { Live::Counted(0) };
        match self.live.entry(to).or_insert(unknown) {
            Live::Counted(count) => *count += 1,
            Live::Known(pointers) => {
                let before = pointers.len();
                pointers.push(location);
                self.pointers = self.pointers + pointers.len() - before;
            }
        }
        if self.pointers > self.pointers_max && !self.inherited {
            self.keep_emptiest(table);
        }
    }

    /// Nothing that is known is counted twice from now on.
    fn settle(&mut self) {
        for live in self.live.values_mut() {
            if let Live::Known(pointers) = live {
                pointers.settle();
            }
        }
    }

    /// Of the fullest objects, only the number of pointers is remembered. What leads to an object may come all at once or in the end, so what was found
    /// the last time tells more than what has been found so far, and what has come since is taken for full.
    fn keep_emptiest(&mut self, table: &Table) {
        let share = |handle: u32, pointers: &Pointers| match self.expected.get(&handle) {
            Some(expected) => *expected,
            None if !self.expected.is_empty() => 1.0,
            None => pointers.len() as f64 / table.get(handle).map_or(1.0, |entry| f64::from(entry.blocks.max(1))),
        };
        let known = self.live.iter().filter_map(|(handle, live)| match live {
            Live::Known(pointers) => Some((share(*handle, pointers), *handle)),
            Live::Counted(_) => None,
        });
        let mut fullest: Vec<(f64, u32)> = known.collect();
        fullest.sort_by(|one, other| other.0.total_cmp(&one.0).then(one.1.cmp(&other.1)));
        for (_, handle) in fullest {
            if self.pointers <= self.pointers_max / 4 * 3 {
                break;
            }
            let Some(mut pointers) = self.take(handle) else { continue };
            self.pointers -= pointers.len();
            pointers.settle();
            self.live.insert(handle, Live::Counted(pointers.len() as u64));
        }
    }
}

impl Core {
    /// What refers to what: complete at the moment when the answer comes.
    pub(super) async fn mark(&self, which: Which) -> Result<Uses, VolumeError> {
        let (mut uses, trees, layers) = {
            // Nothing refers to the new pages of a checkpoint that is under way.
            let _between_checkpoints = self.house.hold().await;
            // A segment halfway in the layers would be known, and half of what leads to it not.
            let _whole = self.applying.hold().await;
            self.noted_hits.replace(Some(Vec::new()));
            self.garbage_noted.set(0);
            let expected = self.shares_found.take();
            let uses = Uses::new(&self.reader.table.borrow(), which, expected, self.settings.marked_max);
            (uses, self.trees(), self.closed_layers())
        };
        let marked = self.mark_all(&mut uses, trees, layers).await;
        let noted = self.noted_hits.take().unwrap_or_default();
        let unreadable = marked?;
        let table = self.reader.table.borrow();
        noted.into_iter().for_each(|pointer| uses.note(pointer, &table));
        drop(table);
        uses.settle();
        uses.kept = self.kept_for(&unreadable);
        self.shares_found.replace(uses.shares(&self.reader.table.borrow()));
        Ok(uses)
    }

    /// The answer is which pages cannot be read.
    async fn mark_all(&self, uses: &mut Uses, trees: Vec<Tree>, layers: Vec<Rc<Layer>>) -> Result<Vec<Pointer>, VolumeError> {
        let table = &self.reader.table;
        let ahead = Ahead::new(&self.reader, trees.len());
        let patient = PatientPages { core: self, pages: &ahead };
        let pages = Unhurried::new(&patient);
        let unreadable = walk(&trees, &pages, |pointer, _| uses.note(pointer, &table.borrow())).await?;
        for layer in layers {
            let mut from = 0;
            loop {
                let runs: Vec<(std::ops::Range<u64>, Pointer)> = layer.runs.within(from..u64::MAX).take(RUNS_AT_ONCE).collect();
                let Some((last, _)) = runs.last() else { break };
                from = last.end;
                runs.iter().for_each(|(_, pointer)| uses.note(*pointer, &table.borrow()));
                give_way().await;
            }
        }
        unreadable.values().for_each(|error| self.note_damage(error.clone()));
        Ok(unreadable.into_keys().collect())
    }

    /// Those of one volume after each other, the oldest first.
    fn trees(&self) -> Vec<Tree> {
        let map = self.map.borrow();
        let mut trees: BTreeMap<Slot, Vec<Tree>> = BTreeMap::new();
        for snapshot in by_age(self.committed_snapshots(|_| true), &self.reader.table.borrow()) {
            trees.entry(snapshot.slot).or_default().push(snapshot.tree);
        }
        map.volumes.iter().for_each(|(slot, held)| trees.entry(*slot).or_default().push(held.tree));
        trees.into_values().flatten().collect()
    }

    /// All layers, which change no more.
    fn closed_layers(&self) -> Vec<Rc<Layer>> {
        let mut map = self.map.borrow_mut();
        map.close_layer(None);
        map.layers.clone()
    }

    /// What pages that cannot be read may refer to.
    fn kept_for(&self, unreadable: &[Pointer]) -> HashSet<u32> {
        let table = self.reader.table.borrow();
        let entry_of = |page: &Pointer| table.get(page.location()?.segment.get());
        let pages: Option<Vec<&Entry>> = unreadable.iter().map(entry_of).collect();
        let may_be_needed = |entry: &Entry| pages.as_ref().is_none_or(|pages| pages.iter().any(|page| page.may_refer_to(entry)));
        let mut kept = HashSet::new();
        for (handle, entry) in table.used().filter(|(_, entry)| may_be_needed(entry)) {
            kept.insert(handle);
            if let State::Forwarded(to) = entry.state {
                kept.insert(to);
            }
        }
        kept
    }
}
