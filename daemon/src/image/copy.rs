//! Copies one disk over another: data as data, zeroes as holes, several requests at once.
//!
//! ```text
//!   Plan (one after another)                    workers (at once)
//!   source's runs ─▶ data ≤ 1 MiB ─────────────▶ read · split into zeroes and data · write · zero
//!                 └▶ zeroes ≤ 1 GiB ───────────▶ what of it is no hole in the target: zero
//! ```
//!
//! Where the source ends before the target does, the rest is zeroes.

use std::collections::{BTreeSet, VecDeque};
use std::io;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use parking_lot::Mutex;

use super::disk::Disk;
use crate::error::{Error, ErrorKind, Result};

/// Zeroes are told from data in units of this.
const UNIT: u64 = 4 << 10;
/// The most data of one step.
const DATA_MAX: u64 = 1 << 20;
/// The most zeroes of one step.
const ZEROES_MAX: u64 = 1 << 30;
/// How far the source is asked ahead.
const LOOK_AHEAD: u64 = 1 << 30;
/// Zeroes shorter than this do not end a step.
const GAP_MIN: u64 = 64 << 10;
/// Steps at once.
const WORKERS: usize = 8;

/// What is done with each range.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Pass {
    /// Writes the source's data over the target.
    Write,
    /// The same for a target that is all zeroes.
    WriteNew,
    /// Fails where the two differ.
    Compare,
}

/// One run over a pair of disks.
pub struct Copy<'a> {
    source: &'a dyn Disk,
    target: &'a dyn Disk,
    pass: Pass,
    /// Below it the target should be right already: what differs is written again, nothing else.
    resumed_from: u64,
    plan: Mutex<Plan>,
    stop: AtomicBool,
    failure: Mutex<Option<Error>>,
    done: AtomicU64,
    written: AtomicU64,
}

#[derive(Default)]
struct Plan {
    /// Where the next step begins.
    cursor: u64,
    /// Runs of the source as far as it was asked: their ends, and whether they are zero.
    known: VecDeque<(u64, bool)>,
    /// Where the steps that are not finished begin.
    outstanding: BTreeSet<u64>,
}

#[derive(Clone, Copy, Debug)]
struct Step {
    offset: u64,
    len: u64,
    zero: bool,
}

