//! Which request comes next: random or sequential, reads, writes or a mix, endless or exactly once over the span.

use std::ops::Range;

use crate::pattern::mix;

#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum, serde::Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Access {
    Random,
    Sequential,
}

/// What a load asks for; the same for NBD and vhost-user.
#[derive(Clone, Copy, Debug, serde::Serialize)]
pub struct Workload {
    pub block_size: u32,
    /// Requests in flight per connection or queue.
    pub depth: u16,
    pub access: Access,
    pub write_percent: u8,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Request {
    pub offset: u64,
    pub write: bool,
}

/// An iterator of requests over the blocks of a range.
#[derive(Clone, Debug)]
pub struct Requests {
    block_size: u64,
    blocks: Range<u64>,
    next: u64,
    left: u64,
    random: bool,
    write_percent: u64,
    state: u64,
}

impl Requests {
    /// Never ends. The range must hold at least one block.
    pub fn endless(workload: &Workload, bytes: Range<u64>, seed: u64) -> Self {
        let mut requests = Self::once(workload, bytes, workload.write_percent);
        requests.left = u64::MAX;
        requests.random = workload.access == Access::Random;
        requests.state = mix(seed) | 1;
        requests
    }

    /// Each block once, in order.
    pub fn once(workload: &Workload, bytes: Range<u64>, write_percent: u8) -> Self {
        let block_size = u64::from(workload.block_size);
        let blocks = bytes.start / block_size..bytes.end / block_size;
        assert!(!blocks.is_empty(), "the range {bytes:?} is smaller than one block of {block_size}");
        Self {
            block_size,
            next: blocks.start,
            left: blocks.end - blocks.start,
            blocks,
            random: false,
            write_percent: write_percent.into(),
            state: 1,
        }
    }

    /// Xorshift64*: a multiplication and three shifts per request.
    fn draw(&mut self) -> u64 {
        self.state ^= self.state >> 12;
        self.state ^= self.state << 25;
        self.state ^= self.state >> 27;
        self.state.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }
}

impl Iterator for Requests {
    type Item = Request;

    fn next(&mut self) -> Option<Request> {
        if self.left == 0 {
            return None;
        }
        if self.left != u64::MAX {
            self.left -= 1;
        }
        let block = if self.random {
            self.blocks.start + scale(self.draw(), self.blocks.end - self.blocks.start)
        } else {
            let block = self.next;
            self.next = if block + 1 == self.blocks.end { self.blocks.start } else { block + 1 };
            block
        };
        let write = match self.write_percent {
            0 => false,
            100.. => true,
            percent => scale(self.draw(), 100) < percent,
        };
        Some(Request { offset: block * self.block_size, write })
    }
}

/// The span of one of `parts` equal shares, whole blocks each.
pub fn share(span: u64, block_size: u32, part: usize, parts: usize) -> Range<u64> {
    let block_size = u64::from(block_size);
    let blocks = span / block_size / parts as u64;
    part as u64 * blocks * block_size..(part as u64 + 1) * blocks * block_size
}

fn scale(random: u64, below: u64) -> u64 {
    ((u128::from(random) * u128::from(below)) >> 64) as u64
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use super::*;

    const LOAD: Workload = Workload { block_size: 4096, depth: 1, access: Access::Random, write_percent: 30 };

    #[test]
    fn random_requests_stay_in_range_and_reach_every_block() {
        let mut requests = Requests::endless(&LOAD, 8192..8192 + 64 * 4096, 3);
        let seen: HashSet<u64> = requests.by_ref().take(2000).map(|request| request.offset).collect();
        assert_eq!(seen, (0..64).map(|block| 8192 + block * 4096).collect());
    }

    #[test]
    fn the_mix_is_near_what_was_asked() {
        let writes = Requests::endless(&LOAD, 0..1 << 20, 9).take(10_000).filter(|request| request.write).count();
        assert!((2_700..3_300).contains(&writes), "{writes} of 10000 are writes");
    }

    #[test]
    fn sequential_requests_wrap_around() {
        let load = Workload { access: Access::Sequential, write_percent: 100, ..LOAD };
        let offsets: Vec<u64> = Requests::endless(&load, 4096..3 * 4096, 0).take(4).map(|request| request.offset).collect();
        assert_eq!(offsets, [4096, 8192, 4096, 8192]);
    }

    #[test]
    fn one_pass_touches_each_block_once() {
        let offsets: Vec<Request> = Requests::once(&LOAD, 0..3 * 4096 + 100, 0).collect();
        assert_eq!(offsets, [0, 4096, 8192].map(|offset| Request { offset, write: false }));
    }

    #[test]
    fn shares_do_not_overlap() {
        assert_eq!(share(10 * 4096, 4096, 0, 3), 0..3 * 4096);
        assert_eq!(share(10 * 4096, 4096, 2, 3), 6 * 4096..9 * 4096);
    }
}
