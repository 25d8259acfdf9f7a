//! `/v1/exports`.

use std::sync::Arc;

use axum::extract::State;

use super::reply::{Body, Done, ErrorBody, Name, Reply, blocking};
use super::types::{Disconnect, Disconnected, ExportCreate, ExportInfo};
use crate::daemon::Daemon;

/// All exports of this host, and who is attached.
#[utoipa::path(get, path = "/v1/exports", operation_id = "list_exports", responses((status = 200, body = [ExportInfo])))]
pub async fn list(State(daemon): State<Arc<Daemon>>) -> Reply<Vec<ExportInfo>> {
    blocking(daemon, |daemon| Ok(daemon.exports().list())).await
}

/// Exports a volume or a snapshot. When this answers, clients can attach.
#[utoipa::path(post, path = "/v1/exports", operation_id = "add_export", request_body = ExportCreate,
    responses((status = 200, body = ExportInfo), (status = "4XX", body = ErrorBody)))]
pub async fn add(State(daemon): State<Arc<Daemon>>, Body(request): Body<ExportCreate>) -> Reply<ExportInfo> {
    blocking(daemon, move |daemon| daemon.exports().add(daemon, request)).await
}

/// One export.
#[utoipa::path(get, path = "/v1/exports/{id}", operation_id = "show_export", params(("id" = String, Path)),
    responses((status = 200, body = ExportInfo), (status = "4XX", body = ErrorBody)))]
pub async fn show(State(daemon): State<Arc<Daemon>>, Name(id): Name<String>) -> Reply<ExportInfo> {
    blocking(daemon, move |daemon| daemon.exports().get(&id)).await
}

/// Stops an export; its clients' requests in flight are finished first.
#[utoipa::path(delete, path = "/v1/exports/{id}", operation_id = "remove_export", params(("id" = String, Path)),
    responses((status = 200, body = Done), (status = "4XX", body = ErrorBody)))]
pub async fn remove(State(daemon): State<Arc<Daemon>>, Name(id): Name<String>) -> Reply<Done> {
    blocking(daemon, move |daemon| daemon.exports().remove(daemon, &id).map(|()| Done { done: true })).await
}

/// Drops one client, or all of them; they may attach again.
#[utoipa::path(post, path = "/v1/exports/{id}/disconnect", operation_id = "disconnect_export", params(("id" = String, Path)),
    request_body = Disconnect, responses((status = 200, body = Disconnected), (status = "4XX", body = ErrorBody)))]
pub async fn disconnect(
    State(daemon): State<Arc<Daemon>>,
    Name(id): Name<String>,
    Body(request): Body<Disconnect>,
) -> Reply<Disconnected> {
    blocking(daemon, move |daemon| {
        let clients = daemon.exports().disconnect(&id, request.client.as_deref())?;
        Ok(Disconnected { clients })
    })
    .await
}

/// Lets go of an export's volume and opens it anew, with all exports that it has; their clients are dropped and may attach again. The way back after a
/// failure, or after another host had the volume; it is taken from a host that still serves it.
#[utoipa::path(post, path = "/v1/exports/{id}/reopen", operation_id = "reopen_export", params(("id" = String, Path)),
    responses((status = 200, body = ExportInfo), (status = "4XX", body = ErrorBody)))]
pub async fn reopen(State(daemon): State<Arc<Daemon>>, Name(id): Name<String>) -> Reply<ExportInfo> {
    blocking(daemon, move |daemon| daemon.exports().reopen(daemon, &id)).await
}
