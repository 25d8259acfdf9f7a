//! What every segment store must do. Tests of stores call [`run`] with a way to make fresh ones.
//!
//! Fixed cases first, then races from several threads and several handles, then random sequences against [`MemoryStore`].

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;

use bytes::Bytes;
use proptest::prelude::*;
use proptest::test_runner::{Config, TestCaseError, TestRunner};

use super::drive::{block_on, join_all};
use super::memory::MemoryStore;
use super::{Listed, OBJECT_LEN_MAX, ROOT_LEN_MAX, SegmentStore, StoreError, Tag};

const MIB: usize = 1 << 20;
/// More than stores give in one answer to a listing.
const MANY: usize = 1100;
const RACERS: usize = 8;

/// What to run.
#[derive(Clone, Copy, Debug)]
pub struct Suite {
    /// Random sequences to try.
    pub sequences: u32,
}

impl Default for Suite {
    fn default() -> Self {
        Suite { sequences: 24 }
    }
}

/// Runs the suite; panics on the first thing that is wrong. `fresh` makes an empty place, and `open` opens it, as often as is wanted: each
/// time as another process would.
pub fn run<P, S: SegmentStore + Send + Sync>(suite: Suite, fresh: impl Fn() -> P, open: impl Fn(&P) -> S) {
    let alone: [fn(&S); 11] = [
        objects_are_whole,
        ranges,
        big_objects,
        what_is_too_long_is_refused,
        an_object_is_never_replaced,
        deleting,
        names_are_checked,
        names_that_look_alike,
        listings,
        roots,
        a_root_that_returns_to_its_content_is_another_version,
    ];
    for case in alone {
        case(&open(&fresh()));
    }
    let place = fresh();
    other_handles_see_it_all(&open(&place), &open(&place));
    let place = fresh();
    racing_creates(&open(&place), || open(&place));
    let place = fresh();
    nobody_sees_a_part(&open(&place), &open(&place));
    let place = fresh();
    racing_swaps(|| open(&place));
    random_sequences(suite, || open(&fresh()));
}

/// Bytes that differ from place to place and from seed to seed.
fn pattern(seed: u64, len: usize) -> Bytes {
    let mut state = seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1;
    let bytes = (0..len).map(|_| {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state as u8
    });
    bytes.collect()
}

fn create(store: &impl SegmentStore, name: &str, content: &Bytes) -> Result<(), StoreError> {
    block_on(store.create(name, vec![content.clone()]))
}

fn read_all(store: &impl SegmentStore, name: &str) -> Result<Bytes, StoreError> {
    block_on(store.read(name, 0..u64::MAX))
}

fn swap(store: &impl SegmentStore, name: &str, expected: Option<&Tag>, content: &Bytes) -> Result<Tag, StoreError> {
    block_on(store.swap(name, expected, content.clone()))
}

fn is_absent<T>(outcome: &Result<T, StoreError>) -> bool {
    matches!(outcome, Err(StoreError::Absent(_)))
}

fn is_refused<T>(outcome: &Result<T, StoreError>) -> bool {
    matches!(outcome, Err(StoreError::Refused(_)))
}

fn is_exists<T>(outcome: &Result<T, StoreError>) -> bool {
    matches!(outcome, Err(StoreError::Exists(_)))
}

fn is_changed<T>(outcome: &Result<T, StoreError>) -> bool {
    matches!(outcome, Err(StoreError::Changed(_)))
}

