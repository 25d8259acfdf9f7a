//! A daemon's life: restarts, kills, reloads, drains; what was promised is kept.

mod common;

use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;

use common::{Daemon, Nbd, eventually, exists, http_get};
use rustix::process::Signal;
use serde_json::Value;

fn daemon_with_volume() -> Daemon {
    daemon_with("mapped")
}

fn daemon_with(layout: &str) -> Daemon {
    let mut daemon = Daemon::new("");
    daemon.start();
    daemon.json(&["volume", "create", "v", "--size", "16M", "--pool", "local", "--layout", layout]);
    daemon
}

#[test]
fn data_catalogue_and_exports_survive_stop_and_kill() {
    let mut daemon = daemon_with_volume();
    let shared = daemon.json(&["export", "add", "v", "--nbd"]);
    let own = format!("--nbd=unix:{}", daemon.path("own.sock").display());
    let own = daemon.json(&["export", "add", "v", &own, "--read-only", "--mode", "0600"]);
    let vhost_user = daemon.path("v.sock");
    daemon.json(&["export", "add", "v", "--vhost-user", vhost_user.to_str().unwrap(), "--queues", "3"]);
    let mut client = daemon.attach("v");
    assert_eq!(client.size, 16 << 20);
    assert_eq!((client.write(4096, &[7; 8192]), client.flush()), (0, 0));
    drop(client);
    let before = daemon.json(&["export", "list"]);
    assert_eq!(before.as_array().unwrap().len(), 3);

    for stop in [Daemon::stop, Daemon::kill] {
        stop(&mut daemon);
        daemon.start();
        let after = daemon.json(&["export", "list"]);
        for (before, after) in before.as_array().unwrap().iter().zip(after.as_array().unwrap()) {
            for field in ["id", "volume", "protocol", "address", "queues", "read_only", "mode", "uris"] {
                assert_eq!(before[field], after[field], "{field}");
            }
            assert_eq!(after["ready"], true, "{after}");
        }
        let mut client = daemon.attach("v");
        assert_eq!(client.read(4096, 8192), [7; 8192]);
        let mut read_only = Nbd::attach(UnixStream::connect(daemon.path("own.sock")).unwrap(), "").unwrap();
        assert_eq!(read_only.read(4096, 1), [7]);
        assert_eq!(read_only.write(0, &[1; 512]), 1, "EPERM");
        assert!(UnixStream::connect(&vhost_user).is_ok());
        let mode = std::fs::metadata(daemon.path("own.sock")).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o600);
    }
    for export in [shared, own] {
        daemon.json(&["export", "remove", export["id"].as_str().unwrap()]);
    }
    daemon.stop();
    daemon.start();
    assert_eq!(daemon.json(&["export", "list"]).as_array().unwrap().len(), 1);
    assert!(!exists(&daemon.path("own.sock")));
}

#[test]
fn a_second_daemon_is_refused_and_harms_nothing() {
    let mut daemon = daemon_with_volume();
    daemon.json(&["export", "add", "v", "--nbd"]);
    let mut client = daemon.attach("v");
    let first_log = daemon.log();
    let refusal = daemon.spawn().err().unwrap();
    assert!(refusal.contains("another novastor"), "{refusal}");
    assert!(first_log.contains("export 1"), "{first_log}");
    assert_eq!(client.write(0, &[1; 512]), 0);
    assert!(daemon.attach("v").size > 0 && daemon.is_alive());
}

#[test]
fn the_end_lets_requests_finish_and_removes_the_sockets() {
    let mut daemon = daemon_with_volume();
    daemon.json(&["export", "add", "v", "--nbd"]);
    let mut client = daemon.attach("v");
    assert_eq!(client.write(0, &[5; 1 << 20]), 0);
    daemon.stop();
    assert!(client.is_closed());
    for socket in ["nbd.sock", "admin.sock"] {
        assert!(!exists(&daemon.path(socket)), "{socket}");
    }
}

