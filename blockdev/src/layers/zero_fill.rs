//! Writes zeroes where a device cannot make them itself.
//!
//! Also catches a device that says EOPNOTSUPP to one request (a file system without the needed call for this file).

use std::cell::RefCell;
use std::rc::Rc;
use std::sync::Arc;

use slab::Slab;

use crate::device::{BlockDevice, Capabilities, DeviceError, Geometry, IoQueue};
use crate::errno::Errno;
use crate::memory::Memory;
use crate::reactor::{Handler, HandlerId, Reactor, ReactorHandle};
use crate::request::{Completion, CompletionQueue, Op, Payload, Request};

const CHUNK: u64 = 1 << 20;
/// Where the buffers are spent.
const CHUNK_SMALL: u64 = 64 << 10;

/// The layer.
pub struct ZeroFill {
    below: Arc<dyn BlockDevice>,
}

impl ZeroFill {
    pub fn wrap(below: Arc<dyn BlockDevice>) -> ZeroFill {
        ZeroFill { below }
    }
}

impl BlockDevice for ZeroFill {
    fn geometry(&self) -> Geometry {
        self.below.geometry()
    }

    fn capabilities(&self) -> Capabilities {
        Capabilities { write_zeroes: true, ..self.below.capabilities() }
    }

    fn open_queue(&self, reactor: &Rc<Reactor>) -> Result<Box<dyn IoQueue>, DeviceError> {
        let below = self.below.open_queue(reactor)?;
        let native = self.below.capabilities().write_zeroes;
        Ok(Box::new(ZeroFillQueue(reactor.install(|id| Inner {
            below,
            native,
            reactor: reactor.clone(),
            id,
            completions: CompletionQueue::new(reactor, id, 16),
            running: RefCell::new(Slab::new()),
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

struct ZeroFillQueue(Rc<Inner>);

struct Inner {
    below: Box<dyn IoQueue>,
    native: bool,
    reactor: Rc<Reactor>,
    id: HandlerId,
    completions: Rc<CompletionQueue>,
    running: RefCell<Slab<Zeroing>>,
}

struct Zeroing {
    request: Request,
    /// Bytes from the start of the request that are zeroed or being written.
    done: u64,
    native: bool,
}

impl IoQueue for ZeroFillQueue {
    fn submit(&self, request: Request) {
        let Op::WriteZeroes { fast, .. } = request.op else { return self.0.below.submit(request) };
        if self.0.native {
            self.0.try_native(request);
        } else if fast {
            request.complete(Err(Errno::EOPNOTSUPP));
        } else {
            self.0.write_chunk(Zeroing { request, done: 0, native: false });
        }
    }
}

impl Drop for ZeroFillQueue {
    fn drop(&mut self) {
        self.0.reactor.unregister(self.0.id);
    }
}

impl Inner {
    fn try_native(&self, request: Request) {
        let (op, offset, len) = (request.op, request.offset, request.len);
        self.pass(Zeroing { request, done: 0, native: true }, op, offset, len, Payload::None);
    }

    fn pass(&self, zeroing: Zeroing, op: Op, offset: u64, len: u64, payload: Payload) {
        let arrived = zeroing.request.arrived;
        let token = self.running.borrow_mut().insert(zeroing) as u64;
        self.below.submit(Request::new(op, offset, len, payload, arrived, &self.completions, token));
    }

    fn write_chunk(&self, mut zeroing: Zeroing) {
        let left = zeroing.request.len - zeroing.done;
        if left == 0 {
            return zeroing.request.complete(Ok(()));
        }
        let pool = self.reactor.buffers();
        let (len, buffer) = match pool.try_get(left.min(CHUNK) as usize) {
            Some(buffer) => (left.min(CHUNK), Some(buffer)),
            None => (left.min(CHUNK_SMALL), pool.get_beyond_budget(left.min(CHUNK_SMALL) as usize)),
        };
        let Some(buffer) = buffer else { return zeroing.request.complete(Err(Errno::ENOMEM)) };
        let mut memory = Memory::from_buffer(buffer, len as usize);
        memory.fill(0);
        let offset = zeroing.request.offset + zeroing.done;
        zeroing.done += len;
        self.pass(zeroing, Op::Write { fua: false }, offset, len, Payload::Memory(memory));
    }

    fn done(&self, completion: Completion) {
        let mut zeroing = self.running.borrow_mut().remove(completion.token as usize);
        let fast = matches!(zeroing.request.op, Op::WriteZeroes { fast: true, .. });
        match completion.result {
            Err(Errno::EOPNOTSUPP) if zeroing.native && !fast => {
                zeroing.native = false;
                self.write_chunk(zeroing);
            }
            Ok(()) if !zeroing.native => self.write_chunk(zeroing),
            result => zeroing.request.complete(result),
        }
    }
}

impl Handler for Inner {
    fn completed(&self, _token: u32, _result: i32, _flags: u32) {}

    fn ready(&self) {
        while let Some(completion) = self.completions.pop() {
            self.done(completion);
        }
    }
}
