//! Whether a store keeps what it promises about conditions. There are stores that accept a conditional request and ignore the condition,
//! or look first and act later; on those, two owners of one volume would overwrite each other without a word.
//!
//! ```text
//!   4 creates of one new name, at once    ─▶ one wins, its content stands, a fifth is told `Exists`
//!   4 swaps of one version, at once       ─▶ one wins, a fifth with the old tag is told `Changed`
//! ```
//!
//! It leaves the root `probe` behind, and no object.

use bytes::Bytes;
use uuid::Uuid;

use super::drive::{block_on, join_all};
use super::{OpenOptions, SegmentStore, StoreError, Tag};

const RACERS: usize = 4;
/// Attempts where the answer may be lost, or another opener's probe may come between.
const ATTEMPTS: usize = 8;
const ROOT: &str = "probe";
/// Longer than what a racer writes, in bytes.
const READ_LEN: u64 = 4096;

/// Proves the conditions of `create` and `swap` with racing writers; to be done whenever a pool is made or opened. `token` is new each
/// time. [`StoreError::Refused`] says what the store does wrong.
pub async fn prove(store: &dyn SegmentStore, token: Uuid) -> Result<(), StoreError> {
    let name = format!("probe/{}", token.simple());
    let created = prove_create(store, &name, token).await;
    let deleted = store.delete(&name).await;
    created.and(deleted)?;
    match store.read(&name, 0..1).await {
        Err(StoreError::Absent(_)) => {}
        Ok(_) => return Err(broken("an object that was deleted can still be read")),
        Err(error) => return Err(error),
    }
    prove_swap(store, token).await
}

/// As every opening does: unless it is read-only, or was done before. A full store is opened unproven, for only then can room be made;
/// nothing can be written to it until there is. Blocks.
pub(super) fn prove_opening(store: &dyn SegmentStore, options: OpenOptions) -> Result<(), StoreError> {
    let Some(token) = options.probe.filter(|_| !options.read_only) else { return Ok(()) };
    match block_on(prove(store, token)) {
        Err(StoreError::NoSpace(_)) => Ok(()),
        outcome => outcome,
    }
}

fn broken(what: &str) -> StoreError {
    StoreError::Refused(format!(
        "the store cannot hold mapped volumes: {what}. Two hosts would overwrite each other's volumes; use a store with atomic \
         conditional writes, and no versioning or proxy that ignores their conditions"
    ))
}

/// What racer `index` writes.
fn content_of(token: Uuid, attempt: usize, index: usize) -> Bytes {
    Bytes::from(format!("{token} {attempt} {index}"))
}

/// What racing writers were told.
struct Race {
    won: Option<usize>,
    /// Those whose answer was lost.
    unknown: Vec<usize>,
}

impl Race {
    fn judge<T>(outcomes: Vec<Result<T, StoreError>>, several: &str) -> Result<Race, StoreError> {
        let mut race = Race { won: None, unknown: Vec::new() };
        for (index, outcome) in outcomes.into_iter().enumerate() {
            match outcome {
                Ok(_) if race.won.is_some() => return Err(broken(several)),
                Ok(_) => race.won = Some(index),
                Err(StoreError::Exists(_) | StoreError::Changed(_)) => {}
                Err(StoreError::Unknown(_)) => race.unknown.push(index),
                Err(error) => return Err(error),
            }
        }
        Ok(race)
    }

    /// Whether what is stored now can be the work of racer `index`.
    fn may_be(&self, index: usize) -> bool {
        self.won.map_or_else(|| self.unknown.contains(&index), |won| won == index)
    }
}

