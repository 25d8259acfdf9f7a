//! Some of what the engine must survive, by the names it was given when it was designed. Each case runs fixed seeds, and sees that what it is
//! about did happen: schedules at random here, and arranged ones beside.

mod at_rest;
mod bench;
mod claims;
mod clones;
mod collections;
mod crashes;
mod full;
mod hosts;
mod interleavings;
mod logs;
mod lost_replies;
mod objects;
mod owners;
mod reclaim;
mod reduction;
mod scale;

use crate::simulation::seen::Seen;
use crate::simulation::{family, run, together};

fn schedules(seeds: std::ops::Range<u64>) -> Seen {
    let mut seen = Seen::default();
    for seed in seeds {
        seen += run(seed, false).unwrap_or_else(|why| panic!("seed {seed}: {why}"));
    }
    seen
}

fn families(seeds: std::ops::Range<u64>) -> Seen {
    let mut seen = Seen::default();
    for seed in seeds {
        seen += family::run(seed, false).unwrap_or_else(|why| panic!("family {seed}: {why}"));
    }
    seen
}

#[test]
fn case_11_schedules_crash_while_they_collect() {
    let seen = schedules(1_100..1_140);
    assert!(seen.collections > 0 && seen.forwards > 0 && seen.scans > 0, "{seen}");
}

#[test]
fn case_12_schedules_find_duplicates_while_they_collect() {
    let seen = schedules(1_200..1_240);
    assert!(seen.hits > 0 && seen.blocks_moved > 0, "{seen}");
}

#[test]
fn case_14_schedules_make_and_delete_snapshots_while_the_log_is_brought_into_the_pool() {
    let seen = schedules(1_400..1_440);
    assert!(seen.snapshots_made > 0 && seen.snapshots_deleted > 0 && seen.snapshots_read > 0 && seen.rollbacks > 0, "{seen}");
}

#[test]
fn case_31_schedules_take_volumes_from_owners_that_go_on() {
    let seen = schedules(3_100..3_140);
    assert!(seen.takeovers > 0 && seen.hits > 0 && seen.collections > 0, "{seen}");
}

#[test]
fn case_40_schedules_clone_while_they_delete() {
    let seen = families(4_000..4_040);
    assert!(seen.clones > 0 && seen.refusals > 0 && seen.snapshots_deleted > 0 && seen.volumes_deleted > 0, "{seen}");
}

#[test]
fn case_41_schedules_collect_what_clones_read() {
    let seen = families(4_100..4_160);
    assert!(seen.foreign_forwards > 0 && seen.flattened > 0 && seen.scans > 0, "{seen}");
}

#[test]
fn volumes_of_one_group_come_and_go_while_others_are_used() {
    let mut seen = Seen::default();
    for seed in 100..160 {
        seen += together::run(seed, false).unwrap_or_else(|why| panic!("group {seed}: {why}"));
    }
    assert!(seen.joined > 0 && seen.left > 0 && seen.clones > 0 && seen.takeovers > 0 && seen.scans > 0, "{seen}");
}

/// A reply was lost, the next try found the store full, and the root came to be all the same.
#[test]
fn a_clone_that_may_have_been_made_keeps_its_pin() {
    schedules(1_795_966_626_704_852..1_795_966_626_704_853);
}

/// A clone's reader met an object that its ancestor had moved and forgotten; another reader had found out where the blocks are just before.
#[test]
fn what_another_reader_has_found_is_not_missing() {
    schedules(1_796_103_066_632_273..1_796_103_066_632_274);
}

/// A collection had seen pages of a damaged object, and read none of them; when the object was put back, the first look at it still failed.
#[test]
fn what_is_put_back_reads_right_at_once() {
    schedules(1_796_209_493_950_735..1_796_209_493_950_736);
}

#[test]
fn case_49_schedules_use_handles_again() {
    let seen = schedules(4_900..4_940);
    assert!(seen.handles_released > 0 && seen.forwards > 0, "{seen}");
}
