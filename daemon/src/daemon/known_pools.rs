//! Which pool was where: a folder whose file system is not mounted, or that another pool has taken, is not served in its place.

use std::collections::BTreeMap;
use std::sync::Arc;

use parking_lot::Mutex;
use uuid::Uuid;

use super::data_dir::DataDir;
use crate::error::{Error, Result};

const FILE: &str = "pools.json";

/// The UUID of each pool that was ever opened here, by its name; kept in `data_dir`.
pub struct KnownPools {
    data_dir: Arc<DataDir>,
    state: Mutex<State>,
}

struct State {
    uuids: BTreeMap<String, Uuid>,
    /// Those that are open now.
    open: BTreeMap<String, Uuid>,
}

impl KnownPools {
    pub fn load(data_dir: Arc<DataDir>) -> Result<KnownPools> {
        let uuids = data_dir.read(FILE)?;
        Ok(KnownPools { data_dir, state: Mutex::new(State { uuids, open: BTreeMap::new() }) })
    }

    /// What pool `name` must be, if it was open before.
    pub fn expected(&self, name: &str) -> Option<Uuid> {
        self.state.lock().uuids.get(name).copied()
    }

    /// Notes, durably, what pool `name` is. Refused if it is a pool that is open under another name.
    pub fn opened(&self, name: &str, uuid: Uuid) -> Result<()> {
        let mut state = self.state.lock();
        if let Some((other, _)) = state.open.iter().find(|(other, open)| *other != name && **open == uuid) {
            return Err(Error::in_use(format!(
                "its UUID, {uuid}, is that of pool {other}: both are one pool, or one is a copy of the other; configure only one of them"
            )));
        }
        if state.uuids.get(name) != Some(&uuid) {
            let mut uuids = state.uuids.clone();
            uuids.insert(name.to_owned(), uuid);
            self.data_dir.write(FILE, &uuids)?;
            state.uuids = uuids;
        }
        state.open.insert(name.to_owned(), uuid);
        Ok(())
    }

    /// Accepts whatever pool is found under this name next, or a new one. False if nothing was known of it.
    pub fn forget(&self, name: &str) -> Result<bool> {
        let mut state = self.state.lock();
        if state.open.contains_key(name) {
            return Err(Error::in_use(format!("pool {name} is open, and is what it was: there is nothing to forget")));
        }
        let mut uuids = state.uuids.clone();
        if uuids.remove(name).is_none() {
            return Ok(false);
        }
        self.data_dir.write(FILE, &uuids)?;
        state.uuids = uuids;
        Ok(true)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::ErrorKind;

    #[test]
    fn what_was_open_is_known_after_a_restart_until_it_is_forgotten() {
        let folder = tempfile::tempdir().unwrap();
        let known = || KnownPools::load(Arc::new(DataDir::open(folder.path()).unwrap())).unwrap();
        let (a, b) = (blockdev::random::uuid(), blockdev::random::uuid());
        let first = known();
        assert_eq!(first.expected("a"), None);
        first.opened("a", a).unwrap();
        first.opened("b", b).unwrap();
        assert_eq!(first.opened("c", a).unwrap_err().kind, ErrorKind::InUse);
        assert_eq!(first.forget("a").unwrap_err().kind, ErrorKind::InUse);
        drop(first);
        let second = known();
        assert_eq!((second.expected("a"), second.expected("b"), second.expected("c")), (Some(a), Some(b), None));
        second.opened("renamed", b).unwrap();
        assert!(second.forget("a").unwrap() && !second.forget("a").unwrap());
        drop(second);
        assert_eq!(known().expected("a"), None);
    }
}
