//! An image as a block device.
//!
//! ```text
//!   RbdDevice ─┐
//!   RbdQueue ──┴▶ Core ── Image ── (closed by a thread of its own when the last owner is gone)
//!      └──▶ helper thread: block status, sizes changed elsewhere
//! ```

use std::io;
use std::rc::Rc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::Sender;
use std::sync::{Arc, OnceLock};

use blockdev::{BlockDevice, Capabilities, DeviceError, Errno, Geometry, IoQueue, Op, Reactor, clock};

use super::cluster::IoContext;
use super::health::Health;
use super::helper::{self, Job};
use super::image::{Access, Image};
use super::library::{FEATURE_FAST_DIFF, FLAG_FAST_DIFF_INVALID};
use super::lock;
use super::openings::{Openings, Ticket};
use super::queue::RbdQueue;

/// RBD takes any offset; this is the smallest that clients use.
const BLOCK_SIZE: u32 = 512;
const PREFERRED_SIZE: u32 = 4096;
/// The granularity Ceph recommends; smaller discards zero the range, and free what they can.
const DISCARD_GRANULARITY: u32 = 64 << 10;

/// What the queues, the helper and the control plane share.
pub(super) struct Core {
    image: Option<Image>,
    ticket: Option<Ticket>,
    size: AtomicU64,
    /// Called when the size was changed elsewhere.
    hears_of_size: OnceLock<Box<dyn Fn() + Send + Sync>>,
    object_size: u64,
    pub(super) capabilities: Capabilities,
    pub(super) health: Health,
}

/// An open image.
pub(super) struct RbdDevice {
    core: Arc<Core>,
    helper: Sender<Job>,
}

impl RbdDevice {
    /// Opens the image, or one of its snapshots read-only. For writing, its exclusive lock is taken first.
    pub(super) fn open(
        context: &Arc<IoContext>,
        openings: &Arc<Openings>,
        name: &str,
        snapshot: Option<&str>,
        read_only: bool,
    ) -> Result<RbdDevice, DeviceError> {
        let writable = !read_only && snapshot.is_none();
        let ticket = openings.begin(name, writable)?;
        let image = open_image(context, name, snapshot, writable)?;
        if writable {
            lock::take(&image)?;
        }
        let core = Core::new(image, ticket, writable)?;
        let helper = helper::start(core.image().spec())?;
        let device = RbdDevice { core, helper };
        device.watch()?;
        Ok(device)
    }

    fn watch(&self) -> Result<(), DeviceError> {
        let core = Arc::downgrade(&self.core);
        let helper = self.helper.clone();
        let hear = move || {
            // A helper that is gone has no device left to tell.
            let _ = helper.send(Job::Refresh(core.clone()));
        };
        let image = self.core.image();
        image
            .watch(hear)
            .map_err(|source| DeviceError::Io { what: format!("image {}: watching for changes", image.spec()), source })
    }
}

/// A client without the right to write cannot watch either: then the image is opened without.
fn open_image(context: &Arc<IoContext>, name: &str, snapshot: Option<&str>, writable: bool) -> Result<Image, DeviceError> {
    let opened = match Image::open(context, name, snapshot, Access::Watching) {
        Err(error) if !writable && matches!(error.raw_os_error(), Some(libc::EPERM | libc::EACCES)) => {
            Image::open(context, name, snapshot, Access::Glance)
        }
        opened => opened,
    };
    let shown = snapshot.map_or_else(String::new, |snapshot| format!("@{snapshot}"));
    opened.map_err(|source| DeviceError::Io { what: format!("image {}/{name}{shown}", context.location()), source })
}

impl Core {
    fn new(image: Image, ticket: Ticket, writable: bool) -> Result<Arc<Core>, DeviceError> {
        let failed = |source| DeviceError::Io { what: format!("image {}: reading its shape", image.spec()), source };
        let size = image.size().map_err(failed)?;
        let object_size = image.object_size().map_err(failed)?;
        let zeroes = image.library().rbd_aio_write_zeroes.is_some();
        let block_status = image.features().map_err(failed)? & FEATURE_FAST_DIFF != 0;
        let capabilities = Capabilities {
            writable,
            discard: zeroes,
            write_zeroes: zeroes,
            fast_zero: false,
            fua: false,
            block_status,
            caches_reads: true,
            flush_failure_loses_writes: false,
        };
        Ok(Arc::new_cyclic(|core| {
            ticket.opened(core);
            Core {
                image: Some(image),
                ticket: Some(ticket),
                size: AtomicU64::new(size),
                hears_of_size: OnceLock::new(),
                object_size,
                capabilities,
                health: Health::new(),
            }
        }))
    }

