//! Snapshots, clones and sizes of mapped volumes, by commands, while clients write and while the daemon is killed.

mod common;

use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicBool, Ordering};

use common::{Daemon, Nbd};
use serde_json::{Value, json};

const BLOCK: usize = 4096;

fn started() -> Daemon {
    let mut daemon = Daemon::new("");
    daemon.start();
    daemon.json(&["volume", "create", "local/v", "--size", "16M"]);
    daemon
}

/// An export that is removed by its id.
fn export(daemon: &Daemon, name: &str) -> (Nbd<UnixStream>, String) {
    let read_only: &[&str] = if name.contains('@') { &["--read-only"] } else { &[] };
    let added = daemon.json(&[&["export", "add", name, "--nbd"], read_only].concat());
    (daemon.attach(name), added["id"].as_str().unwrap().to_owned())
}

fn read(daemon: &Daemon, name: &str, block: usize) -> u8 {
    let (mut client, id) = export(daemon, name);
    let found = client.read((block * BLOCK) as u64, BLOCK as u32);
    assert!(found.iter().all(|byte| *byte == found[0]), "block {block} of {name} is mixed");
    drop(client);
    daemon.json(&["export", "remove", &id]);
    found[0]
}

fn write(client: &mut Nbd<UnixStream>, block: usize, fill: u8) {
    assert_eq!((client.write((block * BLOCK) as u64, &[fill; BLOCK]), client.flush()), (0, 0));
}

fn write_closed(daemon: &Daemon, volume: &str, block: usize, fill: u8) {
    let (mut client, id) = export(daemon, volume);
    write(&mut client, block, fill);
    drop(client);
    daemon.json(&["export", "remove", &id]);
}

fn names(listed: &Value) -> Vec<&str> {
    listed.as_array().unwrap().iter().map(|item| item["name"].as_str().unwrap()).collect()
}

#[test]
fn snapshots_of_an_exported_volume_are_listed_read_compared_and_deleted() {
    let daemon = started();
    let (mut client, id) = export(&daemon, "v");
    write(&mut client, 0, 1);
    let made = daemon.json(&["snapshot", "create", "v@a"]);
    assert_eq!((made[0]["name"].as_str(), made[0]["size"].as_u64()), (Some("local/v@a"), Some(16 << 20)));
    assert!(made[0]["created"].as_u64().unwrap() > 1_700_000_000, "{made}");
    write(&mut client, 0, 2);
    write(&mut client, 100, 2);
    assert_eq!(daemon.refused(&["snapshot", "create", "v@a"]).0, "exists");
    daemon.json(&["snapshot", "create", "v@b"]);
    // Written anew, and the same as before.
    write(&mut client, 100, 2);
    write(&mut client, 200, 3);
    assert_eq!(names(&daemon.json(&["snapshot", "list", "v"])), ["local/v@a", "local/v@b"]);
    assert_eq!((read(&daemon, "v@a", 0), read(&daemon, "v@b", 0), read(&daemon, "v@a", 100)), (1, 2, 0));
    let range = |block: usize| json!({"offset": block * BLOCK, "length": BLOCK});
    assert_eq!(daemon.json(&["snapshot", "diff", "v@a", "v@b"])["changed"], json!([range(0), range(100)]));
    assert_eq!(daemon.json(&["snapshot", "diff", "v@b", "v"])["changed"], json!([range(200)]));
    assert_eq!(daemon.refused(&["snapshot", "rollback", "v@a", "--yes"]).0, "in_use");
    assert_eq!(daemon.refused(&["volume", "delete", "v", "--yes"]).0, "in_use");
    daemon.json(&["snapshot", "delete", "v@a", "--yes"]);
    assert_eq!(daemon.refused(&["export", "add", "v@a", "--nbd", "--read-only"]).0, "not_found");
    drop(client);
    daemon.json(&["export", "remove", &id]);
    daemon.json(&["snapshot", "rollback", "v@b", "--yes"]);
    assert_eq!((read(&daemon, "v", 0), read(&daemon, "v", 200)), (2, 0));
    let (kind, message) = daemon.refused(&["volume", "delete", "v", "--yes"]);
    assert!(kind == "in_use" && message.contains("v@b"), "{kind}: {message}");
}

