//! Cases about a store whose content somebody else has changed: objects in the wrong place, old ones, expired ones, of another format, wrong ones under a good seal.

use std::collections::BTreeSet;
use std::time::Duration;

use blockdev::Errno;
use bytes::Bytes;
use dedup::body::{BODY_LEN_MAX, Body, FrameReader};
use dedup::frame::{Allowed, choose};
use dedup::location::UNIT_LEN;

use super::bench::{BLOCKS, Bench, Owner, numbers};
use crate::bytes_at::crc32c;
use crate::checkpoint::pack;
use crate::names::{Source, root_path};
use crate::object::{self, CLEAR_LEN, Kind, Object};
use crate::progress::Progress;
use crate::reduce::Secrets;
use crate::segment::BLOCK;
use crate::simulation::VOLUME;
use crate::simulation::contents::{Version, content_of, indexed, version_of};
use crate::step_header::StepHeader;
use crate::{Durability, Settings, VolumeError};

const SECRETS: Secrets = Secrets { pool_key: [1; 32], data_key: None };

/// Everything is in the pool.
fn checkpoint(bench: &Bench, owner: &Owner) {
    bench.run(owner, |volume| async move {
        volume.destage().await.unwrap();
        volume.checkpoint().await.unwrap();
    });
}

/// Each block by itself; `None`: it cannot be read.
fn blocks(bench: &Bench, owner: &Owner) -> Vec<Option<Version>> {
    let block = BLOCK as u64;
    let read = |number| {
        let read = bench.run(owner, move |volume| async move { volume.read(number * block, block).await });
        read.ok().map(|bytes| version_of(number, &bytes).unwrap())
    };
    (0..bench.blocks).map(read).collect()
}

fn findings(bench: &Bench, owner: &Owner) -> Vec<String> {
    bench.run(owner, |volume| async move { volume.scrub(&Progress::default()).await }).unwrap()
}

/// Objects with blocks, and not only headers.
fn with_blocks(bench: &Bench, family: &str) -> Vec<String> {
    let has_body = |name: &String| {
        let content = bench.store.content(name).unwrap();
        name.contains(family) && content.len() > CLEAR_LEN && content.len() > object::header_len(&content).unwrap()
    };
    bench.store.names().into_iter().filter(has_body).collect()
}

#[test]
fn case_16_an_object_stands_in_the_place_of_another() {
    let mut lost = 0;
    for seed in 1_600..1_640 {
        let bench = Bench::new(seed, BLOCKS, Durability::Remote);
        let disk = bench.disk();
        let mut owner = bench.open(&disk);
        bench.write(&owner, 0, &numbers(100)).unwrap();
        checkpoint(&bench, &owner);
        let is_reopened = bench.world.random.per_mille(500);
        if is_reopened {
            bench.kill(owner);
            owner = bench.open(&disk);
        }
        let names = with_blocks(&bench, "/w/");
        let pick = || names[bench.world.random.below(names.len() as u64) as usize].clone();
        let (one, other) = (pick(), pick());
        let content = bench.store.content(&other).unwrap();
        bench.store.change(&one, |bytes| *bytes = content.to_vec());
        let found = blocks(&bench, &owner);
        for (block, version) in found.iter().zip(numbers(100)).filter_map(|(found, version)| Some(((*found)?, version))) {
            assert_eq!(block, version, "seed {seed}: another block was handed out");
        }
        let gone = found.iter().filter(|found| found.is_none()).count();
        assert_eq!(gone > 0, one != other, "seed {seed}: {found:?}");
        lost += gone;
        bench.store.repair();
        assert_eq!(bench.content(&owner).unwrap(), numbers(100), "seed {seed}");
        bench.scan(&owner);
    }
    assert!(lost > 40, "{lost} blocks could not be read");
}

