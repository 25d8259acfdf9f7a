//! `/v1/volumes`. A volume stands in the path as `NAME` or `POOL%2FNAME`.

use std::sync::Arc;

use axum::extract::State;
use serde::Deserialize;
use utoipa::IntoParams;

use super::reply::{Asked, Body, Done, ErrorBody, IncompleteBody, Listed, Name, Reply, TakeOver, as_job, blocking, unblocked};
use super::types::{
    CheckReport, VolumeAdopt, VolumeClone, VolumeCreate, VolumeFlattened, VolumeInfo, VolumeRename, VolumeResize, VolumeUsage,
};
use crate::daemon::Daemon;
use crate::error::Result;

#[derive(Deserialize, IntoParams)]
#[serde(deny_unknown_fields)]
pub struct ListQuery {
    /// Only this pool's.
    pool: Option<String>,
}

/// All volumes. 502 if a pool does not answer; the body then has those of the other pools.
#[utoipa::path(get, path = "/v1/volumes", operation_id = "list_volumes", params(ListQuery),
    responses((status = 200, body = [VolumeInfo]), (status = "4XX", body = ErrorBody), (status = 502, body = IncompleteBody<VolumeInfo>)))]
pub async fn list(State(daemon): State<Arc<Daemon>>, Asked(query): Asked<ListQuery>) -> Result<Listed<VolumeInfo>> {
    unblocked(daemon, move |daemon| daemon.list_volumes(query.pool.as_deref())).await
}

/// A new volume.
#[utoipa::path(post, path = "/v1/volumes", operation_id = "create_volume", request_body = VolumeCreate,
    responses((status = 200, body = VolumeInfo), (status = "4XX", body = ErrorBody)))]
pub async fn create(State(daemon): State<Arc<Daemon>>, Body(request): Body<VolumeCreate>) -> Reply<VolumeInfo> {
    blocking(daemon, move |daemon| daemon.create_volume(&request)).await
}

/// Takes over an existing file, device or image, unchanged.
#[utoipa::path(post, path = "/v1/adoptions", operation_id = "adopt_volume", request_body = VolumeAdopt,
    responses((status = 200, body = VolumeInfo), (status = "4XX", body = ErrorBody)))]
pub async fn adopt(State(daemon): State<Arc<Daemon>>, Body(request): Body<VolumeAdopt>) -> Reply<VolumeInfo> {
    blocking(daemon, move |daemon| daemon.adopt_volume(&request)).await
}

/// One volume.
#[utoipa::path(get, path = "/v1/volumes/{volume}", operation_id = "show_volume", params(("volume" = String, Path)),
    responses((status = 200, body = VolumeInfo), (status = "4XX", body = ErrorBody)))]
pub async fn show(State(daemon): State<Arc<Daemon>>, Name(volume): Name<String>) -> Reply<VolumeInfo> {
    blocking(daemon, move |daemon| daemon.show_volume(&volume)).await
}

/// Deletes a volume and its data; an adopted object is only forgotten. Runs as a job; answers when it has ended.
#[utoipa::path(delete, path = "/v1/volumes/{volume}", operation_id = "delete_volume", params(("volume" = String, Path)),
    responses((status = 200, body = Done), (status = "4XX", body = ErrorBody)))]
pub async fn remove(State(daemon): State<Arc<Daemon>>, Name(volume): Name<String>) -> Reply<Done> {
    let work = move |daemon: &Arc<Daemon>, volume: &str| daemon.delete_volume(volume).map(|()| Done { done: true });
    as_job(daemon, "volume delete", &volume.clone(), move |daemon, _| work(daemon, &volume)).await
}

/// Changes the size. Guests on vhost-user are told at once.
#[utoipa::path(post, path = "/v1/volumes/{volume}/resize", operation_id = "resize_volume", params(("volume" = String, Path)),
    request_body = VolumeResize, responses((status = 200, body = VolumeInfo), (status = "4XX", body = ErrorBody)))]
pub async fn resize(
    State(daemon): State<Arc<Daemon>>,
    Name(volume): Name<String>,
    Body(request): Body<VolumeResize>,
) -> Reply<VolumeInfo> {
    blocking(daemon, move |daemon| daemon.resize_volume(&volume, &request)).await
}

/// Gives it another name.
#[utoipa::path(post, path = "/v1/volumes/{volume}/rename", operation_id = "rename_volume", params(("volume" = String, Path)),
    request_body = VolumeRename, responses((status = 200, body = VolumeInfo), (status = "4XX", body = ErrorBody)))]
pub async fn rename(
    State(daemon): State<Arc<Daemon>>,
    Name(volume): Name<String>,
    Body(request): Body<VolumeRename>,
) -> Reply<VolumeInfo> {
    blocking(daemon, move |daemon| daemon.rename_volume(&volume, &request.name)).await
}

/// A writable copy of a volume or a snapshot (`VOL@SNAP`). Runs as a job; answers when it has ended.
#[utoipa::path(post, path = "/v1/volumes/{volume}/clone", operation_id = "clone_volume", params(("volume" = String, Path)),
    request_body = VolumeClone, responses((status = 200, body = VolumeInfo), (status = "4XX", body = ErrorBody)))]
pub async fn clone(
    State(daemon): State<Arc<Daemon>>,
    Name(volume): Name<String>,
    Body(request): Body<VolumeClone>,
) -> Reply<VolumeInfo> {
    as_job(daemon, "volume clone", &volume.clone(), move |daemon, _| {
        daemon.clone_volume(&volume, &request.name, request.take_over)
    })
    .await
}

/// Makes a clone independent of its origin. Runs as a job, which cannot be cancelled; answers when it has ended.
#[utoipa::path(post, path = "/v1/volumes/{volume}/flatten", operation_id = "flatten_volume", params(("volume" = String, Path), TakeOver),
    responses((status = 200, body = VolumeFlattened), (status = "4XX", body = ErrorBody)))]
pub async fn flatten(
    State(daemon): State<Arc<Daemon>>,
    Name(volume): Name<String>,
    Asked(TakeOver { take_over }): Asked<TakeOver>,
) -> Reply<VolumeFlattened> {
    as_job(daemon, "volume flatten", &volume.clone(), move |daemon, job| daemon.flatten_volume(&volume, take_over, job)).await
}

/// Space taken. Of a mapped volume, its whole map is read for it.
#[utoipa::path(get, path = "/v1/volumes/{volume}/usage", operation_id = "volume_usage", params(("volume" = String, Path)),
    responses((status = 200, body = VolumeUsage), (status = "4XX", body = ErrorBody)))]
pub async fn usage(State(daemon): State<Arc<Daemon>>, Name(volume): Name<String>) -> Reply<VolumeUsage> {
    blocking(daemon, move |daemon| daemon.volume_usage(&volume)).await
}

/// Reads a mapped volume and its snapshots whole, and compares each block with its hash; of any volume, whether it opens, is healthy and has the size
/// that the catalogue says. Runs as a job; answers when it has ended.
#[utoipa::path(post, path = "/v1/volumes/{volume}/check", operation_id = "check_volume", params(("volume" = String, Path), TakeOver),
    responses((status = 200, body = CheckReport), (status = "4XX", body = ErrorBody)))]
pub async fn check(
    State(daemon): State<Arc<Daemon>>,
    Name(volume): Name<String>,
    Asked(TakeOver { take_over }): Asked<TakeOver>,
) -> Reply<CheckReport> {
    as_job(daemon, "volume check", &volume.clone(), move |daemon, job| daemon.check_volume(&volume, take_over, job)).await
}
