//! One volume in a world of its own, and hosts that open it as a case arranges it.

use std::cell::RefCell;
use std::rc::Rc;
use std::time::Duration;

use blockdev::Errno;
use bytes::Bytes;

use crate::segment::BLOCK;
use crate::simulation::contents::{Version, contents_of, version_of};
use crate::simulation::disk::HostDisk;
use crate::simulation::store::SharedStore;
use crate::simulation::world::{NOBODY, PATIENCE, ProcessId, SimulatedEnvironment, World};
use crate::simulation::{REST, VOLUME, census, create, new_disk, parts};
use crate::{Durability, MappedVolume, Parts, Secrets, Settings, SnapshotView, VolumeError};

/// Of the volume in many cases.
pub const BLOCKS: u64 = 16;

pub struct Bench {
    pub world: Rc<World>,
    pub store: SharedStore,
    pub blocks: u64,
    pub settings: Settings,
    pub secrets: Secrets,
}

/// What was begun, and comes to something some time.
pub struct Begun<T>(Rc<RefCell<Option<T>>>);

impl<T> Begun<T> {
    pub fn is_done(&self) -> bool {
        self.0.borrow().is_some()
    }

    pub fn take(&self) -> T {
        self.0.take().expect("it is not done yet")
    }
}

/// A process that has the volume open.
pub struct Owner {
    pub process: ProcessId,
    pub parts: Parts,
    pub volume: Rc<MappedVolume>,
}

impl Bench {
    /// A new volume of so many blocks, whose segments are small.
    pub fn new(seed: u64, blocks: u64, durability: Durability) -> Bench {
        Bench::with_key(seed, blocks, durability, None)
    }

    /// The same, perhaps encrypted.
    pub fn with_key(seed: u64, blocks: u64, durability: Durability, data_key: Option<[u8; 32]>) -> Bench {
        let world = World::new(seed);
        let store = SharedStore::new(&world);
        let secrets = Secrets { pool_key: [1; 32], data_key };
        let maker = Parts { secrets: secrets.clone(), ..parts(&world, &store, &new_disk(&world), 0) };
        create(&world, &maker, VOLUME, blocks * BLOCK as u64).unwrap();
        let settings = Settings { durability, segment_bytes: 4 * BLOCK as u64, checkpoint_segments: 4, ..Settings::default() };
        Bench { world, store, blocks, settings, secrets }
    }

    /// A disk for a host's log.
    pub fn disk(&self) -> HostDisk {
        new_disk(&self.world)
    }

    /// Of whoever belongs to no process.
    pub fn environment(&self) -> SimulatedEnvironment {
        SimulatedEnvironment { world: self.world.clone(), process: NOBODY }
    }

    pub fn parts(&self, disk: &HostDisk) -> (ProcessId, Parts) {
        let process = self.world.new_process();
        (process, Parts { secrets: self.secrets.clone(), ..parts(&self.world, &self.store, disk, process) })
    }

    pub fn try_open(&self, disk: &HostDisk, settings: Settings) -> Result<Owner, VolumeError> {
        let (process, parts) = self.parts(disk);
        let its_parts = parts.clone();
        let opening = async move { MappedVolume::open(&its_parts, VOLUME, settings).await };
        let opened = self.world.wait_for(process, opening).unwrap();
        if opened.is_err() {
            self.world.kill(process);
        }
        opened.map(|volume| Owner { process, parts, volume: Rc::new(volume) })
    }

    pub fn open(&self, disk: &HostDisk) -> Owner {
        self.try_open(disk, self.settings).unwrap()
    }

    /// Has an owner do something, to its end.
    pub fn run<T: 'static, F: Future<Output = T> + 'static>(&self, owner: &Owner, work: impl FnOnce(Rc<MappedVolume>) -> F) -> T {
        self.world.wait_for(owner.process, work(owner.volume.clone())).unwrap()
    }

