//! The file driver: the conformance suite on real file systems, and what goes wrong with files.

use std::cell::RefCell;
use std::fs::{self, OpenOptions};
use std::path::Path;
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use backends::file::{FileDevice, FileOptions, FilePool, FilePoolConfig};
use backends::{Flattened, Layout, Pool, PoolError, VolumeSpec};
use blockdev::client::Client;
use blockdev::conformance::{DEVICE_SIZE, Suite, run};
use blockdev::{BlockDevice, DataPlane, DataPlaneOptions, DeviceError, Errno, ExtentKind, Op, Volume, VolumeOptions};

const MIB: u64 = 1 << 20;

fn open(path: &Path, direct: bool) -> Arc<dyn BlockDevice> {
    Arc::new(FileDevice::open(path, FileOptions { read_only: false, direct }).unwrap())
}

fn suite_in(folder: &Path, direct: bool) {
    let number = AtomicU32::new(0);
    run(Suite::default(), || {
        let path = folder.join(number.fetch_add(1, Ordering::Relaxed).to_string());
        fs::File::create_new(&path).unwrap().set_len(DEVICE_SIZE).unwrap();
        open(&path, direct)
    });
}

fn volume(device: Arc<dyn BlockDevice>) -> Arc<Volume> {
    Volume::new(device, VolumeOptions { name: "test".into(), read_only: false, block_size: 512 })
}

struct Rig {
    folder: tempfile::TempDir,
    plane: DataPlane,
}

impl Rig {
    fn new() -> Rig {
        Rig::at(env!("CARGO_TARGET_TMPDIR"))
    }

    fn in_memory() -> Rig {
        Rig::at("/dev/shm")
    }

    fn at(parent: &str) -> Rig {
        let folder = tempfile::tempdir_in(parent).unwrap();
        Rig { folder, plane: DataPlane::start(DataPlaneOptions::default()).unwrap() }
    }

    fn file(&self, name: &str, size: u64) -> std::path::PathBuf {
        let path = self.folder.path().join(name);
        fs::File::create_new(&path).unwrap().set_len(size).unwrap();
        path
    }

    fn client(&self, volume: &Arc<Volume>) -> Client {
        Client::open(volume, &self.plane.handles()[0]).unwrap()
    }

    fn pool(&self) -> FilePool {
        FilePool::open("local", FilePoolConfig { path: self.folder.path().join("pool") }).unwrap()
    }
}

fn spec(size: u64) -> VolumeSpec {
    VolumeSpec { size, block_size: 512, layout: Layout::Raw, policy: None, tenant: None, wrapped_key: None }
}

#[test]
fn conforms_with_direct_io() {
    suite_in(Rig::new().folder.path(), true);
}

#[test]
fn conforms_through_the_page_cache() {
    suite_in(Rig::new().folder.path(), false);
}

#[test]
fn block_devices_conform_whatever_their_block_size() {
    let rig = Rig::new();
    for block_size in [512, 4096] {
        let last = RefCell::new(None);
        run(Suite { resize: false, ..Suite::default() }, || {
            let device = LoopDevice::new(rig.folder.path(), block_size);
            let opened = open(&device.path, true);
            assert_eq!(opened.geometry().block_size, block_size);
            last.replace(Some(device));
            opened
        });
    }
}

#[test]
fn conforms_on_tmpfs() {
    suite_in(tempfile::tempdir_in("/dev/shm").unwrap().path(), true);
}

#[test]
fn a_second_writer_is_refused_until_the_first_closes() {
    let rig = Rig::new();
    let path = rig.file("disk", MIB);
    let first = open(&path, true);
    let second = FileDevice::open(&path, FileOptions { read_only: false, direct: true });
    assert!(matches!(second, Err(DeviceError::Refused(why)) if why.contains("in use")));
    drop(first);
    open(&path, true);
}

