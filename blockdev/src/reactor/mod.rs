//! The data-plane thread: one io_uring that carries kicks, sockets, file I/O, timers and wake-ups.
//!
//! ```text
//!   other threads ──ReactorHandle──▶ inbox ─┐
//!   kernel ───────completion queue──────────┤
//!   timers ─────────────────────────────────┼─▶ Handler::{completed, timer, ready, poll} ──▶ submission queue ──▶ kernel
//!   CompletionQueue::push ──ready list──────┘
//! ```
//!
//! One turn: inbox, completions, timers, ready handlers, pollers; then submit, and sleep in the kernel if nothing was done.
//! Before it sleeps the thread spins for a time that adapts itself: it grows when work came soon after falling asleep and
//! vanishes when it did not.
//!
//! Invariants: handlers are called only by this thread and never from inside one another; a handler's slot outlives its
//! kernel operations; nothing here blocks but the wait in the kernel, and small copies from and to files in memory (decision 6).

mod handle;
mod pinned;
mod spin;
mod thread;

use std::cell::{Cell, RefCell};
use std::cmp::Reverse;
use std::collections::{BinaryHeap, VecDeque};
use std::io;
use std::os::fd::AsRawFd;
use std::rc::Rc;
use std::sync::Arc;
use std::time::{Duration, Instant};

use io_uring::{IoUring, opcode, squeue, types};

use crate::buffer::BufferPool;
use crate::clock;
use handle::{Message, Shared};
use pinned::Pinned;
use spin::Spin;

pub use handle::ReactorHandle;
pub use pinned::{PINNED_AREA_MAX, PinId, PinOwner, Place};
pub use thread::{DataPlane, DataPlaneOptions};

const SUBMISSION_ENTRIES: u32 = 512;
const COMPLETION_ENTRIES: u32 = 4096;
/// Handed to the kernel together. It passes none of them on before it has prepared all: more would keep devices waiting.
const SUBMISSION_BATCH: usize = 4;
/// Dispatched in one turn: more would keep clients waiting for the first.
const COMPLETION_BATCH: usize = 16;
/// Bytes that drivers copy by themselves in one turn.
const COPIED_MAX: u64 = 4 << 20;
const WAKE_TOKEN: u64 = u64::MAX;
const IGNORED_TOKEN: u64 = u64::MAX - 1;
const BUFFER_BUDGET: usize = 512 << 20;
const BUFFER_RETAIN: usize = 32 << 20;

/// Something that lives on a reactor and is told of its events.
pub trait Handler {
    /// A kernel operation ended, or another thread posted a completion: `token` as submitted, `result` as the kernel gives it
    /// (negative: an error number), `flags` of the completion queue entry.
    fn completed(&self, token: u32, result: i32, flags: u32);
    /// [`Reactor::wake`] was called since the last time.
    fn ready(&self);
    /// A deadline set with [`Reactor::set_timer`] has passed.
    fn timer(&self, _token: u32) {}
    /// Looks for work that arrives without an event, such as a guest's ring; true if there was some.
    fn poll(&self) -> bool {
        false
    }
    /// Called once, just before the thread goes to sleep in the kernel, for handlers that poll: ask for events again. True if
    /// work was found meanwhile: then the thread does not sleep.
    fn before_sleep(&self) -> bool {
        false
    }
}

/// Names a handler on its reactor. Never reused while completions for it are outstanding.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Debug)]
pub struct HandlerId(u32);

impl HandlerId {
    fn new(index: usize, generation: u8) -> HandlerId {
        HandlerId((index as u32) << 8 | u32::from(generation))
    }
    fn index(self) -> usize {
        (self.0 >> 8) as usize
    }
    fn generation(self) -> u8 {
        self.0 as u8
    }
}

struct Slot {
    handler: Option<Rc<dyn Handler>>,
    generation: u8,
    in_flight: u32,
    woken: bool,
    polling: bool,
    closing: bool,
}

/// The event loop of one data-plane thread.
pub struct Reactor {
    ring: RefCell<IoUring>,
    slots: RefCell<Vec<Slot>>,
    free: RefCell<Vec<usize>>,
    ready: RefCell<VecDeque<HandlerId>>,
    pollers: RefCell<Vec<HandlerId>>,
    timers: RefCell<BinaryHeap<Reverse<(Instant, HandlerId, u32)>>>,
    now: Cell<Instant>,
    /// Bytes that may still be copied in this turn.
    copying_left: Cell<u64>,
    stopping: Cell<bool>,
    pinned: Pinned,
    buffers: Rc<BufferPool>,
    shared: Arc<Shared>,
    wake_value: Box<Cell<u64>>,
    spin: RefCell<Spin>,
}

