//! A catalogue that lies in the store whose volumes it lists, as one root.
//!
//! ```text
//!   root `catalogue`   {"format": 1, "volumes": {NAME: record}, "leaving": {UUID: {"since": …, "staged": …, "group": …}}}
//! ```
//!
//! One root, not one for each volume: roots cannot be listed, and a rename is one swap. Its 1 MiB has room for some 4,000 volumes.
//! Every change is made by compare-and-swap, and doing it twice is doing it once: after a lost answer it is simply tried again.

use std::collections::BTreeMap;
use std::time::{Duration, UNIX_EPOCH};

use backends::pool::Result;
use backends::segments::drive::block_on;
use backends::segments::{StoreError, Tag};
use backends::{PoolError, VolumeRecord, check_name};
use blockdev::clock;
use bytes::Bytes;
use serde::{Deserialize, Serialize};
use uuid::Uuid;

use super::SharedStore;
use super::records::{Leaving, Records, all_of, moved_away};
use super::segments::failed;

const ROOT: &str = "catalogue";
const FORMAT: u32 = 1;
const ATTEMPTS: u32 = 20;
const PAUSE: Duration = Duration::from_millis(20);
/// Seconds after which nothing more comes of a volume that is retired, from an owner that was not yet fenced or a request still under way; and
/// nobody is still making one that is staged.
const SETTLED: u64 = 3600;

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
struct Content {
    format: u32,
    volumes: BTreeMap<String, VolumeRecord>,
    leaving: BTreeMap<Uuid, Note>,
}

/// Of a volume that is not in the catalogue, or not yet.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
struct Note {
    /// Seconds since 1970.
    since: u64,
    staged: bool,
    /// If it is not alone in its own.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    group: Option<Uuid>,
}

impl Note {
    fn leaving(&self, volume: Uuid) -> Leaving {
        Leaving { volume, group: self.group.unwrap_or(volume), is_staged: self.staged }
    }
}

pub(super) struct StoreRecords {
    pool: String,
    store: SharedStore,
}

impl StoreRecords {
    pub(super) fn new(pool: &str, store: SharedStore) -> StoreRecords {
        StoreRecords { pool: pool.to_owned(), store }
    }

    fn read(&self) -> Result<(Content, Option<Tag>)> {
        let empty = || Content { format: FORMAT, volumes: BTreeMap::new(), leaving: BTreeMap::new() };
        let Some((bytes, tag)) = block_on(self.store.read_root(ROOT)).map_err(|error| failed(&self.pool, error))? else {
            return Ok((empty(), None));
        };
        let content: Content = serde_json::from_slice(&bytes).map_err(|error| {
            PoolError::Invalid(format!("pool {}: its catalogue, root {ROOT} of the store, is damaged: {error}", self.pool))
        })?;
        if content.format != FORMAT {
            return Err(PoolError::Invalid(format!(
                "pool {}: its catalogue has format {}, this version of novastor knows format {FORMAT}; use the version that made it",
                self.pool, content.format
            )));
        }
        Ok((content, Some(tag)))
    }

    /// Applies `change`, which must find itself done if it was done before.
    fn change(&self, change: impl Fn(&mut Content) -> Result<()>) -> Result<()> {
        let mut last = None;
        for attempt in 0..ATTEMPTS {
            if last.is_some() {
                std::thread::sleep(PAUSE * attempt);
            }
            let (before, tag) = match self.read() {
                Ok(read) => read,
                Err(error) if last.is_none() => return Err(error),
                Err(error) => {
                    last = Some(error);
                    continue;
                }
            };
            let mut after = before.clone();
            change(&mut after)?;
            if after == before {
                return Ok(());
            }
            let bytes = serde_json::to_vec(&after).map_err(|error| PoolError::Backend(error.to_string()))?;
            match block_on(self.store.swap(ROOT, tag.as_ref(), Bytes::from(bytes))) {
                Ok(_) => return Ok(()),
                Err(error @ (StoreError::Changed(_) | StoreError::Unknown(_))) => last = Some(failed(&self.pool, error)),
                Err(error) => return Err(failed(&self.pool, error)),
            }
        }
        Err(last.unwrap_or_else(|| PoolError::Backend(format!("pool {}: its catalogue cannot be changed", self.pool))))
    }

