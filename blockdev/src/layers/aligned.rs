//! Lets a device of large blocks take requests of any byte granularity.
//!
//! ```text
//!   request   ·····[====================]·····
//!   device    |  block  |  block  |  block  |     read the span, lay the new bytes over it, write it back
//! ```
//!
//! Requests that fit the device pass untouched. The others go through an aligned buffer, a chunk at a time: a read copies out of
//! it, a write reads the blocks at its edges first. The volume holds the range lock over whole blocks, so nothing changes in between, and a crash
//! leaves each block old or new. Discards shrink to whole blocks; the partial blocks at the edges of a zeroing are rewritten.

use std::cell::{Cell, RefCell};
use std::rc::Rc;

use slab::Slab;
use smallvec::SmallVec;

use crate::buffer::Buffer;
use crate::device::{BlockDevice, Capabilities, DeviceError, Geometry, IoQueue};
use crate::errno::Errno;
use crate::memory::Memory;
use crate::reactor::{Handler, HandlerId, Reactor, ReactorHandle};
use crate::request::{Completion, CompletionQueue, Extent, Op, Payload, Request};

/// The most that goes through one buffer; a multiple of every block size.
const CHUNK: u64 = 4 << 20;

/// The layer.
pub struct Aligned<D> {
    below: D,
}

impl<D: BlockDevice> Aligned<D> {
    pub fn new(below: D) -> Aligned<D> {
        Aligned { below }
    }
}

impl<D: BlockDevice> BlockDevice for Aligned<D> {
    fn geometry(&self) -> Geometry {
        self.below.geometry()
    }

    fn capabilities(&self) -> Capabilities {
        self.below.capabilities()
    }

    fn open_queue(&self, reactor: &Rc<Reactor>) -> Result<Box<dyn IoQueue>, DeviceError> {
        let below = self.below.open_queue(reactor)?;
        let geometry = self.below.geometry();
        Ok(Box::new(AlignedQueue(reactor.install(|id| Inner {
            below,
            reactor: reactor.clone(),
            id,
            completions: CompletionQueue::new(reactor, id, 16),
            block: u64::from(geometry.block_size),
            memory_alignment: geometry.memory_alignment as usize,
            bounced: RefCell::new(Slab::new()),
            starved: RefCell::new(Vec::new()),
            waiting_for_buffers: Cell::new(false),
        }))))
    }

    fn resize(&self, size: u64) -> Result<(), DeviceError> {
        self.below.resize(size)
    }

    fn refresh_size(&self) -> Result<u64, DeviceError> {
        self.below.refresh_size()
    }

    fn on_size_changed_elsewhere(&self, hear: Box<dyn Fn() + Send + Sync>) {
        self.below.on_size_changed_elsewhere(hear);
    }

    fn health(&self) -> Option<String> {
        self.below.health()
    }
    fn home(&self) -> Option<ReactorHandle> {
        self.below.home()
    }
}

struct AlignedQueue(Rc<Inner>);

struct Inner {
    below: Box<dyn IoQueue>,
    reactor: Rc<Reactor>,
    id: HandlerId,
    completions: Rc<CompletionQueue>,
    block: u64,
    memory_alignment: usize,
    bounced: RefCell<Slab<Bounced>>,
    starved: RefCell<Vec<Bounced>>,
    waiting_for_buffers: Cell<bool>,
}

/// A request served through a buffer.
struct Bounced {
    request: Request,
    /// The whole blocks being worked on.
    start: u64,
    len: u64,
    step: Step,
    /// Partial blocks still to be zeroed.
    edges: SmallVec<[(u64, u64); 2]>,
}

#[derive(Clone, Copy, PartialEq, Debug)]
enum Step {
    /// The whole span is being read, for a read.
    ReadAll,
    /// The whole span is being read, to be changed and written back.
    ReadForWrite,
    Write,
    /// Whole blocks of a discard or zeroing, or one of its edges, are being written; the next edge follows.
    Middle,
    /// The block around a partial one is being read.
    ReadEdge {
        from: u64,
        to: u64,
    },
    /// Block status of the whole blocks around.
    Status,
}

