//! A raw image: a file, or a block device to read from.

use std::fs::File;
use std::io;
use std::os::unix::fs::{FileExt, FileTypeExt};

use rustix::fs::{FallocateFlags, SeekFrom, fallocate, seek};
use rustix::io::Errno;

use super::disk::{Disk, Run, one};

static ZEROES: [u8; 64 << 10] = [0; 64 << 10];

pub struct Raw {
    file: File,
    name: String,
    size: u64,
    /// The file tells data from holes.
    has_holes: bool,
}

impl Raw {
    /// An existing image, to be read or to be continued.
    pub fn open(file: File, name: &str) -> io::Result<Raw> {
        let size = seek(&file, SeekFrom::End(0))?;
        let has_holes = !file.metadata()?.file_type().is_block_device();
        Ok(Raw { file, name: name.to_owned(), size, has_holes })
    }

    /// A new image, all hole.
    pub fn create(file: File, name: &str, size: u64) -> io::Result<Raw> {
        file.set_len(size)?;
        Ok(Raw { file, name: name.to_owned(), size, has_holes: true })
    }

    fn write_zeroes(&self, offset: u64, len: u64) -> io::Result<()> {
        let mut done = 0;
        while done < len {
            let part = (len - done).min(ZEROES.len() as u64);
            self.file.write_all_at(&ZEROES[..part as usize], offset + done)?;
            done += part;
        }
        Ok(())
    }
}

impl Disk for Raw {
    fn name(&self) -> &str {
        &self.name
    }

    fn size(&self) -> u64 {
        self.size
    }

    fn runs(&self, offset: u64, len: u64) -> io::Result<Vec<Run>> {
        if !self.has_holes {
            return Ok(one(len, len, false));
        }
        let rest = self.size - offset;
        match seek(&self.file, SeekFrom::Data(offset)) {
            Ok(data) if data > offset => Ok(one((data - offset).min(rest), len, true)),
            Ok(_) => match seek(&self.file, SeekFrom::Hole(offset)) {
                Ok(hole) if hole > offset => Ok(one((hole - offset).min(rest), len, false)),
                Ok(_) => Ok(one(rest, len, false)),
                Err(error) => Err(error.into()),
            },
            Err(Errno::NXIO) => Ok(one(rest, len, true)),
            Err(Errno::INVAL) => Ok(one(rest, len, false)),
            Err(error) => Err(error.into()),
        }
    }

    fn read(&self, offset: u64, buffer: &mut [u8]) -> io::Result<()> {
        self.file.read_exact_at(buffer, offset)
    }

    fn write(&self, offset: u64, data: &[u8]) -> io::Result<()> {
        self.file.write_all_at(data, offset)
    }

    fn zero(&self, offset: u64, len: u64) -> io::Result<()> {
        match fallocate(&self.file, FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE, offset, len) {
            Err(Errno::OPNOTSUPP) => self.write_zeroes(offset, len),
            other => Ok(other?),
        }
    }

    fn flush(&self) -> io::Result<()> {
        self.file.sync_data()
    }
}
