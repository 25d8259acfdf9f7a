//! The store of a pool, opened when it is first needed.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use backends::PoolError;
use backends::pool::Result;
use backends::segments::directory::DirectoryStore;
use backends::segments::drive::block_on;
use backends::segments::{OpenOptions, StoreError};
use parking_lot::Mutex;
use uuid::Uuid;

use super::key::{self, domain_of, key_failed};
use super::{KeksOf, SharedStore};
use crate::keys::{KeyError, Keyring};
use crate::reduce::Secrets;

/// A store that is open, and what is needed to read it.
#[derive(Clone)]
pub(super) struct Opened {
    pub(super) store: SharedStore,
    pub(super) keyring: Keyring,
}

impl Opened {
    /// What opens the objects of a volume. Blocks.
    pub(super) fn secrets(&self, group: Uuid) -> Result<Secrets> {
        self.find_secrets(group)?.map_err(|error| key_failed(&format!("volume {group}"), &error))
    }

    /// The same for a volume that is being deleted: without a data key, if that is gone. Blocks.
    pub(super) fn secrets_at_end(&self, group: Uuid) -> Result<Secrets> {
        match self.find_secrets(group)? {
            Err(KeyError::Missing { .. } | KeyError::Erased { .. }) => Ok(self.keyring.without_data_key()),
            found => found.map_err(|error| key_failed(&format!("volume {group}"), &error)),
        }
    }

    fn find_secrets(&self, group: Uuid) -> Result<std::result::Result<Secrets, KeyError>> {
        let domain = domain_of(&self.store, group).map_err(|error| PoolError::Backend(format!("volume {group}: {error}")))?;
        Ok(block_on(self.keyring.secrets(domain)))
    }
}

enum Place {
    Directory { path: PathBuf, pool: Uuid },
    Given { store: SharedStore, pool: Uuid },
}

pub(super) struct Segments {
    place: Place,
    opened: Mutex<Option<Opened>>,
    keks: KeksOf,
}

/// An error of a pool's store.
pub(super) fn failed(pool: &str, error: StoreError) -> PoolError {
    PoolError::Backend(format!("pool {pool}: {error}"))
}

impl Segments {
    pub(super) fn directory(path: PathBuf, pool: Uuid, keks: KeksOf) -> Segments {
        Segments { place: Place::Directory { path, pool }, opened: Mutex::default(), keks }
    }

    pub(super) fn given(store: SharedStore, pool: Uuid, keks: KeksOf) -> Segments {
        Segments { place: Place::Given { store, pool }, opened: Mutex::default(), keks }
    }

    /// False while no mapped volume was ever made.
    pub(super) fn is_made(&self) -> bool {
        match &self.place {
            Place::Directory { path, .. } => path.join("pool").exists(),
            Place::Given { .. } => true,
        }
    }

    /// The store of pool `pool`. With `make` it is made where there is none. Neither it nor its key is made while there are volumes that should be in
    /// it. Blocks.
    pub(super) fn open(&self, pool: &str, has_volumes: impl Fn() -> Result<bool>, make: bool) -> Result<Opened> {
        let mut opened = self.opened.lock();
        if let Some(opened) = &*opened {
            return Ok(opened.clone());
        }
        let is_empty = !has_volumes()?;
        let (store, uuid): (SharedStore, Uuid) = match &self.place {
            Place::Given { store, pool } => (store.clone(), *pool),
            Place::Directory { path, pool } => {
                let store = open_directory(path, *pool, make && is_empty).map_err(|error| named(path, error))?;
                (Arc::new(store), *pool)
            }
        };
        let keyring = key::keyring(pool, &store, uuid, (self.keks)()?, is_empty)?;
        Ok(opened.insert(Opened { store, keyring }).clone())
    }
}

fn named(path: &Path, error: StoreError) -> PoolError {
    match error {
        StoreError::Absent(what) => PoolError::Backend(format!(
            "{what} is missing, though there are mapped volumes: bring {} back from where it went, or from a copy of the pool",
            path.display()
        )),
        error => PoolError::Backend(format!(
            "the store of mapped volumes in {}: {error}. Raw volumes are not concerned: `--layout raw` makes one",
            path.display()
        )),
    }
}

fn open_directory(path: &Path, pool: Uuid, may_make: bool) -> std::result::Result<DirectoryStore, StoreError> {
    let options = || OpenOptions { expected: Some(pool), read_only: false, probe: Some(Uuid::new_v4()) };
    match DirectoryStore::open(path, options()) {
        Err(StoreError::Absent(_)) if may_make => {}
        opened => return opened,
    }
    match DirectoryStore::make(path, pool) {
        // Somebody else was faster.
        Ok(()) | Err(StoreError::Exists(_)) => DirectoryStore::open(path, options()),
        Err(error) => Err(error),
    }
}
