//! The protocol of the transmission phase, without the socket: bytes in, requests to the volume, replies out.
//!
//! ```text
//!  feed(bytes) ─▶ header ─▶ check ─▶ admit ─▶ [payload into a pooled buffer] ─▶ VolumeQueue
//!                                │                                                 │
//!                                └─ refused ─▶ Batch of replies ◀─ complete() ◀────┘
//! ```
//!
//! Invariants: at most [`REPLIES_MAX`] requests are admitted and not yet answered *on the wire*; they keep at most [`HELD_MAX`]
//! bytes of buffers, or one request's, and [`TOLD_MAX`] of answers about extents, or one answer. Beyond that `feed` takes no more, so that the socket fills up and the client waits.

use std::rc::Rc;
use std::sync::Arc;
use std::time::{Duration, Instant};

use blockdev::stats::{OpClass, OpStats, Stage};
use blockdev::{Buffer, Completion, CompletionQueue, Errno, Extent, Memory, Op, Payload, Reactor, Request, VolumeQueue};
use slab::Slab;

use super::batch::{Batch, BatchPool, REPLIES_MAX};
use super::prefetch::Prefetch;
use super::request::{Action, Rules, check, encode_extents, reply_number};
use super::zeroes;
use crate::client::Client;
use crate::contexts::Context;
use crate::protocol::{
    ALLOCATION_CONTEXT_ID, Headers, PAYLOAD_MAX, REPLY_HEADER_MAX, REQUEST_HEADER_MAX, Reply, RequestHeader, command,
    command_flag, error,
};

/// The most bytes of buffers that one connection holds with several requests.
const HELD_MAX: usize = 32 << 20;
/// A connection holds at most this part of what is still free, so that those who keep their buffers leave some to others.
const FREE_SHARE: usize = 4;
/// But it may hold this much if there is as much.
const HELD_MIN: usize = 256 << 10;
/// Who sends a payload more slowly, in bytes a second, keeps others from its buffer.
const PAYLOAD_RATE_MIN: u64 = 1 << 20;
/// The most bytes that a connection's answers about extents take up, those to come included.
const TOLD_MAX: usize = 1 << 20;
/// What an answer to come is counted as.
const TOLD_EACH: usize = 64 << 10;
/// Payload at least this long is received straight into its buffer.
const DIRECT_MIN: usize = 16 << 10;

/// Why no more input is taken for now.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Blocked {
    /// Until a reply of this connection has been sent.
    Replies,
    /// Until a buffer of this thread is given back.
    Memory,
}

/// Why no more input is taken ever.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(super) enum Ended {
    /// The client said so.
    Disconnected,
    /// It broke the protocol.
    Violation(String),
}

enum Expect {
    Header,
    /// A header whose request waits to be admitted.
    Admission(RequestHeader),
    Payload(Incoming),
    Discard {
        header: RequestHeader,
        remaining: u64,
        number: u32,
    },
}

/// A write whose payload is arriving.
struct Incoming {
    header: RequestHeader,
    op: Op,
    buffer: Buffer,
    filled: usize,
    begun: Instant,
}

impl Incoming {
    fn missing(&self) -> usize {
        self.header.len as usize - self.filled
    }

    fn position(&self) -> *mut u8 {
        self.buffer.as_ptr().wrapping_add(self.filled)
    }
}

/// A request that is with the volume.
struct Slot {
    header: RequestHeader,
    class: OpClass,
    arrived: Instant,
    held_len: usize,
    flush_after: bool,
}

/// What a session works with.
pub(super) struct SessionSetup {
    pub(super) rules: Rules,
    /// The transport sends runs of zeroes that are in no memory.
    pub(super) sends_zeroes: bool,
    /// Of the export's own, those that were selected.
    pub(super) contexts: Vec<Context>,
    pub(super) client: Arc<Client>,
    pub(super) stats: Arc<OpStats>,
    pub(super) queue: Rc<VolumeQueue>,
    pub(super) completions: Rc<CompletionQueue>,
    pub(super) reactor: Rc<Reactor>,
    /// Stands in the upper half of the tokens of all requests.
    pub(super) index: u32,
}

/// One client's transmission phase.
pub(super) struct Session {
    setup: SessionSetup,
    partial: [u8; REQUEST_HEADER_MAX],
    partial_len: usize,
    expect: Expect,
    slots: Slab<Slot>,
    prefetch: Prefetch,
    replies: Option<Box<Batch>>,
    replies_in_flight: usize,
    held_len: usize,
    told_len: usize,
    ended: Option<Ended>,
}

