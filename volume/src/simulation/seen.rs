//! What schedules saw, counted, so that it is visible that everything happens.

use std::fmt;
use std::ops::AddAssign;

use crate::tally::Tally;

macro_rules! counts {
    ($($name:ident: $words:literal,)*) => {
        #[derive(Clone, Copy, Default, Debug)]
        pub struct Seen {
            $(pub $name: u64,)*
        }

        impl AddAssign for Seen {
            fn add_assign(&mut self, other: Seen) {
                $(self.$name += other.$name;)*
            }
        }

        impl fmt::Display for Seen {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                $(writeln!(f, concat!("{:>12} ", $words), self.$name)?;)*
                Ok(())
            }
        }
    };
}

counts! {
    lives: "lives",
    takeovers: "of them ended by another host",
    changes: "changes acknowledged",
    flushes: "flushes acknowledged",
    checkpoints: "checkpoints",
    hits: "blocks found to be stored already",
    collections: "collections that moved blocks",
    blocks_moved: "blocks moved",
    forwards: "blocks read where they were moved to",
    foreign_forwards: "objects of ancestors found to have moved",
    handles_held: "times that a handle was not released because of a reader",
    handles_released: "handles released for other objects",
    snapshots_made: "snapshots made",
    snapshots_deleted: "snapshots deleted",
    snapshots_read: "snapshots read back",
    rollbacks: "rollbacks",
    resizes: "resizes",
    joined: "volumes that joined a group",
    left: "volumes that left one",
    clones: "clones made",
    flattened: "clones flattened",
    refusals: "deletions refused because of clones",
    volumes_deleted: "volumes deleted",
    damaged: "objects damaged in the pool",
    reads_failed: "reads that failed because of that",
    scans: "volumes scanned, and their objects counted",
    full_disks: "times that the disk of a log was full",
    refused: "changes refused for want of space",
}

impl Seen {
    /// What an open volume has counted.
    pub(crate) fn of(tally: &Tally) -> Seen {
        Seen {
            checkpoints: tally.checkpoints.get(),
            hits: tally.hits.get(),
            collections: tally.collections.get(),
            blocks_moved: tally.blocks_moved.get(),
            forwards: tally.forwards.get(),
            foreign_forwards: tally.foreign_forwards.get(),
            handles_held: tally.handles_held.get(),
            handles_released: tally.handles_released.get(),
            ..Seen::default()
        }
    }
}
