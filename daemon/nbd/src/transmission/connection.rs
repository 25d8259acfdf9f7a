//! One connection in its transmission phase, on the thread where it stays until it is closed.
//!
//! ```text
//!   Open ──DISC, end of input, drain()──▶ Draining ──all answered and sent──▶ Closing ──kernel operations ended──▶ gone
//!     └────protocol violation, socket error──────────────────────────────────────▲
//! ```
//!
//! Invariants: at most one receive and one send are with the kernel; what they point to is kept by `State` until they complete,
//! and the connection is not forgotten before that, nor before the volume has completed every request.

use std::cell::{Cell, RefCell};
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::rc::{Rc, Weak};
use std::sync::Arc;
use std::time::{Duration, Instant};

use blockdev::{Completion, Handler, HandlerId, Reactor};
use io_uring::{opcode, types};

use super::batch::Batch;
use super::session::{Blocked, Ended, Session};
use super::transport::{RECEIVE_LARGE, RECEIVE_SMALL, ReceiveBuffer, Transport};
use super::worker::Worker;
use super::zeroes::{self, Sent};
use crate::client::Client;

const RECEIVE: u32 = 0;
const SEND: u32 = 1;
const WRITABLE: u32 = libc::POLLOUT as u32;
const DRAIN_TIMER: u32 = 0;
const SHRINK_TIMER: u32 = 1;
const PREFETCH_TIMER: u32 = 2;
/// A connection that is being closed may take its last replies as long as it takes some of them in this time...
const DRAIN_STEP: Duration = Duration::from_secs(5);
/// ... and is not at it for longer than this.
const DRAIN_MAX: Duration = Duration::from_secs(60);
/// After this long without work a large receive buffer is given back.
const SHRINK_AFTER: Duration = Duration::from_secs(2);

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Phase {
    Open,
    Draining,
    Closing,
}

/// Where the receive that is with the kernel puts its bytes.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Receiving {
    No,
    ToBuffer(usize),
    ToPayload,
}

struct State {
    phase: Phase,
    session: Session,
    transport: Transport,
    /// Bytes that came with the negotiation, before anything that is received here.
    early: Vec<u8>,
    input: ReceiveBuffer,
    receiving: Receiving,
    wants_large: bool,
    after_direct: bool,
    sending: bool,
    /// What is with the kernel sends nothing; it completes when the socket is writable.
    awaiting_writable: bool,
    batch: Option<Box<Batch>>,
    sending_since: Instant,
    /// The client has taken something since this was looked at.
    takes: bool,
    drain_until: Option<Instant>,
    shut_down: bool,
    worked: bool,
    /// A timer is set that goes on with CACHE requests.
    prefetch_due: bool,
}

pub(super) struct Connection {
    id: HandlerId,
    index: usize,
    reactor: Rc<Reactor>,
    worker: Weak<Worker>,
    socket: OwnedFd,
    client: Arc<Client>,
    /// It stands in the worker's list of connections to look after in this turn.
    pub(super) touched: Cell<bool>,
    /// It stands in the worker's list of connections that wait for memory.
    pub(super) starved: Cell<bool>,
    state: RefCell<State>,
}

/// What a connection is made of.
pub(super) struct Parts {
    pub(super) id: HandlerId,
    pub(super) index: usize,
    pub(super) reactor: Rc<Reactor>,
    pub(super) worker: Weak<Worker>,
    pub(super) socket: OwnedFd,
    pub(super) client: Arc<Client>,
    pub(super) session: Session,
    pub(super) transport: Transport,
    pub(super) early: Vec<u8>,
    pub(super) input: ReceiveBuffer,
}

