//! What a front end has said about each ring, and the queues that run because of it.
//!
//! A ring runs when its size, addresses and kick are known, it is enabled, and there is memory. Whatever is changed about a ring
//! that runs, it is drained first and started again afterwards, unless the change is only where to signal.

use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;

use crate::message::RingAddresses;
use crate::queue::{QueueSetup, RunningQueue};
use crate::ring::RingError;

/// How the guest makes itself heard.
pub enum Kick {
    Event(Arc<OwnedFd>),
    /// Not at all: the ring is to be looked at.
    Polled,
}

/// One ring.
#[derive(Default)]
pub struct RingState {
    pub size: Option<u32>,
    pub addresses: Option<RingAddresses>,
    pub base: u16,
    pub kick: Option<Kick>,
    pub call: Option<Arc<OwnedFd>>,
    pub error: Option<Arc<OwnedFd>>,
    pub enabled: bool,
    /// Broken by the guest, until it is set up anew.
    pub broken: bool,
    running: Option<RunningQueue>,
}

impl RingState {
    /// True if everything that is said about the ring lets it run. `always_enabled`: rings cannot be disabled.
    pub fn should_run(&self, always_enabled: bool) -> bool {
        let set_up = self.size.is_some() && self.addresses.is_some() && self.kick.is_some();
        set_up && (self.enabled || always_enabled) && !self.broken
    }

    pub fn is_running(&self) -> bool {
        self.running.is_some()
    }

    /// Lets a queue made by `start` run it. A ring that cannot start is broken, and its front end told so.
    pub fn start(&mut self, start: impl FnOnce(&RingState) -> Result<RunningQueue, RingError>) -> Result<(), RingError> {
        match start(self) {
            Ok(queue) => {
                self.running = Some(queue);
                Ok(())
            }
            Err(error) => {
                self.broken = true;
                if let Some(event) = &self.error {
                    signal(event);
                }
                Err(error)
            }
        }
    }

    pub fn set_call(&mut self, call: Option<Arc<OwnedFd>>) {
        self.call = call.clone();
        if let Some(queue) = &self.running {
            queue.set_call(call);
        }
    }

    pub fn set_error(&mut self, error: Option<Arc<OwnedFd>>) {
        self.error = error.clone();
        if let Some(queue) = &self.running {
            queue.set_error(error);
        }
    }

    /// Puts what this ring knows into the description of a queue.
    pub fn describe(&self, setup: &mut QueueSetup) {
        setup.base = self.base;
        setup.kick = match &self.kick {
            Some(Kick::Event(event)) => Some(event.clone()),
            _ => None,
        };
        setup.call = self.call.clone();
        setup.error = self.error.clone();
    }
}

/// Stops the given rings and waits until nothing of them is in flight.
pub fn drain<'a>(rings: impl Iterator<Item = &'a mut RingState>) {
    let stopping: Vec<_> = rings.filter_map(|ring| ring.running.take().map(|queue| (ring, queue.stop()))).collect();
    for (ring, answer) in stopping {
        match answer.recv() {
            Ok(stopped) => {
                ring.base = stopped.next_available;
                ring.broken |= stopped.broken;
            }
            Err(_) => ring.broken = true,
        }
    }
}

/// Adds 1 to an eventfd of the front end, unless that would block.
fn signal(event: &OwnedFd) {
    let mut poll = [rustix::event::PollFd::from_borrowed_fd(event.as_fd(), rustix::event::PollFlags::OUT)];
    let now = rustix::time::Timespec { tv_sec: 0, tv_nsec: 0 };
    if matches!(rustix::event::poll(&mut poll, Some(&now)), Ok(1)) {
        let _ = rustix::io::write(event, &1u64.to_ne_bytes());
    }
}
