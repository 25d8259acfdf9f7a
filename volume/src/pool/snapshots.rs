//! Snapshots of mapped volumes, as their pool sees them.
//!
//! ```text
//!   operation ─▶ the open device, or one opened for it ─▶ engine: it is done ─▶ mirror: the record says so
//!   opening   ─▶ engine ─▶ mirror: whatever a crash kept from the record
//! ```
//!
//! The engine is the truth; the record of a volume repeats it for whoever does not open the volume.

use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::Arc;
use std::time::{Duration, UNIX_EPOCH};

use backends::pool::Result;
use backends::{Claim, PoolError, SnapshotRecord, VolumeRecord};
use blockdev::{BlockDevice, clock};

use super::MappedPool;
use crate::device::{MappedDevice, OpenError, SnapshotDevice};
use crate::error::VolumeError;

/// By name.
type Snapshots = BTreeMap<String, SnapshotRecord>;

/// Ranges that the engine is asked for at once.
const RANGES_MAX: usize = 65_536;
/// How long a snapshot may be on its way before its owner counts as gone.
const OWNER_PATIENCE: Duration = Duration::from_secs(5);
const PAUSE: Duration = Duration::from_millis(50);

/// What the engine refused or failed to do, in the words of a pool. `what` names the operation and the volume.
pub(super) fn refused(what: &str, error: OpenError) -> PoolError {
    let error = match error {
        OpenError::Device(error) => return error.into(),
        OpenError::Volume(error) => error,
    };
    let message = format!("{what}: {error}");
    match error {
        VolumeError::NoSnapshot | VolumeError::NoVolume => PoolError::NotFound(message),
        VolumeError::SnapshotExists | VolumeError::VolumeExists => PoolError::Exists(message),
        VolumeError::SnapshotHasClones(_) | VolumeError::VolumeHasClones(_) | VolumeError::TooManyAncestors => {
            PoolError::InUse(message)
        }
        VolumeError::SnapshotName | VolumeError::BadSize => PoolError::Invalid(message),
        _ => PoolError::Backend(message),
    }
}

fn no_snapshot(volume: &str, snapshot: &str) -> PoolError {
    PoolError::NotFound(format!("volume {volume} has no snapshot {snapshot}; list them with: novastor snapshot list {volume}"))
}

fn now_seconds() -> u64 {
    clock::wall().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs())
}

impl MappedPool {
    /// The device of a volume that is open here.
    pub(super) fn opened(&self, record: &VolumeRecord) -> Option<Arc<MappedDevice>> {
        let open = self.open.lock();
        open.get(&record.name).filter(|(uuid, _)| *uuid == record.uuid).and_then(|(_, device)| device.upgrade())
    }

    /// The device of a volume, opened if it is not open here, and never taken from another host; it closes with its last user.
    pub(super) fn device(&self, record: &VolumeRecord) -> Result<Arc<MappedDevice>> {
        match self.opened(record) {
            Some(device) => Ok(device),
            None => self.open_device(record, Claim::Own),
        }
    }

    /// Makes the record say what the engine says, if it does not; `record` is what it says now. A deletion that a crash interrupted is completed first.
    /// Blocks.
    pub(super) fn mirror(&self, record: &VolumeRecord, device: &MappedDevice) -> Result<()> {
        let (snapshots, size) = (self.settled(record, device)?, device.geometry().size);
        let is_right = snapshots == record.snapshots && size == record.size;
        if is_right { Ok(()) } else { self.note(record, &snapshots, size) }
    }

    /// The same after the engine has changed, and `record` perhaps too since it was read: gives the snapshots that there are.
    pub(super) fn mirror_change(&self, record: &VolumeRecord, device: &MappedDevice) -> Result<Snapshots> {
        let snapshots = self.settled(record, device)?;
        self.note(record, &snapshots, device.geometry().size)?;
        Ok(snapshots)
    }

    fn note(&self, record: &VolumeRecord, snapshots: &Snapshots, size: u64) -> Result<()> {
        self.records.update(record, &|record| {
            record.snapshots.clone_from(snapshots);
            record.size = size;
        })
    }

    /// The snapshots that the engine has, once it has none that is half deleted.
    fn settled(&self, record: &VolumeRecord, device: &MappedDevice) -> Result<Snapshots> {
        let failed = |error| refused(&format!("volume {}", record.name), error);
        let listed = || -> Result<Snapshots> {
            let snapshots = device.snapshots().map_err(failed)?.into_iter();
            Ok(snapshots.map(|found| (found.name, SnapshotRecord { created: found.created, size: found.size })).collect())
        };
        let mut snapshots = listed()?;
        let half_deleted: Vec<&String> = record.snapshots.keys().filter(|name| !snapshots.contains_key(*name)).collect();
        for name in &half_deleted {
            match device.delete_snapshot(name) {
                Ok(()) | Err(OpenError::Volume(VolumeError::NoSnapshot | VolumeError::SnapshotHasClones(_))) => {}
                Err(error) => return Err(failed(error)),
            }
        }
        if !half_deleted.is_empty() {
            snapshots = listed()?;
        }
        Ok(snapshots)
    }

