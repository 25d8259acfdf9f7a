//! Several volumes in one group: used at once, made, cloned from each other's snapshots and removed meanwhile, through crashes and take-overs.
//!
//! ```text
//!   life ─▶ group opens ─▶ every volume that must be there is ─▶ a client for most of them ─▶ crash
//!                      └─▶ volumes come and go
//! ```
//!
//! Each volume has a history of its own, and clients check it as they do that of a volume that is alone.

use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;
use std::rc::Rc;

use crate::group::{Beginning, MappedGroup};
use crate::names::VolumeId;
use crate::segment::BLOCK;
use crate::simulation::client::{Client, SharedHistory, Verdict};
use crate::simulation::contents::{Contents, Version};
use crate::simulation::disk::HostDisk;
use crate::simulation::history::{History, Kept};
use crate::simulation::seen::Seen;
use crate::simulation::store::SharedStore;
use crate::simulation::world::{PATIENCE, ProcessId, World};
use crate::simulation::{REST, STEPS_MAX, VOLUME, census, create, new_disk, parts, random_durability, random_settings};
use crate::{Durability, Parts, Secrets, Settings, VolumeError};

const VOLUMES_MAX: usize = 5;
const BLOCKS_MAX: u64 = 24;
/// How often the last life tries to open the group while replaced owners still claim it.
const TRIES: u32 = 10;

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Fate {
    /// It was asked for.
    Asked,
    Made,
    /// Its removal was asked for.
    Doomed,
    Removed,
}

#[derive(Clone)]
struct Member {
    history: SharedHistory,
    kept: Kept,
    fate: Fate,
    verdict: Option<Verdict>,
}

/// What is known of each volume, by its UUID.
type Members = BTreeMap<[u8; 16], Member>;

struct Together {
    world: Rc<World>,
    store: SharedStore,
    disk: HostDisk,
    settings: Settings,
    secrets: Secrets,
    contents: Contents,
    members: Members,
    seen: Seen,
    /// Openings that were replaced and do not know it yet.
    replaced: Vec<Rc<Life>>,
    trace: bool,
}

/// One opening of the group.
struct Life {
    world: Rc<World>,
    process: ProcessId,
    parts: Parts,
    settings: Settings,
    contents: Contents,
    members: RefCell<Members>,
    /// Volumes that come or go.
    changes: u64,
    is_open: Cell<bool>,
    /// No volume comes or goes any more: nobody would take note of it.
    is_left_alone: Cell<bool>,
    ended: Cell<bool>,
    error: RefCell<Option<VolumeError>>,
    violation: RefCell<Option<String>>,
    seen: RefCell<Seen>,
}

/// Runs the schedule of a seed. The error says what was broken.
pub fn run(seed: u64, trace: bool) -> Result<Seen, String> {
    let world = World::new(seed);
    let ran = Together::new(&world, trace).run();
    world.end();
    ran
}

impl Together {
    fn new(world: &Rc<World>, trace: bool) -> Together {
        let durability = random_durability(world);
        Together {
            store: SharedStore::new(world),
            disk: new_disk(world),
            settings: Settings { durability, ..random_settings(world) },
            secrets: Secrets { pool_key: [1; 32], data_key: world.random.per_mille(500).then_some([2; 32]) },
            contents: Contents::default(),
            members: Members::new(),
            seen: Seen::default(),
            replaced: Vec::new(),
            trace,
            world: world.clone(),
        }
    }

    fn run(mut self) -> Result<Seen, String> {
        let blocks = 1 + self.world.random.below(BLOCKS_MAX);
        create(&self.world, &self.parts(crate::simulation::world::NOBODY), VOLUME, blocks * BLOCK as u64)?;
        self.members.insert(VOLUME, new_member(&self.contents, vec![0; blocks as usize], Fate::Made));
        for _ in 0..1 + self.world.random.below(5) {
            self.life()?;
        }
        self.last_life()?;
        self.rest()?;
        Ok(self.seen)
    }

    fn parts(&self, process: ProcessId) -> Parts {
        Parts { secrets: self.secrets.clone(), ..parts(&self.world, &self.store, &self.disk, process) }
    }

    fn start(&self) -> Rc<Life> {
        let process = self.world.new_process();
        let life = Rc::new(Life {
            world: self.world.clone(),
            process,
            parts: self.parts(process),
            settings: self.settings,
            contents: self.contents.clone(),
            members: RefCell::new(self.members.clone()),
            changes: self.world.random.below(12),
            is_open: Cell::default(),
            is_left_alone: Cell::default(),
            ended: Cell::default(),
            error: RefCell::default(),
            violation: RefCell::default(),
            seen: RefCell::default(),
        });
        self.world.spawn(process, Box::pin(life.clone().live()));
        life
    }

    fn life(&mut self) -> Result<(), String> {
        self.seen.lives += 1;
        self.store.set_faults(if self.world.random.per_mille(500) { 0 } else { self.world.random.below(100) });
        self.store.set_slow(30);
        let life = self.start();
        for _ in 0..self.world.random.below(STEPS_MAX) {
            if life.ended() {
                break;
            }
            self.step()?;
        }
        self.learn(&life)?;
        self.end_of_life(&life);
        Ok(())
    }

