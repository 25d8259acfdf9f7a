//! A server in this process and a client that says exactly what a test wants it to.

#![allow(dead_code, reason = "each test binary uses its own part")]

pub mod wire;

use std::os::unix::net::UnixListener;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use blockdev::layers::fault::{FaultPlan, FaultRule, Faulty};
use blockdev::memory_disk::MemoryDisk;
use blockdev::reactor::DataPlaneOptions;
use blockdev::stats::OpClass;
use blockdev::{BlockDevice, DataPlane, Errno, Volume, VolumeOptions};
use nbd::{Export, Server, ServerOptions, Serves, Socket, TlsSettings};
use tokio::runtime::Runtime;

#[allow(unused_imports, reason = "each test binary uses its own part")]
pub use wire::{Answer, Wire};

/// Nothing here waits longer.
pub const HANG: Duration = Duration::from_secs(60);

pub struct Rig {
    pub server: Server,
    pub export: Arc<Export>,
    pub runtime: Runtime,
    pub socket: PathBuf,
    pub plane: DataPlane,
    directory: tempfile::TempDir,
}

pub fn volume(device: Arc<dyn BlockDevice>) -> Arc<Volume> {
    Volume::new(device, VolumeOptions { name: "disk".into(), read_only: false, block_size: 512 })
}

pub fn memory(size: u64) -> Arc<dyn BlockDevice> {
    Arc::new(MemoryDisk::new(size, 1))
}

/// A disk in memory whose requests of some kinds take this long.
pub fn slow(size: u64, delay: Duration, classes: &[OpClass]) -> (Arc<dyn BlockDevice>, FaultPlan) {
    let plan = FaultPlan::new(1);
    let rule =
        |class: &OpClass| FaultRule { class: *class, errors_per_million: 0, errno: Errno::EIO, delay, jitter: Duration::ZERO };
    plan.set(classes.iter().map(rule).collect());
    (Arc::new(Faulty::new(memory(size), plan.clone())), plan)
}

impl Rig {
    pub fn new(device: Arc<dyn BlockDevice>) -> Rig {
        Rig::with(device, 2, ServerOptions::default(), |export| export)
    }

    pub fn with(
        device: Arc<dyn BlockDevice>,
        threads: usize,
        options: ServerOptions,
        shape: impl FnOnce(Export) -> Export,
    ) -> Rig {
        let plane = DataPlane::start(DataPlaneOptions { threads, ..Default::default() }).unwrap();
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
        let server = Server::new(plane.handles(), options);
        let directory = tempfile::tempdir().unwrap();
        let socket = directory.path().join("nbd.sock");
        let export = Arc::new(shape(Export::new("disk", volume(device)).description("for tests")));
        server.publish(&export).unwrap();
        let rig = Rig { server, export, runtime, socket, plane, directory };
        rig.listen_unix("nbd.sock", Serves::Shared, None);
        rig
    }

    pub fn listen_unix(&self, name: &str, serves: Serves, tls: Option<TlsSettings>) -> PathBuf {
        let path = self.directory.path().join(name);
        let listener = UnixListener::bind(&path).unwrap();
        let _runtime = self.runtime.enter();
        self.server.listen(Socket::Unix(listener), serves, tls).unwrap();
        path
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    pub fn uri(&self) -> String {
        format!("nbd+unix:///disk?socket={}", self.socket.display())
    }

    /// A client that has chosen the export with these headers.
    pub fn attach(&self, headers: nbd::protocol::Headers) -> Wire {
        Wire::connect(&self.socket).attach("disk", headers)
    }

    /// Waits until this many clients are attached.
    pub fn wait_for_clients(&self, count: usize) {
        wait_for("clients", count as u64, || self.server.clients().len() as u64);
    }

    /// Waits until the device has done this many requests of the first client.
    pub fn wait_for_requests(&self, count: u64) {
        wait_for("requests", count, || self.server.clients()[0].requests);
    }

    /// Bytes of pooled buffers in use on all threads.
    pub fn buffers_used(&self) -> usize {
        self.plane.handles().iter().map(|handle| handle.call(|reactor| reactor.buffers().used_bytes()).unwrap()).sum()
    }
}

impl Drop for Rig {
    fn drop(&mut self) {
        let server = self.server.clone();
        let stopped = self.runtime.block_on(async { tokio::time::timeout(HANG, server.shutdown()).await });
        if !std::thread::panicking() {
            stopped.expect("the server does not shut down");
            assert_eq!(self.buffers_used(), 0, "buffers were lost");
        }
    }
}

fn wait_for(what: &str, count: u64, now: impl Fn() -> u64) {
    let deadline = blockdev::clock::monotonic() + HANG;
    while now() != count {
        assert!(blockdev::clock::monotonic() < deadline, "still {} {what}", now());
        std::thread::sleep(Duration::from_millis(2));
    }
}
