//! Exports over NBD: one server for the shared listeners and for those of single exports.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use blockdev::ReactorHandle;
use blockdev::stats::Snapshot;
use nbd::{Export, Server, ServerOptions, Serves, Socket, TlsSettings};
use parking_lot::Mutex;
use tokio::runtime::Handle;

use super::changes::Changes;
use super::spec::{ExportRecord, ExportSpec};
use super::{FrontEnd, Lease};
use crate::api::types::ClientInfo;
use crate::config::{Address, Config, TlsConfig, tls_key};
use crate::daemon::Daemon;
use crate::daemon::listeners::{Hold, Listeners};
use crate::daemon::sockets::SocketRules;
use crate::error::{Error, Result};
use crate::units::unix_seconds;

/// The NBD server and what it listens on.
pub struct NbdFrontEnd {
    server: Server,
    tls: Option<TlsSettings>,
    asks: Asks,
    runtime: Handle,
    listeners: Arc<Listeners>,
    shared: Mutex<Vec<SharedListener>>,
}

/// What clients on TCP need.
#[derive(Clone, Copy)]
enum Asks {
    Nothing,
    Tls,
    /// TLS, with a certificate of theirs.
    Certificate,
}

impl Asks {
    fn of(config: &Config) -> Asks {
        match &config.tls {
            None => Asks::Nothing,
            Some(tls) if tls.client_ca.is_none() => Asks::Tls,
            Some(_) => Asks::Certificate,
        }
    }
}

struct SharedListener {
    address: Address,
    _hold: Hold,
}

impl NbdFrontEnd {
    /// Must be called within the control plane's runtime.
    pub fn new(config: &Config, reactors: &[ReactorHandle], listeners: Arc<Listeners>) -> Result<NbdFrontEnd> {
        Ok(NbdFrontEnd {
            server: Server::new(reactors, ServerOptions::default()),
            tls: config.tls.as_ref().map(load_tls).transpose()?,
            asks: Asks::of(config),
            runtime: Handle::current(),
            listeners,
            shared: Mutex::default(),
        })
    }

    /// Opens the shared listeners.
    pub fn listen(&self, config: &Config) -> Result<()> {
        let rules = SocketRules::from_config(config);
        for address in config.daemon.nbd_addresses().map_err(Error::invalid)? {
            let address = absolute(address);
            let (socket, address, hold) = self.open(&address, &rules)?;
            self.accept(socket, &address, Serves::Shared)?;
            tracing::info!("NBD: listening on {address}");
            self.shared.lock().push(SharedListener { address, _hold: hold });
        }
        Ok(())
    }

    fn open(&self, address: &Address, rules: &SocketRules) -> Result<(Socket, Address, Hold)> {
        match address {
            Address::Unix(path) => {
                let (listener, hold) = self.listeners.open_unix(path, rules)?;
                Ok((Socket::Unix(listener), address.clone(), hold))
            }
            Address::Tcp { host, .. } => {
                let (listener, hold) = self.listeners.open_tcp(address)?;
                let port = listener.local_addr().map_err(|error| Error::io(address, &error))?.port();
                Ok((Socket::Tcp(listener), Address::Tcp { host: host.clone(), port }, hold))
            }
        }
    }

    fn accept(&self, socket: Socket, address: &Address, serves: Serves) -> Result<()> {
        let _runtime = self.runtime.enter();
        // A unix socket is guarded by its mode and group; TLS there would only cost.
        let tls = if address.unix_path().is_some() { None } else { self.tls.clone() };
        match self.server.listen(socket, serves, tls) {
            Ok(_) => Ok(()),
            Err(error) => Err(Error::invalid(format!("NBD on {address}: {error}"))),
        }
    }

    /// The shared listeners' addresses.
    pub fn addresses(&self) -> Vec<String> {
        self.shared.lock().iter().map(|listener| listener.address.to_string()).collect()
    }

    /// The URIs under which clients find an export.
    pub fn uris(&self, spec: &ExportSpec, name: Option<&str>) -> Vec<String> {
        let name = name.unwrap_or_else(|| short_name(&spec.volume));
        match spec.parsed_address() {
            Some(address) => vec![uri(&address, name, self.asks)],
            None => self.shared.lock().iter().map(|listener| uri(&listener.address, name, self.asks)).collect(),
        }
    }

    /// Serves one export.
    pub fn start(&self, daemon: &Daemon, record: &ExportRecord, lease: &Lease) -> Result<Box<dyn FrontEnd>> {
        let spec = &record.spec;
        let name = record.name.as_deref().unwrap_or_else(|| short_name(&spec.volume));
        let export = Export::new(name, lease.volume().clone())
            .alias(&spec.volume)
            .description(format!("volume {}", spec.volume))
            .read_only(spec.read_only)
            .contexts(Arc::new(Changes { pools: daemon.pools().clone(), id: lease.id().clone() }))
            .tls_allow(spec.tls_allow.clone());
        let export = Arc::new(export);
        let mut own = None;
        match spec.parsed_address() {
            None => self.server.publish(&export).map_err(|error| Error::exists(error.to_string()))?,
            Some(address) => {
                let mut rules = SocketRules::from_config(&daemon.config());
                rules.mode = spec.mode.as_deref().and_then(crate::config::parse_mode).unwrap_or(rules.mode);
                rules.group = spec.group.clone().or(rules.group);
                let (socket, address, hold) = self.open(&address, &rules)?;
                own = Some(hold);
                self.accept(socket, &address, Serves::Only(export.clone()))?;
            }
        }
        Ok(Box::new(NbdExport { server: self.server.clone(), runtime: self.runtime.clone(), export, own }))
    }

