//! Files to serve: preallocated, filled, on the disk and not in the page cache.

use std::fs::{File, OpenOptions};
use std::os::unix::fs::FileExt;
use std::path::Path;

use anyhow::{Context, Result};
use rustix::fs::{Advice, FallocateFlags, fadvise, fallocate};

use crate::pattern;

const PIECE: usize = 1 << 20;

/// Makes `path` a filled file of `bytes`. One that has this size is left as it is.
pub fn prepare(path: &Path, bytes: u64) -> Result<()> {
    let context = || format!("prepare {} ({bytes} bytes)", path.display());
    let file = OpenOptions::new().read(true).write(true).create(true).truncate(false).open(path).with_context(context)?;
    if file.metadata().with_context(context)?.len() != bytes {
        fill(&file, bytes).with_context(context)?;
    }
    file.sync_all().with_context(context)?;
    fadvise(&file, 0, None, Advice::DontNeed).with_context(context)
}

fn fill(file: &File, bytes: u64) -> Result<()> {
    file.set_len(0)?;
    fallocate(file, FallocateFlags::KEEP_SIZE, 0, bytes)?;
    let mut piece = vec![0; PIECE];
    for offset in (0..bytes).step_by(PIECE) {
        let length = PIECE.min((bytes - offset) as usize);
        pattern::fill(1, offset, &mut piece[..length]);
        file.write_all_at(&piece[..length], offset)?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_is_filled_once() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("disk.raw");
        let bytes = PIECE as u64 + 4096;
        prepare(&path, bytes).unwrap();
        let data = std::fs::read(&path).unwrap();
        assert_eq!(data.len() as u64, bytes);
        assert_eq!(pattern::first_mismatch(1, 0, &data), None);

        std::fs::write(&path, vec![9; bytes as usize]).unwrap();
        prepare(&path, bytes).unwrap();
        assert_eq!(std::fs::read(&path).unwrap()[0], 9);
    }
}
