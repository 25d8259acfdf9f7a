//! Time and CPU time as the kernel counts them. A load generator measures the real world, so nothing here can be replaced.

use std::io;

use rustix::time::{ClockId, Timespec, clock_gettime};

/// Nanoseconds of the monotonic clock.
pub fn now_ns() -> u64 {
    nanoseconds(clock_gettime(ClockId::Monotonic))
}

/// CPU nanoseconds used by the calling thread.
pub fn thread_cpu_ns() -> u64 {
    nanoseconds(clock_gettime(ClockId::ThreadCPUTime))
}

/// CPU nanoseconds used by all threads of this process.
pub fn own_cpu_ns() -> u64 {
    nanoseconds(clock_gettime(ClockId::ProcessCPUTime))
}

/// CPU nanoseconds, user and system, used by all threads that process `pid` has or had.
pub fn process_cpu_ns(pid: u32) -> io::Result<u64> {
    let mut clock = 0;
    let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: both pointers are to live locals of the types the calls expect.
    let error = unsafe { libc::clock_getcpuclockid(pid as libc::pid_t, &mut clock) };
    if error != 0 {
        return Err(io::Error::from_raw_os_error(error));
    }
    // SAFETY: as above; `clock` was just filled in.
    if unsafe { libc::clock_gettime(clock, &mut time) } != 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(time.tv_sec as u64 * 1_000_000_000 + time.tv_nsec as u64)
}

fn nanoseconds(time: Timespec) -> u64 {
    time.tv_sec as u64 * 1_000_000_000 + time.tv_nsec as u64
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_busy_thread_shows_in_its_own_clock_and_in_that_of_its_process() {
        let (thread_before, process_before) = (thread_cpu_ns(), process_cpu_ns(std::process::id()).unwrap());
        let mut value = 1u64;
        while thread_cpu_ns() - thread_before < 20_000_000 {
            value = std::hint::black_box(value.wrapping_mul(3));
        }
        let process_used = process_cpu_ns(std::process::id()).unwrap() - process_before;
        assert!(process_used >= 19_000_000, "process clock moved by {process_used} ns");
    }

    #[test]
    fn a_process_that_does_not_exist_is_an_error() {
        assert!(process_cpu_ns(1 << 22).is_err());
    }
}
