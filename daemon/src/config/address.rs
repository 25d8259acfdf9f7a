//! Where something listens: `unix:PATH` or `tcp:HOST:PORT`.

use std::fmt;
use std::net::IpAddr;
use std::path::PathBuf;
use std::str::FromStr;

/// The longest path a unix socket can have, in bytes: `sun_path` without its final zero.
pub const SOCKET_PATH_MAX: usize = 107;

/// A parsed listening address.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Address {
    Unix(PathBuf),
    Tcp { host: String, port: u16 },
}

impl Address {
    /// True unless other hosts could reach it.
    pub fn is_local(&self) -> bool {
        match self {
            Address::Unix(_) => true,
            Address::Tcp { host, .. } => is_loopback(host),
        }
    }

    pub fn unix_path(&self) -> Option<&PathBuf> {
        match self {
            Address::Unix(path) => Some(path),
            Address::Tcp { .. } => None,
        }
    }

    /// Where clients find it: all addresses of this host are told by its name.
    pub fn for_clients(&self) -> Address {
        match self {
            Address::Tcp { host, port } if host.parse::<IpAddr>().is_ok_and(|ip| ip.is_unspecified()) => {
                Address::Tcp { host: host_name(), port: *port }
            }
            other => other.clone(),
        }
    }

    /// `HOST:PORT`, as resolvers take it.
    pub fn host_port(&self) -> Option<String> {
        match self {
            Address::Unix(_) => None,
            Address::Tcp { host, port } if host.contains(':') => Some(format!("[{host}]:{port}")),
            Address::Tcp { host, port } => Some(format!("{host}:{port}")),
        }
    }
}

fn host_name() -> String {
    let name = rustix::system::uname().nodename().to_string_lossy().into_owned();
    if name.is_empty() { "localhost".to_owned() } else { name }
}

/// True for `localhost` and loopback addresses.
pub fn is_loopback(host: &str) -> bool {
    host == "localhost" || host.parse::<IpAddr>().is_ok_and(|address| address.is_loopback())
}

impl fmt::Display for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Address::Unix(path) => write!(f, "unix:{}", path.display()),
            Address::Tcp { .. } => write!(f, "tcp:{}", self.host_port().unwrap_or_default()),
        }
    }
}

impl FromStr for Address {
    type Err = String;

    fn from_str(text: &str) -> Result<Address, String> {
        if let Some(path) = text.strip_prefix("unix:") {
            return unix(path);
        }
        if let Some(rest) = text.strip_prefix("tcp:").or_else(|| text.strip_prefix("http://")) {
            return tcp(rest.trim_end_matches('/'));
        }
        Err(format!("{text:?} is no address: write \"unix:PATH\" or \"tcp:HOST:PORT\""))
    }
}

fn unix(path: &str) -> Result<Address, String> {
    if path.is_empty() {
        return Err("the socket path is empty: write \"unix:PATH\"".to_owned());
    }
    check_socket_path(path)?;
    Ok(Address::Unix(PathBuf::from(path)))
}

/// Refuses a path that no unix socket can have.
pub fn check_socket_path(path: &str) -> Result<(), String> {
    if path.contains('\0') {
        return Err("a socket path cannot hold a zero byte".to_owned());
    }
    if path.len() > SOCKET_PATH_MAX {
        return Err(format!(
            "the socket path {path:?} is {} bytes long, the kernel takes {SOCKET_PATH_MAX}: choose a shorter folder",
            path.len()
        ));
    }
    Ok(())
}

/// `HOST:PORT`, with brackets around an IPv6 address.
pub fn tcp(text: &str) -> Result<Address, String> {
    let wrong = || format!("{text:?} is no HOST:PORT (an IPv6 address goes in brackets)");
    let (host, port) = text.rsplit_once(':').ok_or_else(wrong)?;
    let bracketed = host.strip_prefix('[').and_then(|host| host.strip_suffix(']'));
    if host.is_empty() || (bracketed.is_none() && host.contains(':')) {
        return Err(wrong());
    }
    let port = port.parse().map_err(|_| wrong())?;
    Ok(Address::Tcp { host: bracketed.unwrap_or(host).to_owned(), port })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_round_trip() {
        for text in ["unix:/run/a.sock", "unix:relative.sock", "tcp:127.0.0.1:10809", "tcp:[::1]:1", "tcp:host:0"] {
            assert_eq!(text.parse::<Address>().unwrap().to_string(), text);
        }
        assert_eq!("http://[::1]:80/".parse::<Address>().unwrap().to_string(), "tcp:[::1]:80");
    }

    #[test]
    fn nonsense_is_refused() {
        for text in ["", "unix:", "/run/a.sock", "tcp:1", "tcp::1", "tcp:a:b", "tcp:::1:5", "tcp:a:70000", "unix:a\0b"] {
            assert!(text.parse::<Address>().is_err(), "{text:?}");
        }
        let longest = format!("unix:/{}", "a".repeat(SOCKET_PATH_MAX - 1));
        assert!(longest.parse::<Address>().is_ok());
        assert!(format!("{longest}a").parse::<Address>().unwrap_err().contains("108 bytes"));
    }

    #[test]
    fn clients_are_told_no_wildcard() {
        let told = |text: &str| text.parse::<Address>().unwrap().for_clients().to_string();
        for wildcard in ["tcp:0.0.0.0:7", "tcp:[::]:7"] {
            assert_eq!(told(wildcard), format!("tcp:{}:7", host_name()));
        }
        for other in ["tcp:192.0.2.1:7", "tcp:[::1]:7", "tcp:example.net:7", "unix:/a"] {
            assert_eq!(told(other), other);
        }
    }

    #[test]
    fn loopback_is_told_apart() {
        for (host, local) in [
            ("127.0.0.1", true),
            ("127.9.9.9", true),
            ("::1", true),
            ("localhost", true),
            ("0.0.0.0", false),
            ("::", false),
            ("example.net", false),
        ] {
            assert_eq!(is_loopback(host), local, "{host}");
        }
    }
}
