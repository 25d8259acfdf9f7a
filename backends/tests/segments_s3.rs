//! The segment store in a bucket, on a real S3 server: the conformance suite, connections that break, and servers that are set up wrong.

use std::net::SocketAddr;
use std::time::Duration;

use backends::segments::conformance::{Suite, run};
use backends::segments::drive::block_on;
use backends::segments::object::{S3Config, S3Store};
use backends::segments::{OpenOptions, PoolHeader, SegmentStore, StoreError};
use bytes::Bytes;
use novastor_tests::rig::proxy::{Fault, Proxy};
use novastor_tests::rig::seaweedfs::{ACCESS_KEY, SECRET_KEY, Seaweedfs};
use tokio::runtime::Runtime;
use uuid::Uuid;

const BUCKET: &str = "volumes";
const POOL: Uuid = Uuid::from_u128(0x0102_0304);

struct Rig {
    server: Seaweedfs,
    runtime: Runtime,
}

impl Rig {
    fn start() -> Rig {
        let server = Seaweedfs::start().unwrap();
        server.make_bucket(BUCKET).unwrap();
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
        Rig { server, runtime }
    }

    fn config(&self, address: SocketAddr, prefix: &str) -> S3Config {
        S3Config {
            endpoint: Some(format!("http://{address}")),
            prefix: prefix.to_owned(),
            allow_http: true,
            ..S3Config::new(BUCKET, ACCESS_KEY, SECRET_KEY)
        }
    }

    /// A new pool; the prefix it is under.
    fn make(&self) -> String {
        let prefix = format!("pools/{}", blockdev::random::uuid());
        S3Store::make(self.config(self.server.address(), &prefix), self.runtime.handle().clone(), POOL).unwrap();
        prefix
    }

    fn open(&self, prefix: &str) -> S3Store {
        self.open_with(self.config(self.server.address(), prefix)).unwrap()
    }

    fn open_with(&self, config: S3Config) -> Result<S3Store, StoreError> {
        S3Store::open(config, self.runtime.handle().clone(), options())
    }
}

fn options() -> OpenOptions {
    OpenOptions { expected: Some(POOL), read_only: false, probe: Some(blockdev::random::uuid()) }
}

fn create(store: &S3Store, name: &str, content: &Bytes) -> Result<(), StoreError> {
    block_on(store.create(name, vec![content.clone()]))
}

fn read(store: &S3Store, name: &str) -> Result<Bytes, StoreError> {
    block_on(store.read(name, 0..u64::MAX))
}

fn is_unknown<T>(outcome: &Result<T, StoreError>) -> bool {
    matches!(outcome, Err(StoreError::Unknown(_)))
}

#[test]
fn a_bucket_passes_the_suite() {
    let rig = Rig::start();
    let proven = OpenOptions { probe: None, ..options() };
    let open = |prefix: &String| {
        let config = rig.config(rig.server.address(), prefix);
        S3Store::open(config, rig.runtime.handle().clone(), proven).unwrap()
    };
    run(Suite { sequences: 8 }, || rig.make(), open);
}

#[test]
fn a_pool_is_made_once_and_known_by_its_uuid() {
    let rig = Rig::start();
    let prefix = rig.make();
    assert_eq!(rig.open(&prefix).header(), PoolHeader::new(POOL));
    let config = || rig.config(rig.server.address(), &prefix);
    let made = S3Store::make(config(), rig.runtime.handle().clone(), Uuid::from_u128(9));
    assert!(matches!(made, Err(StoreError::Exists(_))), "{made:?}");
    let other = OpenOptions { expected: Some(Uuid::from_u128(9)), ..options() };
    let opened = S3Store::open(config(), rig.runtime.handle().clone(), other).map(drop);
    assert!(matches!(&opened, Err(StoreError::Refused(text)) if text.contains("another pool")), "{opened:?}");
    let elsewhere = rig.open_with(rig.config(rig.server.address(), "pools/none")).map(drop);
    assert!(matches!(elsewhere, Err(StoreError::Absent(_))), "{elsewhere:?}");
}

#[test]
fn a_bucket_that_is_set_up_wrong_is_refused_and_never_empty() {
    let rig = Rig::start();
    let prefix = rig.make();
    let config = || rig.config(rig.server.address(), &prefix);
    let wrong = [
        S3Config { secret_key: "guessed".to_owned(), ..config() },
        S3Config { bucket: "no-such-bucket".to_owned(), ..config() },
        S3Config { allow_http: false, ..config() },
        S3Config { prefix: "../up".to_owned(), ..config() },
        S3Config { secret_key: String::new(), ..config() },
    ];
    for config in wrong {
        let opened = rig.open_with(config.clone()).map(drop);
        assert!(matches!(opened, Err(StoreError::Refused(_))), "{config:?}: {opened:?}");
        assert!(!format!("{opened:?} {config:?}").contains(SECRET_KEY));
    }
}

#[test]
fn a_server_that_is_not_there_gives_no_answer() {
    let rig = Rig::start();
    let nobody = SocketAddr::from(([127, 0, 0, 1], 1));
    let config = S3Config { retry_timeout: Duration::from_secs(1), ..rig.config(nobody, "p") };
    assert!(is_unknown(&rig.open_with(config).map(drop)));
}