    /// One snapshot of each volume, by their names, or none of any. A crash meanwhile may leave some of them.
    pub(super) fn snapshot_mapped(&self, volumes: &[VolumeRecord], snapshot: &str) -> Result<Snapshots> {
        let created = now_seconds();
        let mut devices = Vec::with_capacity(volumes.len());
        for record in volumes {
            devices.push((record, self.device(record)?));
        }
        let mut found = Snapshots::new();
        for (done, (record, device)) in devices.iter().enumerate() {
            let what = format!("snapshot {}@{snapshot}", record.name);
            let made = device.snapshot(snapshot, created).map_err(|error| refused(&what, error));
            match made.and_then(|()| self.mirror_change(record, device)) {
                Ok(mut snapshots) => found.extend(snapshots.remove(snapshot).map(|made| (record.name.clone(), made))),
                Err(error) => {
                    let is_made = !matches!(error, PoolError::Exists(_));
                    devices[..done + usize::from(is_made)].iter().for_each(|(record, _)| self.take_back(record, snapshot));
                    return Err(error);
                }
            }
        }
        for (_, device) in devices.iter().filter(|(_, device)| Arc::strong_count(device) == 1) {
            // Closed now, the volume would keep it in the log. If it cannot be brought into the pool, the next opening does that.
            let _ = device.wait_for_snapshot(snapshot);
        }
        Ok(found)
    }

    /// Undoes a snapshot that others of the same point in time did not follow.
    pub(super) fn take_back(&self, record: &VolumeRecord, snapshot: &str) {
        let taken_back = self.device(record).and_then(|device| {
            device
                .take_back_snapshot(snapshot)
                .map_err(|error| refused(&format!("snapshot {}@{snapshot}", record.name), error))?;
            self.mirror_change(record, &device)
        });
        match taken_back {
            Ok(_) | Err(PoolError::NotFound(_)) => {}
            Err(error) => tracing::warn!("snapshot {}@{snapshot} was left behind: {error}", record.name),
        }
    }

    pub(super) fn delete_mapped_snapshot(&self, record: &VolumeRecord, snapshot: &str) -> Result<()> {
        let device = self.device(record)?;
        let what = format!("snapshot {}@{snapshot}: delete refused", record.name);
        loop {
            let groups = match device.delete_snapshot(snapshot) {
                Ok(()) => {
                    self.mirror_change(record, &device)?;
                    return self.forget_origin(record, snapshot);
                }
                Err(OpenError::Volume(VolumeError::NoSnapshot)) => {
                    self.mirror_change(record, &device)?;
                    return Err(no_snapshot(&record.name, snapshot));
                }
                Err(OpenError::Volume(VolumeError::SnapshotHasClones(groups))) => groups,
                Err(error) => return Err(refused(&what, error)),
            };
            self.forget_strays(record, &groups, &format!("{what}: it has clones"))?;
        }
    }

    /// The volume's content and size become the snapshot's.
    pub(super) fn roll_back_mapped(&self, record: &VolumeRecord, snapshot: &str) -> Result<()> {
        let device = self.device(record)?;
        match device.roll_back(snapshot) {
            Ok(_) => self.mirror_change(record, &device).map(drop),
            Err(OpenError::Volume(VolumeError::NoSnapshot)) => Err(no_snapshot(&record.name, snapshot)),
            Err(error) => Err(refused(&format!("rollback of {} to {snapshot}", record.name), error)),
        }
    }

    /// A snapshot for reading. One that is only in the log is waited for; if nobody brings it into the pool, its volume is opened, which does.
    pub(super) fn view(&self, record: &VolumeRecord, snapshot: &str) -> Result<SnapshotDevice> {
        let engine = self.engine(record, &self.store()?)?;
        let mut found = SnapshotDevice::open(&engine, snapshot);
        let is_pending = |found: &std::result::Result<SnapshotDevice, OpenError>| {
            matches!(found, Err(OpenError::Volume(VolumeError::NoSnapshot))) && record.snapshots.contains_key(snapshot)
        };
        let deadline = clock::monotonic() + OWNER_PATIENCE;
        // Another host may be about to; the volume is not taken from it.
        let is_elsewhere = self.is_elsewhere(record.group())?;
        while is_pending(&found) && is_elsewhere && clock::monotonic() < deadline {
            std::thread::sleep(PAUSE);
            found = SnapshotDevice::open(&engine, snapshot);
        }
        if is_pending(&found) {
            let settled = self.device(record)?.wait_for_snapshot(snapshot);
            found = settled.and_then(|()| SnapshotDevice::open(&engine, snapshot));
        }
        found.map_err(|error| match error {
            OpenError::Volume(VolumeError::NoSnapshot) => no_snapshot(&record.name, snapshot),
            error => refused(&format!("snapshot {}@{snapshot}", record.name), error),
        })
    }

    /// Ranges, in bytes, in which a snapshot may differ from another one, or from the volume as it is. Of two that are in the pool, the volume need
    /// not be opened.
    pub(super) fn changed_mapped(&self, record: &VolumeRecord, before: &str, to: Option<&str>) -> Result<Vec<Range<u64>>> {
        let failed = |error| refused(&format!("diff of {}@{before}", record.name), error);
        if let Some(to) = to {
            let engine = self.engine(record, &self.store()?)?;
            match in_parts(|from| engine.diff_snapshots(before, to, from, RANGES_MAX)) {
                Err(OpenError::Volume(VolumeError::NoSnapshot)) => {}
                found => return found.map_err(failed),
            }
        }
        let device = self.device(record)?;
        in_parts(|from| device.diff(before, to, from, RANGES_MAX)).map_err(failed)
    }
}

/// Asks again and again for the ranges from some offset on, until there are no more.
fn in_parts(
    mut ask: impl FnMut(u64) -> std::result::Result<Vec<Range<u64>>, OpenError>,
) -> std::result::Result<Vec<Range<u64>>, OpenError> {
    let mut all: Vec<Range<u64>> = Vec::new();
    loop {
        let found = ask(all.last().map_or(0, |range| range.end))?;
        let is_all = found.len() < RANGES_MAX;
        all.extend(found);
        if is_all {
            return Ok(all);
        }
    }
}
