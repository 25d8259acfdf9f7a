//! The file of an image that is only read: what it should hold past its end is missing, not zero.
//!
//! imago fills with zeroes what lies beyond the end of a file, as it must while it writes an image. In a finished image, such as a
//! download that broke off, that would turn lost data, and lost tables, into zeroes without a word.

use std::fmt::{Display, Formatter};
use std::io::{self, ErrorKind};
use std::path::{Path, PathBuf};

use imago::Storage;
use imago::file::File;
use imago::io_buffers::{IoVector, IoVectorMut};
use imago::storage::drivers::CommonStorageHelper;

/// All but compressed clusters begins at a multiple of this. Of those the length is told in units of it, so that the last may seem
/// to end past the end of its file; one that is cut off does not unpack.
const UNIT: u64 = 512;

#[derive(Debug)]
pub struct Whole(pub File);

impl Display for Whole {
    fn fmt(&self, formatter: &mut Formatter<'_>) -> std::fmt::Result {
        self.0.fmt(formatter)
    }
}

impl Storage for Whole {
    fn mem_align(&self) -> usize {
        self.0.mem_align()
    }

    fn req_align(&self) -> usize {
        self.0.req_align()
    }

    fn size(&self) -> io::Result<u64> {
        self.0.size()
    }

    fn resolve_relative_path<P: AsRef<Path>>(&self, relative: P) -> io::Result<PathBuf> {
        self.0.resolve_relative_path(relative)
    }

    fn get_filename(&self) -> Option<PathBuf> {
        self.0.get_filename()
    }

    unsafe fn pure_readv(&self, bufv: IoVectorMut<'_>, offset: u64) -> io::Result<()> {
        let (size, end) = (self.0.size()?, offset.saturating_add(bufv.len()));
        let slack = if offset.is_multiple_of(UNIT) { 0 } else { UNIT - 1 };
        if end > size.saturating_add(slack) || (offset >= size && offset < end) {
            let what =
                format!("the file is truncated: it ends at byte {size}, the image goes on to {end}; get a whole copy of it");
            return Err(io::Error::new(ErrorKind::UnexpectedEof, what));
        }
        // SAFETY: the caller keeps to the same contract, whose alignments are the inner file's.
        unsafe { self.0.pure_readv(bufv, offset) }
    }

    unsafe fn pure_writev(&self, _bufv: IoVector<'_>, _offset: u64) -> io::Result<()> {
        Err(ErrorKind::ReadOnlyFilesystem.into())
    }

    fn flush(&self) -> io::Result<()> {
        self.0.flush()
    }

    fn sync(&self) -> io::Result<()> {
        self.0.sync()
    }

    unsafe fn invalidate_cache(&self) -> io::Result<()> {
        // SAFETY: nothing is ever written here that could be lost.
        unsafe { self.0.invalidate_cache() }
    }

    fn get_storage_helper(&self) -> &CommonStorageHelper {
        self.0.get_storage_helper()
    }
}
