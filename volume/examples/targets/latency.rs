//! What a write and a remote flush take, beside a bare PUT of as many bytes into the same store at the same time.
//!
//! ```text
//!   1 or 32 writers   write a block ─ flush ─ write a block ─ flush …        each at a place of its own
//!   beside them       PUT ─ PUT ─ PUT …                                       one at a time, until they are done
//! ```

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::time::Duration;

use backends::segments::drive::block_on;
use backends::segments::memory::MemoryStore;
use backends::segments::object::{S3Config, S3Store};
use backends::segments::{OpenOptions, SegmentStore};
use blockdev::client::Client;
use blockdev::memory_disk::MemoryDisk;
use bytes::Bytes;
use novastor_tests::rig::seaweedfs::{ACCESS_KEY, SECRET_KEY, Seaweedfs};
use tokio::runtime::Runtime;
use uuid::Uuid;
use volume::{Durability, Settings};

use crate::rig::{BLOCK, GIB, MIB, Random, Rig};
use crate::store::{Counting, Distant, Shared};
use crate::{now, tell};

const WRITERS: [u64; 2] = [1, 32];
/// For each number of writers.
const LENGTH: Duration = Duration::from_secs(30);
const WARM_UP: Duration = Duration::from_secs(1);
const TARGET: &str = "p99 ≤ 2 × that of a PUT";
const BUCKET: &str = "volumes";

pub fn measure() {
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().expect("a runtime");
    let distant = Distant::new(Arc::new(MemoryStore::new()), runtime.handle().clone(), Random(9));
    compare("PUTs of 15 ms and more, seldom 100", Arc::new(distant));
    match Seaweedfs::start() {
        Ok(server) => compare("SeaweedFS on this machine", in_bucket(&server, &runtime)),
        Err(error) => tell("flush with SeaweedFS on this machine", format!("not measured: {error:#}"), TARGET),
    }
}

fn in_bucket(server: &Seaweedfs, runtime: &Runtime) -> Shared {
    server.make_bucket(BUCKET).expect("a bucket");
    let endpoint = Some(format!("http://{}", server.address()));
    let config = S3Config { endpoint, prefix: "pool".into(), allow_http: true, ..S3Config::new(BUCKET, ACCESS_KEY, SECRET_KEY) };
    let pool = Uuid::from_u128(2);
    S3Store::make(config.clone(), runtime.handle().clone(), pool).expect("a pool");
    let opening = OpenOptions { expected: Some(pool), read_only: false, probe: None };
    Arc::new(S3Store::open(config, runtime.handle().clone(), opening).expect("the pool opens"))
}

fn compare(what: &str, store: Shared) {
    let settings = Settings { durability: Durability::Remote, ..Settings::default() };
    let rig = Rig::new(Counting::new(store.clone()), Arc::new(MemoryDisk::new(GIB, 4096)), settings);
    rig.create(64 * GIB);
    let open = rig.open();
    for writers in WRITERS {
        let (puts_before, bytes_before) = rig.store.written();
        flushes(&open.client, writers, WARM_UP);
        let (puts, bytes) = rig.store.written();
        let len = (bytes - bytes_before) / (puts - puts_before).max(1);
        let is_done = AtomicBool::new(false);
        let (mut flushes, mut puts) = std::thread::scope(|scope| {
            let bare = scope.spawn(|| bare_puts(&*store, (writers, len), &is_done));
            let flushes = flushes(&open.client, writers, LENGTH);
            is_done.store(true, Relaxed);
            (flushes, bare.join().expect("PUTs"))
        });
        let ratio = percentile(&mut flushes, 99.0).as_secs_f64() / percentile(&mut puts, 99.0).as_secs_f64();
        tell(
            &format!("write of a block and remote flush, {writers} at a time, {what}"),
            format!("{}; a PUT of {len} bytes {}; p99 {ratio:.2} ×", told(&mut flushes), told(&mut puts)),
            TARGET,
        );
    }
}

/// What each write with its flush took.
fn flushes(client: &Client, writers: u64, length: Duration) -> Vec<Duration> {
    let until = now() + length;
    std::thread::scope(|scope| {
        let writer = |writer: u64| {
            let mut random = Random(100 + writer);
            let mut took = Vec::new();
            while now() < until {
                let offset = writer * GIB + random.below(GIB / BLOCK) * BLOCK;
                let content = random.bytes(BLOCK as usize);
                let began = now();
                client.write(offset, content).expect("a write");
                client.flush().expect("a flush");
                took.push(began.elapsed());
            }
            took
        };
        let writers: Vec<_> = (0..writers).map(|number| scope.spawn(move || writer(number))).collect();
        writers.into_iter().flat_map(|writer| writer.join().expect("a writer")).collect()
    })
}

fn bare_puts(store: &(dyn SegmentStore + Sync), (run, len): (u64, u64), is_done: &AtomicBool) -> Vec<Duration> {
    let content = Bytes::from(Random(8).bytes(len.next_multiple_of(8).min(MIB) as usize));
    let mut took = Vec::new();
    while !is_done.load(Relaxed) {
        let name = format!("bare/{run}/{}", took.len());
        let began = now();
        block_on(store.create(&name, vec![content.clone()])).expect("a PUT");
        took.push(began.elapsed());
    }
    took
}

fn percentile(took: &mut [Duration], percent: f64) -> Duration {
    took.sort_unstable();
    took[((took.len() as f64 * percent / 100.0) as usize).min(took.len() - 1)]
}

fn told(took: &mut [Duration]) -> String {
    format!("p50 {:.1?}, p99 {:.1?} ({} of them)", percentile(took, 50.0), percentile(took, 99.0), took.len())
}
