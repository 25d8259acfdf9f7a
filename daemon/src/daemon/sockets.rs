//! Listening sockets: made only where the configuration allows, with the configured mode and group; a stale socket is replaced,
//! a live one never; a file that is no longer ours is left alone.

use std::fs;
use std::io;
use std::net::{SocketAddr, TcpListener, ToSocketAddrs};
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt};
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::time::Duration;

use rustix::fs::{AtFlags, FileType, Gid, Mode, OFlags, chownat};
use rustix::io::Errno;
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType, connect, socket_with};

use crate::config::Config;
use crate::config::address::{Address, check_socket_path};
use crate::error::{Error, Result};

/// A killed daemon's listener can still accept for a moment.
const PREDECESSOR_WAIT: Duration = Duration::from_secs(2);

/// Where sockets may be made, and how they look.
#[derive(Clone, Debug)]
pub struct SocketRules {
    pub folders: Vec<PathBuf>,
    pub mode: u32,
    pub group: Option<String>,
}

impl SocketRules {
    /// As configured: `socket_dirs`, and the folders of all sockets that the configuration names.
    pub fn from_config(config: &Config) -> SocketRules {
        let mut sockets: Vec<PathBuf> = Vec::new();
        let texts = config.daemon.nbd.iter().chain([&config.daemon.admin]);
        sockets.extend(texts.filter_map(|text| text.parse::<Address>().ok()?.unix_path().cloned()));
        for export in &config.export {
            sockets.extend(export.vhost_user.clone());
            if let Some(crate::config::NbdTarget::Own(text)) = &export.nbd {
                sockets.extend(text.parse::<Address>().ok().and_then(|address| address.unix_path().cloned()));
            }
        }
        let absolute = sockets.iter().filter_map(|socket| std::path::absolute(socket).ok());
        let mut folders: Vec<PathBuf> = absolute.filter_map(|socket| socket.parent().map(Path::to_owned)).collect();
        folders.extend(config.daemon.socket_dirs.iter().cloned());
        folders.sort();
        folders.dedup();
        SocketRules {
            folders,
            mode: crate::config::parse_mode(&config.daemon.socket_mode).unwrap_or(0o600),
            group: config.daemon.socket_group.clone(),
        }
    }

    fn check_folder(&self, path: &Path) -> Result<()> {
        let shown = path.display();
        let folder = path.parent().filter(|_| path.is_absolute() && path.file_name().is_some());
        let folder = folder.ok_or_else(|| Error::invalid(format!("socket {shown}: give an absolute path")))?;
        if self.folders.iter().any(|known| known == folder) {
            make_folder(folder).map_err(|error| Error::io(format!("socket {shown}: making its folder"), &error))?;
        }
        let real = fs::canonicalize(folder).map_err(|error| Error::io(format!("socket {shown}: its folder"), &error))?;
        let allowed = |known: &PathBuf| known == folder || fs::canonicalize(known).is_ok_and(|known| known == real);
        if self.folders.iter().any(allowed) {
            return Ok(());
        }
        let known: Vec<_> = self.folders.iter().map(|known| known.display().to_string()).collect();
        Err(Error::invalid(format!(
            "socket {shown} refused: sockets may be made in {}; add its folder to [daemon].socket_dirs",
            known.join(", ")
        )))
    }
}

/// The file of a listening socket, told apart from any that comes to stand in its place: as long as the socket is open, no other
/// file has its inode.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SocketFile {
    pub path: PathBuf,
    pub device: u64,
    pub inode: u64,
}

impl SocketFile {
    /// The socket at `path` now.
    pub fn at(path: &Path) -> io::Result<SocketFile> {
        let metadata = fs::symlink_metadata(path)?;
        if !metadata.file_type().is_socket() {
            return Err(io::Error::new(io::ErrorKind::AlreadyExists, "something that is no socket is there; move it away"));
        }
        Ok(SocketFile { path: path.to_owned(), device: metadata.dev(), inode: metadata.ino() })
    }

    /// True while its name leads to it.
    pub fn is_there(&self) -> bool {
        SocketFile::at(&self.path).is_ok_and(|now| now == *self)
    }

    /// Removes it, if its name still leads to it.
    pub fn remove(&self) -> io::Result<()> {
        if self.is_there() { fs::remove_file(&self.path) } else { Ok(()) }
    }

    /// Sets its mode and group: of this very socket, whatever its name leads to by then, as others may write to its folder.
    pub fn dress(&self, rules: &SocketRules) -> Result<()> {
        let failed = |error: io::Error| Error::io(format!("socket {}: setting its mode and group", self.path.display()), &error);
        let group = rules.group.as_deref().map(group_id).transpose()?;
        let socket = self.opened().map_err(failed)?;
        if let Some(group) = group {
            chownat(&socket, "", None, Some(Gid::from_raw(group)), AtFlags::EMPTY_PATH).map_err(|error| failed(error.into()))?;
        }
        // A descriptor that is for its path alone takes no fchmod.
        let itself = format!("/proc/self/fd/{}", socket.as_raw_fd());
        fs::set_permissions(itself, fs::Permissions::from_mode(rules.mode)).map_err(failed)
    }

