//! Copies between disks in memory, against a model; and what image files are refused.

use std::io;
use std::path::Path;
use std::process::Command;
use std::sync::atomic::{AtomicI64, AtomicU64, Ordering};

use parking_lot::Mutex;
use proptest::prelude::*;

use super::*;

/// A disk in memory that knows which of its blocks are holes, and can fail after a number of requests.
struct Memory {
    bytes: Mutex<Vec<u8>>,
    holes: Mutex<Vec<bool>>,
    /// The size of its blocks; requests must begin and end with one.
    align: u64,
    budget: AtomicI64,
    flushes: AtomicU64,
}

impl Memory {
    fn new(bytes: Vec<u8>, align: u64) -> Memory {
        let holes = bytes.chunks(align as usize).map(is_zero).collect();
        let (bytes, holes) = (Mutex::new(bytes), Mutex::new(holes));
        Memory { bytes, holes, align, budget: AtomicI64::new(i64::MAX), flushes: AtomicU64::new(0) }
    }

    /// The same, with zeroes that are stored.
    fn allocated(bytes: Vec<u8>, align: u64) -> Memory {
        let disk = Memory::new(bytes, align);
        disk.holes.lock().fill(false);
        disk
    }

    fn spend(&self, offset: u64, len: u64) -> io::Result<()> {
        assert!(len > 0 && offset + len <= self.size(), "{offset}+{len} of {}", self.size());
        let end = offset + len;
        assert!(offset.is_multiple_of(self.align) && (end.is_multiple_of(self.align) || end == self.size()), "{offset}+{len}");
        if self.budget.fetch_sub(1, Ordering::Relaxed) <= 0 { Err(io::Error::other("out of luck")) } else { Ok(()) }
    }

    fn into_bytes(self) -> Vec<u8> {
        self.bytes.into_inner()
    }
}

impl Disk for Memory {
    fn name(&self) -> &str {
        "memory"
    }
    fn size(&self) -> u64 {
        self.bytes.lock().len() as u64
    }
    fn runs(&self, offset: u64, len: u64) -> io::Result<Vec<Run>> {
        self.spend(offset, len)?;
        let holes = self.holes.lock();
        let end = offset + len;
        let mut runs: Vec<Run> = Vec::new();
        let mut at = offset;
        while at < end && runs.len() < 3 {
            let (block, zero) = (at / self.align, holes[(at / self.align) as usize]);
            let part = ((block + 1) * self.align).min(end) - at;
            match runs.last_mut() {
                Some(last) if last.zero == zero => last.len += part,
                _ => runs.push(Run { len: part, zero }),
            }
            at += part;
        }
        Ok(runs)
    }
    fn read(&self, offset: u64, buffer: &mut [u8]) -> io::Result<()> {
        self.spend(offset, buffer.len() as u64)?;
        buffer.copy_from_slice(&self.bytes.lock()[offset as usize..offset as usize + buffer.len()]);
        Ok(())
    }
    fn write(&self, offset: u64, data: &[u8]) -> io::Result<()> {
        self.spend(offset, data.len() as u64)?;
        let (from, to) = (offset as usize, offset as usize + data.len());
        self.bytes.lock()[from..to].copy_from_slice(data);
        let align = self.align as usize;
        self.holes.lock()[from / align..to.div_ceil(align)].fill(false);
        Ok(())
    }
    fn zero(&self, offset: u64, len: u64) -> io::Result<()> {
        self.spend(offset, len)?;
        let (from, to) = (offset as usize, (offset + len) as usize);
        self.bytes.lock()[from..to].fill(0);
        let align = self.align as usize;
        self.holes.lock()[from / align..to.div_ceil(align)].fill(true);
        Ok(())
    }
    fn flush(&self) -> io::Result<()> {
        self.flushes.fetch_add(1, Ordering::Relaxed);
        Ok(())
    }
}

/// The content of a disk; shown as its length.
#[derive(Clone)]
struct Content(Vec<u8>);

impl std::fmt::Debug for Content {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let runs = self.0.chunk_by(|left, right| left == right).map(|run| (run[0], run.len()));
        f.debug_list().entries(runs.take(20)).finish()
    }
}

/// Stretches of data and zeroes, some of them long.
fn content() -> impl Strategy<Value = Content> {
    let len = prop_oneof![4 => 1usize..3 * 4096, 2 => 60_000usize..200_000, 1 => 900_000usize..1_500_000];
    let stretch = (any::<bool>(), len, 1u8..=255);
    proptest::collection::vec(stretch, 1..8).prop_map(|stretches| {
        let fill = |(data, len, byte)| std::iter::repeat_n(if data { byte } else { 0 }, len);
        Content(stretches.into_iter().flat_map(fill).collect())
    })
}