#[test]
fn clones_are_refused_an_end_of_their_origin_until_they_are_flat() {
    let daemon = started();
    let (mut client, _) = export(&daemon, "v");
    write(&mut client, 0, 1);
    let clone = daemon.json(&["volume", "clone", "v", "c"]);
    assert_eq!(clone["origin"], "v@clone-c");
    assert_eq!(clone["layout"], "mapped");
    write(&mut client, 0, 2);
    write_closed(&daemon, "c", 1, 3);
    assert_eq!((read(&daemon, "c", 0), read(&daemon, "c", 1)), (1, 3));
    assert_eq!(client.read(0, 2 * BLOCK as u32)[BLOCK - 1..=BLOCK], [2, 0]);
    let (kind, message) = daemon.refused(&["snapshot", "delete", "v@clone-c", "--yes"]);
    assert!(kind == "in_use" && message.contains("(c)"), "{kind}: {message}");
    assert_eq!(daemon.json(&["volume", "flatten", "c"])["flattened"], true);
    assert_eq!(daemon.json(&["volume", "flatten", "c"])["flattened"], false);
    assert_eq!(daemon.json(&["volume", "show", "c"])["origin"], json!(null));
    daemon.json(&["snapshot", "delete", "v@clone-c", "--yes"]);
    drop(client);
    let exports = daemon.json(&["export", "list"]);
    daemon.json(&["export", "remove", exports[0]["id"].as_str().unwrap()]);
    daemon.json(&["volume", "delete", "v", "--yes"]);
    assert_eq!((read(&daemon, "c", 0), read(&daemon, "c", 1)), (1, 3));
    assert_eq!(daemon.json(&["pool", "check", "local"])["problems"], json!([]));
}

#[test]
fn sizes_change_while_a_client_is_attached_and_after() {
    let mut daemon = started();
    let (mut client, _) = export(&daemon, "v");
    write(&mut client, 4095, 1);
    assert_eq!(daemon.json(&["volume", "resize", "v", "32M"])["size"], 32 << 20);
    write(&mut client, 8191, 2);
    let (kind, message) = daemon.refused(&["volume", "resize", "v", "8M"]);
    assert!(kind == "invalid" && message.contains("--shrink"), "{kind}: {message}");
    drop(client);
    daemon.kill();
    daemon.start();
    let mut client = daemon.attach("v");
    assert_eq!(client.size, 32 << 20);
    assert_eq!((client.read(4095 * 4096, 1), client.read(8191 * 4096, 1)), (vec![1], vec![2]));
    drop(client);
    assert_eq!(daemon.json(&["volume", "resize", "v", "8M", "--shrink", "--yes"])["size"], 8 << 20);
    daemon.json(&["volume", "resize", "v", "16M"]);
    let mut client = daemon.attach("v");
    assert_eq!(client.size, 16 << 20);
    assert_eq!(client.read(4095 * 4096, 1), [0], "what was cut off came back");
    assert_eq!(daemon.json(&["volume", "check", "v"])["problems"], json!([]));
    let (kind, message) = daemon.refused(&["volume", "resize", "v", "16777728"]);
    assert!(message.contains("4096"), "{kind}: {message}");
}

