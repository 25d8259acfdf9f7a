//! Exports come back by themselves: after a start, after a reload, and when a backend answers again.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use backends::Claim;
use blockdev::Volume;

use super::{Entry, Exports, Running, Table};
use crate::config::{Config, ExportConfig};
use crate::daemon::Daemon;
use crate::error::{Error, ErrorKind, Result};
use crate::exports::spec::{ExportRecord, ExportSpec, Refusal};

const RETRY: Duration = Duration::from_secs(2);
/// Threads that open the volumes of one pool, at most: a volume that takes long holds up few others.
const STARTERS_MAX: usize = 8;

impl Exports {
    /// Makes the declared exports those of `config`: new ones are noted, those gone are stopped and forgotten. Returns what
    /// changed, in words.
    pub fn declare(&self, config: &Config) -> Result<Vec<String>> {
        let spec = |(index, export): (usize, &ExportConfig)| {
            let refused = |refusal: Refusal| Error::invalid(format!("export.{index}: {}", refusal.why));
            ExportSpec::from_config(export, config.tls.is_some()).map_err(refused)
        };
        let wanted = config.export.iter().enumerate().map(spec).collect::<Result<Vec<ExportSpec>>>()?;
        let mut changes = Vec::new();
        let mut gone = Vec::new();
        let mut table = self.table.lock();
        let ids: Vec<String> = table.entries.keys().cloned().collect();
        for id in ids {
            let record = &table.entries[&id].record;
            if record.declared && !wanted.iter().any(|spec| same_export(spec, &record.spec)) {
                changes.push(format!("export of {} removed", record.spec.volume));
                gone.extend(table.entries.remove(&id));
            }
        }
        for spec in wanted {
            if table.entries.values().any(|entry| entry.record.declared && same_export(&spec, &entry.record.spec)) {
                continue;
            }
            changes.push(format!("export of {} added", spec.volume));
            let id = table.next.to_string();
            table.next += 1;
            let record = ExportRecord { id: id.clone(), declared: true, name: None, volume_uuid: None, taken_over: false, spec };
            table.entries.insert(id, Entry { record, running: None, error: None });
        }
        let saved = if changes.is_empty() { Ok(()) } else { self.save(&table) };
        drop(table);
        gone.into_iter().for_each(Entry::stop);
        saved.map(|()| changes)
    }

    /// Tries to start everything that does not run, but for what another host has taken over. Pools do not wait for each other. Blocks until each was tried once, or for
    /// `limit`; what takes longer goes on.
    pub fn start_missing(daemon: &Arc<Daemon>, limit: Duration) {
        let mut by_pool: BTreeMap<String, Vec<String>> = BTreeMap::new();
        {
            let table = daemon.exports().table.lock();
            for entry in table.entries.values().filter(|entry| entry.waits()) {
                let pool = entry.record.spec.volume.split_once('/').map_or("", |(pool, _)| pool).to_owned();
                by_pool.entry(pool).or_default().push(entry.record.id.clone());
            }
        }
        let (sender, receiver) = std::sync::mpsc::channel::<()>();
        for (pool, ids) in by_pool {
            if !daemon.exports().trying.lock().insert(pool.clone()) {
                continue;
            }
            let trying = Arc::new(Trying { daemon: daemon.clone(), pool });
            for starter in 0..ids.len().min(STARTERS_MAX) {
                let share: Vec<String> = ids.iter().skip(starter).step_by(STARTERS_MAX).cloned().collect();
                let (trying, sender) = (trying.clone(), sender.clone());
                std::thread::spawn(move || {
                    let daemon = &trying.daemon;
                    match trying.pool.as_str() {
                        "" => daemon.pools().wait_settled(limit),
                        pool => daemon.pools().wait_for(pool, limit),
                    }
                    share.iter().for_each(|id| daemon.exports().start_again(daemon, id, Claim::Return));
                    drop(sender);
                });
            }
        }
        drop(sender);
        let _ = receiver.recv_timeout(limit);
    }

