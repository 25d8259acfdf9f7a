//! The log of an encrypted volume, looked at from outside: by whoever has the disk, and not the key.

use std::cell::RefCell;
use std::rc::Rc;

use bytes::Bytes;

use crate::bytes_at::crc32c;
use crate::segment::BLOCK;
use crate::simulation::contents::content_of;
use crate::simulation::disk::HostDisk;
use crate::simulation::store::SharedStore;
use crate::simulation::world::World;
use crate::simulation::{VOLUME, create, new_disk, parts};
use crate::{Durability, MappedVolume, Parts, Secrets, Settings, VolumeError};

const BATCH: &[u8] = b"NVLOGBAT";
const BLOCKS: u64 = 4;

struct Bench {
    world: Rc<World>,
    store: SharedStore,
    disk: HostDisk,
}

impl Bench {
    fn new() -> Bench {
        let world = World::new(7);
        let bench = Bench { store: SharedStore::new(&world), disk: new_disk(&world), world };
        create(&bench.world, &bench.parts(Some([2; 32])), VOLUME, BLOCKS * BLOCK as u64).unwrap();
        bench
    }

    fn parts(&self, data_key: Option<[u8; 32]>) -> Parts {
        let process = self.world.new_process();
        Parts { secrets: Secrets { pool_key: [1; 32], data_key }, ..parts(&self.world, &self.store, &self.disk, process) }
    }

    /// Opens the volume, writes this version to its first block, and is killed after a flush.
    fn write(&self, version: u64) {
        let parts = self.parts(Some([2; 32]));
        let process = self.world.new_process();
        let writing = async move {
            let volume = MappedVolume::open(&parts, VOLUME, settings()).await.map_err(|error| error.to_string())?;
            let wrote = volume.write(0, Bytes::from(content_of(version))).await;
            wrote.and(volume.flush().await).map_err(|errno| errno.to_string())
        };
        self.world.wait_for(process, writing).unwrap().unwrap();
        self.world.kill(process);
    }

    /// What an opening with this key comes to: the first two blocks.
    fn read(&self, data_key: Option<[u8; 32]>) -> Result<Vec<u8>, VolumeError> {
        let parts = self.parts(data_key);
        let process = self.world.new_process();
        let found = Rc::new(RefCell::new(None));
        let told = found.clone();
        let reading = async move {
            let read = match MappedVolume::open(&parts, VOLUME, settings()).await {
                Ok(volume) => Ok(volume.read(0, 2 * BLOCK as u64).await.map_err(|errno| errno.to_string())?),
                Err(error) => Err(error),
            };
            told.replace(Some(read));
            Ok::<(), String>(())
        };
        self.world.wait_for(process, reading).unwrap().unwrap();
        self.world.kill(process);
        found.take().unwrap()
    }

    /// Where batches begin that carry a payload.
    fn batches(&self) -> Vec<usize> {
        let content = self.disk.content();
        let begins = |at: &usize| content[*at..].starts_with(BATCH) && content[at + 72] > 0;
        (4096..content.len()).step_by(512).filter(begins).collect()
    }
}

impl Drop for Bench {
    fn drop(&mut self) {
        self.world.end();
    }
}

/// Nothing reaches the pool.
fn settings() -> Settings {
    Settings { durability: Durability::Local, ..Settings::default() }
}

fn first_blocks(version: u64) -> Vec<u8> {
    [content_of(version), vec![0; BLOCK]].concat()
}

#[test]
fn nothing_of_what_was_written_lies_in_the_log_and_every_opening_has_a_salt() {
    let bench = Bench::new();
    bench.write(1);
    bench.write(1);
    let content = bench.disk.content();
    let plain = content_of(1);
    assert!(!content.windows(32).any(|window| *window == plain[..32]), "the log holds plain text");
    let batches = bench.batches();
    let [first, second] = [0, 1].map(|index| content[batches[index] + 96..batches[index] + 128].to_vec());
    assert!(batches.len() == 2 && first != second && first != [0; 32]);
    assert_eq!(bench.read(Some([2; 32])), Ok(first_blocks(1)));
}

#[test]
fn another_key_or_none_is_told_before_anything_is_touched() {
    let bench = Bench::new();
    bench.write(1);
    let before = bench.disk.content();
    for key in [Some([3; 32]), None] {
        assert_eq!(bench.read(key), Err(VolumeError::LogKey));
        assert!(bench.disk.content() == before, "the log was changed");
    }
    assert_eq!(bench.read(Some([2; 32])), Ok(first_blocks(1)), "the owner did not change either");
}

#[test]
fn rot_behind_a_header_changes_nothing_and_no_nonce_is_used_twice() {
    let bench = Bench::new();
    bench.write(1);
    let mut content = bench.disk.content();
    content[bench.batches()[0] + 144 + 48] ^= 0x10;
    bench.disk.set_content(content);
    assert_eq!(bench.read(Some([2; 32])), Ok(first_blocks(1)));
}

/// Whoever can write to the disk can repair every CRC.
#[test]
fn a_record_that_somebody_moved_or_changed_is_never_replayed() {
    // The block it goes to, its kind, the payload's tag, what was durable, the salt, the header's tag.
    for at in [144 + 9, 144, 144 + 33, 49, 97, 130] {
        let bench = Bench::new();
        bench.write(1);
        let batch = bench.batches()[0];
        let mut content = bench.disk.content();
        content[batch + at] ^= 0x10;
        let crc = crc32c(&content[batch + 12..batch + 144 + 48]);
        content[batch + 8..batch + 12].copy_from_slice(&crc.to_le_bytes());
        bench.disk.set_content(content);
        match bench.read(Some([2; 32])) {
            Ok(read) => assert!(read.iter().all(|byte| *byte == 0), "byte {at}"),
            Err(error) => assert!(matches!(error, VolumeError::LogDamaged { .. }), "byte {at}: {error}"),
        }
    }
}
