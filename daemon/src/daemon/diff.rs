//! What differs between two states of a volume: both are read, but for what neither holds.

use blockdev::ExtentKind;
use blockdev::client::Client;

use super::Daemon;
use super::jobs::Job;
use super::open::Lease;
use crate::api::types::{RangeInfo, SnapshotDiff};
use crate::error::{Error, ErrorKind, Result};
use crate::names::VolumeId;

/// Read at once from each side.
const STEP: u64 = 1 << 20;
/// What is compared and reported as a whole.
const GRAIN: usize = 4096;

impl Daemon {
    /// Compares `from` (`VOL@SNAP`) with `to` (`VOL@SNAP`, or `VOL` as it is now).
    pub fn diff(&self, from: &str, to: &str, job: &Job) -> Result<SnapshotDiff> {
        let from = self.resolve_snapshot(from)?;
        let to = if to.contains('@') { self.resolve_snapshot(to)? } else { self.resolve_text(to)? };
        let (left, right) = (self.side(&from)?, self.side(&to)?);
        let (short, long) = (left.size.min(right.size), left.size.max(right.size));
        let mut changed = Ranges::default();
        let mut offset = 0;
        while offset < short {
            job.check_cancelled()?;
            job.progress(offset, Some(short));
            let hole = left.hole(offset, short - offset)?.min(right.hole(offset, short - offset)?);
            if hole > 0 {
                offset += hole;
                continue;
            }
            let len = STEP.min(short - offset);
            let (old, new) = (left.read(offset, len)?, right.read(offset, len)?);
            for (index, (old, new)) in old.chunks(GRAIN).zip(new.chunks(GRAIN)).enumerate() {
                if old != new {
                    changed.add(offset + (index * GRAIN) as u64, old.len() as u64);
                }
            }
            offset += len;
        }
        if long > short {
            changed.add(short, long - short);
        }
        let changed_bytes = changed.0.iter().map(|range| range.length).sum();
        Ok(SnapshotDiff { from: from.to_string(), to: to.to_string(), changed: changed.0, changed_bytes })
    }

    fn side(&self, id: &VolumeId) -> Result<Side> {
        let lease = {
            let _held = self.hold([id]);
            self.lease(id, false)?
        };
        let reactor = self.plane.handles().first().ok_or_else(|| Error::internal("no data plane"))?;
        let client = Client::open(lease.volume(), reactor)?;
        Ok(Side { size: lease.volume().size(), client, lease })
    }
}

struct Side {
    size: u64,
    client: Client,
    lease: Lease,
}

impl Side {
    /// Bytes from `offset` on that hold nothing.
    fn hole(&self, offset: u64, len: u64) -> Result<u64> {
        let extents = self.client.extents(offset, len).map_err(|errno| self.failed("block status", offset, errno))?;
        let empty = extents.iter().take_while(|extent| extent.kind != ExtentKind::Data);
        Ok(empty.map(|extent| extent.len).sum::<u64>().min(len))
    }

    fn read(&self, offset: u64, len: u64) -> Result<Vec<u8>> {
        self.client.read(offset, len).map_err(|errno| self.failed("reading", offset, errno))
    }

    fn failed(&self, what: &str, offset: u64, errno: blockdev::Errno) -> Error {
        Error::new(ErrorKind::Backend, format!("{}: {what} at {offset}: {errno}", self.lease.id()))
    }
}

/// Ranges in order, neighbours joined.
#[derive(Default)]
struct Ranges(Vec<RangeInfo>);

impl Ranges {
    fn add(&mut self, offset: u64, length: u64) {
        match self.0.last_mut() {
            Some(last) if last.offset + last.length == offset => last.length += length,
            _ => self.0.push(RangeInfo { offset, length }),
        }
    }
}