fn objects_are_whole(store: &impl SegmentStore) {
    for (number, len) in [0, 1, 511, 4096, 70_001].into_iter().enumerate() {
        let (name, content) = (format!("whole/{number}"), pattern(len as u64, len));
        assert!(is_absent(&read_all(store, &name)), "{name} is not there yet");
        create(store, &name, &content).unwrap();
        assert!(read_all(store, &name).unwrap() == content, "{len} bytes");
    }
    let parts: Vec<Bytes> = [3, 0, 4096, 1].map(|len| pattern(len as u64, len)).into();
    block_on(store.create("whole/parts", parts.clone())).unwrap();
    assert_eq!(read_all(store, "whole/parts").unwrap(), Bytes::from(parts.concat()), "the parts are joined");
    block_on(store.create("whole/nothing", Vec::new())).unwrap();
    assert_eq!(read_all(store, "whole/nothing").unwrap(), Bytes::new(), "no parts are an empty object");
}

fn ranges(store: &impl SegmentStore) {
    let content = pattern(1, 10_000);
    create(store, "object", &content).unwrap();
    let read = |range| block_on(store.read("object", range)).unwrap();
    for range in [0..1, 0..10_000, 9_999..10_000, 17..4_113, 0..0, 5..5] {
        assert!(read(range.clone()) == content[range.start as usize..range.end as usize], "{range:?}");
    }
    for start in [1, 9_000] {
        for end in [20_000, 1 << 40, i64::MAX as u64, u64::MAX] {
            assert!(read(start..end) == content[start as usize..], "{start}..{end} reaches past the end and gives what there is");
        }
    }
    for range in [10_000..10_001, 10_000..10_000, 20_000..30_000, 1 << 40..1 << 41, u64::MAX - 1..u64::MAX] {
        assert!(read(range.clone()).is_empty(), "{range:?} is past the end");
    }
    #[expect(clippy::reversed_empty_ranges, reason = "callers may get it wrong")]
    let backwards = read(7..3);
    assert!(backwards.is_empty());
    create(store, "empty", &Bytes::new()).unwrap();
    for range in [0..0, 0..1, 0..4096, 5..6] {
        assert!(block_on(store.read("empty", range.clone())).unwrap().is_empty(), "{range:?} of an empty object");
        assert!(is_absent(&block_on(store.read("absent", range.clone()))), "{range:?} of no object");
    }
}

fn big_objects(store: &impl SegmentStore) {
    let content = pattern(3, 32 * MIB);
    let parts = content.chunks(5 * MIB + 17).map(|part| content.slice_ref(part)).collect();
    block_on(store.create("big", parts)).unwrap();
    assert_eq!(read_all(store, "big").unwrap().len(), 32 * MIB);
    assert!(read_all(store, "big").unwrap() == content, "32 MiB come back as they were");
    let end = 32 * MIB as u64;
    assert!(block_on(store.read("big", end - 65_536..end + 1)).unwrap() == content.slice(32 * MIB - 65_536..));
    assert_eq!(block_on(store.list("big")).unwrap(), [Listed { name: "big".to_owned(), len: end }]);
}

fn what_is_too_long_is_refused(store: &impl SegmentStore) {
    let part = Bytes::from(vec![7; MIB]);
    let too_many = vec![part.clone(); (OBJECT_LEN_MAX as usize) / MIB + 1];
    assert!(is_refused(&block_on(store.create("long", too_many))));
    assert!(is_absent(&read_all(store, "long")));
    let longest = pattern(5, ROOT_LEN_MAX as usize);
    let tag = swap(store, "long", None, &longest).unwrap();
    assert_eq!(block_on(store.read_root("long")).unwrap(), Some((longest.clone(), tag.clone())));
    let longer = pattern(5, ROOT_LEN_MAX as usize + 1);
    assert!(is_refused(&swap(store, "long", Some(&tag), &longer)));
    assert_eq!(block_on(store.read_root("long")).unwrap(), Some((longest, tag)));
}

fn an_object_is_never_replaced(store: &impl SegmentStore) {
    let (first, second) = (pattern(1, 5_000), pattern(2, 9));
    create(store, "once", &first).unwrap();
    for content in [&second, &first, &Bytes::new()] {
        assert!(is_exists(&create(store, "once", content)));
        assert_eq!(read_all(store, "once").unwrap(), first);
    }
}

