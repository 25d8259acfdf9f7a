//! Serves a disk in memory, for trying clients: `serve_nbd [null|memory] SIZE_BYTES SOCKET`.

use std::error::Error;
use std::sync::Arc;

use blockdev::memory_disk::MemoryDisk;
use blockdev::null_disk::NullDisk;
use blockdev::reactor::DataPlaneOptions;
use blockdev::{BlockDevice, DataPlane, Volume, VolumeOptions};
use nbd::{Export, Server, ServerOptions, Serves, Socket};

fn main() -> Result<(), Box<dyn Error>> {
    let mut arguments = std::env::args().skip(1);
    let kind = arguments.next().ok_or("which device?")?;
    let size: u64 = arguments.next().ok_or("how many bytes?")?.parse()?;
    let path = arguments.next().ok_or("which socket?")?;
    let device: Arc<dyn BlockDevice> = match kind.as_str() {
        "null" => Arc::new(NullDisk::new(size)),
        _ => Arc::new(MemoryDisk::new(size, 1)),
    };
    let options = VolumeOptions { name: "disk".into(), read_only: false, block_size: 512 };
    let volume = Volume::new(device, options);
    let plane = DataPlane::start(DataPlaneOptions::default())?;
    let server = Server::new(plane.handles(), ServerOptions::default());
    server.publish(&Arc::new(Export::new("disk", volume).description("a disk in memory")))?;
    let _ = std::fs::remove_file(&path);
    let listener = std::os::unix::net::UnixListener::bind(&path)?;
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build()?;
    runtime.block_on(async {
        server.listen(Socket::Unix(listener), Serves::Shared, None)?;
        tokio::signal::ctrl_c().await?;
        server.shutdown().await;
        Ok(())
    })
}
