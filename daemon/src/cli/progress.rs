//! How far long work is: a bar on a terminal, lines in a log, JSON for programs; on the error output, so that the result alone is
//! on the other.

use std::io::{IsTerminal, Write};
use std::time::{Duration, Instant};

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use serde_json::json;

use super::output::Output;
use crate::units::{format_rate, format_size};

/// Between lines of a log.
const LINES: Duration = Duration::from_secs(5);
/// Between JSON objects.
const OBJECTS: Duration = Duration::from_secs(1);

pub struct Progress {
    what: String,
    total: u64,
    began: Instant,
    told: Instant,
    form: Form,
}

enum Form {
    Bar(ProgressBar),
    Lines,
    Json,
    Nothing,
}

impl Progress {
    pub fn new(output: Output, what: &str, total: u64) -> Progress {
        let form = match (output.json, output.quiet) {
            (true, _) => Form::Json,
            (false, true) => Form::Nothing,
            _ if std::io::stderr().is_terminal() => Form::Bar(bar(what, total)),
            _ => Form::Lines,
        };
        let now = blockdev::clock::monotonic();
        Progress { what: what.to_owned(), total, began: now, told: now, form }
    }

    /// Shows that `done` bytes are dealt with.
    pub fn show(&mut self, done: u64) {
        let now = blockdev::clock::monotonic();
        let quiet_for = now.saturating_duration_since(self.told);
        match &self.form {
            Form::Bar(bar) => bar.set_position(done),
            Form::Lines if quiet_for >= LINES => self.line(done),
            Form::Json if quiet_for >= OBJECTS => self.object(done),
            _ => return,
        }
        self.told = now;
    }

    /// Takes the bar away.
    pub fn end(&self) {
        if let Form::Bar(bar) = &self.form {
            bar.finish_and_clear();
        }
    }

    fn line(&self, done: u64) {
        let elapsed = blockdev::clock::monotonic().saturating_duration_since(self.began).as_secs_f64();
        let percent = if self.total == 0 { 100.0 } else { done as f64 * 100.0 / self.total as f64 };
        let (done_text, total) = (format_size(done), format_size(self.total));
        let rate = format_rate(done as f64 / elapsed.max(0.001));
        let _ = writeln!(std::io::stderr(), "{}: {done_text} of {total} ({percent:.0}%), {rate}", self.what);
    }

    fn object(&self, done: u64) {
        let object = json!({ "progress": { "what": self.what, "done": done, "total": self.total } });
        let _ = writeln!(std::io::stderr(), "{object}");
    }
}

fn bar(what: &str, total: u64) -> ProgressBar {
    let bar = ProgressBar::with_draw_target(Some(total), ProgressDrawTarget::stderr_with_hz(5));
    let template = "{msg} [{bar:30}] {percent}% of {binary_total_bytes}, {binary_bytes_per_sec}, {eta} to go";
    if let Ok(style) = ProgressStyle::with_template(template) {
        bar.set_style(style.progress_chars("=> "));
    }
    bar.set_message(what.to_owned());
    bar
}
