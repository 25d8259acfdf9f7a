//! The RBD driver against a real Ceph on loopback: one monitor, and storage daemons in memory.

use std::io::{BufRead, BufReader};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, mpsc};
use std::time::Duration;

use backends::rbd::{RbdPool, RbdPoolConfig};
use backends::{Flattened, Layout, Pool, PoolError, VolumeSpec};
use blockdev::client::Client;
use blockdev::conformance::{self, Suite};
use blockdev::reactor::DataPlaneOptions;
use blockdev::{BlockDevice, DataPlane, Errno, ExtentKind, Op, Volume, VolumeOptions, clock};
use novastor_tests::rig::ceph::{Ceph, CephSpec, POOL};

const MIB: u64 = 1 << 20;
const LIMIT: Duration = Duration::from_secs(120);

fn config(ceph: &Ceph) -> RbdPoolConfig {
    RbdPoolConfig { conf: ceph.conf(), ..RbdPoolConfig::new(POOL) }
}

fn pool(ceph: &Ceph) -> RbdPool {
    RbdPool::open("ceph", config(ceph)).unwrap()
}

fn spec(size: u64) -> VolumeSpec {
    VolumeSpec { size, block_size: 512, layout: Layout::Raw, policy: None, tenant: None, wrapped_key: None }
}

fn plane() -> DataPlane {
    DataPlane::start(DataPlaneOptions::default()).unwrap()
}

/// An image that was just given up is in use for a moment longer.
fn unless_in_use(outcome: Result<(), PoolError>) -> Option<Result<(), PoolError>> {
    (!matches!(outcome, Err(PoolError::InUse(_)))).then_some(outcome)
}

fn client(plane: &DataPlane, device: Arc<dyn BlockDevice>) -> Client {
    let options = VolumeOptions { name: "test".into(), read_only: !device.capabilities().writable, block_size: 512 };
    Client::open(&Volume::new(device, options), &plane.handles()[0]).unwrap()
}

/// Waits until `found` gives something; a bound against hanging, not a measurement.
fn wait_for<T>(what: &str, mut found: impl FnMut() -> Option<T>) -> T {
    let deadline = clock::monotonic() + LIMIT;
    loop {
        if let Some(value) = found() {
            return value;
        }
        assert!(clock::monotonic() < deadline, "{what} did not come");
        std::thread::sleep(Duration::from_millis(20));
    }
}

#[test]
fn conforms() {
    let ceph = Ceph::start(CephSpec::default()).unwrap();
    let pool = pool(&ceph);
    let number = AtomicU32::new(0);
    conformance::run(Suite::default(), || {
        let name = format!("disk{}", number.fetch_add(1, Ordering::Relaxed));
        pool.create(&name, &spec(conformance::DEVICE_SIZE)).unwrap();
        pool.open(&name, false).unwrap()
    });
}

