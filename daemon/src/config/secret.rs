//! Secrets: read from files that only their owner (and group) can read, or taken from the environment.

use std::fs::File;
use std::io::Read;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use volume::keys::{Credential, Kek, Keks, KeyError, KeyFile, KeySource};

use super::model::{Config, KeysConfig, PoolConfig, TlsConfig};

const SECRET_MAX: u64 = 1 << 20;

/// Reads a secret file; refuses one that others can read or write.
pub fn read_secret(path: &Path) -> Result<String, String> {
    let shown = path.display();
    let mut text = String::new();
    open_secret(path)?.take(SECRET_MAX).read_to_string(&mut text).map_err(|error| format!("secret file {shown}: {error}"))?;
    Ok(text)
}

/// Refuses a file that others can read or write, for one that a library reads.
pub fn check_secret(path: &Path) -> Result<(), String> {
    open_secret(path).map(|_| ())
}

fn open_secret(path: &Path) -> Result<File, String> {
    let shown = path.display();
    let file = File::open(path).map_err(|error| format!("secret file {shown}: {error}"))?;
    let metadata = file.metadata().map_err(|error| format!("secret file {shown}: {error}"))?;
    if metadata.mode() & 0o007 != 0 {
        let mode = metadata.mode() & 0o777;
        return Err(format!("secret file {shown} has mode {mode:04o}, so others can reach it: chmod 0600 {shown}"));
    }
    Ok(file)
}

/// The bearer token of the admin API, where there is one.
pub fn admin_token(config: &Config) -> Result<Option<String>, String> {
    let token = match (&config.daemon.admin_token, &config.daemon.admin_token_file) {
        (Some(token), _) => token.clone(),
        (None, Some(path)) => read_secret(path)?,
        (None, None) => return Ok(None),
    };
    let token = token.trim();
    if token.len() < 16 {
        return Err("the admin token is shorter than 16 characters: make one with `openssl rand -hex 32`".to_owned());
    }
    Ok(Some(token.to_owned()))
}

/// The access key of an S3 pool: its id and its secret.
pub fn s3_access_key(pool: &PoolConfig) -> Result<(String, String), String> {
    let part = |name: &str, value: &Option<String>, file: &Option<PathBuf>| {
        let text = match (value, file) {
            (Some(value), _) => value.clone(),
            (None, Some(path)) => read_secret(path)?,
            (None, None) => String::new(),
        };
        match text.trim() {
            "" => Err(format!("driver \"s3\" needs `{name}_file`: a file of mode 0600, or `{name}` from the environment")),
            text => Ok(text.to_owned()),
        }
    };
    let id = part("access_key_id", &pool.access_key_id, &pool.access_key_id_file)?;
    Ok((id, part("secret_key", &pool.secret_key, &pool.secret_key_file)?))
}

/// The private key, PEM.
pub fn tls_key(tls: &TlsConfig) -> Result<String, String> {
    match (&tls.key, &tls.key_file) {
        (Some(key), _) => Ok(key.clone()),
        (None, Some(path)) => read_secret(path),
        (None, None) => Err("[tls] needs key_file: the file that holds the private key".to_owned()),
    }
}

/// The key-encryption keys that are configured.
pub fn key_encryption_keys(keys: &KeysConfig) -> Result<Keks, KeyError> {
    let current = key_encryption_key("", &keys.file, &keys.credential, &keys.key)?;
    let previous = key_encryption_key("previous_", &keys.previous_file, &keys.previous_credential, &keys.previous_key)?;
    Ok(Keks { current, previous })
}

fn key_encryption_key(
    prefix: &str,
    file: &Option<PathBuf>,
    credential: &Option<String>,
    key: &Option<String>,
) -> Result<Option<Kek>, KeyError> {
    match (file, credential, key) {
        (None, None, None) => Ok(None),
        (Some(path), None, None) => KeyFile(path.clone()).fetch().map(Some),
        (None, Some(name), None) => Credential { name: name.clone() }.fetch().map(Some),
        (None, None, Some(text)) => {
            Kek::parse(&format!("environment NOVASTOR_KEYS__{}KEY", prefix.to_uppercase()), text).map(Some)
        }
        _ => Err(KeyError::Source {
            origin: "[keys]".to_owned(),
            why: format!("{prefix}file, {prefix}credential and {prefix}key are different places: name one"),
        }),
    }
}