/// Objects whose headers in clear had rotted are put back. Whoever read them meanwhile does not go by what they said then.
#[test]
fn objects_that_are_put_back_read_right_at_once() {
    for seed in 1_640..1_650 {
        let bench = Bench::new(seed, BLOCKS, Durability::Remote);
        let disk = bench.disk();
        let owner = bench.open(&disk);
        bench.write(&owner, 0, &numbers(100)).unwrap();
        checkpoint(&bench, &owner);
        bench.kill(owner);
        let owner = bench.open(&disk);
        bench.pass(&owner, Duration::from_secs(1));
        let names = with_blocks(&bench, "/w/");
        // The body is said to begin elsewhere.
        names.iter().for_each(|name| bench.store.change(name, |bytes| bytes[57] ^= 1));
        // The first of several that cannot be read is an error for all of them.
        assert_eq!(bench.content(&owner), Err(Errno::EIO), "seed {seed}: {} objects", names.len());
        bench.store.repair();
        assert_eq!(bench.content(&owner).unwrap(), numbers(100), "seed {seed}");
    }
}

/// Somebody puts an old root back, as from a copy of the bucket. No volume is as it was then, without a word.
#[test]
fn case_16_an_old_root_is_put_back() {
    let (mut refused, mut right) = (0, 0);
    for seed in 1_650..1_670 {
        let bench = Bench::new(seed, BLOCKS, Durability::Remote);
        let name = root_path(&VOLUME);
        let mut roots: BTreeSet<Bytes> = BTreeSet::new();
        let mut keep = || roots.extend(bench.store.root(&name));
        for round in 1..5 {
            keep();
            let owner = bench.open(&bench.disk());
            keep();
            bench.write(&owner, 0, &numbers(round * 100)[..1 + bench.world.random.below(BLOCKS) as usize]).unwrap();
            keep();
            if bench.world.random.per_mille(500) {
                checkpoint(&bench, &owner);
                keep();
            }
            bench.kill(owner);
        }
        let newest = bench.store.root(&name).unwrap();
        let reader = bench.open(&bench.disk());
        let expected = bench.content(&reader).unwrap();
        checkpoint(&bench, &reader);
        bench.kill(reader);
        let good = bench.store.root(&name).unwrap();
        for old in roots.into_iter().filter(|old| *old != newest) {
            bench.store.set_root(&name, old);
            match bench.try_open(&bench.disk(), bench.settings) {
                Ok(owner) => {
                    right += 1;
                    for (found, expected) in blocks(&bench, &owner).into_iter().zip(&expected) {
                        assert!(found.is_none_or(|found| found == *expected), "seed {seed}: what was flushed is gone: {found:?}");
                    }
                    bench.kill(owner);
                }
                Err(_) => refused += 1,
            }
            bench.store.set_root(&name, good.clone());
        }
    }
    assert!(refused > 20, "{refused} old roots were refused, {right} led to what is right");
}

/// What is under the seal of an object: its header, and the blocks of its body.
fn opened(content: &Bytes, source: &Source) -> (StepHeader, Vec<[u8; BLOCK]>) {
    let Ok(Object::Sealed { inner, opened, .. }) = object::open(content, &SECRETS.sealer(VOLUME), source) else { panic!() };
    let header = StepHeader::decode(&inner).unwrap();
    let mut frames = FrameReader::default();
    let body = &content[opened.body_at as usize..];
    let block_at = |spot: &dedup::location::Spot| {
        let stored = &body[spot.unit() as usize * UNIT_LEN..];
        frames.read(&opened.opener, spot.unit(), stored).unwrap().as_chunks().0[usize::from(spot.block())]
    };
    let blocks = header.stored.iter().map(|(_, spot)| spot).map(block_at).collect();
    (header, blocks)
}

/// Memory failed after a block was hashed and before it was sealed: a block of an object is another one now. Which block that is.
fn flip_between_hash_and_seal(bench: &Bench, name: &str, wrong: Version) -> u64 {
    let source = Source::parse(name).unwrap();
    let (header, mut contents) = opened(&bench.store.content(name).unwrap(), &source);
    let flipped = bench.world.random.below(contents.len() as u64);
    contents[flipped as usize] = content_of(wrong).try_into().unwrap();
    let blocks: Vec<&[u8; BLOCK]> = contents.iter().collect();
    let (body, spots) = pack(Body::new(BODY_LEN_MAX), &blocks, choose(Allowed::Off, 0.0, None));
    assert_eq!(spots, header.stored.iter().map(|(_, spot)| *spot).collect::<Vec<_>>());
    let sealed = object::seal(&SECRETS.sealer(VOLUME), &source, Kind::Step, &[7; 32], &header.encode(), body).unwrap();
    bench.store.change(name, |bytes| *bytes = [&sealed.header[..], &sealed.body].concat());
    flipped
}

