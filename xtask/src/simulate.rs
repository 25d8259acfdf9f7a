//! `cargo xtask simulate`: searches the simulated world for crashes that break mapped volumes.

use crate::commands::{cargo, show};
use anyhow::{Context, Result};
use std::env;
use std::process::Command;

/// `arguments` are those of the program `simulate`: `--seeds N`, `--seed FIRST`.
pub fn run(arguments: &[String]) -> Result<()> {
    let mut simulate = cargo();
    simulate.args(["run", "--quiet", "--release", "-p", "volume", "--features", "simulation", "--bin", "simulate", "--"]);
    show(simulate.args(arguments))
}

/// A few fresh seeds with the build of the tests, which is slower but there already, beside this program.
pub fn run_briefly(seeds: u32) -> Result<()> {
    let program = env::current_exe().context("where this program is")?.with_file_name("simulate");
    show(Command::new(program).args(["--seeds", &seeds.to_string()]))
}
