//! Snapshots of several volumes by one command: all of them or none, even if the daemon is killed meanwhile.
//!
//! ```text
//!   command:  note what will be made ─ make it ─ forget the note ─ answer
//!   start:    take back what is noted still ─ forget it ─ serve
//! ```
//!
//! Invariants:
//! - Nothing that was answered as made is noted; a snapshot that the catalogue had before its command never is.
//! - What cannot be taken back stays noted, and no snapshot of that name is made of that volume before it was.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::sync::mpsc;
use std::time::Duration;

use backends::{Layout, PoolError};
use parking_lot::Mutex;
use serde::{Deserialize, Serialize};
use uuid::Uuid;

use super::Daemon;
use super::data_dir::DataDir;
use crate::error::{Error, ErrorKind, Result};
use crate::names::VolumeId;

const FILE: &str = "joint_snapshots.json";
/// How long start waits until all is taken back. What takes longer goes on by itself, a volume at a time.
const PATIENCE: Duration = Duration::from_secs(20);

/// A snapshot that may have been made.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Noted {
    pool: String,
    /// A name may come to mean another volume.
    volume_uuid: Uuid,
    snapshot: String,
}

/// Those of commands that are under way, and of those that were cut off.
pub struct JointSnapshots {
    data_dir: Arc<DataDir>,
    /// All that is in the file, whatever of it could not be written.
    noted: Mutex<BTreeSet<Noted>>,
}

impl JointSnapshots {
    pub fn load(data_dir: Arc<DataDir>) -> Result<JointSnapshots> {
        let noted = Mutex::new(data_dir.read(FILE)?);
        Ok(JointSnapshots { data_dir, noted })
    }

    fn note(&self, which: &[Noted]) -> Result<()> {
        let mut noted = self.noted.lock();
        noted.extend(which.iter().cloned());
        self.data_dir.write(FILE, &*noted)
    }

    fn forget(&self, which: &[Noted]) -> Result<()> {
        let mut noted = self.noted.lock();
        let left: BTreeSet<Noted> = noted.iter().filter(|one| !which.contains(one)).cloned().collect();
        self.data_dir.write(FILE, &left)?;
        *noted = left;
        Ok(())
    }

    fn is_empty(&self) -> bool {
        self.noted.lock().is_empty()
    }

    fn has(&self, one: &Noted) -> bool {
        self.noted.lock().contains(one)
    }

    fn by_pool(&self) -> BTreeMap<String, Vec<Noted>> {
        let mut by_pool: BTreeMap<String, Vec<Noted>> = BTreeMap::new();
        for one in self.noted.lock().iter() {
            by_pool.entry(one.pool.clone()).or_default().push(one.clone());
        }
        by_pool
    }
}

impl Daemon {
    /// Takes back what an earlier run left of its commands; waits for a pool for at most `pool_limit`.
    pub(super) fn take_back_cut_off(self: &Arc<Self>, pool_limit: Duration) {
        let (sender, receiver) = mpsc::channel::<()>();
        for (pool, noted) in self.joint_snapshots.by_pool() {
            let (daemon, sender) = (self.clone(), sender.clone());
            std::thread::spawn(move || {
                daemon.pools.wait_for(&pool, pool_limit);
                noted.iter().for_each(|one| say_if_left(one, daemon.find_and_take_back(one)));
                drop(sender);
            });
        }
        drop(sender);
        let _ = receiver.recv_timeout(PATIENCE);
    }

    fn find_and_take_back(&self, one: &Noted) -> Result<()> {
        let id = self.snapshot_of(one)?;
        let _held = self.hold([&id]);
        self.take_back(&id, one)
    }

    /// The snapshot as it is called now.
    fn snapshot_of(&self, one: &Noted) -> Result<VolumeId> {
        let records = self.pools.get(&one.pool)?.list()?;
        let record = records.into_iter().find(|record| record.uuid == one.volume_uuid);
        let record = record.ok_or_else(|| Error::not_found(format!("pool {} has no such volume", one.pool)))?;
        Ok(VolumeId { snapshot: Some(one.snapshot.clone()), ..VolumeId::new(&one.pool, &record.name) })
    }

    /// Deletes a snapshot that is noted, if it was made, and forgets the note. The caller holds its volume.
    fn take_back(&self, id: &VolumeId, one: &Noted) -> Result<()> {
        if !self.joint_snapshots.has(one) {
            return Ok(());
        }
        let record = self.record(id)?;
        if record.uuid != one.volume_uuid {
            return Err(Error::not_found(format!("volume {} is another one by now", id.volume())));
        }
        self.open.ensure_closed(id, false, "taking the snapshot back")?;
        let pool = self.pools.get(&id.pool)?;
        match pool.delete_snapshot(&id.name, &one.snapshot) {
            Ok(()) => tracing::warn!("snapshot {id} was taken back: its command did not make it of all volumes that it named"),
            Err(PoolError::NotFound(_)) => {}
            // A pool without snapshots.
            Err(PoolError::Unsupported(_)) if record.layout == Layout::Raw => {}
            Err(PoolError::InUse(why)) if pool.list()?.iter().any(|record| record.origin.as_ref() == Some(&id.short())) => {
                tracing::warn!("snapshot {id} is kept, though its command did not make it of all volumes that it named: {why}");
            }
            Err(error) => return Err(error.into()),
        }
        self.joint_snapshots.forget(std::slice::from_ref(one))
    }

