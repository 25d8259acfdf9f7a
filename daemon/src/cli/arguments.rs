//! The grammar of the command line.

use std::path::PathBuf;

use clap::{Args, Parser, Subcommand};

use crate::units::parse_size;

/// One daemon that serves block volumes over NBD and vhost-user.
#[derive(Parser)]
#[command(name = "novastor", version, max_term_width = 110, arg_required_else_help = true)]
pub struct Arguments {
    #[command(flatten)]
    pub global: Global,
    #[command(subcommand)]
    pub command: Command,
}

#[derive(Args)]
pub struct Global {
    /// Where the daemon's admin API is: unix:PATH, http://HOST:PORT or https://HOST:PORT [default: /run/novastor/admin.sock, or
    /// ./novastor-data/run/admin.sock if that is the caller's own]
    #[arg(long, global = true, env = "NOVASTOR_ADMIN", value_name = "ADDRESS")]
    pub admin: Option<String>,
    /// The file with the API's token, for http and https
    #[arg(long, global = true, env = "NOVASTOR_ADMIN_TOKEN_FILE", value_name = "FILE", hide_env_values = true)]
    pub token_file: Option<PathBuf>,
    /// The CA that signed the daemon's certificate, for https
    #[arg(long, global = true, env = "NOVASTOR_ADMIN_CA", value_name = "FILE")]
    pub ca: Option<PathBuf>,
    /// Print JSON
    #[arg(long, global = true)]
    pub json: bool,
    /// Print nothing but errors, and ids
    #[arg(short, long, global = true)]
    pub quiet: bool,
}

#[derive(Subcommand)]
pub enum Command {
    /// Serve a first disk from ./novastor-data, and print how to use it
    Quickstart(Quickstart),
    /// Run the daemon in the foreground
    Serve {
        /// The configuration [default: /etc/novastor/novastor.toml]
        #[arg(long, value_name = "FILE")]
        config: Option<PathBuf>,
    },
    /// Check this host: one line each, with the fix
    Doctor {
        /// Check also what this configuration needs
        #[arg(long, value_name = "FILE")]
        config: Option<PathBuf>,
    },
    /// Check, explain or reload the configuration
    #[command(subcommand)]
    Config(Config),
    /// Places where volumes live
    #[command(subcommand)]
    Pool(Pool),
    /// Create and manage volumes
    #[command(subcommand)]
    Volume(Volume),
    /// Keys of encrypted volumes
    #[command(subcommand)]
    Key(Key),
    /// Points in time of volumes
    #[command(subcommand)]
    Snapshot(Snapshot),
    /// Serve volumes to guests and hosts
    #[command(subcommand)]
    Export(Export),
    /// Copy disk images into volumes and out of them
    #[command(subcommand)]
    Image(Image),
    /// Long work
    #[command(subcommand)]
    Job(Job),
    /// What every volume does, live
    Top(Top),
}

#[derive(Args)]
pub struct Quickstart {
    /// Where everything goes
    #[arg(long, default_value = "novastor-data", value_name = "FOLDER")]
    pub folder: PathBuf,
    /// Size of the volume `demo`
    #[arg(long, default_value = "10G", value_parser = parse_size)]
    pub size: u64,
}

#[derive(Subcommand)]
pub enum Config {
    /// Say what is wrong with a configuration
    Check {
        #[arg(value_name = "FILE")]
        file: Option<PathBuf>,
        #[arg(long, value_name = "FILE", conflicts_with = "file")]
        config: Option<PathBuf>,
    },
    /// Print the JSON Schema
    Schema,
    /// Print a configuration to start from
    Example,
    /// Have the daemon read its configuration again
    Reload,
}

#[derive(Subcommand)]
pub enum Pool {
    List,
    Show {
        pool: String,
    },
    /// State of one pool, or of all; fails if one does not work
    Health {
        pool: Option<String>,
    },
    /// Look for volumes that cannot be whole: missing or damaged roots, missing objects, what belongs to no volume; no data is read
    Check {
        pool: String,
    },
    /// Forget which pool this was, and take what is found in its place, or begin a new one there
    Forget {
        pool: String,
    },
}

