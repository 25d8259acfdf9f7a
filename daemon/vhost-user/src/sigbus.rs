//! Keeps a front end that truncates its memory file from killing the daemon.
//!
//! ```text
//!   fault at A ─▶ handler ─▶ A in a guarded mapping? ─ yes ─▶ zero pages over A‥end of it, flag raised, event written; A is retried
//!                                                   └─ no ──▶ the handler that was there before
//! ```
//!
//! A guard stands for exactly as long as its mapping, and whoever touches the mapping holds it. The handler runs in the faulting
//! thread and acts on no guard but the one of the mapping that thread touches:
//! - That guard was made before the fault and goes after it, so its slot does not change meanwhile and is read as it is.
//! - Every other slot is read whole or not at all: [`Slot::area`] sees a version on both sides of what it reads, and a guard that
//!   comes or goes changes the version. So what is read is of one guard, whose mapping was there as long as the guard stood.
//! - Such another mapping does not hold the address. If it lay there earlier, it was unmapped before the present one was mapped;
//!   its guard was dropped before that, the present one made after, and both under one lock. So whoever knows the present one
//!   sees the other gone.
//!
//! It follows that `broken` and the descriptor of the event, which the guard owns, are there while the handler uses them.
//! Everything the handler does is async-signal-safe; it takes no lock, and nobody touches a mapping with the lock held.

use std::io;
use std::mem::MaybeUninit;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::ptr;
use std::sync::atomic::{AtomicBool, AtomicI32, AtomicUsize, Ordering, fence};
use std::sync::{Arc, OnceLock};

use parking_lot::Mutex;

const SLOTS: usize = 16384;
/// Two tables, one of which replaces the other, of as many regions as VMMs used to have.
const HANDFUL: usize = 16;

struct Slot {
    /// Odd while a guard stands here.
    version: AtomicUsize,
    start: AtomicUsize,
    end: AtomicUsize,
    granule: AtomicUsize,
    broken: AtomicBool,
    event: AtomicI32,
}

/// What one guard guards.
#[derive(Clone, Copy)]
struct Area {
    start: usize,
    end: usize,
    granule: usize,
    event: RawFd,
}

static TABLE: [Slot; SLOTS] = [const {
    Slot {
        version: AtomicUsize::new(0),
        start: AtomicUsize::new(0),
        end: AtomicUsize::new(0),
        granule: AtomicUsize::new(0),
        broken: AtomicBool::new(false),
        event: AtomicI32::new(0),
    }
}; SLOTS];
/// One past the highest slot ever used.
static USED: AtomicUsize = AtomicUsize::new(0);
/// Held while a guard comes or goes.
static CHANGING: Mutex<()> = Mutex::new(());

impl Slot {
    fn is_taken(&self) -> bool {
        self.version.load(Ordering::Relaxed) % 2 == 1
    }

    /// Only with [`CHANGING`] held, and when free. A handler that reads any of what is stored here sees the version of the free
    /// slot, or a later one, when it looks at the version again: the two fences meet.
    fn fill(&self, area: Area) {
        fence(Ordering::Release);
        self.start.store(area.start, Ordering::Relaxed);
        self.end.store(area.end, Ordering::Relaxed);
        self.granule.store(area.granule, Ordering::Relaxed);
        self.event.store(area.event, Ordering::Relaxed);
        self.broken.store(false, Ordering::Relaxed);
        self.version.fetch_add(1, Ordering::Release);
    }

    /// What is guarded by the guard here, unless there is none or it comes or goes right now.
    fn area(&self) -> Option<Area> {
        let version = self.version.load(Ordering::Acquire);
        let area = Area {
            start: self.start.load(Ordering::Relaxed),
            end: self.end.load(Ordering::Relaxed),
            granule: self.granule.load(Ordering::Relaxed),
            event: self.event.load(Ordering::Relaxed),
        };
        fence(Ordering::Acquire);
        (version % 2 == 1 && self.version.load(Ordering::Relaxed) == version).then_some(area)
    }
}

/// Whether the front end with this event may have one more guard: beyond a handful it has a share of what is left, so that a few
/// front ends with many regions keep nobody else from having some.
fn leaves_room(event: RawFd) -> bool {
    let taken = || TABLE.iter().filter(|slot| slot.is_taken());
    let own = taken().filter(|slot| slot.event.load(Ordering::Relaxed) == event).count();
    own < HANDFUL || own < (SLOTS - taken().count()) / 4
}

/// Guards one mapping until dropped.
pub struct Guard {
    slot: &'static Slot,
    /// Open as long as the handler may write to it.
    _event: Arc<OwnedFd>,
}

impl Guard {
    /// Guards `start..start + len`, made of pages of `granule` bytes and mapped already; it is to be dropped before they are
    /// unmapped. When a fault breaks it, 1 is added to the eventfd `event`.
    pub fn new(start: usize, len: usize, granule: usize, event: Arc<OwnedFd>) -> io::Result<Guard> {
        install()?;
        let _changing = CHANGING.lock();
        let index = TABLE.iter().position(|slot| !slot.is_taken()).filter(|_| leaves_room(event.as_raw_fd()));
        let index = index.ok_or_else(|| io::Error::other("too many memory regions are mapped in this process"))?;
        TABLE[index].fill(Area { start, end: start + len, granule, event: event.as_raw_fd() });
        USED.fetch_max(index + 1, Ordering::Release);
        Ok(Guard { slot: &TABLE[index], _event: event })
    }

    /// True once part of the mapping turned out to be gone.
    pub fn is_broken(&self) -> bool {
        self.slot.broken.load(Ordering::Relaxed)
    }
}

