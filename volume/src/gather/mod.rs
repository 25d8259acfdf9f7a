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

mod choose;
mod copy;
mod mark;
mod pointers;

use std::collections::VecDeque;

use dedup::BLOCK_LEN;
use futures_util::future::join;

use crate::checkpoint::Change;
use crate::core::Core;
use crate::error::VolumeError;
use crate::names::Source;
use crate::table::{Content, Entry, State};
pub(crate) use choose::Which;

use choose::Chosen;
use copy::{Gathering, Read, Written};
use pointers::Pointers;

/// Of all pointers that may be known, the part whose blocks are copied before the victims are given up.
const AT_ONCE: usize = 64;

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

fn bytes(blocks: usize) -> u64 {
    (blocks * BLOCK_LEN) as u64
}

impl Core {
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
            self.is_tidied.set(true);
        }
        self.reader.foreign_moves.borrow_mut().clear();
        let uses = self.mark(which).await?;
        // From here to the end of choosing nothing else runs, so no hit slips in between.
        let stored_blocks = self.reader.table.borrow().stored_blocks();
        let mut done = Gathered { stored_blocks, live_blocks: self.live_blocks(&uses), ..Gathered::default() };
        self.live.set(done.live_blocks.saturating_sub(self.garbage_noted.get()));
        self.pending.set(0);
        let Chosen { mut forgotten, mut victims, mut has_more } = self.choose(uses, which);
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
        self.deduplication.unhook(victim);
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
            self.deduplication.unhook(*handle);
            self.shares_found.borrow_mut().remove(handle);
        }
        self.limbo.borrow_mut().push((self.reader.last_look(), handles));
    }

    /// What is in use of a victim is elsewhere now.
    fn forward(&self, victim: u32, handle: u32, done: &mut Gathered) {
        let (entry, source) = self.entry_and_source(victim);
        self.reader.table.borrow_mut().forward(victim, handle);
        self.deduplication.unhook(victim);
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
