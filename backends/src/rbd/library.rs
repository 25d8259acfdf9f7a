//! librados and librbd, opened when the first RBD pool is, and never closed.
//!
//! The daemon is built without Ceph and starts without it; a host that has an RBD pool needs the packages `librados2` and
//! `librbd1`. Each field of [`Library`] is one C function, named as Ceph names it, with the prototype of Ceph's public headers.
//! Functions newer than Ceph 14 are optional: what needs them is then not offered.

use std::ffi::{c_char, c_int, c_void};
use std::sync::OnceLock;

/// `rados_t`: a connection to a cluster.
pub(super) type RawCluster = *mut c_void;
/// `rados_ioctx_t`: one pool and namespace on a connection.
pub(super) type RawIoContext = *mut c_void;
/// `rbd_image_t`: an open image.
pub(super) type RawImage = *mut c_void;
/// `rbd_completion_t`: one asynchronous operation.
pub(super) type RawCompletion = *mut c_void;
/// `rbd_image_options_t`.
pub(super) type RawOptions = *mut c_void;

/// `rbd_callback_t`.
pub(super) type CompletionCallback = unsafe extern "C" fn(RawCompletion, *mut c_void);
/// `rbd_update_callback_t`.
pub(super) type UpdateCallback = unsafe extern "C" fn(*mut c_void);
/// The callback of `rbd_diff_iterate2`: offset, length, whether it exists.
pub(super) type DiffCallback = unsafe extern "C" fn(u64, usize, c_int, *mut c_void) -> c_int;
/// `librbd_progress_fn_t`: objects done, objects in all. Librbd ignores the answer.
pub(super) type ProgressCallback = unsafe extern "C" fn(u64, u64, *mut c_void) -> c_int;

pub(super) const LOCK_MODE_EXCLUSIVE: c_int = 0;
pub(super) const WRITE_ZEROES_FLAG_THICK_PROVISION: c_int = 1;
pub(super) const FEATURE_EXCLUSIVE_LOCK: u64 = 1 << 2;
pub(super) const FEATURE_FAST_DIFF: u64 = 1 << 4;
pub(super) const FLAG_FAST_DIFF_INVALID: u64 = 1 << 1;
pub(super) const SNAPSHOT_NAMESPACE_USER: c_int = 0;
pub(super) const IMAGE_OPTION_FEATURES_SET: c_int = 8;
pub(super) const IMAGE_OPTION_CLONE_FORMAT: c_int = 12;

/// `rados_cluster_stat_t`.
#[repr(C)]
#[derive(Default)]
pub(super) struct ClusterStat {
    pub kib: u64,
    pub kib_used: u64,
    pub kib_available: u64,
    pub objects: u64,
}

/// `rbd_image_info_t`.
#[repr(C)]
pub(super) struct ImageInfo {
    pub size: u64,
    pub object_size: u64,
    pub objects: u64,
    pub order: c_int,
    pub block_name_prefix: [c_char; 24],
    pub parent_pool: i64,
    pub parent_name: [c_char; 96],
}

/// `rbd_snap_info_t`.
#[repr(C)]
pub(super) struct SnapshotInfo {
    pub id: u64,
    pub size: u64,
    pub name: *const c_char,
}

/// `rbd_image_watcher_t`.
#[repr(C)]
pub(super) struct Watcher {
    pub address: *mut c_char,
    pub id: i64,
    pub cookie: u64,
}

/// `rbd_image_spec_t`.
#[repr(C)]
pub(super) struct ImageSpec {
    pub id: *mut c_char,
    pub name: *mut c_char,
}

/// `rbd_linked_image_spec_t`.
#[repr(C)]
pub(super) struct LinkedImage {
    pub pool_id: i64,
    pub pool_name: *mut c_char,
    pub pool_namespace: *mut c_char,
    pub image_id: *mut c_char,
    pub image_name: *mut c_char,
    pub trash: bool,
}

/// `rbd_snap_spec_t`.
#[repr(C)]
pub(super) struct SnapshotSpec {
    pub id: u64,
    pub namespace: c_int,
    pub name: *mut c_char,
}

