//! How fast one thread reduces and reads back.
//!
//!   cargo run --release -p dedup --example speed -- [MIB] [FOLDER…]
//!
//! The data resembles an image of a system: the files of the folders (default: /usr/bin, /usr/lib, /usr/share), mixed, each padded to whole
//! blocks, MIB of them in all (default: 256). The speed of destaging is given by the wall clock and by the thread's time on a processor, medians of
//! five rounds; they differ where other programs run. Decoding is by the wall clock: measure on a quiet machine.

use blockdev::clock::monotonic;
use dedup::body::{Body, FrameReader, FrameRecord};
use dedup::frame::{Compression, Packing};
use dedup::hash::{BlockHash, Domain, Hasher};
use dedup::index::{BlockRecord, Index, Plan, Search, Settings};
use dedup::location::{LengthClass, Location, SegmentHandle, Spot, UNIT_LEN};
use dedup::pack::{Batch, Packer, hash_blocks};
use dedup::seal::{Opener, Sealed, Sealer};
use dedup::{BLOCK_LEN, Block};
use std::path::{Path, PathBuf};
use std::time::Duration;

const MIB: usize = 1 << 20;
/// Blocks of a batch: 32 MiB before reduction.
const BATCH_BLOCKS: usize = 32 * MIB / BLOCK_LEN;
const ROUNDS: usize = 5;
const READS: usize = 20_000;
/// As for 1 TiB of unique blocks, so that lookups miss the processor's caches.
const UNIQUE_BYTES: u64 = 1 << 40;

fn main() {
    let mut arguments = std::env::args().skip(1);
    let mib: usize = arguments.next().map_or(256, |argument| argument.parse().expect("MIB is a number"));
    let mut folders: Vec<PathBuf> = arguments.map(PathBuf::from).collect();
    if folders.is_empty() {
        folders = ["/usr/bin", "/usr/lib", "/usr/share"].map(PathBuf::from).to_vec();
    }
    let image = image(&folders, mib * MIB / BLOCK_LEN);
    println!("{} MiB of files", image.len() * BLOCK_LEN / MIB);
    println!(
        "| packing | destage, MiB/s of wall clock | MiB/s of processor time | reduction | decode of one block, µs p50 | p99 |"
    );
    println!("|---|---|---|---|---|---|");
    for (name, compression, frame_blocks) in [
        ("lz4, 16 KiB", Compression::Lz4, 4),
        ("zstd-1, 16 KiB", Compression::Zstd { level: 1 }, 4),
        ("lz4, 64 KiB", Compression::Lz4, 16),
        ("zstd-1, 64 KiB", Compression::Zstd { level: 1 }, 16),
        ("zstd-3, 64 KiB", Compression::Zstd { level: 3 }, 16),
    ] {
        measure(name, &image, Packing { compression, frame_blocks });
    }
}

fn measure(name: &str, image: &[Block], packing: Packing) {
    let (mut walls, mut processors) = (Vec::new(), Vec::new());
    let mut segments = Vec::new();
    for _ in 0..ROUNDS {
        let (wall, processor, written) = destage(image, packing);
        walls.push(wall);
        processors.push(processor);
        segments = written;
    }
    let speed = |times: &mut Vec<Duration>| {
        times.sort_unstable();
        (image.len() * BLOCK_LEN / MIB) as f64 / times[ROUNDS / 2].as_secs_f64()
    };
    let (wall, processor) = (speed(&mut walls), speed(&mut processors));
    let stored: usize = segments.iter().map(|segment| segment.sealed.body.len()).sum();
    let reduction = (image.len() * BLOCK_LEN) as f64 / stored as f64;
    let mut times = read_back(&segments);
    times.sort_unstable();
    let micros = |permille: usize| times[times.len() * permille / 1000].as_secs_f64() * 1e6;
    println!("| {name} | {wall:.0} | {processor:.0} | {reduction:.2}× | {:.1} | {:.1} |", micros(500), micros(990));
}

struct Segment {
    opener: Opener,
    sealed: Sealed,
    frames: Vec<FrameRecord>,
}

/// How long this thread has been on a processor.
fn processor_time() -> Duration {
    let text = std::fs::read_to_string("/proc/thread-self/schedstat").expect("Linux says how long a thread ran");
    Duration::from_nanos(text.split(' ').next().and_then(|nanos| nanos.parse().ok()).expect("the first word is nanoseconds"))
}

