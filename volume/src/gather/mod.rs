//! Collecting garbage: objects that nothing refers to are deleted, and those little of which is in use are rewritten.
//!
//! ```text
//!   mark      every pointer of every tree and layer: which handles are used, and where        others go on meanwhile
//!   choose    unused handles are forgotten; emptyish objects are victims, and take no new hits          at one moment
//!   copy      what is in use of some victims ─▶ new objects, whose headers tell what came from where  others go on meanwhile
//!   swap      those are forwarded ─▶ checkpoint ─▶ only then their objects are deleted                     in the house
//!   the next victims …
//! ```
//!
//! Invariants: pages are not rewritten for it; a snapshot neither stalls it nor is changed by it. What is new since marking began is left
//! alone, and so is an object that a step on its way may refer to: whatever refers to a victim at the swap was there when it was chosen. What
//! cannot be read is left where it is, and so is everything that a page which cannot be read may refer to: what was there when that page
//! was written.

mod copy;
mod mark;
mod pointers;

use std::collections::VecDeque;

use dedup::BLOCK_LEN;
use futures_util::future::join;

use crate::checkpoint::Change;
use crate::core::Core;
use crate::error::VolumeError;
use crate::names::{Family, Source};
use crate::segment::Place;
use crate::table::{Content, Entry, State};
use copy::{Gathering, Read, Written};
use mark::Uses;
use pointers::Pointers;

/// Of all pointers that may be known, the part whose blocks are copied before the victims are given up.
const AT_ONCE: usize = 64;
/// Blocks that may be garbage before anybody looks: one object's.
const GARBAGE_MIN: u64 = 8_192;
/// Of what is stored, the share in use that is kept up while the volume is busy, and beyond which nothing is done. Less garbage costs more copies.
const IN_USE_BUSY: f64 = 0.8;
const IN_USE_BUSY_DONE: f64 = 0.84;
/// The same for a volume that rests, and the share of an object up to which it is rewritten in any case.
const IN_USE_QUIET: f64 = 0.97;
const IN_USE_QUIET_OBJECT: f64 = 0.9;
/// It is tidied up again when one block in so many has changed, as that takes a look at all of its map.
const TIDY_EVERY: u64 = 64;

/// What a collection did.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Gathered {
    /// Blocks in use, and blocks stored before anything was done.
    pub live_blocks: u64,
    pub stored_blocks: u64,
    /// Objects that are deleted, and their bytes.
    pub objects_deleted: u64,
    pub bytes_deleted: u64,
    /// Blocks that were copied.
    pub blocks_moved: u64,
}

/// Which objects are rewritten.
#[derive(Clone, Copy, PartialEq, Debug)]
pub(crate) enum Which {
    /// The volume's own of which no larger share is in use.
    Below(f64),
    /// The volume's own, the emptiest first, until such a share of all that is stored is in use.
    Until(f64),
    /// The volume's own, of a volume that rests.
    Tidy,
    /// All that belong to ancestors.
    Inherited,
}

/// What is to be done.
#[derive(Default)]
struct Chosen {
    forgotten: Vec<u32>,
    /// Each with what is in use of it.
    victims: VecDeque<(u32, Pointers)>,
    /// Others are worth it, too.
    has_more: bool,
}

/// An object that may be rewritten.
struct Candidate {
    handle: u32,
    live: u64,
    blocks: u64,
}

impl Candidate {
    /// In use, 0 to 1.
    fn share(&self) -> f64 {
        self.live as f64 / self.blocks.max(1) as f64
    }
}

/// Which of the candidates are rewritten. Of the volume's own blocks that are left when unused objects are gone, `live` of `stored` are in use.
fn victims(mut candidates: Vec<Candidate>, which: Which, live: u64, mut stored: u64) -> Vec<u32> {
    if which != Which::Inherited {
        candidates.retain(|candidate| candidate.live < candidate.blocks);
        candidates.sort_by(|one, other| one.share().total_cmp(&other.share()).then(one.handle.cmp(&other.handle)));
    }
    let mut is_below = |share: f64, candidate: &Candidate| {
        let is_below = (live as f64) < share * stored as f64;
        stored -= candidate.blocks - candidate.live;
        is_below
    };
    let is_worth_it = |candidate: &Candidate| match which {
        Which::Below(below) => candidate.share() <= below,
        Which::Until(share) => is_below(share, candidate),
        Which::Tidy => is_below(IN_USE_QUIET, candidate) || candidate.share() <= IN_USE_QUIET_OBJECT,
        Which::Inherited => true,
    };
    let count = candidates.iter().map(is_worth_it).take_while(|worth_it| *worth_it).count();
    candidates.into_iter().take(count).map(|candidate| candidate.handle).collect()
}

