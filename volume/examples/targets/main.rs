//! Measures a mapped volume against what it is meant to reach: requests to its store, bytes written in vain, times of what must be quick.
//!
//! `cargo run --release -p volume --example targets [-- ROW…]`, `-- images DATASET`, see `images`, or `-- snapshots-large GIB`. The rows of counts need no quiet machine; those of times do. Needs 12 GiB of
//! memory, and 12 GiB of disk under the folder for temporary files.

mod costs;
mod images;
mod killed;
mod latency;
mod memory;
mod rig;
mod store;

use std::fs::File;
use std::path::Path;
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;
use std::time::{Duration, Instant};

use backends::file::{FileDevice, FileOptions};
use backends::segments::OpenOptions;
use backends::segments::directory::DirectoryStore;
use blockdev::{Op, clock};
use rig::{BLOCK, GIB, MIB, Random, Rig};
use store::Counting;
use uuid::Uuid;
use volume::{Durability, Settings};

type Row = (&'static str, fn());

const ROWS: [Row; 11] = [
    ("puts", puts),
    ("flush", flush),
    ("latency", latency::measure),
    ("amplification", amplification),
    ("snapshots", dead_space_beside_snapshots),
    ("opening", opening),
    ("killed", killed::measure),
    ("memory", memory::measure),
    ("snapshot", snapshot_of_a_tebibyte),
    ("costs", costs::measure),
    ("trim", trim),
];

/// Takes an hour or more, so it is measured only if asked for.
const LARGE: Row = ("snapshots-large", || dead_space_in_directory(100));

fn main() {
    let wanted: Vec<String> = std::env::args().skip(1).collect();
    if let [row, dataset] = &wanted[..]
        && row == "images"
    {
        print_head();
        return images::measure(Path::new(dataset));
    }
    if let [row, gib] = &wanted[..]
        && row == LARGE.0
    {
        print_head();
        return dead_space_in_directory(gib.parse().expect("GiB"));
    }
    if let [only] = &wanted[..] {
        let (_, measure) = ROWS.iter().chain([&LARGE]).find(|(name, _)| name == only).expect("a row of this name");
        print_head();
        return measure();
    }
    // Each with the memory to itself.
    for (name, _) in ROWS.iter().filter(|(name, _)| wanted.is_empty() || wanted.iter().any(|row| row == name)) {
        let program = std::env::current_exe().expect("this program");
        let status = Command::new(program).arg(name).status().expect("a row is measured");
        assert!(status.success(), "row {name}: {status}");
    }
}

fn print_head() {
    println!("| row | measured | target |\n|---|---|---|");
}

fn tell(what: &str, measured: String, target: &str) {
    println!("| {what} | {measured} | {target} |");
}

fn now() -> Instant {
    clock::monotonic()
}

fn sequential(size: u64, part: u64) -> impl Iterator<Item = (u64, u64)> {
    (0..size / part).map(move |index| (index * part, part))
}

fn puts() {
    let rig = Rig::in_memory(Settings::default());
    rig.create(8 * GIB);
    let open = rig.open();
    let (before, _) = rig.store.written();
    open.write_all(sequential(4 * GIB, MIB), &mut Random(1));
    open.device.settle().expect("it settles");
    let (after, bytes) = rig.store.written();
    let per_gib = (after - before) as f64 / 4.0;
    let overhead = bytes as f64 / (4 * GIB) as f64;
    tell("PUTs and swaps for a GiB, sequential, incompressible", format!("{per_gib:.1} ({overhead:.3} bytes for each)"), "≤ 36");
}

fn flush() {
    let rig = Rig::in_memory(Settings { durability: Durability::Remote, ..Settings::default() });
    rig.create(GIB);
    let open = rig.open();
    let (before, _) = rig.store.written();
    let mut random = Random(2);
    const FLUSHES: u64 = 50;
    for number in 0..FLUSHES {
        open.write_all([(number * BLOCK, BLOCK)].into_iter(), &mut random);
        open.load([(Op::Flush, 0, 0, Vec::new())].into_iter());
    }
    let (after, _) = rig.store.written();
    let trips = (after - before) as f64 / FLUSHES as f64;
    tell("requests that write, for a remote flush of one block", format!("{trips:.2}"), "1 in line (checkpoints beside)");
}

fn amplification() {
    for (name, hot, target) in [("uniform", false, "≤ 3.2"), ("80:20", true, "≤ 2.4")] {
        let size = 2 * GIB;
        let rig = Rig::in_memory(Settings::default());
        rig.create(size);
        let open = rig.open();
        let mut random = Random(3);
        open.write_all(sequential(size, MIB), &mut random);
        let blocks = size / BLOCK;
        let mut place = Random(4);
        let mut churn = |open: &rig::Open, bytes: u64, random: &mut Random| {
            let places = (0..bytes / BLOCK).map(|_| {
                let is_hot = hot && place.below(10) < 8;
                let block = if is_hot { place.below(blocks / 5) } else { place.below(blocks) };
                (block * BLOCK, BLOCK)
            });
            open.write_all(places, random);
            open.device.settle().expect("it settles");
        };
        churn(&open, 2 * size, &mut random);
        let (_, before) = rig.store.written();
        churn(&open, size, &mut random);
        let (_, after) = rig.store.written();
        let seen = open.device.gather(0.0).expect("it collects");
        let written = (after - before) as f64 / size as f64;
        let in_use = seen.live_blocks as f64 / seen.stored_blocks as f64;
        tell(
            &format!("bytes written to the store for each byte, 4 KiB random, {name}, 2 GiB"),
            format!("{written:.2} with {:.0} % of what is stored in use", in_use * 100.0),
            target,
        );
    }
}

fn dead_space_beside_snapshots() {
    let rig = Rig::in_memory(Settings::default());
    measure_dead_space(&rig, 2 * GIB, &|random, len| random.bytes(len as usize));
}

/// In a directory; the target speaks of 100 GiB. Blocks are zeroes but for 64 bytes each, so that these take
/// some 20 GiB of disk (14 with 65 of the snapshots), and 2 GiB of `/dev/shm` for the log.
fn dead_space_in_directory(gib: u64) {
    let folder = tempfile::tempdir().expect("a folder");
    let log = tempfile::tempdir_in("/dev/shm").expect("a folder in memory");
    let rig = in_directory(folder.path(), &log.path().join("log"), 2 * GIB, false);
    measure_dead_space(&rig, gib * GIB, &|random, len| {
        let mut content = vec![0; len as usize];
        content.chunks_mut(BLOCK as usize).for_each(|block| block[..64].copy_from_slice(&random.bytes(64)));
        content
    });
}

/// How long a volume is left alone, and how long it does nothing when it is tidy.
const IDLE: Duration = Duration::from_secs(600);
const TIDY: Duration = Duration::from_secs(60);

fn measure_dead_space(rig: &Rig, size: u64, content: &dyn Fn(&mut Random, u64) -> Vec<u8>) {
    rig.create(size);
    let open = rig.open();
    let (mut random, mut place) = (Random(5), Random(6));
    let mut write = |places: &mut dyn Iterator<Item = (u64, u64)>| {
        open.load(places.map(|(offset, len)| (Op::Write { fua: false }, offset, len, content(&mut random, len))));
    };
    write(&mut sequential(size, MIB));
    let blocks = size / BLOCK;
    let mut some = |among: u64| -> Vec<(u64, u64)> { (0..blocks / 100).map(|_| (place.below(among) * BLOCK, BLOCK)).collect() };
    for number in 0..100 {
        write(&mut some(blocks).into_iter());
        // Half of it is overwritten again before anybody keeps it.
        for _ in 0..2 {
            write(&mut some(blocks / 50).into_iter());
            open.device.settle().expect("it settles");
        }
        open.device.snapshot(&format!("s{number}"), 0).expect("a snapshot");
    }
    open.device.settle().expect("it settles");
    let dead = || open.device.shares().expect("it is counted").reclaimable;
    let began = now();
    let before = dead();
    eprintln!("what is dead was counted in {:.0} s", began.elapsed().as_secs_f64());
    let mut active = now();
    while began.elapsed() < IDLE && active.elapsed() < TIDY {
        std::thread::sleep(Duration::from_secs(1));
        if open.device.usage().is_none_or(|usage| usage.collected.is_running) {
            active = now();
        }
    }
    let after = dead();
    tell(
        &format!("dead space reclaimed with 100 snapshots held, {} GiB volume, 1 % divergence each", size / GIB),
        format!(
            "{:.0} % of {} MiB after {:.0} s; the process takes {} MiB now, and took {} MiB at most",
            (1.0 - after as f64 / before as f64) * 100.0,
            before / MIB,
            (active - began).as_secs_f64(),
            memory_of_process("VmRSS:") / MIB,
            memory_of_process("VmHWM:") / MIB,
        ),
        "≥ 90 % in 600 s",
    );
}

/// Bytes, as the system counts them.
fn memory_of_process(what: &str) -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").expect("the status of this process");
    let line = status.lines().find_map(|line| line.strip_prefix(what)).expect("a line of the status");
    line.trim().trim_end_matches(" kB").parse::<u64>().expect("a number") << 10
}