/// The seal vouches for what nobody wrote, and whoever writes what was meant gets it as well.
#[test]
fn case_48_a_bit_flips_between_hash_and_seal() {
    const WRONG: Version = 900;
    const HALF: u64 = BLOCKS / 2;
    for seed in 4_800..4_830 {
        for is_checked in [false, true] {
            let bench = Bench::new(seed, BLOCKS, Durability::Remote);
            let segment_bytes = HALF * BLOCK as u64;
            let settings = Settings { compression: Allowed::Off, gathers: false, segment_bytes, ..bench.settings };
            let disk = bench.disk();
            let owner = bench.try_open(&disk, settings).unwrap();
            // What has an entry in the index comes first.
            let run: Vec<Version> = indexed()[..1].iter().copied().chain(100..99 + HALF).collect();
            bench.write(&owner, 0, &run).unwrap();
            checkpoint(&bench, &owner);
            bench.kill(owner);
            let [name] = &with_blocks(&bench, "/w/")[..] else { panic!("seed {seed}: not one segment") };
            let flipped = flip_between_hash_and_seal(&bench, name, WRONG) as usize;

            let owner = bench.try_open(&disk, settings).unwrap();
            bench.pass(&owner, Duration::from_secs(1));
            let mut expected: Vec<Option<Version>> = run.iter().copied().map(Some).chain((0..HALF).map(|_| Some(0))).collect();
            expected[flipped] = Some(WRONG);
            assert_eq!(blocks(&bench, &owner), expected, "seed {seed}: the seal is good, and hides it");
            if is_checked {
                let told = findings(&bench, &owner);
                let offset = format!("bytes {} to ", flipped * BLOCK);
                assert!(matches!(&told[..], [one] if one.contains(&offset) && one.contains(name)), "seed {seed}: {told:?}");
                expected[flipped] = None;
                assert_eq!(blocks(&bench, &owner), expected, "seed {seed}");
            }
            bench.write(&owner, HALF, &run).unwrap();
            checkpoint(&bench, &owner);
            bench.run(&owner, |volume| async move { volume.gather(1.0).await }).unwrap();
            expected.splice(HALF as usize.., run.iter().copied().map(Some));
            if !is_checked {
                expected[HALF as usize + flipped] = Some(WRONG);
            }
            assert_eq!(blocks(&bench, &owner), expected, "seed {seed}");
            assert_eq!(findings(&bench, &owner).len(), if is_checked { 1 } else { 2 }, "seed {seed}");
            // Written again, it is whole.
            bench.write(&owner, 0, &run).unwrap();
            bench.write(&owner, HALF, &run).unwrap();
            checkpoint(&bench, &owner);
            assert_eq!(findings(&bench, &owner), Vec::<String>::new(), "seed {seed}");
            assert_eq!(bench.content(&owner).unwrap(), [&run[..], &run].concat(), "seed {seed}");
            bench.scan(&owner);
        }
    }
}

