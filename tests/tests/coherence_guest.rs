//! Volumes used over NBD and vhost-user at once, on a backend that is slow and fails now and then: every error arrives where it
//! belongs, none is invented, and what was acknowledged is there.
//!
//! Needs a daemon built with the feature `fault-injection`, as `cargo xtask test` builds it.

use anyhow::{Context, Result, ensure};
use novastor_tests::rig::daemon::Daemon;
use novastor_tests::rig::fio::{self, Fio};
use novastor_tests::rig::guest::{Guest, GuestSpec};
use novastor_tests::rig::metrics::Metrics;
use std::thread;
use std::time::Duration;

const LIMIT: Duration = Duration::from_secs(180);
const VOLUMES: [&str; 2] = ["local/one", "local/two"];
/// One request in fifty fails: writes on one volume, reads on the other. Flushes are slow too.
const FAULTS: &str = "write delay_us=200 jitter_us=3000 errors_per_million=20000 volume=local/one; \
                      write delay_us=200 jitter_us=3000 volume=local/two; \
                      read jitter_us=2000 volume=local/one; \
                      read jitter_us=2000 errors_per_million=20000 volume=local/two; \
                      flush delay_us=5000";

/// Goes on after an error and counts it.
fn counting(fio: Fio, offset_mib: u64) -> Fio {
    fio.verify(offset_mib, 8).with(["--continue_on_error=io", "--output-format=json"])
}

/// Errors that fio saw, from its report. A wrong checksum is no such error: it fails the test.
fn errors_seen(report: &str) -> Result<f64> {
    for word in ["verify failed", "bad magic", "bad header"] {
        ensure!(!report.contains(word), "fio read something else than it wrote:\n{report}");
    }
    let job = fio::job(report)?;
    ensure!(job["write"]["total_ios"].as_u64().is_some_and(|ios| ios >= 2000), "fio hardly wrote: {job}");
    ensure!(job["read"]["total_ios"].as_u64().is_some_and(|ios| ios >= 1900), "fio hardly read: {job}");
    job["total_err"].as_f64().context("fio's count of errors")
}

fn errors_counted(metrics: &Metrics, volume: &str, protocol: &str) -> Result<f64> {
    metrics.sum("novastor_export_errors_total", &[("volume", volume), ("protocol", protocol)])
}

/// Verifies both disks at once. No request may be merged with another, or one error would be seen twice.
fn script() -> String {
    let verify = |disk: &str| counting(Fio::disk(disk), 0).line();
    format!(
        "first=vda second=vdb
         [ $(cat /sys/block/vda/size) -lt $(cat /sys/block/vdb/size) ] || {{ first=vdb; second=vda; }}
         for disk in $first $second; do echo 2 >/sys/block/$disk/queue/nomerges; done
         ln -s /dev/$first /tmp/first
         ln -s /dev/$second /tmp/second
         mark begin
         await begin
         {} >/tmp/first.json 2>&1 &
         {} >/tmp/second.json 2>&1 || true
         wait || true
         for disk in first second; do echo REPORT; cat /tmp/$disk.json; echo END; done
         mark end",
        verify("/tmp/first"),
        verify("/tmp/second")
    )
}

#[test]
fn every_error_of_the_backend_is_reported_and_none_invented() -> Result<()> {
    let mut daemon = Daemon::new("")?;
    daemon.set_env("NOVASTOR_DAEMON__FAULTS", FAULTS);
    daemon.start().context("a daemon with faults: build it with `cargo build -p novastor --features fault-injection`")?;
    let mut spec = GuestSpec::new(script());
    let mut uris = Vec::new();
    // By their sizes the guest tells its disks apart, whatever it calls them.
    for (volume, size) in VOLUMES.into_iter().zip(["32M", "36M"]) {
        daemon.create_volume(volume, size)?;
        spec = spec.vhost_user_disk(&volume.replace('/', "-"), &daemon.export_vhost_user(volume)?, 2);
        uris.push(daemon.export_nbd(volume.trim_start_matches("local/"))?);
    }
    let mut guest = Guest::start(&spec)?;
    // Its kernel has read the partition tables, perhaps with errors.
    guest.wait_mark("begin", LIMIT)?;
    let before = daemon.metrics()?;
    guest.send("begin")?;
    let hosts: Vec<_> = uris.into_iter().map(|uri| thread::spawn(move || counting(Fio::nbd(&uri), 16).capture(LIMIT))).collect();
    let hosts: Result<Vec<String>> =
        hosts.into_iter().map(|host| host.join().map_err(|_| anyhow::anyhow!("fio's thread panicked"))?).collect();
    let hosts = hosts?;
    guest.wait_mark("end", LIMIT)?;
    let after = daemon.metrics()?;
    let console = guest.finish(LIMIT)?;
    let guests: Vec<&str> = console.split("REPORT\n").skip(1).filter_map(|part| part.split("\nEND").next()).collect();

    for (index, volume) in VOLUMES.into_iter().enumerate() {
        let mut all = 0.0;
        for (protocol, report) in [("nbd", hosts[index].as_str()), ("vhost-user", guests[index])] {
            let seen = errors_seen(report).with_context(|| format!("{volume} over {protocol}"))?;
            let counted = errors_counted(&after, volume, protocol)? - errors_counted(&before, volume, protocol)?;
            println!("{volume} over {protocol}: {seen} errors seen by the client, {counted} counted by the daemon");
            ensure!(seen == counted, "{volume} over {protocol}: {seen} errors seen, {counted} reported");
            ensure!(seen >= 5.0, "{volume} over {protocol}: one request in fifty should have failed, {seen} did");
            all += counted;
        }
        let of_volume = |metrics: &Metrics| metrics.sum("novastor_volume_errors_total", &[("volume", volume)]);
        ensure!(of_volume(&after)? - of_volume(&before)? == all, "{volume}: the volume and its exports differ");
    }
    daemon.stop()
}
