//! What a process keeps in memory for a volume of 1 TiB that rests.
//!
//! ```text
//!   no volume ─▶ empty ─▶ a block in each 2 MiB: its map has every page that it can have ─▶ data in runs, to so many GiB ─▶ to more
//!                           └─ after each: checkpoint, freed memory goes back to the system, resident memory is read
//! ```
//!
//! What grows with data is told for a TiB of it, from the last two steps; the index is made for the size of the volume. The rest is fixed: caches, buffers,
//! the upper pages of the map.

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
        let more = kept.resident.saturating_sub(without) as f64 / MIB as f64;
        let (index, most, after) = (kept.index / MIB, memory_of_process("VmHWM:") / MIB, began.elapsed().as_secs());
        let measured = format!(
            "{more:.1} MiB more than without it; index made for {index} MiB; {most} MiB at most up to now, after {after} s"
        );
        tell(&format!("resident memory with a volume of 1 TiB that rests, {what}"), measured, "");
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
    let mib = |bytes: u64| bytes as f64 / MIB as f64;
    // The index has its size from the beginning, and is in memory as far as it was used: all of it by then.
    let index = mib(less.index);
    let grown = (mib(more.resident) - mib(less.resident)) * SIZE as f64 / (DATA[1] - DATA[0]) as f64;
    let fixed = mib(less.resident.saturating_sub(without)) - index - grown * DATA[0] as f64 / SIZE as f64;
    let (from, to, most) = (DATA[0] / GIB, DATA[1] / GIB, memory_of_process("VmHWM:") / MIB);
    tell(
        "pinned memory for a TiB of data, and fixed",
        format!(
            "index {index:.0} + {grown:.0} MiB, extrapolated from {from} and {to} GiB; fixed {fixed:.0} MiB; the process took {most} MiB at most"
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
