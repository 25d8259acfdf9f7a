//! Volumes that share what they store: which group a new one joins, and how one leaves it.
//!
//! ```text
//!   create with dedup = "tenant" ─▶ a group of the same tenant and policy whose owner this host was last, or a new one
//!   delete                       ─▶ retire the record ─▶ out of the group, if it has others; else the group ends
//!   opening a group              ─▶ what is in it and in no record, and nobody is making, is taken out
//! ```
//!
//! A group has one owner, so a volume joins one only where that is: on another host it would take the others from their owner.

use std::collections::BTreeSet;

use backends::pool::Result;
use backends::{Claim, Layout, PoolError, VolumeRecord};
use uuid::Uuid;

use super::records::Leaving;
use super::snapshots::refused;
use super::{MappedPool, groups, segments};
use crate::device::GroupDevice;

/// Where a group is.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Place {
    /// This host had it last.
    Here,
    Elsewhere,
    /// It has no root that can be read, or is deleted.
    Nowhere,
}

pub(super) fn names_of(records: &[VolumeRecord]) -> String {
    records.iter().map(|record| record.name.as_str()).collect::<Vec<_>>().join(", ")
}

impl MappedPool {
    /// Gives a new volume that is not to be alone its group. True if that is there already. For whoever holds the membership.
    pub(super) fn join(&self, record: &mut VolumeRecord) -> Result<bool> {
        let alike = |other: &VolumeRecord| {
            (&other.tenant, &other.policy, other.encrypted) == (&record.tenant, &record.policy, record.encrypted)
        };
        let groups: BTreeSet<Uuid> = self.all_mapped()?.into_iter().filter(alike).filter_map(|other| other.group).collect();
        let mut found = None;
        for group in groups {
            if self.place_of(group)? == Place::Here && !self.store()?.is_erased(group)? {
                found = Some(group);
                break;
            }
        }
        record.group = Some(found.unwrap_or_else(blockdev::random::uuid));
        Ok(found.is_some())
    }

    /// Which host had a group last.
    fn place_of(&self, group: Uuid) -> Result<Place> {
        let root = groups::root(&*self.store()?.store, group).map_err(|error| segments::failed(&self.name, error))?;
        let log = self.logs.id(group)?;
        Ok(match root.filter(|root| !root.is_deleted) {
            None => Place::Nowhere,
            Some(root) if log == Some(root.log_id) => Place::Here,
            Some(_) => Place::Elsewhere,
        })
    }

    /// Whether this host had a group last.
    pub(super) fn is_here(&self, group: Uuid) -> Result<bool> {
        Ok(self.place_of(group)? == Place::Here)
    }

    /// Whether another host had a group last, as far as this one knows.
    pub(super) fn is_elsewhere(&self, group: Uuid) -> Result<bool> {
        Ok(self.place_of(group)? == Place::Elsewhere)
    }

    /// Those in the pool. Fails rather than miss one.
    pub(super) fn all_mapped(&self) -> Result<Vec<VolumeRecord>> {
        let records = self.records.list_all()?.into_iter();
        Ok(records.filter(|record| record.layout == Layout::Mapped).collect())
    }

    /// The other volumes of a group.
    pub(super) fn others(&self, group: Uuid, volume: Uuid) -> Result<Vec<VolumeRecord>> {
        let records = self.all_mapped()?.into_iter();
        Ok(records.filter(|other| other.group() == group && other.uuid != volume).collect())
    }

    /// Whether the group of a volume that leaves, or was not made, has others, or will have.
    pub(super) fn is_needed(&self, left: Leaving) -> Result<bool> {
        // In this order a volume that is published meanwhile is found in one of the two.
        let leaving = self.records.leaving()?;
        let joins = |other: &Leaving| other.is_staged && other.group == left.group && other.volume != left.volume;
        Ok(leaving.iter().any(joins) || !self.others(left.group, left.volume)?.is_empty())
    }

    /// Refuses what would take the volumes of a group from another host. `what` names the operation.
    pub(super) fn refuse_elsewhere(&self, record: &VolumeRecord, what: &str) -> Result<()> {
        let group = record.group();
        if record.group.is_none() || self.place_of(group)? != Place::Elsewhere || self.store()?.is_erased(group)? {
            return Ok(());
        }
        let others = match names_of(&self.others(group, record.uuid)?) {
            names if names.is_empty() => "others".to_owned(),
            names => names,
        };
        Err(PoolError::InUse(format!(
            "{what} refused: volume {} may share what it stores with {others}, and another host had them last. Do it there; or export it from here \
             first, which takes all of them over",
            record.name
        )))
    }

    /// Removes a retired volume from the group that it has in common with another one. With a pool that takes nothing that goes on later.
    pub(super) fn take_out(&self, record: &VolumeRecord, other: &VolumeRecord) -> Result<()> {
        let removed = self.open_group(other, Claim::Own)?.remove(record.uuid);
        removed.map_err(|error| refused(&format!("volume {}: delete", record.name), error))
    }

    /// Takes out what a crash, or another host, left in a group that was opened through one of its volumes.
    pub(super) fn forget_lost(&self, record: &VolumeRecord, group: &GroupDevice) {
        if record.group.is_none() {
            return;
        }
        let forgotten = || -> Result<()> {
            let there = group.volumes().map_err(|error| refused(&format!("the group of volume {}", record.name), error))?;
            let leaving = self.records.leaving()?;
            let records = self.all_mapped()?;
            let is_known = |id: &Uuid| {
                records.iter().any(|record| record.uuid == *id) || leaving.iter().any(|left| left.is_staged && left.volume == *id)
            };
            there.into_iter().filter(|id| !is_known(id)).for_each(|id| group.remove_later(id));
            Ok(())
        };
        if let Err(error) = forgotten() {
            tracing::warn!("what deleted volumes left cannot be removed now, it is tried again at the next opening: {error}");
        }
    }

    /// Clones within the group of a snapshot that is no more have no origin: nothing ties them to it.
    pub(super) fn forget_origin(&self, record: &VolumeRecord, snapshot: &str) -> Result<()> {
        if record.group.is_none() {
            return Ok(());
        }
        let origin = format!("{}@{snapshot}", record.name);
        let clones = self.mapped_records()?.into_iter();
        clones.filter(|clone| clone.group == record.group && clone.origin.as_ref() == Some(&origin)).try_for_each(|clone| {
            match self.records.update(&clone, &|record| record.origin = None) {
                // It was renamed, or deleted, meanwhile.
                Err(PoolError::NotFound(_)) => Ok(()),
                updated => updated,
            }
        })
    }
}