    /// Serves one volume on a socket that only the daemon's own user can reach, for a transfer.
    pub fn start_private(&self, lease: Lease, read_only: bool, folder: &Path, name: &str) -> Result<PrivateExport> {
        let path = folder.join(format!("{name}.sock"));
        let rules = SocketRules { folders: vec![folder.to_owned()], mode: 0o600, group: None };
        let volume = short_name(&lease.id().to_string()).to_owned();
        let export = Arc::new(Export::new(&volume, lease.volume().clone()).read_only(read_only));
        let (socket, hold) = self.listeners.open_private(&path, &rules)?;
        self.accept(Socket::Unix(socket), &Address::Unix(path.clone()), Serves::Only(export.clone()))?;
        let front_end = NbdExport { server: self.server.clone(), runtime: self.runtime.clone(), export, own: Some(hold) };
        Ok(PrivateExport { front_end, lease: Some(lease), path, name: volume })
    }

    /// Takes no more clients on the shared listeners. Blocks.
    pub fn stop_accepting(&self) {
        self.runtime.block_on(self.server.close_shared());
    }

    /// Closes all listeners and connections, after the requests taken in. Blocks.
    pub fn stop(&self) {
        self.shared.lock().clear();
        self.runtime.block_on(self.server.shutdown());
    }
}

/// An export with a listener of its own that no list shows.
pub struct PrivateExport {
    front_end: NbdExport,
    lease: Option<Lease>,
    path: PathBuf,
    name: String,
}

impl PrivateExport {
    pub fn path(&self) -> &Path {
        &self.path
    }

    pub fn name(&self) -> &str {
        &self.name
    }
}

impl Drop for PrivateExport {
    fn drop(&mut self) {
        self.front_end.stop();
        self.lease = None;
    }
}

struct NbdExport {
    server: Server,
    runtime: Handle,
    export: Arc<Export>,
    /// Its own socket, where it has one.
    own: Option<Hold>,
}

impl FrontEnd for NbdExport {
    fn clients(&self) -> Vec<ClientInfo> {
        let own = self.server.clients_of(&self.export).into_iter();
        own.map(|client| ClientInfo {
            id: client.id.to_string(),
            peer: match client.tls_subject {
                Some(subject) => format!("{} ({subject})", client.peer),
                None => client.peer,
            },
            since: unix_seconds(client.since),
        })
        .collect()
    }

    fn disconnect(&self, client: Option<&str>) -> usize {
        let chosen = self.clients().into_iter().filter(|other| client.is_none_or(|client| client == other.id));
        chosen.filter_map(|client| client.id.parse().ok()).filter(|id| self.server.disconnect(*id)).count()
    }

    fn stats(&self) -> Snapshot {
        self.export.stats()
    }

    fn stop(&mut self) {
        // In this order: a listener that was shut down looks ready for ever to whoever still accepts from it.
        self.runtime.block_on(self.server.withdraw(&self.export));
        self.own = None;
    }
}

/// The volume's name without its pool.
fn short_name(volume: &str) -> &str {
    volume.split_once('/').map_or(volume, |(_, name)| name)
}

fn absolute(address: Address) -> Address {
    match address {
        Address::Unix(path) => Address::Unix(std::path::absolute(&path).unwrap_or(path)),
        tcp => tcp,
    }
}

/// `DIR` stands for the folder with the client's `client-cert.pem`, `client-key.pem` and `ca-cert.pem`.
fn uri(address: &Address, name: &str, asks: Asks) -> String {
    let server = || address.for_clients().host_port().unwrap_or_default();
    match (address, asks) {
        (Address::Unix(path), _) => crate::quoting::nbd_unix_uri(name, path),
        (Address::Tcp { .. }, Asks::Nothing) => format!("nbd://{}/{name}", server()),
        (Address::Tcp { .. }, Asks::Tls) => format!("nbds://{}/{name}", server()),
        (Address::Tcp { .. }, Asks::Certificate) => format!("nbds://{}/{name}?tls-certificates=DIR", server()),
    }
}

/// Reads and understands the files of `[tls]`.
pub fn load_tls(tls: &TlsConfig) -> Result<TlsSettings> {
    let read = |path: &Path| std::fs::read(path).map_err(|error| Error::io(path.display(), &error));
    let client_ca = tls.client_ca.as_deref().map(read).transpose()?;
    let key = tls_key(tls).map_err(Error::invalid)?;
    let settings = TlsSettings::from_pem(&read(&tls.cert)?, key.as_bytes(), client_ca.as_deref());
    settings.map_err(|error| Error::invalid(format!("[tls]: {error}")))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn uris_are_for_clients() {
        let told = |address: &str, asks| uri(&address.parse().unwrap(), "v", asks);
        assert_eq!(told("unix:/a.sock", Asks::Certificate), "nbd+unix:///v?socket=/a.sock");
        assert_eq!(told("tcp:127.0.0.1:7", Asks::Nothing), "nbd://127.0.0.1:7/v");
        assert_eq!(told("tcp:[::1]:7", Asks::Tls), "nbds://[::1]:7/v");
        let wildcard = told("tcp:0.0.0.0:7", Asks::Certificate);
        assert!(!wildcard.contains("0.0.0.0") && wildcard.ends_with(":7/v?tls-certificates=DIR"), "{wildcard}");
    }
}