#[test]
fn keeps_volumes_snapshots_and_clones() {
    let ceph = Ceph::start(CephSpec::default()).unwrap();
    let (plane, pool) = (plane(), pool(&ceph));

    let made = pool.create("one", &spec(32 * MIB)).unwrap();
    assert_eq!((made.size, made.object.as_deref()), (32 * MIB, None));
    assert_eq!(pool.get("one").unwrap(), made);
    assert!(matches!(pool.create("one", &spec(MIB)), Err(PoolError::Exists(_))));
    assert!(matches!(pool.create("odd", &spec(MIB + 1)), Err(PoolError::Invalid(_))));
    assert!(matches!(pool.get("none"), Err(PoolError::NotFound(_))));
    assert!(matches!(pool.open("none", true), Err(PoolError::NotFound(_))));

    let disk = client(&plane, pool.open("one", false).unwrap());
    disk.write(0, vec![1; 8192]).unwrap();
    pool.snapshot(&["one"], "first").unwrap();
    disk.write(4096, vec![2; 4096]).unwrap();
    assert!(matches!(pool.snapshot(&["one"], "first"), Err(PoolError::Exists(_))));
    assert_eq!(pool.get("one").unwrap().snapshots["first"].size, 32 * MIB);

    let frozen = client(&plane, pool.open_snapshot("one", "first").unwrap());
    assert_eq!(frozen.read(0, 8192).unwrap(), vec![1; 8192]);
    assert_eq!(frozen.write(0, vec![9; 512]), Err(Errno::EPERM));
    drop(frozen);
    assert!(matches!(pool.open_snapshot("one", "second"), Err(PoolError::NotFound(_))));

    let copy = pool.clone_volume("one", Some("first"), "copy").unwrap();
    assert_eq!(copy.origin.as_deref(), Some("one@first"));
    let cloned = client(&plane, pool.open("copy", false).unwrap());
    assert_eq!(cloned.read(0, 8192).unwrap(), vec![1; 8192]);
    cloned.run(Op::Discard, 0, 4096, Vec::new()).unwrap();
    assert_eq!(cloned.read(0, 4096).unwrap(), vec![0; 4096], "the origin's bytes do not shine through");
    let now = pool.clone_volume("one", None, "now").unwrap();
    assert_eq!((now.origin.as_deref(), now.snapshots.len()), (Some("one"), 0));
    let cloned_now = client(&plane, pool.open("now", true).unwrap());
    assert_eq!(cloned_now.read(4096, 4096).unwrap(), vec![2; 4096]);
    assert_eq!(pool.get("one").unwrap().snapshots.len(), 1, "the snapshot of the clone is out of sight");

    assert!(matches!(pool.rollback("one", "first"), Err(PoolError::InUse(_))), "it is open");
    assert!(matches!(pool.delete("one"), Err(PoolError::InUse(_))), "it is open");
    drop((disk, cloned, cloned_now));
    wait_for("the rollback", || unless_in_use(pool.rollback("one", "first"))).unwrap();
    let disk = client(&plane, pool.open("one", true).unwrap());
    assert_eq!(disk.read(4096, 4096).unwrap(), vec![1; 4096]);
    drop(disk);

    let usage = pool.usage("one").unwrap();
    assert_eq!(usage.logical, 32 * MIB);
    assert!(usage.allocated >= 8192 && usage.allocated <= 4 * MIB, "{usage:?}");

    pool.rename("one", "uno").unwrap();
    assert_eq!(pool.list().unwrap().iter().map(|volume| volume.name.as_str()).collect::<Vec<_>>(), ["copy", "now", "uno"]);
    assert_eq!(pool.get("uno").unwrap().uuid, made.uuid);
    let refusal = pool.delete("uno").unwrap_err().to_string();
    assert!(refusal.contains("uno@first"), "{refusal}");
    pool.delete_snapshot("uno", "first").unwrap();
    assert!(matches!(pool.delete_snapshot("uno", "first"), Err(PoolError::NotFound(_))));
    let refusal = pool.delete("uno").unwrap_err().to_string();
    assert!(refusal.contains("clones depend on it"), "{refusal}");
    for name in ["copy", "now", "uno"] {
        wait_for("the deletion", || unless_in_use(pool.delete(name))).unwrap();
    }
    assert_eq!(pool.list().unwrap(), []);
    assert_eq!(ceph.rbd(&["ls", POOL]).unwrap(), "");
    let health = pool.health();
    assert!(health.ok && health.detail.contains("librbd"), "{health:?}");
    assert_eq!(health.total, None, "this cluster has no manager to report its space");
}

