//! What travels between the API and its clients; `--json` prints the same.

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

/// The daemon.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
pub struct Status {
    pub version: String,
    pub node: String,
    pub pid: u32,
    /// Seconds since 1970.
    pub started: u64,
    pub data_dir: String,
    /// Data-plane threads.
    pub threads: usize,
    /// The shared NBD listeners, `unix:PATH` or `tcp:HOST:PORT`.
    pub nbd: Vec<String>,
    /// Where Prometheus scrapes, `HOST:PORT`.
    pub metrics: Option<String>,
}

/// A pool.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
pub struct PoolInfo {
    pub name: String,
    pub driver: String,
    pub location: String,
    pub ok: bool,
    /// Its state in words.
    pub detail: String,
    /// Bytes.
    pub total: Option<u64>,
    /// Bytes.
    pub free: Option<u64>,
}

/// A pool that did not say what it holds.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Unanswered {
    pub pool: String,
    /// Why, in words.
    pub error: String,
}

impl Unanswered {
    /// `pool a: why; pool b: why`
    pub fn in_words(pools: &[Unanswered]) -> String {
        let of_pool = |Unanswered { pool, error }: &Unanswered| {
            let subject = format!("pool {pool}");
            if error.starts_with(&subject) { error.clone() } else { format!("{subject}: {error}") }
        };
        pools.iter().map(of_pool).collect::<Vec<_>>().join("; ")
    }
}

/// A volume.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
pub struct VolumeInfo {
    pub pool: String,
    pub name: String,
    pub uuid: String,
    /// Bytes.
    pub size: u64,
    pub block_size: u32,
    pub layout: String,
    pub policy: Option<String>,
    pub tenant: Option<String>,
    /// Of a mapped volume that shares what it stores: the UUID that all of its group have here.
    pub group: Option<String>,
    /// The file, device or image an adopted volume stands on.
    pub object: Option<String>,
    /// `VOL@SNAP` or `VOL` it was cloned from.
    pub origin: Option<String>,
    pub encrypted: bool,
    pub snapshots: Vec<SnapshotInfo>,
    /// Ids of its exports, and of its snapshots' exports.
    pub exports: Vec<String>,
    pub open: bool,
    /// While it cannot serve everything it should: why.
    pub problem: Option<String>,
    /// The last failed request since it was opened.
    pub last_error: Option<String>,
}

/// A snapshot.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
pub struct SnapshotInfo {
    /// `POOL/VOL@SNAP`.
    pub name: String,
    /// Seconds since 1970.
    pub created: u64,
    /// Of the volume at that time, in bytes.
    pub size: u64,
}

/// What a new volume should be.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct VolumeCreate {
    /// `NAME` or `POOL/NAME`.
    pub name: String,
    /// Bytes.
    pub size: u64,
    pub pool: Option<String>,
    /// "raw" or "mapped"; by default mapped in pools that can hold it.
    pub layout: Option<String>,
    /// 512 or 4096.
    pub block_size: Option<u32>,
    pub policy: Option<String>,
    pub tenant: Option<String>,
    /// Refuses a name that an export waits for: once it serves the volume, no image can be imported.
    #[serde(default)]
    pub for_import: bool,
}

/// An existing object to take over.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct VolumeAdopt {
    pub pool: String,
    /// A path for a file pool, an image name for an RBD pool.
    pub object: String,
    /// By default after the object.
    pub name: Option<String>,
}

#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct VolumeResize {
    /// Bytes.
    pub size: u64,
    /// Allows a smaller size, and loses what lies beyond.
    #[serde(default)]
    pub shrink: bool,
    /// Take it from the host that had it last, if it is a mapped volume.
    #[serde(default)]
    pub take_over: bool,
}

#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct VolumeRename {
    pub name: String,
}

#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct VolumeClone {
    /// The new volume, `NAME` or `POOL/NAME`.
    pub name: String,
    /// Take the origin from the host that had it last, if it is a mapped volume.
    #[serde(default)]
    pub take_over: bool,
}

