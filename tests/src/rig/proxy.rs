//! A TCP proxy on loopback that breaks a connection in mid-request when told to.
//!
//! ```text
//!   client ──▶ proxy ──▶ server        a fault is armed once, strikes the next connection it can, and is spent
//! ```

use anyhow::Result;
use std::io::{Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread;

const CHUNK: usize = 64 << 10;

/// What goes wrong with a request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fault {
    /// The server gets that many bytes of it, then the connection breaks.
    CutRequest(usize),
    /// The server gets and answers it; the client gets that many bytes of the answer, then the connection breaks.
    CutReply(usize),
    /// The server gets and answers it; the client never hears of it, on a connection that stays.
    SwallowReply,
}

#[derive(Debug)]
pub struct Proxy {
    address: SocketAddr,
    armed: Arc<Mutex<Option<Fault>>>,
    is_over: Arc<AtomicBool>,
}

impl Proxy {
    pub fn start(server: SocketAddr) -> Result<Self> {
        let listener = TcpListener::bind("127.0.0.1:0")?;
        let proxy = Self { address: listener.local_addr()?, armed: Arc::default(), is_over: Arc::default() };
        let (armed, is_over) = (proxy.armed.clone(), proxy.is_over.clone());
        thread::spawn(move || {
            for client in listener.incoming() {
                if is_over.load(Ordering::SeqCst) {
                    return;
                }
                // A connection that cannot be carried on is closed, which its client sees.
                let _ = client.and_then(|client| carry(client, server, &armed));
            }
        });
        Ok(proxy)
    }

    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Arms a fault for the next request.
    pub fn arm(&self, fault: Fault) {
        *lock(&self.armed) = Some(fault);
    }

    /// Whether the armed fault has struck.
    pub fn has_struck(&self) -> bool {
        lock(&self.armed).is_none()
    }
}

impl Drop for Proxy {
    fn drop(&mut self) {
        self.is_over.store(true, Ordering::SeqCst);
        // Wakes the listener.
        let _ = TcpStream::connect(self.address);
    }
}

fn lock(armed: &Mutex<Option<Fault>>) -> MutexGuard<'_, Option<Fault>> {
    armed.lock().unwrap_or_else(PoisonError::into_inner)
}

fn carry(client: TcpStream, server: SocketAddr, armed: &Arc<Mutex<Option<Fault>>>) -> std::io::Result<()> {
    let server = TcpStream::connect(server)?;
    for stream in [&client, &server] {
        stream.set_nodelay(true)?;
    }
    let requests = Pump { from: client.try_clone()?, to: server.try_clone()?, armed: armed.clone(), strikes: on_request };
    let replies = Pump { from: server, to: client, armed: armed.clone(), strikes: on_reply };
    thread::spawn(move || requests.run());
    thread::spawn(move || replies.run());
    Ok(())
}

/// How many bytes still pass before the connection breaks; `None`: none do, and it stays.
type Passing = Option<usize>;

fn on_request(fault: Fault) -> Option<Passing> {
    match fault {
        Fault::CutRequest(bytes) => Some(Some(bytes)),
        _ => None,
    }
}

fn on_reply(fault: Fault) -> Option<Passing> {
    match fault {
        Fault::CutReply(bytes) => Some(Some(bytes)),
        Fault::SwallowReply => Some(None),
        Fault::CutRequest(_) => None,
    }
}

struct Pump {
    from: TcpStream,
    to: TcpStream,
    armed: Arc<Mutex<Option<Fault>>>,
    strikes: fn(Fault) -> Option<Passing>,
}

impl Pump {
    /// Carries bytes until an end closes, which closes the other.
    fn run(mut self) {
        let mut buffer = vec![0; CHUNK];
        let mut struck: Option<Passing> = None;
        while let Ok(count @ 1..) = self.from.read(&mut buffer) {
            if struck.is_none() {
                struck = self.strike();
            }
            let passing = match &mut struck {
                None => count,
                Some(None) => 0,
                Some(Some(left)) => {
                    let passing = count.min(*left);
                    *left -= passing;
                    passing
                }
            };
            let passed = self.to.write_all(&buffer[..passing]);
            if passed.is_err() || struck == Some(Some(0)) {
                break;
            }
        }
        for stream in [&self.from, &self.to] {
            // It may be closed already.
            let _ = stream.shutdown(Shutdown::Both);
        }
    }

    fn strike(&self) -> Option<Passing> {
        let mut armed = lock(&self.armed);
        let struck = armed.and_then(self.strikes);
        if struck.is_some() {
            *armed = None;
        }
        struck
    }
}
