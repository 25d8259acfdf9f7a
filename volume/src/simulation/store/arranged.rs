//! What a case arranges with the simulated store: requests that are held, late, or end in a way of its own.

use std::time::Duration;

use backends::segments::{StoreError, StoreFuture};
use bytes::Bytes;

use super::{SharedStore, SimulatedStore, State, Unheard, unknown};
use crate::environment::Environment;
use crate::simulation::requests::{Hold, Leg, Request, Verb};
use crate::simulation::world::{Fate, NOBODY, SimulatedEnvironment};
use crate::simulation::{deletions, digest};

/// A create that takes long.
pub struct Late {
    /// In its name.
    pub part: &'static str,
    /// Until it takes effect, whatever becomes of its caller.
    pub takes: Duration,
    /// Its caller hears `Unknown` long before.
    pub times_out: bool,
}

impl SharedStore {
    /// What would make it hold more bytes than these is refused.
    pub fn set_capacity(&self, bytes: Option<u64>) {
        self.capacity.set(bytes);
    }

    /// Bytes that it holds.
    pub fn used(&self) -> u64 {
        self.state.borrow().used()
    }

    /// Bytes of an object, 0 if there is none.
    pub fn len_of(&self, name: &str) -> usize {
        self.state.borrow().object(name).map_or(0, Bytes::len)
    }

    /// What stands under a name.
    pub fn content(&self, name: &str) -> Option<Bytes> {
        self.state.borrow().object(name).cloned()
    }

    /// The root of a volume.
    pub fn root(&self, name: &str) -> Option<Bytes> {
        self.state.borrow().root(name).cloned()
    }

    /// Somebody else puts a root there.
    pub fn set_root(&self, name: &str, content: Bytes) {
        let mut state = self.state.borrow_mut();
        state.next_tag += 1;
        let tag = state.next_tag;
        state.roots.insert(name.to_owned(), (content, tag));
    }

    /// Why an object may not be deleted.
    pub fn may_delete(&self, name: &str) -> Result<(), String> {
        deletions::check(&self.state.borrow(), name)
    }

    /// The next create of such a name is late.
    pub fn delay(&self, late: Late) {
        self.late.replace(Some(late));
    }

    /// Whether a create that was to be late has begun.
    pub fn is_delaying(&self) -> bool {
        self.late.borrow().is_none()
    }

    /// The next request of that kind stays on its way.
    pub fn hold(&self, leg: Leg, wanted: impl Fn(&Request) -> bool + 'static) -> Hold {
        self.requests.hold(leg, wanted)
    }

    /// What becomes of the changes that processes have under way when they die; `None`: that is left to chance.
    pub fn set_unheard(&self, unheard: Option<Unheard>) {
        self.unheard.set(unheard);
    }

    /// From now on, or no longer: what is there is replaced by whatever is created or swapped, and the writer is told that he won.
    pub fn set_ignores_conditions(&self, ignores: bool) {
        self.ignores_conditions.set(ignores);
    }
}

impl SimulatedStore {
    /// A request is made: what holds it, if anything does.
    pub(super) fn made(&self, verb: Verb, name: &str, content: &[u8]) -> Option<Hold> {
        digest::note(&[&[verb as u8], &self.process.to_le_bytes(), name.as_bytes(), content]);
        self.shared.requests.made(Request { process: self.process, verb, name: name.to_owned() })
    }

    /// Takes effect, and is answered, when it is let through, even if its caller is dead by then.
    pub(super) fn held<T: 'static>(
        &self,
        hold: Hold,
        apply: impl FnOnce(&mut State) -> Result<T, StoreError> + 'static,
    ) -> StoreFuture<'static, T> {
        let (state, (asked, done)) = (self.shared.state.clone(), crate::signal::answer());
        let effect = async move {
            let mut apply = Some(move || apply(&mut state.borrow_mut()));
            let mut applied = if hold.leg() == Leg::Back { apply.take().map(|apply| apply()) } else { None };
            let mut asked = Some(asked);
            if hold.leg() == Leg::Unheard
                && let Some(asked) = asked.take()
            {
                asked.give(unknown());
            }
            hold.begin();
            hold.wait().await;
            applied = applied.or_else(|| apply.map(|apply| apply()));
            if let (Some(asked), Some(applied)) = (asked, applied) {
                asked.give(if hold.is_lost() { unknown() } else { applied });
            }
        };
        self.shared.world.spawn(NOBODY, Box::pin(effect));
        Box::pin(done.get())
    }

    /// Takes effect when its time has come, even if its caller is dead by then.
    pub(super) fn takes_long(
        &self,
        late: &Late,
        apply: impl FnOnce(&mut State) -> Result<(), StoreError> + 'static,
    ) -> StoreFuture<'static, ()> {
        let SharedStore { world, state, .. } = self.shared.clone();
        let (asked, done) = crate::signal::answer();
        let (clock, takes) = (SimulatedEnvironment { world: world.clone(), process: NOBODY }, late.takes);
        let effect = async move {
            clock.sleep(takes).await;
            let applied = apply(&mut state.borrow_mut());
            asked.give(applied);
        };
        world.spawn(NOBODY, Box::pin(effect));
        if late.times_out {
            return world.operation(self.process, |fate| (fate == Fate::Happens).then(unknown));
        }
        Box::pin(done.get())
    }
}
