//! Questions to one pool. Each is asked on another thread, so that nobody waits for a pool that hangs.
//!
//! Invariants: at most [`AT_ONCE_MAX`] threads ask; the other questions wait for one of them, as long as their askers do. While
//! [`OVERDUE_MAX`] questions are overdue, no other is asked.

use std::collections::{BTreeMap, VecDeque};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, mpsc};
use std::time::{Duration, Instant};

use blockdev::clock::monotonic;
use parking_lot::Mutex;

/// Threads that ask one pool.
const AT_ONCE_MAX: usize = 32;
/// Questions that a pool may leave unanswered for longer than anybody waits, before it is asked no more until it has answered.
const OVERDUE_MAX: usize = 4;

/// The questions to one pool.
pub struct Questions {
    /// How long a question may take before it counts as not answered.
    limit: Duration,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    next: u64,
    /// When each question was asked that is not answered.
    asked: BTreeMap<u64, Instant>,
    waiting: VecDeque<Waiting>,
}

struct Waiting {
    since: Instant,
    question: Box<dyn FnOnce() + Send>,
}

impl State {
    fn begin(&mut self, now: Instant) -> u64 {
        self.next += 1;
        self.asked.insert(self.next, now);
        self.next
    }
}

impl Questions {
    pub fn new(limit: Duration) -> Arc<Questions> {
        Arc::new(Questions { limit, state: Mutex::default() })
    }

    /// Asks. The answer may come late, or never; why it was not even asked, in words.
    pub fn ask<T: Send + 'static>(
        self: &Arc<Self>,
        question: impl FnOnce() -> T + Send + 'static,
    ) -> std::result::Result<mpsc::Receiver<T>, String> {
        let (sender, receiver) = mpsc::channel();
        let question = Box::new(move || {
            let _ = sender.send(question());
        });
        let now = monotonic();
        let mut state = self.state.lock();
        if state.asked.values().filter(|asked| now.duration_since(**asked) >= self.limit).count() >= OVERDUE_MAX {
            return Err(self.not_answered());
        }
        if state.asked.len() >= AT_ONCE_MAX {
            state.waiting.retain(|waiting| now.duration_since(waiting.since) < self.limit);
            state.waiting.push_back(Waiting { since: now, question });
            return Ok(receiver);
        }
        let id = state.begin(now);
        drop(state);
        let questions = self.clone();
        let asking = std::thread::Builder::new().name("question".to_owned()).spawn(move || questions.work(id, question));
        asking.map(|_| receiver).map_err(|error| {
            self.state.lock().asked.remove(&id);
            format!("no thread to ask it: {error}")
        })
    }

    /// That a question was not answered in time, in words.
    pub fn not_answered(&self) -> String {
        format!("the backend has not answered for {} s", self.limit.as_secs())
    }

    /// Asks this question, and those that wait.
    fn work(&self, mut id: u64, mut question: Box<dyn FnOnce() + Send>) {
        loop {
            // Whoever asked sees that there is no answer.
            let _ = catch_unwind(AssertUnwindSafe(question));
            let now = monotonic();
            let mut state = self.state.lock();
            state.asked.remove(&id);
            let next = loop {
                match state.waiting.pop_front() {
                    Some(waiting) if now.duration_since(waiting.since) >= self.limit => {}
                    next => break next,
                }
            };
            let Some(next) = next else { return };
            id = state.begin(now);
            question = next.question;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LONG: Duration = Duration::from_secs(30);

    #[test]
    fn any_number_is_answered_by_a_pool_that_answers() {
        let questions = Questions::new(LONG);
        let ask = |number| {
            let question = move || {
                std::thread::sleep(Duration::from_millis(10));
                number
            };
            questions.ask(question).unwrap()
        };
        let receivers: Vec<_> = (0..5 * AT_ONCE_MAX).map(ask).collect();
        assert!(questions.state.lock().asked.len() <= AT_ONCE_MAX);
        for (number, receiver) in receivers.into_iter().enumerate() {
            assert_eq!(receiver.recv_timeout(LONG), Ok(number));
        }
    }

    #[test]
    fn a_pool_that_hangs_is_asked_no_more_until_it_answers() {
        let limit = Duration::from_millis(50);
        let questions = Questions::new(limit);
        let hang = Arc::new(Mutex::new(()));
        let hanging = hang.lock();
        let ask = || {
            let hang = hang.clone();
            questions.ask(move || drop(hang.lock()))
        };
        let asked: Vec<_> = (0..2 * AT_ONCE_MAX).map(|_| ask()).collect();
        assert!(asked.iter().all(Result::is_ok), "nothing is overdue yet");
        assert_eq!(questions.state.lock().asked.len(), AT_ONCE_MAX, "threads");
        std::thread::sleep(limit);
        assert!(ask().is_err());
        drop(hanging);
        let end = monotonic() + LONG;
        while !questions.state.lock().asked.is_empty() {
            assert!(monotonic() < end);
            std::thread::sleep(Duration::from_millis(1));
        }
        assert!(ask().unwrap().recv_timeout(LONG).is_ok());
    }

    #[test]
    fn a_question_that_panics_is_not_answered_and_harms_no_other() {
        let questions = Questions::new(LONG);
        assert!(questions.ask(|| panic!("on purpose")).unwrap().recv_timeout(LONG).is_err());
        assert_eq!(questions.ask(|| 1).unwrap().recv_timeout(LONG), Ok(1));
    }
}
