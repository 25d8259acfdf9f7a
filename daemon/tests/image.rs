//! Images into volumes and out of them, by the real command line against a real daemon, judged by qemu-img.

use std::fs::{self, File};
use std::io::Read;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use novastor_tests::rig::daemon::{Daemon, binary};
use novastor_tests::rig::deadline::Deadline;
use novastor_tests::rig::process::{Running, capture, run};
use novastor_tests::rig::scratch::disk_dir;
use novastor_tests::rig::tools;
use rustix::process::Signal;
use serde_json::Value;
use tempfile::TempDir;

const LIMIT: Duration = Duration::from_secs(120);
const MIB: u64 = 1 << 20;

struct Bench {
    daemon: Daemon,
    files: TempDir,
}

impl Bench {
    fn start() -> Result<Bench> {
        let mut daemon = Daemon::new("")?;
        daemon.start()?;
        Ok(Bench { daemon, files: disk_dir()? })
    }

    /// The same in memory, where a flush takes no time: what is to be interrupted gets to its first record soon.
    fn start_in_memory() -> Result<Bench> {
        let files = tempfile::tempdir_in("/dev/shm")?;
        let pool = files.path().join("pool");
        fs::create_dir(&pool)?;
        let configuration = "[daemon]\ndata_dir = \"{disk}/data\"\nadmin = \"unix:{dir}/admin.sock\"\n\
                             nbd = [\"unix:{dir}/nbd.sock\"]\n[pool.local]\ndriver = \"file\"\n";
        let mut daemon = Daemon::configured(&format!("{configuration}path = \"{}\"\n", pool.display()))?;
        daemon.start()?;
        Ok(Bench { daemon, files })
    }

    fn path(&self, name: &str) -> PathBuf {
        self.files.path().join(name)
    }

    fn text(&self, name: &str) -> String {
        self.path(name).display().to_string()
    }

    fn command(&self, arguments: &[&str]) -> Result<Command> {
        let mut command = Command::new(binary()?);
        command.env("NOVASTOR_ADMIN", format!("unix:{}", self.daemon.folder().join("admin.sock").display()));
        command.env("XDG_STATE_HOME", self.path("state")).args(arguments).current_dir(self.files.path());
        Ok(command)
    }

    /// Runs the command line, which must succeed, and parses its JSON.
    fn json(&self, arguments: &[&str]) -> Result<Value> {
        let output = run(self.command(arguments)?.arg("--json"), LIMIT)?;
        // `run` returns the standard output alone; progress goes to the other.
        serde_json::from_str(&output).with_context(|| output)
    }

    /// Runs it; it must fail with this status and words.
    fn refused(&self, arguments: &[&str], status: i32, words: &str) -> Result<String> {
        let output = capture(&mut self.command(arguments)?, LIMIT)?;
        let error = String::from_utf8_lossy(&output.stderr).into_owned();
        ensure!(output.status.code() == Some(status), "{arguments:?} ended with {}: {error}", output.status);
        ensure!(error.contains(words), "{arguments:?}: no {words:?} in {error}");
        Ok(error)
    }

    /// Compares a volume, over a public export, with an image.
    fn compare(&self, volume: &str, format: &str, image: &str) -> Result<()> {
        let export = self.daemon.json(["export", "add", volume, "--nbd", "--read-only"])?;
        let uri = self.daemon.nbd_uri(volume);
        qemu_img(&["compare", "-f", format, "-F", "raw", &self.text(image), &uri])?;
        self.daemon.cli(["export", "remove", export["id"].as_str().context("an id")?])?;
        Ok(())
    }

    fn allocated(&self, volume: &str) -> Result<u64> {
        self.daemon.json(["volume", "usage", volume])?["stored"].as_u64().context("a number")
    }
}

fn qemu_img(arguments: &[&str]) -> Result<String> {
    run(Command::new(tools::require("qemu-img")?).args(arguments), LIMIT)
}

/// Bytes no compressor and no zero detection shrinks.
fn noise(len: u64, seed: u64) -> Vec<u8> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut bytes = Vec::with_capacity(len as usize + 8);
    while (bytes.len() as u64) < len {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        bytes.extend(state.to_le_bytes());
    }
    bytes.truncate(len as usize);
    bytes
}

/// A sparse raw image of `size` bytes: noise at the places given, in MiB.
fn raw_image(path: &Path, size: u64, places: &[(u64, u64)]) -> Result<()> {
    let file = File::create(path)?;
    file.set_len(size)?;
    for (at, len) in places {
        file.write_all_at(&noise(len * MIB, *at + 1), at * MIB)?;
    }
    Ok(())
}

