//! Whoever uses the volume: opens it, checks what it finds, and then writes, zeroes, reads and flushes at random, several at a time.

use std::cell::{Cell, RefCell};
use std::fmt;
use std::ops::Range;
use std::rc::Rc;

use blockdev::Errno;
use bytes::Bytes;

use crate::names::VolumeId;
use crate::segment::BLOCK;
use crate::signal::Signal;
use crate::simulation::contents::{contents_of, place};
use crate::simulation::history::{History, Kept};
use crate::simulation::seen::Seen;
use crate::simulation::world::{ProcessId, World};
use crate::tally::Tally;
use crate::{Durability, MappedVolume, Parts, Settings, SnapshotView, VolumeError, WhenFull};

const WORKERS: u64 = 6;
const LONGEST: u64 = 8;
/// Blocks that a volume grows to at most.
const BLOCKS_MAX: u64 = 40;

/// A history that others look at while it grows.
pub type SharedHistory = Rc<RefCell<History>>;

pub struct Client {
    pub world: Rc<World>,
    pub process: ProcessId,
    pub parts: Parts,
    pub volume: VolumeId,
    pub settings: Settings,
    /// Of the opening before this one; it may still be growing.
    pub before: SharedHistory,
    pub kept: Kept,
    /// Operations of each worker in each round.
    pub operations: u64,
    /// Between them nobody works, and the volume as a whole may change.
    pub rounds: u64,
}

/// What a client has come to, so far.
#[derive(Clone, Default)]
pub struct Verdict(Rc<State>);

#[derive(Default)]
struct State {
    recovered: RefCell<Option<(SharedHistory, usize)>>,
    error: RefCell<Option<VolumeError>>,
    violation: RefCell<Option<String>>,
    complaint: RefCell<Option<String>>,
    workers: Cell<u64>,
    ended: Cell<bool>,
    seen: RefCell<Seen>,
    tally: RefCell<Option<Rc<Tally>>>,
    changed: Signal,
}

impl Verdict {
    pub fn ended(&self) -> bool {
        self.0.ended.get() || self.0.violation.borrow().is_some()
    }

    /// What the volume held when it was opened: the history that begins there, and how many changes of the one before are in it.
    pub fn recovered(&self) -> Option<(SharedHistory, usize)> {
        self.0.recovered.borrow().clone()
    }

    pub fn error(&self) -> Option<VolumeError> {
        self.0.error.borrow().clone()
    }

    /// Something that must not happen to anybody.
    pub fn violation(&self) -> Result<(), String> {
        self.0.violation.borrow().clone().map_or(Ok(()), Err)
    }

    /// An error that only those may get whose volume was taken over.
    pub fn complaint(&self) -> Result<(), String> {
        self.0.complaint.borrow().clone().map_or(Ok(()), Err)
    }

    pub fn seen(&self) -> Seen {
        let mut seen = self.0.tally.borrow().as_ref().map_or(Seen::default(), |tally| Seen::of(tally));
        seen += *self.0.seen.borrow();
        seen
    }

    fn count(&self, count: impl FnOnce(&mut Seen)) {
        count(&mut self.0.seen.borrow_mut());
    }

    fn judge(&self, checked: Result<(), String>) {
        if let Err(violation) = checked {
            self.0.violation.borrow_mut().get_or_insert(violation);
        }
    }

    fn complain(&self, complaint: String) {
        self.0.complaint.borrow_mut().get_or_insert(complaint);
    }
}

impl fmt::Display for Verdict {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.recovered() {
            None => write!(f, "not opened")?,
            Some((_, found)) => {
                let Seen { changes, flushes, .. } = self.seen();
                write!(f, "found {found} changes; {changes} changes, {flushes} flushes")?
            }
        }
        self.error().map_or(Ok(()), |error| write!(f, "; {error}"))
    }
}

