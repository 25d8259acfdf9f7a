//! A mapped volume beside a raw one in the same pool: what the log costs, and what reduction costs on top of it.
//!
//! ```text
//!   for each kind of volume: daemon, volume with a filled disk ─▶ rounds in turn: settled? ─▶ load ─▶ …  ─▶ medians, ratios
//! ```
//!
//! A round begins when the logs of all volumes are nearly empty and nobody collects garbage, and is short enough that the log does not fill. The disks
//! are filled so often that the logs have been written from end to end: the first time, the file system still has to find out that there are no holes.

use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};

use super::novastor::{self, Daemon};
use super::process::Running;
use super::rows::{Backing, Protocol, Row};
use super::{Options, Outcome, ServerOutcome, Workspace, files, measure_quietly, median, table};
use crate::awake::Awake;
use crate::clock;
use crate::requests::{Access, Workload};

const VOLUME: &str = "disk";
const SETTLED_LOG_BYTES: u64 = 64 << 20;
const SETTLE_LIMIT: Duration = Duration::from_secs(120);
const SETTLE_LOOK: Duration = Duration::from_millis(100);

/// A kind of volume: its name in the report, and what `volume create` is given.
struct Kind {
    name: &'static str,
    arguments: &'static [&'static str],
}

const RAW: Kind = Kind { name: "raw", arguments: &["--layout", "raw"] };
const UNREDUCED: Kind =
    Kind { name: "mapped, reduction off", arguments: &["--layout", "mapped", "--policy", novastor::UNREDUCED] };
const MAPPED: Kind = Kind { name: novastor::NAME, arguments: &["--layout", "mapped"] };

/// A daemon with one volume.
struct Served {
    kind: Kind,
    daemon: Daemon,
    running: Running,
    outcome: ServerOutcome,
}

pub fn run(options: &Options) -> Result<()> {
    let rows: Vec<Row> = rows().into_iter().filter(|row| options.rows.is_match(row.name)).collect();
    ensure!(!rows.is_empty(), "no row matches {}", options.rows);
    let workspace = Workspace::create(options)?;
    let image = workspace.file(Backing::Direct).context("there is no file for this backing")?;
    files::prepare(&image, options.file_bytes)?;
    table::print_machine(options);
    let kinds = [RAW, UNREDUCED, MAPPED].into_iter().enumerate();
    let serve = |(index, kind)| serve(kind, &workspace.direct.join(format!("mapped-{index}")), &image, options);
    let mut served = kinds.map(serve).collect::<Result<Vec<Served>>>()?;
    let _awake = Awake::start()?;
    for row in &rows {
        table::print_row(&compare(row, &mut served, options)?);
    }
    for Served { daemon, running, .. } in served {
        drop(running);
        daemon.remove()?;
    }
    Ok(())
}

fn rows() -> Vec<Row> {
    let row = |name, depth, write_percent| Row {
        name,
        protocol: Protocol::VhostUser { queues: 1 },
        backing: Backing::Direct,
        workload: Workload { block_size: 4 << 10, depth, access: Access::Random, write_percent },
        targets: Vec::new(),
    };
    vec![
        row("mapped-4k-write", 32, 100),
        row("mapped-4k-write-d4", 4, 100),
        row("mapped-4k-write-d1", 1, 100),
        row("mapped-4k-read", 32, 0),
        row("mapped-4k-read-d1", 1, 0),
    ]
}

fn serve(kind: Kind, folder: &Path, image: &Path, options: &Options) -> Result<Served> {
    let daemon = Daemon::new(options, folder)?;
    let mut running = daemon.serve("file")?;
    let size = options.file_bytes.to_string();
    daemon.client(&[&["volume", "create", VOLUME, "--size", &size], kind.arguments].concat())?;
    let image = image.to_str().context("a path that is not UTF-8")?;
    let is_mapped = kind.arguments.contains(&"mapped");
    let fillings = if is_mapped { novastor::LOG_BYTES / options.file_bytes + 2 } else { 1 };
    for _ in 0..fillings {
        daemon.client(&["image", "import", "--yes", image, VOLUME])?;
    }
    running.socket = PathBuf::from(folder).join("disk.sock");
    daemon.export_vhost_user(VOLUME, &running.socket)?;
    let outcome =
        ServerOutcome { name: kind.name.into(), command: running.command.clone(), rounds: Vec::new(), median: None, error: None };
    Ok(Served { kind, daemon, running, outcome })
}

fn compare(row: &Row, served: &mut [Served], options: &Options) -> Result<Outcome> {
    for turn in 0..options.rounds as usize {
        let count = served.len();
        for index in 0..count {
            served.iter().try_for_each(settle)?;
            let server = &mut served[(index + turn) % count];
            let report = measure_quietly(&server.running, row, options).with_context(|| server.kind.name)?;
            server.outcome.rounds.push(report);
        }
    }
    let take = |server: &mut Served| {
        let rounds = std::mem::take(&mut server.outcome.rounds);
        let (name, command) = (server.outcome.name.clone(), server.outcome.command.clone());
        ServerOutcome { name, command, median: median(&rounds), rounds, error: None }
    };
    let servers = served.iter_mut().map(take).collect();
    Ok(Outcome { name: row.name, what: row.describe(), servers, verdicts: Vec::new() })
}

/// Waits until the pool has what the log had for it, and no garbage is being collected.
fn settle(server: &Served) -> Result<()> {
    let end = clock::now_ns() + SETTLE_LIMIT.as_nanos() as u64;
    while clock::now_ns() < end {
        let now = server.daemon.ask(&["top", "--once", "--json"])?;
        let volume = &now["volumes"][0];
        let waiting = volume["log_used"].as_u64().unwrap_or(0);
        if waiting <= SETTLED_LOG_BYTES && volume["is_collecting"] != true {
            return Ok(());
        }
        std::thread::sleep(SETTLE_LOOK);
    }
    bail!("{}: the volume does not settle in {} s", server.kind.name, SETTLE_LIMIT.as_secs())
}
