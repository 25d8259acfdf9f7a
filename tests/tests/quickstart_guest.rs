//! What a stranger does first: `novastor quickstart`, and the lines it prints pasted as they are.

use anyhow::{Context, Result, ensure};
use novastor_tests::rig::console::{Console, Position};
use novastor_tests::rig::daemon::binary;
use novastor_tests::rig::fio::Fio;
use novastor_tests::rig::guest::{Guest, GuestSpec, Memory};
use novastor_tests::rig::process::{Running, run};
use novastor_tests::rig::scratch;
use std::fs;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Duration;

const LIMIT: Duration = Duration::from_secs(180);

/// `novastor quickstart`, running.
struct Quickstart {
    process: Running,
    /// Each line to paste, after the name of its tool.
    lines: Vec<(String, String)>,
}

impl Quickstart {
    fn start(folder: &Path) -> Result<Self> {
        let mut command = Command::new(binary()?);
        command.arg("quickstart").current_dir(folder).stdin(Stdio::null()).stdout(Stdio::piped());
        let mut process = Running::spawn("novastor quickstart", &mut command)?;
        let output = Console::new();
        output.attach(process.child.stdout.take().context("its output")?);
        let ready = |line: &str| (line == "ready").then_some(());
        output.wait_for(&mut Position::default(), "`ready`", LIMIT, ready)?;
        Ok(Self { process, lines: parse(&output.text()) })
    }

    /// The line for `tool` that contains `detail`.
    fn line(&self, tool: &str, detail: &str) -> Result<&str> {
        let found = self.lines.iter().find(|(name, text)| name.starts_with(tool) && text.contains(detail));
        let (_, text) = found.with_context(|| format!("no line for {tool} with {detail:?} in {:?}", self.lines))?;
        Ok(text)
    }

    fn qemu_arguments(&self, detail: &str) -> Result<Vec<String>> {
        Ok(self.line("qemu", detail)?.split_whitespace().map(str::to_owned).collect())
    }

    /// Runs the line for `tool` in a shell.
    fn paste(&self, tool: &str, detail: &str) -> Result<String> {
        shell(self.line(tool, detail)?)
    }

    fn stop(mut self) -> Result<()> {
        let status = self.process.terminate(LIMIT)?;
        ensure!(status.success(), "quickstart ended with {status}");
        Ok(())
    }
}

fn shell(line: &str) -> Result<String> {
    run(Command::new("sh").args(["-c", line]).current_dir("/tmp"), LIMIT)
}

/// Blocks of text that begin with `# TOOL`; lines ending in a backslash go on in the next.
fn parse(text: &str) -> Vec<(String, String)> {
    let joined = text.replace("\\\n", " ");
    let blocks = joined.split("\n\n").filter_map(|block| block.strip_prefix("# ")?.split_once('\n'));
    blocks.map(|(tool, text)| (tool.to_owned(), text.to_owned())).collect()
}

/// Makes a file system on `disk` and fills a file; `find_again` is for the next guest.
fn fill(disk: &str) -> String {
    let verify = file_job();
    format!("mkfs.ext4 -q {disk}; mount -t ext4 {disk} /mnt; {verify}; echo 'still here' >/mnt/note; umount /mnt")
}

fn find_again(disk: &str) -> String {
    let verify = file_job();
    format!(
        "e2fsck -fn {disk}; mount -t ext4 {disk} /mnt; cat /mnt/note; grep -q 'still here' /mnt/note
         {verify} --verify_only; umount /mnt"
    )
}

fn file_job() -> String {
    Fio::disk("/mnt/data").verify(0, 8).line()
}

/// One guest writes; then the daemon and another guest are started anew, and the data is there.
fn survives_a_restart(spec: impl Fn(&Quickstart, &str) -> Result<GuestSpec>, disk: &str) -> Result<()> {
    let folder = scratch::short_dir()?;
    let daemon = Quickstart::start(folder.path())?;
    Guest::start(&spec(&daemon, &fill(disk))?)?.finish(LIMIT)?;
    daemon.stop()?;
    let daemon = Quickstart::start(folder.path())?;
    Guest::start(&spec(&daemon, &find_again(disk))?)?.finish(LIMIT)?;
    daemon.stop()
}

