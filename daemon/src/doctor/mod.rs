//! What the daemon needs of its host, looked at without changing anything.
//!
//! ```text
//!   system (kernel, io_uring, limits, /dev/shm) ─┐
//!   places (folders, sockets, ports, group) ─────┼─▶ Finding: ok | warn | fail, and the fix
//!   tools (QEMU, Ceph's libraries) ──────────────┘
//! ```
//!
//! `fail` means that the daemon would not start, or not serve what the configuration asks for; `warn`, that it would serve less,
//! or less well.

mod places;
mod system;
mod tools;

use std::fmt;

use serde::Serialize;

use crate::config::Config;

#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum State {
    Ok,
    Warn,
    Fail,
}

/// One thing that was looked at.
#[derive(Clone, Debug, Serialize)]
pub struct Finding {
    pub state: State,
    pub what: String,
    pub finding: String,
    /// What to do about it.
    pub fix: Option<String>,
}

impl Finding {
    pub fn ok(what: impl fmt::Display, finding: impl fmt::Display) -> Finding {
        Finding { state: State::Ok, what: what.to_string(), finding: finding.to_string(), fix: None }
    }

    pub fn warn(what: impl fmt::Display, finding: impl fmt::Display, fix: impl fmt::Display) -> Finding {
        Finding { state: State::Warn, fix: Some(fix.to_string()), ..Finding::ok(what, finding) }
    }

    pub fn fail(what: impl fmt::Display, finding: impl fmt::Display, fix: impl fmt::Display) -> Finding {
        Finding { state: State::Fail, fix: Some(fix.to_string()), ..Finding::ok(what, finding) }
    }

    /// `warn  memlock: 64K — …`
    pub fn line(&self) -> String {
        let state = match self.state {
            State::Ok => "ok  ",
            State::Warn => "warn",
            State::Fail => "fail",
        };
        let fix = self.fix.as_ref().map(|fix| format!(" — {fix}")).unwrap_or_default();
        format!("{state}  {}: {}{fix}", self.what, self.finding)
    }
}

/// Looks at everything; at the places of a configuration that was `named` as at things that must be right.
pub fn examine(config: Option<&Config>, named: bool) -> Vec<Finding> {
    let mut findings = system::examine();
    if let Some(config) = config {
        findings.extend(places::examine(config).into_iter().map(|finding| if named { finding } else { finding.softened() }));
    }
    findings.extend(tools::examine(config));
    findings
}

impl Finding {
    /// Of defaults that nobody chose: nothing there has to be right.
    fn softened(self) -> Finding {
        match self.state {
            State::Fail => Finding { state: State::Warn, ..self },
            _ => self,
        }
    }
}
