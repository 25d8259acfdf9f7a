//! `cargo xtask`: every chore of the project, in Rust, from a plain clone.
//!
//! ```text
//!   cargo xtask rig install [qemu|tools|guest|ceph|all]    what the tests need on this machine
//!   cargo xtask test [--quick]                             all of it: rigs, build, style, tests
//!   cargo xtask tidy                                       style rules no compiler knows
//!   cargo xtask fuzz [--seconds N]                         each fuzz target for a while
//!   cargo xtask bench [compare --rows REGEX …]             novastor beside other servers
//! ```

mod bench;
mod commands;
mod fuzz;
mod rig;
mod test;
mod tidy;

use anyhow::Result;
use clap::{Parser, Subcommand};
use rig::Selection;
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
    /// Build the shipped binary and measure it beside other servers
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
        Task::Bench { arguments } => bench::run(&arguments),
    }
}
