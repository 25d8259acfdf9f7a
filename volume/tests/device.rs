//! Mapped volumes as block devices, on real data-plane threads, files and processes.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc;

use backends::file::{FileDevice, FileOptions};
use backends::segments::directory::DirectoryStore;
use backends::segments::memory::MemoryStore;
use backends::segments::{OpenOptions, SegmentStore};
use blockdev::client::{Answer, Client};
use blockdev::layers::aligned::Aligned;
use blockdev::memory_disk::MemoryDisk;
use blockdev::{
    BlockDevice, Capabilities, DataPlane, DataPlaneOptions, DeviceError, Errno, Geometry, IoQueue, Op, Reactor, Request, Volume,
    VolumeOptions, conformance,
};
use uuid::Uuid;
use volume::device::{MappedDevice, MappedOptions, OpenError};
use volume::{Durability, Secrets, Settings, VolumeError};

const MIB: u64 = 1 << 20;
const POOL: Uuid = Uuid::from_u128(7);

type Store = Arc<dyn SegmentStore + Send + Sync>;

const GROUP: Uuid = Uuid::from_u128(9);

fn options(plane: &DataPlane, store: Store, durability: Durability) -> MappedOptions {
    let settings = Settings { durability, segment_bytes: MIB, ..Settings::default() };
    MappedOptions {
        group: GROUP,
        volume: GROUP,
        store,
        settings,
        secrets: Secrets { pool_key: [3; 32], data_key: None },
        home: plane.handles()[0].clone(),
        log_path: "log".into(),
    }
}

fn fresh(plane: &DataPlane, durability: Durability) -> Arc<dyn BlockDevice> {
    let made = options(plane, Arc::new(MemoryStore::new()), durability);
    made.create(conformance::DEVICE_SIZE).unwrap();
    Arc::new(Aligned::new(MappedDevice::open(made, Arc::new(MemoryDisk::new(16 * MIB, 512))).unwrap()))
}

#[test]
fn conforms_with_local_durability() {
    let plane = DataPlane::start(DataPlaneOptions::default()).unwrap();
    let suite = conformance::Suite::default();
    conformance::run(suite, || fresh(&plane, Durability::Local));
}

#[test]
fn conforms_with_remote_durability() {
    let plane = DataPlane::start(DataPlaneOptions::default()).unwrap();
    let suite = conformance::Suite { resize: true, sequences: 8 };
    conformance::run(suite, || fresh(&plane, Durability::Remote));
}

/// A log that counts the bytes that are read of it.
struct CountedLog {
    disk: Arc<MemoryDisk>,
    bytes_read: Arc<AtomicU64>,
}

struct CountedQueue {
    below: Box<dyn IoQueue>,
    bytes_read: Arc<AtomicU64>,
}

impl BlockDevice for CountedLog {
    fn geometry(&self) -> Geometry {
        self.disk.geometry()
    }

    fn capabilities(&self) -> Capabilities {
        self.disk.capabilities()
    }

    fn open_queue(&self, reactor: &Rc<Reactor>) -> Result<Box<dyn IoQueue>, DeviceError> {
        Ok(Box::new(CountedQueue { below: self.disk.open_queue(reactor)?, bytes_read: self.bytes_read.clone() }))
    }

    fn resize(&self, size: u64) -> Result<(), DeviceError> {
        self.disk.resize(size)
    }
}

impl IoQueue for CountedQueue {
    fn submit(&self, request: Request) {
        if request.op == Op::Read {
            self.bytes_read.fetch_add(request.len, Ordering::Relaxed);
        }
        self.below.submit(request);
    }
}

#[test]
fn the_holes_of_a_log_are_not_read_and_what_lies_behind_them_is_found() {
    let plane = DataPlane::start(DataPlaneOptions::default()).unwrap();
    let options = options(&plane, Arc::new(MemoryStore::new()), Durability::Local);
    options.create(16 * MIB).unwrap();
    let (disk, bytes_read) = (Arc::new(MemoryDisk::new(256 * MIB, 512)), Arc::new(AtomicU64::new(0)));
    let open = |accept_loss| {
        let log = CountedLog { disk: disk.clone(), bytes_read: bytes_read.clone() };
        let settings = Settings { accept_loss, ..options.settings };
        let device = MappedDevice::open(MappedOptions { settings, ..options.clone() }, Arc::new(log))?;
        let device = Arc::new(Aligned::new(device));
        let named = VolumeOptions { name: "disk".into(), read_only: false, block_size: 512 };
        Ok::<Client, OpenError>(Client::open(&Volume::new(device, named), &plane.handles()[1]).unwrap())
    };
    let client = open(false).unwrap();
    assert!(bytes_read.load(Ordering::Relaxed) < MIB, "{} bytes were read", bytes_read.load(Ordering::Relaxed));
    client.write(0, vec![1; 4 * MIB as usize]).unwrap();
    client.flush().unwrap();
    drop(client);
    while Arc::strong_count(&disk) > 1 {
        std::thread::yield_now();
    }

    let named = VolumeOptions { name: "log".into(), read_only: false, block_size: 512 };
    let log = Client::open(&Volume::new(disk.clone(), named), &plane.handles()[1]).unwrap();
    // With the superblock, the first batch.
    log.run(Op::Discard, 0, MIB, Vec::new()).unwrap();
    assert!(matches!(open(true), Err(OpenError::Volume(VolumeError::NotALog))));
    log.run(Op::Discard, 0, 256 * MIB, Vec::new()).unwrap();
    open(true).unwrap();
}

/// A pool and a log in a folder.
struct Place(PathBuf);

