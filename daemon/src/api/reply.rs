//! Answers: JSON of what was asked for, or `{"error": {"kind", "message"}}`.

use std::sync::Arc;

use axum::Json;
use axum::extract::{FromRequest, FromRequestParts, Path, Query, Request};
use axum::http::StatusCode;
use axum::http::request::Parts;
use axum::response::{IntoResponse, Response};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use utoipa::{IntoParams, ToSchema};

use super::types::Unanswered;
use crate::daemon::Daemon;
use crate::daemon::jobs::Job;
use crate::error::{Error, ErrorKind, Result};

/// The body of an answer that is no success.
#[derive(Debug, Serialize, Deserialize, ToSchema)]
pub struct ErrorBody {
    pub error: Error,
    /// Of a list that is not complete: the pools that did not answer.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub unanswered: Vec<Unanswered>,
}

/// What several pools hold, as far as they answer.
pub struct Listed<T> {
    pub found: Vec<T>,
    pub unanswered: Vec<Unanswered>,
}

/// The body of a list that is not complete.
#[derive(Debug, Serialize, Deserialize, ToSchema)]
pub struct IncompleteBody<T> {
    pub error: Error,
    /// The pools that did not answer.
    pub unanswered: Vec<Unanswered>,
    /// What the others hold.
    pub found: Vec<T>,
}

impl<T> Listed<T> {
    /// That there may be more than what was found; nothing if all pools answered.
    pub fn error(&self) -> Option<Error> {
        let words = Unanswered::in_words(&self.unanswered);
        let error =
            || Error::new(ErrorKind::Backend, format!("the list is not complete; {words}; `novastor pool list` shows all pools"));
        (!self.unanswered.is_empty()).then(error)
    }
}

impl<T: Serialize> IntoResponse for Listed<T> {
    fn into_response(self) -> Response {
        match self.error() {
            None => Json(self.found).into_response(),
            Some(error) => {
                let status = error.status();
                (status, Json(IncompleteBody { error, unanswered: self.unanswered, found: self.found })).into_response()
            }
        }
    }
}

/// Nothing to say but that it is done.
#[derive(Debug, Serialize, Deserialize, ToSchema)]
pub struct Done {
    pub done: bool,
}

/// Of commands that a mapped volume has to be open for.
#[derive(Debug, Deserialize, IntoParams)]
#[serde(deny_unknown_fields)]
pub struct TakeOver {
    /// Take a mapped volume from the host that had it last.
    #[serde(default)]
    pub take_over: bool,
}

pub type Reply<T> = Result<Json<T>>;

impl Error {
    fn status(&self) -> StatusCode {
        match self.kind {
            ErrorKind::NotFound => StatusCode::NOT_FOUND,
            ErrorKind::Exists | ErrorKind::InUse | ErrorKind::TakenOver | ErrorKind::Cancelled => StatusCode::CONFLICT,
            ErrorKind::Unsupported => StatusCode::NOT_IMPLEMENTED,
            ErrorKind::Invalid => StatusCode::BAD_REQUEST,
            ErrorKind::Unauthorized => StatusCode::UNAUTHORIZED,
            ErrorKind::Backend => StatusCode::BAD_GATEWAY,
            ErrorKind::Io | ErrorKind::Internal => StatusCode::INTERNAL_SERVER_ERROR,
        }
    }
}

impl IntoResponse for Error {
    fn into_response(self) -> Response {
        (self.status(), Json(ErrorBody { error: self, unanswered: Vec::new() })).into_response()
    }
}

/// A JSON body; what is wrong with it is answered like every error.
pub struct Body<T>(pub T);

/// The path's parameter.
pub struct Name<T>(pub T);

/// The query's parameters.
pub struct Asked<T>(pub T);

impl<T: DeserializeOwned, S: Send + Sync> FromRequest<S> for Body<T> {
    type Rejection = Error;

    async fn from_request(request: Request, state: &S) -> Result<Self> {
        let body = Json::from_request(request, state).await;
        body.map(|Json(body)| Body(body)).map_err(|rejection| Error::invalid(rejection.body_text()))
    }
}

impl<T: DeserializeOwned + Send, S: Send + Sync> FromRequestParts<S> for Name<T> {
    type Rejection = Error;

    async fn from_request_parts(parts: &mut Parts, state: &S) -> Result<Self> {
        let name = Path::from_request_parts(parts, state).await;
        name.map(|Path(name)| Name(name)).map_err(|rejection| Error::invalid(rejection.body_text()))
    }
}

impl<T: DeserializeOwned, S: Send + Sync> FromRequestParts<S> for Asked<T> {
    type Rejection = Error;

    async fn from_request_parts(parts: &mut Parts, state: &S) -> Result<Self> {
        let query = Query::from_request_parts(parts, state).await;
        query.map(|Query(query)| Asked(query)).map_err(|rejection| Error::invalid(rejection.body_text()))
    }
}

/// Runs `work` where it may block. It goes on even if the client leaves.
pub async fn blocking<T, F>(daemon: Arc<Daemon>, work: F) -> Reply<T>
where
    T: Send + 'static,
    F: FnOnce(&Arc<Daemon>) -> Result<T> + Send + 'static,
{
    unblocked(daemon, work).await.map(Json)
}

/// The same for what is no JSON yet.
pub async fn unblocked<T, F>(daemon: Arc<Daemon>, work: F) -> Result<T>
where
    T: Send + 'static,
    F: FnOnce(&Arc<Daemon>) -> Result<T> + Send + 'static,
{
    match tokio::task::spawn_blocking(move || work(&daemon)).await {
        Ok(result) => result,
        Err(error) => Err(Error::internal(format!("the operation failed inside the daemon ({error}): its log says more"))),
    }
}

/// The same as a job: listed while it runs.
pub async fn as_job<T, F>(daemon: Arc<Daemon>, kind: &str, subject: &str, work: F) -> Reply<T>
where
    T: Send + 'static,
    F: FnOnce(&Arc<Daemon>, &Job) -> Result<T> + Send + 'static,
{
    let job = daemon.jobs().begin(kind, subject);
    run_job(daemon, job, work).await
}

/// The same; `work` looks between its steps whether it was cancelled.
pub async fn as_cancellable_job<T, F>(daemon: Arc<Daemon>, kind: &str, subject: &str, work: F) -> Reply<T>
where
    T: Send + 'static,
    F: FnOnce(&Arc<Daemon>, &Job) -> Result<T> + Send + 'static,
{
    let job = daemon.jobs().begin_cancellable(kind, subject);
    run_job(daemon, job, work).await
}

async fn run_job<T, F>(daemon: Arc<Daemon>, job: Arc<Job>, work: F) -> Reply<T>
where
    T: Send + 'static,
    F: FnOnce(&Arc<Daemon>, &Job) -> Result<T> + Send + 'static,
{
    blocking(daemon, move |daemon| {
        let _guard = EndOnPanic { daemon, job: &job };
        let result = work(daemon, &job);
        daemon.jobs().end(&job, &result);
        result
    })
    .await
}

/// A job whose work panics has failed, and is not left running for ever. A job that has ended stays as it ended.
struct EndOnPanic<'a> {
    daemon: &'a Daemon,
    job: &'a Job,
}

impl Drop for EndOnPanic<'_> {
    fn drop(&mut self) {
        self.daemon
            .jobs()
            .end(self.job, &Err::<(), _>(Error::internal("the operation failed inside the daemon: its log says more")));
    }
}