#[test]
fn what_is_no_disk_is_refused() {
    let rig = Rig::new();
    let odd = rig.file("odd", 1000);
    let why = FileDevice::open(&odd, FileOptions { read_only: false, direct: true }).err().unwrap().to_string();
    assert!(why.contains("truncate -s"), "{why}");
    for path in [rig.folder.path().to_owned(), "/dev/zero".into(), rig.folder.path().join("none")] {
        assert!(FileDevice::open(&path, FileOptions { read_only: true, direct: true }).is_err(), "{}", path.display());
    }
}

#[test]
fn discard_frees_blocks_and_status_shows_holes() {
    let rig = Rig::new();
    let path = rig.file("disk", 64 * MIB);
    let client = rig.client(&volume(open(&path, true)));
    client.write(0, vec![7; 8 * MIB as usize]).unwrap();
    client.flush().unwrap();
    let allocated = || std::os::unix::fs::MetadataExt::blocks(&fs::metadata(&path).unwrap()) * 512;
    assert!(allocated() >= 8 * MIB);
    client.run(Op::Discard, 0, 64 * MIB, Vec::new()).unwrap();
    assert!(allocated() < MIB, "{} bytes still allocated", allocated());
    assert_eq!(client.extents(0, 64 * MIB).unwrap()[0].kind, ExtentKind::Hole);
    client.run(Op::WriteZeroes { unmap: false, fua: false, fast: false }, 0, 4 * MIB, Vec::new()).unwrap();
    assert!(allocated() >= 4 * MIB, "zeroes without unmap must stay allocated");
}

#[test]
fn a_truncated_file_fails_and_invents_nothing() {
    for rig in [Rig::new(), Rig::in_memory()] {
        fails_and_invents_nothing_when_truncated(&rig);
    }
}

fn fails_and_invents_nothing_when_truncated(rig: &Rig) {
    let path = rig.file("disk", 16 * MIB);
    let volume = volume(open(&path, true));
    let client = rig.client(&volume);
    client.write(8 * MIB, vec![9; 4096]).unwrap();
    OpenOptions::new().write(true).open(&path).unwrap().set_len(MIB).unwrap();
    assert_eq!(client.read(8 * MIB, 4096), Err(Errno::EIO));
    assert_eq!(client.write(12 * MIB, vec![1; 4096]), Err(Errno::EIO), "a write would bring the lost part back as zeroes");
    assert!(volume.health().unwrap().contains("truncated"));
}

#[test]
fn a_truncated_file_is_not_called_a_hole() {
    let rig = Rig::new();
    let path = rig.file("disk", 16 * MIB);
    let volume = volume(open(&path, true));
    let client = rig.client(&volume);
    client.write(8 * MIB, vec![9; 4096]).unwrap();
    OpenOptions::new().write(true).open(&path).unwrap().set_len(MIB).unwrap();
    assert_eq!(client.extents(8 * MIB, MIB).err(), Some(Errno::EIO), "a backup would take a hole for zeroes");
    assert!(volume.health().unwrap().contains("truncated"));
}

#[test]
fn a_truncated_file_that_grew_again_is_noticed_by_a_flush() {
    let rig = Rig::new();
    let path = rig.file("disk", 16 * MIB);
    let client = rig.client(&volume(open(&path, true)));
    client.write(2 * MIB, vec![9; 4096]).unwrap();
    client.flush().unwrap();
    OpenOptions::new().write(true).open(&path).unwrap().set_len(MIB).unwrap();
    // It may be noticed already.
    let _ = client.write(8 * MIB, vec![1; 4096]);
    assert_eq!(client.flush(), Err(Errno::EIO));
    assert_eq!(client.read(2 * MIB, 4096), Err(Errno::EIO), "zeroes were never written there");
}

#[test]
fn a_truncated_file_that_a_write_made_whole_again_gives_no_zeroes() {
    let rig = Rig::new();
    let path = rig.file("disk", 16 * MIB);
    let client = rig.client(&volume(open(&path, true)));
    client.write(2 * MIB, vec![9; 4096]).unwrap();
    OpenOptions::new().write(true).open(&path).unwrap().set_len(MIB).unwrap();
    assert_eq!(client.write(16 * MIB - 4096, vec![1; 4096]), Err(Errno::EIO), "it would hide what was lost");
    assert_eq!(client.read(2 * MIB, 4096), Err(Errno::EIO));
    OpenOptions::new().write(true).open(&path).unwrap().set_len(16 * MIB).unwrap();
    assert_eq!(client.read(2 * MIB, 4096), Err(Errno::EIO), "until it is opened anew");
}

