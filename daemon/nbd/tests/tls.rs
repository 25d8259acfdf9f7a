//! TLS: who gets in, what is said before it, and that everything works over it.

mod common;

use std::io::{self, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::path::Path;
use std::sync::Arc;

use common::{Answer, HANG, Rig, Wire, memory};
use nbd::protocol::{Headers, command, option, option_reply};
use nbd::{Export, ServerOptions, Serves, Socket, TlsSettings};
use rcgen::{BasicConstraints, CertificateParams, CertifiedIssuer, DistinguishedName, DnType, IsCa, KeyPair};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName};
use rustls::{ClientConfig, ClientConnection, RootCertStore, StreamOwned};

/// A certification authority made for one test.
struct Authority(CertifiedIssuer<'static, KeyPair>);

struct Identity {
    cert: String,
    key: String,
}

impl Authority {
    fn new() -> Authority {
        let mut params = CertificateParams::new(Vec::new()).unwrap();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        Authority(CertifiedIssuer::self_signed(params, KeyPair::generate().unwrap()).unwrap())
    }

    fn issue(&self, common_name: &str) -> Identity {
        self.issue_to(None, common_name)
    }

    fn issue_to(&self, organization: Option<&str>, common_name: &str) -> Identity {
        let mut params = CertificateParams::new(vec!["localhost".into()]).unwrap();
        params.distinguished_name = DistinguishedName::new();
        if let Some(organization) = organization {
            params.distinguished_name.push(DnType::OrganizationName, organization);
        }
        params.distinguished_name.push(DnType::CommonName, common_name);
        let key = KeyPair::generate().unwrap();
        let cert = params.signed_by(&key, &self.0).unwrap();
        Identity { cert: cert.pem(), key: key.serialize_pem() }
    }

    fn pem(&self) -> String {
        self.0.pem()
    }

    fn settings(&self) -> TlsSettings {
        let server = self.issue("server");
        TlsSettings::from_pem(server.cert.as_bytes(), server.key.as_bytes(), Some(self.pem().as_bytes())).unwrap()
    }

    /// What a client needs that trusts this authority.
    fn client(&self, identity: Option<&Identity>) -> ClientConfig {
        let mut roots = RootCertStore::empty();
        roots.add(CertificateDer::from_pem_slice(self.pem().as_bytes()).unwrap()).unwrap();
        let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
        let builder = ClientConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()
            .unwrap()
            .with_root_certificates(roots);
        match identity {
            None => builder.with_no_client_auth(),
            Some(identity) => {
                let cert = CertificateDer::from_pem_slice(identity.cert.as_bytes()).unwrap();
                let key = PrivateKeyDer::from_pem_slice(identity.key.as_bytes()).unwrap();
                builder.with_client_auth_cert(vec![cert], key).unwrap()
            }
        }
    }
}

struct TlsRig {
    rig: Rig,
    address: std::net::SocketAddr,
    authority: Authority,
}

impl TlsRig {
    fn new(allow: &[&str]) -> TlsRig {
        let allow = allow.iter().map(|subject| (*subject).to_owned()).collect();
        let rig = Rig::with(memory(8 << 20), 1, ServerOptions::default(), |export: Export| export.tls_allow(allow));
        let authority = Authority::new();
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        {
            let _runtime = rig.runtime.enter();
            rig.server.listen(Socket::Tcp(listener), Serves::Shared, Some(authority.settings())).unwrap();
        }
        TlsRig { rig, address, authority }
    }

    fn connect(&self) -> TcpStream {
        let stream = TcpStream::connect(self.address).unwrap();
        stream.set_read_timeout(Some(HANG)).unwrap();
        stream.set_write_timeout(Some(HANG)).unwrap();
        stream
    }

    /// Upgrades to TLS as this client.
    fn upgrade(&self, config: ClientConfig) -> io::Result<Wire> {
        let mut socket = self.connect();
        let mut wire = Wire::greet(Box::new(socket.try_clone().unwrap()));
        assert_eq!(wire.option(option::STARTTLS, &[])[0].0, option_reply::ACK);
        let name = ServerName::try_from("localhost").unwrap();
        let mut connection = ClientConnection::new(Arc::new(config), name).map_err(io::Error::other)?;
        while connection.is_handshaking() {
            connection.complete_io(&mut socket)?;
        }
        Ok(Wire::over(Box::new(StreamOwned::new(connection, socket))))
    }
}

#[test]
fn everything_works_over_tls() {
    let tls = TlsRig::new(&[]);
    let identity = tls.authority.issue("host1");
    for headers in [Headers::Simple, Headers::Structured, Headers::Extended] {
        let mut wire = tls.upgrade(tls.authority.client(Some(&identity))).unwrap().attach("disk", headers);
        let data: Vec<u8> = (0..3_000_000u32).map(|at| (at % 253) as u8).collect();
        assert_eq!(wire.write_all(77, &data), Answer::Done);
        assert!(wire.read(77, 3_000_000) == Answer::Data(data));
        let mut bytes = Vec::new();
        for n in 0..500 {
            bytes.extend(wire.header(command::READ, 0, n * 512, 9000).1);
        }
        wire.send(&bytes);
        for _ in 0..500 {
            assert!(matches!(wire.answer().1, Answer::Data(data) if data.len() == 9000));
        }
        assert_eq!(tls.rig.server.clients()[0].tls_subject.as_deref(), Some("CN=host1"));
        wire.request(command::DISC, 0, 0, 0);
        assert_eq!(wire.stream.read(&mut [0]).unwrap(), 0, "closed with a goodbye, or the read would fail");
        tls.rig.wait_for_clients(0);
    }
}

#[test]
fn requests_sent_together_with_go_are_not_lost() {
    let tls = TlsRig::new(&[]);
    let identity = tls.authority.issue("host1");
    let mut wire = tls.upgrade(tls.authority.client(Some(&identity))).unwrap();
    let (cookie, header) = wire.header(command::READ, 0, 0, 20_000);
    wire.send(&[Wire::option_bytes(option::GO, &Wire::go_data("disk")), header].concat());
    assert_eq!(wire.option_replies(option::GO).last().unwrap().0, option_reply::ACK);
    assert_eq!(wire.answer_to(cookie), Answer::Data(vec![0; 20_000]));
}

#[test]
fn only_the_clients_named_get_an_export() {
    let tls = TlsRig::new(&["host1", "CN=host2", "CN=host4,O=Example"]);
    for (organization, name, allowed) in [
        (None, "host1", true),
        (Some("Elsewhere"), "host1", true),
        (None, "host2", true),
        (Some("Elsewhere"), "host2", false),
        (None, "host3", false),
        (None, "CN=host1", false),
        (Some("Example"), "host4", true),
        (None, "host4", false),
        (None, "host4,O=Example", false),
    ] {
        let identity = tls.authority.issue_to(organization, name);
        let mut wire = tls.upgrade(tls.authority.client(Some(&identity))).unwrap();
        assert_eq!(wire.option(option::LIST, &[]).len(), if allowed { 2 } else { 1 }, "{name}");
        let replies = wire.option(option::GO, &Wire::go_data("disk"));
        let (kind, message) = replies.last().unwrap();
        assert_eq!(*kind, if allowed { option_reply::ACK } else { option_reply::ERR_POLICY }, "{name}");
        assert!(allowed || String::from_utf8_lossy(message).contains("not for CN="), "{message:?}");
    }
    let mut plain = Wire::connect(&tls.rig.socket);
    assert_eq!(plain.option(option::GO, &Wire::go_data("disk"))[0].0, option_reply::ERR_POLICY);
    assert_eq!(plain.option(option::LIST, &[]).len(), 1);
}

#[test]
fn strangers_are_turned_away() {
    let tls = TlsRig::new(&[]);
    let stranger = Authority::new().issue("host1");
    for config in [tls.authority.client(None), tls.authority.client(Some(&stranger))] {
        // With TLS 1.3 the client learns of the refusal only when it reads.
        let refused = match tls.upgrade(config) {
            Err(_) => true,
            Ok(mut wire) => {
                let _ = wire.stream.write_all(&Wire::option_bytes(option::LIST, &[]));
                wire.try_bytes(1).is_err()
            }
        };
        assert!(refused);
    }
    assert!(tls.rig.server.clients().is_empty());
}

#[test]
fn nothing_is_answered_before_tls() {
    let tls = TlsRig::new(&[]);
    let mut wire = Wire::greet(Box::new(tls.connect()));
    for option in [option::LIST, option::GO, option::INFO, option::STRUCTURED_REPLY, 77] {
        assert_eq!(
            wire.option(option, &Wire::go_data("disk")),
            [(option_reply::ERR_TLS_REQD, b"this server speaks TLS only".to_vec())]
        );
    }
    wire.send(&Wire::option_bytes(option::EXPORT_NAME, b"disk"));
    assert!(wire.is_closed());
}

/// A man in the middle puts options behind STARTTLS, hoping that they are carried out as the authenticated client's.
#[test]
fn words_in_the_clear_behind_starttls_are_not_carried_over() {
    let tls = TlsRig::new(&[]);
    let mut wire = Wire::greet(Box::new(tls.connect()));
    let injected = [Wire::option_bytes(option::STARTTLS, &[]), Wire::option_bytes(option::LIST, &[])].concat();
    wire.send(&injected);
    assert_eq!(wire.option_replies(option::STARTTLS)[0].0, option_reply::ACK);
    let mut rest = Vec::new();
    let _ = wire.stream.read_to_end(&mut rest);
    assert!(rest.is_empty(), "answered {} bytes in the clear", rest.len());
}

#[test]
fn garbage_instead_of_tls_ends_that_client_alone() {
    let tls = TlsRig::new(&[]);
    let identity = tls.authority.issue("host1");
    let mut wire = Wire::greet(Box::new(tls.connect()));
    wire.option(option::STARTTLS, &[]);
    wire.send(&[7; 4096]);
    assert!(wire.is_closed());

    let mut socket = tls.connect();
    let mut wire = Wire::greet(Box::new(socket.try_clone().unwrap()));
    wire.option(option::STARTTLS, &[]);
    let config = Arc::new(tls.authority.client(Some(&identity)));
    let mut connection = ClientConnection::new(config, ServerName::try_from("localhost").unwrap()).unwrap();
    while connection.is_handshaking() {
        connection.complete_io(&mut socket).unwrap();
    }
    connection.writer().write_all(&Wire::option_bytes(option::GO, &Wire::go_data("disk"))).unwrap();
    connection.complete_io(&mut socket).unwrap();
    tls.rig.wait_for_clients(1);
    socket.write_all(&[0x17, 3, 3, 0, 40]).unwrap();
    socket.write_all(&[1; 400]).unwrap();
    tls.rig.wait_for_clients(0);
    let mut good = tls.upgrade(tls.authority.client(Some(&identity))).unwrap().attach("disk", Headers::Simple);
    assert_eq!(good.read(0, 1), Answer::Data(vec![0]));
}

#[test]
fn settings_that_cannot_work_are_explained() {
    let authority = Authority::new();
    let server = authority.issue("server");
    let other = authority.issue("other");
    let why = |result: Result<TlsSettings, nbd::TlsError>| result.err().unwrap().to_string();
    let missing = Path::new("/nonexistent/tls.crt");
    assert!(why(TlsSettings::from_files(missing, missing, None)).starts_with("/nonexistent/tls.crt: "));
    let mixed = TlsSettings::from_pem(server.cert.as_bytes(), other.key.as_bytes(), None);
    assert!(why(mixed).starts_with("the server's certificate and key: "));
    let empty = TlsSettings::from_pem(b"", server.key.as_bytes(), None);
    assert_eq!(why(empty), "the server's certificate: there is no certificate in it");
}

/// libnbd and QEMU, which bring TLS libraries of their own.
#[test]
fn other_clients_speak_tls() {
    let tls = TlsRig::new(&["host1"]);
    let identity = tls.authority.issue("host1");
    let folder = tls.rig.path("pki");
    std::fs::create_dir(&folder).unwrap();
    for (name, content) in
        [("ca-cert.pem", tls.authority.pem()), ("client-cert.pem", identity.cert), ("client-key.pem", identity.key)]
    {
        std::fs::write(folder.join(name), content).unwrap();
    }
    let run = |program: &str, arguments: &[&str]| {
        let output = std::process::Command::new("timeout").args(["60", program]).args(arguments).output().unwrap();
        let text = format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
        assert!(output.status.success(), "{program}: {}\n{text}", output.status);
        text
    };
    let (folder, port) = (folder.display(), tls.address.port());
    let uri = format!("nbds://localhost:{port}/disk?tls-certificates={folder}");
    assert!(run("nbdinfo", &[&uri]).contains("with TLS"));
    let source = tls.rig.path("source.raw");
    let data: Vec<u8> = (0..8 << 20).map(|at: u32| (at.wrapping_mul(2_654_435_761) >> 24) as u8).collect();
    std::fs::write(&source, data).unwrap();
    run("nbdcopy", &[source.to_str().unwrap(), &uri]);
    let credentials = format!("tls-creds-x509,id=tls0,endpoint=client,dir={folder}");
    let image = format!("driver=nbd,host=localhost,port={port},export=disk,tls-creds=tls0");
    let file = format!("driver=file,filename={}", source.display());
    run("qemu-img", &["compare", "--object", &credentials, "--image-opts", &file, &image]);
}
