//! What NBD clients can ask of a mapped volume beside what is allocated: which blocks have changed since a snapshot.
//!
//! ```text
//!   novastor:changed-since:SNAP      flag 1: the range may differ from what snapshot SNAP has
//! ```
//!
//! Of an exported snapshot it is told what differs between the two; of a volume, what differed when the client attached.

use std::ops::Range;
use std::sync::Arc;

use backends::{Pool, VolumeRecord};
use nbd::Contexts;

use crate::daemon::pools::Pools;
use crate::names::VolumeId;

/// Before the name of a snapshot.
const CHANGED_SINCE: &str = "novastor:changed-since:";
/// Ranges kept for a client. Where there are more, small gaps between them count as changed.
const RANGES_MAX: usize = 1 << 20;

/// The contexts of one export.
pub struct Changes {
    pub pools: Arc<Pools>,
    pub id: VolumeId,
}

impl Changes {
    fn record(&self) -> Result<(Arc<dyn Pool>, VolumeRecord), String> {
        let pool = self.pools.get(&self.id.pool).map_err(|error| error.to_string())?;
        let record = pool.get(&self.id.name).map_err(|error| error.to_string())?;
        Ok((pool, record))
    }
}

impl Contexts for Changes {
    fn names(&self) -> Vec<String> {
        let Ok((pool, record)) = self.record() else { return Vec::new() };
        if !pool.tells_changes(record.layout) {
            return Vec::new();
        }
        let others = record.snapshots.keys().filter(|name| Some(*name) != self.id.snapshot.as_ref());
        others.map(|name| format!("{CHANGED_SINCE}{name}")).collect()
    }

    fn marked(&self, name: &str) -> Result<Vec<Range<u64>>, String> {
        let (pool, record) = self.record()?;
        let since = name.strip_prefix(CHANGED_SINCE).and_then(|name| Some((name, record.snapshots.get(name)?)));
        let (since, snapshot) = since.ok_or_else(|| format!("volume {} has no such snapshot", self.id.volume()))?;
        let changed = pool.changed(&self.id.name, since, self.id.snapshot.as_deref()).map_err(|error| error.to_string())?;
        // What lay past the snapshot's end was not there.
        let changed = changed.ok_or_else(|| format!("pool {} does not tell what has changed", self.id.pool))?;
        let mut ranges: Vec<Range<u64>> = changed.into_iter().take_while(|range| range.start < snapshot.size).collect();
        ranges.push(snapshot.size..u64::MAX);
        Ok(coarsened(ranges, RANGES_MAX))
    }
}

/// Joins ranges that touch, and then those with small gaps between them until there are at most `count_max`.
fn coarsened(mut ranges: Vec<Range<u64>>, count_max: usize) -> Vec<Range<u64>> {
    let mut gap_max = 0;
    loop {
        ranges.dedup_by(|next, last| {
            let joins = next.start <= last.end.saturating_add(gap_max);
            last.end = if joins { last.end.max(next.end) } else { last.end };
            joins
        });
        if ranges.len() <= count_max.max(1) {
            return ranges;
        }
        gap_max = (gap_max * 2).max(4096);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn too_many_ranges_are_joined_over_small_gaps() {
        let ranges = || vec![0..10, 10..20, 5000..6000, 9000..9001, 1 << 20..2 << 20];
        assert_eq!(coarsened(ranges(), 9), [0..20, 5000..6000, 9000..9001, 1 << 20..2 << 20]);
        assert_eq!(coarsened(ranges(), 3), [0..20, 5000..9001, 1 << 20..2 << 20]);
        assert_eq!(coarsened(ranges(), 1), std::slice::from_ref(&(0..2 << 20)));
        assert_eq!(coarsened(vec![0..5, 7..u64::MAX], 0), std::slice::from_ref(&(0..u64::MAX)));
    }
}
