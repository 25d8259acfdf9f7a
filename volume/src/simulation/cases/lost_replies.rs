//! Requests that take effect, and of which nobody hears; or that nobody hears of, and that do not.

use std::cell::Cell;
use std::time::Duration;

use super::bench::{BLOCKS, Bench, Owner, numbers};
use crate::environment::Environment;
use crate::simulation::VOLUME;
use crate::simulation::requests::{Hold, Leg, Request, Verb};
use crate::simulation::world::{NOBODY, SimulatedEnvironment};
use crate::{Durability, MappedVolume, Settings, VolumeError};

const MOMENT: Duration = Duration::from_millis(10);

/// The volume is written to, checkpointed and collected.
fn live(bench: &Bench, owner: &Owner) {
    for round in 1..4 {
        bench.write(owner, 0, &numbers(round * 100)).unwrap();
        bench.write(owner, 1, &[round * 1000]).unwrap();
        bench.checkpoint(owner);
    }
    bench.gather(owner);
}

/// The change of the store with this number.
fn change(number: usize) -> impl Fn(&Request) -> bool {
    let count = Cell::new(0);
    move |request| {
        count.set(count.get() + usize::from(request.changes()));
        request.changes() && count.get() > number
    }
}

/// Some time after a request is held, it goes on.
async fn release_later(hold: Hold, environment: SimulatedEnvironment) {
    while !hold.has_begun() {
        environment.sleep(MOMENT).await;
    }
    environment.sleep(10 * MOMENT).await;
    hold.release_and_lose();
}

fn bench(seed: u64) -> Bench {
    let mut bench = Bench::new(seed, BLOCKS, Durability::Remote);
    bench.settings = Settings { gathers: false, checkpoint_segments: 1000, ..bench.settings };
    bench
}

#[test]
fn case_06_the_reply_to_each_change_of_the_store_is_lost() {
    for seed in 600..602 {
        let undisturbed = bench(seed);
        let owner = undisturbed.open(&undisturbed.disk());
        live(&undisturbed, &owner);
        let changes: Vec<Request> = undisturbed.store.requests.of(owner.process).into_iter().filter(Request::changes).collect();
        for (number, change_there) in changes.iter().enumerate() {
            // It was done, or it comes through only long after its caller has asked again.
            for leg in [Leg::Back, Leg::Unheard] {
                let bench = bench(seed);
                let hold = bench.store.hold(leg, change(number));
                bench.begin(NOBODY, release_later(hold.clone(), bench.environment()));
                let owner = bench.open(&bench.disk());
                live(&bench, &owner);
                let place = format!("seed {seed}, change {number}: {change_there:?}, {leg:?}");
                assert!(hold.has_begun(), "{place}: it was not asked for");
                assert_eq!(owner.volume.failed(), None, "{place}");
                let mut expected = numbers(300);
                expected[1] = 3000;
                assert_eq!(bench.content(&owner).unwrap(), expected, "{place}");
                if leg == Leg::Back {
                    bench.scan(&owner);
                }
                bench.pass(&owner, 100 * MOMENT);
                bench.kill(owner);
                let next = bench.open(&bench.disk());
                assert_eq!(bench.content(&next).unwrap(), expected, "{place}");
                // What came through late is removed by whoever opens the volume next.
                bench.scan(&next);
            }
        }
        assert!(changes.len() > 15, "{changes:#?}");
    }
}

/// The swap of a checkpoint was done, its reply is lost, and when its owner looks another one has swapped on top.
#[test]
fn case_32_the_reply_to_a_checkpoint_is_lost_and_another_owner_has_swapped_on_top() {
    for seed in 3_200..3_210 {
        for (leg, is_lost) in [(Leg::There, false), (Leg::There, true), (Leg::Back, false), (Leg::Back, true)] {
            let place = format!("seed {seed}, {leg:?}, lost: {is_lost}");
            let bench = bench(seed);
            let first = bench.open(&bench.disk());
            bench.write(&first, 0, &numbers(100)).unwrap();
            bench.checkpoint(&first);
            bench.write(&first, 0, &numbers(200)).unwrap();
            let process = first.process;
            let hold = bench.store.hold(leg, move |request| request.process == process && request.is(Verb::Swap, "/root"));
            let volume = first.volume.clone();
            let collecting = bench.begin(process, async move { volume.gather(1.0).await.map(drop) });
            bench.until("the swap", || hold.has_begun());

            let second = bench.open(&bench.disk());
            assert_eq!(bench.content(&second).unwrap(), numbers(200), "{place}");
            bench.write(&second, 0, &numbers(300)[..8]).unwrap();
            bench.checkpoint(&second);
            let deletions = || {
                let all = bench.store.requests.of(process);
                all.into_iter().filter(|request| request.verb == Verb::Delete && !request.name.contains("/m/")).count()
            };
            let before = deletions();
            if is_lost {
                hold.release_and_lose()
            } else {
                hold.release()
            }
            assert_eq!(bench.end(&collecting), Err(VolumeError::Fenced), "{place}");
            assert_eq!(deletions(), before, "{place}: somebody deletes on the strength of a swap that he did not make");
            assert!(bench.write(&first, 0, &[900]).is_err(), "{place}");
            bench.kill(first);
            let expected = [&numbers(300)[..8], &numbers(200)[8..]].concat();
            assert_eq!(bench.content(&second).unwrap(), expected, "{place}");
            bench.kill(second);
            // It removes what the first one added when it was replaced already.
            let third = bench.open(&bench.disk());
            assert_eq!(bench.content(&third).unwrap(), expected, "{place}");
            bench.scan(&third);
        }
    }
}

/// The same with the swap by which a volume is claimed.
#[test]
fn case_32_the_reply_to_a_claim_is_lost_and_another_owner_has_claimed_on_top() {
    for seed in 3_250..3_260 {
        for leg in [Leg::There, Leg::Back] {
            let place = format!("seed {seed}, {leg:?}");
            let bench = bench(seed);
            let first = bench.open(&bench.disk());
            bench.write(&first, 0, &numbers(100)).unwrap();
            bench.kill(first);
            let (process, parts) = bench.parts(&bench.disk());
            let hold = bench.store.hold(leg, move |request| request.process == process && request.is(Verb::Swap, "/root"));
            let settings = bench.settings;
            let claiming = bench.begin(process, async move { MappedVolume::open(&parts, VOLUME, settings).await.err() });
            bench.until("the claim", || hold.has_begun());
            let second = bench.open(&bench.disk());
            bench.write(&second, 0, &numbers(200)).unwrap();
            hold.release_and_lose();
            assert_eq!(bench.end(&claiming), Some(VolumeError::Raced), "{place}");
            bench.write(&second, 0, &numbers(300)).unwrap();
            assert_eq!(bench.content(&second).unwrap(), numbers(300), "{place}");
            bench.scan(&second);
        }
    }
}
