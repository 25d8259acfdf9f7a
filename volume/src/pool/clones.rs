//! Clones of mapped volumes, and the end of a volume, which its clones may hold up.
//!
//! ```text
//!   clone:   snapshot is in the pool ─ stage the record ─ pin the snapshot, make the root ─ publish the record
//!   delete:  no clones? ─ retire the record ─ end the group, which unpins its parent's snapshot ─ log
//! ```
//!
//! The engine knows clones as groups. A pinned group that is in no record and not being made is one whose making a crash ended: it is forgotten
//! when it stands in the way.

use std::collections::BTreeMap;

use backends::pool::Result;
use backends::segments::drive::block_on;
use backends::{Claim, Flattened, Layout, PoolError, VolumeRecord};
use uuid::Uuid;

use super::records::Leaving;
use super::segments::Opened;
use super::snapshots::refused;
use super::{MappedPool, groups, key, segments};
use crate::device::OpenError;
use crate::error::VolumeError;
use crate::group::Beginning;

/// Of a snapshot's name, in bytes.
const NAME_MAX: usize = 63;

impl MappedPool {
    /// A volume that begins as a snapshot; without one, as a snapshot that is made for it and stays.
    pub(super) fn clone_mapped(&self, origin: &VolumeRecord, snapshot: Option<&str>, to: &str) -> Result<VolumeRecord> {
        self.refuse_taken(to)?;
        if let Some(snapshot) = snapshot {
            return self.clone_of(origin, snapshot, to);
        }
        let made = free_name(origin, to);
        self.snapshot_mapped(std::slice::from_ref(origin), &made)?;
        let cloned = self.clone_of(&self.records.get(&origin.name)?, &made, to);
        if cloned.is_err() {
            self.take_back(origin, &made);
        }
        cloned
    }

    fn clone_of(&self, origin: &VolumeRecord, snapshot: &str, to: &str) -> Result<VolumeRecord> {
        // Brings it into the pool.
        drop(self.view(origin, snapshot)?);
        let from = format!("{}@{snapshot}", origin.name);
        let size = origin.snapshots.get(snapshot).map_or(origin.size, |snapshot| snapshot.size);
        let record = VolumeRecord {
            name: to.to_owned(),
            uuid: blockdev::random::uuid(),
            size,
            origin: Some(from.clone()),
            snapshots: BTreeMap::new(),
            ..origin.clone()
        };
        let refuse = |error| refused(&format!("clone of {from} as {to}"), error);
        let make = || {
            if record.group.is_some() {
                let begins_as = Beginning::Snapshot(origin.uuid.into_bytes(), snapshot.to_owned());
                return self.open_group(origin, Claim::Own)?.add(record.uuid, begins_as).map_err(refuse);
            }
            let engine = self.engine(origin, &self.store()?)?;
            engine.clone_snapshot(snapshot, record.uuid).map(drop).map_err(refuse)
        };
        let _membership = record.group.map(|_| self.membership.lock());
        self.refuse_elsewhere(origin, &format!("clone of {from} as {to}"))?;
        self.add(&record, &make)?;
        Ok(record)
    }

    fn refuse_taken(&self, volume: &str) -> Result<()> {
        match self.records.get(volume) {
            Ok(_) => Err(PoolError::Exists(format!("pool {} already has a volume {volume}; choose another name", self.name))),
            Err(PoolError::NotFound(_)) => Ok(()),
            Err(error) => Err(error),
        }
    }

    /// Adds a volume that `make` makes.
    pub(super) fn add(&self, record: &VolumeRecord, make: &dyn Fn() -> Result<()>) -> Result<()> {
        let added = self.records.add(record, make);
        if added.is_err() && !matches!(added, Err(PoolError::Exists(_) | PoolError::Invalid(_))) {
            // What is left is noted, and removed at a later opening of the pool at the latest.
            let _ = self.sweep(Leaving::of(record, false));
        }
        added
    }

    /// The records of a volume's clones name it as it is called now. A crash meanwhile leaves them as they were.
    pub(super) fn rename_in_clones(&self, from: &str, to: &str) -> Result<()> {
        for clone in self.records.list()?.iter().filter(|record| record.layout == Layout::Mapped) {
            let Some((_, snapshot)) =
                clone.origin.as_deref().and_then(|origin| origin.split_once('@')).filter(|(name, _)| *name == from)
            else {
                continue;
            };
            self.records.update(clone, &|record| record.origin = Some(format!("{to}@{snapshot}")))?;
        }
        Ok(())
    }

    /// Copies what a clone shares with its parent; its record names no origin then.
    pub(super) fn flatten_mapped(&self, record: &VolumeRecord, progress: &dyn Fn(u64, u64)) -> Result<Flattened> {
        let device = self.device(record)?;
        let flattened = loop {
            match device.flatten(progress) {
                Ok(flattened) => break flattened,
                Err(OpenError::Volume(VolumeError::VolumeHasClones(groups))) => {
                    let what = format!("volume {}: flatten refused: its snapshots have clones", record.name);
                    self.forget_strays(record, &groups, &what)?;
                }
                Err(error) => return Err(refused(&format!("volume {}: flatten", record.name), error)),
            }
        };
        self.records.update(record, &|record| record.origin = None)?;
        Ok(if flattened { Flattened::Copied } else { Flattened::NoParent })
    }

