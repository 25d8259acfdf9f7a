//! `novastor top`: what every volume does, measured by the daemon over an interval.

use std::io::{IsTerminal, Write};

use super::Context;
use super::arguments::Top;
use super::output::table;
use crate::metrics::{ExportStats, OpStats, PoolStats, StatsReport, VolumeStats};
use crate::units::{format_latency, format_rate, format_size};

/// To the top left, and from there clear what is left of a longer frame.
const HOME: &str = "\x1b[H";
const CLEAR_LINE: &str = "\x1b[K";
const CLEAR_BELOW: &str = "\x1b[J";
const CLEAR_ALL: &str = "\x1b[2J";

pub fn run(context: &Context, command: &Top) -> anyhow::Result<()> {
    let client = context.client()?;
    let path = format!("/v1/stats?interval_ms={}", command.interval * 1000);
    let live = std::io::stdout().is_terminal() && !context.output.json && !command.once;
    if !live {
        let report: StatsReport = client.get(&path)?;
        return context.output.print(&report, frame);
    }
    write!(std::io::stdout(), "{CLEAR_ALL}{HOME}novastor top: measuring …")?;
    std::io::stdout().flush()?;
    loop {
        let report: StatsReport = client.get(&path)?;
        let text = frame(&report).replace('\n', &format!("{CLEAR_LINE}\n"));
        let mut out = std::io::stdout().lock();
        write!(out, "{HOME}{text}{CLEAR_LINE}\n{CLEAR_BELOW}")?;
        out.flush()?;
    }
}

fn frame(report: &StatsReport) -> String {
    let volumes = match report.volumes.as_slice() {
        [] => "no volume is open".to_owned(),
        volumes => table(VOLUME_HEAD, volumes.iter().map(|volume| volume_row(volume, clients(report, &volume.volume)))),
    };
    let pools = table(POOL_HEAD, report.pools.iter().map(pool_row));
    let head = format!("{} · {:.1} s", report.node, report.interval_ms as f64 / 1e3);
    let parts = [Some(head), Some(volumes), exports_away(report), Some(pools)];
    parts.into_iter().flatten().collect::<Vec<_>>().join("\n\n")
}

/// Exports that accept no clients, and why.
fn exports_away(report: &StatsReport) -> Option<String> {
    let away = report.exports.iter().filter(|export| !export.ready);
    let rows: Vec<_> =
        away.map(|export| [export.export.clone(), export.volume.clone(), export.error.clone().unwrap_or_default()]).collect();
    (!rows.is_empty()).then(|| table(["EXPORT", "VOLUME", "NOT SERVED"], rows))
}

const VOLUME_HEAD: [&str; 18] = [
    "VOLUME",
    "READ/s",
    "WRITE/s",
    "OTHER/s",
    "READ",
    "WRITE",
    "READ p50",
    "p99",
    "WRITE p50",
    "p99",
    "IN FLIGHT",
    "LOG",
    "LAG",
    "REDUCTION",
    "HITS",
    "FREED",
    "CLIENTS",
    "HEALTH",
];

const POOL_HEAD: [&str; 7] = ["POOL", "DRIVER", "OPS/s", "BYTES", "IN FLIGHT", "ERRORS", "HEALTH"];

fn volume_row(volume: &VolumeStats, clients: usize) -> [String; 18] {
    let nothing = OpStats::default();
    let of = |kind: &str| volume.operations.get(kind).unwrap_or(&nothing);
    let (read, write) = (of("read"), of("write"));
    let others = volume.operations.iter().filter(|(kind, _)| !matches!(kind.as_str(), "read" | "write"));
    let other_rate: f64 = others.map(|(_, stats)| stats.iops).sum();
    let in_flight: u64 = volume.operations.values().map(|stats| stats.in_flight).sum();
    let rate = |iops: f64| format!("{iops:.0}");
    [
        volume.volume.clone(),
        rate(read.iops),
        rate(write.iops),
        rate(other_rate),
        format_rate(read.bytes_per_second),
        format_rate(write.bytes_per_second),
        latency(read.p50_us),
        latency(read.p99_us),
        latency(write.p50_us),
        latency(write.p99_us),
        in_flight.to_string(),
        log(volume),
        volume.lag_ms.map(|lag| format!("{} s", lag / 1000)).unwrap_or_default(),
        volume.reduction.map(|ratio| format!("{ratio:.1}×")).unwrap_or_default(),
        volume.index_hit_rate.map(|rate| format!("{:.0}%", rate * 100.0)).unwrap_or_default(),
        freed(volume),
        clients.to_string(),
        health(volume),
    ]
}

