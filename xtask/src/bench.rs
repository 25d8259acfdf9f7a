//! `cargo xtask bench`: builds what is shipped, then measures it beside other servers.

use crate::commands::{cargo, show};
use anyhow::Result;

const PROFILE: [&str; 2] = ["--profile", "dist"];

/// `arguments` are those of `novastor-bench`; without any it compares all rows.
pub fn run(arguments: &[String]) -> Result<()> {
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
