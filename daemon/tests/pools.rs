//! Pools that are slow, that do not answer, or that are not what they were.

mod common;

use std::fs;

use common::{Daemon, eventually};
use serde_json::{Value, json};

/// A pool that cannot be opened.
const BROKEN: &str = "[pool.broken]\ndriver = \"file\"\npath = \"{dir}/file/pool\"";

#[test]
fn twenty_commands_with_bare_names_at_once_all_find_their_volume() {
    let mut daemon = Daemon::new("");
    daemon.start();
    daemon.json(&["volume", "create", "v", "--size", "1M", "--layout", "raw"]);
    std::thread::scope(|scope| {
        let asking: Vec<_> = (0..20).map(|_| scope.spawn(|| daemon.run(&["volume", "show", "v", "--json"]))).collect();
        for output in asking.into_iter().map(|asking| asking.join().unwrap()) {
            assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        }
    });
}

#[test]
fn lists_say_which_pools_did_not_answer_and_show_what_the_others_hold() {
    let mut daemon = Daemon::new(BROKEN);
    fs::write(daemon.path("file"), "not a folder").unwrap();
    daemon.start();
    daemon.json(&["volume", "create", "local/v", "--size", "1M"]);
    daemon.json(&["snapshot", "create", "local/v@s"]);
    for (what, name) in [("volume", "v"), ("snapshot", "local/v@s")] {
        let output = daemon.run(&[what, "list", "--json"]);
        assert_eq!(output.status.code(), Some(1));
        let found: Value = serde_json::from_slice(&output.stdout).unwrap();
        assert_eq!(found.as_array().unwrap().iter().map(|found| &found["name"]).collect::<Vec<_>>(), [name]);
        let error: Value = serde_json::from_slice(&output.stderr).unwrap();
        assert_eq!(error["error"]["kind"], "backend");
        let unanswered = error["unanswered"].as_array().unwrap();
        assert_eq!(unanswered.len(), 1);
        assert_eq!(unanswered[0]["pool"], "broken");
        assert!(unanswered[0]["error"].as_str().unwrap().contains("file/pool"), "{error}");

        let output = daemon.run(&[what, "list"]);
        assert_eq!(output.status.code(), Some(1));
        assert!(String::from_utf8_lossy(&output.stdout).contains(name));
        assert!(String::from_utf8_lossy(&output.stderr).contains("pool broken:"));
    }
    assert_eq!(daemon.json(&["volume", "list", "--pool", "local"]).as_array().unwrap().len(), 1);
    let (kind, message) = daemon.refused(&["volume", "show", "w"]);
    assert!(kind == "backend" && message.contains("pool broken:"), "{kind}: {message}");
    assert_eq!(daemon.json(&["volume", "show", "v"])["name"], json!("v"));
}

#[test]
fn a_bare_name_changes_nothing_while_a_pool_that_may_have_it_too_is_silent() {
    let declared = "[[export]]\nvolume = \"d\"\nnbd = true\n";
    let mut daemon = Daemon::new(&format!("{declared}{BROKEN}"));
    fs::write(daemon.path("file"), "not a folder").unwrap();
    daemon.start();
    for name in ["v", "d"] {
        daemon.json(&["volume", "create", &format!("local/{name}"), "--size", "1M"]);
    }
    for change in [&["volume", "delete", "v", "--yes"][..], &["export", "add", "v", "--nbd"], &["snapshot", "create", "v@s"]] {
        let (kind, message) = daemon.refused(change);
        assert!(kind == "backend" && message.contains("local/v") && message.contains("pool broken"), "{message}");
    }
    daemon.json(&["volume", "show", "v"]);
    daemon.json(&["volume", "delete", "local/v", "--yes"]);
    daemon.json(&["config", "reload"]);
    assert_eq!(daemon.json(&["export", "list"])[0]["ready"], false, "the silent pool may have another d");
    fs::remove_file(daemon.path("file")).unwrap();
    fs::create_dir(daemon.path("file")).unwrap();
    eventually("the declared export is served", || daemon.json(&["export", "list"])[0]["ready"] == true);
}

fn state_of(daemon: &Daemon, pool: &str) -> (bool, String) {
    let found = daemon.json(&["pool", "show", pool]);
    (found["ok"].as_bool().unwrap(), found["detail"].as_str().unwrap().to_owned())
}

/// The pool's folder goes out of sight, as when its file system is not mounted; an empty one is there instead.
fn unmount(daemon: &Daemon) {
    fs::rename(daemon.path("pool"), daemon.path("away")).unwrap();
    fs::create_dir(daemon.path("pool")).unwrap();
}