fn bytes(blocks: usize) -> u64 {
    (blocks * BLOCK_LEN) as u64
}

impl Core {
    /// What to collect now, if there may be enough garbage. A volume that rests is tidied up once.
    pub(crate) fn due_collection(&self, is_quiet: bool) -> Option<Which> {
        let stored = self.reader.table.borrow().stored_blocks();
        let garbage_max = self.garbage_max(stored);
        if is_quiet && garbage_max > 0 && (self.is_untidy() || self.untidy.get() > 0 && self.live.get() == 0) {
            return Some(Which::Tidy);
        }
        let is_much = garbage_max >= GARBAGE_MIN && garbage_max as f64 > (1.0 - IN_USE_BUSY) * stored as f64;
        (is_much && self.written.get() > 0).then_some(Which::Until(IN_USE_BUSY_DONE))
    }

    /// So much has changed that it is worth looking at all of the map.
    fn is_untidy(&self) -> bool {
        let stored = self.reader.table.borrow().stored_blocks();
        self.untidy.get() > stored / TIDY_EVERY
    }

    pub(crate) async fn collect(&self, which: Which) -> Result<Gathered, VolumeError> {
        let _alone = self.gathering.hold().await;
        // The tree still leads to what was changed since the last checkpoint.
        if self.map.borrow().segments > 0 {
            self.checkpoint().await?;
        }
        self.collecting.set(true);
        let gathered = self.collect_alone(which).await;
        self.collecting.set(false);
        gathered
    }

    /// For whoever holds the right to collect.
    pub(crate) async fn collect_alone(&self, which: Which) -> Result<Gathered, VolumeError> {
        self.written.set(0);
        if which == Which::Tidy {
            self.untidy.set(0);
        }
        self.reader.foreign_moves.borrow_mut().clear();
        let uses = self.mark(which).await?;
        // From here to the end of choosing nothing else runs, so no hit slips in between.
        let stored_blocks = self.reader.table.borrow().stored_blocks();
        let mut done = Gathered { stored_blocks, live_blocks: self.live_blocks(&uses), ..Gathered::default() };
        self.live.set(done.live_blocks);
        self.pending.set(0);
        let Chosen { mut forgotten, mut victims, mut has_more } = self.choose(uses, which, &done);
        let pointers = victims.iter().map(|(_, pointers)| pointers.len()).sum();
        self.note_progress(|progress| progress.begin(bytes(pointers)));
        while !(forgotten.is_empty() && victims.is_empty()) {
            let next = self.next_victims(&mut victims);
            self.rewrite(next, std::mem::take(&mut forgotten), &mut done).await?;
            if which == Which::Tidy && self.is_untidy() && !victims.is_empty() {
                // It does not rest any more, and there is other garbage by now.
                victims.drain(..).for_each(|(handle, _)| self.deduplication.restore(handle));
                has_more = true;
            }
        }
        if has_more {
            // Another collection is due.
            self.note_changed(done.stored_blocks);
        }
        self.reader.tally.collections.add((done.blocks_moved > 0).into());
        Ok(done)
    }

    /// The victims that are rewritten before any others.
    fn next_victims(&self, victims: &mut VecDeque<(u32, Pointers)>) -> Vec<(u32, Pointers)> {
        let mut pointers = 0;
        let mut next = Vec::new();
        while let Some(victim) = victims.pop_front() {
            pointers += victim.1.len();
            next.push(victim);
            if pointers > self.settings.marked_max / AT_ONCE {
                break;
            }
        }
        next
    }

    /// Copies what is in use of some victims, and gives these up, and others that nothing refers to.
    async fn rewrite(
        &self,
        victims: Vec<(u32, Pointers)>,
        mut forgotten: Vec<u32>,
        done: &mut Gathered,
    ) -> Result<(), VolumeError> {
        let (moved, deleted) = (done.blocks_moved, done.bytes_deleted);
        let mut written = self.copy(victims, done).await?;
        let _alone = self.house.hold().await;
        // Of what an ancestor was found to have moved, or to have moved there, something else is in use than it seemed: it stays for another time.
        {
            let foreign_moves = self.reader.foreign_moves.borrow();
            forgotten.retain(|handle| !foreign_moves.contains(handle));
            written.iter_mut().for_each(|written| written.victims.retain(|handle| !foreign_moves.contains(handle)));
        }
        self.swap(forgotten, written, done).await?;
        self.reader.tally.blocks_moved.add(done.blocks_moved - moved);
        self.reader.tally.bytes_freed.add(done.bytes_deleted - deleted);
        Ok(())
    }

