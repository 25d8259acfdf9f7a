//! What an answer of an S3 server means for the operation it answers.

use std::error::Error;
use std::time::Duration;

use super::super::StoreError;

/// The longest text of an error that is passed on, in bytes.
const TEXT_MAX: usize = 600;
/// Codes of a server that is full, or whose owner set a limit.
const FULL: [&str; 5] =
    ["QuotaExceeded", "XMinioAdminBucketQuotaExceeded", "XMinioStorageFull", "InsufficientStorage", "TotalStorageExceeded"];

/// An attempt that did not succeed.
#[derive(Debug)]
pub(super) struct Failure {
    /// Of HTTP; 0 where no answer came.
    status: u16,
    /// In the server's own terms, where it gave any.
    code: Option<String>,
    text: String,
}

impl Failure {
    pub(super) fn new(status: u16, error: &object_store::Error) -> Failure {
        let mut text = error.to_string();
        let mut source = error.source();
        while let Some(cause) = source {
            let words = cause.to_string();
            if !text.contains(&words) {
                text = format!("{text}: {words}");
            }
            source = cause.source();
        }
        let code = text.split_once("<Code>").and_then(|(_, rest)| rest.split_once("</Code>")).map(|(code, _)| code.to_owned());
        let end = text.floor_char_boundary(TEXT_MAX);
        text.truncate(end);
        Failure { status, code, text }
    }

    /// An attempt whose whole answer did not come in time.
    pub(super) fn silent(status: u16, limit: Duration) -> Failure {
        Failure { status, code: None, text: format!("no whole answer within {limit:?}") }
    }

    pub(super) fn has_code(&self, code: &str) -> bool {
        self.code.as_deref() == Some(code)
    }

    /// Whether the server said that the condition does not hold.
    pub(super) fn is_condition(&self) -> bool {
        matches!(self.status, 304 | 412)
    }

    pub(super) fn is_past_end(&self) -> bool {
        self.status == 416
    }

    /// Whether the server said that there is no such key. A missing bucket, or somebody else's 404, does not say that.
    pub(super) fn is_no_key(&self) -> bool {
        self.status == 404 && self.has_code("NoSuchKey")
    }

    /// Whether a key that was there is not any more; the answer to HEAD has no words.
    pub(super) fn is_gone(&self) -> bool {
        self.status == 404
    }

    /// Whether the same request may do better later.
    pub(super) fn is_passing(&self) -> bool {
        matches!(self.status, 0 | 200..=299 | 408 | 409 | 429 | 500 | 502..=504) || self.has_code("RequestTimeout")
    }

    /// The kind of error where none of the operation's own applies.
    pub(super) fn into_error(self, what: &str) -> StoreError {
        let hint = match self.status {
            401 | 403 => "; see the access key, its rights and the clock",
            300..=399 => "; see endpoint and region",
            404 => "; see bucket and endpoint",
            _ => "",
        };
        let text = format!("{what}: {}{hint}", self.text);
        let is_full = self.status == 507 || FULL.iter().any(|code| self.has_code(code));
        match self.status {
            _ if is_full => StoreError::NoSpace(text),
            _ if self.is_passing() => StoreError::Unknown(text),
            300..=499 | 501 | 505 => StoreError::Refused(text),
            _ => StoreError::Unknown(text),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn failure(status: u16, code: &str) -> Failure {
        let long_name = "x".repeat(2 * TEXT_MAX);
        let text = format!("{long_name}: <Error><Code>{code}</Code></Error>");
        let error = object_store::Error::Generic { store: "S3", source: text.into() };
        Failure::new(status, &error)
    }

    #[test]
    fn what_may_have_happened_is_unknown() {
        for status in [0, 200, 408, 409, 429, 500, 502, 503, 504, 599] {
            assert!(matches!(failure(status, "Any").into_error("x"), StoreError::Unknown(_)), "{status}");
        }
        assert!(matches!(failure(400, "RequestTimeout").into_error("x"), StoreError::Unknown(_)));
    }

    #[test]
    fn what_cannot_have_happened_has_its_kind() {
        for status in [301, 400, 401, 403, 404, 405, 501] {
            assert!(matches!(failure(status, "Any").into_error("x"), StoreError::Refused(_)), "{status}");
        }
        assert!(matches!(failure(403, "QuotaExceeded").into_error("x"), StoreError::NoSpace(_)));
        assert!(matches!(failure(507, "Any").into_error("x"), StoreError::NoSpace(_)));
    }

    #[test]
    fn only_the_servers_own_word_makes_an_object_absent() {
        assert!(failure(404, "NoSuchKey").is_no_key());
        assert!(!failure(404, "NoSuchBucket").is_no_key());
        assert!(!failure(404, "").is_no_key());
    }
}
