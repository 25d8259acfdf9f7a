//! Cases about the index of what is stored already: it may be lost, late or wrong, and costs duplicates then, never data.

use std::time::Duration;

use super::bench::{Bench, Owner};
use crate::Durability;
use crate::segment::BLOCK;
use crate::simulation::contents::{Contents, Version};

const BLOCKS: u64 = 64;
const RUN: u64 = 16;

fn hits(owner: &Owner) -> u64 {
    owner.volume.core.reader.tally.hits.get()
}

#[test]
fn case_24_the_index_is_lost_late_or_stale() {
    let (mut late, mut again, mut moved) = (0, 0, 0);
    for seed in 2_400..2_440 {
        let bench = Bench::new(seed, BLOCKS, Durability::Remote);
        let disk = bench.disk();
        let run: Vec<Version> = Contents::default().draw(&bench.world.random, RUN as usize);
        let mut expected = vec![0; BLOCKS as usize];
        let put = |owner: &Owner, expected: &mut Vec<Version>, at: u64, versions: &[Version]| {
            bench.write(owner, at, versions).unwrap();
            expected[at as usize..at as usize + versions.len()].copy_from_slice(versions);
            assert_eq!(bench.content(owner).unwrap(), *expected, "seed {seed}");
        };
        let owner = bench.open(&disk);
        put(&owner, &mut expected, 0, &run);
        bench.kill(owner);

        // Lost: whoever opens the volume reads the headers anew, and cannot read all of them. Late: writing begins at once.
        bench.store.set_faults(300);
        let owner = (0..20).find_map(|_| bench.try_open(&disk, bench.settings).ok()).unwrap();
        put(&owner, &mut expected, RUN, &run);
        late += hits(&owner);
        bench.kill(owner);
        bench.store.set_faults(0);
        let owner = bench.open(&disk);
        bench.pass(&owner, Duration::from_secs(2));
        put(&owner, &mut expected, 2 * RUN, &run);
        again += hits(&owner);

        // Stale: what it says is moved, then deleted.
        put(&owner, &mut expected, 1, &[900, 901, 902]);
        bench.run(&owner, |volume| async move { volume.gather(1.0).await }).unwrap();
        let before = hits(&owner);
        put(&owner, &mut expected, 3 * RUN, &run);
        moved += hits(&owner) - before;
        bench.run(&owner, |volume| async move {
            volume.zero(0, BLOCKS * BLOCK as u64, true).await.unwrap();
            volume.destage().await.unwrap();
            volume.gather(1.0).await.unwrap();
        });
        expected.fill(0);
        put(&owner, &mut expected, RUN / 2, &run);
        bench.scan(&owner);
    }
    assert!(again > 0 && moved > 0, "{late} hits with a late index, {again} with it, {moved} after a move");
}
