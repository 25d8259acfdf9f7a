//! Who may write to an image.
//!
//! ```text
//!   no owner ───────────────────────────────────────────────▶ lock
//!   owner, known dead (this host's own dead process) ─┐
//!   owner that no longer watches the image ───────────┴─▶ fence it, break its lock ──▶ lock
//!   owner that watches ─────────────────────────────────────▶ refused
//! ```
//!
//! The lock is librbd's exclusive lock, held until the image is closed; librbd is told to hand it to nobody. Breaking it
//! blocklists the previous client first, so that a write which that client sent before it died, and which is still on its way,
//! is refused by the storage daemons instead of landing on top of ours.
//!
//! A killed client keeps watching until Ceph's `osd_client_watch_timeout` (30 s). Not to wait that long for a restart on the same
//! host, each owner leaves a note with the image that says which process it is: if that process ran under this boot of this
//! kernel and is gone, it is dead for certain. A note that lies costs its author its connection, and nobody any data.

use std::fs;
use std::io;

use blockdev::DeviceError;
use serde::{Deserialize, Serialize};

use super::image::Image;
use super::library::FEATURE_EXCLUSIVE_LOCK;

const NOTE_KEY: &str = "novastor.owner";

/// What the owner of an image leaves with it.
#[derive(Serialize, Deserialize, PartialEq, Eq, Clone, Debug)]
struct Note {
    /// Of the Ceph client, as it stands in the lock.
    address: String,
    host: String,
    boot_id: String,
    /// Inode of the process-id namespace.
    pid_namespace: u64,
    pid: u32,
    /// When the process started, in clock ticks since the boot.
    started: u64,
}

/// Takes the lock of an image that was opened for writing.
pub(super) fn take(image: &Image) -> Result<(), DeviceError> {
    let spec = image.spec();
    let failed = |source| DeviceError::Io { what: format!("image {spec}: its lock cannot be examined"), source };
    if image.features().map_err(failed)? & FEATURE_EXCLUSIVE_LOCK == 0 {
        return Err(DeviceError::Refused(format!(
            "image {spec} cannot be locked, so it is not opened for writing: run `rbd feature enable {spec} exclusive-lock`"
        )));
    }
    if let Some(owner) = owner_of(image)? {
        let note = read_note(image).map_err(failed)?.filter(|note| note.address == owner);
        let watches = image.watchers().map_err(failed)?.contains(&owner);
        if image.context().cluster.address() == Some(owner.as_str()) {
            return Err(DeviceError::Refused(format!("image {spec} is already open for writing in this process")));
        }
        if watches && !note.as_ref().is_some_and(Note::is_dead) {
            return Err(DeviceError::Refused(in_use(&spec, &owner, note.as_ref())));
        }
        fence(image, &owner)?;
    }
    match image.lock() {
        Ok(()) => {}
        Err(error) if matches!(error.raw_os_error(), Some(libc::EROFS | libc::EBUSY | libc::EAGAIN)) => {
            return Err(DeviceError::Refused(format!(
                "image {spec} was taken by another client a moment ago; close it there first"
            )));
        }
        Err(source) => return Err(DeviceError::Io { what: format!("image {spec}: taking its exclusive lock"), source }),
    }
    leave_note(image).map_err(|source| DeviceError::Io { what: format!("image {spec}: noting its owner"), source })
}

fn owner_of(image: &Image) -> Result<Option<String>, DeviceError> {
    image.lock_owner().map_err(|source| match source.raw_os_error() {
        Some(libc::EBUSY) => DeviceError::Refused(format!(
            "image {spec} has a lock that was made by hand: see `rbd lock ls {spec}`",
            spec = image.spec()
        )),
        _ => DeviceError::Io { what: format!("image {}: asking who holds its lock", image.spec()), source },
    })
}

fn in_use(spec: &str, owner: &str, note: Option<&Note>) -> String {
    let holder = match note {
        Some(note) => format!("process {} on host {} ({owner})", note.pid, note.host),
        None => format!("the Ceph client {owner}"),
    };
    format!(
        "image {spec} is open for writing by {holder}; close it there first (a client that died is let go of after about 30 s)"
    )
}

/// Makes sure that nothing of the previous owner can land any more, and takes its lock away.
fn fence(image: &Image, owner: &str) -> Result<(), DeviceError> {
    match image.break_lock(owner) {
        Ok(()) => {
            tracing::warn!("image {}: fenced its previous writer {owner}, which is gone", image.spec());
            Ok(())
        }
        // It let go by itself, or somebody was faster; taking the lock tells which.
        Err(error) if matches!(error.raw_os_error(), Some(libc::ENOENT | libc::EBUSY)) => Ok(()),
        Err(source) => Err(DeviceError::Io {
            what: format!(
                "image {}: fencing its previous writer {owner} (the user needs the capability \"mon 'profile rbd'\")",
                image.spec()
            ),
            source,
        }),
    }
}

