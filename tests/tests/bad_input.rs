//! Garbage, wrong names, lost files and full disks: an error to their cause alone, while verified load runs on another volume.

use anyhow::{Context, Result, bail, ensure};
use novastor_tests::rig::daemon::Daemon;
use novastor_tests::rig::deadline::Deadline;
use novastor_tests::rig::fio::Fio;
use novastor_tests::rig::loop_mount::LoopMount;
use novastor_tests::rig::process::{capture, run};
use novastor_tests::rig::tools;
use serde_json::Value;
use std::fs::{self, File, OpenOptions, Permissions};
use std::io::{Read, Write};
use std::os::unix::fs::{PermissionsExt, chown};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::thread;
use std::time::Duration;

const LIMIT: Duration = Duration::from_secs(120);
const USER: u32 = 65534;

/// Runs `trouble` while fio verifies the volume `healthy`; afterwards the daemon lives, and drains as it should.
fn beside_a_healthy_volume(mut daemon: Daemon, trouble: impl FnOnce(&Daemon) -> Result<()>) -> Result<()> {
    daemon.create_volume("local/healthy", "64M")?;
    let uri = daemon.export_nbd("healthy")?;
    let load = thread::spawn(move || {
        let fio = Fio::nbd(&uri).verify(0, 16).with(["--loops=4"]);
        fio.run(LIMIT)
    });
    trouble(&daemon)?;
    load.join().map_err(|_| anyhow::anyhow!("fio's thread panicked"))?.context("the healthy volume")?;
    daemon.check_alive()?;
    daemon.stop()
}

fn started(extra: &str) -> Result<Daemon> {
    let mut daemon = Daemon::new(extra)?;
    daemon.start()?;
    Ok(daemon)
}

fn noise(seed: u64, length: usize) -> Vec<u8> {
    let mut state = seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1;
    let mut next = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state.to_le_bytes()[3]
    };
    (0..length).map(|_| next()).collect()
}

/// What a client sends until it may read and write, and one read.
fn conversation(export: &str) -> Vec<u8> {
    let mut bytes = 3u32.to_be_bytes().to_vec();
    let length = u32::try_from(export.len()).unwrap_or_default();
    bytes.extend(b"IHAVEOPT");
    bytes.extend(7u32.to_be_bytes());
    bytes.extend((length + 6).to_be_bytes());
    bytes.extend(length.to_be_bytes());
    bytes.extend(export.as_bytes());
    bytes.extend(0u16.to_be_bytes());
    bytes.extend(0x2560_9513u32.to_be_bytes());
    bytes.extend([0; 4 + 8 + 8]);
    bytes.extend(4096u32.to_be_bytes());
    bytes
}

#[test]
fn garbage_at_every_stage_of_nbd_ends_that_connection_alone() -> Result<()> {
    let daemon = started("")?;
    beside_a_healthy_volume(daemon, |daemon| {
        let good = conversation("healthy");
        for cut in 0..=good.len() {
            let mut stream = UnixStream::connect(daemon.nbd_socket())?;
            // The daemon may hang up at any byte.
            let _ = stream.write_all(&good[..cut]).and_then(|()| stream.write_all(&noise(cut as u64 + 1, 3000)));
            stream.shutdown(std::net::Shutdown::Write)?;
            stream.set_read_timeout(Some(LIMIT))?;
            let mut answer = Vec::new();
            if let Err(error) = stream.read_to_end(&mut answer) {
                ensure!(error.kind() == std::io::ErrorKind::ConnectionReset, "after {cut} good bytes: {error}");
            }
        }
        Ok(())
    })
}

#[test]
fn a_client_that_never_reads_hinders_nobody() -> Result<()> {
    let daemon = started("")?;
    let mut deaf = Vec::new();
    beside_a_healthy_volume(daemon, |daemon| {
        let good = conversation("healthy");
        let (handshake, _) = good.split_at(good.len() - 28);
        for _ in 0..4 {
            let mut stream = UnixStream::connect(daemon.nbd_socket())?;
            stream.write_all(handshake)?;
            stream.set_nonblocking(true)?;
            for handle in 0..4096u64 {
                let mut read = 0x2560_9513u32.to_be_bytes().to_vec();
                read.extend([0; 4]);
                read.extend(handle.to_be_bytes());
                read.extend(0u64.to_be_bytes());
                read.extend((16u32 << 20).to_be_bytes());
                // At some point the daemon takes no more.
                if stream.write_all(&read).is_err() {
                    break;
                }
            }
            deaf.push(stream);
        }
        Ok(())
    })
}

