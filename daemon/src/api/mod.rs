//! The admin API: HTTP and JSON, described by an OpenAPI document that is generated from the handlers.
//!
//! ```text
//!   unix socket 0600 ─┐
//!   TCP (loopback) ───┼─▶ token? ─▶ Router ─▶ handler ─▶ blocking call of daemon::Daemon
//!   TCP + TLS ────────┘
//! ```

pub mod exports;
pub mod jobs;
pub mod keys;
pub mod openapi;
pub mod pools;
pub mod reply;
pub mod server;
pub mod snapshots;
pub mod system;
pub mod types;
pub mod volumes;

use std::sync::Arc;

use axum::Router;
use axum::routing::{delete, get, post, put};

use crate::daemon::Daemon;

/// All handlers.
pub fn router(daemon: Arc<Daemon>) -> Router {
    Router::new()
        .route("/openapi.json", get(openapi::document))
        .route("/metrics", get(system::metrics))
        .route("/v1/status", get(system::status))
        .route("/v1/config/reload", post(system::reload))
        .route("/v1/stats", get(system::stats))
        .route("/v1/pools", get(pools::list))
        .route("/v1/pools/{pool}", get(pools::show))
        .route("/v1/pools/{pool}/check", post(pools::check))
        .route("/v1/pools/{pool}/forget", post(pools::forget))
        .route("/v1/volumes", get(volumes::list).post(volumes::create))
        .route("/v1/adoptions", post(volumes::adopt))
        .route("/v1/volumes/{volume}", get(volumes::show).delete(volumes::remove))
        .route("/v1/volumes/{volume}/resize", post(volumes::resize))
        .route("/v1/volumes/{volume}/rename", post(volumes::rename))
        .route("/v1/volumes/{volume}/clone", post(volumes::clone))
        .route("/v1/volumes/{volume}/flatten", post(volumes::flatten))
        .route("/v1/volumes/{volume}/usage", get(volumes::usage))
        .route("/v1/volumes/{volume}/check", post(volumes::check))
        .route("/v1/keys", get(keys::list))
        .route("/v1/keys/rotate", post(keys::rotate))
        .route("/v1/keys/erase", post(keys::erase))
        .route("/v1/snapshots", get(snapshots::list).post(snapshots::create))
        .route("/v1/snapshots/diff", get(snapshots::diff))
        .route("/v1/snapshots/{snapshot}", delete(snapshots::remove))
        .route("/v1/snapshots/{snapshot}/rollback", post(snapshots::rollback))
        .route("/v1/exports", get(exports::list).post(exports::add))
        .route("/v1/exports/{id}", get(exports::show).delete(exports::remove))
        .route("/v1/exports/{id}/disconnect", post(exports::disconnect))
        .route("/v1/exports/{id}/reopen", post(exports::reopen))
        .route("/v1/transfers", post(jobs::begin_transfer))
        .route("/v1/transfers/{id}", put(jobs::report_transfer))
        .route("/v1/jobs", get(jobs::list))
        .route("/v1/jobs/{id}", get(jobs::show))
        .route("/v1/jobs/{id}/wait", post(jobs::wait))
        .route("/v1/jobs/{id}/cancel", post(jobs::cancel))
        .fallback(server::unknown)
        .with_state(daemon)
}
