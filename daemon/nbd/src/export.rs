//! A volume under a name, and the table of those served on shared listeners.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::ThreadId;

use blockdev::Volume;
use blockdev::stats::{OpStats, Snapshot};
use parking_lot::{Mutex, RwLock};
use thiserror::Error;

use crate::contexts::Contexts;
use crate::negotiation::{Description, Directory, Refusal};
use crate::protocol::{PAYLOAD_MAX, STRING_MAX, transmission_flag};

/// How a volume is exported.
///
/// `NBD_CMD_CACHE` reads its range in pieces, one at a time for each client, and throws the bytes away: a page cache or a cache of
/// Ceph's storage daemons below is warm afterwards, and a range that cannot be read is answered with an error. It ends early, as
/// done, when its client is disconnected. It is offered only where reading warms something
/// ([`blockdev::Capabilities::caches_reads`]): not on files and block devices opened past the page cache (`O_DIRECT`), as they are
/// where their file system allows it. A client that asks all the same is served.
pub struct Export {
    name: String,
    /// Another name that clients may ask for; lists do not show it.
    alias: Option<String>,
    description: String,
    volume: Arc<Volume>,
    read_only: bool,
    tls_allow: Vec<String>,
    contexts: Option<Arc<dyn Contexts>>,
    withdrawn: AtomicBool,
    stats: Mutex<Vec<(ThreadId, Arc<OpStats>)>>,
}

/// Why an export is refused.
#[derive(Error, Debug)]
pub enum ExportError {
    #[error("export name of {0} bytes: the NBD protocol allows {STRING_MAX}")]
    NameTooLong(usize),
    #[error("an export named {0:?} is already served here: remove it first, or choose another name")]
    NameTaken(String),
}

impl Export {
    pub fn new(name: impl Into<String>, volume: Arc<Volume>) -> Export {
        Export {
            name: name.into(),
            alias: None,
            description: String::new(),
            volume,
            read_only: false,
            tls_allow: Vec::new(),
            contexts: None,
            withdrawn: AtomicBool::new(false),
            stats: Mutex::new(Vec::new()),
        }
    }

    /// A second name that clients may ask for. A published name goes before an alias.
    pub fn alias(mut self, alias: impl Into<String>) -> Export {
        self.alias = Some(alias.into());
        self
    }

    /// For people who list the exports.
    pub fn description(mut self, description: impl Into<String>) -> Export {
        self.description = description.into();
        self
    }

    /// Refuses writes, even where the volume takes them.
    pub fn read_only(mut self, read_only: bool) -> Export {
        self.read_only = read_only;
        self
    }

    /// Serves only clients whose certificate has one of these subjects (all of it as RFC 4514 writes it, such as
    /// `CN=host1,O=Example`, or the common name alone). If empty, all clients that the listener accepts may use the export; if not, the export is refused without TLS.
    pub fn tls_allow(mut self, subjects: Vec<String>) -> Export {
        self.tls_allow = subjects;
        self
    }

    /// Offers metadata contexts beside `base:allocation`. Its listeners must be served by a runtime with several threads.
    pub fn contexts(mut self, contexts: Arc<dyn Contexts>) -> Export {
        self.contexts = Some(contexts);
        self
    }

    pub(crate) fn own_contexts(&self) -> Option<&Arc<dyn Contexts>> {
        self.contexts.as_ref()
    }

    pub fn name(&self) -> &str {
        &self.name
    }

    pub fn volume(&self) -> &Arc<Volume> {
        &self.volume
    }

    pub fn is_read_only(&self) -> bool {
        self.read_only || self.volume.is_read_only()
    }

    /// What all clients did so far. Latencies are from the arrival of a request to its reply being ready.
    pub fn stats(&self) -> Snapshot {
        let mut snapshot = Snapshot::default();
        for (_, stats) in self.stats.lock().iter() {
            stats.add_to(&mut snapshot);
        }
        snapshot
    }

    /// The calling thread's statistics of this export.
    pub(crate) fn thread_stats(&self) -> Arc<OpStats> {
        let thread = std::thread::current().id();
        let mut all = self.stats.lock();
        if let Some((_, stats)) = all.iter().find(|(other, _)| *other == thread) {
            return stats.clone();
        }
        let stats = Arc::new(OpStats::default());
        all.push((thread, stats.clone()));
        stats
    }

    pub(crate) fn withdraw(&self) {
        self.withdrawn.store(true, Ordering::SeqCst);
    }

    pub(crate) fn is_withdrawn(&self) -> bool {
        self.withdrawn.load(Ordering::SeqCst)
    }