#[test]
fn wrong_names_are_refused_by_name() -> Result<()> {
    let daemon = started("")?;
    let long = "a".repeat(300);
    beside_a_healthy_volume(daemon, |daemon| {
        for name in ["local/../../etc/passwd", "..", ".", "local/", "/", "local/a/b", "UPPER", "-x", "a\nb", "", &long] {
            for arguments in [vec!["volume", "create", "--size", "1M", "--", name], vec!["volume", "show", "--", name]] {
                let output = daemon.try_cli(&arguments)?;
                let error = String::from_utf8_lossy(&output.stderr).into_owned();
                ensure!(matches!(output.status.code(), Some(1 | 2)), "{arguments:?}: {}\n{error}", output.status);
                ensure!(!error.trim().is_empty() && !error.contains("panicked"), "{arguments:?}: {error:?}");
            }
            if name.is_empty() {
                // To NBD, the empty name asks for the default export.
                continue;
            }
            let mut info = Command::new(tools::require("nbdinfo")?);
            let refused = capture(info.arg(daemon.nbd_uri(&name.replace(['\n', ' '], "%0a"))), LIMIT)?;
            ensure!(!refused.status.success(), "an export named {name:?}");
        }
        ensure!(daemon.json(["volume", "list"])?.as_array().is_some_and(|volumes| volumes.len() == 1));
        Ok(())
    })
}

/// The daemon's view of a volume, once it satisfies `accept`.
fn shown(daemon: &Daemon, volume: &str, accept: impl Fn(&Value) -> bool) -> Result<Value> {
    let deadline = Deadline::after(LIMIT);
    loop {
        let info = daemon.json(["volume", "show", volume])?;
        if accept(&info) {
            return Ok(info);
        }
        if !deadline.pause() {
            bail!("volume {volume} stayed {info}");
        }
    }
}

fn qemu_io(uri: &str, command: &str) -> Result<String> {
    let mut qemu_io = Command::new(tools::require("qemu-io")?);
    let output = capture(qemu_io.args(["-f", "raw", "-c", command, uri]), LIMIT)?;
    Ok(String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr))
}

fn adopted(daemon: &Daemon, name: &str) -> Result<(std::path::PathBuf, String)> {
    let path = daemon.disk().join(format!("{name}.raw"));
    File::create(&path)?.set_len(32 << 20)?;
    daemon.cli(["volume", "adopt", &format!("local/{}", path.display()), name])?;
    let uri = daemon.export_nbd(name)?;
    ensure!(qemu_io(&uri, "write -P 7 8M 64k")?.contains("wrote 65536/65536"));
    Ok((path, uri))
}

#[test]
fn a_truncated_file_is_an_error_in_words() -> Result<()> {
    let daemon = started("")?;
    beside_a_healthy_volume(daemon, |daemon| {
        let (path, uri) = adopted(daemon, "victim")?;
        OpenOptions::new().write(true).open(&path)?.set_len(1 << 20)?;
        let beyond = qemu_io(&uri, "read 8M 64k")?;
        ensure!(beyond.contains("failed"), "what is gone was read: {beyond}");
        let info = shown(daemon, "victim", |info| !info["last_error"].is_null() || !info["problem"].is_null())?;
        println!("truncated: {} / {}", info["last_error"], info["problem"]);
        Ok(())
    })
}

#[test]
fn a_deleted_file_is_found_by_a_check() -> Result<()> {
    let daemon = started("")?;
    beside_a_healthy_volume(daemon, |daemon| {
        let (path, uri) = adopted(daemon, "victim")?;
        fs::remove_file(&path)?;
        let check = daemon.try_cli(["volume", "check", "victim"])?;
        let words = String::from_utf8_lossy(&check.stdout) + String::from_utf8_lossy(&check.stderr);
        ensure!(check.status.code() == Some(1) && words.contains("victim"), "{}: {words}", check.status);
        println!("deleted: {words}");
        // Clients may go on with the file that is open, or be refused; neither hangs.
        qemu_io(&uri, "read 0 64k")?;
        Ok(())
    })
}

