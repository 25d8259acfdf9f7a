//! Snapshots of several volumes that one command makes: all of them or none, whenever the daemon is killed.

mod common;

use std::process::{Child, Stdio};
use std::time::Duration;

use common::Daemon;
use serde_json::{Value, json};

const ROUNDS: u32 = 34;
/// The first rounds are not cut off: they tell how long the command takes on this machine.
const WHOLE_ROUNDS: u32 = 4;
const SEED: u64 = 42;
const VOLUMES: [&str; 3] = ["local/a", "local/b", "other/c"];
/// What the daemon keeps of such commands.
const NOTES: &str = "data/joint_snapshots.json";

/// Three mapped volumes in two pools.
fn started() -> Daemon {
    let mut daemon = Daemon::new("[pool.other]\ndriver = \"file\"\npath = \"{dir}/other\"\n");
    daemon.start();
    for volume in VOLUMES {
        daemon.json(&["volume", "create", volume, "--size", "16M"]);
    }
    daemon
}

/// A command that may be cut off by the end of the daemon.
fn begin(daemon: &Daemon, arguments: &[&str]) -> Child {
    let admin = format!("unix:{}", daemon.path("admin.sock").display());
    let mut command = common::command();
    command.env("NOVASTOR_ADMIN", admin).args(arguments).stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap()
}

fn next_random(state: &mut u64) -> u64 {
    *state ^= *state << 13;
    *state ^= *state >> 7;
    *state ^= *state << 17;
    *state
}

fn has(daemon: &Daemon, snapshot: &str) -> bool {
    let listed = daemon.json(&["snapshot", "list"]);
    listed.as_array().unwrap().iter().any(|item| item["name"] == snapshot)
}

/// The command for all volumes, and the names of what it makes.
fn create(daemon: &Daemon, snapshot: &str) -> (Child, [String; 3]) {
    let names = VOLUMES.map(|volume| format!("{volume}@{snapshot}"));
    (begin(daemon, &["snapshot", "create", &names[0], &names[1], &names[2]]), names)
}

#[test]
fn a_kill_leaves_the_snapshot_on_all_volumes_or_on_none() {
    let mut daemon = started();
    let (mut random, mut all, mut none, mut answered, mut taken_back, mut torn) = (SEED, 0, 0, 0, 0, Vec::new());
    let mut whole = [Duration::ZERO; 2];
    for round in 0..ROUNDS {
        // Open volumes take their snapshots quickly, closed ones slowly: both kinds are cut off.
        let export = (round % 2 == 0).then(|| daemon.json(&["export", "add", "local/b", "--nbd"]));
        let (began, (mut running, names)) = (blockdev::clock::monotonic(), create(&daemon, &format!("r{round}")));
        let whole = &mut whole[usize::from(export.is_some())];
        if round < WHOLE_ROUNDS {
            assert!(common::wait(&mut running).success());
            *whole = blockdev::clock::monotonic() - began;
        } else {
            std::thread::sleep(*whole * (next_random(&mut random) % 120) as u32 / 100);
        }
        daemon.kill();
        let is_answered = common::wait(&mut running).success();
        daemon.start();
        taken_back += usize::from(daemon.log().contains("was taken back"));
        if let Some(export) = export {
            daemon.json(&["export", "remove", export["id"].as_str().unwrap()]);
        }
        // A snapshot that a kill kept from the catalogue is in it once the volume was opened.
        for volume in VOLUMES {
            assert_eq!(daemon.json(&["volume", "check", volume])["problems"], json!([]), "round {round}");
        }
        match names.iter().filter(|name| has(&daemon, name)).count() {
            3 => all += 1,
            0 if !is_answered => none += 1,
            found => torn.push(format!("round {round}: {found} of 3, answered: {is_answered}")),
        }
        answered += u64::from(is_answered);
    }
    println!("{ROUNDS} rounds: all have it in {all}, none in {none}; {answered} were answered, {taken_back} taken back");
    assert!(torn.is_empty(), "{torn:#?}");
}

#[test]
fn a_command_that_fails_leaves_neither_snapshots_nor_a_note() {
    let mut daemon = started();
    daemon.json(&["volume", "create", "memory/raw", "--size", "16M"]);
    let refused = daemon.refused(&["snapshot", "create", "local/a@s", "local/b@s", "memory/raw@s", "other/c@s"]);
    assert_eq!(refused.0, "unsupported", "{}", refused.1);
    assert_eq!((daemon.json(&["snapshot", "list"]), noted(&daemon)), (json!([]), Vec::new()));
    daemon.kill();
    daemon.start();
    daemon.json(&["snapshot", "create", "local/a@s", "local/b@s", "other/c@s"]);
    assert!(!daemon.log().contains("left behind"), "{}", daemon.log());
}