/// Opens a volume of which something is damaged. Refusing it is right, and so is an error for a block; a wrong block is not.
pub async fn read_rotten(parts: &Parts, volume: [u8; 16], settings: Settings, history: &SharedHistory) -> Result<(), String> {
    let Ok(volume) = MappedVolume::open(parts, volume, settings).await else { return Ok(()) };
    for _ in 0..2 {
        for block in 0..volume.size() / BLOCK as u64 {
            let (offset, len) = place(&(block..block + 1));
            if let Ok(bytes) = volume.read(offset, len).await {
                history.borrow().check_known(block, &bytes)?;
            }
        }
        // Whatever it moves is checked once more.
        let _ = volume.gather(1.0).await;
    }
    Ok(())
}

impl Client {
    pub fn start(self) -> Verdict {
        let verdict = Verdict::default();
        let told = verdict.clone();
        let (world, process) = (self.world.clone(), self.process);
        world.spawn(process, Box::pin(self.live(told)));
        verdict
    }

    /// The same with a volume that is open.
    pub fn start_with(self, volume: MappedVolume) -> Verdict {
        let verdict = Verdict::default();
        let told = verdict.clone();
        let (world, process) = (self.world.clone(), self.process);
        let using = async move {
            self.use_volume(Rc::new(volume), &told).await;
            told.0.ended.set(true);
        };
        world.spawn(process, Box::pin(using));
        verdict
    }

    async fn live(self, verdict: Verdict) {
        let opened = MappedVolume::open(&self.parts, self.volume, self.settings).await;
        match opened {
            Err(error) => drop(verdict.0.error.replace(Some(error))),
            Ok(volume) => self.use_volume(Rc::new(volume), &verdict).await,
        }
        verdict.0.ended.set(true);
    }

    async fn use_volume(&self, volume: Rc<MappedVolume>, verdict: &Verdict) {
        verdict.0.tally.replace(Some(volume.core.reader.tally.clone()));
        let Ok(content) = volume.read(0, volume.size()).await else {
            verdict.0.error.replace(volume.failed());
            return;
        };
        let mut history = self.before.borrow().clone();
        let is_local = self.settings.durability == Durability::Local;
        match history.recover(&content, self.kept, is_local) {
            Err(violation) => return verdict.judge(Err(violation)),
            Ok(found) => {
                let names: Vec<String> = volume.snapshots().into_iter().map(|snapshot| snapshot.name).collect();
                if let Err(violation) = history.recover_snapshots(&names, self.kept, is_local) {
                    return verdict.judge(Err(violation));
                }
                let history = Rc::new(RefCell::new(history));
                verdict.0.recovered.replace(Some((history.clone(), found)));
                self.use_for_a_while(&volume, &names, &history, verdict).await;
            }
        }
        verdict.0.error.replace(volume.failed());
    }

    /// `None`: the volume does not go on.
    async fn use_for_a_while(
        &self,
        volume: &Rc<MappedVolume>,
        names: &[String],
        history: &SharedHistory,
        verdict: &Verdict,
    ) -> Option<()> {
        for name in names.iter().filter(|_| self.world.random.per_mille(300)) {
            volume.wait_for_snapshot(name).await.ok()?;
            verdict.count(|seen| seen.snapshots_read += 1);
            verdict.judge(self.check_snapshot(name, history).await);
        }
        for _ in 0..self.rounds {
            self.pause(volume, history, verdict).await?;
            self.work(volume, history, verdict).await?;
        }
        Some(())
    }

