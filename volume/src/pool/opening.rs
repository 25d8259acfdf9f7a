//! Opening a mapped volume on this host: which log it gets, and what is said when it gets none.
//!
//! ```text
//!   log of this host ─▶ claim ─┬─ opened ─ still in the catalogue? ─ mirrored in its record ─▶ device
//!                              ├─ older than another host's writes: refused; to take over, set aside, claim again with a new one
//!                              └─ lost or damaged: refused; with accept_loss set aside, claim with a new one
//! ```

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use backends::pool::Result;
use backends::{Claim, PoolError, VolumeRecord};
use blockdev::clock;
use uuid::Uuid;

use super::records::moved_away;
use super::segments::Opened;
use super::{Dedup, GroupPlace, MappedPool, SEGMENT_BYTES_MAX, VolumePolicy};
use crate::device::{GroupDevice, MappedDevice, MappedOptions, OpenError, name_of};
use crate::error::VolumeError;
use crate::mapped::Settings;
use crate::reduce::Secrets;

/// As the lock of a log is waited for.
const CLOSING_PATIENCE: Duration = Duration::from_secs(5);
const CLOSING_PAUSE: Duration = Duration::from_millis(5);

impl MappedPool {
    pub(super) fn engine(&self, record: &VolumeRecord, opened: &Opened) -> Result<MappedOptions> {
        let segment_bytes = SEGMENT_BYTES_MAX.min(self.options.log_size / 4);
        let VolumePolicy { durability, compression, dedup, when_full } = (self.options.policy)(record)?;
        let deduplicate = dedup != Dedup::None;
        let settings = Settings { durability, segment_bytes, compression, deduplicate, when_full, ..Settings::default() };
        Ok(MappedOptions { settings, ..self.engine_of(record, opened)? })
    }

    /// For what is done in the store alone.
    pub(super) fn engine_of(&self, record: &VolumeRecord, opened: &Opened) -> Result<MappedOptions> {
        let group = record.group();
        let secrets = opened.secrets(group)?;
        Ok(MappedOptions { volume: record.uuid, ..self.engine_with(group, opened, secrets) })
    }

    /// For what ends a group, whose keys may be gone already.
    pub(super) fn engine_at_end(&self, group: Uuid, opened: &Opened) -> Result<MappedOptions> {
        opened.secrets_at_end(group).map(|secrets| self.engine_with(group, opened, secrets))
    }

    fn engine_with(&self, group: Uuid, opened: &Opened, secrets: Secrets) -> MappedOptions {
        let home = self.next_home.fetch_add(1, Ordering::Relaxed) % self.options.homes.len();
        MappedOptions {
            group,
            volume: group,
            store: opened.store.clone(),
            settings: Settings::default(),
            secrets,
            home: self.options.homes[home].clone(),
            log_path: self.logs.path(group),
        }
    }

    pub(super) fn open_device(&self, record: &VolumeRecord, claim: Claim) -> Result<Arc<MappedDevice>> {
        self.wait_until_closed(record)?;
        let group = self.open_group(record, claim)?;
        let device = group.volume(record.uuid).map_err(|error| match error {
            OpenError::Volume(VolumeError::NoVolume) => PoolError::Backend(format!(
                "volume {}: its group {} is there and does not have it, so its data is gone; nothing was changed. Delete it, or restore the pool \
                 from a copy",
                record.name,
                name_of(record.group())
            )),
            error => self.not_opened(record, error.into()),
        })?;
        // Another host may have deleted it before it was claimed; from now on it would notice us.
        let now = match self.records.get(&record.name) {
            Ok(now) if now.uuid == record.uuid => now,
            Ok(_) | Err(PoolError::NotFound(_)) => return Err(moved_away(record)),
            Err(error) => return Err(error),
        };
        self.mirror(&now, &device)?;
        let device = Arc::new(device);
        let mut open = self.open.lock();
        open.retain(|_, (_, device)| device.strong_count() > 0);
        open.insert(record.name.clone(), (record.uuid, Arc::downgrade(&device)));
        Ok(device)
    }

    /// Whoever had the volume may be about to let it go.
    pub(super) fn wait_until_closed(&self, record: &VolumeRecord) -> Result<()> {
        let deadline = clock::monotonic() + CLOSING_PATIENCE;
        while self.opened(record).is_some() {
            if clock::monotonic() >= deadline {
                let log = self.logs.path(record.group());
                return Err(PoolError::InUse(format!(
                    "volume {}: its log {} is in use: the volume is open in this daemon already",
                    record.name,
                    log.display()
                )));
            }
            std::thread::sleep(CLOSING_PAUSE);
        }
        Ok(())
    }

    /// The group of a volume, opened if it is not open here; it closes with its last user.
    pub(super) fn open_group(&self, record: &VolumeRecord, claim: Claim) -> Result<Arc<GroupDevice>> {
        let place = self.group_place(record.group());
        let mut known = place.lock();
        if let Some(group) = known.upgrade() {
            if !group.has_ended() {
                return Ok(group);
            }
            // Its other volumes are opened anew one by one.
            group.end();
        }
        let opened = self.store()?;
        let group = self.claim(record, &opened, claim).map_err(|error| self.not_opened(record, error))?;
        let group = Arc::new(group);
        *known = Arc::downgrade(&group);
        self.forget_lost(record, &group);
        Ok(group)
    }

