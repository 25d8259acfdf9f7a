//! What a machine gathers besides packages: configuration of its own, and logs.

use super::machine::Machine;
use super::script::TIME;
use anyhow::{Context, Result};
use std::fmt::Write;
use std::fs::{self, File};
use std::path::Path;
use std::time::{Duration, UNIX_EPOCH};

const DAEMONS: [&str; 6] = ["systemd[1]", "sshd[811]", "CRON[2210]", "kernel", "rsyslogd[402]", "systemd-logind[391]"];
const MESSAGES: [&str; 6] = [
    "Started session of user deploy.",
    "Accepted publickey for deploy from 192.0.2.7 port",
    "(root) CMD (command -v debian-sa1 > /dev/null && debian-sa1 1 1)",
    "pam_unix(sshd:session): session opened for user deploy(uid=1000) by (uid=0), id",
    "Deactivated successfully, consumed CPU time in ms:",
    "Connection closed by authenticating user root 198.51.100.9 port",
];
const PAGES: [&str; 5] = ["/", "/index.html", "/api/v1/items", "/static/site.css", "/images/logo.png"];

/// One in this many files below /etc is changed on a machine.
const CHANGED_ONE_IN: u64 = 6;

/// Adds to `tree` what a machine that began as `base` has of its own.
pub fn live(machine: &Machine, base: &Path, tree: &Path) -> Result<()> {
    let mut random = machine.seed;
    write(tree, "etc/hostname", format!("{}\n", machine.name))?;
    write(tree, "etc/machine-id", format!("{:016x}{:016x}\n", next(&mut random), next(&mut random)))?;
    write(tree, "etc/network/interfaces.d/lan", format!("iface eth0 inet static\n\taddress 192.0.2.{}/24\n", machine.seed + 10))?;
    change_configuration(&mut random, base, tree)?;
    for (name, line) in [("syslog", system_line as Line), ("auth.log", system_line), ("access.log", access_line)] {
        write(tree, &format!("var/log/{name}"), log(&mut random, machine.log_bytes, line))?;
    }
    Ok(())
}

fn change_configuration(random: &mut u64, base: &Path, tree: &Path) -> Result<()> {
    for entry in super::tree::entries(&base.join("etc"))? {
        let path = format!("etc{}", entry.path);
        if entry.kind != super::tree::Kind::File || !next(random).is_multiple_of(CHANGED_ONE_IN) || tree.join(&path).exists() {
            continue;
        }
        let mut content = fs::read(base.join(&path)).with_context(|| format!("reading {path} of the base"))?;
        content.extend_from_slice(format!("# setting {:x}\n", next(random)).as_bytes());
        write(tree, &path, content)?;
    }
    Ok(())
}

/// A line of a log: its text goes to the string, told by a random number and the time in seconds.
type Line = fn(&mut String, u64, i64) -> std::fmt::Result;

fn system_line(text: &mut String, word: u64, time: i64) -> std::fmt::Result {
    let (daemon, message) = (DAEMONS[(word % 6) as usize], MESSAGES[(word / 6 % 6) as usize]);
    writeln!(text, "{time} server {daemon}: {message} {}", word >> 40)
}

fn access_line(text: &mut String, word: u64, time: i64) -> std::fmt::Result {
    let (page, status) = (PAGES[(word % 5) as usize], [200, 200, 304, 404][(word / 5 % 4) as usize]);
    let address = [word >> 32 & 255, word >> 40 & 255];
    writeln!(text, "198.51.{}.{} - - [{time}] \"GET {page} HTTP/1.1\" {status} {}", address[0], address[1], word >> 50)
}

fn log(random: &mut u64, bytes: usize, line: Line) -> String {
    let (mut text, mut time) = (String::new(), TIME - 1_000_000);
    while text.len() < bytes {
        let word = next(random);
        time += (word >> 60) as i64;
        // Writing to a string does not fail.
        let _ = line(&mut text, word, time);
    }
    text
}

fn write(tree: &Path, name: &str, content: impl AsRef<[u8]>) -> Result<()> {
    let path = tree.join(name);
    let context = || format!("writing {}", path.display());
    path.parent().map_or(Ok(()), fs::create_dir_all).with_context(context)?;
    fs::write(&path, content).with_context(context)?;
    let time = UNIX_EPOCH + Duration::from_secs(TIME.unsigned_abs());
    File::options().write(true).open(&path).and_then(|file| file.set_modified(time)).with_context(context)
}

/// A step of splitmix64.
fn next(state: &mut u64) -> u64 {
    *state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let mut z = *state;
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::dataset::machine::MACHINES;

    #[test]
    fn a_machine_lives_the_same_life_again_and_no_other_does() {
        let base = tempfile::tempdir().unwrap();
        (0..60).for_each(|number| write(base.path(), &format!("etc/{number}.conf"), "setting = default\n").unwrap());
        let live_once = |machine| {
            let tree = tempfile::tempdir().unwrap();
            live(machine, base.path(), tree.path()).unwrap();
            let read = |name: &str| fs::read(tree.path().join(name)).unwrap();
            let changed = (0..60).filter(|number| tree.path().join(format!("etc/{number}.conf")).exists()).count();
            (read("etc/machine-id"), digest(&read("var/log/syslog")), changed)
        };
        let (one, again, other) = (live_once(&MACHINES[0]), live_once(&MACHINES[0]), live_once(&MACHINES[1]));
        assert_eq!(one, again);
        assert!(one.0 != other.0 && one.1 != other.1);
        assert!((1..30).contains(&one.2), "{} of 60 files were changed", one.2);
    }

    /// Length and sum: enough to tell two logs apart.
    fn digest(content: &[u8]) -> (usize, u64) {
        (content.len(), content.iter().map(|byte| u64::from(*byte)).sum())
    }
}
