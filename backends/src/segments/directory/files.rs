//! What the operations do with files. Every function here blocks.

use std::fs::File;
use std::ops::Range;
use std::os::fd::OwnedFd;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};

use bytes::Bytes;
use rustix::fs::{
    AtFlags, Dir, FileType, FlockOperation, Mode, OFlags, fchmod, flock, fstat, openat, renameat, statat, unlinkat,
};
use rustix::io::{Errno, retry_on_intr};

use super::super::names::{folder_of, from_stored, is_part, stored};
use super::super::roots::{self, Stored};
use super::super::{Listed, OBJECT_LEN_MAX, OpenOptions, PoolHeader, StoreError, Tag};
use super::kept::KeptFiles;
use super::layout::{self, HEADER, LOCK, OBJECTS, ROOTS, Temporary, errno_of, file_mode, rename_new};
use super::paced::Pace;
use super::reserve;
use super::sync::{Folders, open_folder, unchanged};

/// The mode of a file whose name is durable.
const SETTLED: Mode = Mode::RUSR;

pub(super) struct Files {
    folders: Folders,
    header: PoolHeader,
    /// `None`: opened read-only.
    temporary: Option<Temporary>,
    next_draft: AtomicU64,
    pace: Pace,
    kept: KeptFiles,
}

/// A temporary file with its content, durable but for its name. Dropped, it is removed.
struct Draft<'a> {
    root: &'a OwnedFd,
    path: String,
    file: File,
    published: bool,
}

impl Draft<'_> {
    /// It has its own name now, which is durable.
    fn settled(self) {
        // Without the mark, readers sync once more.
        let _ = fchmod(&self.file, SETTLED);
    }
}

impl Drop for Draft<'_> {
    fn drop(&mut self) {
        if !self.published {
            // What stays is removed by the next opener.
            let _ = unlinkat(self.root, &self.path, AtFlags::empty());
        }
    }
}

fn path_of(kind: &str, name: &str) -> String {
    format!("{kind}/{}", stored(name))
}

fn folder_path(path: &str) -> &str {
    folder_of(path).0.unwrap_or(".")
}

fn tag_of(root: &Stored) -> Tag {
    Tag(format!("{}-{}", root.counter, &root.hash.to_hex()[..32]))
}

impl Files {
    pub(super) fn open(path: &Path, options: OpenOptions) -> Result<Files, StoreError> {
        let (root, header) = layout::open(path, options.expected, options.read_only)?;
        let temporary = match options.read_only {
            true => None,
            false => Some(Temporary::take(&root).map_err(|error| unchanged(&path.display().to_string(), error))?),
        };
        if temporary.is_some() {
            reserve::keep(&root);
        }
        Ok(Files {
            folders: Folders::new(root),
            header,
            temporary,
            next_draft: AtomicU64::new(0),
            pace: Pace::default(),
            kept: KeptFiles::new(),
        })
    }

    pub(super) fn header(&self) -> PoolHeader {
        self.header
    }

    fn root(&self) -> &OwnedFd {
        self.folders.root()
    }

    pub(super) fn create(&self, name: &str, content: &[Bytes]) -> Result<(), StoreError> {
        let what = format!("object {name}");
        let path = path_of(OBJECTS, name);
        if statat(self.root(), &path, AtFlags::SYMLINK_NOFOLLOW).is_ok() {
            return Err(StoreError::Exists(what));
        }
        let mut draft = self.draft(&what, content)?;
        self.folders.make(folder_path(&path))?;
        match rename_new(self.root(), &draft.path, &path) {
            Ok(()) => draft.published = true,
            Err(Errno::EXIST) => return Err(StoreError::Exists(what)),
            Err(error) => return Err(unchanged(&what, error)),
        }
        self.folders.sync(folder_path(&path))?;
        draft.settled();
        Ok(())
    }

    pub(super) fn read(&self, name: &str, range: Range<u64>) -> Result<Bytes, StoreError> {
        let what = format!("object {name}");
        let Some((file, len)) = self.open_settled(&what, &path_of(OBJECTS, name))? else {
            return Err(StoreError::Absent(what));
        };
        if len > OBJECT_LEN_MAX {
            return Err(StoreError::Refused(format!("{what} has {len} bytes, more than any object: something else wrote it")));
        }
        let part = read_part(&what, &file, range.start.min(len)..range.end.min(len))?;
        self.kept.keep(name, file, len);
        Ok(part)
    }

