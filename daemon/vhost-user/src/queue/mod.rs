//! One virtqueue on its data-plane thread.
//!
//! ```text
//!   kick ──▶ polling on ──▶ poll: pop a batch ──▶ chain → Request on guest memory ──▶ VolumeQueue
//!                             ▲                                                          │ CompletionQueue
//!   before_sleep: ask for kicks, look again        used ring, in-flight log, call ◀── ready: status byte
//! ```
//!
//! While its thread is awake a busy queue is polled and the guest is told not to kick. A queue that found nothing to do before
//! two sleeps in a row leaves the pollers until it is kicked, so idle queues cost the others nothing.
//!
//! Invariants: a head is in at most one slot, and a ring has a slot for each head: nothing is allocated for a request. Guest
//! memory is held by each request in flight. What the guest does wrong gets an error status, or breaks this ring alone. After
//! [`RunningQueue::stop`] has answered, neither ring nor memory is touched again.

mod live;

use std::cell::RefCell;
use std::collections::HashMap;
use std::os::fd::{AsRawFd, OwnedFd};
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::mpsc;
use std::time::Duration;

use blockdev::stats::OpStats;
use blockdev::{Errno, Handler, HandlerId, Reactor, ReactorHandle, Volume};
use io_uring::{cqueue, opcode, types};

use crate::dirty_log::DirtyLog;
use crate::inflight::InflightArea;
use crate::memory::GuestMemory;
use crate::message::RingAddresses;
use crate::pinned::Pages;
use crate::ring::RingError;
use live::Live;

const KICK: u32 = 0;
const CALL: u32 = 1;
const ERROR: u32 = 2;
const LOOK: u32 = 0;
/// How often a ring without a kick descriptor is looked at.
const LOOK_INTERVAL: Duration = Duration::from_micros(250);
const IDLE_SLEEPS: u8 = 2;
static ONE: u64 = 1;

/// Everything a queue needs to run.
pub struct QueueSetup {
    /// For messages: `export NAME`.
    pub name: Arc<str>,
    pub index: usize,
    pub volume: Arc<Volume>,
    pub memory: Arc<GuestMemory>,
    /// What of it is to be pinned.
    pub pages: Option<Arc<Pages>>,
    pub size: u32,
    pub addresses: RingAddresses,
    /// Of the available ring, unless the in-flight log knows better.
    pub base: u16,
    pub features: u64,
    pub kick: Option<Arc<OwnedFd>>,
    pub call: Option<Arc<OwnedFd>>,
    pub error: Option<Arc<OwnedFd>>,
    /// Where pages written to are logged, while they are.
    pub log: Option<Arc<DirtyLog>>,
    pub inflight: Option<Arc<InflightArea>>,
    pub write_through: Arc<AtomicBool>,
    pub read_only: bool,
    pub serial: [u8; 20],
    pub stats: Arc<OpStats>,
}

/// A queue that runs on some data-plane thread.
pub struct RunningQueue {
    reactor: ReactorHandle,
    key: u64,
}

/// What a queue leaves behind.
#[derive(Debug)]
pub struct Stopped {
    /// The index of the first available head that was not taken.
    pub next_available: u16,
    pub broken: bool,
}

thread_local! {
    static WORKERS: RefCell<HashMap<u64, Rc<Worker>>> = RefCell::new(HashMap::new());
}

fn with_worker(key: u64, act: impl FnOnce(&Worker)) {
    if let Some(worker) = WORKERS.with(|workers| workers.borrow().get(&key).cloned()) {
        act(&worker);
    }
}

impl RunningQueue {
    /// Starts a queue on the thread behind `reactor`.
    pub fn start(reactor: &ReactorHandle, setup: QueueSetup) -> Result<RunningQueue, RingError> {
        static NEXT_KEY: AtomicU64 = AtomicU64::new(0);
        let key = NEXT_KEY.fetch_add(1, Ordering::Relaxed);
        let started = reactor.call(move |reactor| Worker::start(reactor, key, setup));
        started.unwrap_or_else(|| Err(RingError::Volume("the data plane has stopped".into())))?;
        Ok(RunningQueue { reactor: reactor.clone(), key })
    }

    /// Signals another eventfd from now on.
    pub fn set_call(&self, call: Option<Arc<OwnedFd>>) {
        let key = self.key;
        self.reactor.spawn(move |_| with_worker(key, |worker| worker.set_call(call)));
    }

    pub fn set_error(&self, error: Option<Arc<OwnedFd>>) {
        let key = self.key;
        self.reactor.spawn(move |_| with_worker(key, |worker| worker.state.borrow_mut().error = error));
    }

