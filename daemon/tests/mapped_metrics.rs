//! What metrics and `top` say of a mapped volume whose data repeats, compresses and is overwritten, and of a pool that takes nothing for a while.

mod common;

use std::fs;
use std::os::unix::net::UnixStream;

use common::{Daemon, Nbd, eventually};
use serde_json::Value;

const MIB: u64 = 1 << 20;
const BLOCK: usize = 4096;
/// Written twice, to two places.
const REPEATED: u64 = 48 * MIB;
/// Rounds until a collection is seen while it runs.
const ROUNDS: u64 = 12;

/// A MiB of blocks each of which is noise in its first half, and zeroes.
fn half_noise(seed: u64) -> Vec<u8> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15);
    let mut bytes = vec![0; MIB as usize];
    for block in bytes.chunks_mut(BLOCK) {
        for word in block[..BLOCK / 2].chunks_mut(8) {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            word.copy_from_slice(&(state ^ state >> 29).to_le_bytes());
        }
    }
    bytes
}

struct Watched {
    daemon: Daemon,
    client: Nbd<UnixStream>,
}

impl Watched {
    fn start() -> Watched {
        let mut daemon = Daemon::new("");
        daemon.start();
        daemon.json(&["volume", "create", "local/v", "--size", "256M"]);
        daemon.json(&["export", "add", "v", "--nbd"]);
        let client = daemon.attach("v");
        Watched { daemon, client }
    }

    fn metric(&self, name: &str) -> f64 {
        use std::io::{Read, Write};
        let mut stream = UnixStream::connect(self.daemon.path("admin.sock")).unwrap();
        write!(stream, "GET /metrics HTTP/1.0\r\nHost: x\r\n\r\n").unwrap();
        let mut text = String::new();
        stream.read_to_string(&mut text).unwrap();
        let line = format!("novastor_volume_{name}{{volume=\"local/v\"}} ");
        let found = text.lines().find_map(|metric| metric.strip_prefix(&line));
        found.unwrap_or_else(|| panic!("{name}: {text}")).parse().unwrap()
    }

    /// In MiB.
    fn mib(&self, name: &str) -> f64 {
        self.metric(name) / MIB as f64
    }

    fn top(&self) -> Value {
        self.daemon.json(&["top", "--once"])["volumes"][0].clone()
    }

    fn write(&mut self, offset: u64, seed: u64) {
        assert_eq!(self.client.write(offset, &half_noise(seed)), 0);
    }

    fn wait_until_destaged(&self, mib: u64) {
        eventually("the pool has it", || self.mib("destaged_bytes_total") >= mib as f64);
    }

    /// Three quarters of everything get new content, which a checkpoint has then.
    fn overwrite(&mut self, round: u64) {
        for part in (0..2 * REPEATED / MIB).filter(|part| part % 4 != 0) {
            self.write(part * MIB, 1000 * (round + 1) + part);
        }
        assert_eq!(self.client.flush(), 0);
        self.daemon.json(&["volume", "resize", "v", &format!("{}M", 257 + round)]);
    }

    /// Whether a collection was seen while the pool took nothing.
    fn sees_a_collection(&self) -> bool {
        // It looks for garbage every five seconds.
        (0..350).any(|_| {
            std::thread::sleep(std::time::Duration::from_millis(20));
            self.metric("collecting") == 1.0
        })
    }
}

/// While there is nowhere to write to, the pool takes nothing; reads go on.
struct HeldBack(std::path::PathBuf);

impl HeldBack {
    fn begin(daemon: &Daemon) -> HeldBack {
        let folder = daemon.path("pool/segments/temporary");
        fs::rename(&folder, folder.with_extension("away")).unwrap();
        HeldBack(folder)
    }

    fn end(self) {
        fs::rename(self.0.with_extension("away"), &self.0).unwrap();
    }
}

fn assert_within(what: &str, value: f64, from: f64, to: f64) {
    println!("{what}: {value}");
    assert!((from..=to).contains(&value), "{what} is {value}, not {from} to {to}");
}

#[test]
fn each_figure_of_a_volume_is_what_was_done_to_it() {
    let mut watched = Watched::start();
    let repeated = REPEATED / MIB;
    for copy in 0..2 {
        (0..repeated).for_each(|part| watched.write(copy * REPEATED + part * MIB, part));
        watched.wait_until_destaged((copy + 1) * repeated);
    }
    let (written, stored) = (2.0 * repeated as f64, watched.mib("destaged_stored_bytes_total"));
    assert_within("destaged", watched.mib("destaged_bytes_total"), written, written);
    assert_within("duplicates", watched.mib("destaged_duplicate_bytes_total"), written * 0.45, written * 0.5);
    assert_within("stored", stored, written * 0.25, written * 0.31);
    assert_within("reduction", watched.metric("reduction_ratio"), written / stored - 0.01, written / stored + 0.01);
    assert_within("unique", watched.mib("unique_bytes"), written * 0.5, written * 0.56);
    assert_within("compressed", watched.mib("compressed_bytes"), written * 0.25, written * 0.31);
    assert!(watched.metric("index_memory_bytes") >= 1024.0);
    let top = watched.top();
    assert_within("top: hits", top["index_hit_rate"].as_f64().unwrap(), 0.45, 0.5);
    assert_within("top: reduction", top["reduction"].as_f64().unwrap(), 3.2, 4.0);
    let table = String::from_utf8(watched.daemon.run(&["top", "--once"]).stdout).unwrap();
    assert!(["50%", "49%", "48%", "47%", "46%", "45%"].iter().any(|hits| table.contains(hits)), "{table}");
    assert!(
        ["3.2×", "3.3×", "3.4×", "3.5×", "3.6×", "3.7×", "3.8×", "3.9×", "4.0×"].iter().any(|ratio| table.contains(ratio)),
        "{table}"
    );

    let mut round = 0;
    let held_back = loop {
        watched.overwrite(round);
        let held_back = HeldBack::begin(&watched.daemon);
        if watched.sees_a_collection() {
            break held_back;
        }
        held_back.end();
        round += 1;
        assert!(round < ROUNDS, "no collection was seen");
    };
    (0..4).for_each(|part| watched.write(part * MIB, 7 + part));
    assert_eq!(watched.client.flush(), 0, "the log has it");
    eventually("writes wait for the pool", || watched.metric("destage_lag_seconds") >= 2.0);
    assert!(watched.mib("log_used_bytes") >= 4.0);
    eventually("the pool is known to take nothing", || watched.metric("pool_waits_seconds") >= 10.0);
    let top = watched.top();
    assert!(top["lag_ms"].as_u64().unwrap() >= 2000 && top["log_used"].as_u64().unwrap() >= 4 * MIB, "{top}");
    assert_eq!(top["is_collecting"], true, "{top}");
    held_back.end();

    eventually("the pool takes it", || {
        ["destage_lag_seconds", "pool_waits_seconds", "collecting"].iter().all(|name| watched.metric(name) == 0.0)
    });
    // Of the first contents three quarters are garbage, a quarter is moved.
    let freed = watched.mib("collected_freed_bytes_total");
    assert_within("freed", freed, repeated as f64 * 0.2, (round + 1) as f64 * written);
    assert_within("moved", watched.mib("collected_moved_bytes_total"), 1.0, (round + 1) as f64 * written);
    let top = watched.top();
    assert!(top["freed"].as_u64().unwrap() as f64 / MIB as f64 >= freed, "{top}");
    assert_eq!(top["lag_ms"], 0, "{top}");
}
