use std::ops::Range;
use std::sync::atomic::{AtomicU64, Ordering};

use backends::segments::drive::block_on;
use backends::segments::memory::MemoryStore;
use backends::segments::{Listed, StoreFuture};
use proptest::prelude::*;

use super::record::RECORD_LEN;
use super::*;

const POOL: Uuid = Uuid::from_u128(0x90);
const GROUPS: [Uuid; 3] = [Uuid::from_u128(1), Uuid::from_u128(2), Uuid::from_u128(3)];

/// A store whose process dies, or whose answer is lost, at one operation.
#[derive(Clone)]
struct Failing {
    below: MemoryStore,
    left: Arc<AtomicU64>,
    fault: Fault,
}

#[derive(Clone, Copy, PartialEq, Debug)]
enum Fault {
    /// Neither this operation nor any after it happens.
    DiesBefore,
    /// This one happens, none after it.
    DiesAfter,
    /// This one happens, and the caller is not told.
    LosesAnswer,
}

impl Failing {
    fn run<'a, T: 'a>(&'a self, operation: impl FnOnce() -> StoreFuture<'a, T>) -> StoreFuture<'a, T> {
        // Wraps around after the fault: far more operations than any test makes are left then.
        let left = self.left.fetch_sub(1, Ordering::Relaxed);
        let is_over = left > u64::MAX / 2;
        let silent = (left == 0) || (is_over && self.fault != Fault::LosesAnswer);
        let happens = left > 0 && (!is_over || self.fault == Fault::LosesAnswer) || left == 0 && self.fault != Fault::DiesBefore;
        let answer = happens.then(operation);
        Box::pin(async move {
            let answer = match answer {
                Some(answer) => Some(answer.await),
                None => None,
            };
            answer.filter(|_| !silent).unwrap_or(Err(StoreError::Unknown("no answer".to_owned())))
        })
    }
}

impl SegmentStore for Failing {
    fn create<'a>(&'a self, name: &'a str, content: Vec<Bytes>) -> StoreFuture<'a, ()> {
        self.run(|| self.below.create(name, content))
    }
    fn read<'a>(&'a self, name: &'a str, range: Range<u64>) -> StoreFuture<'a, Bytes> {
        self.run(|| self.below.read(name, range))
    }
    fn delete<'a>(&'a self, name: &'a str) -> StoreFuture<'a, ()> {
        self.run(|| self.below.delete(name))
    }
    fn list<'a>(&'a self, prefix: &'a str) -> StoreFuture<'a, Vec<Listed>> {
        self.run(|| self.below.list(prefix))
    }
    fn read_root<'a>(&'a self, name: &'a str) -> StoreFuture<'a, Option<(Bytes, Tag)>> {
        self.run(|| self.below.read_root(name))
    }
    fn swap<'a>(&'a self, name: &'a str, expected: Option<&'a Tag>, content: Bytes) -> StoreFuture<'a, Tag> {
        self.run(|| self.below.swap(name, expected, content))
    }
}

fn kek(number: u8) -> Option<Kek> {
    Some(Kek::new([number; 32]))
}

fn keks(current: u8, previous: Option<u8>) -> Keks {
    Keks { current: kek(current), previous: previous.and_then(kek) }
}

fn open(store: &MemoryStore, keks: Keks) -> Result<Keyring, KeyError> {
    open_over(Arc::new(store.clone()), keks)
}

fn open_over(store: Arc<dyn SegmentStore + Send + Sync>, keks: Keks) -> Result<Keyring, KeyError> {
    block_on(Keyring::open(store, POOL, keks, Arc::new(crate::system_random)))
}

/// What the secrets are, so that they can be compared and shown.
type Shown = Result<([u8; 32], Option<[u8; 32]>), KeyError>;

fn shown(secrets: Result<Secrets, KeyError>) -> Shown {
    secrets.map(|secrets| (secrets.pool_key, secrets.data_key))
}

