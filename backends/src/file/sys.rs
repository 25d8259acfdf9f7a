//! The system calls of the file driver that no crate here wraps.

use std::ffi::{CString, OsStr};
use std::fs::File;
use std::io;
use std::mem::MaybeUninit;
use std::os::fd::{AsRawFd, FromRawFd, RawFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Component, Path};

use blockdev::{Extent, ExtentKind};

const BLKSSZGET: libc::c_ulong = 0x1268;
const BLKGETSIZE64: libc::c_ulong = 0x8008_1272;
const FICLONE: libc::c_ulong = 0x4004_9409;

/// Which symbolic links on the way to a file are followed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Links {
    All,
    /// Those before the last component.
    Folders,
    None,
}

/// Opens `path`. Fails with `ELOOP` at a link that is not to be followed.
pub(super) fn open(path: &Path, flags: libc::c_int, links: Links) -> io::Result<File> {
    match links {
        Links::All => open_at(libc::AT_FDCWD, path.as_os_str(), flags),
        Links::Folders => open_at(libc::AT_FDCWD, path.as_os_str(), flags | libc::O_NOFOLLOW),
        Links::None => open_without_links(path, flags),
    }
}

/// From folder to folder. One `openat2` would do, but systemd's `RestrictSUIDSGID` refuses it.
fn open_without_links(path: &Path, flags: libc::c_int) -> io::Result<File> {
    let start = if path.is_absolute() { "/" } else { "." };
    let mut folder = open_at(libc::AT_FDCWD, start.as_ref(), libc::O_PATH)?;
    let names = path.components().filter(|part| !matches!(part, Component::RootDir | Component::CurDir));
    let mut names = names.peekable();
    while let Some(name) = names.next() {
        let is_last = names.peek().is_none();
        let flags = if is_last { flags } else { libc::O_PATH };
        let next = open_at(folder.as_raw_fd(), name.as_os_str(), flags | libc::O_NOFOLLOW)?;
        if !is_last && next.metadata()?.is_symlink() {
            return Err(io::Error::from_raw_os_error(libc::ELOOP));
        }
        folder = next;
    }
    Ok(folder)
}

fn open_at(folder: RawFd, path: &OsStr, flags: libc::c_int) -> io::Result<File> {
    let path = CString::new(path.as_bytes())?;
    // SAFETY: the path is a C string that outlives the call, and no flag asks for a mode.
    let file = check(unsafe { libc::openat(folder, path.as_ptr(), flags | libc::O_CLOEXEC) })?;
    // SAFETY: the descriptor is new and nobody else's.
    Ok(unsafe { File::from_raw_fd(file) })
}

fn check(result: libc::c_int) -> io::Result<libc::c_int> {
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(result) }
}

/// What direct I/O on a file needs, in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct DirectAlignment {
    pub memory: u32,
    pub offset: u32,
}

/// `STATX_DIOALIGN`: `None` where the file takes no direct I/O or the kernel does not say.
pub(super) fn direct_alignment(file: &File) -> io::Result<Option<DirectAlignment>> {
    let mut status = MaybeUninit::<libc::statx>::zeroed();
    let empty = CString::default();
    // SAFETY: the path is an empty C string, the result area is as large as the kernel expects, and AT_EMPTY_PATH makes it
    // describe the descriptor, which `file` keeps open.
    let status = unsafe {
        check(libc::statx(file.as_raw_fd(), empty.as_ptr(), libc::AT_EMPTY_PATH, libc::STATX_DIOALIGN, status.as_mut_ptr()))?;
        status.assume_init()
    };
    let known = status.stx_mask & libc::STATX_DIOALIGN != 0 && status.stx_dio_offset_align != 0;
    Ok(known.then_some(DirectAlignment { memory: status.stx_dio_mem_align, offset: status.stx_dio_offset_align }))
}

/// Size of a file or a block device, in bytes.
pub(super) fn size_of(file: &File) -> io::Result<u64> {
    let metadata = file.metadata()?;
    if !metadata.file_type().is_block_device() {
        return Ok(metadata.len());
    }
    let mut size = 0u64;
    // SAFETY: BLKGETSIZE64 stores one u64.
    unsafe { check(libc::ioctl(file.as_raw_fd(), BLKGETSIZE64, &mut size))? };
    Ok(size)
}

/// Length of a regular file as this host knows it, without asking a server.
pub(super) fn known_length(file: &File) -> io::Result<u64> {
    let mut status = MaybeUninit::<libc::statx>::zeroed();
    let empty = CString::default();
    let flags = libc::AT_EMPTY_PATH | libc::AT_STATX_DONT_SYNC;
    // SAFETY: as in `direct_alignment`.
    let status = unsafe {
        check(libc::statx(file.as_raw_fd(), empty.as_ptr(), flags, libc::STATX_SIZE, status.as_mut_ptr()))?;
        status.assume_init()
    };
    Ok(status.stx_size)
}

/// Logical block size of a block device, in bytes.
pub(super) fn block_size_of_device(file: &File) -> io::Result<u32> {
    let mut size: libc::c_int = 0;
    // SAFETY: BLKSSZGET stores one int.
    unsafe { check(libc::ioctl(file.as_raw_fd(), BLKSSZGET, &mut size))? };
    Ok(size as u32)
}

