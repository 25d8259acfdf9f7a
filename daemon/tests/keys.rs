//! Replacing key-encryption keys and destroying data keys, with a real daemon.

mod common;

use std::fs::{self, Permissions};
use std::io::{Read, Write};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixStream;

use common::Daemon;
use serde_json::{Value, json};

const OLD: &str = "file = \"{dir}/kek\"";
const BOTH: &str = "file = \"{dir}/kek.new\"\nprevious_file = \"{dir}/kek\"";
const NEW: &str = "file = \"{dir}/kek.new\"";

fn daemon_with_keys(keys: &str) -> Daemon {
    let daemon = Daemon::new(&config(keys));
    for (name, pair) in [("kek", "ab"), ("kek.new", "cd")] {
        fs::write(daemon.path(name), pair.repeat(32)).unwrap();
        fs::set_permissions(daemon.path(name), Permissions::from_mode(0o600)).unwrap();
    }
    daemon
}

fn config(keys: &str) -> String {
    format!("[policy.secret]\nencryption = true\n\n[keys]\n{keys}\n")
}

/// Replaces what stands in `[keys]`, the last section.
fn configure_keys(daemon: &Daemon, keys: &str) {
    let now = daemon.config();
    let (before, _) = now.split_once("[keys]\n").unwrap();
    daemon.configure(&format!("{before}[keys]\n{keys}\n"));
}

fn reload(daemon: &Daemon, keys: &str) {
    configure_keys(daemon, keys);
    let report = daemon.json(&["config", "reload"]);
    assert!(report["changed"].to_string().contains("key rotate"), "{report}");
}

fn create(daemon: &Daemon, name: &str, layout: &str) {
    let arguments = ["volume", "create", name, "--size", "16M", "--pool", "local", "--layout", layout, "--policy", "secret"];
    daemon.json(&arguments);
}

fn write(daemon: &Daemon, name: &str, byte: u8) -> String {
    let export = daemon.json(&["export", "add", name, "--nbd"]);
    let mut client = daemon.attach(name);
    assert_eq!((client.write(0, &[byte; 8192]), client.flush()), (0, 0));
    export["id"].as_str().unwrap().to_owned()
}

fn read(daemon: &Daemon, name: &str) -> Vec<u8> {
    daemon.attach(name).read(0, 8192)
}

/// What wraps each key: of the pool, of mapped volumes, of raw ones.
fn wrapped_by(list: &Value) -> Vec<&str> {
    list["keys"].as_array().unwrap().iter().map(|key| key["wrapped_by"].as_str().unwrap()).collect()
}

fn post(daemon: &Daemon, path: &str, body: &Value) -> (u16, Value) {
    let mut stream = UnixStream::connect(daemon.path("admin.sock")).unwrap();
    let body = body.to_string();
    let head = format!("POST {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Type: application/json\r\n");
    write!(stream, "{head}Content-Length: {}\r\n\r\n{body}", body.len()).unwrap();
    let mut text = String::new();
    stream.read_to_string(&mut text).unwrap();
    let status = text.split(' ').nth(1).unwrap().parse().unwrap();
    (status, serde_json::from_str(text.split_once("\r\n\r\n").unwrap().1).unwrap())
}

#[test]
fn a_rotation_rewraps_the_keys_of_mapped_and_raw_volumes_under_attached_clients() {
    let mut daemon = daemon_with_keys(OLD);
    daemon.start();
    for (name, layout, byte) in [("m", "mapped", 1), ("r", "raw", 2)] {
        create(&daemon, name, layout);
        write(&daemon, name, byte);
    }
    let mut client = daemon.attach("m");
    let list = daemon.json(&["key", "list"]);
    let old = list["current"].as_str().unwrap().to_owned();
    assert_eq!(wrapped_by(&list), [&*old; 3], "{list}");
    let of: Vec<&str> = list["keys"].as_array().unwrap().iter().map(|key| key["of"].as_str().unwrap()).collect();
    assert_eq!(of, ["pool", "mapped", "raw"], "{list}");
    assert_eq!(list["keys"][1]["volumes"], json!(["local/m"]));

    reload(&daemon, BOTH);
    let list = daemon.json(&["key", "list", "local"]);
    assert_eq!((list["previous"].as_str(), wrapped_by(&list)), (Some(&*old), vec![&*old; 3]), "{list}");
    let text = String::from_utf8(daemon.run(&["key", "list"]).stdout).unwrap();
    assert_eq!(text.matches("to be rotated").count(), 3, "{text}");
    let of_local = |rotated: Value| {
        let pools = rotated.as_array().unwrap().iter();
        let found = pools.filter(|pool| pool["pool"] == "local").cloned().collect::<Vec<_>>();
        (found[0]["rewrapped"].as_u64().unwrap(), found[0]["already"].as_u64().unwrap())
    };
    assert_eq!(of_local(daemon.json(&["key", "rotate"])), (3, 0));
    assert_eq!(of_local(daemon.json(&["key", "rotate", "local"])), (0, 3), "it can be repeated");
    assert_eq!((client.write(4096, &[3; 4096]), client.flush()), (0, 0));

    reload(&daemon, NEW);
    let list = daemon.json(&["key", "list"]);
    assert_eq!(wrapped_by(&list), [list["current"].as_str().unwrap(); 3], "{list}");
    create(&daemon, "later", "mapped");
    drop(client);
    daemon.kill();
    daemon.start();
    assert_eq!(read(&daemon, "m"), [[1; 4096], [3; 4096]].concat());
    assert_eq!(read(&daemon, "r"), [2; 8192]);
}