/// A pool with a domain that is encrypted, one that is not, and one that was erased.
fn pool_under(keks: Keks) -> (MemoryStore, Vec<Shown>) {
    let store = MemoryStore::new();
    let keyring = open(&store, keks).unwrap();
    for (group, encrypted) in GROUPS.into_iter().zip([true, false, true]) {
        block_on(keyring.create_domain(group, encrypted)).unwrap();
    }
    block_on(keyring.erase(GROUPS[2])).unwrap();
    let secrets = all(&keyring);
    (store, secrets)
}

fn all(keyring: &Keyring) -> Vec<Shown> {
    GROUPS.iter().map(|group| shown(block_on(keyring.secrets(*group)))).collect()
}

fn root_of(store: &MemoryStore, name: &str) -> (Bytes, Tag) {
    block_on(store.read_root(name)).unwrap().unwrap()
}

/// Puts other content into a root.
fn put(store: &MemoryStore, name: &str, content: Bytes) {
    let (_, tag) = root_of(store, name);
    block_on(store.swap(name, Some(&tag), content)).unwrap();
}

#[test]
fn keys_stay_what_they_are_and_differ() {
    let (store, secrets) = pool_under(keks(1, None));
    assert_eq!(all(&open(&store, keks(1, None)).unwrap()), secrets);
    let [Ok((pool_key, Some(data_key))), Ok((same_pool_key, None)), Err(KeyError::Erased { .. })] = &secrets[..] else {
        panic!("not the three kinds");
    };
    assert!(pool_key == same_pool_key && pool_key != data_key && *pool_key != [0; 32]);
    let again = block_on(open(&store, keks(1, None)).unwrap().create_domain(GROUPS[0], true)).err();
    assert!(matches!(again, Some(KeyError::Exists { .. })));
    let keyring = open(&store, keks(1, None)).unwrap();
    let two = block_on(keyring.secrets_of_all(&GROUPS[..2])).ok().unwrap();
    assert_eq!(two.into_values().map(|secrets| secrets.data_key).collect::<Vec<_>>(), [Some(*data_key), None]);
    assert!(block_on(keyring.secrets_of_all(&GROUPS)).is_err(), "one of them is erased");
}

#[test]
fn a_wrong_or_absent_key_encryption_key_is_told_and_changes_nothing() {
    let (store, secrets) = pool_under(keks(1, None));
    let before = root_of(&store, POOL_RECORD);
    for (keys, told) in [(Keks::default(), "no key is configured"), (keks(2, Some(3)), "the configured one is")] {
        let error = open(&store, keys).err().unwrap();
        assert!(matches!(error, KeyError::WrongKek { .. }) && error.to_string().contains(told), "{error}");
        assert!(error.to_string().contains(&Kek::new([1; 32]).id().to_string()), "{error}");
    }
    assert_eq!(root_of(&store, POOL_RECORD), before);
    assert_eq!(all(&open(&store, keks(2, Some(1))).unwrap()), secrets, "a previous key opens too");
}

#[test]
fn a_missing_record_is_no_domain_without_encryption() {
    let (store, _) = pool_under(keks(1, None));
    let keyring = open(&store, keks(1, None)).unwrap();
    let error = block_on(keyring.secrets(Uuid::from_u128(9))).err().unwrap();
    assert!(matches!(error, KeyError::Missing { .. }), "{error}");
    let forged = Record::without_key(keyring.owner(Purpose::Domain, GROUPS[0]), State::NotEncrypted, &Key::new([0; 32]));
    put(&store, &record_name(GROUPS[0]), Bytes::copy_from_slice(&forged));
    assert!(matches!(block_on(keyring.secrets(GROUPS[0])).err(), Some(KeyError::Damaged { .. })), "a forged note was believed");
}

