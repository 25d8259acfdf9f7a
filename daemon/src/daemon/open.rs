//! The volumes that are open: one [`Volume`] each, shared by all its users, closed with the last.

use std::collections::{BTreeMap, HashMap};
use std::sync::{Arc, Weak};
use std::time::Duration;

use blockdev::Volume;
use blockdev::stats::Snapshot;
use parking_lot::Mutex;

use crate::error::{Error, Result};
use crate::names::VolumeId;

/// The data-plane threads let go of a volume a moment after its last user did.
const CLOSE_LIMIT: Duration = Duration::from_secs(15);
const CLOSE_POLL: Duration = Duration::from_millis(2);

#[derive(Default)]
pub struct OpenVolumes {
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    open: HashMap<VolumeId, Open>,
    closing: HashMap<VolumeId, Weak<Volume>>,
    /// What closed volumes did, by pool.
    closed: BTreeMap<String, Snapshot>,
}

struct Open {
    volume: Arc<Volume>,
    users: usize,
}

/// A right to use an open volume; the volume closes with the last one.
pub struct Lease {
    id: VolumeId,
    volume: Option<Arc<Volume>>,
    owner: Arc<OpenVolumes>,
}

impl OpenVolumes {
    /// Shares the open volume, or opens it by `open`. The caller holds the name lock of `id`.
    pub fn lease(self: &Arc<Self>, id: &VolumeId, write: bool, open: impl FnOnce() -> Result<Arc<Volume>>) -> Result<Lease> {
        if let Some(volume) = self.join(id, write)? {
            return Ok(Lease { id: id.clone(), volume: Some(volume), owner: self.clone() });
        }
        self.wait_closed(id)?;
        let volume = open()?;
        if write && volume.is_read_only() {
            return Err(read_only(id));
        }
        self.state.lock().open.insert(id.clone(), Open { volume: volume.clone(), users: 1 });
        Ok(Lease { id: id.clone(), volume: Some(volume), owner: self.clone() })
    }

    fn join(&self, id: &VolumeId, write: bool) -> Result<Option<Arc<Volume>>> {
        let mut state = self.state.lock();
        let Some(open) = state.open.get_mut(id) else { return Ok(None) };
        if write && open.volume.is_read_only() {
            return Err(read_only(id));
        }
        open.users += 1;
        Ok(Some(open.volume.clone()))
    }

    /// Waits until nothing of an already released volume is left.
    pub fn wait_closed(&self, id: &VolumeId) -> Result<()> {
        let deadline = blockdev::clock::monotonic() + CLOSE_LIMIT;
        loop {
            {
                let mut state = self.state.lock();
                match state.closing.get(id) {
                    None => return Ok(()),
                    Some(volume) if volume.strong_count() == 0 => {
                        state.closing.remove(id);
                        return Ok(());
                    }
                    Some(_) => {}
                }
            }
            if blockdev::clock::monotonic() > deadline {
                return Err(Error::in_use(format!("volume {id} is still finishing I/O: try again in a moment")));
            }
            std::thread::sleep(CLOSE_POLL);
        }
    }

    pub fn get(&self, id: &VolumeId) -> Option<Arc<Volume>> {
        self.state.lock().open.get(id).map(|open| open.volume.clone())
    }

    /// What volumes did that are no longer open, by pool.
    pub fn closed_stats(&self) -> BTreeMap<String, Snapshot> {
        self.state.lock().closed.clone()
    }

    pub fn list(&self) -> Vec<(VolumeId, Arc<Volume>)> {
        let state = self.state.lock();
        let mut list: Vec<_> = state.open.iter().map(|(id, open)| (id.clone(), open.volume.clone())).collect();
        list.sort_by(|left, right| left.0.cmp(&right.0));
        list
    }

    /// Refuses while the volume, or with `snapshots` one of its snapshots, is open; then nothing of it is left open.
    pub fn ensure_closed(&self, id: &VolumeId, snapshots: bool, what: &str) -> Result<()> {
        let related = |other: &&VolumeId| **other == *id || (snapshots && other.volume() == *id);
        let in_use = self.state.lock().open.keys().find(related).cloned();
        if let Some(user) = in_use {
            return Err(Error::in_use(format!(
                "volume {id}: {what} refused: {user} is in use, by a job or by an export that is ending: `novastor job list` shows it"
            )));
        }
        let closing: Vec<_> = self.state.lock().closing.keys().filter(related).cloned().collect();
        closing.iter().try_for_each(|id| self.wait_closed(id))
    }
}

fn read_only(id: &VolumeId) -> Error {
    Error::in_use(format!("volume {id} is open read-only: remove its read-only exports first, or export it with --read-only"))
}

impl Lease {
    pub fn volume(&self) -> &Arc<Volume> {
        self.volume.as_ref().expect("taken only by drop")
    }

    pub fn id(&self) -> &VolumeId {
        &self.id
    }
}

impl Drop for Lease {
    fn drop(&mut self) {
        let mut state = self.owner.state.lock();
        let Some(open) = state.open.get_mut(&self.id) else { return };
        open.users -= 1;
        if open.users == 0
            && let Some(open) = state.open.remove(&self.id)
        {
            state.closed.entry(self.id.pool.clone()).or_default().add(&open.volume.stats());
            state.closing.insert(self.id.clone(), Arc::downgrade(&open.volume));
            self.volume = None;
            drop(state);
            drop(open);
        }
    }
}
