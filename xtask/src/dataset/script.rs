//! Changes to an ext4 image, as a script for `debugfs`, which needs no mount.

use super::tree::{Entry, Kind};
use crate::commands::output;
use anyhow::{Context, Result, bail};
use novastor_tests::rig::tools;
use std::fmt::Write;
use std::fs;
use std::path::Path;
use std::process::Command;

/// Seconds since 1970: when everything in the images happened.
pub const TIME: i64 = 1_767_225_600;

/// Commands, one a line.
#[derive(Debug, Default)]
pub struct Script {
    text: String,
    /// The folder that names are looked up in.
    folder: String,
}

impl Script {
    fn add(&mut self, command: std::fmt::Arguments<'_>) {
        // Writing to a string does not fail.
        let _ = self.text.write_fmt(command);
        self.text.push('\n');
    }

    /// Sets the times that differ from one making of the image to the next. A folder's is that of the last change in it.
    pub fn set_times(&mut self, path: &str, kind: &Kind) {
        let fields =
            if *kind == Kind::Folder { &["atime", "ctime", "crtime", "mtime"][..] } else { &["atime", "ctime", "crtime"] };
        for field in fields {
            self.set(path, field, format_args!("@{TIME}"));
            self.set(path, &format!("{field}_extra"), format_args!("0"));
        }
    }

    fn set(&mut self, path: &str, field: &str, value: std::fmt::Arguments<'_>) {
        self.add(format_args!("set_inode_field \"{path}\" {field} {value}"));
    }

    /// Puts an entry of a tree where `known` may be already.
    pub fn put(&mut self, tree: &Path, entry: &Entry, known: Option<&Kind>) {
        let (folder, name) = entry.path.rsplit_once('/').unwrap_or(("", &entry.path));
        match (&entry.kind, known) {
            (Kind::Folder, Some(Kind::Folder)) => return,
            (_, Some(_)) => self.add(format_args!("rm \"{}\"", entry.path)),
            (_, None) => {}
        }
        match &entry.kind {
            Kind::Folder => self.add(format_args!("mkdir \"{}\"", entry.path)),
            Kind::Link { target } => self.add(format_args!("symlink \"{}\" \"{target}\"", entry.path)),
            Kind::File => {
                if self.folder != folder {
                    self.folder = folder.to_owned();
                    self.add(format_args!("cd \"{folder}/\""));
                }
                let native = tree.join(entry.path.trim_start_matches('/'));
                self.add(format_args!("write \"{}\" \"{name}\"", native.display()));
            }
        }
        self.set(&entry.path, "mode", format_args!("0{:o}", entry.mode));
        self.set(&entry.path, "uid", format_args!("{}", entry.owner));
        self.set(&entry.path, "gid", format_args!("{}", entry.group));
        self.set(&entry.path, "mtime", format_args!("@{}", entry.modified));
        self.set_times(&entry.path, &entry.kind);
    }

    /// Applies it to an image, and checks that a sound file system comes out.
    pub fn run(&self, image: &Path) -> Result<()> {
        let path = image.with_extension("debugfs");
        fs::write(&path, &self.text).with_context(|| format!("writing {}", path.display()))?;
        let mut debugfs = Command::new(tools::require("debugfs")?);
        debugfs.env("E2FSPROGS_FAKE_TIME", TIME.to_string()).env("DEBUGFS_PAGER", "cat");
        debugfs.arg("-w").arg("-f").args([&path, &image.to_path_buf()]);
        let finished = debugfs.output().with_context(|| format!("starting {debugfs:?}"))?;
        // It goes on after a command that failed, and says so on standard error only.
        let complaints = String::from_utf8_lossy(&finished.stderr);
        let complaint = complaints.lines().find(|line| !line.starts_with("debugfs 1.") && !line.is_empty());
        if let Some(complaint) = complaint {
            bail!("{debugfs:?} complains, and the image is worth nothing: {complaint}");
        }
        let mut check = Command::new(tools::require("e2fsck")?);
        output(check.env("E2FSPROGS_FAKE_TIME", TIME.to_string()).args(["-f", "-n"]).arg(image))?;
        fs::remove_file(&path).with_context(|| format!("removing {}", path.display()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entry(path: &str, kind: Kind) -> Entry {
        Entry { path: path.to_owned(), kind, mode: 0o100_644, owner: 1, group: 2, modified: 3 }
    }

    fn commands(entry: &Entry, known: Option<&Kind>) -> Vec<String> {
        let mut script = Script::default();
        script.put(Path::new("/tree"), entry, known);
        script.text.lines().filter(|line| !line.starts_with("set_inode_field")).map(str::to_owned).collect()
    }

    #[test]
    fn what_is_there_is_replaced() {
        let file = entry("/a/b c", Kind::File);
        assert_eq!(commands(&file, None), ["cd \"/a/\"", "write \"/tree/a/b c\" \"b c\""]);
        assert_eq!(commands(&file, Some(&Kind::File))[0], "rm \"/a/b c\"");
        assert!(commands(&entry("/a", Kind::Folder), Some(&Kind::Folder)).is_empty());
        let link = entry("/l", Kind::Link { target: "a".to_owned() });
        assert_eq!(commands(&link, None), ["symlink \"/l\" \"a\""]);
    }

    #[test]
    fn a_file_gets_its_mode_and_owner() {
        let mut script = Script::default();
        script.put(Path::new("/tree"), &entry("/f", Kind::File), None);
        for expected in ["mode 0100644", "uid 1", "gid 2", "mtime @3", &format!("ctime @{TIME}")] {
            assert!(script.text.contains(&format!("set_inode_field \"/f\" {expected}\n")), "{expected}");
        }
    }
}