#[test]
fn a_pool_whose_record_is_gone_gets_no_new_key() {
    let store = MemoryStore::new();
    block_on(store.create(&record_name(GROUPS[0]), Vec::new())).unwrap();
    assert!(matches!(open(&store, keks(1, None)).err(), Some(KeyError::Missing { .. })));
}

#[test]
fn without_a_key_encryption_key_nothing_is_encrypted_and_later_it_can_be() {
    let store = MemoryStore::new();
    let keyring = open(&store, Keks::default()).unwrap();
    let plain = shown(block_on(keyring.create_domain(GROUPS[0], false))).unwrap();
    let error = block_on(keyring.create_domain(GROUPS[1], true)).err().unwrap();
    assert!(error.to_string().contains("openssl rand"), "{error}");
    assert_eq!(block_on(keyring.wrapped_by()), Ok(None));

    let keyring = open(&store, keks(1, None)).unwrap();
    assert_eq!(block_on(keyring.wrapped_by()), Ok(None), "opening alone wraps nothing");
    let encrypted = shown(block_on(keyring.create_domain(GROUPS[1], true))).unwrap();
    assert_eq!(block_on(keyring.wrapped_by()), Ok(Some(Kek::new([1; 32]).id())));
    assert_eq!(encrypted.0, plain.0, "the pool's key is the same");
    assert!(open(&store, Keks::default()).is_err());
}

#[test]
fn erasing_leaves_nothing_to_open_and_can_be_repeated() {
    let (store, _) = pool_under(keks(1, None));
    let keyring = open(&store, keks(1, None)).unwrap();
    let (wrapped, _) = root_of(&store, &record_name(GROUPS[0]));
    for _ in 0..2 {
        block_on(keyring.erase(GROUPS[0])).unwrap();
        assert!(matches!(block_on(keyring.secrets(GROUPS[0])).err(), Some(KeyError::Erased { .. })));
    }
    let (note, _) = root_of(&store, &record_name(GROUPS[0]));
    assert!(note[112..144].iter().all(|byte| *byte == 0) && wrapped[112..144].iter().any(|byte| *byte != 0));
    assert!(matches!(block_on(keyring.create_domain(GROUPS[0], true)).err(), Some(KeyError::Exists { .. })));
}

/// Runs `operation` with a fault at each of its operations on the store in turn, and `check` on what each leaves behind.
fn at_every_step(
    fault: Fault,
    fresh: impl Fn() -> MemoryStore,
    operation: impl Fn(Failing) -> bool,
    check: impl Fn(&MemoryStore, bool),
) {
    for step in 0_u64.. {
        let below = fresh();
        let left = Arc::new(AtomicU64::new(step));
        let ended_well = operation(Failing { below: below.clone(), left: left.clone(), fault });
        check(&below, ended_well);
        if left.load(Ordering::Relaxed) < u64::MAX / 2 {
            assert!(ended_well && step > 3, "only {step} operations");
            return;
        }
    }
}

#[test]
fn case_26_a_rotation_killed_at_any_step_is_completed_by_the_next() {
    for fault in [Fault::DiesBefore, Fault::DiesAfter, Fault::LosesAnswer] {
        let (origin, secrets) = pool_under(keks(1, None));
        let content: Vec<(String, Bytes)> = [POOL_RECORD.to_owned()]
            .into_iter()
            .chain(GROUPS.map(record_name))
            .map(|name| (name.clone(), root_of(&origin, &name).0))
            .collect();
        let fresh = || {
            let store = MemoryStore::new();
            for (name, bytes) in &content {
                block_on(store.swap(name, None, bytes.clone())).unwrap();
            }
            GROUPS.iter().for_each(|group| block_on(store.create(&record_name(*group), Vec::new())).unwrap());
            store
        };
        let rotate = |store: Failing| {
            let rotated = open_over(Arc::new(store), keks(2, Some(1))).and_then(|keyring| block_on(keyring.rotate(|_| {})));
            rotated.is_ok()
        };
        at_every_step(fault, fresh, rotate, |store, ended_well| {
            assert!(ended_well || fault != Fault::LosesAnswer, "a lost answer is looked up");
            let keyring = open(store, keks(2, Some(1))).unwrap();
            assert_eq!(all(&keyring), secrets, "both keys open everything, wherever it stopped");
            if !ended_well {
                block_on(keyring.rotate(|_| {})).unwrap();
            }
            assert_eq!(all(&open(store, keks(2, None)).unwrap()), secrets, "the old key is no longer needed");
            assert!(open(store, keks(1, None)).is_err());
        });
    }
}

