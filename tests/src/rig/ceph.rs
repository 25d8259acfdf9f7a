//! A one-node Ceph cluster on loopback: one monitor, object storage daemons in memory, no manager.
//!
//! ```text
//!   Ceph::start ─▶ ceph.conf, keys ─▶ ceph-mon ─▶ ceph-osd × n ─▶ pool `rbd`       usable after about two seconds
//! ```
//!
//! The daemons run in the foreground as our children: dropping the cluster kills them, and its folder goes.
//! Placement groups never report themselves clean without a manager; reads and writes do not need that.

use crate::rig::deadline::Deadline;
use crate::rig::process::{Running, run};
use crate::rig::{scratch, tools};
use anyhow::{Context, Result, bail};
use rustix::process::Signal;
use serde_json::Value;
use std::fs;
use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;
use tempfile::TempDir;

pub const POOL: &str = "rbd";
const LIMIT: Duration = Duration::from_secs(120);
const PLACEMENT_GROUPS: &str = "8";

/// A read lease lasts this share of the heartbeat grace (Ceph's own default).
const DEFAULT_READ_LEASE_RATIO: f64 = 0.8;

/// A lone storage daemon of Ceph 16 that slept through its lease may never renew it: its placement groups stay
/// `laggy` and answer nothing until they are peered anew. Nobody takes over from a lone daemon, so its lease may last.
const LONE_READ_LEASE_RATIO: f64 = 1000.0;

/// What a cluster is made of.
#[derive(Debug, Clone, Copy)]
pub struct CephSpec {
    /// Storage daemons; each holds a copy of every object.
    pub osds: u32,
    /// Writes are accepted while this many copies can be written.
    pub min_copies: u32,
    /// Require keys, as a production cluster does.
    pub authenticate: bool,
}

impl Default for CephSpec {
    fn default() -> Self {
        Self { osds: 1, min_copies: 1, authenticate: false }
    }
}

#[derive(Debug)]
pub struct Ceph {
    // Dropped in this order: the storage daemons first.
    osds: Vec<Running>,
    _monitor: Running,
    folder: TempDir,
}

impl Ceph {
    pub fn start(spec: CephSpec) -> Result<Self> {
        for program in tools::CEPH.programs {
            tools::require(program)?;
        }
        let folder = scratch::short_dir()?;
        let path = folder.path();
        for name in ["run", "log", "crash"] {
            fs::create_dir(path.join(name))?;
        }
        let [fsid, port] = [new_uuid()?, free_port_pair()?.to_string()];
        let monitors = monitor_addresses(&port)?;
        fs::write(path.join("ceph.conf"), configuration(path, spec, &fsid, &monitors))?;
        make_keys(path, spec.osds)?;
        make_monitor(path, &fsid, &monitors)?;
        let monitor = daemon(path, "mon", "a")?;
        let mut cluster = Self { osds: Vec::new(), _monitor: monitor, folder };
        for id in 0..spec.osds {
            cluster.add_osd(id)?;
        }
        cluster.wait_for_osds(spec.osds)?;
        cluster.ceph(&["osd", "pool", "create", POOL, PLACEMENT_GROUPS])?;
        cluster.rbd(&["pool", "init", POOL])?;
        Ok(cluster)
    }

    /// The cluster's `ceph.conf`; it names the key ring too.
    pub fn conf(&self) -> PathBuf {
        self.folder.path().join("ceph.conf")
    }

    /// Runs `ceph ARGUMENTS`.
    pub fn ceph(&self, arguments: &[&str]) -> Result<String> {
        run(command(self.folder.path(), "ceph")?.args(["--connect-timeout", "30"]).args(arguments), LIMIT)
    }

    /// What the cluster is at, for the error of something that waits for it.
    pub fn describe(&self) -> String {
        let asked = [&["status"][..], &["health", "detail"], &["tell", "osd.0", "dump_ops_in_flight"]];
        asked.map(|question| format!("ceph {}: {}", question.join(" "), answer(self.ceph(question)))).join("\n")
    }

