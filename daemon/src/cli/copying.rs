//! A copy with all that is around it: progress, the record of how far it is, and ending when asked to.

use std::fs;
use std::path::PathBuf;
use std::time::Duration;

use super::Context;
use super::interrupt;
use super::progress::Progress;
use super::transfer::Transfer;
use crate::error::{Error, ErrorKind, Result};
use crate::image::{Copy, Disk, Pass, Record};
use crate::units::format_size;

/// When what was copied is first made durable and recorded.
const CHECKPOINT_FIRST: Duration = Duration::from_millis(100);
/// The shortest time between that; where flushing takes long it is done less often.
const CHECKPOINT_MIN: Duration = Duration::from_millis(500);
/// The time from one flush to the next is so many times what the last one took.
const CHECKPOINT_SHARE: u32 = 10;
/// How often progress is looked at.
const LOOK: Duration = Duration::from_millis(100);

/// One image copied, in or out.
pub struct Copying<'a> {
    pub context: &'a Context,
    pub what: String,
    pub source: &'a dyn Disk,
    pub target: &'a dyn Disk,
    pub pass: Pass,
    pub record: Record,
    pub record_path: Option<PathBuf>,
    pub resumed_from: Option<u64>,
    pub verify: bool,
}

impl Copying<'_> {
    /// Copies, and compares if so wanted; returns how much data was written. Ends the transfer's job if it does not come to the end.
    pub fn run(mut self, transfer: &Transfer) -> Result<u64> {
        let copy = Copy::new(self.source, self.target, self.pass, self.resumed_from.unwrap_or(0));
        self.save(self.resumed_from.unwrap_or(0), false);
        if let (Some(position), false) = (self.resumed_from, self.context.output.quiet || self.context.output.json) {
            eprintln!(
                "novastor: resumed: the first {} are compared, and copied again only where they differ",
                format_size(position)
            );
        }
        let finished = self.watch(&copy, transfer, &self.what);
        let position = copy.position().max(copy.resumed_from());
        let flushed = self.target.flush().map_err(|error| Error::io(format!("{}: flush", self.target.name()), &error));
        if flushed.is_ok() {
            self.save(position, true);
        }
        if !finished.map_err(|error| self.resumable(error))? || transfer.is_cancelled() {
            let percent = position as f64 * 100.0 / self.target.size().max(1) as f64;
            return Err(self.resumable(Error::new(ErrorKind::Cancelled, format!("{}: interrupted at {percent:.0}%", self.what))));
        }
        flushed.map_err(|error| self.resumable(error))?;
        if self.verify {
            let what = format!("comparing {}", self.target.name());
            let compare = Copy::new(self.source, self.target, Pass::Compare, 0);
            if !self.watch(&compare, transfer, &what)? {
                return Err(Error::new(
                    ErrorKind::Cancelled,
                    format!("{what}: interrupted; all was copied, but not compared to the end"),
                ));
            }
        }
        if let Some(path) = &self.record_path {
            let _ = fs::remove_file(path);
        }
        Ok(copy.written())
    }

    fn resumable(&self, error: Error) -> Error {
        let next = match &self.record_path {
            Some(path) if path.exists() => "the same command resumes it",
            _ => "the same command begins again",
        };
        Error { kind: error.kind, message: format!("{}; {next}", error.message) }
    }

    /// A record that cannot be written costs only the resuming.
    fn save(&mut self, position: u64, closed: bool) {
        self.record.position = position;
        self.record.closed = closed;
        if let Some(path) = &self.record_path
            && let Err(error) = self.record.save(path)
        {
            eprintln!("novastor: note: {}: {error}: the copy cannot be resumed if it is interrupted", path.display());
            self.record_path = None;
        }
    }

    /// Runs `copy` to its end, showing progress, recording how far it is, and stopping it when asked to.
    fn watch(&self, copy: &Copy<'_>, transfer: &Transfer, what: &str) -> Result<bool> {
        let mut progress = Progress::new(self.context.output, what, self.target.size());
        let finished = std::thread::scope(|scope| {
            let running = scope.spawn(|| copy.run());
            let checkpoints = (copy.pass() != Pass::Compare).then(|| scope.spawn(|| self.checkpoints(copy)));
            while !running.is_finished() {
                if interrupt::asked() || transfer.is_cancelled() {
                    copy.stop();
                }
                transfer.progress(copy.done());
                progress.show(copy.done());
                std::thread::park_timeout(LOOK);
            }
            copy.stop();
            if let Some(checkpoints) = checkpoints {
                checkpoints.thread().unpark();
            }
            running.join().unwrap_or_else(|_| Err(Error::internal(format!("{what}: a defect ended it"))))
        });
        transfer.progress(copy.done());
        progress.end();
        finished
    }

    /// Makes what was copied durable and notes it, now and then.
    fn checkpoints(&self, copy: &Copy<'_>) {
        let Some(path) = &self.record_path else { return };
        let mut pause = CHECKPOINT_FIRST;
        loop {
            std::thread::park_timeout(pause);
            if copy.is_stopped() {
                return;
            }
            let (position, began) = (copy.position().max(copy.resumed_from()), blockdev::clock::monotonic());
            let record = Record { position, ..self.record.clone() };
            // A failed flush ends the copy soon enough; a record that is missing costs only the resuming.
            if self.target.flush().is_err() || record.save(path).is_err() {
                return;
            }
            let took = blockdev::clock::monotonic().saturating_duration_since(began);
            pause = CHECKPOINT_MIN.max(took * CHECKPOINT_SHARE);
        }
    }
}
