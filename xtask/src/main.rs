//! `cargo xtask`: every chore of the project, in Rust, from a plain clone.
//!
//! ```text
//!   cargo xtask rig install [qemu|tools|guest|ceph|s3|all] what the tests need on this machine
//!   cargo xtask test [--quick]                             all of it: rigs, build, style, tests
//!   cargo xtask tidy                                       style rules no compiler knows
//!   cargo xtask fuzz [--seconds N]                         each fuzz target for a while
//!   cargo xtask simulate [--seeds N] [--seed FIRST]        crashes of mapped volumes, by chance or again
//!   cargo xtask dataset DIR                                images of cloned machines, to measure reduction with
//!   cargo xtask bench [compare --rows REGEX …]             novastor beside other servers
//!   cargo xtask bench reduction --dataset DIR              what is stored of the images, beside qcow2
//!   cargo xtask bench speed [MIB]                          how fast one thread reduces and decodes
//!   cargo xtask bench mapped [--rows REGEX …]              a mapped volume beside a raw one
//!   cargo xtask bench engine [ROW…|images DATASET]         a mapped volume against what it is meant to reach
//! ```

mod bench;
mod commands;
mod dataset;
mod fuzz;
mod rig;
mod simulate;
mod test;
mod tidy;

use anyhow::Result;
use clap::{Parser, Subcommand};
use rig::Selection;
use std::path::PathBuf;
use std::process::ExitCode;

#[derive(Debug, Parser)]
#[command(name = "cargo xtask", about = "The chores of novastor")]
struct Arguments {
    #[command(subcommand)]
    task: Task,
}

#[derive(Debug, Subcommand)]
enum Task {
    /// Test rigs: guests, servers and tools around novastor
    Rig {
        #[command(subcommand)]
        action: RigAction,
    },
    /// Install the rigs, build everything, check style, run every test
    Test {
        /// Leave out what boots guests or starts Ceph
        #[arg(long)]
        quick: bool,
    },
    /// Check the style rules
    Tidy,
    /// Run each fuzz target for a while
    Fuzz {
        /// How long each target runs
        #[arg(long, default_value_t = 60)]
        seconds: u32,
    },
    /// Run mapped volumes in a simulated world that crashes
    Simulate {
        /// `--seeds N`: how many schedules; `--seed FIRST`: the first one, a fresh one by default
        #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
        arguments: Vec<String>,
    },
    /// Make images of machines that were cloned and went different ways (fresh Debian 12, as root)
    Dataset {
        /// Where the images and what they are made of are kept
        folder: PathBuf,
    },
    /// Build the shipped binary and measure it beside other servers, or what is stored of images
    Bench {
        /// What `novastor-bench` is asked to do; all rows of `compare` by default
        #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
        arguments: Vec<String>,
    },
}

#[derive(Debug, Subcommand)]
enum RigAction {
    /// Install what the tests need (fresh Debian 12 with Rust, as root)
    Install {
        #[arg(value_enum, default_value = "all")]
        what: Selection,
    },
}

fn main() -> ExitCode {
    match run(Arguments::parse().task) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(task: Task) -> Result<()> {
    match task {
        Task::Rig { action: RigAction::Install { what } } => rig::install(what),
        Task::Test { quick } => test::run(quick),
        Task::Tidy => tidy::run(),
        Task::Fuzz { seconds } => fuzz::run(seconds),
        Task::Simulate { arguments } => simulate::run(&arguments),
        Task::Dataset { folder } => dataset::run(&folder),
        Task::Bench { arguments } => bench::run(&arguments),
    }
}
