//! A world of its own: tasks, pending operations and time, all moved on by one seed.
//!
//! ```text
//!   step: poll a ready task, or let one pending operation happen; when there is neither, time jumps to the next timer
//!   kill: the tasks of a process vanish; each of its pending operations learns that, and decides what it still does
//!   pause: a process stands still, and its pending operations with it, until it is resumed
//! ```
//!
//! One thread, one random number generator: the same seed gives the same steps, always.

use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;
use std::future::poll_fn;
use std::rc::Rc;
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context, Poll, Wake, Waker};
use std::time::Duration;

use crate::environment::{Environment, LocalFuture};
use crate::signal::answer;
#[cfg(test)]
use crate::simulation::digest;

/// Random numbers from a seed (SplitMix64).
#[derive(Debug)]
pub struct Random(Cell<u64>);

impl Random {
    pub fn new(seed: u64) -> Random {
        Random(Cell::new(seed))
    }

    pub fn number(&self) -> u64 {
        let state = self.0.get().wrapping_add(0x9e37_79b9_7f4a_7c15);
        self.0.set(state);
        let mixed = (state ^ (state >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ (mixed >> 31)
    }

    /// Less than `limit`, which is not 0.
    pub fn below(&self, limit: u64) -> u64 {
        self.number() % limit
    }

    /// True so many times out of a thousand.
    pub fn per_mille(&self, share: u64) -> bool {
        self.below(1000) < share
    }
}

/// What has not ended after so many steps never will.
pub const PATIENCE: u64 = 2_000_000;

/// A process of the simulated world; 0 is nobody.
pub type ProcessId = u64;

/// Operations that outlive every process.
pub const NOBODY: ProcessId = 0;

/// How a pending operation ends.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Fate {
    Happens,
    /// The process that wants it is dead.
    ProcessDied,
}

struct Operation {
    process: ProcessId,
    run: Box<dyn FnOnce(Fate)>,
}

struct Task {
    process: ProcessId,
    future: LocalFuture<'static, ()>,
}

struct Timer {
    process: ProcessId,
    at: Duration,
    waker: Waker,
}

/// A process that stands still.
#[cfg(test)]
pub struct Paused {
    tasks: Vec<(u64, Task)>,
    operations: Vec<Operation>,
    timers: Vec<Timer>,
}

#[derive(Default)]
struct Ready(Mutex<Vec<u64>>);

struct TaskWaker {
    task: u64,
    ready: Arc<Ready>,
}

impl Wake for TaskWaker {
    fn wake(self: Arc<Self>) {
        let mut ready = self.ready.0.lock().unwrap_or_else(PoisonError::into_inner);
        if !ready.contains(&self.task) {
            ready.push(self.task);
        }
    }
}

/// The world.
pub struct World {
    pub random: Random,
    now: Cell<Duration>,
    next_id: Cell<u64>,
    tasks: RefCell<BTreeMap<u64, Task>>,
    ready: Arc<Ready>,
    operations: RefCell<Vec<Operation>>,
    timers: RefCell<Vec<Timer>>,
}

impl World {
    pub fn new(seed: u64) -> Rc<World> {
        Rc::new(World {
            random: Random::new(seed),
            now: Cell::new(Duration::from_secs(1)),
            next_id: Cell::new(1),
            tasks: RefCell::default(),
            ready: Arc::default(),
            operations: RefCell::default(),
            timers: RefCell::default(),
        })
    }

    pub fn new_process(&self) -> ProcessId {
        let id = self.next_id.get();
        self.next_id.set(id + 1);
        id
    }

    pub fn spawn(&self, process: ProcessId, future: LocalFuture<'static, ()>) {
        let task = self.new_process();
        self.tasks.borrow_mut().insert(task, Task { process, future });
        Arc::new(TaskWaker { task, ready: self.ready.clone() }).wake();
    }

