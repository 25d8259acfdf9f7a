//! What types cannot say: addresses, modes, drivers, and what this version does not do yet.

use std::path::Path;

use toml::de::{DeTable, DeValue};
use toml::{Table, Value};
use tracing_subscriber::filter::LevelFilter;

use super::address::{self, Address};
use super::check_pool::DRIVERS;
use super::load::{Places, Problem, line_of};
use super::model::{Config, DaemonConfig, ExportConfig, NbdTarget, PolicyConfig};
use super::secret;
use crate::exports::{ExportSpec, load_tls};
use crate::names::VolumeRef;
use crate::units::parse_size;

const DRIVERS_LATER: [&str; 5] = ["nfs", "smb", "gcs", "azure", "swift"];
const POLICY_LATER: [&str; 4] = ["iops", "bandwidth", "burst_iops", "burst_seconds"];
const DURABILITIES: [&str; 2] = ["local", "remote"];
/// Two hosts' logs.
const DURABILITY_LATER: &str = "mirror";
const COMPRESSIONS: [&str; 5] = ["auto", "cold", "none", "lz4", "zstd"];
const DEDUPS: [&str; 3] = ["none", "volume", "tenant"];
const WHEN_FULL: [&str; 2] = ["wait", "error"];
const LOG_SIZE_MIN: u64 = 1 << 20;
const LOG_SIZE_UNIT: u64 = 4096;

/// Refuses, with a reason, what the design foresees and this version cannot do.
pub(super) fn not_yet(table: &DeTable<'_>, file: &str, text: &str) -> Vec<Problem> {
    let mut problems = Vec::new();
    let mut refuse = |offset: usize, message: String| {
        problems.push(Problem { place: format!("{file}:{}", line_of(text, offset)), message });
    };
    for (name, entries) in named_tables(table, "pool") {
        let Some(driver) = entries.get("driver") else { continue };
        if let DeValue::String(value) = driver.get_ref()
            && DRIVERS_LATER.contains(&value.as_ref())
        {
            let known = DRIVERS.join(", ");
            refuse(
                driver.span().start,
                format!("pool {name}: driver \"{value}\" is not in this version; drivers that work: {known}"),
            );
        }
    }
    for section in ["pool", "policy"] {
        for (name, entries) in named_tables(table, section) {
            let Some(durability) = entries.get("durability") else { continue };
            if matches!(durability.get_ref(), DeValue::String(value) if value == DURABILITY_LATER) {
                let known = DURABILITIES.join(", ");
                refuse(
                    durability.span().start,
                    format!(
                        "{section} {name}: durability \"{DURABILITY_LATER}\" is not in this version; those that work: {known}"
                    ),
                );
            }
        }
    }
    for (name, entries) in named_tables(table, "policy") {
        for (key, _) in entries.iter().filter(|(key, _)| POLICY_LATER.contains(&key.get_ref().as_ref())) {
            let message = format!(
                "policy {name}: `{}` is not in this version and would not be honoured: remove it; `durability`, `compression`, `dedup`, `when_full` and `encryption` work",
                key.get_ref()
            );
            refuse(key.span().start, message);
        }
    }
    problems
}

fn named_tables<'a>(table: &'a DeTable<'a>, section: &str) -> Vec<(String, &'a DeTable<'a>)> {
    let Some(DeValue::Table(section)) = table.get(section).map(|value| value.get_ref()) else { return Vec::new() };
    let tables = section.iter().filter_map(|(name, value)| match value.get_ref() {
        DeValue::Table(entries) => Some((name.get_ref().to_string(), entries)),
        _ => None,
    });
    tables.collect()
}

/// Secrets do not belong into the file.
pub(super) fn secrets_in_file(table: &Table, places: &Places) -> Vec<Problem> {
    let own = [
        ("daemon", "admin_token", "admin_token_file"),
        ("tls", "key", "key_file"),
        ("keys", "key", "file"),
        ("keys", "previous_key", "previous_file"),
    ];
    let mut secrets: Vec<(String, &str, &str)> = own.map(|(section, key, file_key)| (section.to_owned(), key, file_key)).into();
    let pools = table.get("pool").and_then(Value::as_table).into_iter().flat_map(Table::keys);
    let of_pools = [("access_key_id", "access_key_id_file"), ("secret_key", "secret_key_file")];
    secrets.extend(pools.flat_map(|pool| of_pools.map(|(key, file_key)| (format!("pool.{pool}"), key, file_key))));
    let is_there = |section: &str, key: &str| {
        let entries = section.split('.').try_fold(table, |table, name| table.get(name)?.as_table());
        entries.is_some_and(|entries| entries.contains_key(key))
    };
    let found = secrets.into_iter().filter(|(section, key, _)| is_there(section, key));
    let problem = |(section, key, file_key): (String, &str, &str)| Problem {
        place: places.of(&format!("{section}.{key}")),
        message: format!(
            "{section}.{key} is a secret and has no place in this file: use `{file_key}`, or the environment NOVASTOR_{}__{}",
            section.to_uppercase().replace('.', "__").replace('-', "_"),
            key.to_uppercase()
        ),
    };
    found.map(problem).collect()
}

