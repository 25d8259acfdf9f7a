//! A QEMU guest that runs a shell job, and talks with the test while it runs.
//!
//! ```text
//!            test                                 guest (Debian's cloud kernel, busybox, fio, nbd-client, …)
//!   Guest::start ── kernel, initramfs + job ──▶   /init → /job.sh
//!   wait_ready   ◀──────── control port ───────   READY
//!   wait_mark    ◀──────── control port ───────   mark NAME [TEXT]
//!   send(line)   ───────── control port ──────▶   await            (the line is then in $REPLY)
//!   qmp(…)       ───── QEMU's own socket
//!   finish       ◀──────── control port ───────   RC=n, then power off
//!                ◀──────── console ────────────   everything the job prints, ending with GUEST-RC=n
//! ```
//!
//! Emulated without KVM: nested virtualisation is often missing or cannot run an ordinary kernel, and a test
//! should behave alike everywhere. The ELF kernel boots through PVH in a few seconds.
//!
//! Invariants:
//! - Guest memory is shared (memfd), as vhost-user needs.
//! - Dropping a `Guest` kills it.

use crate::rig::archive::Archive;
use crate::rig::console::{Console, Position};
use crate::rig::deadline::Deadline;
use crate::rig::process::{self, Running};
use crate::rig::qmp::Qmp;
use crate::rig::{scratch, tools};
use anyhow::{Context, Result, bail};
use serde_json::{Value, json};
use std::fs::{self, OpenOptions, Permissions};
use std::io::{ErrorKind, Write};
use std::os::unix::fs::{PermissionsExt, chown};
use std::os::unix::net::{UnixListener, UnixStream};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;
use tempfile::TempDir;

/// For QEMU to start and connect, and for a QMP command to be answered.
const CONTROL_LIMIT: Duration = Duration::from_secs(60);
/// From start to `READY`; takes about five seconds on an idle machine.
const BOOT_LIMIT: Duration = Duration::from_secs(180);

/// An emulated guest under load dirties memory fast: a short downtime might never be reached.
const MIGRATION_DOWNTIME_MS: u32 = 2000;
/// From the end of the job to the end of QEMU; takes about a second.
const POWER_OFF_LIMIT: Duration = Duration::from_secs(60);
const LAST_WORDS_LIMIT: Duration = Duration::from_secs(2);

/// On a busy machine an emulated timer comes late, which a kernel that checks it takes for a broken one, and panics.
const KERNEL_ARGUMENTS: &str =
    "console=ttyS0 panic=-1 mitigations=off nokaslr random.trust_cpu=on tsc=unstable no_timer_check quiet";

/// The kernel and initramfs that `cargo xtask rig install guest` makes.
#[derive(Debug)]
pub struct Images {
    pub kernel: PathBuf,
    pub initramfs: PathBuf,
}

impl Images {
    pub fn expected() -> Self {
        let folder = scratch::rig_dir().join("guest");
        Self { kernel: folder.join("vmlinux"), initramfs: folder.join("initramfs.cpio") }
    }

