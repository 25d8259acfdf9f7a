//! A Ceph pool as a pool of volumes: each image is one.

use std::collections::{BTreeMap, HashMap};
use std::io;
use std::path::PathBuf;
use std::sync::Arc;

use blockdev::{BlockDevice, DeviceError};
use parking_lot::Mutex;
use serde::{Deserialize, Serialize};

use super::cluster::{Cluster, Connection, IoContext};
use super::device::RbdDevice;
use super::image::{Access, Image};
use super::images;
use super::library::{FEATURE_EXCLUSIVE_LOCK, FLAG_FAST_DIFF_INVALID};
use super::lock;
use super::openings::Openings;
use super::record::{self, Record};
use crate::pool::{Flattened, Pool, PoolError, PoolHealth, Result, SnapshotRecord, Usage, VolumeRecord, VolumeSpec, check_name};

/// How a pool is reached.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RbdPoolConfig {
    /// The Ceph pool.
    pub pool: String,
    /// The namespace in it, if any.
    #[serde(default)]
    pub namespace: String,
    #[serde(default = "default_conf")]
    pub conf: PathBuf,
    /// The Ceph user, without `client.`.
    #[serde(default = "default_user")]
    pub user: String,
    /// The cluster's name, which its configuration file may use.
    #[serde(default = "default_cluster")]
    pub cluster: String,
    /// Instead of the one that the configuration names.
    #[serde(default)]
    pub keyring: Option<PathBuf>,
    /// The longest that connecting, and asking a monitor, may take.
    #[serde(default = "default_connect_timeout")]
    pub connect_timeout_seconds: u64,
    /// Requests that Ceph does not answer in this time fail; 0: they wait until it does, as VMs usually prefer. Whether a
    /// write that failed so was carried out is not known.
    #[serde(default)]
    pub request_timeout_seconds: u64,
}

fn default_conf() -> PathBuf {
    "/etc/ceph/ceph.conf".into()
}

fn default_user() -> String {
    "admin".into()
}

fn default_cluster() -> String {
    "ceph".into()
}

fn default_connect_timeout() -> u64 {
    30
}

impl RbdPoolConfig {
    /// With the defaults for everything but the Ceph pool.
    pub fn new(pool: &str) -> RbdPoolConfig {
        RbdPoolConfig {
            pool: pool.to_owned(),
            namespace: String::new(),
            conf: default_conf(),
            user: default_user(),
            cluster: default_cluster(),
            keyring: None,
            connect_timeout_seconds: default_connect_timeout(),
            request_timeout_seconds: 0,
        }
    }

    fn connection(&self) -> Connection {
        Connection {
            conf: self.conf.clone(),
            user: self.user.clone(),
            cluster: self.cluster.clone(),
            keyring: self.keyring.clone(),
            connect_timeout_seconds: self.connect_timeout_seconds,
            request_timeout_seconds: self.request_timeout_seconds,
        }
    }
}

/// The driver.
pub struct RbdPool {
    name: String,
    config: RbdPoolConfig,
    context: Mutex<Arc<IoContext>>,
    openings: Arc<Openings>,
}

/// A volume found: its image, open for a look.
struct Found {
    image_name: String,
    image: Image,
    record: Record,
}

fn failed(what: String, source: io::Error) -> PoolError {
    match source.raw_os_error() {
        Some(libc::ENOENT) => PoolError::NotFound(format!("{what}: there is no such thing")),
        Some(libc::EEXIST) => PoolError::Exists(format!("{what}: it exists already")),
        Some(libc::EOPNOTSUPP) => PoolError::Unsupported(format!("{what}: Ceph, or its library here, cannot do that")),
        _ => PoolError::Io { what, source },
    }
}

fn connect(config: &RbdPoolConfig) -> std::result::Result<Arc<IoContext>, DeviceError> {
    let cluster = Cluster::shared(&config.connection())?;
    IoContext::open(&cluster, &config.pool, &config.namespace)
}

impl RbdPool {
    /// Connects to the cluster. Fails in words without Ceph's libraries, and after the time limit if the cluster does not answer.
    pub fn open(name: &str, config: RbdPoolConfig) -> Result<RbdPool> {
        let context = connect(&config).map_err(|error| match error {
            DeviceError::Io { what, source } => failed(format!("pool {name}: {what}"), source),
            DeviceError::Unsupported(what) => PoolError::Unsupported(format!("pool {name}: {what}")),
            DeviceError::Refused(what) => PoolError::Invalid(format!("pool {name}: {what}")),
        })?;
        Ok(RbdPool { name: name.to_owned(), config, context: Mutex::new(context), openings: Arc::default() })
    }

