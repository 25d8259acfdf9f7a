//! The exports of this host: kept in `data_dir`, restored at start, retried while their volume cannot be opened.
//!
//! ```text
//!   ExportRecord (durable) ── Entry ── Running: FrontEnd (nbd | vhost_user) + Lease of the volume
//! ```
//!
//! Invariants: what `add` reported as done survives a restart; an export that cannot be served says why and is tried again; one whose
//! volume another host has taken over is not, until somebody asks for it; an export is stopped (its I/O drained) before its volume is
//! released.

mod changes;
mod nbd;
mod restore;
mod spec;
mod vhost_user;

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use backends::Claim;
use blockdev::Volume;
use blockdev::stats::Snapshot;
use parking_lot::Mutex;

use crate::api::types::{ClientInfo, ExportCreate, ExportInfo, Protocol};
use crate::config::Address;
use crate::daemon::Daemon;
use crate::daemon::data_dir::DataDir;
use crate::daemon::open::Lease;
use crate::error::{Error, ErrorKind, Result};
use crate::names::VolumeId;
pub use nbd::{NbdFrontEnd, PrivateExport, load_tls};
use spec::{ExportFile, same_listener};
pub use spec::{ExportRecord, ExportSpec};

const FILE: &str = "exports.json";

/// A protocol serving one export.
pub trait FrontEnd: Send + Sync {
    fn clients(&self) -> Vec<ClientInfo>;
    /// Drops one client, or all; how many that were.
    fn disconnect(&self, client: Option<&str>) -> usize;
    /// What its clients did.
    fn stats(&self) -> Snapshot;
    /// Takes no new client, lets requests in flight finish, and lets go of the volume. Blocks.
    fn stop(&mut self);
}

/// The exports.
pub struct Exports {
    data_dir: Arc<DataDir>,
    nbd: NbdFrontEnd,
    table: Mutex<Table>,
    /// Pools whose exports are being started.
    trying: Mutex<BTreeSet<String>>,
}

struct Table {
    next: u64,
    entries: BTreeMap<String, Entry>,
}

impl Table {
    /// `NAME`, or `POOL/NAME` where another pool's volume has that name here already.
    fn choose_name(&self, volume: &VolumeId) -> String {
        let (short, full) = (volume.short(), volume.to_string());
        let taken = |entry: &Entry| entry.record.spec.volume != full && entry.record.name.as_deref() == Some(&short);
        if self.entries.values().any(taken) { full } else { short }
    }

    /// The export that is where `spec` would be.
    fn clash(&self, spec: &ExportSpec) -> Option<&Entry> {
        self.entries.values().find(|entry| {
            let shared_twice = entry.record.spec.address.is_none() && spec.address.is_none();
            same_listener(&entry.record.spec, spec) || (shared_twice && entry.record.spec.volume == spec.volume)
        })
    }
}

struct Entry {
    record: ExportRecord,
    running: Option<Running>,
    /// Why it does not run.
    error: Option<String>,
}

struct Running {
    front_end: Box<dyn FrontEnd>,
    lease: Lease,
}

/// What an export does at a moment.
pub struct ExportSample {
    pub id: String,
    pub volume: String,
    pub protocol: Protocol,
    /// Clients attached and what they did, or why it does not accept any.
    pub activity: std::result::Result<(usize, Snapshot), String>,
}

impl Exports {
    /// Reads the list; nothing runs yet.
    pub fn load(data_dir: Arc<DataDir>, nbd: NbdFrontEnd) -> Result<Exports> {
        let file: ExportFile = data_dir.read(FILE)?;
        let entry = |record: ExportRecord| (record.id.clone(), Entry { record, running: None, error: None });
        let entries = file.exports.into_iter().map(entry).collect();
        Ok(Exports { data_dir, nbd, table: Mutex::new(Table { next: file.next.max(1), entries }), trying: Mutex::default() })
    }

    pub fn nbd(&self) -> &NbdFrontEnd {
        &self.nbd
    }

    fn save(&self, table: &Table) -> Result<()> {
        let exports = table.entries.values().map(|entry| entry.record.clone()).collect();
        self.data_dir.write(FILE, &ExportFile { next: table.next, exports })
    }

