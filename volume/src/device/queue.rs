//! One thread's queue of a mapped volume: requests go to the engine, results come back.
//!
//! ```text
//!   on the engine's thread    submit ── Job ──────────────▶ engine ── Duty ──▶ completed
//!   on another one            submit ── Job ── spawn ─────▶ engine ── Reply ── post ──▶ Duty ──▶ completed
//! ```

use std::cell::RefCell;
use std::collections::HashMap;
use std::rc::Rc;
use std::sync::Arc;

use blockdev::{Completer, Errno, Extent, Handler, HandlerId, IoQueue, Op, Payload, Reactor, ReactorHandle, Request};
use bytes::Bytes;
use parking_lot::Mutex;
use slab::Slab;

use super::engine::carry_out;
use crate::names::Slot;

/// A request as the engine gets it.
pub(super) struct Job {
    /// Of which volume.
    pub(super) slot: Slot,
    pub(super) op: Op,
    pub(super) offset: u64,
    pub(super) len: u64,
    /// Of a write.
    pub(super) bytes: Bytes,
}

/// What a request found.
pub(super) enum Found {
    Nothing,
    Bytes(Vec<u8>),
    Extents(Vec<Extent>),
}

/// The duty to complete one request. Dropped, it completes with EIO.
struct Duty(Option<(Payload, Completer)>);

impl Duty {
    fn complete(mut self, result: Result<Found, Errno>) {
        let Some((mut payload, completer)) = self.0.take() else { return };
        let result = result.map(|found| match (found, payload.memory_mut()) {
            (Found::Bytes(bytes), Some(memory)) => memory.copy_from(0, &bytes),
            (Found::Extents(extents), _) => payload = Payload::Extents(extents),
            _ => {}
        });
        completer.complete(result, payload);
    }
}

impl Drop for Duty {
    fn drop(&mut self) {
        if let Some((payload, completer)) = self.0.take() {
            completer.complete(Err(Errno::EIO), payload);
        }
    }
}

type FoundByToken = Arc<Mutex<HashMap<u32, Found>>>;

/// The way of an answer back to the thread that asked. Dropped, it answers with EIO.
struct Reply {
    to: ReactorHandle,
    queue: HandlerId,
    token: u32,
    found: FoundByToken,
    is_given: bool,
}

impl Reply {
    fn give(mut self, result: Result<Found, Errno>) {
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
    is_home: bool,
    engine: u64,
    slot: Slot,
    waiting: RefCell<Slab<Duty>>,
    found: FoundByToken,
}

impl MappedQueue {
    pub(super) fn new(reactor: &Rc<Reactor>, home: ReactorHandle, (engine, slot): (u64, Slot)) -> MappedQueue {
        let inner = reactor.install(|id| Inner {
            reactor: reactor.clone(),
            id,
            is_home: reactor.handle().same_reactor(&home),
            home,
            engine,
            slot,
            waiting: RefCell::default(),
            found: Arc::default(),
        });
        MappedQueue { inner }
    }
}

impl IoQueue for MappedQueue {
    fn submit(&self, request: Request) {
        let (inner, engine) = (&self.inner, self.inner.engine);
        let (op, offset, len) = (request.op, request.offset, request.len);
        let (payload, completer) = request.into_parts();
        let bytes = match (op, payload.memory()) {
            (Op::Write { .. }, Some(memory)) => memory.to_vec().into(),
            _ => Bytes::new(),
        };
        let (job, duty) = (Job { slot: inner.slot, op, offset, len, bytes }, Duty(Some((payload, completer))));
        if inner.is_home {
            return carry_out(engine, job, move |found| duty.complete(found));
        }
        let token = inner.waiting.borrow_mut().insert(duty) as u32;
        let reply = Reply { to: inner.reactor.handle(), queue: inner.id, token, found: inner.found.clone(), is_given: false };
        inner.home.spawn(move |_| carry_out(engine, job, move |found| reply.give(found)));
    }
}

impl Drop for MappedQueue {
    fn drop(&mut self) {
        self.inner.reactor.unregister(self.inner.id);
    }
}

impl Handler for Inner {
    fn completed(&self, token: u32, result: i32, _flags: u32) {
        let duty = self.waiting.borrow_mut().try_remove(token as usize);
        let found = self.found.lock().remove(&token).unwrap_or(Found::Nothing);
        if let Some(duty) = duty {
            duty.complete(if result < 0 { Err(Errno::from_raw(-result)) } else { Ok(found) });
        }
    }

    fn ready(&self) {}
}