fn deleting(store: &impl SegmentStore) {
    block_on(store.delete("never/there")).unwrap();
    create(store, "a/b", &pattern(1, 10)).unwrap();
    create(store, "a/c", &pattern(2, 10)).unwrap();
    for _ in 0..2 {
        block_on(store.delete("a/b")).unwrap();
        assert!(is_absent(&read_all(store, "a/b")));
    }
    assert_eq!(read_all(store, "a/c").unwrap(), pattern(2, 10), "only what was named is gone");
    create(store, "a/b", &pattern(3, 10)).unwrap();
    assert_eq!(read_all(store, "a/b").unwrap(), pattern(3, 10), "the name is free again");
}

fn names_are_checked(store: &impl SegmentStore) {
    let long = "x".repeat(251);
    let bad = [
        "",
        "/",
        "/etc/passwd",
        "..",
        "../up",
        "a/../../up",
        "a/./b",
        ".",
        "a//b",
        "a/",
        "A",
        "ä",
        "a b",
        "a\0b",
        "a\\b",
        "a=",
        "%2e%2e",
    ];
    for name in bad.into_iter().chain([long.as_str()]) {
        let content = Bytes::from_static(b"x");
        assert!(is_refused(&create(store, name, &content)), "create {name:?}");
        assert!(is_refused(&read_all(store, name)), "read {name:?}");
        assert!(is_refused(&block_on(store.delete(name))), "delete {name:?}");
        assert!(is_refused(&block_on(store.read_root(name))), "read_root {name:?}");
        assert!(is_refused(&swap(store, name, None, &content)), "swap {name:?}");
    }
    for prefix in ["/", "../", "a/../", "A", "a//", "ä"] {
        assert!(is_refused(&block_on(store.list(prefix))), "list {prefix:?}");
    }
}

fn names_that_look_alike(store: &impl SegmentStore) {
    let longest = format!("{}/{}", "x".repeat(124), "y".repeat(125));
    let names = ["a", "a/b", "a/b/c", "a-b", "a.b", "a0", "...", "-", &longest];
    for (number, name) in names.iter().enumerate() {
        assert!(is_absent(&read_all(store, name)), "{name} is not there yet");
        create(store, name, &pattern(number as u64, 20)).unwrap();
        swap(store, name, None, &pattern(number as u64 + 100, 20)).unwrap();
    }
    for (number, name) in names.iter().enumerate() {
        assert_eq!(read_all(store, name).unwrap(), pattern(number as u64, 20), "object {name}");
        assert_eq!(block_on(store.read_root(name)).unwrap().unwrap().0, pattern(number as u64 + 100, 20), "root {name}");
    }
    let mut sorted: Vec<&str> = names.to_vec();
    sorted.sort_unstable();
    let listed = block_on(store.list("")).unwrap();
    assert_eq!(listed.iter().map(|listed| listed.name.as_str()).collect::<Vec<_>>(), sorted, "in the order of bytes");
}

fn listings(store: &impl SegmentStore) {
    assert_eq!(block_on(store.list("")), Ok(Vec::new()), "a fresh store is empty");
    let mut expected = BTreeMap::new();
    let all: Vec<usize> = (0..MANY).collect();
    for numbers in all.chunks(32) {
        let names: Vec<String> = numbers.iter().map(|number| format!("w/{}/{number}", number % 7)).collect();
        let creates = names.iter().zip(numbers).map(|(name, number)| store.create(name, vec![pattern(1, number % 50)]));
        for created in block_on(join_all(creates.collect())) {
            created.unwrap();
        }
        expected.extend(names.into_iter().zip(numbers.iter().map(|number| (number % 50) as u64)));
    }
    create(store, "x", &pattern(1, 4)).unwrap();
    expected.insert("x".to_owned(), 4);
    swap(store, "w/1/root", None, &Bytes::from_static(b"a root is not listed")).unwrap();
    for prefix in ["", "w", "w/", "w/1", "w/1/", "w/1/1", "w/3/10", "w/9", "x", "y", "w/1/1/1"] {
        let wanted = expected.iter().filter(|(name, _)| name.starts_with(prefix));
        let wanted: Vec<Listed> = wanted.map(|(name, len)| Listed { name: name.clone(), len: *len }).collect();
        assert_eq!(block_on(store.list(prefix)).unwrap(), wanted, "all that begin with {prefix:?}");
    }
}

