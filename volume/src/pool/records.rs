//! What volumes a pool has.
//!
//! ```text
//!   add:     staged ─ make ─▶ in the catalogue        retire:  in the catalogue ─▶ retired
//!   clear:   staged by somebody who crashed, or retired ─ sweep ─▶ forgotten
//! ```
//!
//! Each arrow is one atomic, durable step.

use std::sync::Arc;

use backends::catalogue::Catalogue;
use backends::pool::{Result, is_found};
use backends::{PoolError, VolumeRecord};
use uuid::Uuid;

/// A volume that is not in the catalogue, or not yet, and may have something in the store.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct Leaving {
    pub(super) volume: Uuid,
    pub(super) group: Uuid,
    /// It is being made.
    pub(super) is_staged: bool,
}

impl Leaving {
    pub(super) fn of(record: &VolumeRecord, is_staged: bool) -> Leaving {
        Leaving { volume: record.uuid, group: record.group(), is_staged }
    }
}

/// The catalogue of a pool. All calls block.
pub(super) trait Records: Send + Sync {
    fn list(&self) -> Result<Vec<VolumeRecord>>;

    /// All of them: fails rather than pass over a damaged one.
    fn list_all(&self) -> Result<Vec<VolumeRecord>>;

    fn get(&self, volume: &str) -> Result<VolumeRecord>;

    /// Whether there is such a volume.
    fn has(&self, volume: &str) -> Result<bool> {
        is_found(self.get(volume))
    }

    /// Adds a volume: stages it, then has it made by `make`. If that fails it stays staged.
    fn add(&self, record: &VolumeRecord, make: &dyn Fn() -> Result<()>) -> Result<()>;

    /// Changes the record of a volume, which is still called what `record` says. Doing it twice is doing it once.
    fn update(&self, record: &VolumeRecord, change: &dyn Fn(&mut VolumeRecord)) -> Result<()>;

    fn rename(&self, volume: &str, to: &str) -> Result<()>;

    /// Takes a volume out of the catalogue.
    fn retire(&self, record: &VolumeRecord) -> Result<()>;

    /// What is staged or retired.
    fn leaving(&self) -> Result<Vec<Leaving>>;

    /// Has `sweep` remove what is left of volumes that are retired, or that nobody makes any more, and forgets them once nothing more of them can come.
    fn clear(&self, sweep: &dyn Fn(Leaving) -> Result<()>) -> Result<()>;
}

/// The volume that was looked for has another name now, or is gone.
pub(super) fn moved_away(record: &VolumeRecord) -> PoolError {
    PoolError::NotFound(format!("volume {}: it was deleted or renamed meanwhile; try again", record.name))
}

/// Has all of them done, and tells of the first that failed.
pub(super) fn all_of(done: impl Iterator<Item = Result<()>>) -> Result<()> {
    done.fold(Ok(()), Result::and)
}

/// The catalogue of a driver that has a directory. Its lock is held while a volume is made, so that nobody clears it away meanwhile.
pub(super) struct DirectoryRecords(pub(super) Arc<Catalogue>);

impl DirectoryRecords {
    /// The record as it is now, if it is the same volume's.
    fn own(&self, record: &VolumeRecord) -> Result<VolumeRecord> {
        let now = self.0.get(&record.name)?;
        if now.uuid == record.uuid { Ok(now) } else { Err(moved_away(record)) }
    }
}

impl Records for DirectoryRecords {
    fn list(&self) -> Result<Vec<VolumeRecord>> {
        self.0.list()
    }

    fn list_all(&self) -> Result<Vec<VolumeRecord>> {
        self.0.list_all()
    }

    fn get(&self, volume: &str) -> Result<VolumeRecord> {
        self.0.get(volume)
    }

    fn has(&self, volume: &str) -> Result<bool> {
        self.0.has(volume)
    }

    fn add(&self, record: &VolumeRecord, make: &dyn Fn() -> Result<()>) -> Result<()> {
        let _lock = self.0.lock()?;
        self.0.refuse_existing(&record.name)?;
        self.0.stage(record)?;
        make()?;
        self.0.publish(record)
    }

    fn update(&self, record: &VolumeRecord, change: &dyn Fn(&mut VolumeRecord)) -> Result<()> {
        let _lock = self.0.lock()?;
        let before = self.own(record)?;
        let mut now = before.clone();
        change(&mut now);
        if now == before { Ok(()) } else { self.0.update(&now) }
    }

    fn rename(&self, volume: &str, to: &str) -> Result<()> {
        let _lock = self.0.lock()?;
        self.0.rename(volume, to)
    }

    fn retire(&self, record: &VolumeRecord) -> Result<()> {
        let _lock = self.0.lock()?;
        self.own(record)?;
        self.0.retire(record)
    }

    fn leaving(&self) -> Result<Vec<Leaving>> {
        Ok(self.0.retired()?.iter().map(|(record, is_staged)| Leaving::of(record, *is_staged)).collect())
    }

    fn clear(&self, sweep: &dyn Fn(Leaving) -> Result<()>) -> Result<()> {
        let _lock = self.0.lock()?;
        all_of(self.leaving()?.into_iter().map(|left| {
            sweep(left)?;
            self.0.forget(left.volume)
        }))
    }
}
