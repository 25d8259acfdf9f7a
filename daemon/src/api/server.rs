//! Carries the API: on a unix socket for root alone, or on TCP with a token, on loopback or with TLS. Metrics have a plain
//! listener of their own.

use std::convert::Infallible;
use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use axum::body::Body;
use axum::extract::Request;
use axum::http::header::{AUTHORIZATION, WWW_AUTHENTICATE};
use axum::http::{HeaderValue, StatusCode};
use axum::middleware::{self, Next};
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use hyper_util::rt::TokioIo;
use hyper_util::service::TowerToHyperService;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpListener, UnixListener};
use tokio::sync::Semaphore;
use tokio::task::{JoinHandle, JoinSet};
use tokio_rustls::TlsAcceptor;

use crate::config::{Address, Config, address, admin_token, tls_key};
use crate::daemon::Daemon;
use crate::daemon::listeners::Hold;
use crate::daemon::sockets::SocketRules;
use crate::error::{Error, ErrorKind, Result};

/// Connections at once, per listener; more wait to be accepted.
const CONNECTIONS_MAX: usize = 256;
/// How long a client may take for its request's head, or for a TLS handshake.
const PATIENCE: Duration = Duration::from_secs(30);
const PAUSE_AFTER_ERROR: Duration = Duration::from_millis(100);

/// The running listeners.
pub struct Servers {
    tasks: Vec<JoinHandle<()>>,
    holds: Vec<Hold>,
}

impl Servers {
    /// Takes no more requests.
    pub async fn stop(self) {
        drop(self.holds);
        for task in self.tasks {
            task.abort();
            let _ = task.await;
        }
    }
}

/// Opens the admin listener, and that of the metrics.
pub fn start(daemon: &Arc<Daemon>) -> Result<Servers> {
    let config = daemon.config();
    let mut servers = Servers { tasks: Vec::new(), holds: Vec::new() };
    let address = config.daemon.admin_address().map_err(Error::invalid)?;
    let router = super::router(daemon.clone());
    match &address {
        Address::Unix(path) => {
            let path = std::path::absolute(path).map_err(|error| Error::io(path.display(), &error))?;
            let rules = SocketRules { mode: 0o600, group: None, ..SocketRules::from_config(&config) };
            daemon.listeners().ensure_private(&path)?;
            let (listener, hold) = daemon.listeners().open_unix(&path, &rules)?;
            servers.holds.push(hold);
            tracing::info!("admin API: listening on {address}");
            servers.tasks.push(tokio::spawn(accept_unix(nonblocking_unix(listener)?, router)));
        }
        Address::Tcp { .. } => {
            let token = admin_token(&config).map_err(Error::invalid)?;
            let token = token.ok_or_else(|| Error::invalid("the admin API on TCP needs [daemon].admin_token_file"))?;
            let router = guarded(router, token);
            let tls = tls_acceptor(&config)?;
            let (listener, hold) = daemon.listeners().open_tcp(&address)?;
            servers.holds.push(hold);
            let scheme = if tls.is_some() { "https" } else { "http" };
            let local = listener.local_addr().map_err(|error| Error::io(&address, &error))?;
            tracing::info!("admin API: listening on {scheme}://{local}");
            servers.tasks.push(tokio::spawn(accept_tcp(nonblocking_tcp(listener)?, router, tls)));
        }
    }
    if let Some(metrics) = &config.daemon.metrics {
        let (listener, hold) = daemon.listeners().open_tcp(&address::tcp(metrics).map_err(Error::invalid)?)?;
        servers.holds.push(hold);
        if let Ok(local) = listener.local_addr() {
            tracing::info!("metrics: listening on {local}");
            daemon.note_metrics_address(local.to_string());
        }
        let router = Router::new().route("/metrics", get(super::system::metrics)).with_state(daemon.clone());
        servers.tasks.push(tokio::spawn(accept_tcp(nonblocking_tcp(listener)?, router, None)));
    }
    Ok(servers)
}

fn nonblocking_unix(listener: std::os::unix::net::UnixListener) -> Result<UnixListener> {
    let ready = listener.set_nonblocking(true).and_then(|()| UnixListener::from_std(listener));
    ready.map_err(|error| Error::io("admin socket", &error))
}

fn nonblocking_tcp(listener: std::net::TcpListener) -> Result<TcpListener> {
    let ready = listener.set_nonblocking(true).and_then(|()| TcpListener::from_std(listener));
    ready.map_err(|error| Error::io("listening socket", &error))
}

