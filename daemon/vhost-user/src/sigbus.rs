//! Keeps a front end that truncates its memory file from killing the daemon.
//!
//! ```text
//!   fault at A ─▶ handler ─▶ A in a guarded mapping? ─ yes ─▶ zero pages over A‥end of it, flag raised, event written; A is retried
//!                                                   └─ no ──▶ the handler that was there before
//! ```
//!
//! A guard stands for exactly as long as its mapping; whoever touches the mapping holds it. So the signal handler, which runs
//! in the faulting thread, never meets a guard that is going away. Everything the handler does is async-signal-safe.

use std::io;
use std::mem::MaybeUninit;
use std::os::fd::{AsRawFd, OwnedFd};
use std::ptr;
use std::sync::atomic::{AtomicBool, AtomicI32, AtomicPtr, AtomicUsize, Ordering};
use std::sync::{Arc, OnceLock};

const SLOTS: usize = 16384;
/// The end of a slot that is taken but not yet filled in.
const RESERVED: usize = 1;

struct Slot {
    start: AtomicUsize,
    /// 0: free.
    end: AtomicUsize,
    granule: AtomicUsize,
    broken: AtomicPtr<AtomicBool>,
    event: AtomicI32,
}

static TABLE: [Slot; SLOTS] = [const {
    Slot {
        start: AtomicUsize::new(0),
        end: AtomicUsize::new(0),
        granule: AtomicUsize::new(0),
        broken: AtomicPtr::new(ptr::null_mut()),
        event: AtomicI32::new(-1),
    }
}; SLOTS];
/// One past the highest slot ever used.
static USED: AtomicUsize = AtomicUsize::new(0);

/// Guards one mapping until dropped.
pub struct Guard {
    slot: usize,
    broken: Box<AtomicBool>,
    event: Arc<OwnedFd>,
}

impl Guard {
    /// Guards `start..start + len`, made of pages of `granule` bytes. When a fault breaks it, 1 is added to the eventfd `event`.
    pub fn new(start: usize, len: usize, granule: usize, event: Arc<OwnedFd>) -> io::Result<Guard> {
        install()?;
        let broken = Box::new(AtomicBool::new(false));
        let free = |slot: &&Slot| slot.end.compare_exchange(0, RESERVED, Ordering::AcqRel, Ordering::Relaxed).is_ok();
        let index = TABLE.iter().enumerate().find(|(_, slot)| free(slot)).map(|(index, _)| index);
        let index = index.ok_or_else(|| io::Error::other("too many memory regions are mapped in this process"))?;
        let slot = &TABLE[index];
        slot.granule.store(granule, Ordering::Relaxed);
        slot.event.store(event.as_raw_fd(), Ordering::Relaxed);
        slot.broken.store(ptr::from_ref(&*broken).cast_mut(), Ordering::Relaxed);
        slot.start.store(start, Ordering::Relaxed);
        slot.end.store(start + len, Ordering::Release);
        USED.fetch_max(index + 1, Ordering::Release);
        Ok(Guard { slot: index, broken, event })
    }

    /// True once part of the mapping turned out to be gone.
    pub fn is_broken(&self) -> bool {
        self.broken.load(Ordering::Relaxed)
    }
}

impl Drop for Guard {
    fn drop(&mut self) {
        let slot = &TABLE[self.slot];
        slot.start.store(0, Ordering::Relaxed);
        slot.end.store(0, Ordering::Release);
        let _ = &self.event;
    }
}

static PREVIOUS: OnceLock<libc::sigaction> = OnceLock::new();

