//! Counters and latency histograms that cost a plain store on the data path.
//!
//! Each [`OpStats`] has one writer, the data-plane thread that owns it; any thread may take a [`Snapshot`]. Latencies are in
//! nanoseconds and fall into buckets an eighth of a power of two wide, so a percentile is off by at most 12.5%.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use crate::request::Op;

/// The kinds of request that are counted apart.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum OpClass {
    Read,
    Write,
    Flush,
    Discard,
    WriteZeroes,
    BlockStatus,
}

impl OpClass {
    pub const ALL: [OpClass; 6] =
        [OpClass::Read, OpClass::Write, OpClass::Flush, OpClass::Discard, OpClass::WriteZeroes, OpClass::BlockStatus];

    /// As it stands in metrics.
    pub fn name(self) -> &'static str {
        match self {
            OpClass::Read => "read",
            OpClass::Write => "write",
            OpClass::Flush => "flush",
            OpClass::Discard => "discard",
            OpClass::WriteZeroes => "write_zeroes",
            OpClass::BlockStatus => "block_status",
        }
    }
}

impl From<Op> for OpClass {
    fn from(op: Op) -> OpClass {
        match op {
            Op::Read => OpClass::Read,
            Op::Write { .. } => OpClass::Write,
            Op::Flush => OpClass::Flush,
            Op::Discard => OpClass::Discard,
            Op::WriteZeroes { .. } => OpClass::WriteZeroes,
            Op::BlockStatus => OpClass::BlockStatus,
        }
    }
}

/// The stages of a request's life that are timed.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Stage {
    /// From arrival to the backend: waiting for a range or a slot.
    Queued,
    /// In the backend.
    Backend,
    /// From arrival to completion.
    Total,
}

impl Stage {
    pub const ALL: [Stage; 3] = [Stage::Queued, Stage::Backend, Stage::Total];

    pub fn name(self) -> &'static str {
        match self {
            Stage::Queued => "queued",
            Stage::Backend => "backend",
            Stage::Total => "total",
        }
    }
}

const SUB_BITS: u32 = 3;
const BUCKETS: usize = 37 << SUB_BITS;

fn bucket_of(nanos: u64) -> usize {
    let value = nanos.max(1 << SUB_BITS);
    let exponent = value.ilog2();
    let sub = (value >> (exponent - SUB_BITS)) as usize & ((1 << SUB_BITS) - 1);
    ((((exponent - SUB_BITS) as usize) << SUB_BITS) + sub).min(BUCKETS - 1)
}

fn bucket_top(bucket: usize) -> u64 {
    let exponent = (bucket >> SUB_BITS) as u32 + SUB_BITS;
    let sub = (bucket & ((1 << SUB_BITS) - 1)) as u64;
    ((1 << SUB_BITS) + sub + 1) << (exponent - SUB_BITS)
}

fn add(counter: &AtomicU64, amount: u64) {
    counter.store(counter.load(Ordering::Relaxed) + amount, Ordering::Relaxed);
}

struct Histogram {
    buckets: [AtomicU64; BUCKETS],
    sum_nanos: AtomicU64,
}

impl Histogram {
    fn new() -> Histogram {
        Histogram { buckets: [const { AtomicU64::new(0) }; BUCKETS], sum_nanos: AtomicU64::new(0) }
    }

    fn record(&self, latency: Duration) {
        let nanos = latency.as_nanos() as u64;
        add(&self.buckets[bucket_of(nanos)], 1);
        add(&self.sum_nanos, nanos);
    }
}

struct ClassStats {
    started: AtomicU64,
    ended: AtomicU64,
    errors: AtomicU64,
    bytes: AtomicU64,
    stages: [Histogram; 3],
}

impl ClassStats {
    fn new() -> ClassStats {
        ClassStats {
            started: AtomicU64::new(0),
            ended: AtomicU64::new(0),
            errors: AtomicU64::new(0),
            bytes: AtomicU64::new(0),
            stages: std::array::from_fn(|_| Histogram::new()),
        }
    }
}

/// What one thread did. Only that thread may record.
pub struct OpStats {
    classes: [ClassStats; 6],
}

impl Default for OpStats {
    fn default() -> Self {
        OpStats { classes: std::array::from_fn(|_| ClassStats::new()) }
    }
}

impl OpStats {
    /// A request was taken in.
    pub fn started(&self, class: OpClass) {
        add(&self.classes[class as usize].started, 1);
    }

    /// It spent this long in a stage.
    pub fn stage(&self, class: OpClass, stage: Stage, latency: Duration) {
        self.classes[class as usize].stages[stage as usize].record(latency);
    }

    /// It completed: `bytes` moved, or failed.
    pub fn ended(&self, class: OpClass, bytes: u64, ok: bool) {
        let stats = &self.classes[class as usize];
        add(&stats.ended, 1);
        if ok { add(&stats.bytes, bytes) } else { add(&stats.errors, 1) }
    }

    /// Reads and writes completed.
    pub fn transfers(&self) -> u64 {
        [OpClass::Read, OpClass::Write].map(|class| self.classes[class as usize].ended.load(Ordering::Relaxed)).iter().sum()
    }

