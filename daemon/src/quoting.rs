//! Names and paths inside what somebody pastes: a shell's line, a URI, an option of QEMU or Cloud Hypervisor, XML. What needs no quotes gets none.

use std::path::Path;

/// One word of a shell's line.
pub fn shell(word: &str) -> String {
    let plain = |byte: u8| byte.is_ascii_alphanumeric() || b"-._/:,=@%+".contains(&byte);
    if !word.is_empty() && word.bytes().all(plain) { word.to_owned() } else { format!("'{}'", word.replace('\'', r"'\''")) }
}

/// The value of an option of QEMU.
pub fn qemu(value: &str) -> String {
    value.replace(',', ",,")
}

/// The value of an option of Cloud Hypervisor.
pub fn cloud_hypervisor(value: &str) -> String {
    if value.contains(',') { format!("\"{value}\"") } else { value.to_owned() }
}

/// The value of an attribute in XML, between single quotes.
pub fn xml(value: &str) -> String {
    value.replace('&', "&amp;").replace('<', "&lt;").replace('\'', "&apos;")
}

/// Where an NBD client finds the export `name` on a unix socket.
pub fn nbd_unix_uri(name: &str, socket: &Path) -> String {
    format!("nbd+unix:///{}?socket={}", uri(name.as_bytes()), uri(socket.as_os_str().as_encoded_bytes()))
}

fn uri(text: &[u8]) -> String {
    let plain = |byte: u8| byte.is_ascii_alphanumeric() || b"-._~/@:".contains(&byte);
    text.iter().map(|byte| if plain(*byte) { char::from(*byte).to_string() } else { format!("%{byte:02X}") }).collect()
}

/// What a part of a URI stands for.
pub fn from_uri(text: &str) -> String {
    let mut parts = text.split('%');
    let mut bytes = parts.next().unwrap_or_default().as_bytes().to_vec();
    for part in parts {
        match part.get(..2).and_then(|digits| u8::from_str_radix(digits, 16).ok()) {
            Some(byte) => bytes.extend([&[byte], &part.as_bytes()[2..]].concat()),
            None => bytes.extend([b"%", part.as_bytes()].concat()),
        }
    }
    String::from_utf8_lossy(&bytes).into_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_needs_it_is_quoted() {
        for usual in ["/run/novastor/vm-1.sock", "unix:/run/n.sock", "path=/a,id=disk0", "local/v@s"] {
            assert_eq!(shell(usual), usual);
        }
        assert_eq!(shell("a;reboot"), "'a;reboot'");
        assert_eq!(shell("it's"), r"'it'\''s'");
        assert_eq!(shell(""), "''");
        assert_eq!(qemu("/a,b"), "/a,,b");
        assert_eq!(cloud_hypervisor("/a,b"), "\"/a,b\"");
        assert_eq!(xml("/a'<&"), "/a&apos;&lt;&amp;");
    }

    #[test]
    fn uris_come_back_as_they_were() {
        assert_eq!(nbd_unix_uri("v", Path::new("/run/n.sock")), "nbd+unix:///v?socket=/run/n.sock");
        let socket = "/my disks, 100%/ä'&?.sock";
        let uri = nbd_unix_uri("v", Path::new(socket));
        assert!(uri.is_ascii() && !uri.contains([' ', ',', '\'', '&']), "{uri}");
        assert_eq!(from_uri(uri.split_once("socket=").unwrap().1), socket);
        assert_eq!(from_uri("100%"), "100%");
    }
}
