//! Sizes that somebody else changed, such as those of Ceph images: taken over by open volumes, and so told to front ends.
//!
//! ```text
//!   driver ─ hears of it, must not wait ─▶ a thread of its own ─ holds the name ─▶ Volume::refresh_size ─▶ watchers
//! ```

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use super::Daemon;
use crate::names::VolumeId;
use crate::units::format_size;

impl Daemon {
    /// What a device is to call when its size was changed elsewhere.
    pub(super) fn hears_of_size(&self, id: &VolumeId) -> Box<dyn Fn() + Send + Sync> {
        let (this, id, waiting) = (self.this.clone(), id.clone(), Arc::new(AtomicBool::new(false)));
        Box::new(move || {
            if waiting.swap(true, Ordering::SeqCst) {
                return;
            }
            let (this, id, is_waiting) = (this.clone(), id.clone(), waiting.clone());
            let take_over = move || {
                if let Some(daemon) = this.upgrade() {
                    daemon.take_over_size(&id, &is_waiting);
                }
            };
            if let Err(error) = std::thread::Builder::new().name("size".into()).spawn(take_over) {
                waiting.store(false, Ordering::SeqCst);
                tracing::error!("a size changed elsewhere is not taken over until the next change: no thread: {error}");
            }
        })
    }

    /// `waiting` is true until the size is asked for: a change before that needs no other call.
    fn take_over_size(&self, id: &VolumeId, waiting: &AtomicBool) {
        let _held = self.hold([id]);
        waiting.store(false, Ordering::SeqCst);
        let Some(volume) = self.open.get(id) else { return };
        let before = volume.size();
        match volume.refresh_size() {
            Ok(size) if size != before => {
                tracing::info!("volume {id}: resized elsewhere, from {} to {}", format_size(before), format_size(size));
            }
            Ok(_) => {}
            Err(error) => tracing::error!("volume {id}: resized elsewhere, but its size is not known: {error}"),
        }
    }
}
