//! The only place that reads a clock; everything else takes its time from here.

#![allow(clippy::disallowed_methods)]

use std::time::{Instant, SystemTime};

/// Monotonic time, for latencies and deadlines. On the data path prefer [`crate::Reactor::now`], which is read once a batch.
pub fn monotonic() -> Instant {
    Instant::now()
}

/// Calendar time, for what people read.
pub fn wall() -> SystemTime {
    SystemTime::now()
}
