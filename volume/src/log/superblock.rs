//! The first 4 KiB of a log's disk: whose log this is. Numbers are little-endian.
//!
//! ```text
//!   0  magic "NVLOGDEV"     16  log id     16 bytes     48  length of the ring  u64
//!   8  CRC32C of 12..96     32  group      16 bytes     56  sector              u32
//!  12  format version  u32                              60  zero                4 bytes
//!                                                       64  key check           32 bytes
//! ```

use std::rc::Rc;

use crate::bytes_at::{array_at, crc32c, u32_at, u64_at};
use crate::disk::LogDisk;
use crate::error::VolumeError;
use crate::log::Ring;
use crate::log::cipher::{KeyCheck, LogCipher, key_check};
use crate::log::format::LogId;
use crate::reduce::Secrets;

/// Bytes before the ring.
pub(crate) const SUPERBLOCK_LEN: usize = 4096;
/// The beginning of it that has the log's id.
pub(crate) const SUPERBLOCK_START: usize = 32;
const MAGIC: [u8; 8] = *b"NVLOGDEV";
const USED: usize = 96;
/// Not yet the format of any release.
const VERSION: u32 = 0;

/// The id of the log that begins so: zeroes if it was never used.
pub(crate) fn id_in(start: &[u8; SUPERBLOCK_START]) -> LogId {
    array_at(start, 16)
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Superblock {
    pub(crate) log_id: LogId,
    pub(crate) group: [u8; 16],
    /// As it was when the log was made: a disk may grow, and be read in other sectors later.
    pub(crate) ring: Ring,
    pub(crate) key_check: KeyCheck,
}

impl Superblock {
    /// `None`: there are only zeroes. Anything else that is no log may be somebody's data, or a log that was damaged.
    pub(crate) async fn read(disk: &dyn LogDisk) -> Result<Option<Superblock>, VolumeError> {
        let bytes = disk.read(0, SUPERBLOCK_LEN).await.map_err(|errno| VolumeError::log_io("read", 0, errno))?;
        if bytes.iter().all(|byte| *byte == 0) {
            return Ok(None);
        }
        if bytes[..8] != MAGIC || crc32c(&bytes[12..USED]) != u32_at(&bytes, 8) {
            return Err(VolumeError::NotALog);
        }
        if u32_at(&bytes, 12) != VERSION {
            return Err(VolumeError::FormatVersion("the local log".into()));
        }
        let ring = Ring { len: u64_at(&bytes, 48), sector: u32_at(&bytes, 56) as usize };
        ring.check(disk)?;
        Ok(Some(Superblock { log_id: array_at(&bytes, 16), group: array_at(&bytes, 32), ring, key_check: array_at(&bytes, 64) }))
    }

    /// Of a new log.
    pub(crate) fn new(log_id: LogId, group: [u8; 16], ring: Ring, secrets: &Secrets) -> Superblock {
        Superblock { log_id, group, ring, key_check: key_check(secrets.data_key.as_ref(), &group, &log_id) }
    }

    /// What encrypts the log, if it is encrypted. Fails if it was made with another key than the volume has, or has one and the other has none.
    pub(crate) fn cipher(&self, secrets: &Secrets) -> Result<Option<Rc<LogCipher>>, VolumeError> {
        let data_key = secrets.data_key.as_ref();
        if key_check(data_key, &self.group, &self.log_id) != self.key_check {
            return Err(VolumeError::LogKey);
        }
        Ok(data_key.map(|data_key| Rc::new(LogCipher::new(data_key, self.group, self.log_id))))
    }

    pub(crate) async fn write(&self, disk: &dyn LogDisk) -> Result<(), VolumeError> {
        let mut bytes = vec![0; SUPERBLOCK_LEN];
        bytes[..8].copy_from_slice(&MAGIC);
        bytes[12..16].copy_from_slice(&VERSION.to_le_bytes());
        bytes[16..32].copy_from_slice(&self.log_id);
        bytes[32..48].copy_from_slice(&self.group);
        bytes[48..56].copy_from_slice(&self.ring.len.to_le_bytes());
        bytes[56..60].copy_from_slice(&(self.ring.sector as u32).to_le_bytes());
        bytes[64..USED].copy_from_slice(&self.key_check);
        let crc = crc32c(&bytes[12..USED]);
        bytes[8..12].copy_from_slice(&crc.to_le_bytes());
        disk.write(0, vec![bytes.into()]).await.map_err(|errno| VolumeError::log_io("write", 0, errno))?;
        disk.sync().await.map_err(VolumeError::log_sync)
    }
}
