//! Limits on waiting for real processes.
//!
//! A deadline only turns a hang into a failure: it is always generous, and nothing is measured against it.

use std::thread;
use std::time::{Duration, Instant};

/// How long to sleep between two looks at something that cannot be waited for.
const POLL: Duration = Duration::from_millis(10);

/// A point in time after which waiting is given up.
#[derive(Debug, Clone, Copy)]
pub struct Deadline {
    start: Instant,
    limit: Duration,
}

impl Deadline {
    #[expect(
        clippy::disallowed_methods,
        reason = "real processes run on real time; a replaced clock would never reach a deadline"
    )]
    fn now() -> Instant {
        Instant::now()
    }

    pub fn after(limit: Duration) -> Self {
        Self { start: Self::now(), limit }
    }

    pub fn elapsed(&self) -> Duration {
        Self::now().saturating_duration_since(self.start)
    }

    pub fn remaining(&self) -> Duration {
        self.limit.saturating_sub(self.elapsed())
    }

    pub fn has_passed(&self) -> bool {
        self.remaining().is_zero()
    }

    /// Sleeps briefly; false once the deadline has passed.
    pub fn pause(&self) -> bool {
        if self.has_passed() {
            return false;
        }
        thread::sleep(POLL);
        true
    }
}