/// As if a command that was to make these snapshots had been cut off.
fn note(daemon: &Daemon, noted: &[(&str, &Value, &str)]) {
    let noted = noted.iter().map(|(pool, uuid, snapshot)| json!({"pool": pool, "volume_uuid": uuid, "snapshot": snapshot}));
    std::fs::write(daemon.path(NOTES), Value::from_iter(noted).to_string()).unwrap();
}

/// Pools and snapshots that are noted.
fn noted(daemon: &Daemon) -> Vec<(String, String)> {
    let text = std::fs::read_to_string(daemon.path(NOTES)).unwrap();
    let found: Vec<Value> = serde_json::from_str(&text).unwrap();
    let of = |one: &Value, name: &str| one[name].as_str().unwrap().to_owned();
    found.iter().map(|one| (of(one, "pool"), of(one, "snapshot"))).collect()
}

#[test]
fn what_is_noted_is_taken_back_unless_it_has_clones() {
    let mut daemon = started();
    for snapshot in ["s", "t", "cloned"] {
        daemon.json(&["snapshot", "create", &format!("local/a@{snapshot}"), &format!("other/c@{snapshot}")]);
    }
    assert_eq!(noted(&daemon), [], "what was answered is not noted");
    daemon.json(&["volume", "clone", "local/a@cloned", "clone"]);
    let (a, c) = (
        daemon.json(&["volume", "show", "local/a"])["uuid"].clone(),
        daemon.json(&["volume", "show", "other/c"])["uuid"].clone(),
    );
    daemon.json(&["volume", "rename", "other/c", "d"]);
    daemon.json(&["volume", "create", "other/c", "--size", "16M"]);
    daemon.json(&["snapshot", "create", "other/c@s"]);
    daemon.kill();
    let never_made = ("local", &a, "never-made");
    note(&daemon, &[("local", &a, "s"), ("other", &c, "s"), ("local", &a, "cloned"), ("other", &c, "cloned"), never_made]);
    daemon.start();
    let listed = daemon.json(&["snapshot", "list"]);
    let names: Vec<&str> = listed.as_array().unwrap().iter().map(|item| item["name"].as_str().unwrap()).collect();
    assert_eq!(names, ["local/a@cloned", "local/a@t", "other/c@s", "other/d@t"]);
    let log = daemon.log();
    for said in
        ["local/a@s was taken back", "other/d@s was taken back", "local/a@cloned is kept", "other/d@cloned was taken back"]
    {
        assert!(log.contains(said), "{said}: {log}");
    }
    assert_eq!(noted(&daemon), []);
}

#[test]
fn what_cannot_be_taken_back_now_keeps_nobody_waiting_and_is_not_forgotten() {
    let mut daemon = started();
    daemon.json(&["snapshot", "create", "local/a@s", "local/b@s", "other/c@s"]);
    let uuid = |volume: &str| daemon.json(&["volume", "show", volume])["uuid"].clone();
    let (a, b, c) = (uuid("local/a"), uuid("local/b"), uuid("other/c"));
    daemon.kill();
    let gone = json!("00000000-0000-4000-8000-000000000001");
    note(&daemon, &[("local", &a, "s"), ("local", &b, "s"), ("local", &gone, "s"), ("other", &c, "s"), ("removed", &gone, "s")]);
    // The log of one volume is missing, and another pool: neither is there until they are brought back.
    let log_folder = daemon.path("data/log/local");
    let lost = log_folder.join(b.as_str().unwrap().replace('-', ""));
    assert!(lost.exists(), "{}", lost.display());
    std::fs::rename(&lost, daemon.path("lost")).unwrap();
    let whole = daemon.config();
    daemon.configure(whole.split("[pool.other]").next().unwrap());
    daemon.start();
    let left = |pools: &[&str]| pools.iter().map(|pool| ((*pool).to_owned(), "s".to_owned())).collect::<Vec<_>>();
    assert_eq!(noted(&daemon).len(), 4, "{}", daemon.log());
    assert!(!has(&daemon, "local/a@s") && has(&daemon, "local/b@s"));
    assert_eq!(daemon.log().matches("is left behind").count(), 4, "{}", daemon.log());
    // It could be taken for one that is made now.
    assert!(daemon.refused(&["snapshot", "create", "local/b@s"]).1.contains("local/b@s"));
    daemon.json(&["snapshot", "create", "local/a@s"]);
    daemon.kill();
    std::fs::rename(daemon.path("lost"), &lost).unwrap();
    daemon.configure(&whole);
    daemon.start();
    assert_eq!(noted(&daemon), left(&["local", "removed"]), "{}", daemon.log());
    assert!(has(&daemon, "local/a@s"), "it was made and answered after the other was taken back");
    assert!(!has(&daemon, "local/b@s") && !has(&daemon, "other/c@s"));
}