    /// Exports a volume.
    pub fn add(&self, daemon: &Daemon, request: ExportCreate) -> Result<ExportInfo> {
        let accept_loss = request.accept_loss;
        let spec = ExportSpec::from_request(request, daemon.config().tls.is_some())?;
        if accept_loss {
            return self.add_accepting_loss(daemon, spec);
        }
        self.add_spec(daemon, spec, false)
    }

    /// Opens the volume before anything else does; from then on nothing of it is missing.
    fn add_accepting_loss(&self, daemon: &Daemon, mut spec: ExportSpec) -> Result<ExportInfo> {
        let volume = daemon.resolve_text(&spec.volume)?;
        spec.volume = volume.to_string();
        let waiting = self.table.lock().clash(&spec).map(|entry| entry.record.clone());
        if let Some(record) = &waiting {
            record.ensure_same_volume(daemon.record(&volume)?.uuid)?;
        }
        let _lease = {
            let _held = daemon.hold([&volume]);
            daemon.lease_accepting_loss(&volume)?
        };
        match waiting {
            Some(record) => {
                self.start_again(daemon, &record.id, Claim::TakeOver);
                self.get(&record.id)
            }
            None => self.add_spec(daemon, spec, false),
        }
    }

    fn add_spec(&self, daemon: &Daemon, mut spec: ExportSpec, declared: bool) -> Result<ExportInfo> {
        let volume = daemon.resolve_text(&spec.volume)?;
        spec.volume = volume.to_string();
        let _held = daemon.hold([&volume]);
        let (id, name) = {
            let mut table = self.table.lock();
            if let Some(other) = table.clash(&spec) {
                let (id, volume) = (&other.record.id, &other.record.spec.volume);
                return Err(Error::exists(format!(
                    "export {id} serves {volume} there already: remove it first, or choose another address"
                )));
            }
            let id = table.next.to_string();
            table.next += 1;
            (id, table.choose_name(&volume))
        };
        let volume_uuid = Some(daemon.record(&volume)?.uuid);
        let record = ExportRecord { id: id.clone(), declared, name: Some(name), volume_uuid, taken_over: false, spec };
        let running = self.start(daemon, &record, &volume, Claim::TakeOver)?;
        let mut table = self.table.lock();
        table.entries.insert(id.clone(), Entry { record, running: Some(running), error: None });
        if let Err(error) = self.save(&table) {
            let entry = table.entries.remove(&id);
            drop(table);
            entry.and_then(|entry| entry.running).into_iter().for_each(|mut running| running.front_end.stop());
            return Err(error.of(format!("export of {volume}")));
        }
        drop(table);
        self.get(&id)
    }

    fn start(&self, daemon: &Daemon, record: &ExportRecord, volume: &VolumeId, claim: Claim) -> Result<Running> {
        if volume.snapshot.is_some() && !record.spec.read_only {
            return Err(Error::invalid(format!("snapshot {volume} can only be exported with --read-only")));
        }
        if let Some(job) = daemon.transfers().import_of(volume) {
            return Err(Error::in_use(format!(
                "volume {volume} is being filled from an image: wait for job {job}, or cancel it"
            )));
        }
        self.ensure_not_shadowed(record)?;
        let lease = daemon.lease_as(volume, !record.spec.read_only, claim)?;
        let front_end: Box<dyn FrontEnd> = match record.spec.protocol {
            Protocol::Nbd => self.nbd.start(daemon, record, &lease)?,
            Protocol::VhostUser => vhost_user::start(daemon, record, &lease)?,
        };
        tracing::info!("export {}: {volume} is served ({})", record.id, describe(&record.spec));
        Ok(Running { front_end, lease })
    }

    /// Refuses to join what is still served of another volume that was called the same.
    fn ensure_not_shadowed(&self, record: &ExportRecord) -> Result<()> {
        let Some(uuid) = record.volume_uuid else { return Ok(()) };
        let table = self.table.lock();
        let running = table.entries.values().filter(|entry| entry.running.is_some()).map(|entry| &entry.record);
        running.filter(|other| other.spec.volume == record.spec.volume).try_for_each(|other| other.ensure_same_volume(uuid))
    }

