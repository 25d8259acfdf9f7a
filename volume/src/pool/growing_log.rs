//! A sparse log file that gets its space a good way before the log needs it.
//!
//! ```text
//!   written ────────────▶│◀── ahead: no write waits for space ──▶│ a hole as yet
//! ```
//!
//! A write into a hole waits for the file system to find space for it, on a thread of the kernel's. The log goes through its file from the start to
//! the end, and then over what has its space already. A volume of which little is written needs little ahead. Of a disk that is nearly full nothing is
//! taken ahead: others need it, and so do writes.

use std::fs::File;
use std::ops::Range;
use std::path::Path;
use std::rc::Rc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};

use backends::file::{FileDevice, FileOptions};
use blockdev::offload::Offload;
use blockdev::{BlockDevice, Capabilities, DeviceError, Extent, ExtentKind, Geometry, IoQueue, Op, Payload, Reactor, Request};
use rustix::fs::{FallocateFlags, SeekFrom, fallocate, fstatvfs, seek};
use rustix::io::Errno;

const AHEAD_MIN: u64 = 1 << 20;
const AHEAD_MAX: u64 = 64 << 20;
/// What has to be free for that.
const FREE_MIN: u64 = 2 * AHEAD_MAX;
/// Holes that are told of a log; more count as data.
const HOLES_MAX: usize = 64;

/// The device of a log.
pub(super) struct GrowingLog {
    below: FileDevice,
    space: Arc<Space>,
}

struct Space {
    file: File,
    len: u64,
    /// Where the part ends that has its space, or will have it soon.
    end: AtomicU64,
    /// As the log was opened. Told until something is written.
    holes: Vec<Range<u64>>,
}

struct GrowingQueue {
    below: Box<dyn IoQueue>,
    space: Arc<Space>,
}

impl GrowingLog {
    pub(super) fn open(path: &Path) -> Result<GrowingLog, DeviceError> {
        let below = FileDevice::open(path, FileOptions { read_only: false, direct: true })?;
        let what = || format!("opening {}", path.display());
        let file = File::options().write(true).open(path).map_err(|source| DeviceError::Io { what: what(), source })?;
        let len = below.geometry().size;
        // Where a file system cannot tell, everything counts as data.
        let holes = holes(&file, len).unwrap_or_default();
        let space = Space { file, len, end: AtomicU64::new(0), holes };
        Ok(GrowingLog { below, space: Arc::new(space) })
    }
}

impl Space {
    /// Sees to it that there is space beyond `written`.
    fn keep_ahead(self: &Arc<Self>, written: u64) {
        let end = self.end.load(Ordering::Relaxed);
        let ahead = written.clamp(AHEAD_MIN, AHEAD_MAX);
        let is_enough = end == self.len || end >= written.saturating_add(ahead / 2);
        if is_enough {
            return;
        }
        let (from, to) = (end.max(written), written.saturating_add(ahead).min(self.len));
        self.end.store(to, Ordering::Relaxed);
        let space = self.clone();
        allocators().run(move || {
            // Where it fails, or the file system cannot do it, a write gets its space, or its error, by itself.
            if from < to
                && space.has_plenty()
                && let Err(error) = fallocate(&space.file, FallocateFlags::KEEP_SIZE, from, to - from)
            {
                tracing::debug!("no space was allocated ahead for a log: {error}");
            }
        });
    }
}

/// The first holes of a file of `len` bytes.
fn holes(file: &File, len: u64) -> rustix::io::Result<Vec<Range<u64>>> {
    let mut holes: Vec<Range<u64>> = Vec::new();
    let mut from = 0;
    while from < len && holes.len() < HOLES_MAX {
        let start = seek(file, SeekFrom::Hole(from))?;
        let end = match seek(file, SeekFrom::Data(start)) {
            Err(Errno::NXIO) => len,
            found => found?.min(len),
        };
        if start < end {
            holes.push(start..end);
        }
        from = end.max(start);
    }
    Ok(holes)
}

impl Space {
    fn is_as_opened(&self) -> bool {
        self.end.load(Ordering::Relaxed) == 0
    }

