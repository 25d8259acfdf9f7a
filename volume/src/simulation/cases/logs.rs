//! Logs of which a crash, or rot, has left each possible part.

use std::time::Duration;

use bytes::Bytes;

use super::bench::{Bench, Owner};
use crate::segment::BLOCK;
use crate::simulation::contents::{Version, contents_of, version_of};
use crate::simulation::disk::HostDisk;
use crate::{Durability, Settings, VolumeError};

const BLOCKS: u64 = 8;
const KEYS: [Option<[u8; 32]>; 2] = [None, Some([2; 32])];

/// Nothing reaches the pool.
fn bench(seed: u64, data_key: Option<[u8; 32]>) -> Bench {
    let mut bench = Bench::with_key(seed, BLOCKS, Durability::Local, data_key);
    bench.settings = Settings { segment_bytes: 32 << 20, gathers: false, ..bench.settings };
    bench
}

fn disk(bench: &Bench, sector: usize) -> HostDisk {
    HostDisk::new(&bench.world, 128 * BLOCK, sector)
}

fn write(bench: &Bench, owner: &Owner, block: u64, versions: &[Version]) {
    let bytes = Bytes::from(contents_of(versions));
    bench.run(owner, move |volume| async move { volume.write(block * BLOCK as u64, bytes).await }).unwrap();
}

/// A log as it was, and as it is after one change that nobody has flushed.
struct Torn {
    bench: Bench,
    disk: HostDisk,
    before: Vec<u8>,
    after: Vec<u8>,
    /// Sectors that differ.
    sectors: Vec<usize>,
}

fn torn(seed: u64, sector: usize, data_key: Option<[u8; 32]>, change: impl Fn(&Bench, &Owner)) -> Torn {
    let bench = bench(seed, data_key);
    let disk = disk(&bench, sector);
    let owner = bench.open(&disk);
    bench.write(&owner, 0, &[101, 102, 103]).unwrap();
    let before = disk.content();
    change(&bench, &owner);
    let after = disk.content();
    bench.kill(owner);
    let differs = |number: &usize| before[number * sector..][..sector] != after[number * sector..][..sector];
    let sectors = (0..after.len() / sector).filter(differs).collect();
    Torn { bench, disk, before, after, sectors }
}

impl Torn {
    /// The log with some of the sectors that the change wrote.
    fn leave(&self, left: impl Fn(usize) -> bool) {
        let (mut content, sector) = (self.before.clone(), self.disk.sector());
        for (number, place) in self.sectors.iter().enumerate() {
            if left(number) {
                let bytes = place * sector..(place + 1) * sector;
                content[bytes.clone()].copy_from_slice(&self.after[bytes]);
            }
        }
        self.disk.set_content(content);
    }

    /// Opened, the volume holds this, and it goes on: with a shorter batch in the place of the torn one, and once more.
    fn check(&self, expected: &[Version], place: &str) {
        let mut expected = expected.to_vec();
        for version in [7, 8] {
            let owner = self.bench.open(&self.disk);
            assert_eq!(self.bench.content(&owner).unwrap(), expected, "{place}");
            self.bench.write(&owner, BLOCKS - 1, &[version]).unwrap();
            expected[BLOCKS as usize - 1] = version;
            self.bench.kill(owner);
        }
        let owner = self.bench.open(&self.disk);
        assert_eq!(self.bench.content(&owner).unwrap(), expected, "{place}");
        self.bench.scan(&owner);
    }
}

/// The last batch ends at each of its sectors, or lacks one of them. The disk watches that no key and nonce is used twice for what takes its place.
fn tear_at_every_sector(seed: u64, data_key: Option<[u8; 32]>) {
    const OLD: [Version; 8] = [101, 102, 103, 0, 0, 0, 0, 0];
    const NEW: [Version; 8] = [101, 202, 203, 204, 0, 0, 0, 0];
    for sector in [512, 4096] {
        for lacks_one in [false, true] {
            for number in 0.. {
                let torn = torn(seed, sector, data_key, |bench, owner| write(bench, owner, 1, &[202, 203, 204]));
                let count = torn.sectors.len();
                assert!(count >= 4, "{count} sectors of {sector} bytes");
                torn.leave(|index| if lacks_one { index != number } else { index < number });
                let expected = if number == count { NEW } else { OLD };
                torn.check(&expected, &format!("sector {number} of {count} of {sector} bytes, lacks only that: {lacks_one}"));
                if number == count {
                    break;
                }
            }
        }
    }
}

#[test]
fn case_01_the_last_batch_of_a_log_is_torn_at_every_sector() {
    tear_at_every_sector(100, None);
}