    /// The connection; a new one if another host has fenced the old.
    fn context(&self) -> Result<Arc<IoContext>> {
        let mut context = self.context.lock();
        if context.cluster.is_fenced() {
            *context = connect(&self.config)?;
        }
        Ok(context.clone())
    }

    fn label(&self, volume: &str) -> String {
        format!("volume {}/{volume}", self.name)
    }

    fn failed(&self, volume: &str, doing: &str, source: io::Error) -> PoolError {
        failed(format!("{}: {doing}", self.label(volume)), source)
    }

    fn image_name(&self, context: &IoContext, volume: &str) -> Result<String> {
        let alias = record::alias(context, volume).map_err(|source| self.failed(volume, "looking it up", source))?;
        Ok(alias.unwrap_or_else(|| volume.to_owned()))
    }

    fn find(&self, volume: &str) -> Result<Found> {
        let context = self.context()?;
        let image_name = self.image_name(&context, volume)?;
        let not_found = || PoolError::NotFound(format!("{}: no such volume; `volume list` shows them", self.label(volume)));
        let image = match Image::open(&context, &image_name, None, Access::Glance) {
            Err(error) if error.raw_os_error() == Some(libc::ENOENT) => return Err(not_found()),
            opened => opened.map_err(|source| self.failed(volume, "opening its image", source))?,
        };
        let record = Record::read(&image).map_err(|source| self.failed(volume, "reading its record", source))?;
        if record.forgotten || record.name.as_deref().is_some_and(|name| name != volume) {
            return Err(not_found());
        }
        Ok(Found { image_name, image, record })
    }

    /// Runs `change` on the image: through the device that has it open for writing, where there is one.
    fn change<T>(&self, image_name: &str, change: impl FnOnce(&Image) -> io::Result<T>) -> io::Result<T> {
        if let Some(core) = self.openings.writer(image_name) {
            return change(core.image());
        }
        let context = self.context().map_err(io::Error::other)?;
        change(&Image::open(&context, image_name, None, Access::Watching)?)
    }

    fn refuse_if_open(&self, volume: &str, image_name: &str, doing: &str) -> Result<()> {
        if self.openings.is_open(image_name) {
            let label = self.label(volume);
            return Err(PoolError::InUse(format!("{label}: {doing} refused: it is open; remove its exports first")));
        }
        self.openings.wait_for_closing(Some(image_name));
        Ok(())
    }

    fn refuse_if_taken(&self, volume: &str) -> Result<()> {
        match self.find(volume) {
            Ok(_) => Err(PoolError::Exists(format!("{} exists already", self.label(volume)))),
            Err(PoolError::NotFound(_)) => Ok(()),
            Err(error) => Err(error),
        }
    }

    /// Writes the record of a new image, or takes the image away again.
    fn finish_new(&self, context: &Arc<IoContext>, volume: &str, record: &Record) -> Result<VolumeRecord> {
        let finish = || -> io::Result<VolumeRecord> {
            let image = Image::open(context, volume, None, Access::Watching)?;
            record.write(&image)?;
            record.describe(volume, volume, &image)
        };
        finish().map_err(|source| {
            if let Err(error) = images::remove(context, volume) {
                tracing::warn!("image {}/{volume} is left over from a failed creation: {error}", context.location());
            }
            self.failed(volume, "writing its record", source)
        })
    }

    /// Bytes that the image, and each of its snapshots, take beyond the snapshot before.
    fn measure(&self, found: &Found) -> io::Result<Usage> {
        let context = found.image.context();
        let logical = found.image.size()?;
        let mut allocated = 0;
        found.image.allocated(None, false, 0, logical, |_, len| allocated += len)?;
        let mut total = 0;
        let mut before: Option<String> = None;
        for snapshot in found.image.snapshots()? {
            let image = Image::open(context, &found.image_name, Some(&snapshot.name), Access::Glance)?;
            image.allocated(before.as_deref(), false, 0, snapshot.size, |_, len| total += len)?;
            before = Some(snapshot.name);
        }
        found.image.allocated(before.as_deref(), false, 0, logical, |_, len| total += len)?;
        Ok(Usage { logical, allocated, snapshots: total.saturating_sub(allocated), reduced: None, shares: None, log: None })
    }
}

impl Pool for RbdPool {
    fn name(&self) -> &str {
        &self.name
    }