fn read_note(image: &Image) -> io::Result<Option<Note>> {
    Ok(image.metadata(NOTE_KEY)?.and_then(|text| serde_json::from_str(&text).ok()))
}

/// Notes this process as the owner. A client that dies before it gets here is let go of by its watch.
fn leave_note(image: &Image) -> io::Result<()> {
    let Some(address) = image.lock_owner()? else { return Err(io::Error::from_raw_os_error(libc::ESTALE)) };
    image.context().cluster.learn_address(&address);
    match Note::of_this_process(address) {
        Ok(note) => image.set_metadata(NOTE_KEY, &serde_json::to_string(&note)?),
        // Without /proc there is no note, and a restart waits for the watch.
        Err(_) => Ok(()),
    }
}

impl Note {
    fn of_this_process(address: String) -> io::Result<Note> {
        let pid = std::process::id();
        Ok(Note {
            address,
            host: line_of("/proc/sys/kernel/hostname")?,
            boot_id: boot_id()?,
            pid_namespace: pid_namespace()?,
            pid,
            started: started_at(pid)?.ok_or_else(|| io::Error::from_raw_os_error(libc::ESRCH))?,
        })
    }

    /// True only if the process is certainly gone: it ran here, under this boot, and does not any more.
    fn is_dead(&self) -> bool {
        let here = boot_id().is_ok_and(|id| id == self.boot_id) && pid_namespace().is_ok_and(|inode| inode == self.pid_namespace);
        here && started_at(self.pid).is_ok_and(|started| started != Some(self.started))
    }
}

fn line_of(path: &str) -> io::Result<String> {
    Ok(fs::read_to_string(path)?.trim().to_owned())
}

fn boot_id() -> io::Result<String> {
    line_of("/proc/sys/kernel/random/boot_id")
}

fn pid_namespace() -> io::Result<u64> {
    use std::os::unix::fs::MetadataExt;
    Ok(fs::metadata("/proc/self/ns/pid")?.ino())
}

/// When a process started, in clock ticks since the boot; `None` if it runs no more. One that was killed and not yet waited for
/// runs no more, once all its threads have ended.
fn started_at(pid: u32) -> io::Result<Option<u64>> {
    match fs::read_to_string(format!("/proc/{pid}/stat")) {
        Ok(line) => parse_stat(&line).ok_or_else(|| io::Error::from_raw_os_error(libc::EINVAL)),
        Err(error) if error.kind() == io::ErrorKind::NotFound || error.raw_os_error() == Some(libc::ESRCH) => Ok(None),
        Err(error) => Err(error),
    }
}

/// The outer `None`: not such a line.
fn parse_stat(line: &str) -> Option<Option<u64>> {
    // The name in parentheses may itself hold spaces and parentheses; fields are counted after it, from the third on.
    let (_, rest) = line.rsplit_once(") ")?;
    let fields: Vec<&str> = rest.split_ascii_whitespace().collect();
    let state = *fields.first()?;
    let threads: u64 = fields.get(17)?.parse().ok()?;
    let started: u64 = fields.get(19)?.parse().ok()?;
    let ended = matches!(state, "Z" | "X") && threads <= 1;
    Some((!ended).then_some(started))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn this_process_is_alive_and_another_start_time_is_not() {
        let note = Note::of_this_process("127.0.0.1:0/1".into()).unwrap();
        assert!(!note.is_dead());
        assert!(Note { started: note.started + 1, ..note.clone() }.is_dead(), "its number was given to another process");
        assert!(!Note { boot_id: "another".into(), started: 0, ..note.clone() }.is_dead(), "nothing is known of another boot");
        assert!(!Note { pid_namespace: 0, started: 0, ..note }.is_dead(), "nor of another namespace");
    }

    #[test]
    fn a_killed_child_is_dead_before_it_is_waited_for() {
        let mut child = std::process::Command::new("sleep").arg("100").spawn().unwrap();
        let pid = child.id();
        let started = started_at(pid).unwrap();
        assert!(started.is_some());
        child.kill().unwrap();
        let deadline = blockdev::clock::monotonic() + std::time::Duration::from_secs(60);
        while started_at(pid).unwrap().is_some() {
            assert!(blockdev::clock::monotonic() < deadline, "the killed child still counts as running");
            std::thread::yield_now();
        }
        child.wait().unwrap();
        assert_eq!(started_at(pid).unwrap(), None);
    }

    #[test]
    fn odd_process_names_are_parsed() {
        let fields = "S 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 3 0 4242 99";
        assert_eq!(parse_stat(&format!("7 (a) b (c) {fields}")), Some(Some(4242)));
        assert_eq!(parse_stat(&format!("7 (x) {}", fields.replacen('S', "Z", 1))), Some(Some(4242)), "other threads live");
        assert_eq!(parse_stat(&format!("7 (x) {}", fields.replacen('S', "Z", 1).replacen(" 3 0 ", " 1 0 ", 1))), Some(None));
        assert_eq!(parse_stat("garbage"), None);
    }
}
