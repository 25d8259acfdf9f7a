//! Commands that the daemon carries out as a job: while it works on it, how far it is. The job goes on if this process ends, and Ctrl-C says so.

use std::time::{Duration, Instant};

use serde::de::DeserializeOwned;
use serde_json::json;

use super::progress::Progress;
use super::{Context, interrupt};
use crate::api::types::{JobInfo, JobState};
use crate::client::Client;
use crate::error::Result;

const TURN: Duration = Duration::from_millis(50);
/// Between looks at the job.
const LOOK: Duration = Duration::from_millis(500);

/// Posts to `path`, for which the daemon begins a job of this kind.
pub fn post<T: DeserializeOwned + Send>(context: &Context, kind: &str, path: &str) -> Result<T> {
    run(context, kind, |client| client.post(path, &json!({})))
}

/// Makes a request, for which the daemon begins a job of this kind, and shows its progress until the request is answered.
pub fn run<T: Send>(context: &Context, kind: &str, request: impl FnOnce(&Client) -> Result<T> + Send) -> Result<T> {
    let client = context.client()?;
    let jobs = || client.get::<Vec<JobInfo>>("/v1/jobs").unwrap_or_default();
    let known: Vec<String> = jobs().into_iter().map(|job| job.id).collect();
    let is_ours = |job: &JobInfo| job.state == JobState::Running && job.kind == kind && !known.contains(&job.id);
    let listens = interrupt::listen().is_ok();
    let waiting = std::thread::current();
    std::thread::scope(|scope| {
        let asked = scope.spawn(move || {
            let answer = context.client().and_then(|client| request(&client));
            waiting.unpark();
            answer
        });
        let (mut shown, mut looked): (Option<Progress>, Option<Instant>) = (None, None);
        while !asked.is_finished() {
            std::thread::park_timeout(TURN);
            if listens && interrupt::asked() && !asked.is_finished() {
                shown.iter().for_each(Progress::end);
                leave(kind, jobs().into_iter().find(is_ours).as_ref());
            }
            let now = blockdev::clock::monotonic();
            if now.saturating_duration_since(*looked.get_or_insert(now)) < LOOK {
                continue;
            }
            looked = Some(now);
            let Some(job) = jobs().into_iter().find(is_ours) else { continue };
            let Some(total) = job.total.filter(|total| *total > 0) else { continue };
            shown
                .get_or_insert_with(|| Progress::new(context.output, &format!("{kind} of {}", job.subject), total))
                .show(job.done);
        }
        shown.iter().for_each(Progress::end);
        asked.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    })
}

/// Ends this process, but not the job.
fn leave(kind: &str, job: Option<&JobInfo>) -> ! {
    let state = match job {
        Some(JobInfo { id, subject, .. }) => format!(
            "{kind} of {subject} goes on in the daemon, as job {id}: `novastor job show {id}` shows it, `novastor job wait {id}` waits for it; \
             `novastor job cancel {id}` stops it, if its kind can be stopped"
        ),
        None => format!("{kind} goes on in the daemon, unless it has ended: `novastor job list` shows it"),
    };
    eprintln!("novastor: interrupted: {state}");
    std::process::exit(interrupt::STATUS)
}
