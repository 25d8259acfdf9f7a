//! End-to-end tests of novastor, and the rigs they run on.
//!
//! ```text
//!   tests/tests/*.rs     one file per subject; a file whose name holds `guest` boots guests, `ceph` starts a Ceph, `s3` SeaweedFS
//!        │
//!   rig::guest           QEMU guest running a shell job          rig::ceph    one-node Ceph on loopback
//!   rig::daemon          the novastor under test, and its CLI    rig::loop_mount  a small file system
//!        │
//!   rig::seaweedfs       S3 on loopback                       rig::proxy   breaks connections when told to
//!   rig::systemd         systemd in namespaces, for the units
//!   rig::fio      verified load from the host            rig::{tools, scratch, process, deadline}
//! ```
//!
//! Invariants:
//! - What a rig starts, dropping it stops; nothing outlives a test.
//! - A test that lacks a tool fails, and the failure names the command that installs it.
//! - A rig never asserts anything about novastor; tests do.

pub mod rig;
