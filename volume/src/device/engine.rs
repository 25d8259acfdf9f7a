//! What lives on the home thread of a mapped volume, and how other threads reach it.
//!
//! ```text
//!   any thread ── work ──▶ home thread: ENGINES[number] ─▶ Tasks · a group of volumes or a view of a snapshot · its log
//!        ▲                                                     │
//!        └───────────────────── answer ◀───────────────────────┘
//! ```

use std::cell::RefCell;
use std::collections::HashMap;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc;
use std::time::Duration;

use backends::segments::SegmentStore;
use blockdev::{BlockDevice, DeviceError, Errno, Op, Reactor, ReactorHandle};
use bytes::Bytes;
use parking_lot::Mutex;

use super::log_disk::DeviceLog;
use super::queue::{Found, Job};
use super::tasks::{ReactorEnvironment, Tasks};
use super::{MappedOptions, OpenError};
use crate::clone::SnapshotView;
use crate::environment::{Environment, LocalFuture};
use crate::error::VolumeError;
use crate::group::MappedGroup;
use crate::mapped::{MappedVolume, Parts};
use crate::reduce::Secrets;

/// Long writes go to the log in parts of so many bytes, or of fewer where the log is small.
const WRITE_PART: usize = 1 << 20;
/// How long the thread of an engine may take to say how it is.
const ANSWER_LIMIT: Duration = Duration::from_secs(1);

/// What an engine serves.
#[derive(Clone)]
pub(super) enum Content {
    Group(Rc<MappedGroup>),
    View(Rc<SnapshotView>),
}

/// What a beginning gives: something to serve, if it does not end at once, and an answer for whoever began it.
pub(super) type Begun<T> = Result<(Option<Content>, T), VolumeError>;

struct Engine {
    tasks: Rc<Tasks>,
    environment: Rc<ReactorEnvironment>,
    content: Option<Content>,
    disk: Rc<DeviceLog>,
}

thread_local! {
    static ENGINES: RefCell<HashMap<u64, Engine>> = RefCell::default();
}

/// An engine on its home thread. Closed when dropped; what was acknowledged and is not yet in the pool stays in the log.
pub(super) struct Home {
    thread: ReactorHandle,
    number: u64,
    /// Let go of after the engine's last operation on it.
    log: Mutex<Option<Arc<dyn BlockDevice>>>,
}

impl Drop for Home {
    fn drop(&mut self) {
        self.end();
    }
}

impl Home {
    /// Starts an engine with what `begin` makes, and waits for it. One that gets nothing to serve ends at once. Blocks.
    pub(super) fn start<T: Send + 'static>(
        options: &MappedOptions,
        log: &Arc<dyn BlockDevice>,
        begin: impl FnOnce(Parts) -> LocalFuture<'static, Begun<T>> + Send + 'static,
    ) -> Result<(Home, T), OpenError> {
        static NEXT: AtomicU64 = AtomicU64::new(0);
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        let (sender, receiver) = mpsc::sync_channel(1);
        let (its_log, store, secrets) = (log.clone(), options.store.clone(), options.secrets.clone());
        options.home.spawn(move |reactor| begin_here(number, reactor, &*its_log, (store, secrets), begin, sender));
        let begun = receiver.recv().map_err(|_| stopped())?;
        begun.map(|answer| (Home { thread: options.home.clone(), number, log: Mutex::new(Some(log.clone())) }, answer))
    }

    /// Closes the engine before the last of those who use it is gone; they get EIO.
    pub(super) fn end(&self) {
        let Some(log) = self.log.lock().take() else { return };
        let number = self.number;
        self.thread.spawn(move |_| close(number, Some(log)));
    }

    pub(super) fn is_ended(&self) -> bool {
        self.log.lock().is_none()
    }

    pub(super) fn thread(&self) -> &ReactorHandle {
        &self.thread
    }

    pub(super) fn number(&self) -> u64 {
        self.number
    }

    /// Asks the group something that it knows at once. `None` if its thread does not say, or it is closed. Blocks for a moment.
    pub(super) fn ask<T: Send + 'static>(&self, question: impl FnOnce(&MappedGroup) -> T + Send + 'static) -> Option<T> {
        let (sender, receiver) = mpsc::sync_channel(1);
        let number = self.number;
        self.thread.spawn(move |_| {
            // Whoever asked may have stopped waiting.
            if let Some((_, Content::Group(group))) = find(number) {
                let _ = sender.send(question(&group));
            }
        });
        receiver.recv_timeout(ANSWER_LIMIT).ok()
    }

    /// Has the group do something, and waits for it, however long it takes. Blocks.
    pub(super) fn run<T: Send + 'static>(
        &self,
        work: impl FnOnce(Rc<MappedGroup>) -> LocalFuture<'static, Result<T, VolumeError>> + Send + 'static,
    ) -> Result<T, OpenError> {
        Ok(self.begin(work).recv().map_err(|_| stopped())??)
    }

    /// Has the group do something. The answer comes where it is waited for.
    pub(super) fn begin<T: Send + 'static>(
        &self,
        work: impl FnOnce(Rc<MappedGroup>) -> LocalFuture<'static, Result<T, VolumeError>> + Send + 'static,
    ) -> mpsc::Receiver<Result<T, VolumeError>> {
        let (sender, receiver) = mpsc::sync_channel(1);
        let number = self.number;
        self.thread.spawn(move |_| {
            // Dropped, the sender says that there is no answer.
            let Some((environment, Content::Group(group))) = find(number) else { return };
            environment.spawn(Box::pin(async move {
                let done = work(group).await;
                let _ = sender.send(done);
            }));
        });
        receiver
    }
}

