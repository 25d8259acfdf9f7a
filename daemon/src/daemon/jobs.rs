//! Long work: listed, with progress, cancellable where it can stop halfway; it goes on when whoever asked for it has gone.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use parking_lot::Mutex;

use super::data_dir::DataDir;
use crate::api::types::{JobInfo, JobState};
use crate::error::{Error, ErrorKind, Result};
use crate::units::now_unix;

const FILE: &str = "jobs.json";
/// Finished jobs that are remembered.
const HISTORY: usize = 100;
const NO_TOTAL: u64 = u64::MAX;

/// All jobs of this daemon.
pub struct Jobs {
    data_dir: Arc<DataDir>,
    next: AtomicU64,
    jobs: Mutex<BTreeMap<u64, Arc<Job>>>,
    /// Held while the list is taken and written, so that an older one never replaces a newer one.
    saving: Mutex<()>,
}

/// One job.
pub struct Job {
    number: u64,
    kind: String,
    subject: String,
    started: u64,
    done: AtomicU64,
    total: AtomicU64,
    /// It looks, between steps, whether it was cancelled.
    stops_halfway: bool,
    cancelled: AtomicBool,
    outcome: Mutex<Option<Outcome>>,
    ended: tokio::sync::Notify,
}

#[derive(Clone)]
struct Outcome {
    state: JobState,
    error: Option<String>,
    ended: u64,
}

impl Jobs {
    /// Remembers the jobs of earlier runs; those that were running then count as interrupted.
    pub fn restore(data_dir: Arc<DataDir>) -> Result<Jobs> {
        let earlier: Vec<JobInfo> = data_dir.read(FILE)?;
        let jobs: BTreeMap<u64, Arc<Job>> =
            earlier.into_iter().filter_map(Job::from_info).map(|job| (job.number, Arc::new(job))).collect();
        let next = jobs.last_key_value().map_or(1, |(number, _)| number + 1);
        Ok(Jobs { data_dir, next: AtomicU64::new(next), jobs: Mutex::new(jobs), saving: Mutex::default() })
    }

    /// Begins a job that runs to its end.
    pub fn begin(&self, kind: &str, subject: impl Into<String>) -> Arc<Job> {
        self.begin_job(kind, subject.into(), false)
    }

    /// Begins a job that calls [`Job::check_cancelled`] or [`Job::is_cancelled`] again and again.
    pub fn begin_cancellable(&self, kind: &str, subject: impl Into<String>) -> Arc<Job> {
        self.begin_job(kind, subject.into(), true)
    }

    fn begin_job(&self, kind: &str, subject: String, stops_halfway: bool) -> Arc<Job> {
        let number = self.next.fetch_add(1, Ordering::Relaxed);
        let job = Arc::new(Job {
            number,
            kind: kind.to_owned(),
            subject,
            started: now_unix(),
            done: AtomicU64::new(0),
            total: AtomicU64::new(NO_TOTAL),
            stops_halfway,
            cancelled: AtomicBool::new(false),
            outcome: Mutex::new(None),
            ended: tokio::sync::Notify::new(),
        });
        let mut jobs = self.jobs.lock();
        jobs.insert(number, job.clone());
        let finished: Vec<u64> = jobs.values().filter(|job| job.has_ended()).map(|job| job.number).collect();
        for number in finished.iter().take(finished.len().saturating_sub(HISTORY)) {
            jobs.remove(number);
        }
        drop(jobs);
        self.save();
        job
    }

    /// Ends `job` with what came of it.
    pub fn end<T>(&self, job: &Job, result: &Result<T>) {
        match result {
            Ok(_) => self.conclude(job, JobState::Done, None),
            Err(error) if error.kind == ErrorKind::Cancelled => self.conclude(job, JobState::Cancelled, None),
            Err(error) => self.conclude(job, JobState::Failed, Some(error.message.clone())),
        }
    }

    pub fn conclude(&self, job: &Job, state: JobState, error: Option<String>) {
        {
            let mut outcome = job.outcome.lock();
            if outcome.is_some() {
                return;
            }
            *outcome = Some(Outcome { state, error, ended: now_unix() });
        }
        job.ended.notify_waiters();
        self.save();
    }

    pub fn list(&self) -> Vec<JobInfo> {
        self.jobs.lock().values().map(|job| job.info()).collect()
    }

    pub fn get(&self, id: &str) -> Result<Arc<Job>> {
        let number: Option<u64> = id.parse().ok();
        let found = number.and_then(|number| self.jobs.lock().get(&number).cloned());
        found.ok_or_else(|| Error::not_found(format!("job {id:?} does not exist: `novastor job list` shows those that do")))
    }

    /// A job list that cannot be written is no reason to fail the job.
    fn save(&self) {
        let _saving = self.saving.lock();
        if let Err(error) = self.data_dir.write(FILE, &self.list()) {
            tracing::warn!("the list of jobs was not saved: {error}");
        }
    }
}

impl Job {
    fn from_info(info: JobInfo) -> Option<Job> {
        let (state, error) = match info.state {
            JobState::Running => (JobState::Interrupted, Some(next_step(&info.kind))),
            ended => (ended, info.error),
        };
        Some(Job {
            number: info.id.parse().ok()?,
            kind: info.kind,
            subject: info.subject,
            started: info.started,
            done: AtomicU64::new(info.done),
            total: AtomicU64::new(info.total.unwrap_or(NO_TOTAL)),
            stops_halfway: false,
            cancelled: AtomicBool::new(false),
            outcome: Mutex::new(Some(Outcome { state, error, ended: info.ended.unwrap_or(info.started) })),
            ended: tokio::sync::Notify::new(),
        })
    }

