//! Mapped volumes in a bucket, through the daemon: restarts, a log that is lost, two hosts that fight, and deletion.

use anyhow::{Context, Result, ensure};
use novastor_tests::rig::daemon::Daemon;
use novastor_tests::rig::deadline::Deadline;
use novastor_tests::rig::fio::Fio;
use novastor_tests::rig::nbd::NbdClient;
use novastor_tests::rig::process::capture;
use novastor_tests::rig::seaweedfs::{ACCESS_KEY, SECRET_KEY, Seaweedfs};
use novastor_tests::rig::tools;
use std::fs;
use std::process::Command;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::thread;
use std::time::Duration;

const LIMIT: Duration = Duration::from_secs(120);
const BUCKET: &str = "volumes";
const BLOCK: usize = 4096;
const BLOCKS: usize = 4096;
/// A log that is brought into the pool in steps of 1 MiB, so that some of what is not flushed is there.
const SMALL_LOG: [(&str, &str); 1] = [("NOVASTOR_DAEMON__LOG_SIZE", "4MiB")];

/// A host whose pool `cloud` is in the bucket.
fn host(server: &Seaweedfs) -> Result<Daemon> {
    host_with(server, &[])
}

fn host_with(server: &Seaweedfs, environment: &[(&str, &str)]) -> Result<Daemon> {
    let pool = format!(
        "[pool.cloud]\ndriver = \"s3\"\nbucket = \"{BUCKET}\"\nendpoint = \"http://{}\"\nallow_http = true\nprefix = \"pool\"\n\n\
         [policy.near]\ndurability = \"local\"\n",
        server.address()
    );
    let mut daemon = Daemon::new(&pool)?;
    daemon.set_env("NOVASTOR_POOL__CLOUD__ACCESS_KEY_ID", ACCESS_KEY);
    daemon.set_env("NOVASTOR_POOL__CLOUD__SECRET_KEY", SECRET_KEY);
    environment.iter().for_each(|(name, value)| daemon.set_env(name, value));
    daemon.start()?;
    daemon.wait_for_pools()?;
    Ok(daemon)
}

fn server() -> Result<Seaweedfs> {
    let server = Seaweedfs::start()?;
    server.make_bucket(BUCKET)?;
    Ok(server)
}

fn qemu_io(uri: &str, commands: &[&str]) -> Result<String> {
    let mut qemu_io = Command::new(tools::require("qemu-io")?);
    let output = capture(qemu_io.args(["-f", "raw"]).args(commands.iter().flat_map(|command| ["-c", command])).arg(uri), LIMIT)?;
    Ok(String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr))
}

fn holds(uri: &str, commands: &[&str]) -> Result<()> {
    let said = qemu_io(uri, commands)?;
    ensure!(said.matches("read 65536/65536").count() == commands.len() && !said.contains("failed"), "{said}");
    Ok(())
}

/// Why the export of a volume is not served.
fn error_of(daemon: &Daemon, volume: &str) -> Result<String> {
    let deadline = Deadline::after(LIMIT);
    loop {
        let exports = daemon.json(["export", "list"])?;
        let of_volume = exports.as_array().and_then(|exports| exports.iter().find(|export| export["volume"] == volume));
        match of_volume.and_then(|export| export["error"].as_str()) {
            Some(error) if error.contains("log") => return Ok(error.to_owned()),
            _ => ensure!(deadline.pause(), "{exports}"),
        }
    }
}