#[test]
fn a_socket_that_took_the_place_of_ours_is_left() {
    let mut daemon = daemon_with_volume();
    let nbd = format!("--nbd=unix:{}", daemon.path("own.sock").display());
    let vhost_user = daemon.path("v.sock");
    let ids = [&["export", "add", "v", &nbd][..], &["export", "add", "v", "--vhost-user", vhost_user.to_str().unwrap()]]
        .map(|arguments| daemon.json(arguments)["id"].as_str().unwrap().to_owned());
    let replace = |name: &str| {
        std::fs::remove_file(daemon.path(name)).unwrap();
        std::os::unix::net::UnixListener::bind(daemon.path(name)).unwrap()
    };
    let mut others = Vec::from(["own.sock", "v.sock"].map(replace));
    for id in ids {
        daemon.json(&["export", "remove", &id]);
    }
    others.extend(["nbd.sock", "admin.sock"].map(replace));
    daemon.stop();
    for (name, other) in ["own.sock", "v.sock", "nbd.sock", "admin.sock"].iter().zip(&others) {
        assert!(UnixStream::connect(daemon.path(name)).is_ok(), "{name}");
        other.accept().unwrap();
    }
}

#[test]
fn a_volume_in_use_is_neither_deleted_nor_renamed() {
    let daemon = daemon_with_volume();
    let id = daemon.json(&["export", "add", "v", "--nbd"])["id"].as_str().unwrap().to_owned();
    assert_eq!(daemon.refused(&["volume", "delete", "v", "--yes"]).0, "in_use");
    assert_eq!(daemon.refused(&["volume", "rename", "v", "w"]).0, "in_use");
    let mut client = daemon.attach("v");
    daemon.json(&["export", "remove", &id]);
    assert!(client.is_closed());
    daemon.json(&["volume", "rename", "v", "w"]);
    daemon.json(&["volume", "delete", "w", "--yes"]);
    assert_eq!(daemon.refused(&["volume", "show", "w"]).0, "not_found");
}

#[test]
fn what_a_backend_cannot_do_is_refused_in_words() {
    let daemon = daemon_with_volume();
    daemon.json(&["volume", "create", "memory/m", "--size", "1M"]);
    for arguments in [
        &["snapshot", "create", "m@s"][..],
        &["volume", "clone", "m", "n"],
        &["volume", "adopt", "memory/x"],
        &["volume", "flatten", "none"],
        &["snapshot", "rollback", "v@none", "--yes"],
        &["snapshot", "diff", "v@none"],
        &["volume", "clone", "local/v", "memory/w"],
    ] {
        let (kind, message) = daemon.refused(arguments);
        assert!(["unsupported", "not_found", "invalid"].contains(&kind.as_str()), "{arguments:?}: {kind}");
        assert!(message.len() > 20, "{arguments:?}: {message}");
    }
    assert_eq!(daemon.json(&["volume", "list"]).as_array().unwrap().len(), 2);
    assert_eq!(daemon.json(&["snapshot", "list"]), serde_json::json!([]));
}

#[test]
fn no_word_of_the_command_line_is_taken_from_volume_names() {
    let daemon = daemon_with_volume();
    for name in ["adopt", "diff", "usage", "resize"] {
        daemon.json(&["volume", "create", name, "--size", "1M"]);
        assert_eq!(daemon.json(&["volume", "show", name])["name"], name);
        daemon.json(&["volume", "delete", name, "--yes"]);
    }
}

#[test]
fn a_volume_without_a_parent_is_flat_already() {
    let daemon = daemon_with("raw");
    daemon.json(&["volume", "create", "memory/m", "--size", "1M"]);
    daemon.json(&["export", "add", "v", "--nbd"]);
    for volume in ["local/v", "memory/m"] {
        let outcome = daemon.json(&["volume", "flatten", volume]);
        assert_eq!(outcome, serde_json::json!({ "volume": volume, "flattened": false }));
    }
    let jobs = daemon.json(&["job", "list"]);
    let states: Vec<_> = jobs.as_array().unwrap().iter().map(|job| (job["kind"].clone(), job["state"].clone())).collect();
    assert_eq!(states, [("volume flatten".into(), "done".into()), ("volume flatten".into(), "done".into())]);
}

