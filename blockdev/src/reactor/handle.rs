//! How other threads reach a reactor: a lock-free inbox, and an event that is written only while the thread sleeps.

use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc;

use crossbeam_queue::SegQueue;

use super::{HandlerId, Reactor};

pub(super) type Job = Box<dyn FnOnce(&Rc<Reactor>) + Send>;

pub(super) enum Message {
    Run(Job),
    Completed { id: HandlerId, token: u32, result: i32 },
}

pub(super) struct Shared {
    pub(super) inbox: SegQueue<Message>,
    pub(super) event: OwnedFd,
    sleeping: AtomicBool,
    stopped: AtomicBool,
}

impl Shared {
    pub(super) fn new() -> io::Result<Shared> {
        // SAFETY: eventfd takes no pointers; the descriptor it returns is owned by nobody else.
        let event = unsafe {
            match libc::eventfd(0, libc::EFD_CLOEXEC) {
                -1 => return Err(io::Error::last_os_error()),
                fd => OwnedFd::from_raw_fd(fd),
            }
        };
        Ok(Shared { inbox: SegQueue::new(), event, sleeping: AtomicBool::new(false), stopped: AtomicBool::new(false) })
    }

    /// Announces sleep; false if a message is already waiting.
    pub(super) fn prepare_sleep(&self) -> bool {
        self.sleeping.store(true, Ordering::SeqCst);
        std::sync::atomic::fence(Ordering::SeqCst);
        if self.inbox.is_empty() {
            return true;
        }
        self.sleeping.store(false, Ordering::SeqCst);
        false
    }

    pub(super) fn awake(&self) {
        self.sleeping.store(false, Ordering::SeqCst);
    }

    /// Nobody reads the inbox any more: what is or comes in is dropped, so that whoever waits for it learns of it.
    pub(super) fn stop(&self) {
        self.stopped.store(true, Ordering::SeqCst);
        std::sync::atomic::fence(Ordering::SeqCst);
        self.empty_inbox();
    }

    fn empty_inbox(&self) {
        while let Some(message) = self.inbox.pop() {
            drop(message);
        }
    }

    fn send(&self, message: Message) {
        self.inbox.push(message);
        std::sync::atomic::fence(Ordering::SeqCst);
        if self.stopped.load(Ordering::SeqCst) {
            return self.empty_inbox();
        }
        if self.sleeping.load(Ordering::SeqCst) && self.sleeping.swap(false, Ordering::SeqCst) {
            let one = 1u64.to_ne_bytes();
            // SAFETY: writes eight bytes from a live array to a descriptor that `self` owns.
            unsafe { libc::write(self.event.as_raw_fd(), one.as_ptr().cast(), one.len()) };
        }
    }
}

/// Sends work to a reactor from any thread. Cheap to clone.
#[derive(Clone)]
pub struct ReactorHandle {
    shared: Arc<Shared>,
}

impl ReactorHandle {
    pub(super) fn new(shared: Arc<Shared>) -> ReactorHandle {
        ReactorHandle { shared }
    }

    /// Runs `job` on the reactor's thread, in the order sent.
    pub fn spawn(&self, job: impl FnOnce(&Rc<Reactor>) + Send + 'static) {
        self.shared.send(Message::Run(Box::new(job)));
    }

    /// Runs `job` on the reactor's thread and waits for its value. Never call it from a data-plane thread.
    /// `None` if the reactor has stopped.
    pub fn call<T: Send + 'static>(&self, job: impl FnOnce(&Rc<Reactor>) -> T + Send + 'static) -> Option<T> {
        let (sender, receiver) = mpsc::sync_channel(1);
        self.spawn(move |reactor| {
            let _ = sender.send(job(reactor));
        });
        receiver.recv().ok()
    }

    /// Delivers a completion that did not come from the kernel: `Handler::completed(token, result, 0)` of `id`. Allocates
    /// nothing and writes the event only if the thread sleeps.
    pub fn post(&self, id: HandlerId, token: u32, result: i32) {
        self.shared.send(Message::Completed { id, token, result });
    }

    /// True if both reach the same reactor.
    pub fn same_reactor(&self, other: &ReactorHandle) -> bool {
        Arc::ptr_eq(&self.shared, &other.shared)
    }
}
