//! Encrypts a device with AES-256-XTS, for raw volumes.
//!
//! ```text
//!   write   client's memory ──copy──▶ buffer ──encrypt in place──▶ device
//!   read    client's memory ◀──copy── buffer ◀──decrypt in place── device
//!   discard, zeroing, block status        ──── as they are ───▶ device
//! ```
//!
//! A data unit has 4096 bytes and the number of its place. One whose *stored* bytes are all zeroes was never written, or was discarded or zeroed, and reads as
//! zeroes; no content encrypts to that, but for one in 2^32768. So holes stay holes, and what the device says of them is true.
//!
//! Invariants: neither plain text nor what is stored is ever in memory that its counterpart may see: the client's memory never holds stored bytes, the device is
//! never given the client's. Requests are whole data units; the layer above makes them so.

use std::cell::{Cell, RefCell};
use std::rc::Rc;
use std::sync::Arc;

use slab::Slab;
use zeroize::Zeroizing;

use crate::buffer::Buffer;
use crate::device::{BlockDevice, Capabilities, DeviceError, Geometry, IoQueue};
use crate::layers::xts::{XTS_KEY_LEN, Xts};
use crate::memory::Memory;
use crate::reactor::{Handler, HandlerId, Reactor, ReactorHandle};
use crate::request::{Completion, CompletionQueue, Op, Payload, Request};

/// Bytes that are encrypted under one number.
pub const DATA_UNIT: usize = 4096;
/// The most that goes through one buffer.
const CHUNK: u64 = 1 << 20;
const AES_BLOCK: usize = 16;

/// The layer.
pub struct Encrypted {
    below: Arc<dyn BlockDevice>,
    key: Zeroizing<[u8; XTS_KEY_LEN]>,
}

impl Encrypted {
    /// `key`: both keys of XTS, joined. The device is one that was written through this layer with this key, or reads as zeroes.
    ///
    /// # Errors
    /// If the device's size is no multiple of 4096 bytes.
    pub fn new(below: Arc<dyn BlockDevice>, key: Zeroizing<[u8; XTS_KEY_LEN]>) -> Result<Encrypted, DeviceError> {
        check_size(below.geometry().size)?;
        Ok(Encrypted { below, key })
    }
}

fn check_size(size: u64) -> Result<(), DeviceError> {
    if size.is_multiple_of(DATA_UNIT as u64) {
        return Ok(());
    }
    let why = format!("a size of {size} bytes is not possible on an encrypted volume: choose a multiple of {DATA_UNIT}");
    Err(DeviceError::Unsupported(why))
}

impl BlockDevice for Encrypted {
    fn geometry(&self) -> Geometry {
        let below = self.below.geometry();
        let unit = DATA_UNIT as u32;
        Geometry {
            size: below.size / DATA_UNIT as u64 * DATA_UNIT as u64,
            block_size: below.block_size.max(unit),
            memory_alignment: 1,
            preferred_size: below.preferred_size.max(unit),
            discard_granularity: below.discard_granularity.max(unit),
        }
    }

    fn capabilities(&self) -> Capabilities {
        self.below.capabilities()
    }

    fn open_queue(&self, reactor: &Rc<Reactor>) -> Result<Box<dyn IoQueue>, DeviceError> {
        let below = self.below.open_queue(reactor)?;
        let unusable = || DeviceError::Refused("the key of an encrypted volume cannot be used by AES-XTS".to_owned());
        let cipher = Xts::new(&self.key).ok_or_else(unusable)?;
        Ok(Box::new(EncryptedQueue(reactor.install(|id| Inner {
            below,
            cipher: RefCell::new(cipher),
            reactor: reactor.clone(),
            id,
            completions: CompletionQueue::new(reactor, id, 16),
            running: RefCell::new(Slab::new()),
            starved: RefCell::new(Vec::new()),
            waiting_for_buffers: Cell::new(false),
        }))))
    }

    fn resize(&self, size: u64) -> Result<(), DeviceError> {
        check_size(size)?;
        self.below.resize(size)
    }

