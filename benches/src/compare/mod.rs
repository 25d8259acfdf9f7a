//! Novastor beside other servers: one row of the table at a time, every server loaded in turn by the same generator.
//!
//! ```text
//!   row ─► start every server of it ─► round 1: A B C   round 2: B C A  …  ─► medians ─► ratios and verdicts
//! ```
//!
//! A target compares novastor with the best peer of that metric. Servers not under load sleep. Every
//! server has its own file, preallocated, filled and dropped from the page cache before the first round. A measurement that
//! other programs disturbed is repeated.

mod files;
mod idle;
pub mod mapped;
mod novastor;
mod peers;
mod process;
mod rows;
mod table;

use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use regex::Regex;
use serde::Serialize;

use crate::awake::Awake;
use crate::clock;
use crate::load::{Report, Timing};
use crate::nbd::{Address, NbdLoad};
use crate::vhost::{Pages, VhostLoad, Waiting};

use process::Running;
use rows::{Backing, Protocol, Row, Target};

/// Size of a disk without a file behind it.
pub(crate) const NULL_BYTES: u64 = 8 << 30;
const FOLDER_PREFIX: &str = "novastor-bench-";
const WARM_UP: Duration = Duration::from_millis(500);

#[derive(Clone, Debug, clap::Args)]
pub struct Options {
    /// Only rows whose name matches this regular expression.
    #[arg(long, default_value = ".")]
    rows: Regex,
    /// Measurements of each server per row; the median counts.
    #[arg(long, default_value = "5", value_parser = clap::value_parser!(u32).range(1..))]
    rounds: u32,
    /// Seconds of each measurement.
    #[arg(long, default_value = "3")]
    seconds: f64,
    /// Also write everything measured to this file.
    #[arg(long)]
    json: Option<PathBuf>,
    /// The novastor binary to measure.
    #[arg(long, env = "NOVASTOR", default_value = "target/dist/novastor")]
    novastor: PathBuf,
    /// Measure the other servers only.
    #[arg(long)]
    peers_only: bool,
    /// Where the files of the O_DIRECT rows lie: an ext4 file system. Files of the right size are used again.
    #[arg(long, default_value = "target/bench")]
    directory: PathBuf,
    /// Where the files of the tmpfs rows lie.
    #[arg(long, default_value = "/dev/shm")]
    tmpfs: PathBuf,
    /// Bytes of each file.
    #[arg(long, default_value = "1073741824")]
    file_bytes: u64,
    /// Microseconds the vhost-user client looks for completions before it sleeps.
    #[arg(long, default_value = "20")]
    spin_us: u32,
    /// What the buffers of vhost-user front ends lie in.
    #[arg(long, value_enum, default_value = "small")]
    pages: Pages,
    /// Let novastor pin the memory of vhost-user front ends (`pin_guest_memory`).
    #[arg(long)]
    pin_guest_memory: bool,
    /// Ask NBD servers for structured replies, which let them answer with holes instead of data.
    #[arg(long)]
    structured: bool,
    /// Seconds the idle row measures.
    #[arg(long, default_value = "20")]
    idle_seconds: f64,
    /// A measurement during which other programs used more than this, in percent of one core, is repeated.
    #[arg(long, default_value = "10")]
    quiet_percent: f64,
    /// How often a disturbed measurement is repeated; then the quietest counts.
    #[arg(long, default_value = "3")]
    repeats: u32,
    /// List the rows and end.
    #[arg(long)]
    list: bool,
}

#[derive(Serialize)]
pub struct Outcome {
    name: &'static str,
    what: String,
    servers: Vec<ServerOutcome>,
    verdicts: Vec<Verdict>,
}

#[derive(Serialize)]
struct ServerOutcome {
    name: String,
    command: String,
    rounds: Vec<Report>,
    median: Option<Report>,
    error: Option<String>,
}

#[derive(Serialize)]
pub struct Verdict {
    metric: &'static str,
    target: String,
    ratio: Option<f64>,
    peer: String,
    pass: bool,
}