    fn live_blocks(&self, uses: &Uses) -> u64 {
        let table = self.reader.table.borrow();
        let own = table.used().filter(|(_, entry)| entry.owner == 0 && entry.is_live());
        own.map(|(handle, entry)| uses.live_blocks(handle, entry)).sum()
    }

    fn choose(&self, mut uses: Uses, which: Which, done: &Gathered) -> Chosen {
        let mut chosen = Chosen::default();
        let (table, hit_uses, unreadable) = (self.reader.table.borrow(), self.hit_uses.borrow(), self.unreadable.borrow());
        let (mut candidates, mut stored) = (Vec::new(), done.stored_blocks);
        for (handle, entry) in table.used() {
            if hit_uses.contains_key(&handle) || uses.may_be_needed(handle) || self.is_in_history(entry) {
                continue;
            }
            if uses.is_unused(handle) {
                chosen.forgotten.push(handle);
                stored -= entry.own_blocks();
            } else if entry.is_live() && uses.tracks(entry) && !unreadable.contains(&handle) {
                let live = uses.live_blocks(handle, entry);
                candidates.push(Candidate { handle, live, blocks: entry.blocks.into() });
            }
        }
        let victims = victims(candidates, which, done.live_blocks, stored);
        let worth_it = victims.len();
        chosen.victims = victims.into_iter().filter_map(|handle| Some((handle, uses.take(handle)?))).collect();
        // Of the fullest it may not be known what is in use, until others are gone.
        chosen.has_more = (1..worth_it).contains(&chosen.victims.len());
        let taken = chosen.forgotten.iter().chain(chosen.victims.iter().map(|(handle, _)| handle));
        taken.for_each(|handle| self.deduplication.retire(*handle));
        chosen
    }

    /// An opening would still read the object's header.
    fn is_in_history(&self, entry: &Entry) -> bool {
        let place = Place { epoch: entry.epoch, sequence: entry.number };
        entry.owner == 0 && entry.family == Family::Step && place >= self.keeper.root().checkpoint.place
    }

    /// Copies what is in use of each victim. The answer is the new objects, of which nobody knows yet.
    async fn copy(&self, victims: Vec<(u32, Pointers)>, done: &mut Gathered) -> Result<Vec<Written>, VolumeError> {
        let mut written = Vec::new();
        for content in [Content::Data, Content::Pages] {
            let mut gathering = Gathering::new(self, content);
            let mut victims = victims.iter();
            let mut current = self.read_next(&mut victims, content).await?;
            while let Some(read) = current {
                let victim = read.handle;
                // While one is packed, the next is read.
                let (added, next) = join(gathering.add(read), self.read_next(&mut victims, content)).await;
                match added {
                    Ok(blocks) => {
                        done.blocks_moved += blocks as u64;
                        self.note_progress(|progress| progress.advance(bytes(blocks)));
                    }
                    Err(error) => self.leave(victim, error)?,
                }
                current = next?;
            }
            written.extend(gathering.finish().await?);
        }
        Ok(written)
    }

