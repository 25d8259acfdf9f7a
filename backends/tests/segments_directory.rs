//! The segment stores in memory and in a directory: the conformance suite, killed writers, full disks, and directories that are no pool.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{BufRead, BufReader, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdout, Command, Stdio};

use backends::segments::conformance::{Suite, run};
use backends::segments::directory::DirectoryStore;
use backends::segments::drive::{block_on, join_all};
use backends::segments::memory::MemoryStore;
use backends::segments::{OpenOptions, PoolHeader, SegmentStore, StoreError, probe};
use bytes::Bytes;
use novastor_tests::rig::loop_mount::LoopMount;
use uuid::Uuid;

const MIB: usize = 1 << 20;
const POOL: Uuid = Uuid::from_u128(0x0102_0304);

fn options() -> OpenOptions {
    OpenOptions { expected: Some(POOL), read_only: false, probe: Some(blockdev::random::uuid()) }
}

fn scratch() -> tempfile::TempDir {
    tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap()
}

/// A new pool below `parent`.
fn make(parent: &Path) -> PathBuf {
    let path = parent.join(blockdev::random::uuid().to_string());
    DirectoryStore::make(&path, POOL).unwrap();
    path
}

fn open(path: &Path) -> DirectoryStore {
    DirectoryStore::open(path, options()).unwrap()
}

fn refusal(outcome: Result<DirectoryStore, StoreError>) -> String {
    match outcome {
        Err(StoreError::Refused(text)) => text,
        Err(error) => panic!("{error:?}"),
        Ok(_) => panic!("it was opened"),
    }
}

fn create(store: &impl SegmentStore, name: &str, content: Bytes) -> Result<(), StoreError> {
    block_on(store.create(name, vec![content]))
}

#[test]
fn memory_passes_the_suite() {
    run(Suite::default(), MemoryStore::new, MemoryStore::clone);
}

#[test]
fn a_directory_passes_the_suite() {
    let folder = scratch();
    run(Suite::default(), || make(folder.path()), |path| open(path));
}

#[test]
fn a_directory_in_memory_passes_the_suite() {
    let folder = tempfile::tempdir_in("/dev/shm").unwrap();
    run(Suite::default(), || make(folder.path()), |path| open(path));
}

#[test]
fn xfs_passes_the_suite() {
    let mount = LoopMount::xfs(1024).unwrap();
    run(Suite { sequences: 4 }, || make(mount.path()), |path| open(path));
}

#[test]
fn a_directory_that_is_no_pool_is_told_what_it_is() {
    let folder = scratch();
    let path = folder.path().join("nothing");
    assert!(matches!(DirectoryStore::open(&path, options()), Err(StoreError::Absent(_))));
    fs::create_dir(&path).unwrap();
    assert!(refusal(DirectoryStore::open(&path, options())).contains("no pool"));
    fs::write(path.join("photo.jpg"), "x").unwrap();
    let error = DirectoryStore::make(&path, POOL).unwrap_err();
    assert!(matches!(&error, StoreError::Refused(text) if text.contains("photo.jpg")), "{error}");
}

#[test]
fn a_pool_is_made_once_and_known_by_its_uuid() {
    let folder = scratch();
    let path = make(folder.path());
    assert_eq!(open(&path).header(), PoolHeader::new(POOL));
    assert!(matches!(DirectoryStore::make(&path, Uuid::from_u128(9)), Err(StoreError::Exists(_))));
    let other = OpenOptions { expected: Some(Uuid::from_u128(9)), ..options() };
    assert!(refusal(DirectoryStore::open(&path, other)).contains("another pool"));
    DirectoryStore::open(&path, OpenOptions { expected: None, ..options() }).unwrap();
}

#[test]
fn what_was_copied_in_part_is_refused() {
    let folder = scratch();
    for missing in ["pool", "objects", "roots"] {
        let path = make(folder.path());
        create(&open(&path), "w/1/1", Bytes::from_static(b"x")).unwrap();
        fs::rename(path.join(missing), folder.path().join(missing)).unwrap();
        let text = refusal(DirectoryStore::open(&path, options()));
        assert!(text.contains("in part") && text.contains(missing), "{text}");
    }
    let path = make(folder.path());
    let header = fs::read(path.join("pool")).unwrap();
    for len in [0, 7, 11, 63] {
        fs::write(path.join("pool"), &header[..len]).unwrap();
        refusal(DirectoryStore::open(&path, options()));
    }
    let mut newer = header;
    newer[8] = 2;
    fs::write(path.join("pool"), newer).unwrap();
    assert!(refusal(DirectoryStore::open(&path, options())).contains("format version 2"));
}