#[test]
fn content_survives_restarts_and_with_remote_durability_the_loss_of_the_log() -> Result<()> {
    let server = server()?;
    let mut daemon = host(&server)?;
    let refused = daemon.try_cli(["volume", "create", "cloud/raw", "--size", "64M", "--layout", "raw"])?;
    let why = String::from_utf8_lossy(&refused.stderr).into_owned();
    ensure!(!refused.status.success() && why.contains("mapped volumes only"), "{why}");
    for (volume, policy) in [("far", None), ("close", Some("near"))] {
        let name = format!("cloud/{volume}");
        let policy = policy.into_iter().flat_map(|policy| ["--policy", policy]);
        daemon.cli(["volume", "create", &name, "--size", "64M"].into_iter().chain(policy))?;
        let uri = daemon.export_nbd(volume)?;
        let said = qemu_io(&uri, &["write -P 7 0 64k", "write -P 8 1M 64k", "flush"])?;
        ensure!(said.matches("wrote 65536/65536").count() == 2 && !said.contains("failed"), "{said}");
    }
    let both = ["read -P 7 0 64k", "read -P 8 1M 64k"];
    daemon.restart()?;
    daemon.wait_until_served()?;
    for volume in ["far", "close"] {
        holds(&daemon.nbd_uri(volume), &both).with_context(|| format!("{volume} after a restart"))?;
    }
    daemon.kill()?;
    daemon.start()?;
    daemon.wait_until_served()?;
    for volume in ["far", "close"] {
        holds(&daemon.nbd_uri(volume), &both).with_context(|| format!("{volume} after a kill"))?;
    }

    daemon.kill()?;
    fs::remove_dir_all(daemon.disk().join("data/log/cloud"))?;
    daemon.start()?;
    let error = error_of(&daemon, "cloud/close")?;
    ensure!(error.contains("volume close") && error.contains("--accept-loss"), "{error}");
    daemon.cli(["export", "add", "cloud/close", "--nbd", "--accept-loss", "--yes"])?;
    daemon.wait_until_served()?;
    holds(&daemon.nbd_uri("far"), &both).context("flushes waited for the bucket")?;
    ensure!(!qemu_io(&daemon.nbd_uri("close"), &["read 0 64k"])?.contains("failed"));
    daemon.stop()
}

#[test]
fn verified_load_survives_kills() -> Result<()> {
    let server = server()?;
    let mut daemon = host(&server)?;
    daemon.cli(["volume", "create", "cloud/disk", "--size", "64M"])?;
    let uri = daemon.export_nbd("disk")?;
    for round in 0..3u64 {
        let part = Fio::nbd(&uri).verify(round * 16, 16).with([format!("--randseed={}", round + 1)]).with(["--end_fsync=1"]);
        part.run(LIMIT).with_context(|| format!("round {round}"))?;
        daemon.kill()?;
        daemon.start()?;
        daemon.wait_until_served()?;
        part.with(["--verify_only"]).run(LIMIT).with_context(|| format!("round {round}, after a kill"))?;
    }
    daemon.stop()
}

#[test]
fn of_two_hosts_one_is_fenced_and_says_so() -> Result<()> {
    let server = server()?;
    let (mut first, mut second) = (host(&server)?, host(&server)?);
    first.cli(["volume", "create", "cloud/disk", "--size", "64M"])?;
    let uri = first.export_nbd("disk")?;
    let said = qemu_io(&uri, &["write -P 1 0 64k", "flush"])?;
    ensure!(said.contains("wrote 65536/65536") && !said.contains("failed"), "{said}");

    let taken = second.export_nbd("disk")?;
    holds(&taken, &["read -P 1 0 64k"])?;
    let said = qemu_io(&taken, &["write -P 2 64k 64k", "flush"])?;
    ensure!(said.contains("wrote 65536/65536") && !said.contains("failed"), "{said}");

    let said = qemu_io(&uri, &["write -P 3 128k 64k", "flush"])?;
    ensure!(said.contains("failed") || said.contains("error"), "the replaced host told that a write is safe: {said}");
    let deadline = Deadline::after(LIMIT);
    loop {
        let shown = first.json(["volume", "show", "cloud/disk"])?;
        match shown["problem"].as_str() {
            Some(problem) => break ensure!(problem.contains("another host has taken over"), "{problem}"),
            None => ensure!(deadline.pause(), "the replaced host does not say so: {shown}"),
        }
    }
    holds(&taken, &["read -P 1 0 64k", "read -P 2 64k 64k"])?;

    // The first does not take it back by itself, neither while the second serves it nor later.
    first.restart()?;
    is_left_alone(&first)?;
    let said = qemu_io(&taken, &["write -P 2 64k 64k", "flush"])?;
    ensure!(said.contains("wrote 65536/65536") && !said.contains("failed"), "{said}");
    second.stop()?;
    // Its log is of another epoch by now: it is set aside, and nothing that was flushed is missing.
    take_back(&first)?;
    holds(&uri, &["read -P 1 0 64k", "read -P 2 64k 64k", "read -P 0 128k 64k"])?;
    ensure!(first.log().contains("set aside"), "{}", first.log());
    first.stop()
}

