//! What a check of a volume finds, and what it says of that.

use std::ops::Range;

use crate::error::VolumeError;
use crate::segment::BLOCK;

/// What is told of one volume.
const TOLD_MAX: usize = 100;
/// How often a check looks at what changed while it looked.
const LOOKS_MAX: u32 = 8;

/// In the words of whoever asked, in the order in which they were found.
#[derive(Default)]
pub(crate) struct Findings {
    told: Vec<String>,
    more: u64,
}

/// Why something cannot be read.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(crate) struct Damage {
    object: String,
    why: &'static str,
}

/// What was seen in one go.
#[derive(Default, PartialEq, Eq, Debug)]
pub(crate) struct Look {
    pub(crate) damaged: Vec<(Range<u64>, Damage)>,
    /// Could not be looked at: it was freed meanwhile.
    pub(crate) moved: Vec<Range<u64>>,
    /// A checkpoint came meanwhile: what it has replaced is no damage, and what took its place was not looked at.
    pub(crate) is_outdated: bool,
}

impl Look {
    /// Notes why some blocks were not read. A store that does not answer, or another owner, ends the search.
    pub(crate) fn note(&mut self, blocks: &Range<u64>, error: VolumeError) -> Result<(), VolumeError> {
        match error {
            VolumeError::Moved => self.moved.push(blocks.clone()),
            VolumeError::ObjectDamaged { object, why } => self.damaged.push((blocks.clone(), Damage { object, why })),
            error => return Err(error),
        }
        Ok(())
    }
}

/// Looks at ranges, and again at what changed meanwhile, until nothing did or that was done often enough. Both parts of the answer are in order.
pub(crate) async fn look_until_whole(
    mut ranges: Vec<Range<u64>>,
    mut look: impl AsyncFnMut(&[Range<u64>]) -> Result<Look, VolumeError>,
) -> Result<Look, VolumeError> {
    let mut damaged = Vec::new();
    for looks in 1..=LOOKS_MAX {
        let mut seen = look(&ranges).await?;
        if seen.is_outdated && looks < LOOKS_MAX {
            seen.moved.extend(seen.damaged.into_iter().map(|(blocks, _)| blocks));
        } else {
            damaged.append(&mut seen.damaged);
        }
        let moved = joined(seen.moved.into_iter().map(|blocks| (blocks, ())).collect());
        ranges = moved.into_iter().map(|(blocks, ())| blocks).collect();
        if ranges.is_empty() {
            break;
        }
    }
    Ok(Look { damaged: joined(damaged), moved: ranges, is_outdated: false })
}

/// In order; those that touch each other and are alike are one.
fn joined<K: PartialEq>(mut parts: Vec<(Range<u64>, K)>) -> Vec<(Range<u64>, K)> {
    parts.sort_by_key(|(blocks, _)| blocks.start);
    let mut joined: Vec<(Range<u64>, K)> = Vec::new();
    for (blocks, kind) in parts {
        match joined.last_mut() {
            Some((last, of_last)) if *of_last == kind && last.end >= blocks.start => last.end = last.end.max(blocks.end),
            _ => joined.push((blocks, kind)),
        }
    }
    joined
}

impl Findings {
    pub(crate) fn tell(&mut self, finding: impl FnOnce() -> String) {
        match self.told.len() < TOLD_MAX {
            true => self.told.push(finding()),
            false => self.more += 1,
        }
    }

    /// What was seen of `what`, by its address there.
    pub(crate) fn tell_all(&mut self, what: &str, Look { damaged, moved, .. }: Look) {
        let bytes = |blocks: &Range<u64>| format!("bytes {} to {}", blocks.start * BLOCK as u64, blocks.end * BLOCK as u64);
        let mut moved = moved.into_iter().peekable();
        let mut tell_moved = |findings: &mut Findings, before: u64| {
            while let Some(blocks) = moved.next_if(|blocks| blocks.start < before) {
                findings.tell(|| {
                    format!("{what}: {} could not be compared: the volume changed meanwhile; check again", bytes(&blocks))
                });
            }
        };
        for (blocks, Damage { object, why }) in damaged {
            tell_moved(self, blocks.start);
            self.tell(|| format!("{what}: {} cannot be read: {object} is damaged: {why}", bytes(&blocks)));
        }
        tell_moved(self, u64::MAX);
    }

