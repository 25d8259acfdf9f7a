//! Mapped volumes through the daemon: the default of file pools, beside raw ones.

mod common;

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;

use common::{Daemon, Nbd, eventually};
use serde_json::json;

/// The logs of mapped volumes in `local`.
fn logs(daemon: &Daemon) -> Vec<PathBuf> {
    fs::read_dir(daemon.path("data/log/local")).into_iter().flatten().map(|entry| entry.unwrap().path()).collect()
}

fn export(daemon: &Daemon, volume: &str) -> String {
    daemon.json(&["export", "add", volume, "--nbd"])["id"].as_str().unwrap().to_owned()
}

const SAFE: &str = "[policy.safe]\ndurability = \"remote\"\n";

/// Two daemons with one pool.
fn two_hosts(extra: &str) -> (Daemon, Daemon) {
    let (mut first, mut second) = (Daemon::new(extra), Daemon::new(extra));
    let own_pool = second.path("pool").display().to_string();
    second.configure(&second.config().replace(&own_pool, &first.path("pool").display().to_string()));
    first.start();
    second.start();
    (first, second)
}

#[test]
fn it_is_the_default_where_it_can_be() {
    let mut daemon = Daemon::new("");
    daemon.start();
    let made = |name: &str, rest: &[&str]| daemon.json(&[&["volume", "create", name, "--size", "16M"], rest].concat());
    assert_eq!(made("local/a", &[])["layout"], "mapped");
    assert_eq!(made("local/b", &["--layout", "raw"])["layout"], "raw");
    assert_eq!(made("local/c", &["--layout", "mapped"])["layout"], "mapped");
    assert_eq!(made("memory/d", &[])["layout"], "raw");
    let (kind, message) = daemon.refused(&["volume", "create", "memory/e", "--size", "16M", "--layout", "mapped"]);
    assert!(kind == "unsupported" && message.contains("raw volumes only"), "{kind}: {message}");
    let (kind, message) = daemon.refused(&["volume", "create", "local/f", "--size", "1049088"]);
    assert!(kind == "invalid" && message.contains("4096"), "{kind}: {message}");
    let listed = daemon.json(&["volume", "list"]);
    let layouts: Vec<_> = listed.as_array().unwrap().iter().map(|volume| volume["layout"].as_str().unwrap()).collect();
    assert_eq!(layouts, ["mapped", "raw", "mapped", "raw"]);
}

#[test]
fn content_survives_restarts_and_kills_and_a_new_name() {
    let mut daemon = Daemon::new("");
    daemon.start();
    daemon.json(&["volume", "create", "local/v", "--size", "16M"]);
    let id = export(&daemon, "v");
    let mut client = daemon.attach("v");
    assert_eq!(client.size, 16 << 20);
    assert_eq!((client.write(1000, b"hello"), client.flush()), (0, 0));
    daemon.stop();
    daemon.start();
    let mut client = daemon.attach("v");
    assert_eq!(client.read(1000, 5), b"hello");
    assert_eq!((client.write(1 << 20, &[7; 65536]), client.flush()), (0, 0));
    daemon.kill();
    daemon.start();
    let mut client = daemon.attach("v");
    assert!(client.read(1 << 20, 65536) == vec![7; 65536]);
    drop(client);

    assert_eq!(daemon.refused(&["volume", "delete", "v", "--yes"]).0, "in_use");
    daemon.json(&["export", "remove", &id]);
    daemon.json(&["volume", "rename", "v", "w"]);
    export(&daemon, "w");
    assert_eq!(daemon.attach("w").read(1000, 5), b"hello");
    assert_eq!(daemon.json(&["volume", "check", "w"])["ok"], true);
    assert_eq!(daemon.json(&["pool", "check", "local"])["problems"], json!([]));
}

