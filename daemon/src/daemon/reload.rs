//! `config reload` and SIGHUP: adds pools, follows the declared exports, changes tunables; open volumes are not touched.

use std::sync::Arc;
use std::time::Duration;

use super::Daemon;
use super::keys::kek_ids;
use crate::api::types::ReloadReport;
use crate::config::{self, Config, ExportConfig, LogConfig};
use crate::error::{Error, Result};
use crate::exports::{ExportSpec, Exports};

const POOL_PATIENCE: Duration = Duration::from_secs(5);

impl Daemon {
    /// Reads the configuration again. Nothing changes if it is not valid.
    pub fn reload(self: &Arc<Self>) -> Result<ReloadReport> {
        let mut new = config::load(self.config_file.as_deref()).map_err(|error| Error::invalid(error.to_string()))?;
        let old = self.config();
        let mut report = ReloadReport { needs_restart: needing_restart(&old, &new), ..ReloadReport::default() };
        let waits_for_tls = |export: &mut ExportConfig| ExportSpec::from_config(export, old.tls.is_some()).is_err();
        let later = new.export.extract_if(.., waits_for_tls);
        report
            .problems
            .extend(later.map(|export| format!("export of {}: waits for [tls], which needs a restart", export.volume)));
        self.reload_pools(&new, &mut report);
        if old.log.level != new.log.level {
            self.log.set_level(&new.log.level)?;
            report.changed.push(format!("log.level is {}", new.log.level));
        }
        let sockets = |config: &Config| {
            let daemon = &config.daemon;
            (daemon.socket_mode.clone(), daemon.socket_group.clone(), daemon.socket_dirs.clone())
        };
        if old.daemon.adopt_dirs != new.daemon.adopt_dirs {
            report.changed.push("folders whose files may be adopted".to_owned());
        }
        if sockets(&old) != sockets(&new) {
            report.changed.push("rules for sockets made from now on".to_owned());
        }
        let keks = kek_ids(&new);
        let other_keks = std::mem::replace(&mut *self.kek_ids.lock(), keks) != keks;
        if old.keys != new.keys || other_keks {
            report.changed.push("key-encryption keys: `novastor key rotate` wraps everything with the current one".to_owned());
        }
        if old.policy != new.policy {
            report.changed.push("policies".to_owned());
        }
        *self.config.write() = Arc::new(effective(&old, new));
        if keks != [None, None] || other_keks {
            report.problems.extend(self.pools_out_of_reach());
        }
        report.changed.extend(self.exports.declare(&self.config())?);
        Exports::start_missing(self, POOL_PATIENCE);
        let failed = self.exports.list().into_iter().filter_map(|export| Some((export.volume, export.error?)));
        report.problems.extend(failed.map(|(volume, error)| format!("export of {volume}: {error}")));
        Ok(report)
    }

    fn reload_pools(&self, new: &Config, report: &mut ReloadReport) {
        for (name, pool) in &new.pool {
            match self.pools.config(name) {
                None => {
                    self.pools.add(name, pool);
                    report.changed.push(format!("pool {name} added"));
                }
                Some(known) if known != *pool => report.needs_restart.push(format!("pool.{name}")),
                Some(_) => {}
            }
        }
        let gone = self.pools.names().into_iter().filter(|name| !new.pool.contains_key(name));
        report.needs_restart.extend(gone.map(|name| format!("pool.{name} (removal)")));
        self.pools.wait_settled(POOL_PATIENCE);
        let failed = self.pools.list().into_iter().filter_map(|state| Some((state.name, state.pool.err()?)));
        report.problems.extend(failed.map(|(name, why)| format!("pool {name}: {why}")));
    }
}