macro_rules! functions {
    (
        required { $($name:ident in $library:ident: ($($argument:ty),*) $(-> $value:ty)?;)* }
        optional { $($newer:ident in $newer_library:ident: ($($newer_argument:ty),*) $(-> $newer_value:ty)?;)* }
    ) => {
        /// The C functions. They stay valid for ever: the libraries are never closed.
        pub(super) struct Library {
            $(pub(super) $name: unsafe extern "C" fn($($argument),*) $(-> $value)?,)*
            $(pub(super) $newer: Option<unsafe extern "C" fn($($newer_argument),*) $(-> $newer_value)?>,)*
        }

        impl Library {
            fn load() -> Result<Library, String> {
                let opened = Opened::open()?;
                Ok(Library {
                    $($name: {
                        // SAFETY: the type is that of the function's prototype in Ceph's headers, which Ceph keeps stable
                        // within one soname.
                        let symbol = unsafe { opened.$library.get(concat!(stringify!($name), "\0")) };
                        *symbol.map_err(|error| too_old(stringify!($name), &error))?
                    },)*
                    $($newer: {
                        // SAFETY: as above.
                        let symbol = unsafe { opened.$newer_library.get(concat!(stringify!($newer), "\0")) };
                        symbol.ok().map(|function| *function)
                    },)*
                })
            }
        }
    };
}

functions! {
    required {
        rados_version in rados: (*mut c_int, *mut c_int, *mut c_int);
        rados_create2 in rados: (*mut RawCluster, *const c_char, *const c_char, u64) -> c_int;
        rados_conf_read_file in rados: (RawCluster, *const c_char) -> c_int;
        rados_conf_set in rados: (RawCluster, *const c_char, *const c_char) -> c_int;
        rados_connect in rados: (RawCluster) -> c_int;
        rados_shutdown in rados: (RawCluster);
        rados_cluster_stat in rados: (RawCluster, *mut ClusterStat) -> c_int;
        rados_cluster_fsid in rados: (RawCluster, *mut c_char, usize) -> c_int;
        rados_ioctx_create in rados: (RawCluster, *const c_char, *mut RawIoContext) -> c_int;
        rados_ioctx_destroy in rados: (RawIoContext);
        rados_ioctx_set_namespace in rados: (RawIoContext, *const c_char);
        rados_ioctx_get_id in rados: (RawIoContext) -> i64;

        rbd_version in rbd: (*mut c_int, *mut c_int, *mut c_int);
        rbd_list2 in rbd: (RawIoContext, *mut ImageSpec, *mut usize) -> c_int;
        rbd_image_spec_list_cleanup in rbd: (*mut ImageSpec, usize);
        rbd_image_options_create in rbd: (*mut RawOptions);
        rbd_image_options_destroy in rbd: (RawOptions);
        rbd_image_options_set_uint64 in rbd: (RawOptions, c_int, u64) -> c_int;
        rbd_create4 in rbd: (RawIoContext, *const c_char, u64, RawOptions) -> c_int;
        rbd_clone3 in rbd: (RawIoContext, *const c_char, *const c_char, RawIoContext, *const c_char, RawOptions) -> c_int;
        rbd_remove in rbd: (RawIoContext, *const c_char) -> c_int;
        rbd_rename in rbd: (RawIoContext, *const c_char, *const c_char) -> c_int;
        rbd_open in rbd: (RawIoContext, *const c_char, *mut RawImage, *const c_char) -> c_int;
        rbd_open_read_only in rbd: (RawIoContext, *const c_char, *mut RawImage, *const c_char) -> c_int;
        rbd_close in rbd: (RawImage) -> c_int;
        rbd_stat in rbd: (RawImage, *mut ImageInfo, usize) -> c_int;
        rbd_get_size in rbd: (RawImage, *mut u64) -> c_int;
        rbd_get_id in rbd: (RawImage, *mut c_char, usize) -> c_int;
        rbd_get_features in rbd: (RawImage, *mut u64) -> c_int;
        rbd_get_flags in rbd: (RawImage, *mut u64) -> c_int;
        rbd_get_overlap in rbd: (RawImage, *mut u64) -> c_int;
        rbd_get_stripe_count in rbd: (RawImage, *mut u64) -> c_int;
        rbd_get_parent in rbd: (RawImage, *mut LinkedImage, *mut SnapshotSpec) -> c_int;
        rbd_linked_image_spec_cleanup in rbd: (*mut LinkedImage);
        rbd_snap_spec_cleanup in rbd: (*mut SnapshotSpec);
        rbd_flatten_with_progress in rbd: (RawImage, ProgressCallback, *mut c_void) -> c_int;
        rbd_resize in rbd: (RawImage, u64) -> c_int;
        rbd_metadata_get in rbd: (RawImage, *const c_char, *mut c_char, *mut usize) -> c_int;
        rbd_metadata_set in rbd: (RawImage, *const c_char, *const c_char) -> c_int;
        rbd_lock_acquire in rbd: (RawImage, c_int) -> c_int;
        rbd_lock_get_owners in rbd: (RawImage, *mut c_int, *mut *mut c_char, *mut usize) -> c_int;
        rbd_lock_get_owners_cleanup in rbd: (*mut *mut c_char, usize);
        rbd_lock_break in rbd: (RawImage, c_int, *const c_char) -> c_int;
        rbd_watchers_list in rbd: (RawImage, *mut Watcher, *mut usize) -> c_int;
        rbd_watchers_list_cleanup in rbd: (*mut Watcher, usize);
        rbd_update_watch in rbd: (RawImage, *mut u64, UpdateCallback, *mut c_void) -> c_int;
        rbd_update_unwatch in rbd: (RawImage, u64) -> c_int;
        rbd_snap_list in rbd: (RawImage, *mut SnapshotInfo, *mut c_int) -> c_int;
        rbd_snap_list_end in rbd: (*mut SnapshotInfo);
        rbd_snap_create in rbd: (RawImage, *const c_char) -> c_int;
        rbd_snap_remove in rbd: (RawImage, *const c_char) -> c_int;
        rbd_snap_rollback in rbd: (RawImage, *const c_char) -> c_int;
        rbd_snap_get_namespace_type in rbd: (RawImage, u64, *mut c_int) -> c_int;
        rbd_snap_get_timestamp in rbd: (RawImage, u64, *mut libc::timespec) -> c_int;
        rbd_diff_iterate2 in rbd: (RawImage, *const c_char, u64, u64, u8, u8, DiffCallback, *mut c_void) -> c_int;
        rbd_aio_create_completion in rbd: (*mut c_void, CompletionCallback, *mut RawCompletion) -> c_int;
        rbd_aio_get_return_value in rbd: (RawCompletion) -> isize;
        rbd_aio_release in rbd: (RawCompletion);
        rbd_aio_readv in rbd: (RawImage, *const libc::iovec, c_int, u64, RawCompletion) -> c_int;
        rbd_aio_writev in rbd: (RawImage, *const libc::iovec, c_int, u64, RawCompletion) -> c_int;
        rbd_aio_flush in rbd: (RawImage, RawCompletion) -> c_int;
    }
    optional {
        rbd_aio_write_zeroes in rbd: (RawImage, u64, usize, RawCompletion, c_int, c_int) -> c_int;
        rbd_pool_metadata_get in rbd: (RawIoContext, *const c_char, *mut c_char, *mut usize) -> c_int;
        rbd_pool_metadata_set in rbd: (RawIoContext, *const c_char, *const c_char) -> c_int;
        rbd_pool_metadata_remove in rbd: (RawIoContext, *const c_char) -> c_int;
        rbd_pool_metadata_list in rbd: (RawIoContext, *const c_char, u64, *mut c_char, *mut usize, *mut c_char, *mut usize) -> c_int;
    }
}

