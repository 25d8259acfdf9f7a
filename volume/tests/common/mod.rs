//! A host that pools of mapped volumes are opened on, and what golden files are made of.

#![allow(dead_code, reason = "each test file uses a part of it")]

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use backends::file::{FilePool, FilePoolConfig};
use backends::segments::SegmentStore;
use backends::{Layout, Pool, PoolError, VolumeSpec};
use blockdev::client::Client;
use blockdev::{DataPlane, DataPlaneOptions, Volume, VolumeOptions};
use bytes::Bytes;
use tempfile::TempDir;
use uuid::Uuid;
use volume::keys::{Kek, Keks};
use volume::pool::{Dedup, MappedPool, MappedPoolOptions, SharedStore, VolumePolicy};
use volume::{Allowed, Durability, WhenFull};

pub const MIB: u64 = 1 << 20;
pub const BLOCK: usize = 4096;

/// Six blocks that compress, and differ from each other: `first` is the number of the first.
pub fn content(first: u64, seed: u8) -> Vec<u8> {
    (first..first + 6).flat_map(|block| [vec![seed; BLOCK - 8], block.to_le_bytes().to_vec()].concat()).collect()
}

pub fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

pub fn unhex(hex: &str) -> Bytes {
    (0..hex.len() / 2).map(|index| u8::from_str_radix(&hex[index * 2..index * 2 + 2], 16).unwrap()).collect()
}

pub fn spec(layout: Layout) -> VolumeSpec {
    VolumeSpec { size: 16 * MIB, block_size: 512, layout, policy: None, tenant: None, wrapped_key: None }
}

/// A host with a folder of its own.
pub struct Host {
    pub plane: DataPlane,
    pub folder: PathBuf,
    /// The key-encryption key, if it can be had.
    pub kek: Option<[u8; 32]>,
}

impl Host {
    pub fn new(folder: &Path, name: &str) -> Host {
        Host { plane: DataPlane::start(DataPlaneOptions::default()).unwrap(), folder: folder.join(name), kek: Some([8; 32]) }
    }

    fn options(&self, durability: Durability) -> MappedPoolOptions {
        let kek = self.kek;
        MappedPoolOptions {
            homes: self.plane.handles().to_vec(),
            log_folder: self.folder.clone(),
            log_size: 2 * MIB,
            policy: Box::new(move |record| {
                let is_shared = record.policy.as_deref().is_some_and(|policy| policy.starts_with("shared"));
                let dedup = if is_shared { Dedup::Tenant } else { Dedup::Volume };
                let refuses = record.policy.as_deref() == Some("error when full");
                let when_full = if refuses { WhenFull::Error } else { WhenFull::Wait };
                Ok(VolumePolicy { durability, compression: Allowed::Auto, dedup, when_full })
            }),
            encrypts: Box::new(|record| record.policy.as_deref().is_some_and(|policy| policy.ends_with("secret"))),
            keks: Box::new(move || Ok(Keks { current: kek.map(Kek::new), previous: None })),
        }
    }

    pub fn file_pool(&self, path: &Path) -> MappedPool {
        let files = FilePool::open("p", FilePoolConfig { path: path.to_owned() }).unwrap();
        MappedPool::beside(files, self.options(Durability::Local))
    }

    pub fn store_pool<S: SegmentStore + Send + Sync + 'static>(&self, store: &Arc<S>, durability: Durability) -> MappedPool {
        let store: SharedStore = store.clone();
        MappedPool::in_store("p", "s3", "memory".to_owned(), (store, Uuid::from_u128(3)), self.options(durability))
    }

    pub fn disk(&self, pool: &MappedPool, volume: &str) -> Result<Client, PoolError> {
        self.client(pool.open(volume, false)?)
    }

    pub fn client(&self, device: Arc<dyn blockdev::BlockDevice>) -> Result<Client, PoolError> {
        let options = VolumeOptions { name: "v".to_owned(), read_only: false, block_size: 512 };
        Ok(Client::open(&Volume::new(device, options), &self.plane.handles()[0])?)
    }

    pub fn logs(&self) -> Vec<PathBuf> {
        let mut logs: Vec<PathBuf> =
            fs::read_dir(&self.folder).into_iter().flatten().map(|entry| entry.unwrap().path()).collect();
        logs.sort();
        logs
    }
}

/// A pool in a directory that goes away with it.
pub struct Place {
    pub host: Host,
    pub pool: MappedPool,
    pub folder: TempDir,
}

impl Place {
    pub fn new(volumes: &[&str], spec: &VolumeSpec) -> Place {
        let folder = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
        let host = Host::new(folder.path(), "host");
        let pool = host.file_pool(&folder.path().join("pool"));
        for volume in volumes {
            pool.create(volume, spec).unwrap();
        }
        Place { host, pool, folder }
    }

    /// The pool as another opening finds it.
    pub fn reopen(self) -> Place {
        let Place { host, pool, folder } = self;
        drop(pool);
        let pool = host.file_pool(&folder.path().join("pool"));
        Place { host, pool, folder }
    }

    pub fn disk(&self, volume: &str) -> Client {
        self.host.disk(&self.pool, volume).unwrap()
    }
}
