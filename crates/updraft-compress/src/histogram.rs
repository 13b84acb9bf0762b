//! How a value's elements are distributed, in memory that does not depend on how many there are.
//!
//! Bins are `2^e` wide and begin at multiples of that, and `e` is the least for which 2,048 of them reach from the least
//! element to the greatest and to zero. When an element lies outside, bins are merged by pairs, which is exact. So the
//! histogram is a function of the elements alone: not of their order, nor of how they come in batches.
//!
//! Zeros are counted apart. Every quantizer gives them back exactly, so they have no say in how wide its steps are; and
//! after a Relu half of all elements are zero.

use multiversion::multiversion;
use updraft_passes::quantize::Range;

/// The most bins.
pub const BINS: usize = 2048;

/// Bins are no narrower than `2^EXPONENT_MIN`, so that their inverse width is a number.
const EXPONENT_MIN: i32 = -126;

/// The distribution of elements.
#[derive(Debug, Clone, PartialEq)]
pub struct Histogram {
    min: f32,
    max: f32,
    count: u64,
    zeros: u64,
    exponent: i32,
    /// The first bin begins at this many widths.
    first: i32,
    /// Elements other than zero in each bin.
    bins: Vec<u64>,
}

/// Working memory of [`Histogram::add`], which histograms can share.
pub struct Scratch {
    /// Counts of every fourth element each, since adding to one counter again and again would wait for itself.
    counts: Vec<[u32; 4]>,
}

impl Default for Scratch {
    fn default() -> Scratch {
        Scratch { counts: vec![[0; 4]; BINS] }
    }
}

impl Default for Histogram {
    fn default() -> Histogram {
        Histogram {
            min: f32::INFINITY,
            max: f32::NEG_INFINITY,
            count: 0,
            zeros: 0,
            exponent: 0,
            first: 0,
            bins: Vec::new(),
        }
    }
}

/// The share of elements that ranges by entropy may cut off: outliers, by what that word means.
const CUT_OFF_MAX: f64 = 0.01;

impl Histogram {
    /// Counts elements.
    ///
    /// # Errors
    /// The index of an element that is not a finite number; then nothing is counted.
    pub fn add(&mut self, values: &[f32], scratch: &mut Scratch) -> Result<(), usize> {
        let zeros = self.extend(values)?;
        if values.is_empty() || (self.min == 0.0 && self.max == 0.0) {
            return Ok(());
        }
        self.cover();
        fill(values, (-self.exponent as f32).exp2(), self.first, &mut scratch.counts);
        for (bin, counts) in self.bins.iter_mut().zip(&mut scratch.counts) {
            *bin += counts.iter().map(|c| u64::from(*c)).sum::<u64>();
            *counts = [0; 4];
        }
        // Zeros are in the bin that begins there, like every element equal to its lower edge.
        if let Some(bin) = usize::try_from(-self.first).ok().and_then(|at| self.bins.get_mut(at)) {
            *bin -= zeros;
        }
        Ok(())
    }

    /// Looks at elements for [`range`](Histogram::range) only, at a tenth of the time that counting takes. No others can be
    /// added with [`add`](Histogram::add) then, nor other ranges be asked for.
    ///
    /// # Errors
    /// As for [`add`](Histogram::add).
    pub fn widen(&mut self, values: &[f32]) -> Result<(), usize> {
        self.extend(values).map(drop)
    }

    /// Takes note of everything but the bins; returns how many elements are zero.
    fn extend(&mut self, values: &[f32]) -> Result<u64, usize> {
        let Some(summary) = summary(values) else {
            return Err(values.iter().position(|v| !v.is_finite()).unwrap_or(0));
        };
        self.min = self.min.min(summary.min);
        self.max = self.max.max(summary.max);
        self.count += values.len() as u64;
        self.zeros += summary.zeros;
        Ok(summary.zeros)
    }

