//! The negotiation of one client over its socket, on the control plane.
//!
//! ```text
//!  accept ─▶ greeting ─▶ options ─▶ [STARTTLS ─▶ TLS handshake ─▶ options] ─▶ socket to the data plane
//! ```
//!
//! Invariant: nothing that arrived in the clear is looked at after TLS was agreed on. A well-behaved client waits for the
//! server's answer to STARTTLS, so bytes that are already there by then were put in by somebody else: the client is cut off.

use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;

use rustls::ServerConnection;
use thiserror::Error;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio_rustls::TlsAcceptor;

use crate::export::{Export, Identity, Serves, Table, View};
use crate::negotiation::{Chosen, Encryption, Negotiation, Outcome, Violation};
use crate::tls::{self, TlsSettings};

const READ_SIZE: usize = 4096;

/// A socket that tokio reads and writes and the data plane takes over.
pub(crate) trait Stream: AsyncRead + AsyncWrite + Unpin + Send + 'static {
    fn into_socket(self) -> io::Result<OwnedFd>;
}

impl Stream for tokio::net::UnixStream {
    fn into_socket(self) -> io::Result<OwnedFd> {
        self.into_std().map(OwnedFd::from)
    }
}

impl Stream for tokio::net::TcpStream {
    fn into_socket(self) -> io::Result<OwnedFd> {
        self.into_std().map(OwnedFd::from)
    }
}

/// A client that has chosen an export.
pub(crate) struct Ready {
    pub(crate) socket: OwnedFd,
    pub(crate) early: Vec<u8>,
    pub(crate) tls: Option<Box<ServerConnection>>,
    pub(crate) identity: Identity,
    pub(crate) chosen: Chosen<Arc<Export>>,
}

/// Why a handshake came to nothing.
#[derive(Error, Debug)]
pub(crate) enum HandshakeError {
    #[error("{0}")]
    Io(#[from] io::Error),
    #[error("protocol violation: {0}")]
    Violation(#[from] Violation),
    #[error("data in the clear after STARTTLS")]
    PlaintextAfterStartTls,
    #[error("TLS handshake: {0}")]
    Tls(io::Error),
}

enum Stage {
    Chosen(Chosen<Arc<Export>>),
    StartTls,
    /// The client left in an orderly way.
    Left,
}

/// Negotiates; `None` if the client left without choosing an export.
pub(crate) async fn negotiate<S: Stream>(
    mut stream: S,
    tls: Option<&TlsSettings>,
    table: &Table,
    serves: &Serves,
) -> Result<Option<Ready>, HandshakeError> {
    let encryption = if tls.is_some() { Encryption::Required } else { Encryption::Off };
    let mut negotiation = Negotiation::new(encryption);
    let mut early = Vec::new();
    stream.write_all(&Negotiation::greeting()).await?;
    let nobody = Identity::default();
    let view = View { table, serves, identity: &nobody };
    match (haggle(&mut stream, &mut negotiation, &mut early, &view).await?, tls) {
        (Stage::Chosen(chosen), _) => {
            let socket = stream.into_socket()?;
            Ok(Some(Ready { socket, early, tls: None, identity: nobody, chosen }))
        }
        (Stage::StartTls, Some(settings)) => {
            if !early.is_empty() {
                return Err(HandshakeError::PlaintextAfterStartTls);
            }
            negotiate_over_tls(stream, negotiation, settings, table, serves).await
        }
        (Stage::StartTls | Stage::Left, _) => Ok(None),
    }
}

async fn negotiate_over_tls<S: Stream>(
    stream: S,
    mut negotiation: Negotiation,
    settings: &TlsSettings,
    table: &Table,
    serves: &Serves,
) -> Result<Option<Ready>, HandshakeError> {
    let acceptor = TlsAcceptor::from(settings.config.clone());
    let mut stream = acceptor.accept(stream).await.map_err(HandshakeError::Tls)?;
    let identity = tls::identity(stream.get_ref().1);
    negotiation.tls_established();
    let mut early = Vec::new();
    let view = View { table, serves, identity: &identity };
    let stage = haggle(&mut stream, &mut negotiation, &mut early, &view).await?;
    let Stage::Chosen(chosen) = stage else {
        let _ = stream.shutdown().await;
        return Ok(None);
    };
    let (stream, connection) = stream.into_inner();
    let socket = stream.into_socket()?;
    Ok(Some(Ready { socket, early, tls: Some(Box::new(connection)), identity, chosen }))
}

/// Handles options until something else must happen; what is left of the input stays in `input`.
async fn haggle<S: AsyncRead + AsyncWrite + Unpin>(
    stream: &mut S,
    negotiation: &mut Negotiation,
    input: &mut Vec<u8>,
    view: &View<'_>,
) -> Result<Stage, HandshakeError> {
    let mut output = Vec::new();
    loop {
        let (taken, outcome) = negotiation.advance(input, &mut output, view)?;
        input.drain(..taken);
        if !output.is_empty() {
            stream.write_all(&output).await?;
            stream.flush().await?;
            output.clear();
        }
        match outcome {
            Outcome::Continue => {}
            Outcome::StartTls => return Ok(Stage::StartTls),
            Outcome::Chosen(chosen) => return Ok(Stage::Chosen(chosen)),
            Outcome::Aborted => return Ok(Stage::Left),
            Outcome::NeedsInput => {
                input.reserve(READ_SIZE);
                if stream.read_buf(input).await? == 0 {
                    return Ok(Stage::Left);
                }
            }
        }
    }
}
