//! `novastor volume`.

use super::arguments::{Claim, Usage, Volume};
use super::output::{facts, table};
use super::{Context, long};
use crate::api::reply::{Done, Listed};
use crate::api::types::{
    CheckReport, VolumeAdopt, VolumeClone, VolumeCreate, VolumeFlattened, VolumeInfo, VolumeRename, VolumeResize, VolumeUsage,
};
use crate::client::encode;
use crate::units::format_size;

pub fn run(context: &Context, command: Volume) -> anyhow::Result<()> {
    let output = context.output;
    let path = |volume: &str| format!("/v1/volumes/{}", encode(volume));
    match command {
        Volume::Create { name, size, pool, layout, block_size, policy, tenant } => {
            let request = VolumeCreate { name, size, pool, layout, block_size, policy, tenant, for_import: false };
            let volume: VolumeInfo = context.client()?.post("/v1/volumes", &request)?;
            output.print(&volume, |volume| format!("volume {} created: {}", full(volume), format_size(volume.size)))
        }
        Volume::Adopt { object, name } => {
            let Some((pool, object)) = object.split_once('/').filter(|(pool, _)| !pool.is_empty()) else {
                return Err(Usage(format!(
                    "{object:?}: write POOL/OBJECT; of a file, POOL and its path from / on: local//srv/disk.raw"
                ))
                .into());
            };
            let request = VolumeAdopt { pool: pool.to_owned(), object: object.to_owned(), name };
            let volume: VolumeInfo = context.client()?.post("/v1/adoptions", &request)?;
            output.print(&volume, |volume| format!("volume {} adopted: {}", full(volume), format_size(volume.size)))
        }
        Volume::List { pool } => {
            let query = pool.map(|pool| format!("?pool={}", encode(&pool))).unwrap_or_default();
            let volumes: Listed<VolumeInfo> = context.client()?.list(&format!("/v1/volumes{query}"))?;
            output.print_list(volumes, list)
        }
        Volume::Show { volume } => {
            let volume: VolumeInfo = context.client()?.get(&path(&volume))?;
            output.print(&volume, show)
        }
        Volume::Resize { volume, size, shrink, claim, consent } => {
            if shrink {
                let what = format!("Shrinking volume {volume} loses all data past {}.", format_size(size));
                output.confirm(consent.yes, &what)?;
            }
            let request = VolumeResize { size, shrink, take_over: claim.take_over };
            let volume: VolumeInfo = context.client()?.post(&format!("{}/resize", path(&volume)), &request)?;
            output.print(&volume, |volume| format!("volume {} is {} now", full(volume), format_size(volume.size)))
        }
        Volume::Rename { volume, name } => {
            let renamed: VolumeInfo = context.client()?.post(&format!("{}/rename", path(&volume)), &VolumeRename { name })?;
            output.print(&renamed, |renamed| format!("volume {volume} is {} now", full(renamed)))
        }
        Volume::Delete { volume, consent } => {
            output.confirm(consent.yes, &format!("Deleting volume {volume} loses its data."))?;
            let done: Done = long::run(context, "volume delete", |client| client.delete(&path(&volume)))?;
            output.print(&done, |_| format!("volume {volume} deleted"))
        }
        Volume::Usage { volume } => {
            let usage: VolumeUsage = context.client()?.get(&format!("{}/usage", path(&volume)))?;
            output.print(&usage, usage_text)
        }
        Volume::Check { volume, claim } => {
            let report: CheckReport = long::post(context, "volume check", &format!("{}/check{}", path(&volume), query(&claim)))?;
            output.print(&report, report_text)?;
            if report.ok { Ok(()) } else { Err(anyhow::anyhow!("volume {volume}: {} problems", report.problems.len())) }
        }
        Volume::Clone { source, name, claim } => {
            let (path, request) = (format!("{}/clone", path(&source)), VolumeClone { name, take_over: claim.take_over });
            let volume: VolumeInfo = long::run(context, "volume clone", |client| client.post(&path, &request))?;
            output.print(&volume, |volume| format!("volume {} cloned from {source}", full(volume)))
        }
        Volume::Flatten { volume, claim } => {
            let path = format!("{}/flatten{}", path(&volume), query(&claim));
            let outcome: VolumeFlattened = long::post(context, "volume flatten", &path)?;
            output.print(&outcome, |outcome| match outcome.flattened {
                true => format!("volume {} depends on no other now", outcome.volume),
                false => format!("volume {} has no parent: nothing to flatten", outcome.volume),
            })
        }
    }
}

/// Of a path whose request takes no body.
pub fn query(claim: &Claim) -> &'static str {
    if claim.take_over { "?take_over=true" } else { "" }
}

fn full(volume: &VolumeInfo) -> String {
    format!("{}/{}", volume.pool, volume.name)
}

fn list(volumes: &[VolumeInfo]) -> String {
    let row = |volume: &VolumeInfo| {
        let state = match (&volume.problem, volume.open) {
            (Some(problem), _) => problem.clone(),
            (None, true) => "open".to_owned(),
            (None, false) => String::new(),
        };
        let (snapshots, exports) = (volume.snapshots.len().to_string(), volume.exports.join(","));
        let (size, block) = (format_size(volume.size), volume.block_size.to_string());
        [full(volume), size, volume.layout.clone(), block, snapshots, exports, state]
    };
    table(["VOLUME", "SIZE", "LAYOUT", "BLOCK", "SNAPSHOTS", "EXPORTS", "STATE"], volumes.iter().map(row))
}

fn show(volume: &VolumeInfo) -> String {
    let snapshots: Vec<_> = volume.snapshots.iter().map(|snapshot| snapshot.name.clone()).collect();
    facts([
        ("volume", full(volume)),
        ("uuid", volume.uuid.clone()),
        ("size", format!("{} ({} bytes)", format_size(volume.size), volume.size)),
        ("block size", volume.block_size.to_string()),
        ("layout", volume.layout.clone()),
        ("policy", volume.policy.clone().unwrap_or_default()),
        ("tenant", volume.tenant.clone().unwrap_or_default()),
        ("group", volume.group.clone().unwrap_or_default()),
        ("object", volume.object.clone().unwrap_or_default()),
        ("origin", volume.origin.clone().unwrap_or_default()),
        ("encrypted", if volume.encrypted { "yes".to_owned() } else { String::new() }),
        ("snapshots", snapshots.join(", ")),
        ("exports", volume.exports.join(", ")),
        ("open", if volume.open { "yes".to_owned() } else { String::new() }),
        ("problem", volume.problem.clone().unwrap_or_default()),
        ("last error", volume.last_error.clone().unwrap_or_default()),
    ])
}

fn usage_text(usage: &VolumeUsage) -> String {
    facts([
        ("volume", usage.volume.clone()),
        ("logical", format_size(usage.logical)),
        ("data", usage.data.map(format_size).unwrap_or_default()),
        ("unique", usage.unique.map(format_size).unwrap_or_default()),
        ("compressed", usage.compressed.map(format_size).unwrap_or_default()),
        ("map", usage.map.map(format_size).unwrap_or_default()),
        ("stored", format_size(usage.stored)),
        ("snapshots", format_size(usage.snapshots)),
        ("reclaimable", usage.reclaimable.map(format_size).unwrap_or_default()),
        ("log", usage.log.map(format_size).unwrap_or_default()),
    ])
}

/// Of a pool or a volume.
pub fn report_text(report: &CheckReport) -> String {
    if report.ok {
        return format!("{}: good", report.subject);
    }
    report.problems.iter().map(|problem| format!("{}: {problem}", report.subject)).collect::<Vec<_>>().join("\n")
}
