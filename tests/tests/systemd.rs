//! The units in `deploy/`, run by systemd.

use std::time::Duration;

use anyhow::{Result, bail, ensure};
use novastor_tests::rig::daemon;
use novastor_tests::rig::deadline::Deadline;
use novastor_tests::rig::nbd::NbdClient;
use novastor_tests::rig::systemd::Systemd;

const LIMIT: Duration = Duration::from_secs(60);
const SERVICE: &str = "novastor.service";
const SOCKET: &str = "/run/novastor/nbd.sock";
const POOL: &str = "[daemon]\nmetrics = \"127.0.0.1:0\"\n[pool.local]\ndriver = \"file\"\npath = \"/var/lib/novastor/pool\"\n";
const KEY: &str = "[keys]\ncredential = \"novastor-kek\"\n[policy.secret]\nencryption = true\n";

/// A machine with the units installed as their comments say, novastor's configuration, and additions to the service's unit.
fn machine(configuration: &str, additions: &str) -> Result<Systemd> {
    Systemd::boot(
        &daemon::binary()?,
        &[
            ("/etc/systemd/system/novastor.service", include_str!("../../deploy/novastor.service")),
            ("/etc/systemd/system/novastor.socket", include_str!("../../deploy/novastor.socket")),
            ("/etc/systemd/system/novastor.service.d/test.conf", &format!("[Service]\n{additions}\n")),
            ("/etc/novastor/novastor.toml", configuration),
        ],
    )
}

fn export(machine: &Systemd, volume: &[&str]) -> Result<()> {
    machine.run("novastor", &[&["volume", "create", "disk", "--size", "64M"], volume].concat())?;
    machine.run("novastor", &["export", "add", "disk", "--nbd"]).map(drop)
}

fn connect(machine: &Systemd) -> Result<NbdClient> {
    NbdClient::connect(&machine.path(SOCKET), "disk", LIMIT).map_err(|error| error.context(machine.journal()))
}

fn write(machine: &Systemd, content: &[u8]) -> Result<()> {
    let mut client = connect(machine)?;
    ensure!(client.write(0, content)? == 0 && client.flush()? == 0, "the write failed");
    Ok(())
}

/// Whoever comes while the daemon is not there waits for it, and finds what was written.
fn check_served(machine: &Systemd, content: &[u8]) -> Result<()> {
    let length = u32::try_from(content.len())?;
    ensure!(connect(machine)?.read(0, length)? == content, "not what was written");
    Ok(())
}

fn wait_for_restarts(machine: &Systemd, count: &str) -> Result<()> {
    let deadline = Deadline::after(LIMIT);
    while machine.property(SERVICE, "NRestarts")? != count {
        if !deadline.pause() {
            bail!("not restarted {count} times:\n{}", machine.journal());
        }
    }
    Ok(())
}

#[test]
fn clients_are_served_through_kills_a_hang_a_reload_and_a_restart() -> Result<()> {
    let machine = machine(POOL, "WatchdogSec=2s")?;
    machine.run("systemctl", &["start", SERVICE])?;
    export(&machine, &[])?;
    let content = [7; 8192];
    write(&machine, &content)?;

    machine.signal(SERVICE, "KILL")?;
    check_served(&machine, &content)?;
    wait_for_restarts(&machine, "1")?;
    machine.signal(SERVICE, "STOP")?;
    wait_for_restarts(&machine, "2")?;
    check_served(&machine, &content)?;

    let before = machine.property(SERVICE, "MainPID")?;
    machine.run("systemctl", &["reload", SERVICE])?;
    check_served(&machine, &content)?;
    assert_eq!(machine.property(SERVICE, "MainPID")?, before);
    machine.run("systemctl", &["restart", SERVICE])?;
    check_served(&machine, &content)?;
    assert_ne!(machine.property(SERVICE, "MainPID")?, before);

    machine.run("systemctl", &["stop", SERVICE])?;
    assert_eq!(machine.property(SERVICE, "Result")?, "success");
    assert!(connect(&machine).is_err());
    Ok(())
}

#[test]
fn the_first_client_starts_the_daemon() -> Result<()> {
    let machine = machine(POOL, "")?;
    machine.run("systemctl", &["start", SERVICE])?;
    export(&machine, &["--layout", "raw"])?;
    let content = [9; 4096];
    write(&machine, &content)?;
    machine.run("systemctl", &["stop", SERVICE])?;
    machine.run("systemctl", &["start", "novastor.socket"])?;
    assert_eq!(machine.property(SERVICE, "ActiveState")?, "inactive");
    check_served(&machine, &content)
}

#[test]
fn the_key_of_keys_is_an_encrypted_credential() -> Result<()> {
    const CREDENTIAL: &str = "/etc/credstore.encrypted/novastor-kek";
    let machine = machine(&format!("{POOL}{KEY}"), &format!("LoadCredentialEncrypted=novastor-kek:{CREDENTIAL}"))?;
    machine.run("mkdir", &["--parents", "/etc/credstore.encrypted"])?;
    machine.run("sh", &["-c", "od -An -tx1 -v -N32 /dev/urandom | tr -d ' \\n' >/etc/novastor/kek"])?;
    machine.run("systemd-creds", &["encrypt", "--name=novastor-kek", "/etc/novastor/kek", CREDENTIAL])?;
    machine.run("rm", &["/etc/novastor/kek"])?;
    machine.run("systemctl", &["start", SERVICE])?;
    export(&machine, &["--policy", "secret"])?;
    let content = [5; 4096];
    write(&machine, &content)?;
    machine.run("systemctl", &["restart", SERVICE])?;
    check_served(&machine, &content)
}