    fn driver(&self) -> &'static str {
        "rbd"
    }

    fn location(&self) -> String {
        let RbdPoolConfig { pool, namespace, conf, user, .. } = &self.config;
        let slash = if namespace.is_empty() { "" } else { "/" };
        format!("Ceph pool {pool}{slash}{namespace} of {} as client.{user}", conf.display())
    }

    /// Images whose names no volume can have are left out until they are adopted under another.
    fn list(&self) -> Result<Vec<VolumeRecord>> {
        let context = self.context()?;
        let broken = |source| failed(format!("pool {}: listing its images", self.name), source);
        let aliases = record::aliases(&context).map_err(broken)?;
        let by_image: HashMap<&str, &str> = aliases.iter().map(|(volume, image)| (image.as_str(), volume.as_str())).collect();
        let mut volumes = Vec::new();
        for image in images::list(&context).map_err(broken)? {
            let volume = by_image.get(image.as_str()).copied().unwrap_or(&image);
            if check_name("volume", volume).is_err() {
                continue;
            }
            match self.get(volume) {
                Ok(record) => volumes.push(record),
                Err(PoolError::NotFound(_)) => {}
                // One damaged record hides no other volume.
                Err(PoolError::Io { what, source }) if source.kind() == io::ErrorKind::InvalidData => {
                    tracing::warn!("{what}: {source}")
                }
                Err(error) => return Err(error),
            }
        }
        volumes.sort_by(|one, other| one.name.cmp(&other.name));
        Ok(volumes)
    }

    fn get(&self, volume: &str) -> Result<VolumeRecord> {
        let found = self.find(volume)?;
        let described = found.record.describe(volume, &found.image_name, &found.image);
        described.map_err(|source| self.failed(volume, "reading its image", source))
    }

    fn create(&self, volume: &str, spec: &VolumeSpec) -> Result<VolumeRecord> {
        if spec.wrapped_key.is_some() {
            let label = self.label(volume);
            return Err(PoolError::Unsupported(format!(
                "{label}: encryption is not possible with the rbd driver; use a file pool"
            )));
        }
        if spec.size == 0 || !spec.size.is_multiple_of(u64::from(spec.block_size)) {
            let label = self.label(volume);
            return Err(PoolError::Invalid(format!(
                "{label}: size {} is no multiple of its blocks of {}",
                spec.size, spec.block_size
            )));
        }
        self.refuse_if_taken(volume)?;
        let context = self.context()?;
        let created = images::create(&context, volume, spec.size);
        created.map_err(|source| self.failed(volume, "creating its image", source))?;
        let mut record = Record::new(spec.block_size);
        (record.policy, record.tenant) = (spec.policy.clone(), spec.tenant.clone());
        self.finish_new(&context, volume, &record)
    }

    fn adopt(&self, object: &str, volume: &str) -> Result<VolumeRecord> {
        let context = self.context()?;
        if object != volume {
            self.refuse_if_taken(volume)?;
        }
        let broken = |source: io::Error| match source.raw_os_error() {
            Some(libc::ENOENT) => {
                PoolError::NotFound(format!("pool {}: no image {object}; `rbd ls {}` shows them", self.name, context.location()))
            }
            _ => self.failed(volume, &format!("adopting image {object}"), source),
        };
        let mut record = {
            let image = Image::open(&context, object, None, Access::Glance).map_err(broken)?;
            Record::read(&image).map_err(broken)?
        };
        if record.created && object != volume {
            return Err(PoolError::Exists(format!("image {object} is volume {}/{object} already; rename that", self.name)));
        }
        if let Some(name) = record.name.as_deref().filter(|name| *name != volume && !record.forgotten) {
            return Err(PoolError::Exists(format!("image {object} is volume {}/{name} already; rename that", self.name)));
        }
        record.forgotten = false;
        record.name = (object != volume).then(|| volume.to_owned());
        if record.name.is_some() {
            record::set_alias(&context, volume, object).map_err(broken)?;
        }
        self.change(object, |image| record.write(image)).map_err(broken)?;
        self.get(volume)
    }

    fn open(&self, volume: &str, read_only: bool) -> Result<Arc<dyn BlockDevice>> {
        let Found { image_name, .. } = self.find(volume)?;
        Ok(Arc::new(RbdDevice::open(&self.context()?, &self.openings, &image_name, None, read_only)?))
    }

    fn open_snapshot(&self, volume: &str, snapshot: &str) -> Result<Arc<dyn BlockDevice>> {
        let Found { image_name, .. } = self.find(volume)?;
        let opened = RbdDevice::open(&self.context()?, &self.openings, &image_name, Some(snapshot), true);
        match opened {
            Err(DeviceError::Io { what, source }) => Err(failed(what, source)),
            opened => Ok(Arc::new(opened?)),
        }
    }

    /// The image knows.
    fn resized(&self, _volume: &str, _size: u64) -> Result<()> {
        Ok(())
    }

    fn rename(&self, volume: &str, to: &str) -> Result<()> {
        let Found { image_name, mut record, image } = self.find(volume)?;
        drop(image);
        self.refuse_if_taken(to)?;
        let context = self.context()?;
        let broken = |source| self.failed(volume, &format!("renaming it to {to}"), source);
        if record.created {
            images::rename(&context, &image_name, to).map_err(broken)?;
            self.openings.rename(&image_name, to);
            return Ok(());
        }
        record.name = (to != image_name).then(|| to.to_owned());
        if record.name.is_some() {
            record::set_alias(&context, to, &image_name).map_err(broken)?;
        }
        self.change(&image_name, |image| record.write(image)).map_err(broken)?;
        record::remove_alias(&context, volume).map_err(broken)
    }

    fn delete(&self, volume: &str) -> Result<()> {
        let Found { image_name, mut record, image } = self.find(volume)?;
        let label = self.label(volume);
        self.refuse_if_open(volume, &image_name, "delete")?;
        let context = self.context()?;
        let broken = |source: io::Error| match source.raw_os_error() {
            Some(libc::EBUSY) => PoolError::InUse(format!(
                "{label}: delete refused: a Ceph client has it open; close it there (a client that died is let go of after about 30 s)"
            )),
            Some(libc::ENOTEMPTY) => {
                PoolError::InUse(format!("{label}: delete refused: clones depend on it; flatten or delete them first"))
            }
            _ => self.failed(volume, "deleting it", source),
        };
        if !record.created {
            record.forgotten = true;
            drop(image);
            self.change(&image_name, |image| record.write(image)).map_err(broken)?;
            return record::remove_alias(&context, volume).map_err(broken);
        }
        let snapshots = image.snapshots().map_err(broken)?;
        if let Some(snapshot) = snapshots.first() {
            return Err(PoolError::InUse(format!(
                "{label}: delete refused: it has {} snapshots; delete them first, beginning with {volume}@{}",
                snapshots.len(),
                snapshot.name
            )));
        }
        drop(image);
        images::remove(&context, &image_name).map_err(broken)
    }

    fn clone_volume(&self, volume: &str, snapshot: Option<&str>, to: &str) -> Result<VolumeRecord> {
        let Found { image_name, image, record: parent } = self.find(volume)?;
        drop(image);
        self.refuse_if_taken(to)?;
        let context = self.context()?;
        let broken = |source| self.failed(volume, &format!("cloning it to {to}"), source);
        let mut record = Record::new(parent.block_size);
        (record.policy, record.tenant) = (parent.policy, parent.tenant);
        match snapshot {
            Some(snapshot) => {
                images::clone(&context, &image_name, snapshot, to).map_err(broken)?;
                record.origin = Some(format!("{volume}@{snapshot}"));
            }
            None => {
                // A clone needs a snapshot: one made for it, which Ceph keeps out of sight as long as the clone needs it.
                let passing = format!("clone-{}", record.uuid.simple());
                self.change(&image_name, |image| image.create_snapshot(&passing)).map_err(broken)?;
                let cloned = images::clone(&context, &image_name, &passing, to);
                let removed = self.change(&image_name, |image| image.remove_snapshot(&passing));
                cloned.and(removed).map_err(broken)?;
                record.origin = Some(volume.to_owned());
            }
        }
        self.finish_new(&context, to, &record)
    }

    fn flatten(&self, volume: &str, progress: &(dyn Fn(u64, u64) + Sync)) -> Result<Flattened> {
        let Found { image_name, image, .. } = self.find(volume)?;
        let broken = |source| self.failed(volume, "flattening it", source);
        let has_parent = image.has_parent().map_err(broken)?;
        if !has_parent && Record::read(&image).map_err(broken)?.origin.is_none() {
            return Ok(Flattened::NoParent);
        }
        let object_size = image.object_size().map_err(broken)?;
        drop(image);
        let flatten = |image: &Image| -> io::Result<()> {
            if has_parent {
                image.flatten(|done, total| progress(done * object_size, total * object_size))?;
            }
            let record = Record::read(image)?;
            match record.origin {
                Some(_) => Record { origin: None, ..record }.write(image),
                None => Ok(()),
            }
        };
        self.change(&image_name, flatten).map_err(broken)?;
        Ok(if has_parent { Flattened::Copied } else { Flattened::NoParent })
    }

    /// Each image's snapshot is taken in turn: the caller holds back writes meanwhile.
    fn snapshot(&self, volumes: &[&str], snapshot: &str) -> Result<BTreeMap<String, SnapshotRecord>> {
        let mut images = Vec::with_capacity(volumes.len());
        for volume in volumes {
            images.push(self.find(volume)?.image_name);
        }
        for (number, image_name) in images.iter().enumerate() {
            let Err(source) = self.change(image_name, |image| image.create_snapshot(snapshot)) else { continue };
            for made in &images[..number] {
                if let Err(error) = self.change(made, |image| image.remove_snapshot(snapshot)) {
                    tracing::warn!("snapshot {made}@{snapshot} is left over from a failed group: {error}");
                }
            }
            return Err(self.failed(volumes[number], &format!("taking snapshot {snapshot}"), source));
        }
        let mut made = BTreeMap::new();
        for volume in volumes {
            let record = self.get(volume)?.snapshots.remove(snapshot);
            made.extend(record.map(|record| ((*volume).to_owned(), record)));
        }
        Ok(made)
    }

    fn delete_snapshot(&self, volume: &str, snapshot: &str) -> Result<()> {
        let Found { image_name, .. } = self.find(volume)?;
        self.change(&image_name, |image| image.remove_snapshot(snapshot)).map_err(|source| match source.raw_os_error() {
            Some(libc::EBUSY) => PoolError::InUse(format!(
                "{}@{snapshot}: delete refused: it is protected; flatten its clones and run `rbd snap unprotect`",
                self.label(volume)
            )),
            _ => self.failed(volume, &format!("deleting snapshot {snapshot}"), source),
        })
    }

    fn rollback(&self, volume: &str, snapshot: &str) -> Result<()> {
        let Found { image_name, image, .. } = self.find(volume)?;
        drop(image);
        self.refuse_if_open(volume, &image_name, "rollback")?;
        let broken = |source| self.failed(volume, &format!("rolling back to snapshot {snapshot}"), source);
        let image = Image::open(&self.context()?, &image_name, None, Access::Watching).map_err(broken)?;
        lock::take(&image)?;
        image.roll_back(snapshot).map_err(broken)
    }

    /// Whole objects count as taken where the image keeps a map of them, so small writes weigh 4 MiB each.
    fn usage(&self, volume: &str) -> Result<Usage> {
        let found = self.find(volume)?;
        self.measure(&found).map_err(|source| self.failed(volume, "measuring its space", source))
    }

    fn health(&self) -> PoolHealth {
        let down = |detail: String| PoolHealth { ok: false, detail, total: None, free: None };
        let context = match self.context() {
            Ok(context) => context,
            Err(error) => return down(error.to_string()),
        };
        match context.cluster.space() {
            Ok(space) => PoolHealth {
                ok: true,
                detail: format!("cluster {} answers ({})", context.cluster.fsid(), context.library().versions()),
                total: space.map(|(total, _)| total),
                free: space.map(|(_, free)| free),
            },
            Err(error) => down(format!("the monitors of cluster {} do not answer: {error}", context.cluster.fsid())),
        }
    }

    fn check(&self, _progress: &dyn Fn(u64, u64)) -> Result<Vec<String>> {
        let context = self.context()?;
        let broken = |source| failed(format!("pool {}: listing its images", self.name), source);
        let names = images::list(&context).map_err(broken)?;
        let mut findings = Vec::new();
        for (volume, image) in record::aliases(&context).map_err(broken)? {
            if !names.contains(&image) {
                findings.push(format!("{}: its image {image} is gone; `volume delete` forgets it", self.label(&volume)));
            }
        }
        for name in names {
            match Image::open(&context, &name, None, Access::Glance).and_then(|image| check_image(&image)) {
                Ok(found) => findings.extend(found),
                Err(error) => findings.push(format!("image {}/{name} cannot be examined: {error}", context.location())),
            }
        }
        Ok(findings)
    }
}

fn check_image(image: &Image) -> io::Result<Vec<String>> {
    let spec = image.spec();
    let mut findings = Vec::new();
    if image.features()? & FEATURE_EXCLUSIVE_LOCK == 0 {
        findings.push(format!("image {spec} cannot be locked: run `rbd feature enable {spec} exclusive-lock`"));
    }
    if image.flags()? & FLAG_FAST_DIFF_INVALID != 0 {
        findings.push(format!("image {spec} has a stale object map: run `rbd object-map rebuild {spec}`"));
    }
    if let Err(error) = Record::read(image) {
        findings.push(format!("image {spec}: its record is damaged: {error}"));
    }
    Ok(findings)
}

impl Drop for RbdPool {
    fn drop(&mut self) {
        self.openings.wait_for_closing(None);
    }
}
