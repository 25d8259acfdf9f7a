//! Says in the log when an open volume does not serve everything it should, and when it does again. If another host has taken it over, its exports
//! are told.
//!
//! What lasts is said again, less and less often.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::Daemon;
use crate::names::VolumeId;

const LOOK: Duration = Duration::from_secs(5);
const AGAIN_FIRST: Duration = Duration::from_secs(60);
const AGAIN_MAX: Duration = Duration::from_secs(3600);

/// What was said of the volumes that have a problem.
#[derive(Default)]
struct Said(BTreeMap<String, Problem>);

struct Problem {
    text: String,
    again: Instant,
    pause: Duration,
}

impl Daemon {
    /// Looks for ever.
    pub async fn watch_volumes(self: Arc<Self>) {
        let mut said = Said::default();
        loop {
            tokio::time::sleep(LOOK).await;
            let daemon = self.clone();
            let look = move || -> Vec<(String, Option<String>)> {
                let open = daemon.open.list().into_iter();
                let looked = open.map(|(id, volume)| {
                    let problem = volume.health();
                    if problem.is_some() && daemon.is_taken_over(&id) {
                        daemon.exports.lost(&volume);
                    }
                    (id.to_string(), problem)
                });
                looked.collect()
            };
            if let Ok(found) = tokio::task::spawn_blocking(look).await {
                said.look(found, blockdev::clock::monotonic()).into_iter().for_each(|line| tracing::warn!("{line}"));
            }
        }
    }

    fn is_taken_over(&self, id: &VolumeId) -> bool {
        id.snapshot.is_none() && self.pools.get(&id.pool).is_ok_and(|pool| pool.is_taken_over(&id.name))
    }
}

impl Said {
    /// What is to be said now.
    fn look(&mut self, found: Vec<(String, Option<String>)>, now: Instant) -> Vec<String> {
        let mut lines = Vec::new();
        let mut left = std::mem::take(&mut self.0);
        for (volume, problem) in found {
            match (problem, left.remove(&volume)) {
                (None, None) => {}
                (None, Some(_)) => lines.push(format!("volume {volume}: works again")),
                (Some(text), Some(said)) if said.text == text && now < said.again => drop(self.0.insert(volume, said)),
                (Some(text), said) => {
                    let last = said.filter(|said| said.text == text).map(|said| said.pause);
                    let pause = last.map_or(AGAIN_FIRST, |pause| (pause * 2).min(AGAIN_MAX));
                    lines.push(format!("volume {volume}: {text}"));
                    self.0.insert(volume, Problem { text, again: now + pause, pause });
                }
            }
        }
        lines
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_problem_is_said_once_then_seldom_and_its_end_too() {
        let (mut said, start) = (Said::default(), blockdev::clock::monotonic());
        let mut look = |seconds: u64, problem: Option<&str>| {
            said.look(vec![("p/v".to_owned(), problem.map(str::to_owned))], start + Duration::from_secs(seconds))
        };
        assert_eq!(look(0, None), Vec::<String>::new());
        assert_eq!(look(5, Some("full")), ["volume p/v: full"]);
        let times = (10..1000).step_by(5).filter(|seconds| !look(*seconds, Some("full")).is_empty());
        assert_eq!(times.collect::<Vec<_>>(), [65, 185, 425, 905]);
        assert_eq!(look(1000, Some("gone")), ["volume p/v: gone"]);
        assert_eq!(look(1005, None), ["volume p/v: works again"]);
        assert_eq!(look(1010, None), Vec::<String>::new());
    }
}
