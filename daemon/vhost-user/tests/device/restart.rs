//! The server is killed and started again under a front end that goes on, with requests in flight on a slow disk.
//!
//! The in-flight log, which the front end holds meanwhile, must bring back exactly the requests that were not answered; the
//! front end may ask to go on from either index: of what was made available, or of what was used.

use std::io::{BufRead, BufReader};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::Ordering;
use std::time::Duration;

use crate::frontend::*;
use crate::{DISK, eventually};

const DEPTH: u16 = 32;
const RING: u16 = 128;
const SECTORS: u64 = 8;

/// The example server in a process of its own.
struct Process(Child);

impl Process {
    fn start(socket: &Path, disk: &Path, delay_ms: u32) -> Process {
        let mut child = Command::new(example())
            .args([socket.to_str().unwrap(), &format!("file:{}", disk.display()), "2", &delay_ms.to_string()])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let mut line = String::new();
        BufReader::new(child.stdout.take().unwrap()).read_line(&mut line).unwrap();
        assert_eq!(line, "ready\n");
        Process(child)
    }
}

impl Drop for Process {
    /// As SIGKILL does it: no word to anybody.
    fn drop(&mut self) {
        self.0.kill().unwrap();
        self.0.wait().unwrap();
    }
}

/// Built together with this test, into the folder beside it.
fn example() -> PathBuf {
    let mut path = std::env::current_exe().unwrap();
    path.pop();
    path.pop();
    path.push("examples/serve_vhost_user");
    assert!(path.exists(), "{} was not built: cargo build --examples", path.display());
    path
}

struct Rig {
    /// One with a short path, for the socket, and one on the disk that is built on.
    _folders: [tempfile::TempDir; 2],
    socket: PathBuf,
    disk: PathBuf,
}

impl Rig {
    fn new() -> Rig {
        let folders = [tempfile::tempdir().unwrap(), tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap()];
        let (socket, disk) = (folders[0].path().join("s"), folders[1].path().join("disk"));
        std::fs::File::create(&disk).unwrap().set_len(DISK).unwrap();
        Rig { _folders: folders, socket, disk }
    }

    fn server(&self, delay_ms: u32) -> Process {
        Process::start(&self.socket, &self.disk, delay_ms)
    }
}

struct Log {
    payload: Vec<u8>,
    file: OwnedFd,
}

impl Log {
    fn get(frontend: &Frontend) -> Log {
        let wanted = [u64s(&[0, 0]), vec![1, 0, RING as u8, 0, 0, 0, 0, 0]].concat();
        let mut reply = frontend.ask(req::GET_INFLIGHT_FD, &wanted);
        assert_eq!(reply.payload[16..20], [1, 0, RING as u8, 0]);
        Log { payload: reply.payload, file: reply.fds.pop().expect("a descriptor") }
    }

    fn set(&self, frontend: &Frontend) {
        frontend.must(req::SET_INFLIGHT_FD, &self.payload, &[self.file.as_fd()]);
    }
}

fn offer(queue: &Queue, memory: &SharedMemory, number: u16, round: u8) {
    offer_at(3 * number, queue, memory, number, round);
}

/// The same, with the chain that begins at this descriptor, and so with a buffer of its own.
fn offer_at(head: u16, queue: &Queue, memory: &SharedMemory, number: u16, round: u8) {
    let bytes = vec![round * 40 + number as u8 + 1; SECTORS as usize * 512];
    queue.write_request(memory, head, T_OUT, u64::from(number) * SECTORS, Data::Out(&bytes));
    queue.offer(memory, head);
}

/// Which of two indices the front end sends as its base.
#[derive(Clone, Copy, Debug)]
enum Base {
    Used,
    Available,
}