    fn require() -> Result<Self> {
        let images = Self::expected();
        for path in [&images.kernel, &images.initramfs] {
            if !path.exists() {
                bail!("{} is missing: run `cargo xtask rig install guest`", path.display());
            }
        }
        Ok(images)
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Memory {
    Pages4K,
    /// The caller keeps enough pages reserved, see [`crate::rig::hugepages`].
    HugePages2M,
    /// The arguments that a test adds bring it.
    FromArguments,
}

/// The first process of a guest that boots from its first disk.
const BOOT_FROM_DISK: &str = include_str!("../../rig/guest-boot");

/// What to boot.
#[derive(Debug, Clone)]
pub struct GuestSpec {
    script: String,
    memory_mib: u64,
    memory: Memory,
    vcpus: u32,
    arguments: Vec<String>,
    network: bool,
    files: Vec<(String, Vec<u8>)>,
    run_as: Option<(u32, u32)>,
}

impl GuestSpec {
    /// `script` is the job's shell script, without the `#!` line. It runs under `set -e`: the first command
    /// that fails ends the job, unless its status is looked at.
    pub fn new(script: impl AsRef<str>) -> Self {
        Self {
            script: format!("#!/bin/sh\nset -e\n. /rig.sh\n{}\n", script.as_ref()),
            memory_mib: 512,
            memory: Memory::Pages4K,
            vcpus: 2,
            arguments: Vec::new(),
            network: false,
            files: Vec::new(),
            run_as: None,
        }
    }

    /// Boots a system of its own from the first disk, an ext4 file system. Its `/sbin/init` takes over, which reports to the test as the rig's own
    /// does. The kernel is given directly, as no boot loader is at hand.
    pub fn from_disk() -> Self {
        Self::new("").file("init", BOOT_FROM_DISK)
    }

    pub fn memory(mut self, mib: u64, kind: Memory) -> Self {
        (self.memory_mib, self.memory) = (mib, kind);
        self
    }

    pub fn vcpus(mut self, count: u32) -> Self {
        self.vcpus = count;
        self
    }

    /// Adds arguments to QEMU's command line.
    pub fn args<S: Into<String>>(mut self, arguments: impl IntoIterator<Item = S>) -> Self {
        self.arguments.extend(arguments.into_iter().map(Into::into));
        self
    }

    /// Adds a vhost-user disk; QEMU reconnects by itself when the back end restarts. Disks appear in the
    /// order they are added: vda, vdb, …
    pub fn vhost_user_disk(self, id: &str, socket: &Path, queues: u32) -> Self {
        let chardev = format!("socket,id=chr-{id},path={},reconnect-ms=100", socket.display());
        let device = format!("vhost-user-blk-pci,id={id},chardev=chr-{id},num-queues={queues}");
        self.args(["-chardev", &chardev, "-device", &device])
    }

    /// Adds a disk over NBD, through QEMU's own client, which reconnects within `reconnect_delay` seconds.
    pub fn nbd_disk(self, id: &str, socket: &Path, export: &str, reconnect_delay: u32) -> Self {
        let drive = format!(
            "if=none,id=drive-{id},format=raw,cache=none,discard=unmap,file.driver=nbd,file.server.type=unix,\
             file.server.path={},file.export={export},file.reconnect-delay={reconnect_delay}",
            socket.display()
        );
        let device = format!("virtio-blk-pci,id={id},drive=drive-{id}");
        self.args(["-drive", &drive, "-device", &device])
    }

    /// User networking: the guest reaches the host's 127.0.0.1 as 10.0.2.2.
    pub fn network(mut self) -> Self {
        self.network = true;
        self
    }

    /// Puts a file into the guest's root folder.
    pub fn file(mut self, name: &str, contents: impl Into<Vec<u8>>) -> Self {
        self.files.push((name.to_owned(), contents.into()));
        self
    }

    /// Starts without a guest, to take one in by [`Guest::migrate`].
    pub fn incoming(self) -> Self {
        self.args(["-incoming", "defer"])
    }

    /// Runs QEMU as this user and group, and no other groups.
    pub fn run_as(mut self, user: u32, group: u32) -> Self {
        self.run_as = Some((user, group));
        self
    }

    fn initramfs(&self, base: &Path, target: &Path) -> Result<()> {
        let mut archive = Archive::new();
        archive.add("job.sh", 0o755, self.script.as_bytes());
        for (name, contents) in &self.files {
            archive.add(name, 0o755, contents);
        }
        fs::copy(base, target).with_context(|| format!("copying {}", base.display()))?;
        let mut file = OpenOptions::new().append(true).open(target)?;
        file.write_all(&archive.finish()).with_context(|| format!("writing {}", target.display()))
    }

    fn memory_arguments(&self) -> Vec<String> {
        let pages = match self.memory {
            Memory::FromArguments => return Vec::new(),
            Memory::Pages4K => "",
            Memory::HugePages2M => ",hugetlb=on,hugetlbsize=2M",
        };
        let object = format!("memory-backend-memfd,id=mem,size={}M,share=on{pages}", self.memory_mib);
        ["-object", &object, "-m", &self.memory_mib.to_string(), "-machine", "memory-backend=mem"].map(str::to_owned).into()
    }

    fn command(&self, folder: &Path, kernel: &Path) -> Result<Command> {
        let mut command = Command::new(tools::require("qemu-system-x86_64")?);
        let path = |name: &str| folder.join(name).display().to_string();
        let network = if self.network { " net=1" } else { "" };
        command.args(["-accel", "tcg,thread=multi,tb-size=512", "-cpu", "max", "-machine", "q35"]);
        command.args(self.memory_arguments()).args(["-smp", &self.vcpus.to_string()]);
        command.args(["-bios", "/usr/share/qemu/qboot.rom", "-nodefaults", "-no-user-config"]);
        command.args(["-display", "none", "-no-reboot", "-serial", "stdio", "-monitor", "none"]);
        command.args(["-chardev", &format!("socket,id=control,path={}", path("control"))]);
        command.args(["-device", "isa-serial,chardev=control"]);
        command.args(["-chardev", &format!("socket,id=qmp,path={}", path("qmp"))]);
        command.args(["-mon", "chardev=qmp,mode=control"]);
        command.arg("-kernel").arg(kernel).args(["-initrd", &path("initramfs")]);
        command.args(["-append", &format!("{KERNEL_ARGUMENTS}{network}")]);
        if self.network {
            command.args(["-netdev", "user,id=net0", "-device", "virtio-net-pci,netdev=net0,romfile="]);
        }
        command.args(&self.arguments);
        if let Some((user, group)) = self.run_as {
            // As root, this also drops every supplementary group.
            command.uid(user).gid(group);
        }
        Ok(command)
    }
}

/// A running guest.
#[derive(Debug)]
pub struct Guest {
    process: Running,
    console: Console,
    marks: Console,
    marks_seen: Position,
    console_seen: Position,
    control: UnixStream,
    qmp: Qmp,
    folder: TempDir,
}

impl Guest {
    pub fn start(spec: &GuestSpec) -> Result<Self> {
        let images = Images::require()?;
        let folder = scratch::short_dir()?;
        let control = listen(&folder.path().join("control"))?;
        let qmp = listen(&folder.path().join("qmp"))?;
        spec.initramfs(&images.initramfs, &folder.path().join("initramfs"))?;
        let kernel = match spec.run_as {
            Some(user) => hand_over(folder.path(), &images.kernel, user)?,
            None => images.kernel,
        };

        let mut command = spec.command(folder.path(), &kernel)?;
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut process = Running::spawn("QEMU", &mut command)?;
        let console = Console::new();
        console.attach(process.child.stdout.take().context("QEMU's output")?);
        console.attach(process.child.stderr.take().context("QEMU's error output")?);

        let connected = connect(&control, &qmp, &mut process).with_context(|| {
            // If it ended, its last words are on their way.
            console.wait_end(LAST_WORDS_LIMIT);
            format!("QEMU did not start:\n{}", console.tail())
        });
        let (control, qmp) = connected?;
        let marks = Console::new();
        marks.attach(control.try_clone()?);
        Ok(Self {
            process,
            console,
            marks,
            marks_seen: Position::default(),
            console_seen: Position::default(),
            control,
            qmp,
            folder,
        })
    }

    pub fn id(&self) -> u32 {
        self.process.id()
    }

    /// Waits until the kernel is up and the job starts. Lines sent earlier are lost.
    pub fn wait_ready(&mut self) -> Result<()> {
        self.wait_control("READY from the guest", BOOT_LIMIT, |line| (line == "READY").then_some(()))
    }

    /// Waits for the job's `mark NAME [TEXT]`, and returns the text.
    pub fn wait_mark(&mut self, name: &str, limit: Duration) -> Result<String> {
        let prefix = format!("MARK {name}");
        self.wait_control(&format!("mark {name}"), limit, |line| {
            let rest = line.strip_prefix(&prefix)?;
            (rest.is_empty() || rest.starts_with(' ')).then(|| rest.trim_start().to_owned())
        })
    }

    /// Forgets the marks that have come so far.
    pub fn skip_marks(&mut self) {
        self.marks_seen = self.marks.end();
    }

    fn wait_control<T>(&mut self, what: &str, limit: Duration, mut accept: impl FnMut(&str) -> Option<T>) -> Result<T> {
        let seen = &mut self.marks_seen;
        let found = self.marks.wait_for(seen, what, limit, |line| match accept(line) {
            Some(value) => Some(Ok(value)),
            // A job that ended sends no more marks.
            None => line.strip_prefix("RC=").map(|code| Err(code.to_owned())),
        });
        match found {
            Ok(Ok(value)) => Ok(value),
            Err(error) => Err(error.context(self.describe())),
            Ok(Err(code)) => {
                bail!("no {what}: the job ended with {code}; its console ends with\n{}", self.console.tail())
            }
        }
    }

    /// Waits for a line on the console that contains `text`.
    pub fn wait_console(&mut self, text: &str, limit: Duration) -> Result<String> {
        let seen = &mut self.console_seen;
        self.console
            .wait_for(seen, &format!("{text:?} on the console"), limit, |line| line.contains(text).then(|| line.to_owned()))
    }

    /// Sends a line to the job's `await`.
    pub fn send(&mut self, line: &str) -> Result<()> {
        writeln!(self.control, "{line}").context("sending a line to the guest")
    }

    pub fn qmp(&mut self) -> &mut Qmp {
        &mut self.qmp
    }

    pub fn execute(&mut self, command: &str, arguments: Value) -> Result<Value> {
        self.qmp.execute(command, arguments)
    }

    /// Moves the running guest into `target`, which was started from the same specification with
    /// [`GuestSpec::incoming`]. Afterwards `self` is paused for good.
    pub fn migrate(&mut self, target: &mut Guest, limit: Duration) -> Result<()> {
        let uri = format!("unix:{}", self.folder.path().join("migration").display());
        let parameters = json!({ "downtime-limit": MIGRATION_DOWNTIME_MS });
        self.execute("migrate-set-parameters", parameters)?;
        target.execute("migrate-incoming", json!({ "uri": uri }))?;
        self.execute("migrate", json!({ "uri": uri }))?;
        let deadline = Deadline::after(limit);
        loop {
            let state = self.execute("query-migrate", json!({}))?;
            match state["status"].as_str() {
                Some("completed") => return Ok(()),
                Some("failed" | "cancelled") => {
                    bail!("the migration failed: {state}; the target's console ends with\n{}", target.console.tail())
                }
                _ => {}
            }
            if !deadline.pause() {
                bail!("the migration did not end within {limit:?}: {state}");
            }
        }
    }

    /// Everything on the console so far.
    pub fn console(&self) -> String {
        self.console.text()
    }

    /// Waits for the job to end well and the guest to power off; returns the console.
    pub fn finish(mut self, limit: Duration) -> Result<String> {
        let deadline = Deadline::after(limit);
        let wait = self.wait_control("end of the job", limit, |line| line.strip_prefix("RC=").map(str::to_owned));
        let code = wait?;
        if code != "0" {
            bail!("the job ended with {code}; its console ends with\n{}", self.console.tail());
        }
        let seen = &mut self.console_seen;
        let ended = |line: &str| line.contains("GUEST-RC=").then_some(());
        self.console.wait_for(seen, "GUEST-RC on the console", deadline.remaining(), ended)?;
        self.await_power_off(deadline.remaining())?;
        Ok(self.console.text())
    }

    /// An emulated machine that is to go off hangs now and then (seen once, of many hundred). QEMU must then still be able to stop its devices, for
    /// which each of them has to have answered every request, and has to answer QEMU.
    fn await_power_off(&mut self, limit: Duration) -> Result<()> {
        if self.process.wait(POWER_OFF_LIMIT.min(limit)).is_ok() {
            return Ok(());
        }
        eprintln!("the guest does not power off: {}", self.describe());
        self.qmp.execute("quit", json!({})).context("the guest does not power off")?;
        self.process.wait(POWER_OFF_LIMIT).context("QEMU was told to quit").map(drop)
    }

    /// What a guest that hangs is at, and everything that it depends on.
    fn describe(&mut self) -> String {
        let state = self.qmp.execute("query-status", json!({}));
        let registers = self.qmp.execute("human-monitor-command", json!({ "command-line": "info registers" }));
        let registers = match &registers {
            Ok(Value::String(text)) => text.clone(),
            other => format!("{other:?}"),
        };
        let (tail, others) = (self.console.tail(), process::threads_of_children());
        format!(
            "QEMU's state: {state:?}\nits processor:\n{registers}\nthreads of QEMU and its servers:\n{others}the console ends with\n{tail}"
        )
    }

    /// Ends the guest as a power failure would.
    pub fn kill(mut self) -> Result<String> {
        self.process.kill()?;
        Ok(self.console.text())
    }
}

fn connect(control: &UnixListener, qmp: &UnixListener, process: &mut Running) -> Result<(UnixStream, Qmp)> {
    let control = accept(control, process)?;
    let qmp = accept(qmp, process)?;
    Ok((control, Qmp::negotiate(qmp, CONTROL_LIMIT)?))
}

/// QEMU connects to us, so that no byte is sent before someone listens.
fn listen(path: &Path) -> Result<UnixListener> {
    let listener = UnixListener::bind(path).with_context(|| format!("listening on {}", path.display()))?;
    listener.set_nonblocking(true)?;
    Ok(listener)
}

fn accept(listener: &UnixListener, process: &mut Running) -> Result<UnixStream> {
    let deadline = Deadline::after(CONTROL_LIMIT);
    loop {
        match listener.accept() {
            Ok((stream, _)) => {
                stream.set_nonblocking(false)?;
                return Ok(stream);
            }
            Err(error) if error.kind() == ErrorKind::WouldBlock => {}
            Err(error) => return Err(error).context("accepting QEMU's connection"),
        }
        if let Some(status) = process.has_ended()? {
            bail!("it ended with {status}");
        }
        if !deadline.pause() {
            bail!("it did not connect to its control socket within {CONTROL_LIMIT:?}");
        }
    }
}

/// Makes the guest's files usable for another user, who may be unable to enter the workspace.
fn hand_over(folder: &Path, kernel: &Path, (user, group): (u32, u32)) -> Result<PathBuf> {
    let own = folder.join("kernel");
    fs::copy(kernel, &own).with_context(|| format!("copying {}", kernel.display()))?;
    for entry in fs::read_dir(folder)? {
        let path = entry?.path();
        chown(&path, Some(user), Some(group)).with_context(|| format!("giving away {} (needs root)", path.display()))?;
    }
    chown(folder, Some(user), Some(group)).with_context(|| format!("giving away {}", folder.display()))?;
    fs::set_permissions(folder, Permissions::from_mode(0o700))?;
    Ok(own)
}
