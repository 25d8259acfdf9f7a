//! What is written to blocks: new contents, and contents that were written before, anywhere, so that duplicates are found.
//!
//! Only some contents have an entry in the index of duplicates, one in 64. Most runs begin with one of those, or nothing would ever be found.

use std::cell::{Cell, RefCell};
use std::ops::Range;
use std::rc::Rc;
use std::sync::OnceLock;

use dedup::hash::BlockHash;
use dedup::index::is_hook;

use crate::Secrets;
use crate::bytes_at::u64_at;
use crate::segment::BLOCK;
use crate::simulation::VOLUME;
use crate::simulation::world::Random;

/// Identifies what is in a block; 0 is zeroes.
pub type Version = u64;

/// Runs that may be written again.
const RUNS_MAX: usize = 64;
/// Contents with an entry in the index, from here on.
const INDEXED_FROM: Version = 1 << 40;
const INDEXED: usize = 32;

/// Shared by all histories of a world, so that no two new contents are the same.
#[derive(Clone, Default)]
pub struct Contents(Rc<State>);

#[derive(Default)]
struct State {
    next: Cell<u64>,
    runs: RefCell<Vec<Vec<Version>>>,
}

impl Contents {
    /// A number that was not given before.
    pub fn number(&self) -> u64 {
        self.0.next.set(self.0.next.get() + 1);
        self.0.next.get()
    }

    /// Something to write to so many blocks, half of the time something that was written before.
    pub fn draw(&self, random: &Random, blocks: usize) -> Vec<Version> {
        let mut run = if random.per_mille(500) { self.written_before(random, blocks) } else { Vec::new() };
        if run.is_empty() && random.per_mille(700) {
            run.push(indexed()[random.below(INDEXED as u64) as usize]);
        }
        run.extend((run.len()..blocks).map(|_| self.number()));
        self.remember(&run, random);
        run
    }

    fn written_before(&self, random: &Random, blocks: usize) -> Vec<Version> {
        let runs = self.0.runs.borrow();
        let Some(run) = runs.get(random.below(runs.len().max(1) as u64) as usize) else { return Vec::new() };
        let from = if random.per_mille(700) { 0 } else { random.below(run.len() as u64) as usize };
        run[from..].iter().copied().take(blocks).collect()
    }

    fn remember(&self, run: &[Version], random: &Random) {
        let mut runs = self.0.runs.borrow_mut();
        if runs.len() == RUNS_MAX {
            runs.swap_remove(random.below(RUNS_MAX as u64) as usize);
        }
        runs.push(run.to_vec());
    }
}

/// Contents that have an entry in the index of the simulated volumes.
pub fn indexed() -> &'static [Version] {
    static FOUND: OnceLock<Vec<Version>> = OnceLock::new();
    FOUND.get_or_init(|| {
        let hasher = Secrets { pool_key: [1; 32], data_key: None }.hasher(VOLUME);
        let hash = |version: &Version| -> BlockHash { hasher.hash(content_of(*version).as_slice().try_into().expect("a block")) };
        (INDEXED_FROM..).filter(|version| is_hook(&hash(version))).take(INDEXED).collect()
    })
}

/// The content of a block.
pub fn content_of(version: Version) -> Vec<u8> {
    if version == 0 {
        return vec![0; BLOCK];
    }
    let words = [version, version.rotate_left(32), version.wrapping_mul(0x9e37_79b9_7f4a_7c15), !version];
    let pattern: Vec<u8> = words.iter().flat_map(|word| word.to_le_bytes()).collect();
    pattern.repeat(BLOCK / pattern.len())
}

/// What a block holds; an error if that was never written to any.
pub fn version_of(block: u64, bytes: &[u8]) -> Result<Version, String> {
    let version = u64_at(bytes, 0);
    if bytes != content_of(version) {
        return Err(format!("block {block} holds what was never written (it begins with {:x?})", &bytes[..32]));
    }
    Ok(version)
}

/// The contents of a run.
pub fn contents_of(run: &[Version]) -> Vec<u8> {
    run.iter().flat_map(|version| content_of(*version)).collect()
}

/// Offset and length of blocks, in bytes.
pub fn place(blocks: &Range<u64>) -> (u64, u64) {
    (blocks.start * BLOCK as u64, (blocks.end - blocks.start) * BLOCK as u64)
}