    /// The same if it takes no time; else `None`.
    pub(super) fn read_at_once(&self, name: &str, range: &Range<u64>) -> Option<Bytes> {
        self.kept.read_at_once(name, range)
    }

    pub(super) fn delete(&self, name: &str) -> Result<(), StoreError> {
        let what = format!("object {name}");
        self.writer(&what)?;
        let path = path_of(OBJECTS, name);
        match unlinkat(self.root(), &path, AtFlags::empty()) {
            Ok(()) | Err(Errno::NOENT) => {}
            Err(error) => return Err(unchanged(&format!("deleting {what}"), error)),
        }
        self.kept.let_go(name);
        // An object that is gone may have been deleted by someone who did not live to make it durable.
        match open_folder(self.root(), folder_path(&path)) {
            Err(Errno::NOENT) => Ok(()),
            _ => self.folders.sync(folder_path(&path)),
        }
    }

    pub(super) fn list(&self, prefix: &str) -> Result<Vec<Listed>, StoreError> {
        let first = folder_of(prefix).0.map(str::to_owned);
        let mut listed = Vec::new();
        let mut folders = vec![first.unwrap_or_default()];
        while let Some(folder) = folders.pop() {
            let within = |part: &str| if folder.is_empty() { part.to_owned() } else { format!("{folder}/{part}") };
            let failed = |error| unchanged(&format!("listing {prefix:?}"), error);
            let path = format!("{OBJECTS}/{folder}");
            let entries = match open_folder(self.root(), path.trim_end_matches('/')).and_then(Dir::read_from) {
                Err(Errno::NOENT | Errno::NOTDIR) => continue,
                entries => entries.map_err(failed)?,
            };
            for entry in entries {
                let entry = entry.map_err(failed)?;
                let Ok(part) = entry.file_name().to_str() else { continue };
                if let Some(last) = from_stored(part) {
                    let name = within(last);
                    if name.starts_with(prefix) {
                        listed.extend(self.len_of(&name)?.map(|len| Listed { name, len }));
                    }
                } else if is_part(part) && [FileType::Directory, FileType::Unknown].contains(&entry.file_type()) {
                    let path = within(part);
                    if path.starts_with(prefix) || prefix.starts_with(&path) {
                        folders.push(path);
                    }
                }
            }
        }
        self.check_there()?;
        listed.sort_unstable_by(|one, other| one.name.cmp(&other.name));
        Ok(listed)
    }

    /// Length of an object; `None` if it is gone meanwhile, or is no file.
    fn len_of(&self, name: &str) -> Result<Option<u64>, StoreError> {
        match statat(self.root(), path_of(OBJECTS, name), AtFlags::SYMLINK_NOFOLLOW) {
            Ok(stat) => Ok((FileType::from_raw_mode(stat.st_mode) == FileType::RegularFile).then_some(stat.st_size as u64)),
            Err(Errno::NOENT) => Ok(None),
            Err(error) => Err(unchanged(&format!("object {name}"), error)),
        }
    }

    pub(super) fn read_root(&self, name: &str) -> Result<Option<(Bytes, Tag)>, StoreError> {
        let current = self.stored_root(name)?;
        Ok(current.map(|current| {
            let tag = tag_of(&current);
            (current.content, tag)
        }))
    }

    fn stored_root(&self, name: &str) -> Result<Option<Stored>, StoreError> {
        let what = format!("root {name}");
        let Some((file, len)) = self.open_settled(&what, &path_of(ROOTS, name))? else { return Ok(None) };
        if len > roots::STORED_LEN_MAX {
            return Err(StoreError::Refused(format!("{what} is damaged: it has {len} bytes")));
        }
        Stored::decode(name, &read_part(&what, &file, 0..len)?).map(Some)
    }

