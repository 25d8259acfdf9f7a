//! Guest memory that the kernel holds on to, so that it need not look up the pages of each large request.
//!
//! ```text
//!   session: Pages::prepare, if the VMM allocated all ──▶ queue on its thread: Pinned::on ──▶ reactor, one area a turn
//!   large request ──▶ reactor ──▶ Pages::is_current? ── no ──▶ let go of all areas: looked up for each request again
//! ```
//!
//! A VMM takes pages back from its guest (balloon, free page reporting, virtio-mem) by punching holes into the file that it shares.
//! The guest gets other pages when it next touches the place; those pinned are nobody's then, and to use them would lose what
//! is read and write what is old. On tmpfs, where a memfd lies, a hole moves the file's change time (Linux, `mm/shmem.c`:
//! `shmem_truncate_range`). A guest cannot use the new page before its VMM has punched the hole, so a change time looked at after a
//! request was taken tells whether there was one. It also moves when the VMM writes to a page for the first time (`mm/memory.c`:
//! `fault_dirty_shared_page`), which cannot be told apart: so only a VMM that touched all memory before it shared it keeps it pinned.
//!
//! Memory on other file systems is left alone: pages of hugetlbfs are looked up quickly anyway, and it keeps no such time.

use std::cell::RefCell;
use std::collections::HashMap;
use std::io;
use std::rc::{Rc, Weak};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use blockdev::{PINNED_AREA_MAX, PinId, PinOwner, Reactor};
use rustix::fs::{Stat, fstat};

use crate::memory::{GuestMemory, Mapping};

/// Longer than the step of the clock by which files are stamped, 10 ms at most.
const STAMP_STEP: Duration = Duration::from_millis(20);
const STAMP_TRIES: u32 = 50;
/// The unit of `st_blocks`.
const BLOCK: i64 = 512;

/// Memory of one front end that may be pinned.
pub struct Pages {
    /// For messages.
    name: Arc<str>,
    key: u64,
    memory: Arc<GuestMemory>,
    files: Vec<SharedFile>,
    areas: Vec<Area>,
    refused: AtomicBool,
}

/// A file that memory is shared in.
struct SharedFile {
    /// One of its mappings.
    mapping: Arc<Mapping>,
    identity: (u64, u64),
    stamp: Stamp,
    taken_back: AtomicBool,
}

struct Area {
    start: usize,
    len: usize,
    /// Among the files.
    file: usize,
}

/// A file's change time: seconds and nanoseconds.
type Stamp = (i64, u64);

fn stamp_of(status: &Stat) -> Stamp {
    (status.st_ctime, status.st_ctime_nsec)
}

fn identity_of(status: &Stat) -> (u64, u64) {
    (status.st_dev, status.st_ino)
}

impl Pages {
    /// What of `memory` can be pinned; `None` if there is nothing. Only what its VMM has allocated: else this process would have to, and
    /// the pins would not last.
    pub fn prepare(name: &Arc<str>, memory: &Arc<GuestMemory>) -> Option<Arc<Pages>> {
        static NEXT_KEY: AtomicU64 = AtomicU64::new(0);
        let mappings: Vec<&Arc<Mapping>> = memory.mappings().filter(|mapping| mapping.is_tmpfs()).collect();
        if mappings.is_empty() {
            return None;
        }
        let (files, areas) = areas_of(&mappings)
            .inspect_err(|error| tracing::warn!("{name}: guest memory is not pinned, so large requests take more CPU: {error}"))
            .ok()?;
        let key = NEXT_KEY.fetch_add(1, Ordering::Relaxed);
        Some(Arc::new(Pages { name: name.clone(), key, memory: memory.clone(), files, areas, refused: AtomicBool::new(false) }))
    }

    fn is_unchanged(&self, file: &SharedFile) -> bool {
        !self.memory.is_broken() && fstat(file.mapping.file()).is_ok_and(|now| stamp_of(&now) == file.stamp)
    }
}

/// Of the areas of one file.
struct Owner {
    pages: Arc<Pages>,
    file: usize,
}

impl PinOwner for Owner {
    fn is_current(&self) -> bool {
        let (pages, file) = (&self.pages, &self.pages.files[self.file]);
        if file.taken_back.load(Ordering::Relaxed) {
            return false;
        }
        let current = pages.is_unchanged(file);
        if !current && !file.taken_back.swap(true, Ordering::Relaxed) {
            tracing::warn!(
                "{}: guest memory was taken back, or touched for the first time: it is no longer pinned. VMMs keep it that \
                 allocate it beforehand (QEMU: prealloc=on, Cloud Hypervisor: prefault=on) and use no balloon",
                pages.name
            );
        }
        current
    }
}

