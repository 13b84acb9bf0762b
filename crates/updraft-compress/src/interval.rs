//! How sure a measured drop is, and when enough has been measured.
//!
//! Original and candidate answer the same samples, so what is compared are pairs: of accuracies, only the samples on
//! which the two differ carry information, and the interval of their difference is far narrower than that of either
//! accuracy. Looking at the data several times and stopping when the answer is clear would raise the chance of a wrong
//! answer; [`Looks`] divides that chance among the looks beforehand.

use serde::{Deserialize, Serialize};

/// Where the true value lies, with a confidence that is stated where the interval is made.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Interval {
    /// The value that the data suggests.
    pub estimate: f64,
    /// The lower end.
    pub low: f64,
    /// The upper end.
    pub high: f64,
}

impl Interval {
    /// A value that is known.
    pub fn exactly(value: f64) -> Interval {
        Interval { estimate: value, low: value, high: value }
    }
}

/// The difference of two shares on the same `samples`: `lost` are right in the first only, `gained` in the second only.
/// The result is the first share less the second, with two-sided confidence `1 - alpha`.
///
/// It is the score interval of Tango ("Equivalence test and confidence interval for the difference in proportions for
/// the paired-sample design", Statistics in Medicine 17, 1998): all differences that a score test does not reject. It
/// keeps its coverage where hardly any pair differs, which the difference's standard error does not.
pub fn paired_shares(lost: u64, gained: u64, samples: u64, alpha: f64) -> Interval {
    if samples == 0 {
        return Interval { estimate: 0.0, low: -1.0, high: 1.0 };
    }
    let (lost, gained, n) = (lost as f64, gained as f64, samples as f64);
    let z = normal_quantile(1.0 - alpha / 2.0);
    // How far the data lies above what a true difference `delta` lets expect, in standard errors; falls with `delta`.
    let score = |delta: f64| {
        // The likeliest share of `gained` pairs under that difference: the root of a quadratic.
        let b = (2.0 * n - lost + gained) * delta - lost - gained;
        let c = -gained * delta * (1.0 - delta);
        let share = ((b * b - 8.0 * n * c).max(0.0).sqrt() - b) / (4.0 * n);
        let variance = n * (2.0 * share + delta * (1.0 - delta));
        let excess = lost - gained - n * delta;
        if variance > 0.0 {
            excess / variance.sqrt()
        } else if excess == 0.0 {
            0.0
        } else {
            excess.signum() * f64::INFINITY
        }
    };
    let estimate = (lost - gained) / n;
    let low = crossing(-1.0, estimate, |delta| score(delta) > z);
    let high = crossing(estimate, 1.0, |delta| score(delta) > -z);
    Interval { estimate, low, high }
}

/// The mean of values with two-sided confidence `1 - alpha`, by Student's t.
pub fn mean(values: &[f64], alpha: f64) -> Interval {
    let n = values.len() as f64;
    let estimate = values.iter().sum::<f64>() / n;
    if values.len() < 2 {
        return Interval { estimate, low: f64::NEG_INFINITY, high: f64::INFINITY };
    }
    let variance = values.iter().map(|v| (v - estimate).powi(2)).sum::<f64>() / (n - 1.0);
    let reach = student_quantile(1.0 - alpha / 2.0, n - 1.0) * (variance / n).sqrt();
    Interval { estimate, low: estimate - reach, high: estimate + reach }
}

/// The rise of a mean relative to another on the same samples, `mean(second) / mean(first) - 1`, with two-sided
/// confidence `1 - alpha`: the ratio estimator and its linearised error (Cochran, "Sampling Techniques", 1977, 6.4).
pub fn relative_rise(first: &[f64], second: &[f64], alpha: f64) -> Interval {
    let base = first.iter().sum::<f64>() / first.len() as f64;
    let ratio = second.iter().sum::<f64>() / first.len() as f64 / base;
    let residuals: Vec<f64> = first.iter().zip(second).map(|(a, b)| (b - ratio * a) / base).collect();
    let error = mean(&residuals, alpha);
    Interval {
        estimate: ratio - 1.0,
        low: ratio - 1.0 + error.low - error.estimate,
        high: ratio - 1.0 + error.high - error.estimate,
    }
}

