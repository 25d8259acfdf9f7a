//! Writing what is large so that others on the same disk hardly notice: a few pieces at a time go to the disk, whoever writes.
//!
//! A sync of many megabytes fills the queue of the disk at once, and what a guest waits for, such as a write of a volume's log, would stand behind all of
//! it.

use std::fs::File;
use std::io::{self, BufWriter, Write};
use std::os::fd::AsRawFd;
use std::sync::atomic::{AtomicUsize, Ordering};

use bytes::Bytes;
use parking_lot::Mutex;

/// Bytes that go to the disk together, and how many such pieces at a time: fewer leave a disk idle that needs no rest.
const PIECE: usize = 512 << 10;
const PIECES: usize = 2;
const PAGE: u64 = 4096;

#[derive(Default)]
pub(super) struct Pace {
    /// One is held while a piece is on its way to the disk.
    lanes: [Mutex<()>; PIECES],
    next: AtomicUsize,
}

impl Pace {
    /// Writes a file from its start. The last bytes, or all of a small one, may not be on the disk before it is synced.
    pub(super) fn write(&self, file: &File, content: &[Bytes]) -> io::Result<()> {
        let mut writer = BufWriter::with_capacity(PIECE, file);
        let (mut written, mut on_disk) = (0, 0);
        let done = content.iter().flat_map(|part| part.chunks(PIECE)).try_for_each(|piece| {
            writer.write_all(piece)?;
            written += piece.len() as u64;
            // What is in the writer is less than a piece.
            let end = (written - writer.buffer().len() as u64) / PAGE * PAGE;
            if end - on_disk >= PIECE as u64 {
                let _lane = self.lanes[self.next.fetch_add(1, Ordering::Relaxed) % PIECES].lock();
                write_back(file, on_disk, end)?;
                on_disk = end;
            }
            Ok(())
        });
        let done = done.and_then(|()| writer.flush());
        // Content that could not be written must not be tried again by a buffer that is dropped.
        let _ = writer.into_parts();
        done
    }
}

/// Has a part of a file written to the disk, and waits for it. Nothing is durable by that.
fn write_back(file: &File, from: u64, to: u64) -> io::Result<()> {
    let flags = libc::SYNC_FILE_RANGE_WAIT_BEFORE | libc::SYNC_FILE_RANGE_WRITE | libc::SYNC_FILE_RANGE_WAIT_AFTER;
    // SAFETY: the call takes no pointers, and the descriptor is open as long as `file` is borrowed.
    match unsafe { libc::sync_file_range(file.as_raw_fd(), from.cast_signed(), (to - from).cast_signed(), flags) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_has_what_was_written_whatever_its_parts() {
        for lens in [&[][..], &[0], &[1, 4095, 4096], &[64, PIECE, 3], &[100, 3 * PIECE + 77, 4096, PIECE - 1, 9]] {
            let parts: Vec<Bytes> = lens.iter().map(|len| (0..*len).map(|at| (at * 7 + len) as u8).collect()).collect();
            let folder = tempfile::tempdir().unwrap();
            let path = folder.path().join("object");
            Pace::default().write(&File::create(&path).unwrap(), &parts).unwrap();
            assert!(std::fs::read(&path).unwrap() == parts.concat(), "{lens:?}");
        }
    }

    #[test]
    fn an_error_of_writing_is_told() {
        let full = File::options().write(true).open("/dev/full").unwrap();
        assert!(Pace::default().write(&full, &[vec![1; 3 * PIECE].into()]).is_err());
        assert!(Pace::default().write(&full, &[vec![1; 9].into()]).is_err());
    }
}
