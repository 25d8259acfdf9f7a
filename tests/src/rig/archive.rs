//! Writes cpio archives in the `newc` format, which Linux unpacks as its initial file system.
//!
//! ```text
//!   header: "070701" + 13 fields of 8 hex digits │ name NUL │ pad to 4 │ contents │ pad to 4
//!   …       the entry named TRAILER!!! ends the archive
//! ```
//!
//! The kernel unpacks archives that follow each other, so a job is appended to a ready-made image.

use std::iter;

const ALIGNMENT: usize = 4;
const REGULAR_FILE: u32 = 0o100_000;
const TRAILER: &str = "TRAILER!!!";

#[derive(Debug, Default)]
pub struct Archive {
    bytes: Vec<u8>,
    entries: u32,
}

impl Archive {
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds a regular file; `name` is relative to the root of the archive.
    pub fn add(&mut self, name: &str, permissions: u32, contents: &[u8]) {
        self.entries += 1;
        self.append(name, self.entries, REGULAR_FILE | permissions, contents);
    }

    pub fn finish(mut self) -> Vec<u8> {
        self.append(TRAILER, 0, 0, &[]);
        self.bytes
    }

    fn append(&mut self, name: &str, inode: u32, mode: u32, contents: &[u8]) {
        let (uid, gid, links, modified) = (0, 0, 1, 0);
        let device = [0; 4];
        self.bytes.extend_from_slice(b"070701");
        let fields = [inode, mode, uid, gid, links, modified, contents.len() as u32]
            .into_iter()
            .chain(device)
            .chain([name.len() as u32 + 1, 0]);
        for field in fields {
            self.bytes.extend_from_slice(format!("{field:08x}").as_bytes());
        }
        self.bytes.extend_from_slice(name.as_bytes());
        self.bytes.push(0);
        self.pad();
        self.bytes.extend_from_slice(contents);
        self.pad();
    }

    fn pad(&mut self) {
        let missing = self.bytes.len().next_multiple_of(ALIGNMENT) - self.bytes.len();
        self.bytes.extend(iter::repeat_n(0, missing));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::rig::{process, scratch, tools};
    use std::fs::{self, File};
    use std::process::Command;
    use std::time::Duration;

    #[test]
    fn cpio_unpacks_what_was_added() {
        let dir = scratch::short_dir().unwrap();
        let mut archive = Archive::new();
        archive.add("job.sh", 0o755, b"#!/bin/sh\n");
        archive.add("empty", 0o644, b"");
        archive.add("seven", 0o644, b"1234567");
        fs::write(dir.path().join("a.cpio"), archive.finish()).unwrap();
        let unpack =
            format!("{} -idm --quiet <{}", tools::require("cpio").unwrap().display(), dir.path().join("a.cpio").display());
        let mut shell = Command::new("sh");
        process::run(shell.args(["-c", &unpack]).current_dir(dir.path()), Duration::from_secs(60)).unwrap();
        assert_eq!(fs::read(dir.path().join("job.sh")).unwrap(), b"#!/bin/sh\n");
        assert_eq!(fs::read(dir.path().join("seven")).unwrap(), b"1234567");
        assert_eq!(File::open(dir.path().join("empty")).unwrap().metadata().unwrap().len(), 0);
    }
}
