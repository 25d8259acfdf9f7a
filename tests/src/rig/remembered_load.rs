//! Load from the host that remembers of each sector what it may hold after the daemon's death: what was flushed last, and all that was written since.
//!
//! Several connections write to a part of their own each, one request at a time, and flush now and then. A sector is full of the number of its last write
//! and its own place, so that one that is torn, old, or somebody else's is told.

use super::daemon::Daemon;
use super::nbd::NbdClient;
use anyhow::{Context, Result, bail, ensure};
use std::io::{self, ErrorKind};
use std::path::Path;
use std::thread::{self, JoinHandle};
use std::time::Duration;

const SECTOR: usize = 512;
const CONNECTIONS: u64 = 8;
const SECTORS_MAX: u64 = 128;
/// Every such request is a flush.
const FLUSH_EVERY: u64 = 16;
const ANSWER_LIMIT: Duration = Duration::from_secs(60);
/// Fibonacci hashing: 2^64 divided by the golden ratio.
const SPREAD: u64 = 0x9e37_79b9_7f4a_7c15;

/// The numbers of writes that a sector may hold, that of the last flushed one first; 0 is nothing.
type MayHold = Vec<u64>;

#[derive(Debug)]
pub struct RememberedLoad {
    parts: Vec<Part>,
}

/// What one connection writes to.
#[derive(Debug)]
struct Part {
    first_sector: u64,
    sectors: Vec<MayHold>,
    /// Of the requests so far.
    count: u64,
}

/// Goes on until the daemon is killed.
#[derive(Debug)]
pub struct Underway {
    threads: Vec<JoinHandle<Result<Part>>>,
}

impl RememberedLoad {
    /// For bytes that nobody has written to yet.
    pub fn new(offset: u64, len: u64) -> Self {
        let sectors = len / SECTOR as u64 / CONNECTIONS;
        let part = |number| Part {
            first_sector: offset / SECTOR as u64 + number * sectors,
            sectors: vec![vec![0]; sectors as usize],
            count: 0,
        };
        Self { parts: (0..CONNECTIONS).map(part).collect() }
    }

    pub fn start(self, socket: &Path, export: &str) -> Result<Underway> {
        let begin = |part: Part| {
            let connection = NbdClient::connect(socket, export, ANSWER_LIMIT)?;
            Ok(thread::spawn(move || part.load(connection)))
        };
        Ok(Underway { threads: self.parts.into_iter().map(begin).collect::<Result<_>>()? })
    }

    /// Looks at all of it after the daemon's death. What is seen now must stay.
    pub fn check(&mut self, socket: &Path, export: &str) -> Result<()> {
        let mut connection = NbdClient::connect(socket, export, ANSWER_LIMIT)?;
        self.parts.iter_mut().try_for_each(|part| part.check(&mut connection))
    }

    /// Writes and flushes that were made so far.
    pub fn requests(&self) -> u64 {
        self.parts.iter().map(|part| part.count).sum()
    }
}

impl Underway {
    /// Kills the daemon, which must have served every connection until then: what was written and what was flushed.
    pub fn kill(self, daemon: &mut Daemon) -> Result<RememberedLoad> {
        daemon.check_alive()?;
        let has_ended = self.threads.iter().any(JoinHandle::is_finished);
        daemon.kill()?;
        let join = |thread: JoinHandle<_>| thread.join().ok().context("a thread of the load panicked")?;
        let parts = self.threads.into_iter().map(join).collect::<Result<_>>()?;
        ensure!(!has_ended, "a connection was closed before the daemon was killed");
        Ok(RememberedLoad { parts })
    }
}

/// Whether this is what a client sees of a server that dies.
fn is_closed(error: &anyhow::Error) -> bool {
    let closed = [ErrorKind::UnexpectedEof, ErrorKind::BrokenPipe, ErrorKind::ConnectionReset];
    error.downcast_ref::<io::Error>().is_some_and(|error| closed.contains(&error.kind()))
}

/// The content of a sector.
fn word(number: u64, sector: u64) -> u64 {
    if number == 0 { 0 } else { number << 32 | sector }
}

impl Part {
    fn load(mut self, mut connection: NbdClient) -> Result<Self> {
        loop {
            match self.request(&mut connection) {
                Ok(0) => {}
                Ok(error) => bail!("request {} was answered with error {error}", self.count),
                Err(error) if is_closed(&error) => return Ok(self),
                Err(error) => return Err(error.context(format!("request {}", self.count))),
            }
        }
    }

    /// Writes or flushes once; the error number.
    fn request(&mut self, connection: &mut NbdClient) -> Result<u32> {
        self.count += 1;
        if self.count.is_multiple_of(FLUSH_EVERY) {
            let error = connection.flush()?;
            if error == 0 {
                self.sectors.iter_mut().for_each(|numbers| drop(numbers.drain(..numbers.len() - 1)));
            }
            return Ok(error);
        }
        let random = (self.count ^ self.first_sector << 32).wrapping_mul(SPREAD);
        let count = random % SECTORS_MAX + 1;
        let first = (random >> 32) % (self.sectors.len() as u64 - count);
        let number = self.count;
        self.sectors[first as usize..(first + count) as usize].iter_mut().for_each(|numbers| numbers.push(number));
        let first = self.first_sector + first;
        let data: Vec<u8> =
            (first..first + count).flat_map(|sector| word(number, sector).to_le_bytes().repeat(SECTOR / 8)).collect();
        connection.write(first * SECTOR as u64, &data)
    }

    fn check(&mut self, connection: &mut NbdClient) -> Result<()> {
        let contents = connection.read(self.first_sector * SECTOR as u64, u32::try_from(self.sectors.len() * SECTOR)?)?;
        for ((sector, numbers), found) in (self.first_sector..).zip(&mut self.sectors).zip(contents.chunks(SECTOR)) {
            let is_found = |number: &u64| found == word(*number, sector).to_le_bytes().repeat(SECTOR / 8);
            let number = numbers.iter().copied().find(is_found);
            let number =
                number.with_context(|| format!("sector {sector} holds {:x?}, not whole writes of {numbers:?}", &found[..16]))?;
            *numbers = vec![number];
        }
        Ok(())
    }
}
