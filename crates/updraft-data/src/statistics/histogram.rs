//! Counts of numbers in buckets whose borders do not depend on the data, so that histograms of parts add up exactly.
//!
//! # Design
//!
//! The 64 bits of a float, with the sign turned round, order as the numbers do. A bucket is all numbers that agree in the
//! bits above some `shift`, which begins with none: years and timestamps, which lie close together far from zero, fall into
//! many buckets. When the buckets become more than [`BUCKETS_MAX`], neighbours are joined by as many bits as it takes. How
//! far that goes is a property of the set of numbers alone, so the result does not depend on the order of pushing and
//! merging, and its memory is bounded.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

/// The most buckets of a histogram: 8 KiB, and a distribution over ten octaves is still cut to 2 % of its values.
pub const BUCKETS_MAX: usize = 512;

/// Less than this is told as zero: joined buckets are still narrower until few are left.
const ZERO_MAX: f64 = 1e-100;

/// How often each bucket was met.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "Stored", into = "Stored")]
pub struct Histogram {
    shift: u32,
    counts: BTreeMap<u64, u64>,
    total: u64,
}

/// The form in files: bucket and count, in the order of the buckets.
#[derive(Clone, Serialize, Deserialize)]
struct Stored {
    shift: u32,
    buckets: Vec<(u64, u64)>,
}

impl TryFrom<Stored> for Histogram {
    type Error = String;

    fn try_from(stored: Stored) -> Result<Histogram, String> {
        if stored.shift > 63 {
            return Err(format!("a histogram's shift is at most 63, not {}", stored.shift));
        }
        if stored.buckets.len() > BUCKETS_MAX || !stored.buckets.is_sorted_by(|a, b| a.0 < b.0) {
            return Err(format!("the buckets of a histogram are in order and at most {BUCKETS_MAX}"));
        }
        let total = stored.buckets.iter().try_fold(0u64, |sum, (_, count)| sum.checked_add(*count));
        let total = total.ok_or("the counts of a histogram are too large")?;
        Ok(Histogram { shift: stored.shift, counts: stored.buckets.into_iter().collect(), total })
    }
}

impl From<Histogram> for Stored {
    fn from(histogram: Histogram) -> Stored {
        Stored { shift: histogram.shift, buckets: histogram.counts.into_iter().collect() }
    }
}

/// One bar of a drawn histogram.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Bar {
    /// Its lower end.
    pub low: f64,
    /// Its upper end.
    pub high: f64,
    /// Numbers in it; a bucket that lies in several bars is divided among them evenly.
    pub count: f64,
}

impl Histogram {
    /// Counts numbers; those that are none (NaN) are left out.
    pub fn extend(&mut self, values: impl Iterator<Item = f64>) {
        // Most numbers fall where others just fell: a small table in front of the tree takes them.
        const SLOTS: u64 = 256;
        let mut table = [(0u64, 0u64); SLOTS as usize];
        for value in values.filter(|v| !v.is_nan()) {
            let bucket = ordered_bits(value) >> self.shift;
            let slot = &mut table[(bucket % SLOTS) as usize];
            if slot.0 != bucket && slot.1 > 0 {
                let (bucket, count) = *slot;
                slot.1 = 0;
                self.add(bucket, count);
                // Joining buckets gives the table's keys another meaning.
                if self.counts.len() > BUCKETS_MAX {
                    table.iter_mut().filter(|s| s.1 > 0).for_each(|s| {
                        self.add(s.0, s.1);
                        s.1 = 0;
                    });
                    self.shrink(BUCKETS_MAX);
                }
            }
            let bucket = ordered_bits(value) >> self.shift;
            let slot = &mut table[(bucket % SLOTS) as usize];
            *slot = (bucket, slot.1 + 1);
        }
        for (bucket, count) in table.into_iter().filter(|s| s.1 > 0) {
            self.add(bucket, count);
        }
        self.shrink(BUCKETS_MAX);
    }

    fn add(&mut self, bucket: u64, count: u64) {
        *self.counts.entry(bucket).or_insert(0) += count;
        self.total += count;
    }

