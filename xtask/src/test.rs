//! `cargo xtask test`: from a plain clone to a verdict.
//!
//! ```text
//!   rigs ─▶ format, tidy ─▶ clippy ─▶ build ─▶ tests ─▶ simulated crashes ─▶ examples in docs ─▶ fuzz targets, briefly
//! ```
//!
//! Tests are told apart by the name of their file: `guest` in it boots guests, `ceph` starts a Ceph, `s3` an S3 server. Such
//! tests run one at a time (`.config/nextest.toml`), and `--quick` leaves them out.

use crate::rig::{self, Selection};
use crate::{commands, fuzz, simulate, tidy};
use anyhow::{Context, Result, bail};
use novastor_tests::rig::deadline::Deadline;
use novastor_tests::rig::tools;
use serde_json::Value;
use std::process::Command;
use std::time::Duration;

const SLOW: [&str; 3] = ["guest", "ceph", "s3"];
const FUZZ_SECONDS: u32 = 20;
const SEEDS: u32 = 2000;
/// What is built, at once and with all of it in view: asked for by themselves, programs would get fewer features of third-party crates than tests, and
/// be built twice.
const PROGRAMS: [&str; 3] = ["--lib", "--bins", "--tests"];
/// Tests let the backend fail; builds that are shipped cannot.
const FEATURES: [&str; 2] = ["--features", "novastor/fault-injection,volume/simulation"];

pub fn run(quick: bool) -> Result<()> {
    let clock = Deadline::after(Duration::MAX);
    let stage = |name: &str| println!("\n── {name} ({:.0} s since start)", clock.elapsed().as_secs_f64());

    stage("rigs");
    if quick {
        rig::install(Selection::Tools)?;
        rig::install(Selection::Qemu)?;
    } else {
        rig::install(Selection::All)?;
    }
    stage("style");
    cargo(&["fmt", "--all", "--check"])?;
    tidy::run()?;
    cargo(&[&["clippy", "--workspace", "--all-targets"], &FEATURES[..], &["--", "-D", "warnings"]].concat())?;
    stage("build");
    // Some tests start an example and kill it.
    cargo(&[&["build", "--workspace", "--examples"], &PROGRAMS[..], &FEATURES[..]].concat())?;
    stage("tests");
    run_tests(quick)?;
    stage("simulated crashes");
    simulate::run_briefly(SEEDS)?;
    if !quick {
        stage("examples in the documentation");
        cargo(&[&["test", "--workspace", "--doc"], &FEATURES[..]].concat())?;
        stage("fuzz targets");
        fuzz::run(FUZZ_SECONDS)?;
    }
    let left_out = if quick { "; guests, Ceph, S3, examples in docs and fuzz targets were left out" } else { "" };
    println!("\nall tests passed in {:.1} min{left_out}", clock.elapsed().as_secs_f64() / 60.0);
    Ok(())
}

fn cargo(arguments: &[&str]) -> Result<()> {
    commands::show(commands::cargo().args(arguments))
}

fn run_tests(quick: bool) -> Result<()> {
    if tools::find("cargo-nextest").is_none() {
        println!("cargo-nextest is not installed: running the tests one file at a time");
        return run_plainly(quick);
    }
    let filter = SLOW.map(|word| format!("binary(/{word}/)")).join(" + ");
    let mut nextest = commands::cargo();
    nextest.args(["nextest", "run", "--workspace", "--no-fail-fast"]).args(PROGRAMS).args(FEATURES);
    if quick {
        nextest.args(["--filterset", &format!("not ({filter})")]);
    }
    commands::show(&mut nextest)
}

/// Without cargo-nextest: builds all test programs, then runs those wanted, one after another.
fn run_plainly(quick: bool) -> Result<()> {
    let mut build = commands::cargo();
    build.args(["test", "--workspace", "--no-run", "--message-format", "json"]).args(PROGRAMS).args(FEATURES);
    let messages = String::from_utf8(commands::output(&mut build)?).context("cargo's messages")?;
    let mut failed = Vec::new();
    for message in messages.lines() {
        let message: Value = serde_json::from_str(message)?;
        let (Some(name), Some(program)) = (message["target"]["name"].as_str(), message["executable"].as_str()) else {
            continue;
        };
        let is_slow = SLOW.iter().any(|word| name.contains(word));
        if message["profile"]["test"] != true || (quick && is_slow) {
            continue;
        }
        let manifest = message["manifest_path"].as_str().context("a target without a package")?;
        let mut test = Command::new(program);
        test.current_dir(manifest.trim_end_matches("Cargo.toml"));
        if is_slow {
            test.args(["--test-threads", "1"]);
        }
        if commands::show(&mut test).is_err() {
            failed.push(name.to_owned());
        }
    }
    if !failed.is_empty() {
        bail!("tests failed in {}", failed.join(", "));
    }
    Ok(())
}