async fn prove_create(store: &dyn SegmentStore, name: &str, token: Uuid) -> Result<(), StoreError> {
    let racers = (0..RACERS).map(|index| store.create(name, vec![content_of(token, 0, index)])).collect();
    let race =
        Race::judge(join_all(racers).await, "of several writers that created one object at once, more than one was told it won")?;
    let standing = match store.read(name, 0..READ_LEN).await {
        Err(StoreError::Absent(_)) if race.won.is_none() && !race.unknown.is_empty() => {
            return Err(StoreError::Unknown("conditions cannot be proven: no answer came to any create".to_owned()));
        }
        Err(StoreError::Absent(_)) => return Err(broken("an object cannot be read right after it was created")),
        read => read?,
    };
    if !(0..RACERS).any(|index| race.may_be(index) && content_of(token, 0, index) == standing) {
        return Err(broken(
            "of several writers that created one object at once, one was told it won, and another's content stands",
        ));
    }
    for attempt in 1..=ATTEMPTS {
        match store.create(name, vec![content_of(token, attempt, 0)]).await {
            Err(StoreError::Exists(_)) => break,
            Err(StoreError::Unknown(_)) if attempt < ATTEMPTS => {}
            Ok(()) => return Err(broken("creating an object that exists succeeds (`If-None-Match: *` is ignored)")),
            Err(error) => return Err(error),
        }
    }
    match store.read(name, 0..READ_LEN).await? == standing {
        true => Ok(()),
        false => Err(broken("creating an object that exists is refused, and replaces it all the same")),
    }
}

async fn prove_swap(store: &dyn SegmentStore, token: Uuid) -> Result<(), StoreError> {
    for attempt in 0..ATTEMPTS {
        let before = store.read_root(ROOT).await?.map(|(_, tag)| tag);
        let racers = (0..RACERS).map(|index| store.swap(ROOT, before.as_ref(), content_of(token, attempt, index))).collect();
        let several = "of several writers that swapped one version of a root at once, more than one was told it won";
        let race = Race::judge(join_all(racers).await, several)?;
        let (standing, after) = store.read_root(ROOT).await?.ok_or_else(|| broken("a root that was set cannot be read"))?;
        if before.as_ref() == Some(&after) {
            if race.won.is_none() && race.unknown.is_empty() {
                return Err(broken("swapping the version of a root that is in place is refused (`If-Match` with its tag)"));
            }
            if race.won.is_some() {
                return Err(broken("a swap succeeded, and the root is as before"));
            }
            continue;
        }
        let mine = (0..RACERS).find(|index| content_of(token, attempt, *index) == standing);
        if mine.is_some_and(|index| !race.may_be(index)) {
            return Err(broken("a swap was refused, and its content stands all the same"));
        }
        prove_stale(store, before.as_ref(), token).await?;
        // Where no racer's content stands, another opener's probe came between, and may have made all of them fail.
        if mine.is_some() || race.won.is_some() {
            return Ok(());
        }
    }
    Err(StoreError::Unknown("conditions cannot be proven: swaps of the root `probe` get no answer, or never win".to_owned()))
}