    fn missing(&self, volume: &str) -> PoolError {
        PoolError::NotFound(format!("pool {} has no volume {volume}; list them with: novastor volume list", self.pool))
    }

    fn taken(&self, volume: &str) -> PoolError {
        PoolError::Exists(format!("pool {} already has a volume {volume}; choose another name", self.pool))
    }

    fn stage(&self, record: &VolumeRecord) -> Result<()> {
        let staged = Note { since: now(), staged: true, group: record.group };
        self.change(|content| {
            if content.volumes.contains_key(&record.name) {
                return Err(self.taken(&record.name));
            }
            content.leaving.entry(record.uuid).or_insert(staged);
            Ok(())
        })
    }

    fn publish(&self, record: &VolumeRecord) -> Result<()> {
        self.change(|content| {
            match content.volumes.get(&record.name) {
                Some(present) if present.uuid == record.uuid => return Ok(()),
                Some(_) => return Err(self.taken(&record.name)),
                None => {}
            }
            if content.leaving.remove(&record.uuid).is_none() {
                return Err(PoolError::Backend(format!(
                    "volume {}: creating it took so long that another host has cleared it away; try again",
                    record.name
                )));
            }
            content.volumes.insert(record.name.clone(), record.clone());
            Ok(())
        })
    }
}

fn now() -> u64 {
    clock::wall().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs())
}

impl Records for StoreRecords {
    fn list(&self) -> Result<Vec<VolumeRecord>> {
        Ok(self.read()?.0.volumes.into_values().collect())
    }

    fn list_all(&self) -> Result<Vec<VolumeRecord>> {
        self.list()
    }

    fn get(&self, volume: &str) -> Result<VolumeRecord> {
        check_name("volume", volume)?;
        self.read()?.0.volumes.remove(volume).ok_or_else(|| self.missing(volume))
    }

    fn add(&self, record: &VolumeRecord, make: &dyn Fn() -> Result<()>) -> Result<()> {
        check_name("volume", &record.name)?;
        self.stage(record)?;
        make()?;
        self.publish(record)
    }

    fn update(&self, record: &VolumeRecord, change: &dyn Fn(&mut VolumeRecord)) -> Result<()> {
        self.change(|content| match content.volumes.get_mut(&record.name) {
            Some(present) if present.uuid == record.uuid => {
                change(present);
                Ok(())
            }
            _ => Err(moved_away(record)),
        })
    }

    fn rename(&self, volume: &str, to: &str) -> Result<()> {
        check_name("volume", to)?;
        let uuid = self.get(volume)?.uuid;
        self.change(|content| {
            match content.volumes.get(to) {
                Some(renamed) if renamed.uuid == uuid => return Ok(()),
                Some(_) => return Err(self.taken(to)),
                None => {}
            }
            match content.volumes.remove(volume) {
                Some(record) if record.uuid == uuid => {
                    content.volumes.insert(to.to_owned(), VolumeRecord { name: to.to_owned(), ..record });
                    Ok(())
                }
                _ => Err(self.missing(volume)),
            }
        })
    }

    fn retire(&self, record: &VolumeRecord) -> Result<()> {
        let retired = Note { since: now(), staged: false, group: record.group };
        self.change(|content| {
            if content.leaving.contains_key(&record.uuid) {
                return Ok(());
            }
            match content.volumes.remove(&record.name) {
                Some(present) if present.uuid == record.uuid => {
                    content.leaving.insert(record.uuid, retired);
                    Ok(())
                }
                _ => Err(self.missing(&record.name)),
            }
        })
    }

    fn leaving(&self) -> Result<Vec<Leaving>> {
        Ok(self.read()?.0.leaving.iter().map(|(volume, note)| note.leaving(*volume)).collect())
    }

    fn clear(&self, sweep: &dyn Fn(Leaving) -> Result<()>) -> Result<()> {
        let now = now();
        all_of(self.read()?.0.leaving.into_iter().map(|(volume, note)| {
            let is_settled = now.saturating_sub(note.since) > SETTLED;
            if note.staged && !is_settled {
                return Ok(());
            }
            sweep(note.leaving(volume))?;
            match is_settled {
                true => self.change(|content| {
                    content.leaving.remove(&volume);
                    Ok(())
                }),
                false => Ok(()),
            }
        }))
    }
}

#[cfg(test)]
mod tests;
