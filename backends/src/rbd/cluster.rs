//! One connection to a Ceph cluster, shared by all pools and images that are reached the same way.
//!
//! ```text
//!   RbdPool ──▶ IoContext (pool, namespace) ──▶ Cluster (conf, user, time limits)
//!   Image ──────▶┘                               17 threads and 28 MB for any number of images
//! ```
//!
//! Invariants: a cluster lives as long as its last image; a cluster that was fenced (another host blocklisted it) is never handed
//! out again.

use std::ffi::{CString, c_char, c_int};
use std::io;
use std::path::PathBuf;
use std::ptr;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, OnceLock, Weak};

use blockdev::DeviceError;
use parking_lot::Mutex;

use super::library::{ClusterStat, Library, RawCluster, RawIoContext};
use super::{c_string, outcome};

/// How a cluster is reached.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(super) struct Connection {
    pub conf: PathBuf,
    pub user: String,
    pub cluster: String,
    pub keyring: Option<PathBuf>,
    pub connect_timeout_seconds: u64,
    pub request_timeout_seconds: u64,
}

pub(super) struct Cluster {
    raw: RawCluster,
    pub(super) library: &'static Library,
    connection: Connection,
    fsid: String,
    fenced: AtomicBool,
    address: OnceLock<String>,
}

// SAFETY: librados serialises access to a cluster handle itself; it may be used from any thread.
unsafe impl Send for Cluster {}
// SAFETY: as above.
unsafe impl Sync for Cluster {}

static CLUSTERS: Mutex<Vec<Weak<Cluster>>> = Mutex::new(Vec::new());

impl Cluster {
    /// The connection, made when first asked for. May block for the time limit of connecting.
    pub(super) fn shared(connection: &Connection) -> Result<Arc<Cluster>, DeviceError> {
        let mut clusters = CLUSTERS.lock();
        clusters.retain(|cluster| cluster.strong_count() > 0);
        let known = clusters.iter().filter_map(Weak::upgrade);
        if let Some(cluster) = known.into_iter().find(|other| other.connection == *connection && !other.is_fenced()) {
            return Ok(cluster);
        }
        let cluster = Arc::new(Cluster::connect(connection)?);
        clusters.push(Arc::downgrade(&cluster));
        Ok(cluster)
    }

    fn connect(connection: &Connection) -> Result<Cluster, DeviceError> {
        let library = Library::get().map_err(DeviceError::Unsupported)?;
        let what = || format!("Ceph cluster of {}", connection.conf.display());
        let name = c_string(&connection.cluster)?;
        let user = c_string(&format!("client.{}", connection.user))?;
        let mut raw = ptr::null_mut();
        // SAFETY: both strings live through the call, which stores a handle in `raw` and copies the strings.
        outcome(unsafe { (library.rados_create2)(&mut raw, name.as_ptr(), user.as_ptr(), 0) }, what)?;
        // From here on dropping it shuts it down.
        let mut cluster = Cluster {
            raw,
            library,
            connection: connection.clone(),
            fsid: String::new(),
            fenced: AtomicBool::new(false),
            address: OnceLock::new(),
        };
        cluster.configure()?;
        // SAFETY: the handle is configured and not yet connected.
        outcome(unsafe { (library.rados_connect)(raw) }, || {
            format!(
                "{}: cannot connect as client.{} within {} s; check that the monitors run and that the key ring is readable",
                what(),
                connection.user,
                connection.connect_timeout_seconds
            )
        })?;
        cluster.fsid = cluster.read_fsid()?;
        Ok(cluster)
    }

    fn configure(&self) -> Result<(), DeviceError> {
        let conf = c_string(&self.connection.conf.to_string_lossy())?;
        // SAFETY: the string lives through the call; the handle is not yet connected.
        let code = unsafe { (self.library.rados_conf_read_file)(self.raw, conf.as_ptr()) };
        outcome(code, || format!("Ceph configuration {} cannot be read", self.connection.conf.display()))?;
        let seconds = self.connection.connect_timeout_seconds.to_string();
        self.set("client_mount_timeout", &seconds)?;
        self.set("rados_mon_op_timeout", &seconds)?;
        self.set("rados_osd_op_timeout", &self.connection.request_timeout_seconds.to_string())?;
        // A write is acknowledged when Ceph has it, so that a failed flush can lose nothing.
        self.set("rbd_cache", "false")?;
        if let Some(keyring) = &self.connection.keyring {
            self.set("keyring", &keyring.to_string_lossy())?;
        }
        Ok(())
    }