/// Some rule of the bucket has removed objects by their age.
#[test]
fn case_50_a_rule_of_the_bucket_expires_objects() {
    let (mut missing, mut refused) = (0, 0);
    for seed in 5_000..5_040 {
        let bench = Bench::new(seed, BLOCKS, Durability::Remote);
        let owner = bench.open(&bench.disk());
        for round in 1..4 {
            let count = 1 + bench.world.random.below(BLOCKS) as usize;
            bench.write(&owner, 0, &numbers(round * 100)[..count]).unwrap();
            checkpoint(&bench, &owner);
        }
        let expected = bench.content(&owner).unwrap();
        bench.kill(owner);
        let family = ["/w/", "/g/", "/m/"][bench.world.random.below(3) as usize];
        let expired: Vec<String> =
            with_blocks(&bench, family).into_iter().filter(|_| bench.world.random.per_mille(600)).collect();
        expired.iter().for_each(|name| bench.store.change(name, Vec::clear));
        let disk = bench.disk();
        match bench.try_open(&disk, bench.settings) {
            Ok(owner) => {
                let found = blocks(&bench, &owner);
                for (found, expected) in found.iter().zip(&expected) {
                    assert!(found.is_none_or(|found| found == *expected), "seed {seed}: {found:?}");
                }
                let lost = found.iter().filter(|found| found.is_none()).count();
                missing += lost;
                let told = findings(&bench, &owner);
                assert!(
                    lost == 0 || told.iter().any(|one| expired.iter().any(|name| one.contains(name))),
                    "seed {seed}: {told:?}"
                );
                // The volume goes on, and is whole once everything was written again.
                bench.write(&owner, 0, &numbers(700)).unwrap();
                bench.run(&owner, |volume| async move { volume.gather(1.0).await }).unwrap();
                assert_eq!(bench.content(&owner).unwrap(), numbers(700), "seed {seed}");
                bench.kill(owner);
                assert_eq!(bench.content(&bench.open(&disk)).unwrap(), numbers(700), "seed {seed}");
            }
            Err(VolumeError::ObjectDamaged { object, .. }) => {
                assert!(expired.contains(&object), "seed {seed}: {object}");
                refused += 1;
                bench.store.repair();
                assert_eq!(bench.content(&bench.open(&disk)).unwrap(), expected, "seed {seed}");
            }
            Err(error) => panic!("seed {seed}: {error}"),
        }
    }
    assert!(missing > 20 && refused > 5, "{missing} blocks missing, {refused} openings refused");
}

/// What a later release wrote is refused in these words, and left alone; the release that wrote it finds everything as it was.
#[test]
fn case_28_what_a_later_release_wrote_is_left_alone() {
    for seed in 2_800..2_810 {
        let bench = Bench::new(seed, BLOCKS, Durability::Local);
        let disk = bench.disk();
        let owner = bench.open(&disk);
        bench.write(&owner, 0, &numbers(100)).unwrap();
        bench.kill(owner);
        let later = |bytes: &[u8], end: usize| {
            let mut bytes = bytes.to_vec();
            bytes[12] += 1;
            let crc = crc32c(&bytes[12..end]);
            bytes[8..12].copy_from_slice(&crc.to_le_bytes());
            bytes
        };
        let (name, log) = (root_path(&VOLUME), disk.content());
        let root = bench.store.root(&name).unwrap();
        let refuses = |what: &str| {
            let names = bench.store.names();
            let (log, root) = (disk.content(), bench.store.root(&name));
            for accept_loss in [false, true] {
                let refused = bench.try_open(&disk, Settings { accept_loss, ..bench.settings }).err();
                assert_eq!(refused, Some(VolumeError::FormatVersion(what.to_owned())), "seed {seed}");
            }
            assert!(disk.content() == log && bench.store.root(&name) == root && bench.store.names() == names, "seed {seed}");
        };
        bench.store.set_root(&name, later(&root, root.len()).into());
        refuses(&name);
        bench.store.set_root(&name, root);
        disk.set_content(later(&log, 96));
        refuses("the local log");
        disk.set_content(log);
        assert_eq!(bench.content(&bench.open(&disk)).unwrap(), numbers(100), "seed {seed}");
    }
}

/// What a check misses because it moves is looked at again.
#[test]
fn a_check_beside_writes_and_collections_finds_no_damage_that_is_not_there() {
    for seed in 5_100..5_130 {
        let bench = Bench::new(seed, BLOCKS, Durability::Local);
        let owner = bench.open(&bench.disk());
        bench.write(&owner, 0, &numbers(100)).unwrap();
        let volume = owner.volume.clone();
        let world = bench.world.clone();
        let busy = async move {
            for number in 0.. {
                let bytes = Bytes::from(content_of(200 + number));
                volume.write(world.random.below(BLOCKS) * BLOCK as u64, bytes).await.unwrap();
                if number % 5 == 0 {
                    volume.gather(1.0).await.unwrap();
                }
            }
        };
        bench.world.spawn(owner.process, Box::pin(busy));
        for _ in 0..5 {
            assert_eq!(findings(&bench, &owner), Vec::<String>::new(), "seed {seed}");
        }
    }
}
