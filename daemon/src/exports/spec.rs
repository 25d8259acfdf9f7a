//! What an export is, checked; and how the list of them is kept.

use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use uuid::Uuid;

use crate::api::types::{ExportCreate, Protocol};
use crate::config::address::{Address, check_socket_path};
use crate::config::{ExportConfig, NbdTarget, parse_mode};
use crate::daemon::sockets::group_id;
use crate::error::{Error, Result};

/// The most queues of a vhost-user export where nothing else is said.
pub const QUEUES_DEFAULT: u16 = 64;
const QUEUES_MAX: u16 = 256;

/// An export, checked but not resolved: `volume` is as written, or canonical once stored.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ExportSpec {
    pub volume: String,
    pub protocol: Protocol,
    /// `unix:PATH` or `tcp:HOST:PORT`; none for the shared NBD listeners.
    pub address: Option<String>,
    pub queues: Option<u16>,
    #[serde(default)]
    pub read_only: bool,
    pub mode: Option<String>,
    pub group: Option<String>,
    #[serde(default)]
    pub tls_allow: Vec<String>,
}

/// One export as it is kept in `data_dir`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ExportRecord {
    pub id: String,
    /// It stands in the configuration file and goes when it goes from there.
    #[serde(default)]
    pub declared: bool,
    /// What NBD clients ask for. Chosen once, so that a name never comes to mean another volume.
    #[serde(default)]
    pub name: Option<String>,
    /// Of the volume it was made for; none until it is served, and from versions that did not note it.
    #[serde(default)]
    pub volume_uuid: Option<Uuid>,
    /// Another host has had its volume since: it is not served until somebody asks for it, as a guest would find another disk.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub taken_over: bool,
    #[serde(flatten)]
    pub spec: ExportSpec,
}

impl ExportRecord {
    /// If its volume was taken over: that, and the way back.
    pub fn told_taken_over(&self) -> Option<String> {
        let (id, volume) = (&self.id, &self.spec.volume);
        self.taken_over.then(|| {
            format!(
                "another host has taken over volume {volume}; it is not served here by itself, as a guest would find another disk: when that host no \
                 longer exports it, and no guest that remembers it is attached here, `novastor export reopen {id}` takes it back"
            )
        })
    }

    /// Refuses another volume than the one it was made for: a name may have come to mean a new one meanwhile.
    pub fn ensure_same_volume(&self, now: Uuid) -> Result<()> {
        let Some(own) = self.volume_uuid.filter(|own| *own != now) else { return Ok(()) };
        let (id, volume) = (&self.id, &self.spec.volume);
        let way_out = if self.declared {
            format!("take the [[export]] of {volume} out of the configuration, `novastor config reload`, and put it back")
        } else {
            format!("`novastor export remove {id}`")
        };
        Err(Error::not_found(format!(
            "export {id} was of another volume that was called {volume} (UUID {own}); {way_out}, or rename that volume back"
        )))
    }
}

/// The file of exports.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct ExportFile {
    /// The number of the next id; ids are not used twice.
    pub next: u64,
    pub exports: Vec<ExportRecord>,
}

/// Why an export cannot be.
#[derive(Debug)]
pub struct Refusal {
    /// The key of the configuration, and the option of the command; none where it is the address.
    pub key: Option<&'static str>,
    /// What follows the key.
    pub why: String,
}

impl Refusal {
    fn in_command(self, volume: &str) -> Error {
        let option = self.key.map(|key| format!("--{} ", key.replace('_', "-"))).unwrap_or_default();
        Error::invalid(format!("export of {volume} refused: {option}{}", self.why))
    }
}

impl ExportSpec {
    pub fn from_request(request: ExportCreate, has_tls: bool) -> Result<ExportSpec> {
        let spec = ExportSpec {
            volume: request.volume,
            protocol: request.protocol,
            address: request.address,
            queues: request.queues,
            read_only: request.read_only,
            mode: request.mode,
            group: request.group,
            tls_allow: request.tls_allow,
        };
        let volume = spec.volume.clone();
        spec.checked(has_tls).map_err(|refusal| refusal.in_command(&volume))
    }

    pub fn from_config(config: &ExportConfig, has_tls: bool) -> std::result::Result<ExportSpec, Refusal> {
        let (protocol, address) = match (&config.vhost_user, &config.nbd) {
            (Some(path), _) => (Protocol::VhostUser, Some(format!("unix:{}", path.display()))),
            (None, Some(NbdTarget::Own(address))) => (Protocol::Nbd, Some(address.clone())),
            (None, _) => (Protocol::Nbd, None),
        };
        let spec = ExportSpec {
            volume: config.volume.clone(),
            protocol,
            address,
            queues: config.queues,
            read_only: config.read_only,
            mode: config.mode.clone(),
            group: config.group.clone(),
            tls_allow: config.tls_allow.clone(),
        };
        spec.checked(has_tls)
    }

