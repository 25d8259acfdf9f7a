//! `cargo xtask bench`: builds what is shipped, then measures it beside other servers; or measures what is stored of images,
//! or a mapped volume by itself.

use crate::commands::{cargo, show};
use anyhow::Result;

const PROFILE: [&str; 2] = ["--profile", "dist"];

/// `arguments` are those of `novastor-bench`; without any it compares all rows.
pub fn run(arguments: &[String]) -> Result<()> {
    if arguments.first().is_some_and(|argument| argument == "reduction") {
        return reduction(arguments);
    }
    if arguments.first().is_some_and(|argument| argument == "engine") {
        return engine(&arguments[1..]);
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
    targets.args(["run", "--quiet", "--release", "-p", "volume", "--example", "targets", "--"]);
    show(targets.args(rows))
}
