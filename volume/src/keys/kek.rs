//! Key-encryption keys: where they come from, and how they are told apart.
//!
//! ```text
//!   file · systemd credential · environment  ──KeySource──▶  Kek ──▶ Keks { current, previous }
//! ```
//!
//! A key is 64 hexadecimal digits, as `openssl rand -hex 32` prints them. It must be random: nothing here makes a passphrase stronger. Its id is a hash,
//! and no secret.

use std::fmt;
use std::fs::File;
use std::io::Read;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use zeroize::Zeroizing;

use super::KeyError;
use crate::crypto::Key;

const ID_CONTEXT: &str = "novastor v1 key-encryption key id";
/// Of a file with a key in it, in bytes.
const FILE_MAX: u64 = 4096;
const DIGITS: usize = 64;

/// Names a key-encryption key without giving it away.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct KekId(pub [u8; 16]);

impl fmt::Display for KekId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

impl fmt::Debug for KekId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// A key that wraps other keys. Wiped when dropped.
#[derive(Clone)]
pub struct Kek {
    id: KekId,
    key: Key,
}

impl Kek {
    /// `bytes` are random.
    pub fn new(bytes: [u8; 32]) -> Kek {
        let mut id = [0; 16];
        id.copy_from_slice(&blake3::derive_key(ID_CONTEXT, &bytes)[..16]);
        Kek { id: KekId(id), key: Key::new(bytes) }
    }

    /// Reads 64 hexadecimal digits, with white space around them.
    ///
    /// # Errors
    /// [`KeyError::Source`] if they are not that; the text is not repeated.
    pub fn parse(origin: &str, text: &str) -> Result<Kek, KeyError> {
        let digits = text.trim().as_bytes();
        let value = |digit: u8| (digit as char).to_digit(16).map(|value| value as u8);
        let mut bytes = Zeroizing::new([0; DIGITS / 2]);
        let mut whole = digits.len() == DIGITS;
        for (byte, pair) in bytes.iter_mut().zip(digits.chunks_exact(2)) {
            match (value(pair[0]), value(pair[1])) {
                (Some(high), Some(low)) => *byte = high << 4 | low,
                _ => whole = false,
            }
        }
        if whole {
            return Ok(Kek::new(*bytes));
        }
        let why = format!("it is no key: {DIGITS} hexadecimal digits are needed; make one with `openssl rand -hex 32`");
        Err(KeyError::Source { origin: origin.to_owned(), why })
    }

    pub fn id(&self) -> KekId {
        self.id
    }

    pub(crate) fn key(&self) -> &Key {
        &self.key
    }
}

/// The keys that wrap, and wrapped, the keys of a pool.
#[derive(Clone, Default)]
pub struct Keks {
    /// Wraps what is written from now on. Without it nothing can be encrypted.
    pub current: Option<Kek>,
    /// The one before, as long as something may be wrapped with it.
    pub previous: Option<Kek>,
}

impl Keks {
    pub(crate) fn current_for(&self, what: impl FnOnce() -> String) -> Result<&Kek, KeyError> {
        self.current.as_ref().ok_or_else(|| KeyError::NoKek { what: what() })
    }

    pub(crate) fn find(&self, id: KekId) -> Option<&Kek> {
        [&self.current, &self.previous].into_iter().flatten().find(|kek| kek.id == id)
    }

    /// Of the current and of the previous one.
    pub fn ids(&self) -> [Option<KekId>; 2] {
        [&self.current, &self.previous].map(|kek| kek.as_ref().map(Kek::id))
    }

    /// Which there are, for an error.
    pub(crate) fn describe(&self) -> String {
        let ids: Vec<String> = [&self.current, &self.previous].into_iter().flatten().map(|kek| kek.id.to_string()).collect();
        if ids.is_empty() { "no key is configured".to_owned() } else { format!("the configured one is {}", ids.join(" or ")) }
    }
}

/// Where a key-encryption key comes from. One that asks a key management service fetches it the same way.
pub trait KeySource {
    /// For people.
    fn origin(&self) -> String;

    /// Reads the key. May block.
    ///
    /// # Errors
    /// [`KeyError::Source`] if it is not there, is no key, or others could read it too.
    fn fetch(&self) -> Result<Kek, KeyError>;
}

