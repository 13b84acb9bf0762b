//! What a run has been through: curves for reports, kept in every checkpoint so that a resumed run tells all of it.

use serde::{Deserialize, Serialize};

use crate::metrics::Metrics;

/// Points that a loss curve holds at most: more than a plot has pixels, and some tens of kilobytes in a checkpoint.
const CURVE_POINTS_MAX: usize = 1024;

/// The course of a run up to some step.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct History {
    /// The training loss.
    pub loss: LossCurve,
    /// Evaluations on the validation data, oldest first.
    pub evaluations: Vec<Evaluation>,
}

/// One evaluation during training.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Evaluation {
    /// Steps that were done.
    pub step: u64,
    /// What was measured.
    pub metrics: Metrics,
}

/// The training loss over any number of steps in bounded space: each point is the mean over `stride` steps, and the
/// stride doubles whenever the points run out.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct LossCurve {
    stride: u64,
    points: Vec<LossPoint>,
    sum: f64,
    count: u64,
}

/// The mean training loss of some consecutive steps.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct LossPoint {
    /// The last of the steps, counted from 1.
    pub step: u64,
    /// The mean of their losses.
    pub loss: f64,
}

impl Default for LossCurve {
    fn default() -> LossCurve {
        LossCurve { stride: 1, points: Vec::new(), sum: 0.0, count: 0 }
    }
}

impl LossCurve {
    /// Takes the loss of step `step`, counted from 1; steps come in order and none is left out.
    pub fn push(&mut self, step: u64, loss: f64) {
        self.sum += loss;
        self.count += 1;
        if self.count == self.stride {
            self.points.push(LossPoint { step, loss: self.sum / self.count as f64 });
            (self.sum, self.count) = (0.0, 0);
        }
        if self.points.len() == CURVE_POINTS_MAX {
            self.points = self
                .points
                .chunks_exact(2)
                .map(|pair| LossPoint { step: pair[1].step, loss: (pair[0].loss + pair[1].loss) / 2.0 })
                .collect();
            self.stride *= 2;
        }
    }

    /// The points, oldest first; steps since the last full stride are not among them.
    pub fn points(&self) -> &[LossPoint] {
        &self.points
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_curve_stays_small_and_keeps_the_mean() {
        let mut curve = LossCurve::default();
        let steps = 10 * CURVE_POINTS_MAX as u64;
        // A loss equal to the step: the mean of a stride lies in its middle.
        (1..=steps).for_each(|step| curve.push(step, step as f64));
        assert!(curve.points().len() < CURVE_POINTS_MAX);
        assert_eq!(curve.stride, 16);
        for point in curve.points() {
            assert_eq!(point.loss, point.step as f64 - 7.5);
        }
    }
}
