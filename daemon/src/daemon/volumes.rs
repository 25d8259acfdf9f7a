//! Volumes: create, adopt, show, resize, rename, delete, clone, usage, check.

use std::sync::Arc;

use backends::{Pool, PoolHealth, VolumeRecord, VolumeSpec};

use super::Daemon;
use super::jobs::Job;
use super::pools::Answer;
use crate::api::types::{CheckReport, PoolInfo, SnapshotInfo, VolumeAdopt, VolumeCreate, VolumeInfo, VolumeResize, VolumeUsage};
use crate::error::{Error, Result};
use crate::names::{VolumeId, VolumeRef};
use crate::units::format_size;

const SIZE_MAX: u64 = 1 << 60;

impl Daemon {
    pub fn list_pools(&self) -> Vec<PoolInfo> {
        self.pools.ask(|pool| (pool.location(), pool.health())).into_iter().map(pool_info).collect()
    }

    pub fn show_pool(&self, name: &str) -> Result<PoolInfo> {
        match self.list_pools().into_iter().find(|pool| pool.name == name) {
            Some(pool) => Ok(pool),
            None => Err(self.pools.get(name).err().unwrap_or_else(|| Error::not_found(format!("pool {name}")))),
        }
    }

    pub fn check_pool(&self, name: &str) -> Result<CheckReport> {
        let problems = self.pools.get(name)?.check()?;
        Ok(CheckReport { subject: name.to_owned(), ok: problems.is_empty(), problems })
    }

    pub fn list_volumes(&self, pool: Option<&str>) -> Result<Vec<VolumeInfo>> {
        if let Some(name) = pool {
            let records = self.pools.get(name)?.list()?;
            return Ok(records.into_iter().map(|record| self.volume_info(name, record)).collect());
        }
        let mut volumes = Vec::new();
        for Answer { pool, answer, .. } in self.pools.ask(|pool| pool.list()) {
            match answer {
                Ok(records) => volumes.extend(records?.into_iter().map(|record| self.volume_info(&pool, record))),
                Err(why) => tracing::debug!("pool {pool} is left out of the list of volumes: {why}"),
            }
        }
        Ok(volumes)
    }

    pub fn show_volume(&self, name: &str) -> Result<VolumeInfo> {
        let id = self.resolve(&name.parse::<VolumeRef>()?.without_snapshot()?)?;
        Ok(self.volume_info(&id.pool, self.record(&id)?))
    }

    fn volume_info(&self, pool: &str, record: VolumeRecord) -> VolumeInfo {
        let id = VolumeId::new(pool, &record.name);
        let open = self.open.get(&id);
        let snapshots = record.snapshots.iter().map(|(name, snapshot)| SnapshotInfo {
            name: format!("{id}@{name}"),
            created: snapshot.created,
            size: snapshot.size,
        });
        VolumeInfo {
            pool: pool.to_owned(),
            uuid: record.uuid.to_string(),
            size: open.as_ref().map_or(record.size, |volume| volume.size()),
            block_size: record.block_size,
            layout: "raw".to_owned(),
            policy: record.policy,
            tenant: record.tenant,
            object: record.object,
            origin: record.origin,
            snapshots: snapshots.collect(),
            exports: self.exports.ids_of(&id),
            open: open.is_some(),
            problem: open.as_ref().and_then(|volume| volume.health()),
            last_error: open.as_ref().and_then(|volume| volume.last_error()),
            name: record.name,
        }
    }

    /// The pool for a new volume: as named, or the only one, or the one called `local`.
    fn pool_for(&self, named: Option<&str>) -> Result<(String, Arc<dyn Pool>)> {
        let names = self.pools.names();
        let chosen = match (named, names.as_slice()) {
            (Some(name), _) => name.to_owned(),
            (None, [only]) => only.clone(),
            (None, names) if names.iter().any(|name| name == "local") => "local".to_owned(),
            (None, []) => return Err(Error::invalid("no pool is configured: add [pool.NAME] to the configuration")),
            (None, names) => return Err(Error::invalid(format!("which pool? add --pool with one of {}", names.join(", ")))),
        };
        let pool = self.pools.get(&chosen)?;
        Ok((chosen, pool))
    }