    /// A descriptor of it, for its path alone.
    fn opened(&self) -> io::Result<OwnedFd> {
        let socket = rustix::fs::open(&self.path, OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC, Mode::empty())?;
        let found = rustix::fs::fstat(&socket)?;
        let is_ours = FileType::from_raw_mode(found.st_mode) == FileType::Socket
            && (found.st_dev, found.st_ino) == (self.device, self.inode)
            && found.st_uid == rustix::process::geteuid().as_raw();
        if is_ours { Ok(socket) } else { Err(io::Error::new(io::ErrorKind::AlreadyExists, "something else has taken its place")) }
    }
}

/// Listens on a unix socket at `path`.
pub fn listen_unix(path: &Path, rules: &SocketRules) -> Result<(UnixListener, SocketFile)> {
    let failed = |error: io::Error| Error::io(format!("socket {}", path.display()), &error);
    check_socket_path(&path.to_string_lossy()).map_err(Error::invalid)?;
    rules.check_folder(path)?;
    remove_stale(path)?;
    let listener = UnixListener::bind(path).map_err(failed)?;
    let file = SocketFile::at(path).map_err(failed)?;
    if let Err(error) = file.dress(rules) {
        let _ = file.remove();
        return Err(error);
    }
    Ok((listener, file))
}

/// Whether somebody listens on the socket at `path`. Never waits: a full queue is answered like an empty one.
pub fn is_listened_on(path: &Path) -> io::Result<bool> {
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let socket = socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)?;
    match connect(&socket, &SocketAddrUnix::new(path)?) {
        Ok(()) | Err(Errno::AGAIN) => Ok(true),
        Err(Errno::CONNREFUSED) => Ok(false),
        Err(error) => Err(error.into()),
    }
}

/// Makes a configured folder that is missing, such as one under /run; others may pass through it to their sockets.
fn make_folder(folder: &Path) -> std::io::Result<()> {
    match fs::create_dir(folder) {
        Ok(()) => fs::set_permissions(folder, fs::Permissions::from_mode(0o755)),
        Err(error) if error.kind() == std::io::ErrorKind::AlreadyExists => Ok(()),
        Err(error) => Err(error),
    }
}

/// Removes a socket that nobody listens on; refuses anything else.
fn remove_stale(path: &Path) -> Result<()> {
    let shown = path.display();
    let deadline = blockdev::clock::monotonic() + PREDECESSOR_WAIT;
    loop {
        let found = SocketFile::at(path).and_then(|file| Ok((is_listened_on(path)?, file)));
        match found {
            Ok((false, file)) => {
                return file.remove().map_err(|error| Error::io(format!("socket {shown}: replacing it"), &error));
            }
            Ok((true, _)) if blockdev::clock::monotonic() > deadline => {
                return Err(Error::in_use(format!("socket {shown} refused: another process listens there")));
            }
            Ok((true, _)) => std::thread::sleep(Duration::from_millis(10)),
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {
                return Err(Error::exists(format!("socket {shown} refused: {error}")));
            }
            Err(error) => return Err(Error::io(format!("socket {shown}"), &error)),
        }
    }
}

/// Listens on `HOST:PORT`.
pub fn listen_tcp(host_port: &str) -> Result<TcpListener> {
    let addresses: Vec<SocketAddr> =
        host_port.to_socket_addrs().map_err(|error| Error::io(format!("address {host_port}"), &error))?.collect();
    TcpListener::bind(&addresses[..]).map_err(|error| {
        let advice = match error.kind() {
            std::io::ErrorKind::AddrInUse => " (another process listens there: choose another port)",
            _ => "",
        };
        Error::io(format!("listening on {host_port}{advice}"), &error)
    })
}