impl Reactor {
    /// Must be called on the thread that will run it. `spin_max`: the longest the thread looks for work before it sleeps.
    pub fn new(spin_max: Duration) -> io::Result<Rc<Reactor>> {
        let ring = IoUring::builder()
            .setup_single_issuer()
            .setup_defer_taskrun()
            .setup_taskrun_flag()
            .setup_cqsize(COMPLETION_ENTRIES)
            .build(SUBMISSION_ENTRIES)?;
        let reactor = Rc::new(Reactor {
            ring: RefCell::new(ring),
            slots: RefCell::new(Vec::new()),
            free: RefCell::new(Vec::new()),
            ready: RefCell::new(VecDeque::new()),
            pollers: RefCell::new(Vec::new()),
            timers: RefCell::new(BinaryHeap::new()),
            now: Cell::new(clock::monotonic()),
            copying_left: Cell::new(COPIED_MAX),
            stopping: Cell::new(false),
            pinned: Pinned::default(),
            buffers: BufferPool::new(BUFFER_BUDGET, BUFFER_RETAIN),
            shared: Arc::new(Shared::new()?),
            wake_value: Box::new(Cell::new(0)),
            spin: RefCell::new(Spin::new(spin_max)),
        });
        reactor.watch_wake_event();
        Ok(reactor)
    }

    /// A handle for other threads.
    pub fn handle(&self) -> ReactorHandle {
        ReactorHandle::new(self.shared.clone())
    }

    /// The time at the start of this turn.
    pub fn now(&self) -> Instant {
        self.now.get()
    }

    /// This thread's buffers.
    pub fn buffers(&self) -> &Rc<BufferPool> {
        &self.buffers
    }

    pub fn register(&self, handler: Rc<dyn Handler>) -> HandlerId {
        let id = self.reserve();
        self.slots.borrow_mut()[id.index()].handler = Some(handler);
        id
    }