    /// Stops an export and forgets it.
    pub fn remove(&self, daemon: &Daemon, id: &str) -> Result<()> {
        let volume = {
            let table = self.table.lock();
            let entry = find(&table, id)?;
            if entry.record.declared {
                return Err(Error::invalid(format!(
                    "export {id} stands in the configuration file: remove its [[export]] there, then `novastor config reload`"
                )));
            }
            entry.volume()?
        };
        let _held = daemon.hold([&volume]);
        self.remove_entry(id)
    }

    /// Lets go of an export's volume and serves it again, opened anew, with all exports that it has: the way back when no I/O succeeds any more, or after
    /// another host had it. Their clients are dropped.
    pub fn reopen(&self, daemon: &Daemon, id: &str) -> Result<ExportInfo> {
        let volume = find(&self.table.lock(), id)?.volume()?;
        let ids = self.ids_of_exactly(&volume);
        {
            let _held = daemon.hold([&volume]);
            let stopped: Vec<Running> = {
                let mut table = self.table.lock();
                ids.iter().filter_map(|id| table.entries.get_mut(id)?.running.take()).collect()
            };
            stopped.into_iter().for_each(|mut running| running.front_end.stop());
            daemon.open_volumes().ensure_closed(&volume, false, "reopening")?;
        }
        ids.iter().for_each(|id| self.start_again(daemon, id, Claim::TakeOver));
        let export = self.get(id)?;
        match export.error.as_ref().or(export.problem.as_ref()) {
            Some(error) if !export.ready => Err(Error::new(ErrorKind::Backend, error.clone()).of(format!("export {id}"))),
            _ => Ok(export),
        }
    }

    fn remove_entry(&self, id: &str) -> Result<()> {
        let mut table = self.table.lock();
        find(&table, id)?;
        let Some(entry) = table.entries.remove(id) else { return Ok(()) };
        if let Err(error) = self.save(&table) {
            table.entries.insert(id.to_owned(), entry);
            return Err(error.of(format!("export {id}")));
        }
        drop(table);
        entry.stop();
        Ok(())
    }

    /// Of those that listen for themselves.
    pub fn addresses(&self) -> Vec<Address> {
        self.table.lock().entries.values().filter_map(|entry| entry.record.spec.parsed_address()).collect()
    }

    pub fn list(&self) -> Vec<ExportInfo> {
        let seen: Vec<_> = self.table.lock().entries.values().map(|entry| (self.info(entry), entry.open_volume())).collect();
        let mut list: Vec<_> = seen.into_iter().map(with_problem).collect();
        list.sort_by_key(|export| export.id.parse::<u64>().unwrap_or(u64::MAX));
        list
    }

    pub fn get(&self, id: &str) -> Result<ExportInfo> {
        let seen = find(&self.table.lock(), id).map(|entry| (self.info(entry), entry.open_volume()))?;
        Ok(with_problem(seen))
    }

    pub fn disconnect(&self, id: &str, client: Option<&str>) -> Result<usize> {
        let table = self.table.lock();
        let entry = find(&table, id)?;
        let dropped = entry.running.as_ref().map_or(0, |running| running.front_end.disconnect(client));
        match client {
            Some(client) if dropped == 0 => {
                Err(Error::not_found(format!("export {id} has no client {client:?}: `novastor export show {id}` lists them")))
            }
            _ => Ok(dropped),
        }
    }

    /// What each does, or why it does not run.
    pub fn samples(&self) -> Vec<ExportSample> {
        let table = self.table.lock();
        let sample = |entry: &Entry| ExportSample {
            id: entry.record.id.clone(),
            volume: entry.record.spec.volume.clone(),
            protocol: entry.record.spec.protocol,
            activity: match &entry.running {
                Some(running) => Ok((running.front_end.clients().len(), running.front_end.stats())),
                None => Err(entry.why_not().unwrap_or_else(|| "it is being started".to_owned())),
            },
        };
        table.entries.values().map(sample).collect()
    }

    /// Ids of the exports of a volume and of its snapshots, running or not.
    pub fn ids_of(&self, volume: &VolumeId) -> Vec<String> {
        let (name, prefix) = (volume.to_string(), format!("{volume}@"));
        self.ids_where(|spec| spec.volume == name || spec.volume.starts_with(&prefix))
    }

