//! The CACHE requests of one connection: reads whose bytes are thrown away, so that caches further down have them.
//!
//! ```text
//!   waiting  [ oldest ][ … ][ … ]
//!                └─ piece ─▶ buffer ─▶ volume ─▶ buffer given back ─▶ next turn of the reactor: next piece
//! ```
//!
//! Invariants: however many requests and however long, one piece of at most [`PIECE`] bytes is read at a time, and between two
//! pieces everybody else has a turn, with the memory too. They end early when the connection does: nothing was promised.

use std::collections::VecDeque;

/// The most that is read at once, in bytes.
const PIECE: u64 = 256 << 10;

/// One request that is not answered yet.
struct Waiting {
    slot: usize,
    cursor: u64,
    end: u64,
}

/// What is to be read next.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct Piece {
    pub(super) slot: usize,
    pub(super) offset: u64,
    pub(super) len: u64,
}

#[derive(Default)]
pub(super) struct Prefetch {
    waiting: VecDeque<Waiting>,
    /// A piece of the oldest is with the volume.
    reading: bool,
    ending: bool,
}

impl Prefetch {
    /// Appends the request in `slot`.
    pub(super) fn push(&mut self, slot: usize, offset: u64, len: u64) {
        self.waiting.push_back(Waiting { slot, cursor: offset, end: offset + len });
    }

    /// Up to the next multiple of [`PIECE`]; nothing while a piece is being read.
    pub(super) fn next_piece(&self) -> Option<Piece> {
        let oldest = self.waiting.front().filter(|_| !self.reading)?;
        let end = oldest.end.min((oldest.cursor / PIECE + 1) * PIECE);
        Some(Piece { slot: oldest.slot, offset: oldest.cursor, len: end - oldest.cursor })
    }

    /// The piece is with the volume.
    pub(super) fn begun(&mut self, piece: Piece) {
        self.reading = true;
        if let Some(oldest) = self.waiting.front_mut() {
            oldest.cursor += piece.len;
        }
    }

    /// The piece has been read, or not. True if that was the end of its request, which then is forgotten.
    pub(super) fn piece_done(&mut self, ok: bool) -> bool {
        self.reading = false;
        self.waiting.pop_front_if(|oldest| !ok || self.ending || oldest.cursor == oldest.end).is_some()
    }

    /// Ends all requests. Returns the slots of those that are not with the volume; the other one ends with its piece.
    pub(super) fn end(&mut self) -> Vec<usize> {
        self.ending = true;
        let kept = usize::from(self.reading);
        self.waiting.drain(kept..).map(|waiting| waiting.slot).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn begin(prefetch: &mut Prefetch) -> (usize, u64, u64) {
        let piece = prefetch.next_piece().unwrap();
        prefetch.begun(piece);
        assert_eq!(prefetch.next_piece(), None, "one at a time");
        (piece.slot, piece.offset, piece.len)
    }

    #[test]
    fn requests_are_read_in_turn_and_in_aligned_pieces() {
        let mut prefetch = Prefetch::default();
        prefetch.push(7, PIECE - 10, PIECE + 20);
        prefetch.push(3, 5, 1);
        for (piece, last) in
            [((7, PIECE - 10, 10), false), ((7, PIECE, PIECE), false), ((7, 2 * PIECE, 10), true), ((3, 5, 1), true)]
        {
            assert_eq!(begin(&mut prefetch), piece);
            assert_eq!(prefetch.piece_done(true), last);
        }
        assert_eq!(prefetch.next_piece(), None);
    }

    #[test]
    fn an_error_ends_one_request_and_a_disconnect_all() {
        let mut prefetch = Prefetch::default();
        (0..4).for_each(|slot| prefetch.push(slot, 0, 3 * PIECE));
        begin(&mut prefetch);
        assert!(prefetch.piece_done(false));
        assert_eq!(begin(&mut prefetch).0, 1);
        assert_eq!(prefetch.end(), [2, 3]);
        assert!(prefetch.piece_done(true), "it goes no further");
        assert_eq!(prefetch.next_piece(), None);
        assert!(prefetch.end().is_empty());
    }

    #[test]
    fn an_end_between_two_pieces_leaves_nothing() {
        let mut prefetch = Prefetch::default();
        prefetch.push(0, 0, 2 * PIECE);
        begin(&mut prefetch);
        assert!(!prefetch.piece_done(true));
        assert_eq!(prefetch.end(), [0]);
        assert_eq!(prefetch.next_piece(), None);
    }
}
