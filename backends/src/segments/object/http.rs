//! The HTTP below `object_store`: one attempt at a time, bounded in time and size, with the status it was answered with, which the library's
//! own errors hide.

use std::cell::Cell;
use std::future::Future;
use std::time::Duration;

use async_trait::async_trait;
use http_body_util::{BodyExt, Limited};
use object_store::ClientOptions;
use object_store::client::{
    HttpClient, HttpConnector, HttpError, HttpErrorKind, HttpRequest, HttpResponse, HttpResponseBody, HttpService,
    ReqwestConnector,
};

use super::super::OBJECT_LEN_MAX;
use super::failure::Failure;

/// The longest answer that is read, in bytes: an object, or a page of a listing.
const ANSWER_LEN_MAX: usize = OBJECT_LEN_MAX as usize + (1 << 20);
/// The longest answer that says what went wrong, in bytes.
const ERROR_LEN_MAX: usize = 64 << 10;

tokio::task_local! {
    /// The status of the latest answer of this attempt; 0 if there was none.
    static STATUS: Cell<u16>;
}

/// Makes one attempt. What was heard of its outcome is in the failure.
pub(super) async fn attempt<T>(limit: Duration, call: impl Future<Output = object_store::Result<T>>) -> Result<T, Failure> {
    let outcome = async {
        let outcome = tokio::time::timeout(limit, call).await;
        let status = STATUS.with(Cell::get);
        match outcome {
            Ok(Ok(done)) => Ok(done),
            Ok(Err(error)) => Err(Failure::new(status, &error)),
            Err(_) => Err(Failure::silent(status, limit)),
        }
    };
    STATUS.scope(Cell::new(0), outcome).await
}

/// Makes HTTP clients that note the status of each answer, and read no endless one.
#[derive(Debug)]
pub(super) struct Connector;

impl HttpConnector for Connector {
    fn connect(&self, options: &ClientOptions) -> object_store::Result<HttpClient> {
        Ok(HttpClient::new(Noting(ReqwestConnector::default().connect(options)?)))
    }
}

#[derive(Debug)]
struct Noting(HttpClient);

#[async_trait]
impl HttpService for Noting {
    async fn call(&self, request: HttpRequest) -> Result<HttpResponse, HttpError> {
        let (parts, body) = self.0.execute(request).await?.into_parts();
        // Outside an attempt nobody asks.
        let _ = STATUS.try_with(|status| status.set(parts.status.as_u16()));
        let limit = if parts.status.is_success() { ANSWER_LEN_MAX } else { ERROR_LEN_MAX };
        let body = Limited::new(body, limit).map_err(|error| HttpError::new_boxed(HttpErrorKind::Decode, error));
        Ok(HttpResponse::from_parts(parts, HttpResponseBody::new(body)))
    }
}
