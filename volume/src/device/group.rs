//! A group of volumes that is open on its home thread.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::AtomicU64;
use std::sync::mpsc::RecvTimeoutError;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use backends::segments::StoreError;
use blockdev::{BlockDevice, DeviceError, clock};
use parking_lot::Mutex;
use uuid::Uuid;

use super::engine::{self, Content, Home};
use super::{MappedDevice, MappedOptions, OpenError};
use crate::environment::LocalFuture;
use crate::error::VolumeError;
use crate::group::{Beginning, MappedGroup};
use crate::log::WhenFull;
use crate::progress::Progress;
use crate::troubles::{Cause, Trouble};

/// How long something is waited for that the pool has to take.
pub(super) const PATIENCE: Duration = Duration::from_secs(60);
/// Beginnings of troubles that are remembered.
const BEGINNINGS_MAX: usize = 16;
/// How often it is looked whether the pool takes anything.
const LOOK_EVERY: Duration = Duration::from_millis(200);

/// The group. It is closed when it and the devices of its volumes are dropped; what was acknowledged and is not yet in the pool stays in the log.
pub struct GroupDevice {
    pub(super) home: Home,
    /// When the pool, or the disk of the log, began to take nothing: by the engine's clock, and by the calendar. The latest times.
    troubles_since: Mutex<BTreeMap<Duration, SystemTime>>,
    log_path: PathBuf,
    when_full: WhenFull,
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
        let (log_path, when_full) = (options.log_path.clone(), settings.when_full);
        Ok(GroupDevice { home, troubles_since: Mutex::default(), log_path, when_full })
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
        self.run_telling(limit, &|_, _| {}, move |group, _| work(group))
    }

    /// The same for long work, of whose progress `tell` hears now and then: bytes done, and in all. As long as it comes on, it is waited for. Otherwise
    /// it is told that it is given up.
    pub(super) fn run_telling<T: Send + 'static>(
        &self,
        limit: Duration,
        tell: &dyn Fn(u64, u64),
        work: impl FnOnce(Rc<MappedGroup>, Arc<Progress>) -> LocalFuture<'static, Result<T, VolumeError>> + Send + 'static,
    ) -> Result<T, OpenError> {
        let progress = Arc::new(Progress::default());
        let told = progress.clone();
        let receiver = self.home.begin(move |group| work(group, told));
        let is_stuck = move |group: &MappedGroup| group.trouble_lasts().is_some_and(|lasts| lasts >= limit);
        let (mut before, mut came_on) = (progress.get(), None);
        loop {
            let answer = receiver.recv_timeout(LOOK_EVERY);
            let now @ (done, total) = progress.get();
            tell(done.min(total), total);
            if now != before {
                (before, came_on) = (now, Some(clock::monotonic()));
            }
            let rests = came_on.is_none_or(|then| clock::monotonic().duration_since(then) >= limit);
            match answer {
                Ok(answer) => return Ok(answer?),
                Err(RecvTimeoutError::Timeout) if rests && self.home.ask(is_stuck) == Some(true) => {
                    progress.give_up();
                    return Err(self.takes_nothing());
                }
                Err(RecvTimeoutError::Timeout) => {}
                Err(RecvTimeoutError::Disconnected) => return Err(engine::stopped().into()),
            }
        }
    }

    fn takes_nothing(&self) -> OpenError {
        let trouble = self.home.ask(|group| group.trouble()).flatten();
        let why = match trouble.map(|trouble| trouble.cause) {
            Some(Cause::LogDisk(errno)) => format!("the disk of its log {} is full: {errno}", self.log_path.display()),
            Some(Cause::Pool(error)) => error.to_string(),
            None => "the pool did not answer in time".to_owned(),
        };
        DeviceError::Refused(why).into()
    }

    /// Closes it although its volumes may be in use; whoever uses them gets errors.
    pub fn end(&self) {
        self.home.end();
    }

    /// Whether it does not go on, or is closed. However busy its thread is, it is waited for.
    pub fn has_ended(&self) -> bool {
        !matches!(self.home.run(|group| Box::pin(async move { Ok(group.failed()) })), Ok(None))
    }

    /// What the pool does not take, or the disk of the log, in words that stay the same as long as it lasts. `now`: by the clock of the trouble.
    pub(super) fn told_trouble(&self, Trouble { since, cause }: Trouble, now: Duration) -> String {
        let mut known = self.troubles_since.lock();
        // Told by one clock and meant by another, the beginning would seem to move.
        let wall = *known.entry(since).or_insert_with(|| clock::wall() - now.saturating_sub(since));
        if known.len() > BEGINNINGS_MAX {
            known.pop_first();
        }
        let seconds = wall.duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs());
        let since = clock::format_utc(seconds);
        match cause {
            Cause::Pool(error) => format!("the pool takes nothing since {since}: {error}"),
            Cause::LogDisk(errno) => {
                format!("the disk of the local log {} is full since {since}: {errno}", self.log_path.display())
            }
        }
    }

    /// What becomes of writes meanwhile.
    pub(super) fn told_outlook(&self, cause: &Cause) -> &'static str {
        let is_full = matches!(cause, Cause::Pool(StoreError::NoSpace(_)));
        match (cause, self.when_full) {
            (Cause::LogDisk(_), WhenFull::Wait) => "writes wait, and go on by themselves when there is space",
            (Cause::LogDisk(_), WhenFull::Error) => "writes get ENOSPC, until there is space",
            (Cause::Pool(_), WhenFull::Error) if is_full => {
                "writes wait in the local log, and get ENOSPC when it is full; what waits goes on by itself when that is mended"
            }
            (Cause::Pool(_), _) => "writes wait in the local log, and go on by themselves when that is mended",
        }
    }
}

async fn remove(group: Rc<MappedGroup>, id: Uuid) -> Result<(), VolumeError> {
    match group.remove(id.into_bytes()).await {
        Ok(()) | Err(VolumeError::NoVolume) => Ok(()),
        Err(error) => Err(error),
    }
}