/// Has this process see the pages already, so that pinning them takes its data-plane threads less time.
fn look_up(mapping: &Mapping) -> io::Result<()> {
    // SAFETY: the mapping is ours, and nothing in its pages changes.
    match unsafe { libc::madvise(mapping.start().cast(), mapping.len(), libc::MADV_POPULATE_WRITE) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

/// Each file once, and the areas in them.
fn areas_of(mappings: &[&Arc<Mapping>]) -> io::Result<(Vec<SharedFile>, Vec<Area>)> {
    let (mut files, mut areas) = (Vec::<SharedFile>::new(), Vec::new());
    for mapping in mappings {
        let status = fstat(mapping.file())?;
        if status.st_blocks.saturating_mul(BLOCK) < status.st_size {
            return Err(io::Error::other(
                "its VMM has not allocated all of it (QEMU: prealloc=on, Cloud Hypervisor: prefault=on)",
            ));
        }
        look_up(mapping)?;
        let identity = identity_of(&status);
        let file = files.iter().position(|file| file.identity == identity).unwrap_or(files.len());
        if file == files.len() {
            let (stamp, taken_back) = (stamp_of(&status), AtomicBool::new(false));
            files.push(SharedFile { mapping: (*mapping).clone(), identity, stamp, taken_back });
        }
        let (start, len) = (mapping.start() as usize, mapping.len());
        let part = |done: usize| Area { start: start + done, len: (len - done).min(PINNED_AREA_MAX), file };
        areas.extend((0..len).step_by(PINNED_AREA_MAX).map(part));
    }
    settle(&mut files)?;
    Ok((files, areas))
}

/// Waits until every further change of the files gets another stamp.
fn settle(files: &mut [SharedFile]) -> io::Result<()> {
    for _ in 0..STAMP_TRIES {
        std::thread::sleep(STAMP_STEP);
        let mut settled = true;
        for file in &mut *files {
            let now = stamp_of(&fstat(file.mapping.file())?);
            settled &= std::mem::replace(&mut file.stamp, now) == now;
        }
        if settled {
            return Ok(());
        }
    }
    Err(io::Error::other("its file does not stop changing"))
}

thread_local! {
    static PINNED: RefCell<HashMap<u64, Weak<Pinned>>> = RefCell::new(HashMap::new());
}

/// Memory pinned for the queues of one thread.
pub struct Pinned {
    reactor: Rc<Reactor>,
    pages: Arc<Pages>,
    /// One for each file.
    owners: Vec<Rc<Owner>>,
    pins: RefCell<Vec<PinId>>,
}

impl Pinned {
    /// Begins to pin `pages` on this thread, unless another queue did.
    pub fn on(reactor: &Rc<Reactor>, pages: &Arc<Pages>) -> Rc<Pinned> {
        if let Some(pinned) = Pinned::find(pages.key) {
            return pinned;
        }
        let owners = (0..pages.files.len()).map(|file| Rc::new(Owner { pages: pages.clone(), file })).collect();
        let pinned = Rc::new(Pinned { reactor: reactor.clone(), pages: pages.clone(), owners, pins: RefCell::default() });
        PINNED.with(|all| all.borrow_mut().insert(pages.key, Rc::downgrade(&pinned)));
        pinned.go_on();
        pinned
    }

    fn find(key: u64) -> Option<Rc<Pinned>> {
        PINNED.with(|all| all.borrow().get(&key).and_then(Weak::upgrade))
    }

    /// Pins the next area, and the others in later turns: each may take milliseconds.
    fn go_on(&self) {
        let done = self.pins.borrow().len();
        let Some(area) = self.pages.areas.get(done) else {
            let bytes: usize = self.pages.areas.iter().map(|area| area.len).sum();
            return tracing::info!("{}: {} MiB of guest memory are pinned", self.pages.name, bytes >> 20);
        };
        // SAFETY: the area is part of a mapping of the guest memory that the owner keeps.
        match unsafe { self.reactor.pin(area.start as *mut u8, area.len, self.owners[area.file].clone()) } {
            Ok(pin) => {
                self.pins.borrow_mut().push(pin);
                let key = self.pages.key;
                self.reactor.handle().spawn(move |_| {
                    if let Some(pinned) = Pinned::find(key) {
                        pinned.go_on();
                    }
                });
            }
            Err(error) if !self.pages.refused.swap(true, Ordering::Relaxed) => tracing::warn!(
                "{}: not all guest memory is pinned: {error}; the daemon may lock too little memory (LimitMEMLOCK, ulimit -l)",
                self.pages.name
            ),
            Err(_) => {}
        }
    }
}

impl Drop for Pinned {
    fn drop(&mut self) {
        PINNED.with(|all| all.borrow_mut().remove(&self.pages.key));
        self.pins.borrow_mut().drain(..).for_each(|pin| self.reactor.unpin(pin));
    }
}
