//! Pools of mapped volumes that are not what they should be: of another version, another pool's, copied in part, opened twice. Each is an error that
//! names what is wrong and what to do, and concerns nothing else.

mod common;

use std::cell::Cell;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};

use backends::{Layout, Pool, PoolError};
use common::{Host, MIB, spec};
use tempfile::TempDir;
use volume::pool::MappedPool;

/// An object that only ends an epoch.
const SEAL_LEN: u64 = 128;

/// A pool with two volumes, `v` and `w`, that hold something.
struct Place {
    host: Host,
    path: PathBuf,
    folder: TempDir,
}

impl Place {
    fn new() -> Place {
        let folder = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
        let host = Host::new(folder.path(), "host");
        let place = Place { host, path: folder.path().join("pool"), folder };
        place.fill(&place.path);
        place
    }

    fn fill(&self, path: &Path) {
        let pool = self.host.file_pool(path);
        for volume in ["v", "w"] {
            pool.create(volume, &spec(Layout::Mapped)).unwrap();
            let disk = self.host.disk(&pool, volume).unwrap();
            disk.write(0, noise()).unwrap();
            disk.flush().unwrap();
            pool.snapshot(&[volume], "s").unwrap();
            // When it can be read, all before it is in the pool.
            drop(pool.open_snapshot(volume, "s").unwrap());
        }
    }

    fn pool(&self) -> MappedPool {
        self.host.file_pool(&self.path)
    }

    /// What is said when a volume is opened.
    fn refusal(&self, volume: &str) -> String {
        match self.pool().open(volume, false).map(drop) {
            Err(PoolError::Backend(why)) => why,
            other => panic!("{other:?}"),
        }
    }

    /// The files of a volume of one family, the longest first.
    fn objects(&self, volume: &str, family: &str) -> Vec<PathBuf> {
        let group = self.pool().get(volume).unwrap().uuid.simple().to_string();
        let mut found = files_under(&self.path.join("segments/objects").join(group).join(family));
        found.sort_by_key(|file| std::cmp::Reverse(fs::metadata(file).unwrap().len()));
        found
    }

    fn is_whole(&self, volume: &str) {
        let pool = self.pool();
        let disk = self.host.disk(&pool, volume).unwrap();
        assert!(disk.read(0, MIB).unwrap() == noise(), "volume {volume}");
        drop(disk);
        assert_eq!(pool.check_volume(volume, &|_, _| ()).unwrap(), Vec::<String>::new());
    }
}

/// What neither compresses nor repeats.
fn noise() -> Vec<u8> {
    let mut state = 7u64;
    let mut next = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state.to_le_bytes()
    };
    (0..MIB / 8).flat_map(|_| next()).collect()
}

fn files_under(folder: &Path) -> Vec<PathBuf> {
    let entries = fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path());
    entries.flat_map(|path| if path.is_dir() { files_under(&path) } else { vec![path] }).collect()
}

/// Replaces a file that nobody may write to.
fn replace(file: &Path, change: impl FnOnce(&mut Vec<u8>)) {
    let mut bytes = fs::read(file).unwrap();
    change(&mut bytes);
    fs::remove_file(file).unwrap();
    fs::write(file, bytes).unwrap();
}

fn says(why: &str, words: &[&str]) {
    words.iter().for_each(|word| assert!(why.contains(word), "{word:?} is not in: {why}"));
}

#[test]
fn a_store_of_another_format_version_is_refused_and_left_alone() {
    let place = Place::new();
    let header = place.path.join("segments/pool");
    let before = fs::read(&header).unwrap();
    // These twelve bytes mean the same in every version.
    replace(&header, |bytes| bytes[8] = 2);
    let why = place.refusal("v");
    says(&why, &[place.path.join("segments").to_str().unwrap(), "format version 2", "novastor"]);
    place.pool().create("raw", &spec(Layout::Raw)).unwrap();
    assert!(place.pool().create("x", &spec(Layout::Mapped)).is_err());
    replace(&header, |bytes| *bytes = before);
    place.is_whole("v");
}

#[test]
fn another_pools_store_is_refused_by_its_uuid() {
    let place = Place::new();
    let other = place.folder.path().join("other");
    place.fill(&other);
    let uuid_of = |path: &Path| -> String {
        let text: serde_json::Value = serde_json::from_slice(&fs::read(path.join("pool.json")).unwrap()).unwrap();
        text["uuid"].as_str().unwrap().to_owned()
    };
    let kept = place.folder.path().join("kept");
    fs::rename(place.path.join("segments"), &kept).unwrap();
    fs::rename(other.join("segments"), place.path.join("segments")).unwrap();
    let why = place.refusal("v");
    says(&why, &[place.path.to_str().unwrap(), &uuid_of(&other), &uuid_of(&place.path)]);
    fs::rename(place.path.join("segments"), other.join("segments")).unwrap();
    fs::rename(&kept, place.path.join("segments")).unwrap();
    place.is_whole("v");
}