#[test]
fn a_truncated_file_that_grew_again_is_noticed_by_a_read() {
    let rig = Rig::new();
    let path = rig.file("disk", 16 * MIB);
    let client = rig.client(&volume(open(&path, true)));
    client.write(2 * MIB, vec![9; 4096]).unwrap();
    OpenOptions::new().write(true).open(&path).unwrap().set_len(MIB).unwrap();
    let _ = client.write(8 * MIB, vec![1; 4096]);
    std::thread::sleep(std::time::Duration::from_millis(20));
    assert_eq!(client.read(2 * MIB, 4096), Err(Errno::EIO), "zeroes were never written there");
}

#[test]
fn discard_is_offered_where_holes_can_be_made() {
    let rig = Rig::new();
    let offered = |path: &Path| open(path, true).capabilities().discard;
    assert!(offered(&rig.file("disk", MIB)));
    let path = rig.folder.path().join("ramfs");
    fs::create_dir(&path).unwrap();
    command("mount", &["-t", "ramfs", "none", path.to_str().unwrap()]);
    let mount = LoopMount { path };
    let file = mount.path.join("disk");
    fs::File::create_new(&file).unwrap().set_len(MIB).unwrap();
    assert!(!offered(&file), "its file system has no holes");
    let client = rig.client(&volume(open(&file, true)));
    client.write(0, vec![3; 4096]).unwrap();
    client.run(Op::WriteZeroes { unmap: true, fua: false, fast: false }, 0, 4096, Vec::new()).unwrap();
    assert_eq!(client.read(0, 4096).unwrap(), vec![0; 4096]);
}

#[test]
fn a_truncated_file_fails_also_what_was_waiting() {
    const REQUESTS: u64 = 2000;
    let rig = Rig::new();
    let path = rig.file("disk", 16 * MIB);
    let client = rig.client(&volume(open(&path, true)));
    OpenOptions::new().write(true).open(&path).unwrap().set_len(0).unwrap();
    let (sender, receiver) = std::sync::mpsc::channel();
    // All of them are there before the first can end.
    rig.plane.handles()[0].spawn(|_| std::thread::sleep(std::time::Duration::from_millis(300)));
    for at in 0..REQUESTS {
        let sender = sender.clone();
        client.submit(Op::Read, at * 4096, 4096, Vec::new(), move |answer| sender.send(answer.is_err()).unwrap());
    }
    for _ in 0..REQUESTS {
        assert!(receiver.recv_timeout(std::time::Duration::from_secs(60)).unwrap());
    }
}

#[test]
fn a_mounted_block_device_is_refused() {
    let rig = Rig::new();
    let mount = LoopMount::new(rig.folder.path(), "ext4", 24 * MIB);
    let output = Command::new("findmnt").args(["-no", "SOURCE"]).arg(&mount.path).output().unwrap();
    let device = String::from_utf8(output.stdout).unwrap();
    let opened = FileDevice::open(Path::new(device.trim()), FileOptions { read_only: false, direct: true });
    assert!(matches!(opened, Err(DeviceError::Refused(why)) if why.contains("mounted")));
}

#[test]
fn a_volume_that_another_process_has_open_is_not_deleted() {
    let rig = Rig::new();
    let (here, there) = (rig.pool(), rig.pool());
    here.create("vm", &spec(MIB)).unwrap();
    let opened = there.open("vm", false).unwrap();
    assert!(matches!(here.delete("vm"), Err(PoolError::InUse(_))));
    drop(opened);
    here.delete("vm").unwrap();
}