    /// Widens the bins until they reach all elements and zero.
    fn cover(&mut self) {
        let (min, max) = (f64::from(self.min).min(0.0), f64::from(self.max).max(0.0));
        let edge = |x: f64, exponent: i32| (x * (-f64::from(exponent)).exp2()).floor();
        let reaches = |exponent: i32| edge(max, exponent) - edge(min, exponent) < BINS as f64;
        let mut exponent = if self.bins.is_empty() { EXPONENT_MIN } else { self.exponent };
        // Half of what must be enough, to begin near the answer.
        let near = ((max - min) / BINS as f64).log2().floor() as i32 - 1;
        exponent = exponent.max(near);
        while !reaches(exponent) {
            exponent += 1;
        }
        let first = edge(min, exponent) as i32;
        if self.bins.is_empty() {
            self.bins = vec![0; BINS];
        } else if (exponent, first) != (self.exponent, self.first) {
            let mut merged = vec![0; BINS];
            for (i, count) in self.bins.iter().enumerate().filter(|(_, count)| **count > 0) {
                let at = ((i as i32 + self.first) >> (exponent - self.exponent).min(31)) - first;
                if let Some(bin) = usize::try_from(at).ok().and_then(|at| merged.get_mut(at)) {
                    *bin += count;
                }
            }
            self.bins = merged;
        }
        (self.exponent, self.first) = (exponent, first);
    }

    /// Elements counted.
    pub fn count(&self) -> u64 {
        self.count
    }

    /// Bytes on the heap.
    pub fn heap_bytes(&self) -> usize {
        self.bins.capacity() * size_of::<u64>()
    }

    /// From the least element to the greatest; `None` where there are none.
    pub fn range(&self) -> Option<Range> {
        (self.count > 0).then_some(Range { min: self.min, max: self.max })
    }

    /// The range without the outermost elements: `percent` of all lie inside, as many below as above.
    pub fn percentile(&self, percent: f64) -> Option<Range> {
        let whole = self.range()?;
        let outside = self.count as f64 * (1.0 - percent / 100.0) / 2.0;
        let (mut low, mut high) = (whole.min, whole.max);
        let mut below = 0.0;
        for (i, count) in self.with_zeros().enumerate() {
            if below + count as f64 > outside {
                low = low.max(self.edge(i));
                break;
            }
            below += count as f64;
        }
        let mut above = 0.0;
        for (i, count) in self.with_zeros().enumerate().collect::<Vec<_>>().into_iter().rev() {
            if above + count as f64 > outside {
                high = high.min(self.edge(i + 1));
                break;
            }
            above += count as f64;
        }
        Some(Range { min: low, max: high.max(low) })
    }

    /// The range, as symmetric as the elements allow, from which `levels` steps tell most about the magnitudes: the
    /// threshold with the least Kullback-Leibler divergence of the distribution (what lies beyond gathered in the last
    /// bin) from the same in steps. Migacz, *8-bit inference with TensorRT* (GTC 2017).
    pub fn entropy(&self, levels: usize) -> Option<Range> {
        let whole = self.range()?;
        let magnitudes = self.magnitudes();
        let used = magnitudes.iter().rposition(|c| *c > 0).map_or(0, |i| i + 1);
        if used <= levels {
            return Some(whole);
        }
        let counts: Vec<f64> = magnitudes[..used].iter().map(|c| *c as f64).collect();
        let total: f64 = counts.iter().sum();
        // Before each bin: elements, bins that are not empty, and the sum of `c ln c`.
        let mut sums = vec![(0.0, 0.0, 0.0)];
        for c in &counts {
            let (elements, filled, entropy) = sums[sums.len() - 1];
            let own = if *c > 0.0 { (1.0, c * c.ln()) } else { (0.0, 0.0) };
            sums.push((elements + c, filled + own.0, entropy + own.1));
        }
        let mut best = (f64::INFINITY, used);
        for end in levels..=used {
            let last = counts[end - 1];
            let beyond = total - sums[end].0;
            // Without an element of its own, the last bin has no place for those beyond.
            if last == 0.0 && beyond > 0.0 {
                continue;
            }
            // A bin that most elements share, the background of pictures, would take in all beyond it at no divergence.
            if beyond > total * CUT_OFF_MAX {
                continue;
            }
            let inside = sums[end].0;
            let gathered = last + beyond;
            let own = sums[end - 1].2 + if gathered > 0.0 { gathered * gathered.ln() } else { 0.0 };
            let mut cross = 0.0;
            for level in 0..levels {
                let (from, to) = (level * end / levels, (level + 1) * end / levels);
                let (elements, filled) = (sums[to].0 - sums[from].0, sums[to].1 - sums[from].1);
                if elements > 0.0 {
                    let weight = elements + if to == end { beyond } else { 0.0 };
                    cross += weight * (elements / filled / inside).ln();
                }
            }
            let divergence = (own - cross) / total - total.ln();
            if divergence < best.0 {
                best = (divergence, end);
            }
        }
        let threshold = (best.1 as f64 * f64::from(self.exponent).exp2()) as f32;
        Some(Range { min: whole.min.max(-threshold), max: whole.max.min(threshold) })
    }

