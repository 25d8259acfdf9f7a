//! Carries one answer from a thread that works to whoever polls for it, on any executor.

use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, Waker};

use parking_lot::Mutex;

use super::StoreError;

enum State<T> {
    Waiting(Option<Waker>),
    Answered(Result<T, StoreError>),
    Taken,
}

/// Where the answer is given. Dropped without one, it answers `Unknown`.
pub(super) struct Reply<T>(Arc<Mutex<State<T>>>);

/// Where the answer is awaited.
pub(super) struct Answer<T>(Arc<Mutex<State<T>>>);

pub(super) fn channel<T>() -> (Reply<T>, Answer<T>) {
    let shared = Arc::new(Mutex::new(State::Waiting(None)));
    (Reply(shared.clone()), Answer(shared))
}

impl<T> Reply<T> {
    pub(super) fn send(self, answer: Result<T, StoreError>) {
        self.settle(answer);
    }

    fn settle(&self, answer: Result<T, StoreError>) {
        let mut state = self.0.lock();
        if let State::Waiting(waker) = &mut *state {
            let waker = waker.take();
            *state = State::Answered(answer);
            drop(state);
            if let Some(waker) = waker {
                waker.wake();
            }
        }
    }
}

impl<T> Drop for Reply<T> {
    fn drop(&mut self) {
        self.settle(Err(StoreError::Unknown("the operation was given up before it ended".to_owned())));
    }
}

impl<T> Future for Answer<T> {
    type Output = Result<T, StoreError>;

    fn poll(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Self::Output> {
        let mut state = self.0.lock();
        match std::mem::replace(&mut *state, State::Taken) {
            State::Answered(answer) => Poll::Ready(answer),
            State::Waiting(_) => {
                *state = State::Waiting(Some(context.waker().clone()));
                Poll::Pending
            }
            State::Taken => Poll::Ready(Err(StoreError::Unknown("the answer was taken already".to_owned()))),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::segments::drive::block_on;

    #[test]
    fn an_answer_comes_from_another_thread() {
        let (reply, answer) = channel();
        let worker = std::thread::spawn(move || reply.send(Ok(7)));
        assert_eq!(block_on(answer), Ok(7));
        worker.join().unwrap();
    }

    #[test]
    fn a_lost_reply_is_unknown() {
        let (reply, answer) = channel::<()>();
        drop(reply);
        assert!(matches!(block_on(answer), Err(StoreError::Unknown(_))));
    }
}
