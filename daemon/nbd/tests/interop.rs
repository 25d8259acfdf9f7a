//! Other people's clients: nbdinfo and nbdcopy of libnbd, qemu-img and qemu-io of QEMU, fio. They must be installed.

mod common;

use std::fs;
use std::io::Write;
use std::ops::Range;
use std::path::Path;
use std::process::Command;
use std::rc::Rc;
use std::sync::Arc;

use blockdev::{BlockDevice, Capabilities, DeviceError, Geometry, IoQueue, Reactor};
use common::{Rig, memory};
use nbd::protocol::PAYLOAD_MAX;
use nbd::{Contexts, ServerOptions};

const SIZE: u64 = 64 << 20;

/// Runs a tool, which must be installed and succeed, and returns what it printed.
fn run(program: &str, arguments: &[&str]) -> String {
    let output = Command::new("timeout")
        .args(["120", program])
        .args(arguments)
        .output()
        .unwrap_or_else(|error| panic!("{program}: {error}"));
    let text = format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert!(output.status.success(), "{program} {arguments:?}: {}\n{text}", output.status);
    text
}

/// A sparse file with data in the middle and at its odd end.
fn source(path: &Path) {
    let mut file = fs::File::create(path).unwrap();
    file.set_len(SIZE).unwrap();
    let data: Vec<u8> = (0..9 << 20).map(|at: u32| (at.wrapping_mul(2_654_435_761) >> 24) as u8).collect();
    std::io::Seek::seek(&mut file, std::io::SeekFrom::Start(5 << 20)).unwrap();
    file.write_all(&data).unwrap();
    std::io::Seek::seek(&mut file, std::io::SeekFrom::Start(SIZE - 12_345)).unwrap();
    file.write_all(&data[..12_345]).unwrap();
}

#[test]
fn nbdinfo_sees_what_is_offered() {
    let rig = Rig::new(memory(SIZE));
    let info = run("nbdinfo", &[&rig.uri()]);
    for line in [
        "export-size: 67108864 (64M)",
        "base:allocation",
        "description: for tests",
        "is_read_only: false",
        "can_cache: false",
        "can_df: true",
        "can_fast_zero: true",
        "can_flush: true",
        "can_fua: true",
        "can_multi_conn: true",
        "can_trim: true",
        "can_zero: true",
        "block_size_minimum: 1",
        &format!("block_size_maximum: {PAYLOAD_MAX}"),
    ] {
        assert!(info.contains(line), "{line} is missing in:\n{info}");
    }
    let list = run("nbdinfo", &["--list", &format!("nbd+unix:///?socket={}", rig.socket.display())]);
    assert!(list.contains("export=\"disk\""), "{list}");
    let map = run("nbdinfo", &["--map", &rig.uri()]);
    assert!(map.split_whitespace().eq(["0", "67108864", "3", "hole,zero"]), "{map}");
}

/// A disk whose reads warm a cache, as those through a page cache do.
struct Cached(Arc<dyn BlockDevice>);

impl BlockDevice for Cached {
    fn geometry(&self) -> Geometry {
        self.0.geometry()
    }
    fn capabilities(&self) -> Capabilities {
        Capabilities { caches_reads: true, ..self.0.capabilities() }
    }
    fn open_queue(&self, reactor: &Rc<Reactor>) -> Result<Box<dyn IoQueue>, DeviceError> {
        self.0.open_queue(reactor)
    }
    fn resize(&self, size: u64) -> Result<(), DeviceError> {
        self.0.resize(size)
    }
}

#[test]
fn caching_is_offered_where_reads_are_cached() {
    let rig = Rig::new(Arc::new(Cached(memory(SIZE))));
    assert!(run("nbdinfo", &[&rig.uri()]).contains("can_cache: true"));
}

/// A context whose marks are the same for everybody.
struct Marks;

impl Contexts for Marks {
    fn names(&self) -> Vec<String> {
        vec!["test:marks:one".to_owned(), "test:marks:none".to_owned(), "test:away".to_owned()]
    }

    fn marked(&self, name: &str) -> Result<Vec<Range<u64>>, String> {
        match name {
            "test:marks:one" => Ok(vec![1 << 20..3 << 20, 10 << 20..10 << 20 | 4096, SIZE..u64::MAX]),
            "test:marks:none" => Ok(Vec::new()),
            _ => Err("the pool is away".to_owned()),
        }
    }
}

fn rig_with_marks() -> Rig {
    Rig::with(memory(SIZE), 1, ServerOptions::default(), |export| export.contexts(Arc::new(Marks)))
}

