//! Names of objects and roots: what is allowed, and how stores that keep them in a tree of folders write them.

use super::StoreError;

/// The longest name, in bytes. With the mark of [`stored`] it fits a file name.
const LEN_MAX: usize = 250;

/// Ends the stored form of a name, so that object `a` is never in the way of folder `a`. No name holds it.
const MARK: char = '=';

fn is_allowed(byte: u8) -> bool {
    byte.is_ascii_lowercase() || byte.is_ascii_digit() || b"._-".contains(&byte)
}

fn refused(what: &str, name: &str) -> StoreError {
    let shown: String = name.chars().take(80).collect();
    StoreError::Refused(format!(
        "{what} {shown:?} refused: it must be parts of a-z, 0-9, '.', '_' and '-', none of them '.' or '..', joined by '/', \
         {LEN_MAX} bytes at most"
    ))
}

/// Checks one part of a name.
pub(super) fn is_part(part: &str) -> bool {
    !part.is_empty() && part != "." && part != ".." && part.bytes().all(is_allowed)
}

/// Checks the name of an object or a root.
pub(super) fn check(name: &str) -> Result<(), StoreError> {
    let good = name.len() <= LEN_MAX && name.split('/').all(is_part);
    if good { Ok(()) } else { Err(refused("name", name)) }
}

/// Checks the beginning of names: whole parts, and the beginning of one more, which may be empty.
pub(super) fn check_prefix(prefix: &str) -> Result<(), StoreError> {
    let (folders, last) = folder_of(prefix);
    let good_folders = folders.is_none_or(|folders| folders.split('/').all(is_part));
    let good = prefix.len() <= LEN_MAX && good_folders && last.bytes().all(is_allowed);
    if good { Ok(()) } else { Err(refused("prefix", prefix)) }
}

/// All parts but the last, and the last.
pub(super) fn folder_of(name: &str) -> (Option<&str>, &str) {
    match name.rsplit_once('/') {
        Some((folder, last)) => (Some(folder), last),
        None => (None, name),
    }
}

/// The name as a store of files or keys writes it.
pub(super) fn stored(name: &str) -> String {
    format!("{name}{MARK}")
}

/// The name behind a stored one, or its last part behind a stored last part; `None` for what no store of ours wrote.
pub(super) fn from_stored(stored: &str) -> Option<&str> {
    stored.strip_suffix(MARK).filter(|name| check(name).is_ok())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_parts_joined_by_slashes() {
        for good in ["a", "0", "a/b/c", "w/12/345", "a.b_c-d", "...", "-", &"x".repeat(LEN_MAX)] {
            assert_eq!(check(good), Ok(()), "{good}");
            assert_eq!(from_stored(&stored(good)), Some(good));
        }
        let long = "x".repeat(LEN_MAX + 1);
        for bad in ["", "/", "/a", "a/", "a//b", ".", "..", "a/../b", "./a", "A", "a b", "a=", "a\0", "ä", "a\\b", &long] {
            assert!(matches!(check(bad), Err(StoreError::Refused(_))), "{bad:?}");
        }
        assert_eq!(from_stored("a"), None);
        assert_eq!(from_stored("=lost"), None);
    }

    #[test]
    fn a_prefix_may_end_anywhere_in_a_name() {
        for good in ["", "a", "a/", "a/b", "a/.", "a/b/"] {
            assert_eq!(check_prefix(good), Ok(()), "{good}");
        }
        for bad in ["/", "//", "a//", "../", "a/../b", "A", "a="] {
            assert!(check_prefix(bad).is_err(), "{bad}");
        }
    }
}
