//! Replacing the key-encryption key: every record is wrapped anew, no data is.
//!
//! ```text
//!   read all, change nothing ─▶ wrap keys/pool ─▶ list ─▶ wrap each keys/GROUP
//! ```
//!
//! Records that are wrapped by the current key already are passed over, so it is begun again after a crash, and may run on several hosts.

use uuid::Uuid;

use super::kek::Kek;
use super::record::State;
use super::{KeyError, Keyring, POOL_RECORD, TRIES, inspect, root_called};

/// How far a rotation is, in domains.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Progress {
    pub done: u64,
    pub total: u64,
}

/// What a rotation did, in records: those of domains, and the pool's.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Rotation {
    /// Wrapped anew.
    pub rewrapped: u64,
    /// Wrapped by the current key before.
    pub already: u64,
}

impl Keyring {
    /// Wraps every key with the current key-encryption key. The previous one must stay configured until this has succeeded, everywhere; raw volumes have
    /// theirs in their pools' catalogues ([`super::RawKeys::rewrap`]). If it fails, or the process dies, all keys can still be read with both, and it is repeated.
    ///
    /// # Errors
    /// [`KeyError::NoKek`] without a current key. If any key cannot be read, nothing was changed.
    pub async fn rotate(&self, mut report: impl FnMut(Progress)) -> Result<Rotation, KeyError> {
        let kek = self.keks.current_for(|| format!("rotating the keys of pool {}", self.pool))?;
        for group in inspect::listed(&self.store).await? {
            if let Some((record, _)) = self.domain_record(group).await? {
                match self.data_key_in(&record) {
                    Err(KeyError::Erased { .. }) => {}
                    outcome => drop(outcome?),
                }
            }
        }
        let mut rotation = Rotation::default();
        rotation.count(self.rotate_pool_key(kek).await?);
        let groups = inspect::listed(&self.store).await?;
        let total = groups.len() as u64;
        for (done, group) in groups.into_iter().enumerate() {
            report(Progress { done: done as u64, total });
            rotation.count(self.rotate_domain(group, kek).await?);
        }
        report(Progress { done: total, total });
        Ok(rotation)
    }

    async fn rotate_pool_key(&self, kek: &Kek) -> Result<Outcome, KeyError> {
        for _ in 0..TRIES {
            let (record, tag) = self.pool_record_that_must_be().await?;
            let key = self.pool_key_in(&record)?;
            if record.state == State::Wrapped(kek.id()) {
                return Ok(Outcome::Already);
            }
            match self.rewrap(POOL_RECORD, &record, &tag, kek, &key).await {
                Err(KeyError::Raced { .. }) => {}
                outcome => return outcome.map(|()| Outcome::Rewrapped),
            }
        }
        Err(KeyError::Raced { record: root_called(POOL_RECORD) })
    }

    async fn rotate_domain(&self, group: Uuid, kek: &Kek) -> Result<Outcome, KeyError> {
        let name = super::record_name(group);
        for _ in 0..TRIES {
            let Some((record, tag)) = self.domain_record(group).await? else { return Ok(Outcome::NoKey) };
            let key = match self.data_key_in(&record) {
                Ok(Some(key)) => key,
                Ok(None) | Err(KeyError::Erased { .. }) => return Ok(Outcome::NoKey),
                Err(error) => return Err(error),
            };
            if record.state == State::Wrapped(kek.id()) {
                return Ok(Outcome::Already);
            }
            match self.rewrap(&name, &record, &tag, kek, &key).await {
                Err(KeyError::Raced { .. }) => {}
                outcome => return outcome.map(|()| Outcome::Rewrapped),
            }
        }
        Err(KeyError::Raced { record: root_called(&name) })
    }
}

enum Outcome {
    Rewrapped,
    Already,
    NoKey,
}

impl Rotation {
    fn count(&mut self, outcome: Outcome) {
        match outcome {
            Outcome::Rewrapped => self.rewrapped += 1,
            Outcome::Already => self.already += 1,
            Outcome::NoKey => {}
        }
    }
}
