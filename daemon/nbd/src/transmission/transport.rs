//! What lies between the socket and the session: nothing, or TLS.
//!
//! ```text
//!  plain  socket ─▶ ReceiveBuffer ─────────────▶ Session      Batch ───────────────▶ sendmsg (iovecs, no copy)
//!                └─▶ payload buffer (long writes)
//!  TLS    socket ─▶ ReceiveBuffer ─▶ decrypt ─▶ Session      Batch ─▶ encrypt ─▶ send
//! ```

use std::io::{self, BufRead, Write};

use blockdev::{Buffer, BufferPool};
use io_uring::{opcode, squeue, types};
use rustls::ServerConnection;

use super::batch::{Batch, BatchPool};
use super::session::{Blocked, Session};

/// What an idle connection keeps to receive into, in bytes; also what headers are received into between long payloads.
pub(super) const RECEIVE_SMALL: usize = 4 << 10;
/// What a connection with much to say receives into, in bytes.
pub(super) const RECEIVE_LARGE: usize = 128 << 10;
/// Between long payloads only headers are expected; what else comes would have to be copied.
const RECEIVE_HEADERS: usize = 1 << 10;
/// Plaintext is encrypted in portions of this many bytes.
const ENCRYPT_PORTION: usize = 128 << 10;

/// Bytes from the socket that the session has not taken yet.
pub(super) struct ReceiveBuffer {
    buffer: Buffer,
    start: usize,
    end: usize,
}

impl ReceiveBuffer {
    /// A small one, even if the pool is spent: who attaches then waits for memory beside the others.
    pub(super) fn new(pool: &std::rc::Rc<BufferPool>) -> ReceiveBuffer {
        let buffer = pool.get_beyond_budget(RECEIVE_SMALL).expect("the pool has buffers of this size");
        ReceiveBuffer { buffer, start: 0, end: 0 }
    }

    pub(super) fn is_empty(&self) -> bool {
        self.start == self.end
    }

    pub(super) fn is_large(&self) -> bool {
        self.buffer.capacity() > RECEIVE_SMALL
    }

    /// Changes to a buffer of another size; the old one must be empty. If there is none, the old one stays.
    pub(super) fn resize(&mut self, pool: &std::rc::Rc<BufferPool>, len: usize) {
        if self.is_empty()
            && let Some(buffer) = pool.try_get(len)
        {
            *self = ReceiveBuffer { buffer, start: 0, end: 0 };
        }
    }

    /// Where to receive next. The buffer must be empty.
    pub(super) fn target(&mut self, headers_only: bool) -> (*mut u8, usize) {
        debug_assert!(self.is_empty(), "everything received is taken before more is received");
        (self.start, self.end) = (0, 0);
        let len = self.buffer.capacity();
        (self.buffer.as_ptr(), if headers_only { len.min(RECEIVE_HEADERS) } else { len })
    }

    pub(super) fn received(&mut self, len: usize) {
        self.end = len.min(self.buffer.capacity());
    }

    fn clear(&mut self) {
        (self.start, self.end) = (0, 0);
    }

    fn bytes(&self) -> &[u8] {
        // SAFETY: the kernel has written `start..end`, and nothing is being received while the session takes bytes.
        unsafe { std::slice::from_raw_parts(self.buffer.as_ptr().add(self.start), self.end - self.start) }
    }
}

pub(super) enum Transport {
    Plain,
    Tls(Box<Tls>),
}

pub(super) struct Tls {
    connection: ServerConnection,
    encrypted: Vec<u8>,
    sent: usize,
    said_goodbye: bool,
    peer_said_goodbye: bool,
}

impl Tls {
    pub(super) fn new(connection: ServerConnection) -> Box<Tls> {
        Box::new(Tls { connection, encrypted: Vec::new(), sent: 0, said_goodbye: false, peer_said_goodbye: false })
    }
}

impl Transport {
    /// Gives the session what has been received, until it takes no more.
    pub(super) fn feed(
        &mut self,
        input: &mut ReceiveBuffer,
        session: &mut Session,
        batches: &BatchPool,
    ) -> Result<Option<Blocked>, io::Error> {
        match self {
            Transport::Plain => {
                let (taken, blocked) = session.feed(input.bytes(), batches);
                input.start += taken;
                Ok(blocked)
            }
            Transport::Tls(tls) => tls.feed(input, session, batches),
        }
    }

    /// True if long payloads may be received straight into their buffers.
    pub(super) fn is_direct(&self) -> bool {
        matches!(self, Transport::Plain)
    }

