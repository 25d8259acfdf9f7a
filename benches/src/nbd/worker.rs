//! One connection's load: keeps `depth` requests in flight, sends and receives in batches.

use std::collections::VecDeque;
use std::io::IoSlice;
use std::os::fd::OwnedFd;

use anyhow::{Context, Result, bail, ensure};
use rustix::event::{PollFd, PollFlags, poll};
use rustix::io::Errno;
use rustix::net::{RecvFlags, SendAncillaryBuffer, SendFlags, recv, sendmsg};
use rustix::time::Timespec;

use super::handshake::Connection;
use super::replies::{HEADER_MAX, Parser, Position, Sink};
use super::wire::{self, CMD_DISC, CMD_READ, CMD_WRITE, REQUEST_LEN};
use crate::clock;
use crate::load::{Recorder, Worker};
use crate::pattern;
use crate::requests::{Requests, Workload};

/// Large enough for a batch of 4 KiB replies in one call, small enough to stay in the second-level cache.
const RECEIVE_BUFFER: usize = 256 << 10;
/// Pieces handed to one sendmsg.
const SEND_PIECES: usize = 128;
const REPLY_TIMEOUT: Timespec = Timespec { tv_sec: 30, tv_nsec: 0 };

pub struct NbdWorker {
    connection: Connection,
    requests: Option<Requests>,
    outgoing: Outgoing,
    incoming: Incoming,
    slots: Slots,
}

impl NbdWorker {
    /// With a seed, writes carry the pattern and reads are checked against it.
    pub fn new(connection: Connection, workload: &Workload, seed: Option<u64>) -> Result<Self> {
        let depth = usize::from(workload.depth);
        ensure!(depth > 0, "depth 0: nothing would ever be sent");
        ensure!(connection.size >= u64::from(workload.block_size), "the export is smaller than one block");
        let block_size = workload.block_size as usize;
        let mut payloads = vec![0; depth * block_size];
        pattern::fill(!0, 0, &mut payloads);
        Ok(Self {
            incoming: Incoming { parser: Parser::new(connection.structured), buffer: vec![0; RECEIVE_BUFFER], filled: 0 },
            outgoing: Outgoing {
                headers: vec![[0; REQUEST_LEN]; depth],
                payloads,
                block_size,
                pending: VecDeque::with_capacity(depth),
                sent: 0,
            },
            slots: Slots {
                slots: vec![Slot::default(); depth],
                free: (0..depth as u16).rev().collect(),
                finished: Vec::with_capacity(depth),
                block_size: workload.block_size,
                seed,
            },
            requests: None,
            connection,
        })
    }

    pub fn size(&self) -> u64 {
        self.connection.size
    }

    pub fn set_requests(&mut self, requests: Requests) {
        self.requests = Some(requests);
    }

    fn submit(&mut self, now_ns: u64) {
        let Some(requests) = &mut self.requests else {
            return;
        };
        while let Some(&slot) = self.slots.free.last() {
            let Some(request) = requests.next() else {
                return;
            };
            self.slots.free.pop();
            self.slots.slots[usize::from(slot)] =
                Slot { busy: true, write: request.write, offset: request.offset, received: 0, started_ns: now_ns };
            self.outgoing.push(slot, request.offset, request.write, self.slots.seed);
        }
    }

    /// Blocks until the socket can be read, or written if there is something to send.
    fn wait(&self) -> Result<()> {
        let mut interest = PollFlags::IN;
        if !self.outgoing.pending.is_empty() {
            interest |= PollFlags::OUT;
        }
        let mut descriptors = [PollFd::new(&self.connection.socket, interest)];
        match poll(&mut descriptors, Some(&REPLY_TIMEOUT)) {
            Ok(0) => bail!("no reply from the NBD server within {} s", REPLY_TIMEOUT.tv_sec),
            Ok(_) | Err(Errno::INTR) => Ok(()),
            Err(error) => Err(error).context("wait for the NBD server"),
        }
    }
}

