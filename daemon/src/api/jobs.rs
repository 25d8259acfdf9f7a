//! `/v1/jobs`, and `/v1/transfers`: images that a client copies in or out over a private NBD socket.

use std::sync::Arc;

use axum::Json;
use axum::extract::State;

use super::reply::{Body, ErrorBody, Name, Reply, blocking};
use super::types::{JobInfo, TransferCreate, TransferInfo, TransferProgress};
use crate::daemon::Daemon;

/// Jobs that run, and those that ended lately.
#[utoipa::path(get, path = "/v1/jobs", operation_id = "list_jobs", responses((status = 200, body = [JobInfo])))]
pub async fn list(State(daemon): State<Arc<Daemon>>) -> Reply<Vec<JobInfo>> {
    Ok(Json(daemon.jobs().list()))
}

/// One job.
#[utoipa::path(get, path = "/v1/jobs/{id}", operation_id = "show_job", params(("id" = String, Path)),
    responses((status = 200, body = JobInfo), (status = "4XX", body = ErrorBody)))]
pub async fn show(State(daemon): State<Arc<Daemon>>, Name(id): Name<String>) -> Reply<JobInfo> {
    Ok(Json(daemon.jobs().get(&id)?.info()))
}

/// Answers when the job has ended.
#[utoipa::path(post, path = "/v1/jobs/{id}/wait", operation_id = "wait_job", params(("id" = String, Path)),
    responses((status = 200, body = JobInfo), (status = "4XX", body = ErrorBody)))]
pub async fn wait(State(daemon): State<Arc<Daemon>>, Name(id): Name<String>) -> Reply<JobInfo> {
    let job = daemon.jobs().get(&id)?;
    job.wait().await;
    Ok(Json(job.info()))
}

/// Asks a job to stop at its next step. Refused where it cannot: only image copies and comparisons stop halfway.
#[utoipa::path(post, path = "/v1/jobs/{id}/cancel", operation_id = "cancel_job", params(("id" = String, Path)),
    responses((status = 200, body = JobInfo), (status = "4XX", body = ErrorBody)))]
pub async fn cancel(State(daemon): State<Arc<Daemon>>, Name(id): Name<String>) -> Reply<JobInfo> {
    let job = daemon.jobs().get(&id)?;
    job.cancel()?;
    Ok(Json(job.info()))
}

/// Opens a volume for a transfer: on a unix socket that only the daemon's own user can reach.
#[utoipa::path(post, path = "/v1/transfers", operation_id = "begin_transfer", request_body = TransferCreate,
    responses((status = 200, body = TransferInfo), (status = "4XX", body = ErrorBody)))]
pub async fn begin_transfer(State(daemon): State<Arc<Daemon>>, Body(request): Body<TransferCreate>) -> Reply<TransferInfo> {
    blocking(daemon, move |daemon| daemon.begin_transfer(&request)).await
}

/// Tells how far a transfer is, and in the end what came of it; the job in the answer may have been cancelled meanwhile.
#[utoipa::path(put, path = "/v1/transfers/{id}", operation_id = "report_transfer", params(("id" = String, Path)),
    request_body = TransferProgress, responses((status = 200, body = JobInfo), (status = "4XX", body = ErrorBody)))]
pub async fn report_transfer(
    State(daemon): State<Arc<Daemon>>,
    Name(id): Name<String>,
    Body(progress): Body<TransferProgress>,
) -> Reply<JobInfo> {
    blocking(daemon, move |daemon| daemon.report_transfer(&id, progress)).await
}
