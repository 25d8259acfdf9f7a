//! Rates and percentiles between two samples.

use std::collections::BTreeMap;
use std::time::Duration;

use blockdev::stats::{ClassSnapshot, OpClass, Snapshot, Stage};
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use super::Sample;

/// Totals, and rates over an interval.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
pub struct StatsReport {
    pub node: String,
    /// What the rates and percentiles were measured over, in milliseconds.
    pub interval_ms: u64,
    pub volumes: Vec<VolumeStats>,
    pub exports: Vec<ExportStats>,
    pub pools: Vec<PoolStats>,
}

/// An open volume.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
pub struct VolumeStats {
    pub volume: String,
    pub pool: String,
    /// Bytes.
    pub size: u64,
    pub ok: bool,
    /// While it cannot serve everything it should: why.
    pub problem: Option<String>,
    pub last_error: Option<String>,
    /// Of a mapped volume: bytes of its local log that hold what the pool has not got yet, and of all of it.
    pub log_used: Option<u64>,
    pub log_size: Option<u64>,
    /// Of a mapped volume: how long the oldest write has waited that the pool has not got yet, in milliseconds, to a second.
    pub lag_ms: Option<u64>,
    /// Of a mapped volume, of what it has brought into the pool since it was opened: bytes with data for each byte stored.
    pub reduction: Option<f64>,
    /// The share of these that was found to be stored already, 0 to 1.
    pub index_hit_rate: Option<f64>,
    /// Of a mapped volume: bytes that garbage collection has done away with since it was opened, and whether it runs now.
    pub freed: Option<u64>,
    pub is_collecting: Option<bool>,
    /// By kind: read, write, flush, discard, write_zeroes, block_status.
    pub operations: BTreeMap<String, OpStats>,
}

/// An export.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
pub struct ExportStats {
    pub export: String,
    pub volume: String,
    /// It accepts clients.
    pub ready: bool,
    /// Why it does not.
    pub error: Option<String>,
    pub clients: usize,
    /// Empty while it is not ready.
    pub operations: BTreeMap<String, OpStats>,
}

/// A pool: the sum of its open volumes.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
pub struct PoolStats {
    pub pool: String,
    pub driver: String,
    pub ok: bool,
    /// Its state in words.
    pub detail: String,
    pub iops: f64,
    pub bytes_per_second: f64,
    pub errors: u64,
    pub in_flight: u64,
}

/// One kind of operation.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct OpStats {
    /// Completed since the volume was opened.
    pub ops: u64,
    pub bytes: u64,
    pub errors: u64,
    pub in_flight: u64,
    /// Over the interval, as everything below.
    pub iops: f64,
    pub bytes_per_second: f64,
    pub p50_us: Option<f64>,
    pub p99_us: Option<f64>,
    pub p999_us: Option<f64>,
    /// In the backend alone.
    pub backend_p99_us: Option<f64>,
}

impl Sample {
    /// What happened since `earlier`. What was not there then counts from zero.
    pub fn since(&self, earlier: &Sample) -> StatsReport {
        let interval = self.taken.saturating_duration_since(earlier.taken).max(Duration::from_millis(1));
        let volumes: Vec<VolumeStats> = self
            .volumes
            .iter()
            .map(|now| {
                let then = earlier.volumes.iter().find(|then| then.name == now.name).map(|then| &then.stats);
                VolumeStats {
                    volume: now.name.clone(),
                    pool: now.pool.clone(),
                    size: now.size,
                    ok: now.problem.is_none(),
                    problem: now.problem.clone(),
                    last_error: now.last_error.clone(),
                    log_used: now.engine.map(|engine| engine.log.used),
                    log_size: now.engine.map(|engine| engine.log.size),
                    lag_ms: now.engine.map(|engine| engine.log.lag.as_millis() as u64),
                    reduction: now.engine.and_then(|engine| ratio(engine.destaged.logical, engine.destaged.stored)),
                    index_hit_rate: now.engine.and_then(|engine| ratio(engine.destaged.duplicate, engine.destaged.logical)),
                    freed: now.engine.map(|engine| engine.collected.freed),
                    is_collecting: now.engine.map(|engine| engine.collected.is_running),
                    operations: operations(&now.stats, then, interval),
                }
            })
            .collect();
        let exports = self.exports.iter().map(|now| {
            let before = earlier.exports.iter().find(|then| then.id == now.id).and_then(|then| then.activity.as_ref().ok());
            let before = before.map(|(_, stats)| stats);
            ExportStats {
                export: now.id.clone(),
                volume: now.volume.clone(),
                ready: now.activity.is_ok(),
                error: now.activity.as_ref().err().cloned(),
                clients: now.activity.as_ref().map_or(0, |(clients, _)| *clients),
                operations: now.activity.as_ref().map(|(_, stats)| operations(stats, before, interval)).unwrap_or_default(),
            }
        });
        let exports = exports.collect();
        let pools = self.pools.iter().map(|pool| {
            let own = volumes.iter().filter(|volume| volume.pool == pool.name).flat_map(|volume| volume.operations.values());
            let mut stats = PoolStats {
                pool: pool.name.clone(),
                driver: pool.driver.clone(),
                ok: pool.ok,
                detail: pool.detail.clone(),
                iops: 0.0,
                bytes_per_second: 0.0,
                errors: 0,
                in_flight: 0,
            };
            for operation in own {
                stats.iops += operation.iops;
                stats.bytes_per_second += operation.bytes_per_second;
                stats.errors += operation.errors;
                stats.in_flight += operation.in_flight;
            }
            stats
        });
        let pools = pools.collect();
        StatsReport { node: self.node.clone(), interval_ms: interval.as_millis() as u64, volumes, exports, pools }
    }
}

