//! A few threads for calls that may block and that no ring operation exists for, such as `lseek(SEEK_DATA)`.

use std::sync::OnceLock;
use std::sync::mpsc::{Sender, channel};
use std::sync::{Arc, Mutex};

const THREADS: usize = 2;

type Job = Box<dyn FnOnce() + Send>;

/// Runs `job` on one of a few shared threads, in no promised order. Cheap to call from a data-plane thread.
pub fn run(job: impl FnOnce() + Send + 'static) {
    static POOL: OnceLock<Mutex<Sender<Job>>> = OnceLock::new();
    let pool = POOL.get_or_init(|| {
        let (sender, receiver) = channel::<Job>();
        let receiver = Arc::new(Mutex::new(receiver));
        for number in 0..THREADS {
            let receiver = receiver.clone();
            let work = move || {
                loop {
                    let job = receiver.lock().ok().and_then(|jobs| jobs.recv().ok());
                    let Some(job) = job else { return };
                    job();
                }
            };
            std::thread::Builder::new().name(format!("offload-{number}")).spawn(work).expect("a thread can be started");
        }
        Mutex::new(sender)
    });
    let sender = pool.lock().map(|sender| sender.clone()).unwrap_or_else(|poisoned| poisoned.into_inner().clone());
    let _ = sender.send(Box::new(job));
}