    /// Takes back what is noted of exactly these snapshots, which are about to be made. The caller holds their volumes.
    pub(super) fn take_back_earlier(&self, targets: &[VolumeId]) -> Result<()> {
        if self.joint_snapshots.is_empty() {
            return Ok(());
        }
        for target in targets {
            let taken_back = self.take_back(target, &self.noted(target)?);
            taken_back
                .map_err(|error| error.of(format!("snapshot {target}: taking back what a command that was cut off left")))?;
        }
        Ok(())
    }

    /// Runs `make`, which makes all of `targets` or takes back what it made. The caller holds their volumes, and of several, none of the snapshots is in the
    /// catalogue.
    pub(super) fn all_or_none<T>(&self, targets: &[VolumeId], make: impl FnOnce() -> Result<T>) -> Result<T> {
        if targets.len() == 1 {
            return make();
        }
        let noted = targets.iter().map(|target| self.noted(target)).collect::<Result<Vec<Noted>>>()?;
        self.joint_snapshots.note(&noted)?;
        let made = make().and_then(|made| self.joint_snapshots.forget(&noted).map(|()| made));
        let error = match made {
            Ok(made) => return Ok(made),
            Err(error) => error,
        };
        for (target, one) in targets.iter().zip(&noted) {
            let is_gone = self.record(target).is_ok_and(|record| !record.snapshots.contains_key(&one.snapshot));
            // One that existed, though the catalogue did not say so, is not ours.
            let forgets = is_gone || error.kind == ErrorKind::Exists;
            let one_only = std::slice::from_ref(one);
            say_if_left(one, if forgets { self.joint_snapshots.forget(one_only) } else { self.take_back(target, one) });
        }
        Err(error)
    }

    fn noted(&self, target: &VolumeId) -> Result<Noted> {
        let snapshot = target.snapshot.clone().unwrap_or_default();
        Ok(Noted { pool: target.pool.clone(), volume_uuid: self.record(target)?.uuid, snapshot })
    }
}

fn say_if_left(one: &Noted, taken_back: Result<()>) {
    if let Err(error) = taken_back {
        let Noted { pool, volume_uuid, snapshot } = one;
        tracing::warn!(
            "snapshot {snapshot} of the volume with UUID {volume_uuid} in pool {pool} is left behind, if it was made: {error}; taking it back is \
             tried again at the next start ({FILE} in data_dir names it)"
        );
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn noted(pool: &str, volume: u128, snapshot: &str) -> Noted {
        Noted { pool: pool.to_owned(), volume_uuid: Uuid::from_u128(volume), snapshot: snapshot.to_owned() }
    }

    #[test]
    fn commands_at_once_note_and_forget_their_own() {
        let folder = tempfile::tempdir().unwrap();
        let data_dir = Arc::new(DataDir::open(folder.path()).unwrap());
        let snapshots = Arc::new(JointSnapshots::load(data_dir.clone()).unwrap());
        let (cut_off, gone) = ([noted("p", 1, "s"), noted("q", 2, "s")], [noted("r", 3, "s")]);
        snapshots.note(&cut_off).unwrap();
        std::thread::scope(|scope| {
            for volume in 10..18 {
                let (snapshots, gone) = (snapshots.clone(), gone.clone());
                scope.spawn(move || {
                    let own = [noted("p", volume, "s"), noted("q", volume, "s")];
                    for _ in 0..10 {
                        snapshots.note(&own).unwrap();
                        assert!(own.iter().all(|one| snapshots.has(one)) && !snapshots.has(&gone[0]));
                        snapshots.forget(&own).unwrap();
                        assert!(!own.iter().any(|one| snapshots.has(one)));
                    }
                });
            }
        });
        let by_pool = JointSnapshots::load(data_dir).unwrap().by_pool();
        assert_eq!(by_pool.into_values().collect::<Vec<_>>().concat(), cut_off);
    }

    #[test]
    fn what_cannot_be_written_stays_noted() {
        let folder = tempfile::tempdir().unwrap();
        let snapshots = JointSnapshots::load(Arc::new(DataDir::open(folder.path()).unwrap())).unwrap();
        let (first, second) = (noted("p", 1, "s"), noted("p", 2, "s"));
        snapshots.note(std::slice::from_ref(&first)).unwrap();
        std::fs::create_dir(folder.path().join("joint_snapshots.json.new")).unwrap();
        assert!(snapshots.note(std::slice::from_ref(&second)).is_err());
        assert!(snapshots.forget(std::slice::from_ref(&first)).is_err());
        assert!(snapshots.has(&first) && snapshots.has(&second));
    }
}
