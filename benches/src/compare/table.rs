//! The report: Markdown on standard output.

use std::process::Command;

use super::idle::{self, IdleOutcome};
use super::novastor;
use super::rows::Metric;
use super::{Options, Outcome, ServerOutcome, Verdict};
use crate::load::Report;
use crate::vhost::Pages;

/// Facts about the machine and the programs, as (name, value).
pub fn machine() -> Vec<(&'static str, String)> {
    let read = |path: &str| std::fs::read_to_string(path).unwrap_or_default();
    let field = |text: &str, key: &str| {
        let line = text.lines().find(|line| line.starts_with(key)).unwrap_or_default();
        line.split_once(':').map(|(_, value)| value.trim().to_owned()).unwrap_or_default()
    };
    let cores = std::thread::available_parallelism().map_or(0, std::num::NonZero::get);
    vec![
        ("CPU", format!("{} × {}", cores, field(&read("/proc/cpuinfo"), "model name"))),
        ("memory", field(&read("/proc/meminfo"), "MemTotal")),
        ("kernel", read("/proc/sys/kernel/osrelease").trim().to_owned()),
        ("load average at the start", read("/proc/loadavg").trim().to_owned()),
        ("qemu-storage-daemon", version("qemu-storage-daemon")),
        ("qemu-nbd", version("qemu-nbd")),
        ("nbdkit", version("nbdkit")),
    ]
}

fn version(program: &str) -> String {
    match Command::new(program).arg("--version").output() {
        Ok(output) => String::from_utf8_lossy(&output.stdout).lines().next().unwrap_or_default().to_owned(),
        Err(error) => error.to_string(),
    }
}

pub fn print_machine(options: &Options) {
    for (name, value) in machine() {
        println!("- {name}: {value}");
    }
    println!(
        "- {} rounds of {} s, interleaved, after 0.5 s of warming up; vhost-user client spins {} µs before it sleeps, \
         its buffers in {} pages{}; NBD {} replies",
        options.rounds,
        options.seconds,
        options.spin_us,
        if options.pages == Pages::Huge { "2 MiB" } else { "4 KiB" },
        if options.pin_guest_memory { ", pinned by novastor" } else { "" },
        if options.structured { "structured" } else { "simple" }
    );
}

pub fn print_row(outcome: &Outcome) {
    println!("\n### {}\n\n{}\n", outcome.name, outcome.what);
    println!(
        "| server | IOPS | (lowest – highest) | p50 µs | p99 µs | server CPU µs per I/O | client CPU µs per I/O | other CPU % |"
    );
    println!("|---|--:|--:|--:|--:|--:|--:|--:|");
    outcome.servers.iter().for_each(print_server);
    print_ratios(outcome);
    println!();
    for server in outcome.servers.iter().filter(|server| !server.command.is_empty()) {
        println!("    {}", server.command);
    }
    if !outcome.verdicts.is_empty() {
        println!();
        outcome.verdicts.iter().for_each(|verdict| println!("- {}", show(verdict)));
    }
}

fn print_server(server: &ServerOutcome) {
    if let Some(median) = &server.median {
        let lowest = server.rounds.iter().map(|round| round.iops).fold(f64::INFINITY, f64::min);
        let highest = server.rounds.iter().map(|round| round.iops).fold(0.0, f64::max);
        println!(
            "| {} | {:.0} | {lowest:.0} – {highest:.0} | {:.1} | {:.1} | {:.2} | {:.2} | {:.0} |",
            server.name,
            median.iops,
            median.p50_us,
            median.p99_us,
            median.server_cpu_us.unwrap_or(f64::NAN),
            median.client_cpu_us,
            median.other_cpu_percent.unwrap_or(f64::NAN)
        );
    }
    if let Some(error) = &server.error {
        println!("| {} | failed: {} | | | | | | |", server.name, error.replace(['|', '\n'], " "));
    }
}

/// Novastor divided by each peer.
fn print_ratios(outcome: &Outcome) {
    let Some(ours) = outcome.servers.iter().find(|server| server.name == novastor::NAME).and_then(|us| us.median.as_ref()) else {
        return;
    };
    for peer in outcome.servers.iter().filter(|server| server.name != novastor::NAME) {
        let Some(theirs) = &peer.median else { continue };
        let ratio = |value: fn(&Report) -> Option<f64>| match value(ours).zip(value(theirs)) {
            Some((ours, theirs)) => format!("{:.2}×", ours / theirs),
            None => String::new(),
        };
        println!(
            "| novastor ÷ {} | {} | | {} | {} | {} | | |",
            peer.name,
            ratio(|report| Metric::Iops.of(report)),
            ratio(|report| Metric::P50.of(report)),
            ratio(|report| Some(report.p99_us)),
            ratio(|report| Metric::ServerCpu.of(report)),
        );
    }
}

fn show(verdict: &Verdict) -> String {
    let word = if verdict.pass { "pass" } else { "FAIL" };
    match verdict.ratio {
        Some(ratio) => {
            format!("{word}: {} {ratio:.2}× that of {}, target {}", verdict.metric, verdict.peer, verdict.target)
        }
        None => format!("{word}: {} not measured, target {}", verdict.metric, verdict.target),
    }
}

pub fn print_idle(outcomes: &[IdleOutcome]) {
    println!("\n### {}\n\n{}\n", idle::NAME, idle::WHAT);
    println!("| server | CPU, % of one core | resident MiB |");
    println!("|---|--:|--:|");
    for outcome in outcomes {
        println!("| {} | {:.2} | {:.1} |", outcome.server, outcome.cpu_percent, outcome.resident_mib);
    }
}

pub fn print_summary(outcomes: &[Outcome], idle: Option<&Vec<IdleOutcome>>) {
    println!("\n### Summary\n");
    println!("| row | metric | peer | novastor ÷ peer | target | |");
    println!("|---|---|---|--:|--:|---|");
    for outcome in outcomes {
        for verdict in &outcome.verdicts {
            let ratio = verdict.ratio.map_or_else(|| "not measured".to_owned(), |ratio| format!("{ratio:.2}×"));
            let Verdict { metric, peer, target, pass, .. } = verdict;
            println!("| {} | {metric} | {peer} | {ratio} | {target} | {} |", outcome.name, word(*pass));
        }
    }
    let ours = idle.and_then(|outcomes| outcomes.iter().find(|outcome| outcome.server == novastor::NAME));
    if let Some(ours) = ours {
        let (cpu, resident) = (ours.cpu_percent, ours.resident_mib);
        println!("| idle | CPU | | {cpu:.2} % | < {} % | {} |", idle::CPU_PERCENT_MAX, word(cpu < idle::CPU_PERCENT_MAX));
        println!(
            "| idle | memory | | {resident:.1} MiB | < {} MiB | {} |",
            idle::RESIDENT_MIB_MAX,
            word(resident < idle::RESIDENT_MIB_MAX)
        );
    }
}

fn word(pass: bool) -> &'static str {
    if pass { "pass" } else { "FAIL" }
}