impl Session {
    pub(super) fn new(setup: SessionSetup) -> Session {
        Session {
            setup,
            partial: [0; REQUEST_HEADER_MAX],
            partial_len: 0,
            expect: Expect::Header,
            slots: Slab::new(),
            prefetch: Prefetch::default(),
            replies: None,
            replies_in_flight: 0,
            held_len: 0,
            told_len: 0,
            ended: None,
        }
    }

    pub(super) fn ended(&self) -> Option<&Ended> {
        self.ended.as_ref()
    }

    /// True if no request is with the volume.
    pub(super) fn is_idle(&self) -> bool {
        self.slots.is_empty()
    }

    /// Bytes of buffers held by requests and by replies not yet sent.
    pub(super) fn held_len(&self) -> usize {
        self.held_len
    }

    /// How much longer the payload being received has taken than one of its length may at [`PAYLOAD_RATE_MIN`].
    pub(super) fn payload_overdue(&self, now: Instant) -> Option<Duration> {
        let Expect::Payload(Incoming { header, begun, .. }) = &self.expect else { return None };
        let allowed = Duration::from_millis(header.len * 1000 / PAYLOAD_RATE_MIN);
        Some(now.saturating_duration_since(*begun).saturating_sub(allowed))
    }

    /// Takes input until it ends or no more can be taken. Returns how much was taken, and why not all of it.
    pub(super) fn feed(&mut self, bytes: &[u8], batches: &BatchPool) -> (usize, Option<Blocked>) {
        let mut taken = 0;
        while self.ended.is_none() {
            let rest = &bytes[taken..];
            match &mut self.expect {
                Expect::Admission(header) => {
                    let header = *header;
                    if let Err(blocked) = self.admit(header, batches) {
                        return (taken, Some(blocked));
                    }
                }
                _ if rest.is_empty() => break,
                Expect::Header => taken += self.take_header(rest),
                Expect::Payload(payload) => {
                    let part = rest.len().min(payload.missing());
                    // SAFETY: at least `missing()` bytes of the buffer lie from there on, nobody else has it, and `rest` is elsewhere.
                    unsafe { payload.position().copy_from_nonoverlapping(rest.as_ptr(), part) };
                    taken += part;
                    self.payload_filled(part);
                }
                Expect::Discard { header, remaining, number } => {
                    let part = (rest.len() as u64).min(*remaining);
                    taken += part as usize;
                    *remaining -= part;
                    if *remaining == 0 {
                        let (header, number) = (*header, *number);
                        self.expect = Expect::Header;
                        self.refuse(&header, number, batches);
                    }
                }
            }
        }
        (taken, None)
    }

    /// Where the rest of a long payload may be received without passing through [`Session::feed`].
    pub(super) fn direct_target(&self) -> Option<(*mut u8, usize)> {
        match &self.expect {
            Expect::Payload(payload) if payload.missing() >= DIRECT_MIN => Some((payload.position(), payload.missing())),
            _ => None,
        }
    }

    /// `len` bytes were received at [`Session::direct_target`].
    pub(super) fn payload_filled(&mut self, len: usize) {
        let Expect::Payload(payload) = &mut self.expect else { return };
        payload.filled += len;
        if payload.missing() == 0
            && let Expect::Payload(Incoming { header, op, buffer, .. }) = std::mem::replace(&mut self.expect, Expect::Header)
        {
            let held_len = buffer.capacity();
            let memory = Memory::from_buffer(buffer, header.len as usize);
            self.submit(&header, op, Payload::Memory(memory), held_len);
        }
    }

    /// Takes a header, or a part of one, from the front of `input` and returns its length there.
    fn take_header(&mut self, input: &[u8]) -> usize {
        let headers = self.setup.rules.headers;
        let len = headers.request_len();
        if self.partial_len == 0 && input.len() >= len {
            self.header_complete(RequestHeader::decode(&input[..len], headers));
            return len;
        }
        let part = input.len().min(len - self.partial_len);
        self.partial[self.partial_len..self.partial_len + part].copy_from_slice(&input[..part]);
        self.partial_len += part;
        if self.partial_len == len {
            self.partial_len = 0;
            self.header_complete(RequestHeader::decode(&self.partial[..len], headers));
        }
        part
    }

