//! The configured pools: each opened on a thread of its own, so that one that does not answer holds up no other, and tried again
//! until it opens.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use backends::Pool;
use backends::rbd::{RbdPool, RbdPoolConfig};
use backends::simple::{SimpleKind, SimplePool};
use parking_lot::{Condvar, Mutex};

use super::mapped::Host;
use super::questions::Questions;
use crate::config::PoolConfig;
use crate::error::{Error, ErrorKind, Result};

/// How long between tries to open a pool that failed.
const RETRY: Duration = Duration::from_secs(5);

/// How long a question to a pool may take before it counts as not answering.
const ANSWER_LIMIT: Duration = Duration::from_secs(5);

/// The pools, by name.
pub struct Pools {
    host: Host,
    slots: Mutex<BTreeMap<String, Slot>>,
    settled: Condvar,
    /// Told when what failed may open now.
    again: Condvar,
}

struct Slot {
    config: PoolConfig,
    state: State,
    questions: Arc<Questions>,
}

/// What a pool answered.
pub struct Answer<T> {
    pub pool: String,
    pub driver: String,
    /// The answer, or why there is none.
    pub answer: std::result::Result<T, String>,
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
    questions: Arc<Questions>,
}

impl Pools {
    /// None yet.
    pub fn new(host: Host) -> Pools {
        Pools { host, slots: Mutex::default(), settled: Condvar::new(), again: Condvar::new() }
    }

    /// Begins to open a pool.
    pub fn add(self: &Arc<Self>, name: &str, config: &PoolConfig) {
        let slot = Slot { config: config.clone(), state: State::Opening, questions: Questions::new(ANSWER_LIMIT) };
        self.slots.lock().insert(name.to_owned(), slot);
        let (pools, name, config) = (self.clone(), name.to_owned(), config.clone());
        let spawned = std::thread::Builder::new().name(format!("pool-{name}"));
        let thread_name = name.clone();
        let spawned = spawned.spawn(move || pools.open_until_it_works(&thread_name, &config));
        if let Err(error) = spawned {
            self.set(&name, State::Failed(format!("no thread to open it: {error}")));
        }
    }

    fn open_until_it_works(&self, name: &str, config: &PoolConfig) {
        let mut reported = false;
        loop {
            match open(name, config, &self.host) {
                Ok(pool) => {
                    tracing::info!("pool {name}: open ({} at {})", pool.driver(), pool.location());
                    return self.set(name, State::Open(pool));
                }
                Err(error) => {
                    if !reported {
                        let error = error.clone().of(format!("pool {name}"));
                        tracing::error!("{error}; trying again every {} s", RETRY.as_secs());
                        reported = true;
                    }
                    self.set(name, State::Failed(error.message));
                }
            }
            let mut slots = self.slots.lock();
            self.again.wait_for(&mut slots, RETRY);
        }
    }

    fn set(&self, name: &str, state: State) {
        if let Some(slot) = self.slots.lock().get_mut(name) {
            slot.state = state;
        }
        self.settled.notify_all();
    }

    /// Accepts whatever is found where a pool was that is not open, and tries at once to open it.
    pub fn forget(&self, name: &str) -> Result<()> {
        if !self.host.known.forget(name)? {
            return Err(Error::not_found(format!("pool {name} was never open here: there is nothing to forget")));
        }
        tracing::info!("pool {name}: forgotten; what is found in its place is taken from now on");
        if let Some(slot) = self.slots.lock().get_mut(name) {
            slot.state = State::Opening;
        }
        self.again.notify_all();
        Ok(())
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

    /// Waits until this pool has opened or failed once, or `limit` has passed.
    pub fn wait_for(&self, name: &str, limit: Duration) {
        let deadline = blockdev::clock::monotonic() + limit;
        let mut slots = self.slots.lock();
        while slots.get(name).is_some_and(|slot| matches!(slot.state, State::Opening)) {
            if self.settled.wait_until(&mut slots, deadline).timed_out() {
                return;
            }
        }
    }

    /// Asks all pools at once. One that does not answer in time holds up nobody.
    pub fn ask<T: Send + 'static>(&self, question: impl Fn(&dyn Pool) -> T + Clone + Send + 'static) -> Vec<Answer<T>> {
        let deadline = blockdev::clock::monotonic() + ANSWER_LIMIT;
        let asked: Vec<_> = self
            .list()
            .into_iter()
            .map(|state| {
                let question = question.clone();
                let asked = state.pool.clone().and_then(|pool| state.questions.ask(move || question(&*pool)));
                (asked, state)
            })
            .collect();
        let answers = asked.into_iter().map(|(receiver, state)| {
            let left = deadline.saturating_duration_since(blockdev::clock::monotonic());
            let answer = receiver.and_then(|receiver| receiver.recv_timeout(left).map_err(|_| state.questions.not_answered()));
            Answer { pool: state.name, driver: state.driver, answer }
        });
        answers.collect()
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
            questions: slot.questions.clone(),
        };
        slots.iter().map(state).collect()
    }

    pub fn get(&self, name: &str) -> Result<Arc<dyn Pool>> {
        let slots = self.slots.lock();
        match slots.get(name).map(|slot| &slot.state) {
            Some(State::Open(pool)) => Ok(pool.clone()),
            Some(State::Opening) => Err(Error::new(ErrorKind::Backend, format!("pool {name} is still opening"))),
            Some(State::Failed(why)) => Err(Error::new(ErrorKind::Backend, why.clone()).of(format!("pool {name}"))),
            None => {
                let known: Vec<_> = slots.keys().map(String::as_str).collect();
                let known = if known.is_empty() { "there are none: add [pool.NAME]".to_owned() } else { known.join(", ") };
                Err(Error::not_found(format!("pool {name} is not configured; pools: {known}")))
            }
        }
    }
}

fn open(name: &str, config: &PoolConfig, host: &Host) -> Result<Arc<dyn Pool>> {
    let folder = host.data_dir.join("pools").join(name);
    let missing = |key: &str| Error::invalid(format!("driver \"{}\" needs the key `{key}`", config.driver));
    Ok(match config.driver.as_str() {
        "file" => {
            let path = config.path.as_ref().ok_or_else(|| missing("path"))?;
            host.file_pool(name, config, path)?
        }
        "s3" => host.s3_pool(name, config)?,
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::Config;
    use crate::daemon::data_dir::DataDir;
    use crate::daemon::known_pools::KnownPools;

    #[test]
    fn twenty_questions_at_once_are_all_answered() {
        let folder = tempfile::tempdir().unwrap();
        let runtime = tokio::runtime::Runtime::new().unwrap();
        let pools = Arc::new(Pools::new(Host {
            data_dir: folder.path().to_owned(),
            known: KnownPools::load(Arc::new(DataDir::open(folder.path()).unwrap())).unwrap(),
            config: Arc::new(parking_lot::RwLock::new(Arc::new(Config::default()))),
            reactors: Vec::new(),
            runtime: runtime.handle().clone(),
        }));
        pools.add("a", &PoolConfig { driver: "null".to_owned(), ..PoolConfig::default() });
        pools.wait_for("a", Duration::from_secs(60));
        let ask = || {
            let slow = |pool: &dyn Pool| {
                std::thread::sleep(Duration::from_millis(100));
                pool.name().to_owned()
            };
            pools.ask(slow).pop().unwrap().answer
        };
        std::thread::scope(|scope| {
            let asking: Vec<_> = (0..20).map(|_| scope.spawn(ask)).collect();
            for answer in asking {
                assert_eq!(answer.join().unwrap().as_deref(), Ok("a"));
            }
        });
    }
}
