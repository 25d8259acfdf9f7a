//! Finding out what a step holds that is stored already.
//!
//! ```text
//!   hashes of a step ─▶ Index ─▶ "load these headers" ─▶ Reader ─▶ Index ─▶ candidates, whose objects stay until the step is published
//! ```

use std::cell::RefCell;
use std::collections::{HashMap, HashSet};
use std::rc::{Rc, Weak};

use dedup::hash::BlockHash;
use dedup::index::{BlockRecord, Index, Plan, Search, Settings};
use dedup::location::{Location, SegmentHandle};

use crate::core::Core;
use crate::reader::Reader;
use crate::reduce::{Duplicates, Target};
use crate::signal::Lock;
use crate::step_header::StepHeader;
use crate::table::{Content, State};

pub(crate) struct Deduplication {
    /// `None`: nothing is looked for.
    index: Option<RefCell<Index>>,
    looking_up: Lock,
    /// Handles that take no new hits.
    retiring: RefCell<HashSet<u32>>,
}

/// Keeps the objects of a step's candidates until the step is published.
#[derive(Default)]
pub(crate) struct Uses {
    handles: Vec<u32>,
    /// Weak, as the volume keeps what is published and waits for what comes before it.
    core: Weak<Core>,
}

impl Drop for Uses {
    fn drop(&mut self) {
        let Some(core) = self.core.upgrade() else { return };
        let mut uses = core.hit_uses.borrow_mut();
        for handle in &self.handles {
            if let Some(count) = uses.get_mut(handle) {
                *count -= 1;
                if *count == 0 {
                    uses.remove(handle);
                }
            }
        }
    }
}

impl Deduplication {
    pub(crate) fn new(unique_bytes: Option<u64>) -> Deduplication {
        let index = unique_bytes.map(|bytes| RefCell::new(Index::new(Settings::for_unique_bytes(bytes))));
        Deduplication { index, looking_up: Lock::default(), retiring: RefCell::default() }
    }

    /// What an object's header tells the index from now on.
    pub(crate) fn hook(&self, reader: &Reader, handle: u32, step: &StepHeader) {
        if let (Some(index), Some(segment)) = (&self.index, SegmentHandle::new(handle)) {
            index.borrow_mut().hook(segment, &records(reader, segment, step));
        }
    }

    /// The object of this handle takes no hits from now on, unless it is kept after all.
    pub(crate) fn retire(&self, handle: u32) {
        self.retiring.borrow_mut().insert(handle);
    }

    /// What an object's header tells is forgotten.
    pub(crate) fn unhook(&self, handle: u32) {
        if let (Some(index), Some(segment)) = (&self.index, SegmentHandle::new(handle)) {
            index.borrow_mut().unhook(segment);
        }
    }

    /// The handle stands for another object, or its object was kept after all.
    pub(crate) fn restore(&self, handle: u32) {
        self.retiring.borrow_mut().remove(&handle);
    }

    /// Bytes that the index keeps in memory.
    pub(crate) fn pinned_bytes(&self) -> usize {
        self.index.as_ref().map_or(0, |index| index.borrow().pinned_bytes())
    }
}

/// What a header says of blocks, its own and those it found elsewhere.
fn records(reader: &Reader, segment: SegmentHandle, step: &StepHeader) -> Vec<BlockRecord> {
    let table = reader.table.borrow();
    let own = step.stored.iter().map(|(hash, spot)| BlockRecord { hash: *hash, location: Location { segment, spot: *spot } });
    let elsewhere = step.hits.iter().filter_map(|hit| {
        let handle = table.handle_of(step.sources.get(hit.source as usize)?)?;
        let is_live = table.get(handle)?.state == State::Live;
        let segment = SegmentHandle::new(handle).filter(|_| is_live)?;
        Some(BlockRecord { hash: hit.hash, location: Location { segment, spot: hit.spot } })
    });
    own.chain(elsewhere).collect()
}

impl Core {
    /// What is stored already of blocks with these hashes, and the right to refer to it.
    pub(crate) async fn find_duplicates(self: &Rc<Self>, hashes: &[BlockHash]) -> (Option<Duplicates>, Uses) {
        let Some(index) = &self.deduplication.index else { return (None, Uses::default()) };
        let _alone = self.deduplication.looking_up.hold().await;
        let mut search = Search::new(hashes);
        let candidates = loop {
            let plan = index.borrow_mut().lookup(&mut search);
            let wanted = match plan {
                Plan::Found(candidates) => break candidates,
                Plan::Load(wanted) => wanted,
            };
            for segment in wanted {
                // A header that cannot be read costs duplicates, not data.
                let records = match self.reader.step_of(segment.get()).await {
                    Ok(step) => records(&self.reader, segment, &step),
                    Err(_) => Vec::new(),
                };
                index.borrow_mut().loaded(&mut search, segment, &records);
            }
        };
        let targets: HashMap<SegmentHandle, Target> =
            candidates.segments().into_iter().filter_map(|segment| Some((segment, self.target(segment.get())?))).collect();
        let uses = self.use_handles(targets.keys().map(|segment| segment.get()).collect());
        (Some(Duplicates { candidates, targets }), uses)
    }

    /// What a handle stands for, if steps may refer to it. Of an ancestor's object they may not: that ancestor keeps only the blocks that its
    /// snapshot leads to, and nobody here knows which these are.
    pub(crate) fn target(&self, handle: u32) -> Option<Target> {
        let table = self.reader.table.borrow();
        let entry = table.get(handle)?;
        let may_be_hit = entry.state == State::Live
            && entry.owner == 0
            && entry.content == Content::Data
            && !self.deduplication.retiring.borrow().contains(&handle)
            && !self.reader.distrusts(handle);
        let source = table.source(handle).filter(|_| may_be_hit)?;
        Some(Target { source })
    }

    fn use_handles(self: &Rc<Self>, handles: Vec<u32>) -> Uses {
        let mut uses = self.hit_uses.borrow_mut();
        handles.iter().for_each(|handle| *uses.entry(*handle).or_default() += 1);
        Uses { handles, core: Rc::downgrade(self) }
    }
}