    /// What is in use of the next victim that has such content and can be read.
    async fn read_next<'a>(
        &self,
        victims: &mut impl Iterator<Item = &'a (u32, Pointers)>,
        content: Content,
    ) -> Result<Option<Read>, VolumeError> {
        for (handle, pointers) in victims {
            let entry = self.reader.table.borrow().get(*handle).copied();
            // An ancestor's object may turn out to have moved meanwhile.
            if entry.is_none_or(|entry| entry.content != content || !entry.is_live()) {
                continue;
            }
            match self.read_victim(*handle, pointers, content).await {
                Ok(read) => return Ok(Some(read)),
                Err(error) => self.leave(*handle, error)?,
            }
        }
        Ok(None)
    }

    /// A victim that cannot be read stays as it is.
    fn leave(&self, victim: u32, error: VolumeError) -> Result<(), VolumeError> {
        if !matches!(error, VolumeError::ObjectDamaged { .. }) {
            return Err(error);
        }
        self.note_damage(error);
        self.unreadable.borrow_mut().insert(victim);
        self.deduplication.restore(victim);
        Ok(())
    }

    /// What was copied is where the volume has it from now on, and what nothing refers to goes. New objects take no hits before a checkpoint knows of
    /// them, as a history that refers to what no checkpoint and no step has written could not be read.
    async fn swap(&self, forgotten: Vec<u32>, written: Vec<Written>, done: &mut Gathered) -> Result<(), VolumeError> {
        let mut new = Vec::new();
        for Written { source, content, blocks, bytes, opened, header, victims } in written {
            let full = || VolumeError::ObjectDamaged { object: source.path(), why: "the volume has no handle left for it" };
            let handle = self.reader.table.borrow_mut().add(source, content, blocks, bytes).ok_or_else(full)?;
            self.deduplication.retire(handle);
            self.reader.opened(handle, opened);
            victims.into_iter().for_each(|victim| self.forward(victim, handle, done));
            new.push((handle, content, header));
        }
        self.forget(forgotten, done);
        self.checkpoint_with(Change::Nothing).await?;
        for (handle, _, header) in new.iter().filter(|(_, content, _)| *content == Content::Data) {
            self.deduplication.restore(*handle);
            self.deduplication.hook(&self.reader, *handle, header);
        }
        Ok(())
    }

    /// No page refers to these handles. Objects of one's own are deleted after the next checkpoint.
    fn forget(&self, handles: Vec<u32>, done: &mut Gathered) {
        for handle in &handles {
            let (entry, source) = self.entry_and_source(*handle);
            if let (Some(Entry { owner: 0, state: State::Live, bytes, .. }), Some(source)) = (entry, source) {
                self.doom(source, bytes, done);
            }
            self.reader.table.borrow_mut().forget(*handle);
        }
        self.limbo.borrow_mut().push((self.reader.last_look(), handles));
    }

    /// What is in use of a victim is elsewhere now.
    fn forward(&self, victim: u32, handle: u32, done: &mut Gathered) {
        let (entry, source) = self.entry_and_source(victim);
        self.reader.table.borrow_mut().forward(victim, handle);
        if let (Some(Entry { owner: 0, bytes, .. }), Some(source)) = (entry, source) {
            self.doom(source, bytes, done);
        }
    }

    fn entry_and_source(&self, handle: u32) -> (Option<Entry>, Option<Source>) {
        let table = self.reader.table.borrow();
        (table.get(handle).copied(), table.source(handle))
    }

    fn doom(&self, source: Source, bytes: u32, done: &mut Gathered) {
        self.doomed.borrow_mut().push(source);
        done.objects_deleted += 1;
        done.bytes_deleted += u64::from(bytes);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn chosen(which: Which, objects: &[(u64, u64)]) -> Vec<u32> {
        let candidates = (0..).zip(objects).map(|(handle, (live, blocks))| Candidate { handle, live: *live, blocks: *blocks });
        let (live, stored) = objects.iter().fold((0, 0), |sum, object| (sum.0 + object.0, sum.1 + object.1));
        victims(candidates.collect(), which, live, stored)
    }

    #[test]
    fn the_emptiest_objects_are_rewritten_until_enough_of_what_is_stored_is_in_use() {
        let objects = [(99, 100), (50, 100), (100, 100), (85, 100), (95, 100)];
        assert_eq!(chosen(Which::Until(0.80), &objects), [0; 0]);
        assert_eq!(chosen(Which::Until(0.90), &objects), [1]);
        assert_eq!(chosen(Which::Until(0.97), &objects), [1, 3]);
        assert_eq!(chosen(Which::Until(1.0), &objects), [1, 3, 4, 0]);
        assert_eq!(chosen(Which::Below(0.85), &objects), [1, 3]);
    }

    #[test]
    fn a_resting_volume_rewrites_what_has_a_tenth_of_garbage_however_little_that_is_of_all() {
        let mostly_full = [(990, 1000), (89, 100), (999, 1000), (91, 100), (1000, 1000), (1000, 1000)];
        assert_eq!(chosen(Which::Until(IN_USE_QUIET), &mostly_full), [0; 0]);
        assert_eq!(chosen(Which::Tidy, &mostly_full), [1]);
        let evenly = [(91, 100), (92, 100), (93, 100)];
        assert_eq!(chosen(Which::Tidy, &evenly), [0, 1]);
    }
}
