//! A mapped volume on a data plane of its own, and load for it.

use std::sync::Arc;
use std::sync::mpsc;

use blockdev::client::{Answer, Client};
use blockdev::memory_disk::MemoryDisk;
use blockdev::{BlockDevice, DataPlane, DataPlaneOptions, Op, Volume, VolumeOptions};
use uuid::Uuid;
use volume::device::{MappedDevice, MappedOptions};
use volume::{Secrets, Settings};

use crate::store::Counting;

pub const MIB: u64 = 1 << 20;
pub const GIB: u64 = 1 << 30;
pub const BLOCK: u64 = 4096;
const DEPTH: usize = 32;

pub struct Rig {
    pub plane: DataPlane,
    pub store: Arc<Counting>,
    pub options: MappedOptions,
    pub log: Arc<dyn BlockDevice>,
}

/// An open volume.
pub struct Open {
    pub device: Arc<MappedDevice>,
    pub client: Client,
}

impl Rig {
    pub fn new(store: Arc<Counting>, log: Arc<dyn BlockDevice>, settings: Settings) -> Rig {
        let plane = DataPlane::start(DataPlaneOptions::default()).expect("a data plane");
        let options = MappedOptions {
            group: Uuid::from_u128(1),
            volume: Uuid::from_u128(1),
            store: store.clone(),
            settings,
            secrets: Secrets { pool_key: [1; 32], data_key: Some([2; 32]) },
            home: plane.handles()[0].clone(),
            log_path: "log".into(),
        };
        Rig { plane, store, options, log }
    }

    pub fn in_memory(settings: Settings) -> Rig {
        let store = Counting::new(Arc::new(backends::segments::memory::MemoryStore::new()));
        Rig::new(store, Arc::new(MemoryDisk::new(GIB, 4096)), settings)
    }

    pub fn create(&self, size: u64) {
        self.options.create(size).expect("the volume is made");
    }

    pub fn open(&self) -> Open {
        self.open_as(self.options.group, self.log.clone())
    }

    /// Opens another volume of the store.
    pub fn open_as(&self, group: Uuid, log: Arc<dyn BlockDevice>) -> Open {
        let options = MappedOptions { group, volume: group, ..self.options.clone() };
        self.attach(MappedDevice::open(options, log).expect("the volume opens"))
    }

    pub fn attach(&self, device: MappedDevice) -> Open {
        let device = Arc::new(device);
        let options = VolumeOptions { name: "measured".into(), read_only: false, block_size: 4096 };
        let volume = Volume::new(device.clone() as Arc<dyn BlockDevice>, options);
        let handles = self.plane.handles();
        let client = Client::open(&volume, &handles[handles.len() - 1]).expect("a client");
        Open { device, client }
    }
}

impl Open {
    /// Carries out requests, 32 at a time.
    pub fn load(&self, requests: impl Iterator<Item = (Op, u64, u64, Vec<u8>)>) {
        let (sender, receiver) = mpsc::channel();
        let mut in_flight = 0;
        for (op, offset, len, data) in requests {
            if in_flight == DEPTH {
                let done: Result<(), blockdev::Errno> = receiver.recv().expect("an answer");
                done.expect("the request succeeds");
                in_flight -= 1;
            }
            let sender = sender.clone();
            self.client.submit(op, offset, len, data, move |answer| {
                // The receiver stays until everything is answered.
                let _ = sender.send(answer.map(drop));
            });
            in_flight += 1;
        }
        for _ in 0..in_flight {
            receiver.recv().expect("an answer").expect("the request succeeds");
        }
    }

    pub fn read(&self, offset: u64, len: u64) -> Vec<u8> {
        let (sender, receiver) = mpsc::channel();
        self.client.submit(Op::Read, offset, len, Vec::new(), move |answer| {
            // The receiver stays until it is answered.
            let _ = sender.send(answer);
        });
        match receiver.recv().expect("an answer").expect("the blocks are read") {
            Answer::Bytes(bytes) => bytes,
            Answer::Done | Answer::Extents(_) => panic!("a read is answered with bytes"),
        }
    }

    pub fn write_all(&self, places: impl Iterator<Item = (u64, u64)>, random: &mut Random) {
        self.load(places.map(|(offset, len)| (Op::Write { fua: false }, offset, len, random.bytes(len as usize))));
    }
}

/// Numbers that look random (SplitMix64).
pub struct Random(pub u64);

impl Random {
    pub fn number(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mixed = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ (mixed >> 31)
    }

    pub fn below(&mut self, limit: u64) -> u64 {
        self.number() % limit
    }

    pub fn bytes(&mut self, len: usize) -> Vec<u8> {
        (0..len / 8).flat_map(|_| self.number().to_le_bytes()).collect()
    }
}