#[test]
fn usage_and_metrics_show_the_store_and_the_log() {
    let mut daemon = Daemon::new("");
    daemon.start();
    daemon.json(&["volume", "create", "local/v", "--size", "256M"]);
    let id = export(&daemon, "v");
    let mut client = daemon.attach("v");
    for part in 0..40u64 {
        assert_eq!(client.write(part << 20, &noise(part)), 0);
    }
    assert_eq!(client.flush(), 0);
    // More than one segment was written: it is on its way into the store.
    eventually("the store fills", || daemon.json(&["volume", "usage", "v"])["stored"].as_u64().unwrap() > 30 << 20);
    let usage = daemon.json(&["volume", "usage", "v"]);
    assert_eq!(usage["logical"], 256 << 20);
    assert!(usage["log"].as_u64().is_some(), "{usage}");
    let value = |name: &str| -> f64 {
        let metrics = metrics(std::os::unix::net::UnixStream::connect(daemon.path("admin.sock")).unwrap());
        let line = format!("novastor_volume_{name}{{volume=\"local/v\"}} ");
        let found = metrics.lines().find_map(|metric| metric.strip_prefix(&line));
        found.unwrap_or_else(|| panic!("{name}: {metrics}")).parse().unwrap()
    };
    eventually("the first segment counts", || value("destaged_bytes_total") >= f64::from(30 << 20));
    assert!(value("log_used_bytes") >= 0.0 && value("destage_lag_seconds") >= 0.0);
    let stats = daemon.json(&["top", "--once"]);
    assert_eq!(stats["volumes"][0]["log_size"].as_u64().unwrap() >> 20, 1023, "{stats}");
    let ratio = value("reduction_ratio");
    assert!((0.9..1.1).contains(&ratio), "noise neither compresses nor repeats: {ratio}");
    let zeroes = ["pool_waits_seconds", "destaged_duplicate_bytes_total", "collected_freed_bytes_total", "collecting"].map(value);
    assert_eq!(zeroes, [0.0; 4]);
    assert!(stats["volumes"][0]["reduction"].as_f64().is_some_and(|ratio| ratio > 0.9), "{stats}");
    assert_eq!(stats["volumes"][0]["index_hit_rate"], json!(0.0), "{stats}");
    drop(client);
    daemon.json(&["export", "remove", &id]);
    assert!(daemon.json(&["volume", "usage", "v"])["log"].is_u64(), "its log is here");
}

#[test]
fn usage_counts_what_the_log_of_a_closed_volume_holds() {
    let mut daemon = Daemon::new("");
    daemon.start();
    daemon.json(&["volume", "create", "local/v", "--size", "256M"]);
    assert_eq!(daemon.json(&["volume", "usage", "v"])["data"], 0);
    assert!(logs(&daemon).is_empty(), "a look at a new volume makes no log");
    let id = export(&daemon, "v");
    let mut client = daemon.attach("v");
    assert_eq!((client.write(0, &noise(1)), client.flush()), (0, 0));
    drop(client);
    daemon.json(&["export", "remove", &id]);
    let owners = roots(&daemon.path("pool/segments/roots"));
    for _ in 0..2 {
        assert_eq!(daemon.json(&["volume", "usage", "v"])["data"], 1 << 20);
        daemon.kill();
        daemon.start();
    }
    assert!(!owners.is_empty() && roots(&daemon.path("pool/segments/roots")) == owners, "a look opens nothing");
}

#[test]
fn usage_counts_an_image_that_was_imported_just_now() {
    let mut daemon = Daemon::new("");
    daemon.start();
    let image = daemon.path("image.raw");
    fs::write(&image, noise(1)).unwrap();
    daemon.json(&["image", "import", image.to_str().unwrap(), "local/v"]);
    let usage = || daemon.json(&["volume", "usage", "v"]);
    eventually("the import lets go of the volume", || usage()["log"].is_u64());
    let owners = roots(&daemon.path("pool/segments/roots"));
    let first = usage();
    assert_eq!(first["data"], 1 << 20);
    assert_eq!(usage(), first);
    assert!(roots(&daemon.path("pool/segments/roots")) == owners, "a look opens nothing");
    daemon.json(&["volume", "delete", "v", "--yes"]);
}

