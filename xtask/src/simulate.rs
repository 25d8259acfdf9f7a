//! `cargo xtask simulate`: searches the simulated world for crashes that break mapped volumes.

use crate::commands::{cargo, show};
use anyhow::Result;

/// `arguments` are those of the program `simulate`: `--seeds N`, `--seed FIRST`.
pub fn run(arguments: &[String]) -> Result<()> {
    simulate(&["--release"], arguments)
}

/// A few fresh seeds with the build of the tests, which is slower but there already.
pub fn run_briefly(seeds: u32) -> Result<()> {
    simulate(&[], &["--seeds".to_owned(), seeds.to_string()])
}

fn simulate(profile: &[&str], arguments: &[String]) -> Result<()> {
    let mut simulate = cargo();
    simulate.args(["run", "--quiet"]).args(profile);
    simulate.args(["-p", "volume", "--features", "simulation", "--bin", "simulate", "--"]);
    show(simulate.args(arguments))
}
