//! Reading a log back: every batch from a known place up to the first that is not whole.
//!
//! What follows the last whole batch is a tail that a crash tore off, and may be cut, unless some later batch proves that it had been
//! durable: then the log is damaged, and cutting would lose acknowledged data. After a sync, the next batch is that proof, or a batch without
//! records that follows when nothing else does; until one of them is written, damage cannot be told from a torn tail.

use std::cell::RefCell;

use crate::bytes_at::crc32c;
use crate::disk::LogDisk;
use crate::error::VolumeError;
use crate::log::cipher::LogCipher;
use crate::log::format::{BatchHeader, HEADER_LEN, LogId, RECORD_LEN, RECORDS_MAX, Tail};
use crate::log::{Failure, IN_FLIGHT_MAX, Ring, Superblock};

const SEARCH_LEN: usize = 1 << 20;
/// Read at once in the hope that the next batches are in it, and written at once.
const WINDOW_LEN: usize = 4 << 20;

/// The most bytes of a batch besides its payload.
const HEADERS_MAX: usize = HEADER_LEN + RECORDS_MAX * RECORD_LEN + 2 * 4096;

/// A whole batch.
#[derive(Debug)]
pub(crate) struct Found {
    pub(crate) header: BatchHeader,
    /// Where the next one begins.
    pub(crate) end: Tail,
}

/// All batches of a log from `from` on, of owners up to `epoch`; in an encrypted one, those that are genuine. The next batch is to be written at the last one's end, or at `from` if there
/// is none.
pub(crate) async fn recover(
    disk: &dyn LogDisk,
    log: &Superblock,
    cipher: Option<&LogCipher>,
    epoch: u64,
    from: Tail,
) -> Result<Vec<Found>, VolumeError> {
    let reader = Reader::new(disk, log.ring, log.log_id);
    let mut epochs = 0..=epoch;
    let mut found: Vec<Found> = Vec::new();
    let mut tail = from;
    loop {
        match reader.batch_at(tail, cipher).await? {
            Some(batch) if epochs.contains(&batch.header.epoch) => {
                if let Some(cipher) = cipher {
                    let BatchHeader { epoch, number, salt, .. } = batch.header;
                    cipher.keep(epoch, number, salt, cipher.opening(epoch, &salt));
                }
                epochs = batch.header.epoch..=epoch;
                tail = batch.end;
                found.push(batch);
            }
            _ => {
                reader.refuse_if_durable(tail.position).await?;
                return Ok(found);
            }
        }
    }
}

/// Takes away the header of a batch that a crash tore, if there is one where the next batch goes: whatever is torn of that might make it whole again.
/// Durable with the next sync.
pub(crate) async fn behead_torn(disk: &dyn LogDisk, log: &Superblock, tail: u64) -> Result<(), VolumeError> {
    for position in [tail, log.ring.next_lap(tail)] {
        behead(disk, log.ring, log.log_id, position).await?;
    }
    Ok(())
}

/// Takes away the header of the batch at a place, if there is one, so that no recovery finds it: true if there was one. Durable with the next sync.
pub(crate) async fn behead(disk: &dyn LogDisk, ring: Ring, log_id: LogId, position: u64) -> Result<bool, Failure> {
    let offset = ring.offset(position);
    let failed = |operation| move |errno| Failure::io(operation, offset, errno);
    let sector = disk.read(offset, ring.sector).await.map_err(failed("read"))?;
    let is_there = BatchHeader::may_begin(&sector, log_id, position);
    if is_there {
        disk.write(offset, vec![vec![0; ring.sector].into()]).await.map_err(failed("write"))?;
    }
    Ok(is_there)
}