#[test]
fn qcow2_images_come_back_equal_and_sparse() -> Result<()> {
    let bench = Bench::start()?;
    let data = [(0, 3), (40, 1), (100, 7), (255, 1)];
    raw_image(&bench.path("a.raw"), 256 * MIB, &data)?;
    let stored: u64 = data.iter().map(|(_, len)| len * MIB).sum();
    for (name, options) in [
        ("v3", &["-o", "compat=1.1"][..]),
        ("v2", &["-o", "compat=0.10,cluster_size=4096"]),
        ("compressed", &["-c"]),
        ("preallocated", &["-S", "0", "-o", "preallocation=metadata"]),
    ] {
        let image = format!("{name}.qcow2");
        let (from, to) = (bench.text("a.raw"), bench.text(&image));
        let arguments = [&["convert", "-f", "raw", "-O", "qcow2"], options, &[&from, &to]].concat();
        qemu_img(&arguments)?;
        let report = bench.json(&["image", "import", &bench.text(&image), name, "--verify"])?;
        ensure!(report["format"] == "qcow2" && report["size"] == 256 * MIB, "{report}");
        ensure!(report["written"] == stored, "{name}: {report}");
        bench.compare(name, "raw", "a.raw").with_context(|| name.to_owned())?;
        let allocated = bench.allocated(name)?;
        ensure!(allocated < stored + MIB, "{name}: {allocated} bytes taken for {stored}");

        let (qcow2, raw) = (format!("{name}-out.qcow2"), format!("{name}-out.raw"));
        bench.json(&["image", "export", name, &bench.text(&qcow2), "--verify"])?;
        qemu_img(&["check", "-f", "qcow2", &bench.text(&qcow2)])?;
        qemu_img(&["compare", "-f", "raw", "-F", "qcow2", &bench.text("a.raw"), &bench.text(&qcow2)])?;
        bench.json(&["image", "export", name, &bench.text(&raw)])?;
        qemu_img(&["compare", "-f", "raw", "-F", "raw", &bench.text("a.raw"), &bench.text(&raw)])?;
        for out in [&qcow2, &raw] {
            let taken = fs::metadata(bench.path(out))?.blocks() * 512;
            ensure!(taken < stored + 2 * MIB, "{out}: {taken} bytes taken for {stored}");
            ensure!(!bench.path(&format!("{out}.novastor-part")).exists());
        }
    }
    ensure!(fs::read_dir(bench.path("state/novastor"))?.next().is_none(), "records of copies that are complete");
    Ok(())
}

#[test]
fn odd_sizes_and_snapshots() -> Result<()> {
    let bench = Bench::start()?;
    fs::write(bench.path("odd.raw"), noise(3 * MIB + 1000, 5))?;
    let report = bench.json(&["image", "import", &bench.text("odd.raw"), "odd"])?;
    ensure!(report["size"] == 3 * MIB + 1000, "{report}");
    ensure!(bench.daemon.json(["volume", "show", "odd"])?["size"] == 3 * MIB + 4096);
    bench.json(&["image", "export", "odd", &bench.text("odd.out")])?;
    let (before, after) = (fs::read(bench.path("odd.raw"))?, fs::read(bench.path("odd.out"))?);
    ensure!(after.len() == before.len() + 3096 && after.starts_with(&before) && after.ends_with(&[0; 3096]));
    bench.refused(&["image", "import", &bench.text("odd.raw"), "odd@s"], 1, "snapshot")?;
    fs::write(bench.path("empty"), "")?;
    bench.refused(&["image", "import", &bench.text("empty"), "none"], 1, "empty")?;
    Ok(())
}

