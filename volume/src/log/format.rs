//! What a batch of the log looks like on disk. All numbers are little-endian.
//!
//! ```text
//!   0  magic "NVLOGBAT"                 72  number of records    u32
//!   8  CRC32C of 12..end of records     76  bytes of payload     u32
//!  12  zero                             80  previous batch's chain value  u64
//!  16  log id               16 bytes    88  zero                 8 bytes
//!  32  position             u64         96  salt of the opening  32 bytes
//!  40  number               u64        128  tag of header and records  16 bytes
//!  48  durable up to        u64        144  records, 48 bytes each
//!  56  zero                 8 bytes         zeroes up to a sector
//!  64  epoch                u64             payload of all records, zeroes up to a sector
//!
//!  record:  0  kind u8 · zero 3 · CRC32C of its payload u32     8  offset u64     16  length u64     24  zero 8     32  tag 16 bytes
//! ```
//!
//! A batch without records says only what is durable. The chain value of a batch is the CRC-64/NVME of its header and records, so each batch vouches for all before it.
//! Salt and tags are zeroes in a log that is not encrypted; in one that is, tags stand for the CRCs of payloads: see [`super::cipher`].

use crate::bytes_at::{array_at, crc32c, crc64, u32_at, u64_at};
use crate::crypto::TAG_LEN;
use crate::log::cipher::LogSalt;

pub(crate) const HEADER_LEN: usize = 144;
pub(crate) const RECORD_LEN: usize = 48;
/// The most records of a batch.
pub(crate) const RECORDS_MAX: usize = 512;
/// The most bytes of payload of a batch.
pub(crate) const PAYLOAD_MAX: usize = 4 << 20;
const MAGIC: [u8; 8] = *b"NVLOGBAT";
const SALT_AT: usize = 96;
const TAG_AT: usize = 128;

pub(crate) type LogId = [u8; 16];

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum RecordKind {
    Write = 1,
    Zero = 2,
    Discard = 3,
    /// The volume as it is after the records before is a snapshot; the payload says which. Alone in its batch.
    Marker = 4,
}

impl RecordKind {
    fn has_payload(self) -> bool {
        matches!(self, RecordKind::Write | RecordKind::Marker)
    }
}

/// One change. Offsets and lengths are bytes of the volume; a payload is as long as its record.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Record {
    pub(crate) kind: RecordKind,
    pub(crate) offset: u64,
    pub(crate) len: u64,
    /// Of the payload; 0 where there is none, or it has a tag.
    pub(crate) crc: u32,
    /// Of the payload, if the log is encrypted; otherwise zeroes.
    pub(crate) tag: [u8; TAG_LEN],
}

impl Record {
    pub(crate) fn payload_len(&self) -> usize {
        if self.kind.has_payload() { self.len as usize } else { 0 }
    }
}

/// A place in the log between two batches.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub(crate) struct Tail {
    /// Bytes since the log began; grows for ever.
    pub(crate) position: u64,
    /// Of the next batch.
    pub(crate) number: u64,
    /// Of the batch before.
    pub(crate) chain: u64,
}

#[derive(Clone, PartialEq, Eq, Debug)]
pub(crate) struct BatchHeader {
    pub(crate) log_id: LogId,
    pub(crate) position: u64,
    pub(crate) number: u64,
    /// Everything before this position was durable when the batch was formed.
    pub(crate) durable_upto: u64,
    pub(crate) epoch: u64,
    /// Chain value of the batch before.
    pub(crate) previous: u64,
    /// Of the opening that wrote it, if the log is encrypted; otherwise zeroes.
    pub(crate) salt: LogSalt,
    /// Of everything else here, if the log is encrypted; otherwise zeroes.
    pub(crate) tag: [u8; TAG_LEN],
    pub(crate) records: Vec<Record>,
}

impl BatchHeader {
    pub(crate) fn payload_len(&self) -> usize {
        self.records.iter().map(Record::payload_len).sum()
    }

    pub(crate) fn encoded_len(&self) -> usize {
        HEADER_LEN + self.records.len() * RECORD_LEN
    }

    /// Header, records and payload, each part up to a sector.
    pub(crate) fn total_len(&self, sector: usize) -> usize {
        self.encoded_len().next_multiple_of(sector) + self.payload_len().next_multiple_of(sector)
    }

    /// Where the payload begins, from the start of the batch.
    pub(crate) fn payload_at(&self, sector: usize) -> usize {
        self.encoded_len().next_multiple_of(sector)
    }

    /// The bytes of header and records, and the chain value they give.
    pub(crate) fn encode(&self) -> (Vec<u8>, u64) {
        let mut bytes = self.lay_out();
        bytes[TAG_AT..HEADER_LEN].copy_from_slice(&self.tag);
        let crc = crc32c(&bytes[12..]);
        bytes[8..12].copy_from_slice(&crc.to_le_bytes());
        let chain = crc64(&bytes);
        (bytes, chain)
    }