    /// Adds the counts of another part.
    pub fn merge(&mut self, other: &Histogram) {
        let shift = self.shift.max(other.shift);
        self.widen(shift);
        for (bucket, count) in &other.counts {
            self.add(bucket >> (shift - other.shift), *count);
        }
        self.shrink(BUCKETS_MAX);
    }

    /// The same with at most so many buckets.
    pub fn coarse(mut self, buckets_max: usize) -> Histogram {
        self.shrink(buckets_max.max(1));
        self
    }

    /// Joins neighbours by as few bits as leave so many buckets.
    fn shrink(&mut self, buckets_max: usize) {
        if self.counts.len() <= buckets_max {
            return;
        }
        // Two neighbours become one when all bits in which they differ are shifted out.
        let keys: Vec<u64> = self.counts.keys().copied().collect();
        let mut apart: Vec<u32> = keys.windows(2).map(|pair| u64::BITS - (pair[0] ^ pair[1]).leading_zeros()).collect();
        apart.sort_unstable_by_key(|bits| std::cmp::Reverse(*bits));
        let by = apart.get(buckets_max - 1).copied().unwrap_or(0);
        self.widen((self.shift + by).min(63));
    }

    fn widen(&mut self, shift: u32) {
        if shift > self.shift {
            let by = shift - self.shift;
            let mut joined = BTreeMap::new();
            for (bucket, count) in &self.counts {
                *joined.entry(bucket >> by).or_insert(0) += count;
            }
            (self.counts, self.shift) = (joined, shift);
        }
    }

    /// Numbers counted.
    pub fn total(&self) -> u64 {
        self.total
    }

    /// The buckets that are not empty, in order: lower end, upper end, count.
    pub fn buckets(&self) -> impl Iterator<Item = (f64, f64, u64)> + '_ {
        self.counts.iter().map(|(bucket, count)| {
            let low = bucket << self.shift;
            (of_ordered_bits(low), of_ordered_bits(low | ((1 << self.shift) - 1)), *count)
        })
    }

    /// The number below which a share of the numbers lies, to the width of a bucket; `None` where there are none.
    pub fn quantile(&self, share: f64) -> Option<f64> {
        let rank = share.clamp(0.0, 1.0) * self.total as f64;
        let mut before = 0.0;
        for (low, high, count) in self.buckets() {
            let within = count as f64;
            if before + within >= rank {
                // The bucket of zero goes up to numbers that are hardly ever met: what is in it is zero.
                if low == 0.0 && high < ZERO_MAX {
                    return Some(0.0);
                }
                let (low, high) = (low.max(f64::MIN), high.min(f64::MAX));
                return Some(low + (high - low) * ((rank - before) / within).clamp(0.0, 1.0));
            }
            before += within;
        }
        None
    }

    /// The counts of two histograms in buckets of the same borders, in order; buckets empty in both are left out.
    pub fn beside(&self, other: &Histogram) -> Vec<(u64, u64)> {
        let shift = self.shift.max(other.shift);
        let mut pairs: BTreeMap<u64, (u64, u64)> = BTreeMap::new();
        for (bucket, count) in &self.counts {
            pairs.entry(bucket >> (shift - self.shift)).or_default().0 += count;
        }
        for (bucket, count) in &other.counts {
            pairs.entry(bucket >> (shift - other.shift)).or_default().1 += count;
        }
        pairs.into_values().collect()
    }

    /// Bars of one width from `low` to `high`, for drawing.
    pub fn bars(&self, low: f64, high: f64, count: usize) -> Vec<Bar> {
        let width = (high - low) / count.max(1) as f64;
        if !width.is_finite() || width <= 0.0 {
            return vec![Bar { low, high, count: self.total as f64 }];
        }
        let at = |i: usize| if i == count { high } else { low + width * i as f64 };
        let mut bars: Vec<Bar> = (0..count).map(|i| Bar { low: at(i), high: at(i + 1), count: 0.0 }).collect();
        let place = |x: f64| (((x - low) / width) as usize).min(count - 1);
        for (from, to, n) in self.buckets() {
            let (from, to) = (from.clamp(low, high), to.clamp(low, high));
            let (first, last) = (place(from), place(to));
            for (i, bar) in bars.iter_mut().enumerate().take(last + 1).skip(first) {
                let share =
                    if first == last { 1.0 } else { (to.min(at(i + 1)) - from.max(at(i))).max(0.0) / (to - from) };
                bar.count += n as f64 * share;
            }
        }
        bars
    }
}

