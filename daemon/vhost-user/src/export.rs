//! A volume served on a socket: one front end at a time, one thread that sleeps.
//!
//! ```text
//!   listener ─▶ accept ─▶ Session … end, drained ─▶ accept the next
//!                 └─ while there is one: others are closed at once
//! ```

use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::thread::JoinHandle;
use std::time::SystemTime;

use blockdev::stats::{OpStats, Snapshot};
use blockdev::{ReactorHandle, Volume, clock};
use parking_lot::Mutex;
use rustix::event::{EventfdFlags, PollFd, PollFlags, eventfd, poll};

use crate::config;
use crate::connection::{Connection, ConnectionError};
use crate::session::{Session, SessionError};

/// The first bits of a kick message name the ring.
const QUEUES_MAX: u16 = 256;
const STACK: usize = 256 << 10;
const SERIAL_LEN: usize = 20;

/// How a volume is exported.
#[derive(Clone, Debug)]
pub struct ExportOptions {
    /// The most queues a front end may use, 1 to 256. They cost nothing until used.
    pub queues_max: u16,
    /// Refuse writes even if the volume takes them.
    pub read_only: bool,
    /// What the guest sees as the disk's serial number; its first 20 bytes count.
    pub serial: String,
    /// Have the kernel hold on to the pages of guests whose memory is allocated, instead of looking them up for each large request.
    pub pin_memory: bool,
}

impl Default for ExportOptions {
    fn default() -> Self {
        ExportOptions { queues_max: 64, read_only: false, serial: String::new(), pin_memory: false }
    }
}

/// A connected front end.
#[derive(Clone, Debug)]
pub struct ClientInfo {
    /// 0 for one in a PID namespace that is not seen from here.
    pub pid: i32,
    pub uid: u32,
    pub since: SystemTime,
    /// The virtio features it negotiated.
    pub features: u64,
    pub queues_started: usize,
}

/// What an export's threads share.
pub struct Shared {
    /// For messages.
    pub name: Arc<str>,
    pub volume: Arc<Volume>,
    pub options: ExportOptions,
    data_plane: Vec<ReactorHandle>,
    /// One for each data-plane thread.
    stats: Vec<Arc<OpStats>>,
    first_thread: usize,
    client: Mutex<Option<ClientInfo>>,
    stopping: AtomicBool,
    disconnecting: AtomicBool,
    resized: AtomicBool,
}

impl Shared {
    pub fn is_read_only(&self) -> bool {
        self.options.read_only || self.volume.is_read_only()
    }

    /// The virtio features offered.
    pub fn features(&self) -> u64 {
        config::features(&self.volume, self.is_read_only())
    }

    pub fn serial(&self) -> [u8; SERIAL_LEN] {
        let bytes = self.options.serial.as_bytes();
        std::array::from_fn(|at| bytes.get(at).copied().unwrap_or(0))
    }

    /// The thread of queue `index`.
    pub fn thread_for(&self, index: usize) -> (&ReactorHandle, Arc<OpStats>) {
        let thread = (self.first_thread + index) % self.data_plane.len();
        (&self.data_plane[thread], self.stats[thread].clone())
    }
}

/// A volume served to front ends that connect to a socket. Dropping it stops it.
pub struct VhostUserExport {
    shared: Arc<Shared>,
    wake: Arc<OwnedFd>,
    watch: u64,
    thread: Mutex<Option<JoinHandle<()>>>,
}

