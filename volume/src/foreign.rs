//! Finding what ancestors, or a clone that was flattened, have moved.
//!
//! ```text
//!   an object is gone ─▶ it, and what was forwarded to it, is lost ─▶ newest checkpoints: who has it now? ─▶ forwarded, if it still is lost
//! ```
//!
//! Invariants: each lost object is asked for and noted for itself. Owners move all that an object has; a clone copies what it knows of. What is told
//! counts only for what is lost when it is told.

use crate::chain::Chain;
use crate::error::VolumeError;
use crate::names::{Group, Source};
use crate::reader::Reader;
use crate::table::{Entry, Table};

/// Where a checkpoint says that an object's blocks are.
struct Told {
    from: Source,
    to: Source,
    entry: Entry,
}

fn told_by(table: &Table, lost: &[Source]) -> Vec<Told> {
    let told = |from: &Source| {
        let to = table.forward_of(from)?;
        Some(Told { from: *from, to: table.source(to)?, entry: *table.get(to)? })
    };
    // A clone need not know the newest place of what an ancestor has moved.
    lost.iter().filter_map(told).filter(|told| !lost.contains(&told.to)).collect()
}

impl Reader {
    /// Finds out where the blocks of an object that is gone are now, and of those that were forwarded to it.
    pub(crate) async fn moved_away(&self, handle: u32) -> Result<(), VolumeError> {
        let lost = self.lost(handle);
        let Some(source) = self.table.borrow().source(handle).filter(|_| !lost.is_empty()) else { return Ok(()) };
        let is_own = self.table.borrow().groups()[0] == source.group;
        let missing = || VolumeError::ObjectDamaged { object: source.path(), why: "it is missing" };
        if is_own {
            // Whoever took the volume over removes what no checkpoint knows.
            let is_replaced = self.chain.read_root().await?.0.owner != self.owner;
            return Err(if is_replaced { VolumeError::Fenced } else { missing() });
        }
        let told = self.who_moved(source.group, &lost).await?;
        // Somebody may have found out meanwhile, copied the blocks, or forgotten the object.
        let still_lost = self.lost(handle);
        if told.is_empty() && still_lost == lost {
            return Err(missing());
        }
        for told in told.iter().filter(|told| still_lost.contains(&told.from)) {
            self.note_moved(told).ok_or_else(missing)?;
        }
        Ok(())
    }

    /// What is lost with the object of a handle: those that were forwarded there, and itself unless it was forwarded.
    fn lost(&self, handle: u32) -> Vec<Source> {
        let table = self.table.borrow();
        let itself = table.is_live(handle).then_some(handle);
        let handles = table.forwarded_to(handle).iter().copied().chain(itself);
        handles.filter_map(|handle| table.source(handle)).collect()
    }

    /// What tables of checkpoints say of where lost objects are: the newest of `group`, whose object is gone, and of the volume, if somebody else reads
    /// it, as it may have been flattened since.
    async fn who_moved(&self, group: Group, lost: &[Source]) -> Result<Vec<Told>, VolumeError> {
        let is_view = self.table.borrow().groups()[0] != self.chain.group;
        if is_view {
            let told = told_by(&self.chain.read_meta().await?.1.table, lost);
            if !told.is_empty() || group == self.chain.group {
                return Ok(told);
            }
        }
        let ancestor = Chain { group, ..self.chain.clone() };
        Ok(told_by(&ancestor.read_ancestor().await?.table, lost))
    }

    /// `None`: there are too many handles.
    fn note_moved(&self, told: &Told) -> Option<()> {
        let mut table = self.table.borrow_mut();
        let Some(handle) = table.handle_of(&told.from) else { return Some(()) };
        let Entry { content, blocks, bytes, .. } = told.entry;
        let mut to = table.add(told.to, content, blocks, bytes)?;
        match table.forward_of(&told.to) {
            // Its owner has moved all of it on, as was found out before.
            Some(next) if table.source(next).is_some_and(|source| source.group == told.to.group) => to = next,
            // A clone has copied some of it.
            Some(_) => table.revive(to),
            None => {}
        }
        // Owners move all that an object has; a clone copies what it knows.
        match told.to.group == told.from.group {
            true => table.forward(handle, to),
            false => table.forward_alone(handle, to),
        }
        self.foreign_moves.borrow_mut().extend([handle, to]);
        self.tally.foreign_forwards.add(1);
        Some(())
    }
}
