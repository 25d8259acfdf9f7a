//! The directory itself: made, opened, and rid of what crashed writers left behind.

use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;

use rustix::fs::{
    AtFlags, CWD, Dir, FlockOperation, Mode, OFlags, RenameFlags, flock, fstat, fsync, linkat, mkdirat, openat, renameat_with,
    statat, unlinkat,
};
use rustix::io::Errno;
use uuid::Uuid;

use super::super::StoreError;
use super::super::header::{HEADER_LEN, PoolHeader};
use super::sync::{open_folder, unchanged};

pub(super) const OBJECTS: &str = "objects";
pub(super) const ROOTS: &str = "roots";
pub(super) const LOCK: &str = "lock";
pub(super) const HEADER: &str = "pool";
const TEMPORARY: &str = "temporary";

/// Openers of one directory at a time, at most.
const OPENERS_MAX: u32 = 4096;

pub(super) fn file_mode() -> Mode {
    Mode::from_raw_mode(0o600)
}

/// Makes a pool: everything else first, its header last, so that a pool with a header is complete.
pub(super) fn make(path: &Path, header: &PoolHeader) -> Result<(), StoreError> {
    let shown = path.display().to_string();
    let failed = |error| unchanged(&format!("making a pool in {shown}"), error);
    let is_new = match mkdirat(CWD, path, Mode::from_raw_mode(0o755)) {
        Ok(()) => true,
        Err(Errno::EXIST) => false,
        Err(error) => return Err(failed(error)),
    };
    let root = open_root(path)?;
    if !is_new {
        check_usable(&root, &shown)?;
    }
    for folder in [OBJECTS, ROOTS, TEMPORARY] {
        make_folder(&root, folder).map_err(failed)?;
    }
    fsync(&root).map_err(failed)?;
    let temporary = Temporary::take(&root).map_err(failed)?;
    let draft = temporary.path(0);
    write_draft(&root, &draft, header).map_err(failed)?;
    let published = rename_new(&root, &draft, HEADER);
    if published == Err(Errno::EXIST) {
        return Err(StoreError::Exists(format!("{shown}: a pool made at the same time")));
    }
    published.and_then(|()| fsync(&root)).map_err(failed)?;
    let parent = path.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."));
    let parent = openat(CWD, parent, OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty());
    parent.and_then(fsync).map_err(failed)
}

fn write_draft(root: &OwnedFd, path: &str, header: &PoolHeader) -> Result<(), Errno> {
    let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::CLOEXEC;
    let mut draft = File::from(openat(root, path, flags, file_mode())?);
    draft.write_all(&header.encode()).and_then(|()| draft.sync_all()).map_err(errno_of)
}

/// The number of an error of the standard library.
pub(super) fn errno_of(error: std::io::Error) -> Errno {
    Errno::from_io_error(&error).unwrap_or(Errno::IO)
}

/// A pool may be made where there is nothing, or what an interrupted making left.
fn check_usable(root: &OwnedFd, shown: &str) -> Result<(), StoreError> {
    if statat(root, HEADER, AtFlags::SYMLINK_NOFOLLOW).is_ok() {
        return Err(StoreError::Exists(format!("{shown}: a pool")));
    }
    for name in entries(root, ".").map_err(|error| unchanged(shown, error))? {
        match name.as_str() {
            TEMPORARY | LOCK | "lost+found" => {}
            OBJECTS | ROOTS if entries(root, &name).is_ok_and(|inside| inside.is_empty()) => {}
            other => return Err(StoreError::Refused(format!("{shown} holds {other:?}: a pool is made in an empty directory"))),
        }
    }
    Ok(())
}

/// Names in a folder; those that are no UTF-8 with replacement characters.
pub(super) fn entries(root: &OwnedFd, path: &str) -> Result<Vec<String>, Errno> {
    let mut names = Vec::new();
    for entry in Dir::read_from(open_folder(root, path)?)? {
        let name = entry?.file_name().to_string_lossy().into_owned();
        if name != "." && name != ".." {
            names.push(name);
        }
    }
    Ok(names)
}

fn make_folder(root: &OwnedFd, name: &str) -> Result<(), Errno> {
    match mkdirat(root, name, Mode::from_raw_mode(0o755)) {
        Err(error) if error != Errno::EXIST => Err(error),
        _ => Ok(()),
    }
}

fn open_root(path: &Path) -> Result<OwnedFd, StoreError> {
    let opened = openat(CWD, path, OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty());
    opened.map_err(|error| match error {
        Errno::NOENT => StoreError::Absent(format!("the pool directory {}", path.display())),
        error => unchanged(&format!("opening the pool directory {}", path.display()), error),
    })
}

