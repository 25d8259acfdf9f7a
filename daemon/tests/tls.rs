//! TLS, on the admin API and on NBD: who gets in, and what the others are told.

mod common;

use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use common::{Daemon, command};
use novastor_tests::rig::tools;
use rcgen::{BasicConstraints, CertificateParams, CertifiedIssuer, DistinguishedName, DnType, IsCa, KeyPair};
use serde_json::Value;

const TOKEN: &str = "0123456789abcdef0123456789abcdef";

/// A certification authority made for one test.
struct Authority(CertifiedIssuer<'static, KeyPair>);

impl Authority {
    fn new() -> Authority {
        let mut params = CertificateParams::new(Vec::new()).unwrap();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        Authority(CertifiedIssuer::self_signed(params, KeyPair::generate().unwrap()).unwrap())
    }

    /// A folder with `ca-cert.pem`, `NAME-cert.pem` and `NAME-key.pem`, as libnbd wants it.
    fn issue(&self, folder: &Path, name: &str, common_name: &str) {
        let mut params = CertificateParams::new(vec!["localhost".into(), "127.0.0.1".into()]).unwrap();
        params.distinguished_name = DistinguishedName::new();
        params.distinguished_name.push(DnType::CommonName, common_name);
        let key = KeyPair::generate().unwrap();
        let certificate = params.signed_by(&key, &self.0).unwrap();
        std::fs::create_dir_all(folder).unwrap();
        std::fs::write(folder.join("ca-cert.pem"), self.0.pem()).unwrap();
        std::fs::write(folder.join(format!("{name}-cert.pem")), certificate.pem()).unwrap();
        write_secret(&folder.join(format!("{name}-key.pem")), &key.serialize_pem());
    }
}

fn write_secret(path: &Path, text: &str) {
    std::fs::write(path, text).unwrap();
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o600)).unwrap();
}

/// A daemon that speaks TLS on all its TCP listeners.
struct Rig {
    daemon: Daemon,
    authority: Authority,
    /// Of the admin API, and of the shared NBD listener.
    ports: (u16, u16),
}

impl Rig {
    fn start() -> Rig {
        let mut daemon = Daemon::new(
            "[tls]\ncert = \"{dir}/tls/server-cert.pem\"\nkey_file = \"{dir}/tls/server-key.pem\"\n\
             client_ca = \"{dir}/tls/ca-cert.pem\"\n",
        );
        let authority = Authority::new();
        authority.issue(&daemon.path("tls"), "server", "server");
        write_secret(&daemon.path("token"), TOKEN);
        let config = daemon.config();
        let shown = |name: &str| daemon.path(name).display().to_string();
        let admin = format!("admin = \"unix:{}\"", shown("admin.sock"));
        let nbd = format!("nbd = [\"unix:{}\"", shown("nbd.sock"));
        assert!(config.contains(&admin) && config.contains(&nbd));
        let config = config
            .replace(&admin, &format!("admin = \"tcp:127.0.0.1:0\"\nadmin_token_file = \"{}\"", shown("token")))
            .replace(&nbd, &format!("{nbd}, \"tcp:127.0.0.1:0\""));
        daemon.configure(&config);
        daemon.start();
        let log = daemon.log();
        let port = |before: &str| -> u16 {
            let rest = log.split(before).nth(1).unwrap_or_else(|| panic!("no {before:?} in\n{log}"));
            rest.split(|byte: char| !byte.is_ascii_digit()).next().unwrap().parse().unwrap()
        };
        let ports = (port("admin API: listening on https://127.0.0.1:"), port("NBD: listening on tcp:127.0.0.1:"));
        Rig { daemon, authority, ports }
    }

    fn admin(&self) -> String {
        format!("https://localhost:{}", self.ports.0)
    }

    /// What the daemon's administrator has.
    fn credentials(&self) -> Credentials {
        Credentials { ca: Some(self.daemon.path("tls/ca-cert.pem")), token: Some(self.daemon.path("token")) }
    }

    fn run(&self, credentials: &Credentials, arguments: &[&str]) -> Output {
        let mut cli = command();
        cli.args(arguments).args(["--json", "--admin", &self.admin()]);
        for (option, file) in [("--ca", &credentials.ca), ("--token-file", &credentials.token)] {
            if let Some(file) = file {
                cli.arg(option).arg(file);
            }
        }
        cli.output().unwrap()
    }

    fn json(&self, arguments: &[&str]) -> Value {
        let output = self.run(&self.credentials(), arguments);
        assert!(output.status.success(), "{}\n{}", String::from_utf8_lossy(&output.stderr), self.daemon.log());
        serde_json::from_slice(&output.stdout).unwrap()
    }

    /// The error of a command that must fail with status 1.
    fn refused(&self, credentials: &Credentials) -> (String, String) {
        let output = self.run(credentials, &["volume", "create", "memory/no", "--size", "1M"]);
        let text = String::from_utf8_lossy(&output.stderr).into_owned();
        assert_eq!(output.status.code(), Some(1), "{text}");
        let error: Value = serde_json::from_str(&text).unwrap();
        let field = |name: &str| error["error"][name].as_str().unwrap().to_owned();
        (field("kind"), field("message"))
    }

    /// Shows an export as a client with the certificates in `folder`.
    fn nbdinfo(&self, folder: &Path) -> Output {
        let uri = format!("nbds://localhost:{}/v?tls-certificates={}", self.ports.1, folder.display());
        nbdinfo(&uri)
    }
}