/// The median with two-sided confidence of at least `1 - alpha`, whatever the distribution: the ends are the order
/// statistics that the binomial distribution of the number of values below the median leaves (David and Nagaraja,
/// "Order Statistics", 2003, 7.1). Too few values for that confidence give their whole range.
pub fn median(values: &[f64], alpha: f64) -> Interval {
    let mut sorted = values.to_vec();
    sorted.sort_unstable_by(f64::total_cmp);
    let n = sorted.len();
    let Some(last) = n.checked_sub(1) else {
        return Interval { estimate: f64::NAN, low: f64::NEG_INFINITY, high: f64::INFINITY };
    };
    let estimate = (sorted[last / 2] + sorted[n / 2]) / 2.0;
    // The largest rank whose tail probability stays within alpha / 2.
    let (mut term, mut tail, mut rank) = (0.5f64.powi(n as i32), 0.0, 0);
    while tail + term <= alpha / 2.0 && rank < n / 2 {
        tail += term;
        term *= (n - rank) as f64 / (rank + 1) as f64;
        rank += 1;
    }
    let cut = rank.saturating_sub(1);
    Interval { estimate, low: sorted[cut], high: sorted[last - cut] }
}

/// What is known about `drop <= limit`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Verdict {
    /// The drop is within the limit.
    Within,
    /// The drop is beyond the limit.
    Beyond,
    /// The data does not tell.
    Unclear,
}

impl Verdict {
    /// What an interval of the drop says.
    pub fn of(drop: &Interval, limit: f64) -> Verdict {
        if drop.high <= limit {
            Verdict::Within
        } else if drop.low > limit {
            Verdict::Beyond
        } else {
            Verdict::Unclear
        }
    }
}

/// When the data is looked at, and how much of the chance of a wrong answer each look may take.
///
/// The numbers of samples double from look to look, and the shares add up to `alpha`, so by the union bound all
/// intervals hold together with confidence `1 - alpha`, whatever their dependence (the group-sequential designs of Lan
/// and DeMets, Biometrika 70, 1983, spend alike). The last look takes half: what is close is decided with all samples,
/// and what is clear is clear under a stricter bound too. Looks do not depend on the limit, so what was measured
/// for one limit serves any other.
#[derive(Debug, Clone, PartialEq)]
pub struct Looks {
    looks: Vec<Look>,
}

/// One look.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Look {
    /// Samples seen by then.
    pub samples: u64,
    /// The chance of a wrong answer that it may take.
    pub alpha: f64,
}

impl Looks {
    /// Looks from `first` samples on to all `samples`.
    pub fn new(first: u64, samples: u64, alpha: f64) -> Looks {
        let mut counts: Vec<u64> = std::iter::successors(Some(first.max(1)), |n| n.checked_mul(2))
            // A look at little less than everything is better spent on everything.
            .take_while(|n| n.saturating_mul(3) / 2 < samples)
            .collect();
        counts.push(samples);
        let early = counts.len() - 1;
        let share = |i: usize| match (early, i == early) {
            (0, _) => alpha,
            (_, true) => alpha / 2.0,
            (_, false) => alpha / 2.0 / early as f64,
        };
        Looks { looks: counts.iter().enumerate().map(|(i, n)| Look { samples: *n, alpha: share(i) }).collect() }
    }

    /// The looks, in order.
    pub fn iter(&self) -> impl Iterator<Item = Look> + '_ {
        self.looks.iter().copied()
    }

    /// The chance that the last look may take.
    pub fn last_alpha(&self) -> f64 {
        self.looks.last().map_or(1.0, |l| l.alpha)
    }
}