/// What flattening a volume came to.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
pub struct VolumeFlattened {
    pub volume: String,
    /// False if it had no parent, so that there was nothing to do.
    pub flattened: bool,
}

/// Space of a volume, in bytes.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
pub struct VolumeUsage {
    pub volume: String,
    pub logical: u64,
    /// Taken on the backend: of a mapped volume, all of its objects; of a raw one, snapshots not counted.
    pub stored: u64,
    /// Stored for snapshots alone, as far as the backend can tell: it comes back when they are deleted.
    pub snapshots: u64,
    /// Of a mapped volume: what it has of its logical size.
    pub data: Option<u64>,
    /// Of a mapped volume: stored for nothing any more; it comes back by garbage collection.
    pub reclaimable: Option<u64>,
    /// Of a mapped volume: its own blocks in the pool, each content once, before compression.
    pub unique: Option<u64>,
    /// Of a mapped volume: what those take, compressed.
    pub compressed: Option<u64>,
    /// Of a mapped volume: what its map takes.
    pub map: Option<u64>,
    /// Of a mapped volume whose local log is here: what that holds for the pool.
    pub log: Option<u64>,
}

/// The key-encryption keys of this host, and the keys of pools.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
pub struct KeyList {
    /// Id of the key-encryption key that wraps what is written from now on.
    pub current: Option<String>,
    /// Id of the one before, as long as it is configured.
    pub previous: Option<String>,
    pub keys: Vec<KeyInfo>,
}

/// A key in a pool.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
pub struct KeyInfo {
    pub pool: String,
    /// "mapped" or "raw": the volumes' data key; "pool": its own, which names blocks.
    pub of: String,
    /// Those that share it: a mapped volume, its clones, and theirs. None: left by a deleted volume, or the pool's own.
    pub volumes: Vec<String>,
    /// "wrapped", "clear" (of a pool without encrypted volumes), "erased" or "damaged".
    pub state: String,
    /// Id of the key-encryption key that wraps it.
    pub wrapped_by: Option<String>,
    /// Why it cannot be read.
    pub problem: Option<String>,
}

/// Whose keys to wrap anew.
#[derive(Clone, Debug, Default, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct KeyRotate {
    /// All pools without it.
    pub pool: Option<String>,
}

/// What a rotation did in one pool, in keys.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
pub struct KeysRotated {
    pub pool: String,
    pub rewrapped: u64,
    /// Wrapped by the current key-encryption key before.
    pub already: u64,
}

/// Which key to destroy.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct KeyErase {
    /// All volumes that share it.
    pub volumes: Vec<String>,
}

/// What became of a key.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
pub struct KeyErased {
    pub volumes: Vec<String>,
    /// False if it was erased before.
    pub erased: bool,
}

/// Outcome of a check.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
pub struct CheckReport {
    pub subject: String,
    pub ok: bool,
    /// What is wrong, one sentence each.
    pub problems: Vec<String>,
}

/// Snapshots to make at one point in time.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct SnapshotCreate {
    /// `VOL@SNAP` each.
    pub snapshots: Vec<String>,
    /// Take mapped volumes from the hosts that had them last.
    #[serde(default)]
    pub take_over: bool,
}

/// A range of a volume.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct RangeInfo {
    /// Bytes.
    pub offset: u64,
    /// Bytes.
    pub length: u64,
}

/// What differs between two states of a volume.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
pub struct SnapshotDiff {
    pub from: String,
    pub to: String,
    pub changed: Vec<RangeInfo>,
    /// Bytes in all.
    pub changed_bytes: u64,
}

/// How a volume is offered.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "kebab-case")]
pub enum Protocol {
    Nbd,
    VhostUser,
}

