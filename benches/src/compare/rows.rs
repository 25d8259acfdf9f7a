//! The rows of the comparison and what novastor must reach in each.

use crate::load::Report;
use crate::requests::{Access, Workload};

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Protocol {
    VhostUser { queues: usize },
    Nbd { connections: usize },
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Backing {
    Null,
    /// A file on tmpfs, through the page cache.
    Tmpfs,
    /// A file on ext4 with O_DIRECT.
    Direct,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Metric {
    Iops,
    ServerCpu,
    P50,
}

/// What the ratio of novastor to the best peer in this metric must be.
#[derive(Clone, Copy, Debug)]
pub struct Target {
    pub metric: Metric,
    pub ratio: f64,
}

pub struct Row {
    pub name: &'static str,
    pub protocol: Protocol,
    pub backing: Backing,
    pub workload: Workload,
    pub targets: Vec<Target>,
}

impl Row {
    pub fn describe(&self) -> String {
        let protocol = match self.protocol {
            Protocol::VhostUser { queues: 1 } => "vhost-user, 1 queue".to_owned(),
            Protocol::VhostUser { queues } => {
                format!("vhost-user, {queues} queues on one client thread")
            }
            Protocol::Nbd { connections: 1 } => "NBD on a unix socket, 1 connection".to_owned(),
            Protocol::Nbd { connections } => {
                format!("NBD on a unix socket, {connections} connections")
            }
        };
        let backing = match self.backing {
            Backing::Null => "null device",
            Backing::Tmpfs => "file on tmpfs",
            Backing::Direct => "O_DIRECT file on ext4",
        };
        let access = match self.workload.access {
            Access::Random => "random",
            Access::Sequential => "sequential",
        };
        let direction = if self.workload.write_percent > 0 { "write" } else { "read" };
        let (kib, depth) = (self.workload.block_size >> 10, self.workload.depth);
        format!("{protocol}, {backing}, {kib}k {access} {direction}, depth {depth}")
    }
}

impl Metric {
    pub fn name(self) -> &'static str {
        match self {
            Self::Iops => "IOPS",
            Self::ServerCpu => "server CPU per I/O",
            Self::P50 => "p50",
        }
    }

    pub fn of(self, report: &Report) -> Option<f64> {
        match self {
            Self::Iops => Some(report.iops),
            Self::ServerCpu => report.server_cpu_us,
            Self::P50 => Some(report.p50_us),
        }
    }

    pub fn higher_is_better(self) -> bool {
        self == Self::Iops
    }
}

const VHOST: Protocol = Protocol::VhostUser { queues: 1 };
const VHOST_4: Protocol = Protocol::VhostUser { queues: 4 };
const NBD: Protocol = Protocol::Nbd { connections: 1 };
const NBD_4: Protocol = Protocol::Nbd { connections: 4 };

const READ: u8 = 0;
const WRITE: u8 = 100;

#[rustfmt::skip]
pub fn all() -> Vec<Row> {
    use Backing::*;
    vec![
        row("vhost-null-4k-q1", VHOST, Null, small(32, READ), &[iops(1.5), cpu(0.65)]),
        row("vhost-null-4k-q4", VHOST_4, Null, small(32, READ), &[iops(2.0)]),
        row("vhost-tmpfs-4k-read", VHOST, Tmpfs, small(32, READ), &[iops(2.0), cpu(0.4)]),
        row("vhost-tmpfs-4k-write", VHOST, Tmpfs, small(32, WRITE), &[]),
        row("vhost-direct-4k-read", VHOST, Direct, small(32, READ), &[iops(1.0), cpu(0.85)]),
        row("vhost-direct-4k-write", VHOST, Direct, small(32, WRITE), &[iops(1.0), cpu(0.85)]),
        row("vhost-direct-4k-read-d1", VHOST, Direct, small(1, READ), &[p50(1.0)]),
        row("vhost-direct-4k-write-d1", VHOST, Direct, small(1, WRITE), &[p50(1.0)]),
        row("vhost-direct-128k-read", VHOST, Direct, large(READ), &[iops(1.0), cpu(0.85)]),
        row("vhost-direct-128k-write", VHOST, Direct, large(WRITE), &[iops(1.0), cpu(0.85)]),
        row("nbd-null-4k-read", NBD, Null, small(32, READ), &[cpu(0.6)]),
        row("nbd-null-4k-read-c4", NBD_4, Null, small(32, READ), &[]),
        row("nbd-null-128k-read", NBD, Null, large(READ), &[cpu(0.7)]),
        row("nbd-tmpfs-4k-read", NBD, Tmpfs, small(32, READ), &[]),
        row("nbd-direct-4k-read", NBD, Direct, small(32, READ), &[cpu(0.6)]),
        row("nbd-direct-4k-write", NBD, Direct, small(32, WRITE), &[cpu(0.6)]),
        row("nbd-direct-128k-read", NBD, Direct, large(READ), &[cpu(0.4)]),
        row("nbd-direct-128k-write", NBD, Direct, large(WRITE), &[cpu(0.4)]),
    ]
}

fn row(name: &'static str, protocol: Protocol, backing: Backing, workload: Workload, targets: &[Target]) -> Row {
    Row { name, protocol, backing, workload, targets: targets.to_vec() }
}

fn small(depth: u16, write_percent: u8) -> Workload {
    Workload { block_size: 4 << 10, depth, access: Access::Random, write_percent }
}

fn large(write_percent: u8) -> Workload {
    Workload { block_size: 128 << 10, depth: 8, access: Access::Sequential, write_percent }
}

fn iops(ratio: f64) -> Target {
    Target { metric: Metric::Iops, ratio }
}

fn cpu(ratio: f64) -> Target {
    Target { metric: Metric::ServerCpu, ratio }
}

fn p50(ratio: f64) -> Target {
    Target { metric: Metric::P50, ratio }
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use super::*;

    #[test]
    fn names_tell_rows_apart() {
        let names: HashSet<&str> = all().iter().map(|row| row.name).collect();
        assert_eq!(names.len(), all().len());
    }
}
