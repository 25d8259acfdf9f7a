//! An open image: librbd's calls with owned arguments and answers, everything but requests.

use std::ffi::{CStr, CString, c_char, c_int, c_void};
use std::io;
use std::mem;
use std::ptr;
use std::sync::Arc;
use std::time::Duration;

use parking_lot::Mutex;

use super::cluster::IoContext;
use super::library::{ImageInfo, LOCK_MODE_EXCLUSIVE, Library, RawImage, SNAPSHOT_NAMESPACE_USER, SnapshotInfo, Watcher};
use super::{result_of, text_of};

const METADATA_MAX: usize = 64 << 10;

/// How an image is opened.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Access {
    /// As a client that may write and hears of changes.
    Watching,
    /// For a look: no watch, so it hears of nothing and keeps nobody from removing the image.
    Glance,
}

pub(super) struct Image {
    raw: RawImage,
    context: Arc<IoContext>,
    name: String,
    watch: Mutex<Option<Watch>>,
}

/// A snapshot as librbd lists it.
pub(super) struct Snapshot {
    pub name: String,
    pub size: u64,
    /// Since 1970.
    pub created: Duration,
}

type OnUpdate = Box<dyn Fn() + Send + Sync>;

struct Watch {
    handle: u64,
    on_update: *mut OnUpdate,
}

// SAFETY: librbd serialises access to an image itself; it may be used from any thread. The watch's pointer is freed only in `drop`.
unsafe impl Send for Image {}
// SAFETY: as above.
unsafe impl Sync for Image {}

fn c_string(text: &str) -> io::Result<CString> {
    CString::new(text).map_err(|_| io::Error::from_raw_os_error(libc::EINVAL))
}

impl Image {
    pub(super) fn open(context: &Arc<IoContext>, name: &str, snapshot: Option<&str>, access: Access) -> io::Result<Image> {
        let library = context.library();
        let name_text = c_string(name)?;
        let snapshot = snapshot.map(c_string).transpose()?;
        let snapshot = snapshot.as_ref().map_or(ptr::null(), |text| text.as_ptr());
        let open = match access {
            Access::Watching => library.rbd_open,
            Access::Glance => library.rbd_open_read_only,
        };
        let mut raw = ptr::null_mut();
        // SAFETY: the strings live through the call, which stores a handle in `raw`.
        result_of(unsafe { open(context.raw(), name_text.as_ptr(), &mut raw, snapshot) })?;
        Ok(Image { raw, context: context.clone(), name: name.to_owned(), watch: Mutex::new(None) })
    }

    pub(super) fn raw(&self) -> RawImage {
        self.raw
    }

