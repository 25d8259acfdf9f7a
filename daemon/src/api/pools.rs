//! `/v1/pools`.

use std::sync::Arc;

use axum::extract::State;

use super::reply::{Done, ErrorBody, Name, Reply, as_job, blocking};
use super::types::{CheckReport, PoolInfo};
use crate::daemon::Daemon;

/// All configured pools and their health.
#[utoipa::path(get, path = "/v1/pools", responses((status = 200, body = [PoolInfo])))]
pub async fn list(State(daemon): State<Arc<Daemon>>) -> Reply<Vec<PoolInfo>> {
    blocking(daemon, |daemon| Ok(daemon.list_pools())).await
}

/// One pool and its health.
#[utoipa::path(get, path = "/v1/pools/{pool}", params(("pool" = String, Path)),
    responses((status = 200, body = PoolInfo), (status = "4XX", body = ErrorBody)))]
pub async fn show(State(daemon): State<Arc<Daemon>>, Name(pool): Name<String>) -> Reply<PoolInfo> {
    blocking(daemon, move |daemon| daemon.show_pool(&pool)).await
}

/// Forgets which pool this was, so that another one, or a new one, is taken where it was. Refused while it is open.
#[utoipa::path(post, path = "/v1/pools/{pool}/forget", operation_id = "forget_pool", params(("pool" = String, Path)),
    responses((status = 200, body = Done), (status = "4XX", body = ErrorBody)))]
pub async fn forget(State(daemon): State<Arc<Daemon>>, Name(pool): Name<String>) -> Reply<Done> {
    blocking(daemon, move |daemon| daemon.pools().forget(&pool).map(|()| Done { done: true })).await
}

/// Looks for volumes that cannot be whole: missing or damaged roots, missing objects, what belongs to no volume; no data is read. Runs as a job; answers when it has ended.
#[utoipa::path(post, path = "/v1/pools/{pool}/check", params(("pool" = String, Path)),
    responses((status = 200, body = CheckReport), (status = "4XX", body = ErrorBody)))]
pub async fn check(State(daemon): State<Arc<Daemon>>, Name(pool): Name<String>) -> Reply<CheckReport> {
    as_job(daemon, "pool check", &pool.clone(), move |daemon, job| daemon.check_pool(&pool, job)).await
}