    /// What the tag covers: header and records with zeroes for tag and CRC.
    pub(crate) fn lay_out(&self) -> Vec<u8> {
        let mut bytes = vec![0; self.encoded_len()];
        bytes[..8].copy_from_slice(&MAGIC);
        bytes[16..32].copy_from_slice(&self.log_id);
        for (at, value) in
            [(32, self.position), (40, self.number), (48, self.durable_upto), (64, self.epoch), (80, self.previous)]
        {
            bytes[at..at + 8].copy_from_slice(&value.to_le_bytes());
        }
        bytes[72..76].copy_from_slice(&(self.records.len() as u32).to_le_bytes());
        bytes[76..80].copy_from_slice(&(self.payload_len() as u32).to_le_bytes());
        bytes[SALT_AT..TAG_AT].copy_from_slice(&self.salt);
        for (record, bytes) in self.records.iter().zip(bytes[HEADER_LEN..].chunks_exact_mut(RECORD_LEN)) {
            bytes[0] = record.kind as u8;
            bytes[4..8].copy_from_slice(&record.crc.to_le_bytes());
            bytes[8..16].copy_from_slice(&record.offset.to_le_bytes());
            bytes[16..24].copy_from_slice(&record.len.to_le_bytes());
            bytes[32..].copy_from_slice(&record.tag);
        }
        bytes
    }

    /// How many bytes [`BatchHeader::decode`] needs, told by the first [`HEADER_LEN`]. `None`: this is no batch.
    pub(crate) fn encoded_len_of(start: &[u8]) -> Option<usize> {
        if start[..8] != MAGIC {
            return None;
        }
        let records = u32_at(start, 72) as usize;
        (records <= RECORDS_MAX).then_some(HEADER_LEN + records * RECORD_LEN)
    }

    /// Whether some bytes, damaged or not, look like the start of the batch of a log that has its place at `position`.
    pub(crate) fn may_begin(start: &[u8], log_id: LogId, position: u64) -> bool {
        start[..8] == MAGIC && array_at(start, 16) == log_id && u64_at(start, 32) == position
    }

    /// The header and its chain value. `None`: damaged, or no batch at all.
    pub(crate) fn decode(bytes: &[u8]) -> Option<(BatchHeader, u64)> {
        let len = Self::encoded_len_of(bytes)?;
        let bytes = bytes.get(..len)?;
        if crc32c(&bytes[12..]) != u32_at(bytes, 8) {
            return None;
        }
        let records = bytes[HEADER_LEN..].chunks_exact(RECORD_LEN).map(decode_record).collect::<Option<Vec<Record>>>()?;
        let header = BatchHeader {
            log_id: array_at(bytes, 16),
            position: u64_at(bytes, 32),
            number: u64_at(bytes, 40),
            durable_upto: u64_at(bytes, 48),
            epoch: u64_at(bytes, 64),
            previous: u64_at(bytes, 80),
            salt: array_at(bytes, SALT_AT),
            tag: array_at(bytes, TAG_AT),
            records,
        };
        let payload = u32_at(bytes, 76) as usize;
        let sum = header.records.iter().try_fold(0_u64, |sum, record| sum.checked_add(record.payload_len() as u64))?;
        (payload <= PAYLOAD_MAX && sum == payload as u64).then(|| (header, crc64(bytes)))
    }
}

fn decode_record(bytes: &[u8]) -> Option<Record> {
    let kind = match bytes[0] {
        1 => RecordKind::Write,
        2 => RecordKind::Zero,
        3 => RecordKind::Discard,
        4 => RecordKind::Marker,
        _ => return None,
    };
    let (offset, len) = (u64_at(bytes, 8), u64_at(bytes, 16));
    offset.checked_add(len)?;
    Some(Record { kind, offset, len, crc: u32_at(bytes, 4), tag: array_at(bytes, 32) })
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn header(records: Vec<Record>) -> BatchHeader {
        BatchHeader {
            log_id: [7; 16],
            position: 4096,
            number: 3,
            durable_upto: 512,
            epoch: 9,
            previous: 77,
            salt: [4; 32],
            tag: [5; 16],
            records,
        }
    }

    #[test]
    fn headers_come_back_and_any_flipped_bit_is_noticed() {
        let records = vec![
            Record { kind: RecordKind::Write, offset: 8192, len: 4096, crc: 5, tag: [6; 16] },
            Record { kind: RecordKind::Discard, offset: 0, len: 1 << 40, crc: 0, tag: [0; 16] },
        ];
        let header = header(records);
        let (bytes, chain) = header.encode();
        assert_eq!(BatchHeader::decode(&bytes), Some((header, chain)));
        for bit in 0..bytes.len() * 8 {
            let mut bytes = bytes.clone();
            bytes[bit / 8] ^= 1 << (bit % 8);
            assert_eq!(BatchHeader::decode(&bytes), None, "bit {bit}");
        }
    }

    proptest! {
        #[test]
        fn no_bytes_panic(mut bytes in proptest::collection::vec(any::<u8>(), HEADER_LEN..2048), records in 0_u32..64) {
            bytes[..8].copy_from_slice(&MAGIC);
            bytes[72..76].copy_from_slice(&records.to_le_bytes());
            let _ = BatchHeader::decode(&bytes);
            if let Some(len) = BatchHeader::encoded_len_of(&bytes).filter(|len| *len <= bytes.len()) {
                let crc = crc32c(&bytes[12..len]);
                bytes[8..12].copy_from_slice(&crc.to_le_bytes());
                let _ = BatchHeader::decode(&bytes);
            }
        }
    }
}
