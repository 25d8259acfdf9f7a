//! What a device carries over from one process to another when its guest moves: nearly all of it is in guest memory.
//!
//! ```text
//!   0          8         10      11
//!   | "NOVABLK1" | version | flags |       flags: bit 0 write through
//! ```

use std::io::{self, IoSlice, IoSliceMut};
use std::os::fd::OwnedFd;
use std::time::{Duration, Instant};

use blockdev::clock;
use rustix::event::{PollFd, PollFlags, poll};
use rustix::fs::{FileType, fstat};
use rustix::io::{Errno, ReadWriteFlags, ioctl_fionbio, preadv2, pwritev2};
use rustix::time::Timespec;

const MAGIC: &[u8; 8] = b"NOVABLK1";
const VERSION: u16 = 1;
const LEN: usize = 11;
const WRITE_THROUGH: u8 = 1;
/// For all of a state.
const PATIENCE: Duration = Duration::from_secs(5);
/// Channels have no positions.
const NO_OFFSET: u64 = u64::MAX;

/// The state itself.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct DeviceState {
    pub write_through: bool,
}

impl DeviceState {
    pub fn to_bytes(self) -> [u8; LEN] {
        let mut bytes = [0; LEN];
        bytes[..8].copy_from_slice(MAGIC);
        bytes[8..10].copy_from_slice(&VERSION.to_le_bytes());
        bytes[10] = if self.write_through { WRITE_THROUGH } else { 0 };
        bytes
    }

    pub fn from_bytes(bytes: &[u8]) -> Option<DeviceState> {
        let known = bytes.len() == LEN && bytes[..8] == *MAGIC && bytes[8..10] == VERSION.to_le_bytes();
        (known && bytes[10] <= WRITE_THROUGH).then(|| DeviceState { write_through: bytes[10] == WRITE_THROUGH })
    }

    /// Writes the state to the channel and closes it.
    pub fn save(self, channel: OwnedFd) -> io::Result<()> {
        let bytes = self.to_bytes();
        let write = || match pwritev2(&channel, &[IoSlice::new(&bytes)], NO_OFFSET, ReadWriteFlags::NOWAIT) {
            Err(Errno::OPNOTSUPP) => never_wait(&channel).and_then(|()| rustix::io::write(&channel, &bytes)),
            outcome => outcome,
        };
        match when_ready(&channel, PollFlags::OUT, clock::monotonic() + PATIENCE, write)? {
            LEN => Ok(()),
            _ => Err(io::ErrorKind::WriteZero.into()),
        }
    }

    /// Reads a state from the channel up to its end.
    pub fn load(channel: OwnedFd) -> io::Result<DeviceState> {
        DeviceState::load_by(channel, clock::monotonic() + PATIENCE)
    }

    fn load_by(channel: OwnedFd, deadline: Instant) -> io::Result<DeviceState> {
        let mut bytes = [0; LEN + 1];
        let mut filled = 0;
        while filled < bytes.len() {
            let rest = &mut bytes[filled..];
            let read = || match preadv2(&channel, &mut [IoSliceMut::new(rest)], NO_OFFSET, ReadWriteFlags::NOWAIT) {
                Err(Errno::OPNOTSUPP) => never_wait(&channel).and_then(|()| rustix::io::read(&channel, &mut *rest)),
                outcome => outcome,
            };
            match when_ready(&channel, PollFlags::IN, deadline, read)? {
                0 => break,
                count => filled += count,
            }
        }
        let state = DeviceState::from_bytes(&bytes[..filled]);
        state.ok_or_else(|| io::Error::new(io::ErrorKind::InvalidData, "not a state of this device"))
    }
}

/// For pipes before Linux 6.4, which cannot be asked not to wait once.
fn never_wait(channel: &OwnedFd) -> rustix::io::Result<()> {
    match FileType::from_raw_mode(fstat(channel)?.st_mode) {
        FileType::Fifo | FileType::Socket => ioctl_fionbio(channel, true),
        _ => Err(Errno::OPNOTSUPP),
    }
}

/// A front end that neither sends nor closes, or takes back what it sent, delays its own session only, and not for ever:
/// `transfer` never waits.
fn when_ready(
    channel: &OwnedFd,
    flags: PollFlags,
    deadline: Instant,
    mut transfer: impl FnMut() -> rustix::io::Result<usize>,
) -> io::Result<usize> {
    loop {
        let left = deadline.saturating_duration_since(clock::monotonic());
        let timeout = Timespec { tv_sec: left.as_secs() as i64, tv_nsec: i64::from(left.subsec_nanos()) };
        match poll(&mut [PollFd::new(channel, flags)], Some(&timeout)) {
            Ok(0) => return Err(io::ErrorKind::TimedOut.into()),
            Ok(_) => {}
            Err(Errno::INTR) => continue,
            Err(error) => return Err(error.into()),
        }
        match transfer() {
            Err(Errno::AGAIN | Errno::INTR) if !left.is_zero() => {}
            outcome => return Ok(outcome?),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_front_end_that_never_ends_its_state_is_not_waited_for() {
        use std::io::Write;
        let (reader, mut writer) = std::io::pipe().unwrap();
        writer.write_all(&DeviceState { write_through: true }.to_bytes()).unwrap();
        let outcome = DeviceState::load_by(reader.into(), clock::monotonic());
        assert_eq!(outcome.unwrap_err().kind(), io::ErrorKind::TimedOut);
        drop(writer);
    }

    #[test]
    fn states_travel_and_garbage_does_not() {
        for write_through in [false, true] {
            let (reader, writer) = std::io::pipe().unwrap();
            DeviceState { write_through }.save(writer.into()).unwrap();
            assert_eq!(DeviceState::load(reader.into()).unwrap(), DeviceState { write_through });
        }
        let good = DeviceState { write_through: true }.to_bytes();
        assert_eq!(DeviceState::from_bytes(&good[..10]), None);
        for at in 0..LEN {
            let mut bytes = good;
            bytes[at] ^= 0x80;
            assert_eq!(DeviceState::from_bytes(&bytes), None, "byte {at}");
        }
    }
}