    /// Runs `rbd ARGUMENTS`.
    pub fn rbd(&self, arguments: &[&str]) -> Result<String> {
        run(command(self.folder.path(), "rbd")?.args(arguments), LIMIT)
    }

    /// Creates an image in [`POOL`].
    pub fn create_image(&self, name: &str, size_mib: u64) -> Result<()> {
        self.rbd(&["create", "--size", &format!("{size_mib}M"), &format!("{POOL}/{name}")])?;
        Ok(())
    }

    /// Kills a storage daemon; what it held in memory is lost.
    pub fn kill_osd(&mut self, index: usize) -> Result<()> {
        self.osds.get_mut(index).with_context(|| format!("no storage daemon {index}"))?.kill()
    }

    /// Stops a storage daemon from running at all, without closing its connections.
    pub fn pause_osd(&self, index: usize) -> Result<()> {
        self.osds.get(index).with_context(|| format!("no storage daemon {index}"))?.pause()
    }

    pub fn resume_osd(&self, index: usize) -> Result<()> {
        self.osds.get(index).with_context(|| format!("no storage daemon {index}"))?.signal(Signal::CONT)
    }

    fn add_osd(&mut self, id: u32) -> Result<()> {
        let path = self.folder.path();
        let (id, uuid) = (id.to_string(), new_uuid()?);
        fs::create_dir(path.join(format!("osd.{id}")))?;
        self.ceph(&["osd", "new", &uuid, &id])?;
        run(command(path, "ceph-osd")?.args(["-i", &id, "--mkfs", "--osd-uuid", &uuid]), LIMIT)?;
        self.osds.push(daemon(path, "osd", &id)?);
        Ok(())
    }

    fn wait_for_osds(&self, count: u32) -> Result<()> {
        let deadline = Deadline::after(LIMIT);
        loop {
            let status: Value = serde_json::from_str(&self.ceph(&["osd", "stat", "--format", "json"])?)?;
            if status["num_up_osds"] == count {
                return Ok(());
            }
            if !deadline.pause() {
                bail!("{} of {count} storage daemons came up:\n{}", status["num_up_osds"], self.logs());
            }
        }
    }

    /// The end of each daemon's log, for an error.
    fn logs(&self) -> String {
        let files = fs::read_dir(self.folder.path().join("log")).into_iter().flatten().flatten();
        let tails = files.map(|file| {
            let text = fs::read_to_string(file.path()).unwrap_or_default();
            let lines: Vec<&str> = text.lines().rev().take(20).collect();
            format!("{}:\n{}\n", file.path().display(), lines.into_iter().rev().collect::<Vec<_>>().join("\n"))
        });
        tails.collect()
    }
}

fn answer(asked: Result<String>) -> String {
    asked.unwrap_or_else(|error| format!("{error:#}"))
}

fn command(folder: &Path, program: &str) -> Result<Command> {
    let mut command = Command::new(tools::require(program)?);
    command.env("CEPH_CONF", folder.join("ceph.conf")).env("LANG", "C").current_dir(folder);
    Ok(command)
}

fn daemon(folder: &Path, kind: &str, id: &str) -> Result<Running> {
    let mut command = command(folder, &format!("ceph-{kind}"))?;
    command.args(["-f", "-i", id]).stdin(Stdio::null()).stdout(Stdio::null());
    command.stderr(fs::File::create(folder.join(format!("log/{kind}.{id}.stderr")))?);
    Running::spawn(format!("ceph-{kind} {id}"), &mut command)
}

fn make_keys(folder: &Path, osds: u32) -> Result<()> {
    let key = |name: &str, extra: &[&str]| {
        let mut tool = command(folder, "ceph-authtool")?;
        run(tool.args(["keyring", "--gen-key", "-n", name]).args(extra), LIMIT)
    };
    let everything = ["--cap", "mon", "allow *", "--cap", "osd", "allow *", "--cap", "mgr", "allow *"];
    key("mon.", &["--create-keyring", "--cap", "mon", "allow *"])?;
    key("client.admin", &everything)?;
    for id in 0..osds {
        key(&format!("osd.{id}"), &["--cap", "mon", "allow profile osd", "--cap", "osd", "allow *"])?;
    }
    Ok(())
}

