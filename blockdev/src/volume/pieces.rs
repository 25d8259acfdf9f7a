//! A long discard or zeroing, carried out piece by piece.
//!
//! Each piece is locked on its own and sized to take about [`PIECE_TIME`], so that it delays no other request by more. Discards
//! also give way: while any volume is read or written they take about a hundredth of the time, and one not done after
//! [`ANSWER_AFTER`] is answered and goes on by itself (see [`super::later`]).

use std::cell::Cell;
use std::time::{Duration, Instant};

use crate::clock;
use crate::request::Request;

const PIECE_MIN: u64 = 1 << 20;
const PIECE_FIRST: u64 = 64 << 20;
const PIECE_MAX: u64 = 1 << 30;
const PIECE_TIME: Duration = Duration::from_millis(2);
const ANSWER_AFTER: Duration = Duration::from_millis(250);
/// While any volume is read or written, a discard rests this many times as long as its last piece took.
const GIVE_WAY: u32 = 100;
/// A piece that waited for others says little of the next: no rest is longer.
const REST_MAX: Duration = Duration::from_secs(1);

/// How far a discard or zeroing has come.
pub(super) struct Pieces {
    /// Where the next piece starts.
    cursor: u64,
    end: u64,
    /// When the piece under way went to the device. None while it waits, and of one that had nothing to do.
    started: Option<Instant>,
    /// Others' reads and writes when the last piece ended.
    transfers_seen: u64,
    /// Between two pieces of a discard that gives way.
    rest_until: Option<Instant>,
}

impl Pieces {
    pub(super) fn of(request: &Request) -> Pieces {
        Pieces { cursor: request.offset, end: request.end(), started: None, transfers_seen: u64::MAX, rest_until: None }
    }

    /// Start and end of what is left, if anything is.
    pub(super) fn rest(&self) -> Option<(u64, u64)> {
        (self.cursor < self.end).then_some((self.cursor, self.end))
    }

    /// The next piece ends at `end`.
    pub(super) fn goes_to(&mut self, end: u64) {
        self.started = None;
        self.cursor = end;
    }

    /// The piece that ends at `end` goes to the device.
    pub(super) fn starts(&mut self, end: u64) {
        self.started = Some(clock::monotonic());
        self.cursor = end;
    }

    /// How long the piece that has just ended took.
    pub(super) fn took(&self, now: Instant) -> Option<Duration> {
        self.started.map(|started| now.saturating_duration_since(started))
    }

    /// Rests after a piece of a discard, if others moved data meanwhile. `transfers`: how often they did so far.
    pub(super) fn give_way(&mut self, now: Instant, took: Duration, transfers: u64) {
        self.rest_until = (transfers > self.transfers_seen).then(|| now + (took * GIVE_WAY).min(REST_MAX));
        self.transfers_seen = transfers;
    }

    pub(super) fn is_resting(&self) -> bool {
        self.rest_until.is_some()
    }

    /// Until when it still rests; afterwards it does no more.
    pub(super) fn still_rests(&mut self, now: Instant) -> Option<Instant> {
        self.rest_until = self.rest_until.filter(|until| *until > now);
        self.rest_until
    }
}

/// When a discard is to be answered, done or not.
pub(super) fn answer_at(arrived: Instant) -> Instant {
    arrived + ANSWER_AFTER
}

/// The size of pieces, learnt from how long they take.
pub(super) struct PieceSize(Cell<u64>);

impl PieceSize {
    pub(super) fn new() -> PieceSize {
        PieceSize(Cell::new(PIECE_FIRST))
    }

    /// Where the piece that starts at `offset` ends. Pieces end at multiples of their size.
    pub(super) fn end(&self, offset: u64, end: u64) -> u64 {
        let limit = self.0.get();
        end.min((offset + limit) / limit * limit)
    }

    pub(super) fn adapt(&self, took: Duration) {
        let piece = self.0.get();
        self.0.set(match took {
            slow if slow > PIECE_TIME => (piece / 2).max(PIECE_MIN),
            quick if quick < PIECE_TIME / 4 => (piece * 2).min(PIECE_MAX),
            _ => piece,
        });
    }
}
