//! A host that serves some of a family's volumes: a worker for each, and somebody who clones, deletes and looks.

use std::cell::{Cell, RefCell};
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;

use crate::segment::BLOCK;
use crate::signal::Signal;
use crate::simulation::contents::{contents_of, place};
use crate::simulation::family::member::{Member, Origin, Presence};
use crate::simulation::family::{Family, kept_after};
use crate::simulation::seen::Seen;
use crate::simulation::world::ProcessId;
use crate::simulation::{REST, census};
use crate::{Durability, MappedVolume, Settings, SnapshotView, VolumeError, clone_snapshot, delete_volume};

const LONGEST: u64 = 8;
const BLOCKS_MAX: u64 = 40;
const MEMBERS_MAX: usize = 10;

#[derive(Clone)]
pub struct Host(Rc<State>);

struct State {
    family: Family,
    process: ProcessId,
    members: RefCell<Vec<Rc<Member>>>,
    /// Of each worker.
    operations: u64,
    working: Cell<usize>,
    ended: Signal,
}

impl Host {
    pub fn new(family: &Family, operations: u64) -> Host {
        let process = family.world.new_process();
        let (family, members) = (family.clone(), RefCell::default());
        Host(Rc::new(State { family, process, members, operations, working: Cell::new(0), ended: Signal::default() }))
    }

    pub fn take(&self, member: Rc<Member>) {
        if member.presence.get() != Presence::Gone {
            self.0.members.borrow_mut().push(member);
        }
    }

    pub fn process(&self) -> ProcessId {
        self.0.process
    }

    pub fn members(&self) -> usize {
        self.0.members.borrow().len()
    }

    pub fn ended(&self) -> bool {
        self.0.working.get() == 0
    }

    pub fn start(&self) {
        let members = self.0.members.borrow().clone();
        self.0.working.set(members.len() + 1);
        for member in members {
            let host = self.clone();
            self.spawn(async move { host.serve(&member).await });
        }
        let host = self.clone();
        self.spawn(async move { host.administer().await });
    }

    fn spawn(&self, task: impl Future<Output = Option<()>> + 'static) {
        let host = self.clone();
        let task = async move {
            task.await;
            host.0.working.set(host.0.working.get() - 1);
            host.0.ended.notify();
        };
        self.0.family.world.spawn(self.0.process, Box::pin(task));
    }

    pub fn die(&self, power_fails: bool) {
        self.0.family.world.kill(self.0.process);
        let is_alive = |process: &ProcessId| *process != self.0.process;
        self.0.family.members.all().iter().for_each(|member| member.deleters.borrow_mut().retain(is_alive));
        for member in self.0.members.borrow().iter() {
            if power_fails {
                member.disk.lose_power();
            }
            member.kept.set(member.kept.get().min(kept_after(power_fails)));
        }
    }

    fn settings(&self) -> Settings {
        let family = &self.0.family;
        let durability = if family.world.random.per_mille(500) { Durability::Local } else { Durability::Remote };
        Settings { durability, ..family.settings }
    }

