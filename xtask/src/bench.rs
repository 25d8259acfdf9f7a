//! `cargo xtask bench`: builds what is shipped, then measures it beside other servers; or measures what is stored of images,
//! how fast data is reduced, or a mapped volume by itself.

use crate::commands::{cargo, output, show};
use anyhow::{Context, Result};
use std::path::PathBuf;

const PROFILE: [&str; 2] = ["--profile", "dist"];

/// `arguments` are those of `novastor-bench`; without any it compares all rows.
pub fn run(arguments: &[String]) -> Result<()> {
    match arguments.split_first().map(|(first, rest)| (first.as_str(), rest)) {
        Some(("reduction", _)) => return reduction(arguments),
        Some(("engine", rows)) => return engine(rows),
        Some(("speed", rest)) => return speed(rest),
        _ => {}
    }
    if !arguments.iter().any(|argument| argument == "--peers-only") {
        show(cargo().arg("build").args(PROFILE).args(["-p", "novastor"]))?;
    }
    let mut bench = cargo();
    bench.arg("run").args(PROFILE).args(["-p", "benches", "--bin", "novastor-bench", "--"]);
    match arguments {
        [] => bench.arg("compare"),
        arguments => bench.args(arguments),
    };
    show(&mut bench)
}

/// Sizes do not depend on how well the program is optimised, so the build of the tests does.
fn reduction(arguments: &[String]) -> Result<()> {
    let mut bench = cargo();
    bench.args(["run", "--quiet", "-p", "benches", "--bin", "novastor-bench", "--"]);
    show(bench.args(arguments))
}

/// What a mapped volume is meant to reach; `rows` are names, none means all.
fn engine(rows: &[String]) -> Result<()> {
    let mut targets = cargo();
    if rows.is_empty() || rows.iter().any(|row| row == "killed") {
        targets.env("NOVASTOR_BIN", daemon()?);
    }
    targets.args(["run", "--quiet", "--release", "-p", "volume", "--example", "targets", "--"]);
    show(targets.args(rows))
}

/// What reducing and decoding take on one thread; the first argument is how many MiB of files.
fn speed(arguments: &[String]) -> Result<()> {
    let mut bench = cargo();
    bench.args(["run", "--quiet", "--release", "-p", "dedup", "--example", "speed", "--"]);
    match arguments {
        [] => bench.arg("96"),
        arguments => bench.args(arguments),
    };
    show(&mut bench)
}

/// Builds the daemon as the engine is built for its rows, and tells where it is.
fn daemon() -> Result<PathBuf> {
    let build = ["build", "--quiet", "--release", "-p", "novastor", "--message-format", "json-render-diagnostics"];
    let messages = output(cargo().args(build))?;
    let program = String::from_utf8_lossy(&messages).lines().rev().find_map(program_in);
    program.context("cargo does not say where it put novastor")
}

/// The program that a message of cargo tells of.
fn program_in(message: &str) -> Option<PathBuf> {
    let message: serde_json::Value = serde_json::from_str(message).ok()?;
    message["executable"].as_str().map(PathBuf::from)
}
