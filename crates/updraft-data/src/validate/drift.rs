//! How far a column has moved from an earlier version of the data.
//!
//! Two measures, both over histograms, so that no row is read again:
//!
//! - the population stability index, Σ (a − e) · ln(a / e) over the shares `e` and `a` of both versions in bins that hold a
//!   tenth of the earlier one each, or in each value that recurs, and one of missing cells (Siddiqi, "Credit Risk Scorecards", 2006,
//!   where under 0.1 counts as stable and over 0.25 as moved);
//! - the statistic of Kolmogorov and Smirnov, the largest difference of both distribution functions (Smirnov, "Table for
//!   estimating the goodness of fit of empirical distributions", 1948), with the probability of a larger one by chance in
//!   the approximation of Stephens ("Use of the Kolmogorov-Smirnov, Cramér-von Mises and related statistics", 1970).
//!
//! Distribution functions are compared at the borders of buckets, so the statistic is at most the true one and misses less
//! than the largest share of one bucket.

use std::collections::BTreeMap;

use serde::Serialize;

use crate::statistics::{ColumnStatistics, Histogram};

/// The share that an empty bin counts as: a logarithm of nothing is infinite.
const SHARE_MIN: f64 = 1e-4;

const BINS: u64 = 10;

/// Cells of a bin, at least: chance alone gives an index of about the sum of 1/n and 1/m for each bin of n and m cells.
const BIN_CELLS_MIN: u64 = 20;

/// Cells of a value that counts for itself; rarer ones are one bin together.
const VALUE_CELLS_MIN: u64 = 5;

/// How a column differs from an earlier version.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct ColumnDrift {
    /// The column.
    pub column: String,
    /// What was compared: `values`, `numbers` or `lengths`.
    pub of: &'static str,
    /// The population stability index.
    pub psi: f64,
    /// The largest difference of the distribution functions; `None` for text, which has no order.
    pub ks: Option<f64>,
    /// The probability of a larger difference if nothing had changed.
    pub ks_p: Option<f64>,
    /// The share of missing cells before and now.
    pub missing: [f64; 2],
}

/// The drift of a column from `before` to `now`; `None` where the two have nothing to compare.
pub(crate) fn drift(before: &ColumnStatistics, now: &ColumnStatistics) -> Option<ColumnDrift> {
    let share = |s: &ColumnStatistics| s.missing as f64 / s.rows.max(1) as f64;
    let missing = [share(before), share(now)];
    let missing_rows = (before.missing, now.missing);
    let column = now.column.clone();
    if let (Some(a), Some(b)) = (&before.numbers, &now.numbers) {
        let (ks, ks_p) = kolmogorov_smirnov(&a.histogram, &b.histogram)?;
        let counted = before.values.as_ref().zip(now.values.as_ref());
        let psi = counted
            .and_then(|(a, b)| of_values(a, b, missing_rows))
            .unwrap_or_else(|| of_histograms(&a.histogram, &b.histogram, missing_rows));
        return Some(ColumnDrift { column, of: "numbers", psi, ks: Some(ks), ks_p: Some(ks_p), missing });
    }
    if let (Some(a), Some(b)) = (&before.values, &now.values)
        && let Some(psi) = of_values(a, b, missing_rows)
    {
        return Some(ColumnDrift { column, of: "values", psi, ks: None, ks_p: None, missing });
    }
    let (a, b) = (before.lengths.as_ref()?, now.lengths.as_ref()?);
    let (ks, ks_p) = kolmogorov_smirnov(&a.histogram, &b.histogram)?;
    let psi = of_histograms(&a.histogram, &b.histogram, missing_rows);
    Some(ColumnDrift { column, of: "lengths", psi, ks: Some(ks), ks_p: Some(ks_p), missing })
}

fn psi(pairs: &[(u64, u64)]) -> f64 {
    let (before, now) = pairs.iter().fold((0, 0), |(a, b), (x, y)| (a + x, b + y));
    let share = |part: u64, whole: u64| (part as f64 / whole.max(1) as f64).max(SHARE_MIN);
    pairs.iter().map(|(a, b)| (share(*a, before), share(*b, now))).map(|(e, a)| (a - e) * (a / e).ln()).sum()
}

/// Over values; `None` where most cells hold one that hardly recurs, as names and measurements do: those of any two versions
/// are others.
fn of_values<V: ToString>(before: &[(V, u64)], now: &[(V, u64)], missing: (u64, u64)) -> Option<f64> {
    let mut pairs: BTreeMap<String, (u64, u64)> = BTreeMap::new();
    for (value, count) in before {
        pairs.entry(value.to_string()).or_default().0 += count;
    }
    for (value, count) in now {
        pairs.entry(value.to_string()).or_default().1 += count;
    }
    let (rare, mut bins): (Vec<_>, Vec<_>) =
        pairs.into_values().partition(|(before, now)| *before.max(now) < VALUE_CELLS_MIN);
    let sum = |pairs: &[(u64, u64)]| pairs.iter().fold((0, 0), |(a, b), (x, y)| (a + x, b + y));
    let (rare, common) = (sum(&rare), sum(&bins));
    if rare.0 + rare.1 > common.0 + common.1 {
        return None;
    }
    bins.extend([rare, missing]);
    Some(psi(&bins))
}

