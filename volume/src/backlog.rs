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
    /// Steps that were cut and are not yet in the pool.
    outstanding: Cell<usize>,
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
            outstanding: Cell::new(0),
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
        let index = self.index.borrow();
        let runs = index.iter().filter(|(_, run)| run.batch >= from).map(|(blocks, run)| (blocks, run.clone())).collect();
        self.cut.borrow_mut().push_back(Step { runs, end, marker: self.open_marker.take() });
        self.outstanding.set(self.outstanding.get() + 1);
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
        self.outstanding.set(self.outstanding.get() - 1);
        self.index.borrow_mut().retain(|run| run.batch >= end.position);
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
        if self.outstanding.get() == 0 {
            self.cut();
        }
    }
}