    fn refresh_size(&self) -> Result<u64, DeviceError> {
        self.below.refresh_size()?;
        Ok(self.geometry().size)
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

struct EncryptedQueue(Rc<Inner>);

struct Inner {
    below: Box<dyn IoQueue>,
    cipher: RefCell<Xts>,
    reactor: Rc<Reactor>,
    id: HandlerId,
    completions: Rc<CompletionQueue>,
    running: RefCell<Slab<Running>>,
    starved: RefCell<Vec<Running>>,
    waiting_for_buffers: Cell<bool>,
}

/// A read or write, a chunk at a time.
struct Running {
    request: Request,
    /// Bytes of the request before the chunk that is under way.
    done: u64,
    /// Of that chunk.
    len: u64,
}

impl IoQueue for EncryptedQueue {
    fn submit(&self, request: Request) {
        match request.op {
            Op::Read | Op::Write { .. } => self.0.next_chunk(Running { request, done: 0, len: 0 }),
            _ => self.0.below.submit(request),
        }
    }
}

impl Drop for EncryptedQueue {
    fn drop(&mut self) {
        self.0.reactor.unregister(self.0.id);
    }
}

impl Inner {
    fn next_chunk(&self, mut running: Running) {
        let done = running.done + running.len;
        let len = CHUNK.min(running.request.len - done);
        if len == 0 {
            return running.request.complete(Ok(()));
        }
        let Some(buffer) = self.buffer(len as usize) else { return self.starve(running) };
        (running.done, running.len) = (done, len);
        let mut memory = Memory::from_buffer(buffer, len as usize);
        let (op, offset, arrived) = (running.request.op, running.request.offset + done, running.request.arrived);
        if let (Op::Write { .. }, Some(source)) = (op, running.request.payload.memory()) {
            memory.copy_memory(0, source, done as usize, len as usize);
            self.encrypt(&mut memory, offset);
        }
        let token = self.running.borrow_mut().insert(running) as u64;
        self.below.submit(Request::new(op, offset, len, Payload::Memory(memory), arrived, &self.completions, token));
    }

    /// One request may always go on: the buffers may all be held by requests that wait here for another.
    fn buffer(&self, len: usize) -> Option<Buffer> {
        let pool = self.reactor.buffers();
        let alone = self.running.borrow().is_empty();
        pool.try_get(len).or_else(|| if alone { pool.get_beyond_budget(len) } else { None })
    }

    fn starve(&self, running: Running) {
        self.starved.borrow_mut().push(running);
        if !self.waiting_for_buffers.replace(true) {
            let (reactor, id) = (self.reactor.clone(), self.id);
            self.reactor.buffers().on_free(Box::new(move || reactor.wake(id)));
        }
    }

    fn done(&self, completion: Completion) {
        let mut running = self.running.borrow_mut().remove(completion.token as usize);
        if let Err(errno) = completion.result {
            return running.request.complete(Err(errno));
        }
        if let (Op::Read, Payload::Memory(mut memory)) = (running.request.op, completion.payload) {
            self.decrypt(&mut memory, running.request.offset + running.done);
            if let Some(target) = running.request.payload.memory_mut() {
                target.copy_memory(running.done as usize, &memory, 0, running.len as usize);
            }
        }
        self.next_chunk(running);
    }

    fn encrypt(&self, memory: &mut Memory, offset: u64) {
        let mut cipher = self.cipher.borrow_mut();
        for (at, unit) in units(memory.len(), offset) {
            cipher.encrypt(memory, at, DATA_UNIT, unit);
        }
    }

    fn decrypt(&self, memory: &mut Memory, offset: u64) {
        let mut cipher = self.cipher.borrow_mut();
        for (at, unit) in units(memory.len(), offset) {
            if !is_zero(memory, at) {
                cipher.decrypt(memory, at, DATA_UNIT, unit);
            }
        }
    }
}

/// Where each data unit begins in the memory of a request at `offset`, and its number.
fn units(len: usize, offset: u64) -> impl Iterator<Item = (usize, u64)> {
    (0..len).step_by(DATA_UNIT).zip(offset / DATA_UNIT as u64..)
}

/// Whether a stored data unit was never written.
fn is_zero(memory: &Memory, at: usize) -> bool {
    let mut first = [0; AES_BLOCK];
    memory.copy_to(at, &mut first);
    if first != [0; AES_BLOCK] {
        return false;
    }
    let mut unit = [0; DATA_UNIT];
    memory.copy_to(at, &mut unit);
    unit == [0; DATA_UNIT]
}

impl Handler for Inner {
    fn completed(&self, _token: u32, _result: i32, _flags: u32) {}

    fn ready(&self) {
        while let Some(completion) = self.completions.pop() {
            self.done(completion);
        }
        if self.waiting_for_buffers.replace(false) {
            for running in std::mem::take(&mut *self.starved.borrow_mut()) {
                self.next_chunk(running);
            }
        }
    }
}