#[test]
fn a_full_disk_fails_writes_there_until_there_is_space() -> Result<()> {
    let small = LoopMount::ext4(48)?;
    let daemon = started(&format!("[pool.small]\ndriver = \"file\"\npath = \"{}\"", small.path().display()))?;
    beside_a_healthy_volume(daemon, |daemon| {
        daemon.create_volume("small/thin", "1G")?;
        let uri = daemon.export_nbd("thin")?;
        let fill = qemu_io(&uri, "write -P 3 0 16M")?;
        ensure!(fill.contains("wrote 16777216/16777216"), "{fill}");
        let full = qemu_io(&uri, "write -P 4 64M 64M")?;
        ensure!(full.contains("No space left"), "{full}");
        let info = shown(daemon, "small/thin", |info| !info["last_error"].is_null())?;
        println!("full: {}", info["last_error"]);
        let kept = qemu_io(&uri, "read -P 3 0 16M")?;
        ensure!(kept.contains("read 16777216/16777216") && !kept.contains("verification failed"), "{kept}");
        ensure!(qemu_io(&uri, "discard 64M 64M")?.contains("discard 67108864/67108864"));
        let deadline = Deadline::after(LIMIT);
        while !qemu_io(&uri, "write -P 5 128M 1M")?.contains("wrote 1048576/1048576") {
            ensure!(deadline.pause(), "no space came back");
        }
        ensure!(qemu_io(&uri, "flush")?.trim().is_empty());
        Ok(())
    })
}

/// Bytes that are free on a file system.
fn free(path: &Path) -> Result<u64> {
    let listed = run(Command::new("df").args(["--output=avail", "--block-size=1"]).arg(path), LIMIT)?;
    listed.lines().nth(1).context("no line of df")?.trim().parse().context("df")
}

#[test]
fn a_full_disk_stalls_writers_of_a_mapped_volume_until_there_is_space() -> Result<()> {
    const BALLAST: u64 = 64 << 20;
    let small = LoopMount::ext4(128)?;
    let ballast = small.path().join("ballast");
    fs::write(&ballast, noise(1, BALLAST as usize))?;
    let mut daemon = Daemon::new(&format!("[pool.small]\ndriver = \"file\"\npath = \"{}\"", small.path().display()))?;
    // With the room that is left in the pool, less than what is written.
    daemon.set_env("NOVASTOR_DAEMON__LOG_SIZE", "16MiB");
    daemon.start()?;
    beside_a_healthy_volume(daemon, |daemon| {
        daemon.create_mapped_volume("small/thin", "1G")?;
        let uri = daemon.export_nbd("thin")?;
        let kept = qemu_io(&uri, "write -P 3 0 4M")?;
        ensure!(kept.contains("wrote 4194304/4194304"), "{kept}");
        let part = ["--offset=64M", "--size=80M", "--rw=write", "--bs=64k", "--iodepth=8", "--refill_buffers=1"];
        let verified = ["--verify=crc32c", "--do_verify=1", "--verify_fatal=1", "--verify_state_save=0", "--end_fsync=1"];
        let mut writer = Fio::nbd(&uri).with(part).with(verified).start()?;
        let deadline = Deadline::after(LIMIT);
        let log_fills = || -> Result<bool> {
            let labels = [("volume", "small/thin")];
            let (used, size) = (
                daemon.metrics()?.sum("novastor_volume_log_used_bytes", &labels)?,
                daemon.metrics()?.sum("novastor_volume_log_size_bytes", &labels)?,
            );
            Ok(used > 0.75 * size)
        };
        while !(log_fills()? && free(small.path())? < 8 << 20) {
            ensure!(writer.has_ended()?.is_none(), "the pool had room for everything");
            ensure!(deadline.pause(), "the pool never was full: {} bytes are free", free(small.path())?);
        }
        let read = qemu_io(&uri, "read -P 3 0 4M")?;
        ensure!(read.contains("read 4194304/4194304") && !read.contains("verification failed"), "{read}");
        ensure!(writer.has_ended()?.is_none(), "a writer was told that there is no space, and may not try again");
        fs::remove_file(&ballast)?;
        ensure!(writer.wait(LIMIT)?.success(), "what was written while the disk was full is not there");
        let read = qemu_io(&uri, "read -P 3 0 4M")?;
        ensure!(read.contains("read 4194304/4194304") && !read.contains("verification failed"), "{read}");
        daemon.cli(["volume", "check", "small/thin"])?;
        Ok(())
    })
}