    pub fn id(&self) -> String {
        self.number.to_string()
    }

    pub fn progress(&self, done: u64, total: Option<u64>) {
        self.done.store(done, Ordering::Relaxed);
        self.total.store(total.unwrap_or(NO_TOTAL), Ordering::Relaxed);
    }

    /// Fails once the job was cancelled; called between steps.
    pub fn check_cancelled(&self) -> Result<()> {
        if self.cancelled.load(Ordering::Relaxed) {
            return Err(Error::new(ErrorKind::Cancelled, format!("{} {}: cancelled", self.kind, self.subject)));
        }
        Ok(())
    }

    pub fn is_cancelled(&self) -> bool {
        self.cancelled.load(Ordering::Relaxed)
    }

    /// Asks the job to stop at its next step; refused where there is no such step.
    pub fn cancel(&self) -> Result<()> {
        if self.has_ended() {
            return Err(Error::invalid(format!("job {} has ended already", self.number)));
        }
        if !self.stops_halfway {
            let (number, kind, subject) = (self.number, &self.kind, &self.subject);
            return Err(Error::invalid(format!(
                "job {number} ({kind} of {subject}) cannot be cancelled: it does not stop halfway; wait for it: \
                 `novastor job wait {number}`"
            )));
        }
        self.cancelled.store(true, Ordering::Relaxed);
        Ok(())
    }

    pub fn has_ended(&self) -> bool {
        self.outcome.lock().is_some()
    }

    pub async fn wait(&self) {
        loop {
            let notified = self.ended.notified();
            tokio::pin!(notified);
            notified.as_mut().enable();
            if self.has_ended() {
                return;
            }
            notified.await;
        }
    }

    pub fn info(&self) -> JobInfo {
        let outcome = self.outcome.lock().clone();
        let total = self.total.load(Ordering::Relaxed);
        JobInfo {
            id: self.id(),
            kind: self.kind.clone(),
            subject: self.subject.clone(),
            state: outcome.as_ref().map_or(JobState::Running, |outcome| outcome.state),
            done: self.done.load(Ordering::Relaxed),
            total: (total != NO_TOTAL).then_some(total),
            error: outcome.as_ref().and_then(|outcome| outcome.error.clone()),
            started: self.started,
            ended: outcome.map(|outcome| outcome.ended),
        }
    }
}

/// What is to be done about a job of this kind that ended with an earlier daemon.
fn next_step(kind: &str) -> String {
    let next =
        if kind.starts_with("image") { "the same command resumes it" } else { "nothing is half done: give the command again" };
    format!("the daemon ended meanwhile; {next}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn jobs_end_once_and_survive_a_restart() {
        let folder = tempfile::tempdir().unwrap();
        let data_dir = Arc::new(DataDir::open(folder.path()).unwrap());
        let jobs = Jobs::restore(data_dir.clone()).unwrap();
        let (first, second, third) = (jobs.begin("check", "a"), jobs.begin_cancellable("diff", "b"), jobs.begin("check", "c"));
        first.progress(5, Some(10));
        jobs.end(&first, &Ok(()));
        jobs.end(&first, &Err::<(), _>(Error::internal("late")));
        second.cancel().unwrap();
        let stopped = second.check_cancelled();
        jobs.end(&second, &stopped);
        assert!(first.cancel().is_err());
        drop(third);

        let jobs = Jobs::restore(data_dir).unwrap();
        let states: Vec<_> = jobs.list().into_iter().map(|job| (job.id, job.state)).collect();
        let expected = [("1", JobState::Done), ("2", JobState::Cancelled), ("3", JobState::Interrupted)];
        assert_eq!(states, expected.map(|(id, state)| (id.to_owned(), state)));
        let told = jobs.get("3").unwrap().info().error.unwrap();
        assert!(told.contains("give the command again"), "{told}");
        assert_eq!(jobs.begin("check", "d").id(), "4");
        assert!(jobs.get("9").is_err() && jobs.get("x").is_err());
    }

    #[test]
    fn a_job_that_cannot_stop_halfway_refuses_to_be_cancelled() {
        let folder = tempfile::tempdir().unwrap();
        let jobs = Jobs::restore(Arc::new(DataDir::open(folder.path()).unwrap())).unwrap();
        let job = jobs.begin("volume delete", "local/v");
        let refused = job.cancel().unwrap_err().message;
        for part in ["job 1", "volume delete", "local/v", "novastor job wait 1"] {
            assert!(refused.contains(part), "{refused}");
        }
        assert!(!job.is_cancelled());
    }

    #[test]
    fn jobs_that_begin_and_end_at_once_are_all_saved() {
        let folder = tempfile::tempdir().unwrap();
        let data_dir = Arc::new(DataDir::open(folder.path()).unwrap());
        let jobs = Jobs::restore(data_dir.clone()).unwrap();
        std::thread::scope(|scope| {
            for thread in 0..8 {
                let jobs = &jobs;
                scope.spawn(move || {
                    for number in 0..10 {
                        let job = jobs.begin("check", format!("volume-{}", "x".repeat(thread * 7 + number)));
                        jobs.end(&job, &Ok(()));
                    }
                });
            }
        });
        let restored = Jobs::restore(data_dir).unwrap().list();
        assert_eq!(restored.len(), 80);
        assert!(restored.iter().all(|job| job.state == JobState::Done));
    }
}
