//! What mapped volumes need of a backend: a store of immutable objects, and small roots that are changed by compare-and-swap.
//!
//! ```text
//!   create ─▶ object ─▶ read (ranges) ─▶ delete        immutable: never overwritten, never appended to
//!   swap   ─▶ root   ─▶ read_root                      small; each change names the tag of what it replaces
//! ```
//!
//! Implementors promise:
//! - [`create`](SegmentStore::create) and [`swap`](SegmentStore::swap) are atomic and whole: nobody ever sees a part of the content, and of
//!   several that race for one name or one tag exactly one wins.
//! - What they answer with success is durable, its name included, and visible to every reader from then on.
//! - What a read has shown stays: no crash takes an object or a version of a root back that somebody was shown. So a caller who finds
//!   its own content after `Unknown` is done.
//! - An outcome that is not known (a lost reply, a time-out) is [`StoreError::Unknown`], never `Exists` or `Changed` by guesswork. The
//!   operation may have taken effect, or may still do so later. Nothing is retried inside a conditional operation, so that a store's
//!   own late success is never mistaken for somebody else's.
//!
//! Callers promise to read back after `Unknown`, and to repeat a `create` only with the same bytes.
//!
//! An operation begins when it is called or when its future is first polled. A future dropped earlier takes nothing back.

#[cfg(feature = "conformance")]
pub mod conformance;
pub mod directory;
pub mod drive;
pub mod header;
pub mod memory;
mod names;
#[cfg(feature = "object-store")]
pub mod object;
mod pass_on;
pub mod probe;
mod reply;
mod roots;

use std::future::Future;
use std::ops::Range;
use std::pin::Pin;
use std::sync::Arc;

pub use bytes::Bytes;
pub use header::PoolHeader;

/// The longest object, in bytes. A longer one is [`StoreError::Refused`].
pub const OBJECT_LEN_MAX: u64 = 64 << 20;
/// The longest content of a root, in bytes. A longer one is [`StoreError::Refused`].
pub const ROOT_LEN_MAX: u64 = 1 << 20;

/// How to open a pool.
#[derive(Clone, Copy, Debug)]
pub struct OpenOptions {
    /// The pool that must be there; any, if `None`.
    pub expected: Option<uuid::Uuid>,
    /// `create`, `delete` and `swap` are refused, and nothing is proven.
    pub read_only: bool,
    /// New at each opening: names what [`probe::prove`] writes. `None` only where this process has proven the same pool before.
    pub probe: Option<uuid::Uuid>,
}

/// The answer to come of one operation. It may be polled on any thread, but stays on the one it is first polled on.
pub type StoreFuture<'a, T> = Pin<Box<dyn Future<Output = Result<T, StoreError>> + 'a>>;

/// Stands for one version of a root: equal tags mean equal versions. Opaque to everyone but the store.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Tag(pub String);

/// An object as a listing shows it.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Listed {
    pub name: String,
    /// Bytes.
    pub len: u64,
}

/// Why an operation did not succeed. `what` is for people: the object, the cause, the next step.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum StoreError {
    /// Of `create`: there is an object of this name.
    #[error("{0} exists")]
    Exists(String),
    /// Of `read`: there is no object of this name.
    #[error("{0} does not exist")]
    Absent(String),
    /// Of `swap`: the root is not, or no longer, the version that was named.
    #[error("{0} was changed by another writer")]
    Changed(String),
    /// Full or over quota: nothing was changed, and trying again later may help.
    #[error("{0}")]
    NoSpace(String),
    /// Refused for good: a bad name, permissions, a read-only or a damaged store. Nothing was changed.
    #[error("{0}")]
    Refused(String),
    /// Not reached, or no usable answer: it may or may not have taken effect.
    #[error("{0}")]
    Unknown(String),
}

/// A place for the objects of mapped volumes. Names are relative paths of `[a-z0-9._-]` parts joined by `/`, at most 250 bytes in all,
/// no part `.` or `..`; `a` and `a/b` may both exist, and an object and a root may share a name.
/// The root `probe` and objects `probe/…` belong to [`probe`].
pub trait SegmentStore {
    /// Stores an object of this name if there is none. The parts of `content` are joined; at most [`OBJECT_LEN_MAX`].
    fn create<'a>(&'a self, name: &'a str, content: Vec<Bytes>) -> StoreFuture<'a, ()>;

    /// Reads a range of bytes of an object. A range that reaches past its end gives what there is; an empty answer means the range begins
    /// at or past the end.
    fn read<'a>(&'a self, name: &'a str, range: Range<u64>) -> StoreFuture<'a, Bytes>;

    /// Removes an object; one that does not exist is removed already.
    fn delete<'a>(&'a self, name: &'a str) -> StoreFuture<'a, ()>;

    /// All objects whose name begins with `prefix`, in the order of their names' bytes. Roots are not among them.
    fn list<'a>(&'a self, prefix: &'a str) -> StoreFuture<'a, Vec<Listed>>;

    /// A root and its version, or `None` if it was never set.
    fn read_root<'a>(&'a self, name: &'a str) -> StoreFuture<'a, Option<(Bytes, Tag)>>;

    /// Sets a root whose version is `expected` (`None`: that was never set), and gives its new version. At most [`ROOT_LEN_MAX`].
    fn swap<'a>(&'a self, name: &'a str, expected: Option<&'a Tag>, content: Bytes) -> StoreFuture<'a, Tag>;
}

impl<S: SegmentStore + ?Sized> SegmentStore for Arc<S> {
    fn create<'a>(&'a self, name: &'a str, content: Vec<Bytes>) -> StoreFuture<'a, ()> {
        (**self).create(name, content)
    }

    fn read<'a>(&'a self, name: &'a str, range: Range<u64>) -> StoreFuture<'a, Bytes> {
        (**self).read(name, range)
    }

    fn delete<'a>(&'a self, name: &'a str) -> StoreFuture<'a, ()> {
        (**self).delete(name)
    }

    fn list<'a>(&'a self, prefix: &'a str) -> StoreFuture<'a, Vec<Listed>> {
        (**self).list(prefix)
    }

    fn read_root<'a>(&'a self, name: &'a str) -> StoreFuture<'a, Option<(Bytes, Tag)>> {
        (**self).read_root(name)
    }

    fn swap<'a>(&'a self, name: &'a str, expected: Option<&'a Tag>, content: Bytes) -> StoreFuture<'a, Tag> {
        (**self).swap(name, expected, content)
    }
}

/// Refuses what is too long for an object.
fn check_object_len(name: &str, content: &[Bytes]) -> Result<(), StoreError> {
    let len: u64 = content.iter().map(|part| part.len() as u64).sum();
    if len <= OBJECT_LEN_MAX {
        return Ok(());
    }
    Err(StoreError::Refused(format!("object {name}: {len} bytes are more than the {OBJECT_LEN_MAX} an object may have")))
}
