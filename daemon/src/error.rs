//! Errors of the control plane: a kind for programs, a message for people.

use std::fmt;

use backends::PoolError;
use blockdev::DeviceError;
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

/// What sort of failure it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum ErrorKind {
    /// The thing does not exist.
    NotFound,
    /// Something of that name exists.
    Exists,
    /// It is in use, so this cannot be done now.
    InUse,
    /// Another host had the mapped volume last; it is taken from it only if that is asked for.
    TakenOver,
    /// The backend or this version cannot do it.
    Unsupported,
    /// The request makes no sense.
    Invalid,
    /// The token is missing or wrong.
    Unauthorized,
    /// The operating system refused.
    Io,
    /// The storage backend failed.
    Backend,
    /// The job was cancelled.
    Cancelled,
    /// A defect of the daemon; its log says more.
    Internal,
}

/// Why a control operation failed.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Error {
    pub kind: ErrorKind,
    /// The thing, the reason and the next step.
    pub message: String,
}

pub type Result<T> = std::result::Result<T, Error>;

impl Error {
    pub fn new(kind: ErrorKind, message: impl Into<String>) -> Error {
        Error { kind, message: message.into() }
    }

    pub fn not_found(message: impl Into<String>) -> Error {
        Error::new(ErrorKind::NotFound, message)
    }

    pub fn invalid(message: impl Into<String>) -> Error {
        Error::new(ErrorKind::Invalid, message)
    }

    pub fn in_use(message: impl Into<String>) -> Error {
        Error::new(ErrorKind::InUse, message)
    }

    pub fn exists(message: impl Into<String>) -> Error {
        Error::new(ErrorKind::Exists, message)
    }

    pub fn unsupported(message: impl Into<String>) -> Error {
        Error::new(ErrorKind::Unsupported, message)
    }

    pub fn internal(message: impl Into<String>) -> Error {
        Error::new(ErrorKind::Internal, message)
    }

    /// An operating system error, with what was tried.
    pub fn io(what: impl fmt::Display, source: &std::io::Error) -> Error {
        Error::new(ErrorKind::Io, format!("{what}: {source}"))
    }

    /// The same error, said of `subject`.
    pub fn of(self, subject: impl fmt::Display) -> Error {
        let subject = subject.to_string();
        if self.message.contains(&subject) {
            return self;
        }
        Error { kind: self.kind, message: format!("{subject}: {}", self.message) }
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.message)
    }
}

impl std::error::Error for Error {}

impl From<PoolError> for Error {
    fn from(error: PoolError) -> Error {
        let kind = match &error {
            PoolError::NotFound(_) => ErrorKind::NotFound,
            PoolError::Exists(_) => ErrorKind::Exists,
            PoolError::InUse(_) => ErrorKind::InUse,
            PoolError::TakenOver(_) => ErrorKind::TakenOver,
            PoolError::Unsupported(_) => ErrorKind::Unsupported,
            PoolError::Invalid(_) => ErrorKind::Invalid,
            PoolError::Io { .. } => ErrorKind::Io,
            PoolError::Backend(_) => ErrorKind::Backend,
        };
        Error::new(kind, error.to_string())
    }
}

impl From<DeviceError> for Error {
    fn from(error: DeviceError) -> Error {
        Error::from(PoolError::from(error))
    }
}