/// The id of a group, by name or number.
pub fn group_id(group: &str) -> Result<u32> {
    if let Ok(number) = group.parse() {
        return Ok(number);
    }
    let unknown = || Error::not_found(format!("group {group:?} does not exist: `getent group` lists those that do"));
    let name = std::ffi::CString::new(group).map_err(|_| unknown())?;
    let mut buffer = vec![0; 1 << 16];
    let mut found = std::ptr::null_mut();
    let mut entry = std::mem::MaybeUninit::<libc::group>::uninit();
    // SAFETY: all pointers are to live memory of the lengths given; `found` is null or points to `entry`.
    let status = unsafe { libc::getgrnam_r(name.as_ptr(), entry.as_mut_ptr(), buffer.as_mut_ptr(), buffer.len(), &mut found) };
    if status != 0 || found.is_null() {
        return Err(unknown());
    }
    // SAFETY: a success with a non-null `found` means that `entry` was filled in.
    Ok(unsafe { entry.assume_init() }.gr_gid)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::ErrorKind;

    fn rules(folder: &Path) -> SocketRules {
        SocketRules { folders: vec![folder.to_owned()], mode: 0o640, group: None }
    }

    #[test]
    fn mode_and_group_are_set_and_a_stale_socket_is_replaced() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a.sock");
        let group = rustix::process::getgid().as_raw();
        let rules = SocketRules { group: Some(group.to_string()), ..rules(folder.path()) };
        drop(listen_unix(&path, &rules).unwrap());
        let (listener, _) = listen_unix(&path, &rules).unwrap();
        let metadata = fs::metadata(&path).unwrap();
        assert_eq!((metadata.mode() & 0o777, metadata.gid()), (0o640, group));
        assert_eq!(listen_unix(&path, &rules).unwrap_err().kind, ErrorKind::InUse);
        drop(listener);
    }

    #[test]
    fn what_took_a_sockets_place_keeps_its_mode() {
        let folder = tempfile::tempdir().unwrap();
        let (path, target) = (folder.path().join("a.sock"), folder.path().join("target"));
        fs::write(&target, "").unwrap();
        fs::set_permissions(&target, fs::Permissions::from_mode(0o600)).unwrap();
        let (_listener, file) = listen_unix(&path, &rules(folder.path())).unwrap();
        let away = folder.path().join("away");
        fs::rename(&path, &away).unwrap();
        let dressing =
            SocketRules { mode: 0o666, group: Some(rustix::process::getgid().as_raw().to_string()), ..rules(folder.path()) };
        std::os::unix::fs::symlink(&target, &path).unwrap();
        assert!(file.dress(&dressing).is_err());
        assert_eq!(fs::metadata(&target).unwrap().mode() & 0o777, 0o600);
        fs::remove_file(&path).unwrap();
        std::os::unix::fs::symlink(&away, &path).unwrap();
        assert!(file.dress(&dressing).is_err());
        fs::remove_file(&path).unwrap();
        let _other = UnixListener::bind(&path).unwrap();
        assert!(file.dress(&dressing).is_err(), "another socket is there");
    }

    #[test]
    fn a_listener_that_accepts_nobody_is_a_live_one() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a.sock");
        let listener = socket_with(AddressFamily::UNIX, SocketType::STREAM, SocketFlags::CLOEXEC, None).unwrap();
        rustix::net::bind(&listener, &SocketAddrUnix::new(&path).unwrap()).unwrap();
        rustix::net::listen(&listener, 0).unwrap();
        // Its queue takes one; whoever comes next would wait.
        let _first = std::os::unix::net::UnixStream::connect(&path).unwrap();
        let (sender, receiver) = std::sync::mpsc::channel();
        let rules = rules(folder.path());
        std::thread::spawn(move || sender.send(listen_unix(&path, &rules).map(|_| ())));
        let answer = receiver.recv_timeout(Duration::from_secs(60)).expect("it hangs");
        assert_eq!(answer.unwrap_err().kind, ErrorKind::InUse);
    }

    #[test]
    fn only_the_file_of_its_own_is_removed() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a.sock");
        let (_listener, file) = listen_unix(&path, &rules(folder.path())).unwrap();
        assert!(file.is_there());
        fs::remove_file(&path).unwrap();
        file.remove().unwrap();
        let _other = UnixListener::bind(&path).unwrap();
        assert!(!file.is_there());
        file.remove().unwrap();
        assert!(path.exists());
        SocketFile::at(&path).unwrap().remove().unwrap();
        assert!(!path.exists());
    }

    #[test]
    fn other_folders_and_other_files_are_left_alone() {
        let (folder, other) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let rules = rules(folder.path());
        let refused = listen_unix(&other.path().join("a.sock"), &rules).unwrap_err();
        assert!(refused.message.contains("socket_dirs"), "{refused}");
        let file = folder.path().join("file");
        fs::write(&file, "mine").unwrap();
        assert_eq!(listen_unix(&file, &rules).unwrap_err().kind, ErrorKind::Exists);
        assert_eq!(fs::read(&file).unwrap(), b"mine");
        let link = folder.path().join("link");
        std::os::unix::fs::symlink(&file, &link).unwrap();
        assert_eq!(listen_unix(&link, &rules).unwrap_err().kind, ErrorKind::Exists);
        let escape = folder.path().join("..").join(other.path().file_name().unwrap()).join("a.sock");
        assert!(listen_unix(&escape, &rules).is_err());
        assert!(listen_unix(Path::new("a.sock"), &rules).is_err());
    }

    #[test]
    fn a_configured_folder_is_made_and_no_other() {
        let folder = tempfile::tempdir().unwrap();
        let configured = folder.path().join("run");
        let rules = rules(&configured);
        assert!(listen_unix(&folder.path().join("other/a.sock"), &rules).is_err());
        assert!(!folder.path().join("other").exists());
        drop(listen_unix(&configured.join("a.sock"), &rules).unwrap());
        assert_eq!(fs::metadata(&configured).unwrap().mode() & 0o777, 0o755);
    }

    #[test]
    fn groups_are_found() {
        assert_eq!(group_id("root").unwrap(), 0);
        assert_eq!(group_id("17").unwrap(), 17);
        assert_eq!(group_id("no-such-group-here").unwrap_err().kind, ErrorKind::NotFound);
    }
}
