//! Where listening sockets come from, and where they go.
//!
//! ```text
//!   opened by a socket unit ───────────────────────────┐
//!   kept by the service manager since an earlier run ──┼─▶ listener + Hold ─▶ dropped: taken from the manager and from its
//!   opened here, and given to it to keep ──────────────┘                      folder, unless the daemon ends
//! ```
//!
//! Invariants: a socket that the service manager keeps goes on listening when this process is killed or restarted, so that
//! clients wait instead of being refused; one that nothing is served on once the daemon is ready is closed there too. A socket unit's sockets
//! are never closed for others, nor their files removed.

use std::net::TcpListener;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::MetadataExt;
use std::os::unix::net::UnixListener;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use parking_lot::Mutex;
use rustix::net::Shutdown;

use super::sockets::{SocketFile, SocketRules, listen_tcp, listen_unix};
use super::systemd::{self, PassedSocket};
use crate::config::Address;
use crate::error::{Error, Result};

/// Before the names of sockets that this daemon had kept.
const MARK: &str = "novastor";

/// The sockets passed to this process, and the way to new ones.
#[derive(Default)]
pub struct Listeners {
    passed: Mutex<Vec<Passed>>,
    ending: Arc<AtomicBool>,
}

struct Passed {
    key: String,
    socket: OwnedFd,
    /// Of a socket that the service manager keeps; a socket unit's has neither name nor file.
    name: Option<String>,
    file: Option<SocketFile>,
}

/// What the rest of the host sees of a listening socket: its file, and the service manager's copy. Dropping it takes both away.
pub struct Hold {
    file: Option<SocketFile>,
    kept: Option<Kept>,
    ending: Arc<AtomicBool>,
}

/// A socket of which the service manager has a copy.
struct Kept {
    name: String,
    socket: OwnedFd,
}

impl Listeners {
    /// Takes what the service manager passed to this process; only once.
    pub fn take_passed() -> Listeners {
        let listeners = Listeners::default();
        listeners.passed.lock().extend(systemd::take_passed().into_iter().map(Passed::from));
        listeners
    }

    /// Adds a socket that was opened elsewhere.
    pub fn add(&self, address: &Address, socket: OwnedFd) {
        self.passed.lock().push(Passed { key: key_of(address), socket, name: None, file: None });
    }

    /// Refuses a socket unit's socket that others than its owner can reach: it is taken as it is, and systemd lets everybody in by default.
    pub fn ensure_private(&self, path: &Path) -> Result<()> {
        let key = key_of(&Address::Unix(path.to_owned()));
        if !self.passed.lock().iter().any(|passed| passed.key == key && passed.name.is_none()) {
            return Ok(());
        }
        let shown = path.display();
        let metadata = std::fs::symlink_metadata(path).map_err(|error| Error::io(format!("socket {shown}"), &error))?;
        let mode = metadata.mode() & 0o777;
        if mode & !0o600 == 0 {
            return Ok(());
        }
        Err(Error::invalid(format!(
            "socket {shown} refused: its socket unit gave it mode {mode:04o}: add SocketMode=0600 to that unit"
        )))
    }

    /// Listens on a unix socket: on one that was passed, or on a new one.
    pub fn open_unix(&self, path: &Path, rules: &SocketRules) -> Result<(UnixListener, Hold)> {
        let address = Address::Unix(path.to_owned());
        if let Some((socket, hold)) = self.claim(&address) {
            hold.file.as_ref().map_or(Ok(()), |file| file.dress(rules))?;
            return Ok((socket.into(), hold));
        }
        let (listener, file) = listen_unix(path, rules)?;
        let kept = keep(&address, Some(&file), &listener);
        Ok((listener, self.hold(Some(file), kept)))
    }

    /// The same for a socket that is to be closed when this process ends.
    pub fn open_private(&self, path: &Path, rules: &SocketRules) -> Result<(UnixListener, Hold)> {
        let key = key_of(&Address::Unix(path.to_owned()));
        self.take(|passed| passed.key == key && passed.name.is_some()).into_iter().for_each(|passed| self.close(passed));
        let (listener, file) = listen_unix(path, rules)?;
        Ok((listener, self.hold(Some(file), None)))
    }

    /// Listens on a TCP address: on a socket that was passed, or on a new one.
    pub fn open_tcp(&self, address: &Address) -> Result<(TcpListener, Hold)> {
        if let Some((socket, hold)) = self.claim(address) {
            return Ok((socket.into(), hold));
        }
        let listener = listen_tcp(&address.host_port().unwrap_or_default())?;
        // Port 0 is another one each time.
        let is_any_port = matches!(address, Address::Tcp { port: 0, .. });
        let kept = if is_any_port { None } else { keep(address, None, &listener) };
        Ok((listener, self.hold(None, kept)))
    }

