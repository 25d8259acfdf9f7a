//! The keys of encrypted volumes, of mapped and of raw ones: what wraps them, wrapping them anew, and destroying them.
//!
//! ```text
//!   pool ─┬─ its own keys: of mapped volumes      Pool::keys · rotate_keys · erase_key
//!         └─ records: of raw volumes              wrapped_key, opaque to the pool
//! ```

use std::collections::BTreeSet;
use std::sync::Arc;

use backends::{KeyRecord, KeyState, Pool, VolumeRecord};
use volume::keys::{KekId, RawKeys};

use super::Daemon;
use super::jobs::Job;
use super::pools::Answer;
use crate::api::types::{KeyErased, KeyInfo, KeyList, KeysRotated};
use crate::config::{Config, key_encryption_keys};
use crate::error::{Error, Result};
use crate::names::VolumeId;

/// A raw volume whose key is to be wrapped anew.
struct Stale {
    id: VolumeId,
    from: String,
    to: String,
}

impl Daemon {
    /// The keys of all pools, or of one.
    pub fn list_keys(&self, pool: Option<&str>) -> Result<KeyList> {
        let raw = self.raw_keys_here()?;
        let [current, previous] = raw.keks.ids().map(|id| id.map(|id| id.to_string()));
        let mut keys = Vec::new();
        for name in self.pools_named(pool) {
            let pool = self.pools.get(&name)?;
            keys.extend(pool.keys()?.into_iter().map(|key| key_info(&name, key)));
            let encrypted = pool.list()?.into_iter().filter(|record| record.wrapped_key.is_some());
            keys.extend(encrypted.map(|record| raw_key_info(&name, &record, &raw)));
        }
        Ok(KeyList { current, previous, keys })
    }

    /// Wraps the keys of all pools, or of one, with the current key-encryption key.
    pub fn rotate_keys(&self, pool: Option<&str>, job: &Job) -> Result<Vec<KeysRotated>> {
        let names = self.pools_named(pool);
        names.into_iter().map(|name| self.rotate_keys_of(name, job)).collect()
    }

    /// All keys are read before the first one is wrapped anew.
    fn rotate_keys_of(&self, name: String, job: &Job) -> Result<KeysRotated> {
        let pool = self.pools.get(&name)?;
        let raw = self.raw_keys_here()?;
        let encrypted: Vec<VolumeRecord> = pool.list()?.into_iter().filter(|record| record.wrapped_key.is_some()).collect();
        let mut stale = Vec::new();
        for record in &encrypted {
            stale.extend(stale_key(&name, record, &raw)?);
        }
        let of_pool = pool.rotate_keys(&|done, total| job.progress(done, Some(total)))?;
        let mut rotated = KeysRotated {
            pool: name.clone(),
            rewrapped: of_pool.rewrapped,
            already: of_pool.already + (encrypted.len() - stale.len()) as u64,
        };
        for Stale { id, from, to } in stale {
            let _held = self.hold([&id]);
            pool.set_wrapped_key(&id.name, &from, &to)?;
            rotated.rewrapped += 1;
        }
        tracing::info!("pool {name}: {} keys were wrapped anew, {} were before", rotated.rewrapped, rotated.already);
        Ok(rotated)
    }

    /// Destroys the key that `volumes` share. It must be named all of them, so that nobody loses what was not meant.
    pub fn erase_key(&self, volumes: &[String]) -> Result<KeyErased> {
        let mut ids = volumes.iter().map(|volume| self.resolve_text(volume)).collect::<Result<Vec<_>>>()?;
        ids.sort();
        ids.dedup();
        let Some(first) = ids.first().cloned() else { return Err(Error::invalid("name the volumes whose key is to be erased")) };
        let _held = self.hold(&ids);
        let pool = self.pools.get(&first.pool)?;
        if !pool.get(&first.name)?.encrypted {
            return Err(Error::invalid(format!("volume {first}: key erase refused: it is not encrypted, so there is no key")));
        }
        let sharing = sharing_key(&*pool, &first)?;
        let named: BTreeSet<VolumeId> = ids.iter().cloned().collect();
        if named != sharing {
            let list = |ids: &BTreeSet<VolumeId>| ids.iter().map(VolumeId::to_string).collect::<Vec<_>>().join(", ");
            return Err(Error::invalid(format!(
                "key erase refused: the volumes that share the key of {first} are {}, and {} were named; look at `novastor key list`, and \
                 try again",
                list(&sharing),
                list(&named)
            )));
        }
        for id in &ids {
            self.ensure_unused(id, "key erase")?;
        }
        let erased = pool.erase_key(&first.name)?;
        if erased {
            tracing::warn!("pool {}: the key of {first} and its clones was erased, as was asked for", first.pool);
        }
        Ok(KeyErased { volumes: ids.iter().map(VolumeId::to_string).collect(), erased })
    }

