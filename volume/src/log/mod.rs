//! The local log: where a write is safe before it reaches the pool.
//!
//! ```text
//!   append ─▶ queue ─▶ batches, up to 8 in flight ─▶ disk
//!                          │ in log order
//!                          ▼
//!                      acknowledged ──sync──▶ durable ──the pool has it──▶ trimmed: the ring's space is free again
//! ```
//!
//! Invariants: records are acknowledged in the order they were appended; nothing is acknowledged after a write or a sync failed. A batch never wraps: one that does not fit before the end of the ring begins at its start.
//! A disk that is full has not failed: see `full`.

mod cipher;
mod format;
mod full;
mod recover;
mod superblock;

use std::cell::{Cell, RefCell};
use std::collections::VecDeque;
use std::rc::Rc;
use std::time::Duration;

use blockdev::Errno;
use bytes::Bytes;

pub(crate) use cipher::LogCipher;
pub(crate) use cipher::PayloadSeal;
use cipher::{LogSalt, OpeningKey};
pub(crate) use format::{BatchHeader, LogId, RecordKind, Tail};
use format::{PAYLOAD_MAX, RECORDS_MAX, Record};
pub use full::WhenFull;
use recover::behead;
pub(crate) use recover::{Found, behead_torn, is_unused, make_durable, recover, refuse_if_beheaded};
use superblock::SUPERBLOCK_LEN;
pub(crate) use superblock::{SUPERBLOCK_START, Superblock, id_in};

use crate::bytes_at::crc32c;
use crate::disk::LogDisk;
use crate::environment::Environment;
use crate::error::VolumeError;
use crate::signal::{Answer, Asked, Signal, answer};
use crate::troubles::Troubles;

const IN_FLIGHT_MAX: usize = 8;
const RING_MIN: u64 = 256 << 10;
const MARK_AFTER: Duration = Duration::from_millis(50);
const SECTOR_MIN: usize = 512;

/// How positions of the log lie on the disk.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Ring {
    len: u64,
    sector: usize,
}

impl Ring {
    /// The largest one that a disk has room for.
    pub(crate) fn of(disk: &dyn LogDisk) -> Result<Ring, VolumeError> {
        let sector = disk.sector_size();
        let len = disk.len().saturating_sub(SUPERBLOCK_LEN as u64) / sector as u64 * sector as u64;
        let ring = Ring { len, sector };
        ring.check(disk)?;
        Ok(ring)
    }

    /// Refuses a ring that the disk cannot carry.
    fn check(&self, disk: &dyn LogDisk) -> Result<(), VolumeError> {
        let fits = self.len >= RING_MIN
            && self.len.checked_add(SUPERBLOCK_LEN as u64).is_some_and(|end| end <= disk.len())
            && self.sector.is_power_of_two()
            && (SECTOR_MIN..=SUPERBLOCK_LEN).contains(&self.sector)
            && self.sector >= disk.sector_size()
            && self.len.is_multiple_of(self.sector as u64);
        if fits { Ok(()) } else { Err(VolumeError::LogDoesNotFit) }
    }

    /// The most bytes that one record may carry: a batch of them leaves room for several others.
    pub(crate) fn payload_max(&self) -> usize {
        PAYLOAD_MAX.min((self.len / 8) as usize)
    }

    pub(crate) fn sector(&self) -> usize {
        self.sector
    }

    /// On the disk.
    fn offset(&self, position: u64) -> u64 {
        SUPERBLOCK_LEN as u64 + position % self.len
    }

    /// Bytes from there to the end of the ring.
    fn left(&self, position: u64) -> u64 {
        self.len - position % self.len
    }

    /// The first position after `position` at which the ring begins anew.
    fn next_lap(&self, position: u64) -> u64 {
        (position / self.len + 1) * self.len
    }
}

/// Where the payload of a record lies. It is read and checked as a whole.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct PayloadPlace {
    /// In the log.
    pub(crate) position: u64,
    pub(crate) len: usize,
    pub(crate) crc: u32,
    /// Stands for the CRC if the log is encrypted.
    pub(crate) seal: PayloadSeal,
}

/// A record that is in the log.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(crate) struct Logged {
    pub(crate) kind: RecordKind,
    /// Bytes of the volume.
    pub(crate) offset: u64,
    pub(crate) len: u64,
    /// Of a write.
    pub(crate) payload: PayloadPlace,
    /// The payload itself, if it was written just now.
    pub(crate) bytes: Option<Bytes>,
}

