//! The kernel and the limits it sets.

use std::fs;
use std::io;

use blockdev::DataPlane;
use blockdev::reactor::DataPlaneOptions;
use rustix::process::{Resource, getrlimit};

use super::Finding;
use crate::units::format_size;

/// The first kernel whose io_uring has everything the data plane uses.
const KERNEL_MIN: (u32, u32) = (6, 1);
/// Open files: an NBD client is one, a vhost-user queue a few.
const NOFILE_MIN: u64 = 1024;
const NOFILE_GOOD: u64 = 65_536;
const MEMLOCK_GOOD: u64 = 8 << 20;
const SHM_GOOD: u64 = 64 << 20;

pub fn examine() -> Vec<Finding> {
    vec![kernel(), io_uring(), nofile(), memlock(), io_flusher(), shm()]
}

fn kernel() -> Finding {
    let name = rustix::system::uname();
    let release = name.release().to_string_lossy().into_owned();
    let mut numbers = release.split(['.', '-', '+']).map_while(|part| part.parse::<u32>().ok());
    let version = (numbers.next().unwrap_or(0), numbers.next().unwrap_or(0));
    let (major, minor) = KERNEL_MIN;
    match version {
        version if version >= KERNEL_MIN => Finding::ok("kernel", release),
        _ => Finding::fail(
            "kernel",
            format!("{release} is older than {major}.{minor}"),
            "boot a newer kernel: its io_uring is needed",
        ),
    }
}

/// Does what the daemon does: starts a data-plane thread with its ring.
fn io_uring() -> Finding {
    match DataPlane::start(DataPlaneOptions { threads: 1, ..Default::default() }) {
        Ok(plane) => {
            drop(plane);
            Finding::ok("io_uring", "works")
        }
        Err(error) => refused(&error, disabled(), seccomp()),
    }
}

/// `kernel.io_uring_disabled`: 1 closes it to those outside a group, 2 to all.
fn disabled() -> Option<u32> {
    fs::read_to_string("/proc/sys/kernel/io_uring_disabled").ok()?.trim().parse().ok()
}

/// True under a seccomp filter, such as a container's.
fn seccomp() -> bool {
    let status = fs::read_to_string("/proc/self/status").unwrap_or_default();
    status.lines().any(|line| line.strip_prefix("Seccomp:").is_some_and(|mode| mode.trim() == "2"))
}

fn refused(error: &io::Error, disabled: Option<u32>, seccomp: bool) -> Finding {
    let fail = |why: &str, fix: &str| Finding::fail("io_uring", format!("refused: {why} ({error})"), fix);
    match (error.raw_os_error(), disabled) {
        (Some(libc::EPERM), Some(2)) => fail("kernel.io_uring_disabled is 2", "sysctl -w kernel.io_uring_disabled=0"),
        (Some(libc::EPERM), Some(1)) => fail(
            "kernel.io_uring_disabled is 1, and this user is not in its group",
            "run as root, put the user into kernel.io_uring_group, or sysctl -w kernel.io_uring_disabled=0",
        ),
        (Some(libc::EPERM | libc::EACCES | libc::ENOSYS), _) if seccomp => fail(
            "a seccomp filter forbids it",
            "allow io_uring_setup, io_uring_enter and io_uring_register: for a container --security-opt seccomp=PROFILE",
        ),
        (Some(libc::EPERM | libc::EACCES), _) => fail("not permitted", "look for a security module that denies it to this user"),
        (Some(libc::ENOSYS), _) => fail("the kernel is built without it", "boot a kernel with CONFIG_IO_URING"),
        (Some(libc::EINVAL), _) => fail("the kernel is too old", "boot Linux 6.1 or newer"),
        (Some(libc::ENOMEM), _) => {
            fail("memory that may be locked is used up", "raise memlock: LimitMEMLOCK=infinity, ulimit -l")
        }
        (Some(libc::EMFILE | libc::ENFILE), _) => {
            fail("no more open files are allowed", "raise nofile: LimitNOFILE=1048576, ulimit -n")
        }
        _ => fail("the kernel says no", "look at the kernel's log (dmesg)"),
    }
}

fn limit_text(limit: Option<u64>, show: impl Fn(u64) -> String) -> String {
    limit.map_or_else(|| "unlimited".to_owned(), show)
}

/// The daemon raises the soft limit to the hard one by itself.
fn nofile() -> Finding {
    let hard = getrlimit(Resource::Nofile).maximum;
    let finding = format!("at most {} open files", limit_text(hard, |limit| limit.to_string()));
    let fix = "LimitNOFILE=1048576 in the unit, or ulimit -Hn";
    match hard.unwrap_or(u64::MAX) {
        limit if limit < NOFILE_MIN => Finding::fail("open files", finding, fix),
        limit if limit < NOFILE_GOOD => Finding::warn("open files", format!("{finding}: enough for few clients"), fix),
        _ => Finding::ok("open files", finding),
    }
}

fn memlock() -> Finding {
    let limit = getrlimit(Resource::Memlock).current;
    let finding = format!("{} of memory may be locked", limit_text(limit, format_size));
    match limit.unwrap_or(u64::MAX) {
        limit if limit < MEMLOCK_GOOD && !rustix::process::geteuid().is_root() => Finding::warn(
            "memlock",
            format!("{finding}: rings or hugepages may be refused"),
            "LimitMEMLOCK=infinity in the unit, or ulimit -l",
        ),
        _ => Finding::ok("memlock", finding),
    }
}

/// Does what the daemon does at its start.
fn io_flusher() -> Finding {
    let what = "memory reclaim";
    match crate::daemon::process::become_io_flusher() {
        Ok(()) => Finding::ok(what, "does not wait for the daemon's own disks (PR_SET_IO_FLUSHER)"),
        Err(error) => Finding::warn(
            what,
            format!("PR_SET_IO_FLUSHER: {error}: a disk served to this very host may hang it when memory is short"),
            "if this host itself attaches disks: run as root, or with AmbientCapabilities=CAP_SYS_RESOURCE in the unit",
        ),
    }
}

fn shm() -> Finding {
    let what = "/dev/shm";
    let fix = "mount -t tmpfs -o size=50% tmpfs /dev/shm (a container: --shm-size)";
    match rustix::fs::statvfs(what) {
        Err(error) => Finding::warn(what, format!("{error}: a guest's memory cannot be shared through it"), fix),
        Ok(state) => {
            let free = state.f_bavail * state.f_frsize;
            let finding = format!("{} free", format_size(free));
            if free < SHM_GOOD {
                return Finding::warn(what, format!("{finding}: a guest's memory does not fit"), fix);
            }
            Finding::ok(what, finding)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::doctor::State;

    #[test]
    fn each_refusal_of_io_uring_has_its_fix() {
        let says = |errno, disabled, seccomp| {
            let finding = refused(&io::Error::from_raw_os_error(errno), disabled, seccomp);
            assert_eq!(finding.state, State::Fail);
            finding.line()
        };
        assert!(says(libc::EPERM, Some(2), false).contains("kernel.io_uring_disabled=0"));
        assert!(says(libc::EPERM, Some(1), true).contains("io_uring_group"));
        assert!(says(libc::EPERM, Some(0), true).contains("seccomp"));
        assert!(says(libc::ENOSYS, None, false).contains("CONFIG_IO_URING"));
        assert!(says(libc::EINVAL, None, false).contains("6.1"));
        assert!(says(libc::ENOMEM, None, false).contains("memlock"));
        assert!(says(libc::EIO, None, false).contains("dmesg"));
    }
}
