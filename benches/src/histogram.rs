//! A log-linear histogram of nanoseconds: 128 buckets per power of two, so a quantile is within 0.8 % of the truth.
//!
//! Fixed size, no allocation after creation.

const LINEAR_BITS: u32 = 7;
const LINEAR: usize = 1 << LINEAR_BITS;
const BUCKETS: usize = (64 - LINEAR_BITS as usize + 1) * LINEAR;

#[derive(Clone)]
pub struct Histogram {
    counts: Box<[u64]>,
    total: u64,
    max: u64,
}

impl Default for Histogram {
    fn default() -> Self {
        Self { counts: vec![0; BUCKETS].into_boxed_slice(), total: 0, max: 0 }
    }
}

impl Histogram {
    pub fn record(&mut self, value: u64) {
        self.counts[bucket(value)] += 1;
        self.total += 1;
        self.max = self.max.max(value);
    }

    pub fn count(&self) -> u64 {
        self.total
    }

    pub fn max(&self) -> u64 {
        self.max
    }

    /// The smallest recorded value (rounded up to the end of its bucket) that at least `quantile` of all values do not exceed.
    pub fn quantile(&self, quantile: f64) -> u64 {
        let rank = ((self.total as f64 * quantile).ceil() as u64).clamp(1, self.total.max(1));
        let mut seen = 0;
        for (index, count) in self.counts.iter().enumerate() {
            seen += count;
            if seen >= rank {
                return upper_bound(index).min(self.max);
            }
        }
        0
    }

    pub fn merge(&mut self, other: &Self) {
        for (mine, theirs) in self.counts.iter_mut().zip(&other.counts) {
            *mine += theirs;
        }
        self.total += other.total;
        self.max = self.max.max(other.max);
    }

    pub fn clear(&mut self) {
        self.counts.fill(0);
        self.total = 0;
        self.max = 0;
    }
}

fn bucket(value: u64) -> usize {
    if value < LINEAR as u64 {
        return value as usize;
    }
    let shift = value.ilog2() - LINEAR_BITS;
    (shift as usize + 1) * LINEAR + ((value >> shift) as usize & (LINEAR - 1))
}

fn upper_bound(bucket: usize) -> u64 {
    if bucket < LINEAR {
        return bucket as u64;
    }
    let shift = bucket / LINEAR - 1;
    let first = ((LINEAR + bucket % LINEAR) as u64) << shift;
    first + ((1u64 << shift) - 1)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn an_empty_histogram_has_no_quantiles() {
        assert_eq!(Histogram::default().quantile(0.99), 0);
    }

    #[test]
    fn the_largest_value_has_a_bucket() {
        let mut histogram = Histogram::default();
        histogram.record(u64::MAX);
        assert_eq!(histogram.quantile(0.5), u64::MAX);
    }

    proptest! {
        #[test]
        fn quantiles_agree_with_a_sorted_list(
            mut values in prop::collection::vec(prop_oneof![0..300u64, 0..10_000_000u64, any::<u64>()], 1..400),
            quantile in 0.0..=1.0f64,
        ) {
            let mut histogram = Histogram::default();
            values.iter().for_each(|value| histogram.record(*value));
            values.sort_unstable();
            let rank = ((values.len() as f64 * quantile).ceil() as usize).max(1);
            let (exact, got) = (values[rank - 1], histogram.quantile(quantile));
            prop_assert!(got >= exact);
            prop_assert!(got - exact <= exact / LINEAR as u64, "{got} for {exact}");
        }

        #[test]
        fn merging_is_the_same_as_recording_everything_in_one(
            left in prop::collection::vec(any::<u64>(), 0..100),
            right in prop::collection::vec(any::<u64>(), 0..100),
        ) {
            let (mut a, mut b, mut both) = (Histogram::default(), Histogram::default(), Histogram::default());
            left.iter().for_each(|value| { a.record(*value); both.record(*value); });
            right.iter().for_each(|value| { b.record(*value); both.record(*value); });
            a.merge(&b);
            prop_assert_eq!(a.count(), both.count());
            prop_assert_eq!(&a.counts, &both.counts);
            prop_assert_eq!(a.max(), both.max());
        }
    }
}