impl IoQueue for AlignedQueue {
    fn submit(&self, request: Request) {
        self.0.submit(request);
    }
}

impl Drop for AlignedQueue {
    fn drop(&mut self) {
        self.0.reactor.unregister(self.0.id);
    }
}

impl Inner {
    fn submit(&self, request: Request) {
        if self.fits(&request) {
            return self.below.submit(request);
        }
        match request.op {
            Op::Read | Op::Write { .. } => self.bounce(request),
            Op::BlockStatus => self.widen_status(request),
            _ => self.split_edges(request),
        }
    }

    fn fits(&self, request: &Request) -> bool {
        let aligned = (request.offset | request.len) & (self.block - 1) == 0;
        aligned && request.payload.memory().is_none_or(|memory| memory.is_aligned(self.memory_alignment))
    }

    fn span(&self, request: &Request) -> (u64, u64) {
        let start = request.offset & !(self.block - 1);
        (start, request.end().next_multiple_of(self.block) - start)
    }

    fn bounce(&self, request: Request) {
        let start = request.offset & !(self.block - 1);
        self.bounce_chunk(Bounced { request, start, len: 0, step: Step::ReadAll, edges: SmallVec::new() });
    }

    /// Goes on behind the chunk that was done last.
    fn bounce_chunk(&self, mut bounced: Bounced) {
        let start = bounced.start + bounced.len;
        let end = bounced.request.end().next_multiple_of(self.block);
        if start == end {
            return bounced.request.complete(Ok(()));
        }
        let len = CHUNK.min(end - start);
        let Some(buffer) = self.buffer(len as usize) else { return self.starve(bounced) };
        let mut memory = Memory::from_buffer(buffer, len as usize);
        let request = &bounced.request;
        let whole = request.offset <= start && start + len <= request.end();
        let (step, op) = match request.op {
            Op::Read => (Step::ReadAll, Op::Read),
            Op::Write { .. } if whole => (Step::Write, request.op),
            _ => (Step::ReadForWrite, Op::Read),
        };
        if step == Step::Write {
            lay_over(request, &mut memory, start);
        }
        (bounced.start, bounced.len, bounced.step) = (start, len, step);
        self.pass(bounced, op, Payload::Memory(memory));
    }

    /// One request may always go on: the buffers may all be held by requests that wait here for another.
    fn buffer(&self, len: usize) -> Option<Buffer> {
        let pool = self.reactor.buffers();
        let alone = self.bounced.borrow().is_empty();
        pool.try_get(len).or_else(|| if alone { pool.get_beyond_budget(len) } else { None })
    }

    /// Sends the span below; the completion comes back under the slot's key.
    fn pass(&self, bounced: Bounced, op: Op, payload: Payload) {
        let (start, len, arrived) = (bounced.start, bounced.len, bounced.request.arrived);
        let token = self.bounced.borrow_mut().insert(bounced) as u64;
        self.below.submit(Request::new(op, start, len, payload, arrived, &self.completions, token));
    }

    fn starve(&self, bounced: Bounced) {
        self.starved.borrow_mut().push(bounced);
        if !self.waiting_for_buffers.replace(true) {
            let (reactor, id) = (self.reactor.clone(), self.id);
            self.reactor.buffers().on_free(Box::new(move || reactor.wake(id)));
        }
    }

    fn widen_status(&self, request: Request) {
        let (start, len) = self.span(&request);
        self.pass(Bounced { request, start, len, step: Step::Status, edges: SmallVec::new() }, Op::BlockStatus, Payload::None);
    }

    /// A discard or zeroing: first the whole blocks inside it, then, for zeroing, its ragged edges.
    fn split_edges(&self, request: Request) {
        let (from, to) = (request.offset, request.end());
        let (start, end) = (from.next_multiple_of(self.block), to & !(self.block - 1));
        let mut edges = SmallVec::new();
        if start > end {
            edges.push((from, to));
        } else {
            edges.extend([(from, start), (end, to)].into_iter().filter(|(from, to)| from < to));
        }
        if request.op == Op::Discard {
            edges.clear();
        }
        let op = request.op;
        let bounced = Bounced { request, start, len: end.saturating_sub(start), step: Step::Middle, edges };
        if bounced.len > 0 { self.pass(bounced, op, Payload::None) } else { self.next_edge(bounced) }
    }