    /// The next thing to send, of `batch` or of the transport's own; `None` if there is nothing.
    pub(super) fn send_entry(&mut self, fd: types::Fd, batch: Option<&mut Batch>) -> Option<squeue::Entry> {
        match self {
            Transport::Plain => {
                let batch = batch?;
                let flags = libc::MSG_NOSIGNAL | if batch.unsent() <= RECEIVE_LARGE * 8 { libc::MSG_WAITALL } else { 0 };
                Some(match batch.pending() {
                    [] => return None,
                    [only] => opcode::Send::new(fd, only.iov_base.cast(), only.iov_len as u32).flags(flags).build(),
                    _ => opcode::SendMsg::new(fd, batch.message()).flags(flags as u32).build(),
                })
            }
            Transport::Tls(tls) => {
                if tls.sent == tls.encrypted.len() {
                    tls.encrypt(batch);
                }
                let rest = &tls.encrypted[tls.sent..];
                let flags = libc::MSG_NOSIGNAL | libc::MSG_WAITALL;
                (!rest.is_empty()).then(|| opcode::Send::new(fd, rest.as_ptr(), rest.len() as u32).flags(flags).build())
            }
        }
    }

    /// `len` bytes of the last entry were sent; true if `batch` has now been sent as a whole.
    pub(super) fn sent(&mut self, batch: Option<&mut Batch>, len: usize) -> bool {
        match self {
            Transport::Plain => batch.is_none_or(|batch| batch.advance(len)),
            Transport::Tls(tls) => {
                tls.sent += len;
                tls.sent >= tls.encrypted.len() && batch.is_none_or(|batch| batch.pending().is_empty())
            }
        }
    }

    /// Says goodbye in the transport's own way, once; there may be something to send then.
    pub(super) fn say_goodbye(&mut self) {
        if let Transport::Tls(tls) = self
            && !std::mem::replace(&mut tls.said_goodbye, true)
        {
            tls.connection.send_close_notify();
        }
    }
}

impl Tls {
    fn feed(
        &mut self,
        input: &mut ReceiveBuffer,
        session: &mut Session,
        batches: &BatchPool,
    ) -> Result<Option<Blocked>, io::Error> {
        loop {
            if let Some(blocked) = self.feed_decrypted(session, batches)? {
                return Ok(Some(blocked));
            }
            if session.ended().is_some() {
                return Ok(None);
            }
            if input.is_empty() {
                if self.peer_said_goodbye {
                    session.disconnect();
                }
                return Ok(None);
            }
            let mut encrypted = input.bytes();
            let taken = self.connection.read_tls(&mut encrypted)?;
            input.start += taken;
            let state = self.connection.process_new_packets().map_err(io::Error::other)?;
            self.peer_said_goodbye |= state.peer_has_closed();
            if taken == 0 && !self.peer_said_goodbye {
                return Err(io::Error::other("the TLS session takes no more data"));
            }
            if self.peer_said_goodbye {
                input.clear();
            }
        }
    }

    fn feed_decrypted(&mut self, session: &mut Session, batches: &BatchPool) -> Result<Option<Blocked>, io::Error> {
        loop {
            let mut reader = self.connection.reader();
            let decrypted = match reader.fill_buf() {
                Ok(decrypted) => decrypted,
                Err(error) if matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::UnexpectedEof) => &[],
                Err(error) => return Err(error),
            };
            let len = decrypted.len();
            let (taken, blocked) = session.feed(decrypted, batches);
            reader.consume(taken);
            if blocked.is_some() || len == 0 || taken < len {
                return Ok(blocked);
            }
        }
    }

    /// Encrypts the next portion of `batch`.
    fn encrypt(&mut self, batch: Option<&mut Batch>) {
        self.encrypted.clear();
        self.sent = 0;
        if let Some(batch) = batch {
            let mut portion = 0;
            while portion < ENCRYPT_PORTION
                && let Some(part) = batch.pending().first()
            {
                let len = part.iov_len.min(ENCRYPT_PORTION - portion);
                // SAFETY: the batch keeps this memory; it was filled by a completed read or an encoder, and no kernel operation uses it.
                let plain = unsafe { std::slice::from_raw_parts(part.iov_base.cast::<u8>(), len) };
                let taken = self.connection.writer().write(plain).unwrap_or(0);
                batch.advance(taken);
                portion += taken;
                self.drain();
                if taken == 0 {
                    break;
                }
            }
        }
        self.drain();
    }

    fn drain(&mut self) {
        while self.connection.wants_write() {
            // Writing into memory does not fail.
            if !matches!(self.connection.write_tls(&mut self.encrypted), Ok(1..)) {
                return;
            }
        }
    }
}