pub(super) fn stopped() -> DeviceError {
    DeviceError::Refused("the volume was closed, or the data plane has stopped".into())
}

fn find(number: u64) -> Option<(Rc<ReactorEnvironment>, Content)> {
    ENGINES.with_borrow(|engines| {
        let engine = engines.get(&number)?;
        Some((engine.environment.clone(), engine.content.clone()?))
    })
}

fn begin_here<T: Send + 'static>(
    number: u64,
    reactor: &Rc<Reactor>,
    log: &dyn BlockDevice,
    (store, secrets): (Arc<dyn SegmentStore + Send + Sync>, Secrets),
    begin: impl FnOnce(Parts) -> LocalFuture<'static, Begun<T>>,
    sender: mpsc::SyncSender<Result<T, OpenError>>,
) {
    // The receiver waits until it is answered.
    let answer = move |result| drop(sender.send(result));
    let disk = match DeviceLog::open(log, reactor) {
        Ok(disk) => Rc::new(disk),
        Err(error) => return answer(Err(error.into())),
    };
    let tasks = Tasks::start(reactor);
    let environment = Rc::new(ReactorEnvironment(Rc::downgrade(&tasks)));
    let beginning = begin(Parts { environment: environment.clone(), disk: disk.clone(), store: Rc::new(store), secrets });
    let engine = Engine { tasks, environment: environment.clone(), content: None, disk };
    ENGINES.with_borrow_mut(|engines| engines.insert(number, engine));
    environment.spawn(Box::pin(async move {
        match beginning.await {
            Ok((Some(content), begun)) => {
                ENGINES.with_borrow_mut(|engines| engines.get_mut(&number).map(|engine| engine.content = Some(content)));
                answer(Ok(begun));
            }
            Ok((None, begun)) => {
                close(number, None);
                answer(Ok(begun));
            }
            Err(error) => {
                close(number, None);
                answer(Err(error.into()));
            }
        }
    }));
}

/// Ends an engine when its last operation on the log has ended; then the log is let go of.
fn close(number: u64, log: Option<Arc<dyn BlockDevice>>) {
    let Some(engine) = ENGINES.with_borrow_mut(|engines| engines.remove(&number)) else { return };
    if let Some(Content::Group(group)) = &engine.content {
        group.close();
    }
    let environment = engine.environment.clone();
    environment.spawn(Box::pin(async move {
        engine.disk.idle().await;
        engine.tasks.end();
        drop(log);
    }));
}

/// Carries out a request, on the home thread, and gives what it found. Of an engine that has gone nothing is given.
pub(super) fn carry_out(number: u64, job: Job, give: impl FnOnce(Result<Found, Errno>) + 'static) {
    let Some((environment, content)) = find(number) else { return };
    let Job { slot, op, offset, len, bytes } = job;
    match content {
        Content::Group(group) => {
            let volume = group.at(slot);
            if op == (Op::Write { fua: false }) && bytes.len() <= part_max(&volume) {
                return volume.write_then(offset, bytes, move |done| give(done.map(|()| Found::Nothing)));
            }
            environment.spawn(Box::pin(async move { give(on_volume(&volume, op, offset, len, bytes).await) }));
        }
        Content::View(view) => environment.spawn(Box::pin(async move { give(on_view(&view, op, offset, len).await) })),
    }
}

/// Bytes of a write that go to the log together.
fn part_max(volume: &MappedVolume) -> usize {
    volume.write_max().min(WRITE_PART)
}

async fn on_volume(volume: &MappedVolume, op: Op, offset: u64, len: u64, bytes: Bytes) -> Result<Found, Errno> {
    match op {
        Op::Read => volume.read(offset, len).await.map(Found::Bytes),
        Op::Write { fua } => write(volume, offset, bytes, fua).await.map(|()| Found::Nothing),
        Op::Flush => volume.flush().await.map(|()| Found::Nothing),
        Op::Discard => volume.zero(offset, len, true).await.map(|()| Found::Nothing),
        Op::WriteZeroes { fua, .. } => match volume.zero(offset, len, false).await {
            Ok(()) if fua => volume.flush().await.map(|()| Found::Nothing),
            done => done.map(|()| Found::Nothing),
        },
        Op::BlockStatus => volume.extents(offset, len).await.map(Found::Extents),
    }
}

async fn on_view(view: &SnapshotView, op: Op, offset: u64, len: u64) -> Result<Found, Errno> {
    match op {
        Op::Read => view.read(offset, len).await.map(Found::Bytes).map_err(|_| Errno::EIO),
        Op::BlockStatus => view.extents(offset, len).await.map(Found::Extents).map_err(|_| Errno::EIO),
        Op::Flush => Ok(Found::Nothing),
        Op::Write { .. } | Op::Discard | Op::WriteZeroes { .. } => Err(Errno::EROFS),
    }
}

async fn write(volume: &MappedVolume, offset: u64, bytes: Bytes, fua: bool) -> Result<(), Errno> {
    let part_len = part_max(volume);
    for start in (0..bytes.len()).step_by(part_len) {
        let part = bytes.slice(start..bytes.len().min(start + part_len));
        volume.write(offset + start as u64, part).await?;
    }
    if fua { volume.flush().await } else { Ok(()) }
}
