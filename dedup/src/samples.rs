//! Content for tests: the same for the same seed.

use crate::{BLOCK_LEN, Block};

/// A step of splitmix64.
pub fn next(state: &mut u64) -> u64 {
    *state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let mut z = *state;
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

/// A block that no codec shrinks.
pub fn noise(seed: u64) -> Block {
    let mut state = seed;
    let mut block = [0; BLOCK_LEN];
    block.chunks_exact_mut(8).for_each(|word| word.copy_from_slice(&next(&mut state).to_le_bytes()));
    block
}

/// A block that compresses a few times.
pub fn text(seed: u64) -> Block {
    const WORDS: [&[u8]; 8] = [b"segment ", b"frame ", b"block ", b"of ", b"the ", b"sealed ", b"and ", b"0x"];
    let mut state = seed;
    let mut bytes = format!("{seed:016x} ").into_bytes();
    while bytes.len() < BLOCK_LEN {
        let word = next(&mut state);
        bytes.extend_from_slice(WORDS[word as usize % WORDS.len()]);
        if word >> 60 == 0 {
            bytes.extend_from_slice(format!("{:x} ", word >> 20).as_bytes());
        }
    }
    std::array::from_fn(|index| bytes[index])
}