/// A file that only its owner (and group) can read.
#[derive(Clone, Debug)]
pub struct KeyFile(pub PathBuf);

impl KeySource for KeyFile {
    fn origin(&self) -> String {
        format!("file {}", self.0.display())
    }

    fn fetch(&self) -> Result<Kek, KeyError> {
        let failed = |why: String| KeyError::Source { origin: self.origin(), why };
        let text = read_private(&self.0).map_err(failed)?;
        Kek::parse(&self.origin(), &text)
    }
}

fn read_private(path: &Path) -> Result<Zeroizing<String>, String> {
    let file = File::open(path).map_err(|error| error.to_string())?;
    let mode = file.metadata().map_err(|error| error.to_string())?.mode() & 0o777;
    if mode & 0o007 != 0 {
        return Err(format!("its mode is {mode:04o}, so others can reach it: chmod 0600 {}", path.display()));
    }
    let mut text = Zeroizing::new(String::with_capacity(FILE_MAX as usize));
    file.take(FILE_MAX).read_to_string(&mut text).map_err(|error| error.to_string())?;
    Ok(text)
}

/// What systemd puts into the folder `$CREDENTIALS_DIRECTORY` of a unit with `LoadCredential=` or `LoadCredentialEncrypted=`.
#[derive(Clone, Debug)]
pub struct Credential {
    pub name: String,
}

impl KeySource for Credential {
    fn origin(&self) -> String {
        format!("credential {}", self.name)
    }

    fn fetch(&self) -> Result<Kek, KeyError> {
        let failed = |why: String| KeyError::Source { origin: self.origin(), why };
        let folder = std::env::var_os("CREDENTIALS_DIRECTORY")
            .ok_or_else(|| failed("$CREDENTIALS_DIRECTORY is not set: write LoadCredential= into the unit".to_owned()))?;
        if self.name.contains('/') {
            return Err(failed("the name of a credential has no slash".to_owned()));
        }
        let text = read_private(&Path::new(&folder).join(&self.name)).map_err(failed)?;
        Kek::parse(&self.origin(), &text)
    }
}

#[cfg(test)]
mod tests {
    use std::fs::{self, Permissions};
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    const TEXT: &str = "000102030405060708090a0B0C0D0E0F101112131415161718191a1b1c1d1e1f";

    #[test]
    fn a_key_is_64_hexadecimal_digits() {
        let kek = Kek::parse("x", &format!("  {TEXT}\n")).ok().unwrap();
        assert_eq!(*kek.key().bytes(), std::array::from_fn(|index| index as u8));
        let hashed = blake3::derive_key("novastor v1 key-encryption key id", kek.key().bytes());
        assert_eq!(kek.id().0, hashed[..16]);
        for bad in ["", &TEXT[1..], &format!("{TEXT}0"), &TEXT.replace('B', "g"), &"é".repeat(32), "pass phrase"] {
            let error = Kek::parse("x", bad).err().unwrap().to_string();
            assert!(error.contains("openssl") && (bad.is_empty() || !error.contains(bad)), "{error}");
        }
    }

    #[test]
    fn a_file_that_others_can_reach_is_refused() {
        let folder = tempfile::tempdir().unwrap();
        let file = KeyFile(folder.path().join("kek"));
        assert!(file.fetch().err().unwrap().to_string().contains("kek"));
        fs::write(&file.0, TEXT).unwrap();
        for (mode, is_fine) in [(0o400, true), (0o640, true), (0o644, false), (0o602, false), (0o601, false)] {
            fs::set_permissions(&file.0, Permissions::from_mode(mode)).unwrap();
            match file.fetch() {
                Ok(kek) => assert!(is_fine && kek.id() == Kek::parse("", TEXT).ok().unwrap().id(), "{mode:o}"),
                Err(error) => assert!(!is_fine && error.to_string().contains("chmod 0600"), "{mode:o}: {error}"),
            }
        }
    }

    #[test]
    fn a_credential_that_is_not_there_is_named() {
        let credential = Credential { name: "a/b".to_owned() }.fetch().err().unwrap().to_string();
        assert!(credential.contains("credential a/b"), "{credential}");
    }
}
