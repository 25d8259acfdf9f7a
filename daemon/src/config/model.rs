//! The typed configuration. The doc comments are what `novastor config schema` shows.

use std::collections::BTreeMap;
use std::path::PathBuf;

use schemars::JsonSchema;
use serde::Deserialize;

use super::address::Address;

/// Configuration of the novastor daemon.
#[derive(Clone, Debug, Default, PartialEq, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Config {
    pub daemon: DaemonConfig,
    /// Places where volumes live, by name.
    pub pool: BTreeMap<String, PoolConfig>,
    pub tls: Option<TlsConfig>,
    pub log: LogConfig,
    /// Exports that exist as long as they stand here.
    pub export: Vec<ExportConfig>,
    /// Policies that volumes can be created with, by name.
    pub policy: BTreeMap<String, PolicyConfig>,
}

/// The daemon itself.
#[derive(Clone, Debug, PartialEq, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct DaemonConfig {
    /// Keeps this host's exports.
    pub data_dir: PathBuf,
    /// Where the admin API listens: "unix:PATH", or "tcp:HOST:PORT" on loopback or with [tls].
    pub admin: String,
    /// A file holding the bearer token that the admin API on TCP asks for.
    pub admin_token_file: Option<PathBuf>,
    /// The token itself; from the environment only.
    pub admin_token: Option<String>,
    /// "HOST:PORT" where Prometheus scrapes; without it metrics are only at /metrics of the admin API.
    pub metrics: Option<String>,
    /// Shared NBD listeners: "unix:PATH" or "tcp:HOST:PORT"; beyond loopback they need [tls].
    pub nbd: Vec<String>,
    /// Mode of NBD and vhost-user sockets, in octal.
    pub socket_mode: String,
    /// Group of NBD and vhost-user sockets.
    pub socket_group: Option<String>,
    /// Folders in which sockets may be made and removed, besides those of the sockets named in this file.
    pub socket_dirs: Vec<PathBuf>,
    /// This host's name in metrics; the host name by default.
    pub node: String,
    /// Data-plane threads.
    #[schemars(range(min = 1, max = 256))]
    pub threads: usize,
    /// The longest a data-plane thread looks for work before it sleeps, in microseconds.
    #[schemars(range(max = 10000))]
    pub spin_us: u64,
    /// Test faults, in builds with the feature `fault-injection` only.
    pub faults: Option<String>,
}

impl Default for DaemonConfig {
    fn default() -> Self {
        DaemonConfig {
            data_dir: "/var/lib/novastor".into(),
            admin: "unix:/run/novastor/admin.sock".to_owned(),
            admin_token_file: None,
            admin_token: None,
            metrics: None,
            nbd: vec!["unix:/run/novastor/nbd.sock".to_owned()],
            socket_mode: "0660".to_owned(),
            socket_group: None,
            socket_dirs: Vec::new(),
            node: rustix::system::uname().nodename().to_string_lossy().into_owned(),
            threads: 2,
            spin_us: 100,
            faults: None,
        }
    }
}

/// A place where volumes live. Which keys apply depends on the driver.
#[derive(Clone, Debug, Default, PartialEq, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct PoolConfig {
    /// "file", "rbd", "memory" or "null".
    pub driver: String,
    /// file: the folder that holds the volumes.
    pub path: Option<PathBuf>,
    /// rbd: the name of the Ceph pool.
    pub pool: Option<String>,
    /// rbd: Ceph's configuration file, /etc/ceph/ceph.conf by default.
    pub conf: Option<PathBuf>,
    /// rbd: the Ceph user without "client.", "admin" by default.
    pub user: Option<String>,
    /// rbd: the namespace within the pool.
    pub namespace: Option<String>,
    /// rbd: the cluster's name, "ceph" by default.
    pub cluster: Option<String>,
    /// rbd: the file with the user's key, instead of the one that `conf` names.
    pub keyring: Option<PathBuf>,
    /// rbd: the longest that connecting, and asking a monitor, may take; 30 by default.
    #[schemars(range(min = 1, max = 3600))]
    pub connect_timeout_seconds: Option<u64>,
    /// rbd: requests that Ceph does not answer in this time fail; 0, the default: they wait until it does.
    #[schemars(range(max = 86400))]
    pub request_timeout_seconds: Option<u64>,
}

/// Certificates for NBD and the admin API on TCP.
#[derive(Clone, Debug, Default, PartialEq, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct TlsConfig {
    /// The server's certificate chain, PEM.
    pub cert: PathBuf,
    /// Its private key, PEM; the file must be readable by its owner only.
    pub key_file: Option<PathBuf>,
    /// The private key itself, PEM; from the environment only.
    pub key: Option<String>,
    /// Certificates that sign clients' certificates, PEM; with it clients must show one.
    pub client_ca: Option<PathBuf>,
}

/// What the daemon says on its error output.
#[derive(Clone, Debug, PartialEq, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct LogConfig {
    /// "error", "warn", "info", "debug" or "trace", or a filter such as "info,nbd=debug".
    pub level: String,
    pub format: LogFormat,
}

impl Default for LogConfig {
    fn default() -> Self {
        LogConfig { level: "info".to_owned(), format: LogFormat::Text }
    }
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum LogFormat {
    #[default]
    Text,
    Json,
}

/// One export for configuration management.
#[derive(Clone, Debug, Default, PartialEq, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct ExportConfig {
    /// "POOL/NAME", "NAME", or a snapshot "VOL@SNAP".
    pub volume: String,
    /// Path of a vhost-user-blk socket.
    pub vhost_user: Option<PathBuf>,
    /// true for the shared NBD listeners, or "unix:PATH" or "tcp:HOST:PORT" for one of its own.
    pub nbd: Option<NbdTarget>,
    /// The most queues a vhost-user client may use.
    #[schemars(range(min = 1, max = 256))]
    pub queues: Option<u16>,
    pub read_only: bool,
    /// Mode of its socket, in octal.
    pub mode: Option<String>,
    /// Group of its socket.
    pub group: Option<String>,
    /// Subjects of client certificates that may attach; empty: any that the CA signed.
    pub tls_allow: Vec<String>,
}

/// How a volume is offered over NBD.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize, JsonSchema)]
#[serde(untagged)]
pub enum NbdTarget {
    Shared(bool),
    Own(String),
}

/// How volumes created under this policy behave.
#[derive(Clone, Debug, Default, PartialEq, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct PolicyConfig {
    /// "remote": a flush returns when the backend has the data.
    pub durability: Option<String>,
}

impl DaemonConfig {
    /// The admin address; it was checked when the configuration was loaded.
    pub fn admin_address(&self) -> Result<Address, String> {
        self.admin.parse()
    }

    pub fn nbd_addresses(&self) -> Result<Vec<Address>, String> {
        self.nbd.iter().map(|address| address.parse()).collect()
    }
}
