//! Whether an image's cluster answers: the last failure in words, and how long requests have been waiting.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use blockdev::clock;
use parking_lot::Mutex;

/// A cluster that has answered no request for this long, though some wait, is reported.
const SILENCE: Duration = Duration::from_secs(10);

pub(super) struct Health {
    started: Instant,
    failing: AtomicBool,
    last_error: Mutex<Option<String>>,
    queues: Mutex<Vec<Arc<Progress>>>,
}

/// What one queue has in flight. Written by its thread alone.
#[derive(Default)]
pub(super) struct Progress {
    in_flight: AtomicU64,
    /// When the last request completed, or the first of those in flight was submitted; nanoseconds since the device was opened.
    moved: AtomicU64,
}

impl Progress {
    fn move_to(&self, in_flight: u64, since_start: Duration) {
        self.moved.store(since_start.as_nanos() as u64, Ordering::Relaxed);
        self.in_flight.store(in_flight, Ordering::Relaxed);
    }
}

impl Health {
    pub(super) fn new() -> Health {
        Health {
            started: clock::monotonic(),
            failing: AtomicBool::new(false),
            last_error: Mutex::new(None),
            queues: Mutex::new(Vec::new()),
        }
    }

    /// The record of a new queue.
    pub(super) fn queue(&self) -> Arc<Progress> {
        let progress = Arc::new(Progress::default());
        let mut queues = self.queues.lock();
        queues.retain(|queue| Arc::strong_count(queue) > 1);
        queues.push(progress.clone());
        progress
    }

    /// A queue has `in_flight` requests from now on: one was submitted to an idle queue, or one completed.
    pub(super) fn moved(&self, queue: &Progress, in_flight: usize, now: Instant) {
        queue.move_to(in_flight as u64, now.saturating_duration_since(self.started));
    }

    pub(super) fn failed(&self, what: String) {
        *self.last_error.lock() = Some(what);
        self.failing.store(true, Ordering::Release);
    }

    /// A request was carried out.
    pub(super) fn succeeded(&self) {
        if self.failing.load(Ordering::Relaxed) {
            self.failing.store(false, Ordering::Release);
        }
    }

    /// `Some(why)` while the image does not work.
    pub(super) fn report(&self, now: Instant) -> Option<String> {
        if self.failing.load(Ordering::Acquire) {
            return self.last_error.lock().clone();
        }
        let now = now.saturating_duration_since(self.started);
        let waiting = |queue: &Arc<Progress>| {
            let moved = Duration::from_nanos(queue.moved.load(Ordering::Relaxed));
            (queue.in_flight.load(Ordering::Relaxed) > 0).then(|| now.saturating_sub(moved))
        };
        let longest = self.queues.lock().iter().filter_map(waiting).max()?;
        (longest >= SILENCE).then(|| format!("requests wait, and Ceph has completed none for {} s", longest.as_secs()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn silence_is_reported_only_while_requests_wait() {
        let health = Health::new();
        let queue = health.queue();
        let later = health.started + SILENCE * 2;
        assert_eq!(health.report(later), None);
        health.moved(&queue, 1, health.started + SILENCE);
        assert_eq!(health.report(later - Duration::from_secs(1)), None);
        assert!(health.report(later).is_some_and(|why| why.contains("for 10 s")));
        health.moved(&queue, 0, later);
        assert_eq!(health.report(later + SILENCE), None);
    }

    #[test]
    fn a_failure_lasts_until_something_succeeds() {
        let health = Health::new();
        health.failed("write of 4096 bytes at 0: timed out".into());
        assert!(health.report(health.started).is_some_and(|why| why.contains("timed out")));
        health.succeeded();
        assert_eq!(health.report(health.started), None);
    }
}