fn tls_acceptor(config: &Config) -> Result<Option<TlsAcceptor>> {
    use rustls::pki_types::pem::PemObject;
    use rustls::pki_types::{CertificateDer, PrivateKeyDer};
    let Some(tls) = &config.tls else { return Ok(None) };
    let bad = |what: &str, why: String| Error::invalid(format!("[tls].{what}: {why}"));
    let certificates: std::result::Result<Vec<_>, _> =
        CertificateDer::pem_file_iter(&tls.cert).map_err(|error| bad("cert", error.to_string()))?.collect();
    let certificates = certificates.map_err(|error| bad("cert", error.to_string()))?;
    let key = tls_key(tls).map_err(Error::invalid)?;
    let key = PrivateKeyDer::from_pem_slice(key.as_bytes()).map_err(|error| bad("key_file", error.to_string()))?;
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let server = rustls::ServerConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .map_err(|error| bad("cert", error.to_string()))?
        .with_no_client_auth()
        .with_single_cert(certificates, key)
        .map_err(|error| bad("cert", error.to_string()))?;
    Ok(Some(TlsAcceptor::from(Arc::new(server))))
}

/// Asks every request for the token.
fn guarded(router: Router, token: String) -> Router {
    let expected: Arc<str> = format!("Bearer {token}").into();
    router.layer(middleware::from_fn(move |request: Request, next: Next| {
        let expected = expected.clone();
        async move {
            let given = request.headers().get(AUTHORIZATION).map(HeaderValue::as_bytes);
            if given.is_some_and(|given| same_secret(given, expected.as_bytes())) {
                return next.run(request).await;
            }
            let what = if given.is_some() { "this is not the admin API's token" } else { "the admin API asks for its token" };
            let how = "what the daemon's admin_token_file holds; `novastor` reads it from --token-file FILE, others send \
                       Authorization: Bearer TOKEN";
            let refusal = Error::new(ErrorKind::Unauthorized, format!("{what}: {how}"));
            let mut response = refusal.into_response();
            response.headers_mut().insert(WWW_AUTHENTICATE, HeaderValue::from_static("Bearer"));
            response
        }
    }))
}

/// Takes the same time wherever two secrets of one length differ.
fn same_secret(left: &[u8], right: &[u8]) -> bool {
    let difference = left.iter().zip(right).fold(0u8, |difference, (left, right)| difference | (left ^ right));
    left.len() == right.len() && std::hint::black_box(difference) == 0
}

async fn accept_unix(listener: UnixListener, router: Router) {
    let slots = Arc::new(Semaphore::new(CONNECTIONS_MAX));
    let mut connections = JoinSet::new();
    loop {
        while connections.try_join_next().is_some() {}
        let Ok(slot) = slots.clone().acquire_owned().await else { return };
        match listener.accept().await {
            Ok((stream, _)) => {
                let router = router.clone();
                connections.spawn(async move {
                    converse(stream, router).await;
                    drop(slot);
                });
            }
            Err(error) => pause(&error).await,
        }
    }
}

async fn accept_tcp(listener: TcpListener, router: Router, tls: Option<TlsAcceptor>) {
    let slots = Arc::new(Semaphore::new(CONNECTIONS_MAX));
    let mut connections = JoinSet::new();
    loop {
        while connections.try_join_next().is_some() {}
        let Ok(slot) = slots.clone().acquire_owned().await else { return };
        match listener.accept().await {
            Ok((stream, peer)) => {
                let (router, tls) = (router.clone(), tls.clone());
                connections.spawn(async move {
                    match tls {
                        None => converse(stream, router).await,
                        Some(tls) => match tokio::time::timeout(PATIENCE, tls.accept(stream)).await {
                            Ok(Ok(stream)) => converse(stream, router).await,
                            Ok(Err(error)) => tracing::info!("TLS with {peer}: {error}"),
                            Err(_) => tracing::info!("TLS with {peer}: took too long"),
                        },
                    }
                    drop(slot);
                });
            }
            Err(error) => pause(&error).await,
        }
    }
}

async fn pause(error: &std::io::Error) {
    tracing::warn!("accepting an API client: {error}");
    tokio::time::sleep(PAUSE_AFTER_ERROR).await;
}

async fn converse(stream: impl AsyncRead + AsyncWrite + Unpin + Send + 'static, router: Router) {
    let service = TowerToHyperService::new(router);
    let connection = hyper::server::conn::http1::Builder::new()
        .timer(hyper_util::rt::TokioTimer::new())
        .header_read_timeout(PATIENCE)
        .serve_connection(TokioIo::new(stream), service);
    if let Err(error) = connection.await {
        tracing::debug!("API client: {error}");
    }
}

/// For requests that no handler takes.
pub async fn unknown(request: Request) -> std::result::Result<Response<Body>, Infallible> {
    let message = format!("{} {} is not part of the API: /openapi.json says what is", request.method(), request.uri().path());
    let mut response = Error::not_found(message).into_response();
    *response.status_mut() = StatusCode::NOT_FOUND;
    Ok(response)
}
