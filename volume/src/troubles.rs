//! What a store does not take now, and since when. Whoever stores something tries for ever; this is what the volume says of it meanwhile.
//!
//! ```text
//!   publish, change of the root ── attempt ─▶ failed, failed … ─▶ stored (the attempt ends)
//!                                                │
//!                                    health: the attempt that has failed for longest
//! ```

use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;
use std::time::Duration;

use backends::segments::StoreError;

/// A store that does not answer is not worth a word before.
const SILENCE_MAX: Duration = Duration::from_secs(10);

/// Why a store takes nothing.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Trouble {
    /// By the clock of the volume's environment.
    pub since: Duration,
    pub error: StoreError,
}

/// The attempts of one volume that have failed and go on.
#[derive(Default)]
pub(crate) struct Troubles {
    next: Cell<u64>,
    failing: RefCell<BTreeMap<u64, Trouble>>,
}

/// One thing that is being stored. It is forgotten when dropped.
pub(crate) struct Attempt<'a> {
    troubles: &'a Troubles,
    number: u64,
}

impl Troubles {
    pub(crate) fn attempt(&self) -> Attempt<'_> {
        let number = self.next.replace(self.next.get() + 1);
        Attempt { troubles: self, number }
    }

    /// The one that has lasted longest, if any is worth telling.
    pub(crate) fn worst(&self, now: Duration) -> Option<Trouble> {
        let failing = self.failing.borrow();
        let is_told = |trouble: &&Trouble| {
            !matches!(trouble.error, StoreError::Unknown(_)) || now.saturating_sub(trouble.since) >= SILENCE_MAX
        };
        failing.values().filter(is_told).min_by_key(|trouble| trouble.since).cloned()
    }
}

impl Attempt<'_> {
    pub(crate) fn failed(&self, now: Duration, error: StoreError) {
        let mut failing = self.troubles.failing.borrow_mut();
        let since = failing.get(&self.number).map_or(now, |trouble| trouble.since);
        failing.insert(self.number, Trouble { since, error });
    }
}

impl Drop for Attempt<'_> {
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
        let full = || StoreError::NoSpace("full".into());
        let troubles = Troubles::default();
        let (first, other) = (troubles.attempt(), troubles.attempt());
        assert_eq!(troubles.worst(second(1)), None);
        other.failed(second(2), full());
        first.failed(second(1), StoreError::Unknown("no answer".into()));
        assert_eq!(troubles.worst(second(5)).unwrap().since, second(2), "silence is not told yet");
        first.failed(second(11), StoreError::Unknown("still no answer".into()));
        let worst = troubles.worst(second(11)).unwrap();
        assert_eq!((worst.since, worst.error.to_string().as_str()), (second(1), "still no answer"));
        drop(first);
        assert_eq!(troubles.worst(second(11)).unwrap().error, full());
        drop(other);
        assert_eq!(troubles.worst(second(99)), None);
    }
}