/// What is fixed while the daemon runs.
fn needing_restart(old: &Config, new: &Config) -> Vec<String> {
    let (a, b) = (&old.daemon, &new.daemon);
    let changed = [
        ("daemon.data_dir", a.data_dir != b.data_dir),
        ("daemon.log_size", a.log_size != b.log_size),
        ("daemon.admin", a.admin != b.admin),
        ("daemon.admin_token_file", (&a.admin_token_file, &a.admin_token) != (&b.admin_token_file, &b.admin_token)),
        ("daemon.metrics", a.metrics != b.metrics),
        ("daemon.nbd", a.nbd != b.nbd),
        ("daemon.node", a.node != b.node),
        ("daemon.threads", a.threads != b.threads),
        ("daemon.spin_us", a.spin_us != b.spin_us),
        ("daemon.faults", a.faults != b.faults),
        ("log.format", old.log.format != new.log.format),
        ("tls", old.tls != new.tls),
    ];
    changed.into_iter().filter(|(_, changed)| *changed).map(|(key, _)| key.to_owned()).collect()
}

/// The new configuration, with what is fixed as it was.
fn effective(old: &Config, new: Config) -> Config {
    let mut daemon = old.daemon.clone();
    daemon.socket_mode = new.daemon.socket_mode;
    daemon.socket_group = new.daemon.socket_group;
    daemon.socket_dirs = new.daemon.socket_dirs;
    daemon.adopt_dirs = new.daemon.adopt_dirs;
    daemon.pin_guest_memory = new.daemon.pin_guest_memory;
    let log = LogConfig { format: old.log.format, ..new.log };
    Config { daemon, tls: old.tls.clone(), log, ..new }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::{DaemonConfig, LogFormat};

    #[test]
    fn every_key_of_the_daemon_takes_effect_or_asks_for_a_restart() {
        // Without the rest pattern, so that a new key has to be thought of here.
        let DaemonConfig {
            data_dir: _,
            log_size: _,
            admin: _,
            admin_token_file: _,
            admin_token: _,
            metrics: _,
            nbd: _,
            socket_mode: _,
            socket_group: _,
            socket_dirs: _,
            adopt_dirs: _,
            node: _,
            threads: _,
            spin_us: _,
            pin_guest_memory: _,
            faults: _,
        } = DaemonConfig::default();
        let old = Config::default();
        type Change = fn(&mut DaemonConfig);
        let changes: [(&str, Change); 16] = [
            ("data_dir", |daemon| daemon.data_dir = "/other".into()),
            ("log_size", |daemon| daemon.log_size = "2GiB".to_owned()),
            ("admin", |daemon| daemon.admin = "unix:/other".to_owned()),
            ("admin_token_file", |daemon| daemon.admin_token_file = Some("/other".into())),
            ("admin_token", |daemon| daemon.admin_token = Some("other".to_owned())),
            ("metrics", |daemon| daemon.metrics = Some("127.0.0.1:1".to_owned())),
            ("nbd", |daemon| daemon.nbd.clear()),
            ("socket_mode", |daemon| daemon.socket_mode = "0600".to_owned()),
            ("socket_group", |daemon| daemon.socket_group = Some("0".to_owned())),
            ("socket_dirs", |daemon| daemon.socket_dirs.push("/other".into())),
            ("adopt_dirs", |daemon| daemon.adopt_dirs.push("/other".into())),
            ("node", |daemon| daemon.node.push('x')),
            ("threads", |daemon| daemon.threads += 1),
            ("spin_us", |daemon| daemon.spin_us += 1),
            ("pin_guest_memory", |daemon| daemon.pin_guest_memory = true),
            ("faults", |daemon| daemon.faults = Some(String::new())),
        ];
        for (key, change) in changes {
            let mut new = old.clone();
            change(&mut new.daemon);
            assert_ne!(new, old, "{key}");
            let takes_effect = effective(&old, new.clone()).daemon == new.daemon;
            assert_ne!(takes_effect, !needing_restart(&old, &new).is_empty(), "{key}");
        }
    }

    #[test]
    fn another_format_of_the_log_needs_a_restart_until_there_was_one() {
        let old = Config::default();
        let mut new = old.clone();
        new.log.format = LogFormat::Json;
        let now = effective(&old, new.clone());
        assert_eq!(needing_restart(&now, &new), ["log.format"]);
    }
}