    pub fn create_volume(&self, request: &VolumeCreate) -> Result<VolumeInfo> {
        let name: VolumeRef = request.name.parse::<VolumeRef>()?.without_snapshot()?;
        if let (Some(left), Some(right)) = (&name.pool, &request.pool)
            && left != right
        {
            return Err(Error::invalid(format!("volume {name}: the name says pool {left}, --pool says {right}")));
        }
        match request.layout.as_deref() {
            None | Some("raw") => {}
            Some("mapped") => {
                let message =
                    format!("volume {name}: layout mapped is not in this version; --layout raw works, and is the default");
                return Err(Error::unsupported(message));
            }
            Some(other) => return Err(Error::invalid(format!("volume {name}: no layout {other:?}; raw works"))),
        }
        if let Some(policy) = request.policy.as_ref().filter(|policy| !self.config().policy.contains_key(*policy)) {
            return Err(Error::not_found(format!("policy {policy} is not configured: add [policy.{policy}]")));
        }
        let block_size = request.block_size.unwrap_or(512);
        if ![512, 4096].contains(&block_size) {
            return Err(Error::invalid(format!("volume {name}: block size {block_size}: choose 512 or 4096")));
        }
        check_size(&name.name, request.size, block_size)?;
        let (pool_name, pool) = self.pool_for(name.pool.as_deref().or(request.pool.as_deref()))?;
        let id = VolumeId::new(&pool_name, &name.name);
        let _held = self.hold([&id]);
        let spec = VolumeSpec { size: request.size, block_size, policy: request.policy.clone(), tenant: request.tenant.clone() };
        let record = pool.create(&name.name, &spec).map_err(|error| Error::from(error).of(format!("volume {}", name.name)))?;
        Ok(self.volume_info(&pool_name, record))
    }

    pub fn adopt_volume(&self, request: &VolumeAdopt) -> Result<VolumeInfo> {
        let pool = self.pools.get(&request.pool)?;
        let name = match &request.name {
            Some(name) => name.clone(),
            None => name_after(&request.object)?,
        };
        backends::check_name("volume", &name)?;
        let id = VolumeId::new(&request.pool, &name);
        let _held = self.hold([&id]);
        let record = pool.adopt(&request.object, &name)?;
        Ok(self.volume_info(&request.pool, record))
    }

    pub fn resize_volume(&self, name: &str, request: &VolumeResize) -> Result<VolumeInfo> {
        let id = self.resolve(&name.parse::<VolumeRef>()?.without_snapshot()?)?;
        let _held = self.hold([&id]);
        let record = self.record(&id)?;
        check_size(&id.name, request.size, record.block_size)?;
        let lease = self.lease(&id, true)?;
        let now = lease.volume().size();
        if request.size < now && !request.shrink {
            let (wanted, now) = (format_size(request.size), format_size(now));
            return Err(Error::invalid(format!(
                "volume {}: resize to {wanted} refused: smaller than now ({now}); shrinking needs --shrink, and loses data past {wanted}",
                id.name
            )));
        }
        if request.size != now {
            lease.volume().resize(request.size)?;
        }
        self.pools.get(&id.pool)?.resized(&id.name, request.size)?;
        drop(lease);
        self.show_volume(&id.to_string())
    }

    pub fn rename_volume(&self, name: &str, to: &str) -> Result<VolumeInfo> {
        let id = self.resolve(&name.parse::<VolumeRef>()?.without_snapshot()?)?;
        let to = to.parse::<VolumeRef>()?.without_snapshot()?;
        if to.pool.as_ref().is_some_and(|pool| *pool != id.pool) {
            let message = format!("volume {id}: rename does not move it to another pool; export and import an image instead");
            return Err(Error::invalid(message));
        }
        let target = VolumeId::new(&id.pool, &to.name);
        let _held = self.hold([&id, &target]);
        self.ensure_unused(&id, "rename")?;
        self.pools.get(&id.pool)?.rename(&id.name, &to.name)?;
        self.show_volume(&target.to_string())
    }

    pub fn delete_volume(&self, name: &str) -> Result<()> {
        let id = self.resolve(&name.parse::<VolumeRef>()?.without_snapshot()?)?;
        let _held = self.hold([&id]);
        self.ensure_unused(&id, "delete")?;
        Ok(self.pools.get(&id.pool)?.delete(&id.name)?)
    }

    pub fn clone_volume(&self, name: &str, to: &str) -> Result<VolumeInfo> {
        let source = self.resolve_text(name)?;
        let to = to.parse::<VolumeRef>()?.without_snapshot()?;
        if to.pool.as_ref().is_some_and(|pool| *pool != source.pool) {
            let message = format!(
                "clone of {source} refused: a clone lives in its origin's pool ({}); for another pool, export and import an image",
                source.pool
            );
            return Err(Error::invalid(message));
        }
        let target = VolumeId::new(&source.pool, &to.name);
        let _held = self.hold([&source, &target]);
        let pool = self.pools.get(&source.pool)?;
        let record = match &source.snapshot {
            Some(snapshot) => pool.clone_volume(&source.name, Some(snapshot), &to.name)?,
            None => {
                self.with_writes_held(std::slice::from_ref(&source), || Ok(pool.clone_volume(&source.name, None, &to.name)?))?
            }
        };
        Ok(self.volume_info(&source.pool, record))
    }

