//! A family of volumes: clones of snapshots, clones of clones, everyone written to while its relatives are collected, cloned and deleted.
//!
//! ```text
//!   round: two hosts share the volumes; each has a worker, and somebody clones, deletes and looks at snapshots beside them
//!      ─▶ one host dies, or both, somewhere ─▶ next round: what was under way is resolved ─▶ …
//!   end:   nothing fails any more ─▶ every volume is scanned ─▶ clones, snapshots, volumes go ─▶ nothing is left in the store
//! ```

mod daemon;
mod member;

use std::cell::RefCell;
use std::rc::Rc;

use crate::clone::{delete_volume, unpin};
use crate::names::group_path;
use crate::segment::BLOCK;
use crate::simulation::contents::Contents;
use crate::simulation::history::Kept;
use crate::simulation::seen::Seen;
use crate::simulation::store::SharedStore;
use crate::simulation::world::{NOBODY, ProcessId, World};
use crate::simulation::{VOLUME, create, parts, random_settings};
use crate::{Parts, Secrets, Settings, VolumeError};
use member::{Member, Members, Presence};

const STEPS_MAX: u64 = 6_000;
const HOSTS: usize = 2;

/// Runs the family of a seed. The error says what was broken.
pub fn run(seed: u64, trace: bool) -> Result<Seen, String> {
    let world = World::new(seed);
    let lived = Family::new(&world, trace).live();
    world.end();
    lived
}

/// What all tasks of a family know.
#[derive(Clone)]
struct Family {
    world: Rc<World>,
    store: SharedStore,
    secrets: Secrets,
    settings: Settings,
    contents: Contents,
    members: Members,
    seen: Rc<RefCell<Seen>>,
    violation: Rc<RefCell<Option<String>>>,
    trace: bool,
}

impl Family {
    fn new(world: &Rc<World>, trace: bool) -> Family {
        let data_key = world.random.per_mille(500).then_some([2; 32]);
        Family {
            world: world.clone(),
            store: SharedStore::new(world),
            secrets: Secrets { pool_key: [1; 32], data_key },
            settings: random_settings(world),
            contents: Contents::default(),
            members: Members::default(),
            seen: Rc::default(),
            violation: Rc::default(),
            trace,
        }
    }

    fn live(self) -> Result<Seen, String> {
        let random = &self.world.random;
        let blocks = 2 + random.below(20) as usize;
        let first = self.members.add(Member::new(&self.world, VOLUME, &self.contents, vec![0; blocks], None));
        first.presence.set(Presence::There);
        create(&self.world, &self.parts(NOBODY, &first), first.group, (blocks * BLOCK) as u64)?;
        let faults = if random.per_mille(500) { 0 } else { random.below(100) };
        self.store.set_faults(faults);
        for _ in 0..2 + random.below(5) {
            self.round()?;
        }
        self.store.set_faults(0);
        self.end()?;
        Ok(*self.seen.borrow())
    }

    fn tell(&self, what: impl FnOnce() -> String) {
        if self.trace {
            eprintln!("{}", what());
        }
    }

    fn parts(&self, process: ProcessId, member: &Member) -> Parts {
        Parts { secrets: self.secrets.clone(), ..parts(&self.world, &self.store, &member.disk, process) }
    }

    fn judge(&self, checked: Result<(), String>) {
        if let Err(violation) = checked {
            self.violation.borrow_mut().get_or_insert(violation);
        }
    }

    fn count(&self, count: impl FnOnce(&mut Seen)) {
        count(&mut self.seen.borrow_mut());
    }

    /// Two hosts share the volumes for a while.
    fn round(&self) -> Result<(), String> {
        self.count(|seen| seen.lives += 1);
        // Whoever keeps the catalogue waits until no request for a clone can be under way before it forgets the clone.
        if self.members.all().iter().any(|member| member.presence.get() == Presence::Asked) {
            self.world.settle();
        }
        let random = &self.world.random;
        let mut hosts: Vec<daemon::Host> = (0..HOSTS).map(|_| daemon::Host::new(self, 1 + random.below(25))).collect();
        for member in self.members.all() {
            member.is_contested.set(false);
            hosts[random.below(HOSTS as u64) as usize].take(member);
        }
        hosts.iter().for_each(daemon::Host::start);
        let power_fails = random.per_mille(300);
        while let Some(host) = hosts.pop() {
            for _ in 0..random.below(STEPS_MAX) {
                if host.ended() {
                    break;
                }
                self.step()?;
            }
            self.tell(|| format!("host {} of {} volumes dies; had it ended: {}", host.process(), host.members(), host.ended()));
            host.die(power_fails);
        }
        Ok(())
    }

    fn step(&self) -> Result<(), String> {
        if !self.world.step() {
            return Err("nothing can happen any more: a wake-up was lost".into());
        }
        self.violation.borrow_mut().take().map_or(Ok(()), Err)
    }

    /// Everyone is gone and everything under way has happened. What is left is scanned, and goes away.
    fn end(&self) -> Result<(), String> {
        self.world.settle();
        let host = daemon::Host::new(self, 0);
        self.members.all().into_iter().for_each(|member| host.take(member));
        let (family, task) = (self.clone(), host.clone());
        self.world.wait_for(host.process(), async move { task.scan_all().await })??;
        let checked = family.violation.borrow_mut().take();
        checked.map_or(Ok(()), Err)?;
        host.die(false);
        self.world.settle();
        while let Some(leaf) = self.members.any_leaf(&self.world.random) {
            let process = self.world.new_process();
            let task = daemon::take_down(self.clone(), process, leaf);
            self.world.wait_for(process, task)??;
            self.world.kill(process);
            self.world.settle();
        }
        for member in self.members.all() {
            self.world.wait_for(NOBODY, bury(self.parts(NOBODY, &member), member.clone()))??;
        }
        match self.store.names().first() {
            None => Ok(()),
            Some(name) => Err(format!("all volumes are deleted, and {name} is in the store")),
        }
    }
}

/// What whoever keeps the catalogue of volumes does for volumes that are in it no more.
async fn bury(parts: Parts, member: Rc<Member>) -> Result<(), String> {
    match delete_volume(&parts, member.group).await {
        Ok(()) => return Ok(()),
        Err(VolumeError::NoVolume) => {}
        Err(error) => return Err(format!("a deleted volume cannot be deleted once more: {error}")),
    }
    if let Some(origin) = &member.origin {
        unpin(&parts, origin.parent.group, member.group).await.map_err(|error| error.to_string())?;
    }
    let prefix = format!("{}/", group_path(&member.group));
    for object in parts.store.list(&prefix).await.map_err(|error| error.to_string())? {
        parts.store.delete(&object.name).await.map_err(|error| error.to_string())?;
    }
    Ok(())
}

/// What a host's death leaves of a history.
fn kept_after(power_fails: bool) -> Kept {
    if power_fails { Kept::Flushed } else { Kept::Acknowledged }
}