#[test]
fn a_rotation_that_cannot_read_a_key_changes_nothing_and_names_it() {
    let mut daemon = daemon_with_keys(OLD);
    daemon.start();
    create(&daemon, "m", "mapped");
    create(&daemon, "r", "raw");
    let old = daemon.json(&["key", "list"])["current"].as_str().unwrap().to_owned();
    reload(&daemon, NEW);
    let (_, refused) = daemon.refused(&["key", "rotate", "local"]);
    assert!(refused.contains(&old) && refused.contains("nothing was changed"), "{refused}");
    let list = daemon.json(&["key", "list", "local"]);
    assert_eq!(wrapped_by(&list), [&*old; 3], "{list}");
    let text = String::from_utf8(daemon.run(&["key", "list"]).stdout).unwrap();
    assert_eq!(text.matches("is not configured").count(), 3, "{text}");
    let (_, refused) = daemon.refused(&["export", "add", "m", "--nbd"]);
    assert!(refused.contains(&old), "{refused}");
    reload(&daemon, OLD);
    write(&daemon, "m", 4);
    assert_eq!(read(&daemon, "m"), [4; 8192]);
    let (kind, _) = daemon.refused(&["key", "rotate", "elsewhere"]);
    assert_eq!(kind, "not_found");
}

#[test]
fn an_erased_key_takes_the_content_of_the_volume_and_its_clones_and_nothing_else() {
    let mut daemon = daemon_with_keys(OLD);
    daemon.start();
    for (name, byte) in [("m", 1), ("other", 2)] {
        create(&daemon, name, "mapped");
        let export = write(&daemon, name, byte);
        if name == "m" {
            daemon.json(&["snapshot", "create", "m@s"]);
            daemon.json(&["volume", "clone", "m@s", "c"]);
            assert_eq!(daemon.run(&["key", "erase", "m"]).status.code(), Some(2), "it must be confirmed");
            let (kind, refused) = daemon.refused(&["key", "erase", "c", "--yes"]);
            assert!(kind == "in_use" && refused.contains("exported"), "{kind}: {refused}");
            daemon.json(&["export", "remove", &export]);
        }
    }
    let (status, refused) = post(&daemon, "/v1/keys/erase", &json!({"volumes": ["m"]}));
    let message = refused["error"]["message"].as_str().unwrap();
    assert!(status == 400 && message.contains("local/c, local/m"), "{status} {message}");
    let erased = daemon.json(&["key", "erase", "c", "--yes"]);
    assert_eq!(erased, json!({"volumes": ["local/c", "local/m"], "erased": true}));
    assert_eq!(daemon.json(&["key", "erase", "m", "--yes"])["erased"], false, "it can be repeated");
    for name in ["m", "c", "m@s"] {
        let (_, refused) = daemon.refused(&["export", "add", name, "--nbd", "--read-only"]);
        assert!(refused.contains("was erased"), "{name}: {refused}");
    }
    assert_eq!(read(&daemon, "other"), [2; 8192]);
    assert_eq!(daemon.json(&["key", "list"])["keys"].to_string().matches("erased").count(), 1);

    daemon.kill();
    daemon.start();
    assert_eq!(read(&daemon, "other"), [2; 8192]);
    let (kind, refused) = daemon.refused(&["volume", "delete", "m", "--yes"]);
    assert!(kind == "in_use" && refused.contains("(c)"), "{kind}: {refused}");
    for name in ["c", "m"] {
        daemon.json(&["volume", "delete", name, "--yes"]);
    }
    let report = daemon.json(&["pool", "check", "local"]);
    assert_eq!(report["ok"], true, "{report}");
    assert_eq!(daemon.json(&["key", "list"])["keys"].to_string().matches("erased").count(), 0);
}

#[test]
fn only_a_mapped_volume_has_a_key_to_erase() {
    let mut daemon = daemon_with_keys(OLD);
    daemon.start();
    create(&daemon, "r", "raw");
    let (kind, refused) = daemon.refused(&["key", "erase", "r", "--yes"]);
    assert!(kind == "unsupported" && refused.contains("volume delete r"), "{kind}: {refused}");
    daemon.json(&["volume", "create", "local/plain", "--size", "16M"]);
    let (kind, refused) = daemon.refused(&["key", "erase", "plain", "--yes"]);
    assert!(kind == "invalid" && refused.contains("not encrypted"), "{kind}: {refused}");
}

#[test]
fn a_reload_tells_of_another_key_in_the_same_file() {
    let mut daemon = daemon_with_keys(OLD);
    daemon.start();
    create(&daemon, "m", "mapped");
    create(&daemon, "r", "raw");
    let old = daemon.json(&["key", "list"])["current"].as_str().unwrap().to_owned();
    let quiet = daemon.json(&["config", "reload"]);
    assert_eq!((&quiet["changed"], &quiet["problems"]), (&json!([]), &json!([])));
    fs::copy(daemon.path("kek.new"), daemon.path("kek")).unwrap();
    let report = daemon.json(&["config", "reload"]);
    assert!(report["changed"].to_string().contains("key rotate"), "{report}");
    let problems = report["problems"].as_array().unwrap();
    let told = problems[0].as_str().unwrap();
    assert!(problems.len() == 1 && told.starts_with("pool local: ") && told.contains(&old), "{report}");
    assert!(told.contains("previous_file"), "{told}");
}
