//! The first command of the README.

mod common;

use std::io::{BufRead, BufReader};
use std::net::{TcpListener, TcpStream};
use std::os::unix::fs::MetadataExt;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Child, Stdio};

use common::{Nbd, command, wait};

/// An ordinary user that every system has.
const NOBODY: u32 = 65534;

/// Starts it and returns what it printed before `ready`.
fn quickstart(folder: &Path) -> (Child, String) {
    let mut child = command()
        .args(["quickstart", "--size", "64M", "--folder"])
        .arg(folder)
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    let text = read_until_ready(&mut child).unwrap_or_else(|text| panic!("it ended: {:?}\n{text}", child.wait()));
    (child, text)
}

/// What it prints before `ready`, or before it ends.
fn read_until_ready(child: &mut Child) -> Result<String, String> {
    let mut text = String::new();
    for line in BufReader::new(child.stdout.take().unwrap()).lines() {
        let line = line.unwrap();
        if line == "ready" {
            return Ok(text);
        }
        text += &line;
        text.push('\n');
    }
    Err(text)
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
    let folder = tempfile::tempdir().unwrap();
    let (child, text) = loop {
        let taken = TcpListener::bind("127.0.0.1:10809");
        let (child, text) = quickstart(&folder.path().join("a".repeat(120)));
        if taken.is_ok() || tcp_port(&text) != 10809 {
            break (child, text);
        }
        // Another test had the port, and gave it back meanwhile.
        end(child);
    };
    assert_ne!(tcp_port(&text), 10809);
    assert!(TcpStream::connect(("127.0.0.1", tcp_port(&text))).is_ok());
    end(child);
}

/// Runs a command as an ordinary user, in a folder of that user's own.
fn as_ordinary_user(program: &Path, folder: &Path) -> std::process::Command {
    let mut command = std::process::Command::new(program);
    command.current_dir(folder).stdin(Stdio::null()).env("HOME", folder).env_remove("XDG_RUNTIME_DIR");
    command.env_remove("NOVASTOR_ADMIN");
    if rustix::process::geteuid().is_root() {
        command.uid(NOBODY).gid(NOBODY);
    }
    command
}

#[test]
fn an_ordinary_user_runs_it_and_pastes_its_lines() {
    let folder = tempfile::tempdir().unwrap();
    // The one just built may lie where only its builder can look. Another process copies it: one that this process has open to
    // write could not be run while another test forks.
    let novastor = folder.path().join("novastor");
    let copied = std::process::Command::new("cp").arg(env!("CARGO_BIN_EXE_novastor")).arg(&novastor).status().unwrap();
    assert!(copied.success());
    if rustix::process::geteuid().is_root() {
        std::os::unix::fs::chown(folder.path(), Some(NOBODY), Some(NOBODY)).unwrap();
    }
    let mut child = as_ordinary_user(&novastor, folder.path())
        .args(["quickstart", "--size", "64M", "--folder", "my disks, all"])
        .stdout(Stdio::piped())
        .stderr(std::fs::File::create(folder.path().join("log")).unwrap())
        .spawn()
        .unwrap();
    let log = || std::fs::read_to_string(folder.path().join("log")).unwrap();
    let text = read_until_ready(&mut child).unwrap_or_else(|text| panic!("it ended:\n{text}\n{}", log()));
    let status = std::fs::metadata(format!("/proc/{}", child.id())).unwrap();
    assert!(!rustix::process::geteuid().is_root() || status.uid() == NOBODY);

    // nbdinfo and qemu-img, each over the unix socket and over TCP.
    let tools = ["nbdinfo '", "qemu-img info '"];
    let lines: Vec<&str> = text.lines().filter(|line| tools.iter().any(|tool| line.starts_with(tool))).collect();
    assert_eq!(lines.len(), 4, "{text}");
    let exported = text.lines().find(|line| line.starts_with("export NOVASTOR_ADMIN=")).unwrap();
    let cli = format!("{exported}; ./novastor volume list; ./novastor export list");
    for line in lines.into_iter().chain([cli.as_str()]) {
        let output = as_ordinary_user(Path::new("/bin/sh"), folder.path()).args(["-c", line]).output().unwrap();
        let said = String::from_utf8_lossy(&output.stdout);
        let is_right = said.contains("67108864") || said.contains("64 MiB") || (line == cli && said.contains("demo"));
        assert!(output.status.success() && is_right, "{line}: {output:?}\n{}", log());
    }
    let uri = text.lines().find_map(|line| line.strip_prefix("nbdinfo '")?.strip_suffix('\'')).unwrap();
    let io = format!("qemu-io -f raw -c 'write -P 5 1M 64k' -c 'read -P 5 1M 64k' '{uri}'");
    let output = as_ordinary_user(Path::new("/bin/sh"), folder.path()).args(["-c", &io]).output().unwrap();
    assert!(output.status.success(), "{io}: {output:?}");
    end(child);
    assert!(!log().contains("ERROR"), "{}", log());
}

#[test]
fn a_second_one_in_the_same_folder_changes_nothing_of_the_first() {
    let folder = tempfile::tempdir().unwrap();
    let data = folder.path().join("novastor-data");
    let (child, _) = quickstart(&data);
    let configuration = || std::fs::read_to_string(data.join("novastor.toml")).unwrap();
    let before = configuration();
    let second = command().args(["quickstart", "--size", "64M", "--folder"]).arg(&data).output().unwrap();
    let said = String::from_utf8_lossy(&second.stderr);
    assert!(second.status.code() == Some(1) && said.contains("used by another novastor"), "{said}");
    assert_eq!(configuration(), before);
    end(child);
}
