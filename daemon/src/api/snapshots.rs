//! `/v1/snapshots`. A snapshot stands in the path as `VOL@SNAP`, with the pool as `POOL%2FVOL@SNAP`.

use std::sync::Arc;

use axum::extract::State;
use serde::Deserialize;
use utoipa::IntoParams;

use super::reply::{
    Asked, Body, Done, ErrorBody, IncompleteBody, Listed, Name, Reply, TakeOver, as_cancellable_job, as_job, blocking, unblocked,
};
use super::types::{SnapshotCreate, SnapshotDiff, SnapshotInfo};
use crate::daemon::Daemon;
use crate::daemon::jobs::Job;
use crate::error::Result;

#[derive(Deserialize, IntoParams)]
#[serde(deny_unknown_fields)]
pub struct ListQuery {
    /// Only this volume's.
    volume: Option<String>,
}

#[derive(Deserialize, IntoParams)]
#[serde(deny_unknown_fields)]
pub struct DiffQuery {
    /// `VOL@SNAP`.
    from: String,
    /// `VOL@SNAP` or `VOL`.
    to: String,
    /// Take mapped volumes from the hosts that had them last.
    #[serde(default)]
    take_over: bool,
}

/// All snapshots. 502 if a pool does not answer; the body then has those of the other pools.
#[utoipa::path(get, path = "/v1/snapshots", operation_id = "list_snapshots", params(ListQuery),
    responses((status = 200, body = [SnapshotInfo]), (status = "4XX", body = ErrorBody), (status = 502, body = IncompleteBody<SnapshotInfo>)))]
pub async fn list(State(daemon): State<Arc<Daemon>>, Asked(query): Asked<ListQuery>) -> Result<Listed<SnapshotInfo>> {
    unblocked(daemon, move |daemon| daemon.list_snapshots(query.volume.as_deref())).await
}

/// Snapshots of one or several volumes, all at one point in time.
#[utoipa::path(post, path = "/v1/snapshots", operation_id = "create_snapshots", request_body = SnapshotCreate,
    responses((status = 200, body = [SnapshotInfo]), (status = "4XX", body = ErrorBody)))]
pub async fn create(State(daemon): State<Arc<Daemon>>, Body(request): Body<SnapshotCreate>) -> Reply<Vec<SnapshotInfo>> {
    blocking(daemon, move |daemon| daemon.create_snapshots(&request.snapshots, request.take_over)).await
}

/// What changed between two states. Runs as a job; answers when it has ended.
#[utoipa::path(get, path = "/v1/snapshots/diff", operation_id = "diff_snapshots", params(DiffQuery),
    responses((status = 200, body = SnapshotDiff), (status = "4XX", body = ErrorBody)))]
pub async fn diff(State(daemon): State<Arc<Daemon>>, Asked(query): Asked<DiffQuery>) -> Reply<SnapshotDiff> {
    let subject = format!("{} {}", query.from, query.to);
    let work = move |daemon: &Arc<Daemon>, job: &Job| daemon.diff(&query.from, &query.to, query.take_over, job);
    as_cancellable_job(daemon, "snapshot diff", &subject, work).await
}

/// Deletes a snapshot. Runs as a job; answers when it has ended.
#[utoipa::path(delete, path = "/v1/snapshots/{snapshot}", operation_id = "delete_snapshot",
    params(("snapshot" = String, Path), TakeOver),
    responses((status = 200, body = Done), (status = "4XX", body = ErrorBody)))]
pub async fn remove(
    State(daemon): State<Arc<Daemon>>,
    Name(snapshot): Name<String>,
    Asked(TakeOver { take_over }): Asked<TakeOver>,
) -> Reply<Done> {
    let work =
        move |daemon: &Arc<Daemon>, snapshot: &str| daemon.delete_snapshot(snapshot, take_over).map(|()| Done { done: true });
    as_job(daemon, "snapshot delete", &snapshot.clone(), move |daemon, _| work(daemon, &snapshot)).await
}

/// The volume's content becomes the snapshot's. Runs as a job; answers when it has ended.
#[utoipa::path(post, path = "/v1/snapshots/{snapshot}/rollback", operation_id = "rollback_snapshot",
    params(("snapshot" = String, Path), TakeOver), responses((status = 200, body = Done), (status = "4XX", body = ErrorBody)))]
pub async fn rollback(
    State(daemon): State<Arc<Daemon>>,
    Name(snapshot): Name<String>,
    Asked(TakeOver { take_over }): Asked<TakeOver>,
) -> Reply<Done> {
    let work = move |daemon: &Arc<Daemon>, snapshot: &str| daemon.rollback(snapshot, take_over).map(|()| Done { done: true });
    as_job(daemon, "snapshot rollback", &snapshot.clone(), move |daemon, _| work(daemon, &snapshot)).await
}