impl Connection {
    pub(super) fn new(parts: Parts) -> Connection {
        let now = parts.reactor.now();
        Connection {
            id: parts.id,
            index: parts.index,
            reactor: parts.reactor,
            worker: parts.worker,
            socket: parts.socket,
            client: parts.client,
            touched: Cell::new(false),
            starved: Cell::new(false),
            state: RefCell::new(State {
                phase: Phase::Open,
                session: parts.session,
                transport: parts.transport,
                early: parts.early,
                input: parts.input,
                receiving: Receiving::No,
                wants_large: false,
                after_direct: false,
                sending: false,
                awaiting_writable: false,
                batch: None,
                sending_since: now,
                takes: false,
                drain_until: None,
                shut_down: false,
                worked: false,
                prefetch_due: false,
            }),
        }
    }

    pub(super) fn id(&self) -> HandlerId {
        self.id
    }

    pub(super) fn index(&self) -> usize {
        self.index
    }

    pub(super) fn client(&self) -> &Arc<Client> {
        &self.client
    }

    /// Begins to serve.
    pub(super) fn start(&self) {
        self.step();
    }

    /// A request was completed; [`Connection::step`] follows in the same turn.
    pub(super) fn complete(&self, slot: usize, completion: Completion) {
        let mut state = self.state.borrow_mut();
        let Some(worker) = self.worker.upgrade() else { return };
        let batches = (state.phase != Phase::Closing).then_some(worker.batches());
        state.session.complete(slot, completion, batches);
    }

    /// Takes no more requests, answers those it has, and closes.
    pub(super) fn drain(&self) {
        self.begin_drain(&mut self.state.borrow_mut());
        self.step();
    }

    /// How long the client has kept its buffers busy by not taking what is sent to it, or by not sending what it has begun; and how
    /// many bytes these are.
    pub(super) fn stalled(&self, now: Instant) -> Option<(Duration, usize)> {
        let state = self.state.borrow();
        let sending = state.sending.then(|| now.saturating_duration_since(state.sending_since));
        let since = sending.max(state.session.payload_overdue(now))?;
        Some((since, state.session.held_len()))
    }

    /// Closes without regard to what was not sent yet.
    pub(super) fn abort(&self, why: &str) {
        self.fail(&mut self.state.borrow_mut(), why);
        self.step();
    }

    fn begin_drain(&self, state: &mut State) {
        if state.phase == Phase::Open {
            state.phase = Phase::Draining;
            let now = self.reactor.now();
            state.drain_until = Some(now + DRAIN_MAX);
            self.reactor.set_timer(self.id, now + DRAIN_STEP, DRAIN_TIMER);
            if state.receiving != Receiving::No {
                self.reactor.cancel(self.id, RECEIVE);
            }
            let worker = self.worker.upgrade();
            state.session.end_prefetching(worker.as_ref().map(|worker| worker.batches()));
        }
    }

    fn fail(&self, state: &mut State, why: &str) {
        if state.phase != Phase::Closing {
            tracing::info!(client = self.client.id, export = self.client.export.name(), "closing: {why}");
            state.phase = Phase::Closing;
        }
    }

    /// Does whatever can be done now: takes input, sends replies, closes. Called at the end of each event.
    pub(super) fn step(&self) {
        let state = &mut *self.state.borrow_mut();
        if state.phase == Phase::Open && state.receiving == Receiving::No {
            self.take_input(state);
        }
        if state.session.wants_to_prefetch() && !std::mem::replace(&mut state.prefetch_due, true) {
            self.reactor.set_timer(self.id, self.reactor.now(), PREFETCH_TIMER);
        }
        if state.phase != Phase::Closing && !state.sending {
            self.send(state);
        }
        if state.phase == Phase::Draining && !state.sending && state.session.is_idle() && state.receiving == Receiving::No {
            state.transport.say_goodbye();
            self.send(state);
            if !state.sending {
                state.phase = Phase::Closing;
            }
        }
        if state.phase == Phase::Closing {
            self.close(state);
        }
    }

