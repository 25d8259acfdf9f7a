//! What can go wrong with a mapped volume, in words for its user.

use backends::segments::StoreError;
use blockdev::Errno;

/// Why a mapped volume could not be opened, or does not go on.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum VolumeError {
    #[error("the local log cannot be used: {operation}{}: {errno}; {}", at(*offset), advice(*errno))]
    LogIo {
        operation: &'static str,
        /// Of the disk, in bytes, if it is of a part of it.
        offset: Option<u64>,
        errno: Errno,
    },
    #[error("there is no room for it in the local log; free space in the pool, or where the log lies, and try again")]
    LogFull,
    #[error("the volume was closed")]
    Closed,
    #[error("it was given up, and nothing was changed")]
    GivenUp,
    #[error(
        "the local log is damaged at position {position}: a later entry (position {proof}) shows that what stood there had been \
         acknowledged; nothing was changed. Restore the log from a copy, or open without it and lose what was not yet in the pool"
    )]
    LogDamaged { position: u64, proof: u64 },
    #[error("{object} is damaged: {why}; nothing was changed. Restore it from a copy of the pool")]
    ObjectDamaged { object: String, why: &'static str },
    #[error(
        "{0} is of a format version that this novastor does not know; nothing was changed. Use the release that wrote it, or a newer one"
    )]
    FormatVersion(String),
    #[error("another host has taken over this volume; this one must not go on serving it")]
    Fenced,
    #[error("another host is opening this volume at the same time; try again if it should be served here")]
    Raced,
    #[error("the local log belongs to another volume; give this one a log of its own")]
    ForeignLog,
    #[error(
        "the local log was made with another data key than this volume has, or without one; nothing was changed. Restore the volume's key \
         record, or give the volume another log"
    )]
    LogKey,
    #[error(
        "another host had this volume since the local log was written, so the log must not be replayed; keep it aside, and open the \
         volume with a new one"
    )]
    StaleLog,
    #[error("another host had this volume last, and may have it open")]
    Elsewhere,
    #[error(
        "the device for the local log holds something else; nothing was changed. Give the volume another one, or wipe this one"
    )]
    NotALog,
    #[error(
        "the device for the local log is too small (256 KiB at least), was shrunk, or has larger sectors than when the log was made; \
         nothing was changed. Give it back its size, or the volume another device"
    )]
    LogDoesNotFit,
    #[error(
        "the local log of this volume's last owner is not here, and flushes had been acknowledged on its word; open the volume on that \
         host, or accept the loss of what it had not yet brought into the pool"
    )]
    LogMissing,
    #[error("there is no volume of this name in the pool")]
    NoVolume,
    #[error("the volume exists already")]
    VolumeExists,
    #[error("a block was overwritten and its space freed while it was being read; read it again")]
    Moved,
    #[error("there is no snapshot of this name")]
    NoSnapshot,
    #[error("a snapshot of this name exists already; choose another name")]
    SnapshotExists,
    #[error("a snapshot's name has 1 to 63 bytes")]
    SnapshotName,
    #[error("the snapshot has clones ({0}); delete or flatten them first")]
    SnapshotHasClones(String),
    #[error("the volume's snapshots have clones ({0}); delete or flatten them first")]
    VolumeHasClones(String),
    #[error("a snapshot of the volume was made meanwhile ({0}); try again")]
    VolumeHasSnapshot(String),
    #[error("there are as many volumes in one group as there can be")]
    GroupFull,
    #[error("the volume has too many ancestors for one more clone; flatten one of them first")]
    TooManyAncestors,
    #[error("a size is a multiple of 4096 bytes, not 0, and at most 256T")]
    BadSize,
    #[error("a thread that reduces data has panicked; this is a defect of novastor, see its log")]
    Panicked,
    #[error(transparent)]
    Store(#[from] StoreError),
}

impl VolumeError {
    pub(crate) fn log_io(operation: &'static str, offset: u64, errno: Errno) -> VolumeError {
        VolumeError::LogIo { operation, offset: Some(offset), errno }
    }

    pub(crate) fn log_sync(errno: Errno) -> VolumeError {
        VolumeError::LogIo { operation: "sync", offset: None, errno }
    }
}

fn at(offset: Option<u64>) -> String {
    offset.map_or_else(String::new, |offset| format!(" at byte {offset}"))
}

fn advice(errno: Errno) -> &'static str {
    if errno.is_no_space() { "free space where it lies, and open the volume again" } else { "check the device it lies on" }
}
