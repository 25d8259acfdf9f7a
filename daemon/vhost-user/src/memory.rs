//! Guest memory: the files a front end shares, mapped, and addresses translated into them.
//!
//! ```text
//!   user address (rings) ──┐
//!   guest address (data) ──┴─▶ Region ──▶ Mapping (mmap, guarded against truncation) ──▶ host address
//! ```
//!
//! A [`GuestMemory`] never changes; adding or removing a region makes another one that shares the mappings. A mapping lives as
//! long as anything that may touch it: the session's table, a queue, a request in flight.
//!
//! No reference into guest memory is ever made, as the guest may write to it at any time; bytes are copied through pointers.

use std::cell::Cell;
use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::ptr::{self, NonNull};
use std::sync::Arc;

use thiserror::Error;

use crate::message::{AreaSpec, RegionSpec};
use crate::sigbus::Guard;

const PAGE: u64 = 4096;
const HUGETLBFS: i64 = 0x9584_58f6;
const TMPFS: i64 = 0x0102_1994;
/// File systems whose pages come from another process or host, which may never send them: FUSE, NFS, SMB, CIFS, SMB2, 9P, Ceph.
const SERVED_BY_OTHERS: [i64; 7] = [0x6573_5546, 0x6969, 0x517b, 0xff53_4d42, 0xfe53_4d42, 0x0102_1997, 0x00c3_6400];

/// Why memory cannot be used.
#[derive(Error, Debug)]
pub enum MemoryError {
    #[error("the shared file has {have} bytes, the area in it ends at {need}")]
    FileTooShort { have: u64, need: u64 },
    #[error("map {size} bytes of shared memory: {source}")]
    Map { size: u64, source: io::Error },
    #[error("memory in a file that another process or host serves is not used: it could stop this one; share a memfd")]
    Served,
    #[error("the region at guest address {guest:#x} overlaps another")]
    Overlap { guest: u64 },
    #[error("there is no region at guest address {guest:#x} of {size} bytes")]
    Unknown { guest: u64, size: u64 },
    #[error("more than {0} regions")]
    TooMany(usize),
}

/// A shared part of a file.
pub struct Mapping {
    /// Of the area asked for; the mapping may start before it.
    start: NonNull<u8>,
    len: usize,
    mapped: (usize, usize),
    file: File,
    is_tmpfs: bool,
    guard: Option<Guard>,
}

// SAFETY: it is a range of addresses; what may be done with them is said by whoever dereferences them.
unsafe impl Send for Mapping {}
// SAFETY: as above; all methods only read its fields.
unsafe impl Sync for Mapping {}

impl Mapping {
    /// Maps an area of `file`. A later truncation is reported by adding 1 to the eventfd `event`.
    pub fn new(file: OwnedFd, area: AreaSpec, event: &Arc<OwnedFd>) -> Result<Mapping, MemoryError> {
        let file = File::from(file);
        let map_error = |source| MemoryError::Map { size: area.size, source };
        let need = area.file_offset.checked_add(area.size).filter(|end| *end <= i64::MAX as u64);
        let need = need.ok_or_else(|| map_error(io::Error::from_raw_os_error(libc::EOVERFLOW)))?;
        let have = file.metadata().map_err(map_error)?.len();
        if area.size == 0 || have < need {
            return Err(MemoryError::FileTooShort { have, need });
        }
        let (file_system, block_size) = file_system_of(&file).map_err(map_error)?;
        let granule = granule_on(file_system, block_size).ok_or(MemoryError::Served)?;
        let before = area.file_offset % granule;
        let len = (before + area.size).next_multiple_of(granule) as usize;
        let protection = libc::PROT_READ | libc::PROT_WRITE;
        let flags = libc::MAP_SHARED | libc::MAP_NORESERVE;
        let offset = (area.file_offset - before) as libc::off_t;
        // SAFETY: a new mapping at an address of the kernel's choice; nothing else is there.
        let base = unsafe { libc::mmap(ptr::null_mut(), len, protection, flags, file.as_raw_fd(), offset) };
        if base == libc::MAP_FAILED {
            return Err(map_error(io::Error::last_os_error()));
        }
        // SAFETY: advice about the mapping just made: keep the guest's secrets out of core dumps.
        unsafe { libc::madvise(base, len, libc::MADV_DONTDUMP) };
        let start = NonNull::new(base.cast::<u8>().wrapping_add(before as usize));
        let start = start.ok_or_else(|| map_error(io::Error::from_raw_os_error(libc::ENOMEM)))?;
        let (mapped, is_tmpfs) = ((base as usize, len), file_system == TMPFS);
        let mut mapping = Mapping { start, len: area.size as usize, mapped, file, is_tmpfs, guard: None };
        mapping.guard = Some(Guard::new(base as usize, len, granule as usize, event.clone()).map_err(map_error)?);
        Ok(mapping)
    }