/// Replaces the file while somebody waits for its lock: the waiter must get what the name leads to, not the remnant.
#[test]
fn whoever_waits_for_a_replaced_file_gets_the_new_one() {
    let rig = Rig::new();
    let (path, fresh) = (rig.file("disk", MIB), rig.file("fresh", 2 * MIB));
    let first = open(&path, true);
    let waiting = std::thread::spawn({
        let path = path.clone();
        move || open(&path, true)
    });
    std::thread::sleep(std::time::Duration::from_millis(300));
    fs::rename(&fresh, &path).unwrap();
    drop(first);
    assert_eq!(waiting.join().unwrap().geometry().size, 2 * MIB);
}

#[test]
fn a_deleted_file_is_reported_and_still_serves() {
    let rig = Rig::new();
    let path = rig.file("disk", MIB);
    let volume = volume(open(&path, true));
    let client = rig.client(&volume);
    client.write(0, vec![3; 4096]).unwrap();
    fs::remove_file(&path).unwrap();
    assert!(volume.health().unwrap().contains("deleted"));
    assert_eq!(client.read(0, 4096).unwrap(), vec![3; 4096]);
}

#[test]
fn a_full_disk_is_enospc_and_harms_nothing_else() {
    let rig = Rig::new();
    let mount = LoopMount::new(rig.folder.path(), "ext4", 24 * MIB);
    let small = mount.path.join("disk");
    fs::File::create_new(&small).unwrap().set_len(64 * MIB).unwrap();
    let full = rig.client(&volume(open(&small, true)));
    let other = rig.client(&volume(open(&rig.file("other", 16 * MIB), true)));
    full.write(0, vec![1; MIB as usize]).unwrap();
    let refused = (1..64).find_map(|mib| full.write(mib * MIB, vec![2; MIB as usize]).err());
    assert_eq!(refused, Some(Errno::ENOSPC));
    assert_eq!(full.read(0, MIB).unwrap(), vec![1; MIB as usize]);
    other.write(0, vec![5; 4096]).unwrap();
    full.run(Op::Discard, MIB, 63 * MIB, Vec::new()).unwrap();
    full.write(2 * MIB, vec![3; MIB as usize]).unwrap();
    full.flush().unwrap();
}

#[test]
fn the_catalogue_keeps_what_it_is_told() {
    let rig = Rig::new();
    let pool = rig.pool();
    pool.create("vm1", &spec(8 * MIB)).unwrap();
    assert!(matches!(pool.create("vm1", &spec(MIB)), Err(PoolError::Exists(_))));
    for bad in ["", "../x", "a/b", ".hidden", "UPPER", "a b", &"x".repeat(300)] {
        assert!(matches!(pool.create(bad, &spec(MIB)), Err(PoolError::Invalid(_))), "{bad:?}");
        assert!(matches!(pool.get(bad), Err(PoolError::Invalid(_))), "{bad:?}");
    }
    pool.rename("vm1", "vm2").unwrap();
    let again = rig.pool();
    assert_eq!(again.uuid(), pool.uuid());
    assert_eq!(again.list().unwrap().len(), 1);
    assert_eq!(again.get("vm2").unwrap().size, 8 * MIB);
    assert!(matches!(again.get("vm1"), Err(PoolError::NotFound(_))));
    assert!(again.check(&|_, _| ()).unwrap().is_empty());
    again.delete("vm2").unwrap();
    assert!(again.list().unwrap().is_empty());
    assert_eq!(fs::read_dir(rig.folder.path().join("pool/trash")).unwrap().count(), 0);
}

#[test]
fn a_damaged_record_hides_no_other_volume() {
    let rig = Rig::new();
    let pool = rig.pool();
    pool.create("bad", &spec(MIB)).unwrap();
    pool.create("good", &spec(MIB)).unwrap();
    fs::write(rig.folder.path().join("pool/volumes/bad/volume.json"), "{").unwrap();
    assert_eq!(pool.list().unwrap().iter().map(|record| record.name.as_str()).collect::<Vec<_>>(), ["good"]);
    let problems = pool.check(&|_, _| ()).unwrap();
    assert!(problems.len() == 1 && problems[0].contains("bad"), "{problems:?}");
    assert!(matches!(pool.create("bad", &spec(MIB)), Err(PoolError::Exists(_))), "its data may still be wanted");
}

