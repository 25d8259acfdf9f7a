//! Secrets: read from files that only their owner (and group) can read, or taken from the environment.

use std::fs::File;
use std::io::Read;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use super::model::{Config, TlsConfig};

const SECRET_MAX: u64 = 1 << 20;

/// Reads a secret file; refuses one that others can read or write.
pub fn read_secret(path: &Path) -> Result<String, String> {
    let shown = path.display();
    let file = File::open(path).map_err(|error| format!("secret file {shown}: {error}"))?;
    let metadata = file.metadata().map_err(|error| format!("secret file {shown}: {error}"))?;
    if metadata.mode() & 0o007 != 0 {
        let mode = metadata.mode() & 0o777;
        return Err(format!("secret file {shown} has mode {mode:04o}, so others can reach it: chmod 0600 {shown}"));
    }
    let mut text = String::new();
    file.take(SECRET_MAX).read_to_string(&mut text).map_err(|error| format!("secret file {shown}: {error}"))?;
    Ok(text)
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

/// The private key, PEM.
pub fn tls_key(tls: &TlsConfig) -> Result<String, String> {
    match (&tls.key, &tls.key_file) {
        (Some(key), _) => Ok(key.clone()),
        (None, Some(path)) => read_secret(path),
        (None, None) => Err("[tls] needs key_file: the file that holds the private key".to_owned()),
    }
}
