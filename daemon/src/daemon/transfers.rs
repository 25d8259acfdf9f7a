//! Images copied in and out: the client moves the bytes, over NBD on a socket of its own; here are the job and the open volume.
//!
//! A transfer whose client has gone for [`SILENCE_MAX`] is given up: its job counts as interrupted, the volume is released.
//!
//! Invariant: a job ends after its export has stopped. Nothing is written for a job that has ended, and no other transfer of the
//! volume begins while something may be.

use std::collections::HashMap;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use parking_lot::Mutex;

use super::Daemon;
use super::jobs::Job;
use crate::api::types::{JobInfo, JobState, TransferCreate, TransferInfo, TransferProgress};
use crate::config::Address;
use crate::error::{Error, Result};
use crate::exports::PrivateExport;
use crate::names::VolumeId;

const SILENCE_MAX: Duration = Duration::from_secs(15);
/// The same for one that was cancelled.
const SILENCE_MAX_CANCELLED: Duration = Duration::from_secs(3);
const LOOK: Duration = Duration::from_secs(1);

/// The transfers that run, by job.
#[derive(Default)]
pub struct Transfers {
    running: Mutex<HashMap<String, Transfer>>,
}

struct Transfer {
    volume: VolumeId,
    import: bool,
    job: Arc<Job>,
    /// Dropping it closes the socket, waits for requests in flight, and releases the volume; gone once that has begun.
    export: Option<PrivateExport>,
    heard: Instant,
}

impl Transfers {
    /// The job of a transfer of `volume` that `which` is true of.
    fn job_of(&self, volume: &VolumeId, which: impl Fn(&Transfer) -> bool) -> Option<String> {
        let running = self.running.lock();
        running.values().find(|transfer| transfer.volume == *volume && which(transfer)).map(|transfer| transfer.job.id())
    }

    /// The job that fills `volume` from an image, if one does.
    pub fn import_of(&self, volume: &VolumeId) -> Option<String> {
        self.job_of(volume, |transfer| transfer.import)
    }
}

impl Daemon {
    pub fn begin_transfer(self: &Arc<Self>, request: &TransferCreate) -> Result<TransferInfo> {
        let import = match request.direction.as_str() {
            "import" => true,
            "export" => false,
            other => return Err(Error::invalid(format!("direction {other:?}: \"import\" or \"export\""))),
        };
        let id = self.resolve_text(&request.volume)?;
        let _held = self.hold([&id]);
        let exported = self.exports.ids_of_exactly(&id);
        if import && !exported.is_empty() {
            return Err(Error::in_use(format!(
                "volume {id}: import refused: it is exported ({}); `novastor export remove` first",
                exported.join(", ")
            )));
        }
        if let Some(job) = self.transfers.job_of(&id, |other| import || other.import) {
            return Err(Error::in_use(format!(
                "volume {id}: {} refused: job {job} copies it; wait for it, or cancel it",
                request.direction
            )));
        }
        if request.take_over {
            self.take_over(&id)?;
        }
        let lease = self.lease(&id, import)?;
        let size = lease.volume().size();
        let subject = if import { format!("{} to {id}", request.file) } else { format!("{id} to {}", request.file) };
        let job = self.jobs.begin_cancellable(&format!("image {}", request.direction), subject);
        job.progress(0, Some(request.total));
        let socket = format!("transfer-{}", job.id());
        let export = self.exports.nbd().start_private(lease, !import, &self.private_folder(), &socket).inspect_err(|error| {
            self.jobs.end(&job, &Err::<(), _>(error.clone()));
        })?;
        let info =
            TransferInfo { job: job.id(), socket: export.path().display().to_string(), export: export.name().to_owned(), size };
        let heard = blockdev::clock::monotonic();
        let transfer = Transfer { volume: id, import, job: job.clone(), export: Some(export), heard };
        self.transfers.running.lock().insert(job.id(), transfer);
        let (daemon, id) = (Arc::downgrade(self), job.id());
        std::thread::spawn(move || {
            while let Some(daemon) = daemon.upgrade() {
                if !daemon.give_up_silent(&id) {
                    return;
                }
                drop(daemon);
                std::thread::sleep(LOOK);
            }
        });
        Ok(info)
    }

    /// Beside the admin socket, which has a short path; else in `data_dir`.
    fn private_folder(&self) -> PathBuf {
        let config = self.config();
        let admin = config.daemon.admin_address().ok();
        let folder = match &admin {
            Some(Address::Unix(path)) => std::path::absolute(path).ok().and_then(|path| path.parent().map(PathBuf::from)),
            _ => None,
        };
        folder.unwrap_or_else(|| self.data_dir.path().to_owned())
    }

    pub fn report_transfer(&self, id: &str, progress: TransferProgress) -> Result<JobInfo> {
        let mut running = self.transfers.running.lock();
        let going_on = running.get_mut(id).filter(|transfer| transfer.export.is_some());
        let transfer = going_on.ok_or_else(|| Error::not_found(format!("transfer {id} does not run")))?;
        transfer.heard = blockdev::clock::monotonic();
        let job = transfer.job.clone();
        let total = job.info().total;
        job.progress(progress.done, total);
        let cancelled = job.is_cancelled().then_some(JobState::Cancelled);
        drop(running);
        if let Some(state) = progress.state.filter(|state| *state != JobState::Running).or(cancelled) {
            self.end_transfer(id, state, progress.error);
        }
        Ok(job.info())
    }

    /// Waits until nothing more is read or written, then ends the job. Does nothing if somebody else is at that already.
    fn end_transfer(&self, id: &str, state: JobState, error: Option<String>) {
        let export = self.transfers.running.lock().get_mut(id).and_then(|transfer| transfer.export.take());
        let Some(export) = export else { return };
        drop(export);
        let ended = self.transfers.running.lock().remove(id);
        if let Some(transfer) = ended {
            self.jobs.conclude(&transfer.job, state, error);
        }
    }

    /// True while the transfer runs and is heard of.
    fn give_up_silent(&self, id: &str) -> bool {
        let running = self.transfers.running.lock();
        let Some(transfer) = running.get(id) else { return false };
        let cancelled = transfer.job.is_cancelled();
        let limit = if cancelled { SILENCE_MAX_CANCELLED } else { SILENCE_MAX };
        let silent = blockdev::clock::monotonic().saturating_duration_since(transfer.heard) > limit;
        drop(running);
        if silent {
            let error = "the client went away; the same command resumes it".to_owned();
            let state = if cancelled { JobState::Cancelled } else { JobState::Interrupted };
            self.end_transfer(id, state, Some(error));
        }
        !silent
    }

    /// Ends all of them, as the daemon ends.
    pub(super) fn stop_transfers(&self) {
        let running: Vec<String> = self.transfers.running.lock().keys().cloned().collect();
        for id in running {
            let error = "the daemon ended; the same command resumes it".to_owned();
            self.end_transfer(&id, JobState::Interrupted, Some(error));
        }
    }
}
