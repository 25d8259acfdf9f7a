//! Serves one volume on a vhost-user socket, for tests and trying things out.
//!
//! `serve_vhost_user SOCKET memory:BYTES|null:BYTES|file:PATH [THREADS [DELAY_MS]]`; commands on standard input: `resize BYTES`,
//! `disconnect`, `quit`.

use std::io::BufRead;
use std::os::unix::net::UnixListener;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use backends::file::{FileDevice, FileOptions};
use blockdev::layers::fault::{FaultPlan, FaultRule, Faulty};
use blockdev::memory_disk::MemoryDisk;
use blockdev::null_disk::NullDisk;
use blockdev::reactor::{DataPlane, DataPlaneOptions};
use blockdev::stats::OpClass;
use blockdev::{BlockDevice, Errno, Volume, VolumeOptions};
use vhost_user_blk::{ExportOptions, VhostUserExport};

fn main() -> Result<()> {
    tracing_subscriber::fmt()
        .with_env_filter(tracing_subscriber::EnvFilter::from_default_env())
        .with_writer(std::io::stderr)
        .init();
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [socket, device, rest @ ..] = arguments.as_slice() else {
        bail!("usage: serve_vhost_user SOCKET memory:BYTES|null:BYTES|file:PATH [THREADS [DELAY_MS]]");
    };
    let threads = rest.first().map_or(Ok(2), |text| text.parse()).context("THREADS")?;
    let delay_ms: u64 = rest.get(1).map_or(Ok(0), |text| text.parse()).context("DELAY_MS")?;
    let mut device = open(device)?;
    if delay_ms > 0 {
        device = delayed(device, Duration::from_millis(delay_ms));
    }
    let options = VolumeOptions { name: "example".into(), read_only: false, block_size: 512 };
    let volume = Volume::new(device, options);
    let plane = DataPlane::start(DataPlaneOptions { threads, ..DataPlaneOptions::default() })?;
    let _ = std::fs::remove_file(socket);
    let listener = UnixListener::bind(socket).with_context(|| format!("listen on {socket}"))?;
    let options = ExportOptions { serial: "example".into(), ..ExportOptions::default() };
    let export = VhostUserExport::start(listener, volume.clone(), plane.handles().to_vec(), options)?;
    println!("ready");
    for line in std::io::stdin().lock().lines() {
        let line = line?;
        match line.split_once(' ').unwrap_or((&line, "")) {
            ("resize", size) => volume.resize(size.parse()?)?,
            ("disconnect", _) => export.disconnect(),
            ("quit", _) => break,
            _ => eprintln!("unknown command: {line}"),
        }
    }
    export.stop();
    Ok(())
}

fn open(device: &str) -> Result<Arc<dyn BlockDevice>> {
    Ok(match device.split_once(':') {
        Some(("memory", size)) => Arc::new(MemoryDisk::new(size.parse()?, 1)),
        Some(("null", size)) => Arc::new(NullDisk::new(size.parse()?)),
        Some(("file", path)) => Arc::new(FileDevice::open(Path::new(path), FileOptions { read_only: false, direct: true })?),
        _ => bail!("no such device: {device}"),
    })
}

fn delayed(device: Arc<dyn BlockDevice>, delay: Duration) -> Arc<dyn BlockDevice> {
    let plan = FaultPlan::new(1);
    let rule = |class| FaultRule { class, errors_per_million: 0, errno: Errno::EIO, delay, jitter: delay };
    plan.set(vec![rule(OpClass::Read), rule(OpClass::Write), rule(OpClass::Flush)]);
    Arc::new(Faulty::new(device, plan))
}