/// The roots of the groups in a folder: whoever opens a volume changes that of its group.
fn roots(folder: &Path) -> BTreeMap<PathBuf, Vec<u8>> {
    let mut found = BTreeMap::new();
    for entry in fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            found.append(&mut roots(&path));
        } else if path.ends_with("root=") {
            found.insert(path.clone(), fs::read(path).unwrap());
        }
    }
    found
}

/// A MiB that does not compress.
fn noise(seed: u64) -> Vec<u8> {
    let next = |state: &u64| Some(state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407));
    std::iter::successors(Some(seed), next).skip(8).map(|state| (state >> 56) as u8).take(1 << 20).collect()
}

fn metrics(mut stream: std::os::unix::net::UnixStream) -> String {
    use std::io::{Read, Write};
    write!(stream, "GET /metrics HTTP/1.0\r\nHost: x\r\n\r\n").unwrap();
    let mut text = String::new();
    stream.read_to_string(&mut text).unwrap();
    text
}

#[test]
fn a_deleted_volume_leaves_no_data() {
    let mut daemon = Daemon::new("");
    daemon.start();
    daemon.json(&["volume", "create", "local/v", "--size", "16M"]);
    let id = export(&daemon, "v");
    let mut client = daemon.attach("v");
    assert_eq!((client.write(0, &[1; 65536]), client.flush()), (0, 0));
    drop(client);
    daemon.json(&["export", "remove", &id]);
    assert_eq!(logs(&daemon).len(), 1);
    daemon.json(&["volume", "delete", "v", "--yes"]);
    assert_eq!(logs(&daemon), Vec::<PathBuf>::new());
    assert_eq!(daemon.json(&["volume", "list"]), json!([]));
    assert_eq!(daemon.json(&["pool", "check", "local"])["problems"], json!([]));
    daemon.json(&["volume", "create", "local/v", "--size", "16M"]);
    export(&daemon, "v");
    assert!(daemon.attach("v").read(0, 65536) == vec![0; 65536]);
}

#[test]
fn a_lost_log_is_named_and_its_loss_accepted_for_one_opening() {
    let mut daemon = Daemon::new("");
    daemon.start();
    daemon.json(&["volume", "create", "local/v", "--size", "16M"]);
    let id = export(&daemon, "v");
    let mut client = daemon.attach("v");
    assert_eq!((client.write(0, &[1; 4096]), client.flush()), (0, 0));
    let (kind, message) = daemon.refused(&["export", "add", "v", "--nbd", "--accept-loss", "--yes"]);
    assert!(kind == "invalid" && message.contains("open"), "{kind}: {message}");
    drop(client);
    daemon.stop();
    let log = logs(&daemon).remove(0);
    let lost = daemon.path("lost");
    fs::rename(&log, &lost).unwrap();
    daemon.start();
    let error = |daemon: &Daemon| daemon.json(&["export", "show", &id])["error"].as_str().map(str::to_owned);
    let message = error(&daemon).expect("the export waits for its volume");
    let log_path = log.display().to_string();
    for words in ["volume v", "log", "--accept-loss", &log_path] {
        assert!(message.contains(words), "{words}: {message}");
    }
    assert_eq!(daemon.run(&["export", "add", "v", "--nbd", "--accept-loss"]).status.code(), Some(2), "it must be confirmed");
    let accepted = daemon.json(&["export", "add", "v", "--nbd", "--accept-loss", "--yes"]);
    assert_eq!((accepted["id"].as_str(), accepted["ready"].as_bool()), (Some(&*id), Some(true)));
    let mut client = daemon.attach("v");
    assert_eq!((client.write(8192, &[2; 4096]), client.flush()), (0, 0));
    drop(client);
    daemon.stop();
    daemon.start();
    assert!(daemon.attach("v").read(8192, 4096) == vec![2; 4096], "it opens by itself again");

    // Losing the new log as well is a loss of its own.
    daemon.stop();
    fs::remove_file(&log).unwrap();
    daemon.start();
    assert!(error(&daemon).is_some());
}