fn install() -> io::Result<()> {
    static INSTALLED: OnceLock<Result<(), i32>> = OnceLock::new();
    let outcome = INSTALLED.get_or_init(|| {
        let mut previous = MaybeUninit::<libc::sigaction>::zeroed();
        // SAFETY: asks for the present action only; `previous` is large enough for it and zero is a valid value of it.
        let previous = unsafe {
            libc::sigaction(libc::SIGBUS, ptr::null(), previous.as_mut_ptr());
            previous.assume_init()
        };
        let _ = PREVIOUS.set(previous);
        // SAFETY: zero is a valid value of the structure; its fields are set below.
        let mut action: libc::sigaction = unsafe { MaybeUninit::zeroed().assume_init() };
        action.sa_sigaction = on_sigbus as *const () as usize;
        action.sa_flags = libc::SA_SIGINFO | libc::SA_ONSTACK;
        // SAFETY: the handler has the signature that SA_SIGINFO asks for and does only what a signal handler may.
        match unsafe { libc::sigaction(libc::SIGBUS, &action, ptr::null_mut()) } {
            0 => Ok(()),
            _ => Err(io::Error::last_os_error().raw_os_error().unwrap_or(libc::EIO)),
        }
    });
    outcome.map_err(io::Error::from_raw_os_error)
}

extern "C" fn on_sigbus(signal: libc::c_int, info: *mut libc::siginfo_t, context: *mut libc::c_void) {
    // SAFETY: the kernel passes a valid siginfo of a fault, whose address field is set; errno belongs to this thread.
    let (address, errno) = unsafe { ((*info).si_addr() as usize, libc::__errno_location()) };
    // SAFETY: as above.
    let saved = unsafe { *errno };
    let used = USED.load(Ordering::Acquire);
    let repaired = TABLE[..used].iter().any(|slot| {
        let end = slot.end.load(Ordering::Acquire);
        let start = slot.start.load(Ordering::Relaxed);
        end > RESERVED && (start..end).contains(&address) && repair(slot, address, end)
    });
    // SAFETY: restores what the interrupted code may be about to read.
    unsafe { *errno = saved };
    if !repaired {
        chain(signal, info, context);
    }
}

/// A truncated file is gone from the faulting page to its end, so zero pages go there.
fn repair(slot: &Slot, address: usize, end: usize) -> bool {
    let granule = slot.granule.load(Ordering::Relaxed);
    let start = address & !(granule - 1);
    let protection = libc::PROT_READ | libc::PROT_WRITE;
    let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_FIXED | libc::MAP_NORESERVE;
    // SAFETY: `start..end` is a tail of a mapping that its guard says is ours, and stays one mapping as a whole.
    let mapped = unsafe { libc::mmap(start as *mut libc::c_void, end - start, protection, flags, -1, 0) };
    if mapped == libc::MAP_FAILED {
        return false;
    }
    let one = 1u64;
    // SAFETY: the flag and the descriptor live as long as the guard, and it stands while its mapping is touched, as now.
    unsafe {
        (*slot.broken.load(Ordering::Relaxed)).store(true, Ordering::SeqCst);
        libc::write(slot.event.load(Ordering::Relaxed), ptr::from_ref(&one).cast(), size_of::<u64>());
    }
    true
}

fn chain(signal: libc::c_int, info: *mut libc::siginfo_t, context: *mut libc::c_void) {
    let previous = PREVIOUS.get();
    let handler = previous.map_or(libc::SIG_DFL, |previous| previous.sa_sigaction);
    let takes_info = previous.is_some_and(|previous| previous.sa_flags & libc::SA_SIGINFO != 0);
    match (handler, takes_info) {
        (libc::SIG_DFL | libc::SIG_IGN, _) => {
            // The fault repeats when this returns, and then ends the process as it would have without us.
            // SAFETY: sets the default action; takes no pointers of ours.
            unsafe { libc::signal(signal, libc::SIG_DFL) };
        }
        (handler, true) => {
            // SAFETY: it was installed with SA_SIGINFO, so it has this signature.
            let handler: extern "C" fn(libc::c_int, *mut libc::siginfo_t, *mut libc::c_void) =
                unsafe { std::mem::transmute(handler) };
            handler(signal, info, context);
        }
        (handler, false) => {
            // SAFETY: it was installed without SA_SIGINFO, so it takes the signal's number alone.
            let handler: extern "C" fn(libc::c_int) = unsafe { std::mem::transmute(handler) };
            handler(signal);
        }
    }
}
