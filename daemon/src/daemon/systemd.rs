//! systemd: readiness, the watchdog, and sockets it opened for us.

use std::os::fd::{AsFd, FromRawFd, OwnedFd};
use std::path::PathBuf;
use std::time::Duration;

use rustix::net::AddressFamily;
use sd_notify::NotifyState;

use crate::config::Address;

/// Tells the service manager, where there is one.
pub fn notify(states: &[NotifyState<'_>]) {
    if let Err(error) = sd_notify::notify(states) {
        tracing::warn!("the service manager was not told: {error}");
    }
}

/// Feeds the watchdog, if there is one, as long as the control plane turns.
pub async fn feed_watchdog() {
    let Some(limit) = sd_notify::watchdog_enabled() else { return };
    let mut beat = tokio::time::interval((limit / 3).max(Duration::from_millis(10)));
    loop {
        beat.tick().await;
        notify(&[NotifyState::Watchdog]);
    }
}

/// Listening sockets passed by the service manager, told apart by their addresses.
#[derive(Default)]
pub struct PassedSockets {
    sockets: Vec<(Address, OwnedFd)>,
}

impl PassedSockets {
    /// Takes what was passed to this process; only once.
    pub fn take() -> PassedSockets {
        let Ok(descriptors) = sd_notify::listen_fds() else { return PassedSockets::default() };
        let mut sockets = Vec::new();
        for descriptor in descriptors {
            // SAFETY: the service manager passed this descriptor to this process, and nothing else here has taken it.
            let socket = unsafe { OwnedFd::from_raw_fd(descriptor) };
            let _ = rustix::io::fcntl_setfd(&socket, rustix::io::FdFlags::CLOEXEC);
            match address_of(&socket) {
                Some(address) => sockets.push((address, socket)),
                None => tracing::warn!("descriptor {descriptor} passed by the service manager is no listening socket"),
            }
        }
        PassedSockets { sockets }
    }

    /// Adds a socket that this process has opened itself.
    pub fn add(&mut self, address: Address, socket: OwnedFd) {
        self.sockets.push((address, socket));
    }

    /// The socket for `address`, if one was passed.
    pub fn claim(&mut self, address: &Address) -> Option<OwnedFd> {
        let wanted = comparable(address);
        let at = self.sockets.iter().position(|(passed, _)| comparable(passed) == wanted)?;
        Some(self.sockets.swap_remove(at).1)
    }

    /// Reports what nobody claimed.
    pub fn report_unclaimed(self) {
        for (address, _) in self.sockets {
            tracing::warn!("socket {address} was passed by the service manager, but the configuration does not name it");
        }
    }
}

fn comparable(address: &Address) -> String {
    let text = address.to_string();
    text.strip_prefix("tcp:localhost:").map_or(text.clone(), |port| format!("tcp:127.0.0.1:{port}"))
}

fn address_of(socket: &OwnedFd) -> Option<Address> {
    match rustix::net::sockopt::socket_domain(socket.as_fd()).ok()? {
        AddressFamily::UNIX => {
            let listener = std::os::unix::net::UnixListener::from(socket.try_clone().ok()?);
            let path: PathBuf = listener.local_addr().ok()?.as_pathname()?.to_owned();
            Some(Address::Unix(path))
        }
        AddressFamily::INET | AddressFamily::INET6 => {
            let listener = std::net::TcpListener::from(socket.try_clone().ok()?);
            let address = listener.local_addr().ok()?;
            Some(Address::Tcp { host: address.ip().to_string(), port: address.port() })
        }
        _ => None,
    }
}
