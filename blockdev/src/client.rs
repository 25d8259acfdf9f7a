//! Requests from outside the data plane: imports, checks, tests.
//!
//! A [`Client`] may be used from any thread. Each call travels to a data-plane thread, is carried out there like a front end's
//! request, and comes back through a callback or a blocking wait.

use std::cell::RefCell;
use std::rc::{Rc, Weak};
use std::sync::Arc;
use std::sync::mpsc;

use slab::Slab;

use crate::device::DeviceError;
use crate::errno::Errno;
use crate::memory::Memory;
use crate::reactor::{Handler, HandlerId, Reactor, ReactorHandle};
use crate::request::{Completion, CompletionQueue, Extent, Op, Payload, Request};
use crate::volume::{Volume, VolumeQueue};

/// What came of a request.
#[derive(Debug)]
pub enum Answer {
    Done,
    /// Of a read.
    Bytes(Vec<u8>),
    /// Of a block status request.
    Extents(Vec<Extent>),
}

type Callback = Box<dyn FnOnce(Result<Answer, Errno>) + Send>;

/// A volume, reached through one data-plane thread.
#[derive(Clone)]
pub struct Client {
    reactor: ReactorHandle,
    key: Arc<Registration>,
}

struct Registration {
    reactor: ReactorHandle,
    id: HandlerId,
    volume: Arc<Volume>,
}

thread_local! {
    static CLIENTS: RefCell<Vec<(HandlerId, Weak<Inner>)>> = const { RefCell::new(Vec::new()) };
}

impl Client {
    /// Opens the volume on the thread behind `reactor`. Blocks; never call it from a data-plane thread.
    pub fn open(volume: &Arc<Volume>, reactor: &ReactorHandle) -> Result<Client, DeviceError> {
        let opened = volume.clone();
        let id = reactor
            .call(move |reactor| Inner::open(&opened, reactor))
            .ok_or_else(|| DeviceError::Refused("the data plane has stopped".into()))??;
        let key = Arc::new(Registration { reactor: reactor.clone(), id, volume: volume.clone() });
        Ok(Client { reactor: reactor.clone(), key })
    }

    pub fn volume(&self) -> &Arc<Volume> {
        &self.key.volume
    }

    /// Carries out `op`. `data`: the bytes of a write, else empty. `done` is called on the data-plane thread and must not block.
    pub fn submit(
        &self,
        op: Op,
        offset: u64,
        len: u64,
        data: Vec<u8>,
        done: impl FnOnce(Result<Answer, Errno>) + Send + 'static,
    ) {
        let key = self.key.clone();
        self.reactor.spawn(move |_| {
            let found = CLIENTS
                .with(|clients| clients.borrow().iter().find(|(id, _)| *id == key.id).and_then(|(_, inner)| inner.upgrade()));
            match found {
                Some(inner) => inner.submit(Waiting { op, done: Box::new(done), _key: key }, offset, len, &data),
                None => done(Err(Errno::ESHUTDOWN)),
            }
        });
    }

    /// Like [`Client::submit`], waiting for the answer. Never call it from a data-plane thread.
    pub fn run(&self, op: Op, offset: u64, len: u64, data: Vec<u8>) -> Result<Answer, Errno> {
        let (sender, receiver) = mpsc::sync_channel(1);
        self.submit(op, offset, len, data, move |answer| {
            let _ = sender.send(answer);
        });
        receiver.recv().unwrap_or(Err(Errno::ESHUTDOWN))
    }

    pub fn read(&self, offset: u64, len: u64) -> Result<Vec<u8>, Errno> {
        match self.run(Op::Read, offset, len, Vec::new())? {
            Answer::Bytes(bytes) => Ok(bytes),
            _ => Err(Errno::EIO),
        }
    }

    pub fn write(&self, offset: u64, data: Vec<u8>) -> Result<(), Errno> {
        let len = data.len() as u64;
        self.run(Op::Write { fua: false }, offset, len, data).map(drop)
    }

    pub fn flush(&self) -> Result<(), Errno> {
        self.run(Op::Flush, 0, 0, Vec::new()).map(drop)
    }

    /// What the range holds, from its start; may cover less than `len`.
    pub fn extents(&self, offset: u64, len: u64) -> Result<Vec<Extent>, Errno> {
        match self.run(Op::BlockStatus, offset, len, Vec::new())? {
            Answer::Extents(extents) => Ok(extents),
            _ => Err(Errno::EIO),
        }
    }
}

impl Drop for Registration {
    fn drop(&mut self) {
        let id = self.id;
        self.reactor.spawn(move |reactor| {
            CLIENTS.with(|clients| clients.borrow_mut().retain(|(other, _)| *other != id));
            reactor.unregister(id);
        });
    }
}

/// A request on its way; it keeps the client registered until it is answered.
struct Waiting {
    op: Op,
    done: Callback,
    _key: Arc<Registration>,
}

struct Inner {
    reactor: Rc<Reactor>,
    id: HandlerId,
    queue: Rc<VolumeQueue>,
    completions: Rc<CompletionQueue>,
    waiting: RefCell<Slab<Waiting>>,
}

impl Inner {
    fn open(volume: &Arc<Volume>, reactor: &Rc<Reactor>) -> Result<HandlerId, DeviceError> {
        let queue = volume.queue(reactor)?;
        let inner = reactor.install(|id| Inner {
            reactor: reactor.clone(),
            id,
            queue,
            completions: CompletionQueue::new(reactor, id, 16),
            waiting: RefCell::new(Slab::new()),
        });
        CLIENTS.with(|clients| clients.borrow_mut().push((inner.id, Rc::downgrade(&inner))));
        Ok(inner.id)
    }

    fn submit(&self, waiting: Waiting, offset: u64, len: u64, data: &[u8]) {
        let op = waiting.op;
        if matches!(op, Op::Write { .. }) && data.len() as u64 != len {
            return (waiting.done)(Err(Errno::EINVAL));
        }
        let payload = if matches!(op, Op::Read | Op::Write { .. }) {
            let Some(buffer) = self.reactor.buffers().try_get(len as usize) else {
                return (waiting.done)(Err(Errno::ENOMEM));
            };
            let mut memory = Memory::from_buffer(buffer, len as usize);
            memory.copy_from(0, data);
            Payload::Memory(memory)
        } else {
            Payload::None
        };
        let token = self.waiting.borrow_mut().insert(waiting) as u64;
        self.queue.submit(Request::new(op, offset, len, payload, self.reactor.now(), &self.completions, token));
    }

    fn done(&self, completion: Completion) {
        let Waiting { op, done, _key } = self.waiting.borrow_mut().remove(completion.token as usize);
        let answer = completion.result.map(|()| match completion.payload {
            Payload::Memory(memory) if op == Op::Read => {
                let mut bytes = vec![0; memory.len()];
                memory.copy_to(0, &mut bytes);
                Answer::Bytes(bytes)
            }
            Payload::Extents(extents) => Answer::Extents(extents),
            _ => Answer::Done,
        });
        done(answer);
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
