//! The files of packages, unpacked but not installed, and what dpkg would note of them.

use super::packages::{Package, dpkg_deb};
use anyhow::{Context, Result, bail};
use std::fs::{self, Metadata};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

/// What an entry of a tree is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Kind {
    Folder,
    File,
    Link { target: String },
}

/// A file, folder or symbolic link.
#[derive(Debug)]
pub struct Entry {
    /// From the root of the tree, with a leading `/`.
    pub path: String,
    pub kind: Kind,
    /// As in `stat`.
    pub mode: u32,
    pub owner: u32,
    pub group: u32,
    /// Seconds since 1970.
    pub modified: i64,
}

/// Unpacks packages into `tree`, which is emptied first.
pub fn unpack(folder: &Path, packages: &[Package], tree: &Path) -> Result<()> {
    if tree.exists() {
        fs::remove_dir_all(tree).with_context(|| format!("removing {}", tree.display()))?;
    }
    let notes = tree.join("var/lib/dpkg/info");
    fs::create_dir_all(&notes).with_context(|| format!("creating {}", notes.display()))?;
    let control = tree.with_extension("control");
    for package in packages {
        let path = package.path(folder);
        dpkg_deb("--extract", &path, tree)?;
        dpkg_deb("--control", &path, &control)?;
        for note in fs::read_dir(&control)? {
            let note = note?;
            let name = format!("{}.{}", package.name(), note.file_name().to_string_lossy());
            fs::rename(note.path(), notes.join(name))?;
        }
        fs::remove_dir(&control)?;
    }
    Ok(())
}

/// Everything in a tree but its root, a folder before what is in it, in the order of names.
pub fn entries(tree: &Path) -> Result<Vec<Entry>> {
    let mut entries = Vec::new();
    collect(tree, "", &mut entries)?;
    Ok(entries)
}

fn collect(tree: &Path, folder: &str, entries: &mut Vec<Entry>) -> Result<()> {
    let native = tree.join(folder.trim_start_matches('/'));
    let listing = fs::read_dir(&native).with_context(|| format!("reading {}", native.display()))?;
    let mut names = listing.map(|entry| Ok(entry?.file_name().into_string())).collect::<Result<Vec<_>>>()?;
    names.sort();
    for name in names {
        let Ok(name) = name else { bail!("a name in {} is no UTF-8: {name:?}", native.display()) };
        let path = format!("{folder}/{name}");
        let metadata = fs::symlink_metadata(native.join(&name))?;
        let Some(kind) = kind(&native.join(&name), &metadata)? else { continue };
        let is_folder = kind == Kind::Folder;
        let (mode, owner, group, modified) = (metadata.mode(), metadata.uid(), metadata.gid(), metadata.mtime());
        entries.push(Entry { path: path.clone(), kind, mode, owner, group, modified });
        if is_folder {
            collect(tree, &path, entries)?;
        }
    }
    Ok(())
}

/// `None` for sockets, devices and the like, which no package brings.
fn kind(path: &PathBuf, metadata: &Metadata) -> Result<Option<Kind>> {
    Ok(match metadata.file_type() {
        kind if kind.is_dir() => Some(Kind::Folder),
        kind if kind.is_file() => Some(Kind::File),
        kind if kind.is_symlink() => Some(Kind::Link { target: fs::read_link(path)?.to_string_lossy().into_owned() }),
        _ => None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::symlink;

    #[test]
    fn a_tree_is_listed_in_order() {
        let tree = tempfile::tempdir().unwrap();
        fs::create_dir(tree.path().join("b")).unwrap();
        fs::write(tree.path().join("b/file"), "x").unwrap();
        symlink("b/file", tree.path().join("a")).unwrap();
        let entries = entries(tree.path()).unwrap();
        let paths: Vec<_> = entries.iter().map(|entry| entry.path.as_str()).collect();
        assert_eq!(paths, ["/a", "/b", "/b/file"]);
        assert_eq!(entries[0].kind, Kind::Link { target: "b/file".to_owned() });
        assert_eq!((&entries[1].kind, &entries[2].kind), (&Kind::Folder, &Kind::File));
    }
}
