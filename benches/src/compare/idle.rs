//! What a hundred volumes cost while nothing happens: each exported over vhost-user, each with a front end that has read one
//! block and stays connected.

use std::path::PathBuf;
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result};
use serde::Serialize;

use super::novastor::{self, Daemon};
use super::process::Running;
use super::{NULL_BYTES, Options, Workspace};
use crate::clock;
use crate::requests::{Access, Workload};
use crate::vhost::{Device, Pages, VhostLoad, Waiting};

pub const NAME: &str = "idle";
pub const WHAT: &str = "100 volumes, each with a connected, idle vhost-user front end";
pub const CPU_PERCENT_MAX: f64 = 1.0;
pub const RESIDENT_MIB_MAX: f64 = 100.0;

const VOLUMES: usize = 100;
const SETTLE: Duration = Duration::from_secs(2);

#[derive(Serialize)]
pub struct IdleOutcome {
    pub server: String,
    pub cpu_percent: f64,
    pub resident_mib: f64,
}

pub fn compare(options: &Options, workspace: &Workspace) -> Result<Vec<IdleOutcome>> {
    let mut outcomes = Vec::new();
    if !options.peers_only {
        let (server, sockets) = start_novastor(options, workspace).context("start novastor for the idle row")?;
        outcomes.push(observe(novastor::NAME, &server, &sockets, options)?);
    }
    let (server, sockets) = start_storage_daemon(workspace).context("start qemu-storage-daemon for the idle row")?;
    outcomes.push(observe("qemu-storage-daemon", &server, &sockets, options)?);
    Ok(outcomes)
}

fn start_novastor(options: &Options, workspace: &Workspace) -> Result<(Running, Vec<PathBuf>)> {
    let folder = workspace.run.join("idle");
    let daemon = Daemon::new(options, &folder)?;
    let server = daemon.serve("null")?;
    let sockets: Vec<PathBuf> = (0..VOLUMES).map(|index| folder.join(format!("{index}.sock"))).collect();
    for (index, socket) in sockets.iter().enumerate() {
        let volume = format!("v{index}");
        daemon.client(&["volume", "create", &volume, "--pool", novastor::POOL, "--size", &NULL_BYTES.to_string()])?;
        daemon.export_vhost_user(&volume, socket)?;
    }
    Ok((server, sockets))
}

fn start_storage_daemon(workspace: &Workspace) -> Result<(Running, Vec<PathBuf>)> {
    let sockets: Vec<PathBuf> = (0..VOLUMES).map(|index| workspace.run.join(format!("idle-{index}.sock"))).collect();
    let mut command = Command::new("qemu-storage-daemon");
    command.args(["--object", "iothread,id=io0"]);
    for (index, socket) in sockets.iter().enumerate() {
        command.arg("--blockdev").arg(format!("null-co,node-name=d{index},size={NULL_BYTES},read-zeroes=on"));
        command.arg("--export").arg(format!(
            "vhost-user-blk,id=e{index},node-name=d{index},addr.type=unix,addr.path={},writable=on,iothread=io0",
            socket.display()
        ));
    }
    let log = workspace.run.join("idle-qemu-storage-daemon.log");
    let server = Running::start(&mut command, &log, sockets[0].clone(), "", || sockets.iter().all(|path| path.exists()))?;
    Ok((server, sockets))
}

fn observe(name: &str, server: &Running, sockets: &[PathBuf], options: &Options) -> Result<IdleOutcome> {
    let workload = Workload { block_size: 4096, depth: 1, access: Access::Random, write_percent: 0 };
    let connect = |socket: &PathBuf| -> Result<Device> {
        let waiting = Waiting::SpinThenSleep { spin_us: 0 };
        let socket = socket.clone();
        let load = VhostLoad { socket, queues: 1, thread_per_queue: false, waiting, workload, span: None, pages: Pages::Small };
        let mut device = Device::open(&load, None)?;
        device.touch(&workload)?;
        Ok(device)
    };
    let front_ends = sockets.iter().map(connect).collect::<Result<Vec<Device>>>()?;
    std::thread::sleep(SETTLE);
    let (cpu_before, before) = (clock::process_cpu_ns(server.pid())?, clock::now_ns());
    std::thread::sleep(Duration::from_secs_f64(options.idle_seconds));
    let (cpu_after, after) = (clock::process_cpu_ns(server.pid())?, clock::now_ns());
    let resident_mib = server.resident_bytes()? as f64 / f64::from(1 << 20);
    drop(front_ends);
    Ok(IdleOutcome {
        server: name.into(),
        cpu_percent: (cpu_after - cpu_before) as f64 / (after - before) as f64 * 100.0,
        resident_mib,
    })
}
