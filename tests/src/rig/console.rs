//! Lines that a process prints, collected on a thread of their own while the test does other things.
//!
//! ```text
//!   pipe or socket ──▶ reader thread ──▶ lines (kept for the whole test) ──▶ wait_for(…)
//! ```
//!
//! Invariant: each waiter looks at every line once; a line printed before the wait began still counts.

use crate::rig::deadline::Deadline;
use anyhow::{Result, bail};
use std::io::{BufRead, BufReader, Read};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::Duration;

/// How many lines an error shows.
const TAIL_LINES: usize = 60;

#[derive(Debug, Clone, Default)]
pub struct Console {
    shared: Arc<Shared>,
}

#[derive(Debug, Default)]
struct Shared {
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Debug, Default)]
struct State {
    lines: Vec<String>,
    open_sources: usize,
}

/// A place in the console: lines before it have been seen.
#[derive(Debug, Clone, Copy, Default)]
pub struct Position(usize);

impl Console {
    pub fn new() -> Self {
        Self::default()
    }

    /// Reads `source` line by line until it ends.
    pub fn attach(&self, source: impl Read + Send + 'static) {
        self.state().open_sources += 1;
        let console = self.clone();
        thread::spawn(move || {
            console.read_all(source);
            console.state().open_sources -= 1;
            console.shared.changed.notify_all();
        });
    }

    fn read_all(&self, source: impl Read) {
        let mut reader = BufReader::new(source);
        let mut line = Vec::new();
        // A read error means the writer is gone, as does an empty read.
        while reader.read_until(b'\n', &mut line).is_ok_and(|length| length > 0) {
            let text = String::from_utf8_lossy(&line).trim_end_matches(['\r', '\n']).to_owned();
            self.state().lines.push(text);
            self.shared.changed.notify_all();
            line.clear();
        }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.shared.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits for a line from `position` on that `accept` takes, and returns what it made of it.
    /// `position` moves behind that line.
    pub fn wait_for<T>(
        &self,
        position: &mut Position,
        what: &str,
        limit: Duration,
        mut accept: impl FnMut(&str) -> Option<T>,
    ) -> Result<T> {
        let deadline = Deadline::after(limit);
        let mut state = self.state();
        loop {
            while let Some(line) = state.lines.get(position.0) {
                position.0 += 1;
                if let Some(value) = accept(line) {
                    return Ok(value);
                }
            }
            let ended = state.open_sources == 0;
            if ended || deadline.has_passed() {
                let reason = if ended { "the output ended" } else { "time ran out" };
                bail!("no {what}: {reason} after {:?}; the last lines were\n{}", deadline.elapsed(), tail(&state));
            }
            let woken = self.shared.changed.wait_timeout(state, deadline.remaining());
            state = woken.unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    /// The place behind everything printed so far.
    pub fn end(&self) -> Position {
        Position(self.state().lines.len())
    }

    /// Waits until every source has ended, so that an error shows all there is; gives up after `limit`.
    pub fn wait_end(&self, limit: Duration) {
        let deadline = Deadline::after(limit);
        let mut state = self.state();
        while state.open_sources > 0 && !deadline.has_passed() {
            let woken = self.shared.changed.wait_timeout(state, deadline.remaining());
            state = woken.unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    /// Everything printed so far.
    pub fn text(&self) -> String {
        self.state().lines.join("\n")
    }

    pub fn tail(&self) -> String {
        tail(&self.state())
    }
}

fn tail(state: &State) -> String {
    let start = state.lines.len().saturating_sub(TAIL_LINES);
    state.lines[start..].join("\n")
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;
    use std::os::unix::net::UnixStream;

    const LIMIT: Duration = Duration::from_secs(30);

    fn number(line: &str) -> Option<u32> {
        line.parse().ok()
    }

    #[test]
    fn a_line_printed_before_the_wait_counts_once() {
        let console = Console::new();
        console.attach(&b"text\r\n7\n8"[..]);
        let mut position = Position::default();
        assert_eq!(console.wait_for(&mut position, "number", LIMIT, number).unwrap(), 7);
        assert_eq!(console.wait_for(&mut position, "number", LIMIT, number).unwrap(), 8);
        let error = console.wait_for(&mut position, "number", LIMIT, number).unwrap_err().to_string();
        assert!(error.contains("the output ended") && error.contains("text\n7\n8"), "{error}");
    }

    #[test]
    fn waiting_ends_at_the_deadline_and_shows_the_tail() {
        let (mut writer, reader) = UnixStream::pair().unwrap();
        let console = Console::new();
        console.attach(reader);
        writer.write_all(b"working\n").unwrap();
        let mut position = Position::default();
        let error = console.wait_for(&mut position, "number", Duration::from_millis(200), number);
        let error = error.unwrap_err().to_string();
        assert!(error.contains("time ran out") && error.contains("working"), "{error}");
        writer.write_all(b"9\n").unwrap();
        assert_eq!(console.wait_for(&mut position, "number", LIMIT, number).unwrap(), 9);
    }
}