    /// Stops taking requests. The answer comes when those in flight have completed.
    pub fn stop(self) -> mpsc::Receiver<Stopped> {
        let (sender, receiver) = mpsc::sync_channel(1);
        self.reactor.spawn(move |_| with_worker(self.key, |worker| worker.stop(sender)));
        receiver
    }
}

struct Worker {
    reactor: Rc<Reactor>,
    id: HandlerId,
    key: u64,
    label: String,
    state: RefCell<State>,
}

struct State {
    /// There from start to stop.
    live: Option<Live>,
    kick: Option<Arc<OwnedFd>>,
    call: Option<Arc<OwnedFd>>,
    error: Option<Arc<OwnedFd>>,
    /// The descriptor of a signal on its way.
    signalling: Option<Arc<OwnedFd>>,
    signal_again: bool,
    polling: bool,
    idle_sleeps: u8,
    broken: bool,
    stopping: Option<mpsc::SyncSender<Stopped>>,
}

impl Worker {
    fn start(reactor: &Rc<Reactor>, key: u64, setup: QueueSetup) -> Result<(), RingError> {
        let (kick, call, error) = (setup.kick.clone(), setup.call.clone(), setup.error.clone());
        let label = format!("{} queue {}", setup.name, setup.index);
        let volume = setup.volume.queue(reactor).map_err(|error| RingError::Volume(error.to_string()))?;
        let worker = reactor.install(|id| {
            let state = State {
                live: None,
                kick,
                call,
                error,
                signalling: None,
                signal_again: false,
                polling: false,
                idle_sleeps: 0,
                broken: false,
                stopping: None,
            };
            Worker { reactor: reactor.clone(), id, key, label, state: RefCell::new(state) }
        });
        let (live, replay) = Live::new(reactor, worker.id, volume, setup).inspect_err(|_| reactor.unregister(worker.id))?;
        worker.state.borrow_mut().live = Some(live);
        WORKERS.with(|workers| workers.borrow_mut().insert(key, worker.clone()));
        worker.begin(&replay);
        Ok(())
    }

    /// Carries out again what the in-flight log held, then looks at the ring, since kicks may have been lost; and signals the
    /// guest, since the last signal may have been lost too.
    fn begin(&self, replay: &[u16]) {
        let mut state = self.state.borrow_mut();
        let State { live: Some(live), .. } = &mut *state else { return };
        if !replay.is_empty() {
            tracing::info!("{}: {} requests of a previous connection are carried out again", self.label, replay.len());
        }
        let replayed = replay.iter().try_for_each(|head| live.take(*head, self.reactor.now()));
        live.ring.enable_notifications();
        self.publish(&mut state);
        self.signal(&mut state);
        if let Err(error) = replayed {
            self.break_ring(&mut state, error);
        }
        match state.kick {
            Some(_) => self.watch_kicks(&mut state),
            None => self.reactor.set_timer(self.id, self.reactor.now() + LOOK_INTERVAL, LOOK),
        }
        self.start_polling(&mut state);
        self.process(&mut state);
    }

    fn watch_kicks(&self, state: &mut State) {
        let Some(kick) = &state.kick else { return };
        let entry = opcode::PollAdd::new(types::Fd(kick.as_raw_fd()), libc::POLLIN as u32).multi(true).build();
        // SAFETY: the operation points to nothing; the descriptor stays open in `state` as long as this handler lives.
        unsafe { self.reactor.submit(self.id, KICK, entry) };
    }

    fn start_polling(&self, state: &mut State) {
        state.idle_sleeps = 0;
        if !state.polling && !state.broken && state.stopping.is_none() && state.live.is_some() {
            state.polling = true;
            self.reactor.set_polling(self.id, true);
        }
    }

    /// Takes some of what is available; true if there was something. Whoever calls it is polling, or polls from then on if there
    /// was: so what is left is taken without a kick.
    fn process(&self, state: &mut State) -> bool {
        if state.broken || state.stopping.is_some() {
            return false;
        }
        let Some(live) = &mut state.live else { return false };
        match live.take_available(self.reactor.now()) {
            Ok(false) => false,
            Ok(true) => {
                self.publish(state);
                true
            }
            Err(error) => {
                self.publish(state);
                self.break_ring(state, error);
                true
            }
        }
    }

    fn publish(&self, state: &mut State) {
        let Some(live) = &mut state.live else { return };
        if !live.batch.is_empty() && live.publish() {
            self.signal(state);
        }
    }

    /// Tells the guest to look at the used ring.
    fn signal(&self, state: &mut State) {
        if state.signalling.is_some() {
            state.signal_again = true;
        } else if let Some(call) = state.call.clone() {
            self.write_event(&call, CALL);
            state.signalling = Some(call);
        }
    }