    fn end_of_life(&mut self, life: &Rc<Life>) {
        self.kill_replaced();
        let kept = match self.world.random.below(10) {
            0..4 => {
                self.world.kill(life.process);
                Kept::Acknowledged
            }
            // Only with this no log is missed.
            4..6 if self.settings.durability == Durability::Remote => {
                self.seen.takeovers += 1;
                match life.is_settled() {
                    true => self.replaced.push(life.clone()),
                    false => self.world.kill(life.process),
                }
                life.is_left_alone.set(true);
                self.disk = new_disk(&self.world);
                Kept::Flushed
            }
            _ => {
                self.world.kill(life.process);
                self.disk.lose_power();
                Kept::Flushed
            }
        };
        self.members.values_mut().for_each(|member| member.kept = member.kept.min(kept));
        if self.trace {
            eprintln!("process {}: {kept:?} is kept; {:?}", life.process, life.error.borrow());
        }
    }

    fn kill_replaced(&mut self) {
        self.replaced.drain(..).for_each(|life| self.world.kill(life.process));
    }

    fn last_life(&mut self) -> Result<(), String> {
        self.store.set_faults(0);
        self.store.set_slow(0);
        for _ in 0..TRIES {
            let life = self.start();
            let mut steps = 0;
            while !life.ended() {
                self.step()?;
                steps += 1;
                if steps > PATIENCE {
                    return Err("the last life does not come to an end".into());
                }
            }
            self.learn(&life)?;
            self.world.kill(life.process);
            match life.error.take() {
                None => return Ok(()),
                Some(VolumeError::Raced | VolumeError::Fenced) => {}
                Some(error) => return Err(format!("the last life ended with: {error}")),
            }
        }
        Err(format!("the group could not be opened in {TRIES} tries"))
    }

    /// Nothing is left of what was removed, and nothing else is missing.
    fn rest(&mut self) -> Result<(), String> {
        self.kill_replaced();
        self.world.settle();
        let process = self.world.new_process();
        let (parts, settings) = (self.parts(process), self.settings);
        self.seen.scans += 1;
        self.world.wait_for(process, async move {
            let group = MappedGroup::open(&parts, VOLUME, settings).await.map_err(|error| error.to_string())?;
            group.at(0).destage().await.map_err(|errno| errno.to_string())?;
            parts.environment.sleep(REST).await;
            census::scan(&parts, &group.at(0)).await
        })?
    }

    /// Takes over what a life has found out.
    fn learn(&mut self, life: &Life) -> Result<(), String> {
        life.violation.borrow().clone().map_or(Ok(()), Err)?;
        self.seen += *life.seen.borrow();
        if !life.is_open.get() {
            return Ok(());
        }
        self.members = life.members.borrow().clone();
        for member in self.members.values_mut() {
            let Some(verdict) = member.verdict.take() else { continue };
            verdict.violation()?;
            verdict.complaint()?;
            self.seen += verdict.seen();
            if let Some((history, _)) = verdict.recovered() {
                (member.history, member.kept) = (history, Kept::Acknowledged);
            }
        }
        Ok(())
    }

    fn step(&mut self) -> Result<(), String> {
        if self.world.step() { Ok(()) } else { Err("nothing can happen any more: a wake-up was lost".into()) }
    }
}

fn new_member(contents: &Contents, first: Vec<Version>, fate: Fate) -> Member {
    let history = Rc::new(RefCell::new(History::new(contents, first)));
    Member { history, kept: Kept::Acknowledged, fate, verdict: None }
}

impl Life {
    fn ended(&self) -> bool {
        let all = || self.members.borrow().values().all(|member| member.verdict.as_ref().is_none_or(Verdict::ended));
        self.violation.borrow().is_some() || self.ended.get() && all()
    }

    /// Whether it is known what all that goes on in it does.
    fn is_settled(&self) -> bool {
        let is_known = |member: &Member| member.verdict.as_ref().is_none_or(|verdict| verdict.recovered().is_some());
        self.is_open.get()
            && self.members.borrow().values().all(|member| is_known(member) && matches!(member.fate, Fate::Made | Fate::Removed))
    }

    async fn live(self: Rc<Self>) {
        match MappedGroup::open(&self.parts, VOLUME, self.settings).await {
            Err(error) => drop(self.error.replace(Some(error))),
            Ok(group) => {
                if let Err(violation) = self.use_group(&group).await {
                    self.violation.replace(Some(violation));
                }
                self.error.replace(group.failed());
            }
        }
        self.ended.set(true);
    }

    async fn use_group(&self, group: &MappedGroup) -> Result<(), String> {
        self.find(&group.volumes())?;
        self.is_open.set(true);
        let there: Vec<[u8; 16]> = self.members.borrow().keys().copied().collect();
        for id in there {
            if self.world.random.per_mille(700) {
                self.begin(group, id);
            }
        }
        for _ in 0..self.changes {
            if self.is_left_alone.get() {
                break;
            }
            let done = match self.world.random.below(4) {
                0 => self.add(group).await,
                1 => self.remove(group).await,
                _ => self.add_clone(group).await,
            };
            match done {
                Ok(()) => {}
                Err(_) if group.failed().is_some() => return Ok(()),
                Err(VolumeError::Fenced) => return Ok(()),
                Err(error) => return Err(format!("the group goes on, but said: {error}")),
            }
        }
        Ok(())
    }

