//! Snapshots: create at one point in time, list, delete, roll back, compare.

use std::collections::BTreeMap;

use backends::SnapshotRecord;

use super::Daemon;
use crate::api::reply::Listed;
use crate::api::types::SnapshotInfo;
use crate::error::{Error, Result};
use crate::names::{VolumeId, VolumeRef};

impl Daemon {
    /// Makes all of `names` (`VOL@SNAP` each) at one point in time, or none of them.
    pub fn create_snapshots(&self, names: &[String], takes_over: bool) -> Result<Vec<SnapshotInfo>> {
        let mut targets: Vec<VolumeId> = Vec::new();
        for name in names {
            let (volume, snapshot) = name.parse::<VolumeRef>()?.with_snapshot()?;
            let id = self.resolve(&volume)?;
            let target = VolumeId { snapshot: Some(snapshot), ..id };
            if targets.iter().any(|other| other.volume() == target.volume()) {
                return Err(Error::invalid(format!("volume {} is named twice", target.volume())));
            }
            targets.push(target);
        }
        if targets.is_empty() {
            return Err(Error::invalid("name at least one VOL@SNAP"));
        }
        let volumes: Vec<VolumeId> = targets.iter().map(VolumeId::volume).collect();
        let _held = self.hold(&volumes);
        if takes_over {
            volumes.iter().try_for_each(|id| self.take_over(id))?;
        }
        self.take_back_earlier(&targets)?;
        if targets.len() > 1 {
            targets.iter().try_for_each(|target| self.refuse_existing_snapshot(target))?;
        }
        let made = self.all_or_none(&targets, || self.with_writes_held(&volumes, || self.take_snapshots(&targets)))?;
        targets.iter().map(|target| told(target, made.get(target))).collect()
    }

    fn refuse_existing_snapshot(&self, target: &VolumeId) -> Result<()> {
        let snapshot = target.snapshot.as_deref().unwrap_or_default();
        if self.record(target)?.snapshots.contains_key(snapshot) {
            return Err(Error::exists(format!("snapshot {target} exists already: choose another name")));
        }
        Ok(())
    }

    /// One call per pool and snapshot name; what was made is taken back if a later one fails.
    fn take_snapshots(&self, targets: &[VolumeId]) -> Result<BTreeMap<VolumeId, SnapshotRecord>> {
        let mut groups: BTreeMap<(&str, &str), Vec<&str>> = BTreeMap::new();
        for target in targets {
            let snapshot = target.snapshot.as_deref().unwrap_or_default();
            groups.entry((&target.pool, snapshot)).or_default().push(&target.name);
        }
        let mut made: BTreeMap<VolumeId, SnapshotRecord> = BTreeMap::new();
        for ((pool_name, snapshot), volumes) in groups {
            let taken = self.pools.get(pool_name).and_then(|pool| Ok(pool.snapshot(&volumes, snapshot)?));
            let taken = taken.inspect_err(|_| made.keys().for_each(|id| self.leave_none(id)))?;
            let id = |volume: String| VolumeId { snapshot: Some(snapshot.to_owned()), ..VolumeId::new(pool_name, &volume) };
            made.extend(taken.into_iter().map(|(volume, record)| (id(volume), record)));
        }
        Ok(made)
    }

    /// Takes back a snapshot that others of the same point in time did not follow.
    fn leave_none(&self, id: &VolumeId) {
        let snapshot = id.snapshot.as_deref().unwrap_or_default();
        let deleted = self.pools.get(&id.pool).and_then(|pool| Ok(pool.delete_snapshot(&id.name, snapshot)?));
        if let Err(error) = deleted {
            tracing::warn!("snapshot {id} was left behind: {error}");
        }
    }

    /// Runs `work` while no write of the open ones among `volumes` is in flight or starts.
    pub(super) fn with_writes_held<T>(&self, volumes: &[VolumeId], work: impl FnOnce() -> Result<T>) -> Result<T> {
        let _held: Vec<_> = volumes.iter().filter_map(|id| self.open.get(id)).map(|volume| volume.hold_writes()).collect();
        work()
    }

    fn snapshot_info(&self, id: &VolumeId) -> Result<SnapshotInfo> {
        let record = self.record(id)?;
        told(id, record.snapshots.get(id.snapshot.as_deref().unwrap_or_default()))
    }

    /// A snapshot that exists.
    pub(super) fn resolve_snapshot(&self, name: &str) -> Result<VolumeId> {
        let (volume, snapshot) = name.parse::<VolumeRef>()?.with_snapshot()?;
        let id = VolumeId { snapshot: Some(snapshot), ..self.resolve(&volume)? };
        self.snapshot_info(&id)?;
        Ok(id)
    }

    /// Of all volumes, or of one.
    pub fn list_snapshots(&self, volume: Option<&str>) -> Result<Listed<SnapshotInfo>> {
        let Listed { found, unanswered } = match volume {
            Some(volume) => Listed { found: vec![self.show_volume(volume)?], unanswered: Vec::new() },
            None => self.list_volumes(None)?,
        };
        Ok(Listed { found: found.into_iter().flat_map(|volume| volume.snapshots).collect(), unanswered })
    }

    pub fn delete_snapshot(&self, name: &str, takes_over: bool) -> Result<()> {
        let id = self.resolve_snapshot(name)?;
        let _held = self.hold([&id]);
        let exports = self.exports.ids_of_exactly(&id);
        if !exports.is_empty() {
            let ids = exports.join(", ");
            return Err(Error::in_use(format!("snapshot {id}: delete refused: it is exported ({ids})")));
        }
        self.open.ensure_closed(&id, false, "delete of the snapshot")?;
        if takes_over {
            self.take_over(&id)?;
        }
        Ok(self.pools.get(&id.pool)?.delete_snapshot(&id.name, id.snapshot.as_deref().unwrap_or_default())?)
    }

    pub fn rollback(&self, name: &str, takes_over: bool) -> Result<()> {
        let id = self.resolve_snapshot(name)?;
        let volume = id.volume();
        let _held = self.hold([&volume]);
        let exports = self.exports.ids_of_exactly(&volume);
        if !exports.is_empty() {
            let ids = exports.join(", ");
            return Err(Error::in_use(format!(
                "volume {volume}: rollback refused: it is exported ({ids}); `novastor export remove` first"
            )));
        }
        if takes_over {
            self.take_over(&volume)?;
        }
        self.open.ensure_closed(&volume, false, "rollback")?;
        Ok(self.pools.get(&id.pool)?.rollback(&id.name, id.snapshot.as_deref().unwrap_or_default())?)
    }
}

fn told(id: &VolumeId, found: Option<&SnapshotRecord>) -> Result<SnapshotInfo> {
    let SnapshotRecord { created, size } = found.ok_or_else(|| missing(id))?;
    Ok(SnapshotInfo { name: id.to_string(), created: *created, size: *size })
}

fn missing(id: &VolumeId) -> Error {
    Error::not_found(format!("snapshot {id} does not exist: `novastor snapshot list {}` shows those that do", id.volume()))
}