    pub fn start(&self) -> *mut u8 {
        self.start.as_ptr()
    }

    pub fn len(&self) -> usize {
        self.len
    }

    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    pub fn file(&self) -> &File {
        &self.file
    }

    /// True if the file lies on tmpfs, as a memfd without huge pages does.
    pub fn is_tmpfs(&self) -> bool {
        self.is_tmpfs
    }

    /// True once the file behind it was truncated under us.
    pub fn is_broken(&self) -> bool {
        self.guard.as_ref().is_some_and(Guard::is_broken)
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        drop(self.guard.take());
        let (base, len) = self.mapped;
        // SAFETY: the mapping was made in `new` with this address and length, and its last user is gone.
        unsafe { libc::munmap(base as *mut libc::c_void, len) };
    }
}

/// The type of the file system that `file` is on, and its block size.
fn file_system_of(file: &File) -> io::Result<(i64, u64)> {
    let mut info = std::mem::MaybeUninit::<libc::statfs>::zeroed();
    // SAFETY: `info` has room for what the call fills in, and zero is a valid value of it.
    let info = unsafe {
        if libc::fstatfs(file.as_raw_fd(), info.as_mut_ptr()) != 0 {
            return Err(io::Error::last_os_error());
        }
        info.assume_init()
    };
    Ok((info.f_type as i64, info.f_bsize as u64))
}

/// The page size of a file: huge pages must be mapped whole. `None` if touching its pages could take for ever, which would stop a
/// data-plane thread and all it serves.
fn granule_on(file_system: i64, block_size: u64) -> Option<u64> {
    let huge = file_system == HUGETLBFS && block_size.is_power_of_two();
    let granule = if huge { block_size.max(PAGE) } else { PAGE };
    (!SERVED_BY_OTHERS.contains(&file_system)).then_some(granule)
}

/// A region of guest memory.
#[derive(Clone)]
pub struct Region {
    guest: u64,
    user: u64,
    size: u64,
    mapping: Arc<Mapping>,
}

/// All of a guest's memory at one time.
#[derive(Clone, Default)]
pub struct GuestMemory {
    /// In order of guest address.
    regions: Vec<Region>,
}

/// The most regions of one front end.
pub const REGIONS_MAX: usize = 509;

impl GuestMemory {
    /// Maps every region of a table.
    pub fn from_table(table: Vec<(RegionSpec, OwnedFd)>, event: &Arc<OwnedFd>) -> Result<GuestMemory, MemoryError> {
        let mut memory = GuestMemory::default();
        for (spec, file) in table {
            memory = memory.with_region(spec, file, event)?;
        }
        Ok(memory)
    }

    /// The same memory and one more region.
    pub fn with_region(&self, spec: RegionSpec, file: OwnedFd, event: &Arc<OwnedFd>) -> Result<GuestMemory, MemoryError> {
        if self.regions.len() >= REGIONS_MAX {
            return Err(MemoryError::TooMany(REGIONS_MAX));
        }
        let overlaps = |start: u64, other: u64, size: u64| start < other + size && other < start + spec.size;
        let clash =
            |region: &Region| overlaps(spec.guest, region.guest, region.size) || overlaps(spec.user, region.user, region.size);
        if self.regions.iter().any(clash) {
            return Err(MemoryError::Overlap { guest: spec.guest });
        }
        let area = AreaSpec { size: spec.size, file_offset: spec.file_offset };
        let mapping = Arc::new(Mapping::new(file, area, event)?);
        let mut regions = self.regions.clone();
        let at = regions.partition_point(|region| region.guest < spec.guest);
        regions.insert(at, Region { guest: spec.guest, user: spec.user, size: spec.size, mapping });
        Ok(GuestMemory { regions })
    }