fn roots(store: &impl SegmentStore) {
    assert_eq!(block_on(store.read_root("r")), Ok(None));
    let stranger = Tag("7-of another store".to_owned());
    assert!(is_changed(&swap(store, "r", Some(&stranger), &pattern(1, 8))), "there is no version yet");
    let first = swap(store, "r", None, &pattern(1, 8)).unwrap();
    assert_eq!(block_on(store.read_root("r")).unwrap(), Some((pattern(1, 8), first.clone())));
    assert!(is_changed(&swap(store, "r", None, &pattern(2, 8))));
    assert!(is_changed(&swap(store, "r", Some(&stranger), &pattern(2, 8))));
    for tag in ["", "1", "-", "18446744073709551615-x", "a\nb"] {
        assert!(is_changed(&swap(store, "r", Some(&Tag(tag.to_owned())), &pattern(2, 8))), "{tag:?} was never given");
    }
    let second = swap(store, "r", Some(&first), &Bytes::new()).unwrap();
    assert_ne!(first, second);
    assert!(is_changed(&swap(store, "r", Some(&first), &pattern(3, 8))), "the first version is gone");
    assert_eq!(block_on(store.read_root("r")).unwrap(), Some((Bytes::new(), second)));
    assert_eq!(block_on(store.read_root("other")), Ok(None));
    assert!(is_absent(&read_all(store, "r")), "a root is no object");
}

fn a_root_that_returns_to_its_content_is_another_version(store: &impl SegmentStore) {
    let [a, b] = [1, 2].map(|seed| pattern(seed, 100));
    let first = swap(store, "r", None, &a).unwrap();
    let second = swap(store, "r", Some(&first), &b).unwrap();
    let third = swap(store, "r", Some(&second), &a).unwrap();
    assert_ne!(first, third, "equal tags mean equal versions");
    assert!(is_changed(&swap(store, "r", Some(&first), &b)), "a writer who slept through A-B-A is told");
    assert_eq!(block_on(store.read_root("r")).unwrap(), Some((a, third)));
}

fn other_handles_see_it_all<S: SegmentStore>(store: &S, other: &S) {
    for number in 0..20 {
        let name = format!("w/1/{number}");
        create(store, &name, &pattern(number, 3_000)).unwrap();
        assert_eq!(read_all(other, &name).unwrap(), pattern(number, 3_000));
        assert!(is_exists(&create(other, &name, &pattern(number, 3_000))));
        assert_eq!(block_on(other.list("w/1/")).unwrap().len() as u64, number + 1);
    }
    let first = swap(store, "r", None, &pattern(1, 10)).unwrap();
    assert_eq!(block_on(other.read_root("r")).unwrap(), Some((pattern(1, 10), first.clone())), "tags mean the same to all");
    let second = swap(other, "r", Some(&first), &pattern(2, 10)).unwrap();
    assert!(is_changed(&swap(store, "r", Some(&first), &pattern(3, 10))));
    swap(store, "r", Some(&second), &pattern(4, 10)).unwrap();
    block_on(other.delete("w/1/3")).unwrap();
    assert!(is_absent(&read_all(store, "w/1/3")));
}

