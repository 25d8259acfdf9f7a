//! Data that depends on where it lies: each eight bytes of a volume hold a mix of their own position and a seed, so a read
//! shows whether it came from the right place. No word of the pattern is zero.

/// Fills `buffer` with what belongs at byte `offset`.
pub fn fill(seed: u64, offset: u64, buffer: &mut [u8]) {
    let mut position = offset;
    let mut rest = buffer;
    while !rest.is_empty() {
        let (bytes, skip) = word_at(seed, position);
        let take = (8 - skip).min(rest.len());
        let (now, later) = rest.split_at_mut(take);
        now.copy_from_slice(&bytes[skip..skip + take]);
        position += take as u64;
        rest = later;
    }
}

/// Makes each block of 4 KiB in `buffer` one that was never written: `count` numbers them. The next number.
pub fn make_unique(mut count: u64, buffer: &mut [u8]) -> u64 {
    for block in buffer.chunks_mut(4096) {
        count += 1;
        let len = block.len().min(8);
        block[..len].copy_from_slice(&count.to_le_bytes()[..len]);
    }
    count
}

/// The position of the first byte of `data`, read at byte `offset`, that is not what [`fill`] would have put there.
pub fn first_mismatch(seed: u64, offset: u64, data: &[u8]) -> Option<u64> {
    let mut position = offset;
    let mut rest = data;
    while !rest.is_empty() {
        let (bytes, skip) = word_at(seed, position);
        let take = (8 - skip).min(rest.len());
        let (now, later) = rest.split_at(take);
        if now != &bytes[skip..skip + take] {
            let wrong = now.iter().zip(&bytes[skip..]).position(|(got, wanted)| got != wanted);
            return wrong.map(|index| position + index as u64);
        }
        position += take as u64;
        rest = later;
    }
    None
}

fn word_at(seed: u64, position: u64) -> ([u8; 8], usize) {
    let word = mix(seed ^ (position / 8)).max(1);
    (word.to_le_bytes(), (position % 8) as usize)
}

/// The finaliser of SplitMix64: every bit of the input moves about half of the output's.
pub fn mix(value: u64) -> u64 {
    let value = value.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let value = (value ^ (value >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let value = (value ^ (value >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    value ^ (value >> 31)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn any_piece_of_the_pattern_is_recognised(offset in 0..1u64 << 40, len in 0..200usize, cut in 0..200usize) {
            let mut data = vec![0; len];
            fill(7, offset, &mut data);
            prop_assert_eq!(first_mismatch(7, offset, &data), None);
            let cut = cut.min(len);
            prop_assert_eq!(first_mismatch(7, offset + cut as u64, &data[cut..]), None);
        }

        #[test]
        fn one_changed_byte_is_found(offset in 0..1u64 << 40, len in 1..200usize, at in any::<prop::sample::Index>(), flip in 1..=255u8) {
            let mut data = vec![0; len];
            fill(7, offset, &mut data);
            let at = at.index(len);
            data[at] ^= flip;
            prop_assert_eq!(first_mismatch(7, offset, &data), Some(offset + at as u64));
        }
    }

    #[test]
    fn data_from_another_place_or_another_seed_is_refused() {
        let mut data = [0; 4096];
        fill(7, 4096, &mut data);
        assert_eq!(first_mismatch(7, 0, &data), Some(0));
        assert!(first_mismatch(8, 4096, &data).is_some());
        assert_eq!(first_mismatch(7, 4096, &[0; 4096]), Some(4096));
    }
}