#[test]
fn an_interrupted_making_can_be_repeated() {
    let folder = scratch();
    let path = folder.path().join("pool");
    fs::create_dir_all(path.join("objects")).unwrap();
    fs::create_dir_all(path.join("temporary")).unwrap();
    fs::write(path.join("temporary/0.lock"), "").unwrap();
    fs::write(path.join("temporary/0.0"), "half a header").unwrap();
    assert!(refusal(DirectoryStore::open(&path, options())).contains("interrupted"));
    DirectoryStore::make(&path, POOL).unwrap();
    create(&open(&path), "a", Bytes::from_static(b"x")).unwrap();
}

#[test]
fn a_pool_opened_read_only_is_not_changed() {
    let folder = scratch();
    let path = make(folder.path());
    create(&open(&path), "a", Bytes::from_static(b"x")).unwrap();
    let store = DirectoryStore::open(&path, OpenOptions { read_only: true, ..options() }).unwrap();
    assert_eq!(block_on(store.read("a", 0..9)), Ok(Bytes::from_static(b"x")));
    assert!(matches!(create(&store, "b", Bytes::new()), Err(StoreError::Refused(_))));
    assert!(matches!(block_on(store.delete("a")), Err(StoreError::Refused(_))));
    assert!(matches!(block_on(store.swap("r", None, Bytes::new())), Err(StoreError::Refused(_))));
}

#[test]
fn a_pool_whose_directory_is_emptied_lacks_no_object_it_only_lacks_an_answer() {
    let folder = scratch();
    let path = make(folder.path());
    let store = open(&path);
    assert!(matches!(block_on(store.read("a", 0..9)), Err(StoreError::Absent(_))));
    fs::remove_file(path.join("pool")).unwrap();
    assert!(matches!(block_on(store.read("a", 0..9)), Err(StoreError::Unknown(_))));
    assert!(matches!(block_on(store.read_root("a")), Err(StoreError::Unknown(_))));
    assert!(matches!(block_on(store.list("")), Err(StoreError::Unknown(_))));
}

#[test]
fn a_moved_directory_is_still_the_pool() {
    let folder = scratch();
    let path = make(folder.path());
    let store = open(&path);
    fs::rename(&path, folder.path().join("moved")).unwrap();
    create(&store, "a", Bytes::from_static(b"x")).unwrap();
    assert!(folder.path().join("moved/objects/a=").exists());
}

#[test]
fn damage_to_a_root_is_found_and_strangers_files_are_passed_over() {
    let folder = scratch();
    let path = make(folder.path());
    let store = open(&path);
    block_on(store.swap("r", None, Bytes::from_static(b"content"))).unwrap();
    let root = path.join("roots/r=");
    let mut bytes = fs::read(&root).unwrap();
    *bytes.last_mut().unwrap() ^= 1;
    fs::remove_file(&root).unwrap();
    fs::write(&root, bytes).unwrap();
    assert!(matches!(block_on(store.read_root("r")), Err(StoreError::Refused(text)) if text.contains("damaged")));
    fs::write(path.join("objects/UPPER"), "x").unwrap();
    fs::write(path.join("objects/plain"), "x").unwrap();
    fs::create_dir(path.join("objects/folder=")).unwrap();
    create(&store, "a", Bytes::new()).unwrap();
    assert_eq!(block_on(store.list("")).unwrap().len(), 1);
    assert!(matches!(block_on(store.read("folder", 0..1)), Err(StoreError::Refused(_))));
}

#[test]
fn a_name_that_another_made_is_made_durable_before_it_is_shown() {
    let folder = scratch();
    let path = make(folder.path());
    let store = open(&path);
    let is_writable = |name: &str| {
        let mode = std::os::unix::fs::PermissionsExt::mode(&fs::metadata(path.join(name)).unwrap().permissions());
        mode & 0o200 != 0
    };
    create(&store, "mine", Bytes::new()).unwrap();
    assert!(!is_writable("objects/mine="), "its creator made it durable");
    fs::create_dir(path.join("objects/w")).unwrap();
    fs::write(path.join("objects/w/another="), "x").unwrap();
    assert!(is_writable("objects/w/another="), "as a killed creator leaves it");
    assert_eq!(block_on(store.read("w/another", 0..9)), Ok(Bytes::from_static(b"x")));
    assert!(!is_writable("objects/w/another="), "its reader made it durable");
}

