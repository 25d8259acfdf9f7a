//! Page-aligned buffers from a fixed budget, one pool per data-plane thread.
//!
//! Buffers come in powers of two from 4 KiB to 64 MiB. A freed buffer is kept for the next user of its size until the pool
//! holds more than `retain` idle bytes. When the budget is spent, [`BufferPool::try_get`] says no: that is backpressure, and
//! the caller stops reading from its client until a buffer comes back ([`BufferPool::on_free`]).

mod chunks;

use std::alloc::{Layout, alloc, dealloc, handle_alloc_error};
use std::cell::{Cell, RefCell};
use std::ptr::NonNull;
use std::rc::Rc;

use chunks::{Chunks, LARGE_MIN};

const SMALLEST_SHIFT: u32 = 12;
const CLASSES: usize = 15;
/// Every buffer starts at a multiple of this, which satisfies direct I/O on any device in use.
pub const BUFFER_ALIGNMENT: usize = 4096;
/// The largest buffer a pool hands out, in bytes.
pub const BUFFER_MAX: usize = 1 << (SMALLEST_SHIFT as usize + CLASSES - 1);

/// A pool of aligned buffers. Not shared between threads.
pub struct BufferPool {
    idle: RefCell<[Vec<NonNull<u8>>; CLASSES]>,
    chunks: RefCell<Chunks>,
    idle_bytes: Cell<usize>,
    used_bytes: Cell<usize>,
    budget: usize,
    retain: usize,
    waiters: RefCell<Vec<Box<dyn FnOnce()>>>,
}

/// A buffer of at least the size asked for, given back to its pool when dropped. Its content is whatever its last user left.
pub struct Buffer {
    start: NonNull<u8>,
    class: usize,
    pool: Rc<BufferPool>,
}

fn layout(class: usize) -> Layout {
    let size = 1usize << (SMALLEST_SHIFT as usize + class);
    Layout::from_size_align(size, BUFFER_ALIGNMENT).expect("a power of two of at most BUFFER_MAX")
}

fn class_of(len: usize) -> usize {
    let shift = len.max(1).next_power_of_two().trailing_zeros();
    shift.saturating_sub(SMALLEST_SHIFT) as usize
}

impl BufferPool {
    /// `budget`: the most bytes in use at once. `retain`: the most idle bytes kept for reuse.
    pub fn new(budget: usize, retain: usize) -> Rc<BufferPool> {
        Rc::new(BufferPool {
            idle: RefCell::new(std::array::from_fn(|_| Vec::new())),
            chunks: RefCell::default(),
            idle_bytes: Cell::new(0),
            used_bytes: Cell::new(0),
            budget,
            retain,
            waiters: RefCell::new(Vec::new()),
        })
    }

    /// A buffer of at least `len` bytes, or `None` when the budget is spent or `len` is over [`BUFFER_MAX`].
    pub fn try_get(self: &Rc<Self>, len: usize) -> Option<Buffer> {
        let class = class_of(len);
        if class >= CLASSES || self.used_bytes.get() + layout(class).size() > self.budget {
            return None;
        }
        Some(self.take(class))
    }

    /// A buffer even if the budget is spent: for the few requests without which no buffer would ever come back, because all
    /// holders wait for another, and for what is small and limited in number. `None` only if `len` is over [`BUFFER_MAX`].
    pub fn get_beyond_budget(self: &Rc<Self>, len: usize) -> Option<Buffer> {
        let class = class_of(len);
        (class < CLASSES).then(|| self.take(class))
    }

    fn take(self: &Rc<Self>, class: usize) -> Buffer {
        let size = layout(class).size();
        let reused = self.idle.borrow_mut()[class].pop();
        let start = match reused {
            Some(start) => {
                self.idle_bytes.set(self.idle_bytes.get() - size);
                start
            }
            None => self.allocate(class).unwrap_or_else(|| handle_alloc_error(layout(class))),
        };
        self.used_bytes.set(self.used_bytes.get() + size);
        Buffer { start, class, pool: self.clone() }
    }

