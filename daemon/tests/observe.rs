//! What can be seen of a running daemon: metrics, `top`; and of its host: `doctor`.

use std::collections::BTreeMap;
use std::io::{Read, Write};
use std::net::TcpStream;
use std::os::unix::net::UnixStream;
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use novastor_tests::rig::daemon::{Daemon, binary};
use novastor_tests::rig::process::{capture, run};
use novastor_tests::rig::tools;
use serde_json::Value;

const LIMIT: Duration = Duration::from_secs(60);

/// One line of the exposition: name, labels, value.
type Series = (String, BTreeMap<String, String>, f64);

/// Parses the text format strictly; every sample must follow the TYPE of its family.
fn parse(text: &str) -> Result<Vec<Series>> {
    let mut families: BTreeMap<&str, &str> = BTreeMap::new();
    let mut series: Vec<Series> = Vec::new();
    for line in text.lines() {
        if let Some(rest) = line.strip_prefix("# TYPE ") {
            let (name, kind) = rest.split_once(' ').context("a type")?;
            ensure!(families.insert(name, kind).is_none(), "{name} twice");
        }
        if line.starts_with('#') {
            continue;
        }
        let (head, value) = line.rsplit_once(' ').context("a value")?;
        let (name, labels) = match head.split_once('{') {
            Some((name, rest)) => (name, rest.strip_suffix('}').context("a closing brace")?),
            None => (head, ""),
        };
        let family = ["_bucket", "_sum", "_count"]
            .iter()
            .find_map(|suffix| name.strip_suffix(suffix))
            .filter(|base| families.contains_key(base));
        ensure!(families.contains_key(family.unwrap_or(name)), "{name} has no TYPE");
        let mut parsed = BTreeMap::new();
        for label in labels.split("\",").filter(|label| !label.is_empty()) {
            let (key, value) = label.split_once("=\"").with_context(|| line.to_owned())?;
            parsed.insert(key.to_owned(), value.trim_end_matches('"').to_owned());
        }
        ensure!(!series.iter().any(|(other, labels, _)| other == name && *labels == parsed), "{line} twice");
        series.push((name.to_owned(), parsed, value.parse()?));
    }
    Ok(series)
}

fn value(series: &[Series], name: &str, wanted: &[(&str, &str)]) -> Result<f64> {
    let matches =
        |labels: &BTreeMap<String, String>| wanted.iter().all(|(key, value)| labels.get(*key).is_some_and(|own| own == value));
    let found = series.iter().find(|(other, labels, _)| other == name && matches(labels));
    found.map(|(_, _, value)| *value).with_context(|| format!("{name} {wanted:?} is not there"))
}

