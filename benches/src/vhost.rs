//! A vhost-user-blk load generator: a virtio-blk driver in this process, no guest and no VMM.
//!
//! ```text
//!   Device ─ transport (virtio-driver) ─ socket to the server
//!     ├─ memory: one memfd, one buffer per request in flight
//!     └─ workers: split queues, event index on; one thread for all queues or one for each
//!
//!   worker:  submit to every queue ─► kick where asked ─► look for completions
//!            nothing for `spin` ─► ask for notifications ─► sleep on the call eventfds
//! ```
//!
//! While a worker looks for completions it tells the device not to notify it, as a polling guest would.

use std::ffi::c_void;
use std::io::ErrorKind;
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use anyhow::{Context, Result, bail, ensure};
use rustix::fs::{MemfdFlags, ftruncate, memfd_create};
use rustix::mm::{MapFlags, ProtFlags, mmap, munmap};
use virtio_driver::{
    EventFd, QueueNotifier, VhostUser, VirtioBlkFeatureFlags, VirtioBlkQueue, VirtioBlkTransport, VirtioFeatureFlags,
};

use crate::clock;
use crate::load::{self, Recorder, Report, Timing, Worker};
use crate::pattern;
use crate::requests::{Requests, Workload, share};

const DESCRIPTORS_PER_REQUEST: usize = 3;
const QUEUE_SIZE_MIN: usize = 256;
const REPLY_TIMEOUT_MS: i32 = 30_000;

/// How a worker waits for completions.
#[derive(Clone, Copy, Debug, serde::Serialize)]
pub enum Waiting {
    /// Look for completions for so long, then sleep until notified.
    SpinThenSleep { spin_us: u32 },
    /// Never sleep.
    Spin,
}

/// The pages a guest's memory is made of.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default, clap::ValueEnum, serde::Serialize)]
pub enum Pages {
    /// Ordinary pages of 4 KiB.
    #[default]
    Small,
    /// Pages of 2 MiB from the machine's reserve (`vm.nr_hugepages`).
    Huge,
}

#[derive(Clone, Debug)]
pub struct VhostLoad {
    pub socket: PathBuf,
    pub queues: usize,
    /// One thread for each queue; otherwise one for all.
    pub thread_per_queue: bool,
    pub waiting: Waiting,
    pub workload: Workload,
    /// Bytes at the start of the disk to use; `None` is all of it.
    pub span: Option<u64>,
    /// What the buffers lie in.
    pub pages: Pages,
}

impl VhostLoad {
    pub fn measure(&self, timing: Timing, server: Option<u32>) -> Result<Report> {
        let mut device = Device::open(self, None)?;
        device.set_requests(|range, seed| Requests::endless(&self.workload, range, seed));
        load::measure(&mut device.workers, timing, server)
    }

    /// Writes a pattern over the whole span, runs the load while checking every read, and reads everything back.
    pub fn verify(&self, timing: Timing, seed: u64) -> Result<Report> {
        let mut device = Device::open(self, Some(seed))?;
        device.set_requests(|range, _| Requests::once(&self.workload, range, 100));
        load::run_to_end(&mut device.workers)?;
        device.set_requests(|range, seed| Requests::endless(&self.workload, range, seed));
        let report = load::measure(&mut device.workers, timing, None)?;
        device.set_requests(|range, _| Requests::once(&self.workload, range, 0));
        load::run_to_end(&mut device.workers)?;
        Ok(report)
    }
}

/// A connected disk. The workers hold pointers into the memory of the two fields after them, and are dropped first.
pub struct Device {
    workers: Vec<VhostWorker>,
    _transport: Box<VirtioBlkTransport>,
    _memory: SharedMemory,
    span: u64,
    block_size: u32,
}

