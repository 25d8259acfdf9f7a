//! `novastor doctor`: one line for each thing the daemon needs of this host, with what to do about it.

use std::path::Path;

use super::Context;
use crate::config::{self, Config};
use crate::doctor::{Finding, State, examine};

pub fn run(context: &Context, file: Option<&Path>) -> anyhow::Result<()> {
    let default = Path::new(config::DEFAULT_FILE);
    let file = file.or_else(|| default.exists().then_some(default));
    let (config, problems): (Option<Config>, Vec<Finding>) = match config::load(file) {
        Ok(config) => (Some(config), vec![of_config(file)]),
        Err(error) => (
            None,
            error
                .0
                .iter()
                .map(|problem| {
                    Finding::fail("configuration", format!("{}: {}", problem.place, problem.message), "correct it there")
                })
                .collect(),
        ),
    };
    let mut findings = problems;
    findings.extend(examine(config.as_ref(), file.is_some()));
    let failed = findings.iter().filter(|finding| finding.state == State::Fail).count();
    context.output.print(&findings, |findings| findings.iter().map(Finding::line).collect::<Vec<_>>().join("\n"))?;
    match failed {
        0 => Ok(()),
        1 => Err(anyhow::anyhow!("one thing keeps the daemon from running here")),
        failed => Err(anyhow::anyhow!("{failed} things keep the daemon from running here")),
    }
}

fn of_config(file: Option<&Path>) -> Finding {
    match file {
        Some(file) => Finding::ok("configuration", format!("{} is valid", file.display())),
        None => Finding::ok("configuration", format!("there is none at {}; looked at the defaults", config::DEFAULT_FILE)),
    }
}