#[test]
fn sizes_change_online_and_shrinking_is_deliberate() {
    let daemon = daemon_with("raw");
    daemon.json(&["export", "add", "v", "--nbd"]);
    let mut client = daemon.attach("v");
    daemon.json(&["volume", "resize", "v", "32M"]);
    assert_eq!(daemon.attach("v").size, 32 << 20);
    assert_eq!(client.write(20 << 20, &[1; 512]), 0, "a client attached before may use the new space");
    let (kind, message) = daemon.refused(&["volume", "resize", "v", "5M"]);
    assert_eq!(kind, "invalid");
    assert!(message.contains("--shrink, and loses data past 5M"), "{message}");
    daemon.json(&["volume", "resize", "v", "5M", "--shrink", "--yes"]);
    assert_eq!(daemon.json(&["volume", "show", "v"])["size"], 5 << 20);
}

#[test]
fn clients_are_listed_and_can_be_dropped() {
    let daemon = daemon_with_volume();
    let id = daemon.json(&["export", "add", "v", "--nbd"])["id"].as_str().unwrap().to_owned();
    let mut clients = [daemon.attach("v"), daemon.attach("local/v")];
    let shown = daemon.json(&["export", "show", &id]);
    let listed = shown["clients"].as_array().unwrap();
    assert_eq!(listed.len(), 2);
    assert!(listed.iter().all(|client| client["since"].as_u64().unwrap() > 1_700_000_000), "{listed:?}");
    let first = listed[0]["id"].as_str().unwrap();
    assert_eq!(daemon.json(&["export", "disconnect", &id, first])["clients"], 1);
    assert!(clients[0].is_closed());
    assert_eq!(clients[1].write(0, &[1; 512]), 0);
    assert_eq!(daemon.refused(&["export", "disconnect", &id, "999"]).0, "not_found");
    assert_eq!(daemon.json(&["export", "disconnect", &id])["clients"], 1);
    assert!(clients[1].is_closed());
    eventually("the list is empty", || daemon.json(&["export", "show", &id])["clients"].as_array().unwrap().is_empty());
}

#[test]
fn a_name_never_comes_to_mean_another_volume() {
    let mut daemon = daemon_with_volume();
    daemon.json(&["export", "add", "v", "--nbd"]);
    daemon.json(&["volume", "create", "memory/v", "--size", "1M"]);
    daemon.json(&["export", "add", "memory/v", "--nbd"]);
    for _ in 0..2 {
        assert_eq!(daemon.attach("v").size, 16 << 20);
        assert_eq!(daemon.attach("local/v").size, 16 << 20);
        assert_eq!(daemon.attach("memory/v").size, 1 << 20);
        daemon.stop();
        daemon.start();
    }
    assert_eq!(daemon.refused(&["volume", "show", "v"]).0, "invalid");
    assert_eq!(daemon.refused(&["export", "add", "local/v", "--nbd"]).0, "exists");
    let stranger = UnixStream::connect(daemon.path("nbd.sock")).unwrap();
    assert!(Nbd::attach(stranger, "nothing").is_none());
}

