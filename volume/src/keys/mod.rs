//! The keys of a pool: one for the pool, one for each dedup domain that is encrypted, all wrapped by a key-encryption key that the pool never sees.
//!
//! ```text
//!   Kek (file, credential, environment) ──wraps──▶ root keys/pool    the pool's key: names blocks
//!                                       └─wraps──▶ root keys/GROUP   the data key of a domain   ◀─ object keys/GROUP: that there is one
//! ```
//!
//! Roots cannot be listed, objects can: so a domain's record has an object of the same name beside it, made before the record and removed after it was
//! erased.
//!
//! Invariants:
//! - Nothing is written before every key that would be read again was read.
//! - A domain without a record does not open: what is not encrypted says so, with a tag that takes the pool's key to make.
//! - If any domain is wrapped, so is the pool's key, by the newest key-encryption key: it is wrapped anew first.
//! - Records change by compare-and-swap. Every step may be the last of a process, and every operation may be repeated.

mod error;
mod inspect;
mod kek;
mod raw;
mod record;
mod rotate;
#[cfg(test)]
mod tests;

use std::collections::BTreeMap;
use std::sync::Arc;

use backends::segments::{SegmentStore, StoreError, Tag};
use bytes::Bytes;
use uuid::Uuid;
use zeroize::Zeroizing;

use crate::Secrets;
use crate::crypto::Key;
pub use error::KeyError;
pub use inspect::{KeyStatus, Wrapping, inspect};
pub use kek::{Credential, Kek, KekId, Keks, KeyFile, KeySource};
pub use raw::{RawKey, RawKeys};
use record::{Owner, Purpose, Record, State};
pub use rotate::{Progress, Rotation};

const PREFIX: &str = "keys/";
const POOL_RECORD: &str = "keys/pool";
/// How often a store is asked that gives no usable answer, or a record that others change meanwhile is looked at again.
const TRIES: u32 = 8;

/// Fills a buffer with unpredictable bytes: [`crate::system_random`] outside of tests.
pub type Random = Arc<dyn Fn(&mut [u8]) + Send + Sync>;

/// The keys of one pool. It keeps the pool's key and the key-encryption keys in memory, and reads the others when asked.
#[derive(Clone)]
pub struct Keyring {
    store: Arc<dyn SegmentStore + Send + Sync>,
    pool: Uuid,
    keks: Keks,
    random: Random,
    pool_key: Key,
}

impl Keyring {
    /// Opens the keys of the pool, and makes its key if it is a new one: wrapped if there is a current key-encryption key, in clear otherwise.
    ///
    /// # Errors
    /// [`KeyError::WrongKek`] if the pool's key is wrapped with another one, [`KeyError::Missing`] if its record is gone, and others as named.
    pub async fn open(
        store: Arc<dyn SegmentStore + Send + Sync>,
        pool: Uuid,
        keks: Keks,
        random: Random,
    ) -> Result<Keyring, KeyError> {
        let mut keyring = Keyring { store, pool, keks, random, pool_key: Key::new([0; 32]) };
        for _ in 0..TRIES {
            if let Some((record, _)) = keyring.pool_record().await? {
                keyring.pool_key = keyring.pool_key_in(&record)?;
                return Ok(keyring);
            }
            match keyring.make_pool_key().await {
                Err(KeyError::Raced { .. }) => {}
                made => made?,
            }
        }
        Err(KeyError::Raced { record: POOL_RECORD.to_owned() })
    }

    /// Gives a new domain its data key, or notes that it has none, and gives its secrets.
    ///
    /// # Errors
    /// [`KeyError::NoKek`] if it is to be encrypted without a key-encryption key, [`KeyError::Exists`] if it has a record already,
    /// [`KeyError::Rotated`] if another host has replaced the key-encryption key.
    pub async fn create_domain(&self, group: Uuid, encrypted: bool) -> Result<Secrets, KeyError> {
        let (name, owner) = (record_name(group), self.owner(Purpose::Domain, group));
        let (record, data_key) = if encrypted {
            let kek = self.keks.current_for(|| format!("encrypting {group}"))?;
            self.wrap_pool_key_in_clear(kek).await?;
            let data_key = self.new_key();
            (Record::wrap(kek, owner, self.random_array(), &data_key, &self.random_array()), Some(data_key))
        } else {
            (Record::without_key(owner, State::NotEncrypted, &self.pool_key), None)
        };
        match again(async || self.store.create(&name, Vec::new()).await).await {
            Ok(()) | Err(StoreError::Exists(_)) => {}
            Err(error) => return Err(error.into()),
        }
        match self.set(&name, None, Bytes::copy_from_slice(&record)).await {
            Err(KeyError::Raced { .. }) => return Err(KeyError::Exists { record: root_called(&name) }),
            outcome => outcome?,
        }
        if encrypted {
            self.take_back_if_rotated(group).await?;
        }
        Ok(self.secrets_of(data_key))
    }

