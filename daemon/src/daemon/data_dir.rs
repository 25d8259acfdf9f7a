//! The folder with what belongs to this host: locked against a second daemon, written atomically.

use std::fs::{self, File, OpenOptions};
use std::io::{ErrorKind, Write};
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::time::Duration;

use parking_lot::Mutex;
use rustix::fs::FlockOperation;
use serde::Serialize;
use serde::de::DeserializeOwned;

use crate::error::{Error, Result};

/// A killed daemon holds its lock until the kernel has torn down its rings.
const PREDECESSOR_WAIT: Duration = Duration::from_secs(2);

/// The locked folder.
pub struct DataDir {
    path: PathBuf,
    _lock: File,
    /// Held by who writes: the file that replaces another has one name.
    writing: Mutex<()>,
}

impl DataDir {
    /// Makes the folder where it is missing, and locks it.
    pub fn open(path: &Path) -> Result<DataDir> {
        let shown = path.display();
        fs::DirBuilder::new().recursive(true).mode(0o700).create(path).map_err(|error| {
            Error::io(format!("data_dir {shown} cannot be made (set [daemon].data_dir to a folder you may write)"), &error)
        })?;
        ensure_private(path)?;
        let lock_path = path.join("lock");
        let lock = OpenOptions::new()
            .create(true)
            .truncate(false)
            .write(true)
            .mode(0o600)
            .custom_flags(libc::O_NOFOLLOW)
            .open(&lock_path);
        let lock = lock.map_err(|error| Error::io(format!("data_dir {shown}: lock file"), &error))?;
        let deadline = blockdev::clock::monotonic() + PREDECESSOR_WAIT;
        while let Err(error) = rustix::fs::flock(&lock, FlockOperation::NonBlockingLockExclusive) {
            if error != rustix::io::Errno::WOULDBLOCK {
                return Err(Error::io(format!("data_dir {shown}: locking"), &error.into()));
            }
            if blockdev::clock::monotonic() >= deadline {
                return Err(Error::in_use(format!(
                    "data_dir {shown} is used by another novastor: stop that one, or give this one a data_dir of its own"
                )));
            }
            std::thread::sleep(Duration::from_millis(5));
        }
        Ok(DataDir { path: path.to_owned(), _lock: lock, writing: Mutex::default() })
    }

    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Reads `name`; the default when there is none.
    pub fn read<T: DeserializeOwned + Default>(&self, name: &str) -> Result<T> {
        let path = self.path.join(name);
        let text = match fs::read(&path) {
            Ok(text) => text,
            Err(error) if error.kind() == ErrorKind::NotFound => return Ok(T::default()),
            Err(error) => return Err(Error::io(path.display(), &error)),
        };
        serde_json::from_slice(&text).map_err(|error| {
            Error::invalid(format!("{}: {error}; restore it, or move it away to start without it", path.display()))
        })
    }

    /// Replaces `name`, durably, or leaves it as it was.
    pub fn write<T: Serialize>(&self, name: &str, value: &T) -> Result<()> {
        let path = self.path.join(name);
        let text = serde_json::to_vec_pretty(value).map_err(|error| Error::internal(error.to_string()))?;
        let _writing = self.writing.lock();
        replace_file(&path, &text).map_err(|error| Error::io(path.display(), &error))
    }
}

/// Refuses a folder in which other users can put what the daemon would take for its own.
fn ensure_private(path: &Path) -> Result<()> {
    let shown = path.display();
    let metadata = fs::metadata(path).map_err(|error| Error::io(format!("data_dir {shown}"), &error))?;
    if metadata.mode() & 0o002 != 0 {
        return Err(Error::invalid(format!("data_dir {shown} refused: every user may write to it: chmod 0700 {shown}")));
    }
    let (owner, user) = (metadata.uid(), rustix::process::geteuid().as_raw());
    if owner != user && owner != 0 {
        return Err(Error::invalid(format!("data_dir {shown} refused: it belongs to user {owner}: chown {user} {shown}")));
    }
    Ok(())
}

/// Replaces a file's content atomically and durably.
pub fn replace_file(path: &Path, content: &[u8]) -> std::io::Result<()> {
    let mut temporary = path.as_os_str().to_owned();
    temporary.push(".new");
    let mut file =
        OpenOptions::new().create(true).truncate(true).write(true).mode(0o600).custom_flags(libc::O_NOFOLLOW).open(&temporary)?;
    file.write_all(content)?;
    file.sync_all()?;
    fs::rename(&temporary, path)?;
    let folder = path.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new("."));
    File::open(folder)?.sync_all()
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::*;
    use crate::error::ErrorKind;

    #[test]
    fn a_folder_that_others_may_write_is_refused() {
        let folder = tempfile::tempdir().unwrap();
        let set_mode = |mode| fs::set_permissions(folder.path(), std::os::unix::fs::PermissionsExt::from_mode(mode)).unwrap();
        set_mode(0o777);
        assert!(DataDir::open(folder.path()).err().unwrap().message.contains("chmod 0700"));
        set_mode(0o750);
        drop(DataDir::open(folder.path()).unwrap());
        if rustix::process::geteuid().is_root() {
            std::os::unix::fs::chown(folder.path(), Some(4711), None).unwrap();
            assert!(DataDir::open(folder.path()).err().unwrap().message.contains("chown 0"));
        }
    }

    #[test]
    fn what_stands_in_the_place_of_a_new_file_is_not_followed() {
        let folder = tempfile::tempdir().unwrap();
        let data_dir = DataDir::open(folder.path()).unwrap();
        let target = folder.path().join("target");
        fs::write(&target, "mine").unwrap();
        std::os::unix::fs::symlink(&target, folder.path().join("x.json.new")).unwrap();
        assert!(data_dir.write("x.json", &1).is_err());
        assert_eq!(fs::read(&target).unwrap(), b"mine");
    }

    #[test]
    fn a_second_daemon_is_refused_and_values_survive() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("data");
        let first = DataDir::open(&path).unwrap();
        let value = BTreeMap::from([("a".to_owned(), 1)]);
        first.write("x.json", &value).unwrap();
        assert_eq!(DataDir::open(&path).err().unwrap().kind, ErrorKind::InUse);
        drop(first);
        let again = DataDir::open(&path).unwrap();
        assert_eq!(again.read::<BTreeMap<String, i32>>("x.json").unwrap(), value);
        assert!(again.read::<BTreeMap<String, i32>>("y.json").unwrap().is_empty());
        std::fs::write(path.join("x.json"), "{").unwrap();
        assert!(again.read::<BTreeMap<String, i32>>("x.json").unwrap_err().message.contains("x.json"));
    }
}
