//! A few threads for calls that may block and that no ring operation exists for, such as `lseek(SEEK_DATA)`.

use std::io;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex};

type Job = Box<dyn FnOnce() + Send>;

/// Threads of one's own. Dropped, they do what they were given, and end.
pub struct Offload {
    jobs: Sender<Job>,
}

impl Offload {
    /// Starts `threads` threads, called `name`.
    pub fn start(name: &str, threads: usize) -> io::Result<Offload> {
        Offload::start_nice(name, threads, 0)
    }

    /// The same with threads that step back for others: `nice` as in setpriority(2), 0 to 19.
    pub fn start_nice(name: &str, threads: usize, nice: i32) -> io::Result<Offload> {
        let (jobs, receiver) = channel::<Job>();
        let receiver = Arc::new(Mutex::new(receiver));
        for number in 0..threads {
            let receiver = receiver.clone();
            std::thread::Builder::new().name(format!("{name}-{number}")).spawn(move || {
                step_back(nice);
                work(&receiver);
            })?;
        }
        Ok(Offload { jobs })
    }

    /// Runs `job` on one of the threads, in no promised order. Cheap to call from a data-plane thread.
    pub fn run(&self, job: impl FnOnce() + Send + 'static) {
        let _ = self.jobs.send(Box::new(job));
    }
}

/// Makes this thread nicer. One that cannot be works all the same.
fn step_back(nice: i32) {
    if nice > 0
        && let Err(error) = rustix::process::setpriority_process(Some(rustix::thread::gettid()), nice)
    {
        tracing::debug!("a thread for work in the background keeps its priority: {error}");
    }
}

fn work(jobs: &Mutex<Receiver<Job>>) {
    loop {
        let job = jobs.lock().ok().and_then(|jobs| jobs.recv().ok());
        let Some(job) = job else { return };
        job();
    }
}
