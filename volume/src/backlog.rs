//! What is in the log and not yet in the pool: where to read it, and how it is cut into segments.
//!
//! ```text
//!   log ─records─▶ open step ──cut──▶ cut steps, in order ─▶ published, and forgotten here
//!                  newest, hides ───▶ what they have, and newer ones hide older ones
//! ```
//!
//! A step has everything logged since the one before, in its newest version. So the state after each step is one that the volume really had,
//! and what was overwritten within a step never leaves this host.

use std::cell::{Cell, RefCell};
use std::collections::VecDeque;
use std::ops::Range;
use std::rc::Rc;

use bytes::Bytes;

use crate::extent_map::{ExtentMap, Run, Seen, look_through};
use crate::log::{Follower, Logged, PayloadPlace, RecordKind, Tail};
use crate::segment::BLOCK;
use crate::signal::Signal;

/// What a record adds to a segment's header, in bytes, whatever it carries.
const RECORD_COST: u64 = 64;
/// Steps that are cut for flushes and not yet stored. A flush that comes later shares the next one with others: with more under way, each would wait for
/// the slowest of more PUTs, as they count in order.
const FLUSHING_MAX: usize = 2;

/// Bytes that are in the log, kept in memory too.
#[derive(Debug)]
struct Kept {
    bytes: Bytes,
    budget: Rc<Cell<usize>>,
}

impl Drop for Kept {
    fn drop(&mut self) {
        self.budget.set(self.budget.get() + self.bytes.len());
    }
}

/// A run of blocks that is only in the log.
#[derive(Clone, Debug)]
pub(crate) struct Pending {
    pub(crate) kind: RecordKind,
    /// Of a write.
    pub(crate) payload: PayloadPlace,
    /// Blocks of the payload before this run.
    pub(crate) skip: u64,
    kept: Option<Rc<Kept>>,
}

impl Pending {
    /// The whole payload, if it is in memory.
    pub(crate) fn kept(&self) -> Option<&Bytes> {
        self.kept.as_ref().map(|kept| &kept.bytes)
    }
}

impl Run for Pending {
    fn skip(&self, blocks: u64) -> Pending {
        Pending { skip: self.skip + blocks, ..self.clone() }
    }
}

/// What goes into one segment.
#[derive(Debug)]
pub(crate) struct Step {
    pub(crate) runs: ExtentMap<Pending>,
    /// All records before this place are in this step or an earlier one.
    pub(crate) end: Tail,
    /// The log has the marker there that this step ends with.
    pub(crate) marker: Option<PayloadPlace>,
    /// Whoever flushes waits for it.
    pub(crate) is_for_flush: bool,
}

pub(crate) struct Backlog {
    /// What was logged since the last cut.
    open: RefCell<ExtentMap<Pending>>,
    /// Those that were cut and are not yet in the pool, oldest first.
    steps: RefCell<VecDeque<Rc<Step>>>,
    /// How many of them, from the oldest, are on their way.
    taken: Cell<usize>,
    /// Steps that were cut for a flush and are not yet stored.
    flushing: Cell<usize>,
    open_from: Cell<u64>,
    open_bytes: Cell<u64>,
    open_marker: Cell<Option<PayloadPlace>>,
    end: Cell<Tail>,
    /// Bytes of payload after which a step is cut.
    step_bytes: u64,
    /// Bytes of payload that may still be kept in memory.
    budget: Rc<Cell<usize>>,
    changed: Signal,
}

impl Backlog {
    /// Nothing is pending; the log goes on at `end`. Of what is pending, `kept_bytes` at most are kept in memory.
    pub(crate) fn new(end: Tail, step_bytes: u64, kept_bytes: usize) -> Backlog {
        Backlog {
            open: RefCell::default(),
            steps: RefCell::default(),
            taken: Cell::new(0),
            flushing: Cell::new(0),
            open_from: Cell::new(end.position),
            open_bytes: Cell::new(0),
            open_marker: Cell::new(None),
            end: Cell::new(end),
            step_bytes,
            budget: Rc::new(Cell::new(kept_bytes)),
            changed: Signal::default(),
        }
    }

    /// Ends the open step, if there is anything in it.
    pub(crate) fn cut(&self) {
        self.cut_step(false);
    }

    /// Ends the open step for a flush of everything before `wanted`, if it has any of that; not yet while enough steps are under way for other flushes.
    pub(crate) fn cut_for_flush(&self, wanted: u64) {
        if self.open_from.get() < wanted && self.flushing.get() < FLUSHING_MAX {
            self.flushing.set(self.flushing.get() + 1);
            self.cut_step(true);
        }
    }

    /// The pool has a step that was cut for a flush, though perhaps not all before it.
    pub(crate) fn flush_stored(&self) {
        self.flushing.set(self.flushing.get() - 1);
    }

    fn cut_step(&self, is_for_flush: bool) {
        let end = self.end.get();
        if end.position == self.open_from.get() {
            return;
        }
        let step = Step { runs: self.open.take(), end, marker: self.open_marker.take(), is_for_flush };
        self.steps.borrow_mut().push_back(Rc::new(step));
        self.open_from.set(end.position);
        self.open_bytes.set(0);
        self.changed.notify();
    }