    /// Through the ring, since the front end might have made the descriptor one that blocks.
    fn write_event(&self, event: &Arc<OwnedFd>, token: u32) {
        let entry = opcode::Write::new(types::Fd(event.as_raw_fd()), (&raw const ONE).cast(), size_of::<u64>() as u32);
        // SAFETY: it reads a static; the caller keeps the descriptor open until the completion.
        unsafe { self.reactor.submit(self.id, token, entry.build()) };
    }

    fn set_call(&self, call: Option<Arc<OwnedFd>>) {
        let mut state = self.state.borrow_mut();
        state.call = call;
        self.signal(&mut state);
    }

    /// The guest broke the rules in a way that no status byte can answer.
    fn break_ring(&self, state: &mut State, error: RingError) {
        if state.broken {
            return;
        }
        state.broken = true;
        tracing::warn!("{}: stopped until the driver resets it: {error}", self.label);
        if let Some(event) = &state.error {
            self.write_event(event, ERROR);
        }
        self.reactor.wake(self.id);
    }

    fn stop(&self, sender: mpsc::SyncSender<Stopped>) {
        let mut state = self.state.borrow_mut();
        state.stopping = Some(sender);
        self.retire_if_drained(&mut state);
    }

    fn retire_if_drained(&self, state: &mut State) {
        if state.stopping.is_none() || state.live.as_ref().is_some_and(|live| live.in_flight > 0) {
            return;
        }
        let (Some(sender), Some(mut live)) = (state.stopping.take(), state.live.take()) else { return };
        live.ring.enable_notifications();
        let stopped = Stopped { next_available: live.ring.next_available(), broken: state.broken };
        drop(live);
        // A front end that keeps its descriptors from being written to must not keep this queue.
        [KICK, CALL, ERROR].into_iter().for_each(|token| self.reactor.cancel(self.id, token));
        self.reactor.unregister(self.id);
        WORKERS.with(|workers| workers.borrow_mut().remove(&self.key));
        let _ = sender.send(stopped);
    }
}

impl Handler for Worker {
    fn completed(&self, token: u32, result: i32, flags: u32) {
        let mut state = self.state.borrow_mut();
        match token {
            KICK => {
                if state.live.is_none() || state.broken {
                    return;
                }
                if !cqueue::more(flags) {
                    if result < 0 {
                        let cause = Errno::from_raw(-result);
                        tracing::warn!("{}: its kick descriptor cannot be watched: {cause}; looking now and then", self.label);
                        self.reactor.set_timer(self.id, self.reactor.now() + LOOK_INTERVAL, LOOK);
                        return;
                    }
                    self.watch_kicks(&mut state);
                }
                self.start_polling(&mut state);
            }
            CALL => {
                state.signalling = None;
                if std::mem::take(&mut state.signal_again) && result != -libc::ECANCELED {
                    self.signal(&mut state);
                    if state.live.is_none() {
                        self.reactor.cancel(self.id, CALL);
                    }
                }
            }
            _ => {}
        }
    }

    fn ready(&self) {
        let mut state = self.state.borrow_mut();
        let Some(live) = &mut state.live else { return };
        let gone = live.complete_finished(self.reactor.now());
        if gone {
            // What a request read or wrote there may have been zeroes put in place of the guest's bytes.
            self.break_ring(&mut state, RingError::MemoryGone);
        } else {
            self.publish(&mut state);
        }
        if state.polling && (state.idle_sleeps >= IDLE_SLEEPS || state.broken) {
            state.polling = false;
            self.reactor.set_polling(self.id, false);
        }
        self.retire_if_drained(&mut state);
    }

    fn timer(&self, _token: u32) {
        let mut state = self.state.borrow_mut();
        if state.live.is_some() && !state.broken {
            if self.process(&mut state) {
                self.start_polling(&mut state);
            }
            self.reactor.set_timer(self.id, self.reactor.now() + LOOK_INTERVAL, LOOK);
        }
    }

    fn poll(&self) -> bool {
        let mut state = self.state.borrow_mut();
        let worked = self.process(&mut state);
        if worked {
            state.idle_sleeps = 0;
        }
        worked
    }

    fn before_sleep(&self) -> bool {
        let mut state = self.state.borrow_mut();
        if state.broken || state.stopping.is_some() {
            return false;
        }
        let Some(live) = &mut state.live else { return false };
        live.ring.enable_notifications();
        if self.process(&mut state) {
            state.idle_sleeps = 0;
            return true;
        }
        state.idle_sleeps += 1;
        if state.idle_sleeps >= IDLE_SLEEPS {
            self.reactor.wake(self.id);
        }
        false
    }
}
