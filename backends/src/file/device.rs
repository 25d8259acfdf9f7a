//! One open file or block device.

use std::fs::{File, Metadata};
use std::io;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use blockdev::clock;
use blockdev::offload::Offload;
use blockdev::{BlockDevice, Capabilities, DeviceError, Geometry, IoQueue, Reactor};
use parking_lot::Mutex;

use super::queue::FileQueue;
use super::sys::{self, DirectAlignment, Links};

/// How long to wait for another opener's lock: a process that was killed holds it until its last write has landed.
const LOCK_PATIENCE: Duration = Duration::from_secs(5);
const LOCK_RETRY: Duration = Duration::from_millis(2);
const SECTOR: u64 = 512;

/// How to open a file.
#[derive(Clone, Copy, Debug)]
pub struct FileOptions {
    pub read_only: bool,
    /// Direct I/O where the file can; the page cache otherwise.
    pub direct: bool,
}

/// A raw file or block device. Holds an exclusive lock on it, or a shared one if read-only.
pub struct FileDevice {
    pub(super) shared: Arc<SharedFile>,
    geometry: Geometry,
    read_only: bool,
    direct: bool,
    fast_zero: bool,
    discard: bool,
}

pub(super) struct SharedFile {
    pub file: File,
    pub path: PathBuf,
    pub size: AtomicU64,
    /// The file was found shorter than the volume: nothing it says can be trusted.
    pub truncated: AtomicBool,
    pub is_block_device: bool,
    /// Its file system keeps content in memory alone: a transfer is a copy.
    pub in_memory: bool,
    /// A thread for calls that may block; started by the first.
    helper: Mutex<Option<Offload>>,
}

impl SharedFile {
    /// Runs `job` on a thread of this file alone, after those before it: a file system that hangs delays no other volume.
    pub(super) fn run_aside(&self, job: impl FnOnce() + Send + 'static) -> io::Result<()> {
        match &mut *self.helper.lock() {
            Some(helper) => helper.run(job),
            none => none.insert(Offload::start("extents", 1)?).run(job),
        }
        Ok(())
    }

    /// True if somebody truncated it: a write since then may have made it longer again, with zeroes in place of what was lost.
    pub(super) fn is_short(&self) -> bool {
        if self.is_block_device {
            return false;
        }
        // A resize of our own sets the size before it shortens the file, and after it made it longer.
        let size = self.size.load(Ordering::Acquire);
        let short = sys::known_length(&self.file).is_ok_and(|length| length < size);
        short && self.size.load(Ordering::Acquire) == size
    }
}

fn io_error(what: impl Into<String>) -> impl FnOnce(io::Error) -> DeviceError {
    let what = what.into();
    move |source| DeviceError::Io { what, source }
}

impl FileDevice {
    /// Opens and locks `path`. Waits a few seconds for a lock held elsewhere; then it is refused. Blocks.
    pub fn open(path: &Path, options: FileOptions) -> Result<FileDevice, DeviceError> {
        FileDevice::open_through(path, options, Links::All)
    }

    /// The same; `path` is refused if other links are on it.
    pub(super) fn open_through(path: &Path, options: FileOptions, links: Links) -> Result<FileDevice, DeviceError> {
        let shown = path.display();
        let kind = std::fs::metadata(path).map_err(io_error(format!("opening {shown}")))?.file_type();
        if !kind.is_file() && !kind.is_block_device() {
            return Err(DeviceError::Refused(format!("{shown} is neither a regular file nor a block device")));
        }
        let (file, direct, metadata) = open_locked(path, options, links, kind.is_block_device())?;
        let is_block_device = metadata.file_type().is_block_device();
        if metadata.file_type() != kind {
            return Err(DeviceError::Refused(format!("{shown} is being replaced by something else; try again")));
        }
        let alignment =
            alignment(&file, direct, is_block_device).map_err(io_error(format!("asking {shown} for its alignment")))?;
        let size = sys::size_of(&file).map_err(io_error(format!("reading the size of {shown}")))?;
        check_size(path, size, u64::from(alignment.offset))?;
        let geometry = Geometry {
            size,
            block_size: alignment.offset,
            memory_alignment: alignment.memory,
            preferred_size: alignment.offset.max(4096),
            discard_granularity: (metadata.blksize() as u32).next_power_of_two().clamp(512, 1 << 20),
        };
        let (size, truncated) = (AtomicU64::new(size), AtomicBool::new(false));
        let file_system = if is_block_device { 0 } else { sys::file_system(&file) };
        let in_memory = file_system == libc::TMPFS_MAGIC;
        let fast_zero = [libc::EXT4_SUPER_MAGIC, libc::XFS_SUPER_MAGIC].contains(&file_system);
        let discard = options.read_only
            || sys::can_discard(&file, is_block_device).map_err(io_error(format!("asking {shown} whether it can have holes")))?;
        let (path, helper) = (path.to_owned(), Mutex::new(None));
        let shared = SharedFile { file, path, size, truncated, is_block_device, in_memory, helper };
        Ok(FileDevice { shared: Arc::new(shared), geometry, read_only: options.read_only, direct, fast_zero, discard })
    }