    /// The range from which `steps` equal steps lose least in the mean of squares: by rounding inside, by cutting off
    /// outside.
    pub fn least_squares(&self, steps: u32) -> Option<Range> {
        const CANDIDATES: u32 = 100;
        let whole = self.range()?;
        let width = f64::from(self.exponent).exp2();
        let filled: Vec<(f64, f64)> = (self.bins.iter().enumerate().filter(|(_, count)| **count > 0))
            .map(|(i, count)| ((f64::from(self.first) + i as f64 + 0.5) * width, *count as f64))
            .collect();
        let loss = |low: f64, high: f64| -> f64 {
            let step = (high - low) / f64::from(steps);
            let square = |x: f64| match x {
                _ if x < low => (low - x) * (low - x),
                _ if x > high => (x - high) * (x - high),
                // Elements of a wide bin lie anywhere between codes.
                _ if width >= step => step * step / 12.0,
                _ => (x - (x / step).round() * step).powi(2),
            };
            filled.iter().map(|(x, count)| count * square(*x)).sum()
        };
        let (min, max) = (f64::from(whole.min).min(0.0), f64::from(whole.max).max(0.0));
        let mut best = (loss(min, max), min, max);
        // Both ends together, and then each for itself.
        for ends in [(true, true), (true, false), (false, true)] {
            let (_, low, high) = best;
            for share in (1..CANDIDATES).map(|i| f64::from(i) / f64::from(CANDIDATES)) {
                let low = if ends.0 { low * share } else { low };
                let high = if ends.1 { high * share } else { high };
                let lost = loss(low, high);
                if lost < best.0 {
                    best = (lost, low, high);
                }
            }
        }
        Some(Range { min: whole.min.max(best.1 as f32), max: whole.max.min(best.2 as f32) })
    }

    fn edge(&self, bin: usize) -> f32 {
        ((f64::from(self.first) + bin as f64) * f64::from(self.exponent).exp2()) as f32
    }

    /// Counts of all bins, zeros among them.
    fn with_zeros(&self) -> impl Iterator<Item = u64> + '_ {
        let zero = usize::try_from(-self.first).unwrap_or(usize::MAX);
        self.bins.iter().enumerate().map(move |(i, c)| if i == zero { c + self.zeros } else { *c })
    }

    /// Counts by magnitude: bins on both sides of zero, folded.
    fn magnitudes(&self) -> Vec<u64> {
        let mut folded = vec![0; 2 * BINS];
        for (i, count) in self.bins.iter().enumerate() {
            let at = i as i32 + self.first;
            // The bin before zero is the mirror of the one that begins there.
            let at = if at < 0 { -1 - at } else { at };
            if let Some(bin) = usize::try_from(at).ok().and_then(|at| folded.get_mut(at)) {
                *bin += count;
            }
        }
        folded
    }
}

/// What is known of elements before they are counted.
#[derive(Clone, Copy)]
struct Summary {
    min: f32,
    max: f32,
    zeros: u64,
}

