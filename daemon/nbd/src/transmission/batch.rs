//! Replies on their way to the socket: gathered as iovecs, sent by one `sendmsg`, without copying the data read. A run of zeroes that
//! is not in memory at all has an iovec without an address, and ends what one `sendmsg` takes.
//!
//! ```text
//!  headers  [ reply ][ reply ][ reply ] …                one fixed block
//!  iovecs     ╰──┬────────╯       │
//!           [ headers 0..32 ][ buffer ][ headers 32..48 ][ buffer ] …
//! ```
//!
//! Invariants: a batch takes at most [`REPLIES_MAX`] replies and never moves its memory while they are in it; it keeps what it
//! points to until it is cleared.

use std::cell::RefCell;

use blockdev::Memory;

use crate::protocol::{Headers, REPLY_HEADER_MAX, Reply};

/// The most replies in a batch, and the most requests of one connection that wait for their reply to be sent.
pub(super) const REPLIES_MAX: usize = 128;
const HEADERS_MAX: usize = REPLIES_MAX * REPLY_HEADER_MAX;
const IOVECS_MAX: usize = 2 * REPLIES_MAX;

enum Held {
    Memory(#[expect(dead_code, reason = "held until it has been sent")] Memory),
    Bytes(#[expect(dead_code, reason = "held until it has been sent")] Vec<u8>),
}

/// A set of replies that is sent as a whole.
pub(super) struct Batch {
    headers: Vec<u8>,
    iovecs: Vec<libc::iovec>,
    held: Vec<Held>,
    message: libc::msghdr,
    /// Everything before this iovec has been sent.
    next: usize,
    replies: usize,
    held_len: usize,
    told_len: usize,
    unsent: usize,
    zero_runs: usize,
}

fn is_zeroes(part: &libc::iovec) -> bool {
    part.iov_base.is_null()
}

impl Batch {
    pub(super) fn new() -> Box<Batch> {
        // SAFETY: all-zero is a valid msghdr: null pointers with zero lengths.
        let message = unsafe { std::mem::zeroed() };
        Box::new(Batch {
            headers: Vec::with_capacity(HEADERS_MAX),
            iovecs: Vec::with_capacity(IOVECS_MAX),
            held: Vec::with_capacity(REPLIES_MAX),
            message,
            next: 0,
            replies: 0,
            held_len: 0,
            told_len: 0,
            unsent: 0,
            zero_runs: 0,
        })
    }

    pub(super) fn replies(&self) -> usize {
        self.replies
    }

    /// Bytes of request memory that this batch keeps.
    pub(super) fn held_len(&self) -> usize {
        self.held_len
    }

    /// Bytes given with [`Batch::push_bytes`].
    pub(super) fn told_len(&self) -> usize {
        self.told_len
    }

    pub(super) fn unsent(&self) -> usize {
        self.unsent
    }

    /// Appends a reply without data.
    pub(super) fn push(&mut self, reply: Reply, headers: Headers, cookie: u64, offset: u64) {
        assert!(self.replies < REPLIES_MAX, "more replies than requests were admitted");
        self.replies += 1;
        let mut bytes = [0; REPLY_HEADER_MAX];
        let len = reply.encode(headers, cookie, offset, &mut bytes);
        let start = self.headers.as_mut_ptr().wrapping_add(self.headers.len());
        self.headers.extend_from_slice(&bytes[..len]);
        self.unsent += len;
        match self.iovecs.last_mut() {
            Some(last) if last.iov_base.cast::<u8>().wrapping_add(last.iov_len) == start => last.iov_len += len,
            _ => self.iovecs.push(libc::iovec { iov_base: start.cast(), iov_len: len }),
        }
    }

    /// Appends the data of the reply just pushed. `held_len` is what the request was accounted with.
    pub(super) fn push_memory(&mut self, memory: Memory, held_len: usize) {
        self.held_len += held_len;
        if !memory.is_empty() {
            self.unsent += memory.len();
            self.iovecs.extend_from_slice(memory.segments());
        }
        self.held.push(Held::Memory(memory));
    }

    /// Appends bytes to the reply just pushed.
    pub(super) fn push_bytes(&mut self, mut bytes: Vec<u8>) {
        self.unsent += bytes.len();
        self.told_len += bytes.len();
        self.iovecs.push(libc::iovec { iov_base: bytes.as_mut_ptr().cast(), iov_len: bytes.len() });
        self.held.push(Held::Bytes(bytes));
    }

    /// Appends `len` zeroes, as the data of the reply just pushed.
    pub(super) fn push_zeroes(&mut self, len: usize) {
        self.unsent += len;
        self.zero_runs += 1;
        self.iovecs.push(libc::iovec { iov_base: std::ptr::null_mut(), iov_len: len });
    }

    /// True if anything in it has to be sent as [`Batch::zeroes_due`] tells.
    pub(super) fn has_zeroes(&self) -> bool {
        self.zero_runs > 0
    }

    /// How many zeroes are to be sent before anything else of the batch; 0 if bytes are.
    pub(super) fn zeroes_due(&self) -> usize {
        self.iovecs.get(self.next).filter(|first| is_zeroes(first)).map_or(0, |first| first.iov_len)
    }

    /// What is to be sent before the next run of zeroes.
    pub(super) fn pending(&self) -> &[libc::iovec] {
        let rest = &self.iovecs[self.next..];
        let len = if self.has_zeroes() { rest.iter().position(is_zeroes).unwrap_or(rest.len()) } else { rest.len() };
        &rest[..len]
    }

    /// True if something follows [`Batch::pending`].
    pub(super) fn is_more(&self) -> bool {
        self.next + self.pending().len() < self.iovecs.len()
    }

    /// A message header for [`Batch::pending`]; valid until the batch is changed.
    pub(super) fn message(&mut self) -> *const libc::msghdr {
        self.message.msg_iovlen = self.pending().len();
        self.message.msg_iov = self.iovecs.as_mut_ptr().wrapping_add(self.next);
        &raw const self.message
    }

    /// `len` more bytes were sent; true if that was all.
    pub(super) fn advance(&mut self, mut len: usize) -> bool {
        self.unsent = self.unsent.saturating_sub(len);
        while let Some(first) = self.iovecs.get_mut(self.next) {
            if len < first.iov_len {
                if !is_zeroes(first) {
                    first.iov_base = first.iov_base.cast::<u8>().wrapping_add(len).cast();
                }
                first.iov_len -= len;
                return false;
            }
            len -= first.iov_len;
            self.next += 1;
        }
        true
    }

    /// Empties it for the next use.
    pub(super) fn clear(&mut self) {
        self.held.clear();
        self.headers.clear();
        self.iovecs.clear();
        self.next = 0;
        self.replies = 0;
        self.held_len = 0;
        self.told_len = 0;
        self.unsent = 0;
        self.zero_runs = 0;
    }
}

/// Empty batches of one thread: connections have one only while they have something to say.
#[derive(Default)]
pub(super) struct BatchPool {
    #[expect(clippy::vec_box, reason = "the kernel is given pointers into a batch, so that it must not move")]
    idle: RefCell<Vec<Box<Batch>>>,
}

impl BatchPool {
    const IDLE_MAX: usize = 64;

    pub(super) fn take(&self) -> Box<Batch> {
        self.idle.borrow_mut().pop().unwrap_or_else(Batch::new)
    }

    pub(super) fn give_back(&self, mut batch: Box<Batch>) {
        batch.clear();
        let mut idle = self.idle.borrow_mut();
        if idle.len() < Self::IDLE_MAX {
            idle.push(batch);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use blockdev::BufferPool;

    fn bytes_of(batch: &Batch) -> Vec<u8> {
        let mut bytes = Vec::new();
        for part in batch.pending() {
            // SAFETY: the batch keeps what its iovecs point to.
            bytes.extend_from_slice(unsafe { std::slice::from_raw_parts(part.iov_base.cast::<u8>(), part.iov_len) });
        }
        bytes
    }

    #[test]
    fn adjacent_headers_share_an_iovec_and_any_split_sends_the_same_bytes() {
        let pool = BufferPool::new(1 << 20, 0);
        let fill = || {
            let mut batch = Batch::new();
            batch.push(Reply::Done, Headers::Simple, 1, 0);
            batch.push(Reply::Error(5), Headers::Simple, 2, 0);
            batch.push(Reply::Data(100), Headers::Simple, 3, 0);
            let mut memory = Memory::from_buffer(pool.try_get(100).unwrap(), 100);
            memory.fill(9);
            batch.push_memory(memory, 100);
            batch.push(Reply::Extents { context: 1, count: 1, is_last: true }, Headers::Structured, 4, 0);
            batch.push_bytes(vec![7; 8]);
            batch
        };
        let mut batch = fill();
        assert_eq!(batch.pending().len(), 4);
        let all = bytes_of(&batch);
        assert_eq!((all.len(), batch.unsent()), (48 + 100 + 24 + 8, 48 + 100 + 24 + 8));
        for split in 0..=all.len() {
            let mut batch = fill();
            assert_eq!(batch.advance(split), split == all.len());
            assert_eq!(bytes_of(&batch), all[split..]);
        }
        batch.clear();
        assert_eq!(pool.used_bytes(), 0);
    }

    #[test]
    fn a_run_of_zeroes_stands_between_bytes() {
        let mut batch = Batch::new();
        batch.push(Reply::Data(1000), Headers::Simple, 1, 0);
        batch.push_zeroes(1000);
        batch.push(Reply::Done, Headers::Simple, 2, 0);
        assert_eq!((batch.unsent(), batch.pending().len(), batch.zeroes_due()), (16 + 1000 + 16, 1, 0));
        assert!(batch.is_more());
        assert!(!batch.advance(16));
        assert_eq!((batch.pending().len(), batch.zeroes_due()), (0, 1000));
        assert!(!batch.advance(999));
        assert_eq!((batch.pending().len(), batch.zeroes_due()), (0, 1));
        assert!(!batch.advance(1));
        assert_eq!((batch.pending()[0].iov_len, batch.zeroes_due(), batch.is_more()), (16, 0, false));
        assert!(batch.advance(16) && batch.has_zeroes());
        batch.clear();
        assert!(!batch.has_zeroes());
    }

    #[test]
    fn a_full_batch_does_not_move() {
        let mut batch = Batch::new();
        batch.push(Reply::Data(1), Headers::Extended, 0, 0);
        let first = batch.pending()[0].iov_base;
        for _ in 1..REPLIES_MAX {
            batch.push(Reply::Extents { context: 1, count: 1, is_last: true }, Headers::Extended, 0, 0);
            batch.push_bytes(vec![0]);
        }
        assert_eq!(batch.pending()[0].iov_base, first);
        assert_eq!(batch.headers.capacity(), HEADERS_MAX);
        assert_eq!(batch.iovecs.capacity(), IOVECS_MAX);
    }
}