/// A store behind a proxy, and the same place without one.
struct Broken {
    rig: Rig,
    proxy: Proxy,
    prefix: String,
}

impl Broken {
    fn start() -> Broken {
        let rig = Rig::start();
        let proxy = Proxy::start(rig.server.address()).unwrap();
        let prefix = rig.make();
        Broken { rig, proxy, prefix }
    }

    fn stores(&self) -> (S3Store, S3Store) {
        let config = S3Config {
            request_timeout: Duration::from_secs(2),
            retry_timeout: Duration::from_secs(60),
            ..self.rig.config(self.proxy.address(), &self.prefix)
        };
        (self.rig.open_with(config).unwrap(), self.rig.open(&self.prefix))
    }
}

#[test]
fn case_06_a_lost_reply_is_unknown_and_a_read_shows_the_truth() {
    let broken = Broken::start();
    let (store, truth) = broken.stores();
    let content = Bytes::from(vec![9; 300_000]);
    // With the reply lost, or cut within its first line, the request was carried out.
    for (number, fault) in [Fault::CutReply(0), Fault::CutReply(7), Fault::SwallowReply].into_iter().enumerate() {
        let name = format!("w/1/{number}");
        broken.proxy.arm(fault);
        let outcome = create(&store, &name, &content);
        assert!(is_unknown(&outcome) && broken.proxy.has_struck(), "{fault:?}: {outcome:?}");
        assert!(read(&truth, &name).unwrap() == content, "{fault:?}: it was created");
        assert!(matches!(create(&store, &name, &content), Err(StoreError::Exists(_))));

        let before = block_on(truth.read_root("r")).unwrap().map(|(_, tag)| tag);
        let next = Bytes::from(format!("version {number}"));
        broken.proxy.arm(fault);
        let outcome = block_on(store.swap("r", before.as_ref(), next.clone()));
        assert!(is_unknown(&outcome) && broken.proxy.has_struck(), "{fault:?}: {outcome:?}");
        let (found, after) = block_on(store.read_root("r")).unwrap().unwrap();
        assert!(found == next && Some(&after) != before.as_ref(), "{fault:?}: it was swapped");
    }
}

#[test]
fn a_request_cut_short_is_unknown_and_leaves_nothing() {
    let broken = Broken::start();
    let (store, truth) = broken.stores();
    let content = Bytes::from(vec![9; 3_000_000]);
    for (number, bytes) in [0, 100, 200_000].into_iter().enumerate() {
        let name = format!("w/1/{number}");
        broken.proxy.arm(Fault::CutRequest(bytes));
        let outcome = create(&store, &name, &content);
        assert!(is_unknown(&outcome) && broken.proxy.has_struck(), "after {bytes} bytes: {outcome:?}");
        assert!(matches!(read(&truth, &name), Err(StoreError::Absent(_))), "no part of it can be seen");
        create(&store, &name, &content).unwrap();
        assert!(read(&truth, &name).unwrap() == content);
    }
    let tag = block_on(store.swap("r", None, content.slice(..1000))).unwrap();
    broken.proxy.arm(Fault::CutRequest(50));
    assert!(is_unknown(&block_on(store.swap("r", Some(&tag), content.slice(..2000)))));
    assert_eq!(block_on(truth.read_root("r")).unwrap(), Some((content.slice(..1000), tag)));
}

#[test]
fn what_changes_nothing_is_tried_again() {
    let broken = Broken::start();
    let (store, truth) = broken.stores();
    let content: Bytes = (0..3_000_000u32).map(|at| (at / 7) as u8).collect();
    create(&store, "w/1/1", &content).unwrap();
    block_on(store.swap("r", None, content.slice(..9))).unwrap();
    let cuts = [Fault::CutRequest(20), Fault::CutReply(0), Fault::CutReply(100), Fault::CutReply(200_000), Fault::SwallowReply];
    for fault in cuts {
        broken.proxy.arm(fault);
        assert!(read(&store, "w/1/1").unwrap() == content, "{fault:?}");
        assert!(broken.proxy.has_struck(), "{fault:?}");
    }
    for fault in [Fault::CutRequest(20), Fault::CutReply(0), Fault::CutReply(100), Fault::SwallowReply] {
        broken.proxy.arm(fault);
        assert_eq!(block_on(store.list("w/")).unwrap().len(), 1, "{fault:?}");
        assert!(broken.proxy.has_struck(), "{fault:?}");
        broken.proxy.arm(fault);
        assert_eq!(block_on(store.read_root("r")).unwrap().unwrap().0, content[..9], "{fault:?}");
        broken.proxy.arm(fault);
        block_on(store.delete("w/1/2")).unwrap();
        assert!(broken.proxy.has_struck(), "{fault:?}");
    }
    broken.proxy.arm(Fault::CutReply(0));
    block_on(store.delete("w/1/1")).unwrap();
    assert!(matches!(read(&truth, "w/1/1"), Err(StoreError::Absent(_))));
}

#[test]
fn a_store_whose_runtime_has_ended_gives_no_answer() {
    let rig = Rig::start();
    let prefix = rig.make();
    let store = rig.open(&prefix);
    rig.runtime.shutdown_background();
    assert!(is_unknown(&create(&store, "a", &Bytes::new())));
    assert!(is_unknown(&read(&store, "a")));
}
