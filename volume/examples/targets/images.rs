//! What the pool keeps of machines that were cloned from one image and went their own ways.
//!
//! ```text
//!   clones     base.raw ─▶ volume ─▶ snapshot ─▶ a clone for each server-*.raw, to which the blocks are written that differ from the base
//!   together   a volume for each server-*.raw, all of one group, written one after the other
//!              └─▶ everything read back ─▶ garbage collected ─▶ bytes of all files of the pool
//! ```
//!
//! Each clone deduplicates against what it wrote itself, and shares the blocks that it left as they were. Volumes of one group deduplicate against each
//! other, and know nothing of a base.

use std::fs::{self, File};
use std::io::Read;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use backends::segments::OpenOptions;
use backends::segments::directory::DirectoryStore;
use blockdev::Op;
use blockdev::memory_disk::MemoryDisk;
use tempfile::TempDir;
use uuid::Uuid;
use volume::device::GroupDevice;
use volume::{Allowed, Beginning, Settings};

use crate::rig::{BLOCK, GIB, MIB, Open, Rig};
use crate::store::Counting;
use crate::tell;

/// Bytes after which it is waited for that the pool has them: no guest writes as fast as this for long.
const SETTLE_EVERY: u64 = 128 * MIB;
/// Objects with a larger share in use are left as they are.
const COLLECT_BELOW: f64 = 0.9;
const ZEROES: [u8; BLOCK as usize] = [0; BLOCK as usize];

/// Blocks that are not zero, and bytes written.
#[derive(Default)]
struct Written {
    in_use: u64,
    bytes: u64,
}

pub fn measure(dataset: &Path) {
    let base = dataset.join("base.raw");
    let servers = servers(dataset);
    assert!(!servers.is_empty(), "{} holds no server-*.raw: run `cargo xtask dataset` with this folder", dataset.display());
    clones(dataset, &base, &servers);
    for (compression, target) in [(Allowed::Auto, "≥ 4.1×"), (Allowed::Cold, "≥ 4.5×"), (Allowed::Lz4, "≥ 3.1×")] {
        together(dataset, &servers, compression, target);
    }
}

/// A pool in a directory of its own, which is removed with the folder.
fn pool_in(folder: &TempDir, settings: Settings) -> (Rig, PathBuf) {
    let pool = folder.path().join("pool");
    DirectoryStore::make(&pool, Uuid::from_u128(2)).expect("a pool");
    let probe = Some(blockdev::random::uuid());
    let store = DirectoryStore::open(&pool, OpenOptions { expected: None, read_only: false, probe }).expect("the pool opens");
    (Rig::new(Counting::new(Arc::new(store)), log(), settings), pool)
}

fn together(dataset: &Path, servers: &[PathBuf], compression: Allowed, target: &str) {
    let folder = tempfile::tempdir_in(dataset).expect("a folder");
    let (rig, pool) = pool_in(&folder, Settings { compression, ..Settings::default() });
    let size_of = |server: &PathBuf| fs::metadata(server).expect("an image").len();
    rig.create(size_of(&servers[0]));
    let group = Arc::new(GroupDevice::open(&rig.options, log()).expect("the group opens"));
    let ids: Vec<Uuid> = (0..servers.len() as u128).map(|number| Uuid::from_u128(number + 1)).collect();
    for (id, server) in ids.iter().zip(servers).skip(1) {
        group.add(*id, Beginning::Empty(size_of(server))).expect("a volume joins");
    }
    let mut in_use = 0;
    for (id, server) in ids.iter().zip(servers) {
        let open = rig.attach(group.volume(*id).expect("it is there"));
        in_use += write(&open, server, None).in_use;
        tidy(&open);
        check(&open, server);
    }
    tell(&format!("volumes of one group, {compression:?}"), ratio(size(&pool), in_use), target);
}

fn ratio(stored: u64, in_use: u64) -> String {
    format!("{:.1} MiB for {} MiB: {:.2}×", stored as f64 / MIB as f64, in_use / MIB, in_use as f64 / stored as f64)
}