/// Everything else that can be said without touching anything.
pub(super) fn check(config: &Config, places: &Places) -> Vec<Problem> {
    let mut checker = Checker { config, places, problems: Vec::new() };
    checker.daemon();
    checker.tls();
    checker.keys();
    for (name, pool) in &config.pool {
        checker.pool(name, pool);
    }
    for (name, policy) in &config.policy {
        checker.policy(name, policy);
    }
    for (index, export) in config.export.iter().enumerate() {
        checker.export(index, export);
    }
    checker.folders(config);
    checker.listeners(config);
    checker.problems
}

pub(super) struct Checker<'a> {
    config: &'a Config,
    places: &'a Places,
    problems: Vec<Problem>,
}

impl Checker<'_> {
    pub(super) fn refuse(&mut self, path: &str, message: impl Into<String>) {
        self.problems.push(Problem { place: self.places.of(path), message: format!("{path}: {}", message.into()) });
    }

    pub(super) fn name(&mut self, what: &str, name: &str, path: &str) {
        if let Err(error) = backends::check_name(what, name) {
            self.refuse(path, error.to_string());
        }
    }

    /// Refuses what is none of `known`.
    fn one_of(&mut self, path: &str, value: Option<&String>, known: &[&str]) {
        if let Some(value) = value.filter(|value| !known.contains(&value.as_str())) {
            self.refuse(path, format!("there is no \"{value}\": choose one of {}", known.join(", ")));
        }
    }

    pub(super) fn durability(&mut self, path: &str, durability: Option<&String>) {
        self.one_of(&format!("{path}.durability"), durability, &DURABILITIES);
    }

    pub(super) fn when_full(&mut self, path: &str, when_full: Option<&String>) {
        self.one_of(&format!("{path}.when_full"), when_full, &WHEN_FULL);
    }

    fn policy(&mut self, name: &str, policy: &PolicyConfig) {
        let path = format!("policy.{name}");
        self.name("policy", name, &path);
        self.durability(&path, policy.durability.as_ref());
        self.one_of(&format!("{path}.compression"), policy.compression.as_ref(), &COMPRESSIONS);
        self.one_of(&format!("{path}.dedup"), policy.dedup.as_ref(), &DEDUPS);
        self.when_full(&path, policy.when_full.as_ref());
        if policy.encryption && self.config.keys.is_none() {
            self.refuse(&format!("{path}.encryption"), "needs [keys]: the key-encryption key, such as `file`");
        }
    }

    fn log_size(&mut self, daemon: &DaemonConfig) {
        match parse_size(&daemon.log_size) {
            Err(error) => self.refuse("daemon.log_size", error),
            Ok(size) if size < LOG_SIZE_MIN || !size.is_multiple_of(LOG_SIZE_UNIT) => {
                self.refuse("daemon.log_size", format!("{size} bytes: choose at least 1MiB, and a multiple of {LOG_SIZE_UNIT}"));
            }
            Ok(_) => {}
        }
    }

    fn daemon(&mut self) {
        let daemon = &self.config.daemon;
        match daemon.admin_address() {
            Ok(address) => {
                let has_token = daemon.admin_token.is_some() || daemon.admin_token_file.is_some();
                if address.unix_path().is_none() && !has_token {
                    self.refuse("daemon.admin", "the admin API on TCP needs `admin_token_file`: a file of mode 0600");
                }
                self.reach("daemon.admin", &address);
            }
            Err(error) => self.refuse("daemon.admin", error),
        }
        for (index, text) in daemon.nbd.iter().enumerate() {
            self.listener(&format!("daemon.nbd.{index}"), text);
        }
        if let Some(Err(error)) = daemon.metrics.as_deref().map(address::tcp) {
            self.refuse("daemon.metrics", error);
        }
        if daemon.data_dir.as_os_str().is_empty() {
            self.refuse("daemon.data_dir", "is empty: name the folder for what belongs to this host");
        }
        self.mode("daemon.socket_mode", &daemon.socket_mode);
        self.log_size(daemon);
        if !(1..=256).contains(&daemon.threads) {
            self.refuse("daemon.threads", format!("{} data-plane threads: choose 1 to 256", daemon.threads));
        }
        if daemon.spin_us > 10_000 {
            self.refuse("daemon.spin_us", "at most 10000 microseconds");
        }
        if daemon.node.is_empty() {
            self.refuse("daemon.node", "the node needs a name");
        }
        if daemon.faults.is_some() && !cfg!(feature = "fault-injection") {
            self.refuse("daemon.faults", "this build has no fault injection: remove it");
        }
        if let Err(error) = secret::admin_token(self.config) {
            self.refuse("daemon.admin_token_file", error);
        }
        self.log();
    }

    fn log(&mut self) {
        let level = &self.config.log.level;
        // `Targets` takes any other word for the name of a target, and turns everything else off.
        let words = level.split(',').filter(|word| !word.contains('='));
        for word in words.filter(|word| word.parse::<LevelFilter>().is_err()) {
            self.refuse("log.level", format!("there is no level {word:?}: use error, warn, info, debug or trace"));
        }
        if let Err(error) = level.parse::<tracing_subscriber::filter::Targets>() {
            self.refuse("log.level", format!("{level:?}: {error}; use error, warn, info, debug or trace"));
        }
    }

    fn listener(&mut self, path: &str, text: &str) {
        match text.parse::<Address>() {
            Ok(address) => self.reach(path, &address),
            Err(error) => self.refuse(path, error),
        }
    }

    fn reach(&mut self, path: &str, address: &Address) {
        let socket = address.unix_path().and_then(|socket| std::path::absolute(socket).ok());
        if let Some(Err(error)) = socket.map(|socket| address::check_socket_path(&socket.to_string_lossy())) {
            self.refuse(path, error);
        }
        if !address.is_local() && self.config.tls.is_none() {
            self.refuse(path, format!("{address} can be reached from other hosts: that needs [tls], or use 127.0.0.1"));
        }
    }

    fn mode(&mut self, path: &str, mode: &str) {
        if parse_mode(mode).is_none() {
            self.refuse(path, format!("{mode:?} is no mode: write it in octal, such as \"0660\""));
        }
    }

    fn tls(&mut self) {
        let Some(tls) = &self.config.tls else { return };
        let problems_before = self.problems.len();
        if tls.cert.as_os_str().is_empty() {
            self.refuse("tls.cert", "[tls] needs cert: the file that holds the certificate chain");
        } else {
            self.readable("tls.cert", &tls.cert);
        }
        if let Some(client_ca) = &tls.client_ca {
            self.readable("tls.client_ca", client_ca);
        }
        if let Err(error) = secret::tls_key(tls) {
            self.refuse("tls.key_file", error);
        }
        if self.problems.len() == problems_before
            && let Err(error) = load_tls(tls)
        {
            self.refuse("tls", error.message);
        }
    }

    fn readable(&mut self, path: &str, file: &Path) {
        if let Err(error) = std::fs::read(file) {
            self.refuse(path, format!("{}: {error}; name a PEM file that the daemon's user can read", file.display()));
        }
    }

    /// A credential can be read by the unit alone.
    fn keys(&mut self) {
        let Some(keys) = &self.config.keys else { return };
        let is_out_of_reach = std::env::var_os("CREDENTIALS_DIRECTORY").is_none()
            && (keys.credential.is_some() || keys.previous_credential.is_some());
        match secret::key_encryption_keys(keys) {
            Err(_) if is_out_of_reach => {}
            Err(error) => self.refuse("keys", error.to_string()),
            Ok(found) if found.current.is_none() => self.refuse("keys", "needs `file`, or `credential`: where the key is"),
            Ok(_) => {}
        }
    }

    fn export(&mut self, index: usize, export: &ExportConfig) {
        let path = format!("export.{index}");
        if export.volume.is_empty() {
            self.refuse(&path, "an export needs `volume`");
        } else if let Err(error) = export.volume.parse::<VolumeRef>() {
            self.refuse(&format!("{path}.volume"), error.message);
        }
        let nbd = export.nbd.as_ref().filter(|target| **target != NbdTarget::Shared(false));
        let target = match (nbd, &export.vhost_user) {
            (None, None) => return self.refuse(&path, "needs `vhost_user = \"PATH\"` or `nbd = true`"),
            (Some(_), Some(_)) => return self.refuse(&path, "has both `vhost_user` and `nbd`: write two [[export]] tables"),
            (Some(_), None) => "nbd",
            (None, Some(_)) => "vhost_user",
        };
        if let Err(refusal) = ExportSpec::from_config(export, self.config.tls.is_some()) {
            self.refuse(&format!("{path}.{}", refusal.key.unwrap_or(target)), refusal.why);
        }
    }
}

/// An octal file mode, of permission bits only.
pub fn parse_mode(text: &str) -> Option<u32> {
    let digits = text.strip_prefix("0o").unwrap_or(text);
    u32::from_str_radix(digits, 8).ok().filter(|mode| *mode <= 0o777 && !digits.starts_with(['+', '-']))
}