    pub(super) fn swap(&self, name: &str, expected: Option<&Tag>, content: Bytes) -> Result<Tag, StoreError> {
        let what = format!("root {name}");
        self.writer(&what)?;
        let _lock = self.lock().map_err(|error| unchanged(&format!("locking for {what}"), error))?;
        let current = self.stored_root(name)?;
        if current.as_ref().map(tag_of).as_ref() != expected {
            return Err(StoreError::Changed(what));
        }
        let next = current.map_or(0, |current| current.counter).checked_add(1);
        let next = next.ok_or_else(|| StoreError::Refused(format!("{what} was changed too often")))?;
        let next = Stored::new(next, content);
        let path = path_of(ROOTS, name);
        let prepare = || {
            self.folders.make(folder_path(&path))?;
            self.draft(&what, &[next.encode()])
        };
        let mut gave_up = false;
        let mut draft = match prepare() {
            Err(StoreError::NoSpace(_)) if reserve::give_up(self.root()) => {
                gave_up = true;
                prepare()?
            }
            draft => draft?,
        };
        renameat(self.root(), &draft.path, self.root(), &path).map_err(|error| unchanged(&what, error))?;
        draft.published = true;
        self.folders.sync(folder_path(&path))?;
        draft.settled();
        if gave_up {
            reserve::keep(self.root());
        }
        Ok(tag_of(&next))
    }

    /// Keeps other openers from swapping, until it is dropped.
    fn lock(&self) -> Result<OwnedFd, Errno> {
        loop {
            let lock = openat(self.root(), LOCK, OFlags::RDWR | OFlags::CREATE | OFlags::CLOEXEC, file_mode())?;
            retry_on_intr(|| flock(&lock, FlockOperation::LockExclusive))?;
            // Someone may have removed the file meanwhile; then the next ones lock another.
            let there = statat(self.root(), LOCK, AtFlags::SYMLINK_NOFOLLOW);
            if there.is_ok_and(|there| fstat(&lock).is_ok_and(|held| held.st_ino == there.st_ino)) {
                return Ok(lock);
            }
        }
    }

    fn writer(&self, what: &str) -> Result<&Temporary, StoreError> {
        self.folders.check()?;
        self.temporary.as_ref().ok_or_else(|| StoreError::Refused(format!("{what}: the pool was opened read-only")))
    }

    fn draft(&self, what: &str, content: &[Bytes]) -> Result<Draft<'_>, StoreError> {
        let path = self.writer(what)?.path(self.next_draft.fetch_add(1, Ordering::Relaxed));
        let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::CLOEXEC;
        let file = openat(self.root(), &path, flags, file_mode()).map_err(|error| unchanged(what, error))?;
        let draft = Draft { root: self.root(), path, file: File::from(file), published: false };
        let written = self.pace.write(&draft.file, content);
        written.and_then(|()| draft.file.sync_all()).map_err(|error| unchanged(&format!("writing {what}"), errno_of(error)))?;
        Ok(draft)
    }

    /// Opens a file whose name is durable by then, and tells its length; `None` if there is none.
    fn open_settled(&self, what: &str, path: &str) -> Result<Option<(File, u64)>, StoreError> {
        let flags = OFlags::RDONLY | OFlags::CLOEXEC | OFlags::NOFOLLOW | OFlags::NONBLOCK;
        let file = match openat(self.root(), path, flags, Mode::empty()) {
            Ok(file) => file,
            Err(Errno::NOENT) => return self.check_there().map(|()| None),
            Err(error) => return Err(unchanged(&format!("opening {what}"), error)),
        };
        let stat = fstat(&file).map_err(|error| unchanged(what, error))?;
        if FileType::from_raw_mode(stat.st_mode) != FileType::RegularFile {
            return Err(StoreError::Refused(format!("{what} is no file: something else made it")));
        }
        if Mode::from_raw_mode(stat.st_mode).contains(Mode::WUSR) {
            self.folders.settle(folder_path(path))?;
            if self.temporary.is_some() {
                let _ = fchmod(&file, SETTLED);
            }
        }
        Ok(Some((File::from(file), stat.st_size as u64)))
    }

    /// What is not found is missing only if the pool is there at all.
    fn check_there(&self) -> Result<(), StoreError> {
        match statat(self.root(), HEADER, AtFlags::SYMLINK_NOFOLLOW) {
            Ok(_) => Ok(()),
            Err(error) => Err(StoreError::Unknown(format!("the pool's own header cannot be found: {error}"))),
        }
    }
}

/// Reads a part of a file that is there, as all of it was when its length was asked.
fn read_part(what: &str, file: &File, range: Range<u64>) -> Result<Bytes, StoreError> {
    let mut bytes = vec![0; range.end.saturating_sub(range.start) as usize];
    let read = file.read_exact_at(&mut bytes, range.start);
    read.map_err(|error| StoreError::Unknown(format!("reading {what}: {error}")))?;
    Ok(bytes.into())
}
