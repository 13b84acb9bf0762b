//! The section `[optimize]`: what may be lost, and what is to be won.

use std::str::FromStr;

use serde::{Deserialize, Serialize};
use updraft_compress::arithmetic::Target;
use updraft_compress::measure::Metric;
use updraft_compress::search::Objective;

/// How a trained model is made smaller or faster.
///
/// ```toml
/// [optimize]
/// max_drop = "0.5%"
/// objective = "latency"
/// time_limit = "3m"
/// ```
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct OptimizeSection {
    /// The drop that is allowed: points of accuracy, or the relative rise of the perplexity or the loss.
    pub max_drop: Percent,
    /// What is to be small.
    pub objective: Objective,
    /// When the search ends at the latest.
    pub time_limit: TimeLimit,
    /// The kind of processor that the model is meant for; without it, this machine.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub target: Option<Target>,
    /// What a drop is a drop of; without it, what suits the loss and the output.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub metric: Option<Metric>,
    /// The chance that any statement about a drop is wrong.
    pub alpha: f64,
    /// Samples of the training data that ranges are calibrated on.
    pub calibration_samples: u64,
    /// Samples that are answered at once where the cost is measured.
    pub cost_batch: usize,
    /// Training steps with the rounding in the loop, where integers miss the limit; without it, as many as pruning is
    /// followed by.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub aware_steps: Option<u64>,
    /// Pruning to try.
    pub prune: PruneSection,
}

/// Pruning to try.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct PruneSection {
    /// Shares of channels, in growing order.
    pub ratios: Vec<f64>,
    /// Training steps that follow, with the original as the teacher; without it, one epoch, at most 500 steps.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub recovery_steps: Option<u64>,
    /// Their learning rate at its highest; without it, a third of the training's.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub learning_rate: Option<f64>,
}

impl Default for OptimizeSection {
    fn default() -> OptimizeSection {
        OptimizeSection {
            max_drop: Percent(0.01),
            objective: Objective::Latency,
            time_limit: TimeLimit { seconds: 1800 },
            target: None,
            metric: None,
            alpha: 0.05,
            calibration_samples: 512,
            cost_batch: 32,
            aware_steps: None,
            prune: PruneSection::default(),
        }
    }
}

impl Default for PruneSection {
    fn default() -> PruneSection {
        PruneSection { ratios: vec![0.25, 0.5, 0.75], recovery_steps: None, learning_rate: None }
    }
}

impl OptimizeSection {
    /// What types cannot say: the key, and what is wrong with it.
    pub(super) fn check(&self) -> Result<(), (&'static str, String)> {
        let ratios = &self.prune.ratios;
        if !ratios.iter().all(|r| *r > 0.0 && *r < 1.0) || !ratios.is_sorted_by(|a, b| a < b) {
            return Err(("optimize.prune.ratios", "must be shares between 0 and 1, in growing order".into()));
        }
        if !(self.alpha > 0.0 && self.alpha <= 0.5) {
            return Err(("optimize.alpha", "must be above 0 and at most 0.5".into()));
        }
        if self.calibration_samples == 0 {
            return Err(("optimize.calibration_samples", "must be at least 1".into()));
        }
        if self.cost_batch == 0 {
            return Err(("optimize.cost_batch", "must be at least 1".into()));
        }
        if self.prune.learning_rate.is_some_and(|r| !(r > 0.0 && r.is_finite())) {
            return Err(("optimize.prune.learning_rate", "must be above 0".into()));
        }
        Ok(())
    }
}

/// A share, written in percent: `0.5%`.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Percent(pub f64);

/// A duration, written with its unit: `90s`, `30m`, `2h`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct TimeLimit {
    /// How long.
    pub seconds: u64,
}

impl FromStr for Percent {
    type Err = String;

    fn from_str(text: &str) -> Result<Percent, String> {
        let number = text.trim().strip_suffix('%').and_then(|n| n.trim().parse::<f64>().ok());
        match number.filter(|n| (0.0..=100.0).contains(n)) {
            Some(number) => Ok(Percent(number / 100.0)),
            None => Err(format!("`{text}` is not a percentage from 0 to 100 such as `1%` or `0.5%`")),
        }
    }
}

impl FromStr for TimeLimit {
    type Err = String;

    fn from_str(text: &str) -> Result<TimeLimit, String> {
        let units = [('s', 1), ('m', 60), ('h', 3600)];
        let parsed = units.into_iter().find_map(|(unit, seconds)| {
            text.trim().strip_suffix(unit)?.trim().parse::<u64>().ok()?.checked_mul(seconds)
        });
        // A year is more than any search takes, and far from where nanoseconds overflow.
        match parsed.filter(|s| (1..=31_536_000).contains(s)) {
            Some(seconds) => Ok(TimeLimit { seconds }),
            None => Err(format!("`{text}` is not a time such as `90s`, `30m` or `2h`")),
        }
    }
}

impl TryFrom<String> for Percent {
    type Error = String;

    fn try_from(text: String) -> Result<Percent, String> {
        text.parse()
    }
}

impl TryFrom<String> for TimeLimit {
    type Error = String;

    fn try_from(text: String) -> Result<TimeLimit, String> {
        text.parse()
    }
}

impl From<Percent> for String {
    fn from(percent: Percent) -> String {
        format!("{}%", 100.0 * percent.0)
    }
}

impl From<TimeLimit> for String {
    fn from(limit: TimeLimit) -> String {
        format!("{}s", limit.seconds)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shares_and_times_are_read_with_their_units_only() {
        for (text, expected) in [("1%", 0.01), ("0.5 %", 0.005), ("0%", 0.0)] {
            assert!((text.parse::<Percent>().unwrap().0 - expected).abs() < 1e-15);
        }
        for (text, seconds) in [("90s", 90), ("30m", 1800), ("2h", 7200)] {
            assert_eq!(text.parse(), Ok(TimeLimit { seconds }));
        }
        for text in ["1", "0.01", "101%", "-1%", "one%", "%"] {
            assert!(text.parse::<Percent>().unwrap_err().contains("`1%`"), "{text}");
        }
        for text in ["30", "0s", "1.5h", "m", "99999999999999999999h", "-3m"] {
            assert!(text.parse::<TimeLimit>().unwrap_err().contains("`30m`"), "{text}");
        }
    }
}
