//! What a command prints: tables and sentences for people, JSON for programs.

use std::io::{IsTerminal, Write};

use comfy_table::{Cell, Table, presets};
use serde::Serialize;

use super::arguments::Usage;
use crate::api::reply::{ErrorBody, Listed};
use crate::api::types::Unanswered;
use crate::config::ConfigError;
use crate::error::{Error, ErrorKind};

/// A list was printed that is not complete.
#[derive(Debug, thiserror::Error)]
#[error("{error}")]
struct Incomplete {
    error: Error,
    unanswered: Vec<Unanswered>,
}

/// How to print.
#[derive(Clone, Copy)]
pub struct Output {
    pub json: bool,
    pub quiet: bool,
}

impl Output {
    /// Prints `value` as JSON, or what `text` makes of it.
    pub fn print<T: Serialize>(self, value: &T, text: impl FnOnce(&T) -> String) -> anyhow::Result<()> {
        if self.json {
            return line(&serde_json::to_string_pretty(value)?);
        }
        if self.quiet {
            return Ok(());
        }
        line(&text(value))
    }

    /// Prints what was found; fails if there may be more.
    pub fn print_list<T: Serialize>(self, listed: Listed<T>, text: impl FnOnce(&[T]) -> String) -> anyhow::Result<()> {
        self.print(&listed.found, |found| text(found))?;
        match listed.error() {
            None => Ok(()),
            Some(error) => Err(Incomplete { error, unanswered: listed.unanswered }.into()),
        }
    }

    /// Prints even with `-q`: what scripts need.
    pub fn print_id<T: Serialize>(self, value: &T, id: &str, text: impl FnOnce(&T) -> String) -> anyhow::Result<()> {
        if self.quiet && !self.json {
            return line(id);
        }
        self.print(value, text)
    }

    /// Reports the failure of the command, once.
    pub fn error(self, error: &anyhow::Error) {
        if self.json
            && let Ok(text) = serde_json::to_string_pretty(&body_of(error))
        {
            let _ = writeln!(std::io::stderr(), "{text}");
            return;
        }
        let _ = writeln!(std::io::stderr(), "novastor: {error:#}");
    }

    /// Asks before something is destroyed; without a terminal `--yes` is needed.
    pub fn confirm(self, yes: bool, question: &str) -> anyhow::Result<()> {
        if yes {
            return Ok(());
        }
        if !std::io::stdin().is_terminal() || !std::io::stderr().is_terminal() {
            return Err(Usage(format!("{question} Add --yes to do it without asking.")).into());
        }
        let _ = write!(std::io::stderr(), "{question} [y/N] ");
        let mut answer = String::new();
        std::io::stdin().read_line(&mut answer)?;
        if matches!(answer.trim(), "y" | "Y" | "yes") { Ok(()) } else { Err(anyhow::anyhow!("not done")) }
    }
}

fn body_of(error: &anyhow::Error) -> ErrorBody {
    if let Some(Incomplete { error, unanswered }) = error.downcast_ref() {
        return ErrorBody { error: error.clone(), unanswered: unanswered.clone() };
    }
    let own = error.downcast_ref::<Error>().cloned();
    let kind = if error.is::<Usage>() || error.is::<ConfigError>() { ErrorKind::Invalid } else { ErrorKind::Io };
    ErrorBody { error: own.unwrap_or_else(|| Error::new(kind, format!("{error:#}"))), unanswered: Vec::new() }
}

/// Prints one line; a closed pipe is no failure of ours to report.
pub fn line(text: &str) -> anyhow::Result<()> {
    let mut out = std::io::stdout().lock();
    match writeln!(out, "{text}").and_then(|()| out.flush()) {
        Err(error) if error.kind() == std::io::ErrorKind::BrokenPipe => std::process::exit(1),
        other => Ok(other?),
    }
}

/// Tells whoever started the daemon that exports accept.
pub fn ready() -> anyhow::Result<()> {
    // Whoever does not read it does not need it.
    let mut out = std::io::stdout().lock();
    let _ = writeln!(out, "ready").and_then(|()| out.flush());
    Ok(())
}

/// A plain table.
pub fn table<const N: usize>(head: [&str; N], rows: impl IntoIterator<Item = [String; N]>) -> String {
    let mut table = Table::new();
    table.load_style(presets::NOTHING);
    table.set_header(head.map(Cell::new));
    for row in rows {
        table.add_row(row.map(Cell::new));
    }
    trim_lines(&table.to_string())
}

/// Names and values, one a line; empty values are left out.
pub fn facts<const N: usize>(facts: [(&str, String); N]) -> String {
    let width = facts.iter().map(|(name, _)| name.len()).max().unwrap_or(0);
    let shown = facts.iter().filter(|(_, value)| !value.is_empty());
    shown.map(|(name, value)| format!("{name:width$}  {value}")).collect::<Vec<_>>().join("\n")
}

fn trim_lines(text: &str) -> String {
    text.lines().map(|line| line.strip_prefix(' ').unwrap_or(line).trim_end()).collect::<Vec<_>>().join("\n")
}