    /// Calls `wake` once, when the next buffer is given back.
    pub fn on_free(&self, wake: Box<dyn FnOnce()>) {
        self.waiters.borrow_mut().push(wake);
    }

    /// Bytes handed out and not yet given back.
    pub fn used_bytes(&self) -> usize {
        self.used_bytes.get()
    }

    /// Bytes of the budget that are not handed out.
    pub fn free_bytes(&self) -> usize {
        self.budget.saturating_sub(self.used_bytes.get())
    }

    fn give_back(&self, start: NonNull<u8>, class: usize) {
        let size = layout(class).size();
        self.used_bytes.set(self.used_bytes.get() - size);
        if self.idle_bytes.get() + size <= self.retain {
            self.idle_bytes.set(self.idle_bytes.get() + size);
            self.idle.borrow_mut()[class].push(start);
        } else {
            // SAFETY: `start` came from `allocate` for this class and its only owner gave it up.
            unsafe { self.free(start, class) };
        }
        let waiters = std::mem::take(&mut *self.waiters.borrow_mut());
        for wake in waiters {
            wake();
        }
    }

    fn allocate(&self, class: usize) -> Option<NonNull<u8>> {
        let layout = layout(class);
        if layout.size() >= LARGE_MIN {
            return self.chunks.borrow_mut().allocate(layout.size()).ok();
        }
        // SAFETY: the layout has a non-zero size.
        NonNull::new(unsafe { alloc(layout) })
    }

    /// # Safety
    /// `start` came from `allocate` for this class, and nobody uses that memory any more.
    unsafe fn free(&self, start: NonNull<u8>, class: usize) {
        let layout = layout(class);
        if layout.size() >= LARGE_MIN {
            // SAFETY: the caller's promise.
            return unsafe { self.chunks.borrow_mut().free(start, layout.size()) };
        }
        // SAFETY: the caller's promise.
        unsafe { dealloc(start.as_ptr(), layout) };
    }
}

impl Drop for BufferPool {
    fn drop(&mut self) {
        for (class, idle) in self.idle.take().into_iter().enumerate() {
            for start in idle {
                // SAFETY: idle buffers came from `allocate` for this class and have no other owner.
                unsafe { self.free(start, class) };
            }
        }
    }
}

impl Buffer {
    pub fn as_ptr(&self) -> *mut u8 {
        self.start.as_ptr()
    }

    /// Bytes it can hold: the size asked for, rounded up to a power of two.
    pub fn capacity(&self) -> usize {
        layout(self.class).size()
    }
}

impl Drop for Buffer {
    fn drop(&mut self) {
        self.pool.give_back(self.start, self.class);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_alignment_and_reuse() {
        let pool = BufferPool::new(1 << 20, 1 << 20);
        let small = pool.try_get(1).unwrap();
        assert_eq!(small.capacity(), 4096);
        assert_eq!(small.as_ptr() as usize % BUFFER_ALIGNMENT, 0);
        let address = small.as_ptr();
        drop(small);
        assert_eq!(pool.try_get(4096).unwrap().as_ptr(), address);
        assert_eq!(pool.try_get(4097).unwrap().capacity(), 8192);
        assert_eq!(pool.used_bytes(), 0);
    }

    #[test]
    fn a_spent_budget_refuses_and_wakes_on_free() {
        let pool = BufferPool::new(8192, 0);
        let first = pool.try_get(8192).unwrap();
        assert!(pool.try_get(1).is_none());
        let woken = Rc::new(Cell::new(false));
        let flag = woken.clone();
        pool.on_free(Box::new(move || flag.set(true)));
        drop(first);
        assert!(woken.get());
        assert!(pool.try_get(1).is_some());
        assert!(pool.try_get(BUFFER_MAX + 1).is_none());
    }
}