pub fn run(options: &Options) -> Result<()> {
    let selected: Vec<Row> = rows::all().into_iter().filter(|row| options.rows.is_match(row.name)).collect();
    let idle = options.rows.is_match(idle::NAME);
    if options.list {
        selected.iter().for_each(|row| println!("{:28} {}", row.name, row.describe()));
        println!("{:28} {}", idle::NAME, idle::WHAT);
        return Ok(());
    }
    ensure!(!selected.is_empty() || idle, "no row matches {}", options.rows);
    ensure!(
        options.peers_only || options.novastor.exists(),
        "{} does not exist: cargo build --profile dist -p novastor, or give --novastor or --peers-only",
        options.novastor.display()
    );
    let workspace = Workspace::create(options)?;
    table::print_machine(options);

    let awake = Awake::start()?;
    let mut outcomes = Vec::new();
    for row in &selected {
        let outcome = compare(row, options, &workspace).with_context(|| format!("row {}", row.name))?;
        table::print_row(&outcome);
        outcomes.push(outcome);
    }
    drop(awake);
    // Idle cores are part of what this row is about.
    let idle = idle.then(|| idle::compare(options, &workspace)).transpose()?;
    if let Some(idle) = &idle {
        table::print_idle(idle);
    }
    if !options.peers_only {
        table::print_summary(&outcomes, idle.as_ref());
    }
    if let Some(path) = &options.json {
        let all = serde_json::json!({ "machine": table::machine(), "rows": outcomes, "idle": idle });
        std::fs::write(path, serde_json::to_vec_pretty(&all)?).with_context(|| format!("write {}", path.display()))?;
    }
    Ok(())
}

/// Folders of one run: sockets, configuration and logs in a short path, files where they are asked for.
pub(crate) struct Workspace {
    run: PathBuf,
    direct: PathBuf,
    tmpfs: PathBuf,
}

impl Workspace {
    fn create(options: &Options) -> Result<Self> {
        let name = format!("{FOLDER_PREFIX}{}", std::process::id());
        remove_abandoned(&std::env::temp_dir())?;
        remove_abandoned(&options.tmpfs)?;
        let workspace = Self {
            run: std::env::temp_dir().join(&name),
            direct: std::path::absolute(&options.directory)?,
            tmpfs: options.tmpfs.join(&name),
        };
        for folder in [&workspace.run, &workspace.direct, &workspace.tmpfs] {
            std::fs::create_dir_all(folder).with_context(|| format!("create {}", folder.display()))?;
        }
        Ok(workspace)
    }

    /// A command line without the folders that change from run to run.
    fn abbreviate(&self, command: &str) -> String {
        let folders = [(&self.run, "RUN"), (&self.tmpfs, "TMPFS"), (&self.direct, "DIRECT")];
        folders.iter().fold(command.to_owned(), |text, (folder, name)| text.replace(&*folder.to_string_lossy(), name))
    }

    /// The file that all servers of a row serve, one after the other.
    fn file(&self, backing: Backing) -> Option<PathBuf> {
        let folder = match backing {
            Backing::Null => return None,
            Backing::Tmpfs => &self.tmpfs,
            Backing::Direct => &self.direct,
        };
        Some(folder.join("disk.raw"))
    }
}

/// Removes the folders of runs that were killed.
fn remove_abandoned(parent: &Path) -> Result<()> {
    for entry in std::fs::read_dir(parent).with_context(|| format!("list {}", parent.display()))? {
        let entry = entry?;
        let name = entry.file_name();
        let process = name.to_str().and_then(|name| name.strip_prefix(FOLDER_PREFIX)).and_then(|pid| pid.parse::<u32>().ok());
        if process.is_some_and(|pid| !Path::new(&format!("/proc/{pid}")).exists()) {
            std::fs::remove_dir_all(entry.path()).with_context(|| format!("remove {}", entry.path().display()))?;
        }
    }
    Ok(())
}

impl Drop for Workspace {
    fn drop(&mut self) {
        for folder in [&self.run, &self.tmpfs] {
            if let Err(error) = std::fs::remove_dir_all(folder) {
                eprintln!("{} is left behind: {error}", folder.display());
            }
        }
    }
}

/// A server of a row: how it is started, and what was measured of it.
struct Contender<'a> {
    start: Box<dyn Fn() -> Result<Running> + 'a>,
    outcome: ServerOutcome,
}

impl<'a> Contender<'a> {
    fn new(name: &str, start: impl Fn() -> Result<Running> + 'a) -> Self {
        let outcome = ServerOutcome { name: name.into(), command: String::new(), rounds: Vec::new(), median: None, error: None };
        Self { start: Box::new(start), outcome }
    }