#[test]
fn flattened_clones_need_their_origin_no_more() {
    let ceph = Ceph::start(CephSpec::default()).unwrap();
    let (plane, pool) = (plane(), pool(&ceph));
    pool.create("one", &spec(32 * MIB)).unwrap();
    let disk = client(&plane, pool.open("one", false).unwrap());
    (0..8).for_each(|object| disk.write(object * 4 * MIB, vec![object as u8 + 1; 4096]).unwrap());
    assert_eq!(pool.flatten("one", &|_, _| {}).unwrap(), Flattened::NoParent);
    assert!(matches!(pool.flatten("none", &|_, _| {}), Err(PoolError::NotFound(_))));
    pool.snapshot(&["one"], "first").unwrap();
    pool.clone_volume("one", Some("first"), "copy").unwrap();
    pool.clone_volume("one", None, "now").unwrap();
    drop(disk);

    let copy = client(&plane, pool.open("copy", false).unwrap());
    copy.write(4 * MIB, vec![9; 512]).unwrap();
    let (done, total) = (AtomicU64::new(0), AtomicU64::new(0));
    let progress = |now: u64, all: u64| {
        done.fetch_max(now, Ordering::Relaxed);
        total.store(all, Ordering::Relaxed);
    };
    assert_eq!(pool.flatten("copy", &progress).unwrap(), Flattened::Copied, "while it is open");
    assert_eq!(total.into_inner(), 32 * MIB);
    assert!((1..=32 * MIB).contains(&done.into_inner()));
    assert_eq!(pool.flatten("now", &progress_of_nobody).unwrap(), Flattened::Copied, "while it is not");
    for clone in ["copy", "now"] {
        assert_eq!(pool.get(clone).unwrap().origin, None);
        assert_eq!(pool.flatten(clone, &progress_of_nobody).unwrap(), Flattened::NoParent);
    }

    wait_for("the snapshot's deletion", || unless_in_use(pool.delete_snapshot("one", "first"))).unwrap();
    wait_for("the origin's deletion", || unless_in_use(pool.delete("one"))).unwrap();
    let now = client(&plane, pool.open("now", true).unwrap());
    for object in 0..8 {
        assert_eq!(now.read(object * 4 * MIB, 8192).unwrap(), [[object as u8 + 1; 4096], [0; 4096]].concat());
    }
    assert_eq!(copy.read(4 * MIB, 1024).unwrap(), [[9; 512], [2; 512]].concat());
}

fn progress_of_nobody(_done: u64, _total: u64) {}

#[test]
fn adopts_images_and_never_deletes_them() {
    let ceph = Ceph::start(CephSpec::default()).unwrap();
    let (plane, pool) = (plane(), pool(&ceph));
    ceph.create_image("plain", 16).unwrap();
    ceph.create_image("VM-1", 16).unwrap();

    let plain = pool.get("plain").unwrap();
    assert_eq!(plain.object.as_deref(), Some("plain"), "every image is a volume, whoever made it");
    assert_eq!(pool.get("plain").unwrap().uuid, plain.uuid, "its UUID stays");
    assert_eq!(pool.list().unwrap().len(), 1, "no volume can have the other's name");

    assert!(matches!(pool.adopt("gone", "vm1"), Err(PoolError::NotFound(_))));
    let adopted = pool.adopt("VM-1", "vm1").unwrap();
    assert_eq!((adopted.name.as_str(), adopted.object.as_deref()), ("vm1", Some("VM-1")));
    assert_eq!(adopted.uuid, pool.get("vm1").unwrap().uuid);
    assert!(matches!(pool.adopt("VM-1", "vm2"), Err(PoolError::Exists(_))));
    assert_eq!(pool.list().unwrap().len(), 2);
    let disk = client(&plane, pool.open("vm1", false).unwrap());
    disk.write(0, vec![7; 512]).unwrap();
    pool.rename("vm1", "vm3").unwrap();
    assert!(matches!(pool.get("vm1"), Err(PoolError::NotFound(_))));
    assert_eq!(pool.get("vm3").unwrap().object.as_deref(), Some("VM-1"));
    drop(disk);

    wait_for("forgetting", || unless_in_use(pool.delete("vm3"))).unwrap();
    pool.delete("plain").unwrap();
    assert_eq!(pool.list().unwrap(), []);
    assert_eq!(ceph.rbd(&["ls", POOL]).unwrap(), "VM-1\nplain\n", "the images are still there");
    assert_eq!(pool.adopt("plain", "plain").unwrap().uuid, plain.uuid);

    ceph.rbd(&["namespace", "create", "rbd/tenant"]).unwrap();
    let apart = RbdPool::open("apart", RbdPoolConfig { namespace: "tenant".into(), ..config(&ceph) }).unwrap();
    assert_eq!(apart.list().unwrap(), []);
    ceph.rbd(&["create", "--size", "16M", "rbd/tenant/VM-1"]).unwrap();
    apart.adopt("VM-1", "vm1").unwrap();
    assert_eq!(apart.list().unwrap().len(), 1);
    assert!(matches!(pool.get("vm1"), Err(PoolError::NotFound(_))), "namespaces share no names");
    assert_eq!(apart.check(&|_, _| ()).unwrap(), Vec::<String>::new());

    ceph.rbd(&["image-meta", "set", "rbd/plain", "novastor.volume", "garbage"]).unwrap();
    pool.adopt("VM-1", "vm4").unwrap();
    assert_eq!(pool.list().unwrap().len(), 1, "one damaged record hides no other volume");
    assert!(pool.check(&|_, _| ()).unwrap().iter().any(|finding| finding.contains("rbd/plain: its record is damaged")));

    ceph.rbd(&["create", "--size", "16M", "--image-feature", "layering", &format!("{POOL}/old")]).unwrap();
    let refusal = pool.open("old", false).err().unwrap().to_string();
    assert!(refusal.contains("rbd feature enable rbd/old exclusive-lock"), "{refusal}");
    assert!(pool.check(&|_, _| ()).unwrap().iter().any(|finding| finding.contains("rbd/old")));
    let disk = client(&plane, pool.open("old", true).unwrap());
    assert_eq!(disk.read(0, 512).unwrap(), vec![0; 512]);
    assert!(disk.extents(0, 16 * MIB).unwrap().iter().all(|extent| extent.kind == ExtentKind::Data), "it keeps no map");
}

