//! How much the sparse index finds in data that has aged.
//!
//!   cargo run --release -p dedup --example aging -- [GENERATIONS [ROW]]
//!
//! Several machines are installed from one repository at different times, and live: files are edited in place, upgraded to versions that
//! keep some of their blocks, copied, rewritten unchanged, deleted. A garbage collector rewrites segments that are half dead, mixing
//! survivors of different ages. Contents are numbers; the index and the rule of acceptance are the crate's own. What the index finds is
//! compared with an exact index: every content in a segment that is not retired.

mod machines;
mod store;

use dedup::accept::EXTENT_COST;
use machines::{Machine, Repository};
use store::{Rule, Store, Tally};

const MACHINES: u64 = 8;
/// Generations between two installations.
const INSTALL_EVERY: u64 = 6;
/// Blocks of a batch.
const BATCH_BLOCKS: usize = 8192;

/// Steps of splitmix64: the same history in every run.
pub struct Random(pub u64);

impl Random {
    pub fn draw(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    pub fn below(&mut self, limit: u64) -> u64 {
        self.draw() % limit.max(1)
    }
}

fn main() {
    let generations = std::env::args().nth(1).map_or(48, |argument| argument.parse().expect("GENERATIONS is a number"));
    let only = std::env::args().nth(2).unwrap_or_default();
    let base = Rule {
        owners_max: 1,
        loads_max: 32,
        votes_min: 1,
        cached_segments: 12,
        extent_cost: EXTENT_COST,
        hits_in_headers: true,
        collects: true,
    };
    println!(
        "| index and rule | found of what the exact index finds | taken | loads per batch, mean (most) | records loaded per batch \
         | stored, GiB | moved, GiB | extents per GiB |"
    );
    println!("|---|---|---|---|---|---|---|---|");
    for (name, rule) in [
        ("as built", base),
        ("headers without hits", Rule { hits_in_headers: false, ..base }),
        ("every duplicate taken", Rule { extent_cost: 0, ..base }),
        ("an extent costs 1 block", Rule { extent_cost: 1, ..base }),
        ("an extent costs 4 blocks", Rule { extent_cost: 4, ..base }),
        ("2 owners per hook", Rule { owners_max: 2, ..base }),
        ("at most 8 loads", Rule { loads_max: 8, ..base }),
        ("at most 16 loads", Rule { loads_max: 16, ..base }),
        ("at most 128 loads", Rule { loads_max: 128, ..base }),
        ("loads need 2 hooks", Rule { votes_min: 2, ..base }),
        ("cache of 64 segments", Rule { cached_segments: 64, ..base }),
        ("without garbage collection", Rule { collects: false, ..base }),
    ] {
        if !name.contains(&only) {
            continue;
        }
        let (store, tally) = live(rule, generations);
        println!(
            "| {name} | {:.2} % | {:.2} % | {:.1} ({}) | {:.0} | {:.2} | {:.2} | {:.0} |",
            100.0 * tally.found as f64 / tally.exact as f64,
            100.0 * tally.taken as f64 / tally.exact as f64,
            tally.loads as f64 / tally.batches as f64,
            tally.loads_most,
            tally.records as f64 / tally.batches as f64,
            store.stored_blocks() as f64 / 262_144.0,
            tally.moved as f64 / 262_144.0,
            store.extents_per_gib(),
        );
    }
}

/// One history, of which the second half is counted.
fn live(rule: Rule, generations: u64) -> (Store, Tally) {
    let mut random = Random(1);
    let mut repository = Repository::new(&mut random);
    let mut store = Store::new(rule);
    let mut machines: Vec<Machine> = Vec::new();
    for generation in 0..generations {
        repository.release(&mut random);
        if generation % INSTALL_EVERY == 0 && (machines.len() as u64) < MACHINES {
            let (machine, writes) = Machine::install(&repository, &mut random);
            machines.push(machine);
            store.add_volume();
            destage(&mut store, machines.len() - 1, writes);
        }
        if generation == generations / 2 {
            store.tally = Tally::default();
        }
        for (number, machine) in machines.iter_mut().enumerate() {
            let writes = machine.live(&repository, &mut random);
            destage(&mut store, number, writes);
        }
        store.collect();
    }
    let tally = std::mem::take(&mut store.tally);
    (store, tally)
}

/// Writes in the order of addresses, a batch at a time; `None` discards.
fn destage(store: &mut Store, volume: usize, writes: Vec<(u64, Option<u64>)>) {
    let last: std::collections::BTreeMap<_, _> = writes.into_iter().collect();
    let writes: Vec<_> = last.into_iter().collect();
    writes.chunks(BATCH_BLOCKS).for_each(|batch| store.write(volume, batch));
}
