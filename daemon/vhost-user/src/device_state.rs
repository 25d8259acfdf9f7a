//! What a device carries over from one process to another when its guest moves: nearly all of it is in guest memory.
//!
//! ```text
//!   0          8         10      11
//!   | "NOVABLK1" | version | flags |       flags: bit 0 write through
//! ```

use std::io;
use std::os::fd::OwnedFd;

use rustix::event::{PollFd, PollFlags, poll};
use rustix::time::Timespec;

const MAGIC: &[u8; 8] = b"NOVABLK1";
const VERSION: u16 = 1;
const LEN: usize = 11;
const WRITE_THROUGH: u8 = 1;
const PATIENCE: Timespec = Timespec { tv_sec: 5, tv_nsec: 0 };

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
        wait(&channel, PollFlags::OUT)?;
        match rustix::io::write(&channel, &self.to_bytes())? {
            LEN => Ok(()),
            _ => Err(io::ErrorKind::WriteZero.into()),
        }
    }

    /// Reads a state from the channel up to its end.
    pub fn load(channel: OwnedFd) -> io::Result<DeviceState> {
        let mut bytes = [0; LEN + 1];
        let mut filled = 0;
        while filled < bytes.len() {
            wait(&channel, PollFlags::IN)?;
            match rustix::io::read(&channel, &mut bytes[filled..])? {
                0 => break,
                count => filled += count,
            }
        }
        let state = DeviceState::from_bytes(&bytes[..filled]);
        state.ok_or_else(|| io::Error::new(io::ErrorKind::InvalidData, "not a state of this device"))
    }
}

/// A front end that neither sends nor closes delays its own session only, and not for ever.
fn wait(channel: &OwnedFd, flags: PollFlags) -> io::Result<()> {
    match poll(&mut [PollFd::new(channel, flags)], Some(&PATIENCE))? {
        0 => Err(io::ErrorKind::TimedOut.into()),
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

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