    /// A raw clone that shares nothing with its origin needs no flattening; what does is refused in words.
    pub fn flatten_volume(&self, name: &str) -> Result<()> {
        let id = self.resolve(&name.parse::<VolumeRef>()?.without_snapshot()?)?;
        let record = self.record(&id)?;
        let driver = self.pools.get(&id.pool)?.driver();
        match (&record.origin, driver) {
            (None, _) => Err(Error::invalid(format!("volume {id} is no clone: there is nothing to flatten"))),
            (Some(origin), "rbd") => Err(Error::unsupported(format!(
                "volume {id}: flattening a clone of {origin} is not in this version; use `rbd flatten` on its image"
            ))),
            (Some(origin), _) => Err(Error::unsupported(format!(
                "volume {id} shares only blocks of the file system with {origin} and does not depend on it: nothing to flatten"
            ))),
        }
    }

    pub fn volume_usage(&self, name: &str) -> Result<VolumeUsage> {
        let id = self.resolve(&name.parse::<VolumeRef>()?.without_snapshot()?)?;
        let usage = self.pools.get(&id.pool)?.usage(&id.name)?;
        Ok(VolumeUsage { volume: id.to_string(), logical: usage.logical, allocated: usage.allocated, snapshots: usage.snapshots })
    }

    /// Whether the volume opens, has the size that the catalogue says, and is healthy.
    pub fn check_volume(&self, name: &str, job: &Job) -> Result<CheckReport> {
        let id = self.resolve(&name.parse::<VolumeRef>()?.without_snapshot()?)?;
        let _held = self.hold([&id]);
        job.check_cancelled()?;
        let record = self.record(&id)?;
        let mut problems = Vec::new();
        match self.lease(&id, false) {
            Err(error) => problems.push(format!("it does not open: {error}")),
            Ok(lease) => {
                let size = lease.volume().size();
                if size != record.size {
                    let (real, noted) = (format_size(size), format_size(record.size));
                    problems
                        .push(format!("it is {real} ({size} bytes) large, the catalogue says {noted} ({} bytes)", record.size));
                }
                problems.extend(lease.volume().health());
            }
        }
        Ok(CheckReport { subject: id.to_string(), ok: problems.is_empty(), problems })
    }

    /// Refuses `what` while the volume or one of its snapshots is exported, even by an export that does not run now.
    pub(super) fn ensure_unused(&self, id: &VolumeId, what: &str) -> Result<()> {
        let exports = self.exports.ids_of(id);
        if !exports.is_empty() {
            let ids = exports.join(", ");
            return Err(Error::in_use(format!(
                "volume {id}: {what} refused: it is exported ({ids}); `novastor export remove` first"
            )));
        }
        self.open.ensure_closed(id, true, what)
    }
}

fn pool_info(answer: Answer<(String, PoolHealth)>) -> PoolInfo {
    let (location, health) =
        answer.answer.unwrap_or_else(|why| (String::new(), PoolHealth { ok: false, detail: why, total: None, free: None }));
    PoolInfo {
        name: answer.pool,
        driver: answer.driver,
        location,
        ok: health.ok,
        detail: health.detail,
        total: health.total,
        free: health.free,
    }
}

fn check_size(name: &str, size: u64, block_size: u32) -> Result<()> {
    if size == 0 || size > SIZE_MAX {
        return Err(Error::invalid(format!("volume {name}: size {size} refused: choose 1 block to 1024P")));
    }
    if !size.is_multiple_of(u64::from(block_size)) {
        let next = size.next_multiple_of(u64::from(block_size));
        return Err(Error::invalid(format!(
            "volume {name}: size {size} is no multiple of its block size {block_size}: the next is {next}"
        )));
    }
    Ok(())
}

/// A volume name made from the last part of an object's name.
fn name_after(object: &str) -> Result<String> {
    let last = object.rsplit('/').next().unwrap_or(object);
    let stem = last.strip_suffix(".raw").or_else(|| last.strip_suffix(".img")).unwrap_or(last);
    let name = stem.to_ascii_lowercase();
    match backends::check_name("volume", &name) {
        Ok(()) => Ok(name),
        Err(_) => Err(Error::invalid(format!(
            "{object:?} gives no good volume name: name it, `novastor volume adopt POOL/OBJECT NAME`"
        ))),
    }
}