/// Makes what was found durable. What no header says to be so is written once more: a process that died may have seen a sync fail, after which the system
/// takes for written what is not on the disk, and would sync it no more.
pub(crate) async fn make_durable(disk: &dyn LogDisk, ring: Ring, found: &[Found]) -> Result<(), VolumeError> {
    let durable = found.iter().map(|found| found.header.durable_upto).max().unwrap_or(0);
    let doubtful = found.iter().filter(|found| found.end.position > durable);
    let spans: Vec<(u64, usize)> =
        doubtful.map(|Found { header, .. }| (ring.offset(header.position), header.total_len(ring.sector))).collect();
    let mut len = 0;
    let in_one_go = |one: &(u64, usize), next: &(u64, usize)| {
        len = if len == 0 { one.1 } else { len } + next.1;
        let goes_on = one.0 + one.1 as u64 == next.0 && len <= WINDOW_LEN;
        len = if goes_on { len } else { 0 };
        goes_on
    };
    for span in spans.chunk_by(in_one_go) {
        let (offset, len) = (span[0].0, span.iter().map(|(_, len)| len).sum());
        let bytes = disk.read(offset, len).await.map_err(|errno| VolumeError::log_io("read", offset, errno))?;
        disk.write(offset, vec![bytes.into()]).await.map_err(|errno| VolumeError::log_io("write", offset, errno))?;
    }
    disk.sync().await.map_err(VolumeError::log_sync)
}

/// True if nothing was ever written to this log.
pub(crate) async fn is_unused(disk: &dyn LogDisk, log: &Superblock) -> Result<bool, VolumeError> {
    let reader = Reader::new(disk, log.ring, log.log_id);
    Ok(!reader.has_any().await?)
}

/// Fails if a disk without a superblock carries batches: it was somebody's log.
pub(crate) async fn refuse_if_beheaded(disk: &dyn LogDisk, ring: Ring) -> Result<(), VolumeError> {
    let reader = Reader::new(disk, ring, LogId::default());
    let mut next = reader.part_after(0).await?;
    while let Some((start, len)) = next {
        let bytes = reader.read(start, len).await?;
        if bytes.chunks_exact(ring.sector).any(|sector| BatchHeader::encoded_len_of(&sector[..HEADER_LEN]).is_some()) {
            return Err(VolumeError::NotALog);
        }
        next = reader.part_after(start + len as u64).await?;
    }
    Ok(())
}

struct Reader<'a> {
    disk: &'a dyn LogDisk,
    ring: Ring,
    log_id: LogId,
    /// What was read last: where it begins on the disk, and its bytes.
    window: RefCell<(u64, Vec<u8>)>,
}