/// Kills the server when about `answered` of the requests in flight were answered, `rounds` times; every request is answered
/// once, and the disk holds what was written last.
fn survives(base: Base, rounds: u8) {
    let rig = Rig::new();
    let mut server = rig.server(40);
    let mut memory = SharedMemory::new(MEMORY);
    let mut frontend = Frontend::connect_with(&rig.socket, memory, u64::MAX);
    let log = Log::get(&frontend);
    log.set(&frontend);
    let mut queue = Queue::new(0, RING);
    frontend.start(&queue, 0);
    let mut answers = [0u32; DEPTH as usize];
    for round in 0..rounds {
        for number in 0..DEPTH {
            offer(&queue, &frontend.memory, number, round);
        }
        queue.kick();
        let goal = queue.seen_used.wrapping_add(u16::from(round % 4) * 4);
        eventually("some are answered", || queue.used_index(&frontend.memory).wrapping_sub(goal) < RING);
        drop(server);
        let used = queue.used_index(&frontend.memory);
        let available = queue.avail_index(&frontend.memory);
        Frontend { memory, .. } = frontend;
        server = rig.server(if round + 1 == rounds { 0 } else { 40 });
        frontend = Frontend::connect_with(&rig.socket, memory, u64::MAX);
        log.set(&frontend);
        frontend.start(&queue, if matches!(base, Base::Used) { used } else { available });
        let before = answers;
        for _ in 0..DEPTH {
            let (head, _) = queue.wait_used(&frontend.memory);
            assert_eq!(queue.status(&frontend.memory, head), 0);
            answers[usize::from(head) / 3] += 1;
        }
        for (now, before) in answers.iter().zip(before) {
            assert_eq!(*now, before + 1, "each request is answered exactly once");
        }
        assert!(queue.take_used(&frontend.memory).is_none(), "and nothing else is");
    }
    for number in 0..DEPTH {
        let sector = u64::from(number) * SECTORS;
        assert_eq!(queue.run(&frontend.memory, T_IN, sector, Data::In(512)), 0);
        assert_eq!(queue.read_data(&frontend.memory, 0, 512), [(rounds - 1) * 40 + number as u8 + 1; 512]);
    }
    drop(server);
}

/// A loop device that the kernel lets one process write to slowly: what it has taken outlives the process.
struct SlowDisk {
    device: PathBuf,
    group: PathBuf,
    _file: tempfile::NamedTempFile,
}

impl SlowDisk {
    const BYTES_PER_SECOND: u64 = 32 << 10;

    fn new() -> SlowDisk {
        let file = tempfile::NamedTempFile::new_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
        file.as_file().set_len(DISK).unwrap();
        let losetup = Command::new("losetup").args(["--find", "--show"]).arg(file.path()).output().unwrap();
        assert!(losetup.status.success(), "{}", String::from_utf8_lossy(&losetup.stderr));
        let device = PathBuf::from(String::from_utf8(losetup.stdout).unwrap().trim());
        let number = std::fs::metadata(&device).unwrap().rdev();
        let number = format!("{}:{}", libc::major(number), libc::minor(number));
        let name = format!("novastor-test-{}", std::process::id());
        let rate = Self::BYTES_PER_SECOND;
        let group = match Path::new("/sys/fs/cgroup/blkio") {
            old if old.exists() => limited(old.join(name), "blkio.throttle.write_bps_device", &format!("{number} {rate}")),
            _ => {
                std::fs::write("/sys/fs/cgroup/cgroup.subtree_control", "+io").unwrap();
                limited(Path::new("/sys/fs/cgroup").join(name), "io.max", &format!("{number} wbps={rate}"))
            }
        };
        SlowDisk { device, group, _file: file }
    }

    fn slow_down(&self, process: &Process) {
        std::fs::write(self.group.join("cgroup.procs"), process.0.id().to_string()).unwrap();
    }
}

fn limited(group: PathBuf, limit: &str, value: &str) -> PathBuf {
    std::fs::create_dir(&group).unwrap();
    std::fs::write(group.join(limit), value).unwrap();
    group
}

impl Drop for SlowDisk {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir(&self.group);
        let _ = Command::new("losetup").arg("--detach").arg(&self.device).status();
    }
}

