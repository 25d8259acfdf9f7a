//! Crashes at each step of what an owner does to the store, one after the other.

use std::rc::Rc;
use std::time::Duration;

use bytes::Bytes;

use super::bench::{BLOCKS, Bench, Owner, numbers};
use crate::simulation::contents::{Version, content_of};
use crate::simulation::disk::HostDisk;
use crate::simulation::requests::{Leg, Request, Verb};
use crate::simulation::store::Unheard;
use crate::{Durability, MappedVolume, Settings};

/// What becomes of the changes that are under way when their owner dies.
const OUTCOMES: [Unheard; 3] = [Unheard::Never, Unheard::Later, Unheard::Done];

/// A volume that is open, and what it and its snapshot `s` hold.
struct Arranged {
    bench: Bench,
    disk: HostDisk,
    owner: Owner,
    content: Vec<Version>,
    snapshot: Vec<Version>,
}

/// Every object is half garbage, and the snapshot needs some of the other half.
fn arrange(seed: u64) -> Arranged {
    let mut bench = Bench::new(seed, BLOCKS, Durability::Remote);
    bench.settings = Settings { gathers: false, checkpoint_segments: 1000, ..bench.settings };
    let disk = bench.disk();
    let owner = bench.open(&disk);
    bench.write(&owner, 0, &numbers(100)).unwrap();
    for block in (0..BLOCKS).step_by(2) {
        bench.write(&owner, block, &[200 + block]).unwrap();
    }
    let taken = bench.run(&owner, |volume| async move {
        volume.snapshot("s", 0).await?;
        volume.wait_for_snapshot("s").await
    });
    taken.unwrap();
    let snapshot = bench.content(&owner).unwrap();
    bench.write(&owner, 1, &[301]).unwrap();
    bench.write(&owner, 6, &[306]).unwrap();
    bench.pass(&owner, Duration::from_secs(1));
    let content = bench.content(&owner).unwrap();
    Arranged { bench, disk, owner, content, snapshot }
}

fn changes_of(bench: &Bench, process: u64) -> Vec<Request> {
    bench.store.requests.of(process).into_iter().filter(Request::changes).collect()
}

/// Crashes an owner at each change of the store that `work` asks for, in each way that the change may come out, and has the volume opened again. The
/// answer is those changes.
fn crash_at_each_change<F: Future<Output = ()> + 'static>(
    seed: u64,
    work: impl Fn(Rc<MappedVolume>) -> F,
    is_kept: bool,
) -> Vec<Request> {
    let undisturbed = arrange(seed);
    let (bench, process) = (&undisturbed.bench, undisturbed.owner.process);
    let before = changes_of(bench, process).len();
    bench.run(&undisturbed.owner, &work);
    let changes = changes_of(bench, process).split_off(before);
    for (number, change) in changes.iter().enumerate() {
        for outcome in OUTCOMES {
            let Arranged { bench, disk, owner, content, snapshot } = arrange(seed);
            let process = owner.process;
            let working = bench.begin(process, work(owner.volume.clone()));
            bench.until("the next change", || changes_of(&bench, process).len() > before + number);
            assert!(!working.is_done());
            bench.store.set_unheard(Some(outcome));
            drop(owner);
            bench.world.kill(process);
            bench.store.set_unheard(None);

            let place = format!("seed {seed}, change {number}: {change:?}, {outcome:?}");
            // The next owner may be on another host.
            let next = bench.open(&if number % 2 == 0 { disk } else { bench.disk() });
            assert_eq!(bench.content(&next).unwrap(), content, "{place}");
            let has_snapshot = next.volume.snapshots().iter().any(|snapshot| snapshot.name == "s");
            assert!(has_snapshot || !is_kept, "{place}");
            if has_snapshot {
                assert_eq!(bench.snapshot(&next, "s").unwrap(), snapshot, "{place}");
            }
            bench.gather(&next);
            assert_eq!(bench.content(&next).unwrap(), content, "{place}");
            bench.scan(&next);
        }
    }
    changes
}

#[test]
fn case_11_a_crash_at_each_step_of_a_collection() {
    for seed in 11_000..11_003 {
        let changes = crash_at_each_change(seed, |volume| async move { volume.gather(1.0).await.map(drop).unwrap() }, true);
        let first = |verb, part: &str| changes.iter().position(|change| change.is(verb, part)).expect("every step is there");
        // A checkpoint comes before; then the copies, the checkpoint that knows of them, and the deletions.
        let last_swap = changes.iter().rposition(|change| change.verb == Verb::Swap).unwrap();
        assert!(first(Verb::Create, "/g/") < last_swap && last_swap < first(Verb::Delete, "/w/"), "{changes:#?}");
    }
}