#[test]
fn the_printed_vhost_user_arguments_give_a_guest_its_disk() -> Result<()> {
    let spec = |daemon: &Quickstart, script: &str| {
        let arguments = daemon.qemu_arguments("vhost-user-blk-pci")?;
        Ok(GuestSpec::new(script).memory(0, Memory::FromArguments).args(arguments))
    };
    survives_a_restart(spec, "/dev/vda")
}

#[test]
fn the_printed_nbd_arguments_give_a_guest_its_disk() -> Result<()> {
    let spec =
        |daemon: &Quickstart, script: &str| Ok(GuestSpec::new(script).args(daemon.qemu_arguments("file.server.type=unix")?));
    survives_a_restart(spec, "/dev/vda")
}

#[test]
fn the_printed_nbd_client_line_works_in_a_guest() -> Result<()> {
    let spec = |daemon: &Quickstart, script: &str| {
        // The guest sees the host's loopback under another address.
        let attach = daemon.line("nbd-client", "127.0.0.1")?.replace("127.0.0.1", "10.0.2.2");
        let script = format!("modprobe nbd; {attach}\n{script}\nnbd-client -d /dev/nbd0");
        Ok(GuestSpec::new(script).network())
    };
    survives_a_restart(spec, "/dev/nbd0")
}

#[test]
fn the_printed_lines_for_the_host_work() -> Result<()> {
    let folder = scratch::short_dir()?;
    let daemon = Quickstart::start(folder.path())?;
    for transport in ["nbd+unix:", "nbd://"] {
        let info = daemon.paste("nbdinfo", transport)?;
        assert!(info.contains("export=\"demo\"") && info.contains("10737418240"), "{info}");
        let info = daemon.paste("qemu-img", transport)?;
        assert!(info.contains("virtual size: 10 GiB"), "{info}");
        let list = shell(&daemon.line("nbdinfo", transport)?.replace("nbdinfo", "nbdinfo --list").replace("/demo", "/"))?;
        assert!(list.contains("export=\"demo\""), "{list}");
    }
    let uri = daemon.line("nbdinfo", "nbd+unix:")?.trim_start_matches("nbdinfo ").to_owned();

    let file = |name: &str| folder.path().join(name).display().to_string();
    let noise: Vec<u8> = (0..4u32 << 20).flat_map(|word| word.wrapping_mul(0x9E37_79B9).to_le_bytes()).collect();
    fs::write(file("noise"), &noise)?;
    shell(&format!("nbdcopy {} {uri} && truncate --size=10G {}", file("noise"), file("noise")))?;
    shell(&format!("qemu-img compare --image-opts driver=raw,file.filename={} {}", file("noise"), options(&uri)))?;
    shell(&format!("qemu-img convert -f raw -O qcow2 {uri} {}", file("copy.qcow2")))?;
    shell(&format!("qemu-img convert -n -f qcow2 -O raw {} {uri}", file("copy.qcow2")))?;
    shell(&format!("nbdcopy {uri} {}", file("back")))?;
    assert!(fs::metadata(file("back"))?.len() == 10 << 30);
    shell(&format!("qemu-img compare -f raw -F raw {} {}", file("noise"), file("back")))?;

    let fio = daemon.line("fio", "ioengine=nbd")?.replace("--runtime=10", "--runtime=2");
    let report = shell(&fio)?;
    assert!(report.contains("err= 0"), "{report}");
    Fio::nbd(uri.trim_matches('\'')).verify(0, 16).run(LIMIT)?;
    daemon.stop()
}

/// An NBD URI over a unix socket as options of an image.
fn options(uri: &str) -> String {
    let socket = uri.trim_matches('\'').split_once("socket=").map_or("", |(_, socket)| socket);
    format!("driver=raw,file.driver=nbd,file.server.type=unix,file.server.path={socket},file.export=demo")
}