/// The kernel has more than a second of the dead server's writes when the next one starts, which is not slowed down. The newer writes
/// have buffers of their own: a late one takes what stands in its buffer by then.
#[test]
fn no_late_write_of_the_dead_server_overtakes_a_newer_one() {
    const DEPTH: u16 = super::restart::DEPTH / 2;
    let slow = SlowDisk::new();
    let folder = tempfile::tempdir().unwrap();
    let socket = folder.path().join("s");
    let mut server = Process::start(&socket, &slow.device, 0);
    let mut memory = SharedMemory::new(MEMORY);
    let mut frontend = Frontend::connect_with(&socket, memory, u64::MAX);
    let log = Log::get(&frontend);
    log.set(&frontend);
    let mut queue = Queue::new(0, RING);
    frontend.start(&queue, 0);
    for round in 0..3u8 {
        slow.slow_down(&server);
        let base = queue.used_index(&frontend.memory);
        for number in 0..DEPTH {
            offer(&queue, &frontend.memory, number, 2 * round);
        }
        queue.kick();
        eventually("some are answered", || queue.used_index(&frontend.memory).wrapping_sub(base) >= 4);
        drop(server);
        let used = queue.used_index(&frontend.memory);
        assert!(used.wrapping_sub(base) < DEPTH, "the disk was not slow");
        Frontend { memory, .. } = frontend;
        server = Process::start(&socket, &slow.device, 0);
        frontend = Frontend::connect_with(&socket, memory, u64::MAX);
        log.set(&frontend);
        frontend.start(&queue, used);
        let settle = |queue: &mut Queue, frontend: &Frontend| {
            for _ in 0..DEPTH {
                let (head, _) = queue.wait_used(&frontend.memory);
                assert_eq!(queue.status(&frontend.memory, head), 0);
            }
        };
        settle(&mut queue, &frontend);
        for number in 0..DEPTH {
            offer_at(3 * (DEPTH + number), &queue, &frontend.memory, number, 2 * round + 1);
        }
        queue.kick();
        settle(&mut queue, &frontend);
        std::thread::sleep(Duration::from_secs(u64::from(DEPTH) * SECTORS * 512 / SlowDisk::BYTES_PER_SECOND + 1));
        for number in 0..DEPTH {
            let sector = u64::from(number) * SECTORS;
            let head = 6 * DEPTH;
            queue.write_request(&frontend.memory, head, T_IN, sector, Data::In(512));
            queue.offer(&frontend.memory, head);
            queue.kick();
            queue.wait_used(&frontend.memory);
            let expected = (2 * round + 1) * 40 + number as u8 + 1;
            assert_eq!(queue.read_data(&frontend.memory, head, 4), [expected; 4], "round {round}, request {number}");
        }
    }
    drop(server);
}

#[test]
fn a_killed_server_goes_on_from_the_used_index() {
    survives(Base::Used, 5);
}

#[test]
fn a_killed_server_goes_on_from_the_available_index() {
    survives(Base::Available, 5);
}

#[test]
fn a_write_cache_switched_off_stays_off() {
    let rig = Rig::new();
    let server = rig.server(0);
    let frontend = Frontend::connect(&rig.socket);
    let log = Log::get(&frontend);
    log.set(&frontend);
    frontend.must(req::SET_CONFIG, &[&u32s(&[32, 1, 0])[..], &[0]].concat(), &[]);
    drop(server);
    let _server = rig.server(0);
    let frontend = Frontend::connect(&rig.socket);
    assert_eq!(frontend.config(32, 1), [1], "a front end that brings no log starts anew");
    log.set(&frontend);
    assert_eq!(frontend.config(32, 1), [0], "a driver does not say it again after a restart");
}

#[test]
fn a_replayed_request_without_io_is_answered_too() {
    let rig = Rig::new();
    let _server = rig.server(0);
    let frontend = Frontend::connect(&rig.socket);
    let log = Log::get(&frontend);
    let size = u64::from_ne_bytes(log.payload[..8].try_into().unwrap());
    let mapped = SharedMemory::map(log.file.try_clone().unwrap(), size);
    let mut queue = Queue::new(0, RING);
    queue.write_request(&frontend.memory, 0, T_GET_ID, 0, Data::In(20));
    queue.offer(&frontend.memory, 0);
    // Version 1, head 0 in flight: a server that took it was killed.
    mapped.u16(8).store(1, Ordering::SeqCst);
    mapped.write(16, &[1]);
    log.set(&frontend);
    frontend.start(&queue, 0);
    assert_eq!(queue.wait_used(&frontend.memory).0, 0);
    assert_eq!(queue.status(&frontend.memory, 0), 0);
}

#[test]
fn a_log_full_of_garbage_is_survived() {
    let rig = Rig::new();
    let server = rig.server(0);
    let frontend = Frontend::connect(&rig.socket);
    let log = Log::get(&frontend);
    let size = u64::from_ne_bytes(log.payload[..8].try_into().unwrap());
    let mapped = SharedMemory::map(log.file.try_clone().unwrap(), size);
    mapped.write(0, &vec![0xff; size as usize]);
    mapped.u16(8).store(1, Ordering::SeqCst);
    log.set(&frontend);
    let mut queue = Queue::new(0, 64);
    frontend.start(&queue, 0);
    assert_eq!(queue.run(&frontend.memory, T_OUT, 0, Data::Out(&[1; 512])), 0);
    let bad = [u64s(&[u64::MAX, 0]), vec![1, 0, 64, 0, 0, 0, 0, 0]].concat();
    assert_ne!(frontend.try_tell(req::SET_INFLIGHT_FD, &bad, &[log.file.as_fd()]), 0);
    drop(server);
}