/// The fewest samples that can show a drop of shares to be within `limit`: as many as it takes when no pair differs. None
/// for a limit that no number shows.
pub fn samples_needed(limit: f64, alpha: f64) -> Option<u64> {
    // With no differing pair Tango's upper end is z^2 / (n + z^2).
    let z = normal_quantile(1.0 - alpha / 2.0);
    (limit > 0.0).then(|| (z * z * (1.0 - limit) / limit).max(0.0).ceil() as u64)
}

/// The value that a standard normal number does not exceed with probability `p`.
pub fn normal_quantile(p: f64) -> f64 {
    // Doubles have no normal tail beyond 39.
    crossing(-39.0, 39.0, |x| 0.5 * libm::erfc(-x / std::f64::consts::SQRT_2) < p)
}

/// The value that Student's t with so many degrees of freedom does not exceed with probability `p`, at least one half.
fn student_quantile(p: f64, degrees: f64) -> f64 {
    let below = |t: f64| 1.0 - 0.5 * incomplete_beta(degrees / 2.0, 0.5, degrees / (degrees + t * t));
    crossing(0.0, 1e9, |t| below(t) < p)
}

/// The regularised incomplete beta function I_x(a, b), by its continued fraction (DLMF 8.17.22) evaluated from the front
/// (Lentz, Applied Optics 15, 1976).
fn incomplete_beta(a: f64, b: f64, x: f64) -> f64 {
    if x <= 0.0 || x >= 1.0 {
        return x.clamp(0.0, 1.0);
    }
    // The fraction converges fast below the mean; the other side follows by symmetry.
    if x > (a + 1.0) / (a + b + 2.0) {
        return 1.0 - incomplete_beta(b, a, 1.0 - x);
    }
    const TERMS_MAX: usize = 10_000;
    let guard = |v: f64| if v.abs() < 1e-300 { 1e-300 } else { v };
    let log_front = libm::lgamma(a + b) - libm::lgamma(a) - libm::lgamma(b) + a * x.ln() + b * libm::log1p(-x);
    let (mut c, mut d) = (1.0, 1.0 / guard(1.0 - (a + b) * x / (a + 1.0)));
    let mut fraction = d;
    for m in (1..TERMS_MAX).map(|m| m as f64) {
        let even = m * (b - m) * x / ((a + 2.0 * m - 1.0) * (a + 2.0 * m));
        let odd = -(a + m) * (a + b + m) * x / ((a + 2.0 * m) * (a + 2.0 * m + 1.0));
        let mut step = 1.0;
        for term in [even, odd] {
            d = 1.0 / guard(1.0 + term * d);
            c = guard(1.0 + term / c);
            step = c * d;
            fraction *= step;
        }
        if (step - 1.0).abs() < 1e-15 {
            break;
        }
    }
    log_front.exp() * fraction / a
}

/// Where a condition that holds at `low` and below ceases to hold, by bisection to the last bit.
fn crossing(mut low: f64, mut high: f64, holds: impl Fn(f64) -> bool) -> f64 {
    // An interval of doubles halves at most about 1,100 times.
    for _ in 0..1100 {
        let middle = low + (high - low) / 2.0;
        if middle <= low || middle >= high {
            break;
        }
        if holds(middle) {
            low = middle;
        } else {
            high = middle;
        }
    }
    high
}

#[cfg(test)]
mod tests {
    use updraft_base::Key;

    use super::*;

    #[test]
    fn quantiles_are_those_of_the_tables() {
        for (p, expected) in [(0.5, 0.0), (0.975, 1.959_963_985), (0.995, 2.575_829_304), (0.9995, 3.290_526_731)] {
            assert!((normal_quantile(p) - expected).abs() < 1e-8, "{p}: {}", normal_quantile(p));
        }
        for (degrees, expected) in
            [(1.0, 12.706_204_736), (5.0, 2.570_581_836), (30.0, 2.042_272_456), (1e6, 1.959_966)]
        {
            assert!((student_quantile(0.975, degrees) - expected).abs() < 1e-6, "{degrees}");
        }
    }

