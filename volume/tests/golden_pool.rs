//! A pool as the first version of the formats left it: its directory and the logs of its host, nothing of it encrypted, opened for ever.
//!
//! `NOVASTOR_MAKE_GOLDEN=1 cargo test -p volume --test golden_pool` writes the file anew, which is only right for a new version of the formats.

mod common;

use std::fmt::Write;
use std::fs::{self, File, Permissions};
use std::os::unix::fs::{FileExt, PermissionsExt};
use std::path::{Path, PathBuf};

use backends::{Layout, Pool, VolumeSpec};
use common::{BLOCK, Host, MIB, Place, hex, spec, unhex};

const SECTOR: usize = 512;

fn golden() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/pool-1.txt")
}

fn content(seed: u8) -> Vec<u8> {
    common::content(0, seed)
}

/// Volumes `a` and `b` share a group, `c` is a clone of a snapshot of `own`, and the logs hold what the directory does not.
fn make() -> String {
    let shared = VolumeSpec { policy: Some("shared".to_owned()), tenant: Some("t".to_owned()), ..spec(Layout::Mapped) };
    let place = Place::new(&["a", "b"], &shared);
    place.pool.create("own", &spec(Layout::Mapped)).unwrap();
    let [a, b, own] = ["a", "b", "own"].map(|volume| place.disk(volume));
    for (disk, seed) in [(&a, 1), (&b, 1), (&own, 2)] {
        disk.write(0, content(seed)).unwrap();
        disk.write(8 * MIB, content(seed + 10)).unwrap();
    }
    place.pool.snapshot(&["a", "b"], "s").unwrap();
    place.pool.snapshot(&["own"], "s").unwrap();
    for volume in ["a", "b", "own"] {
        drop(place.pool.open_snapshot(volume, "s").unwrap());
    }
    place.pool.clone_volume("own", Some("s"), "c").unwrap();
    for (disk, seed) in [(&a, 3), (&b, 4), (&own, 5)] {
        disk.write(0, content(seed)).unwrap();
        disk.flush().unwrap();
    }
    let mut text = String::new();
    // Logs first: what reaches the directory meanwhile is in both.
    for folder in ["host", "pool"] {
        describe(place.folder.path(), Path::new(folder), &mut text);
    }
    text
}

/// Each file with its mode, its length and those of its sectors that are not empty.
fn describe(root: &Path, folder: &Path, text: &mut String) {
    let mut entries: Vec<_> = fs::read_dir(root.join(folder)).unwrap().map(|entry| entry.unwrap()).collect();
    entries.sort_by_key(|entry| entry.file_name());
    for entry in entries {
        let path = folder.join(entry.file_name());
        if entry.file_type().unwrap().is_dir() {
            describe(root, &path, text);
            continue;
        }
        let content = fs::read(root.join(&path)).unwrap();
        let mode = entry.metadata().unwrap().permissions().mode() & 0o777;
        writeln!(text, "file {} {mode:o} {}", path.display(), content.len()).unwrap();
        for (number, sector) in content.chunks(SECTOR).enumerate() {
            if sector.iter().any(|byte| *byte != 0) {
                writeln!(text, "{} {}", number * SECTOR, hex(sector)).unwrap();
            }
        }
    }
}

fn restore(root: &Path) {
    let mut current = None;
    for line in fs::read_to_string(golden()).unwrap().lines() {
        match line.split(' ').collect::<Vec<_>>()[..] {
            ["file", path, mode, len] => {
                let path = root.join(path);
                fs::create_dir_all(path.parent().unwrap()).unwrap();
                let file = File::create(&path).unwrap();
                file.set_len(len.parse().unwrap()).unwrap();
                file.set_permissions(Permissions::from_mode(u32::from_str_radix(mode, 8).unwrap())).unwrap();
                current = Some(file);
            }
            [at, sector] => current.as_ref().unwrap().write_all_at(&unhex(sector), at.parse().unwrap()).unwrap(),
            _ => panic!("{line}"),
        }
    }
}

#[test]
fn what_the_first_version_wrote_opens() {
    if std::env::var_os("NOVASTOR_MAKE_GOLDEN").is_some() {
        fs::write(golden(), make()).unwrap();
    }
    let folder = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    restore(folder.path());
    let host = Host::new(folder.path(), "host");
    let pool = host.file_pool(&folder.path().join("pool"));
    let names: Vec<String> = pool.list().unwrap().into_iter().map(|record| record.name).collect();
    assert_eq!(names, ["a", "b", "c", "own"]);
    for (volume, begins, goes_on) in [("a", 3, 11), ("b", 4, 11), ("own", 5, 12), ("c", 2, 12)] {
        let disk = host.disk(&pool, volume).unwrap();
        assert_eq!(disk.read(0, 6 * BLOCK as u64).unwrap(), content(begins), "{volume}");
        assert_eq!(disk.read(8 * MIB, 6 * BLOCK as u64).unwrap(), content(goes_on), "{volume}");
        assert_eq!(disk.read(MIB, BLOCK as u64).unwrap(), vec![0; BLOCK], "{volume}");
        disk.write(0, content(9)).unwrap();
        disk.flush().unwrap();
    }
    for (volume, begins) in [("a", 1), ("b", 1), ("own", 2)] {
        let snapshot = host.client(pool.open_snapshot(volume, "s").unwrap()).unwrap();
        assert_eq!(snapshot.read(0, 6 * BLOCK as u64).unwrap(), content(begins), "{volume}@s");
    }
    assert_eq!(pool.check(&|_, _| ()).unwrap(), Vec::<String>::new());
}