    /// Ids of the exports of exactly this volume or snapshot.
    pub fn ids_of_exactly(&self, volume: &VolumeId) -> Vec<String> {
        let name = volume.to_string();
        self.ids_where(|spec| spec.volume == name)
    }

    /// Ids of the exports that will serve this volume as soon as there is one of that name.
    pub fn ids_waiting_for(&self, volume: &VolumeId) -> Vec<String> {
        let (full, short) = (volume.to_string(), volume.short());
        self.ids_where(|spec| spec.volume == full || spec.volume == short)
    }

    fn ids_where(&self, matches: impl Fn(&ExportSpec) -> bool) -> Vec<String> {
        let table = self.table.lock();
        table.entries.values().filter(|entry| matches(&entry.record.spec)).map(|entry| entry.record.id.clone()).collect()
    }

    /// Stops all of them, keeping the records. Blocks until their I/O is done.
    pub fn stop_all(&self) {
        let entries: Vec<Entry> = {
            let mut table = self.table.lock();
            let records: Vec<_> = table.entries.values().map(|entry| entry.record.clone()).collect();
            let blank = records.into_iter().map(|record| (record.id.clone(), Entry { record, running: None, error: None }));
            std::mem::replace(&mut table.entries, blank.collect()).into_values().collect()
        };
        std::thread::scope(|scope| {
            for entry in entries {
                scope.spawn(move || entry.stop());
            }
        });
    }

    fn info(&self, entry: &Entry) -> ExportInfo {
        let ExportRecord { id, declared, name, spec, .. } = entry.record.clone();
        let running = entry.running.as_ref();
        let taken_over = entry.record.told_taken_over().filter(|_| running.is_none());
        ExportInfo {
            id,
            declared,
            size: running.map(|running| running.lease.volume().size()),
            uris: match spec.protocol {
                Protocol::Nbd => self.nbd.uris(&spec, name.as_deref()),
                Protocol::VhostUser => spec.socket_path().map(|path| path.display().to_string()).into_iter().collect(),
            },
            volume: spec.volume,
            protocol: spec.protocol,
            address: spec.address,
            queues: spec.queues,
            read_only: spec.read_only,
            mode: spec.mode,
            group: spec.group,
            tls_allow: spec.tls_allow,
            ready: running.is_some(),
            error: entry.why_not(),
            problem: taken_over,
            clients: running.map(|running| running.front_end.clients()).unwrap_or_default(),
        }
    }
}

impl Entry {
    /// Why it does not run.
    fn why_not(&self) -> Option<String> {
        self.error.clone().or_else(|| self.record.told_taken_over().filter(|_| self.running.is_none()))
    }

    fn volume(&self) -> Result<VolumeId> {
        let volume: crate::names::VolumeRef = self.record.spec.volume.parse()?;
        Ok(VolumeId { pool: volume.pool.unwrap_or_default(), name: volume.name, snapshot: volume.snapshot })
    }

    /// It is to be served as soon as that is possible.
    fn waits(&self) -> bool {
        self.running.is_none() && !self.record.taken_over
    }

    fn open_volume(&self) -> Option<Arc<Volume>> {
        self.running.as_ref().map(|running| running.lease.volume().clone())
    }

    fn stop(self) {
        if let Some(mut running) = self.running {
            running.front_end.stop();
            tracing::info!("export {}: {} is no longer served", self.record.id, self.record.spec.volume);
        }
    }
}

/// Asks the volume, which may take a while: the table is not held meanwhile.
fn with_problem((export, volume): (ExportInfo, Option<Arc<Volume>>)) -> ExportInfo {
    ExportInfo { problem: volume.and_then(|volume| volume.health()).or(export.problem), ..export }
}

fn find<'a>(table: &'a Table, id: &str) -> Result<&'a Entry> {
    table
        .entries
        .get(id)
        .ok_or_else(|| Error::not_found(format!("export {id:?} does not exist: `novastor export list` shows those that do")))
}

fn describe(spec: &ExportSpec) -> String {
    match (spec.protocol, &spec.address) {
        (Protocol::Nbd, None) => "NBD, shared listeners".to_owned(),
        (Protocol::Nbd, Some(address)) => format!("NBD, {address}"),
        (Protocol::VhostUser, address) => format!("vhost-user, {}", address.as_deref().unwrap_or_default()),
    }
}