/// A version that is not in place any more must not be swapped.
async fn prove_stale(store: &dyn SegmentStore, stale: Option<&Tag>, token: Uuid) -> Result<(), StoreError> {
    for attempt in 0..ATTEMPTS {
        match store.swap(ROOT, stale, content_of(token, ATTEMPTS + attempt, 0)).await {
            Err(StoreError::Changed(_)) => return Ok(()),
            Err(StoreError::Unknown(_)) if attempt + 1 < ATTEMPTS => {}
            Ok(_) => return Err(broken("swapping a version of a root that was replaced succeeds (`If-Match` is ignored)")),
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::future::poll_fn;
    use std::sync::atomic::{AtomicBool, Ordering};
    use std::task::Poll;

    use super::*;
    use crate::segments::StoreFuture;
    use crate::segments::memory::MemoryStore;

    #[derive(Clone, Copy, Default)]
    struct Faults {
        create_overwrites: bool,
        create_looks_first: bool,
        swap_overwrites: bool,
        swap_looks_first: bool,
        refuses_every_swap: bool,
        says_exists_and_overwrites: bool,
        loses_first_replies: bool,
    }

    /// A store that breaks its promises.
    #[derive(Default)]
    struct Careless {
        store: MemoryStore,
        faults: Faults,
        replied: AtomicBool,
    }

    /// Lets the others run.
    async fn turn() {
        let mut waited = false;
        poll_fn(|context| {
            context.waker().wake_by_ref();
            if std::mem::replace(&mut waited, true) { Poll::Ready(()) } else { Poll::Pending }
        })
        .await;
    }

    impl Careless {
        fn with(faults: Faults) -> Careless {
            Careless { faults, ..Careless::default() }
        }

        fn lose<T>(&self, outcome: Result<T, StoreError>) -> Result<T, StoreError> {
            match self.faults.loses_first_replies && !self.replied.swap(true, Ordering::Relaxed) {
                true => Err(StoreError::Unknown("lost".to_owned())),
                false => outcome,
            }
        }
    }

    impl SegmentStore for Careless {
        crate::pass_on!(store: read, delete, list, read_root);

        fn create<'a>(&'a self, name: &'a str, content: Vec<Bytes>) -> StoreFuture<'a, ()> {
            Box::pin(async move {
                let exists = self.store.read(name, 0..1).await.is_ok();
                if self.faults.says_exists_and_overwrites && exists {
                    self.store.delete(name).await?;
                    self.store.create(name, content).await?;
                    return Err(StoreError::Exists(name.to_owned()));
                }
                if self.faults.create_looks_first {
                    turn().await;
                }
                if self.faults.create_overwrites || self.faults.create_looks_first && !exists {
                    self.store.delete(name).await?;
                }
                self.lose(self.store.create(name, content).await)
            })
        }

        fn swap<'a>(&'a self, name: &'a str, expected: Option<&'a Tag>, content: Bytes) -> StoreFuture<'a, Tag> {
            Box::pin(async move {
                if self.faults.refuses_every_swap {
                    return Err(StoreError::Changed(name.to_owned()));
                }
                let current = async || self.store.read_root(name).await.map(|root| root.map(|(_, tag)| tag));
                let fits = current().await?.as_ref() == expected;
                if self.faults.swap_looks_first {
                    turn().await;
                }
                if self.faults.swap_overwrites || self.faults.swap_looks_first && fits {
                    let now = current().await?;
                    return self.store.swap(name, now.as_ref(), content).await;
                }
                self.lose(self.store.swap(name, expected, content).await)
            })
        }
    }

    fn probe(faults: Faults) -> Result<(), StoreError> {
        let store = Careless::with(faults);
        let first = block_on(prove(&store, Uuid::from_u128(1)));
        // Again, as the next opener does: now the root is there.
        first.and_then(|()| block_on(prove(&store, Uuid::from_u128(2))))
    }

    #[test]
    fn a_good_store_passes_and_nothing_but_the_root_is_left() {
        probe(Faults::default()).unwrap();
        let store = MemoryStore::new();
        block_on(prove(&store, Uuid::from_u128(1))).unwrap();
        assert_eq!(block_on(store.list("")), Ok(Vec::new()));
    }

    #[test]
    fn a_lost_reply_is_no_proof_against_a_store() {
        probe(Faults { loses_first_replies: true, ..Faults::default() }).unwrap();
    }

    /// What each is told by.
    fn broken_promises() -> [(&'static str, Faults); 6] {
        let none = Faults::default();
        [
            ("more than one was told it won", Faults { create_overwrites: true, ..none }),
            ("more than one was told it won", Faults { create_looks_first: true, ..none }),
            ("more than one was told it won", Faults { swap_overwrites: true, ..none }),
            ("more than one was told it won", Faults { swap_looks_first: true, ..none }),
            ("cannot be read", Faults { refuses_every_swap: true, ..none }),
            ("another's content stands", Faults { says_exists_and_overwrites: true, ..none }),
        ]
    }

    #[test]
    fn case_10_every_broken_promise_is_found() {
        for (words, faults) in broken_promises() {
            let error = probe(faults).expect_err(words);
            assert!(matches!(&error, StoreError::Refused(text) if text.contains(words)), "{words}: {error}");
        }
    }

    #[test]
    fn case_33_a_store_breaks_its_promises_after_the_pool_was_made() {
        for (words, faults) in broken_promises() {
            let mut store = Careless::default();
            block_on(prove(&store, Uuid::from_u128(1))).expect("the pool is made");
            let opening = |number| OpenOptions { expected: None, read_only: false, probe: Some(Uuid::from_u128(number)) };
            prove_opening(&store, opening(2)).expect("it opens");
            store.faults = faults;
            let error = prove_opening(&store, opening(3)).expect_err(words);
            assert!(
                matches!(&error, StoreError::Refused(text) if text.contains("cannot hold mapped volumes")),
                "{words}: {error}"
            );
            store.faults = Faults::default();
            prove_opening(&store, opening(4)).expect("it opens again");
        }
    }
}