    /// Opens a volume if it is there, or ends what was begun with it, and checks what it finds.
    async fn open(&self, member: &Member) -> Result<Option<Rc<MappedVolume>>, VolumeError> {
        let family = &self.0.family;
        let parts = family.parts(self.0.process, member);
        let was_doomed = member.presence.get() == Presence::Doomed;
        if was_doomed && !self.delete(member).await {
            return Ok(None);
        }
        let (settings, deletions) = (self.settings(), member.deletions.get());
        let volume = match MappedVolume::open(&parts, member.group, settings).await {
            Err(VolumeError::NoVolume) if member.presence.get() == Presence::Asked => {
                super::bury(parts, self.rc_of(member)).await.map_err(|_| VolumeError::NoVolume)?;
                member.presence.set(Presence::Gone);
                return Ok(None);
            }
            // Its deletion goes on when it has no clones any more.
            Err(VolumeError::NoVolume) if member.presence.get() == Presence::Doomed => return Ok(None),
            opened => Rc::new(opened?),
        };
        let content = volume.read(0, volume.size()).await.map_err(|_| self.why(&volume))?;
        let is_asked_for = was_doomed || member.presence.get() == Presence::Asked;
        // Somebody else may be deleting it, and come to it later.
        if is_asked_for && member.deletions.get() == deletions && member.deleters.borrow().is_empty() {
            member.presence.set(Presence::There);
        }
        let names: Vec<String> = volume.snapshots().into_iter().map(|snapshot| snapshot.name).collect();
        let (kept, is_local) = (member.kept.get(), settings.durability == Durability::Local);
        let mut history = member.history.borrow_mut();
        let recovered = history.recover(&content, kept, is_local);
        family.tell(|| format!("host {}: {:02x?} opens with {recovered:?} changes", self.0.process, &member.group[..8]));
        family.judge(recovered.map(drop));
        family.judge(history.recover_snapshots(&names, kept, is_local));
        member.kept.set(crate::simulation::history::Kept::Acknowledged);
        Ok(Some(volume))
    }

    fn rc_of(&self, member: &Member) -> Rc<Member> {
        let members = self.0.family.members.all();
        members.into_iter().find(|one| one.group == member.group).expect("it is one of them")
    }

    fn why(&self, volume: &MappedVolume) -> VolumeError {
        volume.failed().or_else(|| volume.last_read_error()).unwrap_or(VolumeError::Fenced)
    }

    /// An error is right only for a volume that somebody tried to delete.
    fn done<T>(&self, member: &Member, what: &str, result: Result<T, VolumeError>) -> Option<T> {
        if let Err(error) = &result
            && member.must_go_on()
            // A host that has died may still have its claim under way.
            && !matches!(error, VolumeError::Store(_) | VolumeError::Raced)
        {
            self.0.family.judge(Err(format!("{what} {:02x?}: {error}", &member.group[..8])));
        }
        result.ok()
    }

    /// `None`: the volume does not go on.
    async fn serve(&self, member: &Rc<Member>) -> Option<()> {
        let family = &self.0.family;
        let volume = self.done(member, "opening", self.open(member).await)??;
        let (host, its_member, its_volume) = (self.clone(), member.clone(), volume.clone());
        self.0.working.set(self.0.working.get() + 1);
        self.spawn(async move { host.watch(&its_member, &its_volume).await });
        let tally = volume.core.reader.tally.clone();
        for _ in 0..self.0.operations {
            if self.operate(member, &volume).await.is_none() {
                break;
            }
        }
        family.count(|seen| *seen += Seen::of(&tally));
        Some(())
    }

    /// Reads while the volume is changed.
    async fn watch(&self, member: &Member, volume: &MappedVolume) -> Option<()> {
        for _ in 0..self.0.operations / 2 {
            let (began, blocks) = (member.history.borrow().read_begins(), volume.size() / BLOCK as u64);
            let content = volume.read(0, volume.size()).await.map_err(|_| self.why(volume));
            let content = self.done(member, "watching", content)?;
            self.0.family.judge(member.history.borrow().check_racing_read(&(0..blocks), &content, began));
        }
        Some(())
    }

    async fn operate(&self, member: &Rc<Member>, volume: &MappedVolume) -> Option<()> {
        let random = &self.0.family.world.random;
        match random.below(100) {
            0..8 => {
                let covered = member.history.borrow().flush_begins();
                let flushed = volume.flush().await.map_err(|_| self.why(volume));
                self.done(member, "flushing", flushed)?;
                member.history.borrow_mut().flushed(covered);
                Some(())
            }
            8..18 => self.snapshot(member, volume).await,
            18..23 => self.delete_snapshot(member, volume).await,
            23..27 => self.done(member, "checkpoint of", volume.checkpoint().await),
            27..40 => self.done(member, "collecting", volume.gather(random.below(11) as f64 / 10.0).await).map(drop),
            40..42 => self.flatten(member, volume).await,
            42..44 => self.roll_back(member, volume).await,
            44..46 => self.resize(member, volume).await,
            46..65 => self.read(member, volume).await,
            kind => self.write(member, volume, kind < 72).await,
        }
    }