#[test]
fn what_a_copy_of_a_pool_lacks_is_named_and_concerns_its_volume_alone() {
    for family in ["m", "w"] {
        let place = Place::new();
        let lost = place.objects("v", family).remove(0);
        let elsewhere = place.folder.path().join("elsewhere");
        fs::rename(&lost, &elsewhere).unwrap();
        let group = place.pool().get("v").unwrap().uuid.simple().to_string();
        let why = match family {
            // What the checkpoint says.
            "m" => place.refusal("v"),
            // Blocks.
            _ => {
                let pool = place.pool();
                let disk = place.host.disk(&pool, "v").unwrap();
                assert!(disk.read(0, MIB).is_err());
                drop(disk);
                pool.check_volume("v", &|_, _| ()).unwrap().join("\n")
            }
        };
        says(&why, &["volume", &format!("{group}/{family}/"), "missing"]);
        place.is_whole("w");
        fs::rename(&elsewhere, &lost).unwrap();
        place.is_whole("v");
    }
}

#[test]
fn a_check_of_the_pool_names_what_is_missing_and_every_volume_that_needs_it() {
    let place = Place::new();
    place.pool().clone_volume("v", Some("s"), "c").unwrap();
    let check = |pool: &MappedPool| {
        let told = Cell::new((0, 1));
        let found = pool.check(&|done, total| told.set((done, total))).unwrap();
        assert!(told.get().0 == told.get().1 && told.get().1 > MIB, "{:?}", told.get());
        found
    };
    assert_eq!(check(&place.pool()), Vec::<String>::new());
    let elsewhere = place.folder.path().join("elsewhere");
    for (family, also) in [("w", ", and cloned from it c: "), ("g", ", and cloned from it c: "), ("m", ": ")] {
        for lost in place.objects("v", family) {
            let object = lost.strip_prefix(place.path.join("segments/objects")).unwrap().display().to_string();
            let object = object.trim_end_matches('=');
            if fs::metadata(&lost).unwrap().len() == SEAL_LEN {
                continue;
            }
            fs::rename(&lost, &elsewhere).unwrap();
            let pool = place.pool();
            let found = check(&pool);
            assert_eq!(found.len(), 1, "{object}: {found:?}");
            says(&found[0], &[&format!("volume v{also}"), object, "missing", "copy of the pool"]);
            drop(pool);
            fs::rename(&elsewhere, &lost).unwrap();
        }
    }
    let folder = place.path.join("segments/objects").join(place.pool().get("w").unwrap().uuid.simple().to_string());
    fs::rename(&folder, &elsewhere).unwrap();
    let found = check(&place.pool());
    assert!(found.len() == 1 && found[0].contains("volume w: ") && found[0].contains("missing"), "{found:?}");
}

#[test]
fn a_check_of_the_pool_finds_nothing_wrong_while_volumes_are_written_collected_and_deleted() {
    let place = Place::new();
    let pool = place.pool();
    let disk = place.host.disk(&pool, "v").unwrap();
    let is_over = AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            for round in 0..8 {
                let name = format!("n{round}");
                pool.create(&name, &spec(Layout::Mapped)).unwrap();
                disk.write(round % 8 * MIB, noise()).unwrap();
                disk.flush().unwrap();
                pool.snapshot(&["v"], &name).unwrap();
                pool.delete_snapshot("v", &name).unwrap();
                pool.delete(&name).unwrap();
            }
            is_over.store(true, Ordering::SeqCst);
        });
        while !is_over.load(Ordering::SeqCst) {
            let found = pool.check(&|_, _| ()).unwrap();
            assert!(!found.iter().any(|problem| problem.contains("missing")), "{found:?}");
        }
    });
}

#[test]
fn a_volume_whose_root_was_not_copied_is_said_to_lack_it() {
    let place = Place::new();
    let group = place.pool().get("v").unwrap().uuid.simple().to_string();
    let (root, elsewhere) = (place.path.join("segments/roots").join(&group), place.folder.path().join("elsewhere"));
    fs::rename(&root, &elsewhere).unwrap();
    let pool = place.pool();
    let why = pool.open("v", false).map(drop).unwrap_err().to_string();
    says(&why, &["volume v", &format!("{group}/root"), "missing", "copy of the pool"]);
    drop(pool);
    place.is_whole("w");
    fs::rename(&elsewhere, &root).unwrap();
    place.is_whole("v");
}

#[test]
fn a_volume_is_opened_once_on_a_host() {
    let place = Place::new();
    let pool = place.pool();
    let device = pool.open("v", false).unwrap();
    let disk = place.host.client(device.clone()).unwrap();
    for second in [&pool, &place.pool()] {
        let why = second.open("v", false).map(drop).unwrap_err().to_string();
        says(&why, &["volume v", "log"]);
        println!("opened twice: {why}");
    }
    disk.write(0, vec![3; 4096]).unwrap();
    disk.flush().unwrap();
    drop((disk, device));
    assert!(place.host.disk(&pool, "v").unwrap().read(0, 4096).unwrap() == vec![3; 4096]);
}