/// How full the local log of a mapped volume is.
fn log(volume: &VolumeStats) -> String {
    let share = |(used, size): (u64, u64)| format!("{}%", (used * 100).checked_div(size).unwrap_or_default());
    volume.log_used.zip(volume.log_size).map(share).unwrap_or_default()
}

/// What collecting garbage gave back, with a mark while it runs.
fn freed(volume: &VolumeStats) -> String {
    let running = if volume.is_collecting == Some(true) { " …" } else { "" };
    volume.freed.map(|bytes| format!("{}{running}", format_size(bytes))).unwrap_or_default()
}

fn clients(report: &StatsReport, volume: &str) -> usize {
    let own = report.exports.iter().filter(|export: &&ExportStats| export.volume == volume);
    own.map(|export| export.clients).sum()
}

fn latency(micros: Option<f64>) -> String {
    micros.map(|micros| format_latency(std::time::Duration::from_nanos((micros * 1e3) as u64))).unwrap_or_default()
}

/// What is wrong now; else how many requests ever failed, and how the last one did.
fn health(volume: &VolumeStats) -> String {
    let errors: u64 = volume.operations.values().map(|stats| stats.errors).sum();
    match (&volume.problem, errors, &volume.last_error) {
        (Some(problem), _, _) => problem.clone(),
        (None, 0, _) => "ok".to_owned(),
        (None, errors, Some(last)) => format!("ok, {errors} errors, the last: {last}"),
        (None, errors, None) => format!("ok, {errors} errors"),
    }
}

fn pool_row(pool: &PoolStats) -> [String; 7] {
    [
        pool.pool.clone(),
        pool.driver.clone(),
        format!("{:.0}", pool.iops),
        format_rate(pool.bytes_per_second),
        pool.in_flight.to_string(),
        pool.errors.to_string(),
        if pool.ok { "ok".to_owned() } else { pool.detail.clone() },
    ]
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::*;

    fn volume(errors: u64, problem: Option<&str>) -> VolumeStats {
        let read =
            OpStats { iops: 1234.4, bytes_per_second: 2048.0, p50_us: Some(80.0), errors, in_flight: 3, ..OpStats::default() };
        let flush = OpStats { iops: 2.0, in_flight: 1, ..OpStats::default() };
        VolumeStats {
            volume: "p/v".to_owned(),
            pool: "p".to_owned(),
            size: 1,
            ok: problem.is_none(),
            problem: problem.map(str::to_owned),
            last_error: (errors > 0).then(|| "read at 0: EIO".to_owned()),
            log_used: Some(30),
            log_size: Some(120),
            lag_ms: Some(2_500),
            reduction: Some(3.25),
            index_hit_rate: Some(0.5),
            freed: Some(1 << 20),
            is_collecting: Some(true),
            operations: BTreeMap::from([("read".to_owned(), read), ("flush".to_owned(), flush)]),
        }
    }

    #[test]
    fn a_row_sums_what_it_should() {
        let row = volume_row(&volume(0, None), 2);
        let expected = ["p/v", "1234", "0", "2", "2.0 KiB/s", "0.0 B/s", "80.0µs", "", "", "", "4", "25%"];
        assert_eq!(row[..12], expected.map(str::to_owned));
        assert_eq!(row[12..], ["2 s", "3.2×", "50%", "1M …", "2", "ok"].map(str::to_owned));
    }

    #[test]
    fn health_is_in_words() {
        assert!(health(&volume(0, Some("the disk is gone"))).contains("gone"));
        assert_eq!(health(&volume(7, None)), "ok, 7 errors, the last: read at 0: EIO");
    }

    #[test]
    fn a_frame_without_volumes_says_so_and_which_exports_are_not_served() {
        let mut report = StatsReport { node: "n".to_owned(), interval_ms: 1000, volumes: vec![], exports: vec![], pools: vec![] };
        assert!(frame(&report).contains("no volume is open"));
        assert!(!frame(&report).contains("NOT SERVED"));
        report.exports.push(ExportStats {
            export: "3".to_owned(),
            volume: "p/away".to_owned(),
            ready: false,
            error: Some("no such file".to_owned()),
            clients: 0,
            operations: BTreeMap::new(),
        });
        let frame = frame(&report);
        let row = frame.lines().find(|line| line.contains("p/away")).unwrap();
        assert!(frame.contains("NOT SERVED") && row.contains("no such file"), "{frame}");
    }
}
