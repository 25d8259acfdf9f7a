//! What a process keeps in memory for a volume of 1 TiB that rests.
//!
//! ```text
//!   no volume ─▶ empty ─▶ a block in each 2 MiB: its map has every page that it can have ─▶ data in runs, to so many GiB ─▶ to more
//!                           └─ after each: checkpoint, freed memory goes back to the system, resident memory is read
//! ```
//!
//! What is the same with more data is fixed: caches, buffers, the map's upper pages. What grows is told for a TiB of data by the last two steps.

use std::time::Duration;

use crate::rig::{BLOCK, GIB, MIB, Open, Random};
use crate::{in_directory, memory_of_process, now, tell};

const SIZE: u64 = 1024 * GIB;
const LEAF: u64 = 2 * MIB;
/// Caches are full with the first of them.
const DATA: [u64; 2] = [12 * GIB, 36 * GIB];
/// Buffers that nothing needs any more are let go.
const REST: Duration = Duration::from_secs(5);

/// Bytes.
struct Kept {
    resident: u64,
    /// By the engine's own count.
    index: u64,
}

/// Blocks are zeroes but for 64 bytes each, so that it takes some 4 GiB of disk, and 1 GiB of `/dev/shm` for the log.
pub fn measure() {
    let folder = tempfile::tempdir().expect("a folder");
    let log = tempfile::tempdir_in("/dev/shm").expect("a folder in memory");
    let rig = in_directory(folder.path(), &log.path().join("log"), GIB, false);
    rig.create(SIZE);
    let without = resident();
    let open = rig.open();
    let began = now();
    let mut random = Random(11);
    let told = |what: &str, kept: &Kept| {
        let (more, index) = ((kept.resident.saturating_sub(without)) as f64 / MIB as f64, kept.index as f64 / MIB as f64);
        let measured = format!(
            "{more:.1} MiB more than without it, of which index {index:.2}; after {:.0} s",
            began.elapsed().as_secs_f64()
        );
        tell(&format!("resident memory of a volume of 1 TiB that rests, {what}"), measured, "");
    };
    let mut kept = vec![at_rest(&open)];
    told("empty", &kept[0]);
    write(&open, (0..SIZE / LEAF).map(|leaf| (leaf * LEAF, BLOCK)), &mut random);
    kept.push(at_rest(&open));
    told(&format!("{} GiB in single blocks, one under each page of its map", SIZE / LEAF * BLOCK / GIB), &kept[1]);
    let mut written = 0;
    for data in DATA {
        // Past the single blocks.
        write(&open, (written / MIB..data / MIB).map(|run| (run * LEAF + MIB, MIB)), &mut random);
        written = data;
        kept.push(at_rest(&open));
        told(&format!("{} GiB more, in runs of 1 MiB", data / GIB), &kept[kept.len() - 1]);
    }
    let [.., less, more] = &kept[..] else { return };
    let of_data = (DATA[1] - DATA[0]) as f64;
    let per_tib = |grown: f64| grown * (1024 * GIB) as f64 / of_data / MIB as f64;
    let grown = per_tib(more.resident as f64 - less.resident as f64);
    let fixed = (less.resident.saturating_sub(without)) as f64 / MIB as f64 - grown * DATA[0] as f64 / (1024 * GIB) as f64;
    tell(
        "pinned memory for each TiB of data, and fixed",
        format!(
            "{grown:.0} MiB (of which index {:.0}) + {fixed:.0} MiB, extrapolated from {} and {} GiB; at most {} MiB resident",
            per_tib(more.index as f64 - less.index as f64),
            DATA[0] / GIB,
            DATA[1] / GIB,
            memory_of_process("VmHWM:") / MIB
        ),
        "≤ 96 MiB + 192 MiB",
    );
}

fn write(open: &Open, places: impl Iterator<Item = (u64, u64)>, random: &mut Random) {
    open.load(places.map(|(offset, len)| {
        let mut content = vec![0; len as usize];
        content.chunks_mut(BLOCK as usize).for_each(|block| block[..64].copy_from_slice(&random.bytes(64)));
        (blockdev::Op::Write { fua: false }, offset, len, content)
    }));
}

fn at_rest(open: &Open) -> Kept {
    open.device.settle().expect("it settles");
    std::thread::sleep(REST);
    let index = open.device.usage().expect("its thread answers").index;
    Kept { resident: resident(), index }
}

/// Without what the allocator merely has not given back.
fn resident() -> u64 {
    // SAFETY: it takes no pointers, and may be called at any time.
    unsafe { libc::malloc_trim(0) };
    memory_of_process("VmRSS:")
}