fn racing_creates<S: SegmentStore + Send + Sync>(store: &S, another: impl Fn() -> S) {
    let content_of = |racer: usize| pattern(racer as u64, 40_000 + racer);
    let is_certain = |outcome: &Result<(), StoreError>| outcome.is_ok() || is_exists(outcome);
    for round in 0..2 {
        let name = format!("race/one-thread/{round}");
        let creates = (0..RACERS).map(|racer| store.create(&name, vec![content_of(racer)])).collect();
        judge(block_on(join_all(creates)), &is_certain, |winner| read_all(store, &name) == Ok(content_of(winner)));
    }
    let handles: Vec<S> = (0..RACERS).map(|_| another()).collect();
    for round in 0..2 {
        let name = format!("race/threads/{round}");
        let outcomes = thread::scope(|scope| {
            let name = &name;
            let race = |(racer, handle)| scope.spawn(move || create(handle, name, &content_of(racer)));
            let racers: Vec<_> = handles.iter().enumerate().map(race).collect();
            racers.into_iter().map(|racer| racer.join().expect("a racer")).collect()
        });
        judge(outcomes, &is_certain, |winner| read_all(store, &name) == Ok(content_of(winner)));
    }
}

fn judge(
    outcomes: Vec<Result<(), StoreError>>,
    is_certain: &impl Fn(&Result<(), StoreError>) -> bool,
    stands: impl Fn(usize) -> bool,
) {
    assert!(outcomes.iter().all(is_certain), "{outcomes:?}");
    let winners: Vec<usize> = (0..outcomes.len()).filter(|racer| outcomes[*racer].is_ok()).collect();
    let [winner] = winners[..] else { panic!("winners: {winners:?}") };
    assert!(stands(winner), "the winner's content stands");
}

fn nobody_sees_a_part<S: SegmentStore + Send + Sync>(store: &S, other: &S) {
    let is_over = AtomicBool::new(false);
    thread::scope(|scope| {
        let reader = scope.spawn(|| {
            let mut seen = 0;
            while !is_over.load(Ordering::Relaxed) {
                for number in 0..4 {
                    match read_all(other, &format!("part/{number}")) {
                        Ok(read) => {
                            assert!(read == pattern(number, 3 * MIB), "a reader was shown a part of object {number}");
                            seen += 1;
                        }
                        outcome => assert!(is_absent(&outcome), "{outcome:?}"),
                    }
                }
                if let Some((read, _)) = block_on(other.read_root("part")).unwrap() {
                    assert!(
                        read.iter().all(|byte| *byte == read[0]) && read.len() == 100_000,
                        "a reader was shown a part of a root"
                    );
                }
            }
            seen
        });
        let mut tag = None;
        for number in 0..4 {
            create(store, &format!("part/{number}"), &pattern(number, 3 * MIB)).unwrap();
            tag = Some(swap(store, "part", tag.as_ref(), &Bytes::from(vec![number as u8; 100_000])).unwrap());
        }
        is_over.store(true, Ordering::Relaxed);
        reader.join().expect("the reader");
    });
}

/// Several writers count one root up; every success counts once.
fn racing_swaps<S: SegmentStore + Send + Sync>(another: impl Fn() -> S) {
    const TURNS: u64 = 3;
    let handles: Vec<S> = (0..4).map(|_| another()).collect();
    let count_of = |content: &Bytes| u64::from_le_bytes(content[..8].try_into().expect("eight bytes"));
    thread::scope(|scope| {
        for (writer, handle) in handles.iter().enumerate() {
            scope.spawn(move || {
                let mut turns = 0;
                while turns < TURNS {
                    let current = block_on(handle.read_root("count")).unwrap();
                    let (count, tag) = current.map_or((0, None), |(content, tag)| (count_of(&content), Some(tag)));
                    let next = [(count + 1).to_le_bytes(), (writer as u64).to_le_bytes()].concat().into();
                    match swap(handle, "count", tag.as_ref(), &next) {
                        Ok(_) => turns += 1,
                        outcome => assert!(is_changed(&outcome), "{outcome:?}"),
                    }
                }
            });
        }
    });
    let (content, _) = block_on(another().read_root("count")).unwrap().unwrap();
    assert_eq!(count_of(&content), TURNS * handles.len() as u64, "no success was lost, none counted twice");
}

