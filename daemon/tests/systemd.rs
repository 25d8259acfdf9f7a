//! The service manager: readiness, the watchdog, sockets it opens for the daemon, and sockets it keeps while the daemon is dead.

mod common;

use std::io::{IoSliceMut, Read, Write};
use std::mem::MaybeUninit;
use std::net::TcpStream;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::net::{UnixDatagram, UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use common::{Daemon, Nbd, eventually, exists, wait};
use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, recvmsg};
use rustix::process::{Pid, Signal, kill_process};

const LIMIT: Duration = Duration::from_secs(60);
/// Where passed descriptors are put before the shell moves them to theirs: above all that it uses itself.
const ABOVE: i32 = 100;

/// What systemd does for a service with a notification socket and a store of descriptors.
struct Manager {
    socket: UnixDatagram,
    path: PathBuf,
    store: Vec<(String, OwnedFd)>,
    watchdog: Option<Duration>,
}

impl Manager {
    fn new(daemon: &Daemon) -> Manager {
        let path = daemon.path("notify");
        let socket = UnixDatagram::bind(&path).unwrap();
        socket.set_read_timeout(Some(LIMIT)).unwrap();
        Manager { socket, path, store: Vec::new(), watchdog: None }
    }

    /// Starts the daemon with what is in the store, and waits until it is ready. Returns what it said before that.
    fn start(&mut self, daemon: &Daemon) -> (Service, Vec<String>) {
        let mut command = Command::new("bash");
        let (mut moves, mut names) = (String::new(), Vec::new());
        let passed: Vec<OwnedFd> = self.store.iter().map(|(_, socket)| inherited(socket)).collect();
        for (index, ((name, _), socket)) in self.store.iter().zip(&passed).enumerate() {
            moves += &format!(" {}<&{}-", index + 3, socket.as_raw_fd());
            names.push(name.as_str());
        }
        command
            .arg("-c")
            .arg(format!("exec{moves}; LISTEN_PID=$$ exec \"$NOVASTOR\" serve --config \"$CONFIG\""))
            .env("LISTEN_FDS", names.len().to_string())
            .env("LISTEN_FDNAMES", names.join(":"))
            .env("NOVASTOR", env!("CARGO_BIN_EXE_novastor"))
            .env("CONFIG", daemon.path("novastor.toml"))
            .env("NOTIFY_SOCKET", &self.path)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(std::fs::File::create(daemon.path("log")).unwrap());
        if let Some(watchdog) = self.watchdog {
            command.env("WATCHDOG_USEC", watchdog.as_micros().to_string());
        }
        let service = Service(command.spawn().unwrap());
        let said = self.receive_until("READY=1", &daemon.path("log"));
        (service, said)
    }

    /// Receives until a message has `line` in it; all of them.
    fn receive_until(&mut self, line: &str, log: &Path) -> Vec<String> {
        let mut said = Vec::new();
        loop {
            let Some(message) = self.receive() else {
                panic!("{line} never came, but {said:?}\n{}", std::fs::read_to_string(log).unwrap())
            };
            let found = message.lines().any(|other| other == line);
            said.push(message);
            if found {
                return said;
            }
        }
    }

