//! Several hosts fight for one volume: whatever any of them was told to be flushed is there in the end.
//!
//! Each host writes to a block of its own and to one that all share, again and again, and flushes after most writes. It opens the volume anew when another one took it
//! over, for a number of times. Hosts die and come back with their old log, too.

use std::cell::{Cell, RefCell};
use std::rc::Rc;

use bytes::Bytes;

use crate::segment::BLOCK;
use crate::simulation::contents::{Version, content_of, version_of};
use crate::simulation::disk::HostDisk;
use crate::simulation::store::SharedStore;
use crate::simulation::world::{PATIENCE, ProcessId, World};
use crate::simulation::{VOLUME, create, new_disk, parts, random_settings};
use crate::{Durability, MappedVolume, Settings, VolumeError};

const OPENINGS: u32 = 4;
const WRITES: u64 = 8;

/// What one host was told, and what it asked for.
#[derive(Default)]
struct Told {
    openings: Cell<u64>,
    submitted: Cell<u64>,
    flushed: Cell<u64>,
    ended: Cell<bool>,
    violation: RefCell<Option<String>>,
}

/// The block that all hosts write to.
#[derive(Default)]
struct Shared {
    submitted: Cell<u64>,
    flushed: Cell<u64>,
}

struct Host {
    disk: HostDisk,
    told: Rc<Told>,
    process: ProcessId,
}

/// Runs the race of a seed: how often the volume was opened, and how many flushes were acknowledged. The error says what was broken.
pub fn run(seed: u64) -> Result<(u64, u64), String> {
    let world = World::new(seed);
    let raced = race(&world);
    world.end();
    raced
}

fn race(world: &Rc<World>) -> Result<(u64, u64), String> {
    let store = SharedStore::new(world);
    let settings = Settings {
        durability: Durability::Remote,
        segment_bytes: BLOCK as u64 * (1 + world.random.below(4)),
        ..random_settings(world)
    };
    let hosts = 2 + world.random.below(3);
    let shared: Rc<Shared> = Rc::default();
    create(world, &parts(world, &store, &new_disk(world), 0), VOLUME, (hosts + 1) * BLOCK as u64)?;
    store.set_faults(world.random.below(200));
    let count = hosts;
    let start = |block, disk, told| start(world, &store, settings, disk, (told, shared.clone()), (block, count));
    let mut hosts: Vec<Host> = (0..hosts).map(|block| start(block, new_disk(world), Rc::default())).collect();
    for step in 0..PATIENCE {
        if hosts.iter().all(|host| host.told.ended.get()) {
            return judge(world, &store, settings, &hosts);
        }
        if !world.step() {
            return Err("nothing can happen any more: a wake-up was lost".into());
        }
        if let Some(violation) = hosts.iter().find_map(|host| host.told.violation.take()) {
            return Err(violation);
        }
        // Nobody dies in the second half: each opening that came to nothing has left the next one more to read.
        if step < PATIENCE / 2 && world.random.below(3000) == 0 {
            let block = world.random.below(hosts.len() as u64);
            let Host { disk, told, process } = &hosts[block as usize];
            world.kill(*process);
            hosts[block as usize] = start(block, disk.clone(), told.clone());
        }
    }
    Err("the race does not come to an end".into())
}

fn start(
    world: &Rc<World>,
    store: &SharedStore,
    settings: Settings,
    disk: HostDisk,
    (told, shared): (Rc<Told>, Rc<Shared>),
    blocks: (u64, u64),
) -> Host {
    let process = world.new_process();
    told.ended.set(false);
    let task = fight(world.clone(), store.clone(), settings, disk.clone(), process, (told.clone(), shared), blocks);
    world.spawn(process, Box::pin(task));
    Host { disk, told, process }
}