fn padded(mut bytes: Vec<u8>, size: usize) -> Vec<u8> {
    bytes.resize(size, 0);
    bytes
}

fn rounded(bytes: &[u8], more: usize) -> usize {
    bytes.len().next_multiple_of(4096) + more * 4096
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn a_copy_is_the_source_and_zeroes(Content(data) in content(), Content(old) in content(), more in 0usize..600, stored in any::<bool>()) {
        let size = rounded(&data, more);
        let old = padded(old, size);
        let source = if stored { Memory::allocated(data.clone(), 512) } else { Memory::new(data.clone(), 512) };
        let target = Memory::new(old, 4096);
        prop_assert!(Copy::new(&source, &target, Pass::Write, 0).run().unwrap());
        prop_assert!(Copy::new(&source, &target, Pass::Compare, 0).run().unwrap());
        let expected = padded(data, size);
        let kept = expected.chunks(4096).filter(|block| !is_zero(block)).count();
        let taken = target.holes.lock().iter().filter(|hole| !**hole).count();
        prop_assert!(taken <= kept, "{taken} blocks taken, {kept} hold data");
        prop_assert!(target.into_bytes() == expected);
    }

    #[test]
    fn a_copy_over_nothing_writes_only_data(Content(data) in content(), stored in any::<bool>()) {
        let size = rounded(&data, 1);
        let source = if stored { Memory::allocated(data.clone(), 512) } else { Memory::new(data.clone(), 512) };
        let target = Memory::new(vec![0; size], 4096);
        let copy = Copy::new(&source, &target, Pass::WriteNew, 0);
        prop_assert!(copy.run().unwrap());
        prop_assert_eq!(copy.done(), size as u64);
        let expected = padded(data, size);
        let data_bytes = expected.chunks(4096).filter(|block| !is_zero(block)).count() * 4096;
        prop_assert_eq!(copy.written(), data_bytes as u64);
        prop_assert!(target.into_bytes() == expected);
    }

    #[test]
    fn an_interrupted_copy_is_resumed(Content(data) in content(), budget in 0i64..60, damage in any::<proptest::sample::Index>()) {
        let size = rounded(&data, 0);
        let (source, target) = (Memory::new(data.clone(), 512), Memory::new(vec![0; size], 4096));
        target.budget.store(budget, Ordering::Relaxed);
        let first = Copy::new(&source, &target, Pass::WriteNew, 0);
        let finished = first.run();
        let position = first.position();
        prop_assert!(finished.is_err() || position == size as u64);
        let expected = padded(data, size);
        prop_assert!(target.bytes.lock()[..position as usize] == expected[..position as usize]);
        // Somebody wrote to it meanwhile.
        let damaged = damage.index(size);
        target.write((damaged / 4096 * 4096) as u64, &[7; 4096]).ok();
        target.budget.store(i64::MAX, Ordering::Relaxed);
        prop_assert!(Copy::new(&source, &target, Pass::Write, position).run().unwrap());
        prop_assert!(target.into_bytes() == expected);
    }

    #[test]
    fn a_difference_is_found(Content(data) in content(), place in any::<proptest::sample::Index>(), more in 0usize..3) {
        let size = rounded(&data, more);
        let at = place.index(size);
        let mut changed = padded(data.clone(), size);
        changed[at] ^= 1;
        let (source, target) = (Memory::new(data, 512), Memory::new(changed, 4096));
        let error = Copy::new(&source, &target, Pass::Compare, 0).run().unwrap_err();
        prop_assert!(error.message.contains(&format!("differ at {}", at / 4096 * 4096)), "{}", error);
    }
}

#[test]
fn a_stopped_copy_says_how_far_it_came() {
    let source = Memory::new(vec![1; 8 << 20], 512);
    let target = Memory::new(vec![0; 8 << 20], 4096);
    let copy = Copy::new(&source, &target, Pass::Write, 0);
    copy.stop();
    assert!(!copy.run().unwrap());
    assert_eq!((copy.position(), copy.done()), (0, 0));
}

fn qemu_img(arguments: &[&str]) {
    let output = Command::new("qemu-img").args(arguments).output().expect("qemu-img is needed: cargo xtask rig install qemu");
    assert!(output.status.success(), "qemu-img {arguments:?}: {}", String::from_utf8_lossy(&output.stderr));
}

fn refusal(path: &Path) -> OpenError {
    open(path, None).err().unwrap_or_else(|| panic!("{} was opened", path.display()))
}