impl Drop for Guard {
    fn drop(&mut self) {
        let _changing = CHANGING.lock();
        self.slot.version.fetch_add(1, Ordering::Relaxed);
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
    // SAFETY: the kernel passes a valid siginfo, whose address field means something if the code names a fault; errno belongs to
    // this thread.
    let (code, address, errno) = unsafe { ((*info).si_code, (*info).si_addr() as usize, libc::__errno_location()) };
    // SAFETY: as above.
    let saved = unsafe { *errno };
    // Others are no fault of this thread: sent by somebody, or about memory that nobody touches now.
    let faulted = matches!(code, libc::BUS_ADRERR | libc::BUS_MCEERR_AR);
    let used = USED.load(Ordering::Acquire);
    let holds = |area: &Area| (area.start..area.end).contains(&address);
    let found = TABLE[..used].iter().find_map(|slot| slot.area().filter(holds).map(|area| (slot, area)));
    let repaired = faulted && found.is_some_and(|(slot, area)| repair(slot, area, address));
    // SAFETY: restores what the interrupted code may be about to read.
    unsafe { *errno = saved };
    if !repaired {
        chain(signal, info, context);
    }
}

/// A truncated file is gone from the faulting page to its end, so zero pages go there.
fn repair(slot: &Slot, area: Area, address: usize) -> bool {
    let start = address & !(area.granule - 1);
    let protection = libc::PROT_READ | libc::PROT_WRITE;
    let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_FIXED | libc::MAP_NORESERVE;
    // SAFETY: `start..area.end` is a tail of the mapping that the faulting thread holds (see above), and stays one mapping as a
    // whole.
    let mapped = unsafe { libc::mmap(start as *mut libc::c_void, area.end - start, protection, flags, -1, 0) };
    if mapped == libc::MAP_FAILED {
        return false;
    }
    slot.broken.store(true, Ordering::SeqCst);
    let one = 1u64;
    // SAFETY: it reads a live integer; the descriptor is open as long as the guard stands, which it does while its mapping is
    // touched, as now.
    unsafe { libc::write(area.event, ptr::from_ref(&one).cast(), size_of::<u64>()) };
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

#[cfg(test)]
mod tests {
    use super::*;
    use rustix::event::{EventfdFlags, eventfd};
    use rustix::fs::{MemfdFlags, ftruncate, memfd_create};

    const LEN: usize = 1 << 16;
    const ROUNDS: usize = 20_000;

    fn event() -> Arc<OwnedFd> {
        Arc::new(eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK).unwrap())
    }

    fn map(at: usize, len: usize, flags: libc::c_int, file: RawFd) -> usize {
        let protection = libc::PROT_READ | libc::PROT_WRITE;
        // SAFETY: where the kernel likes, or in place of a part of what this test has mapped for itself.
        let start = unsafe { libc::mmap(at as *mut libc::c_void, len, protection, flags, file, 0) };
        assert_ne!(start, libc::MAP_FAILED);
        start as usize
    }

    #[test]
    fn a_front_end_with_many_regions_leaves_room_for_others() {
        let guard = |event: &Arc<OwnedFd>| Guard::new(0, 0, 4096, event.clone()).ok();
        let (first, second) = (event(), event());
        let many: Vec<Guard> = std::iter::from_fn(|| guard(&first)).collect();
        assert!(many.len() < SLOTS / 4, "{} regions", many.len());
        let others: Vec<Guard> = std::iter::from_fn(|| guard(&second)).collect();
        assert!(others.len() > HANDFUL && others.len() < many.len(), "{} and {} regions", many.len(), others.len());
        drop(many);
        assert!(guard(&second).is_some(), "what is given back is there for others");
    }

    /// Guards come and go below and above a file that is truncated again and again, and above its neighbour.
    #[test]
    fn a_fault_repairs_nothing_but_its_own_mapping() {
        let low = map(0, 4 * LEN, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS, -1);
        let (own, neighbour, high) = (low + LEN, low + 2 * LEN, low + 3 * LEN);
        // SAFETY: it lies in what was mapped above, and nobody else uses it.
        let neighbour = unsafe { std::slice::from_raw_parts_mut(neighbour as *mut u8, LEN) };
        neighbour.fill(0xab);
        let done = AtomicBool::new(false);
        std::thread::scope(|scope| {
            for areas in [[low, high], [high, low]] {
                let done = &done;
                scope.spawn(move || {
                    let event = event();
                    while !done.load(Ordering::Relaxed) {
                        areas.iter().for_each(|area| drop(Guard::new(*area, LEN, 4096, event.clone()).unwrap()));
                    }
                });
            }
            let (event, file) = (event(), memfd_create("guarded", MemfdFlags::CLOEXEC).unwrap());
            let mut intact = 0;
            for _ in 0..ROUNDS {
                ftruncate(&file, LEN as u64).unwrap();
                map(own, LEN, libc::MAP_SHARED | libc::MAP_FIXED, file.as_raw_fd());
                let guard = Guard::new(own, LEN, 4096, event.clone()).unwrap();
                ftruncate(&file, 0).unwrap();
                // SAFETY: it is mapped; the access faults and is repaired by the handler.
                let read = unsafe { (own as *const u8).read_volatile() };
                intact += usize::from(read == 0 && guard.is_broken() && neighbour.iter().all(|byte| *byte == 0xab));
            }
            done.store(true, Ordering::Relaxed);
            assert_eq!(intact, ROUNDS);
        });
    }
}