impl VhostUserExport {
    /// Serves `volume` to whoever connects to `listener`. The queues of a front end are spread over `data_plane`.
    pub fn start(
        listener: UnixListener,
        volume: Arc<Volume>,
        data_plane: Vec<ReactorHandle>,
        options: ExportOptions,
    ) -> io::Result<Arc<VhostUserExport>> {
        static NEXT_THREAD: AtomicUsize = AtomicUsize::new(0);
        if data_plane.is_empty() || !(1..=QUEUES_MAX).contains(&options.queues_max) {
            let what = "an export needs a data-plane thread, and 1 to 256 queues";
            return Err(io::Error::new(io::ErrorKind::InvalidInput, what));
        }
        listener.set_nonblocking(true)?;
        let is_home = |thread: &ReactorHandle| volume.home().is_some_and(|home| home.same_reactor(thread));
        let home = data_plane.iter().position(is_home);
        let wake = Arc::new(eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?);
        let shared = Arc::new(Shared {
            name: format!("vhost-user export of {}", volume.name()).into(),
            stats: data_plane.iter().map(|_| Arc::default()).collect(),
            first_thread: home.unwrap_or_else(|| NEXT_THREAD.fetch_add(1, Ordering::Relaxed)),
            volume,
            options,
            data_plane,
            client: Mutex::new(None),
            stopping: AtomicBool::new(false),
            disconnecting: AtomicBool::new(false),
            resized: AtomicBool::new(false),
        });
        let server = Server { shared: shared.clone(), wake: wake.clone(), listener };
        let thread = std::thread::Builder::new().name("vhost-user".into()).stack_size(STACK).spawn(move || server.run())?;
        let (resized, event) = (shared.clone(), wake.clone());
        let watch = shared.volume.watch_size(move |_| {
            resized.resized.store(true, Ordering::SeqCst);
            ring_bell(&event);
        });
        Ok(Arc::new(VhostUserExport { shared, wake, watch, thread: Mutex::new(Some(thread)) }))
    }

    /// Who is connected.
    pub fn clients(&self) -> Vec<ClientInfo> {
        self.shared.client.lock().iter().cloned().collect()
    }

    /// Ends the present connection after what is in flight has completed. The front end may connect again.
    pub fn disconnect(&self) {
        self.shared.disconnecting.store(true, Ordering::SeqCst);
        ring_bell(&self.wake);
    }

    /// Ends the present connection after what is in flight has completed, and closes the socket. Waits for it.
    pub fn stop(&self) {
        self.shared.stopping.store(true, Ordering::SeqCst);
        ring_bell(&self.wake);
        if let Some(thread) = self.thread.lock().take() {
            let _ = thread.join();
        }
        self.shared.volume.unwatch(self.watch);
    }

    /// What was done through this export so far.
    pub fn stats(&self) -> Snapshot {
        let mut snapshot = Snapshot::default();
        self.shared.stats.iter().for_each(|stats| stats.add_to(&mut snapshot));
        snapshot
    }

    pub fn volume(&self) -> &Arc<Volume> {
        &self.shared.volume
    }

    pub fn options(&self) -> &ExportOptions {
        &self.shared.options
    }
}

impl Drop for VhostUserExport {
    fn drop(&mut self) {
        self.stop();
    }
}

fn ring_bell(event: &OwnedFd) {
    // An eventfd that cannot take one more is signalled already.
    let _ = rustix::io::write(event, &1u64.to_ne_bytes());
}

/// Process and user at the other end. As plain numbers, since the kernel gives 0 for a process that is not seen from here.
fn peer_of(stream: &UnixStream) -> (libc::pid_t, libc::uid_t) {
    let mut peer = libc::ucred { pid: 0, uid: 0, gid: 0 };
    let mut len = size_of::<libc::ucred>() as libc::socklen_t;
    let target = (&raw mut peer).cast();
    // SAFETY: `peer` has room for `len` bytes, and any bytes are a valid value of it.
    unsafe { libc::getsockopt(stream.as_raw_fd(), libc::SOL_SOCKET, libc::SO_PEERCRED, target, &raw mut len) };
    (peer.pid, peer.uid)
}

struct Server {
    shared: Arc<Shared>,
    wake: Arc<OwnedFd>,
    listener: UnixListener,
}

/// What woke the thread.
struct Woken {
    socket: bool,
    listener: bool,
}

impl Server {
    fn run(self) {
        while !self.is_stopping() {
            match self.wait(None) {
                Ok(woken) if woken.listener => self.accept(),
                Ok(_) => {}
                Err(error) => return tracing::error!("{}: stopped: poll failed: {error}", self.shared.name),
            }
        }
    }

    fn is_stopping(&self) -> bool {
        self.shared.stopping.load(Ordering::SeqCst)
    }

