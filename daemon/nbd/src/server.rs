//! The server: listeners on the control plane, connections on the data plane, and who is where.
//!
//! ```text
//!  listener task ─accept─▶ handshake task ─▶ Clients ─▶ Worker of the thread with the fewest clients
//!        ▲ at most `handshakes_max` at once                 │ gone
//!        └── closed by withdraw(), shutdown()               ▼
//!                                              Clients, and whoever waits for them to leave
//! ```

use std::collections::{HashMap, VecDeque};
use std::io;
use std::net::IpAddr;
use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Weak};
use std::time::{Duration, Instant};

use blockdev::{ReactorHandle, clock};
use parking_lot::Mutex;
use thiserror::Error;
use tokio::sync::{Notify, OwnedSemaphorePermit, Semaphore};
use tokio::task::{AbortHandle, JoinHandle};

use crate::client::{Client, ClientInfo};
use crate::contexts::Context;
use crate::export::{Export, ExportError, Identity, Serves, Table};
use crate::handshake::{self, Ready, Stream};
use crate::negotiation::Chosen;
use crate::protocol::Headers;
use crate::tls::TlsSettings;
use crate::transmission::{Gone, Negotiated, Worker};

/// The server's limits.
#[derive(Clone, Copy, Debug)]
pub struct ServerOptions {
    /// How long a client may take to choose an export.
    pub handshake_time_max: Duration,
    /// How many clients of one listener may be choosing at once; the oldest has to go for another after a second.
    pub handshakes_max: usize,
    /// How many clients may be attached at once; others are closed at once.
    pub clients_max: usize,
}

impl Default for ServerOptions {
    fn default() -> Self {
        ServerOptions { handshake_time_max: Duration::from_secs(30), handshakes_max: 128, clients_max: 16 << 10 }
    }
}

/// Why a listener is refused.
#[derive(Error, Debug)]
pub enum ListenError {
    #[error("listening on {0}, beyond this host, needs TLS: configure [tls], or listen on 127.0.0.1 or a unix socket")]
    NeedsTls(std::net::SocketAddr),
    #[error("cannot listen: {0}")]
    Io(#[from] io::Error),
}

/// A bound socket.
pub enum Socket {
    Unix(std::os::unix::net::UnixListener),
    Tcp(std::net::TcpListener),
}

/// Names a listener of a server.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct ListenerId(u64);

/// An NBD server. Cheap to clone; all clones are the same server.
#[derive(Clone)]
pub struct Server {
    shared: Arc<Shared>,
}

struct Shared {
    key: u64,
    options: ServerOptions,
    reactors: Vec<ReactorHandle>,
    table: Table,
    listeners: Mutex<HashMap<ListenerId, Listener>>,
    clients: Mutex<Clients>,
    client_left: Notify,
    stopping: AtomicBool,
    gone: Gone,
}

struct Clients {
    by_id: HashMap<u64, Arc<Client>>,
    /// How many live on each data-plane thread.
    on_thread: Vec<usize>,
}

struct Listener {
    serves: Serves,
    task: JoinHandle<()>,
}

static NEXT_ID: AtomicU64 = AtomicU64::new(1);

fn next_id() -> u64 {
    NEXT_ID.fetch_add(1, Ordering::Relaxed)
}

impl Server {
    /// A server whose connections live on these data-plane threads, of which there must be at least one.
    pub fn new(reactors: &[ReactorHandle], options: ServerOptions) -> Server {
        assert!(!reactors.is_empty(), "an NBD server needs a data-plane thread");
        let shared = Arc::new_cyclic(|shared: &Weak<Shared>| {
            let shared = shared.clone();
            let gone: Gone = Arc::new(move |id| {
                if let Some(shared) = shared.upgrade() {
                    shared.client_is_gone(id);
                }
            });
            Shared {
                key: next_id(),
                options,
                reactors: reactors.to_vec(),
                table: Table::default(),
                listeners: Mutex::new(HashMap::new()),
                clients: Mutex::new(Clients { by_id: HashMap::new(), on_thread: vec![0; reactors.len()] }),
                client_left: Notify::new(),
                stopping: AtomicBool::new(false),
                gone,
            }
        });
        Server { shared }
    }

    /// Serves the export by name on all shared listeners.
    pub fn publish(&self, export: &Arc<Export>) -> Result<(), ExportError> {
        self.shared.table.add(export)
    }

    /// Those published now.
    pub fn exports(&self) -> Vec<Arc<Export>> {
        self.shared.table.all()
    }