/// Opens a pool that was made whole, and is the expected one.
pub(super) fn open(path: &Path, expected: Option<Uuid>, read_only: bool) -> Result<(OwnedFd, PoolHeader), StoreError> {
    let root = open_root(path)?;
    let shown = path.display().to_string();
    let refused = |cause: &str| Err(StoreError::Refused(format!("{shown}: {cause}")));
    let is_there = |name: &str| open_folder(&root, name).is_ok();
    let header = match read_header(&root, &shown) {
        Ok(Some(header)) => header,
        Ok(None) if is_there(OBJECTS) || is_there(ROOTS) => {
            return refused("the file `pool` is missing: the pool was copied in part, or its making was interrupted");
        }
        Ok(None) => return refused("this is no pool of novastor: the file `pool` is missing"),
        Err(error) => return Err(error),
    };
    header.check(&shown, expected, read_only)?;
    if let Some(missing) = [OBJECTS, ROOTS].into_iter().find(|name| !is_there(name)) {
        return refused(&format!("the folder `{missing}` is missing: the pool was copied in part, or is damaged"));
    }
    // What an earlier process could not make durable, or did not live to, is durable from here on.
    rustix::fs::syncfs(&root).map_err(|error| StoreError::Unknown(format!("{shown}: syncing: {error}")))?;
    if !read_only {
        make_folder(&root, TEMPORARY).map_err(|error| unchanged(&shown, error))?;
    }
    Ok((root, header))
}

fn read_header(root: &OwnedFd, shown: &str) -> Result<Option<PoolHeader>, StoreError> {
    let failed = |error| unchanged(&format!("{shown}: reading the file `pool`"), error);
    let file = match openat(root, HEADER, OFlags::RDONLY | OFlags::CLOEXEC | OFlags::NONBLOCK, Mode::empty()) {
        Ok(file) => file,
        Err(Errno::NOENT) => return Ok(None),
        Err(error) => return Err(failed(error)),
    };
    let mut bytes = Vec::new();
    let read = File::from(file).take(HEADER_LEN as u64 + 1).read_to_end(&mut bytes);
    read.map_err(|error| failed(errno_of(error)))?;
    PoolHeader::decode(shown, &bytes).map(Some)
}

/// Renames a file unless the new name is taken.
pub(super) fn rename_new(root: &OwnedFd, from: &str, to: &str) -> Result<(), Errno> {
    match renameat_with(root, from, root, to, RenameFlags::NOREPLACE) {
        Err(Errno::INVAL | Errno::NOSYS | Errno::OPNOTSUPP) => {
            linkat(root, from, root, to, AtFlags::empty())?;
            // It has its name; the other one is removed by the next opener at the latest.
            let _ = unlinkat(root, from, AtFlags::empty());
            Ok(())
        }
        renamed => renamed,
    }
}

/// One opener's names for temporary files: nobody else uses or removes them while the lock is held.
pub(super) struct Temporary {
    number: u32,
    _lock: OwnedFd,
}

impl Temporary {
    /// Takes a number that is free, after removing what openers that are gone left behind.
    pub(super) fn take(root: &OwnedFd) -> Result<Temporary, Errno> {
        remove_abandoned(root)?;
        for number in 0..OPENERS_MAX {
            let path = format!("{TEMPORARY}/{number}.lock");
            let flags = OFlags::RDWR | OFlags::CREATE | OFlags::EXCL | OFlags::CLOEXEC;
            match openat(root, &path, flags, file_mode()) {
                Ok(lock) if try_lock(root, &lock, &path)? => return Ok(Temporary { number, _lock: lock }),
                Ok(_) | Err(Errno::EXIST) => {}
                Err(error) => return Err(error),
            }
        }
        Err(Errno::USERS)
    }

    /// The path of this opener's temporary file of that number.
    pub(super) fn path(&self, file: u64) -> String {
        format!("{TEMPORARY}/{}.{file}", self.number)
    }
}

/// Locks a file without waiting; false if another has it, or if the path is another file by now.
fn try_lock(root: &OwnedFd, lock: impl AsFd, path: &str) -> Result<bool, Errno> {
    match flock(&lock, FlockOperation::NonBlockingLockExclusive) {
        Err(Errno::WOULDBLOCK) => return Ok(false),
        locked => locked?,
    }
    match statat(root, path, AtFlags::SYMLINK_NOFOLLOW) {
        Ok(there) => Ok(there.st_ino == fstat(&lock)?.st_ino),
        Err(Errno::NOENT) => Ok(false),
        Err(error) => Err(error),
    }
}

/// Removes the files of openers whose lock nobody holds.
fn remove_abandoned(root: &OwnedFd) -> Result<(), Errno> {
    let names = entries(root, TEMPORARY)?;
    for number in names.iter().filter_map(|name| name.strip_suffix(".lock")) {
        let lock_path = format!("{TEMPORARY}/{number}.lock");
        let lock = match openat(root, &lock_path, OFlags::RDWR | OFlags::CLOEXEC | OFlags::NOFOLLOW, Mode::empty()) {
            Ok(lock) => lock,
            Err(Errno::NOENT) => continue,
            Err(error) => return Err(error),
        };
        if !try_lock(root, &lock, &lock_path)? {
            continue;
        }
        let files = |name: &&String| name.split_once('.').is_some_and(|(owner, file)| owner == number && file != "lock");
        for name in entries(root, TEMPORARY)?.iter().filter(files) {
            remove(root, &format!("{TEMPORARY}/{name}"))?;
        }
        remove(root, &lock_path)?;
    }
    Ok(())
}

fn remove(root: &OwnedFd, path: &str) -> Result<(), Errno> {
    match unlinkat(root, path, AtFlags::empty()) {
        Err(error) if error != Errno::NOENT => Err(error),
        _ => Ok(()),
    }
}