#[test]
fn images_that_stand_on_other_files_are_refused() {
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name);
    let text = |name: &str| path(name).to_str().unwrap().to_owned();
    qemu_img(&["create", "-q", "-f", "qcow2", &text("base.qcow2"), "1M"]);
    qemu_img(&["create", "-q", "-f", "qcow2", "-F", "qcow2", "-b", &text("base.qcow2"), &text("top.qcow2")]);
    qemu_img(&["create", "-q", "-f", "qcow2", "-o", &format!("data_file={}", text("data.raw")), &text("data.qcow2"), "1M"]);
    let secret = "secret,id=s,data=abcdef";
    let options = "encrypt.format=luks,encrypt.key-secret=s,encrypt.iter-time=10";
    qemu_img(&["create", "-q", "--object", secret, "-f", "qcow2", "-o", options, &text("encrypted.qcow2"), "1M"]);
    qemu_img(&["create", "-q", "-f", "qcow2", "-o", "compression_type=zstd", &text("zstd.qcow2"), "1M"]);
    for (name, words) in [
        ("top.qcow2", "base.qcow2"),
        ("data.qcow2", "another file"),
        ("encrypted.qcow2", "encrypted"),
        ("zstd.qcow2", "compression"),
    ] {
        let error = refusal(&path(name));
        assert!(matches!(&error, OpenError::Elsewhere { format: "qcow2", .. }), "{name}: {error:?}");
        assert!(error.to_string().contains(words), "{name}: {error}");
    }
    assert!(open(&path("base.qcow2"), None).is_ok());
}

#[test]
fn other_formats_are_known_and_refused() {
    let folder = tempfile::tempdir().unwrap();
    for (format, options) in
        [("vmdk", "subformat=monolithicSparse"), ("vhdx", ""), ("vpc", "subformat=dynamic"), ("vdi", ""), ("qed", "")]
    {
        let path = folder.path().join(format);
        let mut arguments = vec!["create", "-q", "-f", format];
        if !options.is_empty() {
            arguments.extend(["-o", options]);
        }
        arguments.extend([path.to_str().unwrap(), "1M"]);
        qemu_img(&arguments);
        let error = refusal(&path);
        assert!(matches!(&error, OpenError::Elsewhere { format: known, .. } if *known == format), "{format}: {error:?}");
    }
    let packed = folder.path().join("packed.gz");
    std::fs::write(&packed, b"\x1f\x8b\x08\0rest").unwrap();
    assert!(refusal(&packed).to_string().contains("gzip -dk"));
    assert!(open(&packed, Some(Format::Raw)).is_ok());
    assert!(matches!(refusal(folder.path()), OpenError::Refused(_)));
    assert!(matches!(refusal(&folder.path().join("none")), OpenError::Io(_)));
    assert!(matches!(refusal(Path::new("/dev/null")), OpenError::Refused(_)));
}

#[test]
fn a_flat_vmdk_is_read_and_reaches_no_other_folder() {
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name);
    let raw = path("a.raw");
    std::fs::write(&raw, (0..2u32 << 20).map(|at| (at / 4096) as u8).collect::<Vec<_>>()).unwrap();
    let (from, to) = (raw.to_str().unwrap(), path("a.vmdk"));
    qemu_img(&["convert", "-f", "raw", "-O", "vmdk", "-o", "subformat=monolithicFlat", from, to.to_str().unwrap()]);
    let opened = open(&to, None).unwrap();
    assert_eq!(opened.format, Format::Vmdk);
    let target = Memory::new(vec![0; opened.disk.size() as usize], 4096);
    assert!(Copy::new(&*opened.disk, &target, Pass::WriteNew, 0).run().unwrap());
    assert!(target.into_bytes() == std::fs::read(&raw).unwrap());

    let descriptor = std::fs::read_to_string(&to).unwrap();
    for elsewhere in ["/etc/passwd", "../secret", "sub/../../secret", "link"] {
        let other = path("other.vmdk");
        std::fs::write(&other, descriptor.replace("a-flat.vmdk", elsewhere)).unwrap();
        std::os::unix::fs::symlink("/etc/passwd", path("link")).ok();
        assert!(matches!(refusal(&other), OpenError::Elsewhere { format: "vmdk", .. }), "{elsewhere}");
    }
}