#[test]
fn usage_tells_what_is_unique_and_what_it_takes() {
    let daemon = started();
    let (mut client, id) = export(&daemon, "v");
    for block in 0..400 {
        // The half of them is the same.
        assert_eq!(client.write((block * BLOCK) as u64, &[1 + (block / 2) as u8; BLOCK]), 0);
    }
    assert_eq!(client.flush(), 0);
    daemon.json(&["snapshot", "create", "v@s"]);
    assert_eq!(read(&daemon, "v@s", 0), 1);
    drop(client);
    daemon.json(&["export", "remove", &id]);
    let usage = daemon.json(&["volume", "usage", "v"]);
    let of = |name: &str| usage[name].as_u64().unwrap_or_else(|| panic!("{name}: {usage}"));
    assert_eq!(of("logical"), 16 << 20);
    assert!(of("unique") >= 200 * BLOCK as u64 && of("unique") <= 400 * BLOCK as u64, "{usage}");
    assert!(of("compressed") < of("unique") / 4 && of("compressed") > 0, "{usage}");
    assert!(of("map") > 0 && of("stored") >= of("compressed") + of("map"), "{usage}");
    assert_eq!((of("data"), of("snapshots")), (400 * BLOCK as u64, 0), "{usage}");
    assert!(of("reclaimable") < of("compressed") + of("map"), "{usage}");
    let shown = String::from_utf8(daemon.run(&["volume", "usage", "v"]).stdout).unwrap();
    let is_told = |name: &str| shown.lines().any(|line| line.split_whitespace().next() == Some(name));
    assert!(["logical", "unique", "compressed", "stored", "reclaimable"].into_iter().all(is_told), "{shown}");
    daemon.json(&["volume", "clone", "v@s", "c"]);
    let usage = daemon.json(&["volume", "usage", "c"]);
    assert_eq!((usage["unique"].as_u64(), usage["compressed"].as_u64()), (Some(0), Some(0)), "{usage}");
    assert_eq!(usage["data"].as_u64(), Some(400 * BLOCK as u64), "{usage}");
    daemon.json(&["volume", "create", "memory/r", "--size", "1M"]);
    assert_eq!(daemon.json(&["volume", "usage", "memory/r"])["unique"], json!(null));
}

#[test]
fn one_command_makes_snapshots_of_several_volumes_or_of_none() {
    let daemon = started();
    daemon.json(&["volume", "create", "local/w", "--size", "16M"]);
    let (mut first, _) = export(&daemon, "v");
    write(&mut first, 0, 1);
    daemon.json(&["snapshot", "create", "v@s", "w@s"]);
    assert_eq!((read(&daemon, "v@s", 0), read(&daemon, "w@s", 0)), (1, 0));
    daemon.json(&["snapshot", "create", "w@t"]);
    assert_eq!(daemon.refused(&["snapshot", "create", "v@t", "w@t"]).0, "exists");
    assert_eq!(names(&daemon.json(&["snapshot", "list"])), ["local/v@s", "local/w@s", "local/w@t"]);
}

/// Writes a counter to a block of the one volume, and when that is acknowledged to the same block of the other, again and again. How far it came.
fn count(daemon: &Daemon, block: usize, is_over: &AtomicBool) -> u64 {
    let mut clients = ["v", "w"].map(|volume| daemon.attach(volume));
    let mut counter = 0u64;
    while !is_over.load(Ordering::SeqCst) {
        counter += 1;
        for client in &mut clients {
            assert_eq!(client.write((block * BLOCK) as u64, &counter.to_le_bytes()), 0);
        }
    }
    counter
}

#[test]
fn a_snapshot_of_several_volumes_under_load_is_one_point_in_time() {
    const WRITERS: usize = 3;
    let daemon = started();
    daemon.json(&["volume", "create", "local/w", "--size", "16M"]);
    let ids = ["v", "w"].map(|volume| export(&daemon, volume).1);
    let names: Vec<String> = (0..12).map(|number| format!("s{number}")).collect();
    let is_over = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let writers: Vec<_> = (0..WRITERS)
            .map(|block| {
                scope.spawn({
                    let (daemon, is_over) = (&daemon, &is_over);
                    move || count(daemon, block, is_over)
                })
            })
            .collect();
        for name in &names {
            std::thread::sleep(std::time::Duration::from_millis(20));
            daemon.json(&["snapshot", "create", &format!("v@{name}"), &format!("w@{name}")]);
        }
        is_over.store(true, Ordering::SeqCst);
        for writer in writers {
            assert!(writer.join().unwrap() > names.len() as u64, "there was no load");
        }
    });
    let mut before = [0; WRITERS];
    for name in &names {
        let [first, second] = ["v", "w"].map(|volume| {
            let (mut client, id) = export(&daemon, &format!("{volume}@{name}"));
            let counters: [u64; WRITERS] =
                std::array::from_fn(|block| u64::from_le_bytes(client.read((block * BLOCK) as u64, 8).try_into().unwrap()));
            drop(client);
            daemon.json(&["export", "remove", &id]);
            counters
        });
        for block in 0..WRITERS {
            let (first, second) = (first[block], second[block]);
            assert!(first == second || first == second + 1, "{name}, block {block}: {first} in v, {second} in w");
            assert!(first >= before[block], "{name}, block {block}: {first} after {}", before[block]);
            before[block] = first;
        }
    }
    assert!(before.iter().all(|counter| *counter > 0), "{before:?}");
    ids.iter().for_each(|id| drop(daemon.json(&["export", "remove", id])));
}