    /// Takes the export off all listeners, closes its own ones, and has its clients' requests answered and their connections
    /// closed. Returns when they are gone. The export cannot be published again.
    pub async fn withdraw(&self, export: &Arc<Export>) {
        export.withdraw();
        self.shared.table.remove(export);
        let own = |listener: &Listener| matches!(&listener.serves, Serves::Only(only) if Arc::ptr_eq(only, export));
        self.close_listeners(own).await;
        self.shared.drain(|client| Arc::ptr_eq(&client.export, export)).await;
    }

    /// Accepts clients from a bound socket. Must be called within a tokio runtime, which then carries the handshakes.
    pub fn listen(&self, socket: Socket, serves: Serves, tls: Option<TlsSettings>) -> Result<ListenerId, ListenError> {
        let id = ListenerId(next_id());
        let shared = self.shared.clone();
        let task = match socket {
            Socket::Unix(listener) => {
                listener.set_nonblocking(true)?;
                let listener = tokio::net::UnixListener::from_std(listener)?;
                tokio::spawn(accept(shared, serves.clone(), tls, Accept::Unix(listener)))
            }
            Socket::Tcp(listener) => {
                let address = listener.local_addr()?;
                if tls.is_none() && !is_loopback(address.ip()) {
                    return Err(ListenError::NeedsTls(address));
                }
                listener.set_nonblocking(true)?;
                let listener = tokio::net::TcpListener::from_std(listener)?;
                tokio::spawn(accept(shared, serves.clone(), tls, Accept::Tcp(listener)))
            }
        };
        self.shared.listeners.lock().insert(id, Listener { serves, task });
        Ok(id)
    }

    /// Accepts no more clients from this listener; those attached stay.
    pub async fn close_listener(&self, id: ListenerId) {
        let listener = self.shared.listeners.lock().remove(&id);
        if let Some(listener) = listener {
            listener.task.abort();
            let _ = listener.task.await;
        }
    }

    /// Serves a client that has negotiated somewhere else, from its first request on. False if it must not be served.
    pub fn adopt(&self, socket: OwnedFd, export: &Arc<Export>, headers: Headers, allocation_context: bool) -> bool {
        let (name, contexts) = (export.name().to_owned(), Vec::new());
        let chosen = Chosen { export: export.clone(), name, headers, allocation_context, contexts };
        let ready = Ready { socket, early: Vec::new(), tls: None, identity: Identity::default(), chosen };
        self.shared.attach(ready, Vec::new(), "a client negotiated with elsewhere".to_owned())
    }

    async fn close_listeners(&self, which: impl Fn(&Listener) -> bool) {
        let ids: Vec<ListenerId> =
            self.shared.listeners.lock().iter().filter(|(_, listener)| which(listener)).map(|(id, _)| *id).collect();
        for id in ids {
            self.close_listener(id).await;
        }
    }

    /// Who is attached, oldest first.
    pub fn clients(&self) -> Vec<ClientInfo> {
        let mut clients: Vec<_> = self.shared.clients.lock().by_id.values().map(|client| client.info()).collect();
        clients.sort_by_key(|client| client.id);
        clients
    }

    /// Who is attached to this export, oldest first.
    pub fn clients_of(&self, export: &Arc<Export>) -> Vec<ClientInfo> {
        let clients = self.shared.clients.lock();
        let own = clients.by_id.values().filter(|client| Arc::ptr_eq(&client.export, export));
        let mut clients: Vec<_> = own.map(|client| client.info()).collect();
        clients.sort_by_key(|client| client.id);
        clients
    }

    /// Has the client's requests answered and its connection closed; false if there is no such client. A client that does not
    /// take its replies is cut off after some seconds.
    pub fn disconnect(&self, client: u64) -> bool {
        let found = self.shared.clients.lock().by_id.get(&client).cloned();
        if let Some(client) = &found {
            self.shared.send_drain(client);
        }
        found.is_some()
    }

    /// Closes the listeners that serve every export: who comes from now on does not meet exports that are about to go.
    pub async fn close_shared(&self) {
        self.close_listeners(|listener| matches!(listener.serves, Serves::Shared)).await;
    }

