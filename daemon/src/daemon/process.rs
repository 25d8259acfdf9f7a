//! What the process asks of the kernel for itself: enough descriptors, no core dumps, private files, and memory while its own
//! host waits for its disks.

use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

/// Called once, before anything is opened and before there are other threads.
pub fn prepare() {
    // New files and sockets are the daemon's alone until something says otherwise.
    rustix::process::umask(rustix::fs::Mode::from_bits_truncate(0o077));
    let descriptors = getrlimit(Resource::Nofile);
    if let Err(error) = setrlimit(Resource::Nofile, Rlimit { current: descriptors.maximum, ..descriptors }) {
        tracing::warn!("the limit of open files stays at {:?}: {error}", descriptors.current);
    }
    no_core_dumps();
    // Not permitted to ordinary users; `novastor doctor` says so.
    let _ = become_io_flusher();
}

/// To get memory, the kernel writes to its disks; a thread that serves one must not wait for that. Threads begun later inherit it.
pub fn become_io_flusher() -> std::io::Result<()> {
    Ok(rustix::process::configure_io_flusher_behavior(true)?)
}

/// A core would hold guests' data and keys. A core helper ignores the limit, so the memory is left out as well.
fn no_core_dumps() {
    let none = Rlimit { current: Some(0), maximum: Some(0) };
    if let Err(error) = setrlimit(Resource::Core, none) {
        tracing::warn!("core dumps stay possible: {error}");
    }
    if let Err(error) = std::fs::write("/proc/self/coredump_filter", "0") {
        tracing::debug!("core dump filter: {error}");
    }
}
