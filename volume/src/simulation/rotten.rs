//! A pool that rots while a volume is used, and is repaired by hand later.
//!
//! ```text
//!   use ─▶ an object behind the checkpoint rots, or is cut off, or is gone ─▶ use, close, open, … ─▶ it is put back ─▶ everything is right
//! ```
//!
//! Whatever rots, the volume opens and goes on: only reading may fail, and only what was not written since. Nothing is wrong at any time, and once
//! everything was put back, nothing is missing.

use std::cell::{Cell, RefCell};
use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;
use std::rc::Rc;

use bytes::Bytes;

use crate::names::{Family, Source};
use crate::object::CLEAR_LEN;
use crate::progress::Progress;
use crate::segment::BLOCK;
use crate::simulation::contents::{Contents, Version, contents_of, place, version_of};
use crate::simulation::disk::HostDisk;
use crate::simulation::seen::Seen;
use crate::simulation::store::SharedStore;
use crate::simulation::world::{Random, World};
use crate::simulation::{REST, VOLUME, census, create, new_disk, parts, random_durability, random_settings};
use crate::{MappedVolume, Parts, Secrets, Settings, SnapshotView};

const LIVES_MAX: u64 = 6;
const OPERATIONS_MAX: u64 = 40;
const LONGEST: u64 = 4;
const LEAF: u64 = 512;
/// Volumes of one leaf, of a few, and of so many that a page stands between the root and them.
const SIZES: [u64; 3] = [40, 3 * LEAF, 600 * LEAF];
/// Objects that are damaged at one time.
const DAMAGED_MAX: usize = 2;

type Content = BTreeMap<u64, Version>;

#[derive(Clone)]
struct Rotten {
    world: Rc<World>,
    store: SharedStore,
    disk: HostDisk,
    secrets: Secrets,
    settings: Settings,
    contents: Contents,
    blocks: u64,
    model: Rc<RefCell<Model>>,
    seen: Rc<RefCell<Seen>>,
    trace: bool,
}

#[derive(Default)]
struct Model {
    now: Content,
    snapshots: BTreeMap<String, Content>,
    /// Written since something was damaged last.
    fresh: BTreeSet<u64>,
}

/// Runs the case of a seed. The error says what was broken.
pub fn run(seed: u64, trace: bool) -> Result<Seen, String> {
    let world = World::new(seed);
    let lived = Rotten::new(&world, trace).live();
    world.end();
    lived
}

impl Rotten {
    fn new(world: &Rc<World>, trace: bool) -> Rotten {
        let settings = Settings { durability: random_durability(world), ..random_settings(world) };
        Rotten {
            world: world.clone(),
            store: SharedStore::new(world),
            disk: new_disk(world),
            secrets: Secrets { pool_key: [1; 32], data_key: world.random.per_mille(500).then_some([2; 32]) },
            settings,
            contents: Contents::default(),
            blocks: SIZES[world.random.below(SIZES.len() as u64) as usize],
            model: Rc::default(),
            seen: Rc::default(),
            trace,
        }
    }

    fn live(self) -> Result<Seen, String> {
        create(&self.world, &self.parts(0), VOLUME, self.blocks * BLOCK as u64)?;
        let lives = 1 + self.world.random.below(LIVES_MAX);
        for life in 0..lives {
            let process = self.world.new_process();
            let (life_of, parts) = (self.clone(), self.parts(process));
            self.count(|seen| seen.lives += 1);
            self.world.wait_for(process, async move { life_of.life(parts, life + 1 == lives).await })??;
            self.world.kill(process);
            self.world.settle();
        }
        Ok(*self.seen.borrow())
    }

    fn parts(&self, process: u64) -> Parts {
        Parts { secrets: self.secrets.clone(), ..parts(&self.world, &self.store, &self.disk, process) }
    }

    fn count(&self, count: impl FnOnce(&mut Seen)) {
        count(&mut self.seen.borrow_mut());
    }

    fn tell(&self, what: impl FnOnce() -> String) {
        if self.trace {
            eprintln!("{}", what());
        }
    }

    async fn life(self, parts: Parts, is_last: bool) -> Result<(), String> {
        let volume = MappedVolume::open(&parts, VOLUME, self.settings).await.map_err(|error| format!("opening: {error}"))?;
        self.tell(|| format!("opened, {} objects damaged", self.store.damaged()));
        let life = Life { rotten: self, parts, volume, failed_reads: Cell::new(0) };
        for _ in 0..life.rotten.world.random.below(OPERATIONS_MAX) {
            life.operate().await?;
        }
        life.read_all().await?;
        if is_last {
            life.repair().await?;
            life.parts.environment.sleep(REST).await;
            census::scan(&life.parts, &life.volume).await?;
            life.read_all().await?;
        }
        let tally = Seen::of(&life.volume.core.reader.tally);
        life.rotten.count(|seen| *seen += tally);
        Ok(())
    }
}

