//! Many snapshots of a volume, and clones of clones of clones, through the daemon: made by one client of its API.
//!
//! `NOVASTOR_TEST_SNAPSHOTS` sets how many snapshots, `NOVASTOR_TEST_GENERATIONS` how many clones, each of the one before; without them, a few. What took
//! how long is printed. Thousands take longer than nextest lets a test run: `cargo test -p novastor --test scale -- --nocapture`.

mod common;

use std::env;
use std::os::unix::net::UnixStream;
use std::time::Instant;

use common::{Daemon, Nbd};
use novastor::api::reply::Done;
use novastor::client::{Client, encode};
use serde_json::{Value, json};

const BLOCK: u64 = 4096;
const BLOCKS: u64 = 4096;
/// Snapshots between two writes.
const PER_WRITE: u64 = 25;
const SNAPSHOTS: u64 = 250;
const GENERATIONS: u64 = 20;

fn number(variable: &str, otherwise: u64) -> u64 {
    env::var(variable).map_or(otherwise, |text| text.parse().unwrap_or_else(|_| panic!("{variable}: {text} is no number")))
}

/// Tells how long parts of the work took.
struct Clock(Instant);

impl Clock {
    fn start() -> Clock {
        Clock(blockdev::clock::monotonic())
    }

    fn lap(&mut self, what: &str) {
        let now = blockdev::clock::monotonic();
        let took = now - std::mem::replace(&mut self.0, now);
        println!("{what}: {took:.2?}");
    }
}

struct Admin(Client);

impl Admin {
    fn of(daemon: &Daemon) -> Admin {
        Admin(Client::new(Some(&format!("unix:{}", daemon.path("admin.sock").display())), None, None).unwrap())
    }

    fn post(&self, path: &str, body: &Value) -> Value {
        self.0.post(path, body).unwrap_or_else(|error| panic!("{path} {body}: {error}"))
    }

    fn get(&self, path: &str) -> Value {
        self.0.get(path).unwrap_or_else(|error| panic!("{path}: {error}"))
    }

    fn delete(&self, path: &str) {
        let done: Done = self.0.delete(path).unwrap_or_else(|error| panic!("{path}: {error}"));
        assert!(done.done, "{path}");
    }

    fn create_volume(&self, name: &str) {
        self.post("/v1/volumes", &json!({"name": name, "pool": "local", "size": BLOCKS * BLOCK}));
    }

    /// The id of the export.
    fn export(&self, volume: &str) -> String {
        let is_snapshot = volume.contains('@');
        let added = self.post("/v1/exports", &json!({"volume": volume, "protocol": "nbd", "read_only": is_snapshot}));
        added["id"].as_str().unwrap().to_owned()
    }

    fn remove_export(&self, id: &str) {
        self.delete(&format!("/v1/exports/{id}"));
    }

    fn snapshots(&self, volume: &str) -> Vec<String> {
        names(&self.get(&format!("/v1/snapshots?volume={volume}")))
    }

    fn delete_snapshot(&self, snapshot: &str) {
        self.delete(&format!("/v1/snapshots/{}", encode(snapshot)));
    }

    /// Does something with an export of a volume or snapshot.
    fn attached<T>(&self, daemon: &Daemon, volume: &str, work: impl FnOnce(&mut Nbd<UnixStream>) -> T) -> T {
        let id = self.export(volume);
        let mut client = daemon.attach(volume);
        let answer = work(&mut client);
        drop(client);
        self.remove_export(&id);
        answer
    }
}

fn names(listed: &Value) -> Vec<String> {
    listed.as_array().unwrap().iter().map(|one| one["name"].as_str().unwrap().to_owned()).collect()
}

fn content_of(version: u64) -> Vec<u8> {
    version.to_le_bytes().repeat(BLOCK as usize / 8)
}

/// What is in the first blocks of a volume: whole blocks with content of [`content_of`].
fn versions(daemon: &Daemon, admin: &Admin, volume: &str, blocks: u64) -> Vec<u64> {
    let bytes = admin.attached(daemon, volume, |client| client.read(0, (blocks * BLOCK) as u32));
    let version = |block: &[u8]| {
        let version = u64::from_le_bytes(block[..8].try_into().unwrap());
        assert!(block == content_of(version), "a block of {volume} is mixed");
        version
    };
    bytes.chunks(BLOCK as usize).map(version).collect()
}

fn snapshot_name(number: u64) -> String {
    format!("v@s{number:05}")
}

