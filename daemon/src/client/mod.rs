//! The command line's way to the admin API: over a unix socket, TCP, or TLS.

use std::net::IpAddr;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use axum::http::{Method, Request, StatusCode};
use http_body_util::{BodyExt, Full};
use hyper::body::Bytes;
use hyper_util::rt::TokioIo;
use serde::Serialize;
use serde::de::DeserializeOwned;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpStream, UnixStream};

use crate::api::reply::{ErrorBody, IncompleteBody, Listed};
use crate::config::read_secret;
use crate::error::{Error, ErrorKind, Result};

/// Where the daemon listens when nothing else is said: the system's, and if that is not there the one of `novastor quickstart`.
const SYSTEM_SOCKET: &str = "/run/novastor/admin.sock";
const OWN_SOCKET: &str = "novastor-data/run/admin.sock";

/// An address of the admin API.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Target {
    Unix(PathBuf),
    Plain(String),
    Tls(String),
}

/// A client of one daemon.
pub struct Client {
    target: Target,
    token: Option<String>,
    ca: Option<PathBuf>,
    runtime: tokio::runtime::Runtime,
}

impl Client {
    /// `admin`: `unix:PATH`, `http://HOST:PORT` or `https://HOST:PORT`; by default the system's socket, or the caller's own below the current folder.
    pub fn new(admin: Option<&str>, token_file: Option<&Path>, ca: Option<&Path>) -> Result<Client> {
        let target = match admin {
            Some(text) => parse(text)?,
            None => Target::Unix(default_socket(Path::new(SYSTEM_SOCKET), Path::new(OWN_SOCKET))?),
        };
        let token = token_file.map(|path| read_secret(path).map_err(Error::invalid)).transpose()?;
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
        Ok(Client {
            target,
            token: token.map(|token| token.trim().to_owned()),
            ca: ca.map(Path::to_owned),
            runtime: runtime.map_err(|error| Error::io("starting the client", &error))?,
        })
    }

    pub fn get<T: DeserializeOwned>(&self, path: &str) -> Result<T> {
        self.call(Method::GET, path, None::<&()>)
    }

    /// A list that may lack what pools hold that do not answer.
    pub fn list<T: DeserializeOwned>(&self, path: &str) -> Result<Listed<T>> {
        let (status, bytes) = self.runtime.block_on(self.exchange(Method::GET, path, None::<&()>))?;
        match serde_json::from_slice::<IncompleteBody<T>>(&bytes) {
            Ok(body) if !status.is_success() => Ok(Listed { found: body.found, unanswered: body.unanswered }),
            _ => Ok(Listed { found: understood(status, &bytes)?, unanswered: Vec::new() }),
        }
    }

    pub fn post<T: DeserializeOwned>(&self, path: &str, body: &impl Serialize) -> Result<T> {
        self.call(Method::POST, path, Some(body))
    }

    pub fn put<T: DeserializeOwned>(&self, path: &str, body: &impl Serialize) -> Result<T> {
        self.call(Method::PUT, path, Some(body))
    }

    pub fn delete<T: DeserializeOwned>(&self, path: &str) -> Result<T> {
        self.call(Method::DELETE, path, None::<&()>)
    }

    fn call<T: DeserializeOwned>(&self, method: Method, path: &str, body: Option<&impl Serialize>) -> Result<T> {
        let (status, bytes) = self.runtime.block_on(self.exchange(method, path, body))?;
        understood(status, &bytes)
    }

    async fn exchange(&self, method: Method, path: &str, body: Option<&impl Serialize>) -> Result<(StatusCode, Bytes)> {
        match &self.target {
            Target::Unix(socket) => {
                let stream = UnixStream::connect(socket).await.map_err(|error| unreachable_socket(socket, &error))?;
                self.converse(stream, "localhost", method, path, body).await
            }
            Target::Plain(host) => {
                let stream = connect_tcp(host).await?;
                if self.token.is_some() {
                    let peer = stream.peer_addr().map_err(|error| Error::io(format!("the daemon at {host}"), &error))?;
                    check_unencrypted(host, peer.ip())?;
                }
                self.converse(stream, host, method, path, body).await
            }
            Target::Tls(host) => {
                let stream = self.connect_tls(host).await?;
                self.converse(stream, host, method, path, body).await
            }
        }
    }