    /// Notes what came of it.
    pub(super) fn start_again(&self, daemon: &Daemon, id: &str, claim: Claim) {
        let Some(record) = self.table.lock().entries.get(id).map(|entry| entry.record.clone()) else { return };
        let outcome = self.start_record(daemon, &record, claim);
        let mut table = self.table.lock();
        match outcome {
            Ok(None) => {}
            Ok(Some(mut running)) => match table.entries.get_mut(id) {
                Some(entry) if !daemon.is_stopping() => {
                    entry.running = Some(running);
                    entry.error = None;
                }
                _ => {
                    drop(table);
                    running.front_end.stop();
                }
            },
            Err(error) if error.kind == ErrorKind::TakenOver && !record.spec.volume.contains('@') => {
                let Some(entry) = table.entries.get_mut(id) else { return };
                entry.error = None;
                self.note_taken_over(&mut table, &[id.to_owned()]);
            }
            Err(error) => {
                let Some(entry) = table.entries.get_mut(id) else { return };
                if entry.error.as_deref() != Some(&error.message) {
                    let next = if entry.waits() { format!("; trying again every {} s", RETRY.as_secs()) } else { String::new() };
                    tracing::error!("export {id} of {} is not served: {error}{next}", record.spec.volume);
                }
                entry.error = Some(error.message);
            }
        }
    }

    /// Notes, for good, that another host has taken over the volume of these exports. What cannot be saved is found again: its log is too old.
    fn note_taken_over(&self, table: &mut Table, ids: &[String]) {
        for id in ids {
            let Some(entry) = table.entries.get_mut(id).filter(|entry| !entry.record.taken_over) else { continue };
            entry.record.taken_over = true;
            tracing::error!("export {id}: {}", entry.record.told_taken_over().unwrap_or_default());
        }
        if let Err(error) = self.save(table) {
            tracing::error!("exports whose volumes were taken over cannot be noted: {error}");
        }
    }

    /// The same of those that serve this opening of a volume.
    pub fn lost(&self, volume: &Arc<Volume>) {
        let mut table = self.table.lock();
        let serves = |entry: &&Entry| entry.open_volume().is_some_and(|open| Arc::ptr_eq(&open, volume));
        let new = table.entries.values().filter(serves).filter(|entry| !entry.record.taken_over);
        let ids: Vec<String> = new.map(|entry| entry.record.id.clone()).collect();
        if !ids.is_empty() {
            self.note_taken_over(&mut table, &ids);
        }
    }

    /// Nothing if it runs by now, or the daemon ends.
    fn start_record(&self, daemon: &Daemon, record: &ExportRecord, claim: Claim) -> Result<Option<Running>> {
        let volume = daemon.resolve_text(&record.spec.volume)?;
        let _held = daemon.hold([&volume]);
        let may_start = |entry: &Entry| entry.waits() || (entry.running.is_none() && claim >= Claim::TakeOver);
        if !self.table.lock().entries.get(&record.id).is_some_and(may_start) || daemon.is_stopping() {
            return Ok(None);
        }
        let mut record = record.clone();
        record.spec.volume = volume.to_string();
        let uuid = daemon.record(&volume)?.uuid;
        record.ensure_same_volume(uuid)?;
        if record.name.is_none() || record.volume_uuid.is_none() {
            let mut table = self.table.lock();
            record.name.get_or_insert_with(|| table.choose_name(&volume));
            record.volume_uuid = Some(uuid);
            if let Some(entry) = table.entries.get_mut(&record.id) {
                entry.record = record.clone();
            }
            self.save(&table)?;
        }
        let mut running = self.start(daemon, &record, &volume, claim)?;
        if record.taken_over {
            self.note_returned(&record.id).inspect_err(|_| running.front_end.stop())?;
        }
        Ok(Some(running))
    }

    fn note_returned(&self, id: &str) -> Result<()> {
        let mut table = self.table.lock();
        let note = |table: &mut Table, is_taken_over| {
            table.entries.get_mut(id).into_iter().for_each(|entry| entry.record.taken_over = is_taken_over);
        };
        note(&mut table, false);
        self.save(&table).inspect_err(|_| note(&mut table, true))
    }