/// Its only export is not served, as another host has taken its volume over.
fn is_left_alone(daemon: &Daemon) -> Result<String> {
    let deadline = Deadline::after(LIMIT);
    loop {
        let exports = daemon.json(["export", "list"])?;
        let export = &exports[0];
        match (export["id"].as_str(), export["problem"].as_str()) {
            (Some(id), Some(problem)) if export["ready"] == false => {
                ensure!(problem.contains(&format!("novastor export reopen {id}")), "{exports}");
                return Ok(id.to_owned());
            }
            _ => ensure!(deadline.pause(), "{exports}"),
        }
    }
}

/// The same, and asks for it.
fn take_back(daemon: &Daemon) -> Result<()> {
    let id = is_left_alone(daemon)?;
    daemon.cli(["export", "reopen", &id])?;
    daemon.wait_until_served()
}

/// One connection, and what each block may hold: what was last flushed, and all that was written since.
struct LiveClient {
    connection: NbdClient,
    may_hold: Vec<Vec<u8>>,
}

impl LiveClient {
    fn attach(daemon: &Daemon) -> Result<LiveClient> {
        let connection = NbdClient::connect(&daemon.nbd_socket(), "disk", LIMIT)?;
        Ok(LiveClient { connection, may_hold: vec![vec![0]; BLOCKS] })
    }

    /// The error number.
    fn write(&mut self, block: usize, fill: u8) -> Result<u32> {
        self.may_hold[block].push(fill);
        self.connection.write((block * BLOCK) as u64, &[fill; BLOCK])
    }

    /// The error number.
    fn flush(&mut self) -> Result<u32> {
        let error = self.connection.flush()?;
        if error == 0 {
            self.may_hold.iter_mut().for_each(|fills| drop(fills.drain(..fills.len() - 1)));
        }
        Ok(error)
    }

    /// How many blocks hold something newer than what was flushed last.
    fn check(&self, contents: &[u8]) -> Result<usize> {
        ensure!(contents.len() == BLOCKS * BLOCK, "{} bytes", contents.len());
        let mut newer = 0;
        for (block, (content, fills)) in contents.chunks(BLOCK).zip(&self.may_hold).enumerate() {
            let is_whole = content.iter().all(|byte| *byte == content[0]);
            ensure!(
                is_whole && fills.contains(&content[0]),
                "block {block} holds {}, whole: {is_whole}, not {fills:?}",
                content[0]
            );
            newer += usize::from(content[0] != fills[0]);
        }
        Ok(newer)
    }
}

#[test]
fn a_live_client_with_unflushed_writes_is_never_told_that_they_are_safe() -> Result<()> {
    let server = server()?;
    let (mut first, mut second) = (host_with(&server, &SMALL_LOG)?, host_with(&server, &SMALL_LOG)?);
    first.cli(["volume", "create", "cloud/disk", "--size", "16M"])?;
    first.export_nbd("disk")?;
    let mut client = LiveClient::attach(&first)?;
    for block in 0..512 {
        ensure!(client.write(block, 1)? == 0);
    }
    ensure!(client.flush()? == 0);
    // Over what was flushed, and where nothing was.
    for (block, fill) in (256..768).map(|block| (block, 2)).chain((256..512).map(|block| (block, 4))) {
        ensure!(client.write(block, fill)? == 0);
    }
    second.export_nbd("disk")?;
    let error = client.flush()?;
    ensure!(error != 0, "the replaced host told that the writes are safe");
    for attempt in 0..3 {
        // Not what a block may hold: nothing of it may ever be seen.
        let errors = [client.connection.write(0, &[3; BLOCK])?, client.connection.write(1 << 20, &[3; BLOCK])?, client.flush()?];
        ensure!(errors.iter().all(|error| *error != 0), "attempt {attempt}: {errors:?}");
    }
    let contents = second.contents("disk")?;
    let newer = client.check(&contents)?;
    println!("flush failed with {error}; of 512 blocks that were not flushed, {newer} are there on the other host");
    drop(client);

    // What the replaced host has left in its log does not come back either.
    second.stop()?;
    first.restart()?;
    take_back(&first)?;
    ensure!(first.contents("disk")? == contents, "the content changed while nobody wrote");
    first.stop()
}