/// A daemon whose logs have a small disk of their own, with hardly any room left, and the file to delete for more.
fn with_a_small_disk_for_logs(small: &LoopMount, extra: &str) -> Result<(Daemon, PathBuf)> {
    let ballast = small.path().join("ballast");
    fs::write(&ballast, noise(1, 96 << 20))?;
    let mut daemon = Daemon::new(extra)?;
    daemon.set_env("NOVASTOR_DAEMON__DATA_DIR", &small.path().join("data").display().to_string());
    daemon.set_env("NOVASTOR_DAEMON__LOG_SIZE", "64MiB");
    daemon.start()?;
    Ok((daemon, ballast))
}

#[test]
fn a_full_disk_under_the_log_stalls_writers_until_there_is_space() -> Result<()> {
    let small = LoopMount::ext4(128)?;
    let (daemon, ballast) = with_a_small_disk_for_logs(&small, "")?;
    beside_a_healthy_volume(daemon, |daemon| {
        daemon.create_mapped_volume("local/thin", "1G")?;
        let uri = daemon.export_nbd("thin")?;
        let kept = qemu_io(&uri, "write -P 3 0 4M")?;
        ensure!(kept.contains("wrote 4194304/4194304"), "{kept}");
        let part = ["--offset=64M", "--size=48M", "--rw=write", "--bs=64k", "--iodepth=8", "--refill_buffers=1"];
        let verified = ["--verify=crc32c", "--do_verify=1", "--verify_fatal=1", "--verify_state_save=0", "--end_fsync=1"];
        let mut writer = Fio::nbd(&uri).with(part).with(verified).start()?;
        let info = shown(daemon, "local/thin", |info| !info["problem"].is_null())?;
        let problem = info["problem"].as_str().unwrap_or_default().to_owned();
        println!("full: {problem}");
        let path = small.path().join("data/log/local").display().to_string();
        for part in ["the disk of the local log", &path, "is full since 20", "No space left", "writes wait"] {
            ensure!(problem.contains(part), "{part}: {problem}");
        }
        let read = qemu_io(&uri, "read -P 3 0 4M")?;
        ensure!(read.contains("read 4194304/4194304") && !read.contains("verification failed"), "{read}");
        ensure!(qemu_io(&uri, "flush")?.trim().is_empty());
        ensure!(writer.has_ended()?.is_none(), "a writer was told that there is no space, and may not try again");
        fs::remove_file(&ballast)?;
        ensure!(writer.wait(LIMIT)?.success(), "what was written while the disk was full is not there");
        shown(daemon, "local/thin", |info| info["problem"].is_null())?;
        daemon.cli(["volume", "check", "local/thin"])?;
        Ok(())
    })
}

#[test]
fn a_full_disk_under_the_log_refuses_writes_if_the_policy_says_so() -> Result<()> {
    let small = LoopMount::ext4(128)?;
    let (daemon, ballast) = with_a_small_disk_for_logs(&small, "[policy.strict]\nwhen_full = \"error\"")?;
    beside_a_healthy_volume(daemon, |daemon| {
        daemon.cli(["volume", "create", "local/thin", "--size", "1G", "--policy", "strict"])?;
        let uri = daemon.export_nbd("thin")?;
        let kept = qemu_io(&uri, "write -P 3 0 4M")?;
        ensure!(kept.contains("wrote 4194304/4194304"), "{kept}");
        let full = qemu_io(&uri, "write -P 4 64M 48M")?;
        ensure!(full.contains("No space left"), "{full}");
        let info = shown(daemon, "local/thin", |info| !info["problem"].is_null())?;
        ensure!(info["problem"].as_str().is_some_and(|problem| problem.contains("writes get ENOSPC")), "{info}");
        let read = qemu_io(&uri, "read -P 3 0 4M")?;
        ensure!(read.contains("read 4194304/4194304") && !read.contains("verification failed"), "{read}");
        ensure!(qemu_io(&uri, "flush")?.trim().is_empty());
        fs::remove_file(&ballast)?;
        shown(daemon, "local/thin", |info| info["problem"].is_null())?;
        let written = qemu_io(&uri, "write -P 5 64M 16M")?;
        ensure!(written.contains("wrote 16777216/16777216"), "{written}");
        daemon.cli(["volume", "check", "local/thin"])?;
        Ok(())
    })
}

