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
use backends::{PoolError, VolumeRecord};
use uuid::Uuid;

use super::records::Leaving;
use super::snapshots::refused;
use super::{MappedPool, groups, segments};
use crate::device::GroupDevice;

pub(super) fn names_of(records: &[VolumeRecord]) -> String {
    records.iter().map(|record| record.name.as_str()).collect::<Vec<_>>().join(", ")
}

impl MappedPool {
    /// Gives a new volume that is not to be alone its group. True if that is there already. For whoever holds the membership.
    pub(super) fn join(&self, record: &mut VolumeRecord) -> Result<bool> {
        let alike = |other: &VolumeRecord| {
            (&other.tenant, &other.policy, other.encrypted) == (&record.tenant, &record.policy, record.encrypted)
        };
        let groups: BTreeSet<Uuid> = self.mapped_records()?.into_iter().filter(alike).filter_map(|other| other.group).collect();
        let mut found = None;
        for group in groups {
            if self.is_here(group)? {
                found = Some(group);
                break;
            }
        }
        record.group = Some(found.unwrap_or_else(Uuid::new_v4));
        Ok(found.is_some())
    }

    /// Whether nobody had a group after this host.
    fn is_here(&self, group: Uuid) -> Result<bool> {
        let Some(log) = self.logs.id(group)? else { return Ok(false) };
        let root = groups::root(&*self.store()?.store, group).map_err(|error| segments::failed(&self.name, error))?;
        Ok(root.is_some_and(|root| root.log_id == log))
    }

    /// The other volumes of a group.
    pub(super) fn others(&self, group: Uuid, volume: Uuid) -> Result<Vec<VolumeRecord>> {
        let records = self.mapped_records()?.into_iter();
        Ok(records.filter(|other| other.group() == group && other.uuid != volume).collect())
    }

    /// Whether the group of a volume that leaves, or was not made, has others, or will have.
    pub(super) fn is_needed(&self, left: Leaving) -> Result<bool> {
        // In this order a volume that is published meanwhile is found in one of the two.
        let leaving = self.records.leaving()?;
        let joins = |other: &Leaving| other.is_staged && other.group == left.group && other.volume != left.volume;
        Ok(leaving.iter().any(joins) || !self.others(left.group, left.volume)?.is_empty())
    }

    /// Refuses to delete a volume of a group that is on another host.
    pub(super) fn refuse_elsewhere(&self, record: &VolumeRecord, others: &[VolumeRecord]) -> Result<()> {
        if others.is_empty() || self.is_here(record.group())? {
            return Ok(());
        }
        Err(PoolError::InUse(format!(
            "volume {}: delete refused: it shares what it stores with {}, and another host had all of them last; delete it there",
            record.name,
            names_of(others)
        )))
    }

    /// Removes a retired volume from the group that it has in common with another one.
    pub(super) fn take_out(&self, record: &VolumeRecord, other: &VolumeRecord) -> Result<()> {
        let removed = self.open_group(other, false)?.remove(record.uuid);
        removed.map_err(|error| refused(&format!("volume {}: delete", record.name), error))
    }

    /// Takes out what a crash, or another host, left in a group that was opened through one of its volumes.
    pub(super) fn forget_lost(&self, record: &VolumeRecord, group: &GroupDevice) {
        if record.group.is_none() {
            return;
        }
        let forgotten = || -> Result<()> {
            let failed = |error| refused(&format!("the group of volume {}", record.name), error);
            let there = group.volumes().map_err(failed)?;
            let leaving = self.records.leaving()?;
            let records = self.mapped_records()?;
            let is_known = |id: &Uuid| {
                records.iter().any(|record| record.uuid == *id) || leaving.iter().any(|left| left.is_staged && left.volume == *id)
            };
            there.into_iter().filter(|id| !is_known(id)).try_for_each(|id| group.remove(id).map_err(failed))
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
        let clones = self.others(record.group(), record.uuid)?.into_iter();
        clones
            .filter(|clone| clone.origin.as_ref() == Some(&origin))
            .try_for_each(|clone| self.records.update(&clone, &|record| record.origin = None))
    }
}
