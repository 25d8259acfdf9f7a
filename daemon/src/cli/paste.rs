//! Lines to paste: how QEMU, Cloud Hypervisor, libvirt and NBD clients attach to an export.

use std::process::{Command, Stdio};

use serde::Serialize;

use crate::api::types::{ExportInfo, Protocol};
use crate::quoting;

/// An export with the lines to paste.
#[derive(Serialize)]
pub struct WithLines {
    #[serde(flatten)]
    pub export: ExportInfo,
    /// What attaches to it.
    pub lines: Vec<Line>,
}

/// What to paste where.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Line {
    /// `qemu`, `cloud-hypervisor`, `libvirt`, `nbd-client`, `nbdinfo` …
    pub tool: String,
    pub text: String,
}

fn line(tool: &str, text: impl Into<String>) -> Line {
    Line { tool: tool.to_owned(), text: text.into() }
}

impl WithLines {
    /// For the QEMU found on this host.
    pub fn new(export: ExportInfo) -> WithLines {
        let lines = lines(&export, qemu_version());
        WithLines { export, lines }
    }

    pub fn text(&self) -> String {
        text(&self.lines)
    }
}

/// The lines under their tools' names.
pub fn text(lines: &[Line]) -> String {
    lines.iter().map(|line| format!("# {}\n{}", line.tool, line.text)).collect::<Vec<_>>().join("\n\n")
}

/// `major.minor` of the QEMU on this host.
pub fn qemu_version() -> Option<(u32, u32)> {
    let programs = ["qemu-system-x86_64", "qemu-system-aarch64", "qemu-kvm", "/usr/libexec/qemu-kvm"];
    programs.into_iter().find_map(|program| {
        let output = Command::new(program).arg("--version").stdin(Stdio::null()).stderr(Stdio::null()).output().ok()?;
        parse_version(&String::from_utf8_lossy(&output.stdout))
    })
}

fn parse_version(text: &str) -> Option<(u32, u32)> {
    let version = text.split_whitespace().skip_while(|word| *word != "version").nth(1)?;
    let mut parts = version.split(['.', '(', '-']);
    Some((parts.next()?.parse().ok()?, parts.next()?.parse().ok()?))
}

/// How a chardev tries again after the daemon was restarted.
fn reconnect(version: Option<(u32, u32)>) -> &'static str {
    match version {
        Some(version) if version < (9, 2) => "reconnect=1",
        _ => "reconnect-ms=100",
    }
}

fn lines(export: &ExportInfo, qemu: Option<(u32, u32)>) -> Vec<Line> {
    match export.protocol {
        Protocol::VhostUser => export.uris.first().map(|path| vhost_user(path, export.read_only, qemu)).unwrap_or_default(),
        Protocol::Nbd => export.uris.iter().flat_map(|uri| nbd(uri, export.read_only)).collect(),
    }
}

fn vhost_user(path: &str, read_only: bool, qemu: Option<(u32, u32)>) -> Vec<Line> {
    let found = match qemu {
        Some((major, minor)) => format!("qemu (this host has {major}.{minor})"),
        None => "qemu (none was found here; for 9.2 and later)".to_owned(),
    };
    let access = if read_only { ",readonly=on" } else { "" };
    vec![
        line(
            &found,
            format!(
                "-object memory-backend-memfd,id=mem0,size=1G,share=on -m 1G -machine q35,memory-backend=mem0 \\\n\
                 -chardev {} \\\n\
                 -device vhost-user-blk-pci,chardev=disk0,num-queues=1",
                quoting::shell(&format!("socket,id=disk0,path={},{}", quoting::qemu(path), reconnect(qemu)))
            ),
        ),
        line(
            "cloud-hypervisor",
            format!(
                "--memory size=1G,shared=on \\\n--disk {}",
                quoting::shell(&format!(
                    "vhost_user=on,socket={},num_queues=1,queue_size=128{access}",
                    quoting::cloud_hypervisor(path)
                ))
            ),
        ),
        line(
            "libvirt",
            format!(
                "<memoryBacking><source type='memfd'/><access mode='shared'/></memoryBacking>\n\
                 <disk type='vhostuser' device='disk'>\n  <driver name='qemu' type='raw'/>\n  \
                 <source type='unix' path='{}'><reconnect enabled='yes' timeout='1'/></source>\n  \
                 <target dev='vda' bus='virtio'/>\n</disk>",
                quoting::xml(path)
            ),
        ),
    ]
}

fn nbd(uri: &str, read_only: bool) -> Vec<Line> {
    let access = if read_only { ",readonly=on" } else { "" };
    let tls = Tls::of(uri);
    let (client, server) = match parts(uri) {
        (Place::Unix(path), name) => (
            format!("nbd-client -unix {} -name {} /dev/nbd0", quoting::shell(&path), quoting::shell(&name)),
            format!("file.server.type=unix,file.server.path={},file.export={name}", quoting::qemu(&path)),
        ),
        (Place::Tcp { host, port }, name) => (
            format!("nbd-client {host} {port} -name {name}{} /dev/nbd0", tls.nbd_client),
            format!("file.server.type=inet,file.server.host={host},file.server.port={port},file.export={name}"),
        ),
    };
    vec![
        line(
            "qemu",
            format!(
                "{}-drive {}",
                tls.qemu_object,
                quoting::shell(&format!(
                    "if=virtio,format=raw,cache=none,discard=unmap,file.driver=nbd,{server}{},file.reconnect-delay=60{access}",
                    tls.qemu_drive
                ))
            ),
        ),
        line("nbd-client", client),
        line("nbdinfo", format!("nbdinfo '{uri}'")),
        line("qemu-img", qemu_img(uri, &server, &tls)),
    ]
}