    /// Closes all listeners, has every request taken in answered, and closes all connections.
    pub async fn shutdown(&self) {
        self.shared.stopping.store(true, Ordering::SeqCst);
        self.close_listeners(|_| true).await;
        self.shared.drain(|_| true).await;
        let key = self.shared.key;
        for reactor in &self.shared.reactors {
            reactor.spawn(move |_| Worker::remove(key));
        }
    }
}

fn is_loopback(address: IpAddr) -> bool {
    match address {
        IpAddr::V4(address) => address.is_loopback(),
        IpAddr::V6(address) => address.is_loopback() || address.to_ipv4_mapped().is_some_and(|v4| v4.is_loopback()),
    }
}

enum Accept {
    Unix(tokio::net::UnixListener),
    Tcp(tokio::net::TcpListener),
}

/// Those of a listener's clients that are still choosing. Who does nothing cannot keep others out.
struct Handshakes {
    room: Arc<Semaphore>,
    begun: VecDeque<(Instant, AbortHandle)>,
}

impl Handshakes {
    /// One that is younger is not ended for another.
    const AGE_MIN: Duration = Duration::from_secs(1);

    fn new(most: usize) -> Handshakes {
        Handshakes { room: Arc::new(Semaphore::new(most)), begun: VecDeque::new() }
    }

    /// Waits until there is room for one more, and makes it by ending the oldest.
    async fn room(&mut self) -> Option<OwnedSemaphorePermit> {
        loop {
            self.begun.retain(|(_, handshake)| !handshake.is_finished());
            let age =
                self.begun.front().map_or(Duration::ZERO, |(begun, _)| clock::monotonic().saturating_duration_since(*begun));
            match tokio::time::timeout(Self::AGE_MIN.saturating_sub(age), self.room.clone().acquire_owned()).await {
                Ok(permit) => return permit.ok(),
                Err(_) => {
                    if let Some((_, oldest)) = self.begun.pop_front() {
                        tracing::info!("ending the oldest NBD handshake, as others wait for theirs");
                        oldest.abort();
                    }
                }
            }
        }
    }

    async fn begin(&mut self, handshake: impl Future<Output = ()> + Send + 'static) {
        let permit = self.room().await;
        let task = tokio::spawn(async move {
            handshake.await;
            drop(permit);
        });
        self.begun.push_back((clock::monotonic(), task.abort_handle()));
    }
}

/// The task of one listener.
async fn accept(shared: Arc<Shared>, serves: Serves, tls: Option<TlsSettings>, listener: Accept) {
    const PAUSE_AFTER_ERROR: Duration = Duration::from_millis(100);
    let mut handshakes = Handshakes::new(shared.options.handshakes_max.max(1));
    loop {
        let (shared, serves, tls) = (shared.clone(), serves.clone(), tls.clone());
        let failed = match &listener {
            Accept::Unix(listener) => match listener.accept().await {
                Ok((stream, _)) => {
                    let peer = unix_peer(&stream);
                    let welcome = async move { shared.welcome(stream, peer, &serves, tls.as_ref()).await };
                    handshakes.begin(welcome).await;
                    continue;
                }
                Err(error) => error,
            },
            Accept::Tcp(listener) => match listener.accept().await {
                Ok((stream, address)) => {
                    let _ = stream.set_nodelay(true);
                    let peer = address.to_string();
                    let welcome = async move { shared.welcome(stream, peer, &serves, tls.as_ref()).await };
                    handshakes.begin(welcome).await;
                    continue;
                }
                Err(error) => error,
            },
        };
        tracing::warn!("accepting an NBD client: {failed}");
        tokio::time::sleep(PAUSE_AFTER_ERROR).await;
    }
}

fn unix_peer(stream: &tokio::net::UnixStream) -> String {
    match stream.peer_cred() {
        Ok(peer) => format!("process {} of user {}", peer.pid().unwrap_or(0), peer.uid()),
        Err(_) => "a local process".to_owned(),
    }
}

/// What the contexts that a client selected tell; the client's first requests wait for it.
async fn find_contexts(export: Arc<Export>, wanted: Vec<(u32, String)>) -> Vec<Context> {
    if wanted.is_empty() {
        return Vec::new();
    }
    let ids: Vec<u32> = wanted.iter().map(|(id, _)| *id).collect();
    let find = move || {
        let contexts = export.own_contexts().map(|contexts| &**contexts);
        wanted.iter().map(|(id, name)| Context::find(contexts, *id, name)).collect()
    };
    let found = tokio::task::spawn_blocking(find).await;
    found.unwrap_or_else(|_| ids.into_iter().map(|id| Context::find(None, id, "of a question that panicked")).collect())
}

impl Shared {
    /// Negotiates with a client and hands it to a data-plane thread.
    async fn welcome<S: Stream>(self: Arc<Self>, stream: S, peer: String, serves: &Serves, tls: Option<&TlsSettings>) {
        let negotiation = handshake::negotiate(stream, tls, &self.table, serves);
        match tokio::time::timeout(self.options.handshake_time_max, negotiation).await {
            Ok(Ok(Some(ready))) => {
                let (export, wanted) = (ready.chosen.export.clone(), ready.chosen.contexts.clone());
                let contexts = find_contexts(export, wanted).await;
                self.attach(ready, contexts, peer);
            }
            Ok(Ok(None)) => tracing::debug!("{peer} left without choosing an export"),
            Ok(Err(error)) => tracing::info!("NBD handshake with {peer}: {error}"),
            Err(_) => tracing::info!("NBD handshake with {peer}: took too long"),
        }
    }

