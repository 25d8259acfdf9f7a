//! Zeroes on their way to a plain socket, without a buffer and without a copy: the kernel sends pages of a file that has none.
//!
//! No operation of io_uring does that without a thread of the kernel's for each, so a batch with runs of zeroes is sent by system calls
//! that do not wait; when the socket is full, the connection waits for it to be writable. Before Linux 6.6 `sendfile` may wait for the
//! peer whatever the socket says; there it is not used (docs/decisions/0026-runs-of-zeroes.md).

use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::sync::LazyLock;

use super::batch::Batch;
/// Runs at least this long are worth the system calls.
pub(super) const RUN_MIN: usize = 16 << 10;
/// About as many bytes are sent before other connections have their turn; so long is the file, too.
const TURN_MAX: usize = 1 << 20;
/// The first kernel whose `sendfile` heeds a socket that does not wait.
const KERNEL_MIN: (u32, u32) = (6, 6);

/// A file of zeroes that can never hold anything else.
static FILE: LazyLock<Option<OwnedFd>> = LazyLock::new(|| {
    if kernel() < KERNEL_MIN {
        return None;
    }
    file_of_zeroes().inspect_err(|error| tracing::warn!("zeroes will be copied to clients: no sealed file of them: {error}")).ok()
});

/// True if batches may have runs of zeroes.
pub(super) fn can_be_sent() -> bool {
    FILE.is_some()
}

/// How far a batch came.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Sent {
    Whole,
    /// The rest can be sent once the socket is writable.
    Partly,
}

/// Sends of `batch` what the socket takes now.
pub(super) fn send(socket: &OwnedFd, batch: &mut Batch) -> io::Result<Sent> {
    let _nonblocking = Nonblocking::new(socket)?;
    let mut turn = 0;
    while turn < TURN_MAX {
        let sent = match batch.zeroes_due() {
            0 => send_bytes(socket, batch),
            len => send_zeroes(socket, len.min(TURN_MAX - turn)),
        };
        match sent {
            Ok(len) if batch.advance(len) => return Ok(Sent::Whole),
            Ok(len) => turn += len,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(Sent::Partly),
            Err(error) => return Err(error),
        }
    }
    Ok(Sent::Partly)
}

fn send_bytes(socket: &OwnedFd, batch: &mut Batch) -> io::Result<usize> {
    let more = if batch.is_more() { libc::MSG_MORE } else { 0 };
    let flags = libc::MSG_NOSIGNAL | libc::MSG_DONTWAIT | more;
    // SAFETY: the message points into the batch, which is not changed meanwhile.
    length(unsafe { libc::sendmsg(socket.as_raw_fd(), batch.message(), flags) })
}

fn send_zeroes(socket: &OwnedFd, len: usize) -> io::Result<usize> {
    let file = FILE.as_ref().ok_or(io::ErrorKind::Unsupported)?;
    let mut offset = 0;
    // SAFETY: `offset` is live; both descriptors are owned.
    let sent = unsafe { libc::sendfile(socket.as_raw_fd(), file.as_raw_fd(), &raw mut offset, len) };
    match length(sent)? {
        0 => Err(io::ErrorKind::UnexpectedEof.into()),
        len => Ok(len),
    }
}

fn length(result: libc::ssize_t) -> io::Result<usize> {
    usize::try_from(result).map_err(|_| io::Error::last_os_error())
}

/// Major and minor version of the running kernel; zeroes if it does not say.
fn kernel() -> (u32, u32) {
    // SAFETY: all-zero is a valid utsname, and `uname` fills it in.
    let release = unsafe {
        let mut names: libc::utsname = std::mem::zeroed();
        libc::uname(&raw mut names);
        std::ffi::CStr::from_ptr(names.release.as_ptr()).to_string_lossy().into_owned()
    };
    version(&release)
}

fn version(release: &str) -> (u32, u32) {
    let mut numbers = release.split(|c: char| !c.is_ascii_digit()).map_while(|number| number.parse().ok());
    (numbers.next().unwrap_or(0), numbers.next().unwrap_or(0))
}

fn file_of_zeroes() -> io::Result<OwnedFd> {
    // SAFETY: the name is a C string.
    let file = unsafe { libc::memfd_create(c"zeroes".as_ptr(), libc::MFD_CLOEXEC | libc::MFD_ALLOW_SEALING) };
    if file == -1 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the descriptor is new and nobody else's.
    let file = unsafe { OwnedFd::from_raw_fd(file) };
    let seals = libc::F_SEAL_WRITE | libc::F_SEAL_GROW | libc::F_SEAL_SHRINK | libc::F_SEAL_SEAL;
    // SAFETY: system calls without pointers on a descriptor that is owned.
    let sealed = unsafe {
        libc::ftruncate(file.as_raw_fd(), TURN_MAX as libc::off_t) == 0
            && libc::fcntl(file.as_raw_fd(), libc::F_ADD_SEALS, seals) == 0
    };
    if sealed { Ok(file) } else { Err(io::Error::last_os_error()) }
}

/// A socket that does not wait: `sendfile` has no flag that says so. Whatever io_uring has begun on it has looked before.
struct Nonblocking<'a>(&'a OwnedFd);

impl Nonblocking<'_> {
    fn new(socket: &OwnedFd) -> io::Result<Nonblocking<'_>> {
        set_nonblocking(socket, true)?;
        Ok(Nonblocking(socket))
    }
}

impl Drop for Nonblocking<'_> {
    fn drop(&mut self) {
        // It has just been set, so it can be unset.
        let _ = set_nonblocking(self.0, false);
    }
}

/// Whether calls on `socket` fail rather than wait.
pub(super) fn set_nonblocking(socket: &OwnedFd, nonblocking: bool) -> io::Result<()> {
    let mut nonblocking = libc::c_int::from(nonblocking);
    // SAFETY: FIONBIO reads one integer, which is live.
    match unsafe { libc::ioctl(socket.as_raw_fd(), libc::FIONBIO, &raw mut nonblocking) } {
        -1 => Err(io::Error::last_os_error()),
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn kernels_before_the_first_are_told_from_later_ones() {
        let heeds = |release| version(release) >= KERNEL_MIN;
        assert!(heeds("6.6.0") && heeds("6.12.43+deb13-amd64") && heeds("7.0-rc1") && heeds("10.1"));
        assert!(!heeds("6.5.13") && !heeds("6.1.0-39-amd64") && !heeds("5.15.0") && !heeds("") && !heeds("unknown"));
        assert!(kernel() > (0, 0));
    }
}
