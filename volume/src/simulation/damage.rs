//! What a damaged page of the map, or a damaged header of an object that blocks were moved to, costs: what it leads to, and nothing else.

use std::ops::Range;
use std::rc::Rc;

use bytes::Bytes;

use crate::object::{CLEAR_LEN, header_len};
use crate::progress::Progress;
use crate::segment::BLOCK;
use crate::simulation::contents::{Version, contents_of, place};
use crate::simulation::disk::HostDisk;
use crate::simulation::store::SharedStore;
use crate::simulation::world::World;
use crate::simulation::{VOLUME, create, new_disk, parts};
use crate::{MappedVolume, Settings};

const LEAF: u64 = 512;

struct Bench {
    world: Rc<World>,
    store: SharedStore,
    disk: HostDisk,
}

impl Bench {
    fn new(leaves: u64) -> Bench {
        let world = World::new(7);
        let bench = Bench { store: SharedStore::new(&world), disk: new_disk(&world), world };
        create(&bench.world, &bench.parts(0), VOLUME, leaves * LEAF * BLOCK as u64).unwrap();
        bench
    }

    fn parts(&self, process: u64) -> crate::Parts {
        parts(&self.world, &self.store, &self.disk, process)
    }

    /// Opens the volume, uses it and dies.
    fn live<F: Future<Output = ()> + 'static>(&self, life: impl FnOnce(Disk) -> F + 'static) {
        let process = self.world.new_process();
        let parts = self.parts(process);
        let lived = self.world.wait_for(process, async move {
            let settings = Settings { gathers: false, deduplicate: false, page_cache_bytes: 0, ..Settings::default() };
            life(Disk(MappedVolume::open(&parts, VOLUME, settings).await.unwrap())).await;
        });
        lived.unwrap();
        self.world.kill(process);
    }

    /// The newest object of gathered blocks or pages.
    fn newest(&self) -> String {
        self.store.names().into_iter().rfind(|name| name.contains("/g/")).expect("there is one")
    }

    /// What `change` damages comes back with [`SharedStore::repair`].
    fn damage(&self, name: &str, change: impl FnOnce(&mut Vec<u8>)) {
        self.store.change(name, change);
    }
}

impl Drop for Bench {
    fn drop(&mut self) {
        self.world.end();
    }
}

struct Disk(MappedVolume);

impl Disk {
    async fn write(&self, first: u64, versions: &[Version]) {
        for (part, versions) in (0..).zip(versions.chunks(8)) {
            self.0.write((first + part * 8) * BLOCK as u64, Bytes::from(contents_of(versions))).await.unwrap();
        }
    }

    async fn checkpoint(&self) {
        self.0.destage().await.unwrap();
        self.0.checkpoint().await.unwrap();
    }

    async fn holds(&self, first: u64, versions: &[Version]) {
        let (offset, len) = place(&(first..first + versions.len() as u64));
        let read = self.0.read(offset, len).await.unwrap_or_else(|errno| panic!("block {first}: {errno}"));
        assert!(read == contents_of(versions), "block {first}");
    }

    async fn fails(&self, blocks: Range<u64>) {
        for block in blocks {
            assert!(self.0.read(block * BLOCK as u64, BLOCK as u64).await.is_err(), "block {block}");
        }
        assert!(self.0.failed().is_none());
    }
}

/// The body's first frame has the first leaf that was written, and nothing else.
fn first_frame(object: &mut [u8]) {
    let at = header_len(object).unwrap() + 10;
    object[at] ^= 1;
}

#[test]
fn a_damaged_leaf_costs_its_own_range_until_it_is_overwritten_or_repaired() {
    let bench = Bench::new(4);
    bench.live(|disk| async move {
        disk.write(0, &[1, 2]).await;
        disk.write(2 * LEAF, &[3]).await;
        disk.checkpoint().await;
        disk.write(LEAF, &[4, 5, 6]).await;
        disk.checkpoint().await;
    });
    bench.damage(&bench.newest(), |object| first_frame(object));
    let checks = |disk: Rc<Disk>| async move {
        disk.fails(LEAF..LEAF + 1).await;
        disk.fails(LEAF + 2..LEAF + 4).await;
        disk.holds(LEAF - 1, &[0]).await;
        disk.holds(LEAF + 1, &[7]).await;
        disk.holds(2 * LEAF - 1, &[8, 3, 0]).await;
        disk.holds(0, &[9, 2]).await;
    };
    bench.live(move |disk| async move {
        disk.fails(LEAF..2 * LEAF).await;
        disk.holds(0, &[1, 2, 0]).await;
        let disk = Rc::new(disk);
        disk.write(LEAF + 1, &[7]).await;
        disk.write(2 * LEAF - 1, &[8]).await;
        disk.write(0, &[9]).await;
        checks(disk.clone()).await;
        disk.checkpoint().await;
        checks(disk.clone()).await;
        disk.0.snapshot("s", 0).await.unwrap();
        disk.0.wait_for_snapshot("s").await.unwrap();
        assert!(disk.0.gather(1.0).await.unwrap().blocks_moved == 0, "what the leaf may lead to was moved");
        checks(disk.clone()).await;
        let findings = disk.0.scrub(&Progress::default()).await.unwrap();
        assert!(findings.iter().any(|finding| finding.contains("bytes 2097152 to 2101248 ")), "{findings:?}");
        assert!(findings.iter().all(|finding| finding.contains("/g/")), "{findings:?}");
        assert!(disk.0.last_read_error().is_some());
    });
    bench.live(move |disk| async move {
        let disk = Rc::new(disk);
        checks(disk.clone()).await;
        disk.write(LEAF, &(100..100 + LEAF).collect::<Vec<_>>()).await;
        disk.checkpoint().await;
        disk.holds(LEAF, &(100..100 + LEAF).collect::<Vec<_>>()).await;
        disk.0.roll_back("s").await.unwrap();
        checks(disk.clone()).await;
    });
    bench.store.repair();
    bench.live(|disk| async move {
        disk.holds(LEAF, &[4, 7, 6, 0]).await;
        assert_eq!(disk.0.scrub(&Progress::default()).await.unwrap(), Vec::<String>::new());
        disk.write(0, &[10]).await;
        disk.checkpoint().await;
        disk.holds(LEAF, &[4, 7, 6, 0]).await;
    });
}