/// The body of the answer to a GET.
fn get(mut stream: impl Read + Write, path: &str) -> Result<String> {
    write!(stream, "GET {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer)?;
    let (head, body) = answer.split_once("\r\n\r\n").context("a head")?;
    ensure!(head.starts_with("HTTP/1.1 200 "), "{head}");
    Ok(body.to_owned())
}

/// What Prometheus sees.
fn scrape(daemon: &Daemon) -> Result<String> {
    let admin = UnixStream::connect(daemon.folder().join("admin.sock"))?;
    let status: Value = serde_json::from_str(&get(admin, "/v1/status")?)?;
    let address = status["metrics"].as_str().context("an address of metrics")?.to_owned();
    get(TcpStream::connect(address)?, "/metrics")
}

#[test]
fn what_was_done_is_scraped() -> Result<()> {
    let mut daemon = Daemon::new("")?;
    daemon.start()?;
    daemon.cli(["volume", "create", "v", "--size", "64M"])?;
    let export = daemon.json(["export", "add", "v", "--nbd"])?["id"].as_str().context("an id")?.to_owned();
    let qemu_io = tools::require("qemu-io")?;
    let commands = ["-c", "write -P 7 0 1M", "-c", "write -P 7 4M 64k", "-c", "read -P 7 0 1M", "-c", "flush"];
    run(Command::new(qemu_io).args(["-f", "raw"]).args(commands).arg(daemon.nbd_uri("v")), LIMIT)?;

    let text = scrape(&daemon)?;
    let series = parse(&text)?;
    for subject in [
        ("novastor_volume", "volume", "local/v"),
        ("novastor_export", "export", export.as_str()),
        ("novastor_pool", "pool", "local"),
    ] {
        let (prefix, key, name) = subject;
        let of = |what: &str, op: &str| value(&series, &format!("{prefix}_{what}"), &[(key, name), ("op", op)]);
        ensure!(of("operations_total", "write")? == 2.0 && of("bytes_total", "write")? == 1_114_112.0, "{prefix}: {text}");
        ensure!(of("bytes_total", "read")? >= 1_048_576.0 && of("operations_total", "flush")? >= 1.0, "{prefix}");
        ensure!(of("errors_total", "write")? == 0.0 && of("in_flight", "write")? == 0.0, "{prefix}");
        let stage = if prefix == "novastor_pool" { "backend" } else { "total" };
        let labels = [(key, name), ("op", "write"), ("stage", stage)];
        let latency = |what: &str, more: &[(&str, &str)]| {
            value(&series, &format!("{prefix}_latency_seconds_{what}"), &[&labels[..], more].concat())
        };
        ensure!(latency("count", &[])? == 2.0 && latency("bucket", &[("le", "+Inf")])? == 2.0);
        ensure!(latency("sum", &[])? > 0.0 && latency("bucket", &[("le", "0.000005")])? <= 2.0);
    }
    ensure!(value(&series, "novastor_volume_healthy", &[("volume", "local/v")])? == 1.0);
    ensure!(value(&series, "novastor_pool_healthy", &[("pool", "local"), ("driver", "file")])? == 1.0);
    ensure!(
        value(&series, "novastor_data_plane_threads", &[])? == 2.0
            && value(&series, "novastor_info", &[("node", "test")])? == 1.0
    );

    // The volume is closed; what its pool did stays done.
    daemon.cli(["export", "remove", &export])?;
    let series = parse(&scrape(&daemon)?)?;
    ensure!(value(&series, "novastor_pool_operations_total", &[("pool", "local"), ("op", "write")])? == 2.0);
    ensure!(value(&series, "novastor_volume_operations_total", &[("volume", "local/v")]).is_err());
    Ok(())
}

#[test]
fn an_export_that_is_not_served_is_seen() -> Result<()> {
    let mut daemon = Daemon::new("[[export]]\nvolume = \"local/v\"\nnbd = true")?;
    daemon.start()?;
    let labels = [("volume", "local/v"), ("protocol", "nbd")];
    let series = parse(&scrape(&daemon)?)?;
    ensure!(
        value(&series, "novastor_export_ready", &labels)? == 0.0 && value(&series, "novastor_export_problem", &labels)? == 1.0
    );
    ensure!(value(&series, "novastor_export_clients", &labels).is_err());
    let text = daemon.cli(["top", "--once"])?;
    ensure!(text.contains("NOT SERVED") && text.contains("local/v"), "{text}");

    daemon.cli(["volume", "create", "local/v", "--size", "64M"])?;
    daemon.wait_until_served()?;
    let series = parse(&scrape(&daemon)?)?;
    ensure!(
        value(&series, "novastor_export_ready", &labels)? == 1.0 && value(&series, "novastor_export_clients", &labels)? == 0.0
    );
    ensure!(value(&series, "novastor_export_problem", &labels).is_err());
    ensure!(!daemon.cli(["top", "--once"])?.contains("NOT SERVED"));
    Ok(())
}

#[test]
fn top_shows_a_sample() -> Result<()> {
    let mut daemon = Daemon::new("")?;
    daemon.start()?;
    daemon.cli(["volume", "create", "v", "--size", "64M"])?;
    daemon.cli(["export", "add", "v", "--nbd"])?;
    let report = daemon.json(["top"])?;
    ensure!(report["interval_ms"].as_u64().is_some_and(|interval| interval >= 1000), "{report}");
    ensure!(report["volumes"][0]["volume"] == "local/v" && report["volumes"][0]["operations"]["read"]["iops"] == 0.0, "{report}");
    ensure!(report["pools"][0]["ok"] == true, "{report}");
    let text = daemon.cli(["top", "--once"])?;
    ensure!(text.contains("local/v") && text.contains("WRITE p50"), "{text}");
    Ok(())
}

/// By what they are about: state, and what was said.
type Findings = BTreeMap<String, (String, String)>;

/// Runs `novastor doctor` under `wrapper`; its status and findings, by what they are about.
fn doctor(wrapper: &[&str], config: Option<&std::path::Path>) -> Result<(Option<i32>, Findings)> {
    let novastor = binary()?;
    let mut command = match wrapper.split_first() {
        Some((program, arguments)) => {
            let mut command = Command::new(tools::find(program).with_context(|| format!("{program} is not installed"))?);
            command.args(arguments).arg(novastor);
            command
        }
        None => Command::new(novastor),
    };
    command.arg("doctor").arg("--json");
    if let Some(config) = config {
        command.arg("--config").arg(config);
    }
    let output = capture(&mut command, LIMIT)?;
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    let findings: Vec<Value> =
        serde_json::from_str(&text).with_context(|| format!("{text}{}", String::from_utf8_lossy(&output.stderr)))?;
    let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
    let named = |finding: &Value| {
        let said = format!("{} — {}", text(&finding["finding"]), text(&finding["fix"]));
        (text(&finding["what"]), (text(&finding["state"]), said))
    };
    Ok((output.status.code(), findings.iter().map(named).collect()))
}

#[test]
fn doctor_finds_nothing_wrong_beside_a_running_daemon() -> Result<()> {
    let mut daemon = Daemon::new("")?;
    let (status, before) = doctor(&[], Some(&daemon.config_file()))?;
    ensure!(status == Some(0), "{before:?}");
    for what in [
        "kernel",
        "io_uring",
        "open files",
        "memlock",
        "memory reclaim",
        "configuration",
        "data_dir",
        "pool local",
        "admin socket",
        "NBD",
        "metrics",
        "QEMU",
        "Ceph",
    ] {
        ensure!(before.contains_key(what), "{what} is missing: {before:?}");
    }
    ensure!(before["admin socket"].1.contains("can be made"));
    daemon.start()?;
    let (status, with) = doctor(&[], Some(&daemon.config_file()))?;
    ensure!(status == Some(0) && with["admin socket"].1.contains("a daemon listens"), "{with:?}");
    ensure!(with["data_dir"].1.contains("a daemon runs there"), "{with:?}");
    Ok(())
}

/// Whether each thread of a process may use memory that waits for disks to be written (PF_MEMALLOC_NOIO).
fn flushers(id: u32) -> Result<Vec<bool>> {
    let mut found = Vec::new();
    for thread in std::fs::read_dir(format!("/proc/{id}/task"))? {
        let stat = std::fs::read_to_string(thread?.path().join("stat"))?;
        let (_, fields) = stat.rsplit_once(") ").context("a thread's state")?;
        let flags: u64 = fields.split(' ').nth(6).context("its flags")?.parse()?;
        found.push(flags & 0x0008_0000 != 0);
    }
    Ok(found)
}

#[test]
fn no_thread_waits_for_its_own_disks_to_get_memory_where_that_is_permitted() -> Result<()> {
    let mut daemon = Daemon::new("")?;
    daemon.start()?;
    let (_, findings) = doctor(&[], None)?;
    let (state, said) = &findings["memory reclaim"];
    let threads = flushers(daemon.id()?)?;
    ensure!(threads.len() > 3 && threads.iter().all(|flusher| *flusher == (state == "ok")), "{state} {said}: {threads:?}");
    daemon.stop()?;

    daemon.set_launcher(["setpriv", "--bounding-set", "-sys_resource"]);
    daemon.start()?;
    ensure!(flushers(daemon.id()?)?.iter().all(|flusher| !flusher));
    ensure!(!daemon.log().contains("IO_FLUSHER"), "{}", daemon.log());
    let (status, findings) = doctor(&["setpriv", "--bounding-set", "-sys_resource"], None)?;
    let (state, said) = &findings["memory reclaim"];
    ensure!(status == Some(0) && state == "warn" && said.contains("CAP_SYS_RESOURCE"), "{status:?} {state} {said}");
    Ok(())
}

#[test]
fn doctor_finds_low_limits_and_wrong_places() -> Result<()> {
    let daemon = Daemon::new("")?;
    let (status, low) = doctor(&["prlimit", "--nofile=256:256"], Some(&daemon.config_file()))?;
    ensure!(status == Some(1) && low["open files"].0 == "fail" && low["open files"].1.contains("LimitNOFILE"), "{low:?}");

    let taken = std::net::TcpListener::bind("127.0.0.1:0")?;
    let port = taken.local_addr()?.port();
    daemon.configure(&format!(
        "[daemon]\ndata_dir = \"{{disk}}/data\"\nadmin = \"unix:{{dir}}/novastor.toml/admin.sock\"\nmetrics = \"127.0.0.1:{port}\"\n\
         nbd = [\"unix:{{dir}}/made/nbd.sock\"]\nsocket_group = \"no-such-group\"\n[pool.local]\ndriver = \"file\"\npath = \"{{dir}}/novastor.toml/pool\"\n"
    ))?;
    let (status, wrong) = doctor(&[], Some(&daemon.config_file()))?;
    ensure!(status == Some(1), "{wrong:?}");
    ensure!(wrong["NBD"].0 == "ok" && wrong["NBD"].1.contains("can be made, with its folder"), "{wrong:?}");
    for (what, words) in
        [("admin socket", "Not a directory"), ("metrics", "is taken"), ("socket group", "groupadd"), ("pool local", "no folder")]
    {
        let (state, said) = wrong.get(what).with_context(|| format!("{what}: {wrong:?}"))?;
        ensure!(state == "fail" && said.contains(words), "{what}: {state} {said}");
    }
    daemon.configure("[daemon]\nthreads = 2\ndata_dirr = \"/x\"\n")?;
    let (status, unknown) = doctor(&[], Some(&daemon.config_file()))?;
    ensure!(status == Some(1) && unknown["configuration"].1.contains("data_dir"), "{unknown:?}");
    Ok(())
}