#[test]
fn data_is_replaced_only_when_told_so() -> Result<()> {
    let bench = Bench::start()?;
    raw_image(&bench.path("old.raw"), 16 * MIB, &[(0, 16)])?;
    raw_image(&bench.path("new.raw"), 8 * MIB, &[(2, 1), (6, 1)])?;
    let (old, new) = (bench.text("old.raw"), bench.text("new.raw"));
    bench.json(&["image", "import", &old, "v"])?;
    bench.refused(&["image", "import", &new, "v"], 2, "--yes")?;
    bench.compare("v", "raw", "old.raw")?;
    bench.json(&["image", "import", &new, "v", "--yes", "--verify"])?;
    File::options().write(true).open(bench.path("new.raw"))?.set_len(16 * MIB)?;
    bench.compare("v", "raw", "new.raw")?;
    ensure!(bench.allocated("v")? < 3 * MIB, "old data was not freed");

    fs::write(bench.path("out"), "precious")?;
    bench.refused(&["image", "export", "v", &bench.text("out")], 2, "--yes")?;
    ensure!(fs::read(bench.path("out"))? == b"precious");
    bench.json(&["image", "export", "v", &bench.text("out"), "--yes"])?;
    qemu_img(&["compare", "-f", "raw", "-F", "raw", &bench.text("out"), &bench.text("new.raw")])?;
    bench.refused(&["image", "export", "v", "/dev/null"], 1, "no plain file")?;
    bench.refused(&["image", "export", "v", &bench.text("x.vmdk")], 1, "qemu-img convert -p -O vmdk")?;

    bench.daemon.cli(["volume", "create", "small", "--size", "1M"])?;
    bench.refused(&["image", "import", &new, "small"], 1, "volume resize")?;
    bench.daemon.cli(["volume", "create", "busy", "--size", "16M"])?;
    bench.daemon.cli(["export", "add", "busy", "--nbd"])?;
    bench.refused(&["image", "import", &new, "busy"], 1, "exported")?;
    bench.refused(&["image", "import", &bench.text("none"), "v"], 1, "No such file")?;
    bench.refused(&["image", "export", "none", &bench.text("y")], 1, "does not exist")?;
    Ok(())
}

#[test]
fn the_line_shown_for_a_backing_file_works() -> Result<()> {
    let bench = Bench::start()?;
    raw_image(&bench.path("flat.raw"), 8 * MIB, &[(1, 2)])?;
    qemu_img(&["convert", "-f", "raw", "-O", "qcow2", &bench.text("flat.raw"), &bench.text("base.qcow2")])?;
    qemu_img(&["create", "-q", "-f", "qcow2", "-F", "qcow2", "-b", "base.qcow2", &bench.text("top.qcow2")])?;
    let error = bench.refused(&["image", "import", &bench.text("top.qcow2"), "v"], 1, "backing file \"base.qcow2\"")?;
    bench.daemon.cli(["volume", "create", "v", "--size", "8M"])?;
    bench.daemon.cli(["export", "add", "v", "--nbd"])?;
    let (_, line) = error.split_once("with: ").context("a line to paste")?;
    run(Command::new("sh").args(["-c", line.trim()]), LIMIT)?;
    qemu_img(&["compare", "-f", "raw", "-F", "raw", &bench.text("flat.raw"), &bench.daemon.nbd_uri("v")])?;
    Ok(())
}

/// Starts the command line and holds it where it stands as soon as `there` is true.
fn stop_when(bench: &Bench, arguments: &[&str], there: impl Fn() -> bool) -> Result<Running> {
    let mut command = bench.command(arguments)?;
    let child = command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::piped()).spawn()?;
    let mut child = Running::new("novastor image", child);
    let deadline = Deadline::after(LIMIT);
    while !there() {
        if let Some(status) = child.has_ended()? {
            bail!("{arguments:?} ended ({status}) too soon: the image is too small for this machine");
        }
        ensure!(!deadline.has_passed(), "{arguments:?} came nowhere");
        std::thread::sleep(Duration::from_millis(1));
    }
    child.signal(Signal::STOP)?;
    Ok(child)
}

/// Holds it once a record says that some of the copy is safe.
fn stop_once_recorded(bench: &Bench, arguments: &[&str], record: &Path) -> Result<Running> {
    stop_when(bench, arguments, || {
        let found = fs::read(record).ok().and_then(|text| serde_json::from_slice::<Value>(&text).ok());
        found.is_some_and(|record| record["position"].as_u64() > Some(0))
    })
}

fn record_of_import(bench: &Bench, volume: &str) -> Result<PathBuf> {
    let uuid = bench.daemon.json(["volume", "show", volume])?["uuid"].as_str().context("a uuid")?.to_owned();
    Ok(bench.path(&format!("state/novastor/import-{uuid}.json")))
}

fn rest_of_stderr(child: &mut Running) -> Result<String> {
    let mut text = String::new();
    child.child.stderr.take().context("its error output")?.read_to_string(&mut text)?;
    Ok(text)
}

fn running_job(bench: &Bench) -> Result<String> {
    let jobs = bench.daemon.json(["job", "list"])?;
    let running = jobs.as_array().context("a list")?.iter().find(|job| job["state"] == "running");
    Ok(running.and_then(|job| job["id"].as_str()).context("a job that runs")?.to_owned())
}

