//! Which machines there are. Together they have 1 to 2 GiB of blocks that are not zero.

/// A machine, told by what is installed on it.
#[derive(Debug)]
pub struct Machine {
    /// Its image is `NAME.raw`.
    pub name: &'static str,
    /// What apt is asked for, besides [`SYSTEM`].
    pub packages: &'static [&'static str],
    /// Where apt takes a package from if several suites have it.
    pub suite: &'static str,
    /// Of its configuration and logs.
    pub seed: u64,
    /// Bytes of each of its logs.
    pub log_bytes: usize,
}

/// What is on all of them.
pub const SYSTEM: [&str; 12] = [
    "?essential",
    "?priority(required)",
    "usr-is-merged",
    "linux-image-cloud-amd64",
    "systemd-sysv",
    "udev",
    "openssh-server",
    "python3",
    "curl",
    "rsync",
    "cron",
    "less",
];

pub const BASE: Machine = Machine { name: "base", packages: &[], suite: "bookworm", seed: 0, log_bytes: 0 };

/// The machines whose images are measured.
pub const MACHINES: [Machine; 4] = [
    Machine { name: "server-1-plain", packages: &[], suite: "bookworm", seed: 1, log_bytes: 1 << 20 },
    Machine {
        name: "server-2-web",
        packages: &["nginx", "php-fpm", "php-mysql", "certbot"],
        suite: "bookworm",
        seed: 2,
        log_bytes: 3 << 20,
    },
    Machine { name: "server-3-database", packages: &["mariadb-server"], suite: "bookworm", seed: 3, log_bytes: 2 << 20 },
    Machine {
        name: "server-4-build-upgraded",
        packages: &["gcc", "make", "libc6-dev", "git"],
        suite: "bookworm-security",
        seed: 4,
        log_bytes: 3 << 20,
    },
];
