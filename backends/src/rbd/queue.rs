//! One data-plane thread's way to an image.
//!
//! ```text
//!  submit ─▶ slot (payload, completer) ─▶ librbd ──▶ [librbd's thread] operation_done ──post──▶ completed ─▶ request completes
//! ```
//!
//! A slot's payload stays where it is from the call until the posted completion has arrived: librbd writes into its memory and
//! reads its list of segments all that time. An [`Operation`] is what librbd's thread is given instead: it knows only whom to
//! tell, and outlives the queue if it must.

use std::cell::{Cell, RefCell};
use std::ffi::{c_int, c_void};
use std::mem;
use std::ptr;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::mpsc::Sender;

use blockdev::request::Completer;
use blockdev::{Errno, Extent, Handler, HandlerId, IoQueue, Op, Payload, Reactor, ReactorHandle, Request};
use parking_lot::Mutex;

use super::device::Core;
use super::health::Progress;
use super::helper::Job;
use super::library::{Library, RawCompletion, RawImage, WRITE_ZEROES_FLAG_THICK_PROVISION};

const SLOTS: usize = 64;

pub(super) struct RbdQueue {
    inner: Rc<Inner>,
}

struct Inner {
    core: Arc<Core>,
    helper: Sender<Job>,
    reactor: Rc<Reactor>,
    id: HandlerId,
    progress: Arc<Progress>,
    /// Grows to the most requests ever in flight. A slot never moves: others hold its address.
    slots: RefCell<Vec<Rc<Slot>>>,
    free: RefCell<Vec<u32>>,
    in_flight: Cell<usize>,
    closing: Cell<bool>,
}

struct Slot {
    operation: Arc<Operation>,
    pending: RefCell<Option<Pending>>,
}

/// A request in flight.
struct Pending {
    op: Op,
    offset: u64,
    len: u64,
    payload: Payload,
    completer: Completer,
}

/// How other threads complete what is in a slot.
pub(super) struct Operation {
    library: &'static Library,
    reactor: ReactorHandle,
    handler: HandlerId,
    token: u32,
    extents: Mutex<Vec<Extent>>,
}

impl Operation {
    pub(super) fn complete(&self, result: i32) {
        self.reactor.post(self.handler, self.token, result);
    }

    pub(super) fn complete_with(&self, extents: Vec<Extent>) {
        *self.extents.lock() = extents;
        self.complete(0);
    }
}

/// librbd calls it once an operation has ended, on a thread of its own.
unsafe extern "C" fn operation_done(completion: RawCompletion, argument: *mut c_void) {
    // SAFETY: `argument` came from `Arc::into_raw` in `start`, for this call alone.
    let operation = unsafe { Arc::from_raw(argument.cast::<Operation>()) };
    // SAFETY: the completion belongs to this call, which releases it after its last use.
    let result = unsafe {
        let result = (operation.library.rbd_aio_get_return_value)(completion);
        (operation.library.rbd_aio_release)(completion);
        result
    };
    operation.complete(i32::try_from(result).unwrap_or(-libc::EIO));
}

impl RbdQueue {
    pub(super) fn new(core: &Arc<Core>, helper: Sender<Job>, reactor: &Rc<Reactor>) -> RbdQueue {
        let inner = reactor.install(|id| Inner {
            core: core.clone(),
            helper,
            reactor: reactor.clone(),
            id,
            progress: core.health.queue(),
            slots: RefCell::new(Vec::with_capacity(SLOTS)),
            free: RefCell::new(Vec::with_capacity(SLOTS)),
            in_flight: Cell::new(0),
            closing: Cell::new(false),
        });
        RbdQueue { inner }
    }
}

impl IoQueue for RbdQueue {
    fn submit(&self, request: Request) {
        self.inner.submit(request);
    }
}

impl Drop for RbdQueue {
    fn drop(&mut self) {
        self.inner.closing.set(true);
        self.inner.unregister_if_done();
    }
}

impl Inner {
    fn submit(&self, request: Request) {
        if request.op != Op::Flush && request.len == 0 {
            return request.complete(Ok(()));
        }
        if let Err(errno) = self.check(&request) {
            return request.complete(Err(errno));
        }
        let token = self.take_slot();
        let slot = self.slots.borrow()[token as usize].clone();
        let (op, offset, len) = (request.op, request.offset, request.len);
        let (payload, completer) = request.into_parts();
        *slot.pending.borrow_mut() = Some(Pending { op, offset, len, payload, completer });
        self.in_flight.set(self.in_flight.get() + 1);
        if self.in_flight.get() == 1 {
            self.core.health.moved(&self.progress, 1, self.reactor.now());
        }
        if let Err(errno) = self.start(&slot) {
            self.finish(token, Err(errno));
        }
    }

    /// librbd clips what crosses the end of an image, and calls it a success.
    fn check(&self, request: &Request) -> Result<(), Errno> {
        let end = request.offset.checked_add(request.len).ok_or(Errno::EINVAL)?;
        if request.op != Op::Flush && end > self.core.size() {
            return Err(if request.op.modifies() { Errno::ENOSPC } else { Errno::EINVAL });
        }
        if request.op.modifies() && !self.core.capabilities.writable {
            return Err(Errno::EPERM);
        }
        match request.op {
            Op::WriteZeroes { fast: true, .. } => Err(Errno::EOPNOTSUPP),
            Op::Discard | Op::WriteZeroes { .. } if !self.core.capabilities.write_zeroes => Err(Errno::EOPNOTSUPP),
            Op::Read | Op::Write { .. } => match request.payload.memory() {
                Some(memory) if memory.len() as u64 == request.len => Ok(()),
                _ => Err(Errno::EINVAL),
            },
            _ => Ok(()),
        }
    }