fn in_directory(folder: &Path, log: &Path, log_len: u64, direct: bool) -> Rig {
    let pool = folder.join("pool");
    DirectoryStore::make(&pool, Uuid::from_u128(2)).expect("a pool");
    let probe = Some(blockdev::random::uuid());
    let store = DirectoryStore::open(&pool, OpenOptions { expected: None, read_only: false, probe }).expect("the pool opens");
    File::create(log).and_then(|file| file.set_len(log_len)).expect("a log");
    let log = Arc::new(FileDevice::open(log, FileOptions { read_only: false, direct }).expect("the log opens"));
    Rig::new(Counting::new(Arc::new(store)), log, Settings::default())
}

fn opening() {
    opening_with(256 * MIB, 16, "≤ 1 s with 256 MiB");
    opening_with(4 * GIB, 63, "≤ 5 s with 4 GiB");
}

/// With so many bytes in the log, and so many segments in the pool that no checkpoint has.
fn opening_with(in_log: u64, segments: u64, target: &str) {
    let folder = tempfile::tempdir().expect("a folder");
    let rig = in_directory(folder.path(), &folder.path().join("log"), 4 * in_log, true);
    rig.create(64 * GIB);
    let mut random = Random(7);
    let open = rig.open();
    open.write_all(sequential(512 * MIB, MIB), &mut random);
    open.device.settle().expect("it settles");
    open.write_all((0..segments * 32).map(|index| (GIB + index * MIB, MIB)), &mut random);
    while open.device.usage().is_none_or(|seen| seen.log.used > MIB) {
        std::thread::sleep(Duration::from_millis(100));
    }
    rig.store.holds_back.store(true, Relaxed);
    const WRITTEN: u64 = 64 << 10;
    // Flushed now and then, as a guest would.
    for part in (0..in_log).step_by(64 * MIB as usize) {
        open.write_all((0..64 * MIB / WRITTEN).map(|index| (4 * GIB + part + index * WRITTEN, WRITTEN)), &mut random);
        open.load([(Op::Flush, 0, 0, Vec::new())].into_iter());
    }
    let used = open.device.usage().map_or(0, |usage| usage.log.used);
    drop(open);
    rig.store.holds_back.store(false, Relaxed);
    std::thread::sleep(Duration::from_secs(1));
    let began = now();
    let open = rig.open();
    open.load([(Op::Read, 4 * GIB, BLOCK, Vec::new())].into_iter());
    tell(
        "first read after the volume was dropped with so much in its log",
        format!("{:.2} s with {} MiB in the log, {segments} segments to go through", began.elapsed().as_secs_f64(), used / MIB),
        target,
    );
}