/// What a new export should be.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct ExportCreate {
    /// `VOL` or `VOL@SNAP`.
    pub volume: String,
    pub protocol: Protocol,
    /// `unix:PATH` or `tcp:HOST:PORT`; without it NBD is served on the shared listeners.
    pub address: Option<String>,
    /// The most queues a vhost-user client may use.
    pub queues: Option<u16>,
    #[serde(default)]
    pub read_only: bool,
    /// Mode of its socket, in octal.
    pub mode: Option<String>,
    /// Group of its socket.
    pub group: Option<String>,
    /// Subjects of client certificates that may attach.
    #[serde(default)]
    pub tls_allow: Vec<String>,
    /// Open a mapped volume whose local log is lost, or cannot be read: what only that log had is given up for good. Counts for this opening
    /// alone. An export that is there and waits for its volume is started.
    #[serde(default)]
    pub accept_loss: bool,
}

/// An export.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
pub struct ExportInfo {
    pub id: String,
    pub volume: String,
    /// Bytes, while it is open.
    pub size: Option<u64>,
    pub protocol: Protocol,
    /// Its own listener, if it has one.
    pub address: Option<String>,
    /// Where clients find it: NBD URIs, in which `DIR` stands for the folder with a client's certificates, or the path of a vhost-user socket.
    pub uris: Vec<String>,
    pub queues: Option<u16>,
    pub read_only: bool,
    pub mode: Option<String>,
    pub group: Option<String>,
    pub tls_allow: Vec<String>,
    /// It stands in the configuration file.
    pub declared: bool,
    /// It accepts clients.
    pub ready: bool,
    /// Why it does not; it is tried again by itself, unless another host has taken its volume over.
    pub error: Option<String>,
    /// While its volume cannot serve everything it should: why, as of the volume.
    pub problem: Option<String>,
    pub clients: Vec<ClientInfo>,
}

/// Somebody attached to an export.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
pub struct ClientInfo {
    pub id: String,
    /// Where it comes from, and the subject of its certificate.
    pub peer: String,
    /// Seconds since 1970.
    pub since: u64,
}

/// Whom to drop.
#[derive(Clone, Debug, Default, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct Disconnect {
    /// All clients without it.
    pub client: Option<String>,
}

#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
pub struct Disconnected {
    pub clients: usize,
}

/// What a reload did.
#[derive(Clone, Debug, Default, Serialize, Deserialize, ToSchema)]
pub struct ReloadReport {
    /// In effect now.
    pub changed: Vec<String>,
    /// Takes effect when the daemon is restarted.
    pub needs_restart: Vec<String>,
    pub problems: Vec<String>,
}

/// State of a job.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "lowercase")]
pub enum JobState {
    Running,
    Done,
    Failed,
    Cancelled,
    /// The daemon or the client ended before the job did.
    Interrupted,
}

/// Long work.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
pub struct JobInfo {
    pub id: String,
    /// What it does, such as `volume delete`.
    pub kind: String,
    /// To what.
    pub subject: String,
    pub state: JobState,
    /// How far it is, in bytes where that makes sense.
    pub done: u64,
    /// How far it goes; nothing where that is not known.
    pub total: Option<u64>,
    /// Why it failed.
    pub error: Option<String>,
    /// Seconds since 1970.
    pub started: u64,
    /// Seconds since 1970.
    pub ended: Option<u64>,
}

/// A transfer of an image that the client carries out over NBD.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct TransferCreate {
    /// The volume, or for an export also `VOL@SNAP`.
    pub volume: String,
    /// "import" or "export".
    pub direction: String,
    /// The image, for the list of jobs.
    pub file: String,
    /// Bytes.
    pub total: u64,
    /// Take it from the host that had it last, if it is a mapped volume.
    #[serde(default)]
    pub take_over: bool,
}

/// Where the client finds the volume.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
pub struct TransferInfo {
    /// The job that stands for it; the volume stays open until it is finished.
    pub job: String,
    /// A unix socket that serves this volume over NBD to whoever may use the admin API.
    pub socket: String,
    /// The NBD export name.
    pub export: String,
    /// Bytes.
    pub size: u64,
}

/// How far a transfer is.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct TransferProgress {
    pub done: u64,
    /// Set once, at the end.
    pub state: Option<JobState>,
    pub error: Option<String>,
}
