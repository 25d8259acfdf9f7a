//! Mapped volumes on a real S3 server: as a block device, and fought over by two hosts.

use std::sync::Arc;

use backends::segments::object::{S3Config, S3Store};
use backends::segments::{OpenOptions, SegmentStore};
use blockdev::client::Client;
use blockdev::layers::aligned::Aligned;
use blockdev::memory_disk::MemoryDisk;
use blockdev::{BlockDevice, DataPlane, DataPlaneOptions, Errno, Volume, VolumeOptions, conformance};
use novastor_tests::rig::seaweedfs::{ACCESS_KEY, SECRET_KEY, Seaweedfs};
use tokio::runtime::Runtime;
use uuid::Uuid;
use volume::device::{MappedDevice, MappedOptions};
use volume::{Durability, Secrets, Settings};

const BUCKET: &str = "volumes";
const POOL: Uuid = Uuid::from_u128(11);
const MIB: u64 = 1 << 20;

struct Rig {
    server: Seaweedfs,
    runtime: Runtime,
    plane: DataPlane,
}

impl Rig {
    fn start() -> Rig {
        let server = Seaweedfs::start().unwrap();
        server.make_bucket(BUCKET).unwrap();
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
        let rig = Rig { server, runtime, plane: DataPlane::start(DataPlaneOptions::default()).unwrap() };
        S3Store::make(rig.config(), rig.runtime.handle().clone(), POOL).unwrap();
        rig
    }

    fn config(&self) -> S3Config {
        S3Config {
            endpoint: Some(format!("http://{}", self.server.address())),
            prefix: "pool".into(),
            allow_http: true,
            ..S3Config::new(BUCKET, ACCESS_KEY, SECRET_KEY)
        }
    }

    /// What a host opens a volume with. It was proven already that the server keeps conditions.
    fn host(&self, group: Uuid) -> MappedOptions {
        let opening = OpenOptions { expected: Some(POOL), read_only: false, probe: None };
        let store: Arc<dyn SegmentStore + Send + Sync> =
            Arc::new(S3Store::open(self.config(), self.runtime.handle().clone(), opening).unwrap());
        MappedOptions {
            group,
            volume: group,
            store,
            settings: Settings { durability: Durability::Remote, segment_bytes: MIB, ..Settings::default() },
            secrets: Secrets { pool_key: [3; 32], data_key: Some([4; 32]) },
            home: self.plane.handles()[0].clone(),
            log_path: "log".into(),
        }
    }

    /// With a new log.
    fn open(&self, group: Uuid) -> Client {
        let device = MappedDevice::open(self.host(group), new_log()).unwrap();
        let options = VolumeOptions { name: group.to_string(), read_only: false, block_size: 512 };
        let volume = Volume::new(Arc::new(Aligned::new(device)), options);
        Client::open(&volume, &self.plane.handles()[1]).unwrap()
    }
}

fn new_log() -> Arc<dyn BlockDevice> {
    Arc::new(MemoryDisk::new(16 * MIB, 512))
}

#[test]
fn conforms_on_s3() {
    let rig = Rig::start();
    let fresh = || -> Arc<dyn BlockDevice> {
        let options = rig.host(blockdev::random::uuid());
        options.create(conformance::DEVICE_SIZE).unwrap();
        Arc::new(Aligned::new(MappedDevice::open(options, new_log()).unwrap()))
    };
    conformance::run(conformance::Suite { resize: false, sequences: 4 }, fresh);
}

#[test]
fn a_host_that_was_replaced_is_fenced_and_nothing_flushed_is_lost() {
    let rig = Rig::start();
    let disk = blockdev::random::uuid();
    rig.host(disk).create(4 * MIB).unwrap();
    let first = rig.open(disk);
    first.write(0, vec![1; 65536]).unwrap();
    first.flush().unwrap();

    // The log of the first host is out of the second one's reach.
    let second = rig.open(disk);
    assert!(second.read(0, 65536).unwrap() == vec![1; 65536]);
    second.write(4096, vec![2; 4096]).unwrap();
    second.flush().unwrap();

    first.write(8192, vec![3; 4096]).unwrap();
    assert_eq!(first.flush(), Err(Errno::EIO), "the replaced host told its client that a write is safe");
    assert_eq!(first.read(0, 4096), Err(Errno::EIO));

    drop(second);
    let third = rig.open(disk);
    let found = third.read(0, 65536).unwrap();
    assert!(found[4096..8192] == [2; 4096] && found[..4096] == [1; 4096] && found[8192..] == vec![1; 57344]);
}