    fn set(&self, option: &str, value: &str) -> Result<(), DeviceError> {
        let (name, text) = (c_string(option)?, c_string(value)?);
        // SAFETY: both strings live through the call; the handle is not yet connected.
        let code = unsafe { (self.library.rados_conf_set)(self.raw, name.as_ptr(), text.as_ptr()) };
        outcome(code, || format!("Ceph option {option} = {value} is refused"))
    }

    fn read_fsid(&self) -> Result<String, DeviceError> {
        let mut buffer = [0 as c_char; 64];
        // SAFETY: the buffer is writable for the length given, which leaves room for the terminating zero.
        let code = unsafe { (self.library.rados_cluster_fsid)(self.raw, buffer.as_mut_ptr(), buffer.len()) };
        outcome(code.min(0), || "the Ceph cluster does not tell its id".to_owned())?;
        Ok(super::text_of(&buffer))
    }

    /// The cluster's id.
    pub(super) fn fsid(&self) -> &str {
        &self.fsid
    }

    /// Total and free bytes of the cluster, as its monitors know them; `None` while no manager reports them.
    pub(super) fn space(&self) -> io::Result<Option<(u64, u64)>> {
        let mut stat = ClusterStat::default();
        // SAFETY: the structure is the one the call fills, and lives through it.
        match unsafe { (self.library.rados_cluster_stat)(self.raw, &mut stat) } {
            code if code < 0 => Err(io::Error::from_raw_os_error(-code)),
            _ => Ok((stat.kib > 0).then_some((stat.kib * 1024, stat.kib_available * 1024))),
        }
    }

    /// True once the cluster refuses this client: another host has fenced it.
    pub(super) fn is_fenced(&self) -> bool {
        self.fenced.load(Ordering::Relaxed)
    }

    pub(super) fn set_fenced(&self) {
        self.fenced.store(true, Ordering::Relaxed);
    }

    /// This client's own address as it stands in locks, once one was taken.
    pub(super) fn address(&self) -> Option<&str> {
        self.address.get().map(String::as_str)
    }

    pub(super) fn learn_address(&self, address: &str) {
        let _ = self.address.set(address.to_owned());
    }
}

impl Drop for Cluster {
    fn drop(&mut self) {
        // SAFETY: the last owner is here: no image or context that hangs on the handle exists any more.
        unsafe { (self.library.rados_shutdown)(self.raw) };
    }
}

/// One pool and namespace of a cluster.
pub(super) struct IoContext {
    raw: RawIoContext,
    pub(super) cluster: Arc<Cluster>,
    location: String,
}

// SAFETY: a context is safe to share while its namespace does not change; it is set once, in `open`.
unsafe impl Send for IoContext {}
// SAFETY: as above.
unsafe impl Sync for IoContext {}

impl IoContext {
    pub(super) fn open(cluster: &Arc<Cluster>, pool: &str, namespace: &str) -> Result<Arc<IoContext>, DeviceError> {
        let name = c_string(pool)?;
        let mut raw = ptr::null_mut();
        // SAFETY: the string lives through the call, which stores a context in `raw`.
        let code = unsafe { (cluster.library.rados_ioctx_create)(cluster.raw, name.as_ptr(), &mut raw) };
        outcome(code, || {
            format!("Ceph pool {pool} of {}; `ceph osd pool ls` lists the pools", cluster.connection.conf.display())
        })?;
        let location = if namespace.is_empty() { pool.to_owned() } else { format!("{pool}/{namespace}") };
        let context = IoContext { raw, cluster: cluster.clone(), location };
        let namespace: CString = c_string(namespace)?;
        // SAFETY: the context is this function's alone so far; the string lives through the call.
        unsafe { (cluster.library.rados_ioctx_set_namespace)(raw, namespace.as_ptr()) };
        Ok(Arc::new(context))
    }

    pub(super) fn raw(&self) -> RawIoContext {
        self.raw
    }

    pub(super) fn library(&self) -> &'static Library {
        self.cluster.library
    }

    /// `POOL` or `POOL/NAMESPACE`.
    pub(super) fn location(&self) -> &str {
        &self.location
    }

    pub(super) fn pool_id(&self) -> i64 {
        // SAFETY: the context is open.
        unsafe { (self.library().rados_ioctx_get_id)(self.raw) }
    }

    /// Runs an operation that takes the context and strings, and gives its outcome as an error of the operating system.
    pub(super) fn call(&self, operation: impl FnOnce(&'static Library, RawIoContext) -> c_int) -> io::Result<c_int> {
        match operation(self.library(), self.raw) {
            code if code < 0 => Err(io::Error::from_raw_os_error(-code)),
            code => Ok(code),
        }
    }
}

impl Drop for IoContext {
    fn drop(&mut self) {
        // SAFETY: images of this context hold it, so none is open any more.
        unsafe { (self.library().rados_ioctx_destroy)(self.raw) };
    }
}
