//! `/v1/status`, `/v1/config/reload`, `/v1/stats`, `/metrics`.

use std::sync::Arc;
use std::time::Duration;

use axum::Json;
use axum::extract::State;
use axum::http::header::CONTENT_TYPE;
use axum::response::{IntoResponse, Response};
use serde::Deserialize;
use utoipa::IntoParams;

use super::reply::{Asked, ErrorBody, Reply, blocking};
use super::types::{ReloadReport, Status};
use crate::daemon::Daemon;
use crate::error::{Error, Result};
use crate::metrics::{self, StatsReport};

const INTERVAL_MAX_MS: u64 = 60_000;
const INTERVAL_DEFAULT_MS: u64 = 1000;

/// The daemon itself.
#[utoipa::path(get, path = "/v1/status", responses((status = 200, body = Status)))]
pub async fn status(State(daemon): State<Arc<Daemon>>) -> Reply<Status> {
    Ok(Json(daemon.status()))
}

/// Reads the configuration file again.
#[utoipa::path(post, path = "/v1/config/reload",
    responses((status = 200, body = ReloadReport), (status = "4XX", body = ErrorBody)))]
pub async fn reload(State(daemon): State<Arc<Daemon>>) -> Reply<ReloadReport> {
    blocking(daemon, |daemon| daemon.reload()).await
}

#[derive(Deserialize, IntoParams)]
#[serde(deny_unknown_fields)]
pub struct StatsQuery {
    /// Milliseconds over which rates and latencies are measured: 1 to 60000, 1000 by default. The answer takes that long.
    interval_ms: Option<u64>,
}

impl StatsQuery {
    fn interval(&self) -> Result<Duration> {
        match self.interval_ms.unwrap_or(INTERVAL_DEFAULT_MS) {
            interval @ 1..=INTERVAL_MAX_MS => Ok(Duration::from_millis(interval)),
            other => Err(Error::invalid(format!("interval_ms {other} refused: choose 1 to {INTERVAL_MAX_MS} milliseconds"))),
        }
    }
}

/// What volumes, exports and pools do: totals, and rates over an interval.
#[utoipa::path(get, path = "/v1/stats", params(StatsQuery),
    responses((status = 200, body = StatsReport), (status = "4XX", body = ErrorBody)))]
pub async fn stats(State(daemon): State<Arc<Daemon>>, Asked(query): Asked<StatsQuery>) -> Reply<StatsReport> {
    let interval = query.interval()?;
    let sampling = daemon.clone();
    let Json(before) = blocking(sampling, |daemon| Ok(metrics::Sample::take(daemon))).await?;
    tokio::time::sleep(interval).await;
    blocking(daemon, move |daemon| Ok(metrics::Sample::take(daemon).since(&before))).await
}

/// The same as Prometheus text.
#[utoipa::path(get, path = "/metrics", responses((status = 200, body = String, content_type = "text/plain")))]
pub async fn metrics(State(daemon): State<Arc<Daemon>>) -> Response {
    match blocking(daemon, |daemon| Ok(metrics::prometheus::render(&metrics::Sample::take(daemon)))).await {
        Ok(Json(text)) => ([(CONTENT_TYPE, "text/plain; version=0.0.4")], text).into_response(),
        Err(error) => error.into_response(),
    }
}