    /// Runs the server for one measurement. One that failed once is not measured again in its row.
    fn measure(&mut self, row: &Row, options: &Options) {
        if self.outcome.error.is_some() {
            return;
        }
        let measured = (self.start)().and_then(|server| {
            self.outcome.command.clone_from(&server.command);
            measure_quietly(&server, row, options)
        });
        match measured {
            Ok(report) => self.outcome.rounds.push(report),
            Err(error) => self.outcome.error = Some(format!("{error:#}")),
        }
    }
}

fn compare(row: &Row, options: &Options, workspace: &Workspace) -> Result<Outcome> {
    if let Some(file) = workspace.file(row.backing) {
        files::prepare(&file, options.file_bytes)?;
    }
    let mut contenders = Vec::new();
    if !options.peers_only {
        contenders.push(Contender::new(novastor::NAME, || novastor::start(row, options, workspace)));
    }
    for peer in peers::of(row.protocol, row.backing) {
        contenders.push(Contender::new(peer.name, move || peers::start(&peer, row, workspace)));
    }
    for _ in 0..options.rounds {
        contenders.iter_mut().for_each(|contender| contender.measure(row, options));
        contenders.rotate_left(1);
    }
    let turns = options.rounds as usize % contenders.len();
    contenders.rotate_right(turns);
    let mut servers: Vec<ServerOutcome> = contenders.into_iter().map(|contender| contender.outcome).collect();
    for server in &mut servers {
        server.median = median(&server.rounds);
        server.command = workspace.abbreviate(&server.command);
    }
    let targets = if options.peers_only { &[] } else { row.targets.as_slice() };
    let verdicts = targets.iter().map(|target| judge(target, &servers)).collect();
    Ok(Outcome { name: row.name, what: row.describe(), servers, verdicts })
}

fn measure_quietly(server: &Running, row: &Row, options: &Options) -> Result<Report> {
    let mut quietest = measure_watched(server, row, options)?;
    for _ in 0..options.repeats {
        if quietest.other_cpu_percent <= Some(options.quiet_percent) {
            break;
        }
        let again = measure_watched(server, row, options)?;
        if again.other_cpu_percent < quietest.other_cpu_percent {
            quietest = again;
        }
    }
    Ok(quietest)
}

/// With all cores awake, CPU time that is neither ours nor the server's is that of other programs.
fn measure_watched(server: &Running, row: &Row, options: &Options) -> Result<Report> {
    let cores = std::thread::available_parallelism()?.get() as u64;
    let used = || -> Result<u64> { Ok(clock::own_cpu_ns() + clock::process_cpu_ns(server.pid())?) };
    let (used_before, before) = (used()?, clock::now_ns());
    let report = measure(server, row, options)?;
    let (used_after, after) = (used()?, clock::now_ns());
    let available = (after - before) * cores;
    let other = available.saturating_sub(used_after - used_before) as f64 / (after - before) as f64 * 100.0;
    Ok(Report { other_cpu_percent: Some(other), ..report })
}

fn measure(server: &Running, row: &Row, options: &Options) -> Result<Report> {
    let timing = Timing { warm_up: WARM_UP, measure: Duration::from_secs_f64(options.seconds) };
    let workload = row.workload;
    match row.protocol {
        Protocol::VhostUser { queues } => VhostLoad {
            socket: server.socket.clone(),
            queues,
            thread_per_queue: false,
            waiting: Waiting::SpinThenSleep { spin_us: options.spin_us },
            workload,
            span: None,
            pages: options.pages,
        }
        .measure(timing, Some(server.pid())),
        Protocol::Nbd { connections } => NbdLoad {
            address: Address::Unix(server.socket.clone()),
            export: server.export.clone(),
            connections,
            structured_replies: options.structured,
            workload,
            span: None,
        }
        .measure(timing, Some(server.pid())),
    }
}