#[test]
fn sizes_and_extents_follow_the_image() {
    let ceph = Ceph::start(CephSpec::default()).unwrap();
    let (plane, pool) = (plane(), pool(&ceph));
    pool.create("disk", &spec(32 * MIB)).unwrap();
    let device = pool.open("disk", false).unwrap();
    let disk = client(&plane, device.clone());

    disk.write(8 * MIB + 4096, vec![1; 512]).unwrap();
    let kinds = |at| disk.extents(at, 32 * MIB - at).unwrap().iter().map(|extent| (extent.kind, extent.len)).collect::<Vec<_>>();
    let (hole, data) = (ExtentKind::Hole, ExtentKind::Data);
    assert_eq!(kinds(0), [(hole, 8 * MIB), (data, 4 * MIB), (hole, 20 * MIB)]);
    assert_eq!(kinds(9 * MIB), [(data, 3 * MIB), (hole, 20 * MIB)], "a range that starts within an object");
    disk.run(Op::Discard, 8 * MIB, 4 * MIB, Vec::new()).unwrap();
    assert_eq!(kinds(0), [(hole, 32 * MIB)], "a discard frees whole objects");
    disk.run(Op::WriteZeroes { unmap: false, fua: false, fast: false }, 0, 8192, Vec::new()).unwrap();
    assert_eq!(kinds(0)[0].0, data, "zeroes that must not be unmapped take their space");

    // Somebody else resizes the image; the change reaches the device by itself, which says so.
    let heard = Arc::new(AtomicBool::new(false));
    let hears = heard.clone();
    device.on_size_changed_elsewhere(Box::new(move || hears.store(true, Ordering::SeqCst)));
    ceph.rbd(&["resize", "--size", "64M", "rbd/disk"]).unwrap();
    wait_for("the new size", || (device.geometry().size == 64 * MIB).then_some(()));
    wait_for("the word of it", || heard.load(Ordering::SeqCst).then_some(()));
    assert_eq!(disk.volume().refresh_size().unwrap(), 64 * MIB);
    disk.write(64 * MIB - 512, vec![2; 512]).unwrap();
    ceph.rbd(&["resize", "--size", "16M", "--allow-shrink", "rbd/disk"]).unwrap();
    wait_for("the smaller size", || (device.geometry().size == 16 * MIB).then_some(()));
    // The volume still believes in the old size: what crosses the end must fail, not be clipped.
    assert_eq!(disk.write(16 * MIB - 512, vec![3; 1024]), Err(Errno::ENOSPC));
    assert_eq!(disk.read(16 * MIB - 512, 1024), Err(Errno::EINVAL));
    assert_eq!(disk.read(16 * MIB - 512, 512).unwrap(), vec![0; 512]);
    assert_eq!(device.refresh_size().unwrap(), 16 * MIB);
}