    fn has_missing(&self) -> bool {
        self.table.lock().entries.values().any(Entry::waits)
    }

    /// Tries again for ever.
    pub async fn keep_trying(daemon: Arc<Daemon>) {
        loop {
            tokio::time::sleep(RETRY).await;
            if daemon.exports().has_missing() && !daemon.is_stopping() {
                let daemon = daemon.clone();
                let _ = tokio::task::spawn_blocking(move || Exports::start_missing(&daemon, Duration::from_secs(60))).await;
            }
        }
    }
}

/// A pool whose exports are being started.
struct Trying {
    daemon: Arc<Daemon>,
    pool: String,
}

impl Drop for Trying {
    fn drop(&mut self) {
        self.daemon.exports().trying.lock().remove(&self.pool);
    }
}

/// The same export, whether its volume was written with the pool or without.
fn same_export(wanted: &ExportSpec, kept: &ExportSpec) -> bool {
    let same_volume = wanted.volume == kept.volume
        || (!wanted.volume.contains('/') && kept.volume.split_once('/').is_some_and(|(_, name)| name == wanted.volume));
    same_volume && ExportSpec { volume: kept.volume.clone(), ..wanted.clone() } == *kept
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicBool, Ordering};

    use blockdev::null_disk::NullDisk;
    use blockdev::reactor::DataPlaneOptions;
    use blockdev::stats::Snapshot;
    use blockdev::{DataPlane, VolumeOptions};

    use super::*;
    use crate::api::types::{ClientInfo, Protocol};
    use crate::daemon::data_dir::DataDir;
    use crate::daemon::open::OpenVolumes;
    use crate::exports::{FrontEnd, NbdFrontEnd};
    use crate::names::VolumeId;

    struct Served(Arc<AtomicBool>);

    impl FrontEnd for Served {
        fn clients(&self) -> Vec<ClientInfo> {
            Vec::new()
        }
        fn disconnect(&self, _client: Option<&str>) -> usize {
            0
        }
        fn stats(&self) -> Snapshot {
            Snapshot::default()
        }
        fn stop(&mut self) {
            self.0.store(true, Ordering::SeqCst);
        }
    }

    #[test]
    fn an_export_that_is_no_longer_declared_stops_even_if_that_cannot_be_saved() {
        let folder = tempfile::tempdir().unwrap();
        let data_dir = Arc::new(DataDir::open(folder.path()).unwrap());
        let runtime = tokio::runtime::Runtime::new().unwrap();
        let _entered = runtime.enter();
        let plane = DataPlane::start(DataPlaneOptions::default()).unwrap();
        let config = Config::default();
        let exports = Exports::load(data_dir, NbdFrontEnd::new(&config, plane.handles(), Arc::default()).unwrap()).unwrap();
        let open = || {
            let options = VolumeOptions { name: "p/v".into(), read_only: false, block_size: 512 };
            Ok(Volume::new(Arc::new(NullDisk::new(1 << 20)), options))
        };
        let lease = Arc::new(OpenVolumes::default()).lease(&VolumeId::new("p", "v"), true, open).unwrap();
        let spec = ExportSpec {
            volume: "p/v".to_owned(),
            protocol: Protocol::Nbd,
            address: None,
            queues: None,
            read_only: false,
            mode: None,
            group: None,
            tls_allow: Vec::new(),
        };
        let record = ExportRecord { id: "1".to_owned(), declared: true, name: None, volume_uuid: None, taken_over: false, spec };
        let stopped = Arc::new(AtomicBool::new(false));
        let running = Running { front_end: Box::new(Served(stopped.clone())), lease };
        exports.table.lock().entries.insert("1".to_owned(), Entry { record, running: Some(running), error: None });
        std::fs::create_dir(folder.path().join("exports.json")).unwrap();
        assert!(exports.declare(&config).is_err());
        assert!(stopped.load(Ordering::SeqCst), "nobody could stop it any more");
    }
}
