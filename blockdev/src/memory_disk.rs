//! A thin device in memory: 64 KiB pages, allocated when first written. For tests and benchmarks; its content dies with it.

use std::collections::BTreeMap;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use parking_lot::RwLock;

use crate::device::{BlockDevice, Capabilities, DeviceError, Geometry, IoQueue};
use crate::memory::Memory;
use crate::reactor::Reactor;
use crate::request::{Extent, ExtentKind, Op, Payload, Request};

const PAGE: u64 = 64 << 10;
const SHARDS: u64 = 64;

type Shard = RwLock<BTreeMap<u64, Box<[u8]>>>;

struct Pages {
    size: AtomicU64,
    /// Page `n` is in shard `n % SHARDS`.
    shards: Vec<Shard>,
}

/// The device.
pub struct MemoryDisk {
    pages: Arc<Pages>,
    geometry: Geometry,
}

impl MemoryDisk {
    /// `block_size`: what requests must be aligned to, to stand in for media of any kind; 1 for none.
    pub fn new(size: u64, block_size: u32) -> MemoryDisk {
        let shards = (0..SHARDS).map(|_| RwLock::default()).collect();
        let pages = Arc::new(Pages { size: AtomicU64::new(size), shards });
        let geometry = Geometry {
            size,
            block_size,
            memory_alignment: 1,
            preferred_size: 4096.max(block_size),
            discard_granularity: PAGE as u32,
        };
        MemoryDisk { pages, geometry }
    }

    /// Bytes of memory that hold pages.
    pub fn allocated(&self) -> u64 {
        self.pages.shards.iter().map(|shard| shard.read().len() as u64 * PAGE).sum()
    }
}

impl BlockDevice for MemoryDisk {
    fn geometry(&self) -> Geometry {
        Geometry { size: self.pages.size.load(Ordering::Acquire), ..self.geometry }
    }

    fn capabilities(&self) -> Capabilities {
        Capabilities {
            writable: true,
            discard: true,
            write_zeroes: true,
            fast_zero: true,
            fua: true,
            block_status: true,
            caches_reads: false,
            flush_failure_loses_writes: false,
        }
    }

    fn open_queue(&self, _reactor: &Rc<Reactor>) -> Result<Box<dyn IoQueue>, DeviceError> {
        Ok(Box::new(MemoryQueue { pages: self.pages.clone() }))
    }

    fn resize(&self, size: u64) -> Result<(), DeviceError> {
        let old = self.pages.size.swap(size, Ordering::AcqRel);
        if size < old {
            self.pages.zero(size, old - size);
        }
        Ok(())
    }
}

struct MemoryQueue {
    pages: Arc<Pages>,
}

impl IoQueue for MemoryQueue {
    fn submit(&self, mut request: Request) {
        let (offset, len) = (request.offset, request.len);
        match (request.op, &mut request.payload) {
            (Op::Read, Payload::Memory(memory)) => self.pages.read(offset, memory),
            (Op::Write { .. }, Payload::Memory(memory)) => self.pages.write(offset, memory),
            (Op::Discard | Op::WriteZeroes { .. }, _) => self.pages.zero(offset, len),
            (Op::BlockStatus, _) => {
                let extents = self.pages.status(offset, len);
                return request.complete_with(Ok(()), Payload::Extents(extents));
            }
            _ => {}
        }
        request.complete(Ok(()));
    }
}

/// The parts of a range that lie in one page each: page number, offset inside it, length.
fn pages_of(offset: u64, len: u64) -> impl Iterator<Item = (u64, usize, usize)> {
    let end = offset + len;
    let mut at = offset;
    std::iter::from_fn(move || {
        let inside = at % PAGE;
        let part = (PAGE - inside).min(end - at);
        let item = (part > 0).then_some((at / PAGE, inside as usize, part as usize));
        at += part;
        item
    })
}

impl Pages {
    fn shard(&self, page: u64) -> &Shard {
        &self.shards[(page % SHARDS) as usize]
    }

    fn read(&self, offset: u64, memory: &mut Memory) {
        let zeroes = [0; 4096];
        let mut done = 0;
        for (page, inside, len) in pages_of(offset, memory.len() as u64) {
            match self.shard(page).read().get(&page) {
                Some(bytes) => memory.copy_from(done, &bytes[inside..inside + len]),
                None => {
                    for at in (0..len).step_by(zeroes.len()) {
                        memory.copy_from(done + at, &zeroes[..(len - at).min(zeroes.len())]);
                    }
                }
            }
            done += len;
        }
    }

    fn write(&self, offset: u64, memory: &Memory) {
        let mut done = 0;
        for (page, inside, len) in pages_of(offset, memory.len() as u64) {
            let mut shard = self.shard(page).write();
            let bytes = shard.entry(page).or_insert_with(|| vec![0; PAGE as usize].into_boxed_slice());
            memory.copy_to(done, &mut bytes[inside..inside + len]);
            done += len;
        }
    }

    fn zero(&self, offset: u64, len: u64) {
        let end = offset + len;
        let (first_whole, last_whole) = (offset.div_ceil(PAGE), end / PAGE);
        for (index, shard) in self.shards.iter().enumerate() {
            let mut shard = shard.write();
            if first_whole < last_whole {
                let mut tail = shard.split_off(&first_whole);
                let mut kept = tail.split_off(&last_whole);
                shard.append(&mut kept);
            }
            for page in [offset / PAGE, end / PAGE] {
                if page % SHARDS == index as u64
                    && let Some(bytes) = shard.get_mut(&page)
                {
                    let start = page * PAGE;
                    let from = offset.max(start) - start;
                    let to = end.min(start + PAGE).saturating_sub(start);
                    if from < to {
                        bytes[from as usize..to as usize].fill(0);
                    }
                }
            }
        }
    }

    fn status(&self, offset: u64, len: u64) -> Vec<Extent> {
        const LONGEST: usize = 4096;
        let mut extents: Vec<Extent> = Vec::new();
        for (page, _, len) in pages_of(offset, len) {
            let kind = if self.shard(page).read().contains_key(&page) { ExtentKind::Data } else { ExtentKind::Hole };
            let full = extents.len() == LONGEST;
            match extents.last_mut() {
                Some(last) if last.kind == kind => last.len += len as u64,
                _ if full => break,
                _ => extents.push(Extent { len: len as u64, kind }),
            }
        }
        extents
    }
}