#[test]
fn reload_follows_the_file_without_touching_open_volumes() {
    for by_signal in [false, true] {
        let mut daemon = daemon_with_volume();
        daemon.json(&["export", "add", "v", "--nbd"]);
        let mut client = daemon.attach("v");
        let folder = daemon.path("").display().to_string();
        let declared = format!(
            "{}\n[pool.second]\ndriver = \"null\"\n[[export]]\nvolume = \"v\"\nvhost_user = \"{folder}declared.sock\"\n",
            daemon.config().replace("node = \"test\"", "threads = 1\nnode = \"test\"")
        );
        let original = daemon.config();
        let reload = |daemon: &Daemon| -> Option<Value> {
            if by_signal {
                daemon.signal(Signal::HUP);
                return None;
            }
            Some(daemon.json(&["config", "reload"]))
        };
        daemon.configure(&declared);
        if let Some(report) = reload(&daemon) {
            assert_eq!(report["needs_restart"], serde_json::json!(["daemon.threads"]), "{report}");
        }
        eventually("the declared export is there", || exists(&daemon.path("declared.sock")));
        eventually("the pool is there", || daemon.json(&["pool", "list"]).as_array().unwrap().len() == 3);
        daemon.json(&["volume", "create", "second/x", "--size", "1M"]);
        let exports = daemon.json(&["export", "list"]);
        let declared = exports.as_array().unwrap().iter().find(|export| export["declared"] == true).unwrap();
        let (kind, message) = daemon.refused(&["export", "remove", declared["id"].as_str().unwrap()]);
        assert!(kind == "invalid" && message.contains("[[export]]"), "{message}");
        daemon.configure(&original);
        reload(&daemon);
        eventually("the declared export is gone", || !exists(&daemon.path("declared.sock")));
        daemon.configure("[daemon]\nnonsense = 1\n");
        if by_signal {
            daemon.signal(Signal::HUP);
            eventually("the nonsense is reported", || daemon.log().contains("unknown key `nonsense`"));
        } else {
            let (kind, message) = daemon.refused(&["config", "reload"]);
            assert!(kind == "invalid" && message.contains("unknown key `nonsense`"), "{message}");
        }
        assert_eq!(client.write(0, &[1; 512]), 0);
        assert!(daemon.is_alive());
    }
}

#[test]
fn an_end_is_heard_while_a_reload_waits_for_a_pool() {
    let mut daemon = daemon_with_volume();
    let silent = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    for key in ["id", "secret"] {
        std::fs::write(daemon.path(key), "x").unwrap();
        std::fs::set_permissions(daemon.path(key), std::fs::Permissions::from_mode(0o600)).unwrap();
    }
    let pool = format!(
        "[pool.silent]\ndriver = \"s3\"\nbucket = \"b\"\nendpoint = \"http://{}\"\nallow_http = true\n\
         access_key_id_file = \"{}\"\nsecret_key_file = \"{}\"\n",
        silent.local_addr().unwrap(),
        daemon.path("id").display(),
        daemon.path("secret").display()
    );
    daemon.configure(&format!("{}\n{pool}", daemon.config()));
    daemon.signal(Signal::HUP);
    let _asked = silent.accept().unwrap();
    daemon.stop();
    let log = daemon.log();
    assert!(log.contains("stopped") && !log.contains("reloaded"), "{log}");
}

#[test]
fn a_reload_with_one_bad_export_changes_nothing() {
    let daemon = daemon_with_volume();
    let declared = "[[export]]\nvolume = \"v\"\nnbd = true\nqueues = 2\n";
    daemon.configure(&format!("{}\n[pool.second]\ndriver = \"null\"\n{declared}", daemon.config()));
    let (kind, message) = daemon.refused(&["config", "reload"]);
    assert!(kind == "invalid" && message.contains("novastor.toml:") && message.contains("queues"), "{message}");
    assert_eq!(daemon.json(&["pool", "list"]).as_array().unwrap().len(), 2);
    assert_eq!(daemon.json(&["export", "list"]), serde_json::json!([]));
}

#[test]
fn an_export_that_cannot_be_served_is_reported_and_comes_back() {
    let mut daemon = daemon_with_volume();
    daemon.json(&["export", "add", "v", "--nbd"]);
    daemon.stop();
    std::fs::rename(daemon.path("pool"), daemon.path("away")).unwrap();
    std::fs::write(daemon.path("pool"), "not a folder").unwrap();
    daemon.start();
    let exports = daemon.json(&["export", "list"]);
    assert_eq!(exports[0]["ready"], false);
    assert!(exports[0]["error"].as_str().is_some(), "{exports}");
    let pools = daemon.json(&["pool", "list"]);
    assert_eq!(pools[0]["ok"], false, "{pools}");
    assert_eq!(daemon.run(&["pool", "health"]).status.code(), Some(1));
    daemon.json(&["volume", "create", "memory/w", "--size", "1M"]);
    std::fs::remove_file(daemon.path("pool")).unwrap();
    std::fs::rename(daemon.path("away"), daemon.path("pool")).unwrap();
    eventually("the export is served again", || daemon.json(&["export", "list"])[0]["ready"] == true);
    assert_eq!(daemon.attach("v").size, 16 << 20);
}