/// QEMU knows no URI with TLS.
fn qemu_img(uri: &str, server: &str, tls: &Tls) -> String {
    if tls.qemu_object.is_empty() {
        return format!("qemu-img info '{uri}'");
    }
    format!(
        "qemu-img info {}--image-opts driver=raw,file.driver=nbd,{server}{}",
        tls.qemu_object.replacen('-', "--", 1),
        tls.qemu_drive
    )
}

/// What TLS adds to the lines; `DIR` is the folder with the certificates.
#[derive(Default)]
struct Tls {
    nbd_client: &'static str,
    qemu_object: &'static str,
    qemu_drive: &'static str,
}

impl Tls {
    fn of(uri: &str) -> Tls {
        if !uri.starts_with("nbds:") {
            return Tls::default();
        }
        let certificate = " -x -F DIR/client-cert.pem -K DIR/client-key.pem -A DIR/ca-cert.pem";
        Tls {
            nbd_client: if uri.contains("?tls-certificates=") { certificate } else { " -x" },
            qemu_object: "-object tls-creds-x509,id=tls0,dir=DIR,endpoint=client ",
            qemu_drive: ",file.tls-creds=tls0",
        }
    }
}

enum Place<'a> {
    Unix(String),
    Tcp { host: &'a str, port: &'a str },
}

fn parts(uri: &str) -> (Place<'_>, String) {
    let rest = uri.split_once("://").map_or(uri, |(_, rest)| rest);
    let (host, path) = rest.split_once('/').unwrap_or((rest, ""));
    match path.split_once("?socket=") {
        Some((name, socket)) => (Place::Unix(quoting::from_uri(socket)), quoting::from_uri(name)),
        None => {
            let (host, port) = host.rsplit_once(':').unwrap_or((host, "10809"));
            let name = path.split_once('?').map_or(path, |(name, _)| name);
            (Place::Tcp { host: host.trim_matches(['[', ']']), port }, quoting::from_uri(name))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_choose_the_reconnect_option() {
        assert_eq!(parse_version("QEMU emulator version 10.0.2 (Debian 1:10.0.2+ds-2)"), Some((10, 0)));
        assert_eq!(parse_version("QEMU emulator version 7.2.17"), Some((7, 2)));
        assert_eq!(parse_version("garbage"), None);
        assert_eq!(reconnect(Some((9, 1))), "reconnect=1");
        assert_eq!(reconnect(Some((9, 2))), "reconnect-ms=100");
        assert_eq!(reconnect(Some((10, 0))), "reconnect-ms=100");
    }

    #[test]
    fn nbd_lines_name_socket_host_and_export() {
        let lines = nbd("nbd+unix:///demo?socket=/run/n.sock", false);
        assert!(lines[0].text.contains("file.server.path=/run/n.sock,file.export=demo"), "{lines:?}");
        assert_eq!(lines[1].text, "nbd-client -unix /run/n.sock -name demo /dev/nbd0");
        let lines = nbd("nbd://[::1]:10809/demo", true);
        assert!(lines[0].text.contains("file.server.host=::1,file.server.port=10809"), "{lines:?}");
        assert!(lines[0].text.ends_with("readonly=on"));
    }

    #[test]
    fn unusual_paths_are_quoted_as_each_tool_reads_them() {
        let lines = vhost_user("/my 'd', x/v.sock", false, Some((10, 0)));
        assert!(
            lines[0].text.contains(r"-chardev 'socket,id=disk0,path=/my '\''d'\'',, x/v.sock,reconnect-ms=100' \"),
            "{lines:?}"
        );
        assert!(lines[1].text.contains("socket=\"/my '\\''d'\\'', x/v.sock\",num_queues=1"), "{lines:?}");
        assert!(
            lines[2].text.contains("<source type='unix' path='/my &apos;d&apos;, x/v.sock'><reconnect enabled='yes'"),
            "{lines:?}"
        );
        let usual = vhost_user("/run/v.sock", false, Some((10, 0)));
        assert!(usual[2].text.starts_with("<memoryBacking><source type='memfd'/><access mode='shared'/></memoryBacking>\n"));
        assert!(usual[2].text.contains("<disk type='vhostuser' device='disk'>") && !usual[0].text.contains('\''), "{usual:?}");
        let lines = nbd("nbd+unix:///demo?socket=/my%20d%2C/n.sock", false);
        assert!(lines[0].text.starts_with("-drive 'if=virtio,") && lines[0].text.contains("path=/my d,,/n.sock,"), "{lines:?}");
        assert_eq!(lines[1].text, "nbd-client -unix '/my d,/n.sock' -name demo /dev/nbd0");
    }

    #[test]
    fn lines_with_certificates_say_where_those_go() {
        let lines = nbd("nbds://host:10809/demo?tls-certificates=DIR", false);
        assert!(lines[0].text.starts_with("-object tls-creds-x509,id=tls0,dir=DIR"), "{lines:?}");
        assert!(lines[0].text.contains("file.export=demo,file.tls-creds=tls0,"), "{lines:?}");
        assert!(lines[1].text.contains("-name demo -x -F DIR/client-cert.pem"), "{lines:?}");
        assert_eq!(lines[2].text, "nbdinfo 'nbds://host:10809/demo?tls-certificates=DIR'");
        assert!(lines[3].text.starts_with("qemu-img info --object tls-creds-x509,"), "{lines:?}");
        assert_eq!(nbd("nbds://host:1/demo", false)[1].text, "nbd-client host 1 -name demo -x /dev/nbd0");
    }
}
