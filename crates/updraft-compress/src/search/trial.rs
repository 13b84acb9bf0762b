//! What a search finds out about candidates.

use serde::{Deserialize, Serialize};

use super::Objective;
use crate::candidate::Candidate;
use crate::interval::Interval;

/// One candidate and all that was found out about it.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Trial {
    /// What was tried.
    pub candidate: Candidate,
    /// What it is called.
    pub name: String,
    /// Why it was tried.
    pub reason: String,
    /// The size of its file.
    pub size_bytes: Option<u64>,
    /// How far its outputs are from the original's.
    pub divergence: Option<f64>,
    /// Its drop on the search split.
    pub search: Option<Judgement>,
    /// Its drop on the holdout split.
    pub holdout: Option<Judgement>,
    /// Its speed.
    pub speed: Option<Speed>,
    /// Why it cannot be used.
    pub refused: Option<String>,
}

/// A model that was made.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Made {
    /// The size of its file.
    pub size_bytes: u64,
    /// What became of its units.
    pub decisions: Vec<Decision>,
}

/// What is known about a drop.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Judgement {
    /// The drop.
    pub drop: Interval,
    /// Samples that were looked at.
    pub samples: u64,
    /// The original's metric on them.
    pub original: f64,
    /// The candidate's.
    pub candidate: f64,
}

/// How fast a model is.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Speed {
    /// Time of one answer over the original's.
    pub latency_ratio: Interval,
    /// Time of one answer, in nanoseconds.
    pub latency_ns: Interval,
    /// Machine time a sample in large batches, in nanoseconds; `None` where the model's batch is fixed.
    pub cost_ns: Option<Interval>,
}

/// One unit, and what quantizing it alone does.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct UnitSensitivity {
    /// Its label.
    pub unit: String,
    /// Its operator.
    pub op: String,
    /// Its share of the model's operations.
    pub flops_share: f64,
    /// The divergence of the outputs with only this unit quantized.
    pub divergence: f64,
}

/// What became of a unit in the chosen model.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Decision {
    /// The unit.
    pub unit: String,
    /// Its form: `int8`, `float`.
    pub form: String,
    /// Why.
    pub reason: String,
}

impl Speed {
    /// Whether a model may be chosen: where time is what counts, only one that is certainly no slower than the original.
    pub(super) fn is_allowed(&self, objective: Objective) -> bool {
        match objective {
            Objective::Latency => self.latency_ratio.high <= 1.0,
            Objective::Size | Objective::Cost => true,
        }
    }
}

impl Trial {
    /// What an objective wants to be small.
    pub fn objective(&self, objective: Objective) -> Option<f64> {
        match objective {
            Objective::Latency => Some(self.speed.as_ref()?.latency_ratio.estimate),
            Objective::Size => Some(self.size_bytes? as f64),
            Objective::Cost => Some(self.speed.as_ref()?.cost_ns?.estimate),
        }
    }

    /// Drop, latency, size, cost: what the front is about.
    pub(super) fn point(&self) -> Option<[f64; 4]> {
        let speed = self.speed.as_ref().filter(|_| self.refused.is_none())?;
        let cost = speed.cost_ns.map_or(speed.latency_ns.estimate, |c| c.estimate);
        Some([self.search.as_ref()?.drop.estimate, speed.latency_ratio.estimate, self.size_bytes? as f64, cost])
    }
}

/// One line about it, for those who watch.
pub(super) fn describe(trial: &Trial) -> String {
    let mut parts = vec![trial.name.clone()];
    if let Some(judgement) = &trial.search {
        let Interval { estimate, low, high } = judgement.drop;
        parts.push(format!(
            "drop {:.2} % ({:.2} to {:.2}) on {} samples",
            100.0 * estimate,
            100.0 * low,
            100.0 * high,
            judgement.samples
        ));
    }
    if let Some(speed) = &trial.speed {
        parts.push(format!("{:.2} of the time", speed.latency_ratio.estimate));
    }
    if let Some(size_bytes) = trial.size_bytes {
        parts.push(updraft_base::units::bytes(size_bytes));
    }
    parts.join(", ")
}
