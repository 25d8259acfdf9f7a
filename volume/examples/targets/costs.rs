//! Requests to the store that a snapshot and a clone cost, by kind.

use std::time::Duration;

use blockdev::Op;
use uuid::Uuid;
use volume::Settings;

use crate::rig::{BLOCK, GIB, MIB, Open, Random, Rig};
use crate::tell;

/// What a commit leaves for later, as deleting the checkpoint before, has been done by then.
const AFTERMATH: Duration = Duration::from_millis(500);
const TARGET: &str = "one PUT and one swap";

pub fn measure() {
    // A collection would ask for something meanwhile.
    let rig = Rig::in_memory(Settings { gathers: false, ..Settings::default() });
    rig.create(1024 * GIB);
    let open = rig.open();
    let mut random = Random(10);
    open.write_all((0..64).map(|index| (index * GIB, MIB)), &mut random);
    open.device.settle().expect("it settles");
    tell(
        "requests of a snapshot of 1 TiB, nothing written since the last checkpoint",
        requests(&rig, || commit(&open, "a")),
        TARGET,
    );
    let written = requests(&rig, || {
        open.write_all([(GIB, BLOCK)].into_iter(), &mut random);
        open.load([(Op::Flush, 0, 0, Vec::new())].into_iter());
        commit(&open, "b");
    });
    tell("requests of a snapshot of 1 TiB and of a block written before it", written, TARGET);
    let clone = |number: u128| rig.options.clone_snapshot("b", Uuid::from_u128(number)).map(drop).expect("a clone");
    tell("requests of a clone of it", requests(&rig, || clone(10)), TARGET);
    tell("requests of a second clone of it", requests(&rig, || clone(11)), TARGET);
}

fn commit(open: &Open, snapshot: &str) {
    open.device.snapshot(snapshot, 0).expect("a snapshot");
    open.device.wait_for_snapshot(snapshot).expect("it is committed");
}

/// What the store was asked for meanwhile.
fn requests(rig: &Rig, work: impl FnOnce()) -> String {
    std::thread::sleep(AFTERMATH);
    let before = rig.store.requests();
    work();
    std::thread::sleep(AFTERMATH);
    let [puts, swaps, reads, deletes]: [u64; 4] = std::array::from_fn(|kind| rig.store.requests()[kind] - before[kind]);
    format!("{puts} PUTs, {swaps} swaps; {reads} reads, {deletes} deletes")
}