fn mount(daemon: &Daemon) {
    fs::remove_dir_all(daemon.path("pool")).unwrap();
    fs::rename(daemon.path("away"), daemon.path("pool")).unwrap();
}

#[test]
fn a_pool_whose_file_system_is_not_mounted_is_not_made_anew_and_comes_back_by_itself() {
    let mut daemon = Daemon::new("");
    daemon.start();
    for (name, layout) in [("r", "raw"), ("m", "mapped")] {
        daemon.json(&["volume", "create", &format!("local/{name}"), "--size", "1M", "--layout", layout]);
        daemon.json(&["export", "add", name, "--nbd"]);
    }
    daemon.json(&["volume", "create", "memory/other", "--size", "1M"]);
    daemon.json(&["export", "add", "other", "--nbd"]);
    daemon.stop();
    unmount(&daemon);
    daemon.start();
    let (ok, why) = state_of(&daemon, "local");
    assert!(!ok && why.contains("no pool any more") && why.contains("mounted?") && why.contains("pool forget local"), "{why}");
    assert_eq!(fs::read_dir(daemon.path("pool")).unwrap().count(), 0, "nothing was made there");
    assert!(daemon.refused(&["volume", "create", "local/new", "--size", "1M"]).1.contains("no pool any more"));
    assert_eq!(daemon.attach("other").flush(), 0, "other pools are served");
    mount(&daemon);
    eventually("the pool and its exports come back", || {
        daemon.json(&["export", "list"]).as_array().unwrap().iter().all(|export| export["ready"] == true)
    });
    assert_eq!(daemon.json(&["volume", "list", "--pool", "local"]).as_array().unwrap().len(), 2);
    assert_eq!(daemon.attach("m").flush(), 0);
    assert_eq!(daemon.refused(&["pool", "forget", "local"]).0, "in_use");
    // While it runs, too, nobody is told that all is well.
    unmount(&daemon);
    assert!(state_of(&daemon, "local").1.contains("no pool any more"));
    mount(&daemon);
    assert!(state_of(&daemon, "local").0);
}

#[test]
fn another_pool_or_a_new_one_is_taken_when_the_old_one_is_forgotten() {
    let mut daemon = Daemon::new("");
    daemon.start();
    daemon.json(&["volume", "create", "local/v", "--size", "1M"]);
    daemon.stop();
    unmount(&daemon);
    daemon.start();
    daemon.json(&["pool", "forget", "local"]);
    eventually("a new pool", || state_of(&daemon, "local").0);
    assert_eq!(daemon.json(&["volume", "list"]), json!([]));
    assert_eq!(daemon.refused(&["pool", "forget", "nowhere"]).0, "not_found");
    daemon.stop();
    mount(&daemon);
    daemon.start();
    let (ok, why) = state_of(&daemon, "local");
    assert!(!ok && why.contains("another pool") && why.contains("pool forget local"), "{why}");
    daemon.json(&["pool", "forget", "local"]);
    eventually("the first pool", || state_of(&daemon, "local").0);
    assert_eq!(daemon.json(&["volume", "list"]).as_array().unwrap().len(), 1);
}

#[test]
fn a_copy_of_a_pool_is_not_served_beside_it() {
    let mut daemon = Daemon::new("[pool.twin]\ndriver = \"file\"\npath = \"{dir}/copy\"");
    for folder in ["pool", "copy"] {
        fs::create_dir(daemon.path(folder)).unwrap();
        let header = "{\"format\": 1, \"uuid\": \"6f1e3a52-3c1d-4b0e-9d57-0a4e2f7c1b11\"}";
        fs::write(daemon.path(folder).join("pool.json"), header).unwrap();
    }
    daemon.start();
    let states = [state_of(&daemon, "local"), state_of(&daemon, "twin")];
    assert_eq!(states.iter().filter(|(ok, _)| *ok).count(), 1, "{states:?}");
    assert!(states.iter().any(|(ok, why)| !ok && why.contains("both are one pool")), "{states:?}");
}

#[test]
fn looking_at_the_health_of_a_pool_from_many_sides_harms_nobody() {
    let mut daemon = Daemon::new("");
    daemon.start();
    std::thread::scope(|scope| {
        for _ in 0..8 {
            scope.spawn(|| (0..8).for_each(|_| assert_eq!(state_of(&daemon, "local"), (true, "writable".to_owned()))));
        }
    });
}