struct Queued {
    record: Record,
    payload: Bytes,
    asked: Asked<Result<(), Errno>>,
}

struct InFlight {
    header: BatchHeader,
    end: Tail,
    asked: Vec<Asked<Result<(), Errno>>>,
    payloads: Vec<Bytes>,
    state: BatchState,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum BatchState {
    UnderWay,
    Written,
    /// There was no space for it.
    Refused,
}

/// Hears of the log's records in log order: when they are acknowledged, and before their writers do.
pub(crate) trait Follower {
    fn logged(&self, record: Logged);

    /// All records of a batch have been told; `end` is where it ends.
    fn batch_ended(&self, end: Tail);

    /// A batch waits for the log to be trimmed.
    fn no_room(&self) {}
}

/// Where a log stands when it is opened.
pub(crate) struct LogStart {
    pub(crate) log_id: LogId,
    pub(crate) ring: Ring,
    pub(crate) epoch: u64,
    /// What lies before is no longer needed.
    pub(crate) trimmed: u64,
    /// What lies before is whole, and durable.
    pub(crate) tail: Tail,
    pub(crate) cipher: Option<Rc<LogCipher>>,
    pub(crate) when_full: WhenFull,
    /// Hears of a disk that is full.
    pub(crate) troubles: Rc<Troubles>,
}

/// How this opening encrypts.
struct Encryption {
    cipher: Rc<LogCipher>,
    salt: LogSalt,
    key: Rc<OpeningKey>,
}

pub(crate) struct Log {
    disk: Rc<dyn LogDisk>,
    environment: Rc<dyn Environment>,
    ring: Ring,
    log_id: LogId,
    epoch: u64,
    encryption: RefCell<Option<Encryption>>,
    when_full: WhenFull,
    troubles: Rc<Troubles>,
    follower: Rc<dyn Follower>,
    queue: RefCell<VecDeque<Queued>>,
    in_flight: RefCell<VecDeque<InFlight>>,
    next: Cell<Tail>,
    acknowledged: Cell<Tail>,
    durable: Cell<u64>,
    trimmed: Cell<u64>,
    /// The end of the last batch that has no records and says that all before it is durable.
    marked: Cell<u64>,
    syncing: Cell<bool>,
    /// What is appended is refused: the disk has no space.
    refuses: Cell<bool>,
    /// What waits has to wait for the log to be trimmed.
    is_stuck: Cell<bool>,
    failed: Cell<Option<Failure>>,
    changed: Signal,
}

/// Why nothing is acknowledged any more.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Failure {
    /// Of the disk.
    Io { operation: &'static str, offset: Option<u64>, errno: Errno },
    /// Its owner does not go on.
    Ended(Errno),
}

impl Failure {
    fn io(operation: &'static str, offset: u64, errno: Errno) -> Failure {
        Failure::Io { operation, offset: Some(offset), errno }
    }

    fn sync(errno: Errno) -> Failure {
        Failure::Io { operation: "sync", offset: None, errno }
    }

    /// What those get who ask for anything. It is never that there is no space, which would not be for good.
    pub(crate) fn errno(self) -> Errno {
        match self {
            Failure::Io { errno, .. } if errno.is_no_space() => Errno::EIO,
            Failure::Io { errno, .. } | Failure::Ended(errno) => errno,
        }
    }
}

impl From<Failure> for VolumeError {
    fn from(failure: Failure) -> VolumeError {
        match failure {
            Failure::Io { operation, offset, errno } => VolumeError::LogIo { operation, offset, errno },
            Failure::Ended(_) => VolumeError::Closed,
        }
    }
}

impl Log {
    pub(crate) fn resume(
        disk: Rc<dyn LogDisk>,
        environment: Rc<dyn Environment>,
        start: LogStart,
        follower: Rc<dyn Follower>,
    ) -> Rc<Log> {
        let encryption = start.cipher.map(|cipher| encrypt_from(cipher, start.epoch, start.tail.number, &*environment));
        let log = Rc::new(Log {
            ring: start.ring,
            disk,
            environment: environment.clone(),
            log_id: start.log_id,
            epoch: start.epoch,
            encryption: RefCell::new(encryption),
            when_full: start.when_full,
            troubles: start.troubles,
            follower,
            queue: RefCell::default(),
            in_flight: RefCell::default(),
            next: Cell::new(start.tail),
            acknowledged: Cell::new(start.tail),
            durable: Cell::new(start.tail.position),
            trimmed: Cell::new(start.trimmed),
            marked: Cell::new(0),
            syncing: Cell::new(false),
            refuses: Cell::new(false),
            is_stuck: Cell::new(false),
            failed: Cell::new(None),
            changed: Signal::default(),
        });
        environment.spawn(Box::pin(log.clone().write_batches()));
        if start.when_full == WhenFull::Error {
            environment.spawn(Box::pin(log.clone().refuse_what_is_stuck()));
        }
        log
    }

