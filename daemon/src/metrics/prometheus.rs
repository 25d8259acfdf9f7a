//! A sample as Prometheus text, format 0.0.4.

use std::fmt::Write;
use std::time::Duration;

use backends::EngineUse;
use blockdev::stats::{ClassSnapshot, OpClass, Snapshot, Stage};

use super::{Sample, VolumeSample};
use crate::api::types::{PoolInfo, Protocol};
use crate::exports::ExportSample;

/// Upper limits of the latency buckets, in microseconds.
const BUCKETS_US: [u64; 16] =
    [5, 10, 25, 50, 100, 250, 500, 1_000, 2_500, 5_000, 10_000, 25_000, 100_000, 500_000, 2_000_000, 10_000_000];

/// All metrics.
pub fn render(sample: &Sample) -> String {
    let mut page = Page::default();
    page.family("novastor_info", "gauge", "The daemon, in its labels.");
    page.value("novastor_info", &[("node", &sample.node), ("version", env!("CARGO_PKG_VERSION"))], 1.0);
    page.family("novastor_start_time_seconds", "gauge", "When the daemon started, in seconds since 1970.");
    page.value("novastor_start_time_seconds", &[], sample.started as f64);
    page.family("novastor_data_plane_threads", "gauge", "Threads that carry I/O.");
    page.value("novastor_data_plane_threads", &[], sample.threads as f64);
    pools(&mut page, sample);
    volumes(&mut page, sample);
    exports(&mut page, sample);
    page.text
}

type PoolBytes = fn(&PoolInfo) -> Option<u64>;
type EngineValue = fn(EngineUse) -> f64;
type Count = fn(&ClassSnapshot) -> u64;
type Labels<'a> = Vec<(&'a str, &'a str)>;