    fn checked(mut self, has_tls: bool) -> std::result::Result<ExportSpec, Refusal> {
        let refuse = |why: String| Err(Refusal { key: None, why });
        let refuse_key = |key: &'static str, why: String| Err(Refusal { key: Some(key), why });
        let address = match self.address.as_deref().map(str::parse::<Address>).transpose() {
            Ok(address) => address,
            Err(why) => return refuse(why),
        };
        if let Some(mode) = self.mode.as_deref().filter(|mode| parse_mode(mode).is_none()) {
            return refuse_key("mode", format!("{mode:?} is no mode: write it in octal, such as \"0660\""));
        }
        let own_socket = matches!(address, Some(Address::Unix(_)));
        let dress = if self.mode.is_some() { Some("mode") } else { self.group.as_ref().map(|_| "group") };
        if let Some(key) = dress.filter(|_| !own_socket) {
            return refuse_key(key, "is for an export with a socket of its own".to_owned());
        }
        if let Some(Err(error)) = self.group.as_deref().map(group_id) {
            return refuse_key("group", error.message);
        }
        match self.protocol {
            Protocol::VhostUser => {
                if !own_socket {
                    return refuse("vhost-user needs the path of a unix socket".to_owned());
                }
                if !self.tls_allow.is_empty() {
                    return refuse_key(
                        "tls_allow",
                        "is for NBD; vhost-user has no TLS: use the mode and group of its socket".to_owned(),
                    );
                }
                let queues = *self.queues.get_or_insert(QUEUES_DEFAULT);
                if !(1..=QUEUES_MAX).contains(&queues) {
                    return refuse_key("queues", format!("{queues}: choose 1 to {QUEUES_MAX}"));
                }
            }
            Protocol::Nbd => {
                if self.queues.is_some() {
                    return refuse_key(
                        "queues",
                        "is for vhost-user; an NBD client opens as many connections as it likes".to_owned(),
                    );
                }
                if !self.tls_allow.is_empty() && !has_tls {
                    return refuse_key("tls_allow", "needs [tls] in the configuration".to_owned());
                }
                if let Some(address) = address.as_ref().filter(|address| !address.is_local() && !has_tls) {
                    return refuse(format!("{address} can be reached from other hosts: that needs [tls], or use 127.0.0.1"));
                }
            }
        }
        let address = address.map(absolute);
        let socket = address.as_ref().and_then(Address::unix_path);
        if let Some(Err(why)) = socket.map(|path| check_socket_path(&path.to_string_lossy())) {
            return refuse(why);
        }
        self.address = address.map(|address| address.to_string());
        Ok(self)
    }

    pub fn parsed_address(&self) -> Option<Address> {
        self.address.as_ref().and_then(|address| address.parse().ok())
    }

    /// Of an export with a unix socket of its own.
    pub fn socket_path(&self) -> Option<PathBuf> {
        self.parsed_address().and_then(|address| address.unix_path().cloned())
    }
}

fn absolute(address: Address) -> Address {
    match address {
        Address::Unix(path) => Address::Unix(std::path::absolute(&path).unwrap_or(path)),
        tcp => tcp,
    }
}

/// Whether two listeners would be the same.
pub fn same_listener(left: &ExportSpec, right: &ExportSpec) -> bool {
    let real = |path: &Path| {
        let folder = path.parent().and_then(|folder| std::fs::canonicalize(folder).ok());
        folder.and_then(|folder| Some(folder.join(path.file_name()?))).unwrap_or_else(|| path.to_owned())
    };
    match (left.parsed_address(), right.parsed_address()) {
        (Some(Address::Unix(left)), Some(Address::Unix(right))) => real(&left) == real(&right),
        (Some(left), Some(right)) => left == right,
        _ => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn request(protocol: Protocol, address: Option<&str>) -> ExportCreate {
        ExportCreate {
            volume: "v".to_owned(),
            protocol,
            address: address.map(str::to_owned),
            queues: None,
            read_only: false,
            mode: None,
            group: None,
            tls_allow: Vec::new(),
            accept_loss: false,
        }
    }

    #[test]
    fn good_exports_are_completed() {
        let spec = ExportSpec::from_request(request(Protocol::VhostUser, Some("unix:/run/a.sock")), false).unwrap();
        assert_eq!(spec.queues, Some(QUEUES_DEFAULT));
        let spec = ExportSpec::from_request(request(Protocol::Nbd, Some("unix:a.sock")), false).unwrap();
        assert!(spec.socket_path().unwrap().is_absolute());
        let text = serde_json::to_string(&ExportRecord {
            id: "1".to_owned(),
            declared: true,
            name: None,
            volume_uuid: None,
            taken_over: true,
            spec: spec.clone(),
        })
        .unwrap();
        let read = serde_json::from_str::<ExportRecord>(&text).unwrap();
        assert_eq!((read.spec, read.taken_over), (spec, true));
    }

    #[test]
    fn senseless_exports_are_refused() {
        let refused = |request| ExportSpec::from_request(request, false).unwrap_err().message;
        assert!(refused(request(Protocol::VhostUser, None)).contains("unix socket"));
        assert!(refused(request(Protocol::VhostUser, Some("tcp:127.0.0.1:1"))).contains("unix socket"));
        assert!(refused(request(Protocol::Nbd, Some("tcp:0.0.0.0:1"))).contains("[tls]"));
        assert!(refused(request(Protocol::Nbd, Some(&format!("unix:/{}", "a".repeat(200))))).contains("107"));
        assert!(refused(ExportCreate { queues: Some(2), ..request(Protocol::Nbd, None) }).contains("--queues"));
        assert!(refused(ExportCreate { mode: Some("0660".into()), ..request(Protocol::Nbd, None) }).contains("--mode"));
        assert!(refused(ExportCreate { tls_allow: vec!["a".into()], ..request(Protocol::Nbd, None) }).contains("[tls]"));
        let queues = ExportCreate { queues: Some(0), ..request(Protocol::VhostUser, Some("unix:/a")) };
        assert!(refused(queues).contains("1 to 256"));
    }
}