    /// Makes a handler that needs to know its id, and registers it.
    pub fn install<H: Handler + 'static>(&self, make: impl FnOnce(HandlerId) -> H) -> Rc<H> {
        let id = self.reserve();
        let handler = Rc::new(make(id));
        self.slots.borrow_mut()[id.index()].handler = Some(handler.clone());
        handler
    }

    fn reserve(&self) -> HandlerId {
        let index = self.free.borrow_mut().pop().unwrap_or_else(|| {
            let mut slots = self.slots.borrow_mut();
            slots.push(Slot { handler: None, generation: 0, in_flight: 0, woken: false, polling: false, closing: false });
            slots.len() - 1
        });
        HandlerId::new(index, self.slots.borrow()[index].generation)
    }

    /// Forgets a handler: it gets no more calls but `completed` for kernel operations still in flight, which keep it alive.
    pub fn unregister(&self, id: HandlerId) {
        self.set_polling(id, false);
        let removed = {
            let mut slots = self.slots.borrow_mut();
            match slots.get_mut(id.index()) {
                Some(slot) if slot.generation == id.generation() && !slot.closing => {
                    slot.closing = true;
                    self.remove_if_done(slot, id)
                }
                _ => None,
            }
        };
        drop(removed);
    }

    fn remove_if_done(&self, slot: &mut Slot, id: HandlerId) -> Option<Rc<dyn Handler>> {
        if !slot.closing || slot.in_flight > 0 {
            return None;
        }
        // A generation comes round again; a deadline may lie further ahead.
        self.timers.borrow_mut().retain(|Reverse((_, other, _))| *other != id);
        slot.generation = slot.generation.wrapping_add(1);
        slot.closing = false;
        slot.woken = false;
        self.free.borrow_mut().push(id.index());
        slot.handler.take()
    }

    /// Queues a kernel operation; its completion reaches `id` as `completed(token, …)`. It is handed to the kernel at the end
    /// of this turn.
    ///
    /// # Safety
    /// Everything `entry` points to (buffers, iovecs, paths) must stay valid until its last completion arrives; the handler
    /// stays registered until then by itself.
    pub unsafe fn submit(&self, id: HandlerId, token: u32, entry: squeue::Entry) {
        self.slots.borrow_mut()[id.index()].in_flight += 1;
        self.push(entry.user_data(u64::from(id.0) << 32 | u64::from(token)));
    }

    /// Operations not yet handed to the kernel.
    pub fn queued(&self) -> usize {
        self.ring.borrow_mut().submission().len()
    }

    /// True if a driver may copy so many bytes itself. No for the rest of a turn in which much was copied: then the kernel's
    /// workers do it, and the thread comes to its other work.
    pub fn may_copy(&self, bytes: u64) -> bool {
        let left = self.copying_left.get().checked_sub(bytes);
        self.copying_left.set(left.unwrap_or(self.copying_left.get()));
        left.is_some()
    }

    /// Hands what is queued to the kernel now rather than at the end of this turn.
    pub fn hand_over(&self) {
        hand_over(&self.ring.borrow());
    }

    /// Has the kernel hold on to the pages of an area of at most [`PINNED_AREA_MAX`] bytes, which transfers within it need not look up.
    /// Fails where the user may lock no more memory (`RLIMIT_MEMLOCK`).
    ///
    /// # Safety
    /// The area must stay mapped, readable and writable as long as `owner` lives.
    pub unsafe fn pin(&self, start: *mut u8, len: usize, owner: Rc<dyn PinOwner>) -> io::Result<PinId> {
        // SAFETY: the caller's promise.
        unsafe { self.pinned.pin(&self.ring.borrow(), start, len, owner) }
    }

    /// Lets go of an area, if it is still pinned. Transfers that the kernel was given already use it to their end.
    pub fn unpin(&self, id: PinId) {
        self.hand_over();
        self.pinned.unpin(&self.ring.borrow(), id);
    }

    /// An operation that reads into pinned memory; `None` if not all of `parts` lies in one area whose pages still count.
    pub fn read_pinned(&self, parts: &[libc::iovec], from: Place) -> Option<squeue::Entry> {
        self.pinned.read(&self.ring.borrow(), parts, from)
    }

    /// An operation that writes from pinned memory; `None` if not all of `parts` lies in one area whose pages still count.
    pub fn write_pinned(&self, parts: &[libc::iovec], to: Place) -> Option<squeue::Entry> {
        self.pinned.write(&self.ring.borrow(), parts, to)
    }

    /// Asks the kernel to cancel `id`'s operation `token`; it then completes with -ECANCELED, or as it would have.
    pub fn cancel(&self, id: HandlerId, token: u32) {
        let target = u64::from(id.0) << 32 | u64::from(token);
        self.push(opcode::AsyncCancel::new(target).build().user_data(IGNORED_TOKEN));
    }

    fn push(&self, entry: squeue::Entry) {
        let mut ring = self.ring.borrow_mut();
        loop {
            // SAFETY: entries come from `submit`, whose caller vouches for what they point to, or point to nothing.
            let pushed = unsafe { ring.submission().push(&entry) }.is_ok();
            if !pushed || ring.submission().len() >= SUBMISSION_BATCH {
                hand_over(&ring);
            }
            if pushed {
                return;
            }
        }
    }

    /// Has `ready` of the handler called later in this turn (once, however often it is woken).
    pub fn wake(&self, id: HandlerId) {
        let mut slots = self.slots.borrow_mut();
        if let Some(slot) = slots.get_mut(id.index())
            && slot.generation == id.generation()
            && !slot.woken
        {
            slot.woken = true;
            self.ready.borrow_mut().push_back(id);
        }
    }

    /// Has `timer(token)` of the handler called when `deadline` has passed. There is no cancelling: a handler ignores a timer
    /// it no longer wants.
    pub fn set_timer(&self, id: HandlerId, deadline: Instant, token: u32) {
        self.timers.borrow_mut().push(Reverse((deadline, id, token)));
    }

    /// Whether the handler's `poll` is called each turn while the thread is awake.
    pub fn set_polling(&self, id: HandlerId, polling: bool) {
        let mut slots = self.slots.borrow_mut();
        let Some(slot) = slots.get_mut(id.index()).filter(|slot| slot.generation == id.generation()) else { return };
        if slot.polling != polling {
            slot.polling = polling;
            let mut pollers = self.pollers.borrow_mut();
            if polling { pollers.push(id) } else { pollers.retain(|other| *other != id) }
        }
    }

    /// Ends [`Reactor::run`] after this turn.
    pub fn stop(&self) {
        self.stopping.set(true);
    }

    /// Runs until [`Reactor::stop`].
    pub fn run(self: &Rc<Self>) {
        while !self.stopping.get() {
            self.turn();
        }
        self.shared.stop();
    }

    fn turn(self: &Rc<Self>) {
        self.copying_left.set(COPIED_MAX);
        let worked = self.run_events();
        if worked {
            self.spin.borrow_mut().worked(self.now.get());
            self.enter(false);
            return;
        }
        let now = clock::monotonic();
        self.now.set(now);
        if self.spin.borrow().keeps_on(now) {
            self.enter(false);
            std::thread::yield_now();
            return;
        }
        if self.pollers_before_sleep() {
            return;
        }
        self.sleep();
    }

    fn run_events(self: &Rc<Self>) -> bool {
        let mut worked = self.run_inbox();
        worked |= self.run_completions();
        worked |= self.run_timers();
        worked |= self.run_ready();
        worked |= self.run_pollers();
        worked
    }

    fn touch_clock(&self, already_worked: bool) {
        if !already_worked {
            self.now.set(clock::monotonic());
        }
    }

    /// What has come so far: what this brings in, such as tasks that give way, waits for the next turn.
    fn run_inbox(self: &Rc<Self>) -> bool {
        let mut worked = false;
        for _ in 0..self.shared.inbox.len() {
            let Some(message) = self.shared.inbox.pop() else { break };
            self.touch_clock(worked);
            worked = true;
            match message {
                Message::Run(job) => job(self),
                Message::Completed { id, token, result } => {
                    if let Some(handler) = self.handler(id) {
                        handler.completed(token, result, 0);
                    }
                }
            }
        }
        worked
    }

    fn handler(&self, id: HandlerId) -> Option<Rc<dyn Handler>> {
        let slots = self.slots.borrow();
        slots.get(id.index()).filter(|slot| slot.generation == id.generation()).and_then(|slot| slot.handler.clone())
    }

    fn run_completions(self: &Rc<Self>) -> bool {
        let mut batch = [(0u64, 0i32, 0u32); COMPLETION_BATCH];
        let mut count = 0;
        {
            let mut ring = self.ring.borrow_mut();
            for entry in ring.completion().take(COMPLETION_BATCH) {
                batch[count] = (entry.user_data(), entry.result(), entry.flags());
                count += 1;
            }
        }
        self.touch_clock(count == 0);
        for &(user_data, result, flags) in &batch[..count] {
            self.dispatch(user_data, result, flags);
        }
        count > 0
    }

    fn dispatch(self: &Rc<Self>, user_data: u64, result: i32, flags: u32) {
        match user_data {
            WAKE_TOKEN => return self.watch_wake_event(),
            IGNORED_TOKEN => return,
            _ => {}
        }
        let id = HandlerId((user_data >> 32) as u32);
        let handler = {
            let mut slots = self.slots.borrow_mut();
            let slot = &mut slots[id.index()];
            if !io_uring::cqueue::more(flags) {
                slot.in_flight -= 1;
            }
            slot.handler.clone()
        };
        if let Some(handler) = handler {
            handler.completed(user_data as u32, result, flags);
        }
        let removed = {
            let mut slots = self.slots.borrow_mut();
            let slot = &mut slots[id.index()];
            if slot.generation == id.generation() { self.remove_if_done(slot, id) } else { None }
        };
        drop(removed);
    }

    fn run_timers(&self) -> bool {
        let mut worked = false;
        loop {
            let due = {
                let mut timers = self.timers.borrow_mut();
                match timers.peek() {
                    Some(Reverse((deadline, ..))) if *deadline <= self.now.get() => timers.pop(),
                    _ => None,
                }
            };
            let Some(Reverse((_, id, token))) = due else { return worked };
            worked = true;
            if let Some(handler) = self.handler(id) {
                handler.timer(token);
            }
        }
    }

    fn run_ready(&self) -> bool {
        let mut worked = false;
        loop {
            let Some(id) = self.ready.borrow_mut().pop_front() else { return worked };
            worked = true;
            let handler = {
                let mut slots = self.slots.borrow_mut();
                let slot = &mut slots[id.index()];
                if slot.generation != id.generation() || slot.closing {
                    continue;
                }
                slot.woken = false;
                slot.handler.clone()
            };
            if let Some(handler) = handler {
                handler.ready();
            }
        }
    }

    fn run_pollers(&self) -> bool {
        let mut worked = false;
        let mut next = 0;
        loop {
            let Some(id) = self.pollers.borrow().get(next).copied() else { break };
            next += 1;
            if let Some(handler) = self.handler(id) {
                worked |= handler.poll();
            }
        }
        if worked {
            self.run_ready();
        }
        worked
    }

    fn pollers_before_sleep(&self) -> bool {
        let mut found = false;
        let mut next = 0;
        loop {
            let Some(id) = self.pollers.borrow().get(next).copied() else { break };
            next += 1;
            if let Some(handler) = self.handler(id) {
                found |= handler.before_sleep();
            }
        }
        found | !self.ready.borrow().is_empty()
    }

    /// Hands queued operations to the kernel and lets it post completions.
    fn enter(&self, wait: bool) {
        let mut ring = self.ring.borrow_mut();
        let pending = {
            let submission = ring.submission();
            wait || !submission.is_empty() || submission.taskrun() || submission.cq_overflow()
        };
        if !pending {
            return;
        }
        let outcome = if wait { self.wait(&ring) } else { submit_and_reap(&mut ring) };
        if let Err(error) = outcome {
            assert!(retryable(&error), "io_uring_enter failed: {error}");
        }
    }

    fn wait(&self, ring: &IoUring) -> io::Result<usize> {
        let deadline = self.timers.borrow().peek().map(|Reverse((deadline, ..))| *deadline);
        let Some(deadline) = deadline else { return ring.submit_and_wait(1) };
        let timeout = types::Timespec::from(deadline.saturating_duration_since(clock::monotonic()));
        let arguments = types::SubmitArgs::new().timespec(&timeout);
        ring.submitter().submit_with_args(1, &arguments)
    }

    fn sleep(&self) {
        let slept_at = self.now.get();
        if self.shared.prepare_sleep() {
            self.enter(true);
            self.shared.awake();
        }
        let now = clock::monotonic();
        self.now.set(now);
        self.spin.borrow_mut().slept(slept_at, now);
    }

    fn watch_wake_event(&self) {
        let target = self.wake_value.as_ptr().cast::<u8>();
        let entry = opcode::Read::new(types::Fd(self.shared.event.as_raw_fd()), target, 8).build();
        self.push(entry.user_data(WAKE_TOKEN));
    }
}