    /// What is there must be, and nothing else.
    fn find(&self, volumes: &[[u8; 16]]) -> Result<(), String> {
        let mut members = self.members.borrow_mut();
        if let Some(id) = volumes.iter().find(|id| !members.contains_key(*id)) {
            return Err(format!("there is a volume {id:?}, which nobody asked for"));
        }
        for (id, member) in members.iter_mut() {
            match (volumes.contains(id), member.fate) {
                (false, Fate::Made) => return Err(format!("volume {id:?} is gone")),
                (true, Fate::Removed) => return Err(format!("volume {id:?} is back")),
                (true, _) => member.fate = Fate::Made,
                (false, _) => member.fate = Fate::Removed,
            }
        }
        members.retain(|_, member| member.fate == Fate::Made);
        Ok(())
    }

    /// Lets a client use a volume.
    fn begin(&self, group: &MappedGroup, id: [u8; 16]) {
        let Some(volume) = group.volume(id) else { return };
        let mut members = self.members.borrow_mut();
        let Some(member) = members.get_mut(&id) else { return };
        let client = Client {
            world: self.world.clone(),
            process: self.process,
            parts: self.parts.clone(),
            volume: VolumeId { group: VOLUME, id },
            settings: self.settings,
            before: member.history.clone(),
            kept: member.kept,
            operations: 1 + self.world.random.below(20),
            rounds: 1 + self.world.random.below(3),
        };
        member.verdict = Some(client.start_with(volume));
    }

    fn new_id(&self) -> [u8; 16] {
        (u128::from(self.contents.number()) << 64).to_be_bytes()
    }

    async fn add(&self, group: &MappedGroup) -> Result<(), VolumeError> {
        let blocks = 1 + self.world.random.below(BLOCKS_MAX);
        self.make(group, vec![0; blocks as usize], Beginning::Empty(blocks * BLOCK as u64)).await
    }

    async fn add_clone(&self, group: &MappedGroup) -> Result<(), VolumeError> {
        let candidates: Vec<([u8; 16], String, Vec<Version>)> = {
            let members = self.members.borrow();
            let with_snapshot = members.iter().filter(|(_, member)| member.verdict.is_some()).filter_map(|(id, member)| {
                let (history, _) = member.verdict.as_ref()?.recovered()?;
                let history = history.borrow();
                let name = history.any_snapshot(&self.world.random)?;
                Some((*id, name.clone(), history.content_of_snapshot(&name)?))
            });
            with_snapshot.collect()
        };
        let chosen = candidates.get(self.world.random.below(candidates.len().max(1) as u64) as usize).cloned();
        let Some((of, name, content)) = chosen else {
            self.parts.environment.sleep(REST / 50).await;
            return Ok(());
        };
        match self.make(group, content, Beginning::Snapshot(of, name)).await {
            // It was deleted meanwhile.
            Err(VolumeError::NoSnapshot) => Ok(()),
            made => {
                self.seen.borrow_mut().clones += u64::from(made.is_ok());
                made
            }
        }
    }

    async fn make(&self, group: &MappedGroup, first: Vec<Version>, beginning: Beginning) -> Result<(), VolumeError> {
        if self.members.borrow().len() >= VOLUMES_MAX {
            return Ok(());
        }
        let id = self.new_id();
        self.members.borrow_mut().insert(id, new_member(&self.contents, first, Fate::Asked));
        let made = group.add(id, beginning).await;
        match &made {
            Ok(()) => {
                self.seen.borrow_mut().joined += 1;
                self.set_fate(id, Fate::Made);
                self.begin(group, id);
            }
            Err(VolumeError::NoSnapshot) => drop(self.members.borrow_mut().remove(&id)),
            Err(_) => {}
        }
        made
    }

    fn set_fate(&self, id: [u8; 16], fate: Fate) {
        if let Some(member) = self.members.borrow_mut().get_mut(&id) {
            member.fate = fate;
        }
    }

    /// Ends a volume that no client uses, with its snapshots.
    async fn remove(&self, group: &MappedGroup) -> Result<(), VolumeError> {
        let idle = |member: &Member| member.verdict.is_none() && member.fate == Fate::Made;
        let chosen =
            self.members.borrow().iter().find(|(_, member)| idle(member)).map(|(id, member)| (*id, member.history.clone()));
        let Some((id, history)) = chosen else { return Ok(()) };
        let Some(volume) = group.volume(id) else { return Err(VolumeError::NoVolume) };
        self.set_fate(id, Fate::Doomed);
        volume.snapshots().iter().for_each(|snapshot| history.borrow_mut().doom_snapshot(&snapshot.name));
        group.remove(id).await?;
        self.seen.borrow_mut().left += 1;
        self.set_fate(id, Fate::Removed);
        Ok(())
    }
}