#[test]
fn a_volume_that_takes_long_to_open_holds_up_no_other() {
    let mut daemon = Daemon::new("");
    daemon.start();
    let group = |name: &str| {
        let made = daemon.json(&["volume", "create", name, "--size", "16M", "--pool", "local"]);
        made["uuid"].as_str().unwrap().replace('-', "")
    };
    let slow = group("slow");
    group("other");
    export(&daemon, "slow");
    export(&daemon, "other");
    daemon.stop();
    // Its opener waits for whoever has the log.
    let log = fs::File::open(daemon.path("data/log/local").join(slow)).unwrap();
    rustix::fs::flock(&log, rustix::fs::FlockOperation::LockExclusive).unwrap();
    daemon.start();
    let mut exports = json!(null);
    eventually("the other volume is served", || {
        exports = daemon.json(&["export", "list"]);
        exports[1]["ready"] == true
    });
    assert_eq!((&exports[0]["ready"], &exports[0]["error"]), (&json!(false), &json!(null)), "the other one waited: {exports}");
    drop(log);
    eventually("the log is free", || daemon.json(&["export", "list"])[0]["ready"] == true);
}

#[test]
fn who_stops_waiting_is_told_that_the_work_goes_on() {
    let mut daemon = Daemon::new("");
    daemon.start();
    daemon.json(&["volume", "create", "local/v", "--size", "16M"]);
    let id = export(&daemon, "v");
    daemon.json(&["export", "remove", &id]);
    // The check waits for whoever has the log.
    let log = fs::File::open(logs(&daemon).remove(0)).unwrap();
    rustix::fs::flock(&log, rustix::fs::FlockOperation::LockExclusive).unwrap();
    let admin = format!("unix:{}", daemon.path("admin.sock").display());
    let mut command = common::command();
    command.env("NOVASTOR_ADMIN", admin).args(["volume", "check", "v"]).stderr(Stdio::piped()).stdout(Stdio::null());
    let client = command.spawn().unwrap();
    let job = || daemon.json(&["job", "list"]).as_array().and_then(|jobs| Some(jobs.first()?["id"].as_str()?.to_owned()));
    eventually("the job is there", || job().is_some());
    let job = job().unwrap();
    rustix::process::kill_process(rustix::process::Pid::from_child(&client), rustix::process::Signal::INT).unwrap();
    let ended = client.wait_with_output().unwrap();
    let said = String::from_utf8_lossy(&ended.stderr);
    assert_eq!(ended.status.code(), Some(130), "{said}");
    for words in
        ["volume check of v goes on in the daemon", &format!("novastor job wait {job}"), &format!("novastor job cancel {job}")]
    {
        assert!(said.contains(words), "{words}: {said}");
    }
    drop(log);
    assert_eq!(daemon.json(&["job", "wait", &job])["state"], "done");
}

#[test]
fn only_what_has_a_log_can_be_opened_without_it() {
    let mut daemon = Daemon::new("");
    daemon.start();
    daemon.json(&["volume", "create", "memory/m", "--size", "16M"]);
    let (kind, message) = daemon.refused(&["export", "add", "memory/m", "--nbd", "--accept-loss", "--yes"]);
    assert_eq!(kind, "unsupported", "{message}");
}