    /// Appends a change; the answer comes when it is acknowledged, or when it never will be. A write's `payload` is as long as the change and
    /// at most [`Ring::payload_max`]; others have none.
    pub(crate) fn append(&self, kind: RecordKind, offset: u64, len: u64, payload: Bytes) -> Answer<Result<(), Errno>> {
        let (asked, answer) = answer();
        self.append_for(asked, kind, offset, len, payload);
        answer
    }

    /// The same for `asked`.
    pub(crate) fn append_for(&self, asked: Asked<Result<(), Errno>>, kind: RecordKind, offset: u64, len: u64, payload: Bytes) {
        if let Some(failure) = self.failed.get() {
            return asked.give(Err(failure.errno()));
        }
        if self.refuses.get() {
            return asked.give(Err(Errno::ENOSPC));
        }
        let crc = if payload.is_empty() || self.encryption.borrow().is_some() { 0 } else { crc32c(&payload) };
        let record = Record { kind, offset, len, crc, tag: Default::default() };
        self.queue.borrow_mut().push_back(Queued { record, payload, asked });
        self.changed.notify();
    }

    /// Makes every record acknowledged so far durable.
    pub(crate) async fn sync(self: &Rc<Self>) -> Result<(), Errno> {
        let wanted = self.acknowledged.get().position;
        let settled = || match self.failed.get() {
            Some(failure) => Some(Err(failure.errno())),
            None if self.durable.get() >= wanted => Some(Ok(())),
            None => {
                self.begin_sync();
                None
            }
        };
        self.changed.wait_for(settled).await
    }

    /// The most bytes of one write.
    pub(crate) fn payload_max(&self) -> usize {
        self.ring.payload_max()
    }

    /// What lies before `position` is no longer needed.
    pub(crate) fn trim(&self, position: u64) {
        self.trimmed.set(self.trimmed.get().max(position));
        self.changed.notify();
    }

    /// Bytes of the ring that are in use, and all of them.
    pub(crate) fn used(&self) -> (u64, u64) {
        (self.next.get().position - self.trimmed.get(), self.ring.len)
    }

    /// The share of the ring that is in use, 0 to 1.
    pub(crate) fn fill(&self) -> f64 {
        let (used, len) = self.used();
        used as f64 / len as f64
    }

    /// The bytes of a payload, or `None` if its place was given to newer ones meanwhile.
    pub(crate) async fn read(&self, place: PayloadPlace) -> Result<Option<Vec<u8>>, Errno> {
        let sector = self.ring.sector as u64;
        let offset = self.ring.offset(place.position);
        let start = offset / sector * sector;
        let end = (offset + place.len as u64).next_multiple_of(sector);
        let bytes = self.disk.read(start, (end - start) as usize).await?;
        if place.position < self.trimmed.get() {
            return Ok(None);
        }
        let at = (offset - start) as usize;
        let payload = &bytes[at..at + place.len];
        let whole = match &*self.encryption.borrow() {
            Some(Encryption { cipher, .. }) => {
                let key = cipher.kept(place.seal.epoch, place.seal.number);
                key.and_then(|key| key.open_payload(&place.seal, payload))
            }
            None => (crc32c(payload) == place.crc).then(|| payload.to_vec()),
        };
        whole.map(Some).ok_or(Errno::EIO)
    }

    /// Nothing is acknowledged from now on.
    pub(crate) fn fail(&self, errno: Errno) {
        self.fail_with(Failure::Ended(errno));
    }

    fn fail_with(&self, failure: Failure) {
        let errno = failure.errno();
        if self.failed.get().is_some() {
            return;
        }
        self.failed.set(Some(failure));
        let queued = std::mem::take(&mut *self.queue.borrow_mut());
        let in_flight = std::mem::take(&mut *self.in_flight.borrow_mut());
        let waiting = in_flight.into_iter().flat_map(|batch| batch.asked).chain(queued.into_iter().map(|queued| queued.asked));
        waiting.for_each(|asked| asked.give(Err(errno)));
        self.changed.notify();
    }

