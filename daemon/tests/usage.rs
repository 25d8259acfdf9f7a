//! What users get wrong, and what they are told.

mod common;

use common::{Daemon, command};

fn status_of(arguments: &[&str]) -> (i32, String) {
    let output = command().args(arguments).output().unwrap();
    (output.status.code().unwrap(), String::from_utf8_lossy(&output.stderr).into_owned())
}

#[test]
fn wrong_usage_is_status_2_and_failure_is_status_1() {
    for arguments in [
        &["frobnicate"][..],
        &["volume", "create", "v"],
        &["volume", "create", "v", "--size", "ten"],
        &["export", "add", "v"],
        &["volume", "adopt", "no-slash"],
        &["volume", "adopt", "/srv/disk.raw"],
        &["volume", "delete", "v"],
    ] {
        assert_eq!(status_of(arguments).0, 2, "{arguments:?}");
    }
    let (status, text) = status_of(&["--admin", "unix:/nonexistent/admin.sock", "volume", "list"]);
    assert_eq!(status, 1);
    assert!(text.contains("novastor serve"), "{text}");
    for arguments in [&["--help"][..], &["--version"], &["config", "schema"], &["config", "example"]] {
        assert_eq!(status_of(arguments).0, 0, "{arguments:?}");
    }
}

#[test]
fn a_bad_configuration_names_file_line_and_nearest_key() {
    let daemon = Daemon::new("[log]\nlevle = \"info\"\n");
    let log = daemon.spawn().err().unwrap();
    let file = daemon.path("novastor.toml").display().to_string();
    let line = daemon.config().lines().position(|line| line.starts_with("levle")).unwrap() + 1;
    let expected = format!("{file}:{line}: unknown key `levle` in [log]: did you mean `level`?");
    assert!(log.contains(&expected), "{log}");
    let (status, text) = status_of(&["config", "check", &file]);
    assert_eq!(status, 1);
    assert!(text.contains(&expected), "{text}");
    let (status, text) = status_of(&["config", "check", &file, "--json"]);
    let body: serde_json::Value = serde_json::from_str(&text).unwrap();
    assert_eq!((status, &body["error"]["kind"]), (1, &serde_json::json!("invalid")), "{text}");
    assert!(!daemon.path("data").exists(), "a bad configuration touches nothing");
}

#[test]
fn the_printed_example_is_accepted() {
    let output = command().args(["config", "example"]).output().unwrap();
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("novastor.toml");
    std::fs::write(&file, output.stdout).unwrap();
    assert_eq!(status_of(&["config", "check", file.to_str().unwrap()]), (0, String::new()));
}

#[test]
fn bad_names_and_sizes_are_refused_and_leave_nothing() {
    let mut daemon = Daemon::new("");
    daemon.start();
    let long = "a".repeat(300);
    for name in ["../escape", "a/b/c", "..", ".hidden", "UPPER", "a b", "local/../x", "snap@shot", long.as_str(), ""] {
        let (kind, message) = daemon.refused(&["volume", "create", name, "--size", "1M", "--pool", "local"]);
        assert!(kind == "invalid" || kind == "not_found", "{name}: {kind} {message}");
    }
    for (size, block_size) in [("0", "512"), ("1000", "512"), ("512", "4096"), ("2048P", "512")] {
        let arguments = ["volume", "create", "v", "--size", size, "--block-size", block_size, "--pool", "local"];
        assert_eq!(daemon.refused(&arguments).0, "invalid", "{size}");
    }
    let (kind, message) = daemon.refused(&["volume", "create", "memory/v", "--size", "1M", "--layout", "mapped"]);
    assert_eq!(kind, "unsupported");
    assert!(message.contains("raw"), "{message}");
    let (_, message) = daemon.refused(&["volume", "create", "v", "--size", "1M", "--policy", "gold", "--pool", "local"]);
    assert!(message.contains("[policy.gold]"), "{message}");
    let (kind, message) = daemon.refused(&["volume", "create", "v", "--size", "1M", "--pool", "nowhere"]);
    assert!(kind == "not_found" && message.contains("local, memory"), "{message}");
    assert_eq!(daemon.json(&["volume", "list"]), serde_json::json!([]));
    assert!(daemon.is_alive());
}

#[test]
fn sockets_outside_the_configured_folders_are_refused() {
    let mut daemon = Daemon::new("");
    daemon.start();
    daemon.json(&["volume", "create", "local/v", "--size", "1M"]);
    let elsewhere = tempfile::tempdir().unwrap();
    let path = elsewhere.path().join("v.sock");
    let (_, message) = daemon.refused(&["export", "add", "v", "--vhost-user", path.to_str().unwrap()]);
    assert!(message.contains("socket_dirs"), "{message}");
    let file = daemon.path("precious");
    std::fs::write(&file, "mine").unwrap();
    let (kind, _) = daemon.refused(&["export", "add", "v", "--vhost-user", file.to_str().unwrap()]);
    assert_eq!(kind, "exists");
    assert_eq!(std::fs::read(&file).unwrap(), b"mine");
    let long = daemon.path(&"s".repeat(100));
    let (kind, message) = daemon.refused(&["export", "add", "v", "--vhost-user", long.to_str().unwrap()]);
    assert!(kind == "invalid" && message.contains("107"), "{message}");
    let (kind, _) = daemon.refused(&["export", "add", "v", "--nbd=tcp:0.0.0.0:0"]);
    assert_eq!(kind, "invalid");
    assert_eq!(daemon.json(&["export", "list"]), serde_json::json!([]));
}

#[test]
fn an_import_for_which_an_export_waits_leaves_no_volume() {
    let mut daemon = Daemon::new("[[export]]\nvolume = \"local/v\"\nnbd = true\n");
    daemon.start();
    std::fs::write(daemon.path("v.raw"), vec![7; 8192]).unwrap();
    let (kind, message) = daemon.refused(&["image", "import", "v.raw", "v", "--pool", "local"]);
    assert!(kind == "in_use" && message.contains("it is exported (1)"), "{kind}: {message}");
    assert_eq!(daemon.json(&["volume", "list"]), serde_json::json!([]));
    daemon.json(&["volume", "create", "local/v", "--size", "1M"]);
}