    fn describe(&self) -> Description {
        let capabilities = self.volume.capabilities();
        let mut flags = transmission_flag::SEND_FLUSH | transmission_flag::CAN_MULTI_CONN;
        if capabilities.caches_reads {
            flags |= transmission_flag::SEND_CACHE;
        }
        if self.is_read_only() {
            flags |= transmission_flag::READ_ONLY;
        } else {
            let offers = [
                (capabilities.fua, transmission_flag::SEND_FUA),
                (capabilities.discard, transmission_flag::SEND_TRIM),
                (capabilities.write_zeroes, transmission_flag::SEND_WRITE_ZEROES),
                (capabilities.write_zeroes && capabilities.fast_zero, transmission_flag::SEND_FAST_ZERO),
            ];
            flags |= offers.iter().filter(|(can, _)| *can).map(|(_, flag)| flag).sum::<u16>();
        }
        let preferred = self.volume.geometry().preferred_size.next_power_of_two();
        Description {
            name: self.name.clone(),
            description: self.description.clone(),
            size: self.volume.size(),
            flags,
            preferred_size: preferred.clamp(4096, PAYLOAD_MAX as u32),
        }
    }

    /// Whether a client with this identity may use the export.
    fn admits(&self, identity: &Identity) -> Result<(), Refusal> {
        if self.tls_allow.is_empty() {
            return Ok(());
        }
        match identity.subject() {
            None => Err(Refusal::Policy(format!("export {} is served over TLS to named clients only", self.name))),
            Some(subject) if self.tls_allow.iter().any(|allowed| subject.matches(allowed)) => Ok(()),
            Some(subject) => Err(Refusal::Policy(format!("export {} is not for {}", self.name, subject.full))),
        }
    }
}

/// Whom a client's certificate names.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Subject {
    /// All of it as RFC 4514 writes it: `CN=host1,O=Example`.
    pub full: String,
    pub common_name: Option<String>,
}

impl Subject {
    fn matches(&self, allowed: &str) -> bool {
        self.full == allowed || self.common_name.as_deref() == Some(allowed)
    }
}

/// Who a client is, as far as TLS tells.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Identity(pub Option<Subject>);

impl Identity {
    pub fn subject(&self) -> Option<&Subject> {
        self.0.as_ref()
    }
}

/// The exports served by name on shared listeners. The empty name stands for the only export there is.
#[derive(Default)]
pub(crate) struct Table {
    exports: RwLock<BTreeMap<String, Arc<Export>>>,
}

impl Table {
    pub(crate) fn add(&self, export: &Arc<Export>) -> Result<(), ExportError> {
        if export.name.len() > STRING_MAX {
            return Err(ExportError::NameTooLong(export.name.len()));
        }
        let mut exports = self.exports.write();
        if exports.contains_key(&export.name) {
            return Err(ExportError::NameTaken(export.name.clone()));
        }
        exports.insert(export.name.clone(), export.clone());
        Ok(())
    }

    pub(crate) fn remove(&self, export: &Arc<Export>) {
        let mut exports = self.exports.write();
        if exports.get(&export.name).is_some_and(|listed| Arc::ptr_eq(listed, export)) {
            exports.remove(&export.name);
        }
    }

    pub(crate) fn all(&self) -> Vec<Arc<Export>> {
        self.exports.read().values().cloned().collect()
    }

    fn find(&self, name: &str) -> Option<Arc<Export>> {
        let exports = self.exports.read();
        let by_alias = || exports.values().find(|export| export.alias.as_deref() == Some(name));
        match exports.get(name).or_else(by_alias) {
            Some(export) => Some(export.clone()),
            None if name.is_empty() && exports.len() == 1 => exports.values().next().cloned(),
            None => None,
        }
    }
}

/// What a listener serves.
#[derive(Clone)]
pub enum Serves {
    /// Every published export, by name.
    Shared,
    /// One export, by its name and as the default.
    Only(Arc<Export>),
}

/// The exports one client may see.
pub(crate) struct View<'a> {
    pub(crate) table: &'a Table,
    pub(crate) serves: &'a Serves,
    pub(crate) identity: &'a Identity,
}

impl Directory for View<'_> {
    type Export = Arc<Export>;

    fn list(&self, visit: &mut dyn FnMut(&str, &str)) {
        let exports = match self.serves {
            Serves::Shared => self.table.all(),
            Serves::Only(export) => vec![export.clone()],
        };
        for export in exports.iter().filter(|export| !export.is_withdrawn() && export.admits(self.identity).is_ok()) {
            visit(&export.name, &export.description);
        }
    }

    fn find(&self, name: &str) -> Result<(Arc<Export>, Description), Refusal> {
        let export = match self.serves {
            Serves::Shared => self.table.find(name),
            Serves::Only(export) => {
                let asked_for = name.is_empty() || export.name == name || export.alias.as_deref() == Some(name);
                asked_for.then(|| export.clone())
            }
        };
        let export = export.filter(|export| !export.is_withdrawn()).ok_or(Refusal::Unknown)?;
        export.admits(self.identity)?;
        let description = export.describe();
        Ok((export, description))
    }

    fn contexts(&self, export: &Arc<Export>) -> Vec<String> {
        let Some(contexts) = &export.contexts else { return Vec::new() };
        let mut names = tokio::task::block_in_place(|| contexts.names());
        names.retain(|name| name.len() <= STRING_MAX);
        names
    }
}
