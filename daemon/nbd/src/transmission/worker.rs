//! All NBD connections of one data-plane thread: one completion queue, one pool of reply batches, one place to wait for memory.
//!
//! A turn: the volume's completions become replies of their connections, and then each connection touched sends all it has in
//! one go.

use std::cell::{Cell, RefCell};
use std::collections::{HashMap, VecDeque};
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use blockdev::{CompletionQueue, Handler, HandlerId, Reactor};
use rustls::ServerConnection;
use slab::Slab;

use super::batch::BatchPool;
use super::connection::{Connection, Parts};
use super::request::Rules;
use super::session::{Session, SessionSetup};
use super::transport::{ReceiveBuffer, Tls, Transport};
use super::zeroes;
use crate::client::Client;
use crate::contexts::Context;
use crate::protocol::Headers;

const COMPLETIONS: usize = 1024;
const STALL_CHECK: Duration = Duration::from_secs(1);
/// While others wait for memory, a client that takes nothing, or does not send what it has begun, for this long loses its connection.
const STALL_MAX: Duration = Duration::from_secs(15);
const SEND_BUFFER: libc::c_int = 1 << 20;

/// A connection whose negotiation is done.
pub(crate) struct Negotiated {
    pub(crate) socket: OwnedFd,
    /// What was received beyond the negotiation, decrypted.
    pub(crate) early: Vec<u8>,
    pub(crate) tls: Option<Box<ServerConnection>>,
    pub(crate) headers: Headers,
    pub(crate) allocation_context: bool,
    pub(crate) contexts: Vec<Context>,
    pub(crate) client: Arc<Client>,
}

/// Told when a connection is gone; called on the data-plane thread.
pub(crate) type Gone = Arc<dyn Fn(u64) + Send + Sync>;

thread_local! {
    static WORKERS: RefCell<HashMap<u64, Rc<Worker>>> = RefCell::new(HashMap::new());
}

pub(crate) struct Worker {
    reactor: Rc<Reactor>,
    id: HandlerId,
    completions: Rc<CompletionQueue>,
    connections: RefCell<Slab<Rc<Connection>>>,
    batches: BatchPool,
    touched: RefCell<Vec<Rc<Connection>>>,
    starved: RefCell<VecDeque<usize>>,
    memory_came_back: Rc<Cell<bool>>,
    watching_memory: Cell<bool>,
    watching_stalls: Cell<bool>,
    gone: Gone,
}

impl Worker {
    /// The worker of the server `key` on the calling data-plane thread, made when first asked for.
    pub(crate) fn of_thread(key: u64, reactor: &Rc<Reactor>, gone: &Gone) -> Rc<Worker> {
        WORKERS.with(|workers| workers.borrow_mut().entry(key).or_insert_with(|| Worker::new(reactor, gone.clone())).clone())
    }

    /// The same, if there is one.
    pub(crate) fn existing(key: u64) -> Option<Rc<Worker>> {
        WORKERS.with(|workers| workers.borrow().get(&key).cloned())
    }

    /// Ends the calling thread's worker; its connections must be gone.
    pub(crate) fn remove(key: u64) {
        if let Some(worker) = WORKERS.with(|workers| workers.borrow_mut().remove(&key)) {
            worker.reactor.unregister(worker.id);
        }
    }

    fn new(reactor: &Rc<Reactor>, gone: Gone) -> Rc<Worker> {
        reactor.install(|id| Worker {
            reactor: reactor.clone(),
            id,
            completions: CompletionQueue::new(reactor, id, COMPLETIONS),
            connections: RefCell::new(Slab::new()),
            batches: BatchPool::default(),
            touched: RefCell::new(Vec::new()),
            starved: RefCell::new(VecDeque::new()),
            memory_came_back: Rc::new(Cell::new(false)),
            watching_memory: Cell::new(false),
            watching_stalls: Cell::new(false),
            gone,
        })
    }

    /// Serves a client from here on.
    pub(crate) fn adopt(self: &Rc<Self>, negotiated: Negotiated) {
        let client = negotiated.client.clone();
        if let Err(why) = self.try_adopt(negotiated) {
            tracing::warn!(client = client.id, export = client.export.name(), "cannot serve a client: {why}");
            (self.gone)(client.id);
        }
    }

    fn try_adopt(self: &Rc<Self>, negotiated: Negotiated) -> Result<(), String> {
        let Negotiated { socket, early, tls, headers, allocation_context, contexts, client } = negotiated;
        prepare_socket(&socket).map_err(|error| format!("preparing the socket: {error}"))?;
        let volume = client.export.volume();
        let queue = volume.queue(&self.reactor).map_err(|error| error.to_string())?;
        let input = ReceiveBuffer::new(self.reactor.buffers());
        let rules = Rules {
            headers,
            allocation_context,
            own_contexts: !contexts.is_empty(),
            read_only: client.export.is_read_only(),
            fast_zero: volume.capabilities().fast_zero,
        };
        let connection = {
            let mut connections = self.connections.borrow_mut();
            let entry = connections.vacant_entry();
            let index = entry.key();
            let session = Session::new(SessionSetup {
                rules,
                sends_zeroes: tls.is_none() && zeroes::can_be_sent(),
                contexts,
                client: client.clone(),
                stats: client.export.thread_stats(),
                queue,
                completions: self.completions.clone(),
                reactor: self.reactor.clone(),
                index: index as u32,
            });
            let transport = tls.map_or(Transport::Plain, |tls| Transport::Tls(Tls::new(*tls)));
            let (reactor, worker) = (self.reactor.clone(), Rc::downgrade(self));
            let connection = self.reactor.install(|id| {
                Connection::new(Parts { id, index, reactor, worker, socket, client, session, transport, early, input })
            });
            entry.insert(connection.clone());
            connection
        };
        connection.start();
        Ok(())
    }

