//! The configured pools: each opened on a thread of its own, so that one that does not answer holds up no other, and tried again
//! until it opens.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use backends::Pool;
use backends::file::{FilePool, FilePoolConfig};
use backends::rbd::{RbdPool, RbdPoolConfig};
use backends::simple::{SimpleKind, SimplePool};
use parking_lot::{Condvar, Mutex};

use crate::config::PoolConfig;
use crate::error::{Error, ErrorKind, Result};

/// How long between tries to open a pool that failed.
const RETRY: Duration = Duration::from_secs(5);

/// The pools, by name.
#[derive(Default)]
pub struct Pools {
    slots: Mutex<BTreeMap<String, Slot>>,
    settled: Condvar,
}

struct Slot {
    config: PoolConfig,
    state: State,
}

#[derive(Clone)]
enum State {
    Opening,
    Open(Arc<dyn Pool>),
    Failed(String),
}

/// A pool as it stands now.
pub struct PoolState {
    pub name: String,
    pub driver: String,
    /// The pool, or why there is none.
    pub pool: std::result::Result<Arc<dyn Pool>, String>,
}

impl Pools {
    /// Begins to open a pool.
    pub fn add(self: &Arc<Self>, name: &str, config: &PoolConfig, data_dir: &Path) {
        let slot = Slot { config: config.clone(), state: State::Opening };
        self.slots.lock().insert(name.to_owned(), slot);
        let (pools, name, config, data_dir) = (self.clone(), name.to_owned(), config.clone(), data_dir.to_owned());
        let spawned = std::thread::Builder::new().name(format!("pool-{name}"));
        let thread_name = name.clone();
        let spawned = spawned.spawn(move || pools.open_until_it_works(&thread_name, &config, &data_dir));
        if let Err(error) = spawned {
            self.set(&name, State::Failed(format!("no thread to open it: {error}")));
        }
    }

    fn open_until_it_works(&self, name: &str, config: &PoolConfig, data_dir: &Path) {
        let mut reported = false;
        loop {
            match open(name, config, data_dir) {
                Ok(pool) => {
                    tracing::info!("pool {name}: open ({} at {})", pool.driver(), pool.location());
                    return self.set(name, State::Open(pool));
                }
                Err(error) => {
                    if !reported {
                        tracing::error!("pool {name}: {error}; trying again every {} s", RETRY.as_secs());
                        reported = true;
                    }
                    self.set(name, State::Failed(error.message));
                }
            }
            std::thread::sleep(RETRY);
        }
    }

    fn set(&self, name: &str, state: State) {
        if let Some(slot) = self.slots.lock().get_mut(name) {
            slot.state = state;
        }
        self.settled.notify_all();
    }

    /// Waits until every pool has opened or failed once, or `limit` has passed.
    pub fn wait_settled(&self, limit: Duration) {
        let deadline = blockdev::clock::monotonic() + limit;
        let mut slots = self.slots.lock();
        while slots.values().any(|slot| matches!(slot.state, State::Opening)) {
            if self.settled.wait_until(&mut slots, deadline).timed_out() {
                return;
            }
        }
    }

    pub fn config(&self, name: &str) -> Option<PoolConfig> {
        self.slots.lock().get(name).map(|slot| slot.config.clone())
    }

    pub fn names(&self) -> Vec<String> {
        self.slots.lock().keys().cloned().collect()
    }

    pub fn list(&self) -> Vec<PoolState> {
        let slots = self.slots.lock();
        let state = |(name, slot): (&String, &Slot)| PoolState {
            name: name.clone(),
            driver: slot.config.driver.clone(),
            pool: match &slot.state {
                State::Open(pool) => Ok(pool.clone()),
                State::Opening => Err("still opening: the backend does not answer yet".to_owned()),
                State::Failed(why) => Err(why.clone()),
            },
        };
        slots.iter().map(state).collect()
    }

    pub fn get(&self, name: &str) -> Result<Arc<dyn Pool>> {
        let slots = self.slots.lock();
        match slots.get(name).map(|slot| &slot.state) {
            Some(State::Open(pool)) => Ok(pool.clone()),
            Some(State::Opening) => Err(Error::new(ErrorKind::Backend, format!("pool {name} is still opening"))),
            Some(State::Failed(why)) => Err(Error::new(ErrorKind::Backend, format!("pool {name}: {why}"))),
            None => {
                let known: Vec<_> = slots.keys().map(String::as_str).collect();
                let known = if known.is_empty() { "there are none: add [pool.NAME]".to_owned() } else { known.join(", ") };
                Err(Error::not_found(format!("pool {name} is not configured; pools: {known}")))
            }
        }
    }
}

fn open(name: &str, config: &PoolConfig, data_dir: &Path) -> Result<Arc<dyn Pool>> {
    let folder = data_dir.join("pools").join(name);
    let missing = |key: &str| Error::invalid(format!("driver \"{}\" needs the key `{key}`", config.driver));
    Ok(match config.driver.as_str() {
        "file" => {
            let path = config.path.clone().ok_or_else(|| missing("path"))?;
            Arc::new(FilePool::open(name, FilePoolConfig { path })?)
        }
        "null" => Arc::new(SimplePool::open(name, SimpleKind::Null, &folder)?),
        "memory" => Arc::new(SimplePool::open(name, SimpleKind::Memory, &folder)?),
        "rbd" => {
            let mut rbd = RbdPoolConfig::new(config.pool.as_deref().ok_or_else(|| missing("pool"))?);
            rbd.namespace = config.namespace.clone().unwrap_or_default();
            rbd.conf = config.conf.clone().unwrap_or(rbd.conf);
            rbd.user = config.user.clone().unwrap_or(rbd.user);
            rbd.cluster = config.cluster.clone().unwrap_or(rbd.cluster);
            rbd.keyring = config.keyring.clone();
            rbd.connect_timeout_seconds = config.connect_timeout_seconds.unwrap_or(rbd.connect_timeout_seconds);
            rbd.request_timeout_seconds = config.request_timeout_seconds.unwrap_or(rbd.request_timeout_seconds);
            Arc::new(RbdPool::open(name, rbd)?)
        }
        other => return Err(Error::unsupported(format!("no driver {other:?}"))),
    })
}