    fn attach(&self, ready: Ready, contexts: Vec<Context>, peer: String) -> bool {
        let Ready { socket, early, tls, identity, chosen } = ready;
        let subject = identity.0.map(|subject| subject.full);
        let serve = |client: &Arc<Client>| {
            let negotiated = Negotiated {
                socket,
                early,
                tls,
                headers: chosen.headers,
                allocation_context: chosen.allocation_context,
                contexts,
                client: client.clone(),
            };
            let (key, gone) = (self.key, self.gone.clone());
            client.reactor.spawn(move |reactor| Worker::of_thread(key, reactor, &gone).adopt(negotiated));
        };
        let Some(client) = self.register(chosen.export, peer, subject, serve) else { return false };
        tracing::info!(client = client.id, export = client.export.name(), "{} attached", client.peer);
        true
    }

    /// Enters a client on the thread that has the fewest, if possible on the home of its volume. `None` if it must not be served any more.
    ///
    /// `serve` queues its service on that thread before anybody else can see it: whoever finds the client queues its end behind that.
    fn register(
        &self,
        export: Arc<Export>,
        peer: String,
        tls_subject: Option<String>,
        serve: impl FnOnce(&Arc<Client>),
    ) -> Option<Arc<Client>> {
        let mut clients = self.clients.lock();
        if export.is_withdrawn() || self.stopping.load(Ordering::SeqCst) {
            return None;
        }
        let attached = clients.by_id.len();
        if attached >= self.options.clients_max {
            tracing::warn!("{peer} refused: {attached} NBD clients are attached, the most allowed");
            return None;
        }
        let home = export.volume().home();
        let is_elsewhere = |thread: usize| !home.as_ref().is_some_and(|home| home.same_reactor(&self.reactors[thread]));
        let (thread, _) = clients.on_thread.iter().enumerate().min_by_key(|(thread, load)| (**load, is_elsewhere(*thread)))?;
        clients.on_thread[thread] += 1;
        let client = Arc::new(Client {
            id: next_id(),
            peer,
            export,
            since: clock::wall(),
            tls_subject,
            thread,
            reactor: self.reactors[thread].clone(),
            requests: AtomicU64::new(0),
            bytes_read: AtomicU64::new(0),
            bytes_written: AtomicU64::new(0),
        });
        clients.by_id.insert(client.id, client.clone());
        serve(&client);
        Some(client)
    }

    fn client_is_gone(&self, id: u64) {
        let left = {
            let mut clients = self.clients.lock();
            let left = clients.by_id.remove(&id);
            if let Some(client) = &left {
                clients.on_thread[client.thread] -= 1;
            }
            left
        };
        if let Some(client) = left {
            tracing::info!(client = id, export = client.export.name(), "{} left", client.peer);
        }
        self.client_left.notify_waiters();
    }

    fn send_drain(&self, client: &Client) {
        let (key, id) = (self.key, client.id);
        client.reactor.spawn(move |_| {
            if let Some(worker) = Worker::existing(key) {
                worker.drain(id);
            }
        });
    }

    /// Drains and closes the clients chosen, and returns when they are gone.
    async fn drain(&self, which: impl Fn(&Client) -> bool) {
        let chosen = |shared: &Shared| -> Vec<Arc<Client>> {
            shared.clients.lock().by_id.values().filter(|client| which(client)).cloned().collect()
        };
        for client in chosen(self) {
            self.send_drain(&client);
        }
        loop {
            let left = self.client_left.notified();
            if chosen(self).is_empty() {
                return;
            }
            left.await;
        }
    }
}