    /// Has a process begin something.
    pub fn begin<T: 'static>(&self, process: ProcessId, work: impl Future<Output = T> + 'static) -> Begun<T> {
        let done = Rc::new(RefCell::new(None));
        let told = done.clone();
        self.world.spawn(process, Box::pin(async move { drop(told.replace(Some(work.await))) }));
        Begun(done)
    }

    /// The world goes on until something is so.
    pub fn until(&self, what: &str, is_so: impl Fn() -> bool) {
        for _ in 0..PATIENCE {
            if is_so() {
                return;
            }
            assert!(self.world.step(), "nothing can happen any more, and not yet: {what}");
        }
        panic!("it does not come to this: {what}");
    }

    /// The world goes on until this is done.
    pub fn end<T>(&self, begun: &Begun<T>) -> T {
        self.until("the end of what was begun", || begun.is_done());
        begun.take()
    }

    /// What each block of a snapshot holds.
    pub fn snapshot(&self, owner: &Owner, name: &'static str) -> Result<Vec<Version>, VolumeError> {
        let parts = owner.parts.clone();
        let read = self.run(owner, |_| async move {
            let view = SnapshotView::open(&parts, VOLUME, name).await?;
            view.read(0, view.size()).await
        });
        read.map(|bytes| versions_in(&bytes))
    }

    /// Everything is in the pool, and the tree leads to it.
    pub fn checkpoint(&self, owner: &Owner) {
        self.run(owner, |volume| async move {
            volume.destage().await.unwrap();
            volume.checkpoint().await.unwrap();
        });
    }

    /// Collects all garbage.
    pub fn gather(&self, owner: &Owner) {
        self.run(owner, |volume| async move { volume.gather(1.0).await.map(drop) }).unwrap();
    }

    /// Writes from block `first` on, and flushes.
    pub fn write(&self, owner: &Owner, first: u64, versions: &[Version]) -> Result<(), Errno> {
        let bytes = Bytes::from(contents_of(versions));
        self.run(owner, move |volume| async move {
            // Block by block, so that segments are not cut as one.
            for (index, block) in (0..bytes.len()).step_by(BLOCK).enumerate() {
                volume.write((first + index as u64) * BLOCK as u64, bytes.slice(block..block + BLOCK)).await?;
            }
            volume.flush().await
        })
    }

    /// Writes one block.
    pub fn change(&self, owner: &Owner, block: u64, version: Version) {
        let bytes = Bytes::from(contents_of(&[version]));
        self.run(owner, move |volume| async move { volume.write(block * BLOCK as u64, bytes).await }).unwrap();
    }

    /// What each block holds.
    pub fn content(&self, owner: &Owner) -> Result<Vec<Version>, Errno> {
        let len = self.blocks * BLOCK as u64;
        let bytes = self.run(owner, move |volume| async move { volume.read(0, len).await })?;
        Ok(versions_in(&bytes))
    }

    /// Time passes.
    pub fn pass(&self, owner: &Owner, time: Duration) {
        let environment = owner.parts.environment.clone();
        self.run(owner, move |_| async move { environment.sleep(time).await });
    }

    /// So many steps of the world.
    pub fn steps(&self, count: u64) {
        for _ in 0..count {
            assert!(self.world.step(), "nothing can happen any more");
        }
    }

    /// The process dies, and whatever it had under way happens.
    pub fn kill(&self, owner: Owner) {
        let process = owner.process;
        drop(owner);
        self.world.kill(process);
        self.world.settle();
    }

    /// Once the volume has put its house in order, nothing is in the store that it does not need, and all that it needs is.
    pub fn scan(&self, owner: &Owner) {
        self.run(owner, |volume| async move { volume.destage().await }).unwrap();
        // What is destaged may make a checkpoint due.
        self.pass(owner, REST);
        let parts = owner.parts.clone();
        self.run(owner, move |volume| async move { census::scan(&parts, &volume).await }).unwrap();
    }
}

impl Drop for Bench {
    fn drop(&mut self) {
        self.world.end();
    }
}

pub fn versions_in(bytes: &[u8]) -> Vec<Version> {
    (0..).zip(bytes.chunks_exact(BLOCK)).map(|(block, bytes)| version_of(block, bytes).unwrap()).collect()
}

/// A version for each of so many blocks.
pub fn numbers(from: Version) -> Vec<Version> {
    (from..from + BLOCKS).collect()
}
