//! Objects that were read lately stay open, so that what the page cache has of them is read at once, by whoever asks.
//!
//! Handing a read to another thread and being woken by it takes several times as long as copying a frame.

use std::fs::File;
use std::io::IoSliceMut;
use std::num::NonZeroUsize;
use std::ops::Range;
use std::sync::Arc;

use bytes::Bytes;
use lru::LruCache;
use parking_lot::Mutex;
use rustix::fs::{AtFlags, StatxFlags, statx};
use rustix::io::{ReadWriteFlags, preadv2};

const FILES_MAX: NonZeroUsize = NonZeroUsize::new(256).expect("not 0");
/// More is not copied on the thread of whoever asks, in bytes.
const AT_ONCE_MAX: u64 = 64 << 10;

struct Kept {
    file: File,
    len: u64,
}

pub(super) struct KeptFiles(Mutex<LruCache<String, Arc<Kept>>>);

impl KeptFiles {
    pub(super) fn new() -> KeptFiles {
        KeptFiles(Mutex::new(LruCache::new(FILES_MAX)))
    }

    /// Keeps a whole object of `len` bytes open.
    pub(super) fn keep(&self, name: &str, file: File, len: u64) {
        let kept = Arc::new(Kept { file, len });
        self.0.lock().put(name.to_owned(), kept.clone());
        // If it was deleted before it was kept, nobody else lets go of it.
        if !kept.is_there() {
            self.let_go(name);
        }
    }

    /// For whoever deleted an object: its space is free when nobody has it open.
    pub(super) fn let_go(&self, name: &str) {
        self.0.lock().pop(name);
    }

    /// A part of an object, up to its end. `None`: that would take longer, or fail.
    pub(super) fn read_at_once(&self, name: &str, range: &Range<u64>) -> Option<Bytes> {
        let kept = self.0.lock().get(name)?.clone();
        let range = range.start.min(kept.len)..range.end.min(kept.len);
        let len = range.end.checked_sub(range.start).filter(|len| *len <= AT_ONCE_MAX)?;
        if !kept.is_there() {
            self.let_go(name);
            return None;
        }
        let mut bytes = vec![0; len as usize];
        let read = preadv2(&kept.file, &mut [IoSliceMut::new(&mut bytes)], range.start, ReadWriteFlags::NOWAIT);
        (read.ok()? as u64 == len).then(|| bytes.into())
    }
}

impl Kept {
    /// Whether the object still has a name, as far as that is known without asking a server: whoever asks must not wait.
    fn is_there(&self) -> bool {
        let flags = AtFlags::EMPTY_PATH | AtFlags::STATX_DONT_SYNC;
        statx(&self.file, "", flags, StatxFlags::NLINK).is_ok_and(|about| about.stx_nlink > 0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_deleted_is_neither_read_nor_kept() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("object");
        std::fs::write(&path, [7; 100]).unwrap();
        let files = KeptFiles::new();
        assert_eq!(files.read_at_once("o", &(0..9)), None);
        files.keep("o", File::open(&path).unwrap(), 100);
        assert_eq!(files.read_at_once("o", &(90..200)).as_deref(), Some(&[7; 10][..]));
        assert_eq!(files.read_at_once("o", &(200..300)).as_deref(), Some(&[][..]));
        std::fs::remove_file(&path).unwrap();
        assert_eq!(files.read_at_once("o", &(0..9)), None);
        assert!(files.0.lock().is_empty());

        std::fs::write(&path, [8; 100]).unwrap();
        let late = File::open(&path).unwrap();
        std::fs::remove_file(&path).unwrap();
        files.keep("o", late, 100);
        assert!(files.0.lock().is_empty());
    }

    #[test]
    fn what_was_cut_off_or_is_long_is_left_to_those_who_can_wait() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("object");
        std::fs::write(&path, vec![7; 200_000]).unwrap();
        let files = KeptFiles::new();
        files.keep("o", File::open(&path).unwrap(), 200_000);
        assert_eq!(files.read_at_once("o", &(0..AT_ONCE_MAX + 1)), None);
        File::options().write(true).open(&path).unwrap().set_len(50).unwrap();
        assert_eq!(files.read_at_once("o", &(40..60)), None);
    }
}
