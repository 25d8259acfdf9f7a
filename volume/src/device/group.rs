//! A group of volumes that is open on its home thread.

use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::AtomicU64;
use std::sync::mpsc::RecvTimeoutError;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use blockdev::{BlockDevice, DeviceError, clock};
use parking_lot::Mutex;
use uuid::Uuid;

use super::engine::{self, Content, Home};
use super::{MappedDevice, MappedOptions, OpenError};
use crate::environment::LocalFuture;
use crate::error::VolumeError;
use crate::group::{Beginning, MappedGroup};
use crate::troubles::Trouble;

/// How long something is waited for that the pool has to take.
pub(super) const PATIENCE: Duration = Duration::from_secs(60);
/// How often it is looked whether the pool takes anything.
const LOOK_EVERY: Duration = Duration::from_millis(200);

/// The group. It is closed when it and the devices of its volumes are dropped; what was acknowledged and is not yet in the pool stays in the log.
pub struct GroupDevice {
    pub(super) home: Home,
    /// When the pool began to take nothing, by the engine's clock and by the calendar.
    trouble_since: Mutex<Option<(Duration, SystemTime)>>,
}

impl GroupDevice {
    /// Takes over the group of `options`. `log` carries its log; nobody else uses it meanwhile. Blocks, as all of the following do; never call them
    /// from a data-plane thread.
    pub fn open(options: &MappedOptions, log: Arc<dyn BlockDevice>) -> Result<GroupDevice, OpenError> {
        let (group, settings) = (options.group.into_bytes(), options.settings);
        let open = move |parts| -> LocalFuture<'static, engine::Begun<()>> {
            Box::pin(async move {
                let group = MappedGroup::open(&parts, group, settings).await?;
                Ok((Some(Content::Group(Rc::new(group))), ()))
            })
        };
        let (home, ()) = Home::start(options, &log, open)?;
        Ok(GroupDevice { home, trouble_since: Mutex::default() })
    }

    /// The UUIDs of its volumes.
    pub fn volumes(&self) -> Result<Vec<Uuid>, OpenError> {
        let volumes = self.home.run(|group| Box::pin(async move { Ok(group.volumes()) }))?;
        Ok(volumes.into_iter().map(Uuid::from_bytes).collect())
    }

    /// The device of one of its volumes.
    pub fn volume(self: &Arc<Self>, id: Uuid) -> Result<MappedDevice, OpenError> {
        let found = self.home.run(move |group| {
            Box::pin(async move {
                let volume = group.volume(id.into_bytes()).ok_or(VolumeError::NoVolume)?;
                Ok((volume.slot, volume.size()))
            })
        });
        let (slot, size) = found?;
        Ok(MappedDevice { group: self.clone(), slot, size: AtomicU64::new(size) })
    }

    /// See [`MappedGroup::add`]. Where the pool takes nothing, it fails after a while.
    pub fn add(&self, id: Uuid, beginning: Beginning) -> Result<(), OpenError> {
        self.run_unless_stuck(PATIENCE, move |group| Box::pin(async move { group.add(id.into_bytes(), beginning).await }))
    }

    /// See [`MappedGroup::remove`]; nothing is done if there is no such volume. Where the pool takes nothing, it fails after a while, and goes on.
    pub fn remove(&self, id: Uuid) -> Result<(), OpenError> {
        self.run_unless_stuck(PATIENCE, move |group| Box::pin(remove(group, id)))
    }

    /// The same for those who do not wait for it.
    pub fn remove_later(&self, id: Uuid) {
        self.home.begin(move |group| Box::pin(remove(group, id)));
    }

    /// Has the group do something, and waits for it, unless the pool takes nothing for so long: then it goes on by itself.
    pub(super) fn run_unless_stuck<T: Send + 'static>(
        &self,
        limit: Duration,
        work: impl FnOnce(Rc<MappedGroup>) -> LocalFuture<'static, Result<T, VolumeError>> + Send + 'static,
    ) -> Result<T, OpenError> {
        let receiver = self.home.begin(work);
        let is_stuck = move |group: &MappedGroup| group.trouble_lasts().is_some_and(|lasts| lasts >= limit);
        loop {
            match receiver.recv_timeout(LOOK_EVERY) {
                Ok(answer) => return Ok(answer?),
                Err(RecvTimeoutError::Timeout) if self.home.ask(is_stuck) == Some(true) => return Err(self.takes_nothing()),
                Err(RecvTimeoutError::Timeout) => {}
                Err(RecvTimeoutError::Disconnected) => return Err(engine::stopped().into()),
            }
        }
    }

    fn takes_nothing(&self) -> OpenError {
        let trouble = self.home.ask(|group| group.trouble().map(|trouble| trouble.error.to_string())).flatten();
        DeviceError::Refused(trouble.unwrap_or_else(|| "the pool did not answer in time".to_owned())).into()
    }

    /// Closes it although its volumes may be in use; whoever uses them gets errors.
    pub fn end(&self) {
        self.home.end();
    }

    /// Whether it does not go on, or is closed. However busy its thread is, it is waited for.
    pub fn has_ended(&self) -> bool {
        !matches!(self.home.run(|group| Box::pin(async move { Ok(group.failed()) })), Ok(None))
    }

    /// What the pool does not take, in words that stay the same as long as it lasts.
    pub(super) fn told_trouble(&self, found: Option<(Trouble, Duration)>) -> Option<String> {
        let mut known = self.trouble_since.lock();
        let Some((Trouble { since, error }, now)) = found else {
            *known = None;
            return None;
        };
        // Told by one clock and meant by another, the beginning would seem to move.
        let wall =
            known.filter(|(of, _)| *of == since).map_or_else(|| clock::wall() - now.saturating_sub(since), |(_, wall)| wall);
        *known = Some((since, wall));
        let seconds = wall.duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs());
        Some(format!("the pool takes nothing since {}: {error}", clock::format_utc(seconds)))
    }
}

async fn remove(group: Rc<MappedGroup>, id: Uuid) -> Result<(), VolumeError> {
    match group.remove(id.into_bytes()).await {
        Ok(()) | Err(VolumeError::NoVolume) => Ok(()),
        Err(error) => Err(error),
    }
}