fn snapshot_of_a_tebibyte() {
    let size = 1024 * GIB;
    let rig = Rig::in_memory(Settings::default());
    rig.create(size);
    let open = rig.open();
    open.write_all((0..2048).map(|index| (index * (size / 2048), MIB)), &mut Random(8));
    let began = now();
    open.device.snapshot("s", 0).expect("a snapshot");
    let made = began.elapsed();
    open.device.wait_for_snapshot("s").expect("it is committed");
    let committed = began.elapsed();
    let began = now();
    rig.options.clone_snapshot("s", Uuid::from_u128(3)).expect("a clone");
    let cloned = began.elapsed();
    let began = now();
    open.device.snapshot("t", 0).expect("a snapshot");
    open.device.wait_for_snapshot("t").expect("it is committed");
    tell(
        "snapshot and clone of 1 TiB with 2 GiB in 2,048 places, written just before",
        format!(
            "taken in {made:.1?}, in the pool after {committed:.1?}; a second one, with nothing new, {:.1?}; clone {cloned:.1?}",
            began.elapsed()
        ),
        "≤ 50 ms to usable",
    );
}

fn trim() {
    let size = 4096 * GIB;
    let rig = Rig::in_memory(Settings::default());
    rig.create(size);
    let open = rig.open();
    let began = now();
    open.load([(Op::Discard, 0, size, Vec::new()), (Op::Flush, 0, 0, Vec::new())].into_iter());
    let answered = began.elapsed();
    open.device.settle().expect("it settles");
    tell("trim of an empty 4 TiB", format!("{answered:.1?}, in the map of the pool after {:.1?}", began.elapsed()), "≤ 1 s");
}