    /// The end of the last batch that changed anything.
    pub(crate) fn end(&self) -> Tail {
        self.end.get()
    }

    /// Where the log has the markers of the steps that wait to be taken.
    pub(crate) fn markers(&self) -> Vec<PayloadPlace> {
        self.steps.borrow().iter().skip(self.taken.get()).filter_map(|step| step.marker).collect()
    }

    /// True if no step waits to be taken.
    pub(crate) fn is_taken(&self) -> bool {
        self.steps.borrow().len() == self.taken.get()
    }

    /// The oldest step that was cut and not yet taken.
    pub(crate) async fn next_step(&self) -> Rc<Step> {
        self.changed.wait_for(|| self.take_step()).await
    }

    fn take_step(&self) -> Option<Rc<Step>> {
        let step = self.steps.borrow().get(self.taken.get()).cloned()?;
        self.taken.set(self.taken.get() + 1);
        Some(step)
    }

    /// The pool has the oldest step.
    pub(crate) fn published(&self) -> Option<Rc<Step>> {
        let step = self.steps.borrow_mut().pop_front()?;
        self.taken.set(self.taken.get() - 1);
        Some(step)
    }

    /// What is pending of a range, and the rest of it.
    pub(crate) fn within(&self, blocks: Range<u64>) -> Seen<Pending> {
        let (open, steps) = (self.open.borrow(), self.steps.borrow());
        let newest_first = std::iter::once(&*open).chain(steps.iter().rev().map(|step| &step.runs));
        look_through(newest_first, vec![blocks])
    }

    fn keep(&self, bytes: Bytes) -> Option<Rc<Kept>> {
        let left = self.budget.get().checked_sub(bytes.len()).filter(|_| !bytes.is_empty())?;
        self.budget.set(left);
        Some(Rc::new(Kept { bytes, budget: self.budget.clone() }))
    }
}

impl Follower for Backlog {
    fn logged(&self, record: Logged) {
        let block = BLOCK as u64;
        let blocks = record.offset / block..(record.offset + record.len) / block;
        self.open_bytes.set(self.open_bytes.get() + RECORD_COST + record.payload.len as u64);
        if record.kind == RecordKind::Marker {
            return self.open_marker.set(Some(record.payload));
        }
        let run = Pending {
            kind: record.kind,
            payload: record.payload,
            skip: 0,
            kept: record.bytes.and_then(|bytes| self.keep(bytes)),
        };
        self.open.borrow_mut().insert(blocks, run);
    }

    fn batch_ended(&self, end: Tail) {
        if self.open_bytes.get() == 0 {
            return;
        }
        self.end.set(end);
        if self.open_bytes.get() >= self.step_bytes || self.open_marker.get().is_some() {
            self.cut();
        }
    }

    /// Steps that are on their way will make room.
    fn no_room(&self) {
        if self.steps.borrow().is_empty() {
            self.cut();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    use crate::log::PayloadSeal;

    fn logged(kind: RecordKind, blocks: Range<u64>, batch: u64) -> Logged {
        let (offset, len) = (blocks.start * BLOCK as u64, (blocks.end - blocks.start) * BLOCK as u64);
        let seal = PayloadSeal { epoch: 0, number: 0, index: 0, tag: [0; 16] };
        let payload = PayloadPlace { position: batch, len: 0, crc: 0, seal };
        Logged { kind, offset, len, payload, bytes: None }
    }

    proptest! {
        /// Against a model that looks at every block: where the log has what changed it last.
        #[test]
        fn steps_have_what_changed_since_the_one_before(actions in proptest::collection::vec((0_u8..4, 0_u64..60, 1_u64..9), 1..60)) {
            let backlog = Backlog::new(Tail::default(), u64::MAX, 0);
            let mut model = [None; 70];
            let (mut position, mut from, mut steps) = (0, 0, VecDeque::new());
            for (action, first, len) in actions {
                match action {
                    0 | 1 => {
                        let batch = position;
                        for blocks in [first..first + len, first + 1..first + 2] {
                            backlog.logged(logged(RecordKind::Write, blocks.clone(), batch));
                            model[blocks.start as usize..blocks.end as usize].fill(Some(batch));
                        }
                        position += 10;
                        backlog.batch_ended(Tail { position, ..Tail::default() });
                    }
                    2 => {
                        backlog.cut();
                        if position > from {
                            steps.push_back((from, position, model));
                            from = position;
                        }
                    }
                    _ => if let Some((from, end, then)) = steps.pop_front() {
                        let step = backlog.take_step().unwrap();
                        let mut found = [None; 70];
                        for (blocks, run) in step.runs.iter() {
                            found[blocks.start as usize..blocks.end as usize].fill(Some(run.payload.position));
                        }
                        prop_assert_eq!(found, then.map(|batch| batch.filter(|batch| *batch >= from)));
                        prop_assert!(backlog.published().is_some());
                        model.iter_mut().for_each(|batch| *batch = batch.filter(|batch| *batch >= end));
                    }
                }
                let mut found = [None; 70];
                for (blocks, run) in backlog.within(0..70).runs {
                    found[blocks.start as usize..blocks.end as usize].fill(Some(run.payload.position));
                }
                prop_assert_eq!(found, model);
            }
        }
    }
}