    pub(super) fn library(&self) -> &'static Library {
        self.context.library()
    }

    pub(super) fn context(&self) -> &Arc<IoContext> {
        &self.context
    }

    /// `POOL/IMAGE` or `POOL/NAMESPACE/IMAGE`, as Ceph's tools take it.
    pub(super) fn spec(&self) -> String {
        format!("{}/{}", self.context.location(), self.name)
    }

    /// In bytes.
    pub(super) fn size(&self) -> io::Result<u64> {
        self.number(self.library().rbd_get_size)
    }

    pub(super) fn features(&self) -> io::Result<u64> {
        self.number(self.library().rbd_get_features)
    }

    pub(super) fn flags(&self) -> io::Result<u64> {
        self.number(self.library().rbd_get_flags)
    }

    /// How many bytes, from the start, may come from a parent image.
    pub(super) fn overlap(&self) -> io::Result<u64> {
        self.number(self.library().rbd_get_overlap)
    }

    pub(super) fn stripe_count(&self) -> io::Result<u64> {
        self.number(self.library().rbd_get_stripe_count)
    }

    fn number(&self, ask: unsafe extern "C" fn(RawImage, *mut u64) -> c_int) -> io::Result<u64> {
        let mut number = 0;
        // SAFETY: the image is open; the call stores one integer at the address given.
        result_of(unsafe { ask(self.raw, &mut number) })?;
        Ok(number)
    }

    /// Bytes of the objects it is cut into.
    pub(super) fn object_size(&self) -> io::Result<u64> {
        let mut info = mem::MaybeUninit::<ImageInfo>::zeroed();
        // SAFETY: the structure is the one the call fills, its length is given, and all zeroes is a valid value of it.
        let info = unsafe {
            result_of((self.library().rbd_stat)(self.raw, info.as_mut_ptr(), size_of::<ImageInfo>()))?;
            info.assume_init()
        };
        Ok(info.object_size)
    }

    /// Ceph's own name for the image, which renaming does not change.
    pub(super) fn id(&self) -> io::Result<String> {
        let mut buffer = [0 as c_char; 128];
        // SAFETY: the buffer is writable for the length given.
        result_of(unsafe { (self.library().rbd_get_id)(self.raw, buffer.as_mut_ptr(), buffer.len()) })?;
        Ok(text_of(&buffer))
    }

    pub(super) fn resize(&self, size: u64) -> io::Result<()> {
        // SAFETY: the image is open.
        result_of(unsafe { (self.library().rbd_resize)(self.raw, size) })
    }

    /// True if it is a clone that still needs its parent.
    pub(super) fn has_parent(&self) -> io::Result<bool> {
        let (mut parent, mut snapshot) = (mem::MaybeUninit::zeroed(), mem::MaybeUninit::zeroed());
        // SAFETY: the structures are those the call fills, with strings of its own where it succeeds.
        match result_of(unsafe { (self.library().rbd_get_parent)(self.raw, parent.as_mut_ptr(), snapshot.as_mut_ptr()) }) {
            Ok(()) => {}
            Err(error) if error.raw_os_error() == Some(libc::ENOENT) => return Ok(false),
            Err(error) => return Err(error),
        }
        // SAFETY: the call has filled both, and nobody uses their strings.
        unsafe {
            (self.library().rbd_linked_image_spec_cleanup)(parent.as_mut_ptr());
            (self.library().rbd_snap_spec_cleanup)(snapshot.as_mut_ptr());
        }
        Ok(true)
    }

    /// Copies what comes from its parent, and parts from it. `progress`: objects done, objects in all; called on threads of librbd.
    pub(super) fn flatten(&self, progress: impl Fn(u64, u64) + Sync) -> io::Result<()> {
        unsafe extern "C" fn step<P: Fn(u64, u64) + Sync>(done: u64, total: u64, argument: *mut c_void) -> c_int {
            // SAFETY: `argument` is the closure below, which is shared during the call and may be used by several threads.
            let progress = unsafe { &*argument.cast::<P>() };
            progress(done, total);
            0
        }
        fn callback_of<P: Fn(u64, u64) + Sync>(_: &P) -> super::library::ProgressCallback {
            step::<P>
        }
        let callback = callback_of(&progress);
        let argument = ptr::from_ref(&progress).cast_mut().cast();
        // SAFETY: the closure lives through the call, after which librbd knows it no more.
        result_of(unsafe { (self.library().rbd_flatten_with_progress)(self.raw, callback, argument) })
    }

    /// The value stored with the image under `key`.
    pub(super) fn metadata(&self, key: &str) -> io::Result<Option<String>> {
        let key = c_string(key)?;
        let mut buffer: Vec<c_char> = vec![0; METADATA_MAX];
        let mut len = buffer.len();
        // SAFETY: the key lives through the call; the buffer is writable for the length given.
        let code = unsafe { (self.library().rbd_metadata_get)(self.raw, key.as_ptr(), buffer.as_mut_ptr(), &mut len) };
        match result_of(code) {
            Ok(()) => Ok(Some(text_of(&buffer))),
            Err(error) if error.raw_os_error() == Some(libc::ENOENT) => Ok(None),
            Err(error) => Err(error),
        }
    }

    pub(super) fn set_metadata(&self, key: &str, value: &str) -> io::Result<()> {
        let (key, value) = (c_string(key)?, c_string(value)?);
        // SAFETY: both strings live through the call.
        result_of(unsafe { (self.library().rbd_metadata_set)(self.raw, key.as_ptr(), value.as_ptr()) })
    }

    /// Calls `on_update` on a thread of librbd whenever the image's size or snapshots change, until the image is closed. It must
    /// not call librbd.
    pub(super) fn watch(&self, on_update: impl Fn() + Send + Sync + 'static) -> io::Result<()> {
        unsafe extern "C" fn updated(argument: *mut c_void) {
            // SAFETY: `argument` is the pointer registered below; it is freed only after the watch has ended.
            let on_update = unsafe { &*argument.cast::<OnUpdate>() };
            on_update();
        }
        let mut watch = self.watch.lock();
        debug_assert!(watch.is_none(), "an image is watched once");
        let on_update: *mut OnUpdate = Box::into_raw(Box::new(Box::new(on_update)));
        let mut handle = 0;
        // SAFETY: `on_update` stays valid until the watch is ended in `drop`.
        let code = unsafe { (self.library().rbd_update_watch)(self.raw, &mut handle, updated, on_update.cast()) };
        if let Err(error) = result_of(code) {
            // SAFETY: the registration failed, so librbd does not know the pointer.
            drop(unsafe { Box::from_raw(on_update) });
            return Err(error);
        }
        *watch = Some(Watch { handle, on_update });
        Ok(())
    }

    /// The address of the client that holds the exclusive lock.
    pub(super) fn lock_owner(&self) -> io::Result<Option<String>> {
        let mut mode = 0;
        let mut owners = [ptr::null_mut::<c_char>(); 8];
        let mut count = owners.len();
        // SAFETY: the arrays are writable for the lengths given; the call stores strings of its own, freed below.
        let code = unsafe { (self.library().rbd_lock_get_owners)(self.raw, &mut mode, owners.as_mut_ptr(), &mut count) };
        match result_of(code) {
            Ok(()) => {}
            Err(error) if error.raw_os_error() == Some(libc::ENOENT) => return Ok(None),
            Err(error) => return Err(error),
        }
        // SAFETY: the call stored `count` strings, terminated by zero.
        let owner = (count > 0).then(|| unsafe { CStr::from_ptr(owners[0]) }.to_string_lossy().into_owned());
        // SAFETY: the strings are those the call stored, and nobody uses them any more.
        unsafe { (self.library().rbd_lock_get_owners_cleanup)(owners.as_mut_ptr(), count) };
        Ok(owner)
    }

    /// Takes the exclusive lock and keeps it until the image is closed: EROFS if another client has it.
    pub(super) fn lock(&self) -> io::Result<()> {
        // SAFETY: the image is open.
        result_of(unsafe { (self.library().rbd_lock_acquire)(self.raw, LOCK_MODE_EXCLUSIVE) })
    }

    /// Fences the client at `owner` (no write of it can land any more) and takes its lock away. EBUSY: somebody else has it now.
    pub(super) fn break_lock(&self, owner: &str) -> io::Result<()> {
        let owner = c_string(owner)?;
        // SAFETY: the string lives through the call.
        result_of(unsafe { (self.library().rbd_lock_break)(self.raw, LOCK_MODE_EXCLUSIVE, owner.as_ptr()) })
    }

    /// The addresses of all clients that have the image open and hear of its changes.
    pub(super) fn watchers(&self) -> io::Result<Vec<String>> {
        let mut room = 32;
        loop {
            let mut list: Vec<Watcher> = Vec::with_capacity(room);
            let mut count = room;
            // SAFETY: the array is writable for the length given; on success `count` of its entries are filled.
            let code = unsafe { (self.library().rbd_watchers_list)(self.raw, list.as_mut_ptr(), &mut count) };
            if code == -libc::ERANGE && count > room {
                room = count;
                continue;
            }
            result_of(code)?;
            // SAFETY: the call filled `count` entries, each with a terminated string, which the clean-up frees once they are copied.
            unsafe {
                list.set_len(count);
                let addresses = list.iter().map(|watcher| CStr::from_ptr(watcher.address).to_string_lossy().into_owned());
                let addresses = addresses.collect();
                (self.library().rbd_watchers_list_cleanup)(list.as_mut_ptr(), count);
                return Ok(addresses);
            }
        }
    }

    /// Its snapshots, oldest first; those that other tools keep for themselves are not among them.
    pub(super) fn snapshots(&self) -> io::Result<Vec<Snapshot>> {
        let mut room = 64;
        loop {
            let mut list: Vec<SnapshotInfo> = Vec::with_capacity(room as usize + 1);
            let mut count: c_int = room;
            // SAFETY: the array is writable for the length given, and one entry more for the end mark.
            let code = unsafe { (self.library().rbd_snap_list)(self.raw, list.as_mut_ptr(), &mut count) };
            if code == -libc::ERANGE && count > room {
                room = count;
                continue;
            }
            result_of(code)?;
            // SAFETY: the call filled `code` entries and an end mark; the clean-up frees their names once they are copied.
            unsafe {
                list.set_len(code as usize);
                let snapshots = list.iter().filter(|info| self.is_of_a_user(info.id)).map(|info| Snapshot {
                    name: CStr::from_ptr(info.name).to_string_lossy().into_owned(),
                    size: info.size,
                    created: self.snapshot_created(info.id),
                });
                let snapshots = snapshots.collect();
                if code > 0 {
                    (self.library().rbd_snap_list_end)(list.as_mut_ptr());
                }
                return Ok(snapshots);
            }
        }
    }

    /// False for what Ceph keeps for itself: a removed snapshot that clones still need, say.
    fn is_of_a_user(&self, snapshot: u64) -> bool {
        let mut namespace = SNAPSHOT_NAMESPACE_USER;
        // SAFETY: the image is open; the call stores one integer at the address given.
        let code = unsafe { (self.library().rbd_snap_get_namespace_type)(self.raw, snapshot, &mut namespace) };
        code >= 0 && namespace == SNAPSHOT_NAMESPACE_USER
    }

    fn snapshot_created(&self, id: u64) -> Duration {
        let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
        // SAFETY: the call stores one structure at the address given.
        let code = unsafe { (self.library().rbd_snap_get_timestamp)(self.raw, id, &mut time) };
        if code < 0 { Duration::ZERO } else { Duration::from_secs(time.tv_sec.max(0) as u64) }
    }

    pub(super) fn create_snapshot(&self, name: &str) -> io::Result<()> {
        self.with_name(self.library().rbd_snap_create, name)
    }

    pub(super) fn remove_snapshot(&self, name: &str) -> io::Result<()> {
        self.with_name(self.library().rbd_snap_remove, name)
    }

    pub(super) fn roll_back(&self, name: &str) -> io::Result<()> {
        self.with_name(self.library().rbd_snap_rollback, name)
    }

    fn with_name(&self, run: unsafe extern "C" fn(RawImage, *const c_char) -> c_int, name: &str) -> io::Result<()> {
        let name = c_string(name)?;
        // SAFETY: the image is open; the string lives through the call.
        result_of(unsafe { run(self.raw, name.as_ptr()) })
    }

    /// Visits the extents of `offset..offset + len` that differ from the snapshot `since`, or are allocated at all: in the image,
    /// or in its parents too. Whole objects are reported where the image keeps a map of them, which is fast.
    pub(super) fn allocated(
        &self,
        since: Option<&str>,
        parents: bool,
        offset: u64,
        len: u64,
        mut visit: impl FnMut(u64, u64),
    ) -> io::Result<()> {
        unsafe extern "C" fn found<V: FnMut(u64, u64)>(offset: u64, len: usize, exists: c_int, argument: *mut c_void) -> c_int {
            // SAFETY: `argument` is the visitor below, which is used by nobody else during the call.
            let visit = unsafe { &mut *argument.cast::<V>() };
            if exists != 0 {
                visit(offset, len as u64);
            }
            0
        }
        fn callback_of<V: FnMut(u64, u64)>(_: &V) -> super::library::DiffCallback {
            found::<V>
        }
        let callback = callback_of(&visit);
        let since = since.map(c_string).transpose()?;
        let since = since.as_ref().map_or(ptr::null(), |text| text.as_ptr());
        // SAFETY: the string and the visitor live through the call, which calls the visitor for one extent at a time.
        result_of(unsafe {
            let visitor = ptr::from_mut(&mut visit).cast();
            (self.library().rbd_diff_iterate2)(self.raw, since, offset, len, u8::from(parents), 1, callback, visitor)
        })
    }
}

impl Drop for Image {
    fn drop(&mut self) {
        if let Some(watch) = self.watch.get_mut().take() {
            // SAFETY: the watch was registered on this image and not ended before.
            if unsafe { (self.library().rbd_update_unwatch)(self.raw, watch.handle) } >= 0 {
                // SAFETY: ending a watch waits for its running calls, so librbd uses the pointer no more.
                drop(unsafe { Box::from_raw(watch.on_update) });
            }
        }
        // SAFETY: this is the last use of the handle. Requests hold the image, so none is in flight.
        let code = unsafe { (self.library().rbd_close)(self.raw) };
        if code < 0 {
            tracing::warn!("image {}: closing it failed: {}", self.spec(), io::Error::from_raw_os_error(-code));
        }
    }
}
