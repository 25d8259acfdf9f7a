//! `novastor-bench`: load one server, or compare several.

use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use anyhow::Result;
use benches::awake::Awake;
use benches::compare;
use benches::load::{Report, Timing};
use benches::nbd::{Address, NbdLoad};
use benches::reduction;
use benches::requests::{Access, Workload};
use benches::vhost::{Pages, VhostLoad, Waiting};
use clap::{Args, Parser, Subcommand};

/// Load generators for NBD and vhost-user-blk, and a side-by-side comparison with other servers.
#[derive(Parser)]
#[command(version)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Load an NBD server.
    Nbd(NbdArgs),
    /// Load a vhost-user-blk server, without a guest.
    VhostUser(VhostArgs),
    /// Measure novastor and other servers side by side and print the result as Markdown.
    Compare(compare::Options),
    /// Measure a mapped volume beside a raw one and print the result as Markdown.
    Mapped(compare::Options),
    /// Reduce images of machines and print what is stored as Markdown.
    Reduction(reduction::Options),
}

#[derive(Args)]
struct LoadArgs {
    /// Bytes per request.
    #[arg(long, default_value = "4096")]
    block_size: u32,
    /// Requests in flight per connection or queue.
    #[arg(long, default_value = "32")]
    depth: u16,
    #[arg(long, value_enum, default_value = "random")]
    access: Access,
    /// Percentage of requests that write.
    #[arg(long, default_value = "0", value_parser = clap::value_parser!(u8).range(0..=100))]
    write: u8,
    /// Bytes at the start of the disk to use; all of it if not given.
    #[arg(long)]
    span: Option<u64>,
    /// Seconds measured, after half a second of warming up.
    #[arg(long, default_value = "3")]
    seconds: f64,
    /// Write a pattern over the whole span first, check every read against it, and read everything back at the end.
    #[arg(long)]
    verify: bool,
    /// Keep all cores from idling meanwhile.
    #[arg(long)]
    awake: bool,
    /// The server's process, to report its CPU time.
    #[arg(long)]
    server_pid: Option<u32>,
    /// Print the report as JSON.
    #[arg(long)]
    json: bool,
}

#[derive(Args)]
struct NbdArgs {
    /// unix:PATH or tcp:HOST:PORT.
    address: Address,
    /// Name of the export.
    #[arg(long, default_value = "")]
    export: String,
    /// Connections, one thread each.
    #[arg(long, default_value = "1")]
    connections: usize,
    /// Ask for structured replies, which let a server answer with holes.
    #[arg(long)]
    structured: bool,
    #[command(flatten)]
    load: LoadArgs,
}

#[derive(Args)]
struct VhostArgs {
    /// The server's socket.
    socket: PathBuf,
    #[arg(long, default_value = "1")]
    queues: usize,
    /// One thread for each queue instead of one for all.
    #[arg(long)]
    thread_per_queue: bool,
    /// Microseconds without a completion after which to sleep until notified.
    #[arg(long, default_value = "20", conflicts_with = "spin")]
    spin_us: u32,
    /// Never sleep.
    #[arg(long)]
    spin: bool,
    /// What the buffers lie in.
    #[arg(long, value_enum, default_value = "small")]
    pages: Pages,
    #[command(flatten)]
    load: LoadArgs,
}

impl LoadArgs {
    fn workload(&self) -> Workload {
        Workload { block_size: self.block_size, depth: self.depth, access: self.access, write_percent: self.write }
    }

    fn timing(&self) -> Timing {
        Timing { warm_up: Duration::from_millis(500), measure: Duration::from_secs_f64(self.seconds) }
    }

    fn run(
        &self,
        measure: impl FnOnce(Timing, Option<u32>) -> Result<Report>,
        verify: impl FnOnce(Timing, u64) -> Result<Report>,
    ) -> Result<()> {
        let _awake = self.awake.then(Awake::start).transpose()?;
        let report = match self.verify {
            true => verify(self.timing(), 0x6e6f_7661)?,
            false => measure(self.timing(), self.server_pid)?,
        };
        if self.json {
            println!("{}", serde_json::to_string(&report)?);
        } else {
            print(&report);
        }
        Ok(())
    }
}

fn print(report: &Report) {
    println!("{:.0} IOPS over {:.1} s", report.iops, report.seconds);
    println!("latency µs: p50 {:.1}, p99 {:.1}, max {:.1}", report.p50_us, report.p99_us, report.max_us);
    println!("client CPU per I/O: {:.2} µs", report.client_cpu_us);
    if let Some(server) = report.server_cpu_us {
        println!("server CPU per I/O: {server:.2} µs");
    }
}

fn run(cli: Cli) -> Result<()> {
    match cli.command {
        Command::Nbd(args) => {
            let load = NbdLoad {
                address: args.address,
                export: args.export,
                connections: args.connections,
                structured_replies: args.structured,
                workload: args.load.workload(),
                span: args.load.span,
            };
            args.load.run(|timing, server| load.measure(timing, server), |timing, seed| load.verify(timing, seed))
        }
        Command::Compare(options) => compare::run(&options),
        Command::Mapped(options) => compare::mapped::run(&options),
        Command::Reduction(options) => reduction::run(&options),
        Command::VhostUser(args) => {
            let waiting = if args.spin { Waiting::Spin } else { Waiting::SpinThenSleep { spin_us: args.spin_us } };
            let load = VhostLoad {
                socket: args.socket,
                queues: args.queues,
                thread_per_queue: args.thread_per_queue,
                waiting,
                workload: args.load.workload(),
                span: args.load.span,
                pages: args.pages,
            };
            args.load.run(|timing, server| load.measure(timing, server), |timing, seed| load.verify(timing, seed))
        }
    }
}

fn main() -> ExitCode {
    match run(Cli::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("novastor-bench: {error:#}");
            ExitCode::FAILURE
        }
    }
}
