//! One measurement: workers run, a coordinator moves them from warming up to measuring to stopping, and reports.
//!
//! ```text
//!   coordinator   WarmUp ──► Measure ──────────► Stop
//!                            │ server CPU         │ server CPU
//!   each worker   loop { observe(now); submit; reap; complete(latency) }   own histogram, own CPU clock
//! ```
//!
//! Workers share one atomic byte, read once per turn of their loop.

use std::sync::atomic::{AtomicBool, AtomicU8, Ordering};
use std::time::Duration;

use anyhow::{Context, Result, anyhow};

use crate::clock;
use crate::histogram::Histogram;

const WARM_UP: u8 = 0;
const MEASURE: u8 = 1;
const STOP: u8 = 2;

/// How often the coordinator looks whether a worker has failed.
const CHECK_INTERVAL: Duration = Duration::from_millis(20);

#[derive(Clone, Copy, Debug)]
pub struct Timing {
    pub warm_up: Duration,
    pub measure: Duration,
}

/// Keeps a number of requests in flight until told to stop or until its requests run out, then drains.
pub trait Worker: Send {
    fn run(&mut self, recorder: &mut Recorder<'_>) -> Result<()>;
}

#[derive(Clone, Debug, Default, serde::Serialize)]
pub struct Report {
    pub operations: u64,
    pub seconds: f64,
    pub iops: f64,
    pub p50_us: f64,
    pub p99_us: f64,
    pub max_us: f64,
    /// CPU of all the server process's threads per operation.
    pub server_cpu_us: Option<f64>,
    /// CPU of the generator's threads per operation.
    pub client_cpu_us: f64,
    /// What neither the server nor this process used of the machine, in percent of one core; known while all cores are
    /// kept awake. More than a few percent: something else was running.
    pub other_cpu_percent: Option<f64>,
}

struct Control {
    phase: AtomicU8,
    failed: AtomicBool,
}

/// A worker's view of the phases and its own statistics.
pub struct Recorder<'c> {
    control: &'c Control,
    phase: u8,
    histogram: Histogram,
    wall_ns: u64,
    cpu_ns: u64,
}

impl<'c> Recorder<'c> {
    fn new(control: &'c Control) -> Self {
        Self { control, phase: WARM_UP, histogram: Histogram::default(), wall_ns: 0, cpu_ns: 0 }
    }

    /// Follows the coordinator. False means: submit no more.
    pub fn observe(&mut self, now_ns: u64) -> bool {
        let phase = self.control.phase.load(Ordering::Relaxed);
        if phase != self.phase {
            self.enter(phase, now_ns);
        }
        phase != STOP
    }

    pub fn complete(&mut self, latency_ns: u64) {
        if self.phase == MEASURE {
            self.histogram.record(latency_ns);
        }
    }

    #[cold]
    fn enter(&mut self, phase: u8, now_ns: u64) {
        let cpu_ns = clock::thread_cpu_ns();
        if phase == MEASURE {
            (self.wall_ns, self.cpu_ns) = (now_ns, cpu_ns);
        } else if self.phase == MEASURE {
            self.wall_ns = now_ns - self.wall_ns;
            self.cpu_ns = cpu_ns - self.cpu_ns;
        }
        self.phase = phase;
    }
}

/// Runs the workers through all phases. `server` is the process whose CPU time is reported.
pub fn measure<W: Worker>(workers: &mut [W], timing: Timing, server: Option<u32>) -> Result<Report> {
    let control = Control { phase: AtomicU8::new(WARM_UP), failed: AtomicBool::new(false) };
    let mut server_ns = None;
    let finished = with_workers(workers, &control, || {
        wait(&control, timing.warm_up);
        let before = server_cpu(server)?;
        control.phase.store(MEASURE, Ordering::Relaxed);
        wait(&control, timing.measure);
        server_ns = server_cpu(server)?.zip(before).map(|(after, before)| after - before);
        Ok(())
    })?;
    Ok(summarise(&finished, server_ns))
}

/// Runs workers whose requests end by themselves, to the end.
pub fn run_to_end<W: Worker>(workers: &mut [W]) -> Result<()> {
    let control = Control { phase: AtomicU8::new(MEASURE), failed: AtomicBool::new(false) };
    std::thread::scope(|scope| {
        let threads: Vec<_> = workers.iter_mut().map(|worker| scope.spawn(|| worker.run(&mut Recorder::new(&control)))).collect();
        threads.into_iter().try_for_each(|thread| thread.join().map_err(|_| anyhow!("a load thread panicked"))?)
    })
}