/// Everything a batch goes through: zeroes, hashes, lookup, frames, seal. By the wall clock, and on the processor.
fn destage(image: &[Block], packing: Packing) -> (Duration, Duration, Vec<Segment>) {
    let (domain, key) = (Domain([1; 16]), [2; 32]);
    let (hasher, sealer) = (Hasher::new(&key, domain), Sealer::encrypting(domain, &key));
    let (mut index, mut packer) = (filled_index(), Packer::default());
    let (mut records, mut segments) = (Vec::new(), Vec::new());
    let (mut wall, mut processor) = (Duration::ZERO, Duration::ZERO);
    let mut start = 0;
    while start < image.len() {
        let (begun, begun_processor) = (monotonic(), processor_time());
        let end = (start + BATCH_BLOCKS).min(image.len());
        let hashes = hash_blocks(&hasher, &image[start..end]);
        let mut search = Search::new(hashes.distinct());
        let found = loop {
            match index.lookup(&mut search) {
                Plan::Found(found) => break found,
                Plan::Load(load) => load.iter().for_each(|segment| {
                    let records: Option<&Vec<BlockRecord>> = records.get(segment.get() as usize);
                    records.into_iter().for_each(|records| index.loaded(&mut search, *segment, records));
                }),
            }
        };
        let batch = Batch::with(hashes, (start as u64..).zip(&image[start..end]));
        let hits = batch.accept(&found, dedup::accept::EXTENT_COST, |_| false);
        let mut body = Body::new(32 * MIB);
        let packed = packer.pack(&batch, &hits, packing, &mut body);
        start += packed.taken;
        let id = (segments.len() as u64).to_le_bytes();
        let frames = body.frames().to_vec();
        let sealed = sealer.seal(&id, &[3; 32], &[0; 200_000], body).expect("sealing works");
        let handle = SegmentHandle::new(segments.len() as u32).expect("few segments");
        let own = packed.records(handle);
        index.hook(handle, &own);
        wall += monotonic() - begun;
        processor += processor_time() - begun_processor;
        let opener = sealer.opener(&id, &sealed.seal).expect("the key is right");
        segments.push(Segment { opener, sealed, frames });
        records.push(own);
    }
    (wall, processor, segments)
}

/// As full as it is meant to be, of hooks that lead nowhere.
fn filled_index() -> Index {
    let mut index = Index::new(Settings::for_unique_bytes(UNIQUE_BYTES));
    let spot = Spot::new(0, 0, LengthClass(0)).expect("zero fits");
    let nowhere = SegmentHandle::new((1 << 30) - 1).expect("30 bits");
    let location = Location { segment: nowhere, spot };
    let mut state = 1;
    for _ in 0..UNIQUE_BYTES / BLOCK_LEN as u64 / 64 {
        let word = u128::from(next(&mut state)) << 64 | u128::from(next(&mut state) & !63);
        index.hook(nowhere, &[BlockRecord { hash: BlockHash(word.to_le_bytes()), location }]);
    }
    index
}

/// Opens, unpacks and copies out one block of a frame anywhere, many times.
fn read_back(segments: &[Segment]) -> Vec<Duration> {
    let mut reader = FrameReader::default();
    let mut out = [0; BLOCK_LEN];
    let mut state = 7;
    let mut read = |_| {
        let segment = &segments[next(&mut state) as usize % segments.len()];
        let frame = segment.frames[next(&mut state) as usize % segment.frames.len()];
        let spot = frame.spot((next(&mut state) % u64::from(frame.blocks)) as u8).expect("the frame has this block");
        let stored = &segment.sealed.body[frame.unit as usize * UNIT_LEN..];
        let begun = monotonic();
        reader.read_block(&segment.opener, spot, stored, &mut out).expect("it was sealed like this");
        monotonic() - begun
    };
    (0..READS / 10).for_each(|number| {
        read(number);
    });
    (0..READS).map(read).collect()
}

/// Files of the folders, in an order without meaning, until there are enough blocks.
fn image(folders: &[PathBuf], blocks_max: usize) -> Vec<Block> {
    let mut files = Vec::new();
    folders.iter().for_each(|folder| collect(folder, &mut files));
    files.sort_by_cached_key(|path| *blake3::hash(path.as_os_str().as_encoded_bytes()).as_bytes());
    let mut image = Vec::with_capacity(blocks_max);
    for path in files {
        let Ok(mut content) = std::fs::read(path) else { continue };
        content.resize(content.len().next_multiple_of(BLOCK_LEN), 0);
        image.extend_from_slice(content.as_chunks().0);
        if image.len() >= blocks_max {
            break;
        }
    }
    image.truncate(blocks_max);
    image
}

fn collect(folder: &Path, files: &mut Vec<PathBuf>) {
    for entry in std::fs::read_dir(folder).into_iter().flatten().flatten() {
        match entry.file_type() {
            Ok(kind) if kind.is_dir() => collect(&entry.path(), files),
            Ok(kind) if kind.is_file() => files.push(entry.path()),
            _ => {}
        }
    }
}

fn next(state: &mut u64) -> u64 {
    *state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let mut z = *state;
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}
