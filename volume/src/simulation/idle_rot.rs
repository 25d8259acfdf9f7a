//! A log that rots after everything in it was flushed and nobody used it for a second: what was flushed is there, or the volume says that it
//! is not. It never opens as if the damaged records, or those after them, had not been written.

use std::cell::RefCell;
use std::ops::Range;
use std::rc::Rc;
use std::time::Duration;

use bytes::Bytes;

use crate::segment::BLOCK;
use crate::simulation::contents::{Contents, contents_of};
use crate::simulation::history::History;
use crate::simulation::store::SharedStore;
use crate::simulation::world::World;
use crate::simulation::{VOLUME, create, new_disk, parts};
use crate::{Durability, MappedVolume, Parts, Settings};

const BLOCKS: u64 = 16;
const CHANGES: u64 = 40;

/// Runs the case of a seed. The error says what was broken.
pub fn run(seed: u64) -> Result<(), String> {
    let world = World::new(seed);
    let ran = rot(&world);
    world.end();
    ran
}

fn rot(world: &Rc<World>) -> Result<(), String> {
    let (store, disk) = (SharedStore::new(world), new_disk(world));
    create(world, &parts(world, &store, &disk, 0), VOLUME, BLOCKS * BLOCK as u64)?;
    let history = Rc::new(RefCell::new(History::new(&Contents::default(), vec![0; BLOCKS as usize])));
    let process = world.new_process();
    let using = use_and_rest(world.clone(), parts(world, &store, &disk, process), history.clone());
    world.wait_for(process, using)??;
    world.kill(process);
    if world.random.per_mille(500) {
        disk.lose_power();
    }
    disk.rot();
    let process = world.new_process();
    world.wait_for(process, check(parts(world, &store, &disk, process), history))?
}

async fn use_and_rest(world: Rc<World>, parts: Parts, history: Rc<RefCell<History>>) -> Result<(), String> {
    let volume = MappedVolume::open(&parts, VOLUME, settings()).await.map_err(|error| error.to_string())?;
    for _ in 0..1 + world.random.below(CHANGES) {
        let start = world.random.below(BLOCKS);
        let blocks: Range<u64> = start..(start + 1 + world.random.below(4)).min(BLOCKS);
        let contents = history.borrow().contents();
        let versions = contents.draw(&world.random, (blocks.end - blocks.start) as usize);
        history.borrow_mut().submit(&blocks, &versions);
        let bytes = contents_of(&versions);
        volume.write(blocks.start * BLOCK as u64, Bytes::from(bytes)).await.map_err(|errno| errno.to_string())?;
    }
    volume.flush().await.map_err(|errno| errno.to_string())?;
    parts.environment.sleep(Duration::from_secs(1)).await;
    Ok(())
}

async fn check(parts: Parts, history: Rc<RefCell<History>>) -> Result<(), String> {
    let Ok(volume) = MappedVolume::open(&parts, VOLUME, settings()).await else { return Ok(()) };
    for block in 0..BLOCKS {
        if let Ok(bytes) = volume.read(block * BLOCK as u64, BLOCK as u64).await {
            history.borrow().check_read(&(block..block + 1), &bytes)?;
        }
    }
    Ok(())
}

/// Nothing reaches the pool.
fn settings() -> Settings {
    Settings { durability: Durability::Local, ..Settings::default() }
}