#[test]
fn a_list_is_whole_while_volumes_come_and_go() {
    let rig = Rig::new();
    let pool = rig.pool();
    pool.create("stays", &spec(MIB)).unwrap();
    std::thread::scope(|scope| {
        let busy = scope.spawn(|| {
            for _ in 0..100 {
                pool.create("goes", &spec(MIB)).unwrap();
                pool.delete("goes").unwrap();
            }
        });
        while !busy.is_finished() {
            assert!(pool.list().unwrap().iter().any(|record| record.name == "stays"));
        }
    });
}

#[test]
fn adopting_leaves_the_file_alone() {
    let rig = Rig::new();
    let path = rig.file("image.raw", 4 * MIB);
    let pool = rig.pool();
    let record = pool.adopt(path.to_str().unwrap(), "old").unwrap();
    assert_eq!(record.size, 4 * MIB);
    assert!(matches!(pool.adopt(path.to_str().unwrap(), "twice"), Err(PoolError::Exists(_))));
    assert!(pool.adopt("/nonexistent", "none").is_err());
    let relative = pool.adopt("old.raw", "relative").unwrap_err().to_string();
    assert!(relative.contains("//path/to/old.raw"), "{relative}");
    pool.open("old", false).unwrap();
    pool.create("own", &spec(MIB)).unwrap();
    let link = rig.folder.path().join("link");
    std::os::unix::fs::symlink(rig.folder.path().join("pool"), &link).unwrap();
    let linked = FilePool::open("linked", FilePoolConfig { path: link.clone() }).unwrap();
    let own = link.join("volumes/own/data.raw");
    assert!(matches!(linked.adopt(own.to_str().unwrap(), "again"), Err(PoolError::Invalid(_))));
    pool.delete("old").unwrap();
    assert_eq!(fs::metadata(&path).unwrap().len(), 4 * MIB);
}

#[test]
fn an_adopted_file_that_became_a_link_is_refused() {
    let rig = Rig::new();
    let (path, other) = (rig.file("image.raw", 4 * MIB), rig.file("other.raw", 4 * MIB));
    let pool = rig.pool();
    pool.adopt(path.to_str().unwrap(), "vm").unwrap();
    pool.open("vm", false).unwrap();
    fs::remove_file(&path).unwrap();
    std::os::unix::fs::symlink(&other, &path).unwrap();
    for read_only in [false, true] {
        let refused = pool.open("vm", read_only).err().unwrap().to_string();
        assert!(refused.contains("symbolic link"), "{refused}");
    }
    assert!(pool.snapshot(&["vm"], "s").is_err() && pool.clone_volume("vm", None, "copy").is_err());
    pool.create("own", &spec(4 * MIB)).unwrap();
    let own = rig.folder.path().join("pool/volumes/own/data.raw");
    fs::remove_file(&own).unwrap();
    std::os::unix::fs::symlink(&other, &own).unwrap();
    assert!(pool.open("own", false).err().unwrap().to_string().contains("symbolic link"));
}

#[test]
fn an_adopted_file_whose_folder_became_a_link_is_refused() {
    let rig = Rig::new();
    let (folder, moved) = (rig.folder.path().join("images"), rig.folder.path().join("moved"));
    fs::create_dir_all(folder.join("deep")).unwrap();
    let path = folder.join("deep/image.raw");
    fs::rename(rig.file("image.raw", 4 * MIB), &path).unwrap();
    let pool = rig.pool();
    pool.adopt(path.to_str().unwrap(), "vm").unwrap();
    fs::rename(&folder, &moved).unwrap();
    std::os::unix::fs::symlink(&moved, &folder).unwrap();
    let refused = pool.open("vm", false).err().unwrap().to_string();
    assert!(refused.contains("symbolic link"), "{refused}");
    fs::remove_file(&folder).unwrap();
    fs::rename(&moved, &folder).unwrap();
    pool.open("vm", false).unwrap();
}