    fn extents(&self, within: Range<u64>) -> Vec<Extent> {
        let mut extents = Vec::new();
        let mut push = |from: u64, to: u64, kind| {
            if from < to {
                extents.push(Extent { len: to - from, kind });
            }
        };
        let mut at = within.start;
        for hole in self.holes.iter().filter(|hole| hole.end > within.start && hole.start < within.end) {
            push(at, hole.start, ExtentKind::Data);
            let end = hole.end.min(within.end);
            push(hole.start.max(at), end, ExtentKind::Hole);
            at = end;
        }
        push(at, within.end, ExtentKind::Data);
        extents
    }

    fn has_plenty(&self) -> bool {
        fstatvfs(&self.file).is_ok_and(|found| found.f_bavail.saturating_mul(found.f_frsize) >= FREE_MIN)
    }
}

/// The thread that allocates, for all logs.
fn allocators() -> &'static Offload {
    static ALLOCATORS: OnceLock<Offload> = OnceLock::new();
    ALLOCATORS.get_or_init(|| Offload::start("log-space", 1).expect("a thread can be started"))
}

impl BlockDevice for GrowingLog {
    fn geometry(&self) -> Geometry {
        self.below.geometry()
    }

    fn capabilities(&self) -> Capabilities {
        self.below.capabilities()
    }

    fn open_queue(&self, reactor: &Rc<Reactor>) -> Result<Box<dyn IoQueue>, DeviceError> {
        let below = self.below.open_queue(reactor)?;
        Ok(Box::new(GrowingQueue { below, space: self.space.clone() }))
    }

    fn resize(&self, size: u64) -> Result<(), DeviceError> {
        self.below.resize(size)
    }

    fn health(&self) -> Option<String> {
        self.below.health()
    }
}

impl IoQueue for GrowingQueue {
    fn submit(&self, request: Request) {
        match request.op {
            Op::Write { .. } => self.space.keep_ahead(request.end()),
            Op::BlockStatus if self.space.is_as_opened() => {
                let extents = self.space.extents(request.offset..request.end());
                return request.complete_with(Ok(()), Payload::Extents(extents));
            }
            _ => {}
        }
        self.below.submit(request);
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::{FileExt, MetadataExt};

    use super::*;

    const MIB: u64 = 1 << 20;

    #[test]
    fn holes_are_told_as_they_were_when_the_log_was_opened() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("log");
        let file = File::create(&path).unwrap();
        file.set_len(8 * MIB).unwrap();
        let told = |log: &GrowingLog, within| -> Vec<(u64, bool)> {
            let extents = log.space.extents(within);
            extents.iter().map(|extent| (extent.len / MIB, extent.kind == ExtentKind::Hole)).collect()
        };
        assert_eq!(told(&GrowingLog::open(&path).unwrap(), MIB..8 * MIB), [(7, true)]);
        for start in [2, 5] {
            file.write_all_at(&[1; MIB as usize], start * MIB).unwrap();
        }
        let log = GrowingLog::open(&path).unwrap();
        assert_eq!(told(&log, 0..8 * MIB), [(2, true), (1, false), (2, true), (1, false), (2, true)]);
        assert_eq!(told(&log, 2 * MIB..4 * MIB), [(1, false), (1, true)]);
        assert!(log.space.is_as_opened());
        log.space.keep_ahead(MIB);
        assert!(!log.space.is_as_opened());
    }

    #[test]
    fn space_is_there_before_it_is_written_and_no_earlier() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("log");
        File::create(&path).unwrap().set_len(1024 * MIB).unwrap();
        let log = GrowingLog::open(&path).unwrap();
        let allocated = || std::fs::metadata(&path).unwrap().blocks() * 512 / MIB;
        let settled = |what: u64| {
            let end = blockdev::clock::monotonic() + std::time::Duration::from_secs(30);
            while allocated() != what {
                assert!(blockdev::clock::monotonic() < end, "{} MiB are allocated, not {what}", allocated());
                std::thread::yield_now();
            }
        };
        assert_eq!(allocated(), 0);
        let steps = [(1, 1), (2, 3), (3, 5), (40, 45), (60, 85), (70, 85), (1000, 109)];
        for (written, allocated) in steps {
            log.space.keep_ahead(written * MIB);
            settled(allocated);
        }
        log.space.keep_ahead(1024 * MIB);
        log.space.keep_ahead(MIB);
        settled(109);
    }
}
