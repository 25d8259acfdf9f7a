//! What a store does not take now, or the disk of the log, and since when. Whoever stores something tries for ever; this is what the volume says of it
//! meanwhile.
//!
//! ```text
//!   publish, change of the root ── attempt ─▶ failed, failed … ─▶ stored (the attempt ends)
//!                                                │
//!                                    health: the attempt that has failed for longest
//! ```

use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;
use std::fmt;
use std::rc::Rc;
use std::time::Duration;

use backends::segments::StoreError;
use blockdev::Errno;

/// A store that does not answer is not worth a word before.
const SILENCE_MAX: Duration = Duration::from_secs(10);

/// Why something is not stored.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Trouble {
    /// By the clock of the volume's environment.
    pub since: Duration,
    pub cause: Cause,
}

/// Who does not take something, and why.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Cause {
    Pool(StoreError),
    /// The disk of the local log is full.
    LogDisk(Errno),
}

impl Cause {
    fn is_silence(&self) -> bool {
        matches!(self, Cause::Pool(StoreError::Unknown(_)))
    }

    fn is_of_pool(&self) -> bool {
        matches!(self, Cause::Pool(_))
    }
}

impl fmt::Display for Cause {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Cause::Pool(error) => error.fmt(f),
            Cause::LogDisk(errno) => write!(f, "the disk of the local log is full: {errno}"),
        }
    }
}

/// The attempts of one volume that have failed and go on.
#[derive(Default)]
pub(crate) struct Troubles {
    next: Cell<u64>,
    failing: RefCell<BTreeMap<u64, Trouble>>,
}

/// One thing that is being stored. It is forgotten when dropped.
pub(crate) struct Attempt {
    troubles: Rc<Troubles>,
    number: u64,
}

impl Troubles {
    pub(crate) fn attempt(self: &Rc<Self>) -> Attempt {
        let number = self.next.replace(self.next.get() + 1);
        Attempt { troubles: self.clone(), number }
    }

    /// The one that has lasted longest, if any is worth telling.
    pub(crate) fn worst(&self, now: Duration) -> Option<Trouble> {
        self.worst_of(now, |_| true)
    }

    /// The same of those of the pool.
    pub(crate) fn worst_of_pool(&self, now: Duration) -> Option<Trouble> {
        self.worst_of(now, Cause::is_of_pool)
    }

    fn worst_of(&self, now: Duration, counts: impl Fn(&Cause) -> bool) -> Option<Trouble> {
        let failing = self.failing.borrow();
        let is_told = |trouble: &&Trouble| {
            counts(&trouble.cause) && (!trouble.cause.is_silence() || now.saturating_sub(trouble.since) >= SILENCE_MAX)
        };
        failing.values().filter(is_told).min_by_key(|trouble| trouble.since).cloned()
    }

    /// Whether the pool has no space for something.
    pub(crate) fn is_pool_full(&self) -> bool {
        self.failing.borrow().values().any(|trouble| matches!(trouble.cause, Cause::Pool(StoreError::NoSpace(_))))
    }
}

impl Attempt {
    pub(crate) fn failed(&self, now: Duration, cause: Cause) {
        let mut failing = self.troubles.failing.borrow_mut();
        let since = failing.get(&self.number).map_or(now, |trouble| trouble.since);
        failing.insert(self.number, Trouble { since, cause });
    }
}

impl Drop for Attempt {
    fn drop(&mut self) {
        self.troubles.failing.borrow_mut().remove(&self.number);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_longest_failure_is_told_until_its_attempt_ends() {
        let second = Duration::from_secs;
        let full = || Cause::Pool(StoreError::NoSpace("full".into()));
        let silence = |why: &str| Cause::Pool(StoreError::Unknown(why.into()));
        let troubles = Rc::new(Troubles::default());
        let (first, other) = (troubles.attempt(), troubles.attempt());
        assert_eq!(troubles.worst(second(1)), None);
        other.failed(second(2), full());
        first.failed(second(1), silence("no answer"));
        assert_eq!(troubles.worst(second(5)).unwrap().since, second(2), "silence is not told yet");
        first.failed(second(11), silence("still no answer"));
        let worst = troubles.worst(second(11)).unwrap();
        assert_eq!((worst.since, worst.cause.to_string().as_str()), (second(1), "still no answer"));
        drop(first);
        assert_eq!(troubles.worst(second(11)).unwrap().cause, full());
        assert!(troubles.is_pool_full());
        drop(other);
        assert_eq!(troubles.worst(second(99)), None);
    }

    #[test]
    fn a_full_disk_of_the_log_is_told_and_is_none_of_the_pool() {
        let second = Duration::from_secs;
        let troubles = Rc::new(Troubles::default());
        let (log, pool) = (troubles.attempt(), troubles.attempt());
        log.failed(second(1), Cause::LogDisk(Errno::ENOSPC));
        pool.failed(second(2), Cause::Pool(StoreError::Refused("access denied".into())));
        assert_eq!(troubles.worst(second(2)).unwrap().cause, Cause::LogDisk(Errno::ENOSPC));
        assert_eq!(troubles.worst_of_pool(second(2)).unwrap().since, second(2));
        assert!(!troubles.is_pool_full());
    }
}
