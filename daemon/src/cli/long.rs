//! Commands that the daemon carries out as a job: while it works on it, how far it is.

use std::time::Duration;

use serde::de::DeserializeOwned;
use serde_json::json;

use super::Context;
use super::progress::Progress;
use crate::api::types::{JobInfo, JobState};
use crate::error::Result;

const LOOK: Duration = Duration::from_millis(500);

/// Posts to `path`, and shows the progress of the job of this kind until it is answered. The job goes on if this process ends.
pub fn post<T: DeserializeOwned + Send>(context: &Context, kind: &str, path: &str) -> Result<T> {
    let client = context.client()?;
    let jobs = || client.get::<Vec<JobInfo>>("/v1/jobs").unwrap_or_default();
    let known: Vec<String> = jobs().into_iter().map(|job| job.id).collect();
    let looking = std::thread::current();
    std::thread::scope(|scope| {
        let posted = scope.spawn(move || {
            let answer = context.client().and_then(|client| client.post(path, &json!({})));
            looking.unpark();
            answer
        });
        let mut shown: Option<Progress> = None;
        while !posted.is_finished() {
            std::thread::park_timeout(LOOK);
            let is_ours = |job: &JobInfo| job.state == JobState::Running && job.kind == kind && !known.contains(&job.id);
            let Some(job) = jobs().into_iter().find(is_ours) else { continue };
            let Some(total) = job.total.filter(|total| *total > 0) else { continue };
            shown
                .get_or_insert_with(|| Progress::new(context.output, &format!("{kind} of {}", job.subject), total))
                .show(job.done);
        }
        if let Some(shown) = shown {
            shown.end();
        }
        posted.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    })
}