#[test]
fn policies_decide_on_durability_and_refuse_what_cannot_be() {
    let mut daemon =
        Daemon::new("[policy.safe]\ndurability = \"remote\"\ncompression = \"auto\"\n\n[policy.shared]\ndedup = \"tenant\"\n");
    daemon.start();
    let raw = ["volume", "create", "local/x", "--size", "16M", "--policy", "shared", "--layout", "raw"];
    let (kind, message) = daemon.refused(&raw);
    assert!(kind == "unsupported" && message.contains("dedup") && message.contains("--layout mapped"), "{kind}: {message}");
    let (kind, message) = daemon.refused(&["volume", "create", "memory/x", "--size", "16M", "--policy", "shared"]);
    assert!(kind == "unsupported" && message.contains("raw volumes only") && !message.contains("--layout"), "{kind}: {message}");
    daemon.json(&["volume", "create", "local/v", "--size", "16M", "--policy", "safe"]);
    export(&daemon, "v");
    let mut client = daemon.attach("v");
    assert_eq!((client.write(0, &[1; 4096]), client.flush()), (0, 0));
    assert!(daemon.json(&["volume", "usage", "v"])["stored"].as_u64().unwrap() > 0, "a flush waits for the store");
    drop(client);
    daemon.kill();
    logs(&daemon).into_iter().for_each(|log| fs::remove_file(log).unwrap());
    daemon.start();
    assert!(daemon.attach("v").read(0, 4096) == vec![1; 4096], "what was flushed does not rest on the log");
}

#[test]
fn volumes_of_a_tenant_share_and_are_served_anew_one_by_one() {
    let (mut first, second) = two_hosts("[policy.shared]\ndurability = \"remote\"\ndedup = \"tenant\"\n");
    let create = |name: &str, tenant: &str| {
        let made = first.json(&["volume", "create", name, "--size", "16M", "--policy", "shared", "--tenant", tenant]);
        made["group"].as_str().unwrap().to_owned()
    };
    let group = create("local/a", "t");
    assert_eq!(create("local/b", "t"), group);
    assert_ne!(create("local/c", "u"), group);
    let ids = ["a", "b"].map(|volume| export(&first, volume));
    let mut clients = ["a", "b"].map(|volume| first.attach(volume));
    for (client, fill) in clients.iter_mut().zip([1, 2]) {
        assert_eq!((client.write(0, &[fill; 4096]), client.flush()), (0, 0));
    }

    let taken = export(&second, "a");
    assert!(second.attach("a").read(0, 4096) == [1; 4096]);
    let problem = |volume: &str| first.json(&["volume", "show", volume])["problem"].as_str().unwrap_or_default().to_owned();
    eventually("the first host notices", || ["a", "b"].iter().all(|volume| problem(volume).contains("another host")));
    second.json(&["export", "remove", &taken]);

    for (id, (volume, fill)) in ids.iter().zip([("a", 1), ("b", 2)]) {
        assert_eq!(first.json(&["export", "reopen", id])["ready"], true);
        let mut client = first.attach(volume);
        assert!(client.read(0, 4096) == vec![fill; 4096], "{volume}");
        assert_eq!((client.write(0, &[fill + 2; 4096]), client.flush()), (0, 0));
        if volume == "a" {
            assert!(problem("b").contains("novastor export reopen"), "{}", problem("b"));
        }
    }
    drop(clients);
    first.kill();
    first.start();
    for (volume, fill) in [("a", 3), ("b", 4)] {
        eventually("its export is served again", || first.json(&["volume", "show", volume])["open"] == true);
        assert!(first.attach(volume).read(0, 4096) == vec![fill; 4096], "{volume}");
    }
    let (kind, message) = second.refused(&["volume", "delete", "local/a", "--yes"]);
    assert!(kind == "in_use" && message.contains("b"), "{kind}: {message}");
}

