//! The OpenAPI document.

use axum::Json;
use utoipa::OpenApi;

use super::{exports, jobs, keys, pools, snapshots, system, volumes};

/// novastor's admin API.
#[derive(OpenApi)]
#[openapi(
    info(title = "novastor", description = "The admin API of the novastor daemon."),
    paths(
        system::status,
        system::reload,
        system::stats,
        system::metrics,
        pools::list,
        pools::show,
        pools::check,
        pools::forget,
        volumes::list,
        volumes::create,
        volumes::adopt,
        volumes::show,
        volumes::remove,
        volumes::resize,
        volumes::rename,
        volumes::clone,
        volumes::flatten,
        volumes::usage,
        volumes::check,
        keys::list,
        keys::rotate,
        keys::erase,
        snapshots::list,
        snapshots::create,
        snapshots::diff,
        snapshots::remove,
        snapshots::rollback,
        exports::list,
        exports::add,
        exports::show,
        exports::remove,
        exports::disconnect,
        exports::reopen,
        jobs::list,
        jobs::show,
        jobs::wait,
        jobs::cancel,
        jobs::begin_transfer,
        jobs::report_transfer,
    )
)]
struct Document;

/// Generated from the handlers.
pub fn openapi() -> utoipa::openapi::OpenApi {
    Document::openapi()
}

/// `/openapi.json`.
pub async fn document() -> Json<utoipa::openapi::OpenApi> {
    Json(openapi())
}
