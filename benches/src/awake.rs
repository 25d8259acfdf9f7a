//! Keeps every core from going idle while servers are compared: one thread per core at the lowest scheduling class.
//!
//! A core that sleeps takes many microseconds to answer an interrupt, and how deep it slept depends on what ran before.
//! `SCHED_IDLE` gives way to any other thread, so the servers and the load generator lose nothing to these threads; but a kernel
//! with lazy preemption takes a core from a thread only when that enters the kernel, so these enter it all the time. Without that,
//! whoever is woken by another core waits for the next timer tick: 4 ms.

use std::hint::black_box;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;

use anyhow::{Context, Result};
use rustix::thread::{CpuSet, sched_getaffinity, sched_setaffinity};

/// Cores stay awake until this is dropped.
pub struct Awake {
    stop: Arc<AtomicBool>,
    threads: Vec<JoinHandle<()>>,
}

impl Awake {
    pub fn start() -> Result<Self> {
        let allowed = sched_getaffinity(None).context("read the CPU affinity")?;
        let mut awake = Self { stop: Arc::new(AtomicBool::new(false)), threads: Vec::new() };
        for cpu in (0..CpuSet::MAX_CPU).filter(|cpu| allowed.is_set(*cpu)) {
            let stop = Arc::clone(&awake.stop);
            let thread = std::thread::Builder::new().name(format!("awake-{cpu}"));
            awake.threads.push(thread.spawn(move || spin(cpu, &stop)).context("start a thread that keeps a core awake")?);
        }
        Ok(awake)
    }
}

impl Drop for Awake {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        for thread in self.threads.drain(..) {
            // A thread that could not lower its priority has said so and ended.
            let _ = thread.join();
        }
    }
}

fn spin(cpu: usize, stop: &AtomicBool) {
    let mut only = CpuSet::new();
    only.set(cpu);
    if let Err(error) = sched_setaffinity(None, &only).map_err(std::io::Error::from).and_then(|()| lowest_priority()) {
        eprintln!("core {cpu} is not kept awake: {error}");
        return;
    }
    // Plain arithmetic: the PAUSE instruction makes some hypervisors take the virtual core away.
    let mut value = 1u64;
    while !stop.load(Ordering::Relaxed) {
        for _ in 0..100 {
            value = black_box(value.wrapping_mul(0x9e37_79b9_7f4a_7c15));
        }
        rustix::thread::sched_yield();
    }
}

fn lowest_priority() -> std::io::Result<()> {
    let parameter = libc::sched_param { sched_priority: 0 };
    // SAFETY: the pointer is to a live local; 0 names the calling thread.
    match unsafe { libc::sched_setscheduler(0, libc::SCHED_IDLE, &parameter) } {
        0 => Ok(()),
        _ => Err(std::io::Error::last_os_error()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn starts_one_thread_per_core_and_stops_them() {
        let awake = Awake::start().unwrap();
        assert_eq!(awake.threads.len(), std::thread::available_parallelism().unwrap().get());
        drop(awake);
    }
}
