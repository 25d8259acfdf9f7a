//! Files on machines. A content is a number; equal numbers are equal blocks.

use crate::Random;
use std::collections::BTreeMap;

/// Files of the repository; about 24 blocks each.
const FILES: usize = 24_000;
/// Of 1000 files, how many get a new version in a generation.
const RELEASES: u64 = 30;
/// Of 1000 new versions seen, how many a machine installs in a generation: it catches up over time.
const UPGRADES: u64 = 400;
/// Things that happen on a machine in a generation, besides.
const EVENTS: usize = 1500;

/// Where everybody's files come from.
pub struct Repository {
    files: Vec<Vec<u64>>,
    versions: Vec<u32>,
}

impl Repository {
    pub fn new(random: &mut Random) -> Self {
        let files = (0..FILES).map(|_| fresh(len(random), random)).collect();
        Self { files, versions: vec![0; FILES] }
    }

    /// New versions of some files. A third keep their beginning, a third all but a few blocks, a third nothing.
    pub fn release(&mut self, random: &mut Random) {
        for _ in 0..FILES as u64 * RELEASES / 1000 {
            let file = random.below(FILES as u64) as usize;
            self.versions[file] += 1;
            let content = &mut self.files[file];
            let size = content.len();
            match random.below(3) {
                0 => {
                    let kept = random.below(size as u64) as usize;
                    content.truncate(kept);
                    content.extend(fresh(size - kept, random));
                }
                1 => (0..size.div_ceil(8)).for_each(|_| content[random.below(size as u64) as usize] = random.draw()),
                _ => *content = fresh(len(random), random),
            }
        }
    }
}

/// Mostly small, a few big ones.
fn len(random: &mut Random) -> usize {
    let most = match random.below(100) {
        0..50 => 4,
        50..85 => 16,
        85..98 => 64,
        _ => 1500,
    };
    1 + random.below(most) as usize
}

fn fresh(len: usize, random: &mut Random) -> Vec<u64> {
    (0..len).map(|_| random.draw()).collect()
}

struct File {
    /// Its number in the repository, and the version installed.
    origin: Option<(usize, u32)>,
    addresses: Vec<u64>,
    contents: Vec<u64>,
}

/// What is written where; `None` is a discard.
pub type Writes = Vec<(u64, Option<u64>)>;

/// A machine's file system.
pub struct Machine {
    files: Vec<File>,
    /// Free runs of addresses: start and length.
    free: BTreeMap<u64, u64>,
    end: u64,
    cursor: u64,
}

impl Machine {
    /// Installs everything in its present version, in the repository's order but for packages of 50 files, which come in any order.
    pub fn install(repository: &Repository, random: &mut Random) -> (Self, Writes) {
        let mut machine = Self { files: Vec::new(), free: BTreeMap::new(), end: 0, cursor: 0 };
        let mut writes = Vec::new();
        let mut packages: Vec<_> = (0..FILES).step_by(50).map(|first| (random.draw(), first)).collect();
        packages.sort_unstable();
        for (_, first) in packages {
            for file in first..(first + 50).min(FILES) {
                let origin = Some((file, repository.versions[file]));
                machine.create(origin, repository.files[file].clone(), &mut writes);
            }
        }
        (machine, writes)
    }

    /// One generation.
    pub fn live(&mut self, repository: &Repository, random: &mut Random) -> Writes {
        let mut writes = Vec::new();
        self.upgrade(repository, random, &mut writes);
        for _ in 0..EVENTS {
            let file = random.below(self.files.len() as u64) as usize;
            match random.below(100) {
                0..40 => self.edit(file, random, &mut writes),
                40..55 => self.create(None, fresh(len(random), random), &mut writes),
                55..70 => {
                    let copy = self.files[file].contents.clone();
                    self.create(None, copy, &mut writes);
                }
                70..80 => {
                    let file = &self.files[file];
                    writes.extend(file.addresses.iter().copied().zip(file.contents.iter().copied().map(Some)));
                }
                _ => self.delete(file, &mut writes),
            }
        }
        writes
    }

    fn upgrade(&mut self, repository: &Repository, random: &mut Random, writes: &mut Writes) {
        let mut index = 0;
        while index < self.files.len() {
            let outdated = self.files[index].origin.filter(|(file, version)| repository.versions[*file] != *version);
            match outdated {
                Some((file, _)) if random.below(1000) < UPGRADES => {
                    // The new file is written beside the old one, then the old one goes.
                    let origin = Some((file, repository.versions[file]));
                    self.create(origin, repository.files[file].clone(), writes);
                    self.delete(index, writes);
                }
                _ => index += 1,
            }
        }
    }

    fn edit(&mut self, file: usize, random: &mut Random, writes: &mut Writes) {
        let file = &mut self.files[file];
        let start = random.below(file.contents.len() as u64) as usize;
        let end = (start + 1 + random.below(8) as usize).min(file.contents.len());
        for index in start..end {
            file.contents[index] = random.draw();
            writes.push((file.addresses[index], Some(file.contents[index])));
        }
    }

    fn create(&mut self, origin: Option<(usize, u32)>, contents: Vec<u64>, writes: &mut Writes) {
        let addresses = self.allocate(contents.len() as u64);
        writes.extend(addresses.iter().copied().zip(contents.iter().copied().map(Some)));
        self.files.push(File { origin, addresses, contents });
    }

    fn delete(&mut self, file: usize, writes: &mut Writes) {
        let file = self.files.swap_remove(file);
        for address in file.addresses {
            writes.push((address, None));
            self.release(address);
        }
    }

    /// The next free run that is long enough, else new space at the end, while the disk is young; then whatever is free.
    fn allocate(&mut self, len: u64) -> Vec<u64> {
        let fits = |(start, free): (&u64, &u64)| (*free >= len).then_some(*start);
        let found = self.free.range(self.cursor..).find_map(fits).or_else(|| self.free.range(..self.cursor).find_map(fits));
        let start = found.unwrap_or(self.end);
        match found.and_then(|start| self.free.remove(&start)) {
            Some(free) if free > len => drop(self.free.insert(start + len, free - len)),
            Some(_) => {}
            None => self.end += len,
        }
        self.cursor = start + len;
        (start..start + len).collect()
    }

    fn release(&mut self, address: u64) {
        let after = self.free.remove(&(address + 1)).unwrap_or(0);
        match self.free.range_mut(..address).next_back() {
            Some((start, len)) if *start + *len == address => *len += 1 + after,
            _ => drop(self.free.insert(address, 1 + after)),
        }
    }
}
