//! Futures on a data-plane thread: the engine's environment where it is not simulated.

use std::cell::RefCell;
use std::future::poll_fn;
use std::rc::Rc;
use std::sync::{Arc, OnceLock};
use std::task::{Context, Poll, Wake, Waker};
use std::time::{Duration, Instant};

use blockdev::offload::Offload;
use blockdev::{Handler, HandlerId, Reactor, ReactorHandle, clock};
use parking_lot::Mutex;
use slab::Slab;

use crate::crypto::system_random;
use crate::environment::{Environment, LocalFuture};

const REDUCERS_COUNT: usize = 2;
/// Whoever waits for an answer comes first; a log that fills makes them wait for the reducers.
const REDUCERS_NICE: i32 = 10;

/// Runs tasks on one reactor, from [`Tasks::start`] until [`Tasks::end`].
pub(super) struct Tasks {
    reactor: Rc<Reactor>,
    id: HandlerId,
    /// `None`: is being polled right now.
    tasks: RefCell<Slab<Option<LocalFuture<'static, ()>>>>,
    timers: RefCell<Slab<Waker>>,
    ready: Arc<Ready>,
    began: Instant,
}

/// Tasks that are to be polled.
struct Ready {
    tasks: Mutex<Vec<usize>>,
    reactor: ReactorHandle,
    id: HandlerId,
}

struct TaskWaker {
    task: usize,
    ready: Arc<Ready>,
}

impl Wake for TaskWaker {
    fn wake(self: Arc<Self>) {
        self.ready.push(self.task);
    }
}

impl Ready {
    fn push(&self, task: usize) {
        let mut tasks = self.tasks.lock();
        tasks.push(task);
        if tasks.len() == 1 {
            self.reactor.post(self.id, 0, 0);
        }
    }
}

impl Tasks {
    pub(super) fn start(reactor: &Rc<Reactor>) -> Rc<Tasks> {
        reactor.install(|id| Tasks {
            reactor: reactor.clone(),
            id,
            tasks: RefCell::default(),
            timers: RefCell::default(),
            ready: Arc::new(Ready { tasks: Mutex::default(), reactor: reactor.handle(), id }),
            began: clock::monotonic(),
        })
    }

    /// Forgets all tasks, wherever they are.
    pub(super) fn end(&self) {
        self.reactor.unregister(self.id);
        drop(self.tasks.take());
        drop(self.timers.take());
    }

    fn run_ready(&self) {
        let ready = std::mem::take(&mut *self.ready.tasks.lock());
        for id in ready {
            let Some(mut task) = self.tasks.borrow_mut().get_mut(id).and_then(Option::take) else { continue };
            let waker = Waker::from(Arc::new(TaskWaker { task: id, ready: self.ready.clone() }));
            let polled = task.as_mut().poll(&mut Context::from_waker(&waker));
            let mut tasks = self.tasks.borrow_mut();
            match polled {
                Poll::Ready(()) => drop(tasks.try_remove(id)),
                Poll::Pending => {
                    if let Some(slot) = tasks.get_mut(id) {
                        *slot = Some(task);
                    }
                }
            }
        }
    }
}

impl Handler for Tasks {
    fn completed(&self, _token: u32, _result: i32, _flags: u32) {
        self.run_ready();
    }

    fn ready(&self) {}

    fn timer(&self, token: u32) {
        let waker = self.timers.borrow_mut().try_remove(token as usize);
        if let Some(waker) = waker {
            waker.wake();
        }
    }
}

enum Work {
    Running(Option<Waker>),
    Done,
}

/// The threads that make segments, shared by all volumes.
fn reducers() -> &'static Offload {
    static REDUCERS: OnceLock<Offload> = OnceLock::new();
    REDUCERS.get_or_init(|| Offload::start_nice("reduce", REDUCERS_COUNT, REDUCERS_NICE).expect("a thread can be started"))
}

/// The environment of an engine. A handle of its own, so that tasks do not keep what runs them.
pub(super) struct ReactorEnvironment(pub(super) std::rc::Weak<Tasks>);

impl Environment for ReactorEnvironment {
    fn now(&self) -> Duration {
        self.0.upgrade().map_or(Duration::MAX, |tasks| clock::monotonic().duration_since(tasks.began))
    }

    fn sleep(&self, duration: Duration) -> LocalFuture<'static, ()> {
        let until = clock::monotonic() + duration;
        let tasks = self.0.clone();
        Box::pin(poll_fn(move |context| {
            if clock::monotonic() >= until {
                return Poll::Ready(());
            }
            if let Some(tasks) = tasks.upgrade() {
                let timer = tasks.timers.borrow_mut().insert(context.waker().clone());
                tasks.reactor.set_timer(tasks.id, until, timer as u32);
            }
            Poll::Pending
        }))
    }

    fn random(&self, bytes: &mut [u8]) {
        system_random(bytes);
    }

    fn spawn(&self, task: LocalFuture<'static, ()>) {
        if let Some(tasks) = self.0.upgrade() {
            let id = tasks.tasks.borrow_mut().insert(Some(task));
            tasks.ready.push(id);
        }
    }

    fn offload(&self, work: Box<dyn FnOnce() + Send>) -> LocalFuture<'static, ()> {
        let state = Arc::new(Mutex::new(Work::Running(None)));
        let done = state.clone();
        reducers().run(move || {
            work();
            let before = std::mem::replace(&mut *done.lock(), Work::Done);
            if let Work::Running(Some(waker)) = before {
                waker.wake();
            }
        });
        Box::pin(poll_fn(move |context| match &mut *state.lock() {
            Work::Done => Poll::Ready(()),
            Work::Running(waker) => {
                *waker = Some(context.waker().clone());
                Poll::Pending
            }
        }))
    }
}