    fn receive(&mut self) -> Option<String> {
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(4))];
        let mut control = RecvAncillaryBuffer::new(&mut space);
        let mut buffer = [0; 4096];
        let vectors = &mut [IoSliceMut::new(&mut buffer)];
        let received = recvmsg(&self.socket, vectors, &mut control, RecvFlags::CMSG_CLOEXEC).ok()?;
        let mut descriptors: Vec<OwnedFd> = Vec::new();
        for message in control.drain() {
            if let RecvAncillaryMessage::ScmRights(rights) = message {
                descriptors.extend(rights);
            }
        }
        let text = String::from_utf8(buffer[..received.bytes].to_vec()).unwrap();
        let name = text.lines().find_map(|line| line.strip_prefix("FDNAME=")).unwrap_or("stored").to_owned();
        if text.lines().any(|line| line == "FDSTORE=1") {
            assert!(!name.contains(':') && name.len() <= 255 && !name.chars().any(char::is_control), "{name:?}");
            self.store.extend(descriptors.into_iter().map(|descriptor| (name.clone(), descriptor)));
        } else if text.lines().any(|line| line == "FDSTOREREMOVE=1") {
            self.store.retain(|(kept, _)| *kept != name);
        }
        Some(text)
    }

    /// Waits until a socket whose name contains `part` is kept.
    fn wait_for_kept(&mut self, part: &str) {
        while !self.keeps(part) {
            assert!(self.receive().is_some(), "{part} is never given to the manager");
        }
    }

    fn wait_for_removal(&mut self, part: &str) {
        while self.keeps(part) {
            assert!(self.receive().is_some(), "{part} is never taken from the manager");
        }
    }

    fn keeps(&self, part: &str) -> bool {
        self.store.iter().any(|(name, _)| name.contains(part))
    }
}

/// A copy that a child process inherits.
fn inherited(socket: &OwnedFd) -> OwnedFd {
    let copy = rustix::io::fcntl_dupfd_cloexec(socket, ABOVE).unwrap();
    rustix::io::fcntl_setfd(&copy, rustix::io::FdFlags::empty()).unwrap();
    copy
}

/// The daemon; killed at the end of the test.
struct Service(Child);

impl Service {
    fn signal(&self, signal: Signal) {
        kill_process(Pid::from_child(&self.0), signal).unwrap();
    }

    fn kill(mut self) {
        self.0.kill().unwrap();
        self.0.wait().unwrap();
    }

    fn stop(self) {
        self.signal(Signal::TERM);
        self.ends();
    }

    fn ends(mut self) {
        assert!(wait(&mut self.0).success());
    }
}

impl Drop for Service {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

#[test]
fn a_socket_units_socket_is_served_and_left_and_the_manager_is_told() {
    let daemon = Daemon::new("[[export]]\nvolume = \"memory/v\"\nnbd = true\n");
    let path = daemon.path("nbd.sock");
    let mut manager = Manager::new(&daemon);
    manager.watchdog = Some(Duration::from_millis(300));
    manager.store.push(("novastor.socket".to_owned(), UnixListener::bind(&path).unwrap().into()));

    // A client that came before the daemon waits in the socket's queue.
    let early = UnixStream::connect(&path).unwrap();
    let (service, _) = manager.start(&daemon);
    assert!(!manager.keeps("nbd.sock"), "it is the socket unit's already");
    daemon.json(&["volume", "create", "memory/v", "--size", "1M"]);
    eventually("the declared export is served", || daemon.json(&["export", "list"])[0]["ready"] == true);
    assert_eq!(Nbd::attach(early, "v").unwrap().size, 1 << 20);

    let log = daemon.path("log");
    manager.receive_until("WATCHDOG=1", &log);
    manager.receive_until("WATCHDOG=1", &log);
    service.signal(Signal::HUP);
    let reloading = manager.receive_until("RELOADING=1", &log).pop().unwrap();
    assert!(reloading.contains("MONOTONIC_USEC="), "{reloading}");
    manager.receive_until("READY=1", &log);
    service.signal(Signal::TERM);
    manager.receive_until("STOPPING=1", &log);
    service.ends();
    assert!(exists(&path), "the socket is the service manager's");
    assert!(UnixStream::connect(&path).is_ok(), "clients wait for the next daemon");
}

#[test]
fn a_manager_that_does_not_read_holds_nothing_up() {
    let daemon = Daemon::new("");
    let mut manager = Manager::new(&daemon);
    manager.watchdog = Some(Duration::from_millis(30));
    let (service, _) = manager.start(&daemon);
    let queued: usize = std::fs::read_to_string("/proc/sys/net/unix/max_dgram_qlen").unwrap().trim().parse().unwrap();
    std::thread::sleep(Duration::from_millis(30) * queued as u32);
    assert_eq!(daemon.json(&["export", "list"]), serde_json::json!([]));
    for _ in 0..queued {
        manager.receive_until("WATCHDOG=1", &daemon.path("log"));
    }
    service.kill();
}

/// A daemon with a listener of every kind, started under a manager that keeps them all.
struct Kept {
    daemon: Daemon,
    manager: Manager,
    port: u16,
}

/// What the listeners' names at the manager contain.
const SOCKETS: [&str; 4] = ["/nbd.sock", "/admin.sock", "/own.sock", "/v.sock"];

impl Kept {
    fn start() -> (Kept, Service) {
        let daemon = Daemon::new(
            "[[export]]\nvolume = \"local/v\"\nnbd = true\n\n[[export]]\nvolume = \"local/v\"\nnbd = \"unix:{dir}/own.sock\"\n\n\
             [[export]]\nvolume = \"local/v\"\nnbd = \"unix:{dir}/v.sock\"\n\n\
             [[export]]\nvolume = \"local/v\"\nvhost_user = \"{dir}/vm.sock\"\n",
        );
        let port = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
        let nbd = format!("nbd = [\"unix:{}\"", daemon.path("nbd.sock").display());
        daemon.configure(&daemon.config().replace(&nbd, &format!("{nbd}, \"tcp:127.0.0.1:{port}\"")));
        let manager = Manager::new(&daemon);
        let mut kept = Kept { daemon, manager, port };
        let (service, _) = kept.manager.start(&kept.daemon);
        kept.daemon.json(&["volume", "create", "local/v", "--size", "1M"]);
        kept.wait_until_served();
        for name in SOCKETS {
            kept.manager.wait_for_kept(name);
        }
        kept.manager.wait_for_kept(&port.to_string());
        (kept, service)
    }

