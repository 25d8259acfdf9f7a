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
    /// Whether the key of a volume was destroyed on purpose. Blocks.
    pub(super) fn is_erased(&self, group: Uuid) -> Result<bool> {
        Ok(matches!(self.find_secrets(group)?, Err(KeyError::Erased { .. })))
    }

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
    state: Mutex<State>,
    keks: KeksOf,
}

#[derive(Default)]
struct State {
    store: Option<SharedStore>,
    keyring: Option<Keyring>,
}

/// An error of a pool's store.
pub(super) fn failed(pool: &str, error: StoreError) -> PoolError {
    PoolError::Backend(format!("pool {pool}: {error}"))
}

impl Segments {
    pub(super) fn directory(path: PathBuf, pool: Uuid, keks: KeksOf) -> Segments {
        Segments { place: Place::Directory { path, pool }, state: Mutex::default(), keks }
    }

    pub(super) fn given(store: SharedStore, pool: Uuid, keks: KeksOf) -> Segments {
        Segments { place: Place::Given { store, pool }, state: Mutex::default(), keks }
    }

    /// False while no mapped volume was ever made.
    pub(super) fn is_made(&self) -> bool {
        match &self.place {
            Place::Directory { path, .. } => path.join("pool").exists(),
            Place::Given { .. } => true,
        }
    }

    /// The store of pool `pool`, and its keys. With `make` they are made where there are none, but not while there are volumes that should be in it.
    /// The keys are opened anew when the host has other key-encryption keys than before. Blocks.
    pub(super) fn open(&self, pool: &str, has_volumes: impl Fn() -> Result<bool>, make: bool) -> Result<Opened> {
        let mut state = self.state.lock();
        if let Some(keyring) = self.keyring_as_it_is(&state) {
            return Ok(Opened { store: self.store_in(&mut state, false)?, keyring });
        }
        let is_empty = !has_volumes()?;
        let store = self.store_in(&mut state, make && is_empty)?;
        let keyring = key::keyring(pool, &store, self.uuid(), (self.keks)()?, is_empty)?;
        state.keyring = Some(keyring.clone());
        Ok(Opened { store, keyring })
    }

    /// The store alone, which must be there. Blocks.
    pub(super) fn store(&self) -> Result<SharedStore> {
        self.store_in(&mut self.state.lock(), false)
    }

    pub(super) fn uuid(&self) -> Uuid {
        match &self.place {
            Place::Directory { pool, .. } | Place::Given { pool, .. } => *pool,
        }
    }

    /// Keys that were opened before, unless the host has other key-encryption keys by now. If those cannot be read, what is open stays open.
    fn keyring_as_it_is(&self, state: &State) -> Option<Keyring> {
        let keyring = state.keyring.as_ref()?;
        let is_current = (self.keks)().map_or(true, |keks| keyring.has_keks(&keks));
        is_current.then(|| keyring.clone())
    }

    fn store_in(&self, state: &mut State, may_make: bool) -> Result<SharedStore> {
        if let Some(store) = &state.store {
            return Ok(store.clone());
        }
        let store: SharedStore = match &self.place {
            Place::Given { store, .. } => store.clone(),
            Place::Directory { path, pool } => {
                Arc::new(open_directory(path, *pool, may_make).map_err(|error| named(path, error))?)
            }
        };
        Ok(state.store.insert(store).clone())
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
    let options = || OpenOptions { expected: Some(pool), read_only: false, probe: Some(blockdev::random::uuid()) };
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