#[test]
fn an_adopted_block_device_keeps_the_name_it_was_adopted_by() {
    let rig = Rig::new();
    let (first, second) = (LoopDevice::new(rig.folder.path(), 512), LoopDevice::new(rig.folder.path(), 512));
    let (name, alias) = (rig.folder.path().join("by-name"), rig.folder.path().join("by-alias"));
    std::os::unix::fs::symlink(&first.path, &name).unwrap();
    std::os::unix::fs::symlink(&first.path, &alias).unwrap();
    let pool = rig.pool();
    assert_eq!(pool.adopt(name.to_str().unwrap(), "vm").unwrap().object.as_deref(), name.to_str());
    for other in [&name, &alias, &first.path] {
        assert!(matches!(pool.adopt(other.to_str().unwrap(), "twice"), Err(PoolError::Exists(_))), "{}", other.display());
    }
    rig.client(&volume(open(&second.path, true))).write(0, vec![2; 4096]).unwrap();
    // As after a reboot that numbers the devices in another order.
    fs::remove_file(&name).unwrap();
    std::os::unix::fs::symlink(&second.path, &name).unwrap();
    let client = rig.client(&volume(pool.open("vm", false).unwrap()));
    assert_eq!(client.read(0, 4096).unwrap(), vec![2; 4096]);
    drop(client);
    fs::remove_file(&name).unwrap();
    fs::File::create_new(&name).unwrap().set_len(DEVICE_SIZE).unwrap();
    let refused = pool.open("vm", false).err().unwrap().to_string();
    assert!(refused.contains("was a block device"), "{refused}");
}

#[test]
fn a_link_in_place_of_a_temporary_file_leads_to_nothing_that_is_emptied() {
    let rig = Rig::new();
    let pool = rig.pool();
    pool.create("vm", &spec(MIB)).unwrap();
    let precious = rig.folder.path().join("precious");
    fs::write(&precious, "kept").unwrap();
    let link = |name: &str| std::os::unix::fs::symlink(&precious, rig.folder.path().join("pool").join(name)).unwrap();
    link(".health");
    assert!(pool.health().ok);
    link("volumes/vm/volume.tmp");
    assert!(pool.resized("vm", 2 * MIB).is_err());
    assert_eq!(fs::read_to_string(&precious).unwrap(), "kept");
}

#[test]
fn a_file_truncated_while_nobody_had_it_open_is_refused_in_words() {
    let rig = Rig::new();
    let path = rig.file("image.raw", 4 * MIB);
    let pool = rig.pool();
    pool.adopt(path.to_str().unwrap(), "old").unwrap();
    let file = fs::File::options().write(true).open(&path).unwrap();
    file.set_len(MIB).unwrap();
    let refused = pool.open("old", false).err().unwrap().to_string();
    assert!(refused.contains("truncated") && refused.contains("truncate -s 4194304"), "{refused}");
    for length in [4 * MIB, 8 * MIB] {
        file.set_len(length).unwrap();
        assert_eq!(pool.open("old", false).unwrap().geometry().size, length);
    }
}

#[test]
fn those_who_make_a_pool_at_the_same_moment_agree_on_its_uuid() {
    const THREADS: usize = 8;
    let folder = tempfile::tempdir().unwrap();
    for round in 0..50 {
        let path = folder.path().join(round.to_string());
        let together = std::sync::Barrier::new(THREADS);
        let open = || {
            together.wait();
            FilePool::open("local", FilePoolConfig { path: path.clone() }).unwrap().uuid()
        };
        let uuids: std::collections::BTreeSet<_> = std::thread::scope(|scope| {
            let threads: Vec<_> = (0..THREADS).map(|_| scope.spawn(open)).collect();
            threads.into_iter().map(|thread| thread.join().unwrap()).collect()
        });
        assert_eq!(uuids.len(), 1, "{uuids:?}");
        let mut names: Vec<_> = fs::read_dir(&path).unwrap().map(|entry| entry.unwrap().file_name()).collect();
        names.sort();
        assert_eq!(names, ["pool.json", "trash", "volumes"]);
    }
}

