//! What the process asks of the kernel for itself: enough descriptors, no core dumps, private files.

use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

/// Called once, before anything is opened.
pub fn prepare() {
    // New files and sockets are the daemon's alone until something says otherwise.
    rustix::process::umask(rustix::fs::Mode::from_bits_truncate(0o077));
    let descriptors = getrlimit(Resource::Nofile);
    if let Err(error) = setrlimit(Resource::Nofile, Rlimit { current: descriptors.maximum, ..descriptors }) {
        tracing::warn!("the limit of open files stays at {:?}: {error}", descriptors.current);
    }
    no_core_dumps();
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
