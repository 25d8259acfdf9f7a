//! One seed, one schedule: a volume is used, its world crashes in every way the fault model has, and what comes back is checked.
//!
//! ```text
//!   seed ─▶ shape (sizes, durability, faults) ─▶ life, crash, life, crash, … ─▶ last life without faults ─▶ verdict
//!
//!   crash: the process is killed · the host loses power · the host is lost · another host takes over while the process lives on
//! ```

#[cfg(test)]
mod cases;
mod census;
mod client;
mod contents;
#[cfg(test)]
mod damage;
mod deletions;
#[cfg(test)]
mod digest;
mod disk;
#[cfg(test)]
mod encrypted_log;
mod family;
mod history;
mod idle_rot;
mod late;
mod race;
#[cfg(test)]
mod requests;
mod rotten;
mod seen;
mod store;
mod together;
mod world;

use std::cell::RefCell;
use std::ops::Range;
use std::rc::Rc;
use std::time::Duration;

use crate::segment::BLOCK;
use crate::{Allowed, Durability, MappedVolume, Parts, Secrets, Settings, VolumeError, WhenFull};
use client::{Client, SharedHistory, Verdict};
use contents::Contents;
use disk::HostDisk;
use history::{History, Kept};
use store::SharedStore;
use world::{PATIENCE, ProcessId, SimulatedEnvironment, World};

pub use seen::Seen;