impl Worker for NbdWorker {
    fn run(&mut self, recorder: &mut Recorder<'_>) -> Result<()> {
        let depth = self.slots.slots.len();
        let mut now_ns = clock::now_ns();
        loop {
            if recorder.observe(now_ns) {
                self.submit(now_ns);
            }
            if self.slots.free.len() == depth {
                return Ok(());
            }
            let all_sent = self.outgoing.flush(&self.connection.socket, &self.slots.slots)?;
            if !self.incoming.receive(&self.connection.socket, &mut self.slots, all_sent)? {
                self.wait()?;
            }
            now_ns = clock::now_ns();
            for slot in self.slots.finished.drain(..) {
                recorder.complete(now_ns - self.slots.slots[usize::from(slot)].started_ns);
                self.slots.free.push(slot);
            }
        }
    }
}

impl Drop for NbdWorker {
    fn drop(&mut self) {
        let goodbye = wire::request(CMD_DISC, 0, 0, 0);
        // The server may be gone already; closing the socket says the same.
        let _ = rustix::net::send(&self.connection.socket, &goodbye, SendFlags::DONTWAIT | SendFlags::NOSIGNAL);
    }
}

/// Requests encoded but not yet all accepted by the socket.
struct Outgoing {
    headers: Vec<[u8; REQUEST_LEN]>,
    payloads: Vec<u8>,
    block_size: usize,
    pending: VecDeque<u16>,
    /// Bytes of the first pending request that are already sent.
    sent: usize,
}

impl Outgoing {
    fn push(&mut self, slot: u16, offset: u64, write: bool, seed: Option<u64>) {
        let index = usize::from(slot);
        let command = if write { CMD_WRITE } else { CMD_READ };
        self.headers[index] = wire::request(command, slot.into(), offset, self.block_size as u32);
        if let (true, Some(seed)) = (write, seed) {
            pattern::fill(seed, offset, &mut self.payloads[index * self.block_size..][..self.block_size]);
        }
        self.pending.push_back(slot);
    }

    /// Sends as much as the socket takes. False: it is full.
    fn flush(&mut self, socket: &OwnedFd, slots: &[Slot]) -> Result<bool> {
        while !self.pending.is_empty() {
            let mut pieces = [IoSlice::new(&[]); SEND_PIECES];
            let mut count = 0;
            let mut skip = self.sent;
            for &slot in &self.pending {
                if count + 2 > SEND_PIECES {
                    break;
                }
                for piece in self.parts(slot, slots) {
                    let here = skip.min(piece.len());
                    skip -= here;
                    if here < piece.len() {
                        pieces[count] = IoSlice::new(&piece[here..]);
                        count += 1;
                    }
                }
            }
            let flags = SendFlags::DONTWAIT | SendFlags::NOSIGNAL;
            match sendmsg(socket, &pieces[..count], &mut SendAncillaryBuffer::default(), flags) {
                Ok(bytes) => self.advance(bytes, slots),
                Err(Errno::AGAIN) => return Ok(false),
                Err(Errno::INTR) => {}
                Err(error) => return Err(error).context("send to the NBD server"),
            }
        }
        Ok(true)
    }

    fn advance(&mut self, bytes: usize, slots: &[Slot]) {
        self.sent += bytes;
        while let Some(&slot) = self.pending.front() {
            let length: usize = self.parts(slot, slots).iter().map(|part| part.len()).sum();
            if self.sent < length {
                break;
            }
            self.sent -= length;
            self.pending.pop_front();
        }
    }

    fn parts(&self, slot: u16, slots: &[Slot]) -> [&[u8]; 2] {
        let index = usize::from(slot);
        let payload = if slots[index].write { &self.payloads[index * self.block_size..][..self.block_size] } else { &[] };
        [&self.headers[index], payload]
    }
}

