//! What a mapped volume uses: its engine says it where it is open here. At rest it is read from the store and this host's log, and the volume is not
//! opened for it.

use std::sync::Arc;

use backends::pool::Result;
use backends::{ReducedUsage, Shares, Usage, VolumeRecord};
use blockdev::BlockDevice;

use super::segments::{self, Opened};
use super::snapshots::refused;
use super::{MappedPool, groups};
use crate::at_rest::RestingUse;
use crate::device::{MappedDevice, OpenError};

struct Found {
    reduced: ReducedUsage,
    shares: Shares,
    /// Bytes, where the log is here.
    log: Option<u64>,
}

impl MappedPool {
    pub(super) fn usage_mapped(&self, record: &VolumeRecord) -> Result<Usage> {
        let opened = self.store()?;
        let allocated = groups::stored(&*opened.store, record.group()).map_err(|error| segments::failed(&self.name, error))?;
        let device = self.in_open_group(record);
        let found = match device.as_ref().and_then(|device| Some((device, device.usage()?))) {
            Some((device, found)) => {
                let shares = device.shares().map_err(|error| not_told(record, error))?;
                Found { reduced: found.reduced, shares, log: Some(found.log.used) }
            }
            None => self.usage_at_rest(record, &opened)?,
        };
        let Found { reduced, shares, log } = found;
        let (logical, snapshots) = (record.size, shares.snapshots);
        Ok(Usage { logical, allocated, snapshots, reduced: Some(reduced), shares: Some(shares), log })
    }

    /// The device of a volume that is open here, or whose group is, for another of its volumes.
    fn in_open_group(&self, record: &VolumeRecord) -> Option<Arc<MappedDevice>> {
        if let Some(device) = self.opened(record) {
            return Some(device);
        }
        let place = self.groups.lock().get(&record.group()).cloned()?;
        let group = place.lock().upgrade().filter(|group| !group.has_ended())?;
        group.volume(record.uuid).ok().map(Arc::new)
    }

    /// With what this host's log holds, if this host had the volume last; else as the newest checkpoint says.
    fn usage_at_rest(&self, record: &VolumeRecord, opened: &Opened) -> Result<Found> {
        let engine = self.engine_of(record, opened)?;
        if self.is_here(record.group())? {
            let log = self.logs.open_read_only(record.group());
            let looked = log.and_then(|log| {
                let log: Arc<dyn BlockDevice> = Arc::new(log);
                engine.usage_at_rest(log).map_err(|error| not_told(record, error))
            });
            match looked {
                Ok(RestingUse { reduced, shares, log }) => return Ok(Found { reduced, shares, log: Some(log) }),
                Err(error) => tracing::info!("volume {}: its usage is that of its last checkpoint: {error}", record.name),
            }
        }
        let reduced = engine.usage().map_err(|error| not_told(record, error))?;
        let shares = engine.shares().map_err(|error| not_told(record, error))?;
        Ok(Found { reduced, shares, log: None })
    }
}

fn not_told(record: &VolumeRecord, error: OpenError) -> backends::PoolError {
    refused(&format!("volume {}: usage", record.name), error)
}