    fn next_edge(&self, mut bounced: Bounced) {
        let Some((from, to)) = bounced.edges.pop() else { return bounced.request.complete(Ok(())) };
        let Some(buffer) = self.reactor.buffers().get_beyond_budget(self.block as usize) else {
            return bounced.request.complete(Err(Errno::ENOMEM));
        };
        bounced.start = from & !(self.block - 1);
        bounced.len = self.block;
        bounced.step = Step::ReadEdge { from, to };
        self.pass(bounced, Op::Read, Payload::Memory(Memory::from_buffer(buffer, self.block as usize)));
    }

    fn done(&self, completion: Completion) {
        let mut bounced = self.bounced.borrow_mut().remove(completion.token as usize);
        if let Err(errno) = completion.result {
            return bounced.request.complete(Err(errno));
        }
        match (bounced.step, completion.payload) {
            (Step::ReadAll, Payload::Memory(memory)) => {
                hand_out(&mut bounced.request, &memory, bounced.start);
                self.bounce_chunk(bounced);
            }
            (Step::ReadForWrite, Payload::Memory(mut memory)) => {
                lay_over(&bounced.request, &mut memory, bounced.start);
                bounced.step = Step::Write;
                let op = bounced.request.op;
                self.pass(bounced, op, Payload::Memory(memory));
            }
            (Step::ReadEdge { from, to }, Payload::Memory(mut memory)) => {
                let zeroes = [0; 4096];
                let mut at = from;
                while at < to {
                    let part = (to - at).min(zeroes.len() as u64);
                    memory.copy_from((at - bounced.start) as usize, &zeroes[..part as usize]);
                    at += part;
                }
                bounced.step = Step::Middle;
                self.pass(bounced, Op::Write { fua: false }, Payload::Memory(memory));
            }
            (Step::Status, Payload::Extents(extents)) => {
                let extents = trim_extents(extents, bounced.request.offset - bounced.start, bounced.request.len);
                bounced.request.complete_with(Ok(()), Payload::Extents(extents));
            }
            (Step::Middle, _) => self.next_edge(bounced),
            (_, _) => self.bounce_chunk(bounced),
        }
    }
}

impl Handler for Inner {
    fn completed(&self, _token: u32, _result: i32, _flags: u32) {}

    fn ready(&self) {
        while let Some(completion) = self.completions.pop() {
            self.done(completion);
        }
        if self.waiting_for_buffers.replace(false) {
            for bounced in std::mem::take(&mut *self.starved.borrow_mut()) {
                self.bounce_chunk(bounced);
            }
        }
    }
}

/// Copies those bytes of the write that lie in the span that begins at `start` to their place there.
fn lay_over(request: &Request, span: &mut Memory, start: u64) {
    let (in_request, in_span, len) = overlap(request, span, start);
    if let Some(source) = request.payload.memory() {
        span.copy_memory(in_span, source, in_request, len);
    }
}

/// Copies what the read asked for out of the span that begins at `start`.
fn hand_out(request: &mut Request, span: &Memory, start: u64) {
    let (in_request, in_span, len) = overlap(request, span, start);
    if let Some(target) = request.payload.memory_mut() {
        target.copy_memory(in_request, span, in_span, len);
    }
}

/// Where request and span share bytes: offset in the request, offset in the span, length.
fn overlap(request: &Request, span: &Memory, start: u64) -> (usize, usize, usize) {
    let from = request.offset.max(start);
    let to = request.end().min(start + span.len() as u64);
    ((from - request.offset) as usize, (from - start) as usize, (to - from) as usize)
}

fn trim_extents(extents: Vec<Extent>, mut skip: u64, mut len: u64) -> Vec<Extent> {
    let mut trimmed = Vec::with_capacity(extents.len());
    for extent in extents {
        let skipped = skip.min(extent.len);
        skip -= skipped;
        let part = (extent.len - skipped).min(len);
        len -= part;
        if part > 0 {
            trimmed.push(Extent { len: part, kind: extent.kind });
        }
    }
    trimmed
}
