//! Images of disks, with holes.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use dedup::{BLOCK_LEN, Block};
use rustix::fs::{SeekFrom, seek};
use rustix::io::Errno;

/// Blocks of a batch: 32 MiB.
const BATCH_BLOCKS: usize = (32 << 20) / BLOCK_LEN;

/// A raw image, open for reading.
pub struct Image {
    pub path: PathBuf,
    file: File,
}

impl Image {
    pub fn open(path: &Path) -> Result<Image> {
        let file = File::open(path).with_context(|| format!("opening {}", path.display()))?;
        Ok(Image { path: path.to_owned(), file })
    }

    pub fn name(&self) -> String {
        self.path.file_stem().unwrap_or_default().to_string_lossy().into_owned()
    }

    /// Hands out everything that is no hole, with the numbers of the blocks, ascending.
    pub fn batches(&self, mut batch: impl FnMut(&[(u64, Block)])) -> Result<()> {
        let mut blocks = Vec::with_capacity(BATCH_BLOCKS);
        let mut at = 0;
        while let Some((start, end)) = self.next_data(at).with_context(|| format!("reading {}", self.path.display()))? {
            for number in start / BLOCK_LEN as u64..end.div_ceil(BLOCK_LEN as u64) {
                blocks.push((number, self.block(number)?));
                if blocks.len() == BATCH_BLOCKS {
                    batch(&blocks);
                    blocks.clear();
                }
            }
            at = end.next_multiple_of(BLOCK_LEN as u64);
        }
        if !blocks.is_empty() {
            batch(&blocks);
        }
        Ok(())
    }

    /// Where bytes begin that are no hole, and where they end.
    fn next_data(&self, at: u64) -> std::io::Result<Option<(u64, u64)>> {
        match seek(&self.file, SeekFrom::Data(at)) {
            Ok(start) => Ok(Some((start, seek(&self.file, SeekFrom::Hole(start))?))),
            Err(Errno::NXIO) => Ok(None),
            Err(error) => Err(error.into()),
        }
    }

    fn block(&self, number: u64) -> Result<Block> {
        let mut block = [0; BLOCK_LEN];
        let offset = number * BLOCK_LEN as u64;
        self.file.read_exact_at(&mut block, offset).with_context(|| format!("reading {} at {offset}", self.path.display()))?;
        Ok(block)
    }
}

/// The images of a data set that are measured, in the order of names.
pub fn servers(dataset: &Path) -> Result<Vec<Image>> {
    let listing = std::fs::read_dir(dataset).with_context(|| format!("reading {}", dataset.display()))?;
    let mut paths = listing.map(|entry| Ok(entry?.path())).collect::<Result<Vec<_>>>()?;
    let name = |path: &PathBuf| path.file_name().unwrap_or_default().to_string_lossy().into_owned();
    paths.retain(|path| name(path).starts_with("server-") && name(path).ends_with(".raw"));
    paths.sort();
    paths.iter().map(|path| Image::open(path)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn batches_hold_what_is_no_hole() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("server-1.raw");
        let file = File::create(&path).unwrap();
        file.set_len(1 << 30).unwrap();
        let far = (1 << 29) / BLOCK_LEN as u64;
        for number in [0, 1, far] {
            file.write_all_at(&[number as u8 + 1; BLOCK_LEN], number * BLOCK_LEN as u64).unwrap();
        }
        let images = servers(folder.path()).unwrap();
        let mut found = Vec::new();
        images[0].batches(|blocks| found.extend_from_slice(blocks)).unwrap();
        // A file system may keep more than was written, as zeroes.
        found.retain(|(_, block)| *block != [0; BLOCK_LEN]);
        assert_eq!(
            found.iter().map(|(number, block)| (*number, block[9])).collect::<Vec<_>>(),
            [(0, 1), (1, 2), (far, far as u8 + 1)]
        );
        assert_eq!(images[0].name(), "server-1");
    }
}