    async fn read(&self, member: &Member, volume: &MappedVolume) -> Option<()> {
        let content = volume.read(0, volume.size()).await.map_err(|_| self.why(volume));
        let content = self.done(member, "reading", content)?;
        let history = member.history.borrow();
        self.0.family.judge(history.check_read(&(0..history.blocks()), &content));
        Some(())
    }

    async fn write(&self, member: &Member, volume: &MappedVolume, zeroes: bool) -> Option<()> {
        let family = &self.0.family;
        let random = &family.world.random;
        let blocks = {
            let all = member.history.borrow().blocks();
            let first = random.below(all);
            first..(first + 1 + random.below(LONGEST)).min(all)
        };
        let count = (blocks.end - blocks.start) as usize;
        let versions = if zeroes { vec![0; count] } else { family.contents.draw(random, count) };
        let number = member.history.borrow_mut().submit(&blocks, &versions);
        let (offset, len) = place(&blocks);
        let changed = if zeroes {
            volume.zero(offset, len, random.per_mille(500)).await
        } else {
            volume.write(offset, Bytes::from(contents_of(&versions))).await
        };
        self.done(member, "writing", changed.map_err(|_| self.why(volume)))?;
        member.history.borrow_mut().acknowledge(number);
        family.count(|seen| seen.changes += 1);
        Some(())
    }

    async fn snapshot(&self, member: &Member, volume: &MappedVolume) -> Option<()> {
        let name = member.history.borrow_mut().snapshot();
        self.done(member, "snapshot of", volume.snapshot(&name, 0).await)?;
        member.history.borrow_mut().snapshot_made(&name);
        self.0.family.count(|seen| seen.snapshots_made += 1);
        self.done(member, "snapshot of", volume.wait_for_snapshot(&name).await)
    }

    async fn delete_snapshot(&self, member: &Member, volume: &MappedVolume) -> Option<()> {
        let family = &self.0.family;
        let chosen = member.history.borrow().any_snapshot(&family.world.random);
        let Some(name) = chosen else { return Some(()) };
        member.history.borrow_mut().doom_snapshot(&name);
        let may_pin = family.members.may_pin(member, Some(&name));
        match volume.delete_snapshot(&name).await {
            Err(VolumeError::SnapshotHasClones(_)) if may_pin || family.members.may_pin(member, Some(&name)) => {
                member.history.borrow_mut().spare_snapshot(&name);
                family.count(|seen| seen.refusals += 1);
            }
            deleted => {
                self.done(member, "deleting a snapshot of", deleted)?;
                member.history.borrow_mut().snapshot_deleted(&name);
                family.count(|seen| seen.snapshots_deleted += 1);
                if let Some(clone) = family.members.pins(member, Some(&name)) {
                    family.judge(Err(format!("snapshot {name} is deleted, and {:02x?} is a clone of it", &clone.group[..8])));
                }
            }
        }
        Some(())
    }

    async fn flatten(&self, member: &Member, volume: &MappedVolume) -> Option<()> {
        member.is_loose.set(member.origin.is_some());
        match volume.flatten(Arc::default()).await {
            Ok(true) => self.0.family.count(|seen| seen.flattened += 1),
            Ok(false) | Err(VolumeError::VolumeHasClones(_)) => {}
            // What is on its way to the pool may refer to the ancestors still.
            Err(VolumeError::ObjectDamaged { why, .. }) if why.contains("try again") => {}
            Err(error) => return self.done(member, "flattening", Err(error)),
        }
        Some(())
    }

