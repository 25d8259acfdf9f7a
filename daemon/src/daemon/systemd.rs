//! systemd: readiness, the watchdog, and sockets it opened or keeps for us.

use std::os::fd::{AsFd, BorrowedFd, FromRawFd, OwnedFd};
use std::path::PathBuf;
use std::time::Duration;

use blockdev::ReactorHandle;
use rustix::net::AddressFamily;
use sd_notify::NotifyState;

use crate::config::Address;

/// The longest name of a kept descriptor.
const NAME_MAX: usize = 255;

/// Tells the service manager, where there is one.
pub fn notify(states: &[NotifyState<'_>]) {
    if let Err(error) = sd_notify::notify(states) {
        tracing::warn!("the service manager was not told: {error}");
    }
}

/// Says that a reload has begun; [`NotifyState::Ready`] ends it.
pub fn notify_reloading() {
    match NotifyState::monotonic_usec_now() {
        Ok(now) => notify(&[NotifyState::Reloading, now]),
        Err(_) => notify(&[NotifyState::Reloading]),
    }
}

/// Has the service manager keep a copy of a descriptor, and pass it to the next process of this service. False without one.
pub fn keep(name: &str, descriptor: BorrowedFd<'_>) -> bool {
    if std::env::var_os("NOTIFY_SOCKET").is_none() || name.len() > NAME_MAX {
        return false;
    }
    let told = sd_notify::notify_with_fds(&[NotifyState::FdStore, NotifyState::FdName(name)], &[descriptor]);
    told.inspect_err(|error| tracing::warn!("the service manager does not keep {name:?}: {error}")).is_ok()
}

/// Has it close its copy. False if it could not be told.
pub fn keep_no_longer(name: &str) -> bool {
    let told = sd_notify::notify(&[NotifyState::FdStoreRemove, NotifyState::FdName(name)]);
    told.inspect_err(|error| tracing::warn!("the service manager still keeps {name:?}: {error}")).is_ok()
}

/// Feeds the watchdog, if there is one, as long as the control plane turns and every data-plane thread answers.
pub async fn feed_watchdog(threads: Vec<ReactorHandle>) {
    let Some(limit) = sd_notify::watchdog_enabled() else { return };
    let mut beat = tokio::time::interval((limit / 3).max(Duration::from_millis(10)));
    beat.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    loop {
        beat.tick().await;
        if all_answer(&threads).await {
            // Telling waits for a manager that does not read, which must hold up no request.
            let _ = tokio::task::spawn_blocking(|| notify(&[NotifyState::Watchdog])).await;
        }
    }
}

/// Waits until each of the threads has run what it was given; false if one has ended.
async fn all_answer(threads: &[ReactorHandle]) -> bool {
    let ask = |thread: &ReactorHandle| {
        let (sender, receiver) = tokio::sync::oneshot::channel();
        thread.spawn(move |_| {
            let _ = sender.send(());
        });
        receiver
    };
    let answers: Vec<_> = threads.iter().map(ask).collect();
    for answer in answers {
        if answer.await.is_err() {
            return false;
        }
    }
    true
}

/// A listening socket that the service manager passed.
pub struct PassedSocket {
    /// What it is called there: by a socket unit, or by [`keep`].
    pub name: String,
    pub address: Address,
    pub socket: OwnedFd,
}

/// Takes what was passed to this process; only once.
pub fn take_passed() -> Vec<PassedSocket> {
    let named: Vec<(i32, String)> = match (sd_notify::listen_fds_with_names(), sd_notify::listen_fds()) {
        (Ok(named), _) => named.collect(),
        (Err(_), Ok(unnamed)) => unnamed.map(|descriptor| (descriptor, String::new())).collect(),
        (Err(error), Err(_)) => {
            tracing::warn!("what the service manager passed is not understood: {error}");
            Vec::new()
        }
    };
    let take = |(descriptor, name)| {
        // SAFETY: the service manager passed this descriptor to this process, and nothing else here has taken it.
        let socket = unsafe { OwnedFd::from_raw_fd(descriptor) };
        let address = address_of(&socket);
        if address.is_none() {
            tracing::warn!("descriptor {descriptor} passed by the service manager is no listening socket");
        }
        Some(PassedSocket { name, address: address?, socket })
    };
    named.into_iter().filter_map(take).collect()
}

fn address_of(socket: &OwnedFd) -> Option<Address> {
    if !rustix::net::sockopt::socket_acceptconn(socket).ok()? {
        return None;
    }
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

#[cfg(test)]
mod tests {
    use std::future::Future;
    use std::pin::pin;
    use std::task::{Context, Waker};

    use blockdev::DataPlane;
    use blockdev::reactor::DataPlaneOptions;

    use super::*;

    #[test]
    fn the_watchdog_waits_for_the_slowest_thread_and_starves_without_it() {
        let plane = DataPlane::start(DataPlaneOptions { threads: 2, ..DataPlaneOptions::default() }).unwrap();
        let threads = plane.handles().to_vec();
        let (release, held) = std::sync::mpsc::channel::<()>();
        threads[1].spawn(move |_| {
            let _ = held.recv();
        });
        let mut answers = pin!(all_answer(&threads));
        let mut nobody = Context::from_waker(Waker::noop());
        assert!(answers.as_mut().poll(&mut nobody).is_pending(), "one thread hangs");
        drop(release);
        let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
        assert!(runtime.block_on(answers));
        drop(plane);
        assert!(!runtime.block_on(all_answer(&threads)), "threads that have ended do not answer");
    }
}
