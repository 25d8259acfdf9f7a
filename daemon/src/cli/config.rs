//! `novastor config`.

use std::path::Path;

use serde_json::json;

use super::Context;
use super::arguments::Config;
use super::output::line;
use crate::api::types::ReloadReport;
use crate::config::{self, DEFAULT_FILE, EXAMPLE};

pub fn run(context: &Context, command: Config) -> anyhow::Result<()> {
    match command {
        Config::Check { file, config } => {
            let file = file.or(config).unwrap_or_else(|| DEFAULT_FILE.into());
            check(context, &file)
        }
        Config::Schema => line(&serde_json::to_string_pretty(&config::json_schema())?),
        Config::Example => line(EXAMPLE.trim_end()),
        Config::Reload => {
            let report: ReloadReport = context.client()?.post("/v1/config/reload", &json!({}))?;
            context.output.print(&report, reload_text)
        }
    }
}

fn check(context: &Context, file: &Path) -> anyhow::Result<()> {
    let config = config::load(Some(file))?;
    let report = json!({ "file": file, "ok": true, "pools": config.pool.len(), "exports": config.export.len() });
    context
        .output
        .print(&report, |_| format!("{}: good (pools: {}, exports: {})", file.display(), config.pool.len(), config.export.len()))
}

fn reload_text(report: &ReloadReport) -> String {
    let changed = report.changed.iter().map(|change| format!("changed: {change}"));
    let later = report.needs_restart.iter().map(|key| format!("needs a restart: {key}"));
    let problems = report.problems.iter().map(|problem| format!("problem: {problem}"));
    let lines: Vec<String> = changed.chain(later).chain(problems).collect();
    if lines.is_empty() { "nothing changed".to_owned() } else { lines.join("\n") }
}
