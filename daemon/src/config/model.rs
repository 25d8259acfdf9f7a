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
    /// What encrypts the keys of encrypted volumes.
    pub keys: Option<KeysConfig>,
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
    /// Keeps this host's exports, and the logs of mapped volumes. Losing it loses the exports, and of volumes with durability "local" the latest
    /// writes, acknowledged flushes among them; with "remote" no flush.
    pub data_dir: PathBuf,
    /// The size of the log that a mapped volume gets when this host first opens it, such as "1GiB"; the file is sparse.
    pub log_size: String,
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
    /// Folders whose files and devices clients of the admin API on TCP may adopt; those of its unix socket may adopt any.
    pub adopt_dirs: Vec<PathBuf>,
    /// This host's name in metrics; the host name by default.
    pub node: String,
    /// Data-plane threads.
    #[schemars(range(min = 1, max = 256))]
    pub threads: usize,
    /// The longest a data-plane thread looks for work before it sleeps, in microseconds.
    #[schemars(range(max = 10000))]
    pub spin_us: u64,
    /// Have the kernel hold on to the memory of vhost-user guests whose VMM has allocated all of it: large requests take less CPU. For exports
    /// made from now on.
    pub pin_guest_memory: bool,
    /// Test faults, in builds with the feature `fault-injection` only.
    pub faults: Option<String>,
}

impl Default for DaemonConfig {
    fn default() -> Self {
        DaemonConfig {
            data_dir: "/var/lib/novastor".into(),
            log_size: "1GiB".to_owned(),
            admin: "unix:/run/novastor/admin.sock".to_owned(),
            admin_token_file: None,
            admin_token: None,
            metrics: None,
            nbd: vec!["unix:/run/novastor/nbd.sock".to_owned()],
            socket_mode: "0660".to_owned(),
            socket_group: None,
            socket_dirs: Vec::new(),
            adopt_dirs: Vec::new(),
            node: rustix::system::uname().nodename().to_string_lossy().into_owned(),
            threads: 2,
            spin_us: 100,
            pin_guest_memory: false,
            faults: None,
        }
    }
}

/// A place where volumes live. Which keys apply depends on the driver.
#[derive(Clone, Debug, Default, PartialEq, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct PoolConfig {
    /// "file", "rbd", "s3", "memory" or "null".
    pub driver: String,
    /// file, s3: what a flush of a mapped volume without a policy waits for. "local": the log in data_dir, the default for file; "remote": the
    /// pool itself, the default for s3.
    pub durability: Option<String>,
    /// file, s3: what becomes of writes to a mapped volume without a policy for which there is no space. "wait": they wait until there is, the default;
    /// "error": they fail with "no space left on device".
    pub when_full: Option<String>,
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
    /// s3: the bucket.
    pub bucket: Option<String>,
    /// s3: the server's URL, Amazon's by default.
    pub endpoint: Option<String>,
    /// s3: "us-east-1" by default.
    pub region: Option<String>,
    /// s3: what all keys begin with, so that pools can share a bucket: parts joined by "/".
    pub prefix: Option<String>,
    /// s3: a file holding the id of the access key.
    pub access_key_id_file: Option<PathBuf>,
    /// The id itself; from the environment only.
    pub access_key_id: Option<String>,
    /// s3: a file holding the secret of the access key; the file must not be readable by others than its owner and group.
    pub secret_key_file: Option<PathBuf>,
    /// The secret itself; from the environment only.
    pub secret_key: Option<String>,
    /// s3: whether an endpoint without TLS will do, for tests on a trusted network.
    pub allow_http: Option<bool>,
}

/// Certificates for NBD and the admin API on TCP.
#[derive(Clone, Debug, Default, PartialEq, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct TlsConfig {
    /// The server's certificate chain, PEM.
    pub cert: PathBuf,
    /// Its private key, PEM; the file must not be readable by others than its owner and group.
    pub key_file: Option<PathBuf>,
    /// The private key itself, PEM; from the environment only.
    pub key: Option<String>,
    /// Certificates that sign clients' certificates, PEM; with it clients must show one.
    pub client_ca: Option<PathBuf>,
}

/// The key-encryption key, and the one before it as long as it is being replaced: each 64 hexadecimal digits (`openssl rand -hex 32`), from one place.
#[derive(Clone, Debug, Default, PartialEq, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct KeysConfig {
    /// The file that holds the key; nobody but its owner and its group may reach it.
    pub file: Option<PathBuf>,
    /// The name of the systemd credential that holds the key.
    pub credential: Option<String>,
    /// The key itself; from the environment only.
    pub key: Option<String>,
    /// The file that holds the key before; the same goes for it.
    pub previous_file: Option<PathBuf>,
    /// The name of the systemd credential that holds the key before.
    pub previous_credential: Option<String>,
    /// The key before; from the environment only.
    pub previous_key: Option<String>,
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
    /// What a flush waits for. "remote": the backend has the data, as always with raw volumes; "local": the log in data_dir has it. The
    /// pool's by default.
    pub durability: Option<String>,
    /// How mapped volumes are compressed. "auto": as hard as time allows, which is the default; "cold": harder, for
    /// what is seldom read; "zstd" or "lz4": always with that; "none": not.
    /// What is stored already stays as it is until it is rewritten.
    pub compression: Option<String>,
    /// Where mapped volumes look for blocks that are stored already. "volume": in themselves, which is the default; "tenant": in all volumes of the
    /// pool with the same tenant and policy that were made on this host, of which one host has all or none; "none": nowhere.
    pub dedup: Option<String>,
    /// What becomes of writes to a mapped volume for which there is no space, in the pool or where the log lies. "wait": they wait until there is;
    /// "error": they fail with "no space left on device", as those of raw volumes always do. The pool's by default.
    pub when_full: Option<String>,
    /// Volumes are encrypted; needs [keys].
    pub encryption: bool,
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