impl Library {
    /// The libraries, or in words what is missing. A failed attempt is made again next time: the package may have come meanwhile.
    pub(super) fn get() -> Result<&'static Library, String> {
        static LOADED: OnceLock<Library> = OnceLock::new();
        if let Some(library) = LOADED.get() {
            return Ok(library);
        }
        let library = Library::load()?;
        Ok(LOADED.get_or_init(|| library))
    }

    /// Versions of librados and librbd, for people.
    pub(super) fn versions(&self) -> String {
        let version = |function: unsafe extern "C" fn(*mut c_int, *mut c_int, *mut c_int)| {
            let (mut major, mut minor, mut extra) = (0, 0, 0);
            // SAFETY: the function stores three integers at the addresses given.
            unsafe { function(&mut major, &mut minor, &mut extra) };
            format!("{major}.{minor}.{extra}")
        };
        format!("librados {}, librbd {}", version(self.rados_version), version(self.rbd_version))
    }
}

struct Opened {
    rados: &'static libloading::Library,
    rbd: &'static libloading::Library,
}

impl Opened {
    fn open() -> Result<Opened, String> {
        Ok(Opened { rados: open("librados.so.2", "librados2")?, rbd: open("librbd.so.1", "librbd1")? })
    }
}

/// Opens a library for the life of the process.
fn open(file: &str, package: &str) -> Result<&'static libloading::Library, String> {
    // SAFETY: loading runs the library's initialisers; librados and librbd have none that touch this process's own state.
    let library = unsafe { libloading::Library::new(file) };
    match library {
        Ok(library) => Ok(Box::leak(Box::new(library))),
        Err(error) => Err(format!("{file} cannot be opened ({error}): RBD pools need it; install the package {package}")),
    }
}

fn too_old(name: &str, error: &libloading::Error) -> String {
    format!("Ceph's client libraries lack {name} ({error}): install librados2 and librbd1 of Ceph 14 or newer")
}

/// What of Ceph's libraries is on this host, or in words what is missing; for `doctor`.
pub fn probe() -> Result<String, String> {
    Library::get().map(Library::versions)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_missing_library_names_its_package() {
        let why = open("libthere-is-no-such.so.9", "librbd1").err().unwrap();
        assert!(why.contains("libthere-is-no-such.so.9") && why.contains("install the package librbd1"), "{why}");
    }
}