    pub(super) fn delete_mapped(&self, record: &VolumeRecord) -> Result<()> {
        let name = &record.name;
        self.refuse_clones(record)?;
        // Without its key a volume cannot be opened to delete them, and nobody can read them.
        if !record.snapshots.is_empty() && !self.store()?.is_erased(record.group())? {
            let names = record.snapshots.keys().map(|snapshot| format!("{name}@{snapshot}")).collect::<Vec<_>>().join(", ");
            return Err(PoolError::InUse(format!("volume {name} has snapshots ({names}); delete them first")));
        }
        let _membership = record.group.map(|_| self.membership.lock());
        let others = self.others(record.group(), record.uuid)?;
        self.refuse_elsewhere(record, &format!("volume {name}: delete"))?;
        match others.is_empty() {
            // An engine that is still ending here holds its log.
            true => drop(self.logs.hold(record.group())?),
            false => self.wait_until_closed(record)?,
        }
        self.records.retire(record)?;
        let removed = match others.first() {
            Some(other) => self.take_out(record, other),
            None => self.sweep(Leaving::of(record, false)),
        };
        let Err(error) = removed else {
            self.sweep_others();
            return Ok(());
        };
        self.unswept.lock().push(Leaving::of(record, false));
        Err(PoolError::Backend(format!(
            "volume {name} is deleted, but its data is not removed from pool {}: {error}. That is tried again after the next deletion, and when the pool \
             is opened",
            self.name
        )))
    }

    /// Once more, what the store refused to remove before.
    fn sweep_others(&self) {
        let left = std::mem::take(&mut *self.unswept.lock());
        for left in left {
            if let Err(error) = self.sweep(left) {
                tracing::warn!("pool {}: what is left of a deleted volume was not removed: {error}", self.name);
                self.unswept.lock().push(left);
            }
        }
    }

    fn refuse_clones(&self, record: &VolumeRecord) -> Result<()> {
        let what = format!("volume {}: delete refused", record.name);
        let engine = self.engine_at_end(record.group(), &self.store()?)?;
        loop {
            let groups = match engine.refuse_clones() {
                Ok(()) | Err(OpenError::Volume(VolumeError::NoVolume)) => return Ok(()),
                Err(OpenError::Volume(VolumeError::VolumeHasClones(groups))) => groups,
                Err(error) => return Err(refused(&what, error)),
            };
            self.forget_strays(record, &groups, &format!("{what}: its snapshots have clones"))?;
        }
    }

    /// Has a volume forget clones that do not exist. `groups`: those that it knows, joined by commas. Refuses if any of them exists, naming those.
    pub(super) fn forget_strays(&self, parent: &VolumeRecord, groups: &str, refusal: &str) -> Result<()> {
        if let Err(error) = self.records.clear(&|left| self.sweep(left)) {
            tracing::warn!("pool {}: what is left of a deleted volume was not removed: {error}", self.name);
        }
        // In this order a clone that is published meanwhile is found in one of the two.
        let leaving = self.records.leaving()?;
        let records = self.all_mapped()?;
        let mut clones = Vec::new();
        let mut strays = Vec::new();
        for group in groups.split(", ") {
            let Ok(uuid) = Uuid::parse_str(group) else {
                clones.push(group.to_owned());
                continue;
            };
            match records.iter().find(|record| record.group() == uuid) {
                Some(record) => clones.push(record.name.clone()),
                None if leaving.iter().any(|left| left.group == uuid) => {
                    clones.push(format!("{group}, which is being made or deleted"))
                }
                None => strays.push(uuid),
            }
        }
        let engine = self.engine_at_end(parent.group(), &self.store()?)?;
        for stray in strays {
            engine.unpin(stray).map_err(|error| refused(&format!("volume {}", parent.name), error))?;
        }
        match clones.is_empty() {
            true => Ok(()),
            false => Err(PoolError::InUse(format!("{refusal} ({}); delete or flatten them first", clones.join(", ")))),
        }
    }

    /// Removes what is left of a volume that is not in the catalogue. Of a group that has others, it is taken out if that is open here, and otherwise
    /// when it is opened next.
    pub(super) fn sweep(&self, left: Leaving) -> Result<()> {
        let group = left.group;
        if self.is_needed(left)? {
            if let Some(open) = self.groups.lock().get(&group).and_then(|place| place.try_lock()?.upgrade()) {
                open.remove_later(left.volume);
            }
            return Ok(());
        }
        let opened = self.store()?;
        match self.engine_at_end(group, &opened)?.delete() {
            Ok(()) => {}
            // Never made, or not to be read any more: objects may be there all the same.
            Err(OpenError::Volume(VolumeError::NoVolume | VolumeError::ObjectDamaged { .. })) => {
                groups::remove(&*opened.store, group).map_err(|error| segments::failed(&self.name, error))?;
            }
            Err(error) => return Err(refused(&format!("what is left of group {group}"), error)),
        }
        self.erase_unused_key(&opened, group)?;
        self.logs.remove(group)
    }

    /// Destroys the key that a deleted volume used, unless a volume that was once cloned from it, or that it was cloned from, still uses it.
    fn erase_unused_key(&self, opened: &Opened, group: Uuid) -> Result<()> {
        let domain_of = |group| key::domain_of(&opened.store, group).map_err(|error| segments::failed(&self.name, error));
        let domain = domain_of(group)?;
        for record in self.all_mapped()? {
            if domain_of(record.group())? == domain {
                return Ok(());
            }
        }
        let erased = block_on(opened.keyring.erase(domain));
        erased.map_err(|error| key::key_failed(&format!("pool {}", self.name), &error))
    }
}

/// A name for the snapshot that a clone begins as.
fn free_name(origin: &VolumeRecord, to: &str) -> String {
    let numbered = |number: u64| {
        let suffix = if number == 0 { String::new() } else { format!("-{number}") };
        let mut name = format!("clone-{to}");
        name.truncate(NAME_MAX - suffix.len());
        name + &suffix
    };
    (0..).map(numbered).find(|name| !origin.snapshots.contains_key(name)).unwrap_or_default()
}
