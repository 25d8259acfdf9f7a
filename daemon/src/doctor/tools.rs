//! Programs and libraries of others.

use super::Finding;
use crate::cli::paste::qemu_version;
use crate::config::Config;

/// The first QEMU whose vhost-user front end survives a restart of the daemon within a fraction of a second.
const QEMU_GOOD: (u32, u32) = (9, 2);

pub fn examine(config: Option<&Config>) -> Vec<Finding> {
    vec![qemu(qemu_version()), kvm(), ceph(backends::rbd::probe(), config)]
}

fn qemu(version: Option<(u32, u32)>) -> Finding {
    match version {
        None => Finding::warn("QEMU", "none is found", "install qemu-system-x86, if guests shall run on this host"),
        Some((major, minor)) if (major, minor) < QEMU_GOOD => Finding::warn(
            "QEMU",
            format!("{major}.{minor}: it reconnects to a restarted daemon after whole seconds only"),
            "QEMU 9.2 or newer knows reconnect-ms",
        ),
        Some((major, minor)) => Finding::ok("QEMU", format!("{major}.{minor}")),
    }
}

fn kvm() -> Finding {
    match std::fs::OpenOptions::new().read(true).write(true).open("/dev/kvm") {
        Ok(_) => Finding::ok("KVM", "/dev/kvm can be used"),
        Err(error) => {
            Finding::warn("KVM", format!("/dev/kvm: {error}: guests are emulated, and slow"), "load kvm, join the group kvm")
        }
    }
}

/// Needed where a pool says `driver = "rbd"`, else of no concern.
fn ceph(found: Result<String, String>, config: Option<&Config>) -> Finding {
    let needed = config.is_some_and(|config| config.pool.values().any(|pool| pool.driver == "rbd"));
    match found {
        Ok(versions) => Finding::ok("Ceph", versions),
        Err(why) if needed => Finding::fail("Ceph", why, "install librados2 and librbd1: a pool has driver \"rbd\""),
        Err(_) => Finding::ok("Ceph", "its libraries are not here, and no pool needs them"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::load_text;
    use crate::doctor::State;

    #[test]
    fn qemu_and_ceph_are_judged() {
        assert_eq!(qemu(None).state, State::Warn);
        assert_eq!(qemu(Some((7, 2))).state, State::Warn);
        assert_eq!(qemu(Some((10, 0))).state, State::Ok);
        let with_rbd = load_text("t", "[pool.c]\ndriver = \"rbd\"\npool = \"p\"\n", Vec::new()).unwrap();
        let missing = || Err("librbd.so.1 is missing".to_owned());
        assert_eq!(ceph(missing(), Some(&with_rbd)).state, State::Fail);
        assert_eq!(ceph(missing(), None).state, State::Ok);
        assert_eq!(ceph(Ok("1.16".to_owned()), None).state, State::Ok);
    }
}
