//! The data-plane threads of a process.

use std::io;
use std::sync::mpsc;
use std::thread::JoinHandle;
use std::time::Duration;

use super::{Reactor, ReactorHandle};

/// How to run the data plane.
#[derive(Clone, Debug)]
pub struct DataPlaneOptions {
    pub threads: usize,
    /// The longest a thread looks for work before it sleeps.
    pub spin_max: Duration,
}

impl Default for DataPlaneOptions {
    fn default() -> Self {
        DataPlaneOptions { threads: 2, spin_max: Duration::from_micros(100) }
    }
}

/// The running data-plane threads. Dropping it stops them: close volumes and exports first.
pub struct DataPlane {
    handles: Vec<ReactorHandle>,
    threads: Vec<JoinHandle<()>>,
}

impl DataPlane {
    /// Starts the threads; fails if io_uring is refused.
    pub fn start(options: DataPlaneOptions) -> io::Result<DataPlane> {
        let mut plane = DataPlane { handles: Vec::new(), threads: Vec::new() };
        for number in 0..options.threads.max(1) {
            let (sender, receiver) = mpsc::sync_channel(1);
            let spin_max = options.spin_max;
            let thread = std::thread::Builder::new().name(format!("data-{number}")).spawn(move || {
                let _abort = AbortOnPanic;
                match Reactor::new(spin_max) {
                    Ok(reactor) => {
                        let _ = sender.send(Ok(reactor.handle()));
                        reactor.run();
                    }
                    Err(error) => {
                        let _ = sender.send(Err(error));
                    }
                }
            })?;
            plane.threads.push(thread);
            let handle = receiver.recv().map_err(|_| io::Error::other("the data-plane thread died at start"))??;
            plane.handles.push(handle);
        }
        Ok(plane)
    }

    /// One handle a thread, always in the same order.
    pub fn handles(&self) -> &[ReactorHandle] {
        &self.handles
    }
}

impl Drop for DataPlane {
    fn drop(&mut self) {
        for handle in &self.handles {
            handle.spawn(|reactor| reactor.stop());
        }
        for thread in self.threads.drain(..) {
            let _ = thread.join();
        }
    }
}

/// A data-plane thread that dies would leave its guests waiting for ever; a dead process is restarted, and they reconnect.
struct AbortOnPanic;

impl Drop for AbortOnPanic {
    fn drop(&mut self) {
        if std::thread::panicking() {
            std::process::abort();
        }
    }
}
