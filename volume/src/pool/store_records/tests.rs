//! The catalogue in a store, against a model, on a store that loses answers and requests.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use backends::segments::memory::MemoryStore;
use backends::segments::{SegmentStore, StoreFuture};
use backends::{Layout, VolumeSpec};
use proptest::prelude::*;

use super::*;

/// Swaps get no answer at times, whether or not they took effect.
struct Lossy {
    store: MemoryStore,
    state: AtomicU64,
}

impl SegmentStore for Lossy {
    backends::pass_on!(store: create, read, delete, list, read_root);

    fn swap<'a>(&'a self, name: &'a str, expected: Option<&'a Tag>, content: Bytes) -> StoreFuture<'a, Tag> {
        Box::pin(async move {
            let state = self.state.load(Ordering::Relaxed);
            self.state.store(state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1), Ordering::Relaxed);
            match state >> 60 {
                0 | 1 => Err(StoreError::Unknown("the request was lost".to_owned())),
                2 | 3 => {
                    self.store.swap(name, expected, content).await?;
                    Err(StoreError::Unknown("the answer was lost".to_owned()))
                }
                _ => self.store.swap(name, expected, content).await,
            }
        })
    }
}

fn records(seed: u64) -> StoreRecords {
    StoreRecords::new("p", Arc::new(Lossy { store: MemoryStore::new(), state: AtomicU64::new(seed) }))
}

fn record(name: &str) -> VolumeRecord {
    let spec = VolumeSpec { size: 4096, block_size: 512, layout: Layout::Mapped, policy: None, tenant: None, wrapped_key: None };
    VolumeRecord::new(name, &spec)
}

#[derive(Clone, Debug)]
enum Step {
    Add(u8),
    AddInVain(u8),
    Rename(u8, u8),
    Retire(u8),
}

fn step() -> impl Strategy<Value = Step> {
    let name = 0..4u8;
    prop_oneof![
        name.clone().prop_map(Step::Add),
        name.clone().prop_map(Step::AddInVain),
        (name.clone(), name.clone()).prop_map(|(from, to)| Step::Rename(from, to)),
        name.prop_map(Step::Retire),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 64, ..ProptestConfig::default() })]

    #[test]
    fn it_is_what_a_map_is_and_forgets_no_group(steps in prop::collection::vec(step(), 0..20), seed in any::<u64>()) {
        let records = records(seed);
        let mut model: BTreeMap<String, Uuid> = BTreeMap::new();
        let mut left = std::collections::BTreeSet::new();
        let named = |number: u8| format!("v{number}");
        for step in steps {
            match step {
                Step::Add(number) => {
                    let record = record(&named(number));
                    let added = records.add(&record, &|| Ok(()));
                    prop_assert_eq!(added.is_ok(), !model.contains_key(&record.name));
                    model.entry(record.name).or_insert(record.uuid);
                }
                Step::AddInVain(number) => {
                    let record = record(&named(number));
                    let refused = || Err(PoolError::Backend("no".to_owned()));
                    prop_assert!(records.add(&record, &refused).is_err());
                    if !model.contains_key(&record.name) {
                        left.insert(record.uuid);
                    }
                }
                Step::Rename(from, to) => {
                    let renamed = records.rename(&named(from), &named(to));
                    let possible = model.contains_key(&named(from)) && (from == to || !model.contains_key(&named(to)));
                    prop_assert_eq!(renamed.is_ok(), possible);
                    if possible && let Some(uuid) = model.remove(&named(from)) {
                        model.insert(named(to), uuid);
                    }
                }
                Step::Retire(number) => {
                    let Ok(record) = records.get(&named(number)) else { continue };
                    records.retire(&record).unwrap();
                    model.remove(&record.name);
                    left.insert(record.uuid);
                }
            }
            let listed: BTreeMap<String, Uuid> =
                records.list().unwrap().into_iter().map(|record| (record.name, record.uuid)).collect();
            prop_assert_eq!(&listed, &model);
            let leaving: std::collections::BTreeSet<Uuid> = records.leaving().unwrap().into_iter().map(|left| left.volume).collect();
            prop_assert_eq!(&leaving, &left);
        }
    }
}

#[test]
fn what_is_retired_is_swept_and_what_is_being_made_is_not() {
    let records = records(0);
    let group = Some(blockdev::random::uuid());
    let (kept, deleted) = (record("kept"), VolumeRecord { group, ..record("deleted") });
    let staged = record("staged");
    records.add(&kept, &|| Ok(())).unwrap();
    records.add(&deleted, &|| Ok(())).unwrap();
    records.retire(&deleted).unwrap();
    let swept = std::cell::RefCell::new(Vec::new());
    let sweep = |left| {
        swept.borrow_mut().push(left);
        Ok(())
    };
    let make = || records.clear(&sweep);
    records.add(&staged, &make).unwrap();
    assert_eq!(swept.borrow()[..], [Leaving::of(&deleted, false)]);
    assert_eq!(records.list().unwrap().len(), 2);

    // Long after, nothing more can come of them.
    let age = |content: &mut Content| {
        content.leaving.values_mut().for_each(|leaving| leaving.since = 0);
        Ok(())
    };
    let stuck = record("stuck");
    let in_vain = records.add(&stuck, &|| records.change(age).and_then(|()| records.clear(&sweep)));
    assert!(in_vain.is_err(), "what was cleared away must not be published: {in_vain:?}");
    assert!(records.leaving().unwrap().is_empty());
    assert!(swept.borrow().contains(&Leaving::of(&stuck, true)));
}