    /// The secrets of a domain.
    ///
    /// # Errors
    /// As the key-encryption keys and the record allow; [`KeyError::Erased`] after [`Keyring::erase`].
    pub async fn secrets(&self, group: Uuid) -> Result<Secrets, KeyError> {
        let missing = || KeyError::Missing { record: root_called(&record_name(group)) };
        let (record, _) = self.domain_record(group).await?.ok_or_else(missing)?;
        Ok(self.secrets_of(self.data_key_in(&record)?))
    }

    /// What opens objects that are not encrypted.
    #[must_use]
    pub fn without_data_key(&self) -> Secrets {
        self.secrets_of(None)
    }

    /// The secrets of several domains: of a clone and of those its blocks may lie in.
    ///
    /// # Errors
    /// Those of [`Keyring::secrets`] for the first that has any.
    pub async fn secrets_of_all(&self, groups: &[Uuid]) -> Result<BTreeMap<Uuid, Secrets>, KeyError> {
        let mut found = BTreeMap::new();
        for group in groups {
            found.insert(*group, self.secrets(*group).await?);
        }
        Ok(found)
    }

    /// Destroys the data key of a domain for good: what was encrypted with it can never be read again. Whoever has the volume open reads on until it is
    /// closed. A store that keeps earlier versions of what is overwritten must be made to drop them.
    ///
    /// # Errors
    /// Those of the store. Repeat it then: an erased domain is erased again.
    pub async fn erase(&self, group: Uuid) -> Result<(), KeyError> {
        let name = record_name(group);
        let note = Record::without_key(self.owner(Purpose::Domain, group), State::Erased, &self.pool_key);
        let mut tries = 0..TRIES;
        loop {
            let tag = self.read(&name).await?.map(|(_, tag)| tag);
            match self.set(&name, tag.as_ref(), Bytes::copy_from_slice(&note)).await {
                Err(KeyError::Raced { .. }) if tries.next().is_some() => {}
                erased => break erased?,
            }
        }
        Ok(again(async || self.store.delete(&name).await).await?)
    }

    /// The id of the key that wraps the pool's key, if any does. It differs from the current one until [`Keyring::rotate`] has run.
    ///
    /// # Errors
    /// Those of the store, and of a damaged record.
    pub async fn wrapped_by(&self) -> Result<Option<KekId>, KeyError> {
        match self.pool_record_that_must_be().await?.0.state {
            State::Wrapped(kek) => Ok(Some(kek)),
            _ => Ok(None),
        }
    }

    /// Whether it was opened with these key-encryption keys.
    pub(crate) fn has_keks(&self, keks: &Keks) -> bool {
        self.keks.ids() == keks.ids()
    }

    async fn make_pool_key(&self) -> Result<(), KeyError> {
        if !again(async || self.store.list(PREFIX).await).await?.is_empty() {
            return Err(KeyError::Missing { record: root_called(POOL_RECORD) });
        }
        let (owner, key_id, key) = (self.owner(Purpose::Pool, Uuid::nil()), self.random_array(), self.new_key());
        let record = match &self.keks.current {
            Some(kek) => Record::wrap(kek, owner, key_id, &key, &self.random_array()),
            None => Record::in_clear(owner, key_id, &key),
        };
        self.set(POOL_RECORD, None, Bytes::copy_from_slice(&record)).await
    }

    /// Before the first domain is encrypted.
    async fn wrap_pool_key_in_clear(&self, kek: &Kek) -> Result<(), KeyError> {
        let (record, tag) = self.pool_record_that_must_be().await?;
        if record.state == State::Clear {
            self.rewrap(POOL_RECORD, &record, &tag, kek, &self.pool_key).await?;
        }
        Ok(())
    }

    /// Whoever rotates wraps the pool's key first and looks for domains afterwards. So either it has seen the new domain, or this sees the rotation.
    async fn take_back_if_rotated(&self, group: Uuid) -> Result<(), KeyError> {
        match self.wrapped_by().await? {
            Some(by) if self.keks.find(by).is_none() => {
                self.erase(group).await?;
                Err(KeyError::Rotated { by })
            }
            _ => Ok(()),
        }
    }

