//! An NBD load generator: one thread, one socket and one receive buffer per connection.
//!
//! ```text
//!   address ─► handshake ─► Connection { socket, size, structured }
//!                                │
//!   worker:  free slots ─► headers (+ payloads) ─► one sendmsg
//!            one recv into a large buffer ─► replies ─► free slots
//! ```
//!
//! Read data is parsed where it arrived and never copied again.

mod handshake;
mod replies;
mod worker;

use anyhow::Result;

pub use handshake::{Address, Connection};
pub use worker::NbdWorker;

use crate::load::{self, Report, Timing};
use crate::requests::{Requests, Workload, share};

pub(crate) mod wire {
    pub const NBDMAGIC: u64 = 0x4e42_444d_4147_4943;
    pub const IHAVEOPT: u64 = 0x4948_4156_454f_5054;
    pub const OPTION_REPLY_MAGIC: u64 = 0x0003_e889_0455_65a9;
    pub const REQUEST_MAGIC: u32 = 0x2560_9513;
    pub const SIMPLE_REPLY_MAGIC: u32 = 0x6744_6698;
    pub const STRUCTURED_REPLY_MAGIC: u32 = 0x668e_33ef;

    pub const FLAG_FIXED_NEWSTYLE: u16 = 1;
    pub const FLAG_NO_ZEROES: u16 = 2;

    pub const OPT_GO: u32 = 7;
    pub const OPT_STRUCTURED_REPLY: u32 = 8;

    pub const REP_ACK: u32 = 1;
    pub const REP_INFO: u32 = 3;
    pub const REP_ERROR: u32 = 1 << 31;
    pub const INFO_EXPORT: u16 = 0;

    pub const CMD_READ: u16 = 0;
    pub const CMD_WRITE: u16 = 1;
    pub const CMD_DISC: u16 = 2;

    pub const REPLY_FLAG_DONE: u16 = 1;
    pub const REPLY_NONE: u16 = 0;
    pub const REPLY_OFFSET_DATA: u16 = 1;
    pub const REPLY_OFFSET_HOLE: u16 = 2;
    pub const REPLY_ERROR: u16 = 1 << 15;

    pub const REQUEST_LEN: usize = 28;

    pub fn request(command: u16, cookie: u64, offset: u64, length: u32) -> [u8; REQUEST_LEN] {
        let mut bytes = [0; REQUEST_LEN];
        bytes[0..4].copy_from_slice(&REQUEST_MAGIC.to_be_bytes());
        bytes[6..8].copy_from_slice(&command.to_be_bytes());
        bytes[8..16].copy_from_slice(&cookie.to_be_bytes());
        bytes[16..24].copy_from_slice(&offset.to_be_bytes());
        bytes[24..28].copy_from_slice(&length.to_be_bytes());
        bytes
    }
}

/// What to connect to and what to ask of it.
#[derive(Clone, Debug)]
pub struct NbdLoad {
    pub address: Address,
    pub export: String,
    pub connections: usize,
    pub structured_replies: bool,
    pub workload: Workload,
    /// Bytes at the start of the export to use; `None` is all of it.
    pub span: Option<u64>,
}

impl NbdLoad {
    pub fn measure(&self, timing: Timing, server: Option<u32>) -> Result<Report> {
        let mut workers = self.workers(None)?;
        for (index, worker) in workers.iter_mut().enumerate() {
            worker.set_requests(Requests::endless(&self.workload, self.range(worker, index), index as u64 + 1));
        }
        load::measure(&mut workers, timing, server)
    }

    /// Writes a pattern over the whole span, runs the load while checking every read, and reads everything back.
    pub fn verify(&self, timing: Timing, seed: u64) -> Result<Report> {
        let mut workers = self.workers(Some(seed))?;
        self.pass(&mut workers, 100)?;
        for (index, worker) in workers.iter_mut().enumerate() {
            worker.set_requests(Requests::endless(&self.workload, self.range(worker, index), index as u64 + 1));
        }
        let report = load::measure(&mut workers, timing, None)?;
        self.pass(&mut workers, 0)?;
        Ok(report)
    }

    fn pass(&self, workers: &mut [NbdWorker], write_percent: u8) -> Result<()> {
        for (index, worker) in workers.iter_mut().enumerate() {
            worker.set_requests(Requests::once(&self.workload, self.range(worker, index), write_percent));
        }
        load::run_to_end(workers)
    }

    fn workers(&self, seed: Option<u64>) -> Result<Vec<NbdWorker>> {
        (0..self.connections)
            .map(|_| {
                let connection = Connection::open(&self.address, &self.export, self.structured_replies)?;
                NbdWorker::new(connection, &self.workload, seed)
            })
            .collect()
    }

    /// Each connection has its own part of the span.
    fn range(&self, worker: &NbdWorker, index: usize) -> std::ops::Range<u64> {
        let span = self.span.unwrap_or(u64::MAX).min(worker.size());
        share(span, self.workload.block_size, index, self.connections)
    }
}
