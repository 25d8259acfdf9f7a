//! A volume as the first version of the format left it: store and log, opened for ever.
//!
//! `NOVASTOR_MAKE_GOLDEN=1 cargo test -p volume --test golden_volume` writes the file anew, which is only right for a new version of the format.

mod common;

use std::fmt::Write;
use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use backends::file::{FileDevice, FileOptions};
use backends::segments::SegmentStore;
use backends::segments::drive::block_on;
use backends::segments::memory::MemoryStore;
use blockdev::client::Client;
use blockdev::{BlockDevice, DataPlane, DataPlaneOptions, Volume, VolumeOptions};
use common::{BLOCK, content, hex, unhex};
use uuid::Uuid;
use volume::device::{MappedDevice, MappedOptions, SnapshotDevice};
use volume::{Secrets, Settings};

const SIZE: u64 = 64 << 20;
const LOG_SIZE: u64 = 1 << 20;
const VOLUME: Uuid = Uuid::from_u128(1);
const CLONE: Uuid = Uuid::from_u128(2);
const SECTOR: usize = 512;
const ROOTS: [&str; 3] = ["root", "pins", "none"];

fn path() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/volume-1.txt")
}

fn options(plane: &DataPlane, store: &Arc<MemoryStore>, group: Uuid) -> MappedOptions {
    MappedOptions {
        group,
        volume: group,
        store: store.clone(),
        settings: Settings::default(),
        secrets: Secrets { pool_key: [3; 32], data_key: Some([4; 32]) },
        home: plane.handles()[0].clone(),
        log_path: "log".into(),
    }
}

fn client(plane: &DataPlane, device: Arc<dyn BlockDevice>, read_only: bool) -> Client {
    let volume = Volume::new(device, VolumeOptions { name: "golden".into(), read_only, block_size: 4096 });
    Client::open(&volume, &plane.handles()[0]).unwrap()
}

fn log(path: &Path) -> Arc<FileDevice> {
    Arc::new(FileDevice::open(path, FileOptions { read_only: false, direct: true }).unwrap())
}

fn make(folder: &Path) -> String {
    let plane = DataPlane::start(DataPlaneOptions::default()).unwrap();
    let store = Arc::new(MemoryStore::new());
    let log_path = folder.join("log");
    File::create(&log_path).unwrap().set_len(LOG_SIZE).unwrap();
    let options = options(&plane, &store, VOLUME);
    options.create(SIZE).unwrap();
    let device = Arc::new(MappedDevice::open(options.clone(), log(&log_path)).unwrap());
    let disk = client(&plane, device.clone(), false);
    disk.write(0, content(0, 1)).unwrap();
    disk.write(32 << 20, content(8192, 1)).unwrap();
    device.settle().unwrap();
    device.snapshot("s", 1_700_000_000).unwrap();
    device.wait_for_snapshot("s").unwrap();
    disk.write(0, content(0, 2)).unwrap();
    device.settle().unwrap();
    options.clone_snapshot("s", CLONE).unwrap();
    // Half of what was written just now is left, and is moved.
    disk.write(0, content(0, 3)[..3 * BLOCK].to_vec()).unwrap();
    device.settle().unwrap();
    assert!(device.gather(1.0).unwrap().blocks_moved > 0);
    // Only the log has this.
    disk.write(48 << 20, content(12288, 4)).unwrap();
    disk.flush().unwrap();
    let mut text = String::new();
    for object in block_on(store.list("")).unwrap() {
        let bytes = block_on(store.read(&object.name, 0..object.len)).unwrap();
        writeln!(text, "object {} {}", object.name, hex(&bytes)).unwrap();
    }
    for (group, root) in [VOLUME, CLONE].iter().flat_map(|group| ROOTS.map(|root| (group, root))) {
        let name = format!("{}/{root}", group.simple());
        if let Some((bytes, _)) = block_on(store.read_root(&name)).unwrap() {
            writeln!(text, "root {name} {}", hex(&bytes)).unwrap();
        }
    }
    for (number, sector) in fs::read(&log_path).unwrap().chunks(SECTOR).enumerate() {
        if sector.iter().any(|byte| *byte != 0) {
            writeln!(text, "log {} {}", number * SECTOR, hex(sector)).unwrap();
        }
    }
    text
}

#[test]
fn what_the_first_version_wrote_opens() {
    let folder = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    if std::env::var_os("NOVASTOR_MAKE_GOLDEN").is_some() {
        fs::write(path(), make(folder.path())).unwrap();
    }
    let store = Arc::new(MemoryStore::new());
    let log_path = folder.path().join("golden-log");
    let log_file = File::create(&log_path).unwrap();
    log_file.set_len(LOG_SIZE).unwrap();
    for line in fs::read_to_string(path()).unwrap().lines() {
        match line.split(' ').collect::<Vec<_>>()[..] {
            ["object", name, content] => block_on(store.create(name, vec![unhex(content)])).unwrap(),
            ["root", name, content] => drop(block_on(store.swap(name, None, unhex(content))).unwrap()),
            ["log", at, content] => log_file.write_all_at(&unhex(content), at.parse().unwrap()).unwrap(),
            _ => panic!("{line}"),
        }
    }
    let plane = DataPlane::start(DataPlaneOptions::default()).unwrap();
    let of_volume = options(&plane, &store, VOLUME);
    let snapshot = client(&plane, Arc::new(SnapshotDevice::open(&of_volume, "s").unwrap()), true);
    assert_eq!(snapshot.read(0, 6 * BLOCK as u64).unwrap(), content(0, 1));
    let volume = client(&plane, Arc::new(MappedDevice::open(of_volume, log(&log_path)).unwrap()), false);
    let mixed = [&content(0, 3)[..3 * BLOCK], &content(0, 2)[3 * BLOCK..]].concat();
    assert_eq!(volume.read(0, 6 * BLOCK as u64).unwrap(), mixed);
    for (offset, block, seed) in [(32 << 20, 8192, 1), (48 << 20, 12288, 4)] {
        assert_eq!(volume.read(offset, 6 * BLOCK as u64).unwrap(), content(block, seed), "at {offset}");
    }
    let clone_log = folder.path().join("clone-log");
    File::create(&clone_log).unwrap().set_len(LOG_SIZE).unwrap();
    let clone = MappedDevice::open(options(&plane, &store, CLONE), log(&clone_log)).unwrap();
    let clone = client(&plane, Arc::new(clone), false);
    assert_eq!(clone.read(0, 6 * BLOCK as u64).unwrap(), content(0, 1));
    assert_eq!(clone.read(32 << 20, 6 * BLOCK as u64).unwrap(), content(8192, 1));
}
