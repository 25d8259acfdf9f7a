//! Which names are durable: folders are made and synced here, and errors get their kind.

use std::collections::HashSet;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::atomic::{AtomicBool, Ordering};

use parking_lot::Mutex;
use rustix::fs::{Mode, OFlags, fsync, mkdirat, openat};
use rustix::io::Errno;

use super::super::StoreError;
use super::super::names::folder_of;

/// An error of a call that changed nothing that anyone can see.
pub(super) fn unchanged(what: &str, error: Errno) -> StoreError {
    let text = format!("{what}: {error}");
    match error {
        Errno::NOSPC | Errno::DQUOT => StoreError::NoSpace(text),
        Errno::ACCESS | Errno::PERM | Errno::ROFS | Errno::FBIG => StoreError::Refused(text),
        _ => StoreError::Unknown(text),
    }
}

/// The folders of a store, by their paths from its root.
pub(super) struct Folders {
    root: OwnedFd,
    /// Folders known to be durable, with all above them. Folders are never removed.
    settled: Mutex<HashSet<String>>,
    failed: AtomicBool,
}

impl Folders {
    pub(super) fn new(root: OwnedFd) -> Folders {
        Folders { root, settled: Mutex::new(HashSet::new()), failed: AtomicBool::new(false) }
    }

    pub(super) fn root(&self) -> &OwnedFd {
        &self.root
    }

    /// Makes a folder durable, and those above it; makes those that are not there.
    pub(super) fn make(&self, path: &str) -> Result<(), StoreError> {
        if self.settled.lock().contains(path) {
            return Ok(());
        }
        if let (Some(above), _) = folder_of(path) {
            self.make(above)?;
            match mkdirat(&self.root, path, Mode::from_raw_mode(0o755)) {
                Ok(()) | Err(Errno::EXIST) => {}
                Err(error) => return Err(unchanged(&format!("making the folder {path}"), error)),
            }
            self.sync(above)?;
        }
        self.settled.lock().insert(path.to_owned());
        Ok(())
    }

    /// Makes durable what was changed in a folder, which is there. Where that fails it is not known what a crash would leave, nor does
    /// a second attempt tell.
    pub(super) fn sync(&self, path: &str) -> Result<(), StoreError> {
        self.check()?;
        let synced = open_folder(&self.root, path).and_then(fsync);
        synced.map_err(|error| {
            self.failed.store(true, Ordering::SeqCst);
            StoreError::Unknown(format!("syncing the folder {path}: {error}"))
        })
    }

    /// Makes a name durable that someone else may have made: its folder, and those above.
    pub(super) fn settle(&self, folder: &str) -> Result<(), StoreError> {
        self.make(folder)?;
        self.sync(folder)
    }

    /// Whether syncs can be relied on.
    pub(super) fn check(&self) -> Result<(), StoreError> {
        if self.failed.load(Ordering::SeqCst) {
            return Err(StoreError::Unknown("a sync failed earlier: the pool must be opened anew".to_owned()));
        }
        Ok(())
    }
}

pub(super) fn open_folder(root: impl AsFd, path: &str) -> Result<OwnedFd, Errno> {
    openat(root, path, OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC | OFlags::NOFOLLOW, Mode::empty())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn after_a_sync_failed_nothing_that_needs_one_succeeds() {
        let folder = tempfile::tempdir().unwrap();
        std::fs::create_dir(folder.path().join("objects")).unwrap();
        let folders = Folders::new(std::fs::File::open(folder.path()).unwrap().into());
        folders.make("objects/w/1").unwrap();
        folders.sync("objects/w/1").unwrap();
        assert!(folder.path().join("objects/w/1").is_dir());
        assert!(matches!(folders.sync("objects/missing"), Err(StoreError::Unknown(_))));
        for path in ["objects", "objects/w/1"] {
            assert!(matches!(folders.sync(path), Err(StoreError::Unknown(_))), "{path}");
            assert!(matches!(folders.settle(path), Err(StoreError::Unknown(_))), "{path}");
        }
    }

    #[test]
    fn errors_of_the_system_have_their_kind() {
        for full in [Errno::NOSPC, Errno::DQUOT] {
            assert!(matches!(unchanged("x", full), StoreError::NoSpace(_)));
        }
        for forbidden in [Errno::ACCESS, Errno::PERM, Errno::ROFS] {
            assert!(matches!(unchanged("x", forbidden), StoreError::Refused(_)));
        }
        for other in [Errno::IO, Errno::NOENT, Errno::STALE] {
            assert!(matches!(unchanged("x", other), StoreError::Unknown(_)));
        }
    }
}