    fn group_place(&self, group: Uuid) -> GroupPlace {
        let mut groups = self.groups.lock();
        // Nobody is opening it, and nobody has it open.
        groups.retain(|_, place| Arc::strong_count(place) > 1 || place.lock().strong_count() > 0);
        groups.entry(group).or_default().clone()
    }

    /// Opens the engine. To take over, a log that must not be replayed is set aside; to accept a loss, also one that cannot be.
    fn claim(&self, record: &VolumeRecord, opened: &Opened, claim: Claim) -> std::result::Result<GroupDevice, NotClaimed> {
        let group = record.group();
        let open = |accept_loss| -> std::result::Result<GroupDevice, NotClaimed> {
            let mut engine = self.engine(record, opened)?;
            engine.settings = Settings { accept_loss, own_only: claim == Claim::Own, ..engine.settings };
            Ok(GroupDevice::open(&engine, Arc::new(self.logs.open(group)?))?)
        };
        let set_aside = |why: &VolumeError| -> Result<()> {
            let aside = self.logs.set_aside(group)?;
            tracing::warn!("volume {}: {why}. The log was set aside as {}", record.name, aside.display());
            Ok(())
        };
        let mut outcome = open(false);
        if let Err(NotClaimed::Volume(error @ VolumeError::StaleLog)) = &outcome
            && claim >= Claim::TakeOver
        {
            set_aside(error)?;
            outcome = open(false);
        }
        match outcome {
            Err(NotClaimed::Volume(error)) if claim == Claim::AcceptLoss && is_of_the_log(&error) => {
                tracing::warn!(
                    "volume {}: opened although acknowledged writes may be lost, as was asked for: {error}",
                    record.name
                );
                if error != VolumeError::LogMissing {
                    set_aside(&error)?;
                }
                open(true)
            }
            outcome => outcome,
        }
    }

    fn not_opened(&self, record: &VolumeRecord, error: NotClaimed) -> PoolError {
        let name = &record.name;
        match error {
            NotClaimed::Pool(PoolError::InUse(why)) => PoolError::InUse(format!("volume {name}: its log {why}")),
            NotClaimed::Pool(error) => error,
            NotClaimed::Volume(VolumeError::NoVolume) => PoolError::Backend(format!(
                "volume {name}: {}/root, which says where its data is, is missing, or says that it was deleted; nothing was changed. Restore \
                 it from a copy of the pool",
                name_of(record.group())
            )),
            NotClaimed::Volume(error @ (VolumeError::StaleLog | VolumeError::Elsewhere)) => {
                let unless = if error == VolumeError::Elsewhere { ", unless this host's log of it is lost" } else { "" };
                PoolError::TakenOver(format!(
                    "volume {name}: another host had it last{unless}, and would lose it if it still serves it. Do it there; or take the volume over: \
                     with --take-over, or to serve it here with `novastor export add` or `novastor export reopen`"
                ))
            }
            NotClaimed::Volume(error) if is_of_the_log(&error) => PoolError::Backend(format!(
                "volume {name}: {error}. Its log on this host is {}; `novastor export add {name} … --accept-loss` opens it without what only \
                 that log has, once and for all",
                self.logs.path(record.group()).display()
            )),
            NotClaimed::Volume(error @ VolumeError::LogIo { .. }) => PoolError::Backend(format!(
                "volume {name}: {error}. Its log on this host is {}",
                self.logs.path(record.group()).display()
            )),
            NotClaimed::Volume(error) => PoolError::Backend(format!("volume {name}: {error}")),
        }
    }
}

/// Why a volume was not opened.
enum NotClaimed {
    Volume(VolumeError),
    Pool(PoolError),
}

impl From<OpenError> for NotClaimed {
    fn from(error: OpenError) -> NotClaimed {
        match error {
            OpenError::Volume(error) => NotClaimed::Volume(error),
            OpenError::Device(error) => NotClaimed::Pool(error.into()),
        }
    }
}

impl From<PoolError> for NotClaimed {
    fn from(error: PoolError) -> NotClaimed {
        NotClaimed::Pool(error)
    }
}

/// Whether the volume would open with another log.
fn is_of_the_log(error: &VolumeError) -> bool {
    match error {
        // Another one would need space too.
        VolumeError::LogIo { errno, .. } => !errno.is_no_space(),
        VolumeError::LogDamaged { .. }
        | VolumeError::ForeignLog
        | VolumeError::StaleLog
        | VolumeError::NotALog
        | VolumeError::LogDoesNotFit
        | VolumeError::LogMissing => true,
        VolumeError::ObjectDamaged { .. }
        | VolumeError::FormatVersion(_)
        | VolumeError::Fenced
        | VolumeError::Elsewhere
        | VolumeError::Raced
        | VolumeError::NoVolume
        | VolumeError::VolumeExists
        | VolumeError::Panicked
        | VolumeError::LogKey
        | VolumeError::LogFull
        | VolumeError::Closed
        | VolumeError::GivenUp
        | VolumeError::Moved
        | VolumeError::NoSnapshot
        | VolumeError::SnapshotExists
        | VolumeError::SnapshotName
        | VolumeError::SnapshotHasClones(_)
        | VolumeError::VolumeHasClones(_)
        | VolumeError::VolumeHasSnapshot(_)
        | VolumeError::GroupFull
        | VolumeError::TooManyAncestors
        | VolumeError::BadSize
        | VolumeError::Store(_) => false,
    }
}