    #[test]
    fn two_models_that_never_differ_are_told_apart_only_by_the_number_of_samples() {
        let z = normal_quantile(0.975);
        for n in [10u64, 500, 10_000] {
            let interval = paired_shares(0, 0, n, 0.05);
            let expected = z * z / (n as f64 + z * z);
            assert!((interval.high - expected).abs() < 1e-9 && (interval.low + expected).abs() < 1e-9, "{interval:?}");
        }
        assert_eq!(samples_needed(0.01, 0.05), Some(381));
        assert!(paired_shares(0, 0, 381, 0.05).high <= 0.01 && paired_shares(0, 0, 380, 0.05).high > 0.01);
        assert_eq!(samples_needed(0.0, 0.05), None);
    }

    #[test]
    fn swapping_the_models_mirrors_the_interval() {
        for (lost, gained, n) in [(3, 1, 44), (0, 7, 100), (10, 10, 20)] {
            let (a, b) = (paired_shares(lost, gained, n, 0.05), paired_shares(gained, lost, n, 0.05));
            assert!((a.low + b.high).abs() < 1e-9 && (a.high + b.low).abs() < 1e-9, "{a:?} {b:?}");
        }
    }

    /// Exact, by summing the trinomial distribution over all outcomes: no simulation error.
    #[test]
    fn the_paired_interval_covers_the_truth() {
        const N: u64 = 60;
        let logs: Vec<f64> = (0..=N).map(|k| libm::lgamma(k as f64 + 1.0)).collect();
        let intervals: Vec<Vec<Interval>> =
            (0..=N).map(|l| (0..=N - l).map(|g| paired_shares(l, g, N, 0.05)).collect()).collect();
        for (lost, gained) in [(0.02, 0.02), (0.05, 0.02), (0.1, 0.1), (0.3, 0.1), (0.01, 0.2)] {
            let mut covered = 0.0;
            for l in 0..=N {
                for g in 0..=N - l {
                    let rest = N - l - g;
                    let (x, y, z) = (l as f64, g as f64, rest as f64);
                    let log = logs[N as usize] - logs[l as usize] - logs[g as usize] - logs[rest as usize]
                        + x * f64::ln(lost)
                        + y * f64::ln(gained)
                        + z * f64::ln(1.0 - lost - gained);
                    let interval = intervals[l as usize][g as usize];
                    if interval.low <= lost - gained && lost - gained <= interval.high {
                        covered += log.exp();
                    }
                }
            }
            // The score interval holds its level on average; with counts this small it wavers by up to two points.
            assert!(covered > 0.93, "{lost} {gained}: {covered}");
        }
    }

    #[test]
    fn the_mean_and_the_relative_rise_cover_the_truth() {
        const RUNS: u64 = 2000;
        let (mut mean_hits, mut rise_hits) = (0, 0);
        for run in 0..RUNS {
            let key = Key::new(11).child_index(run);
            // Losses of the original between 0.5 and 1.5; the candidate's are 10 % higher, plus noise of mean zero.
            let first: Vec<f64> = (0..80).map(|i| 0.5 + f64::from(key.uniform_f32(i))).collect();
            let noise: Vec<f64> = (0..80).map(|i| 0.2 * f64::from(key.normal_f32(1000 + i))).collect();
            let second: Vec<f64> = first.iter().zip(&noise).map(|(a, e)| 1.1 * a + e).collect();
            let interval = mean(&noise, 0.05);
            mean_hits += u64::from(interval.low <= 0.0 && 0.0 <= interval.high);
            let interval = relative_rise(&first, &second, 0.05);
            rise_hits += u64::from(interval.low <= 0.1 && 0.1 <= interval.high);
        }
        // Five standard errors of a share of 0.95 over 2,000 runs are 0.024.
        for hits in [mean_hits, rise_hits] {
            assert!((hits as f64 / RUNS as f64 - 0.95).abs() < 0.024, "{hits}");
        }
    }