#[test]
fn snapshots_by_the_hundred_are_listed_read_and_deleted_and_survive_a_kill() {
    let count = number("NOVASTOR_TEST_SNAPSHOTS", SNAPSHOTS);
    let tenth = count.div_ceil(10);
    let mut daemon = Daemon::new("");
    daemon.start();
    let admin = Admin::of(&daemon);
    admin.create_volume("v");
    admin.export("v");
    let mut client = daemon.attach("v");
    let mut clock = Clock::start();
    for snapshot in 0..count {
        let write = snapshot / PER_WRITE;
        if snapshot % PER_WRITE == 0 {
            assert_eq!(client.write(write % BLOCKS * BLOCK, &content_of(1 + write)), 0);
        }
        admin.post("/v1/snapshots", &json!({"snapshots": [snapshot_name(snapshot)]}));
        if (snapshot + 1) % tenth == 0 {
            clock.lap(&format!("snapshots up to {}", snapshot + 1));
        }
    }
    drop(client);

    let check = |admin: &Admin, daemon: &Daemon, left: &[u64]| {
        let expected: Vec<String> = left.iter().map(|number| format!("local/{}", snapshot_name(*number))).collect();
        assert_eq!(admin.snapshots("v"), expected);
        for snapshot in left.iter().step_by(left.len().div_ceil(5)) {
            let written = 1 + snapshot / PER_WRITE;
            let blocks = written.min(64);
            let expected: Vec<u64> = (1..=blocks).collect();
            assert_eq!(versions(daemon, admin, &snapshot_name(*snapshot), blocks), expected, "{snapshot}");
        }
    };
    let all: Vec<u64> = (0..count).collect();
    check(&admin, &daemon, &all);
    clock.lap("list and read 5 or 6 of them");
    assert_eq!(names(&admin.get("/v1/volumes")), ["v"]);
    clock.lap("volume list");
    let (deleted, left): (Vec<u64>, Vec<u64>) = all.iter().partition(|number| *number % tenth == tenth / 2);
    deleted.iter().for_each(|number| admin.delete_snapshot(&snapshot_name(*number)));
    clock.lap(&format!("delete {} of them", deleted.len()));
    daemon.kill();
    daemon.start();
    clock.lap("kill and start");
    check(&Admin::of(&daemon), &daemon, &left);
    clock.lap("list and read once more");
}

fn generation(number: u64) -> String {
    format!("v{number:04}")
}

/// What the volume of a generation has in its first blocks: each generation wrote one more.
fn expected(of: u64, blocks: u64) -> Vec<u64> {
    let written = |block: u64| (0..=of).rev().find(|number| number % blocks == block).map_or(0, |number| 1 + number);
    (0..blocks).map(written).collect()
}

#[test]
fn the_last_of_many_clones_of_clones_is_read_after_a_restart_and_its_chain_is_shortened() {
    let count = number("NOVASTOR_TEST_GENERATIONS", GENERATIONS);
    let blocks = 64;
    let mut daemon = Daemon::new("");
    daemon.start();
    let admin = Admin::of(&daemon);
    admin.create_volume(&generation(0));
    let mut clock = Clock::start();
    for number in 0..count {
        let volume = generation(number);
        admin.attached(&daemon, &volume, |client| {
            assert_eq!((client.write(number % blocks * BLOCK, &content_of(1 + number)), client.flush()), (0, 0));
        });
        admin.post(&format!("/v1/volumes/{volume}/clone"), &json!({"name": generation(number + 1)}));
        if (number + 1) % count.div_ceil(10) == 0 {
            clock.lap(&format!("generations up to {}", number + 1));
        }
    }
    let all: Vec<String> = (0..=count).map(generation).collect();
    assert_eq!(names(&admin.get("/v1/volumes")), all);
    clock.lap("volume list");
    daemon.stop();
    daemon.start();
    let admin = Admin::of(&daemon);
    clock.lap("stop and start");
    let (last, before) = (generation(count), generation(count - 1));
    assert_eq!(versions(&daemon, &admin, &last, blocks), expected(count - 1, blocks));
    clock.lap("export and read the last");

    let snapshot = format!("{before}@clone-{last}");
    let refused = admin.0.delete::<Done>(&format!("/v1/snapshots/{}", encode(&snapshot))).unwrap_err().to_string();
    assert!(refused.contains(&last), "{refused}");
    admin.delete(&format!("/v1/volumes/{last}"));
    clock.lap("delete the last");
    admin.delete_snapshot(&snapshot);
    clock.lap("delete its snapshot");
    let flattened = admin.post(&format!("/v1/volumes/{before}/flatten"), &json!({}));
    assert_eq!(flattened["flattened"], true, "{flattened}");
    clock.lap("flatten the one before");
    assert_eq!(versions(&daemon, &admin, &before, blocks), expected(count - 1, blocks));
    admin.delete_snapshot(&format!("{}@clone-{before}", generation(count - 2)));
    assert_eq!(names(&admin.get("/v1/volumes")), all[..all.len() - 1]);
    assert_eq!(versions(&daemon, &admin, &before, blocks), expected(count - 1, blocks));
    clock.lap("delete its snapshot, read it again");
}