    async fn rewrap(&self, name: &str, record: &Record, tag: &Tag, kek: &Kek, key: &Key) -> Result<(), KeyError> {
        let purpose = if name == POOL_RECORD { Purpose::Pool } else { Purpose::Domain };
        let owner = self.owner(purpose, record.group());
        let wrapped = Record::wrap(kek, owner, record.key_id(), key, &self.random_array());
        self.set(name, Some(tag), Bytes::copy_from_slice(&wrapped)).await
    }

    async fn pool_record(&self) -> Result<Option<(Record, Tag)>, KeyError> {
        let Some((bytes, tag)) = self.read(POOL_RECORD).await? else { return Ok(None) };
        Ok(Some((Record::parse(&root_called(POOL_RECORD), &bytes, Purpose::Pool, self.pool)?, tag)))
    }

    async fn pool_record_that_must_be(&self) -> Result<(Record, Tag), KeyError> {
        self.pool_record().await?.ok_or_else(|| KeyError::Missing { record: root_called(POOL_RECORD) })
    }

    fn pool_key_in(&self, record: &Record) -> Result<Key, KeyError> {
        if record.state == State::Clear { record.clear_key() } else { record.unwrap(&self.keks) }
    }

    async fn domain_record(&self, group: Uuid) -> Result<Option<(Record, Tag)>, KeyError> {
        let name = record_name(group);
        let Some((bytes, tag)) = self.read(&name).await? else { return Ok(None) };
        let record = Record::parse(&root_called(&name), &bytes, Purpose::Domain, self.pool)?;
        if record.group() != group {
            return Err(record.damaged("it belongs to another volume"));
        }
        Ok(Some((record, tag)))
    }

    /// The data key of a domain, if it is encrypted.
    fn data_key_in(&self, record: &Record) -> Result<Option<Key>, KeyError> {
        match record.state {
            State::Wrapped(_) => record.unwrap(&self.keks).map(Some),
            State::Erased => {
                record.check(&self.pool_key)?;
                Err(KeyError::Erased { record: root_called(&record_name(record.group())) })
            }
            State::NotEncrypted | State::Clear => record.check(&self.pool_key).map(|()| None),
        }
    }

    fn secrets_of(&self, data_key: Option<Key>) -> Secrets {
        Secrets { pool_key: *self.pool_key.bytes(), data_key: data_key.map(|key| *key.bytes()) }
    }

    fn owner(&self, purpose: Purpose, group: Uuid) -> Owner {
        Owner { purpose, pool: self.pool, group }
    }

    fn random_array<const N: usize>(&self) -> [u8; N] {
        let mut bytes = [0; N];
        (self.random)(&mut bytes);
        bytes
    }

    fn new_key(&self) -> Key {
        let mut bytes = Zeroizing::new([0; 32]);
        (self.random)(&mut bytes[..]);
        Key::new(*bytes)
    }

    async fn read(&self, name: &str) -> Result<Option<(Bytes, Tag)>, KeyError> {
        Ok(again(async || self.store.read_root(name).await).await?)
    }

    /// Sets a root. An answer that was lost is looked up; [`KeyError::Raced`] only if there is other content than was expected or wanted.
    async fn set(&self, name: &str, expected: Option<&Tag>, content: Bytes) -> Result<(), KeyError> {
        let mut tries = 0..TRIES;
        loop {
            let error = match self.store.swap(name, expected, content.clone()).await {
                Ok(_) => return Ok(()),
                Err(error @ (StoreError::Changed(_) | StoreError::Unknown(_))) => error,
                Err(error) => return Err(error.into()),
            };
            match self.read(name).await? {
                Some((found, _)) if found == content => return Ok(()),
                found if found.as_ref().map(|(_, tag)| tag) != expected => {
                    return Err(KeyError::Raced { record: root_called(name) });
                }
                _ if tries.next().is_none() => return Err(error.into()),
                _ => {}
            }
        }
    }
}

/// Repeats what may be repeated as long as the store gives no usable answer.
async fn again<T>(mut operation: impl AsyncFnMut() -> Result<T, StoreError>) -> Result<T, StoreError> {
    for _ in 1..TRIES {
        match operation().await {
            Err(StoreError::Unknown(_)) => {}
            outcome => return outcome,
        }
    }
    operation().await
}

fn record_name(group: Uuid) -> String {
    format!("{PREFIX}{group}")
}

/// For errors.
fn root_called(name: &str) -> String {
    format!("root {name}")
}
