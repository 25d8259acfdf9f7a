//! Real machinery around novastor: guests, clusters, file systems, the daemon itself.
//! `cargo xtask rig install` brings what they need.

pub mod archive;
pub mod ceph;
pub mod console;
pub mod daemon;
pub mod deadline;
pub mod fio;
pub mod guest;
pub mod hugepages;
pub mod loop_mount;
pub mod metrics;
pub mod nbd;
pub mod process;
pub mod proxy;
pub mod qmp;
pub mod remembered_load;
pub mod scratch;
pub mod seaweedfs;
pub mod snapshots;
pub mod systemd;
pub mod tools;
pub mod verified_load;