#[test]
fn a_domain_created_or_erased_in_part_is_created_or_erased_by_repeating_it() {
    for fault in [Fault::DiesBefore, Fault::DiesAfter, Fault::LosesAnswer] {
        let create = |store: Failing| {
            open_over(Arc::new(store), keks(1, None)).and_then(|keyring| block_on(keyring.create_domain(GROUPS[0], true))).is_ok()
        };
        at_every_step(fault, MemoryStore::new, create, |store, ended_well| {
            let keyring = open(store, keks(1, None)).unwrap();
            match block_on(keyring.secrets(GROUPS[0])) {
                Ok(secrets) => assert!(secrets.data_key.is_some()),
                Err(error) => assert!(!ended_well && matches!(error, KeyError::Missing { .. }), "{error}"),
            }
            block_on(keyring.rotate(|_| {})).unwrap();
            block_on(keyring.erase(GROUPS[0])).unwrap();
        });
        let fresh = || pool_under(keks(1, None)).0;
        let erase = |store: Failing| {
            open_over(Arc::new(store), keks(1, None)).and_then(|keyring| block_on(keyring.erase(GROUPS[0]))).is_ok()
        };
        at_every_step(fault, fresh, erase, |store, ended_well| {
            let keyring = open(store, keks(1, None)).unwrap();
            if !ended_well {
                block_on(keyring.erase(GROUPS[0])).unwrap();
            }
            assert!(matches!(block_on(keyring.secrets(GROUPS[0])).err(), Some(KeyError::Erased { .. })));
            let listed = block_on(store.list(PREFIX)).unwrap();
            assert!(listed.iter().all(|object| object.name != record_name(GROUPS[0])));
        });
    }
}

#[test]
fn rotation_with_a_record_that_does_not_open_changes_nothing() {
    let (store, _) = pool_under(keks(1, None));
    let stranger = Keyring { keks: keks(9, None), ..open(&store, keks(1, None)).unwrap() };
    let group = Uuid::from_u128(77);
    let foreign = Record::wrap(
        stranger.keks.current.as_ref().unwrap(),
        stranger.owner(Purpose::Domain, group),
        [0; 16],
        &Key::new([5; 32]),
        &[6; 32],
    );
    block_on(store.create(&record_name(group), Vec::new())).unwrap();
    block_on(store.swap(&record_name(group), None, Bytes::copy_from_slice(&foreign))).unwrap();
    let before = root_of(&store, POOL_RECORD);
    let rotated = block_on(open(&store, keks(2, Some(1))).unwrap().rotate(|_| {}));
    assert!(matches!(rotated, Err(KeyError::WrongKek { .. })));
    assert_eq!(root_of(&store, POOL_RECORD), before);
}

#[test]
fn a_host_that_missed_the_rotation_creates_nothing_under_the_old_key() {
    let (store, _) = pool_under(keks(1, None));
    let behind = open(&store, keks(1, None)).unwrap();
    let rotation = block_on(open(&store, keks(2, Some(1))).unwrap().rotate(|_| {})).unwrap();
    assert_eq!(rotation, Rotation { rewrapped: 2, already: 0 });
    let group = Uuid::from_u128(4);
    assert!(matches!(block_on(behind.create_domain(group, true)).err(), Some(KeyError::Rotated { .. })));
    let keyring = open(&store, keks(2, None)).unwrap();
    assert!(matches!(block_on(keyring.secrets(group)).err(), Some(KeyError::Erased { .. })));
    assert_eq!(block_on(keyring.rotate(|_| {})), Ok(Rotation { rewrapped: 0, already: 2 }));
}