impl<'a> Copy<'a> {
    /// The target must not be smaller than the source.
    pub fn new(source: &'a dyn Disk, target: &'a dyn Disk, pass: Pass, resumed_from: u64) -> Copy<'a> {
        Copy {
            source,
            target,
            pass,
            resumed_from: resumed_from.min(target.size()),
            plan: Mutex::default(),
            stop: AtomicBool::new(false),
            failure: Mutex::new(None),
            done: AtomicU64::new(0),
            written: AtomicU64::new(0),
        }
    }

    /// Runs to the end, to the first failure, or until stopped; true if it came to the end.
    pub fn run(&self) -> Result<bool> {
        std::thread::scope(|scope| {
            for _ in 0..WORKERS {
                scope.spawn(|| self.work());
            }
        });
        match self.failure.lock().take() {
            Some(failure) => Err(failure),
            None => Ok(self.position() == self.target.size()),
        }
    }

    pub fn pass(&self) -> Pass {
        self.pass
    }

    /// Below it the target was right before already.
    pub fn resumed_from(&self) -> u64 {
        self.resumed_from
    }

    /// Ends soon.
    pub fn stop(&self) {
        self.stop.store(true, Ordering::Relaxed);
    }

    pub fn is_stopped(&self) -> bool {
        self.stop.load(Ordering::Relaxed)
    }

    /// Everything before it is finished.
    pub fn position(&self) -> u64 {
        let plan = self.plan.lock();
        plan.outstanding.first().copied().unwrap_or(plan.cursor)
    }

    /// Bytes dealt with.
    pub fn done(&self) -> u64 {
        self.done.load(Ordering::Relaxed)
    }

    /// Bytes of data written to the target.
    pub fn written(&self) -> u64 {
        self.written.load(Ordering::Relaxed)
    }

    fn work(&self) {
        let mut buffers = Buffers::default();
        while !self.is_stopped() {
            let step = match self.next() {
                Ok(Some(step)) => step,
                Ok(None) => return,
                Err(error) => return self.fail(error),
            };
            // A step that was not finished stays outstanding, so the position stays before it.
            match self.carry_out(step, &mut buffers) {
                Ok(true) => {}
                Ok(false) => return,
                Err(error) => return self.fail(error),
            }
            self.plan.lock().outstanding.remove(&step.offset);
            self.done.fetch_add(step.len, Ordering::Relaxed);
        }
    }

    fn fail(&self, error: Error) {
        self.failure.lock().get_or_insert(error);
        self.stop();
    }

    fn next(&self) -> Result<Option<Step>> {
        let mut plan = self.plan.lock();
        let (offset, total) = (plan.cursor, self.target.size());
        if offset >= total {
            return Ok(None);
        }
        let (end, zero) = match self.zeroes_until(&mut plan, offset)? {
            Some(end) => (end.min(offset + ZEROES_MAX), true),
            None => (self.data_until(&mut plan, offset)?, false),
        };
        plan.cursor = end;
        plan.outstanding.insert(offset);
        Ok(Some(Step { offset, len: end - offset, zero }))
    }

    /// The end of the zeroes at `offset`, if they are worth a step.
    fn zeroes_until(&self, plan: &mut Plan, offset: u64) -> Result<Option<u64>> {
        let (end, zero) = self.run_at(plan, offset)?;
        let end = if end >= self.source.size() { self.target.size() } else { end / UNIT * UNIT };
        let enough = end >= offset + GAP_MIN || end == self.target.size();
        Ok((zero && enough && end > offset).then_some(end))
    }

    /// The end of the step that begins with data at `offset`.
    fn data_until(&self, plan: &mut Plan, offset: u64) -> Result<u64> {
        let limit = ((offset / DATA_MAX + 1) * DATA_MAX).min(self.target.size());
        let mut end = offset;
        while end < limit {
            if end > offset && self.zeroes_until(plan, end)?.is_some() {
                break;
            }
            let (run_end, _) = self.run_at(plan, end)?;
            end = run_end.max(end + 1).next_multiple_of(UNIT).min(limit);
        }
        Ok(end)
    }

    /// The end and kind of the source's run at `offset`; past the source's end all is zero.
    fn run_at(&self, plan: &mut Plan, offset: u64) -> Result<(u64, bool)> {
        if offset >= self.source.size() {
            return Ok((self.target.size(), true));
        }
        while plan.known.front().is_some_and(|(end, _)| *end <= offset) {
            plan.known.pop_front();
        }
        if plan.known.is_empty() {
            let len = LOOK_AHEAD.min(self.source.size() - offset);
            let runs = self.source.runs(offset, len).map_err(|error| self.failed("map", self.source, offset, &error))?;
            let mut end = offset;
            for run in runs {
                end += run.len;
                plan.known.push_back((end, run.zero));
            }
        }
        plan.known.front().copied().ok_or_else(|| Error::internal(format!("{}: no extent at {offset}", self.source.name())))
    }

    fn failed(&self, verb: &str, disk: &dyn Disk, offset: u64, error: &io::Error) -> Error {
        Error::io(format!("{}: {verb} at {offset} failed", disk.name()), error)
    }

    /// False if it was stopped before the end.
    fn carry_out(&self, step: Step, buffers: &mut Buffers) -> Result<bool> {
        if step.zero {
            return self.make_zero(step.offset, step.len, buffers);
        }
        let len = step.len as usize;
        buffers.source.resize(len, 0);
        let held = self.source.size().saturating_sub(step.offset).min(step.len) as usize;
        let read = self.source.read(step.offset, &mut buffers.source[..held]);
        read.map_err(|error| self.failed("read", self.source, step.offset, &error))?;
        buffers.source[held..].fill(0);
        if self.pass == Pass::Compare || step.offset < self.resumed_from {
            return self.compare(step.offset, buffers).map(|()| true);
        }
        for (from, to, zero) in pieces(len, |unit| is_zero(&buffers.source[unit])) {
            let offset = step.offset + from as u64;
            if !zero {
                self.write(offset, &buffers.source[from..to])?;
            } else if !self.make_zero(offset, (to - from) as u64, &mut Buffers::default())? {
                return Ok(false);
            }
        }
        Ok(true)
    }

    fn write(&self, offset: u64, data: &[u8]) -> Result<()> {
        self.target.write(offset, data).map_err(|error| self.failed("write", self.target, offset, &error))?;
        self.written.fetch_add(data.len() as u64, Ordering::Relaxed);
        Ok(())
    }

    /// Compares with `buffers.source`; what differs is written again, or an error.
    fn compare(&self, offset: u64, buffers: &mut Buffers) -> Result<()> {
        let Buffers { source, target } = buffers;
        target.resize(source.len(), 0);
        self.target.read(offset, target).map_err(|error| self.failed("read", self.target, offset, &error))?;
        for (from, to, same) in pieces(source.len(), |unit| source[unit.clone()] == target[unit]) {
            let at = offset + from as u64;
            if same {
                continue;
            }
            if self.pass == Pass::Compare {
                return Err(Error::new(
                    ErrorKind::Io,
                    format!("{} and {} differ at {at}", self.source.name(), self.target.name()),
                ));
            }
            self.write(at, &source[from..to])?;
        }
        Ok(())
    }

    /// Makes a range of the target zero where it is no hole yet.
    fn make_zero(&self, offset: u64, len: u64, buffers: &mut Buffers) -> Result<bool> {
        if self.pass == Pass::WriteNew {
            return Ok(true);
        }
        let end = offset + len;
        let mut at = offset;
        while at < end && !self.is_stopped() {
            let runs = self.target.runs(at, end - at).map_err(|error| self.failed("map", self.target, at, &error))?;
            for run in runs {
                if !run.zero && self.pass == Pass::Compare {
                    self.expect_zeroes(at, run.len, buffers)?;
                } else if !run.zero {
                    self.target.zero(at, run.len).map_err(|error| self.failed("zero", self.target, at, &error))?;
                }
                at += run.len;
            }
        }
        Ok(at >= end)
    }

    fn expect_zeroes(&self, offset: u64, len: u64, buffers: &mut Buffers) -> Result<()> {
        let mut done = 0;
        while done < len {
            let part = (len - done).min(DATA_MAX);
            buffers.source.clear();
            buffers.source.resize(part as usize, 0);
            self.compare(offset + done, buffers)?;
            done += part;
        }
        Ok(())
    }
}

#[derive(Default)]
struct Buffers {
    source: Vec<u8>,
    target: Vec<u8>,
}

/// Splits `len` bytes into stretches of units for which `test` answers the same.
fn pieces(len: usize, test: impl Fn(std::ops::Range<usize>) -> bool) -> Vec<(usize, usize, bool)> {
    let mut pieces: Vec<(usize, usize, bool)> = Vec::new();
    for from in (0..len).step_by(UNIT as usize) {
        let to = (from + UNIT as usize).min(len);
        let answer = test(from..to);
        match pieces.last_mut() {
            Some((_, end, last)) if *last == answer => *end = to,
            _ => pieces.push((from, to, answer)),
        }
    }
    pieces
}

/// Whether a range holds nothing but zeroes.
pub fn is_zero(bytes: &[u8]) -> bool {
    let (words, tail) = bytes.as_chunks::<16>();
    words.iter().all(|word| u128::from_ne_bytes(*word) == 0) && tail.iter().all(|byte| *byte == 0)
}