/// Each metric's own median.
fn median(rounds: &[Report]) -> Option<Report> {
    if rounds.is_empty() {
        return None;
    }
    let middle = |value: fn(&Report) -> f64| {
        let mut values: Vec<f64> = rounds.iter().map(value).collect();
        values.sort_unstable_by(f64::total_cmp);
        let half = values.len() / 2;
        if values.len() % 2 == 1 { values[half] } else { (values[half - 1] + values[half]) / 2.0 }
    };
    Some(Report {
        operations: rounds.iter().map(|report| report.operations).sum(),
        seconds: rounds.iter().map(|report| report.seconds).sum(),
        iops: middle(|report| report.iops),
        p50_us: middle(|report| report.p50_us),
        p99_us: middle(|report| report.p99_us),
        max_us: middle(|report| report.max_us),
        server_cpu_us: Some(middle(|report| report.server_cpu_us.unwrap_or(f64::NAN))),
        client_cpu_us: middle(|report| report.client_cpu_us),
        other_cpu_percent: Some(middle(|report| report.other_cpu_percent.unwrap_or(f64::NAN))),
    })
}

fn judge(target: &Target, servers: &[ServerOutcome]) -> Verdict {
    let metric = target.metric;
    let value = |server: &ServerOutcome| metric.of(server.median.as_ref()?);
    let peers = servers.iter().filter(|server| server.name != novastor::NAME);
    let best = peers
        .filter_map(|server| Some((value(server)?, &server.name)))
        .reduce(|best, other| if (other.0 > best.0) == metric.higher_is_better() { other } else { best });
    let ours = servers.iter().find(|server| server.name == novastor::NAME).and_then(value);
    let ratio = ours.zip(best).map(|(ours, (best, _))| ours / best);
    let pass = ratio.is_some_and(|ratio| if metric.higher_is_better() { ratio >= target.ratio } else { ratio <= target.ratio });
    let sign = if metric.higher_is_better() { "≥" } else { "≤" };
    Verdict {
        metric: metric.name(),
        target: format!("{sign} {}×", target.ratio),
        ratio,
        peer: best.map(|(_, name)| name.clone()).unwrap_or_default(),
        pass,
    }
}

#[cfg(test)]
mod tests {
    use super::rows::Metric;
    use super::*;

    fn server(name: &str, rounds: &[(f64, f64)]) -> ServerOutcome {
        let report = |&(iops, cpu)| Report { iops, server_cpu_us: Some(cpu), ..Report::default() };
        let rounds: Vec<Report> = rounds.iter().map(report).collect();
        let median = median(&rounds);
        ServerOutcome { name: name.into(), command: String::new(), rounds, median, error: None }
    }

    #[test]
    fn one_bad_round_does_not_move_the_median() {
        let median = median(&server("x", &[(100.0, 3.0), (1.0, 900.0), (102.0, 2.0)]).rounds).unwrap();
        assert_eq!((median.iops, median.server_cpu_us), (100.0, Some(3.0)));
        assert!(super::median(&[]).is_none());
    }

    #[test]
    fn each_metric_is_judged_against_its_best_peer() {
        let servers = [
            server(novastor::NAME, &[(150.0, 2.0)]),
            server("fast and hungry", &[(100.0, 5.0)]),
            server("slow and frugal", &[(50.0, 4.0)]),
        ];
        let iops = judge(&Target { metric: Metric::Iops, ratio: 1.5 }, &servers);
        assert_eq!((iops.ratio, iops.peer.as_str(), iops.pass), (Some(1.5), "fast and hungry", true));
        let cpu = judge(&Target { metric: Metric::ServerCpu, ratio: 0.4 }, &servers);
        assert_eq!((cpu.ratio, cpu.peer.as_str(), cpu.pass), (Some(0.5), "slow and frugal", false));
    }

    #[test]
    fn folders_of_dead_runs_are_removed() {
        let parent = tempfile::tempdir().unwrap();
        let names = [format!("{FOLDER_PREFIX}{}", 1 << 22), format!("{FOLDER_PREFIX}{}", std::process::id()), "other".into()];
        names.iter().for_each(|name| std::fs::create_dir(parent.path().join(name)).unwrap());
        remove_abandoned(parent.path()).unwrap();
        assert_eq!(names.map(|name| parent.path().join(name).exists()), [false, true, true]);
    }

    #[test]
    fn a_server_that_was_not_measured_does_not_pass() {
        let target = Target { metric: Metric::ServerCpu, ratio: 100.0 };
        assert!(!judge(&target, &[server(novastor::NAME, &[]), server("peer", &[(1.0, 1.0)])]).pass);
        assert!(!judge(&target, &[server(novastor::NAME, &[(1.0, 1.0)]), server("peer", &[])]).pass);
    }
}