    fn header_complete(&mut self, header: Option<RequestHeader>) {
        match header {
            None => self.violation("a request does not begin with the protocol's magic number".to_owned()),
            Some(header) if header.command == command::DISC => self.ended = Some(Ended::Disconnected),
            Some(header) => self.expect = Expect::Admission(header),
        }
    }

    /// The client said goodbye in some other way than by a request.
    pub(super) fn disconnect(&mut self) {
        self.ended.get_or_insert(Ended::Disconnected);
    }

    fn violation(&mut self, what: String) {
        self.ended = Some(Ended::Violation(what));
    }

    /// Starts a request, or says why it must wait.
    fn admit(&mut self, header: RequestHeader, batches: &BatchPool) -> Result<(), Blocked> {
        let unanswered = self.slots.len() + self.replies_in_flight + self.replies.as_ref().map_or(0, |batch| batch.replies());
        if unanswered >= REPLIES_MAX {
            return Err(Blocked::Replies);
        }
        let payload_len = header.payload_len(self.setup.rules.headers);
        if payload_len > self.payload_limit() {
            self.violation(format!("a request with {payload_len} bytes of payload"));
            return Ok(());
        }
        match check(&header, &self.setup.rules) {
            Err(number) if payload_len > 0 => {
                self.expect = Expect::Discard { header, remaining: payload_len, number };
            }
            Err(number) => {
                self.expect = Expect::Header;
                self.refuse(&header, number, batches);
            }
            Ok(Action::Prefetch) => {
                self.expect = Expect::Header;
                self.admit_prefetch(&header, batches);
            }
            Ok(Action::OwnContexts | Action::Submit(Op::BlockStatus)) if self.told_len > TOLD_MAX - TOLD_EACH => {
                return Err(Blocked::Replies);
            }
            Ok(Action::OwnContexts) => {
                self.expect = Expect::Header;
                self.tell_own_contexts(&header, batches);
            }
            Ok(Action::Submit(op @ Op::Write { .. })) if header.len > 0 => {
                let buffer = self.buffer(header.len as usize)?;
                self.expect = Expect::Payload(Incoming { header, op, buffer, filled: 0, begun: self.setup.reactor.now() });
            }
            Ok(Action::Submit(op @ (Op::Read | Op::Write { .. }))) => {
                let buffer = self.buffer(header.len as usize)?;
                let held_len = buffer.capacity();
                self.expect = Expect::Header;
                self.submit(&header, op, Payload::Memory(Memory::from_buffer(buffer, header.len as usize)), held_len);
            }
            Ok(Action::Submit(op)) => {
                self.told_len += if op == Op::BlockStatus { TOLD_EACH } else { 0 };
                self.expect = Expect::Header;
                self.submit(&header, op, Payload::None, 0);
            }
        }
        Ok(())
    }

    fn is_inside(&self, header: &RequestHeader) -> bool {
        let size = self.setup.client.export.volume().size();
        header.offset.checked_add(header.len).is_some_and(|end| end <= size)
    }

    fn tell_own_contexts(&mut self, header: &RequestHeader, batches: &BatchPool) {
        if !self.is_inside(header) {
            return self.refuse(header, error::EINVAL, batches);
        }
        let (stats, class) = (&self.setup.stats, OpClass::BlockStatus);
        stats.started(class);
        stats.ended(class, 0, true);
        self.setup.client.count(class, 0);
        self.tell_extents(header, None, batches);
    }

    /// Answers BLOCK_STATUS: a chunk for what is allocated, if that was asked for, and one for each context of the export's own.
    fn tell_extents(&mut self, header: &RequestHeader, allocated: Option<&[Extent]>, batches: &BatchPool) {
        let (one, headers) = (header.flags & command_flag::REQ_ONE != 0, self.setup.rules.headers);
        let allocation =
            allocated.map(|extents| (ALLOCATION_CONTEXT_ID, Some(encode_extents(extents, header.len, one, headers))));
        let of_own = |context: &Context| (context.id, context.encode(header.offset, header.len, one, headers));
        let mut chunks = Vec::with_capacity(1 + self.setup.contexts.len());
        for (context, told) in allocation.into_iter().chain(self.setup.contexts.iter().map(of_own)) {
            let Some((count, bytes)) = told.filter(|(count, _)| *count > 0) else {
                return self.refuse(header, error::EIO, batches);
            };
            chunks.push((context, count, bytes));
        }
        let chunk_count = chunks.len();
        let reply = |number: usize, context, count| Reply::Extents { context, count, is_last: number + 1 == chunk_count };
        // The batch has room for one header for each request: those of further chunks follow as data.
        let mut chunks = chunks.into_iter().enumerate();
        let Some((number, (context, count, mut data))) = chunks.next() else { return self.refuse(header, error::EIO, batches) };
        let first = reply(number, context, count);
        for (number, (context, count, bytes)) in chunks {
            let mut head = [0; REPLY_HEADER_MAX];
            let len = reply(number, context, count).encode(headers, header.cookie, header.offset, &mut head);
            data.extend_from_slice(&head[..len]);
            data.extend(bytes);
        }
        self.told_len += data.len();
        self.reply(header, first, batches).push_bytes(data);
    }

