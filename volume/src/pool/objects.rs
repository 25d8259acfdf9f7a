//! Whether the store has all objects that volumes need. What their checkpoints name is compared with what is listed; no data is read.

use std::collections::{BTreeMap, HashSet};

use backends::VolumeRecord;
use backends::pool::Result;
use backends::segments::drive::block_on;
use uuid::Uuid;

use super::segments::Opened;
use super::together::names_of;
use super::{MappedPool, groups};
use crate::device::OpenError;
use crate::error::VolumeError;
use crate::names::Source;

/// Named of one group.
const NAMED_MAX: usize = 100;

/// Volumes of the catalogue, by group.
pub(super) type Groups = BTreeMap<Uuid, Vec<VolumeRecord>>;

/// A group that lacks objects.
struct Lacking {
    volumes: String,
    missing: Vec<String>,
    /// What those who were cloned from it cannot find either.
    lost: HashSet<Source>,
    clones: Vec<String>,
}

impl MappedPool {
    /// What is missing, one sentence each. `sizes`: the bytes that each group has in the store, in which `progress` is told. Blocks.
    pub(super) fn check_objects(
        &self,
        opened: &Opened,
        groups: &Groups,
        sizes: &BTreeMap<Uuid, u64>,
        progress: &dyn Fn(u64, u64),
    ) -> Result<Vec<String>> {
        let size_of = |group| sizes.get(group).copied().unwrap_or(0);
        let total = groups.keys().map(size_of).sum();
        let (mut found, mut lacking, mut done) = (Vec::new(), Vec::new(), 0);
        for (group, records) in groups {
            match self.lacking(opened, *group, records)? {
                Ok(Some(lacks)) => lacking.push(lacks),
                Ok(None) => {}
                Err(why) => found.push(format!("volume {}: {why}", names_of(records))),
            }
            done += size_of(group);
            progress(done, total);
        }
        if !lacking.is_empty() {
            self.name_clones(opened, groups, &mut lacking)?;
        }
        found.extend(lacking.iter().flat_map(Lacking::told));
        Ok(found)
    }

    /// What a group lacks; the inner error says why that cannot be told.
    fn lacking(
        &self,
        opened: &Opened,
        group: Uuid,
        records: &[VolumeRecord],
    ) -> Result<std::result::Result<Option<Lacking>, String>> {
        let Some(record) = records.first() else { return Ok(Ok(None)) };
        if let Some(why) = groups::check_root(&*opened.store, group, records) {
            return Ok(Err(why));
        }
        // Nobody can read what it has.
        if opened.is_erased(group)? {
            return Ok(Ok(None));
        }
        let engine = match self.engine_of(record, opened) {
            Ok(engine) => engine,
            Err(error) => return Ok(Err(format!("whether it has all its objects cannot be told: {error}"))),
        };
        let compared = || -> std::result::Result<_, OpenError> {
            let contents = engine.contents()?;
            let listed = block_on(opened.store.list(&groups::prefix(group))).map_err(VolumeError::from)?;
            let missing = contents.missing(&listed);
            if missing.is_empty() {
                return Ok(None);
            }
            // Its owner may have done away with them meanwhile.
            let now = engine.contents()?;
            let missing = now.still_needed(missing);
            Ok((!missing.is_empty()).then(|| Lacking {
                volumes: names_of(records),
                lost: now.lost_with(&missing),
                missing: missing.iter().map(Source::path).collect(),
                clones: Vec::new(),
            }))
        };
        match compared() {
            Ok(lacks) => Ok(Ok(lacks)),
            // It was deleted meanwhile.
            Err(OpenError::Volume(VolumeError::NoVolume)) => Ok(Ok(None)),
            Err(error) => Ok(Err(error.to_string())),
        }
    }

    /// Volumes that need what others lack.
    fn name_clones(&self, opened: &Opened, groups: &Groups, lacking: &mut [Lacking]) -> Result<()> {
        for (group, records) in groups.iter().filter(|(_, records)| records.iter().any(|record| record.origin.is_some())) {
            if opened.is_erased(*group)? {
                continue;
            }
            let contents = records.first().map(|record| self.engine_of(record, opened).map(|engine| engine.contents()));
            // Why not is told already.
            let Some(Ok(Ok(contents))) = contents else { continue };
            let needed = lacking.iter_mut().filter(|lacks| contents.needs(&lacks.lost));
            needed.for_each(|lacks| lacks.clones.push(names_of(records)));
        }
        Ok(())
    }
}

impl Lacking {
    fn told(&self) -> Vec<String> {
        let Lacking { volumes, missing, clones, .. } = self;
        let concerned = match clones.is_empty() {
            true => format!("volume {volumes}"),
            false => format!("volume {volumes}, and cloned from it {}", clones.join(", ")),
        };
        let sentence = |object: &String| format!("{concerned}: {object} is missing: restore it from a copy of the pool");
        let mut told: Vec<String> = missing.iter().take(NAMED_MAX).map(sentence).collect();
        if missing.len() > NAMED_MAX {
            told.push(format!("{concerned}: {} more objects are missing", missing.len() - NAMED_MAX));
        }
        told
    }
}