fn with_workers<'c, W: Worker>(
    workers: &mut [W],
    control: &'c Control,
    coordinate: impl FnOnce() -> Result<()>,
) -> Result<Vec<Recorder<'c>>> {
    std::thread::scope(|scope| {
        let start = |worker: &'_ mut W| -> Result<Recorder<'c>> {
            let mut recorder = Recorder::new(control);
            let result = worker.run(&mut recorder);
            if result.is_err() {
                control.failed.store(true, Ordering::Relaxed);
            }
            result.map(|()| recorder)
        };
        let threads: Vec<_> = workers.iter_mut().map(|worker| scope.spawn(move || start(worker))).collect();
        let coordinated = coordinate();
        control.phase.store(STOP, Ordering::Relaxed);
        let finished: Result<Vec<_>> =
            threads.into_iter().map(|thread| thread.join().map_err(|_| anyhow!("a load thread panicked"))?).collect();
        coordinated?;
        finished
    })
}

fn wait(control: &Control, time: Duration) {
    let end = clock::now_ns() + time.as_nanos() as u64;
    while !control.failed.load(Ordering::Relaxed) {
        let left = end.saturating_sub(clock::now_ns());
        if left == 0 {
            break;
        }
        std::thread::sleep(CHECK_INTERVAL.min(Duration::from_nanos(left)));
    }
}

fn server_cpu(server: Option<u32>) -> Result<Option<u64>> {
    server.map(|pid| clock::process_cpu_ns(pid).with_context(|| format!("read the CPU time of server process {pid}"))).transpose()
}

fn summarise(recorders: &[Recorder<'_>], server_ns: Option<u64>) -> Report {
    let mut all = Histogram::default();
    let (mut cpu_ns, mut iops, mut seconds) = (0, 0.0, 0.0f64);
    for recorder in recorders {
        let wall = recorder.wall_ns as f64 / 1e9;
        iops += recorder.histogram.count() as f64 / wall.max(1e-9);
        seconds = seconds.max(wall);
        cpu_ns += recorder.cpu_ns;
        all.merge(&recorder.histogram);
    }
    let per_operation = |ns: u64| ns as f64 / 1e3 / all.count().max(1) as f64;
    Report {
        operations: all.count(),
        seconds,
        iops,
        p50_us: all.quantile(0.5) as f64 / 1e3,
        p99_us: all.quantile(0.99) as f64 / 1e3,
        max_us: all.max() as f64 / 1e3,
        server_cpu_us: server_ns.map(per_operation),
        client_cpu_us: per_operation(cpu_ns),
        other_cpu_percent: None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Sleeper {
        fail: bool,
    }

    impl Worker for Sleeper {
        fn run(&mut self, recorder: &mut Recorder<'_>) -> Result<()> {
            while recorder.observe(clock::now_ns()) {
                if self.fail {
                    anyhow::bail!("the server went away");
                }
                std::thread::sleep(Duration::from_millis(1));
                recorder.complete(1_000_000);
            }
            Ok(())
        }
    }

    const TIMING: Timing = Timing { warm_up: Duration::from_millis(30), measure: Duration::from_millis(100) };

    #[test]
    fn only_the_measured_phase_counts() {
        let report = measure(&mut [Sleeper { fail: false }, Sleeper { fail: false }], TIMING, Some(std::process::id())).unwrap();
        assert!(report.operations > 0 && report.operations <= 2 * 130, "{report:?}");
        assert!(report.seconds >= 0.09, "{report:?}");
        assert!((990.0..=1010.0).contains(&report.p50_us), "{report:?}");
        assert!(report.server_cpu_us.is_some());
    }

    #[test]
    fn a_failing_worker_ends_the_measurement_with_its_error() {
        let timing = Timing { warm_up: Duration::from_secs(600), ..TIMING };
        let error = measure(&mut [Sleeper { fail: false }, Sleeper { fail: true }], timing, None).unwrap_err();
        assert_eq!(error.to_string(), "the server went away");
    }
}