#[test]
fn a_full_disk_is_said_and_passes() {
    let mount = LoopMount::ext4(48).unwrap();
    let path = make(mount.path());
    let store = open(&path);
    let content = Bytes::from(vec![7; 4 * MIB]);
    let mut made = 0;
    let full = loop {
        match create(&store, &format!("o/{made}"), content.clone()) {
            Ok(()) => made += 1,
            Err(error) => break error,
        }
        assert!(made < 100, "the disk does not fill");
    };
    assert!(matches!(&full, StoreError::NoSpace(_)), "{full:?}");
    assert_eq!(block_on(store.list("o/")).unwrap().len(), made, "what did not fit left nothing");
    let small = |number: u32| create(&store, &format!("small/{number}"), content.slice(..4096));
    let full = (0..2000).map(small).find_map(Result::err).expect("the disk fills to its last block");
    assert!(matches!(&full, StoreError::NoSpace(_)), "{full:?}");
    drop(store);
    let store = open(&path);
    assert_eq!(block_on(store.read("o/0", 0..u64::MAX)).unwrap(), content, "reads go on");
    block_on(store.delete("o/0")).unwrap();
    create(&store, &format!("o/{made}"), content).unwrap();
}

fn command(program: &str, arguments: &[&str], path: &Path) {
    let status = Command::new(program).args(arguments).arg(path).status().unwrap();
    assert!(status.success(), "{program} {arguments:?} {}", path.display());
}

#[test]
fn what_the_system_forbids_is_refused() {
    let mount = LoopMount::ext4(48).unwrap();
    let path = make(mount.path());
    let store = open(&path);
    create(&store, "a", Bytes::from_static(b"x")).unwrap();
    for folder in ["objects", "roots"] {
        command("chattr", &["+i"], &path.join(folder));
    }
    for name in ["b", "w/1/1"] {
        assert!(matches!(create(&store, name, Bytes::new()), Err(StoreError::Refused(_))), "{name}");
        assert!(matches!(block_on(store.swap(name, None, Bytes::new())), Err(StoreError::Refused(_))), "{name}");
    }
    assert!(matches!(block_on(store.delete("a")), Err(StoreError::Refused(_))));
    for folder in ["objects", "roots"] {
        command("chattr", &["-i"], &path.join(folder));
    }
    create(&store, "b", Bytes::new()).unwrap();
    block_on(store.delete("a")).unwrap();
}

#[test]
fn a_read_only_disk_is_opened_read_only() {
    let mount = LoopMount::ext4(48).unwrap();
    let path = make(mount.path());
    create(&open(&path), "a", Bytes::from_static(b"x")).unwrap();
    command("mount", &["-o", "remount,ro"], mount.path());
    let error = DirectoryStore::open(&path, options()).map(drop).unwrap_err();
    assert!(matches!(error, StoreError::Refused(_)), "{error:?}");
    let store = DirectoryStore::open(&path, OpenOptions { read_only: true, ..options() }).unwrap();
    assert_eq!(block_on(store.read("a", 0..9)), Ok(Bytes::from_static(b"x")));
}

#[test]
fn several_openers_probe_at_once() {
    let folder = scratch();
    let path = make(folder.path());
    std::thread::scope(|scope| {
        for _ in 0..4 {
            scope.spawn(|| {
                let store = open(&path);
                block_on(probe::prove(&store, blockdev::random::uuid())).unwrap();
            });
        }
    });
    assert_eq!(block_on(open(&path).list("")), Ok(Vec::new()));
}

const KILLS: u64 = 12;
const PATH_VARIABLE: &str = "NOVASTOR_TEST_POOL";

/// What object `number` of round `round` holds.
fn content_of(round: u64, number: u64) -> Bytes {
    let len = 1 + (number * 7919 + round * 104_729) as usize % (MIB / 2);
    Bytes::from(vec![(number + round) as u8; len])
}

/// A process that creates objects and swaps a root, tells each success, and is killed.
struct Writer {
    process: Child,
    told: BufReader<ChildStdout>,
}

impl Writer {
    fn start(path: &Path, round: u64) -> Writer {
        let mut command = Command::new(std::env::current_exe().unwrap());
        command.args(["--exact", "writes_until_it_is_killed", "--ignored", "--nocapture", "--test-threads", "1"]);
        command.env(PATH_VARIABLE, path).env("NOVASTOR_TEST_ROUND", round.to_string());
        let mut process = command.stdout(Stdio::piped()).stderr(Stdio::null()).spawn().unwrap();
        let told = BufReader::new(process.stdout.take().unwrap());
        Writer { process, told }
    }

