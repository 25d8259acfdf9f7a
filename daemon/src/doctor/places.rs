//! The folders, sockets and ports that the configuration names.

use std::collections::BTreeSet;
use std::fs;
use std::io::ErrorKind;
use std::net::{TcpListener, ToSocketAddrs};
use std::os::unix::fs::{FileTypeExt, PermissionsExt};
use std::path::{Path, PathBuf};

use rustix::fs::{Access, AtFlags, FlockOperation, accessat};
use volume::keys::Keks;

use super::Finding;
use crate::config::address::check_socket_path;
use crate::config::{Address, Config, KeysConfig, NbdTarget, key_encryption_keys};
use crate::daemon::sockets::{group_id, is_listened_on};
use crate::units::format_size;

/// Less than this free in a pool or in data_dir is too little to go on.
const FREE_MIN: u64 = 64 << 20;

pub fn examine(config: &Config) -> Vec<Finding> {
    let mut findings = vec![data_dir(&config.daemon.data_dir)];
    for (name, pool) in &config.pool {
        if let Some(path) = &pool.path {
            findings.push(folder(&format!("pool {name}"), path));
        }
    }
    if let Some(group) = &config.daemon.socket_group {
        findings.push(match group_id(group) {
            Ok(id) => Finding::ok("socket group", format!("{group} has id {id}")),
            Err(error) => Finding::fail("socket group", error, format!("groupadd {group}, or set [daemon].socket_group")),
        });
    }
    findings.extend(config.keys.as_ref().map(key_encryption_key));
    let running = config.daemon.admin_address().ok().is_some_and(|address| answers(&address));
    findings.extend(addresses(config).iter().map(|(what, address)| listener(what, address, running)));
    findings
}

fn key_encryption_key(keys: &KeysConfig) -> Finding {
    match key_encryption_keys(keys) {
        Ok(Keks { current: Some(kek), previous }) => {
            let previous = previous.map(|kek| format!(", the previous one {}", kek.id())).unwrap_or_default();
            Finding::ok("keys", format!("the key-encryption key is {}{previous}", kek.id()))
        }
        Ok(_) => Finding::fail("keys", "no key-encryption key", "set [keys].file"),
        Err(error) if keys.credential.is_some() => Finding::warn("keys", error.to_string(), "run it within the unit to see"),
        Err(error) => Finding::fail("keys", error.to_string(), "see docs/keys.md"),
    }
}

/// Every address the daemon would listen on, with what for.
fn addresses(config: &Config) -> Vec<(String, Address)> {
    let mut texts = vec![("admin socket".to_owned(), config.daemon.admin.clone())];
    texts.extend(config.daemon.nbd.iter().map(|text| ("NBD".to_owned(), text.clone())));
    texts.extend(config.daemon.metrics.iter().map(|text| ("metrics".to_owned(), format!("tcp:{text}"))));
    for export in &config.export {
        let what = format!("export of {}", export.volume);
        texts.extend(export.vhost_user.iter().map(|path| (what.clone(), format!("unix:{}", path.display()))));
        if let Some(NbdTarget::Own(text)) = &export.nbd {
            texts.push((what, text.clone()));
        }
    }
    let mut seen = BTreeSet::new();
    let parsed = texts.into_iter().filter_map(|(what, text)| Some((what, text.parse::<Address>().ok()?)));
    parsed.filter(|(_, address)| seen.insert(address.to_string())).collect()
}

/// Whether somebody listens there.
fn answers(address: &Address) -> bool {
    match address {
        Address::Unix(path) => is_listened_on(path).unwrap_or(false),
        Address::Tcp { .. } => {
            let host_port = address.host_port().unwrap_or_default();
            std::net::TcpStream::connect(host_port).is_ok()
        }
    }
}

fn listener(what: &str, address: &Address, daemon_runs: bool) -> Finding {
    match address {
        Address::Unix(path) => socket(what, path, daemon_runs),
        Address::Tcp { .. } => port(what, &address.host_port().unwrap_or_default(), daemon_runs),
    }
}

fn socket(what: &str, path: &Path, daemon_runs: bool) -> Finding {
    let shown = path.display();
    if let Err(why) = check_socket_path(&path.to_string_lossy()) {
        return Finding::fail(what, why, "choose a shorter path");
    }
    let folder = path.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new("."));
    // The daemon makes the last folder, and no more.
    let may_make = |error: std::io::Error| error.kind() == ErrorKind::NotFound && folder.parent().is_some_and(may_write);
    if fs::symlink_metadata(folder).is_err_and(may_make) {
        return Finding::ok(what, format!("{shown} can be made, with its folder"));
    }
    if let Err(error) = fs::metadata(folder) {
        return Finding::fail(what, format!("the folder of {shown}: {error}"), format!("mkdir -p {}", folder.display()));
    }
    let is_socket = match fs::symlink_metadata(path) {
        Err(error) if error.kind() == ErrorKind::NotFound => None,
        Err(error) => return Finding::fail(what, format!("{shown}: {error}"), "run as the daemon's user"),
        Ok(metadata) => Some(metadata.file_type().is_socket()),
    };
    match is_socket {
        Some(false) => Finding::fail(what, format!("{shown} is no socket"), "move it away, or choose another path"),
        Some(true) if daemon_runs && is_listened_on(path).unwrap_or(false) => {
            Finding::ok(what, format!("{shown}: a daemon listens"))
        }
        Some(true) if is_listened_on(path).unwrap_or(false) => {
            Finding::fail(what, format!("{shown}: another process listens"), "stop it, or choose another path")
        }
        _ if !may_write(folder) => {
            let user = rustix::process::geteuid().as_raw();
            Finding::fail(what, format!("user {user} may not make {shown}"), "run as the daemon's user, or choose another folder")
        }
        Some(true) => Finding::ok(what, format!("{shown}: left by a daemon that ended; it will be replaced")),
        None => Finding::ok(what, format!("{shown} can be made")),
    }
}

