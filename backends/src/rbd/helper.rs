//! The thread beside a device for what librbd only does synchronously.

use std::sync::mpsc::{self, Sender};
use std::sync::{Arc, Weak};

use blockdev::{DeviceError, Errno, Extent, ExtentKind};

use super::device::Core;
use super::queue::Operation;

/// The most that one answer describes: 16384 objects of the usual 4 MiB.
const STATUS_MAX: u64 = 64 << 30;

pub(super) enum Job {
    /// The image changed: its size may have.
    Refresh(Weak<Core>),
    /// Fills the operation's extents for a range, and completes it.
    Extents { core: Arc<Core>, offset: u64, len: u64, operation: Arc<Operation> },
}

/// The thread ends when the last sender is gone.
pub(super) fn start(image: String) -> Result<Sender<Job>, DeviceError> {
    let (sender, receiver) = mpsc::channel();
    let run = move || {
        for job in receiver {
            work(job);
        }
    };
    let thread = std::thread::Builder::new().name("rbd-helper".into()).spawn(run);
    thread.map_err(|source| DeviceError::Io { what: format!("image {image}: starting its helper thread"), source })?;
    Ok(sender)
}

fn work(job: Job) {
    match job {
        Job::Refresh(core) => {
            let Some(core) = core.upgrade() else { return };
            if let Err(error) = core.changed() {
                core.health.failed(format!("image {}: asking for its size: {error}", core.image().spec()));
            }
        }
        Job::Extents { core, offset, len, operation } => match extents(&core, offset, len) {
            Ok(extents) => operation.complete_with(extents),
            Err(error) => operation.complete(-Errno::from_io(&error).raw()),
        },
    }
}

/// What the range holds, in whole objects; a prefix of it if it is very long.
fn extents(core: &Core, offset: u64, len: u64) -> std::io::Result<Vec<Extent>> {
    let len = len.min(STATUS_MAX);
    if !core.has_reliable_map()? {
        return Ok(vec![Extent { len, kind: ExtentKind::Data }]);
    }
    let mut extents = Vec::new();
    let mut at = offset;
    let end = offset + len;
    // librbd before Ceph 17 wants its range to start at an object.
    let start = offset / core.object_size() * core.object_size();
    core.image().allocated(None, true, start, end - start, |found, found_len| {
        let (found_start, found_end) = (found.clamp(at, end), (found + found_len).clamp(at, end));
        push(&mut extents, found_start - at, ExtentKind::Hole);
        push(&mut extents, found_end - found_start, ExtentKind::Data);
        at = found_end;
    })?;
    push(&mut extents, end - at, ExtentKind::Hole);
    Ok(extents)
}

fn push(extents: &mut Vec<Extent>, len: u64, kind: ExtentKind) {
    match extents.last_mut() {
        _ if len == 0 => {}
        Some(last) if last.kind == kind => last.len += len,
        _ => extents.push(Extent { len, kind }),
    }
}