#[derive(Subcommand)]
pub enum Volume {
    /// A new, thin volume
    Create {
        /// NAME or POOL/NAME
        name: String,
        /// Such as 10G or 512MiB
        #[arg(long, value_parser = parse_size)]
        size: u64,
        #[arg(long)]
        pool: Option<String>,
        /// [default: mapped in pools that can hold it]
        #[arg(long, value_parser = ["raw", "mapped"])]
        layout: Option<String>,
        /// The logical block size that clients see
        #[arg(long, value_parser = parse_block_size, value_name = "512|4096")]
        block_size: Option<u32>,
        #[arg(long)]
        policy: Option<String>,
        #[arg(long)]
        tenant: Option<String>,
    },
    /// Take over an existing raw file, block device or RBD image, unchanged
    Adopt {
        /// POOL/OBJECT: for a file pool the object is a path
        object: String,
        name: Option<String>,
    },
    List {
        #[arg(long)]
        pool: Option<String>,
    },
    Show {
        volume: String,
    },
    /// Change the size, online
    Resize {
        volume: String,
        #[arg(value_parser = parse_size)]
        size: u64,
        /// Allow a smaller size; what lies beyond is lost
        #[arg(long)]
        shrink: bool,
        #[command(flatten)]
        claim: Claim,
        #[command(flatten)]
        consent: Consent,
    },
    Rename {
        volume: String,
        name: String,
    },
    /// Delete a volume and its data
    Delete {
        volume: String,
        #[command(flatten)]
        consent: Consent,
    },
    /// Space taken
    Usage {
        volume: String,
    },
    /// Read all of a mapped volume and its snapshots and compare each block with its hash; of a raw one, whether it opens and has its size
    Check {
        volume: String,
        #[command(flatten)]
        claim: Claim,
    },
    /// A writable copy that shares data where the backend can
    Clone {
        /// VOL or VOL@SNAP
        source: String,
        name: String,
        #[command(flatten)]
        claim: Claim,
    },
    /// Make a clone independent of its origin
    Flatten {
        volume: String,
        #[command(flatten)]
        claim: Claim,
    },
}

#[derive(Args)]
pub struct Consent {
    /// Do not ask
    #[arg(short, long)]
    pub yes: bool,
}

/// Of commands that a mapped volume has to be open for.
#[derive(Args)]
pub struct Claim {
    /// Take a mapped volume from the host that had it last: if that still serves it, its clients get errors
    #[arg(long)]
    pub take_over: bool,
}

#[derive(Subcommand)]
pub enum Key {
    /// Which keys there are, and what wraps them
    List { pool: Option<String> },
    /// Wrap the keys of one pool, or of all, with the current key-encryption key; no data is rewritten
    Rotate { pool: Option<String> },
    /// Destroy the key that a mapped volume shares with its clones, and so their content, for good
    Erase {
        volume: String,
        #[command(flatten)]
        consent: Consent,
    },
}

#[derive(Subcommand)]
pub enum Snapshot {
    /// Several volumes at once are one consistent point
    Create {
        /// VOL@SNAP
        #[arg(required = true, value_name = "VOL@SNAP")]
        snapshots: Vec<String>,
        #[command(flatten)]
        claim: Claim,
    },
    List {
        volume: Option<String>,
    },
    Delete {
        #[arg(value_name = "VOL@SNAP")]
        snapshot: String,
        #[command(flatten)]
        claim: Claim,
        #[command(flatten)]
        consent: Consent,
    },
    /// Make the volume what it was
    Rollback {
        #[arg(value_name = "VOL@SNAP")]
        snapshot: String,
        #[command(flatten)]
        claim: Claim,
        #[command(flatten)]
        consent: Consent,
    },
    /// What changed since a snapshot
    Diff {
        #[arg(value_name = "VOL@SNAP")]
        from: String,
        /// VOL@SNAP, or VOL as it is now [default: the volume]
        to: Option<String>,
        #[command(flatten)]
        claim: Claim,
    },
}