    /// The same memory without one region.
    pub fn without_region(&self, spec: RegionSpec) -> Result<GuestMemory, MemoryError> {
        let same = |region: &Region| (region.guest, region.user, region.size) == (spec.guest, spec.user, spec.size);
        let mut regions = self.regions.clone();
        let at = regions.iter().position(same);
        regions.remove(at.ok_or(MemoryError::Unknown { guest: spec.guest, size: spec.size })?);
        Ok(GuestMemory { regions })
    }

    /// The parts of files behind it.
    pub fn mappings(&self) -> impl Iterator<Item = &Arc<Mapping>> {
        self.regions.iter().map(|region| &region.mapping)
    }

    pub fn is_empty(&self) -> bool {
        self.regions.is_empty()
    }

    /// True once a file behind it was truncated under us.
    pub fn is_broken(&self) -> bool {
        self.regions.iter().any(|region| region.mapping.is_broken())
    }

    /// The host address of `len` bytes at a front end's user address, if one region holds them all.
    pub fn at_user(&self, address: u64, len: u64) -> Option<*mut u8> {
        let region = self.regions.iter().find(|region| address.wrapping_sub(region.user) < region.size)?;
        region.host(address - region.user, len)
    }

    fn find(&self, guest: u64) -> Option<usize> {
        let at = self.regions.partition_point(|region| region.guest <= guest).checked_sub(1)?;
        (guest - self.regions[at].guest < self.regions[at].size).then_some(at)
    }
}

impl Region {
    fn host(&self, offset: u64, len: u64) -> Option<*mut u8> {
        let fits = offset.checked_add(len).is_some_and(|end| end <= self.size);
        fits.then(|| self.mapping.start().wrapping_add(offset as usize))
    }
}

/// Translates guest addresses, remembering the region of the last one. One for each thread.
pub struct Translator {
    memory: Arc<GuestMemory>,
    last: Cell<usize>,
}

impl Translator {
    pub fn new(memory: Arc<GuestMemory>) -> Translator {
        Translator { memory, last: Cell::new(0) }
    }

    pub fn memory(&self) -> &Arc<GuestMemory> {
        &self.memory
    }

    /// The region that holds `guest`, and the offset in it.
    fn region(&self, guest: u64) -> Option<(&Region, u64)> {
        if let Some(region) = self.memory.regions.get(self.last.get()) {
            let offset = guest.wrapping_sub(region.guest);
            if offset < region.size {
                return Some((region, offset));
            }
        }
        let at = self.memory.find(guest)?;
        self.last.set(at);
        let region = &self.memory.regions[at];
        Some((region, guest - region.guest))
    }

    /// The host address of `len` bytes, if one region holds them all.
    pub fn contiguous(&self, guest: u64, len: u64) -> Option<*mut u8> {
        let (region, offset) = self.region(guest)?;
        region.host(offset, len)
    }

    /// Calls `visit` with each piece of `len` bytes, which may cross from one region into the next; false if some of it is
    /// nowhere.
    pub fn pieces(&self, mut guest: u64, mut len: u64, mut visit: impl FnMut(*mut u8, usize)) -> bool {
        while len > 0 {
            let Some((region, offset)) = self.region(guest) else { return false };
            let part = len.min(region.size - offset);
            visit(region.mapping.start().wrapping_add(offset as usize), part as usize);
            len -= part;
            match guest.checked_add(part) {
                Some(next) => guest = next,
                None => return len == 0,
            }
        }
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rustix::event::{EventfdFlags, eventfd};
    use rustix::fs::{MemfdFlags, ftruncate, memfd_create};

    fn event() -> Arc<OwnedFd> {
        Arc::new(eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK).unwrap())
    }