#[test]
fn without_reflink_a_snapshot_is_refused_in_words() {
    let folder = tempfile::tempdir_in("/dev/shm").unwrap();
    let pool = FilePool::open("shm", FilePoolConfig { path: folder.path().to_owned() }).unwrap();
    pool.create("vm", &spec(MIB)).unwrap();
    let why = pool.snapshot(&["vm"], "s1").unwrap_err().to_string();
    assert!(why.contains("XFS or btrfs"), "{why}");
    assert!(pool.get("vm").unwrap().snapshots.is_empty());
}

#[test]
fn snapshots_and_clones_on_xfs() {
    let rig = Rig::new();
    let mount = LoopMount::new(rig.folder.path(), "xfs", 320 * MIB);
    let pool = FilePool::open("xfs", FilePoolConfig { path: mount.path.join("pool") }).unwrap();
    pool.create("vm", &spec(16 * MIB)).unwrap();
    pool.create("vm-data", &spec(16 * MIB)).unwrap();
    let write = |name: &str, byte: u8| {
        let client = rig.client(&volume(pool.open(name, false).unwrap()));
        client.write(0, vec![byte; MIB as usize]).unwrap();
        client.flush().unwrap();
    };
    let first_byte = |device: Arc<dyn BlockDevice>| rig.client(&volume(device)).read(0, 1).unwrap()[0];
    write("vm", 1);
    pool.snapshot(&["vm", "vm-data"], "s1").unwrap();
    assert!(matches!(pool.snapshot(&["vm"], "s1"), Err(PoolError::Exists(_))));
    write("vm", 2);
    assert_eq!(first_byte(pool.open_snapshot("vm", "s1").unwrap()), 1);
    pool.clone_volume("vm", Some("s1"), "copy").unwrap();
    pool.clone_volume("vm", None, "copy2").unwrap();
    for name in ["vm", "copy", "copy2"] {
        assert_eq!(pool.flatten(name, &|_, _| {}).unwrap(), Flattened::NoParent, "clones share blocks and nothing else");
    }
    assert!(matches!(pool.flatten("none", &|_, _| {}), Err(PoolError::NotFound(_))));
    write("copy", 3);
    assert_eq!(first_byte(pool.open("vm", true).unwrap()), 2);
    assert_eq!(first_byte(pool.open("copy2", true).unwrap()), 2);
    assert!(matches!(pool.delete("vm"), Err(PoolError::InUse(_))));
    pool.rollback("vm", "s1").unwrap();
    assert_eq!(first_byte(pool.open("vm", true).unwrap()), 1);
    pool.delete_snapshot("vm", "s1").unwrap();
    assert!(matches!(pool.open_snapshot("vm", "s1"), Err(PoolError::NotFound(_))));
    pool.delete("vm").unwrap();
    assert_eq!(first_byte(pool.open("copy", true).unwrap()), 3);
    assert!(pool.check(&|_, _| ()).unwrap().is_empty());
}

/// A file system in a file, mounted while the test runs.
struct LoopMount {
    path: std::path::PathBuf,
}

impl LoopMount {
    fn new(folder: &Path, kind: &str, size: u64) -> LoopMount {
        let image = folder.join(format!("{kind}.img"));
        fs::File::create_new(&image).unwrap().set_len(size).unwrap();
        let path = folder.join(format!("{kind}.mnt"));
        fs::create_dir(&path).unwrap();
        command("mkfs", &["-t", kind, "-q", image.to_str().unwrap()]);
        command("mount", &["-o", "loop", image.to_str().unwrap(), path.to_str().unwrap()]);
        LoopMount { path }
    }
}

/// A block device of [`DEVICE_SIZE`] bytes of zeroes.
struct LoopDevice {
    path: std::path::PathBuf,
    _file: tempfile::NamedTempFile,
}