    pub(crate) fn failed(&self) -> Option<Failure> {
        self.failed.get()
    }

    async fn write_batches(self: Rc<Self>) {
        loop {
            let go_on = || match self.failed.get() {
                Some(_) => Some(None),
                None => self.next_batch().map(Some),
            };
            let Some(batch) = self.changed.wait_for(go_on).await else { return };
            self.environment.spawn(Box::pin(self.clone().write_batch(batch)));
        }
    }

    /// Forms a batch of what waits, if it may be written now.
    fn next_batch(&self) -> Option<ToWrite> {
        let mut queue = self.queue.borrow_mut();
        if queue.is_empty() || self.refuses.get() || self.in_flight.borrow().len() >= IN_FLIGHT_MAX {
            self.is_stuck.set(false);
            return None;
        }
        let count = batch_len(&queue, self.ring.payload_max());
        let next = self.next.get();
        let records = queue.iter().take(count).map(|queued| queued.record).collect();
        let header = self.header(next, self.durable.get(), records);
        let place = self.place_for(&header);
        if !self.is_stuck.replace(place.is_none()) && place.is_none() {
            self.changed.notify();
        }
        let place = place?;
        let queued: Vec<Queued> = queue.drain(..count).collect();
        Some(self.begin(BatchHeader { position: place, ..header }, queued))
    }

    /// Where a batch may be written: right behind the last one, or at the start of the ring if it does not fit before its end.
    fn place_for(&self, header: &BatchHeader) -> Option<u64> {
        let total = header.total_len(self.ring.sector) as u64;
        let fits = self.ring.left(header.position) >= total;
        let position = if fits { header.position } else { self.ring.next_lap(header.position) };
        if position + total > self.trimmed.get() + self.ring.len {
            self.follower.no_room();
            return None;
        }
        Some(position)
    }

    /// Of a batch that follows `after` directly.
    fn header(&self, after: Tail, durable_upto: u64, records: Vec<Record>) -> BatchHeader {
        BatchHeader {
            log_id: self.log_id,
            position: after.position,
            number: after.number,
            durable_upto,
            epoch: self.epoch,
            previous: after.chain,
            salt: self.encryption.borrow().as_ref().map_or([0; 32], |encryption| encryption.salt),
            tag: Default::default(),
            records,
        }
    }

    /// A batch that is under way from now on.
    fn begin(&self, mut header: BatchHeader, queued: Vec<Queued>) -> ToWrite {
        let (total, payload_at) = (header.total_len(self.ring.sector), header.payload_at(self.ring.sector));
        let mut parts = Vec::with_capacity(queued.len() + 2);
        parts.push(Bytes::new());
        let (mut asked, mut payloads) = (Vec::with_capacity(queued.len()), Vec::with_capacity(queued.len()));
        for (index, queued) in queued.into_iter().enumerate() {
            parts.push(self.as_written(&mut header, index, &queued.payload));
            asked.push(queued.asked);
            payloads.push(queued.payload);
        }
        if let Some(Encryption { key, .. }) = &*self.encryption.borrow() {
            header.tag = key.header_tag(&header);
        }
        let (mut encoded, chain) = header.encode();
        encoded.resize(payload_at, 0);
        parts[0] = encoded.into();
        let filled: usize = parts.iter().map(Bytes::len).sum();
        parts.push(vec![0; total - filled].into());
        let end = Tail { position: header.position + total as u64, number: header.number + 1, chain };
        self.next.set(end);
        let (offset, number) = (self.ring.offset(header.position), header.number);
        self.in_flight.borrow_mut().push_back(InFlight { header, end, asked, payloads, state: BatchState::UnderWay });
        ToWrite { number, offset, parts }
    }

    /// A payload as it stands on the disk; its record gets the tag.
    fn as_written(&self, header: &mut BatchHeader, index: usize, payload: &Bytes) -> Bytes {
        let encryption = self.encryption.borrow();
        let Some(Encryption { key, .. }) = encryption.as_ref().filter(|_| !payload.is_empty()) else {
            return payload.clone();
        };
        let mut sealed = payload.to_vec();
        header.records[index].tag = key.seal_payload(header.number, index, &mut sealed);
        sealed.into()
    }