/// Nothing where there is nothing to compare with.
fn ratio(part: u64, whole: u64) -> Option<f64> {
    (whole > 0).then(|| part as f64 / whole as f64)
}

fn operations(now: &Snapshot, then: Option<&Snapshot>, interval: Duration) -> BTreeMap<String, OpStats> {
    let nothing = Snapshot::default();
    // A volume that was reopened meanwhile counts from zero again.
    let restarted = |then: &&Snapshot| OpClass::ALL.iter().all(|class| then.class(*class).ended <= now.class(*class).ended);
    let then = then.filter(restarted).unwrap_or(&nothing);
    let stats = |class: OpClass| (class.name().to_owned(), operation(now.class(class), then.class(class), interval));
    OpClass::ALL.into_iter().map(stats).collect()
}

fn operation(now: &ClassSnapshot, then: &ClassSnapshot, interval: Duration) -> OpStats {
    let per_second = |now: u64, then: u64| now.saturating_sub(then) as f64 / interval.as_secs_f64();
    let total = now.stage(Stage::Total).since(then.stage(Stage::Total));
    let backend = now.stage(Stage::Backend).since(then.stage(Stage::Backend));
    let micros = |latency: Option<Duration>| latency.map(|latency| latency.as_nanos() as f64 / 1e3);
    OpStats {
        ops: now.ended,
        bytes: now.bytes,
        errors: now.errors,
        in_flight: now.in_flight(),
        iops: per_second(now.ended, then.ended),
        bytes_per_second: per_second(now.bytes, then.bytes),
        p50_us: micros(total.quantile(0.5)),
        p99_us: micros(total.quantile(0.99)),
        p999_us: micros(total.quantile(0.999)),
        backend_p99_us: micros(backend.quantile(0.99)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use blockdev::stats::OpStats as Counters;

    #[test]
    fn rates_and_percentiles_are_of_the_interval() {
        let counters = Counters::default();
        let record = |times: u64, micros: u64| {
            for _ in 0..times {
                counters.started(OpClass::Read);
                counters.stage(OpClass::Read, Stage::Total, Duration::from_micros(micros));
                counters.ended(OpClass::Read, 4096, true);
            }
        };
        let snapshot = || {
            let mut snapshot = Snapshot::default();
            counters.add_to(&mut snapshot);
            snapshot
        };
        record(1000, 10);
        let then = snapshot();
        record(100, 1000);
        let now = snapshot();
        let read = &operations(&now, Some(&then), Duration::from_secs(2))["read"];
        assert_eq!((read.ops, read.iops, read.bytes_per_second), (1100, 50.0, 204_800.0));
        assert!(read.p50_us.unwrap() > 900.0, "{read:?}");
        let reopened = &operations(&then, Some(&now), Duration::from_secs(1))["read"];
        assert_eq!(reopened.iops, 1000.0);
        assert_eq!(operations(&now, None, Duration::from_secs(1))["write"], OpStats::default());
    }
}
