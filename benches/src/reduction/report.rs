//! The result as Markdown.

use std::collections::HashSet;

use anyhow::Result;
use dedup::BLOCK_LEN;
use dedup::hash::{Domain, Hasher, is_zero};

use super::group::Stored;
use super::images::Image;

fn mib(bytes: u64) -> f64 {
    bytes as f64 / f64::from(1 << 20)
}

/// A table of the images. Returns the bytes of blocks that are not zero.
pub fn print_images(images: &[Image]) -> Result<u64> {
    let hasher = Hasher::new(&[0; 32], Domain([0; 16]));
    let (mut all, mut written) = (HashSet::new(), 0);
    println!("| image | blocks that are not zero, MiB | of them new in this image, MiB |");
    println!("|---|--:|--:|");
    for image in images {
        let (mut blocks, before) = (0, all.len());
        image.batches(|batch| {
            batch.iter().filter(|(_, block)| !is_zero(block)).for_each(|(_, block)| {
                blocks += 1;
                all.insert(hasher.hash(block));
            });
        })?;
        let new = (all.len() - before) as u64;
        println!("| {} | {:.1} | {:.1} |", image.name(), mib(blocks * BLOCK_LEN as u64), mib(new * BLOCK_LEN as u64));
        written += blocks;
    }
    let unique = all.len() as u64;
    println!("| all | {:.1} | {:.1} |", mib(written * BLOCK_LEN as u64), mib(unique * BLOCK_LEN as u64));
    println!("\nEqual blocks of 4 KiB stored once, and nothing else: {:.2}×\n", written as f64 / unique as f64);
    Ok(written * BLOCK_LEN as u64)
}

pub fn print_head(written: u64, qcow2: u64) {
    println!(
        "| packing | sharing | stored, MiB | ratio | target | qcow2 ÷ stored | target | frames | headers | map | duplicates taken |"
    );
    println!("|---|---|--:|--:|--:|--:|--:|--:|--:|--:|--:|");
    println!("| qcow2, zstd | none | {:.1} | {:.2}× | | | | | | | |", mib(qcow2), written as f64 / qcow2 as f64);
}

/// A row, with the targets of how many times less is stored: than what was `written`, and than `qcow2` does.
pub fn print_row(packing: &str, sharing: &str, targets: [Option<f64>; 2], [written, qcow2]: [u64; 2], stored: &Stored) {
    let ratio = |bytes: u64, target: Option<f64>| {
        let ratio = bytes as f64 / stored.bytes() as f64;
        let verdict = |target| format!("≥ {target}×, {}", if ratio >= target { "pass" } else { "FAIL" });
        format!("{ratio:.2}× | {}", target.map(verdict).unwrap_or_default())
    };
    println!(
        "| {packing} | {sharing} | {:.1} | {} | {} | {:.1} | {:.1} | {:.1} | {:.1} % |",
        mib(stored.bytes()),
        ratio(written, targets[0]),
        ratio(qcow2, targets[1]),
        mib(stored.frames),
        mib(stored.headers),
        mib(stored.map),
        stored.hits as f64 * 100.0 / stored.duplicates.max(1) as f64,
    );
}
