//! One control operation at a time per name, so that a slow backend holds up only its own volumes.

use std::collections::HashSet;

use parking_lot::{Condvar, Mutex};

/// Locks by name.
#[derive(Default)]
pub struct NameLocks {
    held: Mutex<HashSet<String>>,
    released: Condvar,
}

/// Names held until dropped.
pub struct NameGuard<'a> {
    locks: &'a NameLocks,
    names: Vec<String>,
}

impl NameLocks {
    /// Waits for all of `names` and holds them. They are taken together, so there is no order to get wrong.
    pub fn hold(&self, names: impl IntoIterator<Item = String>) -> NameGuard<'_> {
        let names: HashSet<String> = names.into_iter().collect();
        let mut held = self.held.lock();
        while names.iter().any(|name| held.contains(name)) {
            self.released.wait(&mut held);
        }
        held.extend(names.iter().cloned());
        NameGuard { locks: self, names: names.into_iter().collect() }
    }
}

impl Drop for NameGuard<'_> {
    fn drop(&mut self) {
        let mut held = self.locks.held.lock();
        for name in &self.names {
            held.remove(name);
        }
        self.locks.released.notify_all();
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;
    use std::sync::atomic::{AtomicUsize, Ordering};

    use super::*;

    #[test]
    fn names_exclude_each_other_in_any_order() {
        let locks = Arc::new(NameLocks::default());
        let inside = Arc::new(AtomicUsize::new(0));
        let threads: Vec<_> = (0..8)
            .map(|number| {
                let (locks, inside) = (locks.clone(), inside.clone());
                std::thread::spawn(move || {
                    for _ in 0..200 {
                        let names = if number % 2 == 0 { ["a", "b"] } else { ["b", "c"] };
                        let _held = locks.hold(names.map(str::to_owned));
                        assert_eq!(inside.fetch_add(1, Ordering::SeqCst), 0);
                        inside.fetch_sub(1, Ordering::SeqCst);
                    }
                })
            })
            .collect();
        threads.into_iter().for_each(|thread| thread.join().unwrap());
        drop(locks.hold(["a".to_owned()]));
    }
}
