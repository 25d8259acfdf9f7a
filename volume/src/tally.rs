//! What an open volume has done so far, counted.

use std::cell::Cell;

/// A number that only grows.
#[derive(Default, Debug)]
pub(crate) struct Count(Cell<u64>);

impl Count {
    pub(crate) fn add(&self, more: u64) {
        self.0.set(self.0.get() + more);
    }

    pub(crate) fn get(&self) -> u64 {
        self.0.get()
    }
}

#[derive(Default, Debug)]
pub(crate) struct Tally {
    pub(crate) checkpoints: Count,
    /// Blocks that steps hold, those among them that were found to be stored already, and bytes of the objects with the others.
    pub(crate) blocks: Count,
    pub(crate) hits: Count,
    pub(crate) stored_bytes: Count,
    /// Collections that moved blocks, and the blocks.
    pub(crate) collections: Count,
    pub(crate) blocks_moved: Count,
    /// Bytes of objects that collections did away with.
    pub(crate) bytes_freed: Count,
    /// Blocks that were read where collections had moved them.
    pub(crate) forwards: Count,
    /// Objects of ancestors that turned out to have moved.
    pub(crate) foreign_forwards: Count,
    /// Handles that nothing leads to, and that a reader may still follow.
    pub(crate) handles_held: Count,
    /// Handles that other objects may have from then on.
    pub(crate) handles_released: Count,
}