/// Bits that order as the numbers do; both zeros are one.
pub(super) fn ordered_bits(value: f64) -> u64 {
    let bits = (value + 0.0).to_bits();
    if bits >> 63 == 1 { !bits } else { bits | 1 << 63 }
}

pub(super) fn of_ordered_bits(bits: u64) -> f64 {
    f64::from_bits(if bits >> 63 == 1 { bits & !(1 << 63) } else { !bits })
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn of(values: &[f64]) -> Histogram {
        let mut histogram = Histogram::default();
        histogram.extend(values.iter().copied());
        histogram
    }

    proptest! {
        #[test]
        fn parts_in_any_order_make_the_histogram_of_the_whole(
            values in prop::collection::vec(any::<f64>(), 0..3000), cut in 0usize..3000, again in 0usize..3000,
        ) {
            let whole = of(&values);
            let (cut, again) = (cut.min(values.len()), again.min(values.len()));
            let (first, last) = (cut.min(again), cut.max(again));
            let mut parts = of(&values[last..]);
            parts.merge(&of(&values[..first]));
            parts.merge(&of(&values[first..last]));
            prop_assert_eq!(&parts, &whole);
            prop_assert!(whole.counts.len() <= BUCKETS_MAX);
            let stored = serde_json::to_string(&whole).unwrap();
            prop_assert_eq!(serde_json::from_str::<Histogram>(&stored).unwrap(), whole);
        }

        #[test]
        fn order_of_bits_is_order_of_numbers(a in any::<f64>(), b in any::<f64>()) {
            prop_assume!(!a.is_nan() && !b.is_nan());
            prop_assert_eq!(ordered_bits(a).cmp(&ordered_bits(b)), a.partial_cmp(&b).unwrap());
            prop_assert_eq!(of_ordered_bits(ordered_bits(a)), a);
        }
    }

    #[test]
    fn small_whole_numbers_have_buckets_of_their_own() {
        let values: Vec<f64> = (0..256).map(f64::from).collect();
        let histogram = of(&values);
        assert_eq!(histogram.buckets().count(), 256);
        assert!(histogram.buckets().zip(&values).all(|((low, high, n), v)| low == *v && high < v + 1.0 && n == 1));
    }

    #[test]
    fn numbers_far_from_zero_have_buckets_as_narrow_as_they_are_apart() {
        // A day of milliseconds since 1970, every fifth of them.
        let histogram = of(&(0..17_280_000).step_by(977).map(|i| 1.7e12 + 5.0 * f64::from(i)).collect::<Vec<_>>());
        assert!(histogram.buckets().count() > 250, "{}", histogram.buckets().count());
        let median = histogram.quantile(0.5).unwrap();
        assert!((median - 1.7e12 - 43_200_000.0).abs() < 86_400_000.0 / 250.0, "{median}");
        let years = of(&(1990..2027).map(f64::from).collect::<Vec<_>>());
        assert_eq!(years.buckets().count(), 37);
    }

    #[test]
    fn quantiles_of_a_thousand_numbers_are_within_a_bucket() {
        let values: Vec<f64> = (1..=1000).map(f64::from).collect();
        let histogram = of(&values);
        for (share, expected) in [(0.1, 100.0), (0.5, 500.0), (0.99, 990.0)] {
            let found = histogram.quantile(share).unwrap();
            // A bucket is up to 2^-7 of its values wide.
            assert!((found - expected).abs() <= expected / 100.0, "{share}: {found}");
        }
        assert_eq!(Histogram::default().quantile(0.5), None);
        let bars = histogram.bars(1.0, 1000.0, 10);
        assert!(bars.iter().all(|b| (b.count - 100.0).abs() < 8.0), "{bars:?}");
        assert!((bars.iter().map(|b| b.count).sum::<f64>() - 1000.0).abs() < 1e-6);
    }
}