    async fn connect_tls(&self, host: &str) -> Result<impl AsyncRead + AsyncWrite + Unpin + Send + 'static> {
        use rustls::pki_types::pem::PemObject;
        use rustls::pki_types::{CertificateDer, ServerName};
        let bad = |why: String| Error::invalid(format!("TLS to {host}: {why}"));
        let ca = self.ca.as_ref().ok_or_else(|| bad("name the daemon's CA with --ca FILE or NOVASTOR_ADMIN_CA".to_owned()))?;
        let mut roots = rustls::RootCertStore::empty();
        for certificate in CertificateDer::pem_file_iter(ca).map_err(|error| bad(error.to_string()))? {
            let certificate = certificate.map_err(|error| bad(error.to_string()))?;
            roots.add(certificate).map_err(|error| bad(error.to_string()))?;
        }
        if roots.is_empty() {
            return Err(bad(format!("there is no certificate in {}", ca.display())));
        }
        let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
        let config = rustls::ClientConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()
            .map_err(|error| bad(error.to_string()))?
            .with_root_certificates(roots)
            .with_no_client_auth();
        let name = host.rsplit_once(':').map_or(host, |(name, _)| name).trim_matches(['[', ']']).to_owned();
        let server = ServerName::try_from(name.clone()).map_err(|error| bad(error.to_string()))?;
        let stream = connect_tcp(host).await?;
        let connector = tokio_rustls::TlsConnector::from(Arc::new(config));
        let advice = format!("the daemon's certificate must be for {name}, and signed by a CA in {}", ca.display());
        connector.connect(server, stream).await.map_err(|error| bad(format!("{error}; {advice}")))
    }

    async fn converse(
        &self,
        stream: impl AsyncRead + AsyncWrite + Unpin + Send + 'static,
        host: &str,
        method: Method,
        path: &str,
        body: Option<&impl Serialize>,
    ) -> Result<(StatusCode, Bytes)> {
        let lost = |error: hyper::Error| Error::new(ErrorKind::Io, format!("the connection to the daemon broke: {error}"));
        let (mut sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream)).await.map_err(lost)?;
        tokio::spawn(connection);
        let mut request = Request::builder().method(method).uri(path).header("host", host);
        if let Some(token) = &self.token {
            request = request.header("authorization", format!("Bearer {token}"));
        }
        let content = match body {
            Some(body) => {
                request = request.header("content-type", "application/json");
                serde_json::to_vec(body).map_err(|error| Error::internal(error.to_string()))?
            }
            None => Vec::new(),
        };
        let request = request.body(Full::new(Bytes::from(content))).map_err(|error| Error::invalid(error.to_string()))?;
        let response = sender.send_request(request).await.map_err(lost)?;
        let status = response.status();
        let bytes = response.into_body().collect().await.map_err(lost)?.to_bytes();
        Ok((status, bytes))
    }
}

/// Whoever may write to the current folder could have put a daemon of theirs there: only one of the caller's own is talked to.
fn default_socket(system: &Path, own: &Path) -> Result<PathBuf> {
    if system.exists() || own.symlink_metadata().is_err() {
        return Ok(system.to_owned());
    }
    let caller = rustix::process::geteuid().as_raw();
    let folders = own.ancestors().skip(1).filter(|folder| !folder.as_os_str().is_empty()).take(2);
    let is_callers = |path: &Path| {
        path.symlink_metadata().is_ok_and(|metadata| !metadata.file_type().is_symlink() && metadata.uid() == caller)
    };
    if std::iter::once(own).chain(folders).all(is_callers) {
        return Ok(own.to_owned());
    }
    Err(Error::invalid(format!(
        "the daemon's socket {} and its folders are not all your own: if that daemon is meant, say --admin unix:{0}",
        own.display()
    )))
}

fn understood<T: DeserializeOwned>(status: StatusCode, bytes: &[u8]) -> Result<T> {
    if status.is_success() {
        return serde_json::from_slice(bytes).map_err(|error| {
            Error::internal(format!("the daemon's answer is not understood ({error}): are both of one version?"))
        });
    }
    match serde_json::from_slice::<ErrorBody>(bytes) {
        Ok(body) => Err(body.error),
        Err(_) => Err(Error::internal(format!(
            "the answer, {status}, is not a novastor's: check --admin and NOVASTOR_ADMIN, and that both are of one version"
        ))),
    }
}

