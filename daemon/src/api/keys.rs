//! `/v1/keys`: what the keys of encrypted volumes are wrapped by.

use std::sync::Arc;

use axum::extract::State;
use serde::Deserialize;
use utoipa::IntoParams;

use super::reply::{Asked, Body, ErrorBody, Reply, as_job, blocking};
use super::types::{KeyErase, KeyErased, KeyList, KeyRotate, KeysRotated};
use crate::daemon::Daemon;

#[derive(Deserialize, IntoParams)]
#[serde(deny_unknown_fields)]
pub struct ListQuery {
    /// Only this pool's.
    pool: Option<String>,
}

/// The keys of all pools, and the key-encryption keys of this host. Needs none of them.
#[utoipa::path(get, path = "/v1/keys", operation_id = "list_keys", params(ListQuery),
    responses((status = 200, body = KeyList), (status = "4XX", body = ErrorBody)))]
pub async fn list(State(daemon): State<Arc<Daemon>>, Asked(query): Asked<ListQuery>) -> Reply<KeyList> {
    blocking(daemon, move |daemon| daemon.list_keys(query.pool.as_deref())).await
}

/// Wraps all keys with the current key-encryption key. Runs as a job; answers when it has ended. Can be repeated.
#[utoipa::path(post, path = "/v1/keys/rotate", operation_id = "rotate_keys", request_body = KeyRotate,
    responses((status = 200, body = [KeysRotated]), (status = "4XX", body = ErrorBody)))]
pub async fn rotate(State(daemon): State<Arc<Daemon>>, Body(request): Body<KeyRotate>) -> Reply<Vec<KeysRotated>> {
    let subject = request.pool.clone().unwrap_or_else(|| "all pools".to_owned());
    as_job(daemon, "key rotate", &subject, move |daemon, job| daemon.rotate_keys(request.pool.as_deref(), job)).await
}

/// Destroys a key for good, and with it the content of all volumes that share it, which must all be named and not be exported. Can be repeated.
#[utoipa::path(post, path = "/v1/keys/erase", operation_id = "erase_key", request_body = KeyErase,
    responses((status = 200, body = KeyErased), (status = "4XX", body = ErrorBody)))]
pub async fn erase(State(daemon): State<Arc<Daemon>>, Body(request): Body<KeyErase>) -> Reply<KeyErased> {
    blocking(daemon, move |daemon| daemon.erase_key(&request.volumes)).await
}