impl Place {
    fn make(folder: &Path) -> Place {
        let place = Place(folder.to_owned());
        std::fs::create_dir(place.pool()).unwrap();
        DirectoryStore::make(&place.pool(), POOL).unwrap();
        File::create(place.log()).unwrap().set_len(8 * MIB).unwrap();
        place
    }

    fn pool(&self) -> PathBuf {
        self.0.join("pool")
    }

    fn log(&self) -> PathBuf {
        self.0.join("log")
    }

    fn options(&self, plane: &DataPlane, durability: Durability) -> MappedOptions {
        let opening = OpenOptions { expected: Some(POOL), read_only: false, probe: Some(blockdev::random::uuid()) };
        let store = Arc::new(DirectoryStore::open(&self.pool(), opening).unwrap());
        options(plane, store, durability)
    }

    fn open(&self, plane: &DataPlane, durability: Durability) -> Client {
        let log = Arc::new(FileDevice::open(&self.log(), FileOptions { read_only: false, direct: true }).unwrap());
        let device = MappedDevice::open(self.options(plane, durability), log).unwrap();
        let options = VolumeOptions { name: "disk".into(), read_only: false, block_size: 512 };
        let volume = Volume::new(Arc::new(Aligned::new(device)), options);
        Client::open(&volume, &plane.handles()[1]).unwrap()
    }
}

/// The whole volume carries one number per 64 KiB, which only ever grows.
const CELL: u64 = 64 << 10;
const CELLS: u64 = 32;

fn content(number: u64) -> Vec<u8> {
    number.to_le_bytes().repeat(CELL as usize / 8)
}

fn number(bytes: &[u8]) -> u64 {
    let number = u64::from_le_bytes(bytes[..8].try_into().unwrap());
    assert!(bytes == content(number), "a cell was torn");
    number
}

#[test]
#[ignore = "the other process of case_36_what_was_acknowledged_survives_kills_with_writes_in_flight"]
fn writer_process() {
    let place = Place(std::env::var_os("WRITER_PLACE").expect("this is started by another test").into());
    let durability = if std::env::var_os("WRITER_REMOTE").is_some() { Durability::Remote } else { Durability::Local };
    let plane = DataPlane::start(DataPlaneOptions::default()).unwrap();
    let disk = place.open(&plane, durability);
    let mut numbers: Vec<u64> = (0..CELLS).map(|cell| number(&disk.read(cell * CELL, CELL).unwrap())).collect();
    println!("\nfound {numbers:?}");
    for round in 0.. {
        let (sender, receiver) = mpsc::channel();
        for cell in (round % 4..CELLS).step_by(4) {
            numbers[cell as usize] += 1;
            let (sender, number) = (sender.clone(), numbers[cell as usize]);
            let written = move |answer: Result<Answer, Errno>| sender.send(answer.map(|_| (cell, number))).unwrap();
            disk.submit(Op::Write { fua: false }, cell * CELL, CELL, content(number), written);
        }
        drop(sender);
        let acknowledged: Vec<String> =
            receiver.into_iter().map(|answer| answer.unwrap()).map(|(cell, number)| format!("{cell}:{number}")).collect();
        println!("\nacknowledged {}", acknowledged.join(" "));
        if round % 8 == 7 {
            disk.flush().unwrap();
        }
    }
}

fn writer(place: &Place, remote: bool) -> Child {
    let mut command = Command::new(std::env::current_exe().unwrap());
    command.args(["writer_process", "--exact", "--ignored", "--nocapture"]).env("WRITER_PLACE", &place.0);
    if remote {
        command.env("WRITER_REMOTE", "1");
    }
    command.stdout(Stdio::piped()).spawn().unwrap()
}

#[test]
fn case_36_what_was_acknowledged_survives_kills_with_writes_in_flight() {
    use std::io::{BufRead, BufReader};
    for remote in [false, true] {
        let folder = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
        let place = Place::make(folder.path());
        let plane = DataPlane::start(DataPlaneOptions::default()).unwrap();
        let durability = if remote { Durability::Remote } else { Durability::Local };
        place.options(&plane, durability).create(CELLS * CELL).unwrap();

        let mut acknowledged = vec![0; CELLS as usize];
        for life in 0..12 {
            let mut child = writer(&place, remote);
            let mut lines = BufReader::new(child.stdout.take().unwrap()).lines().map(Result::unwrap);
            let found = lines.by_ref().find_map(|line| line.strip_prefix("found ").map(str::to_owned));
            let found: Vec<u64> = serde_json::from_str(&found.expect("the writer opened the volume")).unwrap();
            let lost = found.iter().zip(&acknowledged).any(|(found, acknowledged)| found < acknowledged);
            assert!(!lost, "life {life}: {found:?} was found, {acknowledged:?} had been acknowledged");
            let told = |acknowledged: &mut Vec<u64>, line: &str| {
                for pair in line.strip_prefix("acknowledged ").into_iter().flat_map(|rest| rest.split(' ')) {
                    let (cell, number) = pair.split_once(':').unwrap();
                    acknowledged[cell.parse::<usize>().unwrap()] = number.parse().unwrap();
                }
            };
            lines.by_ref().take(4 + life * 5).for_each(|line| told(&mut acknowledged, &line));
            child.kill().unwrap();
            child.wait().unwrap();
            lines.for_each(|line| told(&mut acknowledged, &line));
        }
        let disk = place.open(&plane, durability);
        for (cell, acknowledged) in (0..).zip(&acknowledged) {
            assert!(number(&disk.read(cell * CELL, CELL).unwrap()) >= *acknowledged, "cell {cell}");
        }
        assert!(acknowledged.iter().sum::<u64>() > 100, "the writers were hardly alive: {acknowledged:?}");
    }
}