fn nbdinfo(uri: &str) -> Output {
    Command::new(tools::require("nbdinfo").unwrap()).arg(uri).output().unwrap()
}

/// What `qemu-img info` says when it fails.
fn qemu_img_refused(arguments: &[&str]) -> String {
    let output = Command::new(tools::require("qemu-img").unwrap()).arg("info").args(arguments).output().unwrap();
    assert!(!output.status.success(), "{output:?}");
    String::from_utf8(output.stderr).unwrap()
}

#[derive(Clone)]
struct Credentials {
    ca: Option<PathBuf>,
    token: Option<PathBuf>,
}

#[test]
fn the_command_line_reaches_the_admin_api_over_https() {
    let rig = Rig::start();
    assert_eq!(rig.json(&["volume", "create", "local/v", "--size", "1M"])["name"], "v");
    assert_eq!(rig.json(&["volume", "list"]).as_array().unwrap().len(), 1);
    // The same from the environment, and by address.
    let credentials = rig.credentials();
    let output = command()
        .args(["volume", "show", "v", "--json"])
        .env("NOVASTOR_ADMIN", rig.admin().replace("localhost", "127.0.0.1"))
        .env("NOVASTOR_ADMIN_CA", credentials.ca.unwrap())
        .env("NOVASTOR_ADMIN_TOKEN_FILE", credentials.token.unwrap())
        .output()
        .unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
}

#[test]
fn without_the_token_or_with_another_ca_nobody_administers() {
    let rig = Rig::start();
    let credentials = rig.credentials();

    let (kind, message) = rig.refused(&Credentials { token: None, ..credentials.clone() });
    assert_eq!(kind, "unauthorized");
    assert!(message.contains("asks for its token") && message.contains("--token-file"), "{message}");
    let wrong = rig.daemon.path("wrong");
    write_secret(&wrong, &TOKEN.replace('f', "0"));
    let (kind, message) = rig.refused(&Credentials { token: Some(wrong), ..credentials.clone() });
    assert_eq!(kind, "unauthorized");
    assert!(message.contains("not the admin API's token") && message.contains("--token-file"), "{message}");

    let other = rig.daemon.path("other");
    Authority::new().issue(&other, "server", "server");
    let (_, message) = rig.refused(&Credentials { ca: Some(other.join("ca-cert.pem")), ..credentials.clone() });
    assert!(message.contains("invalid peer certificate") && message.contains("signed by a CA in"), "{message}");
    let (_, message) = rig.refused(&Credentials { ca: None, ..credentials.clone() });
    assert!(message.contains("--ca FILE"), "{message}");
    let (_, message) = rig.refused(&Credentials { ca: credentials.token.clone(), ..credentials.clone() });
    assert!(message.contains("no certificate in"), "{message}");

    let plain = command()
        .args(["volume", "list", "--admin", &rig.admin().replace("https:", "http:"), "--token-file"])
        .arg(credentials.token.as_ref().unwrap())
        .output()
        .unwrap();
    assert_eq!(plain.status.code(), Some(1), "the API is not served without TLS");
    assert_eq!(rig.json(&["volume", "list"]), serde_json::json!([]));
}

#[test]
fn an_export_is_for_the_clients_it_names() {
    let rig = Rig::start();
    rig.json(&["volume", "create", "memory/v", "--size", "5M"]);
    let export = rig.json(&["export", "add", "v", "--nbd", "--tls-allow", "CN=host1", "--tls-allow", "host3"]);
    assert_eq!(export["tls_allow"], serde_json::json!(["CN=host1", "host3"]));

    let folder = |name: &str| rig.daemon.path("clients").join(name);
    for name in ["host1", "host2", "host3"] {
        rig.authority.issue(&folder(name), "client", name);
    }
    Authority::new().issue(&folder("stranger"), "client", "host1");
    std::fs::copy(rig.daemon.path("tls/ca-cert.pem"), folder("stranger").join("ca-cert.pem")).unwrap();

    for name in ["host1", "host3"] {
        let output = rig.nbdinfo(&folder(name));
        let text = String::from_utf8_lossy(&output.stdout);
        assert!(output.status.success() && text.contains("export-size: 5242880"), "{name}: {output:?}");
    }
    let plain = nbdinfo(&format!("nbd://localhost:{}/v", rig.ports.1));
    for output in [rig.nbdinfo(&folder("host2")), rig.nbdinfo(&folder("stranger")), plain] {
        let text = String::from_utf8_lossy(&output.stdout);
        assert!(!output.status.success() && !text.contains("export-size"), "{output:?}");
    }
    // libnbd keeps the server's words to itself; QEMU shows them.
    let credentials = format!("tls-creds-x509,id=tls,endpoint=client,dir={}", folder("host2").display());
    let image = format!("driver=nbd,host=localhost,port={},export=v,tls-creds=tls", rig.ports.1);
    let text = qemu_img_refused(&["--object", &credentials, "--image-opts", &image]);
    assert!(text.contains("export v is not for CN=host2"), "{text}");
    let text = qemu_img_refused(&[&format!("nbd+unix:///v?socket={}", rig.daemon.path("nbd.sock").display())]);
    assert!(text.contains("over TLS to named clients only"), "{text}");
}
