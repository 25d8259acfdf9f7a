//! Exports over vhost-user-blk: one socket each.

use std::sync::Arc;

use blockdev::stats::Snapshot;
use vhost_user_blk::{ExportOptions, VhostUserExport};

use super::spec::{ExportRecord, QUEUES_DEFAULT};
use super::{FrontEnd, Lease};
use crate::api::types::ClientInfo;
use crate::daemon::Daemon;
use crate::daemon::listeners::Hold;
use crate::daemon::sockets::SocketRules;
use crate::error::{Error, Result};
use crate::units::unix_seconds;

struct VhostUserFrontEnd {
    export: Arc<VhostUserExport>,
    socket: Option<Hold>,
}

/// Serves one export.
pub fn start(daemon: &Daemon, record: &ExportRecord, lease: &Lease) -> Result<Box<dyn FrontEnd>> {
    let spec = &record.spec;
    let path = spec.socket_path().ok_or_else(|| Error::invalid("vhost-user needs the path of a unix socket"))?;
    let mut rules = SocketRules::from_config(&daemon.config());
    rules.mode = spec.mode.as_deref().and_then(crate::config::parse_mode).unwrap_or(rules.mode);
    rules.group = spec.group.clone().or(rules.group);
    let options = ExportOptions {
        queues_max: spec.queues.unwrap_or(QUEUES_DEFAULT),
        read_only: spec.read_only,
        serial: daemon.record(lease.id())?.uuid.simple().to_string(),
        pin_memory: daemon.config().daemon.pin_guest_memory,
    };
    // Not kept while the daemon is down: a VMM that could connect would wait for an answer with all of its guest stopped.
    let (listener, hold) = daemon.listeners().open_private(&path, &rules)?;
    let data_plane = daemon.plane().handles().to_vec();
    let export = VhostUserExport::start(listener, lease.volume().clone(), data_plane, options)
        .map_err(|error| Error::io(format!("vhost-user socket {}", path.display()), &error))?;
    Ok(Box::new(VhostUserFrontEnd { export, socket: Some(hold) }))
}

impl FrontEnd for VhostUserFrontEnd {
    fn clients(&self) -> Vec<ClientInfo> {
        let info = |client: vhost_user_blk::ClientInfo| ClientInfo {
            id: client.pid.to_string(),
            peer: format!("process {} of user {}, {} queues started", client.pid, client.uid, client.queues_started),
            since: unix_seconds(client.since),
        };
        self.export.clients().into_iter().map(info).collect()
    }

    /// There is at most one.
    fn disconnect(&self, client: Option<&str>) -> usize {
        let attached = self.clients();
        let wanted = attached.iter().any(|other| client.is_none_or(|client| client == other.id));
        if wanted {
            self.export.disconnect();
        }
        usize::from(wanted)
    }

    fn stats(&self) -> Snapshot {
        self.export.stats()
    }

    fn stop(&mut self) {
        self.socket = None;
        self.export.stop();
    }
}