    fn take_input(&self, state: &mut State) {
        let Some(worker) = self.worker.upgrade() else { return };
        let mut blocked = None;
        if !state.early.is_empty() {
            let (taken, why) = state.session.feed(&state.early, worker.batches());
            state.early.drain(..taken);
            blocked = why;
        }
        if blocked.is_none() {
            match state.transport.feed(&mut state.input, &mut state.session, worker.batches()) {
                Ok(why) => blocked = why,
                Err(error) => return self.fail(state, &error.to_string()),
            }
        }
        match (state.session.ended(), blocked) {
            (Some(Ended::Disconnected), _) => self.begin_drain(state),
            (Some(Ended::Violation(what)), _) => {
                let what = what.clone();
                self.fail(state, &what);
            }
            (None, Some(Blocked::Memory)) => worker.wait_for_memory(self),
            (None, Some(Blocked::Replies)) => {}
            (None, None) => self.receive(state),
        }
    }

    fn receive(&self, state: &mut State) {
        let fd = types::Fd(self.socket.as_raw_fd());
        let direct = if state.transport.is_direct() { state.session.direct_target() } else { None };
        let entry = match direct {
            Some((target, len)) => {
                state.receiving = Receiving::ToPayload;
                state.after_direct = true;
                opcode::Recv::new(fd, target, len as u32).flags(libc::MSG_WAITALL).build()
            }
            None => {
                self.fit_input(state);
                let (target, len) = state.input.target(state.after_direct);
                state.receiving = Receiving::ToBuffer(len);
                state.after_direct = false;
                opcode::Recv::new(fd, target, len as u32).build()
            }
        };
        // SAFETY: the target is a buffer in `state`, which touches it again, or drops it, only after this operation has completed.
        unsafe { self.reactor.submit(self.id, RECEIVE, entry) };
    }

    /// Takes a large receive buffer for a client that keeps filling the small one, and gives it back when it no longer does.
    fn fit_input(&self, state: &mut State) {
        match (state.wants_large, state.input.is_large()) {
            (true, false) => {
                state.input.resize(self.reactor.buffers(), RECEIVE_LARGE);
                self.reactor.set_timer(self.id, self.reactor.now() + SHRINK_AFTER, SHRINK_TIMER);
            }
            (false, true) => state.input.resize(self.reactor.buffers(), RECEIVE_SMALL),
            _ => {}
        }
    }

    fn received(&self, state: &mut State, result: i32) {
        let receiving = std::mem::replace(&mut state.receiving, Receiving::No);
        if state.phase != Phase::Open {
            return;
        }
        match (result, receiving) {
            (1.., Receiving::ToBuffer(asked)) => {
                state.worked = true;
                state.wants_large |= result as usize == asked && asked == RECEIVE_SMALL;
                state.input.received(result as usize);
            }
            (1.., _) => {
                state.worked = true;
                state.session.payload_filled(result as usize);
            }
            (0, _) => self.begin_drain(state),
            _ if retryable(result) => {}
            _ => self.fail(state, &io::Error::from_raw_os_error(-result).to_string()),
        }
    }

    /// Hands the next replies to the kernel; nothing must be in flight.
    fn send(&self, state: &mut State) {
        if state.batch.is_none() {
            state.batch = state.session.take_replies();
        }
        let fd = types::Fd(self.socket.as_raw_fd());
        let entry = match state.batch.as_deref_mut() {
            Some(batch) if batch.has_zeroes() => self.send_now(state).then(|| opcode::PollAdd::new(fd, WRITABLE).build()),
            batch => state.transport.send_entry(fd, batch),
        };
        let Some(entry) = entry else { return };
        state.sending = true;
        state.sending_since = self.reactor.now();
        // SAFETY: the entry points into the batch or the transport's buffer, both in `state` and unchanged until it has completed.
        unsafe { self.reactor.submit(self.id, SEND, entry) };
    }