impl Device {
    /// With a seed, writes carry the pattern and reads are checked against it.
    pub fn open(load: &VhostLoad, seed: Option<u64>) -> Result<Self> {
        let workload = &load.workload;
        ensure!(workload.depth > 0 && load.queues > 0, "no queue or depth 0: nothing would ever be sent");
        let mut transport = connect(&load.socket)?;
        let capacity = u64::from(transport.get_config().context("read the device's configuration")?.capacity) * 512;
        let writes = workload.write_percent > 0 || seed.is_some();
        let read_only = transport.get_features() & VirtioBlkFeatureFlags::RO.bits() != 0;
        ensure!(!(writes && read_only), "the disk is read-only");

        let span = load.span.unwrap_or(u64::MAX).min(capacity);
        let block_size = workload.block_size as usize;
        let per_queue = usize::from(workload.depth) * block_size;
        let memory = SharedMemory::new(load.queues * per_queue, load.pages)?;
        transport
            .map_mem_region(memory.address, memory.length, memory.file.as_raw_fd(), 0)
            .context("share memory with the server")?;
        let queue_size = (usize::from(workload.depth) * DESCRIPTORS_PER_REQUEST).next_power_of_two().max(QUEUE_SIZE_MIN);
        let queues = VirtioBlkQueue::setup_queues(transport.as_mut(), load.queues, queue_size as u16)
            .with_context(|| format!("set up {} queues of {queue_size}", load.queues))?;
        let queues = queues.into_iter().enumerate().map(|(index, queue)| Queue {
            queue,
            notifier: transport.get_submission_notifier(index),
            call: transport.get_completion_fd(index),
            requests: None,
            slots: vec![Slot::default(); workload.depth.into()],
            free: (0..workload.depth).rev().collect(),
            finished: Vec::with_capacity(workload.depth.into()),
            buffers: memory.address + index * per_queue,
            block_size,
            seed,
            written: clock::now_ns() ^ (index as u64) << 56,
        });
        let workers = match load.thread_per_queue {
            true => queues.map(|queue| VhostWorker::new(vec![queue], load.waiting)).collect(),
            false => vec![VhostWorker::new(queues.collect(), load.waiting)],
        };
        Ok(Self { workers, _transport: transport, _memory: memory, span, block_size: workload.block_size })
    }

    fn set_requests(&mut self, make: impl Fn(std::ops::Range<u64>, u64) -> Requests) {
        let parts = self.workers.iter().map(|worker| worker.queues.len()).sum();
        let queues = self.workers.iter_mut().flat_map(|worker| &mut worker.queues);
        for (index, queue) in queues.enumerate() {
            queue.requests = Some(make(share(self.span, self.block_size, index, parts), index as u64 + 1));
        }
    }

    /// Reads one block through every queue, then stays connected.
    pub fn touch(&mut self, workload: &Workload) -> Result<()> {
        self.set_requests(|range, _| Requests::once(workload, range.start..range.start + u64::from(workload.block_size), 0));
        load::run_to_end(&mut self.workers)
    }
}

fn connect(socket: &Path) -> Result<Box<VirtioBlkTransport>> {
    let path = socket.to_str().context("a socket path that is not UTF-8")?;
    let features = VirtioFeatureFlags::VERSION_1.bits()
        | VirtioFeatureFlags::RING_EVENT_IDX.bits()
        | VirtioBlkFeatureFlags::RO.bits()
        | VirtioBlkFeatureFlags::FLUSH.bits()
        | VirtioBlkFeatureFlags::MQ.bits();
    let transport = VhostUser::new(path, features).with_context(|| format!("connect to the vhost-user server at {path}"))?;
    Ok(Box::new(transport))
}

/// Drives one or more queues on one thread.
pub struct VhostWorker {
    queues: Vec<Queue>,
    /// The queues' call eventfds, in the same order.
    descriptors: Vec<libc::pollfd>,
    waiting: Waiting,
}

