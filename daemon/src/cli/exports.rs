//! `novastor export`.

use serde_json::json;

use super::Context;
use super::arguments::Export;
use super::output::{facts, table};
use super::paste;
use crate::api::reply::Done;
use crate::api::types::{Disconnect, Disconnected, ExportCreate, ExportInfo, Protocol};
use crate::client::encode;
use crate::units::{format_size, format_time};

pub fn run(context: &Context, command: Export) -> anyhow::Result<()> {
    let output = context.output;
    let path = |id: &str| format!("/v1/exports/{}", encode(id));
    match command {
        Export::Add { volume, nbd, vhost_user, queues, read_only, mode, group, tls_allow, accept_loss, consent } => {
            if accept_loss {
                let what =
                    format!("Opening volume {volume} without its log loses what only the log had, acknowledged writes among it.");
                output.confirm(consent.yes, &what)?;
            }
            let (protocol, address) = match vhost_user {
                Some(path) => (Protocol::VhostUser, Some(format!("unix:{}", std::path::absolute(path)?.display()))),
                None => (Protocol::Nbd, nbd.filter(|address| !address.is_empty()).map(own_listener).transpose()?),
            };
            let request = ExportCreate { volume, protocol, address, queues, read_only, mode, group, tls_allow, accept_loss };
            let export: ExportInfo = context.client()?.post("/v1/exports", &request)?;
            let id = export.id.clone();
            output.print_id(&paste::WithLines::new(export), &id, |export| {
                format!("export {} of {} is ready\n\n{}", export.export.id, export.export.volume, export.text())
            })
        }
        Export::List => {
            let exports: Vec<ExportInfo> = context.client()?.get("/v1/exports")?;
            output.print(&exports, |exports| list(exports))
        }
        Export::Show { id } => {
            let export: ExportInfo = context.client()?.get(&path(&id))?;
            output.print(&paste::WithLines::new(export), |export| format!("{}\n\n{}", show(&export.export), export.text()))
        }
        Export::Remove { id } => {
            let done: Done = context.client()?.delete(&path(&id))?;
            output.print(&done, |_| format!("export {id} removed"))
        }
        Export::Reopen { id } => {
            let export: ExportInfo = context.client()?.post(&format!("{}/reopen", path(&id)), &json!({}))?;
            output.print(&export, |export| format!("export {id} of {} is ready", export.volume))
        }
        Export::Disconnect { id, client } => {
            let report: Disconnected = context.client()?.post(&format!("{}/disconnect", path(&id)), &Disconnect { client })?;
            output.print(&report, |report| format!("{} clients of export {id} disconnected", report.clients))
        }
    }
}

/// A relative path counts from here, not from where the daemon runs.
fn own_listener(address: String) -> anyhow::Result<String> {
    match address.strip_prefix("unix:") {
        Some(path) if !path.is_empty() => Ok(format!("unix:{}", std::path::absolute(path)?.display())),
        _ => Ok(address),
    }
}

fn protocol(export: &ExportInfo) -> &'static str {
    match export.protocol {
        Protocol::Nbd => "nbd",
        Protocol::VhostUser => "vhost-user",
    }
}

fn state(export: &ExportInfo) -> String {
    match (&export.error, &export.problem) {
        (_, Some(problem)) => format!("problem: {}", problem.split(';').next().unwrap_or_default()),
        _ if export.ready => "ready".to_owned(),
        (Some(error), None) => format!("not served: {error}"),
        (None, None) => "starting".to_owned(),
    }
}

fn list(exports: &[ExportInfo]) -> String {
    let row = |export: &ExportInfo| {
        let access = if export.read_only { "ro" } else { "rw" };
        let place = export.address.clone().unwrap_or_else(|| "shared listeners".to_owned());
        let clients = export.clients.len().to_string();
        [export.id.clone(), export.volume.clone(), protocol(export).to_owned(), access.to_owned(), place, clients, state(export)]
    };
    table(["EXPORT", "VOLUME", "PROTOCOL", "ACCESS", "WHERE", "CLIENTS", "STATE"], exports.iter().map(row))
}

fn show(export: &ExportInfo) -> String {
    let clients: Vec<String> = export
        .clients
        .iter()
        .map(|client| format!("{} ({}) since {}", client.id, client.peer, format_time(client.since)))
        .collect();
    facts([
        ("export", export.id.clone()),
        ("volume", export.volume.clone()),
        ("size", export.size.map(format_size).unwrap_or_default()),
        ("protocol", protocol(export).to_owned()),
        ("where", export.uris.join(", ")),
        ("access", if export.read_only { "read-only".to_owned() } else { "read and write".to_owned() }),
        ("queues", export.queues.map(|queues| queues.to_string()).unwrap_or_default()),
        ("mode", export.mode.clone().unwrap_or_default()),
        ("group", export.group.clone().unwrap_or_default()),
        ("tls allow", export.tls_allow.join(", ")),
        ("declared", if export.declared { "in the configuration".to_owned() } else { String::new() }),
        ("state", state(export)),
        ("problem", export.problem.clone().unwrap_or_default()),
        ("clients", clients.join("\n          ")),
    ])
}
