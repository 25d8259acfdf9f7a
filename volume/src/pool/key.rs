//! The keys of a pool's volumes.

use std::sync::Arc;

use backends::PoolError;
use backends::pool::Result;
use backends::segments::StoreError;
use backends::segments::drive::block_on;
use uuid::Uuid;

use super::SharedStore;
use crate::keys::{Keks, KeyError, Keyring};
use crate::names::root_path;
use crate::root::Root;

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
    let name = root_path(group.as_bytes());
    let root = block_on(store.read_root(&name))?.and_then(|(bytes, _)| Root::decode(&bytes, &name).ok());
    Ok(root.map_or(group, |root| Uuid::from_bytes(root.domain)))
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