    pub(super) fn is_block_device(&self) -> bool {
        self.shared.is_block_device
    }

    fn check_file(&self) -> Option<String> {
        let shared = &self.shared;
        let shown = shared.path.display();
        if shared.truncated.load(Ordering::Relaxed) {
            return Some(format!(
                "{shown} was truncated by somebody else; its volume fails all I/O until it is restored and reopened"
            ));
        }
        match shared.file.metadata() {
            Err(error) => Some(format!("{shown}: {error}")),
            Ok(_) if self.shared.is_block_device => None,
            Ok(metadata) if metadata.len() < shared.size.load(Ordering::Acquire) => {
                shared.truncated.store(true, Ordering::Relaxed);
                self.check_file()
            }
            Ok(metadata) if metadata.nlink() == 0 => {
                Some(format!("{shown} was deleted by somebody else; it lives until the volume is closed: export its content now"))
            }
            Ok(_) => None,
        }
    }
}

/// Makes sure that nobody has the volume's file open, until the result is dropped. Waits as [`FileDevice::open`] does.
pub fn hold_unused(path: &Path) -> Result<File, DeviceError> {
    open_locked(path, FileOptions { read_only: false, direct: false }, Links::All, false).map(|(file, ..)| file)
}

fn open_locked(
    path: &Path,
    options: FileOptions,
    links: Links,
    is_block_device: bool,
) -> Result<(File, bool, Metadata), DeviceError> {
    let deadline = clock::monotonic() + LOCK_PATIENCE;
    // A block device is claimed: the kernel refuses that while it is mounted, or part of another device.
    let claim = if is_block_device && !options.read_only { libc::O_EXCL } else { 0 };
    loop {
        let (file, direct) = open_file(path, options, links, claim, deadline)?;
        lock(&file, path, options.read_only, deadline)?;
        let metadata = file.metadata().map_err(io_error(format!("reading the attributes of {}", path.display())))?;
        if is_still_at(&metadata, path)? {
            return Ok((file, direct, metadata));
        }
    }
}

/// False if the path leads elsewhere by now: whoever held the lock has replaced the file, and what was locked is a remnant.
fn is_still_at(opened: &Metadata, path: &Path) -> Result<bool, DeviceError> {
    let now = std::fs::metadata(path).map_err(io_error(format!("opening {}", path.display())))?;
    Ok((opened.dev(), opened.ino()) == (now.dev(), now.ino()))
}

fn open_file(
    path: &Path,
    options: FileOptions,
    links: Links,
    claim: i32,
    deadline: Instant,
) -> Result<(File, bool), DeviceError> {
    loop {
        match try_open(path, options, links, claim) {
            Ok(opened) => return Ok(opened),
            Err(error) if error.raw_os_error() == Some(libc::EBUSY) && clock::monotonic() < deadline => {
                std::thread::sleep(LOCK_RETRY);
            }
            Err(error) if error.raw_os_error() == Some(libc::EBUSY) => {
                return Err(DeviceError::Refused(format!(
                    "{} is in use: it is mounted, part of another device, or open elsewhere; `lsblk` shows by what",
                    path.display()
                )));
            }
            Err(error) if error.raw_os_error() == Some(libc::ELOOP) && links != Links::All => {
                return Err(DeviceError::Refused(format!(
                    "{} leads through a symbolic link, which it did not when its volume was made; put the file back in its place",
                    path.display()
                )));
            }
            Err(error) => return Err(io_error(format!("opening {}", path.display()))(error)),
        }
    }
}

fn try_open(path: &Path, options: FileOptions, links: Links, claim: i32) -> io::Result<(File, bool)> {
    let flags = claim | if options.read_only { libc::O_RDONLY } else { libc::O_RDWR };
    let open = |flags: i32| sys::open(path, flags, links);
    if options.direct {
        match open(flags | libc::O_DIRECT) {
            Ok(file) => return Ok((file, true)),
            Err(error) if error.raw_os_error() == Some(libc::EINVAL) => {
                tracing::warn!("{}: its file system has no direct I/O; using the page cache", path.display());
            }
            Err(error) => return Err(error),
        }
    }
    open(flags).map(|file| (file, false))
}

