//! What qcow2 stores, compressed with zstd in its clusters of 64 KiB.

use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result, bail};

use super::images::Image;

/// Converts an image and says how long the file is; the file is removed.
pub fn stored_bytes(image: &Image, folder: &Path) -> Result<u64> {
    let compressed = folder.join(format!("{}.qcow2", image.name()));
    let mut convert = Command::new("qemu-img");
    convert.args(["convert", "-f", "raw", "-O", "qcow2", "-c", "-o", "compression_type=zstd"]);
    let status = convert.arg(&image.path).arg(&compressed).status();
    let status = status.context("starting qemu-img (Debian package `qemu-utils`)")?;
    if !status.success() {
        bail!("{convert:?} failed ({status})");
    }
    let bytes = std::fs::metadata(&compressed)?.len();
    std::fs::remove_file(&compressed).with_context(|| format!("removing {}", compressed.display()))?;
    Ok(bytes)
}
