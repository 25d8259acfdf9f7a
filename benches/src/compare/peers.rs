//! The other servers and their command lines.

use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result};

use super::process::Running;
use super::rows::{Backing, Protocol, Row};
use super::{NULL_BYTES, Workspace};

/// One way to run another server.
pub struct Peer {
    pub name: &'static str,
    command: fn(&Place<'_>) -> Command,
}

struct Place<'a> {
    socket: &'a Path,
    file: Option<&'a Path>,
    protocol: Protocol,
    backing: Backing,
}

const EXPORT: &str = "disk";

pub fn of(protocol: Protocol, backing: Backing) -> Vec<Peer> {
    let peer = |name, command| Peer { name, command };
    let daemon = "qemu-storage-daemon";
    match (protocol, backing) {
        (Protocol::VhostUser { .. }, Backing::Null) => {
            vec![peer(daemon, |place| storage_daemon(place, ""))]
        }
        (Protocol::VhostUser { .. }, Backing::Tmpfs) => vec![
            peer("qemu-storage-daemon threads", |place| storage_daemon(place, "threads")),
            peer("qemu-storage-daemon io_uring", |place| storage_daemon(place, "io_uring")),
        ],
        (Protocol::VhostUser { .. }, Backing::Direct) => vec![
            peer("qemu-storage-daemon native", |place| storage_daemon(place, "native")),
            peer("qemu-storage-daemon io_uring", |place| storage_daemon(place, "io_uring")),
        ],
        (Protocol::Nbd { .. }, Backing::Null) => {
            vec![peer(daemon, |place| storage_daemon(place, "")), peer("nbdkit null", nbdkit)]
        }
        (Protocol::Nbd { .. }, Backing::Tmpfs) => {
            vec![peer("qemu-storage-daemon io_uring", |place| storage_daemon(place, "io_uring")), peer("nbdkit file", nbdkit)]
        }
        (Protocol::Nbd { .. }, Backing::Direct) => vec![
            peer("qemu-nbd native", |place| qemu_nbd(place, "native")),
            peer("qemu-nbd io_uring", |place| qemu_nbd(place, "io_uring")),
        ],
    }
}

pub fn start(peer: &Peer, row: &Row, workspace: &Workspace) -> Result<Running> {
    let label = peer.name.replace(' ', "-");
    let socket = workspace.run.join(format!("{label}.sock"));
    let _ = std::fs::remove_file(&socket);
    let file = workspace.file(row.backing);
    let place = Place { socket: &socket, file: file.as_deref(), protocol: row.protocol, backing: row.backing };
    let log = workspace.run.join(format!("{label}.log"));
    // A socket that is bound may not be listened on yet; vhost-user servers take one connection only.
    let listens = || match row.protocol {
        Protocol::VhostUser { .. } => socket.exists(),
        Protocol::Nbd { .. } => UnixStream::connect(&socket).is_ok(),
    };
    Running::start(&mut (peer.command)(&place), &log, socket.clone(), EXPORT, listens)
        .with_context(|| format!("start {} (Debian: apt install qemu-system-common qemu-utils nbdkit)", peer.name))
}

/// With an iothread; its file node is exported without a format layer above it.
fn storage_daemon(place: &Place<'_>, engine: &str) -> Command {
    let mut command = Command::new("qemu-storage-daemon");
    command.args(["--object", "iothread,id=io0", "--blockdev"]);
    command.arg(match place.file {
        None => format!("null-co,node-name=d0,size={NULL_BYTES},read-zeroes=on"),
        Some(file) => {
            let direct = if place.backing == Backing::Direct { "on" } else { "off" };
            format!("file,node-name=d0,filename={},cache.direct={direct},aio={engine},discard=unmap", file.display())
        }
    });
    let socket = place.socket.display();
    match place.protocol {
        Protocol::VhostUser { queues } => command.arg("--export").arg(format!(
            "vhost-user-blk,id=e0,node-name=d0,addr.type=unix,addr.path={socket},writable=on,num-queues={queues},iothread=io0"
        )),
        Protocol::Nbd { .. } => command
            .arg("--nbd-server")
            .arg(format!("addr.type=unix,addr.path={socket}"))
            .arg("--export")
            .arg(format!("nbd,id=e0,node-name=d0,name={EXPORT},writable=on,iothread=io0")),
    };
    command
}

fn nbdkit(place: &Place<'_>) -> Command {
    let mut command = Command::new("nbdkit");
    command.args(["--foreground", "--unix"]).arg(place.socket);
    match place.file {
        None => command.arg("null").arg(format!("size={NULL_BYTES}")),
        Some(file) => command.arg("file").arg(file),
    };
    command
}

fn qemu_nbd(place: &Place<'_>, engine: &str) -> Command {
    let mut command = Command::new("qemu-nbd");
    command.args(["--persistent", "--shared=0", "--format=raw", "--cache=none", "--discard=unmap"]);
    command.arg(format!("--aio={engine}")).arg(format!("--export-name={EXPORT}"));
    command.arg("--socket").arg(place.socket).args(place.file);
    command
}
