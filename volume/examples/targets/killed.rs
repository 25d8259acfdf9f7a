//! How soon a volume answers after its daemon was killed, with much in its log that the pool does not have.
//!
//! ```text
//!   segments that no checkpoint has ─▶ the pool is held back ─▶ 256 MiB, flushed ─▶ kill -9 ─▶ start ─▶ attach over NBD ─▶ read
//!                                                                                   └────────── measured ───────────────┘
//! ```
//!
//! The daemon is the program that `NOVASTOR_BIN` names.

use std::fs;
use std::time::Duration;

use anyhow::{Result, ensure};
use novastor_tests::rig::daemon::Daemon;
use novastor_tests::rig::deadline::Deadline;
use novastor_tests::rig::nbd::NbdClient;

use crate::rig::{BLOCK, MIB, Random};
use crate::{now, tell};

const WHAT: &str = "first read after kill -9 of the daemon, over NBD";
const TARGET: &str = "≤ 1 s with 256 MiB and 16 segments";
const ROUNDS: u64 = 3;
const SEGMENTS: u64 = 16;
const SEGMENT: u64 = 32 * MIB;
const IN_LOG: u64 = 256 * MIB;
const LIMIT: Duration = Duration::from_secs(120);

pub fn measure() {
    let measured = match std::env::var_os("NOVASTOR_BIN") {
        Some(_) => rounds().unwrap_or_else(|error| format!("failed: {error:#}")),
        None => "not measured: NOVASTOR_BIN does not name the program".to_owned(),
    };
    tell(WHAT, measured, TARGET);
}

fn rounds() -> Result<String> {
    let rounds: Vec<String> = (0..ROUNDS).map(round).collect::<Result<_>>()?;
    Ok(rounds.join("; "))
}

fn round(number: u64) -> Result<String> {
    let mut daemon = Daemon::new("")?;
    daemon.start()?;
    daemon.create_mapped_volume("v", "8G")?;
    daemon.export_nbd("v")?;
    let mut random = Random(20 + number);
    let mut client = NbdClient::connect(&daemon.nbd_socket(), "v", LIMIT)?;
    let used = |daemon: &Daemon| daemon.metrics()?.sum("novastor_volume_log_used_bytes", &[("volume", "local/v")]);
    for part in 0..SEGMENTS * SEGMENT / MIB {
        ensure!(client.write(part * MIB, &random.bytes(MIB as usize))? == 0, "a write failed");
    }
    let deadline = Deadline::after(LIMIT);
    while used(&daemon)? > MIB as f64 {
        ensure!(deadline.pause(), "the pool does not get it");
    }
    // With nowhere to write, it takes nothing.
    let temporary = daemon.disk().join("pool/segments/temporary");
    fs::rename(&temporary, temporary.with_extension("away"))?;
    let mut last = Vec::new();
    for part in 0..IN_LOG / MIB {
        last = random.bytes(MIB as usize);
        ensure!(client.write((4096 + part) * MIB, &last)? == 0 && client.flush()? == 0, "a write failed");
    }
    let in_log = used(&daemon)?;
    daemon.kill()?;
    fs::rename(temporary.with_extension("away"), &temporary)?;
    let began = now();
    daemon.start()?;
    let mut client = loop {
        match NbdClient::connect(&daemon.nbd_socket(), "v", LIMIT) {
            Ok(client) => break client,
            Err(error) => ensure!(deadline.pause(), "its export is not served: {error:#}"),
        }
    };
    let read = client.read((4096 + IN_LOG / MIB - 1) * MIB, BLOCK as u32)?;
    let took = began.elapsed();
    ensure!(read == last[..BLOCK as usize], "it reads something else than was flushed");
    Ok(format!("{:.2} s with {:.0} MiB in the log", took.as_secs_f64(), in_log / MIB as f64))
}
