//! The images of a Ceph pool as a whole: listed, made, cloned, renamed and removed by name.

use std::ffi::{CStr, CString, c_int};
use std::io;
use std::ptr;

use super::cluster::IoContext;
use super::library::{
    FEATURE_EXCLUSIVE_LOCK, IMAGE_OPTION_CLONE_FORMAT, IMAGE_OPTION_FEATURES_SET, ImageSpec, Library, RawIoContext, RawOptions,
};

/// All names, in no order.
pub(super) fn list(context: &IoContext) -> io::Result<Vec<String>> {
    let mut room = 256;
    loop {
        let mut list: Vec<ImageSpec> = Vec::with_capacity(room);
        let mut count = room;
        // SAFETY: the context is open; the array is writable for the length given.
        let listed = context.call(|library, raw| unsafe { (library.rbd_list2)(raw, list.as_mut_ptr(), &mut count) });
        match listed {
            Err(error) if error.raw_os_error() == Some(libc::ERANGE) && count > room => {
                room = count;
                continue;
            }
            Err(error) if error.raw_os_error() == Some(libc::ENOENT) => return Ok(Vec::new()),
            other => other?,
        };
        // SAFETY: the call filled `count` entries with terminated strings, which the clean-up frees once they are copied.
        unsafe {
            list.set_len(count);
            let names = list.iter().map(|spec| CStr::from_ptr(spec.name).to_string_lossy().into_owned()).collect();
            (context.library().rbd_image_spec_list_cleanup)(list.as_mut_ptr(), count);
            return Ok(names);
        }
    }
}

/// `size` in bytes.
pub(super) fn create(context: &IoContext, image: &str, size: u64) -> io::Result<()> {
    let name = CString::new(image)?;
    with_options(context, &[], |library, raw, options| {
        // SAFETY: the context is open; the string and the options live through the call.
        unsafe { (library.rbd_create4)(raw, name.as_ptr(), size, options) }
    })
}

/// A copy of a snapshot that shares its data.
pub(super) fn clone(context: &IoContext, image: &str, snapshot: &str, to: &str) -> io::Result<()> {
    let (image, snapshot, to) = (CString::new(image)?, CString::new(snapshot)?, CString::new(to)?);
    // Format 2 needs no protected snapshot, and the snapshot can be removed while the clone lives.
    with_options(context, &[(IMAGE_OPTION_CLONE_FORMAT, 2)], |library, raw, options| {
        // SAFETY: the context is open; the strings and the options live through the call.
        unsafe { (library.rbd_clone3)(raw, image.as_ptr(), snapshot.as_ptr(), raw, to.as_ptr(), options) }
    })
}

/// Makes an image with the cluster's default features, lockable in any case, and with further options.
fn with_options(
    context: &IoContext,
    further: &[(c_int, u64)],
    make: impl FnOnce(&'static Library, RawIoContext, RawOptions) -> c_int,
) -> io::Result<()> {
    let made = context.call(|library, raw| {
        let mut options = ptr::null_mut();
        // SAFETY: the call stores new options at the address given.
        unsafe { (library.rbd_image_options_create)(&mut options) };
        let set = |code: c_int, &(option, value): &(c_int, u64)| match code {
            // SAFETY: the options were made above and are not yet freed.
            0.. => unsafe { (library.rbd_image_options_set_uint64)(options, option, value) },
            refused => refused,
        };
        let lockable = (IMAGE_OPTION_FEATURES_SET, FEATURE_EXCLUSIVE_LOCK);
        let code = match further.iter().fold(set(0, &lockable), set) {
            0.. => make(library, raw, options),
            refused => refused,
        };
        // SAFETY: the options were made above, and this is their last use.
        unsafe { (library.rbd_image_options_destroy)(options) };
        code
    });
    made.map(drop)
}

pub(super) fn rename(context: &IoContext, image: &str, to: &str) -> io::Result<()> {
    let (image, to) = (CString::new(image)?, CString::new(to)?);
    // SAFETY: the context is open; both strings live through the call.
    context.call(|library, raw| unsafe { (library.rbd_rename)(raw, image.as_ptr(), to.as_ptr()) }).map(drop)
}

/// Removes it with its data. EBUSY while a client has it open, ENOTEMPTY while it has snapshots.
pub(super) fn remove(context: &IoContext, image: &str) -> io::Result<()> {
    let name = CString::new(image)?;
    // SAFETY: the context is open; the string lives through the call.
    context.call(|library, raw| unsafe { (library.rbd_remove)(raw, name.as_ptr()) }).map(drop)
}
