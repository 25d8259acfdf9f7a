//! Faults for tests, in builds with the feature `fault-injection` only.
//!
//! `[daemon].faults` holds rules separated by `;`, each `OPERATION KEY=VALUE …`:
//! `write delay_us=1000 jitter_us=500; read errors_per_million=100 errno=5; volume=local/vm1 flush errno=28 errors_per_million=1000000`.

use std::sync::Arc;
use std::time::Duration;

use blockdev::layers::fault::{FaultPlan, FaultRule, Faulty};
use blockdev::stats::OpClass;
use blockdev::{BlockDevice, Errno};

use crate::error::{Error, Result};
use crate::names::VolumeId;

const SEED: u64 = 1;

/// Puts the faults that `text` describes between a volume and its device.
pub fn wrap(id: &VolumeId, device: Arc<dyn BlockDevice>, text: &str) -> Result<Arc<dyn BlockDevice>> {
    let rules: Result<Vec<_>> = text.split(';').filter(|rule| !rule.trim().is_empty()).map(parse).collect();
    let own = |(volume, rule): (Option<String>, FaultRule)| volume.is_none_or(|volume| volume == id.to_string()).then_some(rule);
    let rules: Vec<FaultRule> = rules?.into_iter().filter_map(own).collect();
    if rules.is_empty() {
        return Ok(device);
    }
    tracing::warn!("volume {id}: {} rules inject faults", rules.len());
    let plan = FaultPlan::new(SEED);
    plan.set(rules);
    Ok(Arc::new(Faulty::new(device, plan)))
}

fn parse(text: &str) -> Result<(Option<String>, FaultRule)> {
    let wrong = |word: &str| Error::invalid(format!("daemon.faults: {word:?} is not understood"));
    let mut volume = None;
    let mut class = None;
    let (mut errors_per_million, mut errno) = (0, Errno::EIO);
    let (mut delay, mut jitter) = (Duration::ZERO, Duration::ZERO);
    for word in text.split_whitespace() {
        let Some((key, value)) = word.split_once('=') else {
            class = OpClass::ALL.into_iter().find(|class| class.name() == word);
            class.ok_or_else(|| wrong(word))?;
            continue;
        };
        let number = || value.parse::<u32>().map_err(|_| wrong(word));
        match key {
            "volume" => volume = Some(value.to_owned()),
            "errors_per_million" => errors_per_million = number()?,
            "errno" => errno = Errno::from_raw(number()? as i32),
            "delay_us" => delay = Duration::from_micros(u64::from(number()?)),
            "jitter_us" => jitter = Duration::from_micros(u64::from(number()?)),
            _ => return Err(wrong(word)),
        }
    }
    let class = class.ok_or_else(|| Error::invalid(format!("daemon.faults: {text:?} names no operation")))?;
    Ok((volume, FaultRule { class, errors_per_million, errno, delay, jitter }))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rules_are_read() {
        let (volume, rule) = parse(" volume=p/v write errors_per_million=5 errno=28 delay_us=7 ").unwrap();
        assert_eq!(volume.as_deref(), Some("p/v"));
        assert_eq!((rule.class, rule.errors_per_million, rule.errno), (OpClass::Write, 5, Errno::ENOSPC));
        assert_eq!((rule.delay, rule.jitter), (Duration::from_micros(7), Duration::ZERO));
        for text in ["", "scribble", "errno=5", "read errno=x", "read colour=1"] {
            assert!(parse(text).is_err(), "{text}");
        }
    }
}
