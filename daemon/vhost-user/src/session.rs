//! One front end, from its connection to its end: control messages only.
//!
//! ```text
//!   socket ─▶ Connection ─▶ Message ─▶ Session ─▶ rings · memory · logs ─▶ queues on the data plane
//!                                         └─ reply, acknowledgement, or the end
//! ```
//!
//! Invariants: before memory, features or logs change, and before the session ends, every ring is drained. The session never
//! waits for the front end: not for a reply to a notification, not for room in a socket.

use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use blockdev::client::Client;
use thiserror::Error;
use vhost::vhost_user::message::{BackendReq, VhostUserProtocolFeatures as Protocol};

use crate::config;
use crate::connection::{self, Connection, ConnectionError};
use crate::device_state::DeviceState;
use crate::dirty_log::DirtyLog;
use crate::export::Shared;
use crate::inflight::{InflightArea, LogError};
use crate::memory::{GuestMemory, MemoryError, REGIONS_MAX};
use crate::message::{self, ConfigAccess, Header, InflightSpec, Message, RingValue};
use crate::pinned::Pages;
use crate::queue::{QueueSetup, RunningQueue};
use crate::rings::{Kick, RingState, drain};

const NO_CHANNEL: u64 = 1 << 8;

/// Why a message was not obeyed.
#[derive(Error, Debug)]
pub enum Refusal {
    #[error("features {0:#x} were not offered")]
    Features(u64),
    #[error("ring {0} does not exist")]
    Ring(u32),
    #[error("a ring of {0} descriptors is not possible")]
    RingSize(u32),
    #[error("an index of {0} into a ring is not possible")]
    RingBase(u32),
    #[error("the ring's descriptor is not an eventfd")]
    NotAnEvent,
    #[error("the configuration space has only one byte that can be written")]
    ReadOnlyConfig,
    #[error("the write cache was not negotiated")]
    NoWriteCache,
    #[error("flush before the write cache is switched off: {0}")]
    Flush(String),
    #[error("request {0} is not supported")]
    Unsupported(u32),
    #[error("the device's state: {0}")]
    State(std::io::Error),
    #[error(transparent)]
    Memory(#[from] MemoryError),
    #[error(transparent)]
    Log(#[from] LogError),
}

/// Why a session ended.
#[derive(Error, Debug)]
pub enum SessionError {
    #[error(transparent)]
    Connection(#[from] ConnectionError),
    #[error("{0}")]
    Refused(#[from] Refusal),
    #[error("the front end truncated the memory it shares")]
    MemoryGone,
}

/// What a message is answered with.
enum Answer {
    /// An acknowledgement, if one was asked for.
    Done,
    Number(u64),
    Reply(Vec<u8>, Option<OwnedFd>),
}

pub struct Session {
    shared: Arc<Shared>,
    /// Woken when something happens that the session must see.
    wake: Arc<OwnedFd>,
    features: u64,
    protocol: u64,
    status: u64,
    memory: Arc<GuestMemory>,
    /// What of the memory is to be pinned.
    pages: Option<Arc<Pages>>,
    log: Option<Arc<DirtyLog>>,
    inflight: Option<Arc<InflightArea>>,
    rings: Vec<RingState>,
    backend: Option<OwnedFd>,
    /// The front end was asked to read the configuration space, since its rings run and since the last change.
    config_announced: bool,
    write_through: Arc<AtomicBool>,
    arriving_state: Option<OwnedFd>,
}

impl Session {
    pub fn new(shared: Arc<Shared>, wake: Arc<OwnedFd>) -> Session {
        Session {
            shared,
            wake,
            features: 0,
            protocol: 0,
            status: 0,
            memory: Arc::default(),
            pages: None,
            log: None,
            inflight: None,
            rings: Vec::new(),
            backend: None,
            config_announced: false,
            write_through: Arc::default(),
            arriving_state: None,
        }
    }

    /// Obeys one message and answers it. A refusal ends the session unless the front end can be told of it.
    pub fn serve(&mut self, connection: &Connection, header: Header, message: Message) -> Result<(), SessionError> {
        tracing::trace!("{}: {message:?}", self.shared.name);
        let acknowledges = header.needs_reply() && self.has(Protocol::REPLY_ACK);
        let (payload, fd) = match self.handle(message) {
            Ok(Answer::Reply(payload, fd)) => (payload, fd),
            Ok(Answer::Number(number)) => (number.to_ne_bytes().to_vec(), None),
            Ok(Answer::Done) if acknowledges => (0u64.to_ne_bytes().to_vec(), None),
            Ok(Answer::Done) => return Ok(()),
            Err(refusal) if acknowledges => {
                tracing::warn!("{}: request {} refused: {refusal}", self.shared.name, header.request);
                (1u64.to_ne_bytes().to_vec(), None)
            }
            Err(refusal) => return Err(refusal.into()),
        };
        connection.send(&message::reply(header.request, &payload), fd.as_ref().map(AsFd::as_fd))?;
        Ok(())
    }

    /// The front end truncated a file it shares.
    pub fn is_memory_gone(&self) -> bool {
        self.memory.is_broken()
            || self.inflight.as_ref().is_some_and(|area| area.is_broken())
            || self.log.as_ref().is_some_and(|log| log.is_broken())
    }

    /// The configuration space is another now.
    pub fn config_changed(&mut self) {
        self.config_announced = false;
        self.announce_config();
    }

    /// Tells the front end to read the configuration space, each time its rings have begun to run and after each change. It may
    /// remember a size from an earlier connection: QEMU reads the space once in its life, and again only when told. While no ring
    /// runs nothing is told: QEMU then forgets it, and before 7.2 does not survive it.
    pub fn announce_config(&mut self) {
        if self.queues_started() == 0 {
            self.config_announced = false;
            return;
        }
        let listens = self.has(Protocol::CONFIG) && self.has(Protocol::BACKEND_REQ);
        let Some(backend) = self.backend.as_ref().filter(|_| listens && !self.config_announced) else { return };
        let bytes = message::notification(BackendReq::CONFIG_CHANGE_MSG as u32);
        match connection::send(backend.as_fd(), &bytes, None) {
            Ok(()) => self.config_announced = true,
            Err(error) => tracing::warn!("{}: the front end was not told of the present size: {error}", self.shared.name),
        }
    }

    pub fn features(&self) -> u64 {
        self.features
    }

    pub fn queues_started(&self) -> usize {
        self.rings.iter().filter(|ring| ring.is_running()).count()
    }

    /// Stops every ring and waits for what is in flight.
    pub fn drain(&mut self) {
        drain(self.rings.iter_mut());
    }

    fn has(&self, feature: Protocol) -> bool {
        self.protocol & feature.bits() != 0
    }

    fn handle(&mut self, message: Message) -> Result<Answer, Refusal> {
        match message {
            Message::GetFeatures => return Ok(Answer::Number(self.shared.features())),
            Message::SetFeatures(features) => self.set_features(features)?,
            Message::GetProtocolFeatures => return Ok(Answer::Number(config::protocol_features())),
            Message::SetProtocolFeatures(features) => {
                if features & !config::protocol_features() != 0 {
                    return Err(Refusal::Features(features));
                }
                self.protocol = features;
            }
            Message::SetOwner | Message::SetLogFd => {}
            Message::ResetOwner => self.stop_rings(),
            Message::ResetDevice => self.reset(),
            Message::GetQueueNum => return Ok(Answer::Number(u64::from(self.shared.options.queues_max))),
            Message::SetBackendChannel(channel) => {
                self.backend = Some(channel);
                self.config_announced = false;
            }
            Message::GetStatus => return Ok(Answer::Number(self.status)),
            Message::SetStatus(status) => {
                self.status = status;
                if status == 0 {
                    self.stop_rings();
                }
            }
            Message::GetConfig(access) => return Ok(self.read_config(&access)),
            Message::SetConfig(access) => self.write_config(&access)?,
            Message::SetDeviceState { load, channel } => return self.transfer_state(load, channel),
            Message::CheckDeviceState => return self.check_state(),
            Message::Unsupported(request) => return Err(Refusal::Unsupported(request)),
            message => return self.handle_memory(message),
        }
        Ok(Answer::Done)
    }

    fn handle_memory(&mut self, message: Message) -> Result<Answer, Refusal> {
        match message {
            Message::GetMaxMemSlots => return Ok(Answer::Number(REGIONS_MAX as u64)),
            Message::SetMemTable(table) => {
                let memory = GuestMemory::from_table(table, &self.wake)?;
                self.set_memory(memory);
            }
            Message::AddMemRegion(spec, file) => {
                let memory = self.memory.with_region(spec, file, &self.wake)?;
                self.set_memory(memory);
            }
            Message::RemoveMemRegion(spec) => {
                let memory = self.memory.without_region(spec)?;
                self.set_memory(memory);
            }
            Message::SetLogBase(area, file) => {
                let log = Arc::new(DirtyLog::new(area, file, &self.wake)?);
                self.with_rings_drained(|session| session.log = Some(log));
                return Ok(Answer::Number(0));
            }
            Message::GetInflight(spec) => return self.create_inflight(spec),
            Message::SetInflight(spec, file) => self.set_inflight(spec, file)?,
            message => return self.handle_ring(message),
        }
        Ok(Answer::Done)
    }

    fn set_memory(&mut self, memory: GuestMemory) {
        let memory = Arc::new(memory);
        let pages = if self.shared.options.pin_memory { Pages::prepare(&self.shared.name, &memory) } else { None };
        self.with_rings_drained(|session| (session.memory, session.pages) = (memory, pages));
    }

    fn handle_ring(&mut self, message: Message) -> Result<Answer, Refusal> {
        match message {
            Message::SetRingSize(RingValue { ring, value }) => {
                if !value.is_power_of_two() || value > crate::ring::RING_SIZE_MAX {
                    return Err(Refusal::RingSize(value));
                }
                self.change_ring(ring, |state| state.size = Some(value))?;
            }
            Message::SetRingAddresses(ring, addresses) => {
                self.change_ring(ring, |state| state.addresses = Some(addresses))?;
            }
            Message::SetRingBase(RingValue { ring, value }) => {
                let base = u16::try_from(value).map_err(|_| Refusal::RingBase(value))?;
                self.change_ring(ring, |state| state.base = base)?;
            }
            Message::SetRingKick(ring, event) => {
                let kick = event_fd(event)?.map_or(Kick::Polled, Kick::Event);
                self.change_ring(ring, |state| state.kick = Some(kick))?;
            }
            Message::SetRingEnabled(RingValue { ring, value }) => self.enable_ring(ring, value != 0)?,
            Message::SetRingCall(ring, event) => {
                let event = event_fd(event)?;
                self.ring(ring)?.set_call(event);
            }
            Message::SetRingError(ring, event) => {
                let event = event_fd(event)?;
                self.ring(ring)?.set_error(event);
            }
            Message::GetRingBase(ring) => return Ok(self.stop_ring(ring)),
            _ => {}
        }
        Ok(Answer::Done)
    }

    fn set_features(&mut self, features: u64) -> Result<(), Refusal> {
        if features & !self.shared.features() != 0 {
            return Err(Refusal::Features(features));
        }
        if features != self.features {
            self.with_rings_drained(|session| session.features = features);
        }
        Ok(())
    }

    /// The ring `index`, made when first spoken of.
    fn ring(&mut self, index: u32) -> Result<&mut RingState, Refusal> {
        if index >= u32::from(self.shared.options.queues_max) {
            return Err(Refusal::Ring(index));
        }
        let index = index as usize;
        if self.rings.len() <= index {
            self.rings.resize_with(index + 1, RingState::default);
        }
        Ok(&mut self.rings[index])
    }

    /// Changes a ring that is drained, and starts it if it can run. What broke it counts no longer.
    fn change_ring(&mut self, index: u32, change: impl FnOnce(&mut RingState)) -> Result<(), Refusal> {
        let ring = self.ring(index)?;
        drain(std::iter::once(&mut *ring));
        ring.broken = false;
        change(ring);
        self.start_ring(index as usize);
        Ok(())
    }

    fn enable_ring(&mut self, index: u32, enabled: bool) -> Result<(), Refusal> {
        let ring = self.ring(index)?;
        ring.enabled = enabled;
        if enabled {
            self.start_ring(index as usize);
        } else {
            drain(std::iter::once(ring));
        }
        Ok(())
    }

    /// Answers with the index at which the ring would go on; 0 for one that does not exist, so that nobody waits for ever.
    fn stop_ring(&mut self, index: u32) -> Answer {
        let base = match self.ring(index) {
            Ok(ring) => {
                drain(std::iter::once(&mut *ring));
                (ring.kick, ring.broken) = (None, false);
                u32::from(ring.base)
            }
            Err(_) => 0,
        };
        Answer::Reply([index.to_ne_bytes(), base.to_ne_bytes()].concat(), None)
    }

    fn stop_rings(&mut self) {
        self.drain();
        for ring in &mut self.rings {
            ring.kick = None;
        }
    }

    /// Back to the state of a device that was just plugged in; its memory stays.
    fn reset(&mut self) {
        self.drain();
        self.rings.clear();
        (self.features, self.status) = (0, 0);
        self.set_write_through(false);
        self.inflight = None;
    }

    fn with_rings_drained(&mut self, change: impl FnOnce(&mut Session)) {
        self.drain();
        change(self);
        for index in 0..self.rings.len() {
            self.start_ring(index);
        }
    }

    fn start_ring(&mut self, index: usize) {
        let always_enabled = self.features & config::FEATURE_PROTOCOL == 0;
        let ring = &self.rings[index];
        if self.memory.is_empty() || ring.is_running() || !ring.should_run(always_enabled) {
            return;
        }
        let (reactor, stats) = self.shared.thread_for(index);
        let (Some(size), Some(addresses)) = (ring.size, ring.addresses) else { return };
        let mut setup = QueueSetup {
            name: self.shared.name.clone(),
            index,
            volume: self.shared.volume.clone(),
            memory: self.memory.clone(),
            pages: self.pages.clone(),
            size,
            addresses,
            base: 0,
            features: self.features,
            kick: None,
            call: None,
            error: None,
            log: self.log.clone().filter(|_| self.features & config::FEATURE_LOG_ALL != 0),
            inflight: self.inflight.clone(),
            write_through: self.write_through.clone(),
            read_only: self.shared.is_read_only(),
            serial: self.shared.serial(),
            stats,
        };
        let started = self.rings[index].start(|ring| {
            ring.describe(&mut setup);
            RunningQueue::start(reactor, setup)
        });
        if let Err(error) = started {
            tracing::warn!("{} queue {index}: cannot start: {error}", self.shared.name);
        }
    }

    fn create_inflight(&self, spec: InflightSpec) -> Result<Answer, Refusal> {
        let queues = spec.queues.min(self.shared.options.queues_max);
        let (spec, file) = InflightArea::create(queues, spec.queue_size)?;
        Ok(Answer::Reply(message::inflight_payload(spec), Some(file)))
    }

    fn set_inflight(&mut self, spec: InflightSpec, file: OwnedFd) -> Result<(), Refusal> {
        let area = Arc::new(InflightArea::open(spec, file, &self.wake)?);
        match area.write_through() {
            Some(write_through) => self.write_through.store(write_through, Ordering::Relaxed),
            None => area.set_write_through(self.write_through.load(Ordering::Relaxed)),
        }
        self.with_rings_drained(|session| session.inflight = Some(area));
        Ok(())
    }

    fn set_write_through(&mut self, write_through: bool) {
        self.write_through.store(write_through, Ordering::Relaxed);
        if let Some(area) = &self.inflight {
            area.set_write_through(write_through);
        }
    }

    fn config_space(&self) -> impl AsRef<[u8]> {
        let write_back = !self.write_through.load(Ordering::Relaxed);
        config::space(&self.shared.volume, self.shared.options.queues_max, write_back)
    }

    fn read_config(&self, access: &ConfigAccess) -> Answer {
        let bytes = config::read(self.config_space().as_ref(), access.offset, access.bytes.len());
        Answer::Reply(message::config_payload(access, &bytes.unwrap_or_default()), None)
    }

    fn write_config(&mut self, access: &ConfigAccess) -> Result<(), Refusal> {
        let migrating = access.flags != 0;
        let written = config::written_cache(self.config_space().as_ref(), access.offset, &access.bytes, migrating);
        let Some(write_back) = written.ok_or(Refusal::ReadOnlyConfig)? else { return Ok(()) };
        if self.features & config::FEATURE_WRITE_CACHE == 0 && !migrating {
            return Err(Refusal::NoWriteCache);
        }
        if write_back {
            self.set_write_through(false);
            return Ok(());
        }
        self.with_rings_drained(|session| session.set_write_through(true));
        self.flush()
    }

    /// A driver that has switched the cache off flushes no more: what was written before must become durable now, after the last
    /// write that was taken as one into the cache has ended.
    fn flush(&self) -> Result<(), Refusal> {
        let (reactor, _) = self.shared.thread_for(0);
        let client = Client::open(&self.shared.volume, reactor).map_err(|error| Refusal::Flush(error.to_string()))?;
        client.flush().map_err(|errno| Refusal::Flush(errno.to_string()))
    }

    fn transfer_state(&mut self, load: bool, channel: OwnedFd) -> Result<Answer, Refusal> {
        if load {
            self.arriving_state = Some(channel);
        } else {
            let state = DeviceState { write_through: self.write_through.load(Ordering::Relaxed) };
            state.save(channel).map_err(Refusal::State)?;
            self.arriving_state = None;
        }
        Ok(Answer::Number(NO_CHANNEL))
    }

    fn check_state(&mut self) -> Result<Answer, Refusal> {
        if let Some(channel) = self.arriving_state.take() {
            match DeviceState::load(channel) {
                Ok(state) => self.set_write_through(state.write_through),
                Err(error) => {
                    tracing::warn!("{}: the state that arrived is not used: {error}", self.shared.name);
                    return Ok(Answer::Number(1));
                }
            }
        }
        Ok(Answer::Number(0))
    }
}

/// Takes only what an eventfd can be: waiting on a file or a device could never end, or never begin. It is made not to block, so
/// that a signal does not occupy a kernel worker.
fn event_fd(event: Option<OwnedFd>) -> Result<Option<Arc<OwnedFd>>, Refusal> {
    let Some(event) = event else { return Ok(None) };
    let stat = rustix::fs::fstat(&event).map_err(|_| Refusal::NotAnEvent)?;
    if stat.st_mode & libc::S_IFMT != 0 {
        return Err(Refusal::NotAnEvent);
    }
    let _ = rustix::io::ioctl_fionbio(&event, true);
    Ok(Some(Arc::new(event)))
}

impl Drop for Session {
    /// Queues must not outlive what they stand on.
    fn drop(&mut self) {
        self.drain();
    }
}
