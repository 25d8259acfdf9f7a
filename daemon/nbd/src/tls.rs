//! TLS on a listener: the server's certificate, and whose client certificates are accepted.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::server::{NoServerSessionStorage, WebPkiClientVerifier};
use rustls::{RootCertStore, ServerConfig, ServerConnection};
use thiserror::Error;
use x509_parser::objects::{oid_registry, oid2abbrev};
use x509_parser::prelude::{AttributeTypeAndValue, FromDer, RelativeDistinguishedName, X509Certificate, X509Name};

use crate::export::{Identity, Subject};

/// What a TLS listener needs. Cheap to clone.
#[derive(Clone)]
pub struct TlsSettings {
    pub(crate) config: Arc<ServerConfig>,
}

/// Why TLS cannot be set up.
#[derive(Error, Debug)]
pub enum TlsError {
    #[error("{path}: {source}")]
    File { path: PathBuf, source: io::Error },
    #[error("{what}: {reason}")]
    Invalid { what: String, reason: String },
}

fn invalid(what: &str, reason: impl ToString) -> TlsError {
    TlsError::Invalid { what: what.to_owned(), reason: reason.to_string() }
}

impl TlsSettings {
    /// From PEM files. With `client_ca`, clients must have a certificate signed by it; without, any client is accepted, and
    /// exports restricted to subjects are out of reach.
    pub fn from_files(cert: &Path, key: &Path, client_ca: Option<&Path>) -> Result<TlsSettings, TlsError> {
        let read = |path: &Path| fs::read(path).map_err(|source| TlsError::File { path: path.to_owned(), source });
        let ca = client_ca.map(read).transpose()?;
        TlsSettings::from_pem(&read(cert)?, &read(key)?, ca.as_deref())
    }

    /// The same from PEM text.
    pub fn from_pem(cert: &[u8], key: &[u8], client_ca: Option<&[u8]>) -> Result<TlsSettings, TlsError> {
        let chain = certificates("the server's certificate", cert)?;
        let key = PrivateKeyDer::from_pem_slice(key).map_err(|error| invalid("the server's key", error))?;
        let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
        let builder = ServerConfig::builder_with_provider(provider.clone())
            .with_safe_default_protocol_versions()
            .map_err(|error| invalid("TLS versions", error))?;
        let builder = match client_ca {
            None => builder.with_no_client_auth(),
            Some(pem) => {
                let mut roots = RootCertStore::empty();
                for certificate in certificates("the client CA", pem)? {
                    roots.add(certificate).map_err(|error| invalid("the client CA", error))?;
                }
                let verifier = WebPkiClientVerifier::builder_with_provider(Arc::new(roots), provider)
                    .build()
                    .map_err(|error| invalid("the client CA", error))?;
                builder.with_client_cert_verifier(verifier)
            }
        };
        let mut config =
            builder.with_single_cert(chain, key).map_err(|error| invalid("the server's certificate and key", error))?;
        // Every connection proves its identity anew.
        config.session_storage = Arc::new(NoServerSessionStorage {});
        config.send_tls13_tickets = 0;
        Ok(TlsSettings { config: Arc::new(config) })
    }
}

fn certificates(what: &str, pem: &[u8]) -> Result<Vec<CertificateDer<'static>>, TlsError> {
    let parsed: Result<Vec<_>, _> = CertificateDer::pem_slice_iter(pem).collect();
    let parsed = parsed.map_err(|error| invalid(what, error))?;
    if parsed.is_empty() { Err(invalid(what, "there is no certificate in it")) } else { Ok(parsed) }
}

/// Whom the client's verified certificate names.
pub(crate) fn identity(connection: &ServerConnection) -> Identity {
    let subject = connection.peer_certificates().and_then(|chain| chain.first()).and_then(|certificate| {
        let (_, parsed) = X509Certificate::from_der(certificate).ok()?;
        let common_name = parsed.subject().iter_common_name().next().and_then(|name| name.as_str().ok());
        Some(Subject { full: full_name(parsed.subject()), common_name: common_name.map(str::to_owned) })
    });
    Identity(subject)
}

/// A distinguished name as RFC 4514 writes it: most specific part first, special characters escaped, so that no name can be
/// made to look like another.
fn full_name(name: &X509Name<'_>) -> String {
    let parts: Vec<&RelativeDistinguishedName<'_>> = name.iter_rdn().collect();
    let written = parts.iter().rev().map(|part| part.iter().map(attribute).collect::<Vec<_>>().join("+"));
    written.collect::<Vec<_>>().join(",")
}

fn attribute(attribute: &AttributeTypeAndValue<'_>) -> String {
    let oid = attribute.attr_type();
    let kind = oid2abbrev(oid, oid_registry()).map_or_else(|_| oid.to_id_string(), str::to_owned);
    let Ok(value) = attribute.as_str() else {
        let hex: String = attribute.as_slice().iter().map(|byte| format!("{byte:02x}")).collect();
        return format!("{kind}=#{hex}");
    };
    let mut written = format!("{kind}=");
    for (at, character) in value.chars().enumerate() {
        let at_edge = at == 0 || at + 1 == value.chars().count();
        if matches!(character, ',' | '+' | '"' | '\\' | '<' | '>' | ';' | '=')
            || (character == ' ' && at_edge)
            || (character == '#' && at == 0)
        {
            written.push('\\');
        }
        written.push(character);
    }
    written
}