/// The monitor learns every key at its creation, which spares a round trip per key later.
fn make_monitor(folder: &Path, fsid: &str, monitors: &str) -> Result<()> {
    let mut map = command(folder, "monmaptool")?;
    run(map.args(["--create", "--clobber", "--fsid", fsid, "--addv", "a", monitors, "monmap"]), LIMIT)?;
    let mut monitor = command(folder, "ceph-mon")?;
    run(monitor.args(["--mkfs", "-i", "a", "--monmap", "monmap", "--keyring", "keyring"]), LIMIT)?;
    Ok(())
}

fn monitor_addresses(port: &str) -> Result<String> {
    let second = port.parse::<u16>()?.checked_add(1).context("no port after the last one")?;
    Ok(format!("[v2:127.0.0.1:{port},v1:127.0.0.1:{second}]"))
}

/// Two neighbouring free ports. Another process may take them before the monitor does; it then says so.
fn free_port_pair() -> Result<u16> {
    let deadline = Deadline::after(LIMIT);
    loop {
        let first = TcpListener::bind("127.0.0.1:0")?;
        let port = first.local_addr()?.port();
        if port.checked_add(1).is_some_and(|next| TcpListener::bind(("127.0.0.1", next)).is_ok()) {
            return Ok(port);
        }
        if !deadline.pause() {
            bail!("no two neighbouring free ports on 127.0.0.1");
        }
    }
}

fn new_uuid() -> Result<String> {
    let uuid = fs::read_to_string("/proc/sys/kernel/random/uuid").context("asking the kernel for a UUID")?;
    Ok(uuid.trim().to_owned())
}

fn configuration(folder: &Path, spec: CephSpec, fsid: &str, monitors: &str) -> String {
    let folder = folder.display();
    let auth = if spec.authenticate { "cephx" } else { "none" };
    let CephSpec { osds, min_copies, .. } = spec;
    let read_lease_ratio = if osds == 1 { LONE_READ_LEASE_RATIO } else { DEFAULT_READ_LEASE_RATIO };
    format!(
        "[global]
fsid = {fsid}
mon host = {monitors}
mon initial members = a
public addr = 127.0.0.1
cluster addr = 127.0.0.1
ms bind ipv6 = false
auth cluster required = {auth}
auth service required = {auth}
auth client required = {auth}
auth allow insecure global id reclaim = false
keyring = {folder}/keyring
run dir = {folder}/run
pid file = {folder}/run/$type.$id.pid
admin socket = {folder}/run/$type.$id.asok
log file = {folder}/log/$type.$id.log
crash dir = {folder}/crash
max open files = 0
osd pool default size = {osds}
osd pool default min size = {min_copies}
osd pool default pg autoscale mode = off
osd crush chooseleaf type = 0
mon allow pool size one = true
mon allow pool delete = true
mon warn on pool no redundancy = false
mon data avail warn = 2
mon data avail crit = 1
mon osd full ratio = 0.97
mon osd nearfull ratio = 0.95
mon osd backfillfull ratio = 0.96
mon max pg per osd = 1000
# Fail over within seconds; the monitor reads the grace period too.
osd heartbeat interval = 1
osd heartbeat grace = 5
mon osd adjust heartbeat grace = false
osd pool default read lease ratio = {read_lease_ratio}
[client]
admin socket = {folder}/run/$name.$pid.$cctid.asok
log file = {folder}/log/$name.log
client mount timeout = 30
[mon]
mon data = {folder}/mon.$id
mon cluster log file = {folder}/log/cluster.log
mgr initial modules =
# Elect and propose quickly.
paxos propose interval = 0.05
mon tick interval = 1
mon osd min down reporters = 1
mon osd down out interval = 600
[osd]
osd data = {folder}/osd.$id
osd objectstore = memstore
memstore device bytes = 8589934592
osd op num shards = 2
osd op num threads per shard = 1
osd mon heartbeat interval = 5
osd min pg log entries = 100
osd max pg log entries = 500
"
    )
}