impl Worker for VhostWorker {
    fn run(&mut self, recorder: &mut Recorder<'_>) -> Result<()> {
        let mut now_ns = clock::now_ns();
        let mut progress_ns = now_ns;
        loop {
            if recorder.observe(now_ns) {
                self.queues.iter_mut().try_for_each(|queue| queue.submit(now_ns))?;
            }
            if self.queues.iter().all(Queue::is_idle) {
                return Ok(());
            }
            let mut reaped = false;
            for queue in &mut self.queues {
                reaped |= queue.reap()?;
            }
            now_ns = clock::now_ns();
            if reaped {
                progress_ns = now_ns;
                self.queues.iter_mut().for_each(|queue| queue.account(now_ns, recorder));
            } else if let Waiting::SpinThenSleep { spin_us } = self.waiting
                && now_ns - progress_ns >= u64::from(spin_us) * 1000
            {
                self.sleep()?;
                progress_ns = clock::now_ns();
            }
        }
    }
}

impl VhostWorker {
    fn new(queues: Vec<Queue>, waiting: Waiting) -> Self {
        let descriptor = |queue: &Queue| libc::pollfd { fd: queue.call.as_raw_fd(), events: libc::POLLIN, revents: 0 };
        Self { descriptors: queues.iter().map(descriptor).collect(), queues, waiting }
    }

    fn sleep(&mut self) -> Result<()> {
        self.queues.iter_mut().for_each(|queue| queue.queue.set_used_notif_enabled(true));
        let ready = self.queues.iter_mut().any(|queue| queue.queue.completions().has_next());
        let slept = if ready { Ok(()) } else { self.wait_for_call() };
        self.queues.iter_mut().for_each(|queue| queue.queue.set_used_notif_enabled(false));
        slept
    }

    fn wait_for_call(&mut self) -> Result<()> {
        let count = self.descriptors.len() as libc::nfds_t;
        // SAFETY: the pointer and the count are those of one vector, whose descriptors the queues keep open.
        match unsafe { libc::poll(self.descriptors.as_mut_ptr(), count, REPLY_TIMEOUT_MS) } {
            0 => bail!("no completion from the vhost-user server within {} s", REPLY_TIMEOUT_MS / 1000),
            1.. => {}
            _ => match std::io::Error::last_os_error() {
                error if error.kind() == ErrorKind::Interrupted => return Ok(()),
                error => return Err(error).context("wait for the vhost-user server"),
            },
        }
        for (queue, descriptor) in self.queues.iter().zip(&self.descriptors) {
            if descriptor.revents & libc::POLLIN != 0 {
                queue.call.read().context("read a call eventfd")?;
            }
        }
        Ok(())
    }
}

#[derive(Clone, Copy, Default)]
struct Slot {
    offset: u64,
    write: bool,
    started_ns: u64,
}

struct Queue {
    queue: VirtioBlkQueue<'static, u16>,
    notifier: Box<dyn QueueNotifier>,
    call: Arc<EventFd>,
    requests: Option<Requests>,
    slots: Vec<Slot>,
    free: Vec<u16>,
    finished: Vec<u16>,
    /// Address of `slots.len()` buffers of `block_size` bytes each, in the device's shared memory.
    buffers: usize,
    block_size: usize,
    seed: Option<u64>,
    /// The number of the last block written without a seed; no two of all runs are equal.
    written: u64,
}

impl Queue {
    fn is_idle(&self) -> bool {
        self.free.len() == self.slots.len()
    }

    fn submit(&mut self, now_ns: u64) -> Result<()> {
        let Some(requests) = &mut self.requests else {
            return Ok(());
        };
        let mut added = false;
        while let Some(&slot) = self.free.last() {
            let Some(request) = requests.next() else {
                break;
            };
            self.free.pop();
            let index = usize::from(slot);
            self.slots[index] = Slot { offset: request.offset, write: request.write, started_ns: now_ns };
            let buffer: *mut u8 = std::ptr::with_exposed_provenance_mut(self.buffers + index * self.block_size);
            if request.write {
                // SAFETY: the buffer is this free slot's own part of the shared memory, mapped while the queue lives.
                let block = unsafe { std::slice::from_raw_parts_mut(buffer, self.block_size) };
                match self.seed {
                    Some(seed) => pattern::fill(seed, request.offset, block),
                    None => self.written = pattern::make_unique(self.written, block),
                }
            }
            // SAFETY: as above; the slot is reused only after the request has completed.
            unsafe {
                match request.write {
                    true => self.queue.write_raw(request.offset, buffer, self.block_size, slot),
                    false => self.queue.read_raw(request.offset, buffer, self.block_size, slot),
                }
            }
            .context("add a request to a queue")?;
            added = true;
        }
        if added && self.queue.avail_notif_needed() {
            self.notifier.notify().context("kick a queue")?;
        }
        Ok(())
    }

