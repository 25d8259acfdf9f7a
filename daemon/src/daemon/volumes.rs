//! Volumes: create, show, resize, rename, delete, clone, usage, check.

use std::sync::Arc;

use backends::{Flattened, Layout, Pool, PoolHealth, VolumeRecord, VolumeSpec};

use super::Daemon;
use super::jobs::Job;
use super::mapped;
use super::pools::Answer;
use crate::api::reply::Listed;
use crate::api::types::{
    CheckReport, PoolInfo, SnapshotInfo, Unanswered, VolumeCreate, VolumeFlattened, VolumeInfo, VolumeResize, VolumeUsage,
};
use crate::error::{Error, ErrorKind, Result};
use crate::names::{VolumeId, VolumeRef};
use crate::units::format_size;

const RAW_SIZE_MAX: u64 = 1 << 60;
/// What the map of a mapped volume reaches.
const MAPPED_SIZE_MAX: u64 = 256 << 40;

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

    pub fn check_pool(&self, name: &str, job: &Job) -> Result<CheckReport> {
        let problems = self.pools.get(name)?.check(&|done, total| job.progress(done, Some(total)))?;
        Ok(CheckReport { subject: name.to_owned(), ok: problems.is_empty(), problems })
    }

    /// Of all pools, or of one.
    pub fn list_volumes(&self, pool: Option<&str>) -> Result<Listed<VolumeInfo>> {
        let mut listed = Listed { found: Vec::new(), unanswered: Vec::new() };
        if let Some(name) = pool {
            let records = self.pools.get(name)?.list()?;
            listed.found.extend(records.into_iter().map(|record| self.volume_info(name, record)));
            return Ok(listed);
        }
        for Answer { pool, answer, .. } in self.pools.ask(|pool| pool.list().map_err(|error| error.to_string())) {
            match answer.and_then(|records| records) {
                Ok(records) => listed.found.extend(records.into_iter().map(|record| self.volume_info(&pool, record))),
                Err(error) => listed.unanswered.push(Unanswered { pool, error }),
            }
        }
        Ok(listed)
    }

    pub fn show_volume(&self, name: &str) -> Result<VolumeInfo> {
        let id = self.resolve_to_look(&name.parse::<VolumeRef>()?.without_snapshot()?)?;
        Ok(self.volume_info(&id.pool, self.record(&id)?))
    }

    pub(super) fn volume_info(&self, pool: &str, record: VolumeRecord) -> VolumeInfo {
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
            layout: record.layout.name().to_owned(),
            policy: record.policy,
            tenant: record.tenant,
            group: record.group.map(|group| group.to_string()),
            object: record.object,
            origin: record.origin,
            encrypted: record.encrypted,
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
        let block_size = request.block_size.unwrap_or(512);
        if ![512, 4096].contains(&block_size) {
            return Err(Error::invalid(format!("volume {name}: block size {block_size}: choose 512 or 4096")));
        }
        let (pool_name, pool) = self.pool_for(name.pool.as_deref().or(request.pool.as_deref()))?;
        let layout = layout_for(&name.name, request.layout.as_deref(), &*pool)?;
        check_size(&name.name, request.size, block_size, layout)?;
        self.check_policy(&name.name, request.policy.as_deref(), layout, &*pool)?;
        let id = VolumeId::new(&pool_name, &name.name);
        let _held = self.hold([&id]);
        if request.for_import {
            self.ensure_not_waited_for(&id)?;
        }
        let wrapped_key = match layout {
            Layout::Raw => self.key_for_new(&name.name, request.size, request.policy.as_deref())?,
            Layout::Mapped => None,
        };
        let (policy, tenant) = (request.policy.clone(), request.tenant.clone());
        let spec = VolumeSpec { size: request.size, block_size, layout, policy, tenant, wrapped_key };
        let record = pool.create(&name.name, &spec).map_err(|error| Error::from(error).of(format!("volume {}", name.name)))?;
        Ok(self.volume_info(&pool_name, record))
    }

    /// Refuses a policy that does not exist, or asks for what a volume cannot be.
    fn check_policy(&self, volume: &str, name: Option<&str>, layout: Layout, pool: &dyn Pool) -> Result<()> {
        let Some(name) = name else { return Ok(()) };
        let config = self.config();
        let Some(policy) = config.policy.get(name) else {
            return Err(Error::not_found(format!("policy {name} is not configured: add [policy.{name}]")));
        };
        let Some(why) = mapped::refusal(name, policy, layout) else { return Ok(()) };
        let advice = if pool.layouts().contains(&Layout::Mapped) {
            "choose --layout mapped, or another policy".to_owned()
        } else {
            let (pool, driver) = (pool.name(), pool.driver());
            format!(
                "pool {pool} (driver \"{driver}\") holds raw volumes only: choose a pool with mapped volumes, or another policy"
            )
        };
        Err(Error::unsupported(format!("volume {volume}: {why}; {advice}")))
    }

    /// Refuses to make a volume for an import that would then be refused.
    fn ensure_not_waited_for(&self, id: &VolumeId) -> Result<()> {
        let exports = self.exports.ids_waiting_for(id);
        if exports.is_empty() {
            return Ok(());
        }
        let ids = exports.join(", ");
        Err(Error::in_use(format!(
            "volume {id}: import refused, and no volume made: it is exported ({ids}) as soon as there is one; `novastor export remove` first"
        )))
    }

    pub fn resize_volume(&self, name: &str, request: &VolumeResize) -> Result<VolumeInfo> {
        let id = self.resolve(&name.parse::<VolumeRef>()?.without_snapshot()?)?;
        let _held = self.hold([&id]);
        let record = self.record(&id)?;
        check_size(&id.name, request.size, record.block_size, record.layout)?;
        if request.take_over {
            self.take_over(&id)?;
        }
        let lease = self.lease(&id, true)?;
        let now = lease.volume().size();
        if request.size < now && !request.shrink {
            let (wanted, now) = (format_size(request.size), format_size(now));
            return Err(Error::invalid(format!(
                "volume {}: resize to {wanted} refused: smaller than now ({now}); shrinking needs --shrink, and loses data past {wanted}",
                id.name
            )));
        }
        let pool = self.pools.get(&id.pool)?;
        if request.size < now {
            // An object shorter than its record counts as truncated.
            pool.resized(&id.name, request.size)?;
        }
        if request.size != now {
            let resized = lease.volume().resize(request.size);
            resized.map_err(|error| Error::from(error).of(format!("volume {}", id.name)))?;
        }
        pool.resized(&id.name, request.size)?;
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

    pub fn clone_volume(&self, name: &str, to: &str, takes_over: bool) -> Result<VolumeInfo> {
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
        if takes_over {
            self.take_over(&source)?;
        }
        let pool = self.pools.get(&source.pool)?;
        let clone = || Ok(pool.clone_volume(&source.name, source.snapshot.as_deref(), &to.name)?);
        // The log of a mapped volume says which writes are in a snapshot; none waits for it.
        let needs_hold = source.snapshot.is_none() && self.record(&source)?.layout == Layout::Raw;
        let record = if needs_hold { self.with_writes_held(std::slice::from_ref(&source), clone)? } else { clone()? };
        Ok(self.volume_info(&source.pool, record))
    }

    /// The volume counts as in use meanwhile, so that it stays, but is not held against other operations: this may take hours.
    pub fn flatten_volume(&self, name: &str, takes_over: bool, job: &Job) -> Result<VolumeFlattened> {
        let id = self.resolve(&name.parse::<VolumeRef>()?.without_snapshot()?)?;
        let _lease = {
            let _held = self.hold([&id]);
            if takes_over {
                self.take_over(&id)?;
            }
            self.lease(&id, false)?
        };
        let flattened = self.pools.get(&id.pool)?.flatten(&id.name, &|done, total| job.progress(done, Some(total)))?;
        Ok(VolumeFlattened { volume: id.to_string(), flattened: flattened == Flattened::Copied })
    }

    pub fn volume_usage(&self, name: &str) -> Result<VolumeUsage> {
        let id = self.resolve_to_look(&name.parse::<VolumeRef>()?.without_snapshot()?)?;
        let pool = self.pools.get(&id.pool)?;
        let usage = pool.usage(&id.name)?;
        Ok(VolumeUsage {
            volume: id.to_string(),
            logical: usage.logical,
            stored: usage.allocated,
            snapshots: usage.snapshots,
            data: usage.shares.map(|shares| shares.data),
            reclaimable: usage.shares.map(|shares| shares.reclaimable),
            unique: usage.reduced.map(|reduced| reduced.unique),
            compressed: usage.reduced.map(|reduced| reduced.compressed),
            map: usage.reduced.map(|reduced| reduced.map),
            log: usage.log,
        })
    }

    /// Whether the volume opens, has the size that the catalogue says, and is healthy; of a mapped one, whether all of it can be read.
    /// It counts as in use meanwhile, but is not held against other operations: this may take hours.
    pub fn check_volume(&self, name: &str, takes_over: bool, job: &Job) -> Result<CheckReport> {
        let id = self.resolve(&name.parse::<VolumeRef>()?.without_snapshot()?)?;
        let held = self.hold([&id]);
        let record = self.record(&id)?;
        if takes_over {
            self.take_over(&id)?;
        }
        let mut problems = Vec::new();
        let lease = self.lease(&id, false);
        drop(held);
        match lease {
            Err(error) if error.kind == ErrorKind::TakenOver => return Err(error),
            Err(error) => problems.push(format!("it does not open: {error}")),
            Ok(lease) => {
                let size = lease.volume().size();
                if size != record.size {
                    let (real, noted) = (format_size(size), format_size(record.size));
                    problems
                        .push(format!("it is {real} ({size} bytes) large, the catalogue says {noted} ({} bytes)", record.size));
                }
                problems.extend(lease.volume().health());
                let tell = |done, total| job.progress(done, Some(total));
                problems.extend(self.pools.get(&id.pool)?.check_volume(&id.name, &tell)?);
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

/// The layout of a new volume: as asked for, or the pool's usual one.
fn layout_for(volume: &str, asked: Option<&str>, pool: &dyn Pool) -> Result<Layout> {
    let layouts = pool.layouts();
    let Some(asked) = asked else { return Ok(layouts.first().copied().unwrap_or_default()) };
    let wanted = [Layout::Raw, Layout::Mapped].into_iter().find(|layout| layout.name() == asked);
    let wanted = wanted.ok_or_else(|| Error::invalid(format!("volume {volume}: no layout {asked:?}: choose raw or mapped")))?;
    if layouts.contains(&wanted) {
        return Ok(wanted);
    }
    let holds: Vec<&str> = layouts.iter().map(|layout| layout.name()).collect();
    Err(Error::unsupported(format!(
        "volume {volume}: layout {asked} refused: pool {} (driver \"{}\") holds {} volumes only; choose that, or another pool",
        pool.name(),
        pool.driver(),
        holds.join(" and ")
    )))
}

fn check_size(name: &str, size: u64, block_size: u32, layout: Layout) -> Result<()> {
    let (unit, what, max) = match layout {
        Layout::Raw => (u64::from(block_size), "its block size", RAW_SIZE_MAX),
        Layout::Mapped => (volume::BLOCK as u64, "the block size of mapped volumes,", MAPPED_SIZE_MAX),
    };
    if size == 0 || size > max {
        let (layout, max) = (layout.name(), format_size(max));
        return Err(Error::invalid(format!("volume {name}: size {size} refused: a {layout} volume has {unit} bytes to {max}")));
    }
    if !size.is_multiple_of(unit) {
        let next = size.next_multiple_of(unit);
        return Err(Error::invalid(format!("volume {name}: size {size} is no multiple of {what} {unit}: the next is {next}")));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_told_as_the_layout_has_them() {
        let refused = |size, layout| check_size("v", size, 512, layout).unwrap_err().message;
        assert!(refused(5000, Layout::Mapped).contains("4096: the next is 8192"));
        assert!(refused(5000, Layout::Raw).contains("512: the next is 5120"));
        assert!(refused(0, Layout::Mapped).contains("4096 bytes to 256T"));
        assert!(refused((256 << 40) + 4096, Layout::Mapped).contains("256T"));
        assert!(refused(0, Layout::Raw).contains("512 bytes to 1024P"));
        check_size("v", 256 << 40, 512, Layout::Mapped).unwrap();
    }
}
