//! Metadata contexts of an export's own, beside `base:allocation`: ranges that are marked, such as what has changed since some point in time.
//!
//! ```text
//!   negotiation: names ─▶ selected ─▶ marked ranges, asked for once ─▶ BLOCK_STATUS answers from them
//! ```
//!
//! What a context tells stays as it was when the client attached.

use std::ops::Range;
use std::sync::Arc;

use crate::protocol::{Headers, MARKED};

/// The most extents of one context in a reply.
const EXTENTS_MAX: usize = 1 << 12;

/// Where an export's own contexts come from. Called on threads that may block.
pub trait Contexts: Send + Sync {
    /// Their names now, `NAMESPACE:LEAF` each.
    fn names(&self) -> Vec<String>;

    /// The ranges, in bytes, that are marked in a context: in order, apart from each other, and to `u64::MAX` where all that may follow is.
    ///
    /// # Errors
    /// In words for the log; the client's questions about the context are answered with EIO.
    fn marked(&self, name: &str) -> Result<Vec<Range<u64>>, String>;
}

/// A context that one client selected.
#[derive(Clone)]
pub(crate) struct Context {
    pub(crate) id: u32,
    /// `None`: it could not be found out.
    marked: Option<Arc<[Range<u64>]>>,
}

impl Context {
    /// Asks for the ranges. Blocks.
    pub(crate) fn find(contexts: Option<&dyn Contexts>, id: u32, name: &str) -> Context {
        let found = contexts.map_or_else(|| Err("the export has no such context".to_owned()), |contexts| contexts.marked(name));
        let marked = found.inspect_err(|why| tracing::warn!("NBD: metadata context {name}: {why}"));
        Context { id, marked: marked.ok().map(Arc::from) }
    }

    /// Extents from `offset` on, marked and not by turns, as they stand in a reply, and their number. `None`: nothing is known.
    pub(crate) fn encode(&self, offset: u64, len: u64, one: bool, headers: Headers) -> Option<(u32, Vec<u8>)> {
        let marked = self.marked.as_ref()?;
        let (mut from, end) = (offset, offset.checked_add(len)?);
        let mut next = marked.partition_point(|range| range.end <= from);
        let (mut count, mut bytes) = (0, Vec::new());
        while from < end && count < if one { 1 } else { EXTENTS_MAX } {
            let (to, is_marked) = match marked.get(next) {
                Some(range) if range.start <= from => {
                    next += 1;
                    (range.end, true)
                }
                Some(range) => (range.start, false),
                None => (end, false),
            };
            let (to, flags) = (to.min(end), if is_marked { MARKED } else { 0 });
            if headers == Headers::Extended {
                bytes.extend((to - from).to_be_bytes());
                bytes.extend(u64::from(flags).to_be_bytes());
            } else {
                bytes.extend(((to - from) as u32).to_be_bytes());
                bytes.extend(flags.to_be_bytes());
            }
            (from, count) = (to, count + 1);
        }
        Some((count as u32, bytes))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Fixed(Result<Vec<Range<u64>>, String>);

    impl Contexts for Fixed {
        fn names(&self) -> Vec<String> {
            vec!["x:y".to_owned()]
        }
        fn marked(&self, _name: &str) -> Result<Vec<Range<u64>>, String> {
            self.0.clone()
        }
    }

    fn context(marked: Result<Vec<Range<u64>>, String>) -> Context {
        Context::find(Some(&Fixed(marked)), 2, "x:y")
    }

    fn extents(context: &Context, offset: u64, len: u64, one: bool) -> Vec<(u32, u32)> {
        let (count, bytes) = context.encode(offset, len, one, Headers::Structured).unwrap();
        let word = |bytes: &[u8]| u32::from_be_bytes(bytes.try_into().unwrap());
        let extents: Vec<_> = bytes.chunks(8).map(|extent| (word(&extent[..4]), word(&extent[4..]))).collect();
        assert_eq!(extents.len(), count as usize);
        extents
    }

    #[test]
    fn marked_ranges_and_gaps_come_by_turns_and_are_cut() {
        let context = context(Ok(vec![10..20, 30..40, 100..u64::MAX]));
        assert_eq!(extents(&context, 0, 50, false), [(10, 0), (10, 1), (10, 0), (10, 1), (10, 0)]);
        assert_eq!(extents(&context, 15, 10, false), [(5, 1), (5, 0)]);
        assert_eq!(extents(&context, 20, 10, false), [(10, 0)]);
        assert_eq!(extents(&context, 15, 100, true), [(5, 1)]);
        assert_eq!(extents(&context, 200, 7, false), [(7, 1)]);
        assert_eq!(context.encode(10, 10, false, Headers::Extended).unwrap().1, [10_u64, 1].map(u64::to_be_bytes).concat());
    }

    #[test]
    fn what_could_not_be_found_out_is_not_told() {
        assert!(context(Err("the pool is away".to_owned())).encode(0, 1, false, Headers::Structured).is_none());
        assert!(Context::find(None, 2, "x:y").encode(0, 1, false, Headers::Structured).is_none());
    }
}
