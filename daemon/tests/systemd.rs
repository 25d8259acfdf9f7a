//! The service manager: readiness, and sockets it opens for the daemon.

mod common;

use std::os::fd::AsRawFd;
use std::os::unix::net::{UnixDatagram, UnixListener, UnixStream};
use std::process::{Command, Stdio};
use std::time::Duration;

use common::{Daemon, Nbd, exists, wait};

/// A shell that passes descriptor `fd` on as the service manager would, and becomes the daemon.
fn activated(daemon: &Daemon, listener: &UnixListener, notify: &std::path::Path) -> Command {
    let inherited = rustix::io::dup(listener).unwrap();
    let fd = inherited.as_raw_fd();
    // The shell inherits it; nothing closes it before that.
    std::mem::forget(inherited);
    let script = format!("exec 3<&{fd}; LISTEN_PID=$$ LISTEN_FDS=1 exec \"$NOVASTOR\" serve --config \"$CONFIG\"");
    let mut command = Command::new("sh");
    command
        .arg("-c")
        .arg(script)
        .env("NOVASTOR", env!("CARGO_BIN_EXE_novastor"))
        .env("CONFIG", daemon.path("novastor.toml"))
        .env("NOTIFY_SOCKET", notify)
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(std::fs::File::create(daemon.path("log")).unwrap());
    command
}

fn receive(socket: &UnixDatagram) -> String {
    let mut buffer = [0; 4096];
    let len = socket.recv(&mut buffer).unwrap();
    String::from_utf8_lossy(&buffer[..len]).into_owned()
}

#[test]
fn a_passed_socket_is_served_and_left_and_the_manager_is_told() {
    let daemon = Daemon::new("[[export]]\nvolume = \"memory/v\"\nnbd = true\n");
    let path = daemon.path("nbd.sock");
    let listener = UnixListener::bind(&path).unwrap();
    let notify_path = daemon.path("notify");
    let notify = UnixDatagram::bind(&notify_path).unwrap();
    notify.set_read_timeout(Some(Duration::from_secs(60))).unwrap();

    // A client that came before the daemon waits in the socket's queue.
    let early = UnixStream::connect(&path).unwrap();
    let mut child = activated(&daemon, &listener, &notify_path).spawn().unwrap();
    assert!(receive(&notify).contains("READY=1"), "{}", daemon.log());
    daemon.json(&["volume", "create", "memory/v", "--size", "1M"]);
    common::eventually("the declared export is served", || daemon.json(&["export", "list"])[0]["ready"] == true);
    assert_eq!(Nbd::attach(early, "v").unwrap().size, 1 << 20);

    rustix::process::kill_process(rustix::process::Pid::from_child(&child), rustix::process::Signal::TERM).unwrap();
    assert!(receive(&notify).contains("STOPPING=1"));
    assert!(wait(&mut child).success());
    assert!(exists(&path), "the socket is the service manager's");
    assert!(UnixStream::connect(&path).is_ok(), "clients wait for the next daemon");
}