async fn fight(
    world: Rc<World>,
    store: SharedStore,
    settings: Settings,
    disk: HostDisk,
    process: ProcessId,
    (told, shared): (Rc<Told>, Rc<Shared>),
    blocks: (u64, u64),
) {
    for _ in 0..OPENINGS {
        let flushed = shared.flushed.get();
        match MappedVolume::open(&parts(&world, &store, &disk, process), VOLUME, settings).await {
            Ok(volume) => {
                told.openings.set(told.openings.get() + 1);
                if let Err(violation) = use_it(&world, &volume, &told, (&shared, flushed), blocks).await {
                    told.violation.replace(Some(violation));
                }
            }
            // Whoever runs the host gives it a new log.
            Err(VolumeError::StaleLog) => disk.wipe(),
            Err(_) => {}
        }
    }
    told.ended.set(true);
}

async fn use_it(
    world: &World,
    volume: &MappedVolume,
    told: &Told,
    (shared, flushed): (&Shared, u64),
    (block, shared_block): (u64, u64),
) -> Result<(), String> {
    let (offset, shared_offset) = (block * BLOCK as u64, shared_block * BLOCK as u64);
    if let Ok(bytes) = volume.read(shared_offset, BLOCK as u64).await {
        let found = stamp_of(shared_block, &bytes)?;
        if found < flushed {
            return Err(format!("host {block} finds version {found} of the shared block; {flushed} was flushed before it came"));
        }
    }
    if let Ok(bytes) = volume.read(offset, BLOCK as u64).await {
        told.check(block, &bytes)?;
    }
    for _ in 0..WRITES {
        let version = told.submitted.get() + 1;
        told.submitted.set(version);
        let common = shared.submitted.get() + 1;
        shared.submitted.set(common);
        let own = volume.write(offset, Bytes::from(content_of(stamped(block, version))));
        if own.await.is_err() {
            break;
        }
        let both = volume.write(shared_offset, Bytes::from(content_of(stamped(shared_block, common))));
        if both.await.is_err() {
            break;
        }
        if world.random.per_mille(100) && volume.gather(0.7).await.is_err() {
            break;
        }
        if world.random.per_mille(300) {
            continue;
        }
        if volume.flush().await.is_err() {
            break;
        }
        told.flushed.set(version);
        shared.flushed.set(shared.flushed.get().max(common));
    }
    Ok(())
}

/// A content that no other block has.
fn stamped(block: u64, version: u64) -> Version {
    block << 32 | version
}

fn stamp_of(block: u64, bytes: &[u8]) -> Result<u64, String> {
    let found = version_of(block, bytes)?;
    if found != 0 && found >> 32 != block {
        return Err(format!("block {block} holds what was written to block {}", found >> 32));
    }
    Ok(found & u64::from(u32::MAX))
}

impl Told {
    fn check(&self, block: u64, bytes: &[u8]) -> Result<(), String> {
        let (found, flushed, submitted) = (stamp_of(block, bytes)?, self.flushed.get(), self.submitted.get());
        if found < flushed || found > submitted {
            return Err(format!("host {block} finds version {found} of its block; {flushed} was flushed, {submitted} submitted"));
        }
        Ok(())
    }
}

/// A last, undisturbed host opens the volume.
fn judge(world: &Rc<World>, store: &SharedStore, settings: Settings, hosts: &[Host]) -> Result<(u64, u64), String> {
    store.set_faults(0);
    let process = world.new_process();
    let content = Rc::new(RefCell::new(None));
    let (found, parts) = (content.clone(), parts(world, store, &new_disk(world), process));
    let read = async move {
        let read = match MappedVolume::open(&parts, VOLUME, settings).await {
            Ok(volume) => volume.read(0, volume.size()).await.map_err(|errno| errno.to_string()),
            Err(error) => Err(error.to_string()),
        };
        found.replace(Some(read));
    };
    world.spawn(process, Box::pin(read));
    while content.borrow().is_none() {
        if !world.step() {
            return Err("nothing can happen any more: a wake-up was lost".into());
        }
    }
    let content = content.take().unwrap_or_else(|| Err("it was not read".into()))?;
    for (block, (host, bytes)) in hosts.iter().zip(content.chunks_exact(BLOCK)).enumerate() {
        host.told.check(block as u64, bytes)?;
    }
    let sum = |count: fn(&Told) -> u64| hosts.iter().map(|host| count(&host.told)).sum();
    Ok((sum(|told| told.openings.get()), sum(|told| told.flushed.get())))
}
