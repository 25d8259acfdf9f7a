//! `novastor snapshot`.

use super::arguments::Snapshot;
use super::output::table;
use super::volumes::query;
use super::{Context, long};
use crate::api::reply::{Done, Listed};
use crate::api::types::{SnapshotCreate, SnapshotDiff, SnapshotInfo};
use crate::client::encode;
use crate::units::{format_size, format_time};

pub fn run(context: &Context, command: Snapshot) -> anyhow::Result<()> {
    let output = context.output;
    match command {
        Snapshot::Create { snapshots, claim } => {
            let request = SnapshotCreate { snapshots, take_over: claim.take_over };
            let made: Vec<SnapshotInfo> = context.client()?.post("/v1/snapshots", &request)?;
            output.print(&made, |made| {
                made.iter().map(|snapshot| format!("snapshot {} created", snapshot.name)).collect::<Vec<_>>().join("\n")
            })
        }
        Snapshot::List { volume } => {
            let query = volume.map(|volume| format!("?volume={}", encode(&volume))).unwrap_or_default();
            let snapshots: Listed<SnapshotInfo> = context.client()?.list(&format!("/v1/snapshots{query}"))?;
            output.print_list(snapshots, list)
        }
        Snapshot::Delete { snapshot, claim, consent } => {
            output.confirm(consent.yes, &format!("Deleting snapshot {snapshot} loses that state."))?;
            let path = format!("/v1/snapshots/{}{}", encode(&snapshot), query(&claim));
            let done: Done = long::run(context, "snapshot delete", |client| client.delete(&path))?;
            output.print(&done, |_| format!("snapshot {snapshot} deleted"))
        }
        Snapshot::Rollback { snapshot, claim, consent } => {
            output.confirm(consent.yes, &format!("Rolling back to {snapshot} loses everything written since."))?;
            let path = format!("/v1/snapshots/{}/rollback{}", encode(&snapshot), query(&claim));
            let done: Done = long::post(context, "snapshot rollback", &path)?;
            output.print(&done, |_| format!("rolled back to {snapshot}"))
        }
        Snapshot::Diff { from, to, claim } => {
            let to = to.unwrap_or_else(|| from.split('@').next().unwrap_or_default().to_owned());
            let path = format!("/v1/snapshots/diff?from={}&to={}&take_over={}", encode(&from), encode(&to), claim.take_over);
            let diff: SnapshotDiff = long::run(context, "snapshot diff", |client| client.get(&path))?;
            output.print(&diff, diff_text)
        }
    }
}

fn list(snapshots: &[SnapshotInfo]) -> String {
    let row = |snapshot: &SnapshotInfo| [snapshot.name.clone(), format_size(snapshot.size), format_time(snapshot.created)];
    table(["SNAPSHOT", "SIZE", "CREATED"], snapshots.iter().map(row))
}

fn diff_text(diff: &SnapshotDiff) -> String {
    let head = format!("{} changed between {} and {}", format_size(diff.changed_bytes), diff.from, diff.to);
    if diff.changed.is_empty() {
        return head;
    }
    let rows = diff.changed.iter().map(|range| [range.offset.to_string(), range.length.to_string()]);
    format!("{}\n{head}", table(["OFFSET", "LENGTH"], rows))
}
