//! Requests to the simulated store, one by one: who made which, and those that a case holds on their way.

use std::cell::{Cell, RefCell};
use std::rc::Rc;

use crate::signal::Signal;
use crate::simulation::world::ProcessId;

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Verb {
    Create,
    Read,
    Delete,
    List,
    ReadRoot,
    Swap,
}

#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Request {
    pub process: ProcessId,
    pub verb: Verb,
    pub name: String,
}

impl Request {
    pub fn is(&self, verb: Verb, part: &str) -> bool {
        self.verb == verb && self.name.contains(part)
    }

    /// It changes the store.
    pub fn changes(&self) -> bool {
        matches!(self.verb, Verb::Create | Verb::Delete | Verb::Swap)
    }
}

/// Where a request is held.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Leg {
    /// Before it takes effect.
    There,
    /// After it has taken effect, and before its caller hears of it.
    Back,
    /// Before it takes effect, but its caller is told at once that nobody knows what became of it.
    Unheard,
}

/// One request that stays on its way until it is let through, whatever becomes of its caller.
#[derive(Clone)]
pub struct Hold(Rc<Held>);

struct Held {
    leg: Leg,
    wanted: Box<dyn Fn(&Request) -> bool>,
    has_begun: Cell<bool>,
    is_released: Cell<bool>,
    /// Its caller is told that nobody knows what became of it.
    is_lost: Cell<bool>,
    released: Signal,
}

impl Hold {
    pub fn leg(&self) -> Leg {
        self.0.leg
    }

    pub fn has_begun(&self) -> bool {
        self.0.has_begun.get()
    }

    pub fn begin(&self) {
        self.0.has_begun.set(true);
    }

    pub fn release(&self) {
        self.0.is_released.set(true);
        self.0.released.notify();
    }

    /// It goes on, but its reply is lost.
    pub fn release_and_lose(&self) {
        self.0.is_lost.set(true);
        self.release();
    }

    pub fn is_lost(&self) -> bool {
        self.0.is_lost.get()
    }

    pub async fn wait(&self) {
        self.0.released.wait_for(|| self.0.is_released.get().then_some(())).await;
    }
}

/// All requests that were made so far.
#[derive(Default)]
pub struct Requests {
    made: RefCell<Vec<Request>>,
    holds: RefCell<Vec<Hold>>,
}

impl Requests {
    pub fn hold(&self, leg: Leg, wanted: impl Fn(&Request) -> bool + 'static) -> Hold {
        let (has_begun, is_released, is_lost) = Default::default();
        let hold =
            Hold(Rc::new(Held { leg, wanted: Box::new(wanted), has_begun, is_released, is_lost, released: Signal::default() }));
        self.holds.borrow_mut().push(hold.clone());
        hold
    }

    /// A request is made: what holds it, if anything does.
    pub fn made(&self, request: Request) -> Option<Hold> {
        let mut holds = self.holds.borrow_mut();
        let held = holds.iter().position(|hold| (hold.0.wanted)(&request));
        self.made.borrow_mut().push(request);
        held.map(|index| holds.remove(index))
    }

    /// Those of a process.
    pub fn of(&self, process: ProcessId) -> Vec<Request> {
        self.made.borrow().iter().filter(|request| request.process == process).cloned().collect()
    }
}
