//! What must be in the store for a group to be whole, as its root and its newest checkpoint say.
//!
//! ```text
//!   checkpoint ─▶ what it says, m/ ─▶ table: live objects, own w/ and g/, and those of ancestors
//!        └─▶ history after it: each w/ up to the seal of its epoch; after the last seal nobody can tell a gap from the end
//! ```

use std::collections::{BTreeSet, HashMap, HashSet};

use backends::segments::Listed;

use crate::error::VolumeError;
use crate::mapped::Parts;
use crate::names::{Family, Group, Source};
use crate::object::CLEAR_LEN;
use crate::segment::Place;
use crate::table::State;

/// What a checkpoint says to be in the store.
pub(crate) struct Contents {
    group: Group,
    place: Place,
    own: BTreeSet<Source>,
    /// Of ancestors.
    foreign: Vec<Source>,
    /// Objects that were done away with, by the own ones that their blocks are in now.
    moved: HashMap<Source, Vec<Source>>,
}

impl Contents {
    pub(crate) async fn read(parts: &Parts, group: Group) -> Result<Contents, VolumeError> {
        let (root, meta) = parts.chain(group).read_meta().await?;
        let table = meta.table;
        let live = table.live().filter_map(|handle| table.source(handle));
        let (mut own, foreign): (BTreeSet<Source>, BTreeSet<Source>) = live.partition(|source| source.group == group);
        own.insert(root.meta());
        let mut moved: HashMap<Source, Vec<Source>> = HashMap::new();
        for (handle, entry) in table.used() {
            let State::Forwarded(to) = entry.state else { continue };
            if let (Some(from), Some(to)) = (table.source(handle), table.source(to)) {
                moved.entry(to).or_default().push(from);
            }
        }
        Ok(Contents { group, place: root.checkpoint.place, own, foreign: foreign.into_iter().collect(), moved })
    }

    /// Those of its own objects that are not listed, and gaps in its history.
    pub(crate) fn missing(&self, listed: &[Listed]) -> BTreeSet<Source> {
        let parsed = listed.iter().filter_map(|object| Some((Source::parse(&object.name)?, object.len)));
        let there: HashMap<Source, u64> = parsed.collect();
        let mut missing: BTreeSet<Source> = self.own.iter().filter(|source| !there.contains_key(*source)).copied().collect();
        let is_seal = |source: &Source| source.family == Family::Step && there[source] == CLEAR_LEN as u64;
        let mut ends: HashMap<u64, u64> = HashMap::new();
        for seal in there.keys().filter(|source| is_seal(source) && source.epoch >= self.place.epoch) {
            let end = ends.entry(seal.epoch).or_insert(seal.number);
            *end = seal.number.min(*end);
        }
        for (epoch, end) in ends {
            let start = if epoch == self.place.epoch { self.place.sequence } else { 0 };
            let steps = (start..end).map(|number| Source { group: self.group, family: Family::Step, epoch, number });
            missing.extend(steps.filter(|step| !there.contains_key(step)));
        }
        missing
    }

    /// Those of `missing` that a later checkpoint still needs.
    pub(crate) fn still_needed(&self, missing: BTreeSet<Source>) -> BTreeSet<Source> {
        let is_ahead = |source: &Source| {
            source.family == Family::Step && Place { epoch: source.epoch, sequence: source.number } >= self.place
        };
        missing.into_iter().filter(|source| self.own.contains(source) || is_ahead(source)).collect()
    }

    /// What others cannot read if these are missing: they, and what was moved into them.
    pub(crate) fn lost_with(&self, missing: &BTreeSet<Source>) -> HashSet<Source> {
        let moved = missing.iter().filter_map(|source| self.moved.get(source)).flatten();
        moved.chain(missing).copied().collect()
    }

    /// Whether any of these objects of ancestors is needed.
    pub(crate) fn needs(&self, lost: &HashSet<Source>) -> bool {
        self.foreign.iter().any(|source| lost.contains(source))
    }
}
