//! Encrypted raw volumes: their keys stand wrapped in the catalogue, and a layer over the device uses them.

use std::sync::Arc;

use backends::{Pool, VolumeRecord};
use blockdev::BlockDevice;
use blockdev::layers::encrypted::{DATA_UNIT, Encrypted};
use volume::keys::{KeyError, RawKeys};

use super::Daemon;
use crate::config::key_encryption_keys;
use crate::error::{Error, Result};

impl Daemon {
    /// The wrapped key of a new volume, if its policy wants it encrypted.
    pub(super) fn key_for_new(&self, volume: &str, size: u64, policy: Option<&str>) -> Result<Option<String>> {
        let config = self.config();
        if !policy.and_then(|policy| config.policy.get(policy)).is_some_and(|policy| policy.encryption) {
            return Ok(None);
        }
        if !size.is_multiple_of(DATA_UNIT as u64) {
            let next = size.next_multiple_of(DATA_UNIT as u64);
            return Err(Error::invalid(format!(
                "volume {volume}: size {size} is no multiple of {DATA_UNIT}, as encryption needs: the next is {next}"
            )));
        }
        let created = self.raw_keys().and_then(|keys| keys.create(volume));
        let (wrapped, _) = created.map_err(|error| key_error(volume, &error))?;
        Ok(Some(wrapped))
    }

    /// The device as its clients see it. A key that is still wrapped by the previous key-encryption key is wrapped anew.
    pub(super) fn decrypted(
        &self,
        pool: &dyn Pool,
        record: &VolumeRecord,
        device: Arc<dyn BlockDevice>,
    ) -> Result<Arc<dyn BlockDevice>> {
        let Some(wrapped) = &record.wrapped_key else { return Ok(device) };
        let failed = |error: KeyError| key_error(&record.name, &error);
        let keys = self.raw_keys().map_err(failed)?;
        let key = keys.open(&record.name, wrapped).map_err(failed)?;
        if let Some(rewrapped) = keys.rewrap(&record.name, wrapped).map_err(failed)?
            && let Err(error) = pool.set_wrapped_key(&record.name, wrapped, &rewrapped)
        {
            tracing::warn!("volume {}: its key is still wrapped by the previous key-encryption key: {error}", record.name);
        }
        Ok(Arc::new(Encrypted::new(device, key)?))
    }

    pub(super) fn raw_keys(&self) -> std::result::Result<RawKeys, KeyError> {
        let keks = self.config().keys.as_ref().map(key_encryption_keys).transpose()?.unwrap_or_default();
        Ok(RawKeys { keks, random: Arc::new(volume::system_random) })
    }
}

pub(super) fn key_error(volume: &str, error: &KeyError) -> Error {
    Error::invalid(error.to_string()).of(format!("volume {volume}"))
}
