//! Injects errors and delays, for tests only; nothing in a shipped daemon makes one.
//!
//! A [`FaultPlan`] is shared by all queues of the device and may be changed while it runs. Decisions are drawn from a seeded
//! generator, so a run with one queue repeats exactly.

use std::cell::RefCell;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use parking_lot::Mutex;
use slab::Slab;

use crate::device::{BlockDevice, Capabilities, DeviceError, Geometry, IoQueue};
use crate::errno::Errno;
use crate::reactor::{Handler, HandlerId, Reactor, ReactorHandle};
use crate::request::Request;
use crate::stats::OpClass;

/// What goes wrong.
#[derive(Clone, Debug)]
pub struct FaultRule {
    pub class: OpClass,
    /// Of a million requests, how many fail, on average.
    pub errors_per_million: u32,
    pub errno: Errno,
    /// Each request waits this long before it goes on (or fails).
    pub delay: Duration,
    /// And up to this much longer.
    pub jitter: Duration,
}

struct Plan {
    rules: Vec<FaultRule>,
    random: u64,
    injected: u64,
}

/// The shared, changeable set of faults of one device.
#[derive(Clone)]
pub struct FaultPlan {
    plan: Arc<Mutex<Plan>>,
}

impl FaultPlan {
    pub fn new(seed: u64) -> FaultPlan {
        FaultPlan { plan: Arc::new(Mutex::new(Plan { rules: Vec::new(), random: seed | 1, injected: 0 })) }
    }

    /// Replaces the rules.
    pub fn set(&self, rules: Vec<FaultRule>) {
        self.plan.lock().rules = rules;
    }

    /// Errors injected so far.
    pub fn injected(&self) -> u64 {
        self.plan.lock().injected
    }

    fn decide(&self, class: OpClass) -> (Option<Errno>, Duration) {
        let mut plan = self.plan.lock();
        let Some(rule) = plan.rules.iter().find(|rule| rule.class == class).cloned() else { return (None, Duration::ZERO) };
        let fails = plan.next() % 1_000_000 < u64::from(rule.errors_per_million);
        let jitter = rule.jitter.mul_f64((plan.next() % 1024) as f64 / 1024.0);
        plan.injected += u64::from(fails);
        (fails.then_some(rule.errno), rule.delay + jitter)
    }
}

impl Plan {
    /// xorshift64*, by Sebastiano Vigna.
    fn next(&mut self) -> u64 {
        self.random ^= self.random >> 12;
        self.random ^= self.random << 25;
        self.random ^= self.random >> 27;
        self.random.wrapping_mul(0x2545_F491_4F6C_DD1D) >> 8
    }
}

/// The layer.
pub struct Faulty {
    below: Arc<dyn BlockDevice>,
    plan: FaultPlan,
}

impl Faulty {
    pub fn new(below: Arc<dyn BlockDevice>, plan: FaultPlan) -> Faulty {
        Faulty { below, plan }
    }
}

impl BlockDevice for Faulty {
    fn geometry(&self) -> Geometry {
        self.below.geometry()
    }

    fn capabilities(&self) -> Capabilities {
        self.below.capabilities()
    }

    fn open_queue(&self, reactor: &Rc<Reactor>) -> Result<Box<dyn IoQueue>, DeviceError> {
        let below = self.below.open_queue(reactor)?;
        Ok(Box::new(FaultyQueue(reactor.install(|id| Inner {
            below,
            plan: self.plan.clone(),
            reactor: reactor.clone(),
            id,
            held: RefCell::default(),
        }))))
    }

    fn resize(&self, size: u64) -> Result<(), DeviceError> {
        self.below.resize(size)
    }

    fn refresh_size(&self) -> Result<u64, DeviceError> {
        self.below.refresh_size()
    }

    fn on_size_changed_elsewhere(&self, hear: Box<dyn Fn() + Send + Sync>) {
        self.below.on_size_changed_elsewhere(hear);
    }

    fn health(&self) -> Option<String> {
        self.below.health()
    }
    fn home(&self) -> Option<ReactorHandle> {
        self.below.home()
    }
}

struct FaultyQueue(Rc<Inner>);

struct Inner {
    below: Box<dyn IoQueue>,
    plan: FaultPlan,
    reactor: Rc<Reactor>,
    id: HandlerId,
    held: RefCell<Slab<(Request, Option<Errno>)>>,
}

impl IoQueue for FaultyQueue {
    fn submit(&self, request: Request) {
        let inner = &self.0;
        let (error, delay) = inner.plan.decide(OpClass::from(request.op));
        if delay.is_zero() {
            return inner.go_on(request, error);
        }
        let token = inner.held.borrow_mut().insert((request, error)) as u32;
        inner.reactor.set_timer(inner.id, inner.reactor.now() + delay, token);
    }
}

impl Drop for FaultyQueue {
    fn drop(&mut self) {
        self.0.reactor.unregister(self.0.id);
    }
}

impl Inner {
    fn go_on(&self, request: Request, error: Option<Errno>) {
        match error {
            Some(errno) => request.complete(Err(errno)),
            None => self.below.submit(request),
        }
    }
}

impl Handler for Inner {
    fn completed(&self, _token: u32, _result: i32, _flags: u32) {}

    fn ready(&self) {}

    fn timer(&self, token: u32) {
        let (request, error) = self.held.borrow_mut().remove(token as usize);
        self.go_on(request, error);
    }
}
