//! What two parts of a configuration cannot both have: a folder, or an address to listen on.

use std::net::{IpAddr, Ipv4Addr};
use std::path::{Path, PathBuf};

use super::address::{self, Address};
use super::check::Checker;
use super::model::{Config, NbdTarget};

impl Checker<'_> {
    /// Two pools in one folder would be the same pool.
    pub(super) fn folders(&mut self, config: &Config) {
        let files = config.pool.iter().filter(|(_, pool)| pool.driver == "file");
        let places = files.filter_map(|(name, pool)| Some((name, real(pool.path.as_ref()?))));
        let places: Vec<(&String, PathBuf)> = places.collect();
        for (index, (name, place)) in places.iter().enumerate() {
            if let Some((other, _)) = places[..index].iter().find(|(_, other)| other == place) {
                let place = place.display();
                let message = format!("pool {other} has {place} already: give each pool a folder of its own");
                self.refuse(&format!("pool.{name}.path"), message);
            }
        }
    }

    pub(super) fn listeners(&mut self, config: &Config) {
        let daemon = &config.daemon;
        let nbd = daemon.nbd.iter().enumerate().map(|(index, text)| (format!("daemon.nbd.{index}"), text.parse()));
        let admin = [("daemon.admin".to_owned(), daemon.admin_address())];
        let metrics = daemon.metrics.iter().map(|text| ("daemon.metrics".to_owned(), address::tcp(text)));
        let exports = config.export.iter().enumerate().filter_map(|(index, export)| {
            let (key, address) = match (&export.vhost_user, &export.nbd) {
                (Some(socket), _) => ("vhost_user", Ok(Address::Unix(socket.clone()))),
                (None, Some(NbdTarget::Own(text))) => ("nbd", text.parse()),
                (None, _) => return None,
            };
            Some((format!("export.{index}.{key}"), address))
        });
        let all = admin.into_iter().chain(metrics).chain(nbd).chain(exports);
        let all: Vec<(String, Address)> = all.filter_map(|(path, address)| Some((path, address.ok()?))).collect();
        for (index, (path, address)) in all.iter().enumerate() {
            if let Some((other, _)) = all[..index].iter().find(|(_, other)| clash(address, other)) {
                self.refuse(path, format!("{other} listens on {address} already: choose another"));
            }
        }
    }
}

/// The folder itself, whatever way it is written.
fn real(path: &Path) -> PathBuf {
    let full = std::path::absolute(path).unwrap_or_else(|_| path.to_owned());
    full.canonicalize().unwrap_or(full)
}

/// Whether the kernel refuses the second of two listeners.
fn clash(left: &Address, right: &Address) -> bool {
    match (left, right) {
        (Address::Unix(left), Address::Unix(right)) => real(left) == real(right),
        (Address::Tcp { host: left, port }, Address::Tcp { host: right, port: other }) => {
            let (left, right) = (numeric(left), numeric(right));
            let all_of_them = |one: &Host, other: &Host| match (one, other) {
                (Host::Ip(one), Host::Ip(other)) => one.is_unspecified() && one.is_ipv4() == other.is_ipv4(),
                _ => false,
            };
            port == other && *port != 0 && (left == right || all_of_them(&left, &right) || all_of_them(&right, &left))
        }
        _ => false,
    }
}

#[derive(PartialEq)]
enum Host {
    Ip(IpAddr),
    Name(String),
}

fn numeric(host: &str) -> Host {
    match host.parse() {
        Ok(ip) => Host::Ip(ip),
        Err(_) if host == "localhost" => Host::Ip(Ipv4Addr::LOCALHOST.into()),
        Err(_) => Host::Name(host.to_owned()),
    }
}