/// Locks the open file description without waiting; false if another description holds a conflicting lock.
pub(super) fn try_lock(file: &File, exclusive: bool) -> io::Result<bool> {
    let kind = if exclusive { libc::LOCK_EX } else { libc::LOCK_SH };
    // SAFETY: flock takes no pointers.
    match check(unsafe { libc::flock(file.as_raw_fd(), kind | libc::LOCK_NB) }) {
        Ok(_) => Ok(true),
        Err(error) if error.raw_os_error() == Some(libc::EWOULDBLOCK) => Ok(false),
        Err(error) => Err(error),
    }
}

/// The magic number of the file system `file` is on; 0 if it is not known.
pub(super) fn file_system(file: &File) -> libc::__fsword_t {
    let mut status = MaybeUninit::<libc::statfs>::zeroed();
    // SAFETY: the result area is a whole statfs, and `file` keeps the descriptor open.
    let result = unsafe { libc::fstatfs(file.as_raw_fd(), status.as_mut_ptr()) };
    // SAFETY: it was zeroed, which is a valid statfs, before the kernel may have filled it.
    let status = unsafe { status.assume_init() };
    if result == 0 { status.f_type } else { 0 }
}

/// Reads into `parts`, or writes from them, at `offset` on this thread; the number of bytes moved.
///
/// # Safety
/// All parts must be mapped for the whole call, and writable for a read.
pub(super) unsafe fn transfer(file: &File, write: bool, parts: &[libc::iovec], offset: u64) -> io::Result<usize> {
    let (fd, count, offset) = (file.as_raw_fd(), parts.len() as libc::c_int, offset as libc::off_t);
    // SAFETY: the caller's promise; `parts` and the descriptor live through the call.
    let moved = unsafe {
        match write {
            true => libc::pwritev(fd, parts.as_ptr(), count, offset),
            false => libc::preadv(fd, parts.as_ptr(), count, offset),
        }
    };
    usize::try_from(moved).map_err(|_| io::Error::last_os_error())
}

/// Whether holes can be made in a file that is open to write, or a block device. Where nobody says, an attempt will tell.
pub(super) fn can_discard(file: &File, is_block_device: bool) -> io::Result<bool> {
    if is_block_device {
        return Ok(["discard_max_bytes", "write_zeroes_max_bytes"].iter().all(|limit| queue_limit(file, limit) != Some(0)));
    }
    // Past its end there is nothing to lose.
    let past_end = file.metadata()?.len().next_multiple_of(1 << 20) as libc::off_t;
    let mode = libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE;
    // SAFETY: fallocate takes no pointers.
    match check(unsafe { libc::fallocate(file.as_raw_fd(), mode, past_end, 4096) }) {
        Err(error) => Ok(![libc::EOPNOTSUPP, libc::ENOSYS].contains(&error.raw_os_error().unwrap_or(0))),
        Ok(_) => Ok(true),
    }
}

/// A limit of a block device's queue; that of a partition is its disk's.
fn queue_limit(file: &File, name: &str) -> Option<u64> {
    let number = file.metadata().ok()?.rdev();
    let device = format!("/sys/dev/block/{}:{}", libc::major(number), libc::minor(number));
    let read = |queue: &str| std::fs::read_to_string(format!("{device}/{queue}/{name}")).ok();
    read("queue").or_else(|| read("../queue"))?.trim().parse().ok()
}

/// Makes `target` share all data of `source` (reflink).
pub(super) fn share_data(source: &File, target: &File) -> io::Result<()> {
    // SAFETY: FICLONE takes a descriptor by value.
    check(unsafe { libc::ioctl(target.as_raw_fd(), FICLONE, source.as_raw_fd()) }).map(drop)
}

fn seek(file: &File, offset: u64, whence: libc::c_int) -> io::Result<Option<u64>> {
    // SAFETY: lseek takes no pointers; the driver uses no file position, so moving it disturbs nobody.
    let position = unsafe { libc::lseek(file.as_raw_fd(), offset as libc::off_t, whence) };
    if position >= 0 {
        return Ok(Some(position as u64));
    }
    match io::Error::last_os_error() {
        error if error.raw_os_error() == Some(libc::ENXIO) => Ok(None),
        error => Err(error),
    }
}

/// The data and holes of `offset..offset + len`, at most `longest` of them.
pub(super) fn extents(file: &File, offset: u64, len: u64, longest: usize) -> io::Result<Vec<Extent>> {
    let end = offset + len;
    let mut at = offset;
    let mut found: Vec<Extent> = Vec::new();
    while at < end && found.len() < longest {
        let data = seek(file, at, libc::SEEK_DATA)?.unwrap_or(end).min(end);
        if data > at {
            found.push(Extent { len: data - at, kind: ExtentKind::Hole });
        }
        if data == end {
            break;
        }
        let hole = seek(file, data, libc::SEEK_HOLE)?.unwrap_or(end).clamp(data + 1, end);
        found.push(Extent { len: hole - data, kind: ExtentKind::Data });
        at = hole;
    }
    Ok(found)
}