    /// Nothing is read of a range that is not all there.
    fn admit_prefetch(&mut self, header: &RequestHeader, batches: &BatchPool) {
        if !self.is_inside(header) {
            return self.refuse(header, error::EINVAL, batches);
        }
        if header.len == 0 {
            self.reply(header, Reply::Done, batches);
            return;
        }
        let (arrived, class) = (self.setup.reactor.now(), OpClass::Read);
        let slot = self.slots.insert(Slot { header: *header, class, arrived, held_len: 0, flush_after: false });
        self.prefetch.push(slot, header.offset, header.len);
    }

    /// True if [`Session::go_on_prefetching`] has something to do, in a later turn of the reactor.
    pub(super) fn wants_to_prefetch(&self) -> bool {
        self.prefetch.next_piece().is_some()
    }

    pub(super) fn go_on_prefetching(&mut self) -> Result<(), Blocked> {
        let Some(piece) = self.prefetch.next_piece() else { return Ok(()) };
        let buffer = self.buffer(piece.len as usize)?;
        self.slots[piece.slot].held_len = buffer.capacity();
        self.prefetch.begun(piece);
        let setup = &self.setup;
        let token = u64::from(setup.index) << 32 | piece.slot as u64;
        let payload = Payload::Memory(Memory::from_buffer(buffer, piece.len as usize));
        let now = setup.reactor.now();
        setup.queue.submit(Request::new(Op::Read, piece.offset, piece.len, payload, now, &setup.completions, token));
        Ok(())
    }

    /// Answers all CACHE requests, or without `batches` forgets them; the one that is with the volume follows.
    pub(super) fn end_prefetching(&mut self, batches: Option<&BatchPool>) {
        for slot in self.prefetch.end() {
            self.prefetched(slot, Ok(()), batches);
        }
    }

    fn prefetch_piece_done(&mut self, slot: usize, completion: Completion, batches: Option<&BatchPool>) {
        drop(completion.payload);
        self.held_len -= std::mem::take(&mut self.slots[slot].held_len);
        if self.prefetch.piece_done(completion.result.is_ok()) {
            self.prefetched(slot, completion.result, batches);
        }
    }

    fn prefetched(&mut self, slot: usize, result: Result<(), Errno>, batches: Option<&BatchPool>) {
        let Slot { header, class, .. } = self.slots.remove(slot);
        self.setup.client.count(class, 0);
        let Some(batches) = batches else { return };
        let reply = result.map_or_else(|errno| Reply::Error(reply_number(&header, errno)), |()| Reply::Done);
        self.reply(&header, reply, batches);
    }

    /// A payload longer than this is taken for an attack. Up to here, one that is too long is read, thrown away and refused;
    /// with extended headers the specification wants a disconnect at once.
    fn payload_limit(&self) -> u64 {
        if self.setup.rules.headers == Headers::Extended { PAYLOAD_MAX } else { 2 * PAYLOAD_MAX }
    }

    fn buffer(&mut self, len: usize) -> Result<Buffer, Blocked> {
        let pool = self.setup.reactor.buffers();
        let wanted = self.held_len + len;
        if self.held_len > 0 && wanted > HELD_MAX {
            return Err(Blocked::Replies);
        }
        if wanted > (pool.free_bytes() / FREE_SHARE).max(HELD_MIN) {
            return Err(Blocked::Memory);
        }
        let buffer = pool.try_get(len).ok_or(Blocked::Memory)?;
        self.held_len += buffer.capacity();
        Ok(buffer)
    }

