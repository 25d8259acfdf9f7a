//! How long a thread looks for work before it sleeps.
//!
//! A sleep that ended sooner than the longest spin was not worth it: the next spin is longer. A sleep that lasted longer means
//! spinning is wasted: the next one is shorter, down to none, so that idle volumes cost nothing.

use std::time::{Duration, Instant};

const FIRST: Duration = Duration::from_micros(4);

pub(super) struct Spin {
    longest: Duration,
    current: Duration,
    until: Instant,
}

impl Spin {
    pub(super) fn new(longest: Duration) -> Spin {
        Spin { longest, current: Duration::ZERO, until: crate::clock::monotonic() }
    }

    pub(super) fn worked(&mut self, now: Instant) {
        self.until = now + self.current;
    }

    pub(super) fn keeps_on(&self, now: Instant) -> bool {
        now < self.until
    }

    pub(super) fn slept(&mut self, from: Instant, to: Instant) {
        if to.duration_since(from) <= self.longest {
            self.current = (self.current * 2).max(FIRST).min(self.longest);
        } else {
            self.current /= 2;
            if self.current < FIRST {
                self.current = Duration::ZERO;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn grows_on_short_sleeps_and_vanishes_on_long_ones() {
        let start = crate::clock::monotonic();
        let mut spin = Spin::new(Duration::from_micros(32));
        spin.worked(start);
        assert!(!spin.keeps_on(start));
        for _ in 0..10 {
            spin.slept(start, start + Duration::from_micros(10));
        }
        spin.worked(start);
        assert!(spin.keeps_on(start + Duration::from_micros(31)));
        assert!(!spin.keeps_on(start + Duration::from_micros(32)));
        for _ in 0..10 {
            spin.slept(start, start + Duration::from_millis(1));
        }
        spin.worked(start);
        assert!(!spin.keeps_on(start));
    }
}