#[test]
fn jobs_and_metrics_tell_what_was_done() {
    let daemon = daemon_with_volume();
    daemon.json(&["export", "add", "v", "--nbd"]);
    let mut client = daemon.attach("v");
    assert_eq!(client.write(0, &[1; 4096]), 0);
    client.read(0, 4096);
    assert_eq!(daemon.json(&["volume", "check", "v"])["ok"], true);
    let jobs = daemon.json(&["job", "list"]);
    assert_eq!((&jobs[0]["kind"], &jobs[0]["state"]), (&"volume check".into(), &"done".into()));
    assert_eq!(daemon.json(&["job", "wait", jobs[0]["id"].as_str().unwrap()])["state"], "done");
    assert_eq!(daemon.refused(&["job", "show", "99"]).0, "not_found");

    let log = daemon.log();
    let address = log.lines().find_map(|line| line.split("metrics: listening on ").nth(1)).unwrap();
    let (status, text) = http_get(address, "/metrics", "");
    assert_eq!(status, 200);
    for line in [
        "novastor_volume_operations_total{volume=\"local/v\",op=\"write\"} 1",
        "novastor_export_bytes_total{export=\"1\",volume=\"local/v\",protocol=\"nbd\",op=\"read\"} 4096",
        "novastor_pool_healthy{pool=\"local\",driver=\"file\"} 1",
        "novastor_volume_latency_seconds_count{volume=\"local/v\",op=\"write\",stage=\"total\"} 1",
    ] {
        assert!(text.contains(line), "{line} is not in\n{text}");
    }
    assert_eq!(http_get(address, "/v1/volumes", "").0, 404, "the metrics listener serves metrics only");
}

#[test]
fn a_job_that_cannot_be_cancelled_says_so() {
    let daemon = &daemon_with_volume();
    // The delete waits for whoever changes the catalogue: for this test.
    let catalogue = std::fs::File::open(daemon.path("pool/pool.json")).unwrap();
    rustix::fs::flock(&catalogue, rustix::fs::FlockOperation::LockExclusive).unwrap();
    let find = || {
        let jobs = daemon.json(&["job", "list"]);
        jobs.as_array().unwrap().iter().find(|job| job["kind"] == "volume delete").cloned()
    };
    std::thread::scope(move |scope| {
        let delete = scope.spawn(|| daemon.run(&["volume", "delete", "v", "--yes"]));
        eventually("the delete runs", || find().is_some());
        let id = find().unwrap()["id"].as_str().unwrap().to_owned();
        let (kind, message) = daemon.refused(&["job", "cancel", &id]);
        assert_eq!(kind, "invalid");
        assert!(message.contains("volume delete of v") && message.contains(&format!("`novastor job wait {id}`")), "{message}");
        drop(catalogue);
        assert!(delete.join().unwrap().status.success());
        assert_eq!(daemon.json(&["job", "wait", &id])["state"], "done");
    });
}

#[test]
fn the_api_on_tcp_asks_for_its_token() {
    let mut daemon = Daemon::new("");
    let token = "0123456789abcdef0123456789abcdef";
    let token_file = daemon.path("token");
    std::fs::write(&token_file, token).unwrap();
    std::fs::set_permissions(&token_file, std::fs::Permissions::from_mode(0o600)).unwrap();
    let port = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
    let unix = format!("admin = \"unix:{}\"", daemon.path("admin.sock").display());
    let tcp = format!("admin = \"tcp:127.0.0.1:{port}\"\nadmin_token_file = \"{}\"", token_file.display());
    daemon.configure(&daemon.config().replace(&unix, &tcp));
    daemon.start();
    let address = format!("127.0.0.1:{port}");
    assert_eq!(http_get(&address, "/v1/volumes", "").0, 401);
    assert_eq!(http_get(&address, "/v1/volumes", "Authorization: Bearer wrong\r\n").0, 401);
    assert_eq!(http_get(&address, "/v1/volumes", &format!("Authorization: Bearer {token}\r\n")), (200, "[]".to_owned()));
    let admin = format!("http://{address}");
    let list = ["--admin", &admin, "--token-file", token_file.to_str().unwrap(), "pool", "list", "--json"];
    assert!(common::command().args(list).output().unwrap().status.success());
    assert_eq!(common::command().args(["--admin", &admin, "pool", "list"]).output().unwrap().status.code(), Some(1));
}