#[test]
fn every_changed_byte_of_every_record_is_noticed() {
    for keys in [keks(1, None), Keks::default()] {
        let store = MemoryStore::new();
        let keyring = open(&store, keys.clone()).unwrap();
        let encrypted = keys.current.is_some();
        block_on(keyring.create_domain(GROUPS[0], encrypted)).unwrap();
        for name in [POOL_RECORD.to_owned(), record_name(GROUPS[0])] {
            let (whole, _) = root_of(&store, &name);
            let opens = || open(&store, keys.clone()).and_then(|keyring| block_on(keyring.secrets(GROUPS[0]))).is_ok();
            assert!(opens());
            for at in 0..RECORD_LEN {
                let mut bytes = whole.to_vec();
                bytes[at] ^= 1 << (at % 8);
                put(&store, &name, bytes.into());
                assert!(!opens(), "byte {at} of {name}");
            }
            for len in [0, 8, RECORD_LEN - 1] {
                put(&store, &name, whole.slice(..len));
                assert!(!opens(), "{name} cut to {len}");
            }
            put(&store, &name, whole);
        }
    }
}

#[test]
fn a_record_opens_only_in_its_own_place() {
    let (store, _) = pool_under(keks(1, None));
    let keyring = open(&store, keks(1, None)).unwrap();
    let (bytes, _) = root_of(&store, &record_name(GROUPS[0]));
    put(&store, &record_name(GROUPS[1]), bytes);
    assert!(matches!(block_on(keyring.secrets(GROUPS[1])).err(), Some(KeyError::Damaged { .. })));
    let elsewhere = Keyring::open(Arc::new(store), Uuid::from_u128(8), keks(1, None), Arc::new(crate::system_random));
    assert!(block_on(elsewhere).err().unwrap().to_string().contains("another pool"));
}

#[test]
fn records_of_earlier_versions_open_for_ever() {
    let owner = |purpose, group| Owner { purpose, pool: POOL, group };
    let kek = Kek::new([1; 32]);
    let pool_key = Key::new([2; 32]);
    let wrapped = Record::wrap(&kek, owner(Purpose::Domain, GROUPS[0]), [3; 16], &Key::new([4; 32]), &[5; 32]);
    let clear = Record::in_clear(owner(Purpose::Pool, Uuid::nil()), [3; 16], &pool_key);
    let note = Record::without_key(owner(Purpose::Domain, GROUPS[0]), State::Erased, &pool_key);
    assert_eq!(&wrapped, include_bytes!("../../tests/golden/key-wrapped.bin"));
    assert_eq!(&clear, include_bytes!("../../tests/golden/key-clear.bin"));
    assert_eq!(&note, include_bytes!("../../tests/golden/key-erased.bin"));
    let parsed = Record::parse("x", &wrapped, Purpose::Domain, POOL).unwrap();
    assert_eq!(parsed.unwrap(&keks(1, None)).unwrap().bytes(), &[4; 32]);
}

#[test]
fn the_same_random_bytes_never_encrypt_two_keys_alike() {
    let owner = Owner { purpose: Purpose::Domain, pool: POOL, group: GROUPS[0] };
    let wrap = |key| Record::wrap(&Kek::new([1; 32]), owner, [0; 16], &Key::new([key; 32]), &[7; 32]);
    let (first, second) = (wrap(1), wrap(2));
    assert_ne!(first[80..112], second[80..112], "the same salt for two keys");
    assert_eq!(first, wrap(1));
}