const VOLUME: [u8; 16] = [7; 16];
const STEPS_MAX: u64 = 3_000;
/// How often the last life tries to open the volume while replaced owners still claim it.
const TRIES: u32 = 10;
/// Long enough for an opening to put its house in order.
const REST: Duration = Duration::from_secs(2);
/// Runs the schedule of a seed. The error says what was broken.
/// With `trace`, its lives are told on standard error. Of ten, one is a race of several hosts, one a log that rots while idle, three are
/// families of clones, one is a pool that rots, one has readers that are late, and one has a group of several volumes.
pub fn run(seed: u64, trace: bool) -> Result<Seen, String> {
    if seed.is_multiple_of(10) {
        let (openings, flushes) = race::run(seed)?;
        return Ok(Seen { lives: openings, takeovers: openings, flushes, ..Seen::default() });
    }
    if seed % 10 == 1 {
        idle_rot::run(seed)?;
        return Ok(Seen { lives: 2, flushes: 1, ..Seen::default() });
    }
    if (2..5).contains(&(seed % 10)) {
        return family::run(seed, trace);
    }
    if seed % 10 == 5 {
        return rotten::run(seed, trace);
    }
    if seed % 10 == 6 {
        return late::run(seed);
    }
    if seed % 10 == 7 {
        return together::run(seed, trace);
    }
    Schedule::new(seed, trace).run()
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Crash {
    Killed,
    PowerLost,
    HostLost,
    TakenOver,
}

struct Schedule {
    world: Rc<World>,
    store: SharedStore,
    disk: HostDisk,
    settings: Settings,
    secrets: Secrets,
    history: SharedHistory,
    kept: Kept,
    faults: u64,
    seen: Seen,
    trace: bool,
    /// Owners that were replaced and do not know it yet.
    replaced: Vec<Replaced>,
}

struct Replaced {
    process: ProcessId,
    durability: Durability,
    history: SharedHistory,
    verdict: Verdict,
    /// Changes of it that its successor found, once that is known.
    found: Option<usize>,
}

impl Schedule {
    fn new(seed: u64, trace: bool) -> Schedule {
        let world = World::new(seed);
        let random = &world.random;
        let durability = random_durability(&world);
        let when_full = if random.per_mille(500) { WhenFull::Wait } else { WhenFull::Error };
        let settings = Settings { durability, when_full, ..random_settings(&world) };
        let blocks = 2 + random.below(30) as usize;
        let faults = if random.per_mille(500) { 0 } else { random.below(150) };
        let disk = new_disk(&world);
        let store = SharedStore::new(&world);
        let history = Rc::new(RefCell::new(History::new(&Contents::default(), vec![0; blocks])));
        let seen = Seen::default();
        let replaced = Vec::new();
        let secrets = Secrets { pool_key: [1; 32], data_key: world.random.per_mille(500).then_some([2; 32]) };
        let schedule =
            Schedule { world, store, disk, settings, secrets, history, kept: Kept::Acknowledged, faults, seen, trace, replaced };
        schedule.tell(|| format!("{blocks} blocks, {settings:?}, {faults} lost replies in 1000"));
        schedule
    }

    fn tell(&self, what: impl FnOnce() -> String) {
        if self.trace {
            eprintln!("{}", what());
        }
    }

    fn run(mut self) -> Result<Seen, String> {
        create(&self.world, &self.parts(world::NOBODY), VOLUME, self.history.borrow().blocks() * BLOCK as u64)?;
        for _ in 0..1 + self.world.random.below(6) {
            self.life()?;
        }
        if self.world.random.per_mille(100) {
            self.rotten_life()?
        } else {
            self.last_life()?;
            self.rest()?;
        }
        Ok(self.seen)
    }

    /// A process opens the volume, uses it for a while and comes to an end of some kind.
    fn life(&mut self) -> Result<(), String> {
        self.seen.lives += 1;
        self.store.set_faults(self.faults);
        self.store.set_slow(if self.world.random.per_mille(400) { 400 } else { 30 });
        if self.world.random.per_mille(150) {
            self.settings.durability = random_durability(&self.world);
        }
        if self.world.random.per_mille(100) {
            self.disk.grow();
        }
        self.disk.failures = if self.world.random.per_mille(100) { 20 } else { 0 };
        let (process, verdict) = self.start();
        let steps = self.world.random.below(STEPS_MAX);
        let full = self.when_full(steps);
        for step in 0..steps {
            if verdict.ended() {
                break;
            }
            if full.contains(&step) && step == full.start {
                self.seen.full_disks += 1;
                self.disk.set_room(Some(self.world.random.below(64) as usize));
            }
            if step == full.end {
                self.disk.set_room(None);
            }
            self.step()?;
        }
        self.disk.set_room(None);
        let failures = self.disk.failures;
        self.tell(|| format!("process {process}, {failures} disk failures in 1000: {verdict}"));
        self.learn(&verdict)?;
        self.accept_loss_of(&verdict);
        self.end_of_life(process, verdict);
        Ok(())
    }

    /// The steps of a life in which there is hardly any space on the disk; often there are none.
    fn when_full(&self, steps: u64) -> Range<u64> {
        let random = &self.world.random;
        if steps == 0 || !random.per_mille(250) {
            return 0..0;
        }
        let start = random.below(steps);
        start..start + random.below(steps)
    }

    fn end_of_life(&mut self, process: ProcessId, verdict: Verdict) {
        let crash = match self.world.random.below(10) {
            0..4 => Crash::Killed,
            4..7 => Crash::PowerLost,
            7 => Crash::HostLost,
            _ => Crash::TakenOver,
        };
        self.tell(|| format!("process {process}: {crash:?}"));
        if crash == Crash::TakenOver {
            self.seen.takeovers += 1;
            match verdict.recovered() {
                Some((history, _)) => {
                    let durability = self.settings.durability;
                    self.replaced.push(Replaced { process, durability, history, verdict, found: None });
                }
                None => self.world.kill(process),
            }
        } else {
            self.world.kill(process);
        }
        match crash {
            Crash::Killed => {}
            Crash::PowerLost => self.disk.lose_power(),
            Crash::HostLost | Crash::TakenOver => self.disk = new_disk(&self.world),
        }
        let kept = if crash == Crash::Killed { Kept::Acknowledged } else { Kept::Flushed };
        self.kept = self.kept.min(kept);
    }

    /// Only a volume that says so may lose what was flushed; whoever runs it then accepts that.
    fn accept_loss_of(&mut self, verdict: &Verdict) {
        if verdict.error() == Some(VolumeError::LogMissing) {
            self.settings.accept_loss = true;
            self.kept = Kept::Nothing;
        }
    }

    /// Nothing fails any more: the volume must open, be right, and go on.
    fn last_life(&mut self) -> Result<(), String> {
        self.store.set_faults(0);
        self.store.set_slow(0);
        self.disk.failures = 0;
        for _ in 0..TRIES {
            let (process, verdict) = self.start();
            let mut steps = 0;
            while !verdict.ended() {
                self.step()?;
                steps += 1;
                if steps > PATIENCE {
                    return Err("the last life does not come to an end".into());
                }
            }
            self.learn(&verdict)?;
            self.world.kill(process);
            self.accept_loss_of(&verdict);
            match verdict.error() {
                None => return Ok(()),
                Some(VolumeError::LogMissing) => {}
                Some(VolumeError::Raced | VolumeError::Fenced) => {}
                Some(error) => return Err(format!("the last life ended with: {error}")),
            }
        }
        Err(format!("the volume could not be opened in {TRIES} tries"))
    }

    /// Everyone is gone, and everything under way has happened. One more opening, undisturbed, leaves nothing behind that is not needed.
    fn rest(&mut self) -> Result<(), String> {
        self.replaced.drain(..).for_each(|replaced| self.world.kill(replaced.process));
        self.world.settle();
        let process = self.world.new_process();
        let (parts, settings) = (self.parts(process), self.settings);
        self.seen.scans += 1;
        self.world.wait_for(process, async move {
            let volume = MappedVolume::open(&parts, VOLUME, settings).await.map_err(|error| error.to_string())?;
            volume.destage().await.map_err(|errno| errno.to_string())?;
            parts.environment.sleep(REST).await;
            census::scan(&parts, &volume).await
        })?
    }

    /// A bit has flipped somewhere. Every block reads as it once was, or not at all.
    fn rotten_life(&mut self) -> Result<(), String> {
        // They may meet the rot too, which is no fault of theirs.
        self.replaced.clear();
        self.store.set_faults(0);
        self.disk.failures = 0;
        let part = ["/w/", "/g/", "/m/", "the log"][self.world.random.below(4) as usize];
        let rotten = self.store.rot(part);
        if rotten.is_none() {
            self.disk.rot();
        }
        self.tell(|| format!("rot in {}", rotten.as_deref().unwrap_or("the log")));
        let process = self.world.new_process();
        let checked = Rc::new(RefCell::new(None));
        let (told, parts, settings, history) = (checked.clone(), self.parts(process), self.settings, self.history.clone());
        let check = async move {
            let read = client::read_rotten(&parts, VOLUME, settings, &history).await;
            told.replace(Some(read));
        };
        self.world.spawn(process, Box::pin(check));
        while checked.borrow().is_none() {
            self.step()?;
        }
        checked.take().unwrap_or(Ok(()))
    }

    fn start(&self) -> (ProcessId, Verdict) {
        let process = self.world.new_process();
        let client = Client {
            world: self.world.clone(),
            process,
            parts: self.parts(process),
            volume: VOLUME.into(),
            settings: self.settings,
            before: self.history.clone(),
            kept: self.kept,
            operations: 1 + self.world.random.below(40),
            rounds: 1 + self.world.random.below(3),
        };
        (process, client.start())
    }

    fn parts(&self, process: ProcessId) -> Parts {
        Parts { secrets: self.secrets.clone(), ..parts(&self.world, &self.store, &self.disk, process) }
    }

    /// Takes over what a client has found out.
    fn learn(&mut self, verdict: &Verdict) -> Result<(), String> {
        verdict.violation()?;
        verdict.complaint()?;
        self.seen += verdict.seen();
        let Some((history, found)) = verdict.recovered() else { return Ok(()) };
        if let Some(replaced) = self.replaced.iter_mut().find(|replaced| Rc::ptr_eq(&replaced.history, &self.history)) {
            replaced.found = Some(found);
        }
        self.history = history;
        self.kept = Kept::Acknowledged;
        self.settings.accept_loss = false;
        Ok(())
    }

    /// One step of the world. A replaced owner never tells its client of a flush that its successor does not know.
    fn step(&mut self) -> Result<(), String> {
        if !self.world.step() {
            return Err("nothing can happen any more: a wake-up was lost".into());
        }
        for replaced in &self.replaced {
            replaced.verdict.violation()?;
            let flushed = replaced.history.borrow().flushed_by_owner();
            if replaced.durability == Durability::Remote && replaced.found.is_some_and(|found| flushed > found) {
                return Err(format!(
                    "a replaced owner flushed {flushed} changes, of which its successor found {:?}",
                    replaced.found
                ));
            }
        }
        Ok(())
    }
}

impl Drop for Schedule {
    fn drop(&mut self) {
        self.world.end();
    }
}

/// What a process of a host opens the volume with.
fn parts(world: &Rc<World>, store: &SharedStore, disk: &HostDisk, process: ProcessId) -> Parts {
    Parts {
        environment: Rc::new(SimulatedEnvironment { world: world.clone(), process }),
        disk: Rc::new(disk.opened_by(process)),
        store: Rc::new(store.opened_by(process)),
        secrets: Secrets { pool_key: [1; 32], data_key: None },
    }
}

fn create(world: &World, parts: &Parts, group: [u8; 16], size: u64) -> Result<(), String> {
    let parts = parts.clone();
    let created = world.wait_for(world::NOBODY, async move { MappedVolume::create(&parts, group, size).await })?;
    created.map_err(|error| error.to_string())
}

/// Frames of 1, 4 and 16 blocks.
const COMPRESSIONS: [Allowed; 3] = [Allowed::Off, Allowed::Auto, Allowed::Cold];

/// Everything small, so that all of it happens often.
fn random_settings(world: &World) -> Settings {
    Settings {
        segment_bytes: BLOCK as u64 * (1 + world.random.below(16)),
        checkpoint_segments: 1 + world.random.below(12),
        deduplicate: world.random.per_mille(500),
        page_cache_bytes: BLOCK * world.random.below(8) as usize,
        kept_bytes: BLOCK * world.random.below(12) as usize,
        slice: 1 + world.random.below(4) as usize,
        marked_max: 4 << world.random.below(7),
        compression: COMPRESSIONS[world.random.below(COMPRESSIONS.len() as u64) as usize],
        ..Settings::default()
    }
}

fn random_durability(world: &World) -> Durability {
    if world.random.per_mille(500) { Durability::Local } else { Durability::Remote }
}

fn new_disk(world: &Rc<World>) -> HostDisk {
    let sector = if world.random.per_mille(500) { 512 } else { 4096 };
    let ring = 64 + world.random.below(192);
    HostDisk::new(world, BLOCK + ring as usize * BLOCK, sector)
}
