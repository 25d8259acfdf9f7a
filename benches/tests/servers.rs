//! The generators against real servers: nbdkit, qemu-nbd and qemu-storage-daemon, which must be installed.

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use benches::load::Timing;
use benches::nbd::{Address, NbdLoad};
use benches::requests::{Access, Workload};
use benches::vhost::{Pages, VhostLoad, Waiting};

const SIZE: u64 = 16 << 20;
const SEED: u64 = 5;
const TIMING: Timing = Timing { warm_up: Duration::from_millis(50), measure: Duration::from_millis(300) };
const MIXED: Workload = Workload { block_size: 4096, depth: 32, access: Access::Random, write_percent: 30 };
const LARGE: Workload = Workload { block_size: 128 << 10, depth: 8, access: Access::Sequential, write_percent: 50 };

/// A server in a folder of its own; both are gone when this is dropped.
struct Server {
    child: Child,
    folder: tempfile::TempDir,
}

/// A socket's file is there before it listens; connecting would make the server's only client of us.
fn listens(socket: &Path) -> bool {
    const ACCEPTS: &str = "00010000";
    let sockets = std::fs::read_to_string("/proc/net/unix").unwrap();
    let name = socket.to_str().unwrap();
    sockets.lines().any(|line| line.ends_with(name) && line.split_whitespace().nth(3) == Some(ACCEPTS))
}

impl Server {
    /// `arguments` may name files of the folder as `@/name`. Waits for the socket `@/sock`.
    fn start(program: &str, arguments: &[&str]) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let file = std::fs::File::create(folder.path().join("disk.raw")).unwrap();
        file.set_len(SIZE).unwrap();
        let place = folder.path().to_str().unwrap();
        let child = Command::new(program)
            .args(arguments.iter().map(|argument| argument.replace('@', place)))
            .stdin(Stdio::null())
            .spawn()
            .unwrap_or_else(|error| panic!("{program} is needed for this test: {error}"));
        let mut server = Self { child, folder };
        for _ in 0..1500 {
            if listens(&server.socket()) {
                return server;
            }
            assert_eq!(server.child.try_wait().unwrap(), None, "{program} ended early");
            std::thread::sleep(Duration::from_millis(20));
        }
        panic!("{program} does not listen");
    }

    fn socket(&self) -> PathBuf {
        self.folder.path().join("sock")
    }

    fn storage_daemon(queues: usize) -> Self {
        let export = format!("vhost-user-blk,id=e0,node-name=d0,addr.type=unix,addr.path=@/sock,writable=on,num-queues={queues}");
        let node = "file,node-name=d0,filename=@/disk.raw,cache.direct=off";
        Self::start("qemu-storage-daemon", &["--blockdev", node, "--export", &export])
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }
}

fn nbd(socket: &Path, workload: Workload) -> NbdLoad {
    NbdLoad {
        address: Address::Unix(socket.into()),
        export: String::new(),
        connections: 1,
        structured_replies: false,
        workload,
        span: None,
    }
}

fn vhost(socket: PathBuf, workload: Workload) -> VhostLoad {
    let waiting = Waiting::SpinThenSleep { spin_us: 20 };
    VhostLoad { socket, queues: 1, thread_per_queue: false, waiting, workload, span: None, pages: Pages::Small }
}

#[test]
fn nbdkit_keeps_what_was_written() {
    let server = Server::start("nbdkit", &["--foreground", "--unix", "@/sock", "memory", "16M"]);
    for workload in [MIXED, LARGE] {
        for structured_replies in [false, true] {
            let load = NbdLoad { connections: 2, structured_replies, ..nbd(&server.socket(), workload) };
            assert!(load.verify(TIMING, SEED).unwrap().operations > 0);
        }
    }
}

#[test]
fn qemu_nbd_keeps_what_was_written() {
    let arguments = ["--persistent", "--shared=0", "--format=raw", "--socket", "@/sock", "@/disk.raw"];
    let server = Server::start("qemu-nbd", &arguments);
    for workload in [MIXED, LARGE] {
        for structured_replies in [false, true] {
            let load = NbdLoad { connections: 2, structured_replies, ..nbd(&server.socket(), workload) };
            assert!(load.verify(TIMING, SEED).unwrap().operations > 0);
        }
    }
}

#[test]
fn a_server_that_forgets_is_noticed() {
    for structured_replies in [false, true] {
        let server = Server::start("nbdkit", &["--foreground", "--unix", "@/sock", "null", "16M"]);
        let load = NbdLoad { structured_replies, ..nbd(&server.socket(), MIXED) };
        let error = load.verify(TIMING, SEED).unwrap_err().to_string();
        assert!(error.contains("is not what was written there"), "{error}");
    }
}

#[test]
fn a_failed_request_is_an_error() {
    let arguments = ["--foreground", "--unix", "@/sock", "--filter=error", "memory", "16M", "error-rate=100%"];
    let server = Server::start("nbdkit", &arguments);
    let error = format!("{:#}", nbd(&server.socket(), MIXED).measure(TIMING, None).unwrap_err());
    assert!(error.contains("failed with NBD error 5"), "{error}");
}

#[test]
fn the_report_counts_the_servers_cpu_time() {
    let server = Server::start("nbdkit", &["--foreground", "--unix", "@/sock", "memory", "16M"]);
    let report = nbd(&server.socket(), MIXED).measure(TIMING, Some(server.child.id())).unwrap();
    assert!(report.server_cpu_us.unwrap() > 0.0 && report.client_cpu_us > 0.0, "{report:?}");
    assert!(report.p50_us > 0.0 && report.p50_us <= report.p99_us && report.p99_us <= report.max_us, "{report:?}");
}

#[test]
fn a_vhost_user_server_keeps_what_was_written() {
    let server = Server::storage_daemon(2);
    for (workload, thread_per_queue, spin_us) in [(MIXED, false, 20), (MIXED, true, 0), (LARGE, false, 0)] {
        let waiting = Waiting::SpinThenSleep { spin_us };
        let load = VhostLoad { queues: 2, thread_per_queue, waiting, ..vhost(server.socket(), workload) };
        assert!(load.verify(TIMING, SEED).unwrap().operations > 0);
    }
}

#[test]
fn a_vhost_user_server_without_the_queues_asked_for_is_refused() {
    let server = Server::storage_daemon(1);
    let error = format!("{:#}", VhostLoad { queues: 2, ..vhost(server.socket(), MIXED) }.measure(TIMING, None).unwrap_err());
    assert!(error.contains("set up 2 queues"), "{error}");
}