/// `None` where an element is not a finite number.
#[multiversion(targets("x86_64+avx512f+avx512bw+avx512dq+avx512vl", "x86_64+avx2", "aarch64+neon"))]
fn summary(values: &[f32]) -> Option<Summary> {
    const LANES: usize = 16;
    let mut all = Summary { min: f32::INFINITY, max: f32::NEG_INFINITY, zeros: 0 };
    let mut broken = 0f32;
    // Counts of a part fit 32 bits.
    for part in values.chunks(1 << 20) {
        let mut min = [f32::INFINITY; LANES];
        let mut max = [f32::NEG_INFINITY; LANES];
        let mut zeros = [0u32; LANES];
        let mut bad = [0f32; LANES];
        let mut look = |lane: usize, x: f32| {
            min[lane] = if x < min[lane] { x } else { min[lane] };
            max[lane] = if x > max[lane] { x } else { max[lane] };
            zeros[lane] += u32::from(x == 0.0);
            // Neither an infinity nor what is no number times zero is zero.
            bad[lane] += x * 0.0;
        };
        let rows = part.chunks_exact(LANES);
        rows.remainder().iter().enumerate().for_each(|(lane, x)| look(lane, *x));
        for row in rows {
            (0..LANES).for_each(|lane| look(lane, row[lane]));
        }
        all.min = min.into_iter().fold(all.min, f32::min);
        all.max = max.into_iter().fold(all.max, f32::max);
        all.zeros += zeros.into_iter().map(u64::from).sum::<u64>();
        broken += bad.into_iter().sum::<f32>();
    }
    (broken == 0.0).then_some(all)
}

/// Counts elements in bins of width `1 / inverse`, of which the first begins at `first` widths.
#[multiversion(targets("x86_64+avx512f+avx512bw+avx512dq+avx512vl", "x86_64+avx2", "aarch64+neon"))]
fn fill(values: &[f32], inverse: f32, first: i32, counts: &mut [[u32; 4]]) {
    const LANES: usize = 64;
    let place = |x: f32| {
        // Scaling by a power of two is exact, so bins merged later are those that wider bins would have been.
        let scaled = x * inverse;
        let towards_zero = scaled as i32;
        (towards_zero - i32::from((towards_zero as f32) > scaled) - first) as usize
    };
    let mut places = [0usize; LANES];
    let mut count = |places: &[usize]| {
        for (lane, at) in places.iter().enumerate() {
            if let Some(bin) = counts.get_mut(*at) {
                bin[lane & 3] += 1;
            }
        }
    };
    let rows = values.chunks_exact(LANES);
    let rest = rows.remainder();
    for row in rows {
        places.iter_mut().zip(row).for_each(|(at, x)| *at = place(*x));
        count(&places);
    }
    places.iter_mut().zip(rest).for_each(|(at, x)| *at = place(*x));
    count(&places[..rest.len()]);
}

#[cfg(test)]
mod tests {
    use super::*;
    use updraft_base::random::{Key, fill_normal, fill_uniform};

    fn of(parts: &[&[f32]]) -> Histogram {
        let mut histogram = Histogram::default();
        let mut scratch = Scratch::default();
        parts.iter().for_each(|part| histogram.add(part, &mut scratch).unwrap());
        histogram
    }

    fn normal(n: usize) -> Vec<f32> {
        let mut values = vec![0f32; n];
        fill_normal(&Key::new(3), 0, &mut values);
        values
    }

    #[test]
    fn neither_order_nor_batches_change_a_histogram() {
        let mut values = normal(5000);
        values.iter_mut().enumerate().for_each(|(i, v)| *v *= 1.01f32.powi((i / 10) as i32));
        values.extend([0.0, -0.0, 0.5, 1.0, 2.0, -1.0, 1e-30, -1e-30, f32::MIN_POSITIVE / 4.0]);
        let whole = of(&[&values]);
        let parts: Vec<&[f32]> = values.chunks(7).collect();
        assert_eq!(of(&parts), whole);
        values.reverse();
        assert_eq!(of(&[&values]), whole);
        assert_eq!(whole.bins.iter().sum::<u64>() + whole.zeros, whole.count);
        assert_eq!(whole.zeros, 2);
    }