fn lock(file: &File, path: &Path, read_only: bool, deadline: Instant) -> Result<(), DeviceError> {
    loop {
        if sys::try_lock(file, !read_only).map_err(io_error(format!("locking {}", path.display())))? {
            return Ok(());
        }
        if clock::monotonic() >= deadline {
            return Err(DeviceError::Refused(format!(
                "{} is in use: another process, or another volume of this one, holds its lock; close that first",
                path.display()
            )));
        }
        std::thread::sleep(LOCK_RETRY);
    }
}

fn alignment(file: &File, direct: bool, is_block_device: bool) -> io::Result<DirectAlignment> {
    if !direct {
        return Ok(DirectAlignment { memory: 1, offset: 1 });
    }
    if let Some(known) = sys::direct_alignment(file)? {
        return Ok(known);
    }
    let block = if is_block_device { sys::block_size_of_device(file)? } else { 4096 };
    Ok(DirectAlignment { memory: block, offset: block })
}

fn check_size(path: &Path, size: u64, block: u64) -> Result<(), DeviceError> {
    let unit = block.max(SECTOR);
    if size.is_multiple_of(unit) {
        return Ok(());
    }
    Err(DeviceError::Refused(format!(
        "{}: its size, {size} bytes, is not a multiple of {unit}; extend it with: truncate -s {} {0}",
        path.display(),
        size.next_multiple_of(unit)
    )))
}

impl BlockDevice for FileDevice {
    fn geometry(&self) -> Geometry {
        Geometry { size: self.shared.size.load(Ordering::Acquire), ..self.geometry }
    }

    fn capabilities(&self) -> Capabilities {
        Capabilities {
            writable: !self.read_only,
            discard: self.discard,
            write_zeroes: true,
            fast_zero: self.fast_zero,
            // Through the page cache a full disk would show in a durable write as the loss of others: they are told apart by a
            // flush of its own.
            fua: self.direct,
            block_status: !self.shared.is_block_device,
            caches_reads: !self.direct && !self.shared.in_memory,
            flush_failure_loses_writes: true,
        }
    }

    fn open_queue(&self, reactor: &Rc<Reactor>) -> Result<Box<dyn IoQueue>, DeviceError> {
        Ok(Box::new(FileQueue::new(self.shared.clone(), reactor)))
    }

    fn resize(&self, size: u64) -> Result<(), DeviceError> {
        let shown = self.shared.path.display();
        check_size(&self.shared.path, size, u64::from(self.geometry.block_size))?;
        if self.shared.is_block_device {
            return Err(DeviceError::Unsupported(format!(
                "{shown} is a block device: resize it with its own tools, then reopen the volume"
            )));
        }
        let old = self.shared.size.load(Ordering::Acquire);
        if size < old {
            self.shared.size.store(size, Ordering::Release);
        }
        let outcome = self.shared.file.set_len(size).and_then(|()| self.shared.file.sync_all());
        let now = if outcome.is_ok() { size } else { sys::size_of(&self.shared.file).unwrap_or(old) };
        self.shared.size.store(now, Ordering::Release);
        outcome.map_err(io_error(format!("resizing {shown} to {size} bytes")))
    }

    fn refresh_size(&self) -> Result<u64, DeviceError> {
        let size =
            sys::size_of(&self.shared.file).map_err(io_error(format!("reading the size of {}", self.shared.path.display())))?;
        check_size(&self.shared.path, size, u64::from(self.geometry.block_size))?;
        self.shared.size.store(size, Ordering::Release);
        Ok(size)
    }

    fn health(&self) -> Option<String> {
        self.check_file()
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc;

    use blockdev::client::Client;
    use blockdev::reactor::{DataPlane, DataPlaneOptions};
    use blockdev::{Volume, VolumeOptions};

    use super::*;

    #[test]
    fn a_file_system_that_hangs_delays_no_block_status_of_other_files() {
        let folder = tempfile::tempdir().unwrap();
        let open = |name: &str| {
            let path = folder.path().join(name);
            File::create(&path).unwrap().set_len(1 << 20).unwrap();
            FileDevice::open(&path, FileOptions { read_only: false, direct: false }).unwrap()
        };
        let (hanging, healthy) = (open("hanging"), open("healthy"));
        let (release, held) = mpsc::channel::<()>();
        let held = Arc::new(Mutex::new(held));
        for _ in 0..3 {
            let held = held.clone();
            hanging.shared.run_aside(move || assert!(held.lock().recv().is_err())).unwrap();
        }
        let plane = DataPlane::start(DataPlaneOptions { threads: 1, ..Default::default() }).unwrap();
        let options = VolumeOptions { name: "healthy".into(), read_only: false, block_size: 512 };
        let client = Client::open(&Volume::new(Arc::new(healthy), options), &plane.handles()[0]).unwrap();
        assert_eq!(client.extents(0, 1 << 20).unwrap().iter().map(|extent| extent.len).sum::<u64>(), 1 << 20);
        drop(release);
    }
}