#[test]
fn deleting_a_volume_makes_room_in_a_full_pool() -> Result<()> {
    let small = LoopMount::tmpfs(64)?;
    let mut daemon = Daemon::new(&format!("[pool.small]\ndriver = \"file\"\npath = \"{}\"", small.path().display()))?;
    daemon.start()?;
    daemon.create_mapped_volume("small/old", "1G")?;
    let fill = ["--rw=write", "--bs=64k", "--iodepth=8", "--refill_buffers=1", "--end_fsync=1", "--size=40M"];
    ensure!(Fio::nbd(&daemon.export_nbd("old")?).with(fill).start()?.wait(LIMIT)?.success());
    let deadline = Deadline::after(LIMIT);
    while daemon.json(["volume", "usage", "small/old"])?["log"].as_u64().is_some_and(|log| log > 1 << 20) {
        ensure!(deadline.pause(), "the pool does not get what is in the log");
    }
    daemon.remove_exports()?;
    // Not a byte more.
    let ballast = small.path().join("ballast");
    let filled = File::create(&ballast)?.write_all(&noise(2, 64 << 20));
    ensure!(filled.is_err() && free(small.path())? == 0, "{} bytes are free", free(small.path())?);
    daemon.cli(["volume", "delete", "small/old", "--yes"])?;
    ensure!(free(small.path())? > 32 << 20, "{} bytes are free", free(small.path())?);
    daemon.create_mapped_volume("small/new", "1G")?;
    let written = qemu_io(&daemon.export_nbd("new")?, "write -P 5 0 16M")?;
    ensure!(written.contains("wrote 16777216/16777216"), "{written}");
    daemon.stop()
}

#[test]
fn another_users_file_is_refused() -> Result<()> {
    let mut daemon = Daemon::new("")?;
    for folder in [daemon.folder(), daemon.disk(), &daemon.disk().join("pool"), &daemon.disk().join("data")] {
        chown(folder, Some(USER), Some(USER))?;
    }
    let secret = Path::new(daemon.folder()).join("secret.raw");
    File::create(&secret)?.set_len(1 << 20)?;
    fs::set_permissions(&secret, Permissions::from_mode(0o600))?;
    let (user, group) = (format!("--reuid={USER}"), format!("--regid={USER}"));
    let reachable = run(Command::new("setpriv").args([&user, &group, "--clear-groups", "ls"]).arg(daemon.disk()), LIMIT);
    reachable.context("this test needs a workspace that every user may enter")?;
    daemon.set_launcher(["setpriv", &user, &group, "--clear-groups"]);
    daemon.start()?;
    beside_a_healthy_volume(daemon, |daemon| {
        let output = daemon.try_cli(["volume", "adopt", &format!("local/{}", secret.display()), "theirs"])?;
        let error = String::from_utf8_lossy(&output.stderr);
        ensure!(output.status.code() == Some(1) && error.contains("secret.raw"), "{}: {error}", output.status);
        println!("another user's: {error}");
        Ok(())
    })
}

#[test]
fn a_wrong_configuration_changes_nothing_that_runs() -> Result<()> {
    let daemon = started("")?;
    beside_a_healthy_volume(daemon, |daemon| {
        let good = fs::read_to_string(daemon.config_file())?;
        for (wrong, word) in [
            ("[daemon]\nthread = 2\n", "threads"),
            ("[daemon]\nthreads = \"many\"\n", "threads"),
            ("[pool.x]\ndriver = \"fille\"\n", "file"),
            ("[daemon\n", "novastor.toml"),
        ] {
            daemon.configure(wrong)?;
            for command in ["check", "reload"] {
                let mut arguments = vec!["config".to_owned(), command.to_owned()];
                if command == "check" {
                    arguments.push(daemon.config_file().display().to_string());
                }
                let output = daemon.try_cli(&arguments)?;
                let error = String::from_utf8_lossy(&output.stderr) + String::from_utf8_lossy(&output.stdout);
                ensure!(output.status.code() == Some(1) && error.contains(word), "{command} of {wrong:?}: {error}");
            }
        }
        daemon.configure(&good)?;
        daemon.cli(["config", "reload"])?;
        Ok(())
    })
}
