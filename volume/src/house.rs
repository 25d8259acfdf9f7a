//! What an open volume does by itself: checkpoints, collecting garbage, bringing a quiet log into the pool, noticing that it was replaced.

use std::collections::HashSet;
use std::rc::Rc;
use std::time::Duration;

use crate::core::Core;
use crate::error::VolumeError;
use crate::log::Tail;
use crate::names::{Family, Source, family_path, root_path};
use crate::object::CLEAR_LEN;
use crate::root::Root;
use crate::table::{Content, State};

const ROOT_CHECK: Duration = Duration::from_secs(5);
/// What nothing was added to for so long goes to the pool as it is.
const QUIET: Duration = Duration::from_secs(5);
/// So many times quiet, a volume rests.
const RESTING: u32 = 6;

impl Core {
    /// Checkpoints when they are due, to the end of the volume.
    pub(crate) async fn keep_house(self: Rc<Self>) {
        loop {
            let due = || {
                let wanted = self.checkpoint_wanted.get() || self.map.borrow().segments >= self.settings.checkpoint_segments;
                (wanted || self.failed_errno().is_some()).then_some(())
            };
            self.changed.wait_for(due).await;
            if self.failed_errno().is_some() {
                return;
            }
            if let Err(error) = self.checkpoint().await {
                return self.fail(error);
            }
        }
    }

    /// Collects garbage when it is worth it, to the end of the volume.
    pub(crate) async fn collect_garbage(self: Rc<Self>) {
        loop {
            let due = || (self.gather_wanted.get().is_some() || self.failed_errno().is_some()).then_some(());
            self.changed.wait_for(due).await;
            if self.failed_errno().is_some() {
                return;
            }
            if let Some(which) = self.gather_wanted.take()
                && let Err(error) = self.collect(which).await
            {
                return self.fail(error);
            }
            // Whoever wanted one meanwhile did not know what was found.
            self.gather_wanted.set(None);
        }
    }

    /// Cuts a step that nothing is added to, and sees when there is garbage.
    pub(crate) async fn watch_quiet(self: Rc<Self>) {
        let (mut before, mut quiet) = (Tail::default(), 0);
        while self.failed_errno().is_none() {
            self.chain.environment.sleep(QUIET).await;
            let now = self.backlog.end();
            quiet = if now == before { quiet + 1 } else { 0 };
            if quiet > 0 {
                self.backlog.cut();
            }
            before = now;
            let due = self.due_collection(quiet >= RESTING).filter(|_| self.settings.gathers);
            if due.is_some() {
                self.gather_wanted.set(due);
                self.changed.notify();
            }
        }
    }

    /// Once the pool has what an opening found in the log, flushes rest on the log no more.
    pub(crate) async fn leave_log(self: Rc<Self>, found: Tail) {
        self.backlog.cut();
        let settled = || (self.published.get() >= found.position || self.failed_errno().is_some()).then_some(());
        self.changed.wait_for(settled).await;
        if self.published.get() >= found.position
            && let Err(error) = self.keeper.change(|root| root.is_local = false).await
        {
            self.fail(error);
        }
    }

    /// An owner that was replaced notices even if it writes nothing.
    pub(crate) async fn watch_root(self: Rc<Self>) {
        let name = root_path(&self.chain.group);
        let owner = self.keeper.root().owner;
        while self.failed_errno().is_none() {
            self.chain.environment.sleep(ROOT_CHECK).await;
            let bytes = match self.chain.store.read_root(&name).await {
                Ok(Some((bytes, _))) => bytes,
                Ok(None) => return self.fail(VolumeError::NoVolume),
                Err(_) => continue,
            };
            match Root::decode(&bytes, &name) {
                Ok(root) if root.is_deleted => self.fail(VolumeError::NoVolume),
                Ok(root) if root.owner == owner => {}
                Ok(_) => self.fail(VolumeError::Fenced),
                Err(error) => self.fail(error),
            }
        }
    }

    /// What an opening found that is needed: of what earlier owners wrote, everything else may go.
    pub(crate) fn kept_sources(&self) -> HashSet<Source> {
        let table = self.reader.table.borrow();
        // What was moved may have been sent once more, and have come late.
        let live = table.used().filter(|(_, entry)| entry.is_live());
        let mut kept: HashSet<Source> = live.filter_map(|(handle, _)| table.source(handle)).collect();
        kept.insert(self.keeper.root().meta());
        for source in self.doomed.borrow().iter() {
            kept.remove(source);
        }
        kept
    }

    /// Removes what earlier owners wrote and no checkpoint or step refers to: they died, or were replaced, before one did. `kept` is as it was
    /// at opening: what has been retired since may only be deleted after a checkpoint.
    pub(crate) async fn sweep(self: Rc<Self>, kept: HashSet<Source>) {
        let root = self.keeper.root();
        for family in [Family::Step, Family::Gathered, Family::Meta] {
            let Ok(listed) = self.chain.store.list(&family_path(&root.group, family)).await else { return };
            // Seals are never deleted.
            let is_seal = |len| family == Family::Step && len <= CLEAR_LEN as u64;
            let found = listed.iter().filter(|listed| !is_seal(listed.len)).filter_map(|listed| Source::parse(&listed.name));
            let of_others = |source: &Source| source.group == root.group && source.epoch < root.epoch;
            let orphans: Vec<Source> = found.filter(of_others).filter(|source| !kept.contains(source)).collect();
            self.chain.remove(&orphans).await;
        }
    }

    /// Tells the index what earlier openings have written.
    pub(crate) async fn rebuild_index(self: Rc<Self>) {
        let has_blocks = |(_, entry): &(u32, &crate::table::Entry)| {
            entry.state == State::Live && entry.content == Content::Data && entry.blocks > 0
        };
        let handles: Vec<u32> = self.reader.table.borrow().used().filter(has_blocks).map(|(handle, _)| handle).collect();
        for handle in handles {
            let looking = self.reader.looking();
            let source = self.reader.table.borrow().source(handle);
            let Ok(step) = self.reader.step_of(handle).await else { continue };
            // It may have been retired, or stand for another object, since.
            if self.reader.table.borrow().source(handle) == source && self.target(handle).is_some() {
                self.deduplication.hook(&self.reader, handle, &step);
            }
            drop(looking);
            if self.failed_errno().is_some() {
                return;
            }
        }
    }
}