    #[test]
    fn each_element_is_counted_where_it_lies() {
        let values = normal(3000);
        let histogram = of(&[&values]);
        let width = f64::from(histogram.exponent).exp2();
        for (i, count) in histogram.bins.iter().enumerate() {
            let low = (f64::from(histogram.first) + i as f64) * width;
            let inside = values.iter().filter(|v| (low..low + width).contains(&f64::from(**v)));
            assert_eq!(inside.count() as u64, *count);
        }
        // Half of the bins at least are within reach of the elements.
        assert!(f64::from(histogram.max - histogram.min) > width * (BINS / 2 - 2) as f64);
    }

    #[test]
    fn a_percentile_leaves_out_as_many_elements_as_it_says() {
        let mut values = vec![0f32; 100_000];
        fill_uniform(&Key::new(1), 0, &mut values);
        values[0] = 50.0;
        values[1] = -80.0;
        let found = of(&[&values]).percentile(99.99).unwrap();
        // Five elements on either side; a bin is 130 / 2048 wide at most.
        assert!(found.min > -0.13 && found.max < 1.13, "{found:?}");
        let inside = values.iter().filter(|v| (found.min..=found.max).contains(*v)).count();
        assert!(inside >= 99_990, "{inside}");
        assert_eq!(of(&[&values]).percentile(100.0), of(&[&values]).range());
    }

    #[test]
    fn entropy_cuts_off_outliers_but_not_the_body() {
        let mut values = normal(200_000);
        values[0] = 40.0;
        let found = of(&[&values]).entropy(128).unwrap();
        assert!(found.max < 12.0 && found.max > 2.5 && found.min < -2.5, "{found:?}");
        // Uniform elements have no outliers.
        fill_uniform(&Key::new(1), 0, &mut values);
        let whole = of(&[&values]);
        for found in [whole.entropy(128).unwrap(), whole.least_squares(255).unwrap()] {
            assert!(found.max > 0.95, "{found:?}");
        }
    }

    #[test]
    fn entropy_keeps_what_a_frequent_value_outnumbers() {
        let mut values = vec![-0.42f32; 100_000];
        fill_uniform(&Key::new(1), 0, &mut values[80_000..]);
        values[80_000..].iter_mut().for_each(|v| *v *= 2.8);
        let found = of(&[&values]).entropy(128).unwrap();
        assert!(found.max > 2.7, "{found:?}");
    }

    #[test]
    fn least_squares_lose_no_more_than_the_whole_range_when_measured_on_the_elements() {
        use updraft_graph::{DType, Tensor};
        use updraft_passes::quantize::Quantizer;
        for spread in [1.0f32, 3.0, 5.0] {
            let values: Vec<f32> = normal(50_000).into_iter().map(|v| v.signum() * v.abs().powf(spread)).collect();
            let histogram = of(&[&values]);
            let tensor = Tensor::vector(&values);
            let error = |range: Range| -> f64 {
                let back = Quantizer::of_range(range, DType::U8, false).unwrap().round_trip(&tensor).unwrap();
                values.iter().zip(back.as_slice::<f32>().unwrap()).map(|(a, b)| f64::from(a - b).powi(2)).sum()
            };
            let (found, whole) = (histogram.least_squares(255).unwrap(), histogram.range().unwrap());
            // Errors are judged at the middles of bins, which are up to a quarter of a step wide.
            assert!(error(found) <= 1.02 * error(whole), "{spread}: {found:?} of {whole:?}");
            assert!(spread > 1.0 || error(found) < 0.9 * error(whole), "{found:?} of {whole:?}");
        }
    }

    #[test]
    fn what_is_no_number_is_found_by_place_and_zeros_alone_have_a_range() {
        let mut histogram = Histogram::default();
        let mut values = vec![1f32; 40];
        for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
            values[33] = bad;
            assert_eq!(histogram.add(&values, &mut Scratch::default()), Err(33));
        }
        assert_eq!(histogram.range(), None);
        let zeros = of(&[&[0.0; 5]]);
        for found in [zeros.range(), zeros.percentile(99.0), zeros.entropy(128), zeros.least_squares(255)] {
            assert_eq!(found, Some(Range { min: 0.0, max: 0.0 }));
        }
    }
}
