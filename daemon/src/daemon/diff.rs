//! What differs between two states of a volume: both are read, but for what neither holds, and what their pool knows to be the same.

use std::ops::Range;

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
    pub fn diff(&self, from: &str, to: &str, takes_over: bool, job: &Job) -> Result<SnapshotDiff> {
        let from = self.resolve_snapshot(from)?;
        let to = if to.contains('@') { self.resolve_snapshot(to)? } else { self.resolve_text(to)? };
        if takes_over {
            let _held = self.hold([&from, &to]);
            self.take_over(&from)?;
            self.take_over(&to)?;
        }
        let (left, right) = (self.side(&from)?, self.side(&to)?);
        let (short, long) = (left.size.min(right.size), left.size.max(right.size));
        let mut changed = Ranges::default();
        for range in self.candidates(&from, &to)?.unwrap_or_else(|| std::iter::once(0..short).collect()) {
            let mut offset = range.start;
            while offset < range.end.min(short) {
                job.check_cancelled()?;
                job.progress(offset, Some(short));
                offset += compare(&left, &right, offset, range.end.min(short) - offset, &mut changed)?;
            }
        }
        if long > short {
            changed.add(short, long - short);
        }
        let changed_bytes = changed.0.iter().map(|range| range.length).sum();
        Ok(SnapshotDiff { from: from.to_string(), to: to.to_string(), changed: changed.0, changed_bytes })
    }

    /// Where they may differ at all, if their pool can tell.
    fn candidates(&self, from: &VolumeId, to: &VolumeId) -> Result<Option<Vec<Range<u64>>>> {
        match &from.snapshot {
            Some(before) if from.volume() == to.volume() => {
                Ok(self.pools.get(&from.pool)?.changed(&from.name, before, to.snapshot.as_deref())?)
            }
            _ => Ok(None),
        }
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

/// Compares up to `len` bytes from `offset` on, and says how many it was.
fn compare(left: &Side, right: &Side, offset: u64, len: u64, changed: &mut Ranges) -> Result<u64> {
    let hole = left.hole(offset, len)?.min(right.hole(offset, len)?);
    if hole > 0 {
        return Ok(hole);
    }
    let len = STEP.min(len);
    let (old, new) = (left.read(offset, len)?, right.read(offset, len)?);
    for (index, (old, new)) in old.chunks(GRAIN).zip(new.chunks(GRAIN)).enumerate() {
        if old != new {
            changed.add(offset + (index * GRAIN) as u64, old.len() as u64);
        }
    }
    Ok(len)
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