    #[test]
    fn the_median_covers_the_truth_and_ignores_outliers() {
        const RUNS: u64 = 2000;
        let mut hits = 0;
        for run in 0..RUNS {
            let key = Key::new(12).child_index(run);
            // Uniform on [0, 1) with one in ten values far above: the median of the mixture is 0.5 / 0.9.
            let values: Vec<f64> = (0..31)
                .map(|i| if key.below(500 + i, 10) == 0 { 1e6 } else { f64::from(key.uniform_f32(i)) })
                .collect();
            let interval = median(&values, 0.05);
            hits += u64::from(interval.low <= 0.5 / 0.9 && 0.5 / 0.9 <= interval.high);
        }
        assert!(hits as f64 / RUNS as f64 > 0.94, "{hits}");
        assert_eq!(median(&[3.0, 1.0, 2.0], 0.05), Interval { estimate: 2.0, low: 1.0, high: 3.0 });
    }

    /// Runs the looks over pairs of which a share `lost` and a share `gained` differ.
    fn sequential(key: &Key, lost: f64, gained: f64, looks: &Looks, limit: f64) -> (Verdict, u64) {
        let (mut l, mut g, mut seen) = (0, 0, 0);
        for look in looks.iter() {
            for i in seen..look.samples {
                let u = f64::from(key.uniform_f32(i));
                l += u64::from(u < lost);
                g += u64::from(u >= lost && u < lost + gained);
            }
            seen = look.samples;
            let verdict = Verdict::of(&paired_shares(l, g, seen, look.alpha), limit);
            if verdict != Verdict::Unclear {
                return (verdict, seen);
            }
        }
        (Verdict::Unclear, seen)
    }

    #[test]
    fn stopping_early_keeps_the_chance_of_a_wrong_answer() {
        const RUNS: u64 = 1000;
        let looks = Looks::new(250, 4000, 0.05);
        // The true drop is the limit itself, and a hair beyond it: the hardest cases, where any answer may be wrong.
        for (lost, gained) in [(0.02, 0.01), (0.06, 0.05), (0.0101, 0.0001)] {
            let wrong = (0..RUNS)
                .filter(|run| {
                    let key = Key::new(13).child_index(*run);
                    sequential(&key, lost, gained, &looks, 0.01).0 != Verdict::Unclear
                })
                .count();
            // Both ways of being wrong together may take 0.05; five standard errors more are 0.034.
            assert!(wrong as f64 / RUNS as f64 <= 0.05 + 0.034, "{lost} {gained}: {wrong}");
        }
    }

    #[test]
    fn clear_answers_need_a_fraction_of_the_samples() {
        let looks = Looks::new(250, 10_000, 0.05);
        let samples = |lost: f64, gained: f64, expected: Verdict| -> f64 {
            let mut total = 0;
            for run in 0..50 {
                let (verdict, seen) = sequential(&Key::new(14).child_index(run), lost, gained, &looks, 0.01);
                assert_eq!(verdict, expected, "{lost} {gained}");
                total += seen;
            }
            total as f64 / 50.0
        };
        assert!(samples(0.10, 0.01, Verdict::Beyond) < 700.0);
        assert!(samples(0.001, 0.001, Verdict::Within) < 2500.0);
    }

    #[test]
    fn looks_double_and_spend_all_of_alpha() {
        for (first, samples) in [(250, 10_000), (250, 300), (500, 100), (64, 2000)] {
            let looks = Looks::new(first, samples, 0.05);
            let total: f64 = looks.iter().map(|l| l.alpha).sum();
            assert!((total - 0.05).abs() < 1e-12);
            let counts: Vec<u64> = looks.iter().map(|l| l.samples).collect();
            assert!(counts.is_sorted() && counts.last() == Some(&samples), "{counts:?}");
        }
    }
}
