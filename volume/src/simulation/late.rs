//! Readers that are late: before they get to what they look for, it is overwritten, moved and deleted, and its handle stands for another object.
//!
//! Whatever happens meanwhile, a block reads as it was when the reading began, or as somebody wrote it since.

use std::cell::{Cell, RefCell};
use std::rc::Rc;

use bytes::Bytes;

use crate::segment::BLOCK;
use crate::signal::{Signal, give_way};
use crate::simulation::contents::{Contents, contents_of, place};
use crate::simulation::history::History;
use crate::simulation::seen::Seen;
use crate::simulation::store::SharedStore;
use crate::simulation::world::{ProcessId, World};
use crate::simulation::{REST, VOLUME, census, create, new_disk, parts, random_settings};
use crate::{MappedVolume, Parts, Settings};

/// So few that what is overwritten soon leaves whole objects without use.
const BLOCKS_MAX: u64 = 12;
const WRITERS: u64 = 2;
const READERS: u64 = 6;
const WRITES: u64 = 400;
const LONGEST: u64 = 6;
/// Of a thousand operations of the store, at most so many take long.
const SLOW_MAX: u64 = 150;

struct Late {
    world: Rc<World>,
    volume: MappedVolume,
    history: RefCell<History>,
    writing: Cell<u64>,
    reading: Cell<u64>,
    ended: Signal,
    violation: RefCell<Option<String>>,
}

/// Runs the case of a seed. The error says what was broken.
pub fn run(seed: u64) -> Result<Seen, String> {
    let world = World::new(seed);
    let ran = start(&world);
    world.end();
    ran
}

fn start(world: &Rc<World>) -> Result<Seen, String> {
    let (store, disk) = (SharedStore::new(world), new_disk(world));
    let blocks = 4 + world.random.below(BLOCKS_MAX - 4);
    create(world, &parts(world, &store, &disk, 0), VOLUME, blocks * BLOCK as u64)?;
    let segment_bytes = BLOCK as u64 * (1 + world.random.below(6));
    let settings = Settings { segment_bytes, page_cache_bytes: 0, gathers: false, ..random_settings(world) };
    store.set_slow(world.random.below(SLOW_MAX));
    let process = world.new_process();
    let living = live(world.clone(), process, parts(world, &store, &disk, process), settings, blocks);
    world.wait_for(process, living)?
}

async fn live(world: Rc<World>, process: ProcessId, parts: Parts, settings: Settings, blocks: u64) -> Result<Seen, String> {
    let volume = MappedVolume::open(&parts, VOLUME, settings).await.map_err(|error| error.to_string())?;
    let late = Rc::new(Late {
        world: world.clone(),
        volume,
        history: RefCell::new(History::new(&Contents::default(), vec![0; blocks as usize])),
        writing: Cell::new(WRITERS),
        reading: Cell::new(READERS + 1),
        ended: Signal::default(),
        violation: RefCell::default(),
    });
    for _ in 0..WRITERS {
        world.spawn(process, Box::pin(late.clone().write()));
    }
    for _ in 0..READERS {
        world.spawn(process, Box::pin(late.clone().read()));
    }
    world.spawn(process, Box::pin(late.clone().tidy()));
    late.ended.wait_for(|| (late.writing.get() + late.reading.get() == 0).then_some(())).await;
    late.violation.take().map_or(Ok(()), Err)?;
    late.volume.destage().await.map_err(|errno| errno.to_string())?;
    parts.environment.sleep(REST).await;
    census::scan(&parts, &late.volume).await?;
    Ok(Seen { lives: 1, scans: 1, ..Seen::of(&late.volume.core.reader.tally) })
}

impl Late {
    fn judge(&self, checked: Result<(), String>) {
        if let Err(violation) = checked {
            self.violation.borrow_mut().get_or_insert(violation);
        }
    }

    fn failed<T>(&self, what: &str, result: Result<T, impl std::fmt::Display>) -> Option<T> {
        let told = result.map_err(|error| format!("{what}: {error}: {:?}", self.volume.last_read_error()));
        told.map_err(|why| self.judge(Err(why))).ok()
    }

    fn goes_on(&self) -> bool {
        self.writing.get() > 0 && self.violation.borrow().is_none()
    }

    fn end(&self, working: &Cell<u64>) {
        working.set(working.get() - 1);
        self.ended.notify();
    }

    async fn write(self: Rc<Self>) {
        for _ in 0..WRITES {
            let taken = self.history.borrow_mut().take_range(&self.world.random, LONGEST);
            let Some(blocks) = taken else { continue };
            let contents = self.history.borrow().contents();
            let versions = contents.draw(&self.world.random, (blocks.end - blocks.start) as usize);
            let number = self.history.borrow_mut().submit(&blocks, &versions);
            let written = self.volume.write(place(&blocks).0, Bytes::from(contents_of(&versions))).await;
            let Some(()) = self.failed("writing", written) else { break };
            self.history.borrow_mut().acknowledge(number);
            self.history.borrow_mut().release(&blocks);
            if self.world.random.per_mille(500) {
                let destaged = self.volume.destage().await;
                let Some(()) = self.failed("destage", destaged) else { break };
            }
        }
        self.end(&self.writing);
    }

    async fn read(self: Rc<Self>) {
        while self.goes_on() {
            let blocks = self.history.borrow().any_range(&self.world.random, BLOCKS_MAX);
            let began = self.history.borrow().read_begins();
            let (offset, len) = place(&blocks);
            let read = self.volume.read(offset, len).await;
            let Some(bytes) = self.failed("reading", read) else { break };
            self.judge(self.history.borrow().check_racing_read(&blocks, &bytes, began));
            give_way().await;
        }
        self.end(&self.reading);
    }

    async fn tidy(self: Rc<Self>) {
        while self.goes_on() {
            let checkpoint = self.volume.checkpoint().await;
            let Some(()) = self.failed("checkpoint", checkpoint) else { break };
            let gathered = self.volume.gather(self.world.random.below(11) as f64 / 10.0).await;
            let Some(_) = self.failed("collecting", gathered) else { break };
        }
        self.end(&self.reading);
    }
}
