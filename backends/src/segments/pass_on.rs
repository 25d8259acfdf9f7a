//! For stores in front of another one, which do little themselves.

/// Methods of [`SegmentStore`](crate::segments::SegmentStore) that do what the store `self.$behind` does; in an `impl` of it, beside the methods written out.
///
/// ```
/// use backends::segments::memory::MemoryStore;
/// use backends::segments::{SegmentStore, StoreError, StoreFuture};
///
/// struct KeepsAll {
///     store: MemoryStore,
/// }
///
/// impl SegmentStore for KeepsAll {
///     backends::pass_on!(store: create, read, list, read_root, swap);
///
///     fn delete<'a>(&'a self, name: &'a str) -> StoreFuture<'a, ()> {
///         Box::pin(async move { Err(StoreError::Refused(format!("{name} is kept"))) })
///     }
/// }
/// ```
#[macro_export]
macro_rules! pass_on {
    ($behind:tt : $($method:ident),+) => { $($crate::pass_on!(@$method $behind);)+ };
    (@create $behind:tt) => {
        fn create<'a>(&'a self, name: &'a str, content: Vec<$crate::segments::Bytes>) -> $crate::segments::StoreFuture<'a, ()> {
            self.$behind.create(name, content)
        }
    };
    (@read $behind:tt) => {
        fn read<'a>(
            &'a self,
            name: &'a str,
            range: ::std::ops::Range<u64>,
        ) -> $crate::segments::StoreFuture<'a, $crate::segments::Bytes> {
            self.$behind.read(name, range)
        }
    };
    (@delete $behind:tt) => {
        fn delete<'a>(&'a self, name: &'a str) -> $crate::segments::StoreFuture<'a, ()> {
            self.$behind.delete(name)
        }
    };
    (@list $behind:tt) => {
        fn list<'a>(&'a self, prefix: &'a str) -> $crate::segments::StoreFuture<'a, Vec<$crate::segments::Listed>> {
            self.$behind.list(prefix)
        }
    };
    (@read_root $behind:tt) => {
        fn read_root<'a>(
            &'a self,
            name: &'a str,
        ) -> $crate::segments::StoreFuture<'a, Option<($crate::segments::Bytes, $crate::segments::Tag)>> {
            self.$behind.read_root(name)
        }
    };
    (@swap $behind:tt) => {
        fn swap<'a>(
            &'a self,
            name: &'a str,
            expected: Option<&'a $crate::segments::Tag>,
            content: $crate::segments::Bytes,
        ) -> $crate::segments::StoreFuture<'a, $crate::segments::Tag> {
            self.$behind.swap(name, expected, content)
        }
    };
}