    pub(crate) fn told(mut self) -> Vec<String> {
        if self.more > 0 {
            self.told.push(format!("{} more findings are not listed: mend these first, then check again", self.more));
        }
        self.told
    }
}

#[cfg(test)]
mod tests {
    use backends::segments::drive::block_on;

    use super::*;

    fn damage(blocks: Range<u64>, object: &str) -> (Range<u64>, Damage) {
        (blocks, Damage { object: object.to_owned(), why: "gone" })
    }

    /// What a check comes to that sees these things one after the other, and the ranges that it looked at.
    fn looked_at(mut seen: Vec<Look>) -> (Look, Vec<Vec<Range<u64>>>) {
        let mut asked = Vec::new();
        seen.reverse();
        let look = async |ranges: &[Range<u64>]| {
            asked.push(ranges.to_vec());
            Ok(if seen.len() > 1 { seen.pop().unwrap() } else { std::mem::take(&mut seen[0]) })
        };
        let all = vec![0..50, 60..100];
        let found = block_on(look_until_whole(all, look)).unwrap();
        (found, asked)
    }

    #[test]
    fn what_changed_meanwhile_is_looked_at_again_and_nothing_else() {
        let first =
            Look { damaged: vec![damage(9..10, "b"), damage(3..4, "a")], moved: vec![20..21, 7..8, 19..20], ..Look::default() };
        let outdated = Look { damaged: vec![damage(7..8, "a")], moved: vec![20..21, 19..20], is_outdated: true };
        let (found, asked) = looked_at(vec![first, outdated, Look::default()]);
        assert_eq!(found.damaged, [damage(3..4, "a"), damage(9..10, "b")]);
        assert_eq!(found.moved, [] as [Range<u64>; 0]);
        assert_eq!(asked, [[0..50, 60..100], [7..8, 19..21], [7..8, 19..21]]);
    }

    #[test]
    fn what_never_stands_still_is_told() {
        let restless = || Look { damaged: vec![damage(5..6, "a")], moved: vec![1..2, 8..9], is_outdated: true };
        let (found, asked) = looked_at((0..=LOOKS_MAX).map(|_| restless()).collect());
        assert_eq!(asked.len(), LOOKS_MAX as usize);
        let mut findings = Findings::default();
        findings.tell_all("snapshot s", found);
        assert_eq!(
            findings.told(),
            [
                "snapshot s: bytes 4096 to 8192 could not be compared: the volume changed meanwhile; check again",
                "snapshot s: bytes 20480 to 24576 cannot be read: a is damaged: gone",
                "snapshot s: bytes 32768 to 36864 could not be compared: the volume changed meanwhile; check again",
            ]
        );
    }

    #[test]
    fn neighbours_of_one_object_are_one_finding_and_what_is_not_listed_is_counted() {
        let parts = vec![damage(2..3, "a"), damage(0..1, "a"), damage(1..2, "a"), damage(3..4, "b"), damage(5..6, "b")];
        let (found, _) = looked_at(vec![Look { damaged: parts, ..Look::default() }]);
        assert_eq!(found.damaged, [damage(0..3, "a"), damage(3..4, "b"), damage(5..6, "b")]);
        let mut findings = Findings::default();
        let damaged = (0..TOLD_MAX as u64 + 7).map(|block| damage(2 * block..2 * block + 1, "a")).collect();
        findings.tell_all("the volume", Look { damaged, ..Look::default() });
        let told = findings.told();
        assert_eq!(told.len(), TOLD_MAX + 1);
        assert!(told[TOLD_MAX - 1].contains("bytes 811008 to 815104"), "{}", told[TOLD_MAX - 1]);
        assert_eq!(told[TOLD_MAX], "7 more findings are not listed: mend these first, then check again");
    }
}
