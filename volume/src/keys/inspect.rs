//! What can be told of keys without a key-encryption key: which there are, and what each is wrapped by.

use std::collections::BTreeSet;
use std::str::FromStr;

use backends::segments::SegmentStore;
use uuid::Uuid;

use super::record::{Purpose, Record, State};
use super::{KekId, KeyError, POOL_RECORD, PREFIX, again, record_name, root_called};

/// The record of a key, as far as it can be read without opening it.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct KeyStatus {
    /// The domain whose data key it is; `None`: it is the pool's own.
    pub domain: Option<Uuid>,
    pub wrapping: Wrapping,
}

/// How a key lies in the pool.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Wrapping {
    /// Wrapped by this key-encryption key.
    By(KekId),
    /// As it is: the pool's own, while no domain is encrypted.
    Clear,
    /// Destroyed on purpose.
    Erased,
    /// There is a record that cannot be understood.
    Damaged(KeyError),
}

/// The keys of pool `pool`, its own first. Domains that are not encrypted have none. Those that are erased are found only if they are among `known`.
///
/// # Errors
/// Those of the store.
pub async fn inspect(
    store: &dyn SegmentStore,
    pool: Uuid,
    known: impl IntoIterator<Item = Uuid>,
) -> Result<Vec<KeyStatus>, KeyError> {
    let domains: BTreeSet<Uuid> = listed(store).await?.into_iter().chain(known).collect();
    let mut found = Vec::new();
    for domain in std::iter::once(None).chain(domains.into_iter().map(Some)) {
        found.extend(status(store, pool, domain).await?);
    }
    Ok(found)
}

/// The domains that have a record, or are about to get one.
pub(super) async fn listed(store: &dyn SegmentStore) -> Result<Vec<Uuid>, KeyError> {
    let listed = again(async || store.list(PREFIX).await).await?;
    let domain = |name: &str| name.strip_prefix(PREFIX).and_then(|domain| Uuid::from_str(domain).ok());
    Ok(listed.iter().filter_map(|object| domain(&object.name)).collect())
}

async fn status(store: &dyn SegmentStore, pool: Uuid, domain: Option<Uuid>) -> Result<Option<KeyStatus>, KeyError> {
    let (name, purpose) = match domain {
        None => (POOL_RECORD.to_owned(), Purpose::Pool),
        Some(domain) => (record_name(domain), Purpose::Domain),
    };
    let Some((bytes, _)) = again(async || store.read_root(&name).await).await? else { return Ok(None) };
    let wrapping = match Record::parse(&root_called(&name), &bytes, purpose, pool) {
        Err(error) => Wrapping::Damaged(error),
        Ok(record) if record.group() != domain.unwrap_or_default() => {
            Wrapping::Damaged(record.damaged("it belongs to another volume"))
        }
        Ok(record) => match record.state {
            State::Wrapped(kek) => Wrapping::By(kek),
            State::Clear => Wrapping::Clear,
            State::Erased => Wrapping::Erased,
            State::NotEncrypted => return Ok(None),
        },
    };
    Ok(Some(KeyStatus { domain, wrapping }))
}