fn hand_over(ring: &IoUring) {
    if let Err(error) = ring.submit() {
        assert!(retryable(&error), "io_uring refuses submissions: {error}");
    }
}

fn submit_and_reap(ring: &mut IoUring) -> io::Result<usize> {
    const GETEVENTS: u32 = 1;
    let queued = ring.submission().len() as u32;
    // SAFETY: no argument structure is passed, and the queued entries were vouched for when they were pushed.
    unsafe { ring.submitter().enter::<libc::sigset_t>(queued, 0, GETEVENTS, None) }
}

fn retryable(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::EINTR | libc::EAGAIN | libc::EBUSY | libc::ETIME))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Default)]
    struct CountsTimers(Cell<u32>);

    impl Handler for CountsTimers {
        fn completed(&self, _token: u32, _result: i32, _flags: u32) {}
        fn ready(&self) {}
        fn timer(&self, _token: u32) {
            self.0.set(self.0.get() + 1);
        }
    }

    #[test]
    fn a_timer_never_reaches_a_later_handler_in_the_same_slot() {
        let reactor = Reactor::new(Duration::ZERO).unwrap();
        let first = reactor.register(Rc::new(CountsTimers::default()));
        reactor.set_timer(first, reactor.now(), 1);
        reactor.unregister(first);
        for _ in 0..255 {
            reactor.unregister(reactor.register(Rc::new(CountsTimers::default())));
        }
        let last = Rc::new(CountsTimers::default());
        let id = reactor.register(last.clone());
        assert_eq!(id, first, "the generation has come round");
        reactor.set_timer(id, reactor.now(), 2);
        reactor.turn();
        assert_eq!(last.0.get(), 1, "its own timer, and no other");
    }

    #[test]
    fn work_that_asks_for_more_work_leaves_the_turn_to_others() {
        fn again(reactor: &Rc<Reactor>, runs: Rc<Cell<u32>>) {
            runs.set(runs.get() + 1);
            AGAIN.set(Some(runs));
            reactor.handle().spawn(|reactor| again(reactor, AGAIN.take().unwrap()));
        }
        thread_local! {
            static AGAIN: RefCell<Option<Rc<Cell<u32>>>> = const { RefCell::new(None) };
        }
        let reactor = Reactor::new(Duration::ZERO).unwrap();
        let runs = Rc::new(Cell::new(0));
        again(&reactor, runs.clone());
        for turn in 1..=3 {
            reactor.turn();
            assert_eq!(runs.get(), 1 + turn, "once a turn");
        }
    }
}
