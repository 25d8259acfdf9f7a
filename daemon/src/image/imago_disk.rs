//! Images with a format of their own, through the crate imago.

use std::fs;
use std::io;

use imago::format::drivers::FormatDriverInstance;
use imago::{FormatAccess, Mapping, Storage};
use parking_lot::Mutex;

use super::disk::{Disk, Run, one};

/// The most runs told at once.
const RUNS_MAX: usize = 1024;

pub struct Imago<S: Storage + 'static> {
    access: FormatAccess<S>,
    name: String,
    /// Kept beside imago's own descriptor, to make its writes durable.
    file: fs::File,
    /// Allocates one cluster at a time; clusters are written one after the other anyway.
    writing: Mutex<()>,
}

impl<S: Storage> Imago<S> {
    pub fn new<D: FormatDriverInstance<Storage = S> + 'static>(driver: D, file: fs::File, name: &str) -> Imago<S> {
        Imago { access: FormatAccess::new(driver), name: name.to_owned(), file, writing: Mutex::new(()) }
    }
}

impl<S: Storage> Disk for Imago<S> {
    fn name(&self) -> &str {
        &self.name
    }

    fn size(&self) -> u64 {
        self.access.size()
    }

    fn runs(&self, offset: u64, len: u64) -> io::Result<Vec<Run>> {
        let mut runs: Vec<Run> = Vec::new();
        let mut covered = 0;
        while covered < len {
            let (mapping, found) = self.access.get_mapping(offset + covered, len - covered)?;
            let (found, zero) = match mapping {
                Mapping::Zero { .. } => (found, true),
                Mapping::Eof { .. } => return Ok(if runs.is_empty() { one(len, len, true) } else { runs }),
                _ => (found, false),
            };
            if found == 0 {
                return Err(io::Error::other("the image's map has an empty entry"));
            }
            let full = runs.len() >= RUNS_MAX;
            match runs.last_mut() {
                Some(last) if last.zero == zero => last.len += found,
                Some(_) if full => break,
                _ => runs.push(Run { len: found, zero }),
            }
            covered += found;
        }
        Ok(runs)
    }

    fn read(&self, offset: u64, buffer: &mut [u8]) -> io::Result<()> {
        self.access.read(buffer, offset)
    }

    fn write(&self, offset: u64, data: &[u8]) -> io::Result<()> {
        let _writing = self.writing.lock();
        self.access.write(data, offset)
    }

    fn zero(&self, offset: u64, len: u64) -> io::Result<()> {
        let _writing = self.writing.lock();
        self.access.write_zeroes(offset, len)
    }

    fn flush(&self) -> io::Result<()> {
        let _writing = self.writing.lock();
        self.access.flush()?;
        self.file.sync_data()
    }
}