    /// Has the client's connection answer what it has taken in, and close.
    pub(crate) fn drain(&self, client: u64) {
        let found = {
            let connections = self.connections.borrow();
            connections.iter().find(|(_, connection)| connection.client().id == client).map(|(_, found)| found.clone())
        };
        if let Some(connection) = found {
            connection.drain();
        }
    }

    pub(super) fn batches(&self) -> &BatchPool {
        &self.batches
    }

    /// The connection's `step` is called when a buffer has come back.
    pub(super) fn wait_for_memory(&self, connection: &Connection) {
        if connection.starved.replace(true) {
            return;
        }
        self.starved.borrow_mut().push_back(connection.index());
        if !self.watching_memory.replace(true) {
            let (reactor, id, came_back) = (Rc::downgrade(&self.reactor), self.id, self.memory_came_back.clone());
            self.reactor.buffers().on_free(Box::new(move || {
                came_back.set(true);
                if let Some(reactor) = reactor.upgrade() {
                    reactor.wake(id);
                }
            }));
        }
        if !self.watching_stalls.replace(true) {
            self.reactor.set_timer(self.id, self.reactor.now() + STALL_CHECK, 0);
        }
    }

    pub(super) fn forget(&self, index: usize) {
        let connection = self.connections.borrow_mut().remove(index);
        self.reactor.unregister(connection.id());
        (self.gone)(connection.client().id);
    }

    fn deliver(&self) {
        while let Some(completion) = self.completions.pop() {
            let (index, slot) = ((completion.token >> 32) as usize, completion.token as u32 as usize);
            let connections = self.connections.borrow();
            let connection = &connections[index];
            connection.complete(slot, completion);
            if !connection.touched.replace(true) {
                self.touched.borrow_mut().push(connection.clone());
            }
        }
        loop {
            let Some(connection) = self.touched.borrow_mut().pop() else { return };
            connection.touched.set(false);
            connection.step();
        }
    }

    fn feed_starved(&self) {
        if !self.memory_came_back.replace(false) {
            return;
        }
        self.watching_memory.set(false);
        let waiting = self.starved.borrow().len();
        for _ in 0..waiting {
            let Some(index) = self.starved.borrow_mut().pop_front() else { return };
            let connection = self.connections.borrow().get(index).cloned();
            if let Some(connection) = connection
                && connection.starved.replace(false)
            {
                connection.step();
            }
        }
    }

    fn worst_stalled(&self) -> Option<Rc<Connection>> {
        let now = self.reactor.now();
        let connections = self.connections.borrow();
        let stalled = connections.iter().filter_map(|(_, connection)| {
            let (since, held_len) = connection.stalled(now)?;
            (since >= STALL_MAX).then_some((held_len, connection))
        });
        stalled.max_by_key(|(held_len, _)| *held_len).map(|(_, connection)| connection.clone())
    }
}

impl Handler for Worker {
    fn completed(&self, _token: u32, _result: i32, _flags: u32) {}

    fn ready(&self) {
        self.deliver();
        self.feed_starved();
    }

    fn timer(&self, _token: u32) {
        self.watching_stalls.set(false);
        if self.starved.borrow().is_empty() {
            return;
        }
        if let Some(connection) = self.worst_stalled() {
            connection.abort("the client takes no replies, or sends no payload, while others wait for memory");
        }
        if !self.watching_stalls.replace(true) {
            self.reactor.set_timer(self.id, self.reactor.now() + STALL_CHECK, 0);
        }
    }
}

/// io_uring waits for a blocking socket by itself; large replies should fit into the socket at once; and a peer that vanished
/// without a word is noticed within two minutes.
fn prepare_socket(socket: &OwnedFd) -> io::Result<()> {
    zeroes::set_nonblocking(socket, false)?;
    // A kernel that grants less than wished for, or a unix socket that knows no keep-alive, is no error.
    let _ = set_option(socket, libc::SOL_SOCKET, libc::SO_SNDBUF, SEND_BUFFER);
    let keep_alive = [
        (libc::SOL_SOCKET, libc::SO_KEEPALIVE, 1),
        (libc::IPPROTO_TCP, libc::TCP_KEEPIDLE, 60),
        (libc::IPPROTO_TCP, libc::TCP_KEEPINTVL, 10),
        (libc::IPPROTO_TCP, libc::TCP_KEEPCNT, 6),
    ];
    for (level, name, value) in keep_alive {
        let _ = set_option(socket, level, name, value);
    }
    Ok(())
}

fn set_option(socket: &OwnedFd, level: libc::c_int, name: libc::c_int, value: libc::c_int) -> io::Result<()> {
    let len = size_of_val(&value) as libc::socklen_t;
    // SAFETY: the option's value is an integer that is live, of the length given.
    match unsafe { libc::setsockopt(socket.as_raw_fd(), level, name, (&raw const value).cast(), len) } {
        -1 => Err(io::Error::last_os_error()),
        _ => Ok(()),
    }
}