    /// Closes what was passed for other addresses than `wanted`, so that others can listen there.
    pub fn keep_only(&self, wanted: &[Address]) {
        let wanted: Vec<String> = wanted.iter().map(key_of).collect();
        for passed in self.take(|passed| !wanted.contains(&passed.key)) {
            if passed.name.is_none() {
                let key = &passed.key;
                tracing::warn!("socket {key} was passed by the service manager, but the configuration does not name it");
            }
            self.close(passed);
        }
    }

    /// Closes what the service manager kept and nothing is served on yet: a client that waits there had better be refused and
    /// try again. A socket unit's sockets can still be used later.
    pub fn close_unused(&self) {
        self.take(|passed| passed.name.is_some()).into_iter().for_each(|passed| self.close(passed));
    }

    /// From now on, what the service manager keeps stays there, and so do its files: this may be a restart.
    pub fn end(&self) {
        self.ending.store(true, Ordering::SeqCst);
    }

    /// A socket whose file has gone can be reached by nobody: it is closed, and a new one made.
    fn claim(&self, address: &Address) -> Option<(OwnedFd, Hold)> {
        let key = key_of(address);
        let mut chosen = None;
        for passed in self.take(|passed| passed.key == key) {
            if chosen.is_none() && passed.file.as_ref().is_none_or(SocketFile::is_there) {
                chosen = Some(passed);
            } else {
                self.close(passed);
            }
        }
        let Passed { socket, name, file, .. } = chosen?;
        let kept = name.and_then(|name| Some(Kept { name, socket: socket.try_clone().ok()? }));
        Some((socket, self.hold(file, kept)))
    }

    fn close(&self, passed: Passed) {
        let Passed { socket, name, file, .. } = passed;
        if let Some(name) = &name {
            tracing::info!("kept socket {name:?}: nothing is served there now, so it is closed");
        }
        drop(self.hold(file, name.map(|name| Kept { name, socket })));
    }

    fn take(&self, which: impl Fn(&Passed) -> bool) -> Vec<Passed> {
        let mut passed = self.passed.lock();
        let (taken, left) = std::mem::take(&mut *passed).into_iter().partition(which);
        *passed = left;
        taken
    }

    fn hold(&self, file: Option<SocketFile>, kept: Option<Kept>) -> Hold {
        Hold { file, kept, ending: self.ending.clone() }
    }
}

impl From<PassedSocket> for Passed {
    fn from(passed: PassedSocket) -> Passed {
        let PassedSocket { name, address, socket } = passed;
        match parse_name(&name, &address) {
            Some((key, file)) => Passed { key, socket, name: Some(name), file },
            None => Passed { key: key_of(&address), socket, name: None, file: None },
        }
    }
}

impl Drop for Hold {
    fn drop(&mut self) {
        if let Some(Kept { name, socket }) = self.kept.take() {
            if self.ending.load(Ordering::SeqCst) {
                return;
            }
            // In this order: if the manager could not be told, the copy it passes to the next process must still be of use.
            if systemd::keep_no_longer(&name) {
                let _ = rustix::net::shutdown(&socket, Shutdown::Both);
            }
        }
        if let Some(file) = &self.file
            && let Err(error) = file.remove()
        {
            tracing::warn!("socket {} was left behind: {error}", file.path.display());
        }
    }
}

fn keep(address: &Address, file: Option<&SocketFile>, socket: &impl AsFd) -> Option<Kept> {
    let socket = socket.as_fd();
    let name = name_of(address, file);
    let copy = socket.try_clone_to_owned().ok()?;
    systemd::keep(&name, socket).then_some(Kept { name, socket: copy })
}

/// The same for all ways to write an address, and fit for a name at the service manager.
fn key_of(address: &Address) -> String {
    let address = match address {
        Address::Unix(path) => Address::Unix(std::path::absolute(path).unwrap_or_else(|_| path.clone())),
        Address::Tcp { host, port } if host == "localhost" => Address::Tcp { host: "127.0.0.1".to_owned(), port: *port },
        other => other.clone(),
    };
    let fits = |byte: u8| byte.is_ascii_graphic() && byte != b':' && byte != b'%';
    let text = address.to_string();
    text.bytes().map(|byte| if fits(byte) { char::from(byte).to_string() } else { format!("%{byte:02X}") }).collect()
}

/// `novastor KEY`, and device and inode of its file.
fn name_of(address: &Address, file: Option<&SocketFile>) -> String {
    let key = key_of(address);
    file.map_or_else(|| format!("{MARK} {key}"), |file| format!("{MARK} {key} {} {}", file.device, file.inode))
}