    async fn roll_back(&self, member: &Member, volume: &MappedVolume) -> Option<()> {
        let chosen = member.history.borrow().any_snapshot(&self.0.family.world.random);
        let Some(name) = chosen else { return Some(()) };
        let number = member.history.borrow_mut().roll_back(&name)?;
        self.done(member, "rolling back", volume.roll_back(&name).await)?;
        member.history.borrow_mut().acknowledge(number);
        self.0.family.count(|seen| seen.rollbacks += 1);
        Some(())
    }

    async fn resize(&self, member: &Member, volume: &MappedVolume) -> Option<()> {
        let (before, blocks) = (member.history.borrow().blocks(), 1 + self.0.family.world.random.below(BLOCKS_MAX));
        if blocks < before {
            member.history.borrow_mut().submit(&(blocks..before), &vec![0; (before - blocks) as usize]);
        }
        let number = member.history.borrow_mut().resize(blocks);
        self.done(member, "resizing", volume.resize(blocks * BLOCK as u64).await)?;
        member.history.borrow_mut().acknowledge(number);
        self.0.family.count(|seen| seen.resizes += 1);
        Some(())
    }

    /// Clones and deletes volumes and looks at snapshots, whoever serves them.
    async fn administer(&self) -> Option<()> {
        let family = &self.0.family;
        let random = &family.world.random;
        for _ in 0..self.0.operations / 2 {
            let member = family.members.any(random)?;
            match random.below(10) {
                0..4 => self.clone_some(&member).await,
                4 if family.members.there() > 2 || family.members.may_pin(&member, None) => {
                    self.delete(&member).await;
                }
                _ => self.look(&member).await,
            }
        }
        Some(())
    }

    async fn clone_some(&self, parent: &Rc<Member>) {
        let family = &self.0.family;
        let Some(name) =
            parent.history.borrow().any_snapshot(&family.world.random).filter(|_| family.members.there() < MEMBERS_MAX)
        else {
            return;
        };
        let Some(first) = parent.history.borrow().content_of_snapshot(&name) else { return };
        let origin = Origin { parent: parent.clone(), snapshot: name.clone() };
        let group = (u128::from(family.contents.number()) << 64).to_be_bytes();
        let clone = family.members.add(Member::new(&family.world, group, &family.contents, first, Some(origin)));
        let cloned = clone_snapshot(&family.parts(self.0.process, parent), parent.group, &name, clone.group).await;
        family.tell(|| {
            let (from, to) = (&parent.group[..8], &clone.group[..8]);
            format!("host {}: cloning {name} of {from:02x?} to {to:02x?}: {:?}", self.0.process, cloned.as_ref().map(drop))
        });
        match cloned {
            Ok(_) => {
                clone.presence.set(Presence::There);
                family.count(|seen| seen.clones += 1);
                if parent.history.borrow().is_deleted(&name) {
                    family.judge(Err(format!("snapshot {name} was cloned, and is deleted")));
                }
            }
            Err(VolumeError::NoSnapshot | VolumeError::NoVolume) => clone.presence.set(Presence::Gone),
            Err(VolumeError::Store(_)) => {}
            Err(error) => family.judge(Err(format!("snapshot {name} cannot be cloned: {error}"))),
        }
    }