/// A command that may be cut off by the end of the daemon.
fn begin(daemon: &Daemon, arguments: &[&str]) -> std::process::Child {
    let admin = format!("unix:{}", daemon.path("admin.sock").display());
    let mut command = common::command();
    command.env("NOVASTOR_ADMIN", admin).args(arguments).stdout(std::process::Stdio::null());
    command.stderr(std::process::Stdio::null()).spawn().unwrap()
}

#[test]
fn kills_in_the_middle_of_operations_leave_each_of_them_done_or_not() {
    let mut daemon = started();
    daemon.json(&["export", "add", "v", "--nbd"]);
    let mut kept: Vec<(String, u8)> = Vec::new();
    for round in 1..=16u8 {
        let mut client = daemon.attach("v");
        write(&mut client, 0, round);
        let name = format!("v@s{round}");
        daemon.json(&["snapshot", "create", &name]);
        kept.push((name.clone(), round));
        write(&mut client, 0, 100 + round);
        let (pending, clone, oldest) = (format!("v@p{round}"), format!("c{round}"), kept[0].0.clone());
        let mut running = match round % 4 {
            0 => begin(&daemon, &["snapshot", "create", &pending]),
            1 => begin(&daemon, &["volume", "clone", &name, &clone]),
            2 => begin(&daemon, &["volume", "clone", "v", &clone]),
            _ => begin(&daemon, &["snapshot", "delete", &oldest, "--yes"]),
        };
        std::thread::sleep(std::time::Duration::from_millis(u64::from(round * 7 % 40)));
        daemon.kill();
        common::wait(&mut running);
        drop(client);
        daemon.start();
        let snapshots = daemon.json(&["snapshot", "list", "v"]);
        let is_there = |name: &str| names(&snapshots).contains(&&*format!("local/{name}"));
        if round % 4 == 3 && !is_there(&oldest) {
            kept.remove(0);
        }
        for (name, fill) in &kept {
            assert!(is_there(name), "round {round}: {name}: {snapshots}");
            assert_eq!(read(&daemon, name, 0), *fill, "round {round}: {name}");
        }
        if is_there(&pending) {
            assert_eq!(read(&daemon, &pending, 0), 100 + round);
        }
        let volumes = daemon.json(&["volume", "list"]);
        if names(&volumes).contains(&&*clone) {
            assert_eq!(read(&daemon, &clone, 0), if round % 4 == 1 { round } else { 100 + round });
        }
        assert_eq!(daemon.attach("v").read(0, 1), [100 + round], "round {round}");
        assert_eq!(daemon.json(&["pool", "check", "local"])["problems"], json!([]), "round {round}");
    }
    delete_everything(&daemon);
}

/// Clones first, then snapshots, then volumes: nothing that a kill left behind stands in the way.
fn delete_everything(daemon: &Daemon) {
    for export in daemon.json(&["export", "list"]).as_array().unwrap() {
        daemon.json(&["export", "remove", export["id"].as_str().unwrap()]);
    }
    let volumes = daemon.json(&["volume", "list"]);
    for clone in names(&volumes).into_iter().filter(|name| *name != "v") {
        daemon.json(&["volume", "delete", clone, "--yes"]);
    }
    for snapshot in names(&daemon.json(&["snapshot", "list"])) {
        daemon.json(&["snapshot", "delete", snapshot, "--yes"]);
    }
    daemon.json(&["volume", "delete", "v", "--yes"]);
    assert_eq!(daemon.json(&["volume", "list"]), json!([]));
}