#[test]
fn an_export_whose_volume_another_host_had_is_served_again_when_that_is_asked_for() {
    let (first, second) = two_hosts(SAFE);
    first.json(&["volume", "create", "local/v", "--size", "16M", "--policy", "safe"]);
    let ids = [export(&first, "v"), {
        let own = format!("--nbd=unix:{}", first.path("own.sock").display());
        first.json(&["export", "add", "v", &own])["id"].as_str().unwrap().to_owned()
    }];
    let mut client = first.attach("v");
    assert_eq!((client.write(0, &[1; 4096]), client.flush()), (0, 0));

    let taken = export(&second, "v");
    let mut other = second.attach("v");
    assert_eq!((other.write(4096, &[2; 4096]), other.flush()), (0, 0));
    let problem = || first.json(&["volume", "show", "v"])["problem"].as_str().unwrap_or_default().to_owned();
    eventually("the first host notices", || problem().contains("another host has taken over"));
    assert!(problem().contains("novastor export reopen"), "{}", problem());
    let listed = first.json(&["export", "list"]);
    assert!(listed.as_array().unwrap().iter().all(|export| export["problem"] == *problem()), "{listed}");
    let listed = String::from_utf8(first.run(&["export", "list"]).stdout).unwrap();
    assert_eq!(listed.matches("problem: another host has taken over this volume").count(), 2, "{listed}");
    assert_ne!(client.write(8192, &[3; 4096]), 0);
    drop(other);
    second.json(&["export", "remove", &taken]);

    let export = first.json(&["export", "reopen", &ids[1]]);
    assert_eq!((export["ready"].as_bool(), export["id"].as_str()), (Some(true), Some(&*ids[1])));
    assert!(client.is_closed(), "it remembers another disk");
    assert_eq!(problem(), "");
    let mut client = first.attach("v");
    assert!(client.read(0, 8192) == [[1; 4096], [2; 4096]].concat() && client.read(8192, 4096) == [0; 4096]);
    assert_eq!((client.write(8192, &[4; 4096]), client.flush()), (0, 0));
    eventually("the other export is served too", || first.json(&["export", "show", &ids[0]])["ready"] == true);
    assert_eq!(first.refused(&["export", "reopen", "99"]).0, "not_found");
}

/// Not served, and why: another host serves the volume of this export.
fn is_left_alone(daemon: &Daemon, id: &str) -> bool {
    let shown = daemon.json(&["export", "show", id]);
    let problem = shown["problem"].as_str().unwrap_or_default();
    let next = format!("novastor export reopen {id}");
    shown["ready"] == false && problem.contains("another host has taken over volume local/v") && problem.contains(&next)
}

#[test]
fn an_export_whose_volume_another_host_serves_does_not_come_back_by_itself() {
    for notices in [false, true] {
        let (mut first, second) = two_hosts(SAFE);
        first.json(&["volume", "create", "local/v", "--size", "16M", "--policy", "safe"]);
        let id = export(&first, "v");
        let mut client = first.attach("v");
        assert_eq!((client.write(0, &[1; 4096]), client.flush()), (0, 0));
        if !notices {
            first.kill();
        }
        let taken = export(&second, "v");
        let mut other = second.attach("v");
        let mut goes_on = |fill| assert_eq!((other.write(4096, &[fill; 4096]), other.flush()), (0, 0));
        goes_on(2);
        if notices {
            let saved = || fs::read_to_string(first.path("data/exports.json")).unwrap();
            eventually("it is noted", || saved().contains("taken_over"));
            first.stop();
        }
        first.start();
        eventually("the export says why it is not served", || is_left_alone(&first, &id));
        // It would be tried again by then.
        std::thread::sleep(Duration::from_secs(5));
        goes_on(3);
        assert_eq!(second.json(&["volume", "show", "v"])["problem"], json!(null));
        assert!(logs(&first).len() == 1 && is_left_alone(&first, &id), "{:?}", logs(&first));

        // A command that takes the volume over brings no guest back to it.
        second.json(&["export", "remove", &taken]);
        assert_eq!(first.refused(&["volume", "check", "v"]).0, "taken_over");
        first.json(&["volume", "check", "v", "--take-over"]);
        first.stop();
        first.start();
        assert!(is_left_alone(&first, &id));
        let listed = String::from_utf8(first.run(&["export", "list"]).stdout).unwrap();
        assert!(listed.contains("problem: another host has taken over volume local/v"), "{listed}");

        let reopened = first.json(&["export", "reopen", &id]);
        assert_eq!((&reopened["ready"], &reopened["problem"]), (&json!(true), &json!(null)));
        assert!(first.attach("v").read(0, 8192) == [[1; 4096], [3; 4096]].concat());
        first.kill();
        first.start();
        eventually("it returns by itself: this host had it last", || first.json(&["export", "show", &id])["ready"] == true);
    }
}

