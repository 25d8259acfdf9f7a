//! The device against a scripted front end.

mod frontend;
mod hostile;
mod io;
mod lifecycle;
mod model;
mod restart;

use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use blockdev::memory_disk::MemoryDisk;
use blockdev::reactor::{DataPlane, DataPlaneOptions};
use blockdev::{BlockDevice, Volume, VolumeOptions};
use vhost_user_blk::{ExportOptions, VhostUserExport};

pub const DISK: u64 = 64 << 20;

/// An export of a volume in this process.
pub struct Server {
    pub export: Arc<VhostUserExport>,
    pub volume: Arc<Volume>,
    pub plane: DataPlane,
    folder: tempfile::TempDir,
}

impl Server {
    pub fn start() -> Server {
        Server::of(Arc::new(MemoryDisk::new(DISK, 1)))
    }

    pub fn of(device: Arc<dyn BlockDevice>) -> Server {
        Server::with(device, ExportOptions { serial: "serial-0123456789-and-more".into(), ..ExportOptions::default() })
    }

    pub fn with(device: Arc<dyn BlockDevice>, options: ExportOptions) -> Server {
        let folder = tempfile::tempdir().unwrap();
        let volume = Volume::new(device, VolumeOptions { name: "test".into(), read_only: false, block_size: 512 });
        let plane = DataPlane::start(DataPlaneOptions { threads: 2, ..DataPlaneOptions::default() }).unwrap();
        let listener = UnixListener::bind(socket_in(folder.path())).unwrap();
        let export = VhostUserExport::start(listener, volume.clone(), plane.handles().to_vec(), options).unwrap();
        Server { export, volume, plane, folder }
    }

    pub fn socket(&self) -> PathBuf {
        socket_in(self.folder.path())
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.export.stop();
    }
}

fn socket_in(folder: &Path) -> PathBuf {
    folder.join("vhost.sock")
}

/// Waits until `done`, which something in another thread brings about.
pub fn eventually(what: &str, mut done: impl FnMut() -> bool) {
    let deadline = blockdev::clock::monotonic() + frontend::PATIENCE;
    while !done() {
        assert!(blockdev::clock::monotonic() < deadline, "never happened: {what}");
        std::thread::sleep(std::time::Duration::from_millis(1));
    }
}