#[test]
fn a_client_that_writes_through_a_take_over_loses_nothing_that_was_flushed() -> Result<()> {
    let server = server()?;
    let (mut first, mut second) = (host_with(&server, &SMALL_LOG)?, host_with(&server, &SMALL_LOG)?);
    first.cli(["volume", "create", "cloud/disk", "--size", "16M"])?;
    first.export_nbd("disk")?;
    let mut client = LiveClient::attach(&first)?;
    let (flushes, is_taken) = (AtomicUsize::new(0), AtomicBool::new(false));
    thread::scope(|scope| {
        let writer = scope.spawn(|| write_until_refused(&mut client, &flushes, &is_taken));
        let deadline = Deadline::after(LIMIT);
        while flushes.load(Ordering::SeqCst) < 5 && !writer.is_finished() {
            ensure!(deadline.pause(), "{} flushes", flushes.load(Ordering::SeqCst));
        }
        let taken = second.export_nbd("disk");
        is_taken.store(true, Ordering::SeqCst);
        writer.join().map_err(|_| anyhow::anyhow!("the writer panicked"))??;
        taken
    })?;
    ensure!(client.connection.write(0, &[255; BLOCK])? != 0 && client.flush()? != 0, "it failed, and then it did not");
    let newer = client.check(&second.contents("disk")?)?;
    println!("{} flushes; {newer} blocks are newer than what was flushed", flushes.load(Ordering::SeqCst));
    let said = qemu_io(&second.nbd_uri("disk"), &["write -P 9 0 64k", "flush", "read -P 9 0 64k"])?;
    ensure!(!said.contains("failed") && !said.contains("error"), "{said}");
    first.stop()?;
    second.stop()
}

/// Writes all over the volume, flushing now and then, until something is refused; after a take-over, that is the next flush.
fn write_until_refused(client: &mut LiveClient, flushes: &AtomicUsize, is_taken: &AtomicBool) -> Result<()> {
    for round in 1..usize::MAX {
        for number in 0..32 {
            let (block, fill) = ((round * 577 + number * 131) % BLOCKS, (round % 254 + 1) as u8);
            // What is written after the take-over may not be seen on the other host.
            let error = match is_taken.load(Ordering::SeqCst) {
                true => client.connection.write((block * BLOCK) as u64, &[fill; BLOCK])?,
                false => client.write(block, fill)?,
            };
            if error != 0 {
                return Ok(());
            }
        }
        if round % 16 != 0 {
            continue;
        }
        let was_taken = is_taken.load(Ordering::SeqCst);
        match client.flush()? {
            0 => ensure!(!was_taken, "the replaced host told that writes are safe"),
            _ => return Ok(()),
        }
        flushes.fetch_add(1, Ordering::SeqCst);
    }
    Ok(())
}

#[test]
fn a_volume_is_renamed_and_deleted_with_all_its_objects() -> Result<()> {
    let server = server()?;
    let mut daemon = host(&server)?;
    let other = host(&server)?;
    daemon.cli(["volume", "create", "cloud/disk", "--size", "64M"])?;
    daemon.cli(["volume", "rename", "cloud/disk", "kept"])?;
    let listed = other.json(["volume", "list", "--pool", "cloud"])?;
    ensure!(listed.as_array().is_some_and(|volumes| volumes.len() == 1) && listed[0]["name"] == "kept", "{listed}");
    let export = daemon.json(["export", "add", "kept", "--nbd"])?;
    Fio::nbd(&daemon.nbd_uri("kept")).verify(0, 8).with(["--end_fsync=1"]).run(LIMIT)?;
    ensure!(daemon.json(["volume", "usage", "kept"])?["stored"].as_u64().is_some_and(|bytes| bytes > 8 << 20));
    let refused = daemon.try_cli(["volume", "delete", "kept", "--yes"])?;
    ensure!(!refused.status.success(), "it is exported");
    daemon.cli(["export", "remove", export["id"].as_str().context("an id")?])?;
    daemon.cli(["volume", "delete", "kept", "--yes"])?;
    ensure!(other.json(["volume", "list", "--pool", "cloud"])? == serde_json::json!([]));
    let report = daemon.json(["pool", "check", "cloud"])?;
    ensure!(report["ok"] == true, "{report}");
    ensure!(!daemon.disk().join("data/log/cloud").read_dir()?.any(|_| true), "its log is left");
    daemon.stop()
}