/// One opening of the volume.
struct Life {
    rotten: Rotten,
    parts: Parts,
    volume: MappedVolume,
    failed_reads: Cell<u64>,
}

impl Life {
    fn random(&self) -> &Random {
        &self.rotten.world.random
    }

    fn is_damaged(&self) -> bool {
        self.rotten.store.damaged() > 0
    }

    /// Whatever is damaged, nothing but reading may fail.
    fn done<T>(&self, what: &str, result: Result<T, impl std::fmt::Display>) -> Result<T, String> {
        self.rotten.tell(|| what.to_owned());
        if let Some(error) = self.volume.failed() {
            return Err(format!("{what}: the volume failed: {error}"));
        }
        result.map_err(|error| format!("{what}: {error}"))
    }

    /// Some blocks, mostly near the edges of leaves.
    fn some_blocks(&self) -> Range<u64> {
        let random = self.random();
        let leaves = self.rotten.blocks.div_ceil(LEAF);
        let leaf = [0, 1, 2, LEAF, LEAF + 1][random.below(5) as usize] % leaves;
        let within = if random.per_mille(500) { random.below(8) } else { LEAF - 1 - random.below(8) };
        let start = (leaf * LEAF + within) % self.rotten.blocks;
        start..(start + 1 + random.below(LONGEST)).min(self.rotten.blocks)
    }

    async fn operate(&self) -> Result<(), String> {
        match self.random().below(100) {
            0..30 => self.write().await,
            30..38 => self.zero().await,
            38..60 => self.read(&self.some_blocks()).await,
            60..66 => self.done("checkpoint", self.volume.checkpoint().await),
            66..74 => self.done("collecting", self.volume.gather(self.random().below(11) as f64 / 10.0).await).map(drop),
            74..78 => self.done("flush", self.volume.flush().await),
            78..83 => self.snapshot().await,
            83..85 => self.delete_snapshot().await,
            85..87 => self.roll_back().await,
            87..90 => self.look().await,
            90..91 => self.check().await,
            91..98 => self.damage().await,
            _ => self.repair().await,
        }
    }

    async fn write(&self) -> Result<(), String> {
        let blocks = self.some_blocks();
        let count = (blocks.end - blocks.start) as usize;
        let contents = &self.rotten.contents;
        // What is found to be stored already may be damaged.
        let versions: Vec<Version> = match self.is_damaged() {
            true => (0..count).map(|_| contents.number()).collect(),
            false => contents.draw(self.random(), count),
        };
        let written = self.volume.write(place(&blocks).0, Bytes::from(contents_of(&versions))).await;
        self.done(&format!("writing {blocks:?}"), written)?;
        let mut model = self.rotten.model.borrow_mut();
        model.fresh.extend(blocks.clone());
        model.now.extend(blocks.zip(versions));
        Ok(())
    }

    /// A few blocks, or a few leaves.
    async fn zero(&self) -> Result<(), String> {
        let mut blocks = self.some_blocks();
        if self.random().per_mille(300) {
            let leaf = blocks.start / LEAF * LEAF;
            blocks = leaf..(leaf + LEAF * (1 + self.random().below(2))).min(self.rotten.blocks);
        }
        let (offset, len) = place(&blocks);
        let zeroed = self.volume.zero(offset, len, self.random().per_mille(500)).await;
        self.done(&format!("zeroing {blocks:?}"), zeroed)?;
        let mut model = self.rotten.model.borrow_mut();
        model.now.retain(|block, _| !blocks.contains(block));
        model.fresh.extend(blocks);
        Ok(())
    }

    async fn read(&self, blocks: &Range<u64>) -> Result<(), String> {
        let (offset, len) = place(blocks);
        let read = self.volume.read(offset, len).await;
        let model = self.rotten.model.borrow();
        match read {
            Ok(bytes) => check(&model.now, blocks, &bytes),
            Err(_) if self.is_damaged() && !blocks.clone().all(|block| model.fresh.contains(&block)) => {
                self.failed_reads.set(self.failed_reads.get() + 1);
                self.rotten.count(|seen| seen.reads_failed += 1);
                let told = self.volume.last_read_error().map(drop).ok_or("a read failed, and nothing is told of it");
                self.done(&format!("reading {blocks:?} fails"), told)
            }
            Err(errno) => self.done(&format!("reading {blocks:?}"), Err(format!("{errno}: {:?}", self.volume.last_read_error()))),
        }
    }

    async fn read_all(&self) -> Result<(), String> {
        let written: Vec<u64> = self.rotten.model.borrow().now.keys().copied().collect();
        for block in written {
            self.read(&(block..block + 1)).await?;
        }
        let names: Vec<String> = self.rotten.model.borrow().snapshots.keys().cloned().collect();
        for name in names {
            self.read_snapshot(&name).await?;
        }
        Ok(())
    }