    /// Takes completed requests off the ring; false if there are none.
    fn reap(&mut self) -> Result<bool> {
        for completion in self.queue.completions() {
            let offset = self.slots[usize::from(completion.context)].offset;
            ensure!(completion.ret == 0, "the request at {offset} failed with errno {}", -completion.ret);
            self.finished.push(completion.context);
        }
        if let Some(seed) = self.seed {
            self.check(seed)?;
        }
        Ok(!self.finished.is_empty())
    }

    fn check(&self, seed: u64) -> Result<()> {
        for &slot in &self.finished {
            let Slot { offset, write, .. } = self.slots[usize::from(slot)];
            let buffer: *const u8 = std::ptr::with_exposed_provenance(self.buffers + usize::from(slot) * self.block_size);
            // SAFETY: the slot's own part of the shared memory; its request is complete and the slot not yet free.
            let data = unsafe { std::slice::from_raw_parts(buffer, self.block_size) };
            if let (false, Some(wrong)) = (write, pattern::first_mismatch(seed, offset, data)) {
                bail!("byte {wrong} is not what was written there");
            }
        }
        Ok(())
    }

    fn account(&mut self, now_ns: u64, recorder: &mut Recorder<'_>) {
        for slot in self.finished.drain(..) {
            recorder.complete(now_ns - self.slots[usize::from(slot)].started_ns);
            self.free.push(slot);
        }
    }
}

/// Half of each so many bytes of the buffers is zeroes: data is seldom without any redundancy.
const COMPRESSIBLE: usize = 128;

/// Memory both sides map, filled with a pattern so that no page is still unallocated when the load starts.
struct SharedMemory {
    address: usize,
    length: usize,
    file: OwnedFd,
}

impl SharedMemory {
    fn new(length: usize, pages: Pages) -> Result<Self> {
        let (page, flags) = match pages {
            Pages::Small => (4096, MemfdFlags::empty()),
            Pages::Huge => (2 << 20, MemfdFlags::HUGETLB | MemfdFlags::HUGE_2MB),
        };
        let length = length.next_multiple_of(page);
        let file = memfd_create("bench-buffers", MemfdFlags::CLOEXEC | flags).context("create shared memory")?;
        ftruncate(&file, length as u64).context("size the shared memory")?;
        // SAFETY: a new mapping at an address of the kernel's choice touches nothing that exists.
        let pointer =
            unsafe { mmap(std::ptr::null_mut(), length, ProtFlags::READ | ProtFlags::WRITE, MapFlags::SHARED, &file, 0) }
                .with_context(|| {
                    format!("map {length} bytes of shared memory in {pages:?} pages (huge ones: sysctl vm.nr_hugepages)")
                })?;
        // SAFETY: the mapping was just made with this length, and nobody else knows of it yet.
        let memory = unsafe { std::slice::from_raw_parts_mut(pointer.cast::<u8>(), length) };
        pattern::fill(!0, 0, memory);
        memory.chunks_mut(COMPRESSIBLE).for_each(|part| part[COMPRESSIBLE / 2..].fill(0));
        Ok(Self { address: pointer.expose_provenance(), length, file })
    }
}

impl Drop for SharedMemory {
    fn drop(&mut self) {
        let pointer: *mut c_void = std::ptr::with_exposed_provenance_mut(self.address);
        // SAFETY: the mapping is this object's own; the queues that point into it are dropped before it.
        let _ = unsafe { munmap(pointer, self.length) };
    }
}