    /// Nobody writes: the volume may go back to a snapshot, or get another size. `None`: it does not go on.
    async fn pause(&self, volume: &MappedVolume, history: &SharedHistory, verdict: &Verdict) -> Option<()> {
        let random = &self.world.random;
        let done = |result: Result<(), VolumeError>, number| {
            if let Err(error) = &result
                && volume.failed().is_none()
                && *error != VolumeError::Fenced
            {
                verdict.complain(format!("the volume goes on, but said: {error}"));
            }
            result.ok()?;
            history.borrow_mut().acknowledge(number);
            history.borrow_mut().flushed(number + 1);
            Some(())
        };
        let name = history.borrow().any_snapshot(random).filter(|_| random.per_mille(150));
        if let Some(name) = name {
            let number = history.borrow_mut().roll_back(&name)?;
            done(volume.roll_back(&name).await, number)?;
            verdict.count(|seen| seen.rollbacks += 1);
        }
        if random.per_mille(200) {
            let (before, blocks) = (history.borrow().blocks(), 1 + random.below(BLOCKS_MAX));
            let is_smaller = blocks < before;
            if is_smaller {
                history.borrow_mut().submit(&(blocks..before), &vec![0; (before - blocks) as usize]);
            }
            let number = history.borrow_mut().resize(blocks);
            let resized = volume.resize(blocks * BLOCK as u64).await;
            if is_smaller && resized == Err(VolumeError::LogFull) && self.may_refuse() {
                history.borrow_mut().refused(number);
                history.borrow_mut().refused(number - 1);
                verdict.count(|seen| seen.refused += 1);
                return Some(());
            }
            done(resized, number)?;
            verdict.count(|seen| seen.resizes += 1);
        }
        Some(())
    }

    fn may_refuse(&self) -> bool {
        self.settings.when_full == WhenFull::Error
    }

    /// A snapshot that is in the pool holds what it should, unless its volume has been taken over or it was deleted meanwhile.
    async fn check_snapshot(&self, name: &str, history: &SharedHistory) -> Result<(), String> {
        let view = match SnapshotView::open(&self.parts, self.volume, name).await {
            Ok(view) => view,
            Err(VolumeError::NoSnapshot) => return Ok(()),
            Err(error) => return Err(format!("snapshot {name} does not open: {error}")),
        };
        match view.read(0, view.size()).await {
            Ok(content) => history.borrow().check_snapshot(name, &content),
            Err(error) => match SnapshotView::open(&self.parts, self.volume, name).await {
                Ok(_) => Err(format!("snapshot {name} cannot be read: {error}")),
                Err(_) => Ok(()),
            },
        }
    }

    async fn work(&self, volume: &Rc<MappedVolume>, history: &SharedHistory, verdict: &Verdict) -> Option<()> {
        verdict.0.workers.set(WORKERS);
        for _ in 0..WORKERS {
            let worker = Worker {
                world: self.world.clone(),
                volume: volume.clone(),
                history: history.clone(),
                verdict: verdict.clone(),
                operations: self.operations,
                may_refuse: self.may_refuse(),
            };
            self.world.spawn(self.process, Box::pin(worker.work()));
        }
        verdict.0.changed.wait_for(|| (verdict.0.workers.get() == 0).then_some(())).await;
        volume.destage().await.ok()?;
        let content = volume.read(0, volume.size()).await.ok()?;
        let blocks = 0..history.borrow().blocks();
        verdict.judge(history.borrow().check_read(&blocks, &content));
        Some(())
    }
}

struct Worker {
    world: Rc<World>,
    volume: Rc<MappedVolume>,
    history: SharedHistory,
    verdict: Verdict,
    operations: u64,
    /// What there is no space for.
    may_refuse: bool,
}

impl Worker {
    async fn work(self) {
        for _ in 0..self.operations {
            if self.operate().await.is_none() {
                break;
            }
        }
        let state = &self.verdict.0;
        state.workers.set(state.workers.get() - 1);
        state.changed.notify();
    }

    /// `None`: the volume does not go on.
    async fn operate(&self) -> Option<()> {
        let random = &self.world.random;
        let kind = random.below(100);
        match kind {
            0..15 => return self.flush().await,
            15..18 => return self.snapshot().await,
            18..20 => return self.delete_snapshot().await,
            20..22 => return self.done(self.volume.checkpoint().await),
            22..25 => return self.done(self.volume.gather(random.below(11) as f64 / 10.0).await.map(drop)),
            25..35 => return self.race().await,
            _ => {}
        }
        let taken = self.history.borrow_mut().take_range(random, LONGEST);
        let Some(blocks) = taken else { return Some(()) };
        let went_on = match kind {
            35..45 => self.read(&blocks).await,
            45..58 => self.change(&blocks, true).await,
            _ => self.change(&blocks, false).await,
        };
        if went_on.is_none() {
            self.complain_of(&blocks);
        }
        // A change that failed may still be in the log: its blocks stay taken.
        went_on?;
        self.history.borrow_mut().release(&blocks);
        Some(())
    }