    /// Adds what is counted here to `snapshot`.
    pub fn add_to(&self, snapshot: &mut Snapshot) {
        for (from, to) in self.classes.iter().zip(&mut snapshot.classes) {
            to.started += from.started.load(Ordering::Relaxed);
            to.ended += from.ended.load(Ordering::Relaxed);
            to.errors += from.errors.load(Ordering::Relaxed);
            to.bytes += from.bytes.load(Ordering::Relaxed);
            for (from, to) in from.stages.iter().zip(&mut to.stages) {
                for (from, to) in from.buckets.iter().zip(&mut to.buckets) {
                    *to += from.load(Ordering::Relaxed);
                }
                to.sum_nanos += from.sum_nanos.load(Ordering::Relaxed);
            }
        }
    }
}

/// The sum of several threads' statistics at about one moment.
#[derive(Clone)]
pub struct Snapshot {
    pub classes: [ClassSnapshot; 6],
}

/// One kind of request.
#[derive(Clone)]
pub struct ClassSnapshot {
    pub started: u64,
    pub ended: u64,
    pub errors: u64,
    pub bytes: u64,
    pub stages: [HistogramSnapshot; 3],
}

/// A latency distribution.
#[derive(Clone)]
pub struct HistogramSnapshot {
    buckets: Vec<u64>,
    pub sum_nanos: u64,
}

impl Default for Snapshot {
    fn default() -> Self {
        let histogram = HistogramSnapshot { buckets: vec![0; BUCKETS], sum_nanos: 0 };
        let stages = [histogram.clone(), histogram.clone(), histogram];
        let class = ClassSnapshot { started: 0, ended: 0, errors: 0, bytes: 0, stages };
        Snapshot { classes: std::array::from_fn(|_| class.clone()) }
    }
}

impl Snapshot {
    /// Counts what `other` counted as well.
    pub fn add(&mut self, other: &Snapshot) {
        for (to, from) in self.classes.iter_mut().zip(&other.classes) {
            to.started += from.started;
            to.ended += from.ended;
            to.errors += from.errors;
            to.bytes += from.bytes;
            for (to, from) in to.stages.iter_mut().zip(&from.stages) {
                to.buckets.iter_mut().zip(&from.buckets).for_each(|(to, from)| *to += from);
                to.sum_nanos += from.sum_nanos;
            }
        }
    }

    pub fn class(&self, class: OpClass) -> &ClassSnapshot {
        &self.classes[class as usize]
    }
}

impl ClassSnapshot {
    pub fn in_flight(&self) -> u64 {
        self.started.saturating_sub(self.ended)
    }

    pub fn stage(&self, stage: Stage) -> &HistogramSnapshot {
        &self.stages[stage as usize]
    }
}

impl HistogramSnapshot {
    pub fn count(&self) -> u64 {
        self.buckets.iter().sum()
    }

    /// The latency that a share `quantile` (0 to 1) of requests did not exceed; `None` without requests.
    pub fn quantile(&self, quantile: f64) -> Option<Duration> {
        let wanted = ((self.count() as f64 * quantile).ceil() as u64).max(1);
        let mut seen = 0;
        self.buckets.iter().enumerate().find_map(|(bucket, count)| {
            seen += count;
            (seen >= wanted).then(|| Duration::from_nanos(bucket_top(bucket)))
        })
    }

    /// Requests that took at most about `limit`, for cumulative exposition.
    pub fn at_most(&self, limit: Duration) -> u64 {
        let limit = limit.as_nanos() as u64;
        self.buckets.iter().enumerate().take_while(|(bucket, _)| bucket_top(*bucket) <= limit).map(|(_, count)| count).sum()
    }

    /// What was recorded since `earlier` was taken.
    pub fn since(&self, earlier: &HistogramSnapshot) -> HistogramSnapshot {
        let buckets = self.buckets.iter().zip(&earlier.buckets).map(|(now, then)| now.saturating_sub(*then)).collect();
        HistogramSnapshot { buckets, sum_nanos: self.sum_nanos.saturating_sub(earlier.sum_nanos) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn buckets_are_monotonic_and_tight() {
        let mut last = 0;
        for nanos in (1..2_000_000u64).step_by(37) {
            let bucket = bucket_of(nanos);
            assert!(bucket >= last);
            last = bucket;
            assert!(bucket_top(bucket) > nanos || bucket == BUCKETS - 1);
            assert!(nanos < 16 || bucket_top(bucket) as f64 <= nanos as f64 * 1.13, "{nanos}");
        }
        assert_eq!(bucket_of(u64::MAX), BUCKETS - 1);
    }

    #[test]
    fn quantiles_and_in_flight() {
        let stats = OpStats::default();
        for micros in 1..=100 {
            stats.started(OpClass::Read);
            stats.stage(OpClass::Read, Stage::Total, Duration::from_micros(micros));
            stats.ended(OpClass::Read, 4096, micros != 7);
        }
        stats.started(OpClass::Read);
        let mut snapshot = Snapshot::default();
        stats.add_to(&mut snapshot);
        let class = snapshot.class(OpClass::Read);
        assert_eq!((class.in_flight(), class.errors, class.bytes), (1, 1, 99 * 4096));
        let total = class.stage(Stage::Total);
        let median = total.quantile(0.5).unwrap().as_micros();
        assert!((50..=57).contains(&median), "{median}");
        assert_eq!(total.since(total).count(), 0);
        let mut twice = snapshot.clone();
        twice.add(&snapshot);
        let doubled = twice.class(OpClass::Read);
        assert_eq!((doubled.in_flight(), doubled.errors, doubled.stage(Stage::Total).count()), (2, 2, 200));
        assert!(total.at_most(Duration::from_micros(50)) >= 40);
        assert_eq!(class.stage(Stage::Queued).quantile(0.5), None);
    }
}
