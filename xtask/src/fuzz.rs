//! Runs the fuzz targets of fuzz/ for a while each, without cargo-fuzz: it is cargo with the right flags.
//!
//! The committed corpus is read, never written; a crash leaves its input in fuzz/artifacts and fails the run.

use crate::commands;
use anyhow::{Context, Result};
use novastor_tests::rig::scratch::{self, workspace_root};
use serde_json::Value;
use std::fs;
use std::path::Path;
use std::process::Command;

const PLATFORM: &str = "x86_64-unknown-linux-gnu";
/// Coverage for libFuzzer, and the address sanitizer; both are unstable, hence the bootstrap variable below.
const FLAGS: &str = "--cfg fuzzing -Cpasses=sancov-module -Cllvm-args=-sanitizer-coverage-level=4 \
    -Cllvm-args=-sanitizer-coverage-inline-8bit-counters -Cllvm-args=-sanitizer-coverage-pc-table \
    -Cllvm-args=-sanitizer-coverage-trace-compares -Zsanitizer=address -Ccodegen-units=1";

pub fn run(seconds: u32) -> Result<()> {
    let folder = workspace_root().join("fuzz");
    let manifest = folder.join("Cargo.toml");
    if !manifest.exists() {
        println!("fuzz: there are no targets");
        return Ok(());
    }
    let targets = targets(&manifest)?;
    let mut build = commands::cargo();
    build.env("RUSTC_BOOTSTRAP", "1").env("RUSTFLAGS", FLAGS);
    build.args(["build", "--locked", "--release", "--bins", "--target", PLATFORM, "--manifest-path"]).arg(&manifest);
    build.arg("--target-dir").arg(folder.join("target"));
    commands::show(&mut build)?;
    for target in &targets {
        fuzz(&folder, target, seconds)?;
    }
    Ok(())
}

fn targets(manifest: &Path) -> Result<Vec<String>> {
    let mut metadata = commands::cargo();
    metadata.args(["metadata", "--no-deps", "--format-version", "1", "--manifest-path"]).arg(manifest);
    let metadata: Value = serde_json::from_slice(&commands::output(&mut metadata)?)?;
    let all = metadata["packages"][0]["targets"].as_array().context("cargo metadata shows no targets")?;
    let programs = all.iter().filter(|target| target["kind"][0] == "bin");
    Ok(programs.filter_map(|target| target["name"].as_str().map(str::to_owned)).collect())
}

fn fuzz(folder: &Path, target: &str, seconds: u32) -> Result<()> {
    println!("fuzz: {target} for {seconds} s");
    let (corpus, artifacts) = (folder.join("corpus").join(target), folder.join("artifacts").join(target));
    for path in [&corpus, &artifacts] {
        fs::create_dir_all(path).with_context(|| format!("creating {}", path.display()))?;
    }
    // libFuzzer adds what it finds to the first folder.
    let found = scratch::short_dir()?;
    let mut program = Command::new(folder.join("target").join(PLATFORM).join("release").join(target));
    program.arg(format!("-max_total_time={seconds}")).arg("-print_final_stats=1");
    program.arg(format!("-artifact_prefix={}/", artifacts.display()));
    commands::output(program.arg(found.path()).arg(&corpus)).with_context(|| format!("fuzz target {target}"))?;
    Ok(())
}