    async fn flush(&self) -> Option<()> {
        let covered = self.history.borrow().flush_begins();
        self.volume.flush().await.ok()?;
        self.history.borrow_mut().flushed(covered);
        self.verdict.count(|seen| seen.flushes += 1);
        Some(())
    }

    /// Only a volume that has failed may refuse this.
    fn done(&self, result: Result<(), VolumeError>) -> Option<()> {
        if let Err(error) = &result
            && self.volume.failed().is_none()
            && !matches!(error, VolumeError::Fenced)
        {
            self.verdict.complain(format!("the volume goes on, but said: {error}"));
        }
        result.ok()
    }

    async fn snapshot(&self) -> Option<()> {
        let name = self.history.borrow_mut().snapshot();
        let made = self.volume.snapshot(&name, 0).await;
        if made == Err(VolumeError::LogFull) && self.may_refuse {
            self.history.borrow_mut().snapshot_refused(&name);
            self.verdict.count(|seen| seen.refused += 1);
            return Some(());
        }
        self.done(made)?;
        self.history.borrow_mut().snapshot_made(&name);
        self.verdict.count(|seen| seen.snapshots_made += 1);
        Some(())
    }

    async fn delete_snapshot(&self) -> Option<()> {
        let chosen = self.history.borrow().any_snapshot(&self.world.random);
        let Some(name) = chosen else { return Some(()) };
        self.history.borrow_mut().doom_snapshot(&name);
        self.done(self.volume.delete_snapshot(&name).await)?;
        self.history.borrow_mut().snapshot_deleted(&name);
        self.verdict.count(|seen| seen.snapshots_deleted += 1);
        Some(())
    }

    async fn read(&self, blocks: &Range<u64>) -> Option<()> {
        let (offset, len) = place(blocks);
        let bytes = self.volume.read(offset, len).await.ok()?;
        self.verdict.judge(self.history.borrow().check_read(blocks, &bytes));
        Some(())
    }

    /// Reads what others may be changing.
    async fn race(&self) -> Option<()> {
        let random = &self.world.random;
        let longest = if random.per_mille(500) { LONGEST } else { BLOCKS_MAX };
        let blocks = self.history.borrow().any_range(random, longest);
        let began = self.history.borrow().read_begins();
        let (offset, len) = place(&blocks);
        let Ok(bytes) = self.volume.read(offset, len).await else {
            self.complain_of(&blocks);
            return None;
        };
        self.verdict.judge(self.history.borrow().check_racing_read(&blocks, &bytes, began));
        Some(())
    }

    /// Of a request that failed, if the volume did not.
    fn complain_of(&self, blocks: &Range<u64>) {
        if self.volume.failed().is_none() {
            let why = self.volume.last_read_error();
            self.verdict.complain(format!("a request for blocks {blocks:?} failed, but the volume did not: {why:?}"));
        }
    }

    async fn change(&self, blocks: &Range<u64>, zeroes: bool) -> Option<()> {
        let (offset, len) = place(blocks);
        let discard = self.world.random.per_mille(500);
        let count = (blocks.end - blocks.start) as usize;
        let contents = self.history.borrow().contents();
        let versions = if zeroes { vec![0; count] } else { contents.draw(&self.world.random, count) };
        let number = self.history.borrow_mut().submit(blocks, &versions);
        let changed = if zeroes {
            self.volume.zero(offset, len, discard).await
        } else {
            self.volume.write(offset, Bytes::from(contents_of(&versions))).await
        };
        match changed {
            Ok(()) => {
                self.history.borrow_mut().acknowledge(number);
                self.verdict.count(|seen| seen.changes += 1);
            }
            Err(errno) if errno == Errno::ENOSPC && self.may_refuse => {
                self.history.borrow_mut().refused(number);
                self.verdict.count(|seen| seen.refused += 1);
            }
            Err(_) => return None,
        }
        Some(())
    }
}
