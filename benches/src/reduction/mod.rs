//! How much less is stored than was written: images of machines, reduced by the crate `dedup` and by qcow2.
//!
//! ```text
//!   DATASET/server-*.raw ─▶ batches of 32 MiB in the order of addresses ─▶ Group: hashes · index · frames · header ─▶ bytes stored
//!                      └──▶ qemu-img convert -c, zstd ─▶ bytes of the file                 └─ map pages, handles
//! ```
//!
//! - What was written are the blocks of 4 KiB that are not zero.
//! - Everything a volume keeps is counted: headers with their tables, frames with their padding and tags, the pages of its map, packed as its
//!   data is, and 32 bytes for each segment in the table of handles.
//! - It is what is left when garbage collection is done: nothing is overwritten, so no block is dead, and each map is written once.

mod group;
mod images;
mod map;
mod qcow2;
mod report;

use std::path::PathBuf;

use anyhow::{Result, bail};
use clap::Args;
use dedup::frame::{Compression, Packing};

use group::{Group, Stored};
use images::Image;
use map::Map;

/// Which images to reduce.
#[derive(Args)]
pub struct Options {
    /// The folder that `cargo xtask dataset` filled.
    #[arg(long)]
    dataset: PathBuf,
    /// Bytes for the headers that the index keeps in memory.
    #[arg(long, default_value = "67108864")]
    header_cache: usize,
}

/// A way to pack.
struct Setting {
    name: &'static str,
    packing: Packing,
    /// How many times less must be stored, as one domain.
    target: f64,
    /// How many times less than qcow2 with zstd does.
    qcow2_target: Option<f64>,
}

const SETTINGS: [Setting; 3] = [
    Setting {
        name: "default: 16 KiB, zstd-1",
        packing: Packing { compression: Compression::Zstd { level: 1 }, frame_blocks: 4 },
        target: 4.1,
        qcow2_target: Some(1.5),
    },
    Setting {
        name: "cold: 64 KiB, zstd-3",
        packing: Packing { compression: Compression::Zstd { level: 3 }, frame_blocks: 16 },
        target: 4.5,
        qcow2_target: Some(1.5),
    },
    Setting {
        name: "lz4: 16 KiB",
        packing: Packing { compression: Compression::Lz4, frame_blocks: 4 },
        target: 3.1,
        qcow2_target: None,
    },
];
/// For tenants that share nothing but a library image, in the default setting.
const TENANTS_TARGET: f64 = 3.7;
/// Measures all of it and prints Markdown.
pub fn run(options: &Options) -> Result<()> {
    let images = images::servers(&options.dataset)?;
    if images.is_empty() {
        bail!("{} holds no server-*.raw: run `cargo xtask dataset` with this folder", options.dataset.display());
    }
    let base = Image::open(&options.dataset.join("base.raw"))?;
    let written = report::print_images(&images)?;
    let qcow2 = images.iter().map(|image| qcow2::stored_bytes(image, &options.dataset)).sum::<Result<u64>>()?;
    report::print_head(written, qcow2);
    for setting in &SETTINGS {
        let stored = one_domain(&images, setting.packing, options.header_cache)?;
        let targets = [Some(setting.target), setting.qcow2_target];
        report::print_row(setting.name, "one domain", targets, [written, qcow2], &stored);
    }
    for (number, setting) in SETTINGS.iter().enumerate() {
        let stored = tenants_with_library(&base, &images, setting.packing, options.header_cache)?;
        let targets = [(number == 0).then_some(TENANTS_TARGET), None];
        report::print_row(setting.name, "isolated tenants, library image", targets, [written, qcow2], &stored);
    }
    Ok(())
}

/// All images in one group.
fn one_domain(images: &[Image], packing: Packing, header_cache: usize) -> Result<Stored> {
    let mut group = Group::new(1, packing, header_cache);
    for image in images {
        let mut map = Map::default();
        image.batches(|blocks| group.write(blocks, None, &mut map))?;
        group.keep(&map);
    }
    Ok(group.into_stored())
}

/// Each image in a group of its own, which may refer to the library image besides.
fn tenants_with_library(base: &Image, images: &[Image], packing: Packing, header_cache: usize) -> Result<Stored> {
    let mut library = Group::new(1, packing, header_cache);
    let mut map = Map::default();
    base.batches(|blocks| library.write(blocks, None, &mut map))?;
    library.keep(&map);
    let mut all = Stored::default();
    for (number, image) in (2..).zip(images) {
        let (mut tenant, mut map) = (Group::new(number, packing, header_cache), Map::default());
        image.batches(|blocks| tenant.write(blocks, Some(&mut library), &mut map))?;
        tenant.keep(&map);
        all.add(&tenant.into_stored());
    }
    all.add(&library.into_stored());
    Ok(all)
}