impl<'a> Reader<'a> {
    fn new(disk: &'a dyn LogDisk, ring: Ring, log_id: LogId) -> Reader<'a> {
        Reader { disk, ring, log_id, window: RefCell::default() }
    }

    /// The batch that follows `tail`: right there, or at the start of the ring if it did not fit before its end.
    async fn batch_at(&self, tail: Tail, cipher: Option<&LogCipher>) -> Result<Option<Found>, VolumeError> {
        for position in [tail.position, self.ring.next_lap(tail.position)] {
            let Some((header, chain)) = self.header_at(position).await? else { continue };
            let expected = (self.log_id, position, tail.number, tail.chain);
            if (header.log_id, header.position, header.number, header.previous) != expected {
                continue;
            }
            if self.ring.left(position) < header.total_len(self.ring.sector) as u64 {
                continue;
            }
            if self.is_whole(&header, cipher).await? {
                let position = position + header.total_len(self.ring.sector) as u64;
                let end = Tail { position, number: tail.number + 1, chain };
                return Ok(Some(Found { header, end }));
            }
        }
        Ok(None)
    }

    async fn header_at(&self, position: u64) -> Result<Option<(BatchHeader, u64)>, VolumeError> {
        let sector = self.ring.sector;
        let first = self.read(position, sector).await?;
        let Some(len) = BatchHeader::encoded_len_of(&first[..HEADER_LEN]) else { return Ok(None) };
        let len = len.next_multiple_of(sector);
        if len <= sector {
            return Ok(BatchHeader::decode(&first));
        }
        if self.ring.left(position) < len as u64 {
            return Ok(None);
        }
        Ok(BatchHeader::decode(&self.read(position, len).await?))
    }

    /// Whether header and payloads are what was written.
    async fn is_whole(&self, header: &BatchHeader, cipher: Option<&LogCipher>) -> Result<bool, VolumeError> {
        let key = cipher.map(|cipher| cipher.opening(header.epoch, &header.salt));
        if key.as_ref().is_some_and(|key| !key.is_genuine(header)) {
            return Ok(false);
        }
        let len = header.payload_len().next_multiple_of(self.ring.sector);
        if len == 0 {
            return Ok(true);
        }
        let payload = self.read(header.position + header.payload_at(self.ring.sector) as u64, len).await?;
        let mut at = 0;
        Ok(header.payloads(self.ring.sector).all(|(_, place)| {
            let part = &payload[at..at + place.len];
            at += part.len();
            match &key {
                Some(key) => part.is_empty() || key.open_payload(&place.seal, part).is_some(),
                None => part.is_empty() || crc32c(part) == place.crc,
            }
        }))
    }

    /// Fails if any batch says that the one missing at `position` had been durable. Batches that are in flight together lie within reach of each
    /// other, so nothing follows where nothing is within reach.
    async fn refuse_if_durable(&self, position: u64) -> Result<(), VolumeError> {
        let reach = ((IN_FLIGHT_MAX + 2) * (self.ring.payload_max() + HEADERS_MAX)) as u64;
        let (mut at, mut until) = (position, position + reach);
        while at < until.min(position + self.ring.len) {
            let len = self.ring.left(at).min(SEARCH_LEN as u64);
            for header in self.headers_within(at % self.ring.len, len as usize).await? {
                if header.position > position && header.durable_upto > position {
                    return Err(VolumeError::LogDamaged { position, proof: header.position });
                }
                until = until.max(header.position + reach);
            }
            at += len;
        }
        Ok(())
    }

    /// True if any batch of this log is whole and in its place.
    async fn has_any(&self) -> Result<bool, VolumeError> {
        let mut next = self.part_after(0).await?;
        while let Some((start, len)) = next {
            if !self.headers_within(start, len).await?.is_empty() {
                return Ok(true);
            }
            next = self.part_after(start + len as u64).await?;
        }
        Ok(false)
    }

    /// The next part of the ring to search, from `start` on: what is a hole of the disk has no headers, as zeroes are none.
    async fn part_after(&self, start: u64) -> Result<Option<(u64, usize)>, VolumeError> {
        if start >= self.ring.len {
            return Ok(None);
        }
        let offset = self.ring.offset(start);
        let data = self.disk.next_data(offset).await.map_err(|errno| VolumeError::log_io("read", offset, errno))?;
        let sector = self.ring.sector as u64;
        let start = start + data.saturating_sub(offset) / sector * sector;
        let len = self.ring.len.saturating_sub(start).min(SEARCH_LEN as u64) as usize;
        Ok((len > 0).then_some((start, len)))
    }

    /// The headers of this log that are whole and in their places, in a part of the ring.
    async fn headers_within(&self, start: u64, len: usize) -> Result<Vec<BatchHeader>, VolumeError> {
        let sector = self.ring.sector;
        let bytes = self.read(start, len).await?;
        let mut headers = Vec::new();
        for (index, bytes) in bytes.chunks_exact(sector).enumerate() {
            let there = start + (index * sector) as u64;
            let Some(len) = BatchHeader::encoded_len_of(&bytes[..HEADER_LEN]) else { continue };
            let header = if len <= sector { BatchHeader::decode(bytes) } else { self.header_at(there).await? };
            let in_place = |header: &BatchHeader| header.log_id == self.log_id && header.position % self.ring.len == there;
            headers.extend(header.map(|(header, _)| header).filter(in_place));
        }
        Ok(headers)
    }

    async fn read(&self, position: u64, len: usize) -> Result<Vec<u8>, VolumeError> {
        let offset = self.ring.offset(position);
        if let Some(bytes) = self.in_window(offset, len) {
            return Ok(bytes);
        }
        let wanted = len.max(WINDOW_LEN).min(self.ring.left(position) as usize).max(len);
        let bytes = self.disk.read(offset, wanted).await.map_err(|errno| VolumeError::log_io("read", offset, errno))?;
        let found = bytes[..len].to_vec();
        self.window.replace((offset, bytes));
        Ok(found)
    }

    fn in_window(&self, offset: u64, len: usize) -> Option<Vec<u8>> {
        let (start, bytes) = &*self.window.borrow();
        let from = usize::try_from(offset.checked_sub(*start)?).ok()?;
        bytes.get(from..from.checked_add(len)?).map(<[u8]>::to_vec)
    }
}