#[test]
fn an_import_survives_the_end_of_both_sides() -> Result<()> {
    let mut bench = Bench::start_in_memory()?;
    raw_image(&bench.path("big.raw"), 768 * MIB, &[(0, 300), (400, 300)])?;
    bench.daemon.cli(["volume", "create", "v", "--size", "768M"])?;
    let arguments = ["image", "import", &bench.text("big.raw"), "v"];
    let record = record_of_import(&bench, "v")?;

    let mut child = stop_once_recorded(&bench, &arguments, &record)?;
    bench.refused(&["export", "add", "v", "--nbd"], 1, "filled from an image")?;
    bench.refused(&arguments, 1, "refused: job")?;
    bench.daemon.kill()?;
    child.signal(Signal::CONT)?;
    ensure!(child.wait(LIMIT)?.code() == Some(1));
    let error = rest_of_stderr(&mut child)?;
    ensure!(error.contains("the same command resumes it"), "{error}");

    bench.daemon.start()?;
    bench.refused(&arguments, 2, "is resumed at")?;
    let arguments = [&arguments[..], &["--yes"]].concat();
    let mut child = stop_when(&bench, &arguments, || running_job(&bench).is_ok())?;
    let job = running_job(&bench)?;
    child.signal(Signal::KILL)?;
    child.wait(LIMIT)?;
    bench.daemon.cli(["job", "cancel", &job])?;
    capture(&mut bench.command(&["job", "wait", &job])?, LIMIT)?;

    let report = bench.json(&arguments)?;
    let resumed = report["resumed_from"].as_u64().context("it began again")?;
    let written = report["written"].as_u64().context("a number")?;
    ensure!(resumed > 0 && written < 600 * MIB, "{report}");
    bench.compare("v", "raw", "big.raw")?;
    ensure!(!record.exists());
    Ok(())
}

#[test]
fn interrupted_exports_are_resumed() -> Result<()> {
    let bench = Bench::start_in_memory()?;
    raw_image(&bench.path("big.raw"), 768 * MIB, &[(0, 300), (400, 300)])?;
    bench.json(&["image", "import", &bench.text("big.raw"), "v"])?;
    for (out, format, signal) in
        [("a.qcow2", "qcow2", Signal::INT), ("a.raw", "raw", Signal::INT), ("b.raw", "raw", Signal::KILL)]
    {
        let arguments = ["image", "export", "v", &bench.text(out)];
        let record = bench.path(&format!("{out}.novastor-part.json"));
        let mut child = stop_once_recorded(&bench, &arguments, &record)?;
        child.signal(signal)?;
        child.signal(Signal::CONT)?;
        let status = child.wait(LIMIT)?;
        ensure!(!bench.path(out).exists() && record.exists(), "{out} after {signal:?}");
        if signal == Signal::INT {
            let error = rest_of_stderr(&mut child)?;
            ensure!(status.code() == Some(1) && error.contains("the same command resumes it"), "{status}: {error}");
        }
        let report = bench.json(&arguments)?;
        ensure!(report["resumed_from"].as_u64().is_some_and(|from| from > 0), "{out}: {report}");
        qemu_img(&["compare", "-f", "raw", "-F", format, &bench.text("big.raw"), &bench.text(out)])?;
        ensure!(!record.exists());
        fs::remove_file(bench.path(out))?;
    }
    Ok(())
}

#[test]
fn a_cancelled_job_ends_the_copy() -> Result<()> {
    let bench = Bench::start_in_memory()?;
    raw_image(&bench.path("big.raw"), 640 * MIB, &[(0, 640)])?;
    bench.daemon.cli(["volume", "create", "v", "--size", "640M"])?;
    let arguments = ["image", "import", &bench.text("big.raw"), "v"];
    let mut child = stop_once_recorded(&bench, &arguments, &record_of_import(&bench, "v")?)?;
    let job = running_job(&bench)?;
    bench.daemon.cli(["job", "cancel", &job])?;
    let deadline = Deadline::after(LIMIT);
    while bench.daemon.json(["job", "show", &job])?["state"] != "cancelled" {
        ensure!(!deadline.has_passed(), "the daemon waits for a client that does not answer");
        std::thread::sleep(Duration::from_millis(100));
    }
    child.signal(Signal::CONT)?;
    ensure!(child.wait(LIMIT)?.code() == Some(1));
    bench.json(&[&arguments[..], &["--yes"]].concat())?;
    bench.compare("v", "raw", "big.raw")
}