fn of_histograms(before: &Histogram, now: &Histogram, missing: (u64, u64)) -> f64 {
    let target = before.total().div_ceil(BINS).max(BIN_CELLS_MIN);
    let mut bins = vec![(0u64, 0u64)];
    for (a, b) in before.beside(now) {
        if bins.last().is_some_and(|bin| bin.0 >= target) {
            bins.push((0, 0));
        }
        if let Some(bin) = bins.last_mut() {
            bin.0 += a;
            bin.1 += b;
        }
    }
    // What is left at the end is a bin of its own where it is half of one.
    if let [.., before_last, last] = bins.as_mut_slice()
        && last.0 < target / 2
    {
        *before_last = (before_last.0 + last.0, before_last.1 + last.1);
        bins.pop();
    }
    bins.push(missing);
    psi(&bins)
}

/// The statistic and its probability; `None` where one of the two is empty.
fn kolmogorov_smirnov(before: &Histogram, now: &Histogram) -> Option<(f64, f64)> {
    let (n, m) = (before.total() as f64, now.total() as f64);
    if n == 0.0 || m == 0.0 {
        return None;
    }
    let (mut a, mut b, mut most) = (0, 0, 0f64);
    for (x, y) in before.beside(now) {
        a += x;
        b += y;
        most = most.max((a as f64 / n - b as f64 / m).abs());
    }
    let root = (n * m / (n + m)).sqrt();
    Some((most, probability((root + 0.12 + 0.11 / root) * most)))
}

/// Q(λ) = 2 Σ (−1)^(k−1) exp(−2 k² λ²), the limit distribution of Kolmogorov (1933).
fn probability(lambda: f64) -> f64 {
    // The series needs many terms where the answer is 1 to many digits.
    if lambda < 0.2 {
        return 1.0;
    }
    let term = |k: i32| (if k % 2 == 1 { 2.0 } else { -2.0 }) * (-2.0 * f64::from(k * k) * lambda * lambda).exp();
    (1..=100).map(term).sum::<f64>().clamp(0.0, 1.0)
}

#[cfg(test)]
mod tests {
    use updraft_base::Key;
    use updraft_graph::Tensor;

    use super::*;
    use crate::rows::Cells;
    use crate::statistics::ColumnSummary;

    fn normal(seed: u64, count: u64, mean: f64, std: f64) -> ColumnStatistics {
        let key = Key::new(seed);
        let values: Vec<f64> = (0..count).map(|i| mean + std * f64::from(key.normal_f32(i))).collect();
        let mut summary = ColumnSummary::new("x");
        summary.push(&Cells::Numbers(Tensor::vector(&values))).unwrap();
        summary.finish()
    }

    #[test]
    fn draws_of_one_distribution_are_stable_and_of_two_are_not() {
        let before = normal(1, 20_000, 0.0, 1.0);
        let same = drift(&before, &normal(2, 20_000, 0.0, 1.0)).unwrap();
        assert!(same.psi < 0.01 && same.ks_p.unwrap() > 0.01, "{same:?}");
        let moved = drift(&before, &normal(2, 20_000, 1.0, 1.0)).unwrap();
        // Two normals one deviation apart differ most in the middle, by 2 Φ(1/2) − 1 = 0.3829.
        assert!((moved.ks.unwrap() - 0.3829).abs() < 0.02, "{moved:?}");
        // Over ever finer bins the index of two normals one deviation apart tends to 1, from below.
        assert!((0.8..1.05).contains(&moved.psi), "{moved:?}");
        assert!(moved.ks_p.unwrap() < 1e-9);
    }

    #[test]
    fn shares_of_values_give_the_index_computed_by_hand() {
        let column = |counts: [i64; 2]| {
            let values: Vec<i64> = (0..2).flat_map(|v| std::iter::repeat_n(v, counts[v as usize] as usize)).collect();
            let mut summary = ColumnSummary::new("label");
            summary.push(&Cells::Numbers(Tensor::vector(&values))).unwrap();
            summary.finish()
        };
        let found = drift(&column([50, 50]), &column([80, 20])).unwrap();
        let expected = 0.3 * (0.8f64 / 0.5).ln() - 0.3 * (0.2f64 / 0.5).ln();
        assert!((found.psi - expected).abs() < 1e-12 && (found.ks.unwrap() - 0.3).abs() < 1e-12, "{found:?}");
    }

    #[test]
    fn few_rows_of_one_distribution_are_stable_too() {
        let text = |seed: u64| {
            let names =
                (0..200).map(|i| bytes::Bytes::from(format!("{:016x}", Key::new(seed).child_index(i).to_u64())));
            let mut summary = ColumnSummary::new("name");
            summary.push(&Cells::Bytes(names.collect())).unwrap();
            summary.finish()
        };
        let names = drift(&text(1), &text(2)).unwrap();
        assert_eq!((names.of, names.psi), ("lengths", 0.0), "all names are new, as long as before");
        for count in [30, 200] {
            let again = |seed| drift(&normal(seed, count, 0.0, 1.0), &normal(100 + seed, count, 0.0, 1.0)).unwrap().psi;
            // Two to ten bins of at least 20 and 10 cells: chance makes a mean of at most 0.1.
            let mean = (0..40).map(again).sum::<f64>() / 40.0;
            assert!(mean < 0.15, "{count}: {mean}");
            let moved = drift(&normal(1, count, 0.0, 1.0), &normal(2, count, 1.5, 1.0)).unwrap();
            assert!(moved.psi > 0.5, "{count}: {moved:?}");
        }
    }

    #[test]
    fn probabilities_are_those_of_the_table_of_smirnov() {
        for (lambda, expected) in [(0.5, 0.9639), (0.83, 0.4962), (1.0, 0.2700), (1.36, 0.0494), (1.63, 0.0098)] {
            assert!((probability(lambda) - expected).abs() < 1e-4, "{lambda}: {}", probability(lambda));
        }
    }
}