#[test]
fn case_45_a_crash_at_each_step_of_a_checkpoint_that_lets_objects_go() {
    for seed in 45_000..45_003 {
        let work = |volume: Rc<MappedVolume>| async move {
            volume.checkpoint().await.unwrap();
            volume.delete_snapshot("s").await.unwrap();
            volume.gather(0.0).await.unwrap();
        };
        let changes = crash_at_each_change(seed, work, false);
        let count = |verb| changes.iter().filter(|change| change.verb == verb).count();
        assert!(count(Verb::Swap) >= 4 && count(Verb::Delete) >= 6, "{changes:#?}");
    }
}

/// However long the root takes.
#[test]
fn case_45_nothing_is_deleted_before_the_root_says_that_it_is_not_needed() {
    for seed in 45_100..45_110 {
        for leg in [Leg::There, Leg::Back] {
            let Arranged { bench, owner, content, .. } = arrange(seed);
            bench.checkpoint(&owner);
            let process = owner.process;
            let hold = bench.store.hold(leg, move |request| request.process == process && request.verb == Verb::Swap);
            let deletions = || bench.store.requests.of(process).iter().filter(|request| request.verb == Verb::Delete).count();
            let before = deletions();
            let volume = owner.volume.clone();
            let collecting = bench.begin(process, async move { volume.gather(1.0).await });
            bench.until("the swap", || hold.has_begun());
            bench.pass(&owner, Duration::from_secs(60));
            assert_eq!(deletions(), before, "seed {seed}: something is deleted before the root was swapped");
            assert_eq!(bench.content(&owner).unwrap(), content, "seed {seed}");
            hold.release();
            bench.end(&collecting).unwrap();
            assert!(deletions() > before, "seed {seed}");
            assert_eq!(bench.content(&owner).unwrap(), content, "seed {seed}");
            bench.scan(&owner);
        }
    }
}

/// What is done at some moment while the log is brought into the pool.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Moment {
    Taken,
    /// And then the owner is killed.
    TakenAndKilled,
    /// And another one is deleted at the same time.
    TakenAndDeleted,
}

#[test]
fn case_14_a_snapshot_at_each_step_of_bringing_the_log_into_the_pool() {
    let mut steps = 0;
    for moment in [Moment::Taken, Moment::TakenAndKilled, Moment::TakenAndDeleted] {
        for step in 0.. {
            let is_last = snapshot_at(step, moment);
            steps += 1;
            if is_last {
                break;
            }
        }
    }
    assert!(steps > 150, "{steps} steps");
}

/// True if everything was in the pool before that step.
fn snapshot_at(step: u64, moment: Moment) -> bool {
    let mut bench = Bench::new(14_000 + step, BLOCKS, Durability::Local);
    bench.settings = Settings { segment_bytes: 32 << 20, slice: 1, ..bench.settings };
    let disk = bench.disk();
    let owner = bench.open(&disk);
    bench.run(&owner, |volume| async move { volume.snapshot("old", 0).await }).unwrap();
    bench.write(&owner, 0, &numbers(100)).unwrap();
    let volume = owner.volume.clone();
    let destaging = bench.begin(owner.process, async move {
        volume.destage().await.unwrap();
        volume.checkpoint().await.unwrap();
    });
    for _ in 0..step {
        if !destaging.is_done() {
            bench.steps(1);
        }
    }
    let is_last = destaging.is_done();
    let volume = owner.volume.clone();
    let deleting = (moment == Moment::TakenAndDeleted)
        .then(|| bench.begin(owner.process, async move { volume.delete_snapshot("old").await }));
    let volume = owner.volume.clone();
    let taken = bench.run(&owner, |_| async move {
        // What comes right behind it is not in it.
        let taking = volume.snapshot("s", 0);
        let writing = volume.write(0, Bytes::from(content_of(900)));
        futures_util::future::join(taking, writing).await
    });
    assert_eq!(taken, (Ok(()), Ok(())), "step {step}");
    let mut expected = numbers(100);
    expected[0] = 900;
    let owner = if moment == Moment::TakenAndKilled {
        bench.kill(owner);
        bench.open(&disk)
    } else {
        owner
    };
    assert_eq!(bench.content(&owner).unwrap(), expected, "step {step}, {moment:?}");
    bench.run(&owner, |volume| async move { volume.wait_for_snapshot("s").await }).unwrap();
    assert_eq!(bench.snapshot(&owner, "s").unwrap(), numbers(100), "step {step}, {moment:?}");
    if let Some(deleting) = deleting {
        bench.end(&deleting).unwrap();
    }
    let has_old = owner.volume.snapshots().iter().any(|snapshot| snapshot.name == "old");
    assert_eq!(has_old, moment != Moment::TakenAndDeleted, "step {step}, {moment:?}");
    bench.scan(&owner);
    assert_eq!(bench.snapshot(&owner, "s").unwrap(), numbers(100), "step {step}, {moment:?}");
    is_last
}