    pub(super) fn image(&self) -> &Image {
        self.image.as_ref().expect("the image is there until the core is dropped")
    }

    /// In bytes, as last heard of.
    pub(super) fn size(&self) -> u64 {
        self.size.load(Ordering::Acquire)
    }

    pub(super) fn object_size(&self) -> u64 {
        self.object_size
    }

    /// Asks the cluster for the size.
    pub(super) fn refresh_size(&self) -> io::Result<u64> {
        let size = self.image().size()?;
        self.size.store(size, Ordering::Release);
        Ok(size)
    }

    /// The image has changed in some way: if it is its size, whoever wants to hear of that does.
    pub(super) fn changed(&self) -> io::Result<()> {
        let before = self.size();
        if self.refresh_size()? != before
            && let Some(hear) = self.hears_of_size.get()
        {
            hear();
        }
        Ok(())
    }

    /// True if the image's map tells allocated objects from others, right now. Before Ceph 17 it does so only for images
    /// without a parent and without fancy striping.
    pub(super) fn has_reliable_map(&self) -> io::Result<bool> {
        let image = self.image();
        Ok(image.features()? & FEATURE_FAST_DIFF != 0
            && image.flags()? & FLAG_FAST_DIFF_INVALID == 0
            && image.overlap()? == 0
            && image.stripe_count()? == 1)
    }

    /// Notes why a request failed.
    pub(super) fn note_failure(&self, op: Op, offset: u64, len: u64, cause: Errno) {
        if cause == Errno::ESHUTDOWN {
            self.image().context().cluster.set_fenced();
        }
        self.health.failed(format!("image {}: {op:?} of {len} bytes at {offset}: {cause}", self.image().spec()));
    }
}

impl Drop for Core {
    fn drop(&mut self) {
        let (image, ticket) = (self.image.take(), self.ticket.take());
        let close = move || {
            drop(image);
            drop(ticket);
        };
        // If no thread can be had, the refused closure is dropped here, which closes the image just as well.
        let _ = std::thread::Builder::new().name("rbd-close".into()).spawn(close);
    }
}

impl BlockDevice for RbdDevice {
    fn geometry(&self) -> Geometry {
        Geometry {
            size: self.core.size(),
            block_size: BLOCK_SIZE,
            memory_alignment: 1,
            preferred_size: PREFERRED_SIZE,
            discard_granularity: DISCARD_GRANULARITY,
        }
    }

    fn capabilities(&self) -> Capabilities {
        self.core.capabilities
    }

    fn open_queue(&self, reactor: &Rc<Reactor>) -> Result<Box<dyn IoQueue>, DeviceError> {
        Ok(Box::new(RbdQueue::new(&self.core, self.helper.clone(), reactor)))
    }

    fn resize(&self, size: u64) -> Result<(), DeviceError> {
        let image = self.core.image();
        if !self.core.capabilities.writable {
            return Err(DeviceError::Refused(format!("image {} is open read-only and cannot be resized", image.spec())));
        }
        let resized = image.resize(size).and_then(|()| self.core.refresh_size());
        resized
            .map(drop)
            .map_err(|source| DeviceError::Io { what: format!("image {}: resize to {size} bytes", image.spec()), source })
    }

    fn refresh_size(&self) -> Result<u64, DeviceError> {
        let what = || format!("image {}: asking for its size", self.core.image().spec());
        self.core.refresh_size().map_err(|source| DeviceError::Io { what: what(), source })
    }

    fn on_size_changed_elsewhere(&self, hear: Box<dyn Fn() + Send + Sync>) {
        let _ = self.core.hears_of_size.set(hear);
    }

    fn health(&self) -> Option<String> {
        if self.core.image().context().cluster.is_fenced() {
            let spec = self.core.image().spec();
            return Some(format!(
                "image {spec}: another host has fenced this one out of the Ceph cluster; reopen the volume here, or serve it there"
            ));
        }
        self.core.health.report(clock::monotonic())
    }
}