async fn connect_tcp(host: &str) -> Result<TcpStream> {
    TcpStream::connect(host).await.map_err(|error| Error::io(format!("the daemon at {host} does not answer"), &error))
}

/// A token is not sent where others can read it.
fn check_unencrypted(host: &str, peer: IpAddr) -> Result<()> {
    if peer.to_canonical().is_loopback() {
        return Ok(());
    }
    Err(Error::invalid(format!(
        "--admin http://{host} refused: the token would cross the network unencrypted; write https://{host}, or an address on 127.0.0.1"
    )))
}

fn unreachable_socket(socket: &Path, error: &std::io::Error) -> Error {
    let next = match error.kind() {
        std::io::ErrorKind::PermissionDenied => "run as the daemon's user (sudo)",
        _ => "is `novastor serve` running? name its socket with --admin unix:PATH or NOVASTOR_ADMIN",
    };
    Error::io(format!("no daemon answers at {} ({next})", socket.display()), error)
}

fn parse(text: &str) -> Result<Target> {
    if let Some(path) = text.strip_prefix("unix:").filter(|path| !path.is_empty()) {
        return Ok(Target::Unix(PathBuf::from(path)));
    }
    let host = |rest: &str, port: u16| {
        let host = rest.trim_end_matches('/');
        let has_port = host.rsplit_once(':').is_some_and(|(_, port)| port.parse::<u16>().is_ok());
        if has_port { host.to_owned() } else { format!("{host}:{port}") }
    };
    if let Some(rest) = text.strip_prefix("http://").or_else(|| text.strip_prefix("tcp:")) {
        return Ok(Target::Plain(host(rest, 80)));
    }
    if let Some(rest) = text.strip_prefix("https://") {
        return Ok(Target::Tls(host(rest, 443)));
    }
    Err(Error::invalid(format!("--admin {text:?}: write unix:PATH, http://HOST:PORT or https://HOST:PORT")))
}

/// A name as one segment of a path, or a value of a query.
pub fn encode(name: &str) -> String {
    let plain = |byte: u8| byte.is_ascii_alphanumeric() || b"-._~@".contains(&byte);
    name.bytes().map(|byte| if plain(byte) { char::from(byte).to_string() } else { format!("%{byte:02X}") }).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn targets_are_read() {
        assert_eq!(parse("unix:/a").unwrap(), Target::Unix("/a".into()));
        assert_eq!(parse("http://h:1/").unwrap(), Target::Plain("h:1".into()));
        assert_eq!(parse("http://[::1]:80").unwrap(), Target::Plain("[::1]:80".into()));
        assert_eq!(parse("https://h").unwrap(), Target::Tls("h:443".into()));
        assert!(parse("h:1").is_err() && parse("unix:").is_err());
    }

    #[test]
    fn a_socket_of_somebody_else_is_not_talked_to_unasked() {
        let folder = tempfile::tempdir().unwrap();
        let (system, data) = (folder.path().join("system.sock"), folder.path().join("data"));
        let own = data.join("run/admin.sock");
        assert_eq!(default_socket(&system, &own).unwrap(), system);
        std::fs::create_dir_all(data.join("run")).unwrap();
        let _listener = std::os::unix::net::UnixListener::bind(&own).unwrap();
        assert_eq!(default_socket(&system, &own).unwrap(), own);
        std::fs::rename(&data, folder.path().join("elsewhere")).unwrap();
        std::os::unix::fs::symlink("elsewhere", &data).unwrap();
        let error = default_socket(&system, &own).unwrap_err();
        assert!(error.message.contains("--admin"), "{error}");
        std::fs::write(&system, "").unwrap();
        assert_eq!(default_socket(&system, &own).unwrap(), system);
    }

    #[test]
    fn a_token_goes_unencrypted_to_this_host_only() {
        for (peer, allowed) in
            [("127.0.0.1", true), ("::1", true), ("::ffff:127.0.0.2", true), ("192.0.2.1", false), ("2001:db8::1", false)]
        {
            assert_eq!(check_unencrypted("h:1", peer.parse().unwrap()).is_ok(), allowed, "{peer}");
        }
    }

    #[test]
    fn names_are_encoded() {
        assert_eq!(encode("pool/a@s b"), "pool%2Fa@s%20b");
    }
}