#[test]
fn damaged_qcow2_images_are_errors_and_no_more() {
    let folder = tempfile::tempdir().unwrap();
    let raw = folder.path().join("a.raw");
    let whole = folder.path().join("a.qcow2");
    std::fs::write(&raw, (0..1u32 << 20).map(|at| (at.wrapping_mul(2_654_435_761) >> 24) as u8).collect::<Vec<_>>()).unwrap();
    let (from, to) = (raw.to_str().unwrap(), whole.to_str().unwrap());
    qemu_img(&["convert", "-c", "-f", "raw", "-O", "qcow2", "-o", "cluster_size=4096", from, to]);
    let image = std::fs::read(&whole).unwrap();
    let damaged = folder.path().join("damaged.qcow2");
    let mut seed = 1u64;
    let mut next = move || {
        seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (seed >> 33) as usize
    };
    let mut read = 0;
    for round in 0..400 {
        let mut bytes = image.clone();
        // The header, then the tables, then anywhere.
        let reach = [120, 20 << 10, bytes.len()][round % 3].min(bytes.len());
        for _ in 0..1 + next() % 4 {
            bytes[next() % reach] = next() as u8;
        }
        if round % 5 == 0 {
            bytes.truncate(next() % image.len());
        }
        std::fs::write(&damaged, &bytes).unwrap();
        let Ok(opened) = open(&damaged, Some(Format::Qcow2)) else { continue };
        if opened.disk.size() > 64 << 20 {
            continue;
        }
        let target = Memory::new(vec![0; opened.disk.size() as usize], 512);
        if Copy::new(&*opened.disk, &target, Pass::Write, 0).run().is_ok() {
            read += 1;
        }
    }
    assert!(read > 0 && read < 400, "{read} of 400 damaged images could be read");
}

#[test]
fn what_a_truncated_image_lost_is_never_taken_for_zeroes() {
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name);
    let mut content: Vec<u8> = (0..3u32 << 20).map(|at| (at.wrapping_mul(2_654_435_761) >> 24) as u8 | 1).collect();
    content[1 << 20..2 << 20].fill(0);
    std::fs::write(path("a.raw"), &content).unwrap();
    for (kind, options, file) in [
        ("qcow2", vec!["-o", "cluster_size=65536"], "a.qcow2"),
        ("qcow2", vec!["-o", "compat=0.10,cluster_size=512"], "a.qcow2"),
        ("qcow2", vec!["-c", "-o", "cluster_size=4096"], "a.qcow2"),
        ("vmdk", vec!["-o", "subformat=monolithicFlat"], "a-flat.vmdk"),
    ] {
        let image = path(&format!("a.{kind}"));
        let fixed = ["convert", "-f", "raw", "-O", kind];
        qemu_img(&[&fixed[..], &options, &[path("a.raw").to_str().unwrap(), image.to_str().unwrap()]].concat());
        let copy = || {
            let opened = open(&image, None).ok()?;
            let target = Memory::new(vec![0; opened.disk.size() as usize], 512);
            let whole = Copy::new(&*opened.disk, &target, Pass::Write, 0).run().is_ok_and(|finished| finished);
            whole.then(|| target.into_bytes())
        };
        assert!(copy().is_some_and(|bytes| bytes == content), "{options:?}: the whole image");
        let bytes = std::fs::read(path(file)).unwrap();
        let mut lost = 0;
        for cut in (0..bytes.len()).step_by(bytes.len() / 60).chain([bytes.len() - 513]) {
            std::fs::write(path(file), &bytes[..cut]).unwrap();
            let copied = copy();
            lost += usize::from(copied.is_none());
            assert!(copied.is_none_or(|copied| copied == content), "{options:?}: cut at {cut} of {}", bytes.len());
        }
        assert!(lost > 40, "{options:?}: only {lost} of the damaged images were refused");
    }
}

#[test]
fn images_are_what_their_names_say() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("download.qcow2");
    std::fs::write(&path, "<html>not found</html>").unwrap();
    assert!(refusal(&path).to_string().contains("--format raw"));
    assert!(open(&path, Some(Format::Raw)).is_ok());
}

#[test]
fn a_daemon_that_hangs_up_is_named() {
    let (ours, theirs) = std::os::unix::net::UnixStream::pair().unwrap();
    drop(theirs);
    let error = std::io::Read::read_exact(&mut &ours, &mut [0]).map_err(super::volume::hung_up).unwrap_err();
    assert!(error.to_string().contains("the daemon closed the connection"), "{error}");
}

#[test]
fn records_survive_and_know_their_copy() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("deep/import.json");
    let source = Source::of_file(&tempfile::tempfile().unwrap()).unwrap();
    let record = Record { source: source.clone(), format: Format::Qcow2, size: 10, position: 5, closed: false };
    assert_eq!(Record::load(&path), None);
    record.save(&path).unwrap();
    assert_eq!(Record::load(&path), Some(record.clone()));
    assert!(record.is_of(&source, Format::Qcow2, 10) && !record.is_of(&source, Format::Raw, 10));
    assert!(!record.is_of(&Source::Volume { uuid: "u".to_owned(), snapshot: None }, Format::Qcow2, 10));
    std::fs::write(&path, "{").unwrap();
    assert_eq!(Record::load(&path), None);
}