    /// Kills it after that many successes, and gives all it told.
    fn kill_after(mut self, successes: usize) -> Vec<String> {
        let mut told = Vec::new();
        let mut line = String::new();
        while self.told.read_line(&mut line).unwrap() > 0 {
            told.extend(line.trim().strip_prefix("done ").map(str::to_owned));
            line.clear();
            if told.len() == successes {
                self.process.kill().unwrap();
            }
        }
        self.process.wait().unwrap();
        assert!(told.len() >= successes, "the writer ended by itself after {told:?}");
        told
    }
}

#[test]
#[ignore = "the other process of what_was_acknowledged_survives_kills"]
fn writes_until_it_is_killed() {
    let path = PathBuf::from(std::env::var_os(PATH_VARIABLE).unwrap());
    let round: u64 = std::env::var("NOVASTOR_TEST_ROUND").unwrap().parse().unwrap();
    let store = open(&path);
    let tell = |what: String| {
        let mut out = std::io::stdout().lock();
        out.write_all(format!("\ndone {what}\n").as_bytes()).unwrap();
        out.flush().unwrap();
    };
    let mut tag = block_on(store.read_root("r")).unwrap().map(|(_, tag)| tag);
    for batch in 0u64.. {
        let names: Vec<(u64, String)> = (0..4).map(|n| (batch * 4 + n, format!("w/{round}/{}", batch * 4 + n))).collect();
        let creates = names.iter().map(|(number, name)| store.create(name, vec![content_of(round, *number)]));
        for (created, (_, name)) in block_on(join_all(creates.collect())).into_iter().zip(&names) {
            created.unwrap();
            tell(format!("object {name}"));
        }
        let content = [round.to_le_bytes(), batch.to_le_bytes()].concat();
        tag = Some(block_on(store.swap("r", tag.as_ref(), content.into())).unwrap());
        tell(format!("root {round} {batch}"));
    }
}

/// Whether all of a round's objects that can be seen are whole; which they are.
fn check_objects(store: &DirectoryStore, round: u64) -> BTreeMap<String, u64> {
    let mut seen = BTreeMap::new();
    for listed in block_on(store.list(&format!("w/{round}/"))).unwrap() {
        let number: u64 = listed.name.rsplit('/').next().unwrap().parse().unwrap();
        let read = block_on(store.read(&listed.name, 0..u64::MAX)).unwrap();
        assert!(read == content_of(round, number), "{} is not whole", listed.name);
        seen.insert(listed.name, listed.len);
    }
    seen
}

#[test]
fn what_was_acknowledged_survives_kills() {
    let folder = scratch();
    let path = make(folder.path());
    let mut newest = None;
    for round in 0..KILLS {
        let told = Writer::start(&path, round).kill_after(3 + 7 * round as usize % 31);
        let store = open(&path);
        let seen = check_objects(&store, round);
        for what in &told {
            match what.split(' ').collect::<Vec<_>>()[..] {
                ["object", name] => assert!(seen.contains_key(name), "round {round}: {name} was acknowledged and is gone"),
                ["root", of, batch] => newest = Some((of.parse::<u64>().unwrap(), batch.parse::<u64>().unwrap())),
                _ => panic!("{what}"),
            }
        }
        let root = block_on(store.read_root("r")).unwrap();
        let number_at = |content: &Bytes, at: usize| u64::from_le_bytes(content[at..at + 8].try_into().unwrap());
        let found = root.as_ref().map(|(content, _)| (number_at(content, 0), number_at(content, 8)));
        assert!(found >= newest, "round {round}: root {newest:?} was acknowledged, and {found:?} is there");
        if let Some((content, tag)) = root {
            // The lock of the killed swapper is free, and the root goes on.
            block_on(store.swap("r", Some(&tag), content)).unwrap();
        }
        let left: Vec<_> = fs::read_dir(path.join("temporary")).unwrap().flatten().map(|entry| entry.file_name()).collect();
        assert_eq!(left, ["0.lock"], "what the killed writer left is gone, and only our own lock is there");
    }
}

#[test]
fn the_files_of_a_living_opener_are_left_alone() {
    let folder = scratch();
    let path = make(folder.path());
    let first = open(&path);
    let draft = path.join("temporary/0.77");
    File::create(&draft).unwrap();
    let second = open(&path);
    assert!(draft.exists());
    drop((first, second));
    open(&path);
    assert!(!draft.exists());
}

#[test]
fn a_store_that_was_dropped_has_let_go_of_its_directory() {
    let folder = scratch();
    let path = make(folder.path());
    for round in 0..300 {
        drop(open(&path));
        let left: Vec<_> = fs::read_dir(path.join("temporary")).unwrap().flatten().map(|entry| entry.file_name()).collect();
        assert_eq!(left, ["0.lock"], "round {round}: the lock of the store before was still held");
    }
}
