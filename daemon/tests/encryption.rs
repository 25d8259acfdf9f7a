//! Encrypted volumes in a real daemon: what lies in the pool, and which key-encryption key opens it.

mod common;

use std::collections::BTreeMap;
use std::fs::{self, Permissions};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use common::Daemon;

const POLICY: &str = "[keys]\nfile = \"{dir}/kek\"\n\n[policy.secret]\nencryption = true\n";

fn write_kek(daemon: &Daemon, name: &str, pair: &str) {
    fs::write(daemon.path(name), pair.repeat(32)).unwrap();
    fs::set_permissions(daemon.path(name), Permissions::from_mode(0o600)).unwrap();
}

fn daemon_with_key() -> Daemon {
    let daemon = Daemon::new(POLICY);
    write_kek(&daemon, "kek", "ab");
    daemon
}

fn stored(daemon: &Daemon, volume: &str) -> Vec<u8> {
    fs::read(daemon.path("pool").join("volumes").join(volume).join("data.raw")).unwrap()
}

#[test]
fn a_volume_of_an_encrypting_policy_holds_no_plain_text_and_survives_a_restart() {
    let mut daemon = daemon_with_key();
    daemon.start();
    let volume =
        daemon.json(&["volume", "create", "v", "--size", "1M", "--pool", "local", "--policy", "secret", "--layout", "raw"]);
    assert_eq!(volume["encrypted"], true, "{volume}");
    assert_eq!(
        daemon.json(&["volume", "create", "plain", "--size", "1M", "--pool", "local", "--layout", "raw"])["encrypted"],
        false
    );
    for name in ["v", "plain"] {
        daemon.json(&["export", "add", name, "--nbd"]);
        let mut client = daemon.attach(name);
        assert_eq!((client.write(512, &[7; 8192]), client.flush()), (0, 0));
    }
    let is_written = |content: &[u8]| content.windows(64).any(|window| window == [7; 64]);
    assert!(!is_written(&stored(&daemon, "v")) && is_written(&stored(&daemon, "plain")));
    daemon.kill();
    daemon.start();
    let mut client = daemon.attach("v");
    assert_eq!(client.read(512, 8192), [7; 8192]);
    assert!(client.read(0, 512).iter().chain(&client.read(16384, 65536)).all(|byte| *byte == 0), "the rest was never written");
}

#[test]
fn sizes_and_keys_that_do_not_fit_are_told() {
    let mut daemon = daemon_with_key();
    daemon.start();
    let (_, odd) = daemon
        .refused(&["volume", "create", "v", "--size", "1049088", "--pool", "local", "--policy", "secret", "--layout", "raw"]);
    assert!(odd.contains("the next is 1052672"), "{odd}");
    daemon.json(&["volume", "create", "v", "--size", "1M", "--pool", "local", "--policy", "secret", "--layout", "raw"]);
    daemon.stop();
    write_kek(&daemon, "kek", "cd");
    daemon.start();
    let (_, wrong) = daemon.refused(&["export", "add", "v", "--nbd"]);
    assert!(wrong.contains("volume v") && wrong.contains("is wrapped with key-encryption key"), "{wrong}");
}

#[test]
fn a_replaced_key_is_no_longer_needed_once_the_volume_was_opened_with_both() {
    let mut daemon = daemon_with_key();
    daemon.start();
    daemon.json(&["volume", "create", "v", "--size", "1M", "--pool", "local", "--policy", "secret", "--layout", "raw"]);
    daemon.json(&["export", "add", "v", "--nbd"]);
    let mut client = daemon.attach("v");
    assert_eq!((client.write(0, &[9; 4096]), client.flush()), (0, 0));
    drop(client);
    daemon.stop();
    let bytes = stored(&daemon, "v");
    let config = daemon.config();
    write_kek(&daemon, "kek.new", "cd");
    for keys in ["file = \"{dir}/kek.new\"\nprevious_file = \"{dir}/kek\"", "file = \"{dir}/kek.new\""] {
        let file = format!("file = \"{}\"", daemon.path("kek").display());
        daemon.configure(&config.replace(&file, keys));
        daemon.start();
        assert_eq!(daemon.attach("v").read(0, 4096), [9; 4096], "{keys}");
        daemon.stop();
        assert!(stored(&daemon, "v") == bytes, "data was rewritten");
    }
}

/// A mapped volume `v`, encrypted, that holds something and is exported.
fn fill_mapped(daemon: &Daemon) {
    daemon.json(&["volume", "create", "v", "--size", "16M", "--pool", "local", "--policy", "secret"]);
    daemon.json(&["export", "add", "v", "--nbd"]);
    let mut client = daemon.attach("v");
    assert_eq!((client.write(0, &[5; 65536]), client.flush()), (0, 0));
}