/// Reads [`name_of`]; the path is the one that the socket is bound to.
fn parse_name(name: &str, address: &Address) -> Option<(String, Option<SocketFile>)> {
    let mut words = name.split(' ');
    let key = words.next().filter(|mark| *mark == MARK).and_then(|_| words.next())?.to_owned();
    match (address.unix_path(), words.next(), words.next()) {
        (None, None, None) => Some((key, None)),
        (Some(path), Some(device), Some(inode)) => {
            let (device, inode) = (device.parse().ok()?, inode.parse().ok()?);
            Some((key, Some(SocketFile { path: path.clone(), device, inode })))
        }
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rules(folder: &Path) -> SocketRules {
        SocketRules { folders: vec![folder.to_owned()], mode: 0o600, group: None }
    }

    /// As the service manager passes it.
    fn pass(listeners: &Listeners, name: &str, address: &Address, socket: OwnedFd) {
        let passed = PassedSocket { name: name.to_owned(), address: address.clone(), socket };
        listeners.passed.lock().push(passed.into());
    }

    #[test]
    fn names_tell_sockets_apart() {
        let path = Path::new("/run/a b:%.sock");
        let (address, file) = (Address::Unix(path.to_owned()), SocketFile { path: path.to_owned(), device: 5, inode: 77 });
        let name = name_of(&address, Some(&file));
        assert_eq!(name, "novastor unix%3A/run/a%20b%3A%25.sock 5 77");
        assert_eq!(parse_name(&name, &address), Some((key_of(&address), Some(file))));
        let address: Address = "tcp:[::1]:10809".parse().unwrap();
        assert_eq!(parse_name(&name_of(&address, None), &address), Some((key_of(&address), None)));
        for other in ["novastor.socket", "", "novastor", "unknown", name.as_str()] {
            assert_eq!(parse_name(other, &address), None, "{other}");
        }
        assert_eq!(key_of(&"tcp:localhost:1".parse().unwrap()), key_of(&"tcp:127.0.0.1:1".parse().unwrap()));
    }

    #[test]
    fn a_kept_socket_is_used_again_and_its_file_goes_with_it() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a.sock");
        let address = Address::Unix(path.clone());
        let (earlier, file) = listen_unix(&path, &rules(folder.path())).unwrap();
        let listeners = Listeners::default();
        pass(&listeners, &name_of(&address, Some(&file)), &address, earlier.into());
        let (listener, hold) = listeners.open_unix(&path, &rules(folder.path())).unwrap();
        assert!(file.is_there(), "it is the same socket");
        drop(hold);
        assert!(!path.exists());
        assert!(std::os::unix::net::UnixStream::connect(&path).is_err());
        drop(listener);
    }

    #[test]
    fn a_kept_socket_whose_file_has_gone_is_replaced() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a.sock");
        let address = Address::Unix(path.clone());
        let (earlier, file) = listen_unix(&path, &rules(folder.path())).unwrap();
        std::fs::remove_file(&path).unwrap();
        let listeners = Listeners::default();
        pass(&listeners, &name_of(&address, Some(&file)), &address, earlier.into());
        let (_listener, _hold) = listeners.open_unix(&path, &rules(folder.path())).unwrap();
        assert!(std::os::unix::net::UnixStream::connect(&path).is_ok());
    }

    #[test]
    fn a_socket_units_socket_that_others_can_reach_is_not_private() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a.sock");
        let (socket, _) = listen_unix(&path, &rules(folder.path())).unwrap();
        let listeners = Listeners::default();
        pass(&listeners, "novastor.socket", &Address::Unix(path.clone()), socket.into());
        listeners.ensure_private(&path).unwrap();
        for mode in [0o666, 0o660, 0o604] {
            std::fs::set_permissions(&path, std::os::unix::fs::PermissionsExt::from_mode(mode)).unwrap();
            let refused = listeners.ensure_private(&path).unwrap_err();
            assert!(refused.message.contains("add SocketMode=0600"), "{refused}");
        }
        listeners.ensure_private(&folder.path().join("other.sock")).unwrap();
    }

    #[test]
    fn what_has_no_use_is_closed_and_a_socket_units_file_is_left() {
        let folder = tempfile::tempdir().unwrap();
        let listeners = Listeners::default();
        let mut paths = Vec::new();
        for (name, of_unit) in [("used", false), ("unused", false), ("unit", true)] {
            let path = folder.path().join(name);
            let address = Address::Unix(path.clone());
            let (socket, file) = listen_unix(&path, &rules(folder.path())).unwrap();
            let kept = if of_unit { "novastor.socket".to_owned() } else { name_of(&address, Some(&file)) };
            pass(&listeners, &kept, &address, socket.into());
            paths.push(path);
        }
        listeners.keep_only(&[Address::Unix(paths[0].clone())]);
        assert_eq!(paths.iter().map(|path| path.exists()).collect::<Vec<_>>(), [true, false, true]);
        listeners.close_unused();
        assert!(!paths[0].exists());
        assert_eq!(listeners.passed.lock().len(), 0);
    }
}