    /// True if it was refused.
    async fn delete(&self, member: &Member) -> bool {
        let family = &self.0.family;
        member.presence.set(Presence::Doomed);
        member.is_contested.set(true);
        member.deletions.set(member.deletions.get() + 1);
        let may_pin = family.members.may_pin(member, None);
        member.deleters.borrow_mut().push(self.0.process);
        let deleted = delete_volume(&family.parts(self.0.process, member), member.group).await;
        member.is_deleted_no_more_by(self.0.process);
        family.tell(|| format!("host {}: deleting {:02x?}: {deleted:?}", self.0.process, &member.group[..8]));
        match deleted {
            Ok(()) => {
                member.presence.set(Presence::Gone);
                family.count(|seen| seen.volumes_deleted += 1);
                if let Some(clone) = family.members.pins(member, None) {
                    family.judge(Err(format!("a volume is deleted, and {:02x?} is a clone of it", &clone.group[..8])));
                }
            }
            Err(VolumeError::VolumeHasClones(_)) if may_pin || family.members.may_pin(member, None) => {
                family.count(|seen| seen.refusals += 1);
                return true;
            }
            Err(VolumeError::Store(_)) => {}
            Err(error) => family.judge(Err(format!("volume {:02x?} cannot be deleted: {error}", &member.group[..8]))),
        }
        false
    }

    /// A snapshot holds what it should, unless it is deleted meanwhile.
    async fn look(&self, member: &Member) {
        let family = &self.0.family;
        let chosen = member.history.borrow().any_snapshot(&family.world.random);
        let Some(name) = chosen else { return };
        let Ok(view) = SnapshotView::open(&family.parts(self.0.process, member), member.group, &name).await else { return };
        for _ in 0..1 + family.world.random.below(4) {
            let content = view.read(0, view.size()).await;
            let is_there = member.must_go_on() && member.history.borrow().is_made(&name);
            match content {
                Ok(content) => family.judge(member.history.borrow().check_snapshot(&name, &content)),
                Err(VolumeError::Store(_)) => {}
                Err(error) if is_there => family.judge(Err(format!("snapshot {name} cannot be read: {error}"))),
                Err(_) => return,
            }
            family.parts(self.0.process, member).environment.sleep(Duration::from_millis(family.world.random.below(20))).await;
        }
        family.count(|seen| seen.snapshots_read += 1);
    }

    /// Opens all volumes and scans each of them, while the others are open.
    pub async fn scan_all(self) -> Result<(), String> {
        let mut open = Vec::new();
        let mut members = self.0.members.borrow().clone();
        // Whoever was being deleted is refused as long as there are clones, so clones come first.
        members.reverse();
        for member in members {
            let failed =
                |error| format!("{:02x?}, {:?}, does not open in the end: {error}", &member.group[..8], member.presence.get());
            let opened = self.open(&member).await.map_err(failed)?;
            open.extend(opened.map(|volume| (member, volume)));
        }
        for (member, volume) in &open {
            volume.destage().await.map_err(|errno| errno.to_string())?;
            self.read(member, volume).await;
        }
        if let Some((member, _)) = open.first() {
            self.0.family.parts(self.0.process, member).environment.sleep(REST).await;
        }
        for (member, volume) in &open {
            self.0.family.count(|seen| seen.scans += 1);
            census::scan(&self.0.family.parts(self.0.process, member), volume).await?;
            self.read(member, volume).await;
        }
        Ok(())
    }
}

/// Ends a volume without clones: perhaps flattens it, deletes its snapshots, and the volume.
pub async fn take_down(family: Family, process: ProcessId, member: Rc<Member>) -> Result<(), String> {
    let failed = |error: VolumeError| format!("{:02x?} cannot be taken down: {error}", &member.group[..8]);
    let parts = family.parts(process, &member);
    if member.is_there() && family.world.random.per_mille(700) {
        let volume = MappedVolume::open(&parts, member.group, family.settings).await.map_err(failed)?;
        if family.world.random.per_mille(500) {
            volume.destage().await.map_err(|errno| errno.to_string())?;
            volume.flatten(Arc::default()).await.map_err(failed)?;
            census::scan(&parts, &volume).await?;
        }
        for snapshot in volume.snapshots() {
            volume.delete_snapshot(&snapshot.name).await.map_err(failed)?;
        }
    }
    delete_volume(&parts, member.group).await.map_err(failed)?;
    member.presence.set(Presence::Gone);
    Ok(())
}