#[test]
fn a_command_takes_no_volume_from_another_host_unless_told_to() {
    let (first, second) = two_hosts(SAFE);
    first.json(&["volume", "create", "local/v", "--size", "16M", "--policy", "safe"]);
    export(&first, "v");
    let mut client = first.attach("v");
    let mut goes_on = |fill| assert_eq!((client.write(0, &[fill; 4096]), client.flush()), (0, 0));
    goes_on(1);
    first.json(&["snapshot", "create", "v@s"]);
    let image = second.path("image").display().to_string();
    let commands: [&[&str]; 9] = [
        &["volume", "resize", "v", "32M"],
        &["volume", "check", "v"],
        &["volume", "flatten", "v"],
        &["volume", "clone", "v", "w"],
        &["snapshot", "create", "v@t"],
        &["snapshot", "delete", "v@s", "--yes"],
        &["snapshot", "rollback", "v@s", "--yes"],
        &["snapshot", "diff", "v@s"],
        &["image", "export", "v", &image],
    ];
    for command in commands {
        let (kind, message) = second.refused(command);
        assert_eq!(kind, "taken_over", "{command:?}: {message}");
        let words = ["volume v", "another host", "--take-over"];
        assert!(words.iter().all(|word| message.contains(word)), "{command:?}: {message}");
        goes_on(2);
    }
    second.json(&["volume", "usage", "v"]);
    second.json(&["volume", "clone", "v@s", "c"]);
    goes_on(3);

    second.json(&["snapshot", "create", "v@t", "--take-over"]);
    second.json(&["snapshot", "delete", "v@t", "--yes"]);
    assert!(client.write(4096, &[4; 4096]) != 0 || client.flush() != 0, "the replaced host acknowledged a flush");
}

#[test]
fn an_export_serves_no_other_volume_that_has_come_to_its_name() {
    let (mut first, second) = two_hosts("");
    let create =
        |name: &str, size: &str| second.json(&["volume", "create", name, "--size", size])["uuid"].as_str().unwrap().to_owned();
    let uuid = create("local/a", "16M");
    let id = export(&first, "a");
    first.stop();
    // As an older version left it.
    let list = first.path("data/exports.json");
    let mut older: serde_json::Value = serde_json::from_slice(&fs::read(&list).unwrap()).unwrap();
    older["exports"][0].as_object_mut().unwrap().remove("volume_uuid").unwrap();
    fs::write(&list, older.to_string()).unwrap();
    first.start();
    assert_eq!(first.attach("a").size, 16 << 20);
    first.stop();

    second.json(&["volume", "rename", "a", "old"]);
    create("local/a", "8M");
    first.start();
    let shown = first.json(&["export", "show", &id]);
    let error = shown["error"].as_str().unwrap_or_default();
    assert!(shown["ready"] == false && error.contains(&uuid) && error.contains(&format!("export remove {id}")), "{shown}");
    assert!(error.contains("another volume that was called local/a"), "{error}");
    assert!(Nbd::attach(UnixStream::connect(first.path("nbd.sock")).unwrap(), "a").is_none());
    second.json(&["volume", "rename", "a", "new"]);
    second.json(&["volume", "rename", "old", "a"]);
    eventually("it is served again", || first.json(&["export", "show", &id])["ready"] == true);
    assert_eq!(first.attach("a").size, 16 << 20);

    second.json(&["volume", "rename", "a", "old"]);
    second.json(&["volume", "rename", "new", "a"]);
    let own = format!("--nbd=unix:{}", first.path("own.sock").display());
    let (_, refused) = first.refused(&["export", "add", "a", &own]);
    assert!(refused.contains(&uuid), "what is still open is not the volume meant: {refused}");
}
