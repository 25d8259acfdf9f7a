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
use std::path::Path;
use std::rc::Rc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};

use backends::file::{FileDevice, FileOptions};
use blockdev::offload::Offload;
use blockdev::{BlockDevice, Capabilities, DeviceError, Geometry, IoQueue, Op, Reactor, Request};
use rustix::fs::{FallocateFlags, fallocate, fstatvfs};

const AHEAD_MIN: u64 = 1 << 20;
const AHEAD_MAX: u64 = 64 << 20;
/// What has to be free for that.
const FREE_MIN: u64 = 2 * AHEAD_MAX;

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
        let space = Space { file, len: below.geometry().size, end: AtomicU64::new(0) };
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

impl Space {
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
        if matches!(request.op, Op::Write { .. }) {
            self.space.keep_ahead(request.end());
        }
        self.below.submit(request);
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::MetadataExt;

    use super::*;

    const MIB: u64 = 1 << 20;

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