    fn file(size: u64) -> OwnedFd {
        let file = memfd_create("memory-test", MemfdFlags::CLOEXEC).unwrap();
        ftruncate(&file, size).unwrap();
        file
    }

    fn spec(guest: u64, size: u64, user: u64, file_offset: u64) -> RegionSpec {
        RegionSpec { guest, size, user, file_offset }
    }

    #[test]
    fn addresses_translate_and_cross_adjacent_regions() {
        let shared = file(5 * PAGE);
        let table = vec![
            (spec(PAGE, 3 * PAGE, 0x70_0000, 2 * PAGE), shared.try_clone().unwrap()),
            (spec(0, PAGE, 0x80_0000, 100), shared),
        ];
        let memory = Arc::new(GuestMemory::from_table(table, &event()).unwrap());
        assert!(memory.at_user(0x70_0000, 3 * PAGE).is_some());
        assert!(memory.at_user(0x70_0000, 3 * PAGE + 1).is_none());
        assert!(memory.at_user(0x70_0000 + 3 * PAGE, 1).is_none());
        let translator = Translator::new(memory);
        let mut pieces = Vec::new();
        assert!(translator.pieces(PAGE - 10, 30, |_, len| pieces.push(len)));
        assert_eq!(pieces, [10, 20]);
        assert!(translator.contiguous(PAGE - 10, 30).is_none());
        assert!(!translator.pieces(4 * PAGE - 1, 2, |_, _| {}));
        assert!(!translator.pieces(u64::MAX, 2, |_, _| {}));
    }

    #[test]
    fn memory_that_others_serve_is_refused() {
        let (tmpfs, fuse, nfs) = (0x0102_1994, 0x6573_5546, 0x6969);
        assert_eq!(granule_on(tmpfs, PAGE), Some(PAGE));
        assert_eq!(granule_on(HUGETLBFS, 2 << 20), Some(2 << 20));
        assert_eq!((granule_on(fuse, PAGE), granule_on(nfs, 1 << 20)), (None, None));
    }

    #[test]
    fn bad_tables_are_refused() {
        let memory = GuestMemory::from_table(vec![(spec(0, PAGE, 0, 0), file(PAGE))], &event()).unwrap();
        let add = |spec, size| memory.with_region(spec, file(size), &event()).err();
        assert!(matches!(add(spec(PAGE - 1, PAGE, 0x9000, 0), PAGE), Some(MemoryError::Overlap { .. })));
        assert!(matches!(add(spec(PAGE, PAGE, PAGE - 1, 0), PAGE), Some(MemoryError::Overlap { .. })));
        assert!(matches!(add(spec(PAGE, PAGE, PAGE, 1), PAGE), Some(MemoryError::FileTooShort { .. })));
        let missing = memory.without_region(spec(0, PAGE, 1, 0)).err();
        assert!(matches!(missing, Some(MemoryError::Unknown { .. })));
        assert!(memory.without_region(spec(0, PAGE, 0, 77)).unwrap().is_empty());
    }

    #[test]
    fn a_truncated_file_reads_as_zeroes_and_is_flagged() {
        let event = event();
        let shared = file(4 * PAGE);
        let table = vec![(spec(0, 4 * PAGE, 0, 0), shared.try_clone().unwrap())];
        let memory = GuestMemory::from_table(table, &event).unwrap();
        let start = memory.at_user(0, 4 * PAGE).unwrap();
        // SAFETY: both addresses lie in the region just mapped; the second faults and is repaired by the handler.
        let read = unsafe {
            start.write_volatile(7);
            start.wrapping_add(2 * PAGE as usize).write_volatile(9);
            ftruncate(&shared, PAGE).unwrap();
            [start.read_volatile(), start.wrapping_add(2 * PAGE as usize).read_volatile()]
        };
        assert_eq!(read, [7, 0]);
        assert!(memory.is_broken());
        let mut count = [0; 8];
        assert_eq!(rustix::io::read(&event, &mut count), Ok(8));
    }
}