#[test]
fn over_tcp_only_files_of_named_folders_are_adopted() {
    let mut daemon = Daemon::new("");
    let (token_file, open, closed) = (daemon.path("token"), daemon.path("images"), daemon.path("images-of-others"));
    std::fs::write(&token_file, "0123456789abcdef").unwrap();
    std::fs::set_permissions(&token_file, std::fs::Permissions::from_mode(0o600)).unwrap();
    for folder in [&open, &closed] {
        std::fs::create_dir(folder).unwrap();
        std::fs::write(folder.join("disk"), [1; 4096]).unwrap();
    }
    std::os::unix::fs::symlink(closed.join("disk"), open.join("link")).unwrap();
    let port = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
    let unix = format!("admin = \"unix:{}\"", daemon.path("admin.sock").display());
    let (token, folder) = (token_file.display(), open.display());
    let tcp = format!("admin = \"tcp:127.0.0.1:{port}\"\nadmin_token_file = \"{token}\"\nadopt_dirs = [\"{folder}\"]");
    daemon.configure(&daemon.config().replace(&unix, &tcp));
    daemon.start();
    let adopt = |object: PathBuf| {
        let (admin, object) = (format!("http://127.0.0.1:{port}"), format!("local/{}", object.display()));
        let place = ["--admin", &admin, "--token-file", token_file.to_str().unwrap()];
        common::command().args(place).args(["volume", "adopt", &object, "disk"]).output().unwrap()
    };
    for refused in [closed.join("disk"), open.join("link"), open.join("../images-of-others/disk"), open.join("none")] {
        let output = adopt(refused);
        let words = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(!output.status.success() && words.contains("add its folder to [daemon].adopt_dirs"), "{words}");
    }
    let output = adopt(open.join("disk"));
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
}

#[test]
fn the_openapi_document_and_the_router_agree() {
    let mut daemon = Daemon::new("");
    let port = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
    let unix = format!("admin = \"unix:{}\"", daemon.path("admin.sock").display());
    daemon.configure(&daemon.config().replace(&unix, &format!("admin = \"tcp:127.0.0.1:{port}\"")));
    let refusal = daemon.spawn().err().unwrap();
    assert!(refusal.contains("admin_token_file"), "{refusal}");
    let token_file = daemon.path("token");
    std::fs::write(&token_file, "0123456789abcdef").unwrap();
    std::fs::set_permissions(&token_file, std::fs::Permissions::from_mode(0o600)).unwrap();
    let tcp = format!("admin = \"tcp:127.0.0.1:{port}\"");
    let with_token = format!("{tcp}\nadmin_token_file = \"{}\"", token_file.display());
    daemon.configure(&daemon.config().replace(&tcp, &with_token));
    daemon.start();
    let (address, token) = (format!("127.0.0.1:{port}"), "Authorization: Bearer 0123456789abcdef\r\n");
    let (status, text) = http_get(&address, "/openapi.json", token);
    assert_eq!(status, 200);
    let document: Value = serde_json::from_str(&text).unwrap();
    let paths = document["paths"].as_object().unwrap();
    assert!(paths.len() > 20);
    for (path, operations) in paths {
        let (status, text) = http_get(&address, &path.replace(['{', '}'], ""), token);
        let routed = !text.contains("not part of the API");
        assert!(routed, "{path}: {status} {text}");
        assert_eq!(operations.get("get").is_none(), status == 405, "{path}: {status}");
    }
    for interval in ["0", "60001", "99999999999"] {
        let (status, text) = http_get(&address, &format!("/v1/stats?interval_ms={interval}"), token);
        assert!(status == 400 && text.contains("choose 1 to 60000 milliseconds"), "{interval}: {status} {text}");
    }
    assert!(http_get(&address, "/v1/nonsense", token).1.contains("not part of the API"));
}