#[test]
fn raw_volumes_keep_their_key_through_a_rotation_and_no_changed_digit_passes() {
    let raw = |keks| RawKeys { keks, random: Arc::new(crate::system_random) };
    let (text, key) = raw(keks(1, None)).create("v").unwrap();
    assert_eq!(raw(keks(1, None)).open("v", &text).unwrap(), key);
    assert_ne!(key[..32], key[32..], "XTS needs two keys");
    assert!(matches!(raw(keks(2, None)).open("v", &text), Err(KeyError::WrongKek { .. })));
    assert!(matches!(raw(Keks::default()).create("v"), Err(KeyError::NoKek { .. })));
    assert_eq!(raw(keks(1, None)).rewrap("v", &text), Ok(None));
    let rewrapped = raw(keks(2, Some(1))).rewrap("v", &text).unwrap().unwrap();
    assert_eq!(raw(keks(2, None)).open("v", &rewrapped).unwrap(), key);
    for at in 0..text.len() {
        let digit = if text.as_bytes()[at] == b'0' { "1" } else { "0" };
        let mut changed = text.clone();
        changed.replace_range(at..at + 1, digit);
        assert!(raw(keks(1, None)).open("v", &changed).is_err(), "digit {at}");
    }
    assert!(raw(keks(1, None)).open("v", "0g").is_err() && raw(keks(1, None)).open("v", &text[1..]).is_err());
}

proptest! {
    #[test]
    fn no_bytes_panic(mut bytes in proptest::collection::vec(any::<u8>(), 0..2 * RECORD_LEN), exact: bool, state in 0_u8..6) {
        if exact {
            bytes.resize(RECORD_LEN, 0);
            bytes[..16].copy_from_slice(b"novakeys\x01\0\0\0\x02\0\0\0");
            bytes[13] = state;
            bytes[16..32].copy_from_slice(POOL.as_bytes());
        }
        if let Ok(record) = Record::parse("x", &bytes, Purpose::Domain, POOL) {
            prop_assert!(record.unwrap(&keks(1, None)).is_err() && record.check(&Key::new([1; 32])).is_err());
        }
    }
}

#[test]
fn keys_are_told_without_any_key_encryption_key() {
    let store = MemoryStore::new();
    let told = || -> Vec<(Option<Uuid>, Wrapping)> {
        let found = block_on(inspect(&store, POOL, [GROUPS[1]])).unwrap();
        found.into_iter().map(|status| (status.domain, status.wrapping)).collect()
    };
    assert_eq!(told(), []);
    let keys = |current: Option<Kek>, previous: Option<Kek>| {
        let keks = Keks { current, previous };
        block_on(Keyring::open(Arc::new(store.clone()), POOL, keks, Arc::new(crate::system_random))).unwrap()
    };
    block_on(keys(None, None).create_domain(GROUPS[2], false)).unwrap();
    assert_eq!(told(), [(None, Wrapping::Clear)]);
    let [old, new] = [1, 2].map(|number| kek(number).unwrap().id());
    for group in &GROUPS[..2] {
        block_on(keys(kek(1), None).create_domain(*group, true)).unwrap();
    }
    let [first, second] = [GROUPS[0], GROUPS[1]].map(Some);
    assert_eq!(told(), [None, first, second].map(|domain| (domain, Wrapping::By(old))));
    block_on(keys(kek(2), kek(1)).rotate(|_| {})).unwrap();
    for group in &GROUPS[..2] {
        block_on(keys(kek(2), None).erase(*group)).unwrap();
    }
    assert_eq!(told(), [(None, Wrapping::By(new)), (second, Wrapping::Erased)], "what nobody asks for is over");
    let (_, tag) = block_on(store.read_root(POOL_RECORD)).unwrap().unwrap();
    block_on(store.swap(POOL_RECORD, Some(&tag), Bytes::from_static(b"torn"))).unwrap();
    assert!(matches!(&told()[0], (None, Wrapping::Damaged(_))));
}