    /// The open pools with keys that no key-encryption key here unwraps, one sentence each.
    pub(super) fn pools_out_of_reach(&self) -> Vec<String> {
        let Ok(raw) = self.raw_keys().map(Arc::new) else { return Vec::new() };
        let answers = self.pools.ask(move |pool| foreign_keks(pool, &raw));
        let sentence = |Answer { pool, answer, .. }: Answer<Result<BTreeSet<String>>>| {
            let ids = answer.ok()?.ok().filter(|ids| !ids.is_empty())?;
            let ids = ids.into_iter().collect::<Vec<_>>().join(", ");
            Some(format!(
                "pool {pool}: keys in it are wrapped by {ids}, which is not configured: name it as previous_file in [keys], then \
                 `novastor config reload` and `novastor key rotate`"
            ))
        };
        answers.into_iter().filter_map(sentence).collect()
    }

    fn pools_named(&self, pool: Option<&str>) -> Vec<String> {
        pool.map_or_else(|| self.pools.names(), |pool| vec![pool.to_owned()])
    }

    fn raw_keys_here(&self) -> Result<RawKeys> {
        self.raw_keys().map_err(|error| Error::invalid(error.to_string()))
    }
}

/// Ids of the key-encryption keys, for telling when they change.
pub(super) fn kek_ids(config: &Config) -> [Option<KekId>; 2] {
    let keks = config.keys.as_ref().and_then(|keys| key_encryption_keys(keys).ok());
    keks.map(|keks| keks.ids()).unwrap_or_default()
}

/// What wraps keys in the pool and is not among the key-encryption keys here.
fn foreign_keks(pool: &dyn Pool, raw: &RawKeys) -> Result<BTreeSet<String>> {
    let here: Vec<String> = raw.keks.ids().iter().flatten().map(KekId::to_string).collect();
    let wrapped = |key: KeyRecord| match key.state {
        KeyState::Wrapped(by) => Some(by),
        _ => None,
    };
    let mut found: BTreeSet<String> = pool.keys()?.into_iter().filter_map(wrapped).collect();
    let of_raw = |record: VolumeRecord| raw.wrapped_by(&record.name, record.wrapped_key.as_deref()?).ok();
    found.extend(pool.list()?.into_iter().filter_map(of_raw).map(|by| by.to_string()));
    found.retain(|by| !here.contains(by));
    Ok(found)
}

/// The volumes that have the same key as `id`, itself included.
fn sharing_key(pool: &dyn Pool, id: &VolumeId) -> Result<BTreeSet<VolumeId>> {
    let volumes = pool.keys()?.into_iter().filter_map(|key| key.volumes).find(|volumes| volumes.contains(&id.name));
    let volumes = volumes.unwrap_or_else(|| vec![id.name.clone()]);
    Ok(volumes.iter().map(|name| VolumeId::new(&id.pool, name)).collect())
}

fn stale_key(pool: &str, record: &VolumeRecord, raw: &RawKeys) -> Result<Option<Stale>> {
    let Some(from) = &record.wrapped_key else { return Ok(None) };
    let rewrapped = raw.rewrap(&record.name, from).map_err(|error| super::encryption::key_error(&record.name, &error))?;
    Ok(rewrapped.map(|to| Stale { id: VolumeId::new(pool, &record.name), from: from.clone(), to }))
}

fn key_info(pool: &str, key: KeyRecord) -> KeyInfo {
    let (state, wrapped_by, problem) = match key.state {
        KeyState::Wrapped(by) => ("wrapped", Some(by), None),
        KeyState::Clear => ("clear", None, None),
        KeyState::Erased => ("erased", None, None),
        KeyState::Unreadable(why) => ("damaged", None, Some(why)),
    };
    let of = if key.volumes.is_some() { "mapped" } else { "pool" };
    let volumes = key.volumes.unwrap_or_default().iter().map(|name| format!("{pool}/{name}")).collect();
    KeyInfo { pool: pool.to_owned(), of: of.to_owned(), volumes, state: state.to_owned(), wrapped_by, problem }
}

fn raw_key_info(pool: &str, record: &VolumeRecord, raw: &RawKeys) -> KeyInfo {
    let wrapped_by = raw.wrapped_by(&record.name, record.wrapped_key.as_deref().unwrap_or_default());
    let state = match &wrapped_by {
        Ok(by) => KeyState::Wrapped(KekId::to_string(by)),
        Err(error) => KeyState::Unreadable(error.to_string()),
    };
    let info = key_info(pool, KeyRecord { volumes: Some(vec![record.name.clone()]), state });
    KeyInfo { of: "raw".to_owned(), ..info }
}
