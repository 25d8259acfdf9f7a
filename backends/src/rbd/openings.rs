//! The devices that a pool has open, and those still on their way out.
//!
//! Closing an image takes round trips to the cluster, and the last owner of a device may be a data-plane thread: so images are
//! closed by threads of their own, and whoever wants the same image again waits for that here.

use std::sync::{Arc, Weak};
use std::time::Duration;

use blockdev::DeviceError;
use parking_lot::{Condvar, Mutex};

use super::device::Core;

/// The longest anybody waits for an image to close.
const CLOSING_MAX: Duration = Duration::from_secs(30);

#[derive(Default)]
pub(super) struct Openings {
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Default)]
struct State {
    next: u64,
    entries: Vec<Entry>,
}

struct Entry {
    id: u64,
    image: String,
    writable: bool,
    stage: Stage,
}

enum Stage {
    Opening,
    /// Closing, once the device is gone.
    Open(Weak<Core>),
}

/// One entry; dropping it, after the image was closed, removes the entry.
pub(super) struct Ticket {
    openings: Arc<Openings>,
    id: u64,
}

impl Openings {
    /// Announces that `image` will be opened. Waits for its last writer to close it; refused while that one is open.
    pub(super) fn begin(self: &Arc<Self>, image: &str, writable: bool) -> Result<Ticket, DeviceError> {
        let mut state = self.state.lock();
        while let Some(writer) = state.entries.iter().find(|entry| writable && entry.writable && entry.image == image) {
            if writer.is_alive() {
                return Err(DeviceError::Refused(format!("image {image} is already open for writing; close it first")));
            }
            if self.changed.wait_for(&mut state, CLOSING_MAX).timed_out() {
                return Err(DeviceError::Refused(format!(
                    "image {image} is still being closed; see whether the cluster answers"
                )));
            }
        }
        state.next += 1;
        let id = state.next;
        state.entries.push(Entry { id, image: image.to_owned(), writable, stage: Stage::Opening });
        Ok(Ticket { openings: self.clone(), id })
    }

    /// The device that has `image` open for writing.
    pub(super) fn writer(&self, image: &str) -> Option<Arc<Core>> {
        let state = self.state.lock();
        state.entries.iter().filter(|entry| entry.writable && entry.image == image).find_map(|entry| match &entry.stage {
            Stage::Open(core) => core.upgrade(),
            Stage::Opening => None,
        })
    }

    /// True while `image` is open, for writing or reading.
    pub(super) fn is_open(&self, image: &str) -> bool {
        self.state.lock().entries.iter().any(|entry| entry.image == image && entry.is_alive())
    }

    pub(super) fn rename(&self, image: &str, to: &str) {
        for entry in self.state.lock().entries.iter_mut().filter(|entry| entry.image == image) {
            to.clone_into(&mut entry.image);
        }
    }

    /// Waits until what is closing has closed.
    pub(super) fn wait_for_closing(&self, image: Option<&str>) {
        let mut state = self.state.lock();
        let closing = |entry: &Entry| !entry.is_alive() && image.is_none_or(|image| entry.image == image);
        while state.entries.iter().any(closing) {
            if self.changed.wait_for(&mut state, CLOSING_MAX).timed_out() {
                return;
            }
        }
    }
}

impl Entry {
    fn is_alive(&self) -> bool {
        match &self.stage {
            Stage::Opening => true,
            Stage::Open(core) => core.strong_count() > 0,
        }
    }
}

impl Ticket {
    pub(super) fn opened(&self, core: &Weak<Core>) {
        let mut state = self.openings.state.lock();
        if let Some(entry) = state.entries.iter_mut().find(|entry| entry.id == self.id) {
            entry.stage = Stage::Open(core.clone());
        }
    }
}

impl Drop for Ticket {
    fn drop(&mut self) {
        self.openings.state.lock().entries.retain(|entry| entry.id != self.id);
        self.openings.changed.notify_all();
    }
}
