//! `novastor job`.

use serde_json::json;

use super::Context;
use super::arguments::Job;
use super::output::{facts, table};
use crate::api::types::{JobInfo, JobState};
use crate::client::encode;
use crate::units::format_time;

pub fn run(context: &Context, command: Job) -> anyhow::Result<()> {
    let client = context.client()?;
    let path = |id: &str| format!("/v1/jobs/{}", encode(id));
    match command {
        Job::List => {
            let jobs: Vec<JobInfo> = client.get("/v1/jobs")?;
            context.output.print(&jobs, |jobs| list(jobs))
        }
        Job::Show { id } => {
            let job: JobInfo = client.get(&path(&id))?;
            context.output.print(&job, show)
        }
        Job::Wait { id } => {
            let job: JobInfo = client.post(&format!("{}/wait", path(&id)), &json!({}))?;
            context.output.print(&job, show)?;
            match job.state {
                JobState::Done => Ok(()),
                _ => Err(anyhow::anyhow!("job {id}: {}", job.error.unwrap_or_else(|| state(job.state).to_owned()))),
            }
        }
        Job::Cancel { id } => {
            let job: JobInfo = client.post(&format!("{}/cancel", path(&id)), &json!({}))?;
            context.output.print(&job, |_| format!("job {id} stops at its next step"))
        }
    }
}

fn state(state: JobState) -> &'static str {
    match state {
        JobState::Running => "running",
        JobState::Done => "done",
        JobState::Failed => "failed",
        JobState::Cancelled => "cancelled",
        JobState::Interrupted => "interrupted",
    }
}

fn progress(job: &JobInfo) -> String {
    let share = job.total.filter(|total| *total > 0).map(|total| job.done as f64 * 100.0 / total as f64);
    match (job.state, share) {
        (JobState::Running, Some(percent)) => format!("{percent:.0}%"),
        _ => String::new(),
    }
}

fn list(jobs: &[JobInfo]) -> String {
    let row = |job: &JobInfo| {
        let (what, error) = (job.kind.clone(), job.error.clone().unwrap_or_default());
        let started = format_time(job.started);
        [job.id.clone(), what, job.subject.clone(), state(job.state).to_owned(), progress(job), started, error]
    };
    table(["JOB", "WHAT", "OF", "STATE", "PROGRESS", "STARTED", "ERROR"], jobs.iter().map(row))
}

fn show(job: &JobInfo) -> String {
    facts([
        ("job", job.id.clone()),
        ("what", job.kind.clone()),
        ("of", job.subject.clone()),
        ("state", state(job.state).to_owned()),
        ("progress", progress(job)),
        ("started", format_time(job.started)),
        ("ended", job.ended.map(format_time).unwrap_or_default()),
        ("error", job.error.clone().unwrap_or_default()),
    ])
}