    async fn snapshot(&self) -> Result<(), String> {
        let name = format!("s{}", self.rotten.contents.number());
        self.done("snapshot", self.volume.snapshot(&name, 0).await)?;
        self.done("snapshot", self.volume.wait_for_snapshot(&name).await)?;
        let mut model = self.rotten.model.borrow_mut();
        let content = model.now.clone();
        model.snapshots.insert(name, content);
        Ok(())
    }

    fn any_snapshot(&self) -> Option<String> {
        let model = self.rotten.model.borrow();
        let count = model.snapshots.len() as u64;
        model.snapshots.keys().nth(self.random().below(count.max(1)) as usize).cloned()
    }

    async fn delete_snapshot(&self) -> Result<(), String> {
        let Some(name) = self.any_snapshot() else { return Ok(()) };
        self.done("deleting a snapshot", self.volume.delete_snapshot(&name).await)?;
        self.rotten.model.borrow_mut().snapshots.remove(&name);
        Ok(())
    }

    async fn roll_back(&self) -> Result<(), String> {
        let Some(name) = self.any_snapshot() else { return Ok(()) };
        self.done("rolling back", self.volume.roll_back(&name).await)?;
        let mut model = self.rotten.model.borrow_mut();
        model.now = model.snapshots[&name].clone();
        model.fresh.clear();
        Ok(())
    }

    /// Looks at a snapshot, and at what has changed since.
    async fn look(&self) -> Result<(), String> {
        let Some(name) = self.any_snapshot() else { return Ok(()) };
        self.read_snapshot(&name).await?;
        let ranges = self.done("diff", self.volume.diff(&name, None, 0, usize::MAX).await)?;
        let model = self.rotten.model.borrow();
        let (then, block) = (&model.snapshots[&name], BLOCK as u64);
        let differs = |number: &&u64| model.now.get(number).unwrap_or(&0) != then.get(number).unwrap_or(&0);
        for number in model.now.keys().chain(then.keys()).filter(differs) {
            if !ranges.iter().any(|range| range.contains(&(number * block))) {
                return Err(format!("block {number} differs from snapshot {name}, and the diff does not tell"));
            }
        }
        Ok(())
    }

    async fn read_snapshot(&self, name: &str) -> Result<(), String> {
        let view = self.done("opening a snapshot", SnapshotView::open(&self.parts, VOLUME, name).await)?;
        let content = self.rotten.model.borrow().snapshots[name].clone();
        for block in content.keys() {
            let (offset, len) = place(&(*block..*block + 1));
            match view.read(offset, len).await {
                Ok(bytes) => check(&content, &(*block..*block + 1), &bytes)?,
                Err(_) if self.is_damaged() => self.rotten.count(|seen| seen.reads_failed += 1),
                Err(error) => return Err(format!("snapshot {name}: {error}")),
            }
        }
        Ok(())
    }

    /// What cannot be read is found by a check.
    async fn check(&self) -> Result<(), String> {
        self.done("collecting", self.volume.gather(0.0).await)?;
        let failed_before = self.failed_reads.get();
        self.read_all().await?;
        let findings = self.done("check", self.volume.scrub(&Progress::default()).await)?;
        if !self.is_damaged() && !findings.is_empty() {
            return Err(format!("nothing is damaged, but: {findings:?}"));
        }
        if self.failed_reads.get() > failed_before && findings.is_empty() {
            return Err("a read failed, and a check finds nothing".to_owned());
        }
        Ok(())
    }

    /// Something behind the checkpoint rots. What is not in a checkpoint is read when the volume is opened, and must not be passed over.
    async fn damage(&self) -> Result<(), String> {
        if self.rotten.store.damaged() >= DAMAGED_MAX {
            return Ok(());
        }
        self.done("destage", self.volume.destage().await)?;
        self.done("checkpoint", self.volume.checkpoint().await)?;
        let is_pages = self.random().per_mille(700);
        let may_rot = |name: &str, len: usize| match Source::parse(name).map(|source| source.family) {
            Some(Family::Gathered) => is_pages,
            Some(Family::Step) => !is_pages && len > CLEAR_LEN,
            Some(Family::Meta) | None => false,
        };
        if let Some(name) = self.rotten.store.damage(may_rot) {
            self.rotten.tell(|| format!("{name} is damaged"));
            self.rotten.count(|seen| seen.damaged += 1);
            self.rotten.model.borrow_mut().fresh.clear();
        }
        Ok(())
    }

    async fn repair(&self) -> Result<(), String> {
        self.rotten.tell(|| "repaired".to_owned());
        self.rotten.store.repair();
        self.read_all().await
    }
}

fn check(content: &Content, blocks: &Range<u64>, bytes: &[u8]) -> Result<(), String> {
    for (block, bytes) in blocks.clone().zip(bytes.chunks_exact(BLOCK)) {
        let (found, expected) = (version_of(block, bytes)?, content.get(&block).copied().unwrap_or(0));
        if found != expected {
            return Err(format!("block {block} reads as version {found} instead of {expected}"));
        }
    }
    Ok(())
}