    fn take_slot(&self) -> u32 {
        if let Some(token) = self.free.borrow_mut().pop() {
            return token;
        }
        let mut slots = self.slots.borrow_mut();
        let token = slots.len() as u32;
        let operation = Arc::new(Operation {
            library: self.core.image().library(),
            reactor: self.reactor.handle(),
            handler: self.id,
            token,
            extents: Mutex::new(Vec::new()),
        });
        slots.push(Rc::new(Slot { operation, pending: RefCell::new(None) }));
        token
    }

    /// Starts what is in the slot: on success a completion will be posted.
    fn start(&self, slot: &Slot) -> Result<(), Errno> {
        let pending = slot.pending.borrow();
        let Some(pending) = &*pending else { return Err(Errno::EIO) };
        if pending.op == Op::BlockStatus {
            let operation = slot.operation.clone();
            let job = Job::Extents { core: self.core.clone(), offset: pending.offset, len: pending.len, operation };
            return self.helper.send(job).map_err(|_| Errno::EIO);
        }
        let library = slot.operation.library;
        let argument = Arc::into_raw(slot.operation.clone()).cast_mut().cast::<c_void>();
        let mut completion = ptr::null_mut();
        // SAFETY: the callback takes the argument over if, and only if, an operation is started with the completion.
        let code = unsafe { (library.rbd_aio_create_completion)(argument, operation_done, &mut completion) };
        let code = if code < 0 { code } else { start_operation(library, self.core.image().raw(), pending, completion) };
        if code >= 0 {
            return Ok(());
        }
        // SAFETY: librbd refused, so it will not call back: the argument is ours again.
        drop(unsafe { Arc::from_raw(argument.cast_const().cast::<Operation>()) });
        if !completion.is_null() {
            // SAFETY: the completion was created above, and nothing was started with it.
            unsafe { (library.rbd_aio_release)(completion) };
        }
        Err(Errno::from_raw(-code))
    }

    fn finish(&self, token: u32, result: Result<i32, Errno>) {
        let slot = self.slots.borrow()[token as usize].clone();
        let taken = slot.pending.borrow_mut().take();
        let Some(Pending { op, offset, len, payload, completer }) = taken else {
            debug_assert!(false, "a completion for an empty slot");
            return;
        };
        self.free.borrow_mut().push(token);
        self.in_flight.set(self.in_flight.get() - 1);
        self.core.health.moved(&self.progress, self.in_flight.get(), self.reactor.now());
        let result = result.and_then(|transferred| self.check_done(op, offset + len, len, transferred));
        match result {
            Ok(()) => self.core.health.succeeded(),
            Err(errno) => self.core.note_failure(op, offset, len, errno),
        }
        let payload = match op {
            Op::BlockStatus if result.is_ok() => Payload::Extents(mem::take(&mut *slot.operation.extents.lock())),
            _ => payload,
        };
        completer.complete(result, payload);
        self.unregister_if_done();
    }

    /// Whether it was done as a whole: the image may have shrunk meanwhile, and librbd clipped it.
    fn check_done(&self, op: Op, end: u64, len: u64, transferred: i32) -> Result<(), Errno> {
        match op {
            Op::Read if transferred as u64 != len => Err(Errno::EIO),
            _ if op.modifies() && end > self.core.size() => Err(Errno::ENOSPC),
            _ => Ok(()),
        }
    }

    fn unregister_if_done(&self) {
        if self.closing.get() && self.in_flight.get() == 0 {
            self.reactor.unregister(self.id);
        }
    }
}

/// Hands one operation to librbd; negative if it refused.
fn start_operation(library: &Library, image: RawImage, pending: &Pending, completion: RawCompletion) -> c_int {
    let Pending { op, offset, len, .. } = *pending;
    let segments = pending.payload.memory().map_or(&[][..], |memory| memory.segments());
    let zero = |flags| match library.rbd_aio_write_zeroes {
        // SAFETY: the image is open as long as the queue, which outlives what it has in flight.
        Some(zero) => unsafe { zero(image, offset, len as usize, completion, flags, 0) },
        None => -libc::EOPNOTSUPP,
    };
    match op {
        // SAFETY: the segments and the list of them stay valid and in place until the completion: the slot keeps them, and the
        // image is open as above.
        Op::Read => unsafe { (library.rbd_aio_readv)(image, segments.as_ptr(), segments.len() as c_int, offset, completion) },
        // SAFETY: as above.
        Op::Write { .. } => unsafe {
            (library.rbd_aio_writev)(image, segments.as_ptr(), segments.len() as c_int, offset, completion)
        },
        // SAFETY: the image is open as above.
        Op::Flush => unsafe { (library.rbd_aio_flush)(image, completion) },
        // A discard proper skips what is smaller than its granularity; zeroing without allocating frees just as much.
        Op::Discard | Op::WriteZeroes { unmap: true, .. } => zero(0),
        Op::WriteZeroes { unmap: false, .. } => zero(WRITE_ZEROES_FLAG_THICK_PROVISION),
        Op::BlockStatus => -libc::EOPNOTSUPP,
    }
}

impl Handler for Inner {
    fn completed(&self, token: u32, result: i32, _flags: u32) {
        self.finish(token, if result < 0 { Err(Errno::from_raw(-result)) } else { Ok(result) });
    }

    fn ready(&self) {}
}

impl Drop for Inner {
    fn drop(&mut self) {
        // Only a reactor that ends with requests in flight gets here with some. librbd still writes into their memory: it is
        // never given back.
        for slot in self.slots.get_mut().drain(..) {
            if slot.pending.borrow().is_some() {
                mem::forget(slot);
            }
        }
    }
}