    fn wait_until_served(&self) {
        eventually("every export is served", || {
            let exports = self.daemon.json(&["export", "list"]);
            exports.as_array().unwrap().iter().all(|export| export["ready"] == true)
        });
    }

    /// Clients that come now, to each of the listeners.
    fn connect(&self) -> Clients {
        let unix = |name: &str| UnixStream::connect(self.daemon.path(name)).unwrap_or_else(|error| panic!("{name}: {error}"));
        Clients {
            shared: unix("nbd.sock"),
            tcp: TcpStream::connect(("127.0.0.1", self.port)).unwrap(),
            own: unix("own.sock"),
            admin: unix("admin.sock"),
            another: unix("v.sock"),
        }
    }
}

struct Clients {
    shared: UnixStream,
    tcp: TcpStream,
    own: UnixStream,
    admin: UnixStream,
    another: UnixStream,
}

impl Clients {
    fn are_served(mut self) {
        self.admin.set_read_timeout(Some(LIMIT)).unwrap();
        assert_eq!(Nbd::attach(self.shared, "v").unwrap().read(4096, 5), b"hello");
        assert_eq!(Nbd::attach(self.tcp, "v").unwrap().read(4096, 5), b"hello");
        assert_eq!(Nbd::attach(self.own, "").unwrap().read(4096, 5), b"hello");
        assert_eq!(Nbd::attach(self.another, "").unwrap().read(4096, 5), b"hello");
        self.admin.write_all(b"GET /v1/status HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n").unwrap();
        let mut answer = String::new();
        self.admin.read_to_string(&mut answer).unwrap();
        assert!(answer.starts_with("HTTP/1.1 200 "), "{answer}");
    }
}

/// A front end's first message, GET_FEATURES of version 1, is answered with eight bytes.
fn answers_vhost_user(mut stream: UnixStream) {
    stream.set_read_timeout(Some(LIMIT)).unwrap();
    stream.write_all(&[1u32, 1, 0].map(u32::to_ne_bytes).concat()).unwrap();
    let mut reply = [0; 20];
    stream.read_exact(&mut reply).unwrap();
    assert_eq!(reply[..12], [1u32, 5, 8].map(u32::to_ne_bytes).concat());
}

#[test]
fn while_a_killed_daemon_is_dead_its_clients_wait() {
    let (mut kept, service) = Kept::start();
    let mut client = kept.daemon.attach("v");
    assert_eq!((client.write(4096, b"hello"), client.flush()), (0, 0));
    service.kill();
    assert!(client.is_closed());
    let vm = kept.daemon.path("vm.sock");
    assert!(UnixStream::connect(&vm).is_err(), "a VMM would wait for an answer with its guest stopped");
    let early = kept.connect();
    let (service, said) = kept.manager.start(&kept.daemon);
    assert!(!said.iter().any(|message| message.contains("FDSTORE")), "nothing is opened or closed anew: {said:?}");
    early.are_served();
    kept.wait_until_served();
    answers_vhost_user(UnixStream::connect(&vm).unwrap());

    // A deliberate restart is no different.
    service.stop();
    let early = kept.connect();
    let (service, said) = kept.manager.start(&kept.daemon);
    let stopping = said.iter().position(|message| message.contains("STOPPING=1"));
    assert!(stopping.is_some() && !said.iter().any(|message| message.contains("FDSTORE")), "{said:?}");
    early.are_served();
    service.stop();
}

#[test]
fn a_socket_without_an_export_is_kept_no_longer() {
    let (mut kept, service) = Kept::start();
    let mut client = kept.daemon.attach("v");
    assert_eq!((client.write(4096, b"hello"), client.flush()), (0, 0));

    // Removed while the daemon runs.
    let extra = kept.daemon.path("extra.sock");
    let id = kept.daemon.json(&["export", "add", "v", &format!("--nbd=unix:{}", extra.display())])["id"].clone();
    kept.manager.wait_for_kept("extra.sock");
    kept.daemon.json(&["export", "remove", id.as_str().unwrap()]);
    kept.manager.wait_for_removal("extra.sock");
    assert!(!exists(&extra));

    // Gone from the configuration while it is dead; and the file of another one is gone.
    service.kill();
    let config = kept.daemon.config();
    let own = format!("[[export]]\nvolume = \"local/v\"\nnbd = \"unix:{}\"\n", kept.daemon.path("own.sock").display());
    assert!(config.contains(&own));
    kept.daemon.configure(&config.replace(&own, ""));
    let replaced = kept.daemon.path("v.sock");
    std::fs::remove_file(&replaced).unwrap();
    let old = kept.manager.store.iter().find(|(name, _)| name.contains("/v.sock")).unwrap().0.clone();
    let (service, _) = kept.manager.start(&kept.daemon);
    kept.manager.wait_for_removal("own.sock");
    assert!(!exists(&kept.daemon.path("own.sock")));
    kept.manager.wait_for_removal(&old);
    kept.manager.wait_for_kept("/v.sock");
    assert!(UnixStream::connect(&replaced).is_ok(), "it is made anew");
    assert_eq!(kept.daemon.attach("v").read(4096, 5), b"hello");

    // Its volume has gone: a client must not wait for an answer that may never come.
    service.kill();
    let volume = ["pool/volumes/v", "moved"].map(|name| kept.daemon.path(name));
    std::fs::rename(&volume[0], &volume[1]).unwrap();
    let (service, _) = kept.manager.start(&kept.daemon);
    kept.manager.wait_for_removal("/v.sock");
    assert!(!exists(&replaced));
    std::fs::rename(&volume[1], &volume[0]).unwrap();
    kept.manager.wait_for_kept("/v.sock");
    kept.wait_until_served();
    assert!(UnixStream::connect(&replaced).is_ok());
    service.stop();
}
