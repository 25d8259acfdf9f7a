//! Who is attached: one record a connection, shared by the thread that serves it and the control plane.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::SystemTime;

use blockdev::ReactorHandle;
use blockdev::stats::OpClass;

use crate::export::Export;

/// One attached client, as of now.
#[derive(Clone, Debug)]
pub struct ClientInfo {
    pub id: u64,
    /// An address, or process and user of a local client.
    pub peer: String,
    pub export: String,
    pub since: SystemTime,
    /// Of its certificate.
    pub tls_subject: Option<String>,
    pub requests: u64,
    pub bytes_read: u64,
    pub bytes_written: u64,
}

pub(crate) struct Client {
    pub(crate) id: u64,
    pub(crate) peer: String,
    pub(crate) export: Arc<Export>,
    pub(crate) since: SystemTime,
    pub(crate) tls_subject: Option<String>,
    /// Its data-plane thread, by number and by handle.
    pub(crate) thread: usize,
    pub(crate) reactor: ReactorHandle,
    pub(crate) requests: AtomicU64,
    pub(crate) bytes_read: AtomicU64,
    pub(crate) bytes_written: AtomicU64,
}

/// Only the thread that serves the client counts.
fn add(counter: &AtomicU64, amount: u64) {
    counter.store(counter.load(Ordering::Relaxed) + amount, Ordering::Relaxed);
}

impl Client {
    pub(crate) fn count(&self, class: OpClass, bytes: u64) {
        add(&self.requests, 1);
        match class {
            OpClass::Read => add(&self.bytes_read, bytes),
            OpClass::Write => add(&self.bytes_written, bytes),
            _ => {}
        }
    }

    pub(crate) fn info(&self) -> ClientInfo {
        ClientInfo {
            id: self.id,
            peer: self.peer.clone(),
            export: self.export.name().to_owned(),
            since: self.since,
            tls_subject: self.tls_subject.clone(),
            requests: self.requests.load(Ordering::Relaxed),
            bytes_read: self.bytes_read.load(Ordering::Relaxed),
            bytes_written: self.bytes_written.load(Ordering::Relaxed),
        }
    }
}