struct Incoming {
    parser: Parser,
    buffer: Vec<u8>,
    filled: usize,
}

impl Incoming {
    /// Receives once and handles what came. Blocks only if `may_block`; false: nothing was there.
    fn receive(&mut self, socket: &OwnedFd, slots: &mut Slots, may_block: bool) -> Result<bool> {
        let flags = if may_block { RecvFlags::empty() } else { RecvFlags::DONTWAIT };
        match recv(socket, &mut self.buffer[self.filled..], flags) {
            Ok((0, _)) => bail!("the NBD server closed the connection"),
            Ok((bytes, _)) => self.filled += bytes,
            Err(Errno::AGAIN) if may_block => bail!("no reply from the NBD server within {} s", REPLY_TIMEOUT.tv_sec),
            Err(Errno::AGAIN) => return Ok(false),
            Err(Errno::INTR) => return Ok(true),
            Err(error) => return Err(error).context("receive from the NBD server"),
        }
        let used = self.parser.feed(&self.buffer[..self.filled], slots)?;
        self.buffer.copy_within(used..self.filled, 0);
        self.filled -= used;
        debug_assert!(self.filled < HEADER_MAX);
        Ok(true)
    }
}

#[derive(Clone, Copy, Default)]
struct Slot {
    busy: bool,
    write: bool,
    offset: u64,
    received: u32,
    started_ns: u64,
}

struct Slots {
    slots: Vec<Slot>,
    free: Vec<u16>,
    finished: Vec<u16>,
    block_size: u32,
    seed: Option<u64>,
}

impl Slots {
    fn busy(&self, cookie: u64) -> Result<&Slot> {
        match self.slots.get(cookie as usize).filter(|slot| slot.busy && cookie <= u64::from(u16::MAX)) {
            Some(slot) => Ok(slot),
            None => bail!("a reply to request {cookie}, which is not in flight"),
        }
    }

    fn receive_bytes(&mut self, cookie: u64, offset: u64, length: u64) -> Result<()> {
        let block_size = self.block_size;
        let slot = self.busy(cookie)?;
        let inside = offset >= slot.offset && offset.saturating_add(length) <= slot.offset + u64::from(block_size);
        ensure!(inside && !slot.write, "data at {offset}+{length} does not belong to request {cookie}");
        ensure!(u64::from(slot.received) + length <= block_size.into(), "too much data for request {cookie}");
        self.slots[cookie as usize].received += length as u32;
        Ok(())
    }
}

impl Sink for Slots {
    fn read_length(&self, cookie: u64) -> Result<Option<u32>> {
        self.busy(cookie).map(|slot| (!slot.write).then_some(self.block_size))
    }

    fn data(&mut self, cookie: u64, at: Position, bytes: &[u8]) -> Result<()> {
        let offset = match at {
            Position::InExport(offset) => offset,
            Position::InRequest(position) => self.busy(cookie)?.offset + position,
        };
        self.receive_bytes(cookie, offset, bytes.len() as u64)?;
        match self.seed.and_then(|seed| pattern::first_mismatch(seed, offset, bytes)) {
            None => Ok(()),
            Some(wrong) => bail!("byte {wrong} is not what was written there"),
        }
    }

    fn hole(&mut self, cookie: u64, offset: u64, length: u32) -> Result<()> {
        self.receive_bytes(cookie, offset, length.into())?;
        ensure!(self.seed.is_none(), "byte {offset} is not what was written there: the server says it is a hole");
        Ok(())
    }

    fn done(&mut self, cookie: u64) -> Result<()> {
        let slot = self.busy(cookie)?;
        let wanted = if slot.write { 0 } else { self.block_size };
        ensure!(slot.received == wanted, "request {cookie} ended after {} of {wanted} bytes", slot.received);
        self.slots[cookie as usize].busy = false;
        self.finished.push(cookie as u16);
        Ok(())
    }
}
