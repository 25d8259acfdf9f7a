//! What volumes, exports and pools do, as numbers: for Prometheus and for `novastor top`.
//!
//! ```text
//!   data-plane threads ── OpStats (plain stores) ──▶ Sample ──▶ prometheus text
//!                                                      └─ since(earlier) ──▶ StatsReport: rates and percentiles
//! ```
//!
//! Nothing is counted here and nothing runs in the background: a sample is taken when somebody asks.

pub mod prometheus;
mod report;

use std::collections::BTreeMap;
use std::time::Instant;

use backends::EngineUse;
use blockdev::stats::Snapshot;

use crate::api::types::PoolInfo;
use crate::daemon::Daemon;
use crate::exports::ExportSample;
pub use report::{ExportStats, OpStats, PoolStats, StatsReport, VolumeStats};

/// All counters at about one moment.
pub struct Sample {
    pub node: String,
    /// Seconds since 1970.
    pub started: u64,
    /// Data-plane threads.
    pub threads: usize,
    pub taken: Instant,
    pub volumes: Vec<VolumeSample>,
    pub exports: Vec<ExportSample>,
    pub pools: Vec<PoolInfo>,
    /// What volumes that are no longer open did, by pool: without it a pool's counters would fall when one is closed.
    pub closed: BTreeMap<String, Snapshot>,
}

pub struct VolumeSample {
    pub name: String,
    pub pool: String,
    pub size: u64,
    pub stats: Snapshot,
    pub problem: Option<String>,
    pub last_error: Option<String>,
    /// Of a mapped volume.
    pub engine: Option<EngineUse>,
}

impl Sample {
    /// Asks everybody. Pools may block.
    pub fn take(daemon: &Daemon) -> Sample {
        let volumes = daemon.open_volumes().list().into_iter().map(|(id, volume)| VolumeSample {
            name: id.to_string(),
            size: volume.size(),
            stats: volume.stats(),
            problem: volume.health(),
            last_error: volume.last_error(),
            engine: daemon.pools().get(&id.pool).ok().and_then(|pool| pool.engine_use(&id.name)),
            pool: id.pool,
        });
        Sample {
            node: daemon.config().daemon.node.clone(),
            started: daemon.status().started,
            threads: daemon.plane().handles().len(),
            taken: blockdev::clock::monotonic(),
            volumes: volumes.collect(),
            exports: daemon.exports().samples(),
            pools: daemon.list_pools(),
            closed: daemon.open_volumes().closed_stats(),
        }
    }
}