#[test]
fn under_a_damaged_root_everything_new_can_be_read_and_what_was_there_comes_back_with_it() {
    let bench = Bench::new(LEAF + 2);
    bench.live(|disk| async move {
        disk.write(0, &[1, 2]).await;
        disk.write(LEAF * LEAF, &[3]).await;
        disk.checkpoint().await;
    });
    let before = bench.newest();
    bench.damage(&before, Vec::clear);
    bench.live(|disk| async move {
        disk.fails(0..2).await;
        disk.write(1, &[4]).await;
        disk.checkpoint().await;
        disk.write(LEAF, &[5]).await;
        disk.checkpoint().await;
        disk.0.resize(2 * LEAF * BLOCK as u64).await.unwrap();
        disk.holds(1, &[4]).await;
        disk.holds(LEAF, &[5]).await;
        disk.fails(0..1).await;
        disk.fails(LEAF + 1..LEAF + 2).await;
        disk.0.resize((LEAF + 2) * LEAF * BLOCK as u64).await.unwrap();
        disk.holds(LEAF * LEAF, &[0]).await;
    });
    bench.store.repair();
    bench.live(|disk| async move {
        disk.holds(0, &[1, 4]).await;
        disk.holds(LEAF, &[5, 0]).await;
        disk.holds(LEAF * LEAF, &[0]).await;
    });
}

#[test]
fn a_damaged_header_of_moved_blocks_costs_those_blocks() {
    let bench = Bench::new(1);
    bench.live(|disk| async move {
        disk.write(0, &[1, 2, 3, 4]).await;
        disk.checkpoint().await;
        disk.write(0, &[5, 6]).await;
        disk.write(8, &[7]).await;
        disk.checkpoint().await;
        assert_eq!(disk.0.gather(0.6).await.unwrap().blocks_moved, 2);
    });
    bench.damage(&bench.newest(), |object| {
        let only_pages = 256;
        assert!(header_len(object).unwrap() > only_pages, "this is no object of moved blocks");
        object[CLEAR_LEN + 1] ^= 1;
    });
    let checks = |disk: Rc<Disk>| async move {
        disk.fails(2..3).await;
        disk.holds(0, &[5, 6]).await;
        disk.holds(8, &[7]).await;
    };
    bench.live(move |disk| async move {
        let disk = Rc::new(disk);
        checks(disk.clone()).await;
        disk.write(3, &[8]).await;
        disk.checkpoint().await;
        for _ in 0..2 {
            disk.0.gather(1.0).await.unwrap();
            checks(disk.clone()).await;
            disk.holds(3, &[8]).await;
        }
        assert!(!disk.0.scrub(&Progress::default()).await.unwrap().is_empty());
    });
    bench.store.repair();
    bench.live(|disk| async move {
        disk.holds(0, &[5, 6, 3, 8]).await;
        disk.0.gather(1.0).await.unwrap();
        disk.holds(0, &[5, 6, 3, 8]).await;
        assert_eq!(disk.0.scrub(&Progress::default()).await.unwrap(), Vec::<String>::new());
    });
}

/// A collection met a header that said in clear, and wrongly, where its blocks begin.
#[test]
fn a_header_that_was_put_back_is_read_anew() {
    let bench = Bench::new(1);
    bench.live(|disk| async move {
        disk.write(0, &[1, 2, 3, 4]).await;
        disk.checkpoint().await;
        disk.write(0, &[5, 6]).await;
        disk.checkpoint().await;
    });
    let is_segment = |name: &String| name.contains("/w/") && bench.store.len_of(name) > CLEAR_LEN;
    let first = bench.store.names().into_iter().find(is_segment).unwrap();
    let store = bench.store.clone();
    bench.live(move |disk| async move {
        store.change(&first, |bytes| bytes[56] ^= 64);
        let gathered = disk.0.gather(1.0).await.unwrap();
        assert!(store.names().contains(&first), "{gathered:?}");
        store.repair();
        disk.holds(2, &[3, 4]).await;
    });
}