fn clones(dataset: &Path, base: &Path, servers: &[PathBuf]) {
    let folder = tempfile::tempdir_in(dataset).expect("a folder");
    let (rig, pool) = pool_in(&folder, Settings::default());
    rig.create(fs::metadata(base).expect("the base image").len());
    let open = rig.open();
    let of_base = write(&open, base, None);
    open.device.snapshot("base", 0).expect("a snapshot");
    open.device.wait_for_snapshot("base").expect("it is committed");
    tidy(&open);
    check(&open, base);
    drop(open);
    println!("| base | {} MiB in use, the pool has {} MiB | |", of_base.in_use / MIB, size(&pool) / MIB);
    let mut in_use = 0;
    for (number, server) in (10..).zip(servers) {
        let clone = Uuid::from_u128(number);
        rig.options.clone_snapshot("base", clone).expect("a clone");
        let open = rig.open_as(clone, log());
        let written = write(&open, server, Some(base));
        tidy(&open);
        check(&open, server);
        in_use += written.in_use;
        let name = server.file_stem().unwrap_or_default().display();
        println!(
            "| {name} | {} MiB in use, {} MiB written, the pool has {} MiB | |",
            written.in_use / MIB,
            written.bytes / MIB,
            size(&pool) / MIB
        );
    }
    let measured = ratio(size(&pool), in_use);
    tell("everything the pool has of machines cloned from one image", measured, "≥ 3.7× (isolated tenants and a library)");
}

fn servers(dataset: &Path) -> Vec<PathBuf> {
    let files = fs::read_dir(dataset).expect("the folder of the data set").filter_map(|file| Some(file.ok()?.path()));
    let is_server = |path: &PathBuf| {
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        name.starts_with("server-") && name.ends_with(".raw")
    };
    let mut servers: Vec<PathBuf> = files.filter(is_server).collect();
    servers.sort();
    servers
}

fn log() -> Arc<MemoryDisk> {
    Arc::new(MemoryDisk::new(GIB, 4096))
}

/// Parts of a mebibyte, with where they are.
fn parts(image: &Path) -> impl Iterator<Item = (u64, Vec<u8>)> {
    let mut file = File::open(image).expect("an image");
    let parts = fs::metadata(image).expect("an image").len() / MIB;
    (0..parts).map(move |number| {
        let mut part = vec![0; MIB as usize];
        file.read_exact(&mut part).expect("the image is read");
        (number * MIB, part)
    })
}

/// Writes an image over a volume that has what `below` has.
fn write(open: &Open, image: &Path, below: Option<&Path>) -> Written {
    let mut below = below.map(parts);
    let (mut written, mut settled) = (Written::default(), 0);
    for (offset, part) in parts(image) {
        let old = below.as_mut().and_then(Iterator::next).map_or_else(|| vec![0; MIB as usize], |(_, old)| old);
        let blocks = part.as_chunks::<{ BLOCK as usize }>().0.iter().zip(old.as_chunks::<{ BLOCK as usize }>().0);
        written.in_use += blocks.clone().filter(|(new, _)| **new != ZEROES).count() as u64 * BLOCK;
        let changed: Vec<(u64, &[u8; BLOCK as usize])> =
            (0..).zip(blocks).filter(|(_, (new, old))| new != old).map(|(number, (new, _))| (number, new)).collect();
        let runs = changed.chunk_by(|before, next| before.0 + 1 == next.0 && (*before.1 == ZEROES) == (*next.1 == ZEROES));
        open.load(runs.map(|run| {
            let (at, len) = (offset + run[0].0 * BLOCK, run.len() as u64 * BLOCK);
            match *run[0].1 == ZEROES {
                true => (Op::WriteZeroes { unmap: true, fua: false, fast: false }, at, len, Vec::new()),
                false => (Op::Write { fua: false }, at, len, run.iter().flat_map(|(_, block)| block.iter().copied()).collect()),
            }
        }));
        written.bytes += changed.len() as u64 * BLOCK;
        if written.bytes - settled >= SETTLE_EVERY {
            settled = written.bytes;
            open.device.settle().expect("it settles");
        }
    }
    open.device.settle().expect("it settles");
    written
}

fn tidy(open: &Open) {
    open.device.gather(COLLECT_BELOW).expect("it collects");
    open.device.settle().expect("it settles");
}

/// Reads all of it back.
fn check(open: &Open, image: &Path) {
    for (offset, part) in parts(image) {
        assert!(open.read(offset, MIB) == part, "{} differs in the mebibyte at {offset}", image.display());
    }
}

/// Bytes of all files under a folder.
fn size(folder: &Path) -> u64 {
    let entries = fs::read_dir(folder).expect("a folder").map(|entry| entry.expect("an entry"));
    entries
        .map(|entry| {
            let about = entry.metadata().expect("what it is");
            if about.is_dir() { size(&entry.path()) } else { about.len() }
        })
        .sum()
}
