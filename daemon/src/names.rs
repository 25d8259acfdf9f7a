//! Names of volumes and snapshots as users write them: `POOL/NAME`, `NAME`, each with `@SNAP` or without.

use std::fmt;
use std::str::FromStr;

use crate::error::{Error, Result};

/// A name as written: the pool may be missing.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct VolumeRef {
    pub pool: Option<String>,
    pub name: String,
    pub snapshot: Option<String>,
}

/// A volume or snapshot with its pool.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct VolumeId {
    pub pool: String,
    pub name: String,
    pub snapshot: Option<String>,
}

impl VolumeId {
    pub fn new(pool: &str, name: &str) -> VolumeId {
        VolumeId { pool: pool.to_owned(), name: name.to_owned(), snapshot: None }
    }

    /// The volume itself, without the snapshot.
    pub fn volume(&self) -> VolumeId {
        VolumeId { snapshot: None, ..self.clone() }
    }

    /// `NAME` or `NAME@SNAP`, without the pool.
    pub fn short(&self) -> String {
        with_snapshot(&self.name, self.snapshot.as_deref())
    }
}

fn with_snapshot(name: &str, snapshot: Option<&str>) -> String {
    snapshot.map_or_else(|| name.to_owned(), |snapshot| format!("{name}@{snapshot}"))
}

impl fmt::Display for VolumeId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.pool, self.short())
    }
}

impl fmt::Display for VolumeRef {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let short = with_snapshot(&self.name, self.snapshot.as_deref());
        match &self.pool {
            Some(pool) => write!(f, "{pool}/{short}"),
            None => f.write_str(&short),
        }
    }
}

impl FromStr for VolumeRef {
    type Err = Error;

    fn from_str(text: &str) -> Result<VolumeRef> {
        let (path, snapshot) = match text.split_once('@') {
            Some((path, snapshot)) => (path, Some(snapshot)),
            None => (text, None),
        };
        let (pool, name) = match path.split_once('/') {
            Some((pool, name)) => (Some(pool), name),
            None => (None, path),
        };
        if let Some(pool) = pool {
            backends::check_name("pool", pool)?;
        }
        backends::check_name("volume", name)?;
        if let Some(snapshot) = snapshot {
            backends::check_name("snapshot", snapshot)?;
        }
        let owned = |text: &str| text.to_owned();
        Ok(VolumeRef { pool: pool.map(owned), name: owned(name), snapshot: snapshot.map(owned) })
    }
}

impl VolumeRef {
    /// Refuses a snapshot where only a volume makes sense.
    pub fn without_snapshot(self) -> Result<VolumeRef> {
        match self.snapshot {
            None => Ok(self),
            Some(_) => Err(Error::invalid(format!("{self} is a snapshot; a volume is needed here"))),
        }
    }

    /// Refuses a volume where only a snapshot makes sense.
    pub fn with_snapshot(self) -> Result<(VolumeRef, String)> {
        match self.snapshot.clone() {
            Some(snapshot) => Ok((VolumeRef { snapshot: None, ..self }, snapshot)),
            None => Err(Error::invalid(format!("{self} names no snapshot: write VOL@SNAP"))),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_round_trip() {
        for text in ["a", "p/a", "p/a@s", "a@s", "0.x_y-z"] {
            assert_eq!(text.parse::<VolumeRef>().unwrap().to_string(), text);
        }
    }

    #[test]
    fn bad_names_are_refused() {
        let long = "a".repeat(300);
        for text in ["", "/", "a/", "/a", "a/b/c", "../a", ".a", "A", "a b", "a@", "@s", "a@b@c", "a\0", "ä", &long] {
            let error = text.parse::<VolumeRef>().unwrap_err();
            assert!(error.message.len() < 400 && error.message.contains("1 to 63"), "{text:?}: {error}");
        }
    }
}