impl LoopDevice {
    fn new(folder: &Path, block_size: u32) -> LoopDevice {
        let file = tempfile::NamedTempFile::new_in(folder).unwrap();
        file.as_file().set_len(DEVICE_SIZE).unwrap();
        let (block_size, shown) = (block_size.to_string(), file.path().to_str().unwrap());
        let path = command("losetup", &["--find", "--show", "--sector-size", &block_size, shown]);
        LoopDevice { path: path.trim().into(), _file: file }
    }
}

impl Drop for LoopDevice {
    fn drop(&mut self) {
        let _ = Command::new("losetup").arg("--detach").arg(&self.path).status();
    }
}

impl Drop for LoopMount {
    fn drop(&mut self) {
        let _ = Command::new("umount").args(["-l"]).arg(&self.path).status();
    }
}

fn command(program: &str, arguments: &[&str]) -> String {
    let path = format!("{}:/sbin:/usr/sbin", std::env::var("PATH").unwrap_or_default());
    let output = Command::new(program).args(arguments).env("PATH", path).output();
    let output = output.unwrap_or_else(|error| panic!("{program}: {error}; install it with: cargo xtask rig install"));
    assert!(output.status.success(), "{program} {arguments:?}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap()
}

/// Counts on one volume, then on the other, without pause: no snapshot of both may see the second ahead of the first.
#[test]
fn a_snapshot_of_two_volumes_is_one_point_in_time() {
    let rig = Rig::new();
    let mount = LoopMount::new(rig.folder.path(), "xfs", 320 * MIB);
    let pool = FilePool::open("xfs", FilePoolConfig { path: mount.path.join("pool") }).unwrap();
    let names = ["one", "two"];
    let volumes = names.map(|name| {
        pool.create(name, &spec(16 * MIB)).unwrap();
        volume(pool.open(name, false).unwrap())
    });
    let counted = |device: Arc<dyn BlockDevice>| {
        let bytes = rig.client(&volume(device)).read(4 * MIB, 8).unwrap();
        u64::from_le_bytes(bytes.try_into().unwrap())
    };
    let stop = std::sync::atomic::AtomicBool::new(false);
    std::thread::scope(|scope| {
        let clients = [rig.client(&volumes[0]), rig.client(&volumes[1])];
        let stop = &stop;
        scope.spawn(move || {
            for count in 1u64.. {
                for client in &clients {
                    let mut sector = vec![0; 512];
                    sector[..8].copy_from_slice(&count.to_le_bytes());
                    client.write(4 * MIB, sector).unwrap();
                }
                if stop.load(Ordering::Relaxed) {
                    return;
                }
            }
        });
        let mut wrong = Vec::new();
        for round in 0..20 {
            let snapshot = format!("s{round}");
            {
                let _held = [volumes[0].hold_writes(), volumes[1].hold_writes()];
                pool.snapshot(&names, &snapshot).unwrap();
            }
            let counts = names.map(|name| counted(pool.open_snapshot(name, &snapshot).unwrap()));
            if counts[0] != counts[1] && counts[0] != counts[1] + 1 {
                wrong.push(counts);
            }
        }
        stop.store(true, Ordering::Relaxed);
        assert!(wrong.is_empty(), "{wrong:?}");
    });
}

#[test]
fn a_wrapped_key_is_replaced_only_if_nobody_has_replaced_it_meanwhile() {
    let folder = tempfile::tempdir().unwrap();
    let pool = FilePool::open("p", FilePoolConfig { path: folder.path().to_owned() }).unwrap();
    pool.create("v", &VolumeSpec { wrapped_key: Some("old".to_owned()), ..spec(1 << 20) }).unwrap();
    pool.set_wrapped_key("v", "old", "new").unwrap();
    assert!(matches!(pool.set_wrapped_key("v", "old", "other"), Err(PoolError::InUse(_))));
    assert_eq!(pool.get("v").unwrap().wrapped_key.as_deref(), Some("new"));
}
