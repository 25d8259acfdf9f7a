//! What is in the log and not yet in the pool: where to read it, and how it is cut into segments.
//!
//! ```text
//!   log ─records─▶ open step ──cut──▶ cut steps, in order ─▶ published, and forgotten here
//!                     └────── index: the newest version of each block ──────┘
//! ```
//!
//! A step takes everything logged since the one before, in its newest version at the moment of the cut. So the state after each step is one
//! that the volume really had, and what was overwritten within a step never leaves this host.

use std::cell::{Cell, RefCell};
use std::collections::VecDeque;
use std::ops::Range;
use std::rc::Rc;

use bytes::Bytes;

use crate::extent_map::{ExtentMap, Run};
use crate::log::{Follower, Logged, PayloadPlace, RecordKind, Tail};
use crate::segment::BLOCK;
use crate::signal::Signal;

/// What a record adds to a segment's header, in bytes, whatever it carries.
const RECORD_COST: u64 = 64;

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
    batch: u64,
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
    pub(crate) runs: Vec<(Range<u64>, Pending)>,
    /// All records before this place are in this step or an earlier one.
    pub(crate) end: Tail,
    /// The log has the marker there that this step ends with.
    pub(crate) marker: Option<PayloadPlace>,
}

pub(crate) struct Backlog {
    index: RefCell<ExtentMap<Pending>>,
    cut: RefCell<VecDeque<Step>>,
    /// The blocks of each step that was cut and is not yet in the pool, oldest first.
    outstanding: RefCell<VecDeque<Vec<Range<u64>>>>,
    /// What the open step has changed, in the order in which it did.
    open_blocks: RefCell<Vec<Range<u64>>>,
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
            index: RefCell::default(),
            cut: RefCell::default(),
            outstanding: RefCell::default(),
            open_blocks: RefCell::default(),
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
        let (from, end) = (self.open_from.get(), self.end.get());
        if end.position == from {
            return;
        }
        let blocks = joined(self.open_blocks.take());
        let index = self.index.borrow();
        let runs = blocks.iter().flat_map(|blocks| index.within(blocks.clone())).collect();
        self.cut.borrow_mut().push_back(Step { runs, end, marker: self.open_marker.take() });
        self.outstanding.borrow_mut().push_back(blocks);
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
        self.cut.borrow().iter().filter_map(|step| step.marker).collect()
    }

    /// True if no step waits to be taken.
    pub(crate) fn is_taken(&self) -> bool {
        self.cut.borrow().is_empty()
    }

    /// The oldest step that was cut and not yet taken.
    pub(crate) async fn next_step(&self) -> Step {
        self.changed.wait_for(|| self.cut.borrow_mut().pop_front()).await
    }

    /// The pool has one step more: everything before `end`.
    pub(crate) fn published(&self, end: Tail) {
        let mut index = self.index.borrow_mut();
        for blocks in self.outstanding.borrow_mut().pop_front().into_iter().flatten() {
            let of_step = index.within(blocks).filter(|(_, run)| run.batch < end.position).map(|(blocks, _)| blocks);
            of_step.collect::<Vec<_>>().into_iter().for_each(|blocks| index.remove(blocks));
        }
    }

    fn keep(&self, bytes: Bytes) -> Option<Rc<Kept>> {
        let left = self.budget.get().checked_sub(bytes.len()).filter(|_| !bytes.is_empty())?;
        self.budget.set(left);
        Some(Rc::new(Kept { bytes, budget: self.budget.clone() }))
    }

    pub(crate) fn within(&self, blocks: Range<u64>) -> Vec<(Range<u64>, Pending)> {
        self.index.borrow().within(blocks).collect()
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
            batch: record.batch,
            kept: record.bytes.and_then(|bytes| self.keep(bytes)),
        };
        self.open_blocks.borrow_mut().push(blocks.clone());
        self.index.borrow_mut().insert(blocks, run);
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
        if self.outstanding.borrow().is_empty() {
            self.cut();
        }
    }
}

/// The same blocks in order, as few ranges as possible.
fn joined(mut ranges: Vec<Range<u64>>) -> Vec<Range<u64>> {
    ranges.sort_unstable_by_key(|range| range.start);
    let mut joined: Vec<Range<u64>> = Vec::new();
    for range in ranges {
        match joined.last_mut() {
            Some(last) if range.start <= last.end => last.end = last.end.max(range.end),
            _ => joined.push(range),
        }
    }
    joined
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
        Logged { kind, offset, len, payload, bytes: None, batch }
    }

    proptest! {
        /// Against a model that looks at every block: the batch that changed it last.
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
                        let step = backlog.cut.borrow_mut().pop_front().unwrap();
                        let mut found = [None; 70];
                        for (blocks, run) in step.runs {
                            found[blocks.start as usize..blocks.end as usize].fill(Some(run.batch));
                        }
                        prop_assert_eq!(found, then.map(|batch| batch.filter(|batch| *batch >= from)));
                        backlog.published(Tail { position: end, ..Tail::default() });
                        model.iter_mut().for_each(|batch| *batch = batch.filter(|batch| *batch >= end));
                    }
                }
                let mut found = [None; 70];
                for (blocks, run) in backlog.within(0..70) {
                    found[blocks.start as usize..blocks.end as usize].fill(Some(run.batch));
                }
                prop_assert_eq!(found, model);
            }
        }
    }
}
