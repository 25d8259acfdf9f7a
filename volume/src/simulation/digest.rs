//! A digest of everything that happens in a world: each step and its time, each request to the store, and what disks read and write.

use std::cell::RefCell;

thread_local! {
    /// `None`: nobody wants to know.
    static DIGEST: RefCell<Option<blake3::Hasher>> = const { RefCell::new(None) };
}

/// Something happened.
pub fn note(parts: &[&[u8]]) {
    DIGEST.with_borrow_mut(|digest| {
        let Some(digest) = digest else { return };
        for part in parts {
            digest.update(&(part.len() as u64).to_le_bytes());
            digest.update(part);
        }
    });
}

/// The digest of what happens in `work`.
fn digest_of(work: impl FnOnce()) -> blake3::Hash {
    DIGEST.set(Some(blake3::Hasher::new()));
    work();
    DIGEST.take().expect("it was set").finalize()
}

/// Some of each kind of schedule, with and without encryption.
#[test]
fn one_seed_gives_one_schedule() {
    let mut digests = std::collections::BTreeSet::new();
    for seed in 70_000..70_040 {
        let run = || {
            super::run(seed, false).unwrap_or_else(|why| panic!("seed {seed}: {why}"));
        };
        let [first, second] = [digest_of(run), digest_of(run)];
        assert_eq!(first, second, "seed {seed} does not give the same schedule twice");
        digests.insert(*first.as_bytes());
    }
    assert_eq!(digests.len(), 40, "different seeds give different schedules");
}