#[test]
fn nbdinfo_lists_an_exports_own_contexts_and_maps_them() {
    let rig = rig_with_marks();
    let info = run("nbdinfo", &[&rig.uri()]);
    for context in ["base:allocation", "test:marks:one", "test:marks:none", "test:away"] {
        assert!(info.contains(context), "{context} is missing in:\n{info}");
    }
    let words = |context: &str| -> Vec<String> {
        let map = run("nbdinfo", &[&format!("--map={context}"), &rig.uri()]);
        map.lines().map(|line| line.split_whitespace().take(3).collect::<Vec<_>>().join(" ")).collect()
    };
    let expected = ["0 1048576 0", "1048576 2097152 1", "3145728 7340032 0", "10485760 4096 1", "10489856 56619008 0"];
    assert_eq!(words("test:marks:one"), expected);
    assert_eq!(words("test:marks:none"), ["0 67108864 0"]);
    assert_eq!(words("base:allocation"), ["0 67108864 3"]);
}

#[test]
fn qemu_img_takes_a_context_for_a_dirty_bitmap() {
    let rig = rig_with_marks();
    let options = |context: &str| {
        let socket = rig.socket.display();
        format!("driver=nbd,export=disk,server.type=unix,server.path={socket},x-dirty-bitmap={context}")
    };
    let map = run("qemu-img", &["map", "--output=json", "--image-opts", &options("test:marks:one")]);
    let dirty: Vec<&str> = map.lines().filter(|line| line.contains("\"data\": false")).collect();
    assert_eq!(dirty.len(), 2, "{map}");
    for (line, start, length) in [(dirty[0], 1048576, 2097152), (dirty[1], 10485760, 4096)] {
        assert!(line.contains(&format!("\"start\": {start}, \"length\": {length},")), "{line}");
    }
}

#[test]
fn nbdcopy_copies_both_ways_and_keeps_holes() {
    let rig = Rig::new(memory(SIZE));
    let (from, to) = (rig.path("from.raw"), rig.path("to.raw"));
    source(&from);
    run("nbdcopy", &["--connections=4", "--flush", from.to_str().unwrap(), &rig.uri()]);
    run("nbdcopy", &["--connections=4", &rig.uri(), to.to_str().unwrap()]);
    run("cmp", &[from.to_str().unwrap(), to.to_str().unwrap()]);
    let map = run("nbdinfo", &["--map", "--totals", &rig.uri()]);
    assert!(map.contains("hole,zero"), "{map}");
    run("nbdcopy", &["--synchronous", &rig.uri(), "null:"]);
}

#[test]
fn qemu_img_converts_and_compares() {
    let rig = Rig::new(memory(SIZE));
    let (from, image) = (rig.path("from.raw"), rig.path("image.qcow2"));
    let (from, image) = (from.to_str().unwrap(), image.to_str().unwrap());
    source(Path::new(from));
    run("qemu-img", &["convert", "-n", "-f", "raw", "-O", "raw", "-W", "-m", "8", from, &rig.uri()]);
    run("qemu-img", &["compare", "-f", "raw", "-F", "raw", from, &rig.uri()]);
    run("qemu-img", &["convert", "-f", "raw", "-O", "qcow2", &rig.uri(), image]);
    run("qemu-img", &["compare", "-F", "raw", image, &rig.uri()]);
    let map = run("qemu-img", &["map", "--output=json", "-f", "raw", &rig.uri()]);
    assert!(map.contains("\"zero\": true"), "{map}");
    let io = ["-f", "raw", "-c", "write -P 9 -f 1000 70000", "-c", "write -z -u 2000 5000", "-c", "discard 1M 1M", "-c", "flush"];
    run("qemu-io", &[&io[..], &[&rig.uri()]].concat());
    let check = ["-f", "raw", "-c", "read -P 0 2000 5000", "-c", "read -P 9 7000 64000", "-c", "read -P 9 1000 1000"];
    let seen = run("qemu-io", &[&check[..], &[&rig.uri()]].concat());
    assert!(!seen.contains("verification failed"), "{seen}");
}

#[test]
fn fio_verifies_what_it_wrote() {
    let rig = Rig::new(memory(SIZE));
    let uri = format!("--uri={}", rig.uri());
    let job = ["--name=verify", "--ioengine=nbd", &uri, "--rw=randwrite", "--bsrange=512-256k", "--bs_unaligned", "--size=64m"];
    let verify =
        ["--iodepth=32", "--verify=crc32c", "--verify_fatal=1", "--trim_percentage=0", "--randseed=7", "--verify_state_save=0"];
    let seen = run("fio", &[&job[..], &verify].concat());
    assert!(seen.contains("err= 0"), "{seen}");
}
