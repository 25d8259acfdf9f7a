//! What types cannot say: addresses, modes, drivers, and what this version does not do yet.

use std::path::Path;

use toml::Table;
use toml::de::{DeTable, DeValue};

use super::address::{self, Address};
use super::load::{Places, Problem, line_of};
use super::model::{Config, ExportConfig, NbdTarget, PoolConfig};
use super::schema::nearest;
use super::secret;

/// The drivers that work.
const DRIVERS: [&str; 4] = ["file", "rbd", "memory", "null"];
const RBD_KEYS: [&str; 8] =
    ["pool", "conf", "user", "namespace", "cluster", "keyring", "connect_timeout_seconds", "request_timeout_seconds"];
const DRIVERS_LATER: [&str; 6] = ["nfs", "smb", "s3", "gcs", "azure", "swift"];
const POLICY_LATER: [&str; 7] = ["iops", "bandwidth", "burst_iops", "burst_seconds", "compression", "dedup", "encryption"];

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
    for (name, entries) in named_tables(table, "policy") {
        for (key, _) in entries.iter().filter(|(key, _)| POLICY_LATER.contains(&key.get_ref().as_ref())) {
            let message = format!(
                "policy {name}: `{}` is not in this version and would not be honoured: remove it; `durability` works",
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
    let secrets = [("daemon", "admin_token", "admin_token_file"), ("tls", "key", "key_file")];
    let found =
        secrets.into_iter().filter(|(section, key, _)| table.get(*section).and_then(|entries| entries.get(*key)).is_some());
    let problem = |(section, key, file_key): (&str, &str, &str)| Problem {
        place: places.of(&format!("{section}.{key}")),
        message: format!(
            "{section}.{key} is a secret and has no place in this file: use `{file_key}`, or the environment NOVASTOR_{}__{}",
            section.to_uppercase(),
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
    for (name, pool) in &config.pool {
        checker.pool(name, pool);
    }
    for (name, policy) in &config.policy {
        checker.name("policy", name, &format!("policy.{name}"));
        if let Some(durability) = policy.durability.as_deref().filter(|durability| *durability != "remote") {
            checker.refuse(
                &format!("policy.{name}.durability"),
                format!("durability \"{durability}\" is not in this version: \"remote\" works, and is what volumes have anyway"),
            );
        }
    }
    for (index, export) in config.export.iter().enumerate() {
        checker.export(index, export);
    }
    checker.problems
}

struct Checker<'a> {
    config: &'a Config,
    places: &'a Places,
    problems: Vec<Problem>,
}

impl Checker<'_> {
    fn refuse(&mut self, path: &str, message: impl Into<String>) {
        self.problems.push(Problem { place: self.places.of(path), message: format!("{path}: {}", message.into()) });
    }

    fn name(&mut self, what: &str, name: &str, path: &str) {
        if let Err(error) = backends::check_name(what, name) {
            self.refuse(path, error.to_string());
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
        self.mode("daemon.socket_mode", &daemon.socket_mode);
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
        if tls.cert.as_os_str().is_empty() {
            self.refuse("tls.cert", "[tls] needs cert: the file that holds the certificate chain");
        }
        if let Err(error) = secret::tls_key(tls) {
            self.refuse("tls.key_file", error);
        }
    }

    fn pool(&mut self, name: &str, pool: &PoolConfig) {
        let path = format!("pool.{name}");
        self.name("pool", name, &path);
        let driver_path = format!("{path}.driver");
        let allowed: &[&str] = match pool.driver.as_str() {
            "file" => &["path"],
            "rbd" => &RBD_KEYS,
            "memory" | "null" => &[],
            "" => return self.refuse(&path, format!("needs a driver: one of {}", DRIVERS.join(", "))),
            other => {
                let advice = nearest(other, &DRIVERS).map(|near| format!("; did you mean \"{near}\"?"));
                let known = DRIVERS.join(", ");
                return self
                    .refuse(&driver_path, format!("no driver {other:?}: there are {known}{}", advice.unwrap_or_default()));
            }
        };
        let given = [
            ("path", pool.path.is_some()),
            ("pool", pool.pool.is_some()),
            ("conf", pool.conf.is_some()),
            ("user", pool.user.is_some()),
            ("namespace", pool.namespace.is_some()),
            ("cluster", pool.cluster.is_some()),
            ("keyring", pool.keyring.is_some()),
            ("connect_timeout_seconds", pool.connect_timeout_seconds.is_some()),
            ("request_timeout_seconds", pool.request_timeout_seconds.is_some()),
        ];
        for (key, _) in given.iter().filter(|(key, given)| *given && !allowed.contains(key)) {
            self.refuse(&format!("{path}.{key}"), format!("driver \"{}\" has no key `{key}`", pool.driver));
        }
        if pool.connect_timeout_seconds.is_some_and(|seconds| !(1..=3600).contains(&seconds)) {
            self.refuse(&format!("{path}.connect_timeout_seconds"), "choose 1 to 3600 seconds");
        }
        if pool.request_timeout_seconds.is_some_and(|seconds| seconds > 86_400) {
            self.refuse(&format!("{path}.request_timeout_seconds"), "choose at most 86400 seconds; 0 waits for ever");
        }
        let needed = if pool.driver == "file" {
            "path"
        } else if pool.driver == "rbd" {
            "pool"
        } else {
            return;
        };
        if !given.iter().any(|(key, given)| *key == needed && *given) {
            self.refuse(&path, format!("driver \"{}\" needs the key `{needed}`", pool.driver));
        }
    }

    fn export(&mut self, index: usize, export: &ExportConfig) {
        let path = format!("export.{index}");
        if export.volume.is_empty() {
            self.refuse(&path, "an export needs `volume`");
        }
        let nbd = export.nbd.as_ref().filter(|target| **target != NbdTarget::Shared(false));
        match (nbd, &export.vhost_user) {
            (None, None) => self.refuse(&path, "needs `vhost_user = \"PATH\"` or `nbd = true`"),
            (Some(_), Some(_)) => self.refuse(&path, "has both `vhost_user` and `nbd`: write two [[export]] tables"),
            (Some(NbdTarget::Own(text)), None) => self.listener(&format!("{path}.nbd"), text),
            (Some(_), None) => {}
            (None, Some(socket)) => self.socket(&format!("{path}.vhost_user"), socket),
        }
        if export.queues.is_some_and(|queues| !(1..=256).contains(&queues)) {
            self.refuse(&format!("{path}.queues"), "choose 1 to 256 queues");
        }
        if let Some(mode) = &export.mode {
            self.mode(&format!("{path}.mode"), mode);
        }
    }

    fn socket(&mut self, path: &str, socket: &Path) {
        if let Err(error) = address::check_socket_path(&socket.to_string_lossy()) {
            self.refuse(path, error);
        }
    }
}

/// An octal file mode, of permission bits only.
pub fn parse_mode(text: &str) -> Option<u32> {
    let digits = text.strip_prefix("0o").unwrap_or(text);
    u32::from_str_radix(digits, 8).ok().filter(|mode| *mode <= 0o777 && !digits.starts_with(['+', '-']))
}
