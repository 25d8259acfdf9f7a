//! A transfer as its client sees it: begun with the daemon, kept alive while it runs, ended once.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::thread::JoinHandle;
use std::time::Duration;

use crate::api::types::{JobInfo, JobState, TransferCreate, TransferInfo, TransferProgress};
use crate::client::Client;
use crate::error::{ErrorKind, Result};

/// How often the daemon hears of it.
const BEAT: Duration = Duration::from_secs(1);

pub struct Transfer {
    pub info: TransferInfo,
    shared: Arc<Shared>,
    end: Option<Sender<(JobState, Option<String>)>>,
    thread: Option<JoinHandle<()>>,
}

#[derive(Default)]
struct Shared {
    done: AtomicU64,
    /// The daemon wants it to end.
    cancelled: AtomicBool,
}

impl Transfer {
    pub fn begin(client: Client, request: &TransferCreate) -> Result<Transfer> {
        let info: TransferInfo = client.post("/v1/transfers", request)?;
        let shared = Arc::new(Shared::default());
        let (end, ended) = channel();
        let path = format!("/v1/transfers/{}", info.job);
        let beating = shared.clone();
        let thread = std::thread::spawn(move || beat(&client, &path, &beating, &ended));
        Ok(Transfer { info, shared, end: Some(end), thread: Some(thread) })
    }

    pub fn progress(&self, done: u64) {
        self.shared.done.store(done, Ordering::Relaxed);
    }

    /// True once the job was cancelled, or given up by the daemon.
    pub fn is_cancelled(&self) -> bool {
        self.shared.cancelled.load(Ordering::Relaxed)
    }

    /// Tells the daemon what came of it.
    pub fn end(mut self, state: JobState, error: Option<String>) {
        self.conclude(state, error);
    }

    fn conclude(&mut self, state: JobState, error: Option<String>) {
        if let Some(end) = self.end.take() {
            let _ = end.send((state, error));
        }
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

impl Drop for Transfer {
    fn drop(&mut self) {
        self.conclude(JobState::Failed, Some("the client gave it up before it began".to_owned()));
    }
}

/// Reports until the end. What the daemon does not take is no reason to end: the copy itself will tell.
fn beat(client: &Client, path: &str, shared: &Shared, ended: &Receiver<(JobState, Option<String>)>) {
    loop {
        let (state, error) = match ended.recv_timeout(BEAT) {
            Ok((state, error)) => (Some(state), error),
            Err(RecvTimeoutError::Timeout) => (None, None),
            Err(RecvTimeoutError::Disconnected) => return,
        };
        let last = state.is_some();
        let report = TransferProgress { done: shared.done.load(Ordering::Relaxed), state, error };
        match client.put::<JobInfo>(path, &report) {
            Ok(job) if job.state == JobState::Running => {}
            Ok(_) => shared.cancelled.store(true, Ordering::Relaxed),
            Err(error) if error.kind == ErrorKind::NotFound => shared.cancelled.store(true, Ordering::Relaxed),
            Err(_) => {}
        }
        if last {
            return;
        }
    }
}