fn may_write(folder: &Path) -> bool {
    accessat(rustix::fs::CWD, folder, Access::WRITE_OK | Access::EXEC_OK, AtFlags::EACCESS).is_ok()
}

fn port(what: &str, host_port: &str, daemon_runs: bool) -> Finding {
    let addresses: Vec<_> = match host_port.to_socket_addrs() {
        Ok(addresses) => addresses.collect(),
        Err(error) => return Finding::fail(what, format!("{host_port}: {error}"), "write an address of this host"),
    };
    match TcpListener::bind(&addresses[..]) {
        Ok(_) => Finding::ok(what, format!("{host_port} is free")),
        Err(error) if error.kind() == ErrorKind::AddrInUse && daemon_runs => {
            Finding::ok(what, format!("{host_port} is taken, as it should be: a daemon runs"))
        }
        Err(error) if error.kind() == ErrorKind::AddrInUse => Finding::fail(
            what,
            format!("{host_port} is taken"),
            format!("see who has it (ss -ltnp), or choose another port: {error}"),
        ),
        Err(error) if error.kind() == ErrorKind::PermissionDenied => Finding::fail(
            what,
            format!("{host_port}: {error}"),
            "choose a port from 1024 up, or give AmbientCapabilities=CAP_NET_BIND_SERVICE",
        ),
        Err(error) => Finding::fail(what, format!("{host_port}: {error}"), "write an address of this host"),
    }
}

fn data_dir(path: &Path) -> Finding {
    let finding = folder("data_dir", path);
    if finding.state != super::State::Ok {
        return finding;
    }
    let shown = path.display();
    if let Ok(metadata) = fs::metadata(path)
        && metadata.permissions().mode() & 0o002 != 0
    {
        return Finding::fail("data_dir", format!("every user may write to {shown}"), format!("chmod 0700 {shown}"));
    }
    match fs::File::open(path.join("lock")) {
        Ok(lock) if rustix::fs::flock(&lock, FlockOperation::NonBlockingLockExclusive).is_err() => {
            Finding::ok("data_dir", format!("{shown}: a daemon runs there"))
        }
        _ => finding,
    }
}

/// A folder the daemon writes to; one that is missing is made, if it may be.
fn folder(what: &str, path: &Path) -> Finding {
    let shown = path.display();
    let existing: PathBuf = path.ancestors().find(|folder| folder.exists()).map_or_else(|| PathBuf::from("/"), Path::to_owned);
    if !existing.is_dir() {
        return Finding::fail(what, format!("{} is no folder", existing.display()), "move it away, or choose another path");
    }
    if !may_write(&existing) {
        let user = rustix::process::geteuid().as_raw();
        let fix = format!("run as the daemon's user, or chown {user} {}", existing.display());
        return Finding::fail(what, format!("user {user} may not write to {}", existing.display()), fix);
    }
    let Ok(state) = rustix::fs::statvfs(&existing) else {
        return Finding::fail(what, format!("{shown} cannot be looked at"), "look at the kernel's log (dmesg)");
    };
    let free = state.f_bavail * state.f_frsize;
    let finding = format!("{shown}{}, {} free", if existing == path { "" } else { " can be made" }, format_size(free));
    if free < FREE_MIN {
        return Finding::warn(what, finding, "make room: writes will fail");
    }
    Finding::ok(what, finding)
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixListener;

    use super::*;
    use crate::doctor::State;

    #[test]
    fn sockets_are_told_apart() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a.sock");
        let state = |runs| socket("x", &path, runs).state;
        assert_eq!(state(false), State::Ok);
        let listener = UnixListener::bind(&path).unwrap();
        assert_eq!((state(false), state(true)), (State::Fail, State::Ok));
        drop(listener);
        assert!(socket("x", &path, false).finding.contains("replaced"));
        fs::remove_file(&path).unwrap();
        fs::write(&path, "").unwrap();
        assert!(socket("x", &path, false).finding.contains("no socket"));
        assert_eq!(socket("x", &folder.path().join("none/a.sock"), false).state, State::Ok);
        assert_eq!(socket("x", &folder.path().join("none/none/a.sock"), false).state, State::Fail);
        assert_eq!(socket("x", &folder.path().join("a".repeat(200)), false).state, State::Fail);
    }

    #[test]
    fn ports_are_told_apart() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap().to_string();
        assert_eq!(port("x", &address, false).state, State::Fail);
        assert_eq!(port("x", &address, true).state, State::Ok);
        drop(listener);
        assert_eq!(port("x", &address, false).state, State::Ok);
        assert_eq!(port("x", "192.0.2.1:1", false).state, State::Fail);
    }

    #[test]
    fn folders_are_told_apart() {
        let place = tempfile::tempdir().unwrap();
        assert!(folder("x", &place.path().join("a/b")).finding.contains("can be made"));
        let file = place.path().join("file");
        fs::write(&file, "").unwrap();
        assert_eq!(folder("x", &file.join("a")).state, State::Fail);
        fs::set_permissions(place.path(), fs::Permissions::from_mode(0o777)).unwrap();
        assert!(data_dir(place.path()).line().contains("chmod 0700"));
    }
}