    fn submit(&mut self, header: &RequestHeader, op: Op, payload: Payload, held_len: usize) {
        let setup = &self.setup;
        let class = OpClass::from(op);
        setup.stats.started(class);
        let arrived = setup.reactor.now();
        let slot = self.slots.insert(Slot {
            header: *header,
            class,
            arrived,
            held_len,
            flush_after: op == Op::Discard && header.flags & command_flag::FUA != 0,
        });
        let token = u64::from(setup.index) << 32 | slot as u64;
        let (offset, len) = if op == Op::Flush { (0, 0) } else { (header.offset, header.len) };
        setup.queue.submit(Request::new(op, offset, len, payload, arrived, &setup.completions, token));
    }

    /// The volume has completed the request in `slot`. Without `batches` nobody is left to reply to.
    pub(super) fn complete(&mut self, slot: usize, completion: Completion, batches: Option<&BatchPool>) {
        if self.slots[slot].header.command == command::CACHE {
            return self.prefetch_piece_done(slot, completion, batches);
        }
        if completion.result.is_ok() && std::mem::take(&mut self.slots[slot].flush_after) {
            let setup = &self.setup;
            let token = u64::from(setup.index) << 32 | slot as u64;
            let now = setup.reactor.now();
            return setup.queue.submit(Request::new(Op::Flush, 0, 0, Payload::None, now, &setup.completions, token));
        }
        let Slot { header, class, arrived, held_len, .. } = self.slots.remove(slot);
        self.told_len -= if class == OpClass::BlockStatus { TOLD_EACH } else { 0 };
        let ok = completion.result.is_ok();
        let moved = if matches!(class, OpClass::Flush | OpClass::BlockStatus) { 0 } else { header.len };
        let setup = &self.setup;
        setup.stats.stage(class, Stage::Total, setup.reactor.now().saturating_duration_since(arrived));
        setup.stats.ended(class, moved, ok);
        setup.client.count(class, if ok { moved } else { 0 });
        let Some(batches) = batches else {
            self.held_len -= held_len;
            return;
        };
        match (completion.result, completion.payload) {
            (Err(errno), _) => {
                self.held_len -= held_len;
                self.refuse(&header, reply_number(&header, errno), batches);
            }
            (Ok(()), Payload::Memory(memory)) if class == OpClass::Read && !self.is_hole(&memory) => {
                let is_run = self.is_run(&memory);
                if is_run {
                    self.held_len -= held_len;
                }
                let batch = self.reply(&header, Reply::Data(header.len), batches);
                if is_run { batch.push_zeroes(memory.len()) } else { batch.push_memory(memory, held_len) }
            }
            (Ok(()), Payload::Extents(extents)) => self.tell_extents(&header, Some(&extents), batches),
            (Ok(()), payload) => {
                drop(payload);
                self.held_len -= held_len;
                let reply = if class == OpClass::Read { Reply::Zeroes(header.len as u32) } else { Reply::Done };
                self.reply(&header, reply, batches);
            }
        }
    }

    /// Zeroes are told, not sent, to a client that understands it.
    fn is_hole(&self, read: &Memory) -> bool {
        self.setup.rules.headers != Headers::Simple && !read.is_empty() && read.is_zero()
    }

    /// Long runs of zeroes are sent without being in memory to a client that does not.
    fn is_run(&self, read: &Memory) -> bool {
        self.setup.sends_zeroes && self.setup.rules.headers == Headers::Simple && read.len() >= zeroes::RUN_MIN && read.is_zero()
    }

    fn refuse(&mut self, header: &RequestHeader, number: u32, batches: &BatchPool) {
        self.reply(header, Reply::Error(number), batches);
    }

    fn reply(&mut self, header: &RequestHeader, reply: Reply, batches: &BatchPool) -> &mut Batch {
        let batch = self.replies.get_or_insert_with(|| batches.take());
        batch.push(reply, self.setup.rules.headers, header.cookie, header.offset);
        batch
    }

    /// The replies that are ready, to be sent. At most one batch is outside at a time.
    pub(super) fn take_replies(&mut self) -> Option<Box<Batch>> {
        let batch = self.replies.take()?;
        self.replies_in_flight = batch.replies();
        Some(batch)
    }

    /// A batch taken with [`Session::take_replies`] has been sent, or never will be.
    pub(super) fn replies_done(&mut self, batch: &Batch) {
        self.replies_in_flight = 0;
        self.held_len -= batch.held_len();
        self.told_len -= batch.told_len();
    }
}
