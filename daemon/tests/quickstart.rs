//! The first command of the README.

mod common;

use std::io::{BufRead, BufReader};
use std::net::{TcpListener, TcpStream};
use std::path::Path;
use std::process::{Child, Stdio};

use common::{Nbd, command, wait};

/// Starts it and returns what it printed before `ready`.
fn quickstart(folder: &Path) -> (Child, String) {
    let mut child = command()
        .args(["quickstart", "--size", "64M", "--folder"])
        .arg(folder)
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    let mut text = String::new();
    for line in BufReader::new(child.stdout.take().unwrap()).lines() {
        let line = line.unwrap();
        if line == "ready" {
            return (child, text);
        }
        text += &line;
        text.push('\n');
    }
    panic!("it ended: {:?}\n{text}", child.wait());
}

fn end(mut child: Child) {
    rustix::process::kill_process(rustix::process::Pid::from_child(&child), rustix::process::Signal::INT).unwrap();
    assert!(wait(&mut child).success());
}

fn tcp_port(text: &str) -> u16 {
    let line = text.lines().find(|line| line.starts_with("nbdinfo 'nbd://127.0.0.1:")).unwrap();
    line["nbdinfo 'nbd://127.0.0.1:".len()..].split('/').next().unwrap().parse().unwrap()
}

#[test]
fn it_serves_a_disk_and_can_be_run_again() {
    let folder = tempfile::tempdir().unwrap();
    let data = folder.path().join("novastor-data");
    let (child, text) = quickstart(&data);
    for tool in ["qemu", "nbd-client", "qemu-img", "fio", "cloud-hypervisor"] {
        assert!(text.contains(&format!("# {tool}")), "{tool} is not in\n{text}");
    }
    let attach = |text: &str| Nbd::attach(TcpStream::connect(("127.0.0.1", tcp_port(text))).unwrap(), "demo").unwrap();
    let mut client = attach(&text);
    assert_eq!(client.size, 64 << 20);
    assert_eq!((client.write(0, b"hello"), client.flush()), (0, 0));
    assert!(std::os::unix::net::UnixStream::connect(data.join("run/demo.sock")).is_ok());
    end(child);

    let (child, text) = quickstart(&data);
    assert_eq!(attach(&text).read(0, 5), b"hello");
    end(child);
}

#[test]
fn it_takes_another_port_and_a_folder_with_a_long_path() {
    let _taken = TcpListener::bind("127.0.0.1:10809");
    let folder = tempfile::tempdir().unwrap();
    let (child, text) = quickstart(&folder.path().join("a".repeat(120)));
    assert_ne!(tcp_port(&text), 10809);
    assert!(TcpStream::connect(("127.0.0.1", tcp_port(&text))).is_ok());
    end(child);
}