    /// Sleeps until the socket, the listener or somebody in this process has something.
    fn wait(&self, socket: Option<&Connection>) -> rustix::io::Result<Woken> {
        let wake = PollFd::new(&self.wake, PollFlags::IN);
        let listener = PollFd::new(&self.listener, PollFlags::IN);
        let mut fds = match socket {
            Some(socket) => vec![wake, listener, PollFd::from_borrowed_fd(socket.as_fd(), PollFlags::IN)],
            None => vec![wake, listener],
        };
        match poll(&mut fds, None) {
            Ok(_) | Err(rustix::io::Errno::INTR) => {}
            Err(error) => return Err(error),
        }
        if !fds[0].revents().is_empty() {
            let _ = rustix::io::read(&self.wake, &mut [0; 8]);
        }
        Ok(Woken { listener: !fds[1].revents().is_empty(), socket: fds.get(2).is_some_and(|fd| !fd.revents().is_empty()) })
    }

    /// The next connection, if one can be had.
    fn next_connection(&self) -> Option<UnixStream> {
        match self.listener.accept() {
            Ok((stream, _)) => Some(stream),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => None,
            Err(error) => {
                tracing::warn!("{}: a connection could not be accepted: {error}", self.shared.name);
                // Out of descriptors, most likely; without a pause this thread would spin.
                std::thread::sleep(std::time::Duration::from_millis(100));
                None
            }
        }
    }

    fn accept(&self) {
        let Some(stream) = self.next_connection() else { return };
        self.shared.disconnecting.store(false, Ordering::SeqCst);
        let (pid, uid) = peer_of(&stream);
        let process = if pid == 0 { "a process of another PID namespace".into() } else { format!("process {pid}") };
        *self.shared.client.lock() = Some(ClientInfo { pid, uid, since: clock::wall(), features: 0, queues_started: 0 });
        tracing::info!("{}: {process} of user {uid} connected", self.shared.name);
        let end = self.serve(stream);
        *self.shared.client.lock() = None;
        match end {
            Ok(()) => tracing::info!("{}: {process} disconnected", self.shared.name),
            Err(SessionError::Connection(ConnectionError::Closed)) => {
                tracing::info!("{}: {process} closed its connection", self.shared.name);
            }
            Err(error) => tracing::warn!("{}: connection to {process} ended: {error}", self.shared.name),
        }
    }

    /// Serves one front end to its end; its rings are drained when this returns.
    fn serve(&self, stream: UnixStream) -> Result<(), SessionError> {
        let mut connection = Connection::new(stream.into());
        let mut session = Session::new(self.shared.clone(), self.wake.clone());
        let end = self.exchange(&mut connection, &mut session);
        session.drain();
        end
    }

    fn exchange(&self, connection: &mut Connection, session: &mut Session) -> Result<(), SessionError> {
        let mut others_refused = false;
        loop {
            let woken = self.wait(Some(connection)).map_err(|error| ConnectionError::Io(error.into()))?;
            if self.is_stopping() || self.shared.disconnecting.swap(false, Ordering::SeqCst) {
                return Ok(());
            }
            if session.is_memory_gone() {
                return Err(SessionError::MemoryGone);
            }
            if self.shared.resized.swap(false, Ordering::SeqCst) {
                session.config_changed();
            }
            if woken.socket {
                // One at a time, so that a front end that never stops talking cannot keep others from being heard.
                if let Some((header, message)) = connection.receive()? {
                    session.serve(connection, header, message)?;
                    session.announce_config();
                    self.publish(session);
                }
            } else if woken.listener {
                self.refuse_other(&mut others_refused);
            }
        }
    }

    fn publish(&self, session: &Session) {
        if let Some(client) = &mut *self.shared.client.lock() {
            client.features = session.features();
            client.queues_started = session.queues_started();
        }
    }

    /// Only when the present front end's socket is quiet: one that has just gone away makes room for the next.
    fn refuse_other(&self, reported: &mut bool) {
        let Some(stream) = self.next_connection() else { return };
        drop(stream);
        if !std::mem::replace(reported, true) {
            tracing::warn!("{}: a second connection was refused: one front end is served at a time", self.shared.name);
        }
    }
}