#[derive(Clone, Debug)]
enum Step {
    Create(usize, usize),
    Read(usize, u64, u64),
    Delete(usize),
    List(usize),
    /// Whether with the version in place, with the one before, or as if there were none.
    Swap(usize, u8, usize),
    ReadRoot(usize),
}

const NAMES: [&str; 6] = ["a", "a/b", "a/c", "ab", "w/1/2", "w/1/10"];
const PREFIXES: [&str; 6] = ["", "a", "a/", "w/1/1", "ab", "z"];

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let name = 0..NAMES.len();
    let step = prop_oneof![
        (name.clone(), 0usize..2000).prop_map(|(name, len)| Step::Create(name, len)),
        (name.clone(), 0u64..2200, 0u64..2200).prop_map(|(name, start, end)| Step::Read(name, start, end)),
        name.clone().prop_map(Step::Delete),
        name.clone().prop_map(Step::List),
        (name.clone(), 0u8..3, 0usize..200).prop_map(|(name, which, len)| Step::Swap(name, which, len)),
        name.prop_map(Step::ReadRoot),
    ];
    prop::collection::vec(step, 1..40)
}

/// What was answered, without words and tags.
fn essence<T>(outcome: Result<T, StoreError>) -> Result<T, std::mem::Discriminant<StoreError>> {
    outcome.map_err(|error| std::mem::discriminant(&error))
}

/// A root's tags in a store, the newest last.
type Tags = BTreeMap<usize, Vec<Tag>>;

fn step_on(store: &impl SegmentStore, tags: &mut Tags, number: usize, step: &Step) -> String {
    let content = |len| pattern(number as u64, len);
    match *step {
        Step::Create(name, len) => format!("{:?}", essence(create(store, NAMES[name], &content(len)))),
        Step::Read(name, start, end) => format!("{:?}", essence(block_on(store.read(NAMES[name], start..end)))),
        Step::Delete(name) => format!("{:?}", essence(block_on(store.delete(NAMES[name])))),
        Step::List(prefix) => format!("{:?}", essence(block_on(store.list(PREFIXES[prefix])))),
        Step::ReadRoot(name) => {
            let read = block_on(store.read_root(NAMES[name]));
            let is_newest =
                read.as_ref().is_ok_and(|read| read.as_ref().map(|(_, tag)| tag) == tags.entry(name).or_default().last());
            format!("{:?} {is_newest}", essence(read.map(|read| read.map(|(content, _)| content))))
        }
        Step::Swap(name, which, len) => {
            let known = tags.entry(name).or_default();
            let expected = known.iter().rev().nth(usize::from(which)).cloned();
            let swapped = swap(store, NAMES[name], expected.as_ref(), &content(len));
            known.extend(swapped.clone().ok());
            format!("{:?}", essence(swapped.map(drop)))
        }
    }
}

fn random_sequences<S: SegmentStore>(suite: Suite, fresh: impl Fn() -> S) {
    let config = Config { cases: suite.sequences, failure_persistence: None, ..Config::default() };
    let ran = TestRunner::new(config).run(&steps(), |steps| {
        let (store, model) = (fresh(), MemoryStore::new());
        let (mut tags, mut model_tags) = (Tags::new(), Tags::new());
        for (number, step) in steps.iter().enumerate() {
            let (found, wanted) = (step_on(&store, &mut tags, number, step), step_on(&model, &mut model_tags, number, step));
            if found != wanted {
                return Err(TestCaseError::fail(format!("step {number}, {step:?}: {found}, not {wanted}")));
            }
        }
        Ok(())
    });
    ran.unwrap_or_else(|error| panic!("{error}"));
}