#[test]
fn the_key_comes_from_a_credential_of_systemd_or_from_the_environment() {
    let mut daemon = Daemon::new("[policy.secret]\nencryption = true\n\n[keys]\ncredential = \"kek\"\n");
    fs::create_dir(daemon.path("credentials")).unwrap();
    write_kek(&daemon, "credentials/kek", "ab");
    let folder = daemon.path("credentials").display().to_string();
    daemon.set_environment(&[("CREDENTIALS_DIRECTORY", &folder)]);
    daemon.start();
    fill_mapped(&daemon);
    let current = |daemon: &Daemon| daemon.json(&["key", "list"])["current"].as_str().map(str::to_owned);
    let id = current(&daemon).expect("there is a key");
    daemon.stop();

    let config = daemon.config();
    daemon.configure(&config.replace("credential = \"kek\"\n", ""));
    daemon.set_environment(&[("NOVASTOR_KEYS__KEY", &"ab".repeat(32))]);
    daemon.start();
    assert_eq!(current(&daemon), Some(id));
    assert!(daemon.attach("v").read(0, 65536) == vec![5; 65536], "the same key from elsewhere");
    daemon.stop();

    daemon.configure(&config);
    daemon.set_environment(&[]);
    daemon.start();
    let error = daemon.json(&["export", "list"])[0]["error"].as_str().unwrap_or_default().to_owned();
    assert!(error.contains("credential kek") && error.contains("LoadCredential="), "{error}");
}

#[test]
fn a_wrong_key_is_refused_before_anything_of_the_volume_is_touched() {
    let mut daemon = daemon_with_key();
    daemon.start();
    fill_mapped(&daemon);
    daemon.stop();
    let kept = |daemon: &Daemon| -> BTreeMap<PathBuf, (SystemTime, Vec<u8>)> {
        let files = [files_under(&daemon.path("pool")), files_under(&daemon.path("data/log"))].concat();
        // The store is probed at each opening, and its reserve is made good.
        let files = files.into_iter().filter(|file| !["probe", "temporary", "reserve"].iter().any(|part| is_within(file, part)));
        files.map(|file| (file.clone(), (fs::metadata(&file).unwrap().modified().unwrap(), fs::read(&file).unwrap()))).collect()
    };
    let before = kept(&daemon);
    assert!(
        ["objects", "roots", "log"].iter().all(|part| before.keys().any(|file| is_within(file, part))),
        "{:?}",
        before.keys()
    );
    write_kek(&daemon, "kek", "cd");
    daemon.start();
    let own = format!("--nbd=unix:{}", daemon.path("own.sock").display());
    let commands: [&[&str]; 5] = [
        &["export", "add", "v", &own],
        &["volume", "resize", "v", "32M"],
        &["snapshot", "create", "v@s"],
        &["volume", "usage", "v"],
        &["volume", "create", "w", "--size", "16M", "--pool", "local", "--policy", "secret"],
    ];
    for command in commands {
        let (_, why) = daemon.refused(command);
        assert!(why.contains("key-encryption key"), "{command:?}: {why}");
    }
    let error = daemon.json(&["export", "list"])[0]["error"].as_str().unwrap_or_default().to_owned();
    assert!(error.contains("is wrapped with key-encryption key"), "{error}");
    daemon.stop();
    assert!(kept(&daemon) == before, "something was touched");

    write_kek(&daemon, "kek", "ab");
    daemon.start();
    assert!(daemon.attach("v").read(0, 65536) == vec![5; 65536]);
}

fn is_within(file: &Path, part: &str) -> bool {
    file.components().any(|component| component.as_os_str().to_string_lossy().trim_end_matches('=') == part)
}

fn files_under(folder: &Path) -> Vec<PathBuf> {
    let entries = fs::read_dir(folder).into_iter().flatten().map(|entry| entry.unwrap().path());
    entries.flat_map(|path| if path.is_dir() { files_under(&path) } else { vec![path] }).collect()
}

#[test]
fn an_encrypted_mapped_volume_holds_no_plain_text_in_pool_and_log() {
    let mut daemon = daemon_with_key();
    daemon.start();
    let create = |name: &'static str| ["volume", "create", name, "--size", "16M", "--pool", "local", "--policy", "secret"];
    assert_eq!(daemon.json(&create("v"))["encrypted"], true);
    daemon.json(&["export", "add", "v", "--nbd"]);
    // Does not compress, so that it could be seen.
    let noise: Vec<u8> = (0..65536_u32).map(|at| (at.wrapping_mul(at).wrapping_mul(2_654_435_761) >> 13) as u8).collect();
    let mut client = daemon.attach("v");
    assert_eq!((client.write(0, &noise), client.flush()), (0, 0));
    daemon.json(&["snapshot", "create", "v@s"]);
    daemon.json(&["volume", "clone", "v@s", "c"]);
    assert_eq!(daemon.json(&["volume", "show", "c"])["encrypted"], true);
    let shown = String::from_utf8(daemon.run(&["volume", "show", "c"]).stdout).unwrap();
    assert!(shown.lines().any(|line| line.split_whitespace().eq(["encrypted", "yes"])), "{shown}");
    drop(client);
    daemon.kill();
    let needle = &noise[8192..8256];
    for file in [files_under(&daemon.path("pool")), files_under(&daemon.path("data"))].concat() {
        assert!(!fs::read(&file).unwrap().windows(64).any(|window| window == needle), "{} holds plain text", file.display());
    }
    daemon.start();
    assert_eq!(daemon.attach("v").read(0, 65536), noise);
    daemon.json(&["export", "add", "c", "--nbd"]);
    assert_eq!(daemon.attach("c").read(0, 65536), noise);
    daemon.stop();
    write_kek(&daemon, "kek", "cd");
    daemon.start();
    let (_, wrong) = daemon.refused(&["volume", "resize", "v", "32M"]);
    assert!(wrong.contains("is wrapped with key-encryption key"), "{wrong}");
}