    /// Sends what the socket takes of a batch with runs of zeroes; true if the rest waits until it takes more.
    fn send_now(&self, state: &mut State) -> bool {
        let Some(batch) = state.batch.as_deref_mut() else { return false };
        match zeroes::send(&self.socket, batch) {
            Ok(Sent::Partly) => state.awaiting_writable = true,
            Ok(Sent::Whole) => {
                self.give_back(state);
                self.reactor.wake(self.id);
            }
            Err(error) => {
                self.give_back(state);
                self.fail(state, &format!("sending: {error}"));
            }
        }
        state.awaiting_writable
    }

    fn sent(&self, state: &mut State, result: i32) {
        state.sending = false;
        state.takes |= result > 0;
        if std::mem::take(&mut state.awaiting_writable) && result >= 0 {
            return;
        }
        match result {
            0.. if state.phase != Phase::Closing => {
                if state.transport.sent(state.batch.as_deref_mut(), result as usize) {
                    self.give_back(state);
                }
            }
            _ if retryable(result) && state.phase != Phase::Closing => {}
            _ => {
                self.give_back(state);
                self.fail(state, &format!("sending: {}", io::Error::from_raw_os_error(result.min(0).saturating_neg())));
            }
        }
    }

    fn give_back(&self, state: &mut State) {
        if let Some(batch) = state.batch.take() {
            state.session.replies_done(&batch);
            if let Some(worker) = self.worker.upgrade() {
                worker.batches().give_back(batch);
            }
        }
    }

    /// Ends what is with the kernel, and leaves when nothing is outstanding.
    fn close(&self, state: &mut State) {
        if !std::mem::replace(&mut state.shut_down, true) {
            // SAFETY: a system call without pointers on a descriptor that `self` owns.
            unsafe { libc::shutdown(self.socket.as_raw_fd(), libc::SHUT_RDWR) };
            if state.receiving != Receiving::No {
                self.reactor.cancel(self.id, RECEIVE);
            }
            if state.sending {
                self.reactor.cancel(self.id, SEND);
            }
            state.session.end_prefetching(None);
        }
        if state.receiving == Receiving::No && !state.sending && state.session.is_idle() {
            self.give_back(state);
            if let Some(batch) = state.session.take_replies() {
                state.batch = Some(batch);
                self.give_back(state);
            }
            if let Some(worker) = self.worker.upgrade() {
                worker.forget(self.index);
            }
        }
    }
}

fn retryable(result: i32) -> bool {
    matches!(-result, libc::EINTR | libc::EAGAIN | libc::ECANCELED)
}

impl Handler for Connection {
    fn completed(&self, token: u32, result: i32, _flags: u32) {
        {
            let state = &mut *self.state.borrow_mut();
            match token {
                RECEIVE => self.received(state, result),
                _ => self.sent(state, result),
            }
        }
        self.step();
    }

    fn ready(&self) {
        self.step();
    }

    fn timer(&self, token: u32) {
        let state = &mut *self.state.borrow_mut();
        match token {
            PREFETCH_TIMER => {
                state.prefetch_due = false;
                let blocked = state.session.go_on_prefetching().err();
                if let Some(worker) = self.worker.upgrade().filter(|_| blocked == Some(Blocked::Memory)) {
                    worker.wait_for_memory(self);
                }
            }
            DRAIN_TIMER if state.phase == Phase::Draining => {
                let now = self.reactor.now();
                let takes = std::mem::take(&mut state.takes) && state.drain_until.is_some_and(|until| now < until);
                if state.session.is_idle() && !takes {
                    self.fail(state, "the client does not take its last replies");
                    self.close(state);
                } else {
                    self.reactor.set_timer(self.id, now + DRAIN_STEP, DRAIN_TIMER);
                }
            }
            SHRINK_TIMER if state.phase == Phase::Open && state.input.is_large() => {
                if std::mem::take(&mut state.worked) || !matches!(state.receiving, Receiving::ToBuffer(_)) {
                    self.reactor.set_timer(self.id, self.reactor.now() + SHRINK_AFTER, SHRINK_TIMER);
                } else {
                    state.wants_large = false;
                    self.reactor.cancel(self.id, RECEIVE);
                }
            }
            _ => {}
        }
    }
}