    fn written(&self, number: u64) {
        self.set_state(number, BatchState::Written);
        while let Some(batch) = self.pop_written() {
            follow(&*self.follower, &batch.header, batch.end, self.ring.sector, &batch.payloads);
            self.acknowledged.set(batch.end);
            batch.asked.into_iter().for_each(|asked| asked.give(Ok(())));
        }
        self.changed.notify();
    }

    fn set_state(&self, number: u64, state: BatchState) {
        if let Some(batch) = self.in_flight.borrow_mut().iter_mut().find(|batch| batch.header.number == number) {
            batch.state = state;
        }
    }

    fn pop_written(&self) -> Option<InFlight> {
        let mut in_flight = self.in_flight.borrow_mut();
        let is_written = in_flight.front()?.state == BatchState::Written;
        is_written.then(|| in_flight.pop_front())?
    }

    /// Some time after a sync that nothing followed, leaves the proof of it that recovery looks for.
    async fn mark_durable(self: Rc<Self>, upto: Tail) {
        self.environment.sleep(MARK_AFTER).await;
        let idle = self.next.get() == upto && self.queue.borrow().is_empty() && self.failed.get().is_none();
        if !idle || self.refuses.get() {
            return;
        }
        let header = self.header(upto, upto.position, Vec::new());
        let Some(position) = self.place_for(&header) else { return };
        let mark = self.begin(BatchHeader { position, ..header }, Vec::new());
        self.marked.set(self.next.get().position);
        self.clone().write_batch(mark).await;
        self.begin_sync();
    }

    fn begin_sync(self: &Rc<Self>) {
        if self.syncing.replace(true) {
            return;
        }
        let log = self.clone();
        self.environment.spawn(Box::pin(async move {
            let upto = log.acknowledged.get();
            let synced = log.disk.sync().await;
            log.syncing.set(false);
            match synced {
                Ok(()) => {
                    log.durable.set(upto.position);
                    if log.next.get() == upto && log.marked.get() != upto.position {
                        log.environment.spawn(Box::pin(log.clone().mark_durable(upto)));
                    }
                }
                Err(errno) => log.fail_with(Failure::sync(errno)),
            }
            log.changed.notify();
        }));
    }
}

/// What to write of a batch, and where.
struct ToWrite {
    number: u64,
    offset: u64,
    parts: Vec<Bytes>,
}

/// How many of the first records that wait go into one batch: a marker goes alone.
fn batch_len(queue: &VecDeque<Queued>, payload_max: usize) -> usize {
    let is_marker = |queued: &Queued| queued.record.kind == RecordKind::Marker;
    let mut payload = 0;
    let fits = |queued: &&Queued| {
        payload += queued.payload.len();
        payload <= payload_max && !is_marker(queued)
    };
    queue.iter().take(RECORDS_MAX).take_while(fits).count().max(1)
}

/// Batches from `number` on are encrypted with a key of their own.
fn encrypt_from(cipher: Rc<LogCipher>, epoch: u64, number: u64, environment: &dyn Environment) -> Encryption {
    let mut salt = [0; 32];
    environment.random(&mut salt);
    let key = cipher.opening(epoch, &salt);
    cipher.keep(epoch, number, salt, key.clone());
    Encryption { cipher, salt, key }
}

/// Tells a batch to a follower. `payloads` are those of its records, or none.
pub(crate) fn follow(follower: &dyn Follower, header: &BatchHeader, end: Tail, sector: usize, payloads: &[Bytes]) {
    for (index, (record, payload)) in header.payloads(sector).enumerate() {
        let (kind, offset, len) = (record.kind, record.offset, record.len);
        follower.logged(Logged { kind, offset, len, payload, bytes: payloads.get(index).cloned() });
    }
    follower.batch_ended(end);
}

impl BatchHeader {
    /// Its records, and where the payload of each lies.
    fn payloads(&self, sector: usize) -> impl Iterator<Item = (&Record, PayloadPlace)> {
        let mut position = self.position + self.payload_at(sector) as u64;
        self.records.iter().zip(0..).map(move |(record, index)| {
            let seal = PayloadSeal { epoch: self.epoch, number: self.number, index, tag: record.tag };
            let place = PayloadPlace { position, len: record.payload_len(), crc: record.crc, seal };
            position += record.payload_len() as u64;
            (record, place)
        })
    }
}
