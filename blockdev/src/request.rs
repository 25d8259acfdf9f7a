//! A request, its completion, and the queue through which completions come back.
//!
//! ```text
//!  front end ──Request{op, payload, completer}──▶ layer ──divert()──▶ layer ──▶ driver
//!      ▲                                            │ keeps the Completer            │ complete(result)
//!      └──── CompletionQueue ◀── Completer ◀────────┴──── CompletionQueue ◀──────────┘
//! ```
//!
//! A completion is never delivered by a call back into the submitter: it is put into its queue, and the owner's
//! [`Handler::ready`](crate::Handler::ready) runs later in the same turn of the reactor. So a driver may complete a request inside
//! `submit`, and batches form by themselves.

use std::cell::RefCell;
use std::collections::VecDeque;
use std::rc::Rc;
use std::time::Instant;

use crate::errno::Errno;
use crate::memory::Memory;
use crate::reactor::{HandlerId, Reactor};

/// What to do. Offsets and lengths are in bytes and stand in the [`Request`].
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Op {
    Read,
    /// `fua`: durable when it completes.
    Write {
        fua: bool,
    },
    /// Makes every write completed before this request arrived durable.
    Flush,
    /// The range's content no longer matters. Of a device: whole blocks of it read as zeroes when it completes. Of a volume: a
    /// long one may complete before all of it is carried out; until then the rest reads as before.
    Discard,
    /// The range reads as zeroes afterwards. `unmap`: its space may be given back; otherwise it stays allocated.
    /// `fast`: fail with EOPNOTSUPP rather than be slower than writing nothing.
    WriteZeroes {
        unmap: bool,
        fua: bool,
        fast: bool,
    },
    /// Which parts of the range hold data; answers with [`Payload::Extents`] covering a prefix of the range, at least one extent.
    BlockStatus,
}

impl Op {
    /// True for what changes content.
    pub fn modifies(self) -> bool {
        matches!(self, Op::Write { .. } | Op::Discard | Op::WriteZeroes { .. })
    }
}

/// What a part of a device holds.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum ExtentKind {
    Data,
    /// Allocated and reads as zeroes.
    Zero,
    /// Not allocated and reads as zeroes.
    Hole,
}

/// A run of bytes of one kind.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Extent {
    pub len: u64,
    pub kind: ExtentKind,
}

/// What travels with a request and comes back with its completion.
pub enum Payload {
    None,
    /// Of a read or a write: exactly as long as the request.
    Memory(Memory),
    /// Of a block status answer.
    Extents(Vec<Extent>),
}

impl Payload {
    /// The memory of a read or a write.
    pub fn memory(&self) -> Option<&Memory> {
        match self {
            Payload::Memory(memory) => Some(memory),
            _ => None,
        }
    }

    pub fn memory_mut(&mut self) -> Option<&mut Memory> {
        match self {
            Payload::Memory(memory) => Some(memory),
            _ => None,
        }
    }

    pub fn into_memory(self) -> Option<Memory> {
        match self {
            Payload::Memory(memory) => Some(memory),
            _ => None,
        }
    }
}

/// One I/O request.
pub struct Request {
    pub op: Op,
    /// Bytes from the start of the device.
    pub offset: u64,
    /// Bytes.
    pub len: u64,
    /// When the front end took it from its client.
    pub arrived: Instant,
    pub payload: Payload,
    completer: Completer,
}

/// The duty to complete one request.
pub struct Completer {
    queue: Option<Rc<CompletionQueue>>,
    token: u64,
}

/// The outcome of one request. A read or write either did all of its length or failed.
pub struct Completion {
    /// As given to [`Request::new`] or [`Request::divert`].
    pub token: u64,
    pub result: Result<(), Errno>,
    pub payload: Payload,
}

/// Where completions wait for the handler that submitted the requests.
pub struct CompletionQueue {
    waiting: RefCell<VecDeque<Completion>>,
    reactor: Rc<Reactor>,
    handler: HandlerId,
}

impl Request {
    /// A request whose completion carries `token` into `queue`.
    pub fn new(
        op: Op,
        offset: u64,
        len: u64,
        payload: Payload,
        arrived: Instant,
        queue: &Rc<CompletionQueue>,
        token: u64,
    ) -> Request {
        Request { op, offset, len, arrived, payload, completer: Completer { queue: Some(queue.clone()), token } }
    }

    /// One past the last byte. The volume has checked that this does not overflow.
    pub fn end(&self) -> u64 {
        self.offset + self.len
    }

    /// Completes it, giving the payload back.
    pub fn complete(self, result: Result<(), Errno>) {
        self.completer.complete(result, self.payload);
    }

    /// Completes it with another payload.
    pub fn complete_with(self, result: Result<(), Errno>, payload: Payload) {
        self.completer.complete(result, payload);
    }

    /// The request as a layer passes it on: it completes into the layer's own queue under the layer's token; the duty to the
    /// original submitter is handed to the layer.
    pub fn divert(mut self, queue: &Rc<CompletionQueue>, token: u64) -> (Request, Completer) {
        let own = Completer { queue: Some(queue.clone()), token };
        let original = std::mem::replace(&mut self.completer, own);
        (self, original)
    }

    /// Takes it apart: for drivers that keep the pieces in slots of their own.
    pub fn into_parts(self) -> (Payload, Completer) {
        (self.payload, self.completer)
    }
}

impl Completer {
    /// Completes the request this duty came from.
    pub fn complete(mut self, result: Result<(), Errno>, payload: Payload) {
        if let Some(queue) = self.queue.take() {
            queue.push(Completion { token: self.token, result, payload });
        }
    }
}

impl Drop for Completer {
    fn drop(&mut self) {
        if let Some(queue) = self.queue.take() {
            queue.push(Completion { token: self.token, result: Err(Errno::EIO), payload: Payload::None });
            debug_assert!(std::thread::panicking(), "a request was dropped without being completed");
        }
    }
}

impl CompletionQueue {
    /// A queue for `handler`'s completions: its `ready` runs when there are some. `capacity` is the most requests the handler
    /// has in flight; it is allocated here.
    pub fn new(reactor: &Rc<Reactor>, handler: HandlerId, capacity: usize) -> Rc<CompletionQueue> {
        Rc::new(CompletionQueue { waiting: RefCell::new(VecDeque::with_capacity(capacity)), reactor: reactor.clone(), handler })
    }

    /// The oldest completion not yet taken.
    pub fn pop(&self) -> Option<Completion> {
        self.waiting.borrow_mut().pop_front()
    }

    pub fn is_empty(&self) -> bool {
        self.waiting.borrow().is_empty()
    }

    fn push(&self, completion: Completion) {
        let mut waiting = self.waiting.borrow_mut();
        if waiting.is_empty() {
            self.reactor.wake(self.handler);
        }
        waiting.push_back(completion);
    }
}
