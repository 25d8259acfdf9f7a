//! One thread's queue of a mapped volume: requests go to the engine's thread, results come back.

use std::cell::RefCell;
use std::collections::HashMap;
use std::rc::Rc;
use std::sync::Arc;

use blockdev::{Completer, Errno, Extent, Handler, HandlerId, IoQueue, Op, Payload, Reactor, ReactorHandle, Request};
use bytes::Bytes;
use parking_lot::Mutex;
use slab::Slab;

/// A request on its way to the engine.
pub(super) struct Job {
    pub(super) op: Op,
    pub(super) offset: u64,
    pub(super) len: u64,
    /// Of a write.
    pub(super) bytes: Bytes,
    pub(super) reply: Reply,
}

/// What a request found.
pub(super) enum Found {
    Nothing,
    Bytes(Vec<u8>),
    Extents(Vec<Extent>),
}

type FoundByToken = Arc<Mutex<HashMap<u32, Found>>>;

/// The duty to answer one request. Dropped unanswered, it fails with EIO.
pub(super) struct Reply {
    to: ReactorHandle,
    queue: HandlerId,
    token: u32,
    found: FoundByToken,
    is_given: bool,
}

impl Reply {
    pub(super) fn give(mut self, result: Result<Found, Errno>) {
        self.is_given = true;
        let number = match result {
            Ok(Found::Nothing) => 0,
            Ok(found) => {
                self.found.lock().insert(self.token, found);
                0
            }
            Err(errno) => -errno.raw(),
        };
        self.to.post(self.queue, self.token, number);
    }
}

impl Drop for Reply {
    fn drop(&mut self) {
        if !self.is_given {
            self.to.post(self.queue, self.token, -Errno::EIO.raw());
        }
    }
}

pub(super) struct MappedQueue {
    inner: Rc<Inner>,
}

struct Inner {
    reactor: Rc<Reactor>,
    id: HandlerId,
    home: ReactorHandle,
    engine: u64,
    waiting: RefCell<Slab<(Payload, Completer)>>,
    found: FoundByToken,
}

impl MappedQueue {
    pub(super) fn new(reactor: &Rc<Reactor>, home: ReactorHandle, engine: u64) -> MappedQueue {
        let inner = reactor.install(|id| Inner {
            reactor: reactor.clone(),
            id,
            home,
            engine,
            waiting: RefCell::default(),
            found: Arc::default(),
        });
        MappedQueue { inner }
    }
}

impl IoQueue for MappedQueue {
    fn submit(&self, request: Request) {
        let inner = &self.inner;
        let (op, offset, len) = (request.op, request.offset, request.len);
        let (payload, completer) = request.into_parts();
        let mut bytes = Bytes::new();
        if let (Op::Write { .. }, Some(memory)) = (op, payload.memory()) {
            let mut copy = vec![0; memory.len()];
            memory.copy_to(0, &mut copy);
            bytes = copy.into();
        }
        let token = inner.waiting.borrow_mut().insert((payload, completer)) as u32;
        let reply = Reply { to: inner.reactor.handle(), queue: inner.id, token, found: inner.found.clone(), is_given: false };
        let (engine, job) = (inner.engine, Job { op, offset, len, bytes, reply });
        inner.home.spawn(move |_| super::engine::carry_out(engine, job));
    }
}

impl Drop for MappedQueue {
    fn drop(&mut self) {
        self.inner.reactor.unregister(self.inner.id);
    }
}

impl Handler for Inner {
    fn completed(&self, token: u32, result: i32, _flags: u32) {
        let Some((mut payload, completer)) = self.waiting.borrow_mut().try_remove(token as usize) else { return };
        let found = self.found.lock().remove(&token);
        if result < 0 {
            return completer.complete(Err(Errno::from_raw(-result)), payload);
        }
        match (found, payload.memory_mut()) {
            (Some(Found::Bytes(bytes)), Some(memory)) => memory.copy_from(0, &bytes),
            (Some(Found::Extents(extents)), _) => payload = Payload::Extents(extents),
            _ => {}
        }
        completer.complete(Ok(()), payload);
    }

    fn ready(&self) {}
}