#[test]
fn case_15_and_47_the_torn_tail_of_an_encrypted_log_is_written_anew_under_another_key() {
    tear_at_every_sector(4_700, Some([2; 32]));
}

/// What the test above rests on.
#[test]
#[should_panic(expected = "a nonce was used twice")]
fn case_15_the_disk_notices_a_batch_that_is_encrypted_like_another_one() {
    let torn = torn(4_750, 4096, Some([2; 32]), |bench, owner| write(bench, owner, 1, &[202]));
    let owner = torn.bench.open(&torn.disk);
    let sector = torn.sectors[0] * 4096;
    let mut batch = torn.after[sector..sector + 2 * 4096].to_vec();
    batch[4096] ^= 1;
    let disk = owner.parts.disk.clone();
    torn.bench.run(&owner, |_| async move { disk.write(sector as u64, vec![Bytes::from(batch)]).await }).unwrap();
}

/// Three changes that were acknowledged, and not flushed: of their sectors, any may have come to the disk.
#[test]
fn case_03_every_subset_of_what_was_not_synced_is_lost() {
    for data_key in KEYS {
        let change = |bench: &Bench, owner: &Owner| (1..4).for_each(|block| write(bench, owner, block, &[200 + block]));
        let count = torn(300, 4096, data_key, change).sectors.len();
        assert_eq!(count, 6, "header and payload of three batches");
        for subset in 0_u32..1 << count {
            let torn = torn(300, 4096, data_key, change);
            torn.leave(|index| subset >> index & 1 == 1);
            let whole = (0..3).take_while(|batch| subset >> (2 * batch) & 3 == 3).count();
            let mut expected = vec![101, 102, 103, 0, 0, 0, 0, 0];
            (1..=whole).for_each(|block| expected[block] = 200 + block as u64);
            torn.check(&expected, &format!("sectors {subset:06b}"));
        }
    }
}

/// Everything was flushed. What is rotten is an error, or hurts nothing: it is never as if the change, or those after it, had not been made.
#[test]
fn case_02_a_bit_flips_at_each_place_of_a_log_that_is_durable() {
    for data_key in KEYS {
        let bench = bench(200, data_key);
        let disk = disk(&bench, 512);
        let owner = bench.open(&disk);
        let expected: Vec<Version> = vec![201, 202, 303, 304, 105, 106, 0, 0];
        for (block, versions) in [(0, vec![101, 102, 103, 104, 105, 106]), (0, vec![201, 202]), (2, vec![303, 304])] {
            write(&bench, &owner, block, &versions);
            bench.run(&owner, |volume| async move { volume.flush().await }).unwrap();
        }
        // The proof that the last one is durable.
        bench.pass(&owner, Duration::from_secs(1));
        bench.kill(owner);
        let content = disk.content();
        let last = content.iter().rposition(|byte| *byte != 0).unwrap();
        // Every byte of headers and records, and some of payloads.
        let is_header = |at: &usize| content[at / 512 * 512..].starts_with(b"NVLOG") && at % 512 < 144 + 48;
        let (mut refused, mut unreadable) = (0, 0);
        for at in (0..=last).filter(|at| is_header(at) || at % 509 == 0) {
            let mut rotten = content.clone();
            rotten[at] ^= 1 << (at % 8);
            disk.set_content(rotten);
            let owner = match bench.try_open(&disk, bench.settings) {
                Ok(owner) => owner,
                Err(error) => {
                    refused += 1;
                    assert!(is_about_the_log(&error), "byte {at}: {error}");
                    continue;
                }
            };
            for block in 0..BLOCKS {
                let (offset, len) = (block * BLOCK as u64, BLOCK as u64);
                match bench.run(&owner, move |volume| async move { volume.read(offset, len).await }) {
                    Ok(bytes) => assert_eq!(version_of(block, &bytes), Ok(expected[block as usize]), "byte {at}"),
                    Err(_) => unreadable += 1,
                }
            }
            bench.kill(owner);
        }
        assert!(refused > 300, "{refused} openings refused, {unreadable} blocks not read");
        disk.set_content(content);
        assert_eq!(bench.content(&bench.open(&disk)).unwrap(), expected);
    }
}

fn is_about_the_log(error: &VolumeError) -> bool {
    use VolumeError::{ForeignLog, FormatVersion, LogDamaged, LogDoesNotFit, LogKey, LogMissing, NotALog, StaleLog};
    matches!(error, ForeignLog | FormatVersion(_) | LogDamaged { .. } | LogDoesNotFit | LogKey | LogMissing | NotALog | StaleLog)
}
