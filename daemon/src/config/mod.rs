//! The configuration: one TOML file, every key overridable from the environment, nothing unknown accepted.
//!
//! ```text
//!   FILE ──parse──▶ keys with lines ──known? (schema)──▶ table ──environment──▶ typed ──check──▶ Config
//! ```
//!
//! Invariants: a key that is accepted is honoured; every problem names the file, the line and the next step; secrets come from
//! `*_file` keys or the environment only, and a secret file that others can read is refused.

pub mod address;
mod check;
mod check_pool;
mod check_shared;
mod environment;
mod load;
mod model;
mod schema;
mod secret;

pub use address::Address;
pub use check::parse_mode;
pub use load::{ConfigError, Problem, load, load_text};
pub use model::{
    Config, DaemonConfig, ExportConfig, KeysConfig, LogConfig, LogFormat, NbdTarget, PolicyConfig, PoolConfig, TlsConfig,
};
pub use schema::json_schema;
pub use secret::{admin_token, key_encryption_keys, read_secret, s3_access_key, tls_key};

/// A configuration to start from, with every key explained.
pub const EXAMPLE: &str = include_str!("example.toml");

/// Where the daemon looks when it is told nothing.
pub const DEFAULT_FILE: &str = "/etc/novastor/novastor.toml";

#[cfg(test)]
mod tests;