#[test]
fn an_image_has_one_writer_and_a_dead_one_is_fenced() {
    let ceph = Ceph::start(CephSpec::default()).unwrap();
    let (plane, pool) = (plane(), pool(&ceph));
    pool.create("disk", &spec(16 * MIB)).unwrap();

    let device = pool.open("disk", false).unwrap();
    assert!(matches!(pool.open("disk", false), Err(PoolError::InUse(_))));
    let second = RbdPool::open("again", config(&ceph)).unwrap();
    let refusal = second.open("disk", false).err().unwrap();
    assert!(matches!(&refusal, PoolError::InUse(why) if why.contains("in this process")), "{refusal}");
    let reader = client(&plane, pool.open("disk", true).unwrap());
    client(&plane, device).write(0, vec![1; 512]).unwrap();
    assert_eq!(reader.read(0, 512).unwrap(), vec![1; 512], "readers are welcome");
    drop(reader);

    // Another process takes it over, once the first has let go.
    let mut child = wait_for("the other process", || Holder::start(&ceph));
    let refusal = pool.open("disk", false).err().unwrap();
    assert!(matches!(&refusal, PoolError::InUse(why) if why.contains(&format!("process {}", child.pid()))), "{refusal}");
    child.kill();
    // Its watch lasts for half a minute more. An open never waits: it succeeds at once, or is refused.
    let disk = client(&plane, pool.open("disk", false).unwrap());
    assert!(ceph.ceph(&["osd", "blocklist", "ls"]).unwrap().contains("127.0.0.1"), "the killed writer is fenced");
    disk.write(0, vec![4; MIB as usize]).unwrap();
    disk.flush().unwrap();
    assert_eq!(disk.read(0, MIB).unwrap(), vec![4; MIB as usize]);

    // Now this client is fenced: it says so, and opening anew gets a new connection.
    let owners = ceph.rbd(&["lock", "ls", "--format", "json", "rbd/disk"]).unwrap();
    let owners: serde_json::Value = serde_json::from_str(&owners).unwrap();
    let address = owners[0]["address"].as_str().unwrap().to_owned();
    ceph.ceph(&["osd", "blocklist", "add", &address]).unwrap();
    wait_for("the fence", || disk.write(0, vec![5; 512]).err());
    assert!(disk.volume().health().unwrap().contains("fenced"));
    drop(disk);
    let disk = wait_for("another connection", || pool.open("disk", false).ok());
    let disk = client(&plane, disk);
    disk.write(0, vec![6; 512]).unwrap();
    assert_eq!(disk.volume().health(), None);
}

/// A process that has the volume `disk` open and writes to it, without pause.
struct Holder(Child);

impl Holder {
    /// `None` if the volume is in use.
    fn start(ceph: &Ceph) -> Option<Holder> {
        let mut command = Command::new(std::env::current_exe().unwrap());
        command.args(["--exact", "holder_process", "--ignored", "--nocapture"]);
        command.env("HOLDER_CONF", ceph.conf()).stdout(Stdio::piped());
        let mut child = command.spawn().unwrap();
        let lines = BufReader::new(child.stdout.take().unwrap()).lines();
        for line in lines {
            let line = line.unwrap();
            if line.contains("holder: writing") {
                return Some(Holder(child));
            }
            if line.contains("holder: in use") {
                break;
            }
        }
        child.kill().unwrap();
        child.wait().unwrap();
        None
    }

    fn pid(&self) -> u32 {
        self.0.id()
    }

    fn kill(&mut self) {
        self.0.kill().unwrap();
        self.0.wait().unwrap();
    }
}