#[derive(Subcommand)]
pub enum Export {
    /// Serve a volume or a snapshot
    #[command(group = clap::ArgGroup::new("protocol").required(true))]
    Add {
        /// VOL or VOL@SNAP
        volume: String,
        /// Over NBD: on the shared listeners, or on a listener of its own
        #[arg(long, group = "protocol", num_args = 0..=1, require_equals = true, value_name = "unix:PATH|tcp:HOST:PORT",
            default_missing_value = "")]
        nbd: Option<String>,
        /// Over vhost-user-blk, on this socket
        #[arg(long, group = "protocol", value_name = "PATH")]
        vhost_user: Option<PathBuf>,
        /// The most queues a vhost-user client may use [default: 64]
        #[arg(long)]
        queues: Option<u16>,
        #[arg(long)]
        read_only: bool,
        /// Mode of its socket, in octal
        #[arg(long)]
        mode: Option<String>,
        /// Group of its socket
        #[arg(long)]
        group: Option<String>,
        /// Subject of client certificates that may attach; may be given several times
        #[arg(long, value_name = "SUBJECT")]
        tls_allow: Vec<String>,
        /// Open a mapped volume, this once, though its local log is lost: what only the log had is given up for good
        #[arg(long, conflicts_with = "read_only")]
        accept_loss: bool,
        #[command(flatten)]
        consent: Consent,
    },
    List,
    /// One export: who is attached, since when, and the lines to paste
    Show {
        id: String,
    },
    Remove {
        id: String,
    },
    /// Open its volume anew, after a failure or after another host had it; drops the clients
    Reopen {
        id: String,
    },
    /// Drop a client, or all: NBD at once, vhost-user when what is in flight has been answered
    Disconnect {
        id: String,
        client: Option<String>,
    },
}

#[derive(Subcommand)]
pub enum Image {
    /// Copy a raw, qcow2 or flat vmdk image into a volume, which is created if there is none
    Import {
        file: PathBuf,
        /// VOL or POOL/VOL
        volume: String,
        /// What the image is [default: told from its first bytes]
        #[arg(long)]
        format: Option<ImageFormat>,
        /// The pool for a new volume
        #[arg(long)]
        pool: Option<String>,
        /// Read both again and compare
        #[arg(long)]
        verify: bool,
        #[command(flatten)]
        claim: Claim,
        #[command(flatten)]
        consent: Consent,
    },
    /// Copy a volume or a snapshot into a raw or qcow2 image
    Export {
        /// VOL or VOL@SNAP
        volume: String,
        file: PathBuf,
        /// What the image will be [default: by its name, else raw]
        #[arg(long)]
        format: Option<ImageFormat>,
        /// Read both again and compare
        #[arg(long)]
        verify: bool,
        #[command(flatten)]
        claim: Claim,
        #[command(flatten)]
        consent: Consent,
    },
}

#[derive(Clone, Copy, clap::ValueEnum)]
pub enum ImageFormat {
    Raw,
    Qcow2,
    Vmdk,
}

#[derive(Args)]
pub struct Top {
    /// Seconds between samples
    #[arg(long, default_value = "1", value_name = "SECONDS", value_parser = clap::value_parser!(u64).range(1..=60))]
    pub interval: u64,
    /// Print one sample and end
    #[arg(long)]
    pub once: bool,
}

#[derive(Subcommand)]
pub enum Job {
    List,
    Show {
        id: String,
    },
    /// Return when it has ended; fails if it did
    Wait {
        id: String,
    },
    Cancel {
        id: String,
    },
}

fn parse_block_size(text: &str) -> Result<u32, String> {
    match text {
        "512" => Ok(512),
        "4096" | "4K" | "4k" => Ok(4096),
        _ => Err("choose 512 or 4096".to_owned()),
    }
}

/// A mistake in how the command was used: exit status 2.
#[derive(Debug)]
pub struct Usage(pub String);

impl std::fmt::Display for Usage {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for Usage {}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;

    #[test]
    fn the_grammar_is_sound() {
        Arguments::command().debug_assert();
    }

    #[test]
    fn exports_take_their_protocol_in_every_form() {
        let parse = |line: &str| Arguments::try_parse_from(line.split(' '));
        for (line, expected) in [
            ("novastor export add v --nbd", Some("")),
            ("novastor export add v --nbd=unix:/a", Some("unix:/a")),
            ("novastor export add --nbd v", Some("")),
            ("novastor export add v --vhost-user /a", None),
        ] {
            let Command::Export(Export::Add { nbd, volume, .. }) = parse(line).unwrap().command else { panic!("{line}") };
            assert_eq!((volume.as_str(), nbd.as_deref()), ("v", expected), "{line}");
        }
        assert!(parse("novastor export add v").is_err());
        assert!(parse("novastor export add v --nbd --vhost-user /a").is_err());
        assert!(parse("novastor volume create v --size ten").is_err());
        assert!(parse("novastor volume create v --size 1G --block-size 1024").is_err());
    }
}