fn pools(page: &mut Page, sample: &Sample) {
    page.family("novastor_pool_healthy", "gauge", "1 while the backend works.");
    for pool in &sample.pools {
        page.value("novastor_pool_healthy", &[("pool", &pool.name), ("driver", &pool.driver)], f64::from(pool.ok));
    }
    page.family("novastor_pool_problem", "gauge", "Present while the backend does not work: why.");
    for pool in sample.pools.iter().filter(|pool| !pool.ok) {
        page.value("novastor_pool_problem", &[("pool", &pool.name), ("text", &bounded(&pool.detail))], 1.0);
    }
    let sizes: [(&str, &str, PoolBytes); 2] = [
        ("novastor_pool_size_bytes", "Size of the backend.", |pool| pool.total),
        ("novastor_pool_free_bytes", "Free space of the backend.", |pool| pool.free),
    ];
    for (name, help, size) in sizes {
        page.family(name, "gauge", help);
        for (pool, bytes) in sample.pools.iter().filter_map(|pool| Some((pool, size(pool)?))) {
            page.value(name, &[("pool", &pool.name)], bytes as f64);
        }
    }
    let of_pool: Vec<(Labels<'_>, Vec<&Snapshot>)> = sample
        .pools
        .iter()
        .map(|pool| {
            let open = sample.volumes.iter().filter(|volume| volume.pool == pool.name).map(|volume| &volume.stats);
            (vec![("pool", pool.name.as_str())], open.chain(sample.closed.get(&pool.name)).collect())
        })
        .collect();
    page.operations("novastor_pool", &of_pool);
    page.latencies("novastor_pool", &of_pool, &[Stage::Backend]);
}

fn volumes(page: &mut Page, sample: &Sample) {
    page.family("novastor_volume_size_bytes", "gauge", "Size of an open volume.");
    for volume in &sample.volumes {
        page.value("novastor_volume_size_bytes", &[("volume", &volume.name)], volume.size as f64);
    }
    page.family("novastor_volume_healthy", "gauge", "1 while the volume serves everything it should.");
    for volume in &sample.volumes {
        page.value("novastor_volume_healthy", &[("volume", &volume.name)], f64::from(volume.problem.is_none()));
    }
    page.family("novastor_volume_problem", "gauge", "Present while the volume does not serve everything: why.");
    page.texts("novastor_volume_problem", sample, |volume| volume.problem.as_ref());
    page.family(
        "novastor_volume_last_error",
        "gauge",
        "Present once a request has failed: how the last one did, without its numbers.",
    );
    page.texts("novastor_volume_last_error", sample, |volume| volume.last_error.as_ref());
    engines(page, sample);
    let of_volume: Vec<(Labels<'_>, Vec<&Snapshot>)> =
        sample.volumes.iter().map(|volume| (vec![("volume", volume.name.as_str())], vec![&volume.stats])).collect();
    page.operations("novastor_volume", &of_volume);
    page.latencies("novastor_volume", &of_volume, &Stage::ALL);
}

fn engines(page: &mut Page, sample: &Sample) {
    let families: [(&str, &str, &str, EngineValue); 15] = [
        ("log_used_bytes", "gauge", "What the local log of a mapped volume holds for the pool.", |engine| engine.log.used as f64),
        ("log_size_bytes", "gauge", "Size of the local log of a mapped volume.", |engine| engine.log.size as f64),
        ("destage_lag_seconds", "gauge", "How long the oldest write has waited that the pool has not got yet.", |engine| {
            engine.log.lag.as_secs_f64()
        }),
        (
            "pool_waits_seconds",
            "gauge",
            "How long the pool has taken nothing that it was given; 0 while it takes it.",
            |engine| engine.waits.as_secs_f64(),
        ),
        ("unique_bytes", "gauge", "Blocks of a mapped volume in the pool, before compression.", |engine| {
            engine.reduced.unique as f64
        }),
        ("compressed_bytes", "gauge", "What these blocks take.", |engine| engine.reduced.compressed as f64),
        ("map_bytes", "gauge", "What the map of a mapped volume takes in the pool.", |engine| engine.reduced.map as f64),
        ("index_memory_bytes", "gauge", "Memory of the index for deduplication.", |engine| engine.index as f64),
        ("destaged_bytes_total", "counter", "Blocks with data that were brought into the pool.", |engine| {
            engine.destaged.logical as f64
        }),
        ("destaged_duplicate_bytes_total", "counter", "Of these, blocks that the index found to be stored already.", |engine| {
            engine.destaged.duplicate as f64
        }),
        ("destaged_stored_bytes_total", "counter", "What the others took in the pool.", |engine| engine.destaged.stored as f64),
        ("reduction_ratio", "gauge", "Destaged bytes for each byte stored, since the volume was opened.", |engine| {
            engine.destaged.logical as f64 / engine.destaged.stored.max(1) as f64
        }),
        ("collected_moved_bytes_total", "counter", "Blocks that garbage collection has copied.", |engine| {
            engine.collected.moved as f64
        }),
        ("collected_freed_bytes_total", "counter", "Objects that garbage collection has done away with.", |engine| {
            engine.collected.freed as f64
        }),
        ("collecting", "gauge", "1 while garbage is being collected.", |engine| f64::from(engine.collected.is_running)),
    ];
    for (suffix, kind, help, value) in families {
        let name = format!("novastor_volume_{suffix}");
        page.family(&name, kind, help);
        for (volume, engine) in sample.volumes.iter().filter_map(|volume| Some((volume, volume.engine?))) {
            page.value(&name, &[("volume", &volume.name)], value(engine));
        }
    }
}

fn exports(page: &mut Page, sample: &Sample) {
    let named: Vec<_> = sample.exports.iter().map(|export| (export_labels(export), &export.activity)).collect();
    page.family("novastor_export_ready", "gauge", "1 while the export accepts clients.");
    for (labels, activity) in &named {
        page.value("novastor_export_ready", labels, f64::from(activity.is_ok()));
    }
    page.family("novastor_export_problem", "gauge", "Present while the export accepts no clients: why.");
    for (labels, reason) in named.iter().filter_map(|(labels, activity)| Some((labels, activity.as_ref().err()?))) {
        page.value("novastor_export_problem", &[labels.as_slice(), &[("text", &bounded(reason))]].concat(), 1.0);
    }
    let running: Vec<_> = named.into_iter().filter_map(|(labels, activity)| Some((labels, activity.as_ref().ok()?))).collect();
    page.family("novastor_export_clients", "gauge", "Clients attached.");
    for (labels, (clients, _)) in &running {
        page.value("novastor_export_clients", labels, *clients as f64);
    }
    let of_export: Vec<(Labels<'_>, Vec<&Snapshot>)> =
        running.into_iter().map(|(labels, (_, stats))| (labels, vec![stats])).collect();
    page.operations("novastor_export", &of_export);
    page.latencies("novastor_export", &of_export, &[Stage::Total]);
}

fn export_labels(export: &ExportSample) -> Labels<'_> {
    vec![("export", &export.id), ("volume", &export.volume), ("protocol", protocol(export.protocol))]
}

fn protocol(protocol: Protocol) -> &'static str {
    match protocol {
        Protocol::Nbd => "nbd",
        Protocol::VhostUser => "vhost-user",
    }
}

#[derive(Default)]
struct Page {
    text: String,
}

impl Page {
    fn family(&mut self, name: &str, kind: &str, help: &str) {
        let _ = writeln!(self.text, "# HELP {name} {help}\n# TYPE {name} {kind}");
    }

    fn value(&mut self, name: &str, labels: &[(&str, &str)], value: f64) {
        let labels: Vec<String> = labels.iter().map(|(key, value)| format!("{key}=\"{}\"", escape(value))).collect();
        let labels = if labels.is_empty() { String::new() } else { format!("{{{}}}", labels.join(",")) };
        let _ = writeln!(self.text, "{name}{labels} {value}");
    }

    fn texts(&mut self, name: &str, sample: &Sample, text: impl Fn(&VolumeSample) -> Option<&String>) {
        for (volume, text) in sample.volumes.iter().filter_map(|volume| Some((volume, text(volume)?))) {
            self.value(name, &[("volume", &volume.name), ("text", &bounded(text))], 1.0);
        }
    }

    fn operations(&mut self, prefix: &str, subjects: &[(Labels<'_>, Vec<&Snapshot>)]) {
        let families: [(&str, &str, &str, Count); 4] = [
            ("operations_total", "counter", "Operations completed.", |class| class.ended),
            ("bytes_total", "counter", "Bytes of operations that succeeded.", |class| class.bytes),
            ("errors_total", "counter", "Operations that failed.", |class| class.errors),
            ("in_flight", "gauge", "Operations taken and not completed.", ClassSnapshot::in_flight),
        ];
        for (suffix, kind, help, count) in families {
            let name = format!("{prefix}_{suffix}");
            self.family(&name, kind, help);
            for (labels, stats) in subjects {
                for class in OpClass::ALL {
                    let sum: u64 = stats.iter().map(|stats| count(stats.class(class))).sum();
                    let labels = [labels.as_slice(), &[("op", class.name())]].concat();
                    self.value(&name, &labels, sum as f64);
                }
            }
        }
    }

    fn latencies(&mut self, prefix: &str, subjects: &[(Labels<'_>, Vec<&Snapshot>)], stages: &[Stage]) {
        let name = format!("{prefix}_latency_seconds");
        self.family(&name, "histogram", "Time in a stage: queued, backend, total.");
        for (labels, stats) in subjects {
            for class in [OpClass::Read, OpClass::Write, OpClass::Flush, OpClass::Discard, OpClass::WriteZeroes] {
                for stage in stages {
                    let own = [("op", class.name()), ("stage", stage.name())];
                    self.histogram(&name, &[labels.as_slice(), &own].concat(), stats, class, *stage);
                }
            }
        }
    }

    fn histogram(&mut self, name: &str, labels: &[(&str, &str)], stats: &[&Snapshot], class: OpClass, stage: Stage) {
        let histograms = || stats.iter().map(|stats| stats.class(class).stage(stage));
        let count: u64 = histograms().map(|histogram| histogram.count()).sum();
        if count == 0 {
            return;
        }
        let sum: u64 = histograms().map(|histogram| histogram.sum_nanos).sum();
        for limit_us in BUCKETS_US {
            let below: u64 = histograms().map(|histogram| histogram.at_most(Duration::from_micros(limit_us))).sum();
            let limit = (limit_us as f64 / 1e6).to_string();
            self.value(&format!("{name}_bucket"), &[labels, &[("le", limit.as_str())]].concat(), below as f64);
        }
        self.value(&format!("{name}_bucket"), &[labels, &[("le", "+Inf")]].concat(), count as f64);
        self.value(&format!("{name}_sum"), labels, sum as f64 / 1e9);
        self.value(&format!("{name}_count"), labels, count as f64);
    }
}

/// A message as a label: offsets and lengths in it would make a new series each time.
fn bounded(text: &str) -> String {
    const LENGTH_MAX: usize = 160;
    let mut bounded = String::new();
    for character in text.chars().take(LENGTH_MAX) {
        match character {
            digit if digit.is_ascii_digit() && bounded.ends_with('#') => {}
            digit if digit.is_ascii_digit() => bounded.push('#'),
            other => bounded.push(other),
        }
    }
    bounded
}

fn escape(value: &str) -> String {
    value.replace('\\', "\\\\").replace('"', "\\\"").replace('\n', "\\n")
}

#[cfg(test)]
mod tests {
    use backends::{Collected, Destaged, LogUse, ReducedUsage};

    use super::*;

    #[test]
    fn the_text_is_well_formed_and_cumulative() {
        let counters = blockdev::stats::OpStats::default();
        for micros in [3, 30, 300, 3_000_000] {
            counters.started(OpClass::Write);
            counters.stage(OpClass::Write, Stage::Total, Duration::from_micros(micros));
            counters.ended(OpClass::Write, 512, micros != 30);
        }
        let mut stats = Snapshot::default();
        counters.add_to(&mut stats);
        let volume = VolumeSample {
            name: "p/a\"b".to_owned(),
            pool: "p".to_owned(),
            size: 1 << 20,
            stats,
            problem: Some("broken".to_owned()),
            last_error: Some("write of 512 bytes at 4096: EIO".to_owned()),
            engine: Some(EngineUse {
                log: LogUse { used: 5, size: 9, lag: Duration::from_millis(2500) },
                reduced: ReducedUsage { unique: 4096, compressed: 77, map: 6 },
                index: 12,
                destaged: Destaged { logical: 8192, duplicate: 4096, stored: 2048 },
                collected: Collected { moved: 1, freed: 2, is_running: true },
                waits: Duration::from_secs(7),
            }),
        };
        let sample = Sample {
            node: "n".to_owned(),
            started: 1,
            threads: 2,
            closed: Default::default(),
            taken: blockdev::clock::monotonic(),
            volumes: vec![volume],
            exports: vec![ExportSample {
                id: "7".to_owned(),
                volume: "p/away".to_owned(),
                protocol: Protocol::Nbd,
                activity: Err("no such file".to_owned()),
            }],
            pools: Vec::new(),
        };
        let text = render(&sample);
        for line in text.lines().filter(|line| !line.starts_with('#')) {
            let (name, value) = line.rsplit_once(' ').unwrap();
            assert!(name.starts_with("novastor_") && value.parse::<f64>().is_ok(), "{line}");
        }
        let label = "volume=\"p/a\\\"b\",op=\"write\"";
        assert!(text.contains(&format!("novastor_volume_errors_total{{{label}}} 1\n")), "{text}");
        assert!(text.contains("text=\"write of # bytes at #: EIO\"} 1\n"), "{text}");
        assert!(text.contains("novastor_data_plane_threads 2\n"));
        for line in [
            "log_used_bytes{} 5",
            "destage_lag_seconds{} 2.5",
            "pool_waits_seconds{} 7",
            "unique_bytes{} 4096",
            "compressed_bytes{} 77",
            "map_bytes{} 6",
            "index_memory_bytes{} 12",
            "destaged_duplicate_bytes_total{} 4096",
            "reduction_ratio{} 4",
            "collected_freed_bytes_total{} 2",
            "collecting{} 1",
        ] {
            let line = line.replace("{}", "{volume=\"p/a\\\"b\"}");
            assert!(text.contains(&format!("novastor_volume_{line}\n")), "{line}: {text}");
        }
        assert!(!text.contains("op=\"discard\",stage"), "a histogram of nothing");
        assert!(text.contains("novastor_volume_healthy{volume=\"p/a\\\"b\"} 0\n"));
        let away = "{export=\"7\",volume=\"p/away\",protocol=\"nbd\"";
        assert!(text.contains(&format!("novastor_export_ready{away}}} 0\n")), "{text}");
        assert!(text.contains(&format!("novastor_export_problem{away},text=\"no such file\"}} 1\n")), "{text}");
        assert!(!text.contains("novastor_export_clients{"), "clients of an export that accepts none");
        let counts: Vec<f64> = text
            .lines()
            .filter(|line| line.contains("_bucket") && line.contains("op=\"write\",stage=\"total\""))
            .map(|line| line.rsplit_once(' ').unwrap().1.parse().unwrap())
            .collect();
        assert_eq!(counts.len(), BUCKETS_US.len() + 1);
        assert!(counts.is_sorted() && counts.last() == Some(&4.0) && counts[0] == 1.0, "{counts:?}");
    }
}