impl Drop for Holder {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

#[test]
#[ignore = "the other process of an_image_has_one_writer_and_a_dead_one_is_fenced"]
fn holder_process() {
    let conf = std::env::var_os("HOLDER_CONF").expect("this is started by another test");
    let pool = RbdPool::open("holder", RbdPoolConfig { conf: conf.into(), ..RbdPoolConfig::new(POOL) }).unwrap();
    let device = match pool.open("disk", false) {
        Err(PoolError::InUse(_)) => return println!("\nholder: in use"),
        opened => opened.unwrap(),
    };
    let plane = plane();
    let disk = client(&plane, device);
    println!("\nholder: writing");
    loop {
        let (sender, receiver) = mpsc::channel();
        for part in 0..16 {
            let sender = sender.clone();
            let written = move |answer: Result<_, Errno>| {
                let _ = sender.send(answer.map(drop));
            };
            disk.submit(Op::Write { fua: false }, part * 65536, 65536, vec![3; 65536], written);
        }
        drop(sender);
        receiver.into_iter().for_each(|answer| answer.unwrap());
    }
}

#[test]
fn an_outage_is_reported_and_survived() {
    let ceph = Ceph::start(CephSpec::default()).unwrap();
    let plane = plane();
    let patient = pool(&ceph);
    let hasty = RbdPool::open("hasty", RbdPoolConfig { request_timeout_seconds: 10, ..config(&ceph) }).unwrap();
    patient.create("waits", &spec(16 * MIB)).unwrap();
    patient.create("fails", &spec(16 * MIB)).unwrap();
    let waits = client(&plane, patient.open("waits", false).unwrap());
    let fails = client(&plane, hasty.open("fails", false).unwrap());
    for disk in [&waits, &fails] {
        disk.write(0, vec![1; 4096]).unwrap();
        disk.flush().unwrap();
        assert_eq!(disk.volume().health(), None);
    }

    ceph.pause_osd(0).unwrap();
    let (sender, receiver) = mpsc::channel();
    waits.submit(Op::Write { fua: true }, 0, 4096, vec![2; 4096], move |answer| sender.send(answer.map(drop)).unwrap());
    assert_eq!(fails.write(8192, vec![2; 4096]), Err(Errno::ETIMEDOUT));
    assert_eq!(fails.read(0, 4096), Err(Errno::ETIMEDOUT));
    let why = fails.volume().health().unwrap();
    assert!(why.contains("timed out"), "{why}");
    let why = wait_for("the report of silence", || waits.volume().health());
    assert!(why.contains("requests wait"), "{why}");
    assert!(receiver.try_recv().is_err(), "a write was answered by a stopped cluster");

    ceph.resume_osd(0).unwrap();
    assert_eq!(receiver.recv_timeout(LIMIT).unwrap(), Ok(()));
    assert_eq!(waits.read(0, 4096).unwrap(), vec![2; 4096]);
    assert_eq!(fails.read(0, 4096).unwrap(), vec![1; 4096]);
    fails.write(8192, vec![3; 4096]).unwrap();
    assert_eq!(fails.read(8192, 4096).unwrap(), vec![3; 4096], "a write that timed out overtook a newer one");
    assert_eq!((waits.volume().health(), fails.volume().health()), (None, None));
}

#[test]
fn a_storage_daemon_that_dies_under_load_costs_no_error() {
    let mut ceph = Ceph::start(CephSpec { osds: 2, min_copies: 1, authenticate: true }).unwrap();
    let (plane, pool) = (plane(), pool(&ceph));
    pool.create("disk", &spec(16 * MIB)).unwrap();
    let disk = client(&plane, pool.open("disk", false).unwrap());
    let (sender, receiver) = mpsc::channel();
    const WRITES: u64 = 1024;
    for number in 0..WRITES {
        if number == WRITES / 2 {
            ceph.kill_osd(0).unwrap();
        }
        let sender = sender.clone();
        let written = move |answer: Result<_, Errno>| sender.send(answer.map(drop)).unwrap();
        disk.submit(Op::Write { fua: false }, number * 16384, 16384, vec![number as u8; 16384], written);
    }
    for _ in 0..WRITES {
        assert_eq!(receiver.recv_timeout(LIMIT).unwrap(), Ok(()));
    }
    disk.flush().unwrap();
    for number in 0..WRITES {
        assert!(disk.read(number * 16384, 16384).unwrap() == vec![number as u8; 16384], "block {number}");
    }
}

#[test]
fn what_cannot_be_reached_is_said_in_words() {
    let missing = RbdPool::open("ceph", RbdPoolConfig { conf: "/nowhere/ceph.conf".into(), ..RbdPoolConfig::new("vms") });
    let why = missing.err().unwrap().to_string();
    assert!(why.contains("/nowhere/ceph.conf"), "{why}");

    let ceph = Ceph::start(CephSpec { authenticate: true, ..CephSpec::default() }).unwrap();
    let why = RbdPool::open("ceph", RbdPoolConfig { pool: "vms".into(), ..config(&ceph) }).err().unwrap().to_string();
    assert!(why.contains("pool vms") && why.contains("ceph osd pool ls"), "{why}");
    let stranger = RbdPoolConfig { user: "stranger".into(), connect_timeout_seconds: 5, ..config(&ceph) };
    let why = RbdPool::open("ceph", stranger).err().unwrap().to_string();
    assert!(why.contains("client.stranger"), "{why}");
}
