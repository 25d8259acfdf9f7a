//! Waiting within one thread: a condition that others change, and an answer that comes once.

use std::cell::{Cell, RefCell};
use std::future::poll_fn;
use std::rc::Rc;
use std::task::{Poll, Waker};

/// Wakes whoever waits for a condition that may have changed.
#[derive(Default)]
pub(crate) struct Signal {
    waiting: RefCell<Vec<Waker>>,
}

impl Signal {
    pub(crate) fn notify(&self) {
        let waiting = std::mem::take(&mut *self.waiting.borrow_mut());
        waiting.into_iter().for_each(Waker::wake);
    }

    /// Completes with what `condition` finds. It is asked now and after each [`Signal::notify`].
    pub(crate) async fn wait_for<T>(&self, mut condition: impl FnMut() -> Option<T>) -> T {
        poll_fn(|context| match condition() {
            Some(value) => Poll::Ready(value),
            None => {
                self.waiting.borrow_mut().push(context.waker().clone());
                Poll::Pending
            }
        })
        .await
    }
}

/// Lets others go on first.
pub(crate) async fn give_way() {
    let mut has_waited = false;
    poll_fn(|context| {
        if std::mem::replace(&mut has_waited, true) {
            return Poll::Ready(());
        }
        context.waker().wake_by_ref();
        Poll::Pending
    })
    .await;
}

/// The two ends of one answer.
pub(crate) fn answer<T>() -> (Asked<T>, Answer<T>) {
    let cell = Rc::new(AnswerCell { value: Cell::new(None), waker: Cell::new(None) });
    (Asked(End::Cell(cell.clone())), Answer(cell))
}

struct AnswerCell<T> {
    value: Cell<Option<T>>,
    waker: Cell<Option<Waker>>,
}

/// The end that gives the answer.
pub(crate) struct Asked<T>(End<T>);

enum End<T> {
    Cell(Rc<AnswerCell<T>>),
    Call(Box<dyn FnOnce(T)>),
}

/// The end that waits for it.
pub(crate) struct Answer<T>(Rc<AnswerCell<T>>);

impl<T> Asked<T> {
    /// An end whose answer nobody waits for: `then` is called with it.
    pub(crate) fn call(then: impl FnOnce(T) + 'static) -> Asked<T> {
        Asked(End::Call(Box::new(then)))
    }

    pub(crate) fn give(self, value: T) {
        match self.0 {
            End::Call(then) => then(value),
            End::Cell(cell) => {
                cell.value.set(Some(value));
                if let Some(waker) = cell.waker.take() {
                    waker.wake();
                }
            }
        }
    }
}

impl<T> Answer<T> {
    /// Never completes if the other end was dropped.
    pub(crate) async fn get(self) -> T {
        poll_fn(|context| match self.0.value.take() {
            Some(value) => Poll::Ready(value),
            None => {
                self.0.waker.set(Some(context.waker().clone()));
                Poll::Pending
            }
        })
        .await
    }
}

/// Held by one task at a time.
#[derive(Default)]
pub(crate) struct Lock {
    is_held: Cell<bool>,
    freed: Signal,
}

/// The right to go on alone, until it is dropped.
pub(crate) struct Held<'a>(&'a Lock);

impl Lock {
    pub(crate) async fn hold(&self) -> Held<'_> {
        self.freed.wait_for(|| (!self.is_held.replace(true)).then_some(())).await;
        Held(self)
    }
}

impl Drop for Held<'_> {
    fn drop(&mut self) {
        self.0.is_held.set(false);
        self.0.freed.notify();
    }
}