    /// Something that happens later, in any order with everything else. `run` gives the answer, or none if nobody is to hear of it.
    pub fn operation<T: 'static>(
        &self,
        process: ProcessId,
        run: impl FnOnce(Fate) -> Option<T> + 'static,
    ) -> LocalFuture<'static, T> {
        let (asked, answer) = answer();
        let run = Box::new(move |fate| {
            if let Some(value) = run(fate) {
                asked.give(value);
            }
        });
        self.operations.borrow_mut().push(Operation { process, run });
        Box::pin(answer.get())
    }

    /// Something that happens later and that nobody waits for.
    pub fn loose_operation(&self, run: impl FnOnce() + 'static) {
        self.operations.borrow_mut().push(Operation { process: NOBODY, run: Box::new(move |_| run()) });
    }

    /// Moves the world on by one step; false if nothing is left that could happen.
    pub fn step(&self) -> bool {
        let ready = self.ready_len();
        let operations = self.operations.borrow().len();
        if ready + operations == 0 {
            return self.jump_to_next_timer();
        }
        self.now.set(self.now.get() + Duration::from_micros(self.random.below(200)));
        self.fire_timers();
        let chosen = self.random.below((ready + operations) as u64) as usize;
        #[cfg(test)]
        digest::note(&[&self.now.get().as_nanos().to_le_bytes(), &[ready, operations, chosen].map(usize::to_le_bytes).concat()]);
        if chosen < ready {
            self.poll_ready(chosen);
        } else {
            let operation = self.operations.borrow_mut().swap_remove(chosen - ready);
            (operation.run)(Fate::Happens);
        }
        true
    }

    /// Runs a task of a process to its end.
    pub fn wait_for<T: 'static>(&self, process: ProcessId, task: impl Future<Output = T> + 'static) -> Result<T, String> {
        let ended = Rc::new(Cell::new(None));
        let told = ended.clone();
        self.spawn(process, Box::pin(async move { told.set(Some(task.await)) }));
        for _ in 0..PATIENCE {
            match ended.take() {
                Some(result) => return Ok(result),
                None if !self.step() => return Err("nothing can happen any more: a wake-up was lost".into()),
                None => {}
            }
        }
        Err(format!("a task does not come to an end in {PATIENCE} steps"))
    }

    /// Nothing happens for so long, as when a machine was asleep.
    #[cfg(test)]
    pub fn jump(&self, time: Duration) {
        self.now.set(self.now.get() + time);
        self.fire_timers();
    }

    /// Whatever is under way happens. Nobody may be left who would begin more.
    pub fn settle(&self) {
        while let Some(operation) = self.take_operation() {
            (operation.run)(Fate::Happens);
        }
    }

    fn take_operation(&self) -> Option<Operation> {
        let count = self.operations.borrow().len() as u64;
        (count > 0).then(|| self.operations.borrow_mut().swap_remove(self.random.below(count) as usize))
    }

    /// The process is gone between two steps.
    pub fn kill(&self, process: ProcessId) {
        let doomed: Vec<u64> =
            self.tasks.borrow().iter().filter(|(_, task)| task.process == process).map(|(id, _)| *id).collect();
        for id in doomed {
            let task = self.tasks.borrow_mut().remove(&id);
            drop(task);
        }
        self.timers.borrow_mut().retain(|timer| timer.process != process);
        let (ours, others) = self.operations.take().into_iter().partition(|operation| operation.process == process);
        self.operations.replace(others);
        let ours: Vec<Operation> = ours;
        ours.into_iter().for_each(|operation| (operation.run)(Fate::ProcessDied));
    }

    /// The process stands still between two steps.
    #[cfg(test)]
    pub fn pause(&self, process: ProcessId) -> Paused {
        let (tasks, others) = self.tasks.take().into_iter().partition(|(_, task)| task.process == process);
        self.tasks.replace(others);
        let (operations, others) = self.operations.take().into_iter().partition(|operation| operation.process == process);
        self.operations.replace(others);
        let (timers, others) = self.timers.take().into_iter().partition(|timer| timer.process == process);
        self.timers.replace(others);
        let tasks: BTreeMap<u64, Task> = tasks;
        Paused { tasks: tasks.into_iter().collect(), operations, timers }
    }

    /// The process goes on. Its tasks are woken, as each may have been meanwhile.
    #[cfg(test)]
    pub fn resume(&self, paused: Paused) {
        let Paused { tasks, operations, timers } = paused;
        self.operations.borrow_mut().extend(operations);
        self.timers.borrow_mut().extend(timers);
        for (id, task) in tasks {
            self.tasks.borrow_mut().insert(id, task);
            Arc::new(TaskWaker { task: id, ready: self.ready.clone() }).wake();
        }
    }

    /// Everything that is under way is forgotten. Tasks hold the world that holds them, so without this neither would ever be freed.
    pub fn end(&self) {
        drop(self.tasks.take());
        drop(self.operations.take());
        drop(self.timers.take());
    }

    fn ready_len(&self) -> usize {
        self.ready.0.lock().unwrap_or_else(PoisonError::into_inner).len()
    }

    fn poll_ready(&self, index: usize) {
        let id = self.ready.0.lock().unwrap_or_else(PoisonError::into_inner).swap_remove(index);
        let Some(mut task) = self.tasks.borrow_mut().remove(&id) else { return };
        let waker = Waker::from(Arc::new(TaskWaker { task: id, ready: self.ready.clone() }));
        if task.future.as_mut().poll(&mut Context::from_waker(&waker)).is_pending() {
            self.tasks.borrow_mut().insert(id, task);
        }
    }

    fn fire_timers(&self) {
        let now = self.now.get();
        let mut timers = self.timers.borrow_mut();
        timers.retain(|timer| {
            let due = timer.at <= now;
            if due {
                timer.waker.wake_by_ref();
            }
            !due
        });
    }

    fn jump_to_next_timer(&self) -> bool {
        let Some(next) = self.timers.borrow().iter().map(|timer| timer.at).min() else { return false };
        self.now.set(self.now.get().max(next));
        self.fire_timers();
        true
    }
}

/// What a process of the world sees of it.
pub struct SimulatedEnvironment {
    pub world: Rc<World>,
    pub process: ProcessId,
}

impl Environment for SimulatedEnvironment {
    fn now(&self) -> Duration {
        self.world.now.get()
    }

    fn sleep(&self, duration: Duration) -> LocalFuture<'static, ()> {
        let (world, process) = (self.world.clone(), self.process);
        let at = world.now.get() + duration;
        Box::pin(poll_fn(move |context| {
            if world.now.get() >= at {
                return Poll::Ready(());
            }
            world.timers.borrow_mut().push(Timer { process, at, waker: context.waker().clone() });
            Poll::Pending
        }))
    }

    fn random(&self, bytes: &mut [u8]) {
        for part in bytes.chunks_mut(8) {
            let number = self.world.random.number().to_le_bytes();
            part.copy_from_slice(&number[..part.len()]);
        }
    }

    fn spawn(&self, task: LocalFuture<'static, ()>) {
        self.world.spawn(self.process, task);
    }

    fn offload(&self, work: Box<dyn FnOnce() + Send>) -> LocalFuture<'static, ()> {
        self.world.operation(self.process, move |fate| (fate == Fate::Happens).then(work))
    }
}
