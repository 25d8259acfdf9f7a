//! The keys of a pool's volumes.

use std::collections::BTreeMap;
use std::sync::Arc;

use backends::pool::Result;
use backends::segments::StoreError;
use backends::segments::drive::block_on;
use backends::{KeyRecord, KeyRotation, KeyState, Layout, PoolError, VolumeRecord};
use uuid::Uuid;

use super::together::names_of;
use super::{MappedPool, SharedStore, groups, segments};
use crate::keys::{Keks, KeyError, Keyring, Wrapping, inspect};

const NAME: &str = "keys/pool";

pub(super) fn key_failed(subject: &str, error: &KeyError) -> PoolError {
    PoolError::Backend(format!("{subject}: {error}"))
}

/// The keys of pool `name`, whose UUID is `pool`. Where there are none, they are made if `may_make`. Blocks.
pub(super) fn keyring(name: &str, store: &SharedStore, pool: Uuid, keks: Keks, may_make: bool) -> Result<Keyring> {
    let failed = |error: StoreError| PoolError::Backend(format!("pool {name}: {error}"));
    if !may_make && block_on(store.read_root(NAME)).map_err(failed)?.is_none() {
        return Err(PoolError::Backend(format!(
            "pool {name}: root {NAME} is missing, though there are volumes; the pool is damaged or was copied in part: restore it from a \
             whole copy"
        )));
    }
    let opened = block_on(Keyring::open(store.clone(), pool, keks, Arc::new(crate::system_random)));
    opened.map_err(|error| key_failed(&format!("pool {name}"), &error))
}

/// The domain whose keys a volume uses: that of its first ancestor, or its own. Blocks.
pub(super) fn domain_of(store: &SharedStore, group: Uuid) -> std::result::Result<Uuid, StoreError> {
    Ok(groups::root(&**store, group)?.map_or(group, |root| Uuid::from_bytes(root.domain)))
}

impl MappedPool {
    pub(super) fn mapped_keys(&self) -> Result<Vec<KeyRecord>> {
        if !self.segments.is_made() {
            return Ok(Vec::new());
        }
        let store = self.segments.store()?;
        let mut volumes: BTreeMap<Uuid, Vec<String>> = BTreeMap::new();
        for record in self.mapped_records()? {
            let domain = domain_of(&store, record.group()).map_err(|error| segments::failed(&self.name, error))?;
            volumes.entry(domain).or_default().push(record.name);
        }
        let found =
            block_on(inspect(&store, self.segments.uuid(), volumes.keys().copied())).map_err(|error| self.key_failed(&error))?;
        let record = |status: crate::keys::KeyStatus| KeyRecord {
            volumes: status.domain.map(|domain| volumes.get(&domain).cloned().unwrap_or_default()),
            state: match status.wrapping {
                Wrapping::By(kek) => KeyState::Wrapped(kek.to_string()),
                Wrapping::Clear => KeyState::Clear,
                Wrapping::Erased => KeyState::Erased,
                Wrapping::Damaged(why) => KeyState::Unreadable(why.to_string()),
            },
        };
        // Of deleted volumes, only what is not erased yet is of interest.
        let is_over = |key: &KeyRecord| key.state == KeyState::Erased && key.volumes.as_ref().is_some_and(Vec::is_empty);
        Ok(found.into_iter().map(record).filter(|key| !is_over(key)).collect())
    }

    pub(super) fn rotate_mapped_keys(&self, progress: &dyn Fn(u64, u64)) -> Result<KeyRotation> {
        if !self.segments.is_made() {
            return Ok(KeyRotation::default());
        }
        let rotated = block_on(self.store()?.keyring.rotate(|at| progress(at.done, at.total)));
        let rotation = rotated.map_err(|error| self.key_failed(&error))?;
        Ok(KeyRotation { rewrapped: rotation.rewrapped, already: rotation.already })
    }

    pub(super) fn erase_mapped_key(&self, record: &VolumeRecord) -> Result<bool> {
        let name = &record.name;
        if !record.encrypted {
            return Err(PoolError::Invalid(format!("volume {name}: key erase refused: it is not encrypted, so there is no key")));
        }
        let others = self.others(record.group(), record.uuid)?;
        if !others.is_empty() {
            return Err(PoolError::InUse(format!(
                "volume {name}: key erase refused: it has its key in common with {}; delete those first",
                names_of(&others)
            )));
        }
        let opened = self.store()?;
        if opened.is_erased(record.group())? {
            return Ok(false);
        }
        let domain = domain_of(&opened.store, record.group()).map_err(|error| segments::failed(&self.name, error))?;
        let erased = block_on(opened.keyring.erase(domain));
        erased.map(|()| true).map_err(|error| key_failed(&format!("volume {name}"), &error))
    }

    pub(super) fn mapped_records(&self) -> Result<Vec<VolumeRecord>> {
        let records = self.records.list()?.into_iter();
        Ok(records.filter(|record| record.layout == Layout::Mapped).collect())
    }

    fn key_failed(&self, error: &KeyError) -> PoolError {
        key_failed(&format!("pool {}", self.name), error)
    }
}

#[cfg(test)]
mod tests {
    use backends::segments::memory::MemoryStore;

    use super::*;

    #[test]
    fn a_key_is_made_once_and_never_where_volumes_need_another() {
        let (store, pool): (SharedStore, _) = (Arc::new(MemoryStore::new()), Uuid::from_u128(5));
        let open = |may_make| keyring("p", &store, pool, Keks::default(), may_make);
        assert!(open(false).is_err());
        let keys = open(true).unwrap();
        let domain = Uuid::from_u128(6);
        let secrets = block_on(keys.create_domain(domain, false)).unwrap();
        for may_make in [true, false] {
            assert_eq!(block_on(open(may_make).unwrap().secrets(domain)).unwrap().pool_key, secrets.pool_key);
        }
        assert_eq!(domain_of(&store, domain).unwrap(), domain);
    }
}
